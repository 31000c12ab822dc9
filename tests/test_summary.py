"""Summaries: what is counted, what is left out, and intervals that behave."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.board.summary import ArmSummary, case_table, exact_mean, generator_for, mean_interval, summarise
from ichbench.errors import InputError
from ichbench.scoring.score import Score

INF, NAN = math.inf, math.nan


def rows_of(values: dict[str, float], arm: str = "a", metric: str = "dice", seed: str = "-", fold: str = "-") -> list[Score]:
    return [Score(arm, fold, seed, case, metric, value) for case, value in values.items()]


def one(rows: list[Score], metric: str = "dice", seed: int = 0) -> ArmSummary:
    found = summarise(rows, (metric,), seed=seed)
    assert len(found) == 1
    return found[0]


def numbered(values: list[float]) -> dict[str, float]:
    return {f"case{i:03d}": value for i, value in enumerate(values)}


def test_moments_by_hand() -> None:
    summary = one(rows_of(numbered([0.1, 0.2, 0.3, 0.6])))
    assert summary.mean == pytest.approx(0.3)
    assert summary.median == 0.25
    assert summary.sd == pytest.approx(math.sqrt((0.04 + 0.01 + 0 + 0.09) / 3))  # divisor n - 1
    assert (summary.n, summary.n_undefined, summary.n_infinite) == (4, 0, 0)
    assert 0 <= summary.lower < summary.mean < summary.upper <= 1
    assert (summary.quartile_1, summary.quartile_3) == pytest.approx((0.175, 0.375))


def test_sd_has_the_divisor_of_the_challenge_server() -> None:
    # evalutils prints pandas' describe(), that is ddof=1; numpy is the independent witness
    values = np.random.default_rng(0).random(30)
    assert one(rows_of(numbered(values.tolist()))).sd == pytest.approx(np.std(values, ddof=1), rel=1e-14)


def test_seeds_and_folds_are_not_extra_cases() -> None:
    rows = []
    for seed, shift in (("0", -0.1), ("1", 0.1)):
        for fold, more in (("0", -0.01), ("1", 0.01)):
            rows += rows_of({"x": 0.5 + shift + more, "y": 0.7 + shift + more, "z": 0.3 + shift + more}, seed=seed, fold=fold)
    nested, plain = one(rows), one(rows_of({"x": 0.5, "y": 0.7, "z": 0.3}))
    assert nested.n == 3
    assert nested.seeds == ("0", "1")
    for field in ("mean", "median", "sd", "lower", "upper"):
        assert getattr(nested, field) == pytest.approx(getattr(plain, field), abs=1e-12)


def test_a_seed_with_more_folds_counts_as_much_as_another() -> None:
    rows = [row for fold in "01234" for row in rows_of({"x": 0.9, "y": 0.8}, seed="0", fold=fold)]
    rows += rows_of({"x": 0.3, "y": 0.2}, seed="1", fold="0")
    table = case_table(rows, ("dice",))
    assert table.values["a", "dice"].tolist() == pytest.approx([0.6, 0.5])
    assert table.seed_means["a", "dice"] == pytest.approx((0.85, 0.25))
    assert one(rows).mean == pytest.approx(sum(table.seed_means["a", "dice"]) / 2)
    # an undefined fold leaves its seed to the others, an undefined seed the case to the other seeds
    holes = rows_of({"x": 0.5}, seed="0", fold="0") + rows_of({"x": math.nan}, seed="0", fold="1")
    holes += rows_of({"x": math.nan}, seed="1", fold="0") + rows_of({"x": 0.7}, seed="2", fold="0")
    assert case_table(holes, ("dice",)).values["a", "dice"].tolist() == pytest.approx([0.6])


def test_an_ensemble_is_no_further_seed() -> None:
    rows = rows_of({"x": 0.9}, seed="-") + rows_of({"x": 0.5}, seed="0")
    with pytest.raises(InputError, match=r"arm 'a' has rows with the seed '-' .* beside those of the seeds 0 for 1 cases: x"):
        case_table(rows, ("dice",))


def test_cross_validation_folds_share_out_the_cases() -> None:
    rows = rows_of({"x": 0.5, "y": 0.7}, fold="0", seed="0") + rows_of({"z": 0.3}, fold="1", seed="0")
    assert one(rows).n == 3
    assert one(rows).mean == pytest.approx(0.5)


def test_an_infinite_case_makes_the_mean_infinite_and_is_counted() -> None:
    summary = one(rows_of(numbered([10.0, 20.0, 30.0, INF, 15.0]), metric="hd"), "hd")
    assert summary.mean == INF
    assert summary.median == 20.0
    assert math.isnan(summary.sd)
    assert (summary.n, summary.n_infinite) == (5, 1)
    assert math.isfinite(summary.lower)
    assert summary.upper == INF


def test_the_interval_of_two_infinite_in_seventy_has_a_finite_lower_end() -> None:
    # P(no infinite case in a resample) = (68/70)^70 = 13 %, so a tail of 2 to 3 % is finite
    values = np.random.default_rng(1).uniform(5, 80, 70)
    values[:2] = INF
    lower, upper = mean_interval(values, np.random.default_rng(0))
    assert 5 < lower < 80
    assert upper == INF
    # with half of the cases infinite no resample of 2000 is free of them
    values[:35] = INF
    assert mean_interval(values, np.random.default_rng(0)) == (INF, INF)


def test_opposite_infinities_have_no_mean() -> None:
    assert math.isnan(exact_mean([INF, -INF, 1.0]))
    assert all(math.isnan(end) for end in mean_interval(np.array([INF, -INF, 1.0]), np.random.default_rng(0)))
    assert mean_interval(np.array([-INF] * 3), np.random.default_rng(0)) == (-INF, -INF)


def test_undefined_values_are_left_out_and_said_so() -> None:
    summary = one(rows_of(numbered([0.2, NAN, 0.4]), metric="nsd"), "nsd")
    assert summary.mean == pytest.approx(0.3)
    assert (summary.n, summary.n_undefined) == (2, 1)
    nothing = one(rows_of(numbered([NAN, NAN]), metric="nsd"), "nsd")
    assert (nothing.n, nothing.n_undefined) == (0, 2)
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.median)


def test_an_undefined_seed_is_left_out_within_its_case_and_an_infinite_one_is_not() -> None:
    rows = rows_of({"x": NAN, "y": 1.0}, metric="hd", seed="0") + rows_of({"x": 4.0, "y": INF}, metric="hd", seed="1")
    assert case_table(rows, ("hd",)).values["a", "hd"].tolist() == [4.0, INF]


def test_one_case_has_no_interval() -> None:
    summary = one(rows_of({"x": 0.5}))
    assert (summary.mean, summary.median, summary.n) == (0.5, 0.5, 1)
    assert all(math.isnan(value) for value in (summary.lower, summary.upper, summary.sd))


def test_marks_count_cases_and_not_runs() -> None:
    rows = rows_of({"x": 0.5, "y": 0.0}, seed="0") + rows_of({"x": 0.0, "y": 0.0}, seed="1")
    rows += rows_of({"x": 0, "y": 1}, metric="empty_prediction", seed="0") + rows_of({"x": 1, "y": 1}, metric="empty_prediction", seed="1")
    rows += rows_of({"x": 0, "y": 1}, metric="missing", seed="0") + rows_of({"x": 0, "y": 0}, metric="missing", seed="1")
    summary = one(rows)
    assert (summary.n, summary.n_empty_prediction, summary.n_missing) == (2, 2, 1)
    assert summary.n_empty_reference is None  # no row says so, and unknown is not zero


def test_a_label_is_counted_with_its_own_marks() -> None:
    rows = rows_of({"x": 0.5, "y": 0.0}, metric="dice/2") + rows_of({"x": 0, "y": 0}, metric="empty_prediction")
    rows += rows_of({"x": 0, "y": 1}, metric="empty_prediction/2") + rows_of({"x": 1, "y": 0}, metric="missing")
    summary = one(rows, "dice/2")
    assert (summary.n_empty_prediction, summary.n_missing) == (1, 1)


@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 0.0, 123.456])
@pytest.mark.parametrize("n", [2, 3, 7, 30])
def test_constant_data_have_zero_width(constant: float, n: int) -> None:
    summary = one(rows_of(numbered([constant] * n)))
    assert summary.mean == summary.lower == summary.upper == constant
    assert summary.sd == 0


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_row_order_does_not_matter(values: list[float], shuffler: random.Random) -> None:
    rows = [row for seed in ("0", "1") for row in rows_of(numbered(values), seed=seed)]
    mixed = list(rows)
    shuffler.shuffle(mixed)
    assert repr(summarise(rows, ("dice",), resamples=200)) == repr(summarise(mixed, ("dice",), resamples=200))


@settings(max_examples=25)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(-1000, 1000), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_interval_moves_and_stretches_with_the_data(values: list[float], shift: float, scale: float) -> None:
    data = np.array(values)
    lower, upper = mean_interval(data, np.random.default_rng(0), 300)
    moved = mean_interval(data * scale + shift, np.random.default_rng(0), 300)
    assert moved == pytest.approx((lower * scale + shift, upper * scale + shift), abs=1e-9)
    mirrored = mean_interval(-data, np.random.default_rng(0), 300)
    assert mirrored == pytest.approx((-upper, -lower), abs=1e-12)
    assert lower <= data.mean() + 1e-9
    assert data.mean() - 1e-9 <= upper


def test_the_interval_of_an_arm_does_not_depend_on_other_arms_or_other_metrics() -> None:
    values = np.random.default_rng(3).random((3, 20))
    first, second = rows_of(numbered(values[0].tolist()), arm="m"), rows_of(numbered(values[1].tolist()), arm="b")
    alone = one(first)
    together = summarise([*second, *first, *rows_of(numbered(values[2].tolist()), arm="m", metric="nsd")], ("dice",))
    assert alone in together
    assert generator_for(0, "m", "dice").random() != generator_for(0, "m", "nsd").random()
    assert generator_for(0, "m", "dice").random() != generator_for(0, "k", "dice").random()
    assert generator_for(0, "m", "dice").random() != generator_for(1, "m", "dice").random()
    assert generator_for(0, "a", "bc").random() != generator_for(0, "ab", "c").random()
    assert one(first, seed=1).lower != alone.lower


def test_the_interval_agrees_with_the_closed_form_for_many_normal_cases() -> None:
    values = np.random.default_rng(4).normal(0.6, 0.2, 400)
    half = 1.966 * np.std(values, ddof=1) / 20  # t quantile at 399 degrees of freedom
    lower, upper = mean_interval(values, np.random.default_rng(0), 20_000)
    assert upper - lower == pytest.approx(2 * half, rel=0.03)
    assert lower == pytest.approx(values.mean() - half, abs=0.05 * half)


def test_intervals_end_where_the_metric_does() -> None:
    values = numbered([0.99, 1.0, 0.2, 1.0])
    assert one(rows_of(values)).upper == 1.0
    assert one(rows_of(numbered([0.0, 0.0, 40.0]), metric="hd"), "hd").lower == 0.0
    assert one(rows_of(numbered([0.0, 0.0, 40.0]), metric="volume_bias_ml"), "volume_bias_ml").lower < 0
    # a Dice in percent is not one between 0 and 1, so nothing is known of its range
    assert one(rows_of(numbered([60.0, 70.0, 99.0]))).upper > 99


def test_the_median_has_an_interval_of_order_statistics() -> None:
    # n = 10: ranks 2 and 9 cover 97.9 %, 3 and 8 only 89.1 % (binomial tables)
    summary = one(rows_of(numbered([float(i) / 10 for i in range(10)])))
    assert (summary.median_lower, summary.median_upper) == (0.1, 0.8)
    few = one(rows_of(numbered([0.1, 0.2, 0.3, 0.4, 0.5])))
    assert math.isnan(few.median_lower)
    assert math.isnan(few.median_upper)


def test_between_seed_spread() -> None:
    rows = rows_of({"x": 0.5, "y": 0.7}, seed="0") + rows_of({"x": 0.6, "y": 1.0}, seed="1")
    assert one(rows).seed_sd == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert math.isnan(one(rows_of({"x": 0.5, "y": 0.7}, seed="0")).seed_sd)
    assert case_table(rows, ("dice",)).seed_means["a", "dice"] == pytest.approx((0.6, 0.8))


def test_folds_of_one_seed_make_one_seed_mean() -> None:
    rows = rows_of({"x": 0.5}, seed="0", fold="0") + rows_of({"y": 0.7}, seed="0", fold="1")
    assert case_table(rows, ("dice",)).seed_means["a", "dice"] == pytest.approx((0.6,))


def test_clusters_widen_the_interval_and_are_counted() -> None:
    rng = np.random.default_rng(9)
    patients = np.repeat(rng.random(10), 4)
    rows = rows_of(numbered((patients + rng.normal(0, 0.001, 40)).tolist()), metric="hd")
    clusters = {f"case{i:03d}": f"p{i // 4}" for i in range(40)}
    alone, together = summarise(rows, ("hd",))[0], summarise(rows, ("hd",), clusters=clusters)[0]
    assert (alone.n_units, together.n_units, together.n) == (40, 10, 40)
    assert together.mean == alone.mean
    # four copies of each patient: the true error is twice that of forty cases
    assert 1.8 < (together.upper - together.lower) / (alone.upper - alone.lower) < 2.8
    assert together.median_upper - together.median_lower > alone.median_upper - alone.median_lower
    with pytest.raises(InputError, match=r"no cluster .* case007"):
        summarise(rows, ("hd",), clusters={case: name for case, name in clusters.items() if case != "case007"})


@pytest.mark.parametrize(("n", "low", "high"), [(13, 0.92, 0.975), (30, 0.93, 0.975)])
def test_coverage_is_near_95_percent_for_dice_like_scores(n: int, low: float, high: float) -> None:
    # beta(5, 2) is skewed like per-case Dice; with 5000 studies 0.951 at n = 13 and 0.952 at n = 30
    rng = np.random.default_rng(5)
    covered = [lower <= 5 / 7 <= upper for lower, upper in (mean_interval(rng.beta(5, 2, n), rng, 999) for _ in range(800))]
    assert low <= np.mean(covered) <= high


def test_real_per_case_results_of_five_algorithms(shared_data: Path) -> None:
    with (shared_data / "rankings" / "masilab_tbi_nih_vu_per_case.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    rows = [Score(line["algorithm"], "-", "-", line["case"], "dice", float(line["dice"])) for line in table]
    found = {summary.arm: summary for summary in summarise(rows, ("dice",))}
    assert len(found) == 5
    for arm, summary in found.items():
        values = np.array([float(line["dice"]) for line in table if line["algorithm"] == arm])
        assert summary.n == len(values) == 63
        assert summary.mean == pytest.approx(values.mean(), rel=1e-14)
        assert summary.median == np.median(values)
        assert summary.sd == pytest.approx(values.std(ddof=1), rel=1e-13)
        # t interval as the witness: 63 cases are enough for both to nearly agree
        half = 1.999 * summary.sd / math.sqrt(63)
        assert (summary.lower, summary.upper) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)


def test_duplicate_rows_are_refused_and_listed() -> None:
    rows = rows_of({"x": 0.5, "y": 0.5})
    with pytest.raises(InputError, match=r"duplicate.*a,-,-,x,dice"):
        summarise([*rows, rows[0]], ("dice",))


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="no score rows"):
        summarise([])


def test_a_case_without_a_metric_is_refused() -> None:
    rows = rows_of({"x": 0.5, "y": 0.5}) + rows_of({"x": 1.0}, metric="hd")
    with pytest.raises(InputError, match=r"no 'hd' row for 1 of its 2 cases: y"):
        summarise(rows)
    with pytest.raises(InputError, match="arm 'a' has no 'nsd' row"):
        summarise(rows_of({"x": 0.5}) + rows_of({"x": 0.5}, arm="b", metric="nsd"))


def test_an_unfinished_seed_is_refused() -> None:
    with pytest.raises(InputError, match=r"seed 1 has no rows for y"):
        summarise(rows_of({"x": 0.5, "y": 0.5}, seed="0") + rows_of({"x": 0.5}, seed="1"))


def test_unknown_metrics_are_refused_and_absent_default_ones_left_out() -> None:
    rows = rows_of({"x": 0.5, "y": 0.5})
    assert [summary.metric for summary in summarise(rows)] == ["dice"]
    with pytest.raises(InputError, match=r"metric dicee; the rows have dice"):
        summarise(rows, ("dice", "dicee"))
    with pytest.raises(InputError, match="the rows have dice"):
        summarise(rows, ("nsd",))


def test_a_mark_must_be_zero_or_one() -> None:
    with pytest.raises(InputError, match=r"missing is 0\.5"):
        summarise(rows_of({"x": 0.5}) + rows_of({"x": 0.5}, metric="missing"))


def test_resamples_must_be_positive() -> None:
    with pytest.raises(InputError, match="resamples"):
        summarise(rows_of({"x": 0.5, "y": 0.1}), resamples=0)
