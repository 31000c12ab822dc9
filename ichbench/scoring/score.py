"""Scores: one pair of masks, and one case as the rows that every board is a fold over.

A row is (arm, fold, seed, case, metric, value). `metric` is `name[@parameter][/label]`; a bare name is the protocol's
default for the whole foreground (all labels above 0 merged), `dice/2` is label 2 alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ichbench.errors import InputError
from ichbench.scoring import overlap, surface
from ichbench.scoring.protocol import Protocol, get_protocol, split_metric


class Score(NamedTuple):
    """One measured number. `fold` and `seed` are "-" for untrained or ensembled arms."""

    arm: str
    fold: str
    seed: str
    case: str
    metric: str
    value: float


@dataclass(frozen=True, eq=False)
class Measured:
    """What all metrics of one pair are computed from."""

    counts: overlap.Counts
    voxel_ml: float
    surfaces: surface.SurfaceDistances
    protocol: Protocol


#: metric name -> its formula; the second argument is the parameter after `@`, None for a bare name.
FORMULAS: dict[str, Callable[[Measured, float | None], float]] = {
    "dice": lambda pair, _: overlap.dice(pair.counts, pair.protocol.dice_smooth),
    "nsd": lambda pair, tolerance_mm: surface.nsd(pair.surfaces, pair.protocol.tolerance_mm if tolerance_mm is None else tolerance_mm),
    "rvd": lambda pair, _: overlap.rvd(pair.counts),
    "hd": lambda pair, percent: surface.hausdorff(pair.surfaces, 100.0 if percent is None else percent),
    "hd95": lambda pair, _: surface.hausdorff(pair.surfaces, 95.0),
    "assd": lambda pair, _: surface.assd(pair.surfaces),
    "iou": lambda pair, _: overlap.iou(pair.counts),
    "sensitivity": lambda pair, _: overlap.sensitivity(pair.counts),
    "precision": lambda pair, _: overlap.precision(pair.counts),
    "reference_ml": lambda pair, _: overlap.volume_ml(pair.counts.reference, pair.voxel_ml),
    "predicted_ml": lambda pair, _: overlap.volume_ml(pair.counts.predicted, pair.voxel_ml),
}


def score_masks(
    reference_zyx: Any,
    predicted_zyx: Any,
    spacing_zyx_mm: Sequence[float],
    protocol: str | Protocol = "instance2022",
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Every metric of the protocol for one pair of masks; never raises on a valid pair, however empty or small.

    reference_zyx, predicted_zyx   3D arrays or torch tensors of one shape, bool, integer, or floats holding whole numbers;
                                   every label above 0 is foreground (the official script needs strictly 0 and 1)
    spacing_zyx_mm                 voxel edges in the order of the array axes
    protocol                       "instance2022", "strict" or a Protocol; it says what an empty mask gets
    metrics                        other names than the protocol's, e.g. ("dice", "nsd@1.0", "hd@90")

    Any axis order will do as long as all three arguments share it. Returns at least dice, nsd, rvd, hd, hd95, assd,
    reference_ml and predicted_ml (unless `metrics` says otherwise). InputError on anything that is not a pair of masks.
    """
    rules = get_protocol(protocol)
    keys = tuple(rules.metrics if metrics is None else metrics)
    wanted = {key: _formula(key) for key in keys}
    reference = overlap.as_mask(reference_zyx, "the reference")
    predicted = overlap.as_mask(predicted_zyx, "the prediction")
    overlap.check_same_shape(reference.shape, predicted.shape)
    spacing_mm = overlap.as_spacing(spacing_zyx_mm)
    counts = overlap.count(reference, predicted)
    surfaces = surface.surface_record(reference, predicted, spacing_mm)
    voxel_ml = math.prod(sorted(spacing_mm)) / 1000.0  # sorted, so that the order of the axes cannot change the last bit
    pair = Measured(counts, voxel_ml, surfaces, rules)
    values: dict[str, float] = {}
    for key, (formula, parameter) in wanted.items():
        declared = rules.empty_rule(key).value(counts.reference, counts.predicted)
        values[key] = formula(pair, parameter) if declared is None else declared
    return values


