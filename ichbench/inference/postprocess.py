"""Keep only the largest component where that raised the Dice of cross-validated predictions (nnU-Net's rule, facts section 10).

First the union of all foreground labels is tried: it must raise the mean over labels and lower none. Then each label or
region in the order declared: it must raise its own Dice. What was accepted holds for all that is tried after it. The rule
is stored as JSON; nnU-Net pickles functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ichbench.cases.files import read_table, write_atomically
from ichbench.cases.labels import Target, mask_of, members
from ichbench.errors import InputError

Labels = NDArray[np.integer]
#: case id -> (reference, prediction), both (z, y, x) on one grid
Load = Callable[[str], tuple[Labels, Labels]]

FORMAT = "ichbench postprocessing 1"
#: that a mask file holds
HIGHEST = 65535


@dataclass(frozen=True)
class Trial:
    """One step that was tried: on which labels, and the mean Dice that decided, before and after."""

    keep_largest: tuple[int, ...]
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True)
class Postprocessing:
    """The steps to apply in order, each a set of labels of whose union only the largest component stays, and what was tried."""

    steps: tuple[tuple[int, ...], ...]
    trials: tuple[Trial, ...] = ()
    cases: int = 0

    def apply(self, labels_zyx: Labels) -> Labels:
        """A new mask; removed voxels are background."""
        for step in self.steps:
            labels_zyx = keep_largest(labels_zyx, step)
        return labels_zyx

    def to_json(self) -> dict[str, Any]:
        """As `save` writes it; `parse_postprocessing` reads it."""
        trials = [{**vars(trial), "keep_largest": list(trial.keep_largest)} for trial in self.trials]
        for trial in trials:
            trial |= {key: None if np.isnan(trial[key]) else trial[key] for key in ("before", "after")}
        return {"format": FORMAT, "keep_largest": [list(step) for step in self.steps], "cases": self.cases, "tried": trials}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_atomically(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())


def read_postprocessing(path: Path) -> Postprocessing:
    """Read what `save` wrote; InputError for anything else."""
    return parse_postprocessing(read_table(path, "give what `ichbench postprocess find` wrote; nnU-Net's .pkl files are not read"), path)


def parse_postprocessing(table: Any, path: Path) -> Postprocessing:
    """A rule out of the JSON in `path`, whose name begins the InputError for anything else."""
    try:
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}")
        steps = tuple(tuple(step) for step in table["keep_largest"])
        if any(not step or not all(type(label) is int and 0 < label <= HIGHEST for label in step) for step in steps):
            raise ValueError(f"keep_largest must list labels from 1 to {HIGHEST}")
        trials = tuple(
            Trial(tuple(item["keep_largest"]), _number(item["before"]), _number(item["after"]), bool(item["accepted"]))
            for item in table["tried"]
        )
        return Postprocessing(steps, trials, int(table["cases"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is not a rule of `ichbench postprocess find` ({error}); nnU-Net's .pkl files are not read") from None


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def keep_largest(labels_zyx: Labels, labels: Iterable[int]) -> Labels:
    """Set to 0 what belongs to the union of `labels` but not to its largest component.

    Voxels that touch at a corner are connected; components that share the largest size all stay.
    """
    mask = mask_of(labels_zyx, tuple(labels))
    places = ndimage.find_objects(mask.astype(np.uint8))
    if not places:
        return labels_zyx
    inside = mask[places[0]]
    components, n = ndimage.label(inside, np.ones((3,) * inside.ndim))
    if n == 1:
        return labels_zyx
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    small = (sizes < sizes.max())[components]
    out = labels_zyx.copy()
    out[places[0]][small & inside] = 0
    return out


def dice_counts(reference: Labels, predicted: Labels, targets: Sequence[Target], ignore: int | None = None) -> NDArray[np.int64]:
    """(targets, 3): voxels in both, only predicted, only in the reference; voxels whose reference is `ignore` take no part."""
    if reference.shape != predicted.shape:
        raise InputError(f"the reference has shape {reference.shape}, the prediction {predicted.shape}; both must lie on the same grid")
    used = np.ones(reference.shape, dtype=bool) if ignore is None else reference != ignore
    counts = []
    for target in targets:
        own, other = mask_of(reference, target) & used, mask_of(predicted, target) & used
        both = int(np.count_nonzero(own & other))
        counts.append((both, int(np.count_nonzero(other)) - both, int(np.count_nonzero(own)) - both))
    return np.array(counts, dtype=np.int64)


def mean_dice(counts: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Mean over cases of each target's Dice, without the cases where reference and prediction are both empty; NaN if all are."""
    values = []
    for one in counts:
        both, predicted, reference = one.T
        total = 2 * both + predicted + reference
        values.append([2 * b / t if t else np.nan for b, t in zip(both, total, strict=True)])
    table = np.array(values, dtype=np.float64)
    seen = ~np.isnan(table).all(axis=0)
    means = np.full(table.shape[1], np.nan)
    means[seen] = np.nanmean(table[:, seen], axis=0)
    return means


def foreground_mean(dice: NDArray[np.float64], compatibility: str = "ichbench") -> float:
    """Mean over targets. A target that no case shows takes no part; with "nnunet" it makes the mean NaN, as in nnU-Net."""
    if compatibility == "nnunet":
        return float(np.mean(dice))
    return float(np.nanmean(dice)) if not np.isnan(dice).all() else float("nan")


def find_postprocessing(
    cases: Sequence[str], load: Load, targets: Sequence[Target], ignore: int | None = None, compatibility: str = "ichbench"
) -> Postprocessing:
    """Try every step on all cases (best: cross-validated predictions of a whole cohort) and keep those that help."""
    if not cases or not targets:
        raise InputError("post-processing is found on at least one case with at least one label")

    def measured(steps: tuple[tuple[int, ...], ...]) -> NDArray[np.float64]:
        counts = []
        for case in sorted(cases):
            reference, predicted = load(case)
            counts.append(dice_counts(reference, Postprocessing(steps).apply(predicted), targets, ignore))
        return mean_dice(counts)

    union = tuple(sorted({label for target in targets for label in members(target)}))
    steps: tuple[tuple[int, ...], ...] = ()
    base = measured(steps)
    tried = measured((union,))
    before, after = foreground_mean(base, compatibility), foreground_mean(tried, compatibility)
    accepted = after > before and not (tried < base).any()
    trials = [Trial(union, before, after, accepted)]
    if accepted:
        steps, base = (union,), tried
    if len(targets) > 1:
        for index, target in enumerate(targets):
            tried = measured((*steps, members(target)))
            accepted = bool(tried[index] > base[index])
            trials.append(Trial(members(target), float(base[index]), float(tried[index]), accepted))
            if accepted:
                steps, base = (*steps, members(target)), tried
    return Postprocessing(steps, tuple(trials), len(cases))
