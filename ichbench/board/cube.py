"""Score rows -> one array over metrics, arms and cases, and what is done about the holes in it before anything is ranked.

A hole is an absent row, an undefined value (nan) or an infinite one. Nothing is decided quietly: the default refuses holes and keeps
infinite values as they are; every other rule is asked for by name and counted per arm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ichbench.board.summary import listed, mark_of, mean_of_seeds, refuse_mixed_seeds
from ichbench.errors import InputError
from ichbench.scoring.protocol import METRICS, Better, split_metric

if TYPE_CHECKING:
    from ichbench.scoring.score import Score

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Kind = Literal["refuse", "exact", "worst", "drop", "drop-case", "penalty"]
#: What may be asked for absent and undefined values, and for infinite ones; the first is the default.
MISSING_KINDS: tuple[Kind, ...] = ("refuse", "worst", "drop", "drop-case")
INFINITE_KINDS: tuple[Kind, ...] = ("exact", "worst", "drop", "drop-case")


@dataclass(frozen=True)
class Rule:
    """What happens to a hole.

    refuse     an error that lists them
    exact      (infinite only) stays infinite: infinite values tie with each other behind every finite one
    worst      the arm takes the last place wherever the cell counts: in that case, or in the metric when cases are averaged first
    drop       left out for this arm alone; the count is printed beside the arm
    drop-case  the case is left out of this metric for every arm, and counted
    penalty    a finite value instead, by metric, in the metric's own unit
    """

    kind: Kind
    penalties: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cube:
    """Values over (metric, arm, case), seeds and folds averaged within a case.

    values_mac          float64; inf as it came, nan where undefined or absent
    absent_mac          True where an arm has no row (or one of its seeds has none)
    n_empty, n_missing  per arm: cases with an empty prediction (in the label of a ranked metric: `dice/2` counts empty labels 2), and
                        with none at all (scored as empty); -1 if the rows do not say
    """

    metrics: tuple[str, ...]
    arms: tuple[str, ...]
    cases: tuple[str, ...]
    values_mac: FloatArray
    absent_mac: BoolArray
    n_empty: tuple[int, ...]
    n_missing: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A cube without holes, turned so that lower is better.

    lower_mac   finite or +inf; 0 where not kept and where worst
    worst_mac   the arm takes the last place here
    kept_mac    False: the cell counts for nothing
    n_dropped   per arm, cells left out for it alone; `n_worst`, `n_penalised` likewise
    notes       what was done, in words
    """

    metrics: tuple[str, ...]
    arms: tuple[str, ...]
    cases: tuple[str, ...]
    lower_mac: FloatArray
    worst_mac: BoolArray
    kept_mac: BoolArray
    n_dropped: tuple[int, ...]
    n_worst: tuple[int, ...]
    n_penalised: tuple[int, ...]
    notes: tuple[str, ...]


def better_of(metric: str) -> Better:
    """Which way is better: declared in `scoring.protocol.METRICS`, once. InputError for a metric without a direction."""
    better = METRICS[split_metric(metric)[0]].better
    if better == "none":
        ranked = ", ".join(name for name, known in METRICS.items() if known.better != "none")
        raise InputError(f"the metric {metric!r} has no better direction, so nothing can be ranked by it; choose among {ranked}")
    return better


