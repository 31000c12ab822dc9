"""Intervals of a mean over cases, by six methods, for many columns at once; and of a quantile.

A *unit* is what is drawn: a case, or all cases of one patient or site. Every column is described by the sums of its values
over each unit and by the units' sizes; its mean is the sum of the sums over the sum of the sizes. Resamples are ranked by a
matrix product; the ones that become ends are then summed exactly, so that by default an interval depends on the values alone: not
on the order of the units, not on other columns, not on the machine. (BCa and bootstrap-t may differ in the last digits.)
`benchmarks/honesty.py` measures how often each method covers the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
Method = Literal["outer", "t", "percentile", "expanded", "bca", "bootstrap-t"]

METHODS: tuple[Method, ...] = get_args(Method)
#: Best measured coverage (benchmarks/results/honesty.md): from 30 cases on within 93-97 % on nearly all real spreads.
DEFAULT_METHOD: Method = "outer"
#: All studies of one size share their draws (see `draw_units`), so these must be good: with 2,000 the coverage was off by up to 1 %.
DEFAULT_RESAMPLES = 10_000
#: Confidence of every interval of a board.
LEVEL = 0.95
#: Columns and resamples that are held at once; bounds the memory.
COLUMNS_AT_ONCE = 256
COUNTS_AT_ONCE = 4_000_000
DRAWS = 20_000_000

METHOD_TEXT: dict[Method, str] = {
    "outer": "wider of t-based and expanded percentile at each end",
    "t": "t-based",
    "percentile": "percentile bootstrap",
    "expanded": "expanded percentile bootstrap",
    "bca": "BCa bootstrap",
    "bootstrap-t": "bootstrap-t",
}


def exact_mean(values: Sequence[float] | FloatArray) -> float:
    """The mean, independent of the order of the values; nan for none, and where +inf and -inf meet."""
    numbers = [float(value) for value in values]
    if not numbers or (math.inf in numbers and -math.inf in numbers):
        return math.nan
    try:
        return min(max(math.fsum(numbers) / len(numbers), min(numbers)), max(numbers))
    except OverflowError:
        raise InputError(f"the sum of {len(numbers)} values is too large for a computer (up to {max(map(abs, numbers)):g})") from None


def unit_sums(values: FloatArray, clusters: Sequence[str] | None = None) -> tuple[FloatArray, FloatArray]:
    """Sums (units, columns) and sizes (units,) of `values` (cases, columns); without `clusters` every case is a unit of its own."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise InputError(f"{len(clusters)} clusters are named for {len(values)} cases; name one for each case")
    _, place = np.unique(np.array(clusters, dtype=str), return_inverse=True)
    n_units = int(place.max(initial=-1)) + 1
    sums = np.zeros((n_units, values.shape[1]))
    with np.errstate(invalid="ignore"):  # inf - inf within a cluster is nan, as it should be
        np.add.at(sums, place, values)
    return sums, np.bincount(place, minlength=n_units).astype(np.float64)