def rows_for_case(
    arm: str,
    fold: str,
    seed: str,
    case: str,
    reference_zyx: Any,
    predicted_zyx: Any | None,
    spacing_zyx_mm: Sequence[float],
    protocol: str | Protocol = "instance2022",
    labels: Mapping[str, int] | None = None,
    file_axes: tuple[int, int, int] = (2, 1, 0),
    voxel_ml: float | None = None,
) -> list[Score]:
    """All rows of one case: the metrics of the whole foreground, of each label where there are several, and the 0/1 marks.

    predicted_zyx   None for a missing prediction: scored as an empty one, with `missing` and `empty_prediction` 1
    labels          name -> value; more than one value above 0 adds rows such as `dice/2`. Values outside it are an
                    InputError. Voxels of a label named "ignore" in the reference count as background in both
    file_axes       `Grid.file_axes`: distances are summed in the order of the file's axes, so that their last bit is
                    the one of the official script, which reads the file
    voxel_ml        `Grid.voxel_ml` of a sheared grid, whose voxels are smaller than the product of the spacings; volumes only
    """
    rules = get_protocol(protocol)
    to_file = tuple(file_axes.index(axis) for axis in range(3))
    spacing = overlap.as_spacing(spacing_zyx_mm)
    spacing_file_mm = tuple(spacing[axis] for axis in to_file)
    reference = overlap.as_labels(reference_zyx, f"case {case}: the reference").transpose(to_file)
    if predicted_zyx is None:
        predicted: overlap.LabelArray = np.zeros(reference.shape, dtype=np.bool_)
    else:
        predicted = overlap.as_labels(predicted_zyx, f"case {case}: the prediction").transpose(to_file)
        if reference.shape != predicted.shape:
            raise InputError(
                f"case {case}: the reference has shape {tuple(np.shape(reference_zyx))} and the prediction "
                f"{tuple(np.shape(predicted_zyx))} (z, y, x); both must lie on the same voxel grid"
            )
    if labels is not None:
        _check_values(case, "reference", reference, labels)
        _check_values(case, "prediction", predicted, labels)
        if "ignore" in labels:
            kept = reference != labels["ignore"]
            reference, predicted = reference * kept, predicted * kept
    values = sorted({value for name, value in (labels or {}).items() if value > 0 and name != "ignore"})
    parts = [("", reference != 0, predicted != 0)]
    if len(values) > 1:
        parts += [(f"/{value}", reference == value, predicted == value) for value in values]
    rows: list[Score] = []
    for suffix, own, other in parts:
        found = score_masks(own, other, spacing_file_mm, rules)
        if voxel_ml is not None:
            volumes = {"reference_ml": voxel_ml * np.count_nonzero(own), "predicted_ml": voxel_ml * np.count_nonzero(other)}
            found |= {name: value for name, value in volumes.items() if name in found}
        found["empty_prediction"] = float(not other.any())
        found["empty_reference"] = float(not own.any())
        if not suffix:
            found["missing"] = float(predicted_zyx is None)
        rows += [Score(arm, fold, seed, case, name + suffix, value) for name, value in found.items()]
    return rows


def _formula(key: str) -> tuple[Callable[[Measured, float | None], float], float | None]:
    name, parameter = split_metric(key)
    if name not in FORMULAS or "/" in key:
        raise InputError(f"{key!r} cannot be computed from a pair of masks; choose from {', '.join(FORMULAS)}")
    return FORMULAS[name], parameter


def _check_values(case: str, what: str, array: overlap.LabelArray, labels: Mapping[str, int]) -> None:
    unknown = sorted({int(value) for value in np.unique(array[array != 0])} - set(labels.values()))
    if unknown:
        raise InputError(f"case {case}: the {what} contains the label(s) {unknown}, but the declared ones are {dict(labels)}")
