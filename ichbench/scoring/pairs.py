"""One pair of masks, from files or arrays, -> rows and voxel counts. Every error names the case and its files.

Masks are read in the order of the file's axes, so that distances are summed as the official script sums them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ichbench.errors import CaseError, InputError
from ichbench.scoring import overlap
from ichbench.scoring.anomalies import Anomaly, find_anomalies
from ichbench.scoring.definitions import OFFICIAL, measured_definitions, tolerance_curve
from ichbench.scoring.geometry import onto_reference
from ichbench.scoring.layouts import Pair
from ichbench.scoring.protocol import Protocol
from ichbench.scoring.score import Labels, Score, measure, regions_of, rows_for_case


@dataclass(frozen=True, eq=False)
class Settings:
    """How pairs are scored; the first fields are the keywords of `folders.Options`.

    label_map      value in a reference file -> value to use
    count_voxels   also fill `Scored.voxels`
    definitions    metrics of `definitions.matrix_metrics` to fill `Scored.definitions` with; none unless asked for
    curve          tolerances in mm to fill `Scored.curve` at, likewise
    anomalies      also fill `Scored.anomalies` (only they look at a pair's image)
    """

    protocol: Protocol
    arm: str = "prediction"
    fold: str = "-"
    seed: str = "-"
    labels: Labels | None = None
    label_map: Mapping[int, int] | None = None
    reorient: bool = False
    count_voxels: bool = False
    definitions: tuple[str, ...] = ()
    curve: tuple[float, ...] = ()
    anomalies: bool = False


@dataclass(frozen=True)
class Voxels:
    """Voxels of one label that are right, too many, missed, and rightly left alone; ignored voxels are in none of them."""

    tp: int
    fp: int
    fn: int
    tn: int


@dataclass(frozen=True, eq=False)
class Scored:
    """One case: its rows, its files (None for arrays, and for a missing prediction), and what the reader warned of.

    voxels        by row suffix (`score.regions_of`), "" for the whole foreground where no labels are declared; empty unless asked for
    definitions   values of `definitions.pair_definitions` for the whole foreground; empty unless asked for
    curve         NSD at the tolerances asked for, likewise
    anomalies     what is odd about the prediction, likewise
    """

    case: str
    reference: Path | None
    prediction: Path | None
    rows: tuple[Score, ...]
    voxels: Mapping[str, Voxels]
    notes: tuple[str, ...]
    definitions: Mapping[tuple[str, str], float] = field(default_factory=dict)
    curve: tuple[float, ...] = ()
    anomalies: tuple[Anomaly, ...] = ()


class _Masks(NamedTuple):
    """Labels on one grid, in the order of the file's axes reversed; `predicted` is None for a missing prediction.

    case_order   how to transpose them so that axis 0 is the slice axis (`images.case_order`)
    """

    reference: Any
    predicted: Any | None
    spacing_zyx_mm: Sequence[float]
    voxel_ml: float | None
    axis_codes_zyx: str = "SPL"
    image_hu: Any | None = None
    case_order: tuple[int, int, int] = (0, 1, 2)


def score_pair(task: tuple[Settings, Pair]) -> Scored:
    """Read, compare and score one pair; a pair that does not fit is an InputError, anything unforeseen a CaseError."""
    settings, pair = task
    named = {"reference": pair.reference, "prediction": pair.prediction, "image": pair.image if settings.anomalies else None}
    files = {what: path for what, path in named.items() if isinstance(path, Path)}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            masks = _read(pair, settings)
            if settings.label_map:
                masks = masks._replace(reference=_mapped(masks.reference, settings.label_map))
            rows = _rows(settings, pair.case, masks)
            voxels = _voxels(settings.labels, masks) if settings.count_voxels else {}
            beside = _beside(settings, masks, rows)
    except InputError as error:
        text = str(error)
        unnamed = ", ".join(f"{what} {path}" for what, path in files.items() if str(path) not in text)
        head = "" if text.startswith(f"case {pair.case}") else f"case {pair.case}: "
        raise InputError(head + text + (f" ({unnamed})" if unnamed else "")) from error
    except Exception as error:
        given = ", ".join(f"{what} {path}" for what, path in files.items()) or "arrays"
        reason = "not enough memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        raise CaseError(f"case {pair.case} could not be scored: {reason} ({given})") from error
    notes = tuple(dict.fromkeys(str(item.message) for item in caught))
    return Scored(pair.case, files.get("reference"), files.get("prediction"), tuple(rows), voxels, notes, *beside)


def as_pair(given: Pair | tuple[Any, ...]) -> Pair:
    """Paths as `Path`, all else as arrays (a tensor cannot be handed to another process without torch there), or an InputError."""
    if not isinstance(given, Pair) and len(given) not in (3, 4):
        raise InputError(f"a pair is (case, reference, prediction), for arrays with spacing_zyx_mm as well, but {len(given)} things came")
    pair = given if isinstance(given, Pair) else Pair(*given)
    others = {"prediction": pair.prediction, "image": pair.image}
    sides = {"reference": pair.reference} | {name: side for name, side in others.items() if side is not None}
    paths = [isinstance(side, (str, os.PathLike)) for side in sides.values()]
    also = "" if pair.image is None else ", and the image likewise"
    if pair.reference is None or any(paths) != all(paths):
        raise InputError(f"case {pair.case}: give two paths or two arrays (the prediction may be None: a missing one){also}")
    if all(paths):
        found = {name: Path(side) for name, side in sides.items()}
        return Pair(pair.case, found["reference"], found.get("prediction"), image=found.get("image"))
    if pair.spacing_zyx_mm is None:
        raise InputError(f"case {pair.case}: arrays come with spacing_zyx_mm, three numbers in mm, one per array axis")
    arrays = {name: overlap.as_labels(side, f"case {pair.case}: the {name}") for name, side in sides.items() if name != "image"}
    image = None if pair.image is None else np.asarray(pair.image)
    return Pair(pair.case, arrays["reference"], arrays.get("prediction"), pair.spacing_zyx_mm, image)


def _read(pair: Pair, settings: Settings) -> _Masks:
    if not isinstance(pair.reference, Path):
        return _Masks(pair.reference, pair.prediction, pair.spacing_zyx_mm or (), None, image_hu=pair.image)
    from ichbench.cases.images import case_order, read_image, read_labels

    reference, grid = read_labels(pair.reference, keep_file_order=True)
    predicted = image = None
    if pair.prediction is not None:
        predicted = onto_reference(*read_labels(pair.prediction, keep_file_order=True), grid, settings.reorient)
    if pair.image is not None and settings.anomalies:
        image = onto_reference(*read_image(pair.image, keep_file_order=True), grid, settings.reorient, "image")
    # the voxels of a sheared grid are smaller than the product of the spacings
    voxel_ml = None if grid.is_regular else grid.voxel_ml
    return _Masks(reference, predicted, grid.spacing_zyx_mm, voxel_ml, grid.axis_codes_zyx, image, case_order(grid))


def _mapped(labels_zyx: Any, label_map: Mapping[int, int]) -> Any:
    """A copy with other values, in a type that holds them all: files come as int16, arrays as anything down to bool."""
    mapped = labels_zyx.astype(np.result_type(labels_zyx.dtype, *map(np.min_scalar_type, label_map.values())))
    for old, new in label_map.items():
        mapped[labels_zyx == old] = new
    return mapped


def _rows(settings: Settings, case: str, masks: _Masks) -> list[Score]:
    """Rows of the whole and of every declared label or region. Arrays are (z, y, x), so a file's order is the reverse."""
    names = (settings.arm, settings.fold, settings.seed, case)
    sides, spacing = (masks.reference, masks.predicted), masks.spacing_zyx_mm
    return rows_for_case(*names, *sides, spacing, settings.protocol, settings.labels, (2, 1, 0), masks.voxel_ml)


def _beside(
    settings: Settings, masks: _Masks, rows: Sequence[Score]
) -> tuple[Mapping[tuple[str, str], float], tuple[float, ...], tuple[Anomaly, ...]]:
    """What was asked for beside the rows, about the whole foreground. A missing prediction is an empty one, and not odd."""
    if not (settings.definitions or settings.curve or settings.anomalies):
        return {}, (), ()
    used = _used(settings.labels or {}, masks.reference)
    # in the order of the file's axes, as the rows are (`rows_for_case`)
    own = ((masks.reference != 0) & used).T
    other = np.zeros_like(own) if masks.predicted is None else ((masks.predicted != 0) & used).T
    spacing = tuple(masks.spacing_zyx_mm)[::-1]
    odd: tuple[Anomaly, ...] = ()
    if settings.anomalies:
        hd_mm = next((row.value for row in rows if row.metric == "hd"), None)
        # the checks tell slices from rows and columns, which the order of the file's axes does not
        order = masks.case_order
        image = None if masks.image_hu is None else masks.image_hu.transpose(order)
        sides = (own.T.transpose(order), other.T.transpose(order), [masks.spacing_zyx_mm[axis] for axis in order])
        codes = "".join(masks.axis_codes_zyx[axis] for axis in order)
        known: dict[str, Any] = {"hd_mm": hd_mm, "axis_codes_zyx": codes, "voxel_ml": masks.voxel_ml}
        odd = find_anomalies(*sides, image, **known)
    pair = measure(own, other, spacing, OFFICIAL)
    curve = tolerance_curve(pair.surfaces, settings.curve) if settings.curve else ()
    return measured_definitions(pair, settings.definitions) if settings.definitions else {}, curve, odd


def _voxels(labels: Labels | None, masks: _Masks) -> dict[str, Voxels]:
    used = _used(labels or {}, masks.reference)
    predicted = np.zeros(masks.reference.shape, dtype=np.bool_) if masks.predicted is None else masks.predicted
    counts: dict[str, Voxels] = {}
    for key, values in (regions_of(labels or {}) or {"": ()}).items():
        own, other = ((np.isin(side, values) if values else side != 0) & used for side in (masks.reference, predicted))
        found = overlap.count(own, other)
        union = found.reference + found.predicted - found.both
        total = int(np.count_nonzero(used))
        counts[key] = Voxels(found.both, found.predicted - found.both, found.reference - found.both, total - union)
    return counts


def _used(labels: Labels, reference: Any) -> Any:
    """Where the reference does not say "ignore"."""
    return reference != labels["ignore"] if "ignore" in labels else np.ones(reference.shape, dtype=np.bool_)
