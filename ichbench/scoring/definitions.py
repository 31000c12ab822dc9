"""How much of a score is the tool: the same masks under the definitions that people meet, and NSD over its tolerance.

Every tool prints a "surface Dice" and an "HD95". At the voxels of a head CT (0.45 x 0.45 x 5 mm) their numbers differ by
up to ten points of NSD (facts, C4), which is more than most published gains. The definition matrix puts them side by
side: one value per metric and definition, minus the official one of INSTANCE 2022.

The tolerance is the protocol's, and every key says it (`nsd@0.42`); what is official stays INSTANCE 2022 under any protocol.

The tolerance matters as much. At 0.42 mm a shift by one voxel scores 1.00 where voxels are 0.42 mm wide and about 0.90
where they are 0.43 mm, so a curve over the tolerance says more than its one point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring import edges, overlap, surface
from ichbench.scoring.protocol import PROTOCOLS, Protocol, split_metric
from ichbench.scoring.score import Measured, measure, score_measured

#: The protocol whose numbers are the official ones.
OFFICIAL = "instance2022"
#: What the matrix compares; `nsd@1.0` is another tolerance.
MATRIX_METRICS = ("dice", "nsd", "hd", "hd95", "assd")
#: The first line of the table.
HEADING = "official: the formulas of INSTANCE 2022, under every protocol; hd95 and assd, which it lacks, from the same surfaces"
#: Tolerances of the curve in mm, dense about the official 0.42 mm and the common in-plane voxel edges.
TOLERANCES_MM = (0.1, 0.2, 0.3, 0.4, 0.42, 0.43, 0.45, 0.488, 0.5, 0.6, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True)
class Definition:
    """One way to compute a metric. `formula` takes the pair and the tolerance; None is the official way (score.py)."""

    metric: str
    name: str
    tools: str
    formula: Callable[[Measured, float], float] | None


#: In the order of the table; the first definition of a metric is the official one.
DEFINITIONS: tuple[Definition, ...] = (
    Definition("dice", "smoothed", "INSTANCE 2022: 1e-5 above and below the line", None),
    Definition("dice", "strict", "DeepMind, MONAI, nnU-Net, MedPy: nothing added", lambda pair, _: overlap.dice(pair.counts)),
    Definition("nsd", "surfels_area", "INSTANCE 2022, DeepMind, MONAI with use_subvoxels", None),
    Definition("nsd", "voxels_count", "MONAI by default, Metrics Reloaded", lambda pair, tau: edges.nsd_voxels(pair.edge_mm, tau)),
    Definition("nsd", "voxels_fractions", "panoptica, GaNDLF", lambda pair, tau: edges.nsd_fractions(pair.edge_mm, tau)),
    Definition("hd", "surfels", "INSTANCE 2022, DeepMind", None),
    Definition("hd", "voxels", "MONAI, MedPy, panoptica, Metrics Reloaded", lambda pair, _: edges.hd_directional(pair.edge_mm, 100.0)),
    Definition("hd95", "surfels_area", "DeepMind: percentile by area", None),
    Definition("hd95", "voxels_directional", "MONAI, Metrics Reloaded", lambda pair, _: edges.hd_directional(pair.edge_mm, 95.0)),
    Definition("hd95", "voxels_pooled", "MedPy, panoptica, GaNDLF, seg-metrics", lambda pair, _: edges.hd_pooled(pair.edge_mm, 95.0)),
    Definition("assd", "surfels_area", "both surfaces together by area", None),
    Definition("assd", "surfels_directional", "DeepMind's two averages, their mean", lambda pair, _: _mean_of_means(pair.surfaces)),
    Definition("assd", "voxels_pooled", "MONAI, MedPy from 0.5, Metrics Reloaded", lambda pair, _: edges.assd_pooled(pair.edge_mm)),
    Definition("assd", "voxels_directional", "panoptica, MedPy to 0.4, MASD", lambda pair, _: edges.assd_directional(pair.edge_mm)),
)


@dataclass(frozen=True)
class MatrixRow:
    """One definition over all cases.

    mean         over the `finite` of `cases` in which it is a finite number; nan without any
    difference   mean of (this minus official) over the cases in which both are finite; 0 for the official one
    largest      the difference of largest size in one case, with its sign
    spread       of the metric: highest minus lowest mean of its definitions, over the cases in which all are finite
    """

    metric: str
    definition: str
    tools: str
    mean: float
    finite: int
    cases: int
    difference: float
    largest: float
    spread: float


@dataclass(frozen=True)
class CurvePoint:
    """Mean NSD at one tolerance over the `finite` of `cases` that have one (two empty masks have none)."""

    tolerance_mm: float
    mean: float
    finite: int
    cases: int


def pair_definitions(
    reference_zyx: Any, predicted_zyx: Any, spacing_zyx_mm: Sequence[float], metrics: Sequence[str] = MATRIX_METRICS
) -> dict[tuple[str, str], float]:
    """(metric, definition) -> value for one pair of masks, which are given as to `score_masks`.

    metrics   any of `MATRIX_METRICS` and `nsd@TOLERANCE`; InputError for others

    The official values are those of `score_masks`. A pair with an empty mask gets the official value under every
    definition of a surface metric: what an empty mask gets is the protocol's choice, not the definition's. Strict Dice
    is 0 then, or nan for two empty masks.
    """
    return measured_definitions(measure(reference_zyx, predicted_zyx, spacing_zyx_mm, OFFICIAL), metrics)


def matrix_metrics(protocol: Protocol, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """What the matrix compares under a protocol: `MATRIX_METRICS`, or those among the metrics `asked` for that it knows.

    A bare `nsd` becomes `nsd@TOLERANCE`, the protocol's. InputError where none of `asked` is in the matrix.
    """
    known = [key for key in (MATRIX_METRICS if asked is None else asked) if _in_matrix(key)]
    if not known:
        raise InputError(f"--definitions compares {', '.join(MATRIX_METRICS)} and nsd@TOLERANCE; none of them is among the metrics given")
    return tuple(dict.fromkeys(f"nsd@{protocol.tolerance_mm!r}" if key == "nsd" else key for key in known))


def curve_tolerances(protocol: Protocol) -> tuple[float, ...]:
    """`TOLERANCES_MM`, and the protocol's own among them."""
    return tuple(sorted({*TOLERANCES_MM, protocol.tolerance_mm}))