def cube_of_rows(rows: Iterable[Score], metrics: Sequence[str]) -> Cube:
    """Fold score rows; arms and cases in alphabetical order, metrics as given. Folds of a seed, then seeds are averaged (nan left out).

    A cell is absent when the arm has no such row, or when one of its seeds lacks it: what the other seeds say is another question.
    InputError: no rows, two rows of one number (all are listed), an arm with and without seeds, a metric that no row
    has, a mark that is neither 0 nor 1.
    """
    mark_names = {mark: {mark_of(metric, mark) for metric in metrics} for mark in ("empty_prediction", "missing")}
    wanted = frozenset(metrics).union(*mark_names.values())
    runs: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(dict)
    seeds: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    cases: set[str] = set()
    seen: set[tuple[str, ...]] = set()
    repeated: list[str] = []
    present: set[str] = set()
    for row in rows:
        present.add(row.metric)
        cases.add(row.case)
        seeds[row.arm][row.seed].add(row.case)
        if row.metric not in wanted:
            continue
        key = tuple(row[:5])
        if key in seen:
            repeated.append(",".join(key))
        seen.add(key)
        runs[row.metric, row.arm, row.case].setdefault(row.seed, []).append(float(row.value))
    if not cases:
        raise InputError("there are no score rows, so there is nothing to rank. Score a cohort first")
    if repeated:
        raise InputError(f"duplicate score rows (arm,fold,seed,case,metric): {listed(repeated)}. Keep one row of each")
    refuse_mixed_seeds(seeds)
    unknown = [metric for metric in metrics if metric not in present]
    if unknown or not metrics:
        raise InputError(f"no score row has the metric {listed(unknown) or '(none given)'}; the rows have {listed(sorted(present))}")
    arms, ids = tuple(sorted(seeds)), tuple(sorted(cases))
    values = np.full((len(metrics), len(arms), len(ids)), math.nan)
    absent = np.ones(values.shape, dtype=bool)
    arm_place = {arm: index for index, arm in enumerate(arms)}
    case_place = {case: index for index, case in enumerate(ids)}
    metric_place = {metric: index for index, metric in enumerate(metrics)}
    marked: dict[str, dict[str, set[str]]] = {mark: {} for mark in mark_names}
    for (metric, arm, case), by_seed in runs.items():
        found = [value for folds in by_seed.values() for value in folds]
        for mark, names in mark_names.items():
            if metric in names:
                if any(value not in (0.0, 1.0) for value in found):
                    raise InputError(f"arm {arm!r}, case {case!r}: {metric} is {found[0]!r}; it must be 0 or 1")
                # a case counts once, whichever of its seeds and ranked labels is empty
                marked[mark].setdefault(arm, set()).update({case} if max(found) else ())
        if metric in metric_place:
            at = metric_place[metric], arm_place[arm], case_place[case]
            absent[at] = by_seed.keys() != seeds[arm].keys()
            values[at] = math.nan if absent[at] else found[0] if len(found) == 1 else mean_of_seeds(by_seed.values())
    n_empty, n_missing = (tuple(len(by_arm[arm]) if arm in by_arm else -1 for arm in arms) for by_arm in marked.values())
    return Cube(tuple(metrics), arms, ids, values, absent, n_empty, n_missing)


def parse_rule(text: str, kinds: Sequence[Kind], metrics: Sequence[str], option: str) -> Rule:
    """`worst`, `drop`, ... or penalties `dice=0,hd=374`, in the metric's unit. InputError for anything else."""
    if text in kinds:
        return Rule(next(kind for kind in kinds if kind == text))
    penalties: dict[str, float] = {}
    for part in text.split(","):
        metric, equals, number = part.partition("=")
        try:
            value = float(number) if equals else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{option} {text!r} is not understood; give one of {', '.join(kinds)}, or penalties such as dice=0,hd=374")
        if metric not in metrics:
            raise InputError(f"{option}: {metric!r} is not ranked; the ranking is over {', '.join(metrics)}")
        if metric in penalties:
            raise InputError(f"{option}: two penalties for {metric!r}; give one")
        penalties[metric] = value
    return Rule("penalty", penalties)


