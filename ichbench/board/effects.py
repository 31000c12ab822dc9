"""Did an arm help? Paired differences to the base, case by case: interval, permutation p, and a plain verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, FloatArray, Method, exact_mean, standard_errors, unit_sums
from ichbench.board.signflip import ALPHA, detectable, holm, sign_flip_p, signed_ranks
from ichbench.board.summary import (
    CaseTable,
    Clusters,
    clusters_of,
    intervals_of,
    listed,
    sample_sd,
    width_of,
)
from ichbench.errors import InputError
from ichbench.scoring.protocol import METRICS, Better, split_metric

if TYPE_CHECKING:
    pass

Verdict = Literal["better", "worse", "not separable", "equivalent", "no direction"]
Units = Sequence[tuple[str, ...] | None]

#: With fewer pairs no two-sided sign test or sign-flip permutation test can reach 5 % (2 / 2**5 = 0.0625), so no verdict is given.
FEWEST_PAIRS = 6
#: A difference whose whole interval lies within -+ margin is called equivalent; by bare metric name. Others need --margin.
MARGINS: dict[str, float] = {"dice": 0.01, "nsd": 0.01}


@dataclass(frozen=True)
class Estimate:
    """A mean of per-case differences (or other contrasts), and what may be said about it.

    difference      mean over pairs, in the unit of the metric; nan where +inf and -inf meet
    lower, upper    its 95 % interval over cases, or over clusters
    n_pairs         pairs with a defined difference
    n_left_out      pairs without one: undefined in an arm (nan), or infinite in both
    n_units         what was drawn and flipped: the pairs, or their clusters
    standardised    difference divided by the standard deviation of the differences (Cohen's d_z); nan without a spread
    p, p_adjusted   two-sided sign-flip permutation p (of signed ranks where a difference is infinite); Holm over the family
    detectable      true difference that such a study calls separable in 80 % of cases, after Holm's first step; see `signflip`
    """

    difference: float
    lower: float
    upper: float
    n_pairs: int
    n_left_out: int
    n_units: int
    standardised: float
    p: float
    p_adjusted: float
    detectable: float


@dataclass(frozen=True)
class Claim(Estimate):
    """An estimate in one metric, and what is said about it.

    margin        what counts as equivalent; None where no margin is stated for the metric
    single_seed   an arm in it was trained with one seed only, so another seed may move the difference unseen
    seed_error    standard error of the difference from training seeds alone; 0 for untrained arms, nan with a single seed
    """

    metric: str
    verdict: Verdict
    margin: float | None
    single_seed: bool
    seed_error: float


@dataclass(frozen=True)
class Effect(Claim):
    """One arm against the base in one metric, over the cases that both have; the family of Holm is the arms of the table.

    share_improved  share of the pairs in which the arm is strictly better; nan for a metric without a direction
    """

    arm: str
    base: str
    share_improved: float


def paired_effects(
    table: CaseTable,
    base: str = "base",
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    method: Method = DEFAULT_METHOD,
    clusters: Clusters = None,
    margins: Mapping[str, float] | None = None,
) -> list[Effect]:
    """Compare every other arm of a table (`summary.case_table`) with `base`; arms and metrics in the table's order.

    The table holds means over seeds and folds within a case, so an untrained arm can be compared with a base of several seeds.
    `margins` (by metric or bare name) are taken before MARGINS. InputError: no such base, arms scored on different cases, a
    margin that is not above 0.
    """
    if base not in table.arms:
        raise InputError(f"there is no arm {base!r} to compare with; the rows have {listed(table.arms)}. Name one of them as base")
    require_same_cases(table, base)
    units = clusters_of(table.cases[base], clusters)
    arms = [arm for arm in table.arms if arm != base]
    found: dict[tuple[str, str], Effect] = {}
    for metric in table.metrics:
        better, margin = better_direction(metric), margin_of(metric, margins)
        columns = [differences_of(table.values[arm, metric], table.values[base, metric]) for arm in arms]
        for arm, column, estimate in zip(
            arms, columns, estimate_family(columns, [units] * len(arms), seed, resamples, method), strict=True
        ):
            improved = column > 0 if better == "higher" else column < 0
            found[arm, metric] = Effect(
                **asdict(within_width(estimate, metric, column)),
                arm=arm,
                base=base,
                metric=metric,
                share_improved=float(improved.sum()) / estimate.n_pairs if estimate.n_pairs and better != "none" else math.nan,
                verdict=verdict_of(estimate, better, margin),
                margin=margin,
                single_seed=any(one_seed(table.seeds[name]) for name in (arm, base)),
                seed_error=seed_error(table, {arm: 1.0, base: -1.0}, metric),
            )
    return [found[arm, metric] for arm in arms for metric in table.metrics]


def estimate_family(
    columns: Sequence[FloatArray], units: Units, seed: int = 0, resamples: int = DEFAULT_RESAMPLES, method: Method = DEFAULT_METHOD
) -> list[Estimate]:
    """One estimate per column of per-case differences (nan: none in that case); p is adjusted over the columns that have one."""
    ends = intervals_of(columns, units, seed, resamples, method)
    defined = [column[~np.isnan(column)] for column in columns]
    kept = [_kept(column, its_units) for column, its_units in zip(columns, units, strict=True)]
    p_values = _p_values(defined, kept)
    adjusted = holm(p_values)
    n_tests = max(1, sum(not math.isnan(p) for p in p_values))
    found = []
    for index, (values, clusters) in enumerate(zip(defined, kept, strict=True)):
        sums, sizes = unit_sums(values[:, None], clusters)
        finite = bool(np.isfinite(values).all())
        sd = sample_sd(values)
        mean = exact_mean(values)
        found.append(
            Estimate(
                difference=mean,
                lower=ends[index][0],
                upper=ends[index][1],
                n_pairs=len(values),
                n_left_out=len(columns[index]) - len(values),
                n_units=len(sums),
                standardised=mean / sd if sd > 0 else math.nan,
                p=p_values[index],
                p_adjusted=adjusted[index],
                detectable=detectable(float(standard_errors(sums, sizes)[0]) if finite else math.nan, len(sums), n_tests),
            )
        )
    return found


def verdict_of(estimate: Estimate, better: Better, margin: float | None = None) -> Verdict:
    """The plain word.

    better, worse   the adjusted p is at most 5 % and the interval leaves out 0, on the side of the mean
    equivalent      neither, and the interval lies within -+ margin
    not separable   all else, and everything below FEWEST_PAIRS units
    """
    e = estimate
    if better == "none":
        return "no direction"
    if e.n_units < FEWEST_PAIRS or math.isnan(e.difference):
        return "not separable"
    if e.p_adjusted <= ALPHA and (e.lower > 0 or e.upper < 0):
        return "better" if (e.lower > 0) == (better == "higher") else "worse"
    if margin is not None and -margin <= e.lower and e.upper <= margin:
        return "equivalent"
    return "not separable"


def within_width(estimate: Estimate, metric: str, column: FloatArray) -> Estimate:
    """The estimate with its interval cut to the differences that the metric can have (Dice: -1 to 1), if the cases' own are such."""
    width = width_of(metric)
    if math.isinf(width) or not (np.abs(column[~np.isnan(column)]) <= width).all():
        return estimate
    lower, upper = estimate.lower, estimate.upper
    return replace(estimate, lower=-width if lower < -width else lower, upper=width if upper > width else upper)


def margin_of(metric: str, margins: Mapping[str, float] | None = None) -> float | None:
    """The margin of a metric: by its full name, else its bare name, from `margins`, else from MARGINS.

    InputError unless it is finite and above 0.
    """
    name = split_metric(metric)[0]
    for table in (margins or {}, MARGINS):
        for key in (metric, name):
            if key in table:
                if not 0 < table[key] < math.inf:
                    raise InputError(f"the margin of {key!r} is {table[key]!r}; it must be a finite number above 0, in the metric's unit")
                return table[key]
    return None


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


def differences_of(arm_values: FloatArray, base_values: FloatArray) -> FloatArray:
    """arm - base for every case; nan where either is undefined or both are infinite with one sign.

    What is below 1e-12 of the values is rounding (of a mean over seeds) and becomes 0, lest many tiny signs make a verdict.
    """
    with np.errstate(invalid="ignore"):  # inf - inf is what is being looked for
        return without_rounding(arm_values - base_values, np.maximum(np.abs(arm_values), np.abs(base_values)))


def without_rounding(differences: FloatArray, sizes: FloatArray) -> FloatArray:
    """`differences`, with 0 where they are below 1e-12 of `sizes`, the size of what was subtracted."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(differences) & (np.abs(differences) <= 1e-12 * sizes), 0.0, differences)


def paired_differences(arm_values: FloatArray, base_values: FloatArray) -> FloatArray:
    """arm - base for the pairs that have a difference; nan in either, and infinite in both, have none."""
    differences = differences_of(arm_values, base_values)
    return differences[~np.isnan(differences)]


def one_seed(seeds: tuple[str, ...]) -> bool:
    """Trained, and with one seed only."""
    return len(seeds) == 1 and seeds != ("-",)


def seed_error(table: CaseTable, weights: Mapping[str, float], metric: str) -> float:
    """Standard error of a weighted sum of arms' means that comes from training seeds: root of the sum of weight^2 x (seed sd)^2 / seeds."""
    variance = 0.0
    for arm, weight in weights.items():
        if table.seeds[arm] != ("-",):
            means = table.seed_means.get((arm, metric), ())
            variance += weight**2 * sample_sd(means) ** 2 / max(1, len(means))
    return math.sqrt(variance) if not math.isnan(variance) else math.nan


def within_seeds(claim: Claim) -> bool:
    """A claim that training seeds alone may have made: less than twice their error."""
    return claim.verdict in ("better", "worse") and not math.isnan(claim.seed_error) and abs(claim.difference) < 2 * claim.seed_error


def _kept(column: FloatArray, units: tuple[str, ...] | None) -> list[str] | None:
    return None if units is None else [name for name, value in zip(units, column, strict=True) if not math.isnan(value)]


def _p_values(defined: Sequence[FloatArray], kept: Sequence[list[str] | None]) -> list[float]:
    """Permutation p of every column; columns with the same number of units are tested together. nan without a pair."""
    groups: dict[int, list[tuple[int, FloatArray]]] = defaultdict(list)
    for index, (values, clusters) in enumerate(zip(defined, kept, strict=True)):
        numbers = values if np.isfinite(values).all() else signed_ranks(values)
        sums, _ = unit_sums(numbers[:, None], clusters)
        groups[len(sums)].append((index, sums[:, 0]))
    found = [math.nan] * len(defined)
    for n_units, members in groups.items():
        if n_units:
            p_values = sign_flip_p(np.stack([sums for _, sums in members], axis=1))
            for (index, _), p in zip(members, p_values, strict=True):
                found[index] = float(p)
    return found