def measured_definitions(pair: Measured, metrics: Sequence[str] = MATRIX_METRICS) -> dict[tuple[str, str], float]:
    """`pair_definitions` of a pair that has been measured already; a bare `nsd` is at the official tolerance."""
    wanted = {key: _tolerance_mm(key) for key in metrics}
    official = score_measured(pair, tuple(wanted))
    filled = pair.counts.reference > 0 and pair.counts.predicted > 0
    values: dict[tuple[str, str], float] = {}
    for key, tolerance_mm in wanted.items():
        for definition in _of(key):
            if definition.formula is None or not (filled or definition.metric == "dice"):
                values[key, definition.name] = official[key]
            else:
                values[key, definition.name] = definition.formula(pair, tolerance_mm)
    return values


def definition_matrix(pairs: Iterable[tuple[Any, Any, Sequence[float]]], metrics: Sequence[str] = MATRIX_METRICS) -> tuple[MatrixRow, ...]:
    """Every definition over many (reference, prediction, spacing): `fold_definitions` of their `pair_definitions`.

    Pairs are taken one at a time, so that a generator keeps one pair in memory.
    """
    return fold_definitions(pair_definitions(*pair, metrics) for pair in pairs)


def fold_definitions(cases: Iterable[Mapping[tuple[str, str], float]]) -> tuple[MatrixRow, ...]:
    """Rows of the matrix from the values of each case (`pair_definitions`), which must hold the same keys.

    In the order of the keys; empty without cases. InputError for cases that do not fit together.
    """
    found = [dict(case) for case in cases]
    if not found:
        return ()
    keys = list(found[0])
    if any(case.keys() != found[0].keys() for case in found):
        raise InputError("the cases of a definition matrix were measured with different metrics; give every case the same ones")
    columns = {key: np.array([case[key] for case in found], dtype=np.float64) for key in keys}
    rows = []
    for metric in dict.fromkeys(metric for metric, _ in keys):
        names = [name for found_metric, name in keys if found_metric == metric]
        official = columns[metric, names[0]]
        shared = np.logical_and.reduce([np.isfinite(columns[metric, name]) for name in names])
        means = [_mean(columns[metric, name][shared]) for name in names]
        tools = {definition.name: definition.tools for definition in _of(metric)}
        for name in names:
            values = columns[metric, name]
            both = np.isfinite(values) & np.isfinite(official)
            apart = values[both] - official[both]
            rows.append(
                MatrixRow(
                    metric,
                    name,
                    tools.get(name, ""),
                    _mean(values[np.isfinite(values)]),
                    int(np.count_nonzero(np.isfinite(values))),
                    len(found),
                    _mean(apart),
                    float(apart[np.argmax(np.abs(apart))]) if apart.size else math.nan,
                    max(means) - min(means),
                )
            )
    return tuple(rows)


