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


@dataclass(frozen=True)
class EmptyRule:
    """What one metric gets when a mask has no foreground; None means that the formula answers."""

    metric: str
    empty_prediction: float | None
    empty_reference: float | None
    both_empty: float | None

    def value(self, reference_voxels: int, predicted_voxels: int) -> float | None:
        """The declared value for these counts, or None where the formula holds."""
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
        """The rule of this metric; one whose values all come from the formula if none is declared."""
        name = split_metric(metric)[0]
        return next((rule for rule in self.empties if rule.metric == name), EmptyRule(name, None, None, None))


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
        Metric("reference_ml", "none", "ml", "volume of the reference"),
        Metric("predicted_ml", "none", "ml", "volume of the prediction"),
        Metric("missing", "lower", "0/1", "there is no prediction for this case; it is scored as an empty one"),
        Metric("empty_prediction", "none", "0/1", "the case was scored with a prediction without foreground (a missing one included)"),
        Metric("empty_reference", "none", "0/1", "the reference has no foreground"),
    )
}

#: The 0/1 rows that every case has beside its metrics.
MARKS = ("missing", "empty_prediction", "empty_reference")

#: Metrics that take a parameter after `@`, and what it means.
PARAMETERS: dict[str, str] = {"nsd": "tolerance in mm", "hd": "percentile from 0 to 100"}

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
