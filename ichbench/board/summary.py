"""Score rows -> one value per case -> mean, spread and interval per arm and metric.

Cases are the only units that are counted: the rows that several seeds or folds gave for one case are averaged first.
Infinite values stay exact: one case without a finite distance makes the mean infinite, and the count stands beside it.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring.protocol import MARKS

if TYPE_CHECKING:
    from ichbench.scoring.score import Score

FloatArray = NDArray[np.float64]

DEFAULT_METRICS = ("dice", "nsd", "rvd", "hd", "hd95")
DEFAULT_RESAMPLES = 2000
#: Confidence of every interval of a board.
LEVEL = 0.95
#: Below this many cases a board says that its intervals are rough: measured coverage of a nominal 95 % falls to 92-93 % at 13.
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
    """

    arms: tuple[str, ...]
    cases: dict[str, tuple[str, ...]]
    seeds: dict[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    values: dict[tuple[str, str], FloatArray]
    marked: dict[tuple[str, str], int]


@dataclass(frozen=True)
class ArmSummary:
    """One arm in one metric.

    n                   cases that the mean is over; cases with an undefined value (nan) are not among them
    n_undefined         cases left out because the metric is undefined there (NSD of two empty masks)
    n_infinite          cases among n whose value is infinite; the mean is infinite then, sd is nan, the median stays exact
    n_empty_prediction  cases in which at least one run predicted nothing; None if the rows do not say (so for the next two)
    lower, upper        95 % interval of the mean over cases, see `mean_interval`; nan below two cases
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


def case_table(rows: Iterable[Score], metrics: Sequence[str] = DEFAULT_METRICS) -> CaseTable:
    """Average seeds and folds within each case; undefined runs (nan) are left out, an infinite run makes the case infinite.

    A metric of `DEFAULT_METRICS` that no row has is left out; any other is an error. InputError also for: no rows, duplicate
    rows, a case without one of its arm's metrics, seeds of one arm with different cases, a 0/1 row that is neither 0 nor 1.
    """
    marks = tuple(dict.fromkeys(_mark_of(metric, mark) for metric in metrics for mark in MARKS))
    wanted = frozenset(metrics) | frozenset(marks)
    runs: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
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
    if not cases_of:
        raise InputError("there are no score rows; expected rows of arm,fold,seed,case,metric,value. Score a cohort first")
    if repeated:
        raise InputError(f"duplicate score rows (arm,fold,seed,case,metric): {listed(repeated)}. Keep one row of each")
    kept = _kept_metrics(metrics, present)
    arms = tuple(sorted(cases_of))
    cases = {arm: _cases_of_arm(arm, cases_of[arm]) for arm in arms}
    values: dict[tuple[str, str], FloatArray] = {}
    marked: dict[tuple[str, str], int] = {}
    for arm in arms:
        for metric in kept:
            by_case = _complete(arm, metric, cases[arm], runs.get((arm, metric), {}))
            values[arm, metric] = np.array([_mean_of_runs(run) for run in by_case])
        for mark in marks:
            if (arm, mark) in runs:
                marked[arm, mark] = _count_marked(arm, mark, _complete(arm, mark, cases[arm], runs[arm, mark]))
    return CaseTable(arms, cases, {arm: tuple(sorted(cases_of[arm])) for arm in arms}, kept, values, marked)


def summarise(
    rows: Iterable[Score], metrics: Sequence[str] = DEFAULT_METRICS, seed: int = 0, resamples: int = DEFAULT_RESAMPLES
) -> list[ArmSummary]:
    """Describe every arm in every metric: arms in alphabetical order, metrics in the given order. Errors: see `case_table`."""
    return summarise_table(case_table(rows, metrics), seed, resamples)


def summarise_table(table: CaseTable, seed: int = 0, resamples: int = DEFAULT_RESAMPLES) -> list[ArmSummary]:
    """`summarise` for a table that is already folded."""
    return [_summary(table, arm, metric, seed, resamples) for arm in table.arms for metric in table.metrics]


def mean_interval(
    values: FloatArray, rng: np.random.Generator, resamples: int = DEFAULT_RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values` (n,) over cases: the expanded percentile interval.

    Plain percentile intervals are too short for few cases, because resamples spread like the sample with divisor n. The tail
    probability is therefore that of a normal at sqrt(n / (n - 1)) times Student's t quantile (Hesterberg, "What teachers
    should know about the bootstrap", 2015, section 5.2). Measured on real per-case Dice differences, 13 cases, nominal 95 %:
    93 % covered, against 90 % for percentile and 86 % for BCa. Ends are order statistics, so infinities stay exact.
    Returns (nan, nan) below two values or where +inf and -inf meet. Values must not be nan.
    """
    n = len(values)
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; it must be at least 1, and 1000 or more for a usable interval")
    has_plus, has_minus = bool(np.isposinf(values).any()), bool(np.isneginf(values).any())
    if n < 2 or (has_plus and has_minus):
        return math.nan, math.nan
    # summed along axis 0, one case after the other, so that the order of additions is the same on every machine
    drawn = values[rng.integers(0, n, size=(n, resamples))]
    means = drawn.sum(axis=0) / n
    if not (has_plus or has_minus):
        # a mean lies between its values; rounding may miss that by an ulp, and constant data must give zero width
        means = np.clip(means, values.min(), values.max())
    means.sort()
    k = max(1, math.floor(_tail(n, level) * (resamples + 1)))
    return float(means[k - 1]), float(means[resamples - k])


def exact_mean(values: Sequence[float] | FloatArray) -> float:
    """The mean, independent of the order of the values; nan for none, and where +inf and -inf meet."""
    numbers = [float(value) for value in values]
    if not numbers or (math.inf in numbers and -math.inf in numbers):
        return math.nan
    return min(max(math.fsum(numbers) / len(numbers), min(numbers)), max(numbers))


def generator_for(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names alone, so that adding an arm moves no other arm's interval."""
    digest = hashlib.blake2b("\x1f".join((str(seed), *names)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more


def _summary(table: CaseTable, arm: str, metric: str, seed: int, resamples: int) -> ArmSummary:
    values = table.values[arm, metric]
    defined = values[~np.isnan(values)]
    lower, upper = mean_interval(defined, generator_for(seed, arm, metric), resamples)
    return ArmSummary(
        arm=arm,
        metric=metric,
        mean=exact_mean(defined),
        lower=lower,
        upper=upper,
        median=float(statistics.median(defined.tolist())) if len(defined) else math.nan,
        sd=_sample_sd(defined),
        n=len(defined),
        n_undefined=len(values) - len(defined),
        n_empty_prediction=table.marked.get((arm, _mark_of(metric, "empty_prediction"))),
        n_empty_reference=table.marked.get((arm, _mark_of(metric, "empty_reference"))),
        n_missing=table.marked.get((arm, _mark_of(metric, "missing"))),
        n_infinite=int(np.isinf(defined).sum()),
        seeds=table.seeds[arm],
    )


def _sample_sd(values: FloatArray) -> float:
    """Standard deviation with divisor n - 1; nan below two values or with an infinite one."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    mean = exact_mean(values)
    return math.sqrt(math.fsum((float(value) - mean) ** 2 for value in values) / (len(values) - 1))


@lru_cache(maxsize=1024)
def _tail(n: int, level: float) -> float:
    from scipy.special import ndtr, stdtrit  # scipy starts slowly and only intervals need it

    return float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, 1 - (1 - level) / 2)))


def _mark_of(metric: str, mark: str) -> str:
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


def _mean_of_runs(runs: list[float]) -> float:
    return exact_mean([value for value in runs if not math.isnan(value)])


def _count_marked(arm: str, mark: str, runs_by_case: list[list[float]]) -> int:
    strange = sorted({value for runs in runs_by_case for value in runs if value not in (0.0, 1.0)})
    if strange:
        raise InputError(f"arm {arm!r}: {mark} is {strange[0]!r}; it must be 0 or 1")
    return sum(max(runs) == 1.0 for runs in runs_by_case)
