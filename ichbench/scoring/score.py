"""Scores: one pair of masks, and one case as the rows that every board is a fold over.

A row is (arm, fold, seed, case, metric, value). `metric` is `name[@parameter][/label]`; a bare name is the protocol's
default for the whole foreground (all labels above 0 merged), `dice/2` is label 2 alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ichbench.errors import InputError
from ichbench.scoring import edges, islands, lesions, overlap, surface
from ichbench.scoring.lesionwise import LesionwiseRecord, lesionwise_dice, lesionwise_hd, lesionwise_record
from ichbench.scoring.protocol import PARAMETERS, Protocol, get_protocol, split_metric

#: a bare boundary_iou looks this part of the volume's diagonal away from the contour (Cheng et al., CVPR 2021: 2 % in images)
BOUNDARY_SHARE = 0.02
#: name -> label value, or the values that a region merges; a label named "ignore" is left out of both masks
Labels = Mapping[str, int | tuple[int, ...]]


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
    """One pair of masks, and what its metrics are computed from: each measured once, when the first metric asks for it."""

    reference: overlap.MaskArray
    predicted: overlap.MaskArray
    spacing_mm: tuple[float, float, float]
    voxel_ml: float
    protocol: Protocol

    @cached_property
    def boxes(self) -> list[islands.Box]:
        return islands.islands(self.reference, self.predicted)

    @cached_property
    def counts(self) -> overlap.Counts:
        parts = [overlap.count(self.reference[box], self.predicted[box]) for box in self.boxes]
        return overlap.Counts(sum(one.reference for one in parts), sum(one.predicted for one in parts), sum(one.both for one in parts))

    @cached_property
    def surfaces(self) -> surface.SurfaceDistances:
        return surface.surface_record(self.reference, self.predicted, self.spacing_mm, self.boxes)

    @cached_property
    def edge_mm(self) -> edges.EdgeRecord:
        return edges.edge_record(self.reference, self.predicted, self.spacing_mm)

    @cached_property
    def lesion_overlaps(self) -> lesions.LesionRecord:
        found = lesions.lesion_record(self.reference, self.predicted, self.spacing_mm)
        return replace(found, voxel_ml=self.voxel_ml)

    @cached_property
    def lesionwise(self) -> LesionwiseRecord:
        return lesionwise_record(self.reference, self.predicted, self.spacing_mm)

    @property
    def diagonal_mm(self) -> float:
        return math.hypot(*(n * edge for n, edge in zip(self.reference.shape, self.spacing_mm, strict=True)))

    def tolerance_mm(self, given: float | None) -> float:
        return self.protocol.tolerance_mm if given is None else given


Formula = Callable[[Measured, float | None], float]


def _percent(given: float | None) -> float:
    return 100.0 if given is None else given


def _lesion(formula: Callable[..., float]) -> Formula:
    return lambda pair, stratum: formula(pair.lesion_overlaps, stratum_ml=_stratum_ml(stratum))


def _stratum_ml(lower_ml: float | None) -> tuple[float, float] | None:
    if lower_ml is None:
        return None
    for stratum in lesions.STRATA_ML:
        if stratum[0] == lower_ml:
            return stratum
    raise InputError(f"no lesion stratum begins at {lower_ml:g} ml; {PARAMETERS['lesion_f1']}")


#: metric name -> its formula; the second argument is the parameter after `@`, None for a bare name.
FORMULAS: dict[str, Formula] = {
    "dice": lambda pair, _: overlap.dice(pair.counts, pair.protocol.dice_smooth),
    "nsd": lambda pair, tolerance_mm: surface.nsd(pair.surfaces, pair.tolerance_mm(tolerance_mm)),
    "rvd": lambda pair, _: overlap.rvd(pair.counts),
    "hd": lambda pair, percent: surface.hausdorff(pair.surfaces, _percent(percent)),
    "hd95": lambda pair, _: surface.hausdorff(pair.surfaces, 95.0),
    "assd": lambda pair, _: surface.assd(pair.surfaces),
    "iou": lambda pair, _: overlap.iou(pair.counts),
    "sensitivity": lambda pair, _: overlap.sensitivity(pair.counts),
    "precision": lambda pair, _: overlap.precision(pair.counts),
    "rvd_signed": lambda pair, _: overlap.rvd_signed(pair.counts),
    "reference_ml": lambda pair, _: overlap.volume_ml(pair.counts.reference, pair.voxel_ml),
    "predicted_ml": lambda pair, _: overlap.volume_ml(pair.counts.predicted, pair.voxel_ml),
    "volume_bias_ml": lambda pair, _: overlap.volume_ml(pair.counts.predicted - pair.counts.reference, pair.voxel_ml),
    "boundary_iou": lambda pair, mm: edges.boundary_iou(
        pair.reference, pair.predicted, pair.spacing_mm, BOUNDARY_SHARE * pair.diagonal_mm if mm is None else mm
    ),
    "nsd_voxels": lambda pair, tolerance_mm: edges.nsd_voxels(pair.edge_mm, pair.tolerance_mm(tolerance_mm)),
    "nsd_fractions": lambda pair, tolerance_mm: edges.nsd_fractions(pair.edge_mm, pair.tolerance_mm(tolerance_mm)),
    "hd_directional": lambda pair, percent: edges.hd_directional(pair.edge_mm, _percent(percent)),
    "hd_pooled": lambda pair, percent: edges.hd_pooled(pair.edge_mm, _percent(percent)),
    "lesion_f1": _lesion(lesions.lesion_f1),
    "lesion_sensitivity": _lesion(lesions.lesion_sensitivity),
    "lesion_precision": _lesion(lesions.lesion_precision),
    "lesion_fp": lambda pair, stratum: float(lesions.count_lesions(pair.lesion_overlaps, stratum_ml=_stratum_ml(stratum)).false_positives),
    "pq": lambda pair, _: lesions.panoptic(pair.lesion_overlaps).pq,
    "lesionwise_dice": lambda pair, _: lesionwise_dice(pair.lesionwise),
    "lesionwise_hd95": lambda pair, _: lesionwise_hd(pair.lesionwise),
}


def score_masks(
    reference_zyx: Any,
    predicted_zyx: Any,
    spacing_zyx_mm: Sequence[float],
    protocol: str | Protocol = "instance2022",
    metrics: Sequence[str] | None = None,
    *,
    voxel_ml: float | None = None,
) -> dict[str, float]:
    """Every metric of the protocol for one pair of masks; never raises on a valid pair, however empty or small.

    reference_zyx, predicted_zyx   3D arrays or torch tensors of one shape, bool, integer, or floats holding whole numbers;
                                   every label above 0 is foreground (the official script needs strictly 0 and 1)
    spacing_zyx_mm                 voxel edges in the order of the array axes
    protocol                       "instance2022", "strict" or a Protocol; it says what an empty mask gets
    metrics                        other names than the protocol's, e.g. ("dice", "nsd@1.0", "hd@90", "lesion_f1@10"): METRICS
                                   and PARAMETERS in protocol.py list them. A metric that the protocol drops has no key
    voxel_ml                       volume of a voxel where it is not the product of the edges (a sheared grid, `Grid.voxel_ml`)

    Any axis order will do as long as all three arguments share it. Returns at least dice, nsd, rvd, hd, hd95, assd,
    reference_ml and predicted_ml (unless `metrics` says otherwise). InputError on anything that is not a pair of masks.
    """
    pair = measure(reference_zyx, predicted_zyx, spacing_zyx_mm, protocol, voxel_ml=voxel_ml)
    return score_measured(pair, tuple(pair.protocol.metrics if metrics is None else metrics))


def measure(
    reference_zyx: Any,
    predicted_zyx: Any,
    spacing_zyx_mm: Sequence[float],
    protocol: str | Protocol = "instance2022",
    *,
    voxel_ml: float | None = None,
) -> Measured:
    """A checked pair, of which nothing has been measured yet; arguments and errors are those of `score_masks`."""
    rules = get_protocol(protocol)
    reference = overlap.as_mask(reference_zyx, "the reference")
    predicted = overlap.as_mask(predicted_zyx, "the prediction")
    overlap.check_same_shape(reference.shape, predicted.shape)
    spacing_mm = overlap.as_spacing(spacing_zyx_mm)
    if voxel_ml is None:
        voxel_ml = math.prod(sorted(spacing_mm)) / 1000.0  # sorted, so that the order of the axes cannot change the last bit
    return Measured(reference, predicted, spacing_mm, voxel_ml, rules)


def score_measured(pair: Measured, metrics: Sequence[str]) -> dict[str, float]:
    """These metrics of a pair under its protocol, which says what an empty mask gets."""
    wanted = {key: _formula(key) for key in metrics}
    values: dict[str, float] = {}
    for key, (formula, parameter) in wanted.items():
        declared = pair.protocol.empty_rule(key).value(pair.counts.reference, pair.counts.predicted)
        if declared == "diagonal":
            declared = pair.diagonal_mm
        if declared != "drop":
            values[key] = formula(pair, parameter) if declared is None else float(declared)
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
    labels: Labels | None = None,
    file_axes: tuple[int, int, int] = (2, 1, 0),
    voxel_ml: float | None = None,
) -> list[Score]:
    """All rows of one case: the metrics of the whole foreground, of each label where there are several or of each region, and the
    0/1 marks.

    predicted_zyx   None for a missing prediction: scored as an empty one, with `missing` and `empty_prediction` 1
    labels          name -> value, or values of a region; more than one value above 0 adds rows such as `dice/2`, a region
                    such as `dice/core` (`regions_of`). Values outside it are an InputError. Voxels of a label named
                    "ignore" in the reference count as background in both
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
            if (predicted == labels["ignore"]).any():
                raise InputError(
                    f"case {case}: the prediction contains the label {labels['ignore']} (ignore) where the reference does not; "
                    "only references may say ignore, so give every other voxel of the prediction a class"
                )
    declared = regions_of(labels or {})
    parts = [("", reference != 0, predicted != 0)]
    if len(declared) > 1 or any(isinstance(value, tuple) for value in (labels or {}).values()):
        parts += [(f"/{name}", np.isin(reference, values), np.isin(predicted, values)) for name, values in declared.items()]
    rows: list[Score] = []
    for suffix, own, other in parts:
        found = score_masks(own, other, spacing_file_mm, rules, voxel_ml=voxel_ml)
        found["empty_prediction"] = float(not other.any())
        found["empty_reference"] = float(not own.any())
        if not suffix:
            found["missing"] = float(predicted_zyx is None)
        rows += [Score(arm, fold, seed, case, name + suffix, value) for name, value in found.items()]
    return rows


