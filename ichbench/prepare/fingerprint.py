"""The training cases in numbers: spacings, shapes and foreground intensities (nnU-Net's dataset_fingerprint.json).

It is taken after the paper's flags have acted, because those change spacing, shape and grey values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case
from ichbench.cases.files import read_json
from ichbench.errors import InputError
from ichbench.prepare.crop import extent, slices

#: nnU-Net draws this many foreground voxels in all, shared evenly between the cases
N_SAMPLES = 10**8
SEED = 1234
CHUNK = 2**20
#: what is known of each channel, in nnU-Net's order
STATISTICS = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
#: voxels along an axis, and mm, that no scan exceeds (nnU-Net gives the slice of a single picture 999 mm and more)
MOST_VOXELS, MOST_MM = 10**6, 1e6

Counted = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Fingerprint:
    """What planning and CT normalisation know of a cohort; one entry a case, in the order of the cases.

    spacings                 mm, (z, y, x), before cropping
    shapes_after_crop        voxels, (z, y, x), of the nonzero box
    intensities              channel index as text -> mean, median, std, min, max, percentile_00_5, percentile_99_5 of the foreground
    median_relative_size     median over cases of voxels after / before the crop
    """

    spacings: tuple[tuple[float, float, float], ...]
    shapes_after_crop: tuple[tuple[int, int, int], ...]
    intensities: Mapping[str, Mapping[str, float]]
    median_relative_size: float

    def to_json(self) -> dict[str, Any]:
        """nnU-Net's key names."""
        return {
            "foreground_intensity_properties_per_channel": {key: dict(value) for key, value in self.intensities.items()},
            "median_relative_size_after_cropping": self.median_relative_size,
            "shapes_after_crop": [list(shape) for shape in self.shapes_after_crop],
            "spacings": [list(spacing) for spacing in self.spacings],
        }

    def to_text(self) -> str:
        """The file that nnU-Net writes: four spaces, keys sorted."""
        return json.dumps(self.to_json(), indent=4)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_json` or nnU-Net wrote; `InputError` where something is missing or cannot have been measured."""
        if not isinstance(table, Mapping):
            raise InputError(f"not a dataset fingerprint: it is a {type(table).__name__}, not a table; take it again")
        try:
            found = cls(
                tuple((float(z), float(y), float(x)) for z, y, x in table["spacings"]),
                tuple((_whole(z), _whole(y), _whole(x)) for z, y, x in table["shapes_after_crop"]),
                {str(key): {name: float(one) for name, one in value.items()} for key, value in _sorted_channels(table)},
                float(table["median_relative_size_after_cropping"]),
            )
            wrong = _wrong(found)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            wrong = repr(error)
        if wrong:
            raise InputError(f"not a dataset fingerprint: {wrong}; take it again")
        return found


def read_fingerprint(path: Path, n_cases: int | None = None) -> Fingerprint:
    """A fingerprint file, ours or nnU-Net's, of that many cases if they are given; `InputError` where it is not one."""
    table = read_json(path, "give a dataset_fingerprint.json")
    try:
        found = Fingerprint.from_json(table)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if n_cases is not None and len(found.spacings) != n_cases:
        raise InputError(f"{path}: was taken of {len(found.spacings)} cases, but there are {n_cases} training cases; take it again")
    return found


@dataclass(frozen=True)
class CaseFacts:
    """One case's share of the fingerprint; `foreground` (channels, voxels) are its values where a label is above 0."""

    spacing_zyx_mm: tuple[float, float, float]
    shape_after_crop: tuple[int, int, int]
    relative_size: float
    foreground: NDArray[np.float32]


def case_facts(case: Case) -> CaseFacts:
    """Measure one case (after the flags). All labels above 0 are foreground, an ignore label included, as in nnU-Net."""
    if case.labels_zyx is None:
        raise InputError(f"case {case.id} has no labels; a fingerprint is taken over labelled training cases")
    # without its holes filled, which cannot enlarge the box
    box = extent((case.image_czyx != 0).any(axis=0))
    shape = (box[0][1] - box[0][0], box[1][1] - box[1][0], box[2][1] - box[2][0])
    inside = slices(box)
    values = case.image_czyx[(slice(None), *inside)][:, case.labels_zyx[inside] > 0]
    return CaseFacts(case.grid.spacing_zyx_mm, shape, float(np.prod(shape)) / float(np.prod(case.grid.shape_zyx)), values)


def fingerprint(cases: Iterable[Case], sampled: bool = False, n_samples: int = N_SAMPLES) -> Fingerprint:
    """Fingerprint of training cases that the flags have already acted on (`pipeline.flagged_case`).

    nnU-Net draws n_samples // n_cases foreground voxels with replacement from each case, so a case counts the same
    whatever the size of its bleed. By default the law of that draw is evaluated exactly, from the counted values, each
    case weighing the same: deterministic, fast, and what nnU-Net's numbers converge to. `sampled=True` repeats
    nnU-Net's draw itself and so gives its file to the last digit (0.8 GB at its 1e8 samples, and some seconds a channel).
    """
    return combine((case_facts(case) for case in cases), sampled, n_samples)


def combine(facts: Iterable[CaseFacts], sampled: bool = False, n_samples: int = N_SAMPLES, workers: int = 1) -> Fingerprint:
    """Fingerprint from what `case_facts` found, in the order of the cases (they may have been measured in parallel).

    workers  threads for the draw, which changes nothing but the time
    """
    found = list(facts)
    if not found:
        raise InputError("there are no training cases to take a fingerprint of")
    with_foreground = [one.foreground for one in found if one.foreground.shape[1] > 0]
    if not with_foreground:
        raise InputError(f"none of the {len(found)} training cases has a labelled voxel after the flags; training needs at least one")
    if len({len(one) for one in with_foreground}) != 1:
        raise InputError(f"the training cases have different numbers of channels: {sorted({len(one) for one in with_foreground})}")
    if sampled:
        drawn = _nnunet_statistics([one.foreground for one in found], n_samples // len(found), workers)
        intensities = {str(index): facts for index, facts in enumerate(drawn)}
    else:
        channels = range(len(with_foreground[0]))
        intensities = {str(index): _law_statistics([one[index] for one in with_foreground]) for index in channels}
    return Fingerprint(
        tuple(one.spacing_zyx_mm for one in found),
        tuple(one.shape_after_crop for one in found),
        intensities,
        float(np.median([one.relative_size for one in found])),
    )


def _law_statistics(cases: list[NDArray[np.float32]]) -> dict[str, float]:
    """Statistics of "pick a case, then one of its foreground voxels"."""
    counted = [np.unique(values, return_counts=True) for values in cases]
    values = np.concatenate([value for value, _ in counted]).astype(np.float64)
    weights = np.concatenate([count / (count.sum() * len(counted)) for _, count in counted])
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    mean = float(np.sum(weights * values))
    reached = np.cumsum(weights)
    return {
        "max": float(values[-1]),
        "mean": mean,
        "median": _quantile(values, reached, 0.5),
        "min": float(values[0]),
        "percentile_00_5": _quantile(values, reached, 0.005),
        "percentile_99_5": _quantile(values, reached, 0.995),
        "std": float(np.sqrt(np.sum(weights * (values - mean) ** 2))),
    }


def _quantile(values: NDArray[np.float64], reached: NDArray[np.float64], share: float) -> float:
    """Smallest value at which the cumulative weight reaches `share`; half way to the next where it is hit exactly."""
    at = min(int(np.searchsorted(reached, share - 1e-12)), len(values) - 1)
    if abs(reached[at] - share) <= 1e-12 and at + 1 < len(values):
        return float((values[at] + values[at + 1]) / 2)
    return float(values[at])


def _nnunet_statistics(cases: list[NDArray[np.float32]], n: int, workers: int) -> Iterator[dict[str, float]]:
    """Per channel the statistics of n values of each case, drawn with replacement, as numpy finds them for nnU-Net.

    The generator starts anew for each case, not for each channel. Where a case has no foreground, nnU-Net's pool becomes
    float64 and its sums with it; else they are float32 and so differ in the 7th digit.
    """
    # nnU-Net's numbers come from this legacy generator, so the same one is needed to repeat them
    filled = [(channels, np.random.RandomState(SEED)) for channels in cases if channels.shape[1] > 0]
    pool: NDArray[Any] = np.empty(n * len(filled), dtype=np.float32 if len(filled) == len(cases) else np.float64)
    with ThreadPoolExecutor(workers) as threads:
        for index in range(len(filled[0][0])):
            jobs = [
                threads.submit(_draw, channels[index], generator, pool[place * n : (place + 1) * n])
                for place, (channels, generator) in enumerate(filled)
            ]
            yield _pool_statistics(pool, [job.result() for job in jobs])


def _draw(values: NDArray[np.float32], generator: np.random.RandomState, out: NDArray[np.floating]) -> Counted:
    """Fill `out` as `generator.choice(values, len(out))` would; returns the distinct values and how often each was drawn."""
    drawn = np.zeros(len(values), dtype=np.int64)
    for start in range(0, len(out), CHUNK):
        part = out[start : start + CHUNK]
        picked = generator.randint(0, len(values), size=len(part))
        part[:] = values[picked]
        drawn += np.bincount(picked, minlength=len(values))
    distinct, inverse = np.unique(values, return_inverse=True)
    # counts stay below 2**53, so float64 holds them exactly
    return distinct, np.bincount(inverse, weights=drawn).astype(np.int64)


def _pool_statistics(pool: NDArray[np.floating], counted: list[Counted]) -> dict[str, float]:
    """Sums over the pool itself, because their rounding depends on its order; percentiles from the counts, which is exact."""
    values, counts = np.concatenate([one for one, _ in counted]), np.concatenate([one for _, one in counted])
    values, counts = values[counts > 0], counts[counts > 0]
    order = np.argsort(values, kind="stable")
    values, reached = values[order].astype(pool.dtype), np.cumsum(counts[order])
    return {
        "max": float(values[-1]),
        "mean": float(pool.mean()),
        "median": _percentile(values, reached, 50.0),
        "min": float(values[0]),
        "percentile_00_5": _percentile(values, reached, 0.5),
        "percentile_99_5": _percentile(values, reached, 99.5),
        "std": float(pool.std()),
    }


def _percentile(values: NDArray[np.floating], reached: NDArray[np.int64], percent: float) -> float:
    """numpy's linear percentile of sorted values that fill the ranks below `reached`, to the last bit."""
    at = float((int(reached[-1]) - 1) * np.true_divide(percent, 100))
    below, share = int(at), at - int(at)
    low, high = values[np.searchsorted(reached, [below, min(below + 1, int(reached[-1]) - 1)], side="right")]
    step = float(high - low)
    # numpy starts from the nearer end
    return float(low) + step * share if share < 0.5 else float(high) - step * (1 - share)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"whole numbers are needed, not {value!r}")
    return int(value)


def _wrong(found: Fingerprint) -> str | None:
    """What cannot have been measured, in words."""
    for spacing in found.spacings:
        if not all(0 < value <= MOST_MM for value in spacing):
            return f"the spacing {list(spacing)} is not three positive numbers in mm"
    for shape in found.shapes_after_crop:
        if not all(1 <= n <= MOST_VOXELS for n in shape):
            return f"the shape {list(shape)} is not three numbers of voxels from 1 to {MOST_VOXELS}"
    if not len(found.spacings) == len(found.shapes_after_crop) > 0:
        return f"it has {len(found.spacings)} spacings and {len(found.shapes_after_crop)} shapes; each case needs one of both"
    if list(found.intensities) != [str(index) for index in range(len(found.intensities))] or not found.intensities:
        return f"the channels are {list(found.intensities)}; they must be numbered from 0"
    for key, facts in found.intensities.items():
        for name in STATISTICS:
            if not math.isfinite(facts.get(name, math.nan)):
                return f"channel {key}: {name} is {facts.get(name, 'missing')}, but must be a finite number"
    if not 0 < found.median_relative_size <= 1:
        return f"median_relative_size_after_cropping is {found.median_relative_size}, but must lie above 0 and not above 1"
    return None


def _sorted_channels(table: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    key = "foreground_intensity_properties_per_channel"
    said = table[key]
    if not isinstance(said, Mapping) or not all(isinstance(facts, Mapping) for facts in said.values()):
        raise ValueError(f"{key} must hold a table for each channel")
    return sorted(said.items(), key=lambda item: int(item[0]))
