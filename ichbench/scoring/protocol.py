"""What is measured, with which parameters, and what an empty mask gets. All of it is data.

A new metric: one entry in METRICS here, one formula in score.py. A new protocol: one entry in PROTOCOLS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ichbench.errors import InputError

Better = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity: its name in the rows, which direction is better, its unit, and what it is."""

    name: str
    better: Better
    unit: str
    text: str


#: A number; None, the formula answers; "diagonal", the length of the volume's diagonal in mm; "drop", the case has no such row.
EmptyValue = float | None | Literal["diagonal", "drop"]


@dataclass(frozen=True)
class EmptyRule:
    """The empty-mask policy of one metric: what it gets when a mask has no foreground."""

    metric: str
    empty_prediction: EmptyValue
    empty_reference: EmptyValue
    both_empty: EmptyValue

    def value(self, reference_voxels: int, predicted_voxels: int) -> EmptyValue:
        """What is declared for these counts; None where the formula holds."""
        if reference_voxels and predicted_voxels:
            return None
        if reference_voxels:
            return self.empty_prediction
        return self.empty_reference if predicted_voxels else self.both_empty


@dataclass(frozen=True)
class Protocol:
    """A way to score: `metrics` in the order of their columns, and the parameters behind a bare metric name.

    dice_smooth    added to both sides of the Dice fraction
    tolerance_mm   of a bare `nsd`
    empties        one rule per metric; a metric with a parameter (`nsd@1.0`) follows the rule of its name
    """

    name: str
    text: str
    metrics: tuple[str, ...]
    dice_smooth: float
    tolerance_mm: float
    empties: tuple[EmptyRule, ...]

    def empty_rule(self, metric: str) -> EmptyRule:
        """The rule of this very key (`hd@95`), else of its name (`hd`); one whose values all come from the formula if none is declared."""
        key, name = metric.partition("/")[0], split_metric(metric)[0]
        declared = {rule.metric: rule for rule in self.empties}
        return declared.get(key) or declared.get(name) or EmptyRule(name, None, None, None)


#: Every metric that a row can name. `better` is said here and nowhere else.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("dice", "higher", "", "Dice coefficient of the voxels"),
        Metric("nsd", "higher", "", "normalised surface Dice: area-weighted, within the tolerance (mm, <=)"),
        Metric("rvd", "lower", "", "relative volume difference | |P| - |G| | / |G|"),
        Metric("hd", "lower", "mm", "Hausdorff distance; hd@90 is the 90th percentile by area, per direction, then the larger"),
        Metric("hd95", "lower", "mm", "Hausdorff distance at the 95th percentile by area, per direction, then the larger"),
        Metric("assd", "lower", "mm", "average symmetric surface distance over both surfaces together, area-weighted"),
        Metric("iou", "higher", "", "Jaccard index of the voxels"),
        Metric("sensitivity", "higher", "", "part of the reference voxels that was found"),
        Metric("precision", "higher", "", "part of the predicted voxels that is right"),
        Metric("rvd_signed", "none", "", "relative volume difference with its sign, (|P| - |G|) / |G|"),
        Metric("volume_bias_ml", "none", "ml", "predicted volume minus reference volume"),
        Metric("boundary_iou", "higher", "", "IoU of the voxels within a distance (mm) of either mask's contour"),
        Metric("nsd_voxels", "higher", "", "surface Dice by counting edge voxels within the tolerance (MONAI's default)"),
        Metric("nsd_fractions", "higher", "", "surface Dice as the mean of the two directions' fractions of edge voxels (panoptica)"),
        Metric("hd_directional", "lower", "mm", "unweighted percentile over edge voxels, per direction, then the larger (MONAI)"),
        Metric("hd_pooled", "lower", "mm", "unweighted percentile over the edge voxels of both directions together (MedPy)"),
        Metric("lesion_f1", "higher", "", "F1 of the lesions; a lesion is found when one voxel overlaps"),
        Metric("lesion_sensitivity", "higher", "", "part of the reference lesions that was found"),
        Metric("lesion_precision", "higher", "", "part of the predicted lesions that touch a reference lesion"),
        Metric("lesion_fp", "lower", "", "predicted lesions that touch no reference lesion"),
        Metric("pq", "higher", "", "panoptic quality: lesions matched at IoU > 0.5"),
        Metric("lesionwise_dice", "higher", "", "Dice per lesion as in BraTS 2023, false positives counted as 0"),
        Metric("lesionwise_hd95", "lower", "mm", "HD95 per lesion as in BraTS 2023, misses and false positives counted as 374 mm"),
        Metric("reference_ml", "none", "ml", "volume of the reference"),
        Metric("predicted_ml", "none", "ml", "volume of the prediction"),
        Metric("missing", "lower", "0/1", "there is no prediction for this case; it is scored as an empty one"),
        Metric("empty_prediction", "none", "0/1", "the case was scored with a prediction without foreground (a missing one included)"),
        Metric("empty_reference", "none", "0/1", "the reference has no foreground"),
    )
}

