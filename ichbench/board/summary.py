"""Score rows -> one value per case -> mean, spread and interval per arm and metric.

Cases are the only units that are counted: the rows that several seeds or folds gave for one case are averaged first, and
cases of one patient (or site) are drawn together where clusters are given.
Infinite values stay exact: one case without a finite distance makes the mean infinite, and the count stands beside it.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ichbench.board.intervals import DEFAULT_METHOD, Method, affordable, draw_units, mean_intervals, quantile_interval, unit_sums
from ichbench.board.intervals import DEFAULT_RESAMPLES as DEFAULT_RESAMPLES
from ichbench.board.intervals import LEVEL as LEVEL
from ichbench.board.intervals import FloatArray as FloatArray
from ichbench.board.intervals import exact_mean as exact_mean
from ichbench.errors import InputError
from ichbench.scoring.protocol import MARKS, range_of
from ichbench.scoring.tables import percentiles

if TYPE_CHECKING:
    from ichbench.scoring.score import Score

#: case -> its patient or site; None where every case stands alone
Clusters = Mapping[str, str] | None

DEFAULT_METRICS = ("dice", "nsd", "rvd", "hd", "hd95")
#: Below this many cases (or clusters) a board says that its intervals are rough: a nominal 95 % covers 91-96 % at 13.
ROUGH_BELOW_CASES = 30
#: How many offenders an error message spells out.
LISTED = 8


@dataclass(frozen=True, eq=False)
class CaseTable:
    """One value per arm, metric and case; seeds and folds are already averaged.

    arms      in alphabetical order
    cases     arm -> its cases in alphabetical order
    seeds     arm -> its seeds; ("-",) for an untrained or ensembled arm
    values    (arm, metric) -> float64 array, one value for each of `cases[arm]`; inf and nan as they came
    marked    (arm, mark) -> how many cases have the 0/1 row (`missing`, `empty_prediction/2`, ...) set in at least one seed or
              fold; absent if the rows do not say
    seed_means (arm, metric) -> the mean over cases of each seed, in the order of `seeds[arm]`; nan where none is defined
    """

    arms: tuple[str, ...]
    cases: dict[str, tuple[str, ...]]
    seeds: dict[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    values: dict[tuple[str, str], FloatArray]
    marked: dict[tuple[str, str], int]
    seed_means: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmSummary:
    """One arm in one metric.

    n                   cases that the mean is over; cases with an undefined value (nan) are not among them
    n_undefined         cases left out because the metric is undefined there (NSD of two empty masks)
    n_infinite          cases among n whose value is infinite; the mean is infinite then, sd is nan, the median stays exact
    n_empty_prediction  cases in which at least one run predicted nothing; None if the rows do not say (so for the next two)
    lower, upper        95 % interval of the mean over cases, see `intervals.mean_intervals`; nan below two cases
    median_lower, ...   95 % interval of the median, see `intervals.quantile_interval`; nan below six cases
    quartile_1, 3       linear between the neighbours, as pandas has them
    n_units             what the intervals draw: the cases, or their clusters
    seed_sd             standard deviation (divisor k - 1) between the k seeds' means; nan below two seeds
    """

    arm: str
    metric: str
    mean: float
    lower: float
    upper: float
    median: float
    sd: float
    n: int
    n_undefined: int
    n_empty_prediction: int | None
    n_empty_reference: int | None
    n_missing: int | None
    n_infinite: int
    seeds: tuple[str, ...]
    median_lower: float
    median_upper: float
    quartile_1: float
    quartile_3: float
    n_units: int
    seed_sd: float


def case_table(rows: Iterable[Score], metrics: Sequence[str] = DEFAULT_METRICS) -> CaseTable:
    """Average folds within each seed and then seeds, within each case; undefined runs (nan) are left out, an infinite one stays.

    A metric of `DEFAULT_METRICS` that no row has is left out; any other is an error. InputError also for: no rows, duplicate
    rows, a case without one of its arm's metrics, seeds of one arm with different cases, an arm with and without seeds, a 0/1 row
    that is neither 0 nor 1.
    """
    marks = tuple(dict.fromkeys(mark_of(metric, mark) for metric in metrics for mark in MARKS))
    wanted = frozenset(metrics) | frozenset(marks)
    runs: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    runs_by_seed: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    cases_of: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    seen: set[tuple[str, str, str, str, str]] = set()
    repeated: list[str] = []
    present: set[str] = set()
    for row in rows:
        present.add(row.metric)
        cases_of[row.arm][row.seed].add(row.case)
        if row.metric not in wanted:
            continue
        key = (row.arm, row.fold, row.seed, row.case, row.metric)
        if key in seen:
            repeated.append(",".join(key))
        seen.add(key)
        runs[row.arm, row.metric][row.case].append(float(row.value))
        runs_by_seed[row.arm, row.metric, row.seed][row.case].append(float(row.value))
    if not cases_of:
        raise InputError("there are no score rows; expected rows of arm,fold,seed,case,metric,value. Score a cohort first")
    if repeated:
        raise InputError(f"duplicate score rows (arm,fold,seed,case,metric): {listed(repeated)}. Keep one row of each")
    kept = _kept_metrics(metrics, present)
    arms = tuple(sorted(cases_of))
    refuse_mixed_seeds(cases_of)
    cases = {arm: _cases_of_arm(arm, cases_of[arm]) for arm in arms}
    values: dict[tuple[str, str], FloatArray] = {}
    marked: dict[tuple[str, str], int] = {}
    for arm in arms:
        for metric in kept:
            _complete(arm, metric, cases[arm], runs.get((arm, metric), {}))
            by_seed = [runs_by_seed[arm, metric, seed] for seed in cases_of[arm]]
            values[arm, metric] = np.array([mean_of_seeds(folds[case] for folds in by_seed if case in folds) for case in cases[arm]])
        for mark in marks:
            if (arm, mark) in runs:
                marked[arm, mark] = _count_marked(arm, mark, _complete(arm, mark, cases[arm], runs[arm, mark]))
    seeds = {arm: tuple(sorted(cases_of[arm])) for arm in arms}
    seed_means = {
        (arm, metric): tuple(mean_of_seeds(runs_by_seed[arm, metric, seed].values()) for seed in seeds[arm])
        for arm in arms
        for metric in kept
    }
    return CaseTable(arms, cases, seeds, kept, values, marked, seed_means)


def summarise(
    rows: Iterable[Score],
    metrics: Sequence[str] = DEFAULT_METRICS,
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    method: Method = DEFAULT_METHOD,
    clusters: Clusters = None,
) -> list[ArmSummary]:
    """Describe every arm in every metric: arms in alphabetical order, metrics in the given order.

    `clusters` names the patient or site of every case; intervals then draw those. InputError: a case without a cluster, and
    whatever `case_table` refuses.
    """
    return summarise_table(case_table(rows, metrics), seed, resamples, method, clusters)


def summarise_table(
    table: CaseTable, seed: int = 0, resamples: int = DEFAULT_RESAMPLES, method: Method = DEFAULT_METHOD, clusters: Clusters = None
) -> list[ArmSummary]:
    """`summarise` for a table that is already folded."""
    keys = [(arm, metric) for arm in table.arms for metric in table.metrics]
    columns = [table.values[key] for key in keys]
    units = [clusters_of(table.cases[arm], clusters) for arm, _ in keys]
    ends = intervals_of(columns, units, seed, resamples, method)
    return [_summary(table, arm, metric, its, end) for (arm, metric), its, end in zip(keys, units, ends, strict=True)]


def clusters_of(cases: Sequence[str], clusters: Clusters) -> tuple[str, ...] | None:
    """The cluster of each case, or None; InputError for a case that has none."""
    if clusters is None:
        return None
    if lacking := [case for case in cases if not clusters.get(case)]:
        raise InputError(
            f"no cluster (patient or site) is named for {len(lacking)} of {len(cases)} cases: {listed(lacking)}. "
            "Name one for every case, or leave clusters out"
        )
    return tuple(clusters[case] for case in cases)


def intervals_of(
    columns: Sequence[FloatArray],
    units: Sequence[tuple[str, ...] | None],
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    method: Method = DEFAULT_METHOD,
) -> list[tuple[float, float]]:
    """Interval of the mean of the defined values of each column (one per case, nan for undefined), in the given order.

    Columns with the same number of units share the draws, which depend on that number and `seed` alone: another arm moves nothing.
    """
    groups: dict[tuple[bytes, tuple[str, ...] | None], list[int]] = defaultdict(list)
    for index, (column, its_units) in enumerate(zip(columns, units, strict=True)):
        groups[np.isnan(column).tobytes(), its_units].append(index)
    found = [(math.nan, math.nan)] * len(columns)
    for (_, its_units), members in groups.items():
        defined = ~np.isnan(columns[members[0]])
        if defined.sum() < 2:
            continue
        kept = None if its_units is None else [name for name, there in zip(its_units, defined, strict=True) if there]
        sums, sizes = unit_sums(np.stack([columns[index][defined] for index in members], axis=1), kept)
        draws = draw_units(len(sums), affordable(resamples, len(sums)), generator_for(seed, str(len(sums))))
        lower, upper = mean_intervals(sums, sizes, draws, method)
        for place, index in enumerate(members):
            found[index] = float(lower[place]), float(upper[place])
    return found


def mean_interval(
    values: FloatArray,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
    level: float = LEVEL,
    method: Method = DEFAULT_METHOD,
    clusters: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Interval of the mean of `values` (n,) over cases, or over their clusters; see `intervals.mean_intervals` for the methods.

    Returns (nan, nan) below two units or where +inf and -inf meet. Values must not be nan.
    """
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; it must be at least 1, and 1000 or more for a usable interval")
    if len(values) < 2:
        return math.nan, math.nan
    sums, sizes = unit_sums(np.asarray(values, dtype=np.float64)[:, None], clusters)
    lower, upper = mean_intervals(sums, sizes, draw_units(len(sums), resamples, rng), method, level)
    return float(lower[0]), float(upper[0])