def render_matrix(rows: Sequence[MatrixRow]) -> str:
    """The matrix as plain text: a table, and under it what the choice of definition alone does to each metric.

    Where no case has a number (a distance, when no case has both masks) it says "undefined".
    """
    if not rows:
        return "no cases\n"
    first = {row.metric: row for row in reversed(rows)}
    cells = [("metric", "definition", "mean", "minus official", "largest in a case", "finite", "who computes it so")]
    for row in rows:
        official = row is first[row.metric]
        cells.append(
            (
                row.metric if official else "",
                row.definition,
                _plain(row.mean),
                "official" if official else _signed(row.difference),
                "" if official else _signed(row.largest),
                f"{row.finite}/{row.cases}",
                row.tools,
            )
        )
    moves = []
    for metric, row in reversed(first.items()):
        moved = f"the definition alone moves the mean by {row.spread:.4f}{_unit(metric)}"
        moves.append(f"{metric}: {'undefined (no case with both masks)' if math.isnan(row.spread) else moved}")
    return HEADING + "\n" + _table(cells, right=(2, 3, 4, 5)) + "\n" + "\n".join(moves) + "\n"


def tolerance_curve(record: surface.SurfaceDistances, tolerances_mm: Sequence[float] = TOLERANCES_MM) -> tuple[float, ...]:
    """NSD at each tolerance from one record, the official definition: never falling as the tolerance grows.

    0 throughout when one mask is empty, nan when both are. InputError for a tolerance that is not a finite number from 0 up.
    """
    return tuple(surface.nsd(record, tolerance_mm) for tolerance_mm in tolerances_mm)


def mean_curve(curves: Iterable[Sequence[float]], tolerances_mm: Sequence[float] = TOLERANCES_MM) -> tuple[CurvePoint, ...]:
    """The curves of many cases (`tolerance_curve` at these tolerances), averaged at each tolerance over finite values."""
    found = [tuple(curve) for curve in curves]
    for curve in found:
        if len(curve) != len(tolerances_mm):
            raise InputError(f"a tolerance curve has {len(curve)} values, but there are {len(tolerances_mm)} tolerances")
    points = []
    for index, tolerance_mm in enumerate(tolerances_mm):
        values = np.array([curve[index] for curve in found], dtype=np.float64)
        finite = values[np.isfinite(values)]
        points.append(CurvePoint(float(tolerance_mm), _mean(finite), int(finite.size), len(found)))
    return tuple(points)


def render_curve(points: Sequence[CurvePoint], protocol: Protocol = PROTOCOLS[OFFICIAL]) -> str:
    """The mean curve as plain text, with the tolerances of INSTANCE 2022 and of the protocol marked."""
    # a protocol without a surface Dice has a tolerance too, for whoever asks for one, but none to speak of
    own = protocol.name != OFFICIAL and not {"nsd", "nsd_voxels", "nsd_fractions"}.isdisjoint(protocol.metrics)
    cells = [("tolerance mm", "NSD as INSTANCE 2022", "finite", "")]
    for point in points:
        marks = ["INSTANCE 2022"] if point.tolerance_mm == PROTOCOLS[OFFICIAL].tolerance_mm else []
        if own and point.tolerance_mm == protocol.tolerance_mm:
            marks.append(f"protocol {protocol.name}")
        cells.append((f"{point.tolerance_mm:g}", _plain(point.mean), f"{point.finite}/{point.cases}", ", ".join(marks)))
    return _table(cells, right=(0, 1, 2))


def _of(key: str) -> list[Definition]:
    name = split_metric(key)[0]
    return [definition for definition in DEFINITIONS if definition.metric == name]


def _in_matrix(key: str) -> bool:
    name, parameter = split_metric(key)
    return name in MATRIX_METRICS and (parameter is None or name == "nsd")


def _tolerance_mm(key: str) -> float:
    """The tolerance behind a metric of the matrix. InputError for a metric that is not in it."""
    if not _in_matrix(key):
        raise InputError(f"{key!r} is not in the definition matrix; choose from {', '.join(MATRIX_METRICS)} and nsd@TOLERANCE")
    parameter = split_metric(key)[1]
    return PROTOCOLS[OFFICIAL].tolerance_mm if parameter is None else parameter


def _mean_of_means(record: surface.SurfaceDistances) -> float:
    sides = ((record.reference_mm, record.reference_mm2), (record.predicted_mm, record.predicted_mm2))
    return sum(float(np.sum(distances * areas) / np.sum(areas)) for distances, areas in sides) / 2.0


def _mean(values: NDArray[np.float64]) -> float:
    """Summed exactly, so that the order of the cases does not matter."""
    return math.fsum(values.tolist()) / values.size if values.size else math.nan


def _unit(metric: str) -> str:
    return "" if split_metric(metric)[0] in ("dice", "nsd") else " mm"


def _plain(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"


def _signed(difference: float) -> str:
    """Four places, but never a zero for a difference that is there (smoothing moves Dice by 1e-9)."""
    if math.isnan(difference):
        return "undefined"
    return f"{difference:+.4f}" if difference == 0 or abs(difference) >= 5e-5 else f"{difference:+.0e}"


def _table(cells: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        placed = [row[c].rjust(width) if c in right else row[c].ljust(width) for c, width in enumerate(widths)]
        lines.append("  ".join(placed).rstrip())
    return "\n".join(lines) + "\n"
