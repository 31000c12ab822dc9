"""Factorial studies: what each level does on average over the others, and whether two levels need each other.

Both are contrasts within a case, so their intervals and tests are those of any paired difference. In a complete design they
equal the coefficients of least squares with sum-to-zero factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from ichbench.board.effects import (
    Claim,
    better_direction,
    estimate_family,
    margin_of,
    one_seed,
    seed_error,
    verdict_of,
    within_width,
    without_rounding,
)
from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, FloatArray, Method
from ichbench.board.summary import CaseTable, Clusters, clusters_of, listed
from ichbench.errors import InputError

Kind = Literal["main effect", "interaction"]
#: (level or None for off) of every factor -> the contrast's weight on that arm
Weights = dict[tuple[str | None, ...], float]


@dataclass(frozen=True)
class FactorEffect(Claim):
    """A contrast of a factorial design in one metric; Holm's family is all contrasts of one kind in that metric.

    main effect   mean over all settings of the other factors of (level - off)
    interaction   mean over the remaining factors of (both - first alone) - (second alone - neither): above 0, the two together give
                  a higher value than the sum of what each gives alone
    """

    kind: Kind
    term: str


def factorial_effects(
    table: CaseTable,
    base: str,
    factors: Mapping[str, Sequence[str]],
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    method: Method = DEFAULT_METHOD,
    clusters: Clusters = None,
    margins: Mapping[str, float] | None = None,
) -> list[FactorEffect]:
    """Main effects and two-way interactions of a complete design whose arms are named as `run-ablation` does (`a+b`, base for none).

    InputError: fewer than two factors, arms of the design without scores, arms with different cases.
    """
    if len(factors) < 2 or not all(factors.values()):
        raise InputError(f"a factorial design needs two factors or more with a level each; given are {listed(factors) or 'none'}")
    arm_of = design_arms(base, factors)
    if missing := sorted(set(arm_of.values()) - set(table.arms)):
        raise InputError(
            f"the factorial design lacks scores of {listed(missing)}, so its effects would mix with each other. "
            "Run the missing arms, or compare arms one at a time"
        )
    cases = table.cases[base]
    if other := [arm for arm in arm_of.values() if table.cases[arm] != cases]:
        raise InputError(f"arms {base!r} and {other[0]!r} were not scored on the same cases; score all arms of a design on one cohort")
    units = clusters_of(cases, clusters)
    kinds: dict[Kind, dict[str, Weights]] = {
        "main effect": main_contrasts(factors),
        "interaction": interaction_contrasts(factors),
    }
    found = []
    for metric in table.metrics:
        values = {choice: table.values[arm, metric] for choice, arm in arm_of.items()}
        better, margin = better_direction(metric), margin_of(metric, margins)
        for kind, contrasts in kinds.items():
            columns = [contrast_of(values, weights) for weights in contrasts.values()]
            estimates = estimate_family(columns, [units] * len(columns), seed, resamples, method)
            for (term, weights), column, estimate in zip(contrasts.items(), columns, estimates, strict=True):
                by_arm = {arm_of[setting]: weight for setting, weight in weights.items()}
                found.append(
                    FactorEffect(
                        **asdict(within_width(estimate, metric, column) if kind == "main effect" else estimate),
                        metric=metric,
                        verdict=verdict_of(estimate, better, margin),
                        margin=margin,
                        single_seed=any(one_seed(table.seeds[arm]) for arm in by_arm),
                        seed_error=seed_error(table, by_arm, metric),
                        kind=kind,
                        term=term,
                    )
                )
    return found


def design_arms(base: str, factors: Mapping[str, Sequence[str]]) -> dict[tuple[str | None, ...], str]:
    """Every setting of the factors (None: off) -> the arm that has it."""
    settings = itertools.product(*[(None, *levels) for levels in factors.values()])
    return {setting: "+".join(level for level in setting if level is not None) or base for setting in settings}


def main_contrasts(factors: Mapping[str, Sequence[str]]) -> dict[str, Weights]:
    """`level` -> weights of its main effect."""
    found: dict[str, Weights] = {}
    names = list(factors)
    for place, name in enumerate(names):
        others = [(None, *factors[other]) if other != name else (None,) for other in names]
        rest = list(itertools.product(*others))
        for level in factors[name]:
            weights: Weights = {}
            for setting in rest:
                weights[_with(setting, {place: level})] = 1 / len(rest)
                weights[setting] = -1 / len(rest)
            found[level] = weights
    return found


def interaction_contrasts(factors: Mapping[str, Sequence[str]]) -> dict[str, Weights]:
    """`level x level` -> weights of the interaction of two levels of different factors."""
    found: dict[str, Weights] = {}
    names = list(factors)
    for (first, one), (second, two) in itertools.combinations(enumerate(names), 2):
        others = [(None, *factors[name]) if name not in (one, two) else (None,) for name in names]
        rest = list(itertools.product(*others))
        for level, other in itertools.product(factors[one], factors[two]):
            weights: Weights = {}
            for setting in rest:
                weights[_with(setting, {first: level, second: other})] = 1 / len(rest)
                weights[_with(setting, {first: level})] = -1 / len(rest)
                weights[_with(setting, {second: other})] = -1 / len(rest)
                weights[setting] = 1 / len(rest)
            found[f"{level} x {other}"] = weights
    return found


def contrast_of(values: Mapping[tuple[str | None, ...], FloatArray], weights: Weights) -> FloatArray:
    """The contrast in every case; nan where an arm is undefined or infinities meet."""
    total, size = np.zeros((2, len(next(iter(values.values())))))
    with np.errstate(invalid="ignore"):
        for setting, weight in weights.items():
            total = total + weight * values[setting]
            size = np.maximum(size, np.abs(values[setting]))
    return without_rounding(total, size)


def _with(setting: tuple[str | None, ...], changes: Mapping[int, str]) -> tuple[str | None, ...]:
    return tuple(changes.get(place, level) for place, level in enumerate(setting))