def affordable(resamples: int, n_units: int) -> int:
    """`resamples`, or what DRAWS allows (2,000 for 10,000 units, never below 1,000): with so many units all methods agree anyway."""
    return min(resamples, max(1000, DRAWS // max(n_units, 1)))


def draw_units(n_units: int, resamples: int, rng: np.random.Generator) -> IntArray:
    """Which unit each place of each resample takes, (n_units, resamples).

    The second half of the resamples mirrors the first (unit i becomes n - 1 - i): with units in order of their means, an
    interval of the negated values is then exactly the negated interval, and ends vary less between seeds.
    """
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; it must be at least 1, and 1000 or more for a usable interval")
    half = rng.integers(0, n_units, size=(n_units, (resamples + 1) // 2))
    return np.concatenate([half, n_units - 1 - half], axis=1)[:, :resamples]


def mean_intervals(
    sums: FloatArray, sizes: FloatArray, draws: IntArray, method: Method = DEFAULT_METHOD, level: float = LEVEL
) -> tuple[FloatArray, FloatArray]:
    """Lower and upper ends (columns,) of the interval of each column's mean.

    sums (units, columns) and sizes (units,) as `unit_sums` gives them, no nan except where infinities meet in a unit;
    draws (units, resamples) as `draw_units` gives them.

    t            mean -+ t quantile (units - 1) x standard error; the error is that of a ratio of sums where units differ in size
    percentile   order statistics of the resampled means
    expanded     the same further out: the tail is a normal's at sqrt(n / (n - 1)) x t quantile (Hesterberg 2015, section 5.2)
    outer        the wider of t and expanded at each end
    bca          bias-corrected and accelerated, jackknife over units (Efron 1987)
    bootstrap-t  studentised resamples; those without any spread are left out; (nan, nan) below three units

    A column with an infinite value has no standard error: its ends are order statistics (percentile, or else expanded), and
    exact. (nan, nan) below two units, and where +inf and -inf meet.
    """
    if method not in METHODS:
        raise InputError(f"interval method {method!r} is not known; give one of {', '.join(METHODS)}")
    n_units, n_columns = sums.shape
    lower, upper = np.full(n_columns, np.nan), np.full(n_columns, np.nan)
    # of two units every resample with a spread is the sample itself: nothing is studentised
    if n_units < (3 if method == "bootstrap-t" else 2):
        return lower, upper
    means = sums / sizes[:, None]
    finite = np.isfinite(sums).all(axis=0)
    usable = finite | ~(np.isnan(sums).any(axis=0) | (np.isposinf(sums).any(axis=0) & np.isneginf(sums).any(axis=0)))
    for kind in (True, False):
        columns = np.flatnonzero(usable & (finite == kind))
        for start in range(0, len(columns), COLUMNS_AT_ONCE):
            part = columns[start : start + COLUMNS_AT_ONCE]
            order = np.argsort(means[:, part], axis=0, kind="stable")
            its_sums, its_sizes = np.take_along_axis(sums[:, part], order, axis=0), sizes[order]
            ends = _finite_ends if kind else _infinite_ends
            lower[part], upper[part] = ends(its_sums, its_sizes, draws, method, level)
    return lower, upper


def standard_errors(sums: FloatArray, sizes: FloatArray) -> FloatArray:
    """Standard error of each column's mean (columns,), by units; the textbook sd / sqrt(n) where every size is 1."""
    n_units = len(sums)
    if n_units < 2:
        return np.full(sums.shape[1], np.nan)
    total = float(sizes.sum())
    with np.errstate(invalid="ignore"):
        residuals = sums - _means(sums, total) * sizes[:, None]
        # sorted, so that the last digit does not hang on the order of the units
        return np.asarray(np.sqrt(_sum_rows(np.sort(residuals**2, axis=0)) * n_units / (n_units - 1)) / total)


def quantile_interval(
    values: FloatArray, share: float = 0.5, clusters: Sequence[str] | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """Interval of the `share` quantile of `values` (cases,): order statistics, so infinities stay exact and no shape is assumed.

    Without clusters the ranks come from the binomial distribution (covers at least `level`); with clusters from the cluster-robust
    error of the share of cases below the quantile (Woodruff 1952). (nan, nan) where no pair of ranks covers `level`.
    """
    n = len(values)
    ordered = np.sort(values)
    if n < 2:
        return math.nan, math.nan
    if clusters is None:
        low, high = _quantile_ranks(n, share, level)
        if low < 1 or high > n:
            return math.nan, math.nan
        return float(ordered[low - 1]), float(ordered[high - 1])
    middle = ordered[min(n - 1, math.ceil(share * n) - 1)]
    sums, sizes = unit_sums((values <= middle).astype(np.float64)[:, None], clusters)
    if len(sums) < 2:
        return math.nan, math.nan
    half = float(_t_quantile(len(sums), level) * standard_errors(sums, sizes)[0])
    low, high = math.floor(n * (share - half)), math.ceil(n * (share + half)) + 1
    if low < 1 or high > n:
        return math.nan, math.nan
    return float(ordered[low - 1]), float(ordered[high - 1])


def _finite_ends(sums: FloatArray, sizes: FloatArray, draws: IntArray, method: Method, level: float) -> tuple[FloatArray, FloatArray]:
    """sums and sizes (units, columns), sorted by the units' means."""
    n_units, n_resamples = draws.shape
    total = float(sizes[:, 0].sum())
    means = np.clip(_means(sums, total), (sums / sizes)[0], (sums / sizes)[-1])
    residuals = sums - means * sizes
    error = np.sqrt(_sum_rows(np.sort(residuals**2, axis=0)) * n_units / (n_units - 1)) / total
    half = _t_quantile(n_units, level) * error
    by_t = means - half, means + half
    if method == "t":
        return by_t
    counts = _counts(draws)
    weight = _resampled(sizes, counts)
    deviations = _resampled(residuals, counts) / weight
    if method == "bootstrap-t":
        squares = _resampled(residuals**2, counts) - 2 * deviations * _resampled(residuals * sizes, counts)
        squares += deviations**2 * _resampled(sizes**2, counts)
        spread = np.sqrt(np.maximum(squares, 0) * n_units / (n_units - 1)) / weight
        # a resample of one unit alone has no spread; rounding of the squares leaves it up to 1e-8 of that of the units
        flat = spread <= 1e-6 * error
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.sort(np.where(flat, np.nan, deviations / spread).T, axis=1).T
        kept = (~flat).sum(axis=0)
        k = np.maximum(1, np.floor((1 - level) / 2 * (kept + 1)).astype(int))
        columns = np.arange(sums.shape[1])
        low, high = ratios[np.minimum(k - 1, n_resamples - 1), columns], ratios[np.maximum(kept - k, 0), columns]
        # all units equal: no spread at all, and none in the interval
        return np.where(kept == 0, means, means - high * error), np.where(kept == 0, means, means - low * error)
    if method == "bca":
        deviations = np.sort(deviations.T, axis=1).T
        # a mean lies between its units' means; rounding may miss that by an ulp, and constant data must give zero width
        resampled = np.clip(means + deviations, (sums / sizes)[0], (sums / sizes)[-1])
        return _bca_ends(sums, sizes, total, deviations, resampled, level)
    low, high = _exact_ends(deviations, sums, sizes, draws, _tail_rank(n_units, n_resamples, level, method))
    if method == "outer":
        return np.minimum(low, by_t[0]), np.maximum(high, by_t[1])
    return low, high


def _exact_ends(ranked_by: FloatArray, sums: FloatArray, sizes: FloatArray, draws: IntArray, k: int) -> tuple[FloatArray, FloatArray]:
    """The k-th resample from below and from above by `ranked_by` (resamples, columns), and their means, summed exactly."""
    n_resamples = len(ranked_by)
    # columns side by side in memory, and values instead of places, make this ten times faster
    by_column = np.ascontiguousarray(ranked_by.T)
    ordered = np.sort(by_column, axis=1)
    ends = []
    for place in (k - 1, n_resamples - k):
        chosen = draws[:, (by_column == ordered[:, [place]]).argmax(axis=1)]
        values, weights = np.take_along_axis(sums, chosen, axis=0), np.take_along_axis(sizes, chosen, axis=0)
        found = [math.fsum(value) / math.fsum(weight) for value, weight in zip(values.T.tolist(), weights.T.tolist(), strict=True)]
        ends.append(np.clip(np.array(found), (sums / sizes)[0], (sums / sizes)[-1]))
    return ends[0], ends[1]


def _bca_ends(
    sums: FloatArray, sizes: FloatArray, total: float, deviations: FloatArray, resampled: FloatArray, level: float
) -> tuple[FloatArray, FloatArray]:
    from scipy.special import ndtr, ndtri

    n_resamples = len(resampled)
    # a resample of the very same units has no deviation, but for rounding
    near = np.abs(deviations) <= 1e-12 * np.abs(deviations).max(axis=0)
    below = ((deviations < 0) & ~near).sum(axis=0) / n_resamples + 0.5 * near.sum(axis=0) / n_resamples
    bias = ndtri(np.clip(below, 0.5 / n_resamples, 1 - 0.5 / n_resamples))
    without = (_sum_rows(sums) - sums) / (total - sizes)
    moved = without.mean(axis=0) - without
    squares = (moved**2).sum(axis=0)
    acceleration = np.divide((moved**3).sum(axis=0), 6 * squares**1.5, out=np.zeros_like(squares), where=squares > 0)
    ends = []
    for z in (ndtri((1 - level) / 2), ndtri((1 + level) / 2)):
        share = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
        rank = np.floor(share * (n_resamples + 1)) if z < 0 else np.ceil(share * (n_resamples + 1))
        place = np.clip(rank.astype(int), 1, n_resamples) - 1
        ends.append(resampled[place, np.arange(sums.shape[1])])
    return ends[0], ends[1]


def _infinite_ends(sums: FloatArray, sizes: FloatArray, draws: IntArray, method: Method, level: float) -> tuple[FloatArray, FloatArray]:
    """Columns with infinities of one sign: a resample that has one is infinite, whatever else it has (0 times inf is not nan here)."""
    infinite = np.isinf(sums)
    sign = np.where(np.isposinf(sums).any(axis=0), np.inf, -np.inf)
    counts = _counts(draws)
    means = _resampled(np.where(infinite, 0.0, sums), counts) / _resampled(sizes, counts)
    means = np.where(_resampled(infinite.astype(np.float64), counts) > 0, sign, means)
    return _exact_ends(
        means, sums, sizes, draws, _tail_rank(draws.shape[0], draws.shape[1], level, "percentile" if method == "percentile" else "expanded")
    )


def _means(sums: FloatArray, total: float) -> FloatArray:
    columns = [column.tolist() for column in sums.T]
    return np.array([math.fsum(column) / total if all(map(math.isfinite, column)) else math.nan for column in columns])


def _counts(draws: IntArray) -> FloatArray:
    """How often each resample takes each unit, (resamples, units)."""
    n_units, n_resamples = draws.shape
    found = np.empty((n_resamples, n_units))
    step = max(1, COUNTS_AT_ONCE // n_units)
    for start in range(0, n_resamples, step):
        part = draws[:, start : start + step].T
        flat = (part + n_units * np.arange(len(part))[:, None]).ravel()
        found[start : start + step] = np.bincount(flat, minlength=n_units * len(part)).reshape(len(part), n_units)
    return found


def _resampled(values: FloatArray, counts: FloatArray) -> FloatArray:
    """Sum of `values` (units, columns) over each resample: (resamples, columns)."""
    if (values == values[0, 0]).all():
        return np.full((len(counts), values.shape[1]), values[0, 0] * counts.shape[1])
    return np.asarray(counts @ values)


def _sum_rows(values: FloatArray) -> FloatArray:
    """Row after row, so that the order of the additions is the same on every machine."""
    found: FloatArray = values[0].copy()
    for row in values[1:]:
        found += row
    return found


def _tail_rank(n_units: int, n_resamples: int, level: float, method: Method) -> int:
    tail = (1 - level) / 2 if method == "percentile" else _expanded_tail(n_units, level)
    return max(1, math.floor(tail * (n_resamples + 1)))


@lru_cache(maxsize=1024)
def _quantile_ranks(n: int, share: float, level: float) -> tuple[int, int]:
    """Ranks (from 1) whose values hold the quantile: at most half of 1 - level lies beyond each. 0 or n + 1 where there is none."""
    from scipy.special import bdtr, bdtrc

    tail = (1 - level) / 2
    low = max((rank for rank in range(1, n + 1) if bdtr(rank - 1, n, share) <= tail), default=0)
    high = min((rank for rank in range(1, n + 1) if bdtrc(rank - 1, n, share) <= tail), default=n + 1)
    return low, high


@lru_cache(maxsize=1024)
def _t_quantile(n_units: int, level: float) -> float:
    from scipy.special import stdtrit  # scipy starts slowly and only intervals need it

    return float(stdtrit(n_units - 1, 1 - (1 - level) / 2))


@lru_cache(maxsize=1024)
def _expanded_tail(n_units: int, level: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(-math.sqrt(n_units / (n_units - 1)) * _t_quantile(n_units, level)))
