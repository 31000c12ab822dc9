"""Interval methods against closed forms, SciPy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ichbench.board.intervals import (
    METHODS,
    Method,
    draw_units,
    exact_mean,
    mean_intervals,
    quantile_interval,
    standard_errors,
    unit_sums,
)
from ichbench.errors import InputError

INF = math.inf
B = 20_000


def interval(
    values: np.ndarray, method: Method, clusters: list[str] | None = None, resamples: int = B, seed: int = 0
) -> tuple[float, float]:
    sums, sizes = unit_sums(values[:, None], clusters)
    lower, upper = mean_intervals(sums, sizes, draw_units(len(sums), resamples, np.random.default_rng(seed)), method)
    return float(lower[0]), float(upper[0])


@pytest.mark.parametrize("n", [2, 5, 13, 70])
def test_t_is_the_textbook_interval(n: int) -> None:
    values = np.random.default_rng(n).gamma(2, size=n)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert interval(values, "t") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("method", "theirs"), [("percentile", "percentile"), ("bca", "BCa")])
@pytest.mark.parametrize("n", [9, 30])
def test_percentile_and_bca_agree_with_scipy(method: Method, theirs: str, n: int) -> None:
    values = np.random.default_rng(n).gamma(1.5, size=n)
    expected = stats.bootstrap((values,), np.mean, method=theirs, n_resamples=B, rng=np.random.default_rng(1)).confidence_interval
    # both are random: the standard error of a 2.5 % quantile of B means is about 0.02 of their spread
    assert interval(values, method) == pytest.approx(tuple(expected), abs=0.08 * values.std() / math.sqrt(n))


def test_percentile_ends_by_exact_enumeration() -> None:
    # three cases have 27 resamples; the 2.5 % quantile of their means is the least one (1/27), and the largest likewise
    values = np.array([0.1, 0.5, 0.7])
    assert interval(values, "percentile") == pytest.approx((0.1, 0.7))
    # four cases: 256 resamples, the least mean has 1/256, so 2.5 % (6.4 of 256) is the 7th in order
    values = np.array([0.0, 0.2, 0.5, 1.0])
    means = np.sort([np.mean(values[list(places)]) for places in np.ndindex(4, 4, 4, 4)])
    assert interval(values, "percentile", resamples=200_000) == pytest.approx((means[6], means[-7]), abs=1e-12)


def test_bootstrap_t_by_hand_one_resample_at_a_time() -> None:
    values, n = np.random.default_rng(3).gamma(1.0, size=11), 11
    draws = draw_units(n, 999, np.random.default_rng(0))
    ordered = np.sort(values)
    ratios = []
    for places in draws.T:
        sample = ordered[places]
        if sample.std() > 0:
            ratios.append((sample.mean() - values.mean()) / stats.sem(sample))
    ratios.sort()
    k = int(0.025 * (len(ratios) + 1))
    expected = values.mean() - ratios[-k] * stats.sem(values), values.mean() - ratios[k - 1] * stats.sem(values)
    assert interval(values, "bootstrap-t", resamples=999) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "t_quantile"), [(2, 12.7062), (6, 2.570582), (13, 2.178813), (30, 2.045230)])
def test_expanded_ends_are_order_statistics_of_the_wider_tail(n: int, t_quantile: float) -> None:
    # the textbook recipe, one resample at a time, with the t quantile from a printed table
    values = np.random.default_rng(8).random(n)
    means = sorted(float(np.mean(np.sort(values)[places])) for places in draw_units(n, B, np.random.default_rng(0)).T)
    tail = 0.5 * math.erfc(math.sqrt(n / (n - 1)) * t_quantile / math.sqrt(2))
    k = max(1, int(tail * (B + 1)))
    assert interval(values, "expanded") == pytest.approx((means[k - 1], means[-k]), abs=1e-14)


def test_outer_is_the_wider_of_two_at_each_end() -> None:
    values = np.random.default_rng(5).exponential(size=13)
    t, expanded, outer = (interval(values, method) for method in ("t", "expanded", "outer"))
    assert outer == (min(t[0], expanded[0]), max(t[1], expanded[1]))
    assert outer[0] == t[0] != expanded[0]  # skewed to the right: t reaches further down, the bootstrap further up
    assert outer[1] == expanded[1] != t[1]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25)
@given(values=st.lists(st.floats(-1, 1, width=16), min_size=3, max_size=12), shift=st.floats(-100, 100), scale=st.sampled_from([0.5, 4.0]))
def test_intervals_move_stretch_and_turn_with_the_data(method: Method, values: list[float], shift: float, scale: float) -> None:
    data = np.array(values)
    lower, upper = interval(data, method, resamples=400)
    moved = interval(data * scale + shift, method, resamples=400)
    assert moved == pytest.approx((lower * scale + shift, upper * scale + shift), abs=1e-7)
    assert interval(-data, method, resamples=400) == pytest.approx((-upper, -lower), abs=1e-7)
    assert interval(data[::-1], method, resamples=400) == (lower, upper)
    assert lower <= upper


@pytest.mark.parametrize("method", METHODS)
def test_constant_data_have_no_width_and_one_case_no_interval(method: Method) -> None:
    for n in (3, 7, 30):
        assert interval(np.full(n, 0.1), method, resamples=200) == (0.1, 0.1)
    assert all(math.isnan(end) for end in interval(np.array([0.5]), method))
    assert all(math.isnan(end) for end in interval(np.array([INF, -INF, 1.0]), method))


@pytest.mark.parametrize("method", METHODS)
def test_infinities_stay_exact(method: Method) -> None:
    assert interval(np.full(5, INF), method) == (INF, INF)
    values = np.random.default_rng(1).uniform(5, 80, 70)
    values[:2] = -INF
    lower, upper = interval(values, method)
    assert lower == -INF
    # P(no infinite case in a resample) = (68/70)^70 = 13 %, so the upper tail is finite
    assert 5 < upper < 80


def test_columns_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(2)
    values = rng.random((12, 600))
    values[3, 7], values[4, 8] = INF, -INF
    values[0, 9], values[1, 9] = INF, -INF
    draws = draw_units(12, 300, np.random.default_rng(0))
    for method in METHODS:
        lower, upper = mean_intervals(values, np.ones(12), draws, method)
        for column in (0, 7, 8, 9, 255, 256, 599):
            alone = mean_intervals(values[:, [column]], np.ones(12), draws, method)
            found, expected = [lower[column], upper[column]], [alone[0][0], alone[1][0]]
            if method in ("bca", "bootstrap-t"):
                np.testing.assert_allclose(found, expected, rtol=1e-12)
            else:
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_clusters_of_one_are_cases_and_equal_copies_count_once(method: Method) -> None:
    values = np.random.default_rng(6).random(12)
    plain = interval(values, method, resamples=500)
    assert interval(values, method, [str(i) for i in range(12)], resamples=500) == pytest.approx(plain, rel=1e-12)
    copied = interval(np.repeat(values, 3), method, [str(i // 3) for i in range(36)], resamples=500)
    assert copied == pytest.approx(plain, rel=1e-9)


def test_the_error_of_unequal_clusters_is_that_of_a_ratio() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0, 4.0, 5.0])
    clusters = ["a", "a", "a", "b", "c", "c"]
    sums, sizes = unit_sums(values[:, None], clusters)
    assert sums[:, 0].tolist() == [6.0, 10.0, 9.0]
    assert sizes.tolist() == [3.0, 1.0, 2.0]
    mean = 25 / 6
    by_hand = math.sqrt(3 / 2 * ((6 - 3 * mean) ** 2 + (10 - mean) ** 2 + (9 - 2 * mean) ** 2)) / 6
    assert standard_errors(sums, sizes)[0] == pytest.approx(by_hand)
    half = stats.t.ppf(0.975, 2) * by_hand
    assert interval(values, "t", clusters) == pytest.approx((mean - half, mean + half))


def test_a_resample_of_clusters_weighs_cases() -> None:
    # two clusters, sizes 3 and 1: a resample has mean 1, 5, or (3 * 1 + 5) / 4 = 2
    values, clusters = np.array([1.0, 1.0, 1.0, 5.0]), ["a", "a", "a", "b"]
    sums, sizes = unit_sums(values[:, None], clusters)
    draws = np.array([[0, 0, 1], [0, 1, 1]])
    lower, upper = mean_intervals(sums, sizes, draws, "percentile", level=0.4)
    assert (lower[0], upper[0]) == (1.0, 5.0)
    lower, upper = mean_intervals(sums, sizes, draws[:, [1, 1, 1]], "percentile")
    assert (lower[0], upper[0]) == (2.0, 2.0)


def test_draws_are_mirrored_and_uniform() -> None:
    draws = draw_units(5, 10_000, np.random.default_rng(0))
    assert draws.shape == (5, 10_000)
    np.testing.assert_array_equal(draws[:, 5000:], 4 - draws[:, :5000])
    counts = np.bincount(draws.ravel(), minlength=5)
    assert stats.chisquare(counts[:3]).pvalue > 1e-4
    assert draw_units(5, 7, np.random.default_rng(0)).shape == (5, 7)


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (10, 2, 9), (20, 6, 15), (30, 10, 21), (70, 27, 44)])
def test_median_ranks_are_those_of_binomial_tables(n: int, low: int, high: int) -> None:
    values = np.random.default_rng(0).permutation(n).astype(float) + 1
    assert quantile_interval(values) == (low, high)
    assert stats.binom.cdf(low - 1, n, 0.5) <= 0.025 < stats.binom.cdf(low, n, 0.5)


def test_quantile_intervals_of_few_infinite_and_clustered_values() -> None:
    assert all(math.isnan(end) for end in quantile_interval(np.arange(5.0)))
    assert quantile_interval(np.array([1.0, 2, 3, 4, 5, INF])) == (1.0, INF)
    values = np.random.default_rng(4).random(60)
    plain, same = quantile_interval(values), quantile_interval(values, clusters=[str(i) for i in range(60)])
    ranks = np.searchsorted(np.sort(values), [*plain, *same])
    assert np.abs(ranks[:2] - ranks[2:]).max() <= 2  # Woodruff's normal ranks beside the exact ones


def test_median_intervals_cover_also_where_a_bootstrap_fails() -> None:
    rng = np.random.default_rng(12)
    truth = stats.lognorm(1.5).median()
    for n in (13, 30):
        ends = [quantile_interval(rng.lognormal(0, 1.5, n)) for _ in range(1500)]
        assert 0.94 <= np.mean([low <= truth <= high for low, high in ends]) <= 0.99


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="'jackknife' is not known; give one of outer, t"):
        interval(np.arange(3.0), "jackknife")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resamples is 0"):
        draw_units(3, 0, np.random.default_rng(0))
    with pytest.raises(InputError, match="2 clusters are named for 3 cases"):
        unit_sums(np.zeros((3, 1)), ["a", "b"])


@pytest.mark.parametrize("method", METHODS)
def test_two_units_have_nothing_to_studentise(method: Method) -> None:
    for clusters in (None, ["a", "b"]):
        lower, upper = interval(np.array([0.2, 0.9]), method, clusters)
        assert math.isnan(lower) == math.isnan(upper) == (method == "bootstrap-t")
    assert not math.isnan(interval(np.array([0.2, 0.9, 0.4]), method)[0])


def test_a_sum_that_overflows_is_bad_input() -> None:
    with pytest.raises(InputError, match="the sum of 3 values is too large for a computer"):
        exact_mean([1.5e308] * 3)