#: The 0/1 rows that every case has beside its metrics.
MARKS = ("missing", "empty_prediction", "empty_reference")

#: Metrics between 0 and 1, and those that may be negative; all others are 0 or more.
SHARES = (
    "dice", "nsd", "iou", "sensitivity", "precision", "boundary_iou", "nsd_voxels", "nsd_fractions",
    "lesion_f1", "lesion_sensitivity", "lesion_precision", "pq", "lesionwise_dice", *MARKS,
)  # fmt: skip
SIGNED = ("rvd_signed", "volume_bias_ml")
#: No distance, volume or count is as large, and sums of such numbers would overflow.
LARGEST = 1e100
#: A share may lie this much beyond 1: the last digit of someone's sum.
SHARE_SLACK = 1e-9

_STRATUM = "lower end of the lesions' size in ml: 0, 1, 10 or 30 for <1, 1-10, 10-30 and >30 ml"
#: Metrics that take a parameter after `@`, and what it means.
PARAMETERS: dict[str, str] = {
    "nsd": "tolerance in mm",
    "hd": "percentile from 0 to 100",
    "boundary_iou": "distance from the contour in mm",
    "nsd_voxels": "tolerance in mm",
    "nsd_fractions": "tolerance in mm",
    "hd_directional": "percentile from 0 to 100",
    "hd_pooled": "percentile from 0 to 100",
    "lesion_f1": _STRATUM,
    "lesion_sensitivity": _STRATUM,
    "lesion_precision": _STRATUM,
    "lesion_fp": _STRATUM,
}

_COLUMNS = ("dice", "nsd", "rvd", "hd", "hd95", "assd", "reference_ml", "predicted_ml")
_INF, _NAN = math.inf, math.nan