def prepare(cube: Cube, missing: Rule | None = None, infinite: Rule | None = None) -> Prepared:
    """Apply the rules to the holes and turn every metric so that lower is better.

    A case that is undefined (nan) for every arm says nothing about any of them: it is left out of that metric, and noted.
    InputError: holes under `refuse`, a metric without a direction, an infinitely good value, a hole without a penalty.
    """
    missing, infinite = missing or Rule("refuse"), infinite or Rule("exact")
    sign_m11 = np.array([1.0 if better_of(metric) == "lower" else -1.0 for metric in cube.metrics])[:, None, None]
    lower = cube.values_mac * sign_m11
    _refuse_infinitely_good(cube, lower)
    nan_for_all = np.isnan(lower).all(axis=1, keepdims=True) & ~cube.absent_mac.any(axis=1, keepdims=True)
    hole = np.isnan(lower) & ~nan_for_all
    unending = np.isposinf(lower)
    notes = [
        f"{metric}: {int(nan_for_all[m].sum())} of {len(cube.cases)} cases are undefined for every arm and left out"
        for m, metric in enumerate(cube.metrics)
        if nan_for_all[m].any()
    ]
    if missing.kind == "refuse" and hole.any():
        raise InputError(_holes(cube, hole))
    kept = np.broadcast_to(~nan_for_all, lower.shape).copy()
    worst = np.zeros(lower.shape, dtype=bool)
    penalised = np.zeros(lower.shape, dtype=bool)
    for what, rule, cells in (("missing or undefined", missing, hole), ("infinite", infinite, unending)):
        if not cells.any() or rule.kind in ("exact", "refuse"):
            continue
        if rule.kind == "worst":
            worst |= cells
        elif rule.kind == "drop":
            kept &= ~cells
        elif rule.kind == "drop-case":
            gone = cells.any(axis=1, keepdims=True)
            kept &= ~gone
            notes += [
                f"{metric}: {int(gone[m].sum())} of {len(cube.cases)} cases are left out for every arm, because a value is {what}: "
                + listed(case for case, out in zip(cube.cases, gone[m, 0], strict=True) if out)
                for m, metric in enumerate(cube.metrics)
                if gone[m].any()
            ]
        else:
            penalised |= cells
            lower = _penalise(cube, lower, cells, rule, what, sign_m11, notes)
    if not kept.any(axis=(1, 2)).all():
        empty = [metric for m, metric in enumerate(cube.metrics) if not kept[m].any()]
        raise InputError(
            f"no case is left for {listed(empty)}, so nothing can be ranked by it; leave the metric out or choose another rule"
        )
    whole_case_gone = ~kept.any(axis=1, keepdims=True)
    worst &= kept
    return Prepared(
        metrics=cube.metrics,
        arms=cube.arms,
        cases=cube.cases,
        lower_mac=np.where(kept & ~worst, lower, 0.0),
        worst_mac=worst,
        kept_mac=kept,
        n_dropped=_by_arm(~kept & ~whole_case_gone),
        n_worst=_by_arm(worst),
        n_penalised=_by_arm(penalised & kept),
        notes=tuple(notes),
    )


def _by_arm(cells_mac: BoolArray) -> tuple[int, ...]:
    return tuple(int(n) for n in cells_mac.sum(axis=(0, 2)))


def _penalise(cube: Cube, lower: FloatArray, cells: BoolArray, rule: Rule, what: str, sign_m11: FloatArray, notes: list[str]) -> FloatArray:
    filled = lower.copy()
    for m, metric in enumerate(cube.metrics):
        if not cells[m].any():
            continue
        if metric not in rule.penalties:
            raise InputError(f"{metric} has {what} values and no penalty; add {metric}=VALUE, or choose another rule")
        given = rule.penalties[metric]
        filled[m][cells[m]] = given * sign_m11[m, 0, 0]
        beaten = int((lower[m][np.isfinite(lower[m])] > given * sign_m11[m, 0, 0]).sum())
        if beaten:
            notes.append(f"the penalty {given:g} of {metric} is better than {beaten} measured values: failing pays in those cases")
    return filled


def _refuse_infinitely_good(cube: Cube, lower: FloatArray) -> None:
    found = np.argwhere(np.isneginf(lower))
    if len(found):
        m, a, c = found[0]
        raise InputError(
            f"{cube.metrics[m]} of arm {cube.arms[a]!r}, case {cube.cases[c]!r} is {cube.values_mac[m, a, c]}, which is infinitely good "
            f"({len(found)} such values); no metric can be that. Correct the rows"
        )


def _holes(cube: Cube, hole: BoolArray) -> str:
    """Every arm and metric with holes, the first few spelled out, and what can be done."""
    found = []
    for a, arm in enumerate(cube.arms):
        for m, metric in enumerate(cube.metrics):
            for word, cells in (("no row", hole[m, a] & cube.absent_mac[m, a]), ("nan", hole[m, a] & ~cube.absent_mac[m, a])):
                if cells.any():
                    names = listed(case for case, bad in zip(cube.cases, cells, strict=True) if bad)
                    found.append(f"{arm!r} has {word} in {metric} for {int(cells.sum())} of {len(cube.cases)} cases ({names})")
    shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more such lines" if len(found) > 8 else "")
    return (
        f"values are missing, and no arm is ranked on the rest quietly: {shown}. Score every arm on every case, or say "
        "what a missing value is worth: --missing worst, drop, drop-case, or penalties such as dice=0,hd=374 "
        "(nan may mean that there is nothing to measure, as in two empty masks: then drop-case is fair)"
    )