def within_range(metric: str, ends: tuple[float, float], values: Sequence[float] | FloatArray) -> tuple[float, float]:
    """An interval cut to the values that the metric can take: a t-based end may lie beyond, and nothing is lost by cutting it there.

    Where a value itself lies beyond (a Dice in percent), nothing is known of the range and nothing is cut.
    """
    low, high = range_of(metric)
    if not all(low <= value <= high for value in values):
        return ends
    # max and min would turn nan, which says that there is no interval, into a bound
    return (low if ends[0] < low else ends[0]), (high if ends[1] > high else ends[1])


def width_of(metric: str) -> float:
    """How far apart two values of a metric can be: 1 for shares, else infinite."""
    low, high = range_of(metric)
    return high - low


def generator_for(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names alone, so that adding an arm moves no other arm's interval."""
    digest = hashlib.blake2b("\x1f".join((str(seed), *names)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more


def _summary(table: CaseTable, arm: str, metric: str, units: tuple[str, ...] | None, ends: tuple[float, float]) -> ArmSummary:
    values = table.values[arm, metric]
    known = ~np.isnan(values)
    defined = values[known]
    kept = None if units is None else [name for name, there in zip(units, known, strict=True) if there]
    median_lower, median_upper = quantile_interval(defined, 0.5, kept)
    lower, upper = within_range(metric, ends, defined)
    quartile_1, quartile_3 = percentiles(sorted(defined.tolist()), (25.0, 75.0))
    return ArmSummary(
        arm=arm,
        metric=metric,
        mean=exact_mean(defined),
        lower=lower,
        upper=upper,
        median=float(statistics.median(defined.tolist())) if len(defined) else math.nan,
        sd=sample_sd(defined),
        n=len(defined),
        n_undefined=len(values) - len(defined),
        n_empty_prediction=table.marked.get((arm, mark_of(metric, "empty_prediction"))),
        n_empty_reference=table.marked.get((arm, mark_of(metric, "empty_reference"))),
        n_missing=table.marked.get((arm, mark_of(metric, "missing"))),
        n_infinite=int(np.isinf(defined).sum()),
        seeds=table.seeds[arm],
        median_lower=median_lower,
        median_upper=median_upper,
        quartile_1=quartile_1,
        quartile_3=quartile_3,
        n_units=len(defined) if kept is None else len(set(kept)),
        seed_sd=sample_sd(table.seed_means.get((arm, metric), ())),
    )


def sample_sd(values: Sequence[float] | FloatArray) -> float:
    """Standard deviation with divisor n - 1; nan below two values or with an infinite or undefined one."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    mean = exact_mean(values)
    return math.sqrt(math.fsum((float(value) - mean) ** 2 for value in values) / (len(values) - 1))


def mark_of(metric: str, mark: str) -> str:
    """The name of the 0/1 row that belongs to a metric: `dice/2` goes with `empty_prediction/2`, a whole case is missing."""
    label = metric.partition("/")[2]
    return f"{mark}/{label}" if label and mark != "missing" else mark


def _kept_metrics(metrics: Sequence[str], present: set[str]) -> tuple[str, ...]:
    unknown = [metric for metric in metrics if metric not in present and metric not in DEFAULT_METRICS]
    kept = tuple(dict.fromkeys(metric for metric in metrics if metric in present))
    if unknown or not kept:
        raise InputError(
            f"no score row has the metric {listed(unknown or metrics)}; the rows have {listed(sorted(present - set(MARKS)))}. "
            "Name metrics as the rows do (name[@parameter][/label])"
        )
    return kept


def _cases_of_arm(arm: str, cases_by_seed: dict[str, set[str]]) -> tuple[str, ...]:
    every = set().union(*cases_by_seed.values())
    for seed, cases in sorted(cases_by_seed.items()):
        if cases != every:
            raise InputError(
                f"arm {arm!r}: seed {seed} has no rows for {listed(sorted(every - cases))}, which its other seeds have. "
                "Finish the missing runs or leave that seed out"
            )
    return tuple(sorted(every))


def _complete(arm: str, metric: str, cases: tuple[str, ...], by_case: dict[str, list[float]]) -> list[list[float]]:
    lacking = [case for case in cases if case not in by_case]
    if lacking:
        raise InputError(
            f"arm {arm!r} has no {metric!r} row for {len(lacking)} of its {len(cases)} cases: {listed(lacking)}. "
            "Score every case of every arm with the same protocol (a missing prediction is a row too)"
        )
    return [by_case[case] for case in cases]


def mean_of_seeds(folds_of_seeds: Iterable[Sequence[float]]) -> float:
    """Folds are averaged first: a seed with five folds counts as much as a seed with one. nan is left out on both levels."""
    return _mean_of_known([_mean_of_known(folds) for folds in folds_of_seeds])


def refuse_mixed_seeds(cases_of: Mapping[str, Mapping[str, set[str]]]) -> None:
    """InputError for an arm (arm -> seed -> cases) of which a case has rows with a seed and without one: `-` is no further seed."""
    for arm, by_seed in sorted(cases_of.items()):
        without = by_seed.get("-", set())
        both = without & set().union(*(cases for seed, cases in by_seed.items() if seed != "-"))
        if both:
            seeds = listed(sorted(seed for seed in by_seed if seed != "-"))
            raise InputError(
                f"arm {arm!r} has rows with the seed '-' (no seed, or an ensemble) beside those of the seeds {seeds} for {len(both)} "
                f"cases: {listed(sorted(both))}. These are two arms: name them apart, or keep one of them"
            )


def _mean_of_known(values: Sequence[float]) -> float:
    return exact_mean([value for value in values if not math.isnan(value)])


def _count_marked(arm: str, mark: str, runs_by_case: list[list[float]]) -> int:
    strange = sorted({value for runs in runs_by_case for value in runs if value not in (0.0, 1.0)})
    if strange:
        raise InputError(f"arm {arm!r}: {mark} is {strange[0]!r}; it must be 0 or 1")
    return sum(max(runs) == 1.0 for runs in runs_by_case)