PROTOCOLS: dict[str, Protocol] = {
    "instance2022": Protocol(
        name="instance2022",
        text="The official scorer of INSTANCE 2022 (MICCAI), for 0/1 masks. Where an empty mask makes that script return a number it "
        "is kept, odd or not: two empty masks have Dice 1 but HD inf and NSD nan. Where it raises (RVD with an empty reference) the "
        "value is inf, or nan when the prediction is empty too. HD95 and ASSD are not part of the challenge and follow its library.",
        metrics=_COLUMNS,
        dice_smooth=1e-5,
        tolerance_mm=0.42,
        empties=(
            # metric, empty prediction, empty reference, both empty
            EmptyRule("dice", None, None, None),
            EmptyRule("nsd", 0.0, 0.0, _NAN),
            EmptyRule("rvd", 1.0, _INF, _NAN),
            EmptyRule("hd", _INF, _INF, _INF),
            EmptyRule("hd95", _INF, _INF, _INF),
            EmptyRule("assd", _INF, _INF, _NAN),
        ),
    ),
    "strict": Protocol(
        name="strict",
        text="The same metrics without smoothing: a miss and a false alarm are as bad as can be, and saying nothing "
        "about a scan without a bleed is perfect.",
        metrics=_COLUMNS,
        dice_smooth=0.0,
        tolerance_mm=0.42,
        empties=(
            EmptyRule("dice", 0.0, 0.0, 1.0),
            EmptyRule("nsd", 0.0, 0.0, 1.0),
            EmptyRule("rvd", 1.0, _INF, 0.0),
            EmptyRule("hd", _INF, _INF, 0.0),
            EmptyRule("hd95", _INF, _INF, 0.0),
            EmptyRule("assd", _INF, _INF, 0.0),
            EmptyRule("iou", 0.0, 0.0, 1.0),
            EmptyRule("sensitivity", 0.0, _NAN, 1.0),
            EmptyRule("precision", _NAN, 0.0, 1.0),
        ),
    ),
    "kits": Protocol(
        name="kits",
        text="KiTS 2023: Dice and surface Dice at 1.033 mm, the tolerance of its first region (the others' are 1.133 and 1.150: "
        "nsd@1.133). One empty mask is 0, two are 1.",
        metrics=("dice", "nsd", "reference_ml", "predicted_ml"),
        dice_smooth=0.0,
        tolerance_mm=1.033,
        empties=(EmptyRule("dice", 0.0, 0.0, 1.0), EmptyRule("nsd", 0.0, 0.0, 1.0)),
    ),
    "brats": Protocol(
        name="brats",
        text="BraTS: Dice and HD95, and since 2023 both per lesion. A missed or invented object costs 374 mm, the longest "
        "diagonal of its volumes; two empty masks are perfect.",
        metrics=("dice", "hd95", "lesionwise_dice", "lesionwise_hd95", "sensitivity", "reference_ml", "predicted_ml"),
        dice_smooth=0.0,
        tolerance_mm=1.0,
        empties=(
            EmptyRule("dice", 0.0, 0.0, 1.0),
            EmptyRule("hd95", 374.0, 374.0, 0.0),
            EmptyRule("sensitivity", 0.0, _NAN, 1.0),
        ),
    ),
    "toothfairy": Protocol(
        name="toothfairy",
        text="ToothFairy: Dice and HD95, where an object that is missing on one side costs the diagonal of the volume.",
        metrics=("dice", "hd95", "reference_ml", "predicted_ml"),
        dice_smooth=0.0,
        tolerance_mm=1.0,
        empties=(EmptyRule("dice", 0.0, 0.0, 1.0), EmptyRule("hd95", "diagonal", "diagonal", 0.0)),
    ),
    "monai": Protocol(
        name="monai",
        text="MONAI's defaults: everything over edge voxels, percentiles unweighted. The tolerance of 0.42 mm is ours, that of INSTANCE: "
        "MONAI has no default and asks for one (nsd_voxels@1.0). A case that its means leave out (nan there) "
        "has no row here. Its HD95 of one empty mask is nan as well (issue 9095): a miss vanishes from the mean.",
        metrics=("dice", "nsd_voxels", "hd_directional", "hd_directional@95", "reference_ml", "predicted_ml"),
        dice_smooth=0.0,
        tolerance_mm=0.42,
        empties=(
            EmptyRule("dice", 0.0, "drop", "drop"),
            EmptyRule("nsd_voxels", 0.0, 0.0, "drop"),
            EmptyRule("hd_directional", _INF, _INF, "drop"),
            EmptyRule("hd_directional@95", "drop", "drop", "drop"),
        ),
    ),
    "nnunet": Protocol(
        name="nnunet",
        text="nnU-Net v2's evaluation: Dice and IoU from voxel counts, nan where both masks are empty (its means skip nan).",
        metrics=("dice", "iou", "reference_ml", "predicted_ml"),
        dice_smooth=0.0,
        tolerance_mm=1.0,
        empties=(EmptyRule("dice", 0.0, 0.0, _NAN), EmptyRule("iou", 0.0, 0.0, _NAN)),
    ),
}


def get_protocol(protocol: str | Protocol) -> Protocol:
    """The protocol of this name; a Protocol is handed through. InputError for an unknown name."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise InputError(f"there is no protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def split_metric(key: str) -> tuple[str, float | None]:
    """`nsd@1.0` -> ("nsd", 1.0); `dice` -> ("dice", None). A label suffix (`dice/2`) is ignored. InputError if it means nothing."""
    name, at, parameter = key.partition("/")[0].partition("@")
    if name not in METRICS:
        raise InputError(f"there is no metric {name!r}; choose one of {', '.join(METRICS)}")
    if not at:
        return name, None
    if name not in PARAMETERS:
        raise InputError(f"the metric {name!r} takes no parameter, but {key!r} gives one; only {', '.join(PARAMETERS)} do")
    try:
        return name, float(parameter)
    except ValueError as error:
        raise InputError(f"the parameter of {key!r} must be a number: {PARAMETERS[name]}") from error


def range_of(metric: str) -> tuple[float, float]:
    """The lowest and the highest value that a metric can have. InputError for a metric that is not declared."""
    name = split_metric(metric)[0]
    return (-math.inf if name in SIGNED else 0.0), (1.0 if name in SHARES else math.inf)


def why_impossible(metric: str, value: float) -> str:
    """Why a metric cannot have this value, in words; empty where it can. nan (undefined) is always possible."""
    low, high = range_of(metric)
    if value < low or value == -math.inf:
        return f"{metric} cannot be below {low:g}" if math.isfinite(low) else f"{metric} cannot be -inf"
    if LARGEST < abs(value) < math.inf:
        return f"{metric} cannot be that large; infinite is written inf"
    if value > high + SHARE_SLACK:
        return f"{metric} is a share and cannot be above {high:g}" + (" (in percent? divide by 100)" if value <= 100 else "")
    return ""
