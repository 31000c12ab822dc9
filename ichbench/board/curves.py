"""Learning curves: how a score grows with the number of training cases, and what a doubling brings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ichbench.board.effects import Estimate, estimate_family, without_rounding
from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, Method
from ichbench.board.summary import ArmSummary, CaseTable, Clusters, clusters_of, summarise_table
from ichbench.errors import InputError


@dataclass(frozen=True)
class LearningCurve:
    """One metric over arms that differ in the number of training cases alone.

    points         (number of training cases, summary of that arm), fewest first
    per_doubling   the slope of a straight line through score against log2(cases), fitted in every case by itself, over the cases
    """

    metric: str
    points: tuple[tuple[int, ArmSummary], ...]
    per_doubling: Estimate


def learning_curves(
    table: CaseTable,
    training_cases: Mapping[str, int],
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    method: Method = DEFAULT_METHOD,
    clusters: Clusters = None,
) -> list[LearningCurve]:
    """One curve per metric over the arms that `training_cases` names (arm -> number of training cases).

    InputError: fewer than two different numbers, a number below 1, an arm without scores, arms with different cases.
    """
    sizes = sorted((count, arm) for arm, count in training_cases.items())
    if len({count for count, _ in sizes}) < 2 or sizes[0][0] < 1:
        raise InputError(
            f"a learning curve needs two different numbers of training cases, each 1 or more; given are {dict(training_cases)}"
        )
    if missing := [arm for _, arm in sizes if arm not in table.arms]:
        raise InputError(f"there are no scores of {', '.join(missing)}, which the learning curve needs")
    cases = table.cases[sizes[0][1]]
    if other := [arm for _, arm in sizes if table.cases[arm] != cases]:
        raise InputError(f"arms {sizes[0][1]!r} and {other[0]!r} were not scored on the same cases; a curve needs one cohort")
    summaries = {(one.arm, one.metric): one for one in summarise_table(table, seed, resamples, method, clusters)}
    units = clusters_of(cases, clusters)
    return [
        LearningCurve(
            metric=metric,
            points=tuple((count, summaries[arm, metric]) for count, arm in sizes),
            per_doubling=estimate_family([_slopes(table, metric, sizes)], [units], seed, resamples, method)[0],
        )
        for metric in table.metrics
    ]


def _slopes(table: CaseTable, metric: str, sizes: Sequence[tuple[int, str]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Least-squares slope of each case's scores against log2(training cases); nan where a score is infinite or undefined."""
    doublings = np.array([math.log2(count) for count, _ in sizes])
    weights = doublings - doublings.mean()
    values = np.stack([table.values[arm, metric] for _, arm in sizes])
    values = np.where(np.isfinite(values), values, np.nan)
    slopes = (weights[:, None] * values).sum(axis=0) / (weights**2).sum()
    return without_rounding(slopes, np.abs(values).max(axis=0))
