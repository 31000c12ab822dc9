"""Did an arm help? Paired differences to the base, case by case, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ichbench.board.summary import (
    DEFAULT_METRICS,
    DEFAULT_RESAMPLES,
    CaseTable,
    FloatArray,
    case_table,
    exact_mean,
    generator_for,
    listed,
    mean_interval,
)
from ichbench.errors import InputError
from ichbench.scoring.protocol import METRICS, Better, split_metric

if TYPE_CHECKING:
    from ichbench.scoring.score import Score

Verdict = Literal["better", "worse", "not separable", "no direction"]

#: With fewer pairs no two-sided sign test or sign-flip permutation test can reach 5 % (2 / 2**5 = 0.0625), so no verdict is given.
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class Effect:
    """One arm against the base in one metric, over the cases that both have.

    difference      mean of (arm - base) over pairs, in the unit of the metric; nan where +inf and -inf meet
    lower, upper    its 95 % interval over cases (`summary.mean_interval` of the paired differences)
    n_pairs         pairs with a defined difference
    n_left_out      pairs without one: undefined in an arm (nan), or infinite in both
    share_improved  share of the pairs in which the arm is strictly better; nan for a metric without a direction
    verdict         better or worse if the interval leaves out 0 and there are at least FEWEST_PAIRS pairs
    """

    arm: str
    base: str
    metric: str
    difference: float
    lower: float
    upper: float
    n_pairs: int
    n_left_out: int
    share_improved: float
    verdict: Verdict


def paired_effects(
    rows: Iterable[Score],
    base: str = "base",
    metrics: Sequence[str] = DEFAULT_METRICS,
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
) -> list[Effect]:
    """Compare every other arm with `base`: arms in alphabetical order, metrics in the given order.

    Seeds and folds are averaged within a case first, so an untrained arm can be compared with a base of several seeds.
    InputError: no such base, arms scored on different cases, and whatever `summary.case_table` refuses.
    """
    return effects_of_table(case_table(rows, metrics), base, seed, resamples)


def effects_of_table(table: CaseTable, base: str = "base", seed: int = 0, resamples: int = DEFAULT_RESAMPLES) -> list[Effect]:
    """`paired_effects` for a table that is already folded."""
    if base not in table.arms:
        raise InputError(f"there is no arm {base!r} to compare with; the rows have {listed(table.arms)}. Name one of them as base")
    require_same_cases(table, base)
    directions = {metric: better_direction(metric) for metric in table.metrics}
    return [
        _effect(table, arm, base, metric, directions[metric], seed, resamples)
        for arm in table.arms
        if arm != base
        for metric in table.metrics
    ]


def require_same_cases(table: CaseTable, base: str | None = None) -> None:
    """Refuse arms that were scored on different cases: a mean over other cases answers another question."""
    first = table.arms[0] if base is None else base
    expected = set(table.cases[first])
    for arm in table.arms:
        found = set(table.cases[arm])
        if found != expected:
            raise InputError(
                f"arms {first!r} and {arm!r} were not scored on the same cases: only {first!r} has "
                f"{listed(sorted(expected - found)) or 'none'}; only {arm!r} has {listed(sorted(found - expected)) or 'none'}. "
                "Score both on one cohort, or leave one of them out"
            )


def better_direction(metric: str) -> Better:
    """Which way is better for `name[@parameter][/label]`: declared once, in `scoring.protocol.METRICS`."""
    return METRICS[split_metric(metric)[0]].better


def verdict_of(lower: float, upper: float, n_pairs: int, better: Better) -> Verdict:
    """The plain word for an interval of (arm - base)."""
    if better == "none":
        return "no direction"
    if n_pairs < FEWEST_PAIRS or not (lower > 0 or upper < 0):
        return "not separable"
    return "better" if (lower > 0) == (better == "higher") else "worse"


def _effect(table: CaseTable, arm: str, base: str, metric: str, better: Better, seed: int, resamples: int) -> Effect:
    differences = paired_differences(table.values[arm, metric], table.values[base, metric])
    lower, upper = mean_interval(differences, generator_for(seed, arm, metric, "minus", base), resamples)
    n_pairs = len(differences)
    improved = differences > 0 if better == "higher" else differences < 0
    return Effect(
        arm=arm,
        base=base,
        metric=metric,
        difference=exact_mean(differences),
        lower=lower,
        upper=upper,
        n_pairs=n_pairs,
        n_left_out=len(table.cases[arm]) - n_pairs,
        share_improved=float(improved.sum()) / n_pairs if n_pairs and better != "none" else math.nan,
        verdict=verdict_of(lower, upper, n_pairs, better),
    )


def paired_differences(arm_values: FloatArray, base_values: FloatArray) -> FloatArray:
    """arm - base for the pairs that have a difference; nan in either, and infinite in both, have none."""
    with np.errstate(invalid="ignore"):  # inf - inf is what is being looked for
        differences = arm_values - base_values
    return differences[~np.isnan(differences)]