def regions_of(labels: Labels) -> dict[str, tuple[int, ...]]:
    """What has rows of its own, as row suffix -> label values: a plain label goes by its value, a region by its name.

    Background and "ignore" have none. `{"background": 0, "tumor": (1, 2), "core": 2}` gives `{"tumor": (1, 2), "2": (2,)}`.
    """
    parts: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        values = value if isinstance(value, tuple) else (value,)
        if name != "ignore" and set(values) != {0}:
            parts[name if isinstance(value, tuple) else str(value)] = values
    return parts


def check_metrics(keys: Sequence[str]) -> tuple[str, ...]:
    """Names that `score_masks` can compute, without blanks and repetitions, or an InputError."""
    cleaned = tuple(dict.fromkeys(key.strip() for key in keys))
    if cleaned == ("",):
        raise InputError(f"no metric was given; choose from {', '.join(FORMULAS)}")
    for key in cleaned:
        _formula(key)
    return cleaned


def _formula(key: str) -> tuple[Formula, float | None]:
    """Checked before any mask is looked at: an empty one must not hide that a parameter means nothing."""
    name, parameter = split_metric(key)
    if name not in FORMULAS or "/" in key:
        raise InputError(f"{key!r} cannot be computed from a pair of masks; choose from {', '.join(FORMULAS)}")
    if parameter is not None:
        highest = 100.0 if PARAMETERS[name].startswith("percentile") else sys.float_info.max
        if not 0 <= parameter <= highest:
            raise InputError(f"the parameter of {key!r} is {parameter:g}: {PARAMETERS[name]}; a finite number from 0 up is needed")
        if name.startswith("lesion_"):
            _stratum_ml(parameter)
    return FORMULAS[name], parameter


def _check_values(case: str, what: str, array: overlap.LabelArray, labels: Labels) -> None:
    declared = {0} | {value for values in labels.values() for value in (values if isinstance(values, tuple) else (values,))}
    unknown = sorted({int(value) for value in np.unique(array[array != 0])} - declared)
    if unknown:
        raise InputError(f"case {case}: the {what} contains the label(s) {unknown}, but the declared ones are {dict(labels)}")
