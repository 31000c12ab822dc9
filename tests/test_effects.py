"""Effects: the sign of better, what is paired with what, and when nothing is claimed."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.board.effects import (
    FEWEST_PAIRS,
    Effect,
    Estimate,
    better_direction,
    estimate_family,
    margin_of,
    paired_differences,
    paired_effects,
    verdict_of,
)
from ichbench.board.summary import case_table
from ichbench.errors import InputError
from ichbench.scoring.protocol import METRICS
from ichbench.scoring.score import Score

INF, NAN = math.inf, math.nan


def study(metric: str = "dice", seed: str = "-", **arms: list[float]) -> list[Score]:
    return [Score(arm, "-", seed, f"case{i:03d}", metric, value) for arm, values in arms.items() for i, value in enumerate(values)]


def one(rows: list[Score], metric: str = "dice") -> Effect:
    found = paired_effects(case_table(rows, (metric,)))
    assert len(found) == 1
    return found[0]


SPREAD = [0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.4]
SHIFT = [0.02, 0.03, 0.01, 0.02, 0.03, 0.01, 0.02, -0.005]


def test_difference_is_arm_minus_base_and_pairing_removes_the_spread_of_the_cases() -> None:
    effect = one(study(base=SPREAD, arm=[a + b for a, b in zip(SPREAD, SHIFT, strict=True)]))
    assert effect.difference == pytest.approx(sum(SHIFT) / 8)
    assert 0 < effect.lower < effect.difference < effect.upper < 0.03
    assert (effect.n_pairs, effect.n_left_out, effect.share_improved) == (8, 0, 7 / 8)
    assert (effect.arm, effect.base, effect.verdict) == ("arm", "base", "better")


@pytest.mark.parametrize("metric", list(METRICS))
def test_the_sign_of_better_follows_the_metric(metric: str) -> None:
    if metric in ("missing", "empty_prediction", "empty_reference"):
        return
    effect = one(study(metric, base=[0.5] * 8, arm=[0.5 + b for b in SHIFT]), metric)
    expected = {"higher": ("better", 7 / 8), "lower": ("worse", 1 / 8), "none": ("no direction", NAN)}[METRICS[metric].better]
    assert effect.verdict == expected[0]
    assert effect.share_improved == pytest.approx(expected[1], nan_ok=True)


def test_directions_ignore_parameter_and_label() -> None:
    assert better_direction("nsd@1.0") == "higher"
    assert better_direction("hd@90/2") == "lower"
    assert better_direction("dice/2") == "higher"
    with pytest.raises(InputError, match="dicee"):
        better_direction("dicee")


def test_an_arm_equal_to_base_is_equivalent_and_only_where_a_margin_is_stated() -> None:
    effect = one(study(base=SPREAD, arm=SPREAD))
    assert (effect.difference, effect.lower, effect.upper, effect.p) == (0, 0, 0, 1)
    assert (effect.share_improved, effect.verdict) == (0, "equivalent")
    assert one(study("hd", base=SPREAD, arm=SPREAD), "hd").verdict == "not separable"  # no margin in mm is stated


def test_too_few_pairs_give_no_verdict_however_clear() -> None:
    for n in (1, 2, FEWEST_PAIRS - 1, FEWEST_PAIRS):
        effect = one(study(base=SPREAD[:n], arm=[value + 0.1 for value in SPREAD[:n]]))
        assert effect.verdict == ("better" if n >= FEWEST_PAIRS else "not separable")
        assert effect.n_pairs == n
    assert 2 / 2 ** (FEWEST_PAIRS - 1) > 0.05 >= 2 / 2**FEWEST_PAIRS


def estimate(lower: float, upper: float, n_units: int = 30, p: float = 0.001, difference: float | None = None) -> Estimate:
    middle = (lower + upper) / 2 if difference is None else difference
    return Estimate(middle, lower, upper, n_units, 0, n_units, 1.0, p, p, 0.1)


def test_verdicts_from_interval_and_p() -> None:
    assert verdict_of(estimate(0.0, 0.1), "higher") == "not separable"
    assert verdict_of(estimate(NAN, NAN), "higher") == "not separable"
    assert verdict_of(estimate(1e-9, 0.1), "higher") == "better"
    assert verdict_of(estimate(-0.2, -0.1), "higher") == "worse"
    assert verdict_of(estimate(-0.2, -0.1), "lower") == "better"
    assert verdict_of(estimate(0.1, 0.2, p=0.0501), "higher") == "not separable"
    assert verdict_of(estimate(0.1, 0.2, p=0.05), "higher") == "better"
    assert verdict_of(estimate(0.1, 0.2, n_units=5), "higher") == "not separable"
    assert verdict_of(estimate(0.1, 0.2, difference=NAN), "higher") == "not separable"
    assert verdict_of(estimate(0.1, 0.2), "none") == "no direction"
    assert verdict_of(estimate(-0.01, 0.01, p=1.0), "higher", 0.01) == "equivalent"
    assert verdict_of(estimate(-0.01, 0.0101, p=1.0), "higher", 0.01) == "not separable"
    assert verdict_of(estimate(-0.01, 0.01, n_units=5, p=1.0), "higher", 0.01) == "not separable"
    assert verdict_of(estimate(0.001, 0.002), "higher", 0.01) == "better"  # small, and there


def test_a_verdict_needs_the_adjusted_p_and_not_only_its_own() -> None:
    e = Estimate(0.15, 0.1, 0.2, 30, 0, 30, 1.0, 0.02, 0.08, 0.1)  # p, then Holm's
    assert verdict_of(e, "higher") == "not separable"


def test_margins_are_taken_by_full_name_then_bare_name_and_checked() -> None:
    assert margin_of("dice") == margin_of("dice/2") == 0.01
    assert margin_of("hd95") is None
    assert margin_of("nsd@1.0", {"nsd": 0.03}) == 0.03
    assert margin_of("nsd@1.0", {"nsd": 0.03, "nsd@1.0": 0.04}) == 0.04
    for wrong in (0.0, -1.0, INF, NAN):
        with pytest.raises(InputError, match="margin of 'dice'"):
            margin_of("dice", {"dice": wrong})


def test_p_is_adjusted_over_the_arms_of_a_metric_and_by_hand() -> None:
    # 8 pairs, all 256 patterns: a shift of one sign in all has p = 2/256, in 7 of 8 equal steps 18/256
    shifts = {"all": [0.1] * 8, "most": [0.1] * 7 + [-0.1], "half": [0.1] * 4 + [-0.1] * 4}
    rows = study(base=SPREAD, **{arm: [a + b for a, b in zip(SPREAD, by, strict=True)] for arm, by in shifts.items()})
    found = {effect.arm: effect for effect in paired_effects(case_table(rows, ("dice",)))}
    assert {arm: effect.p for arm, effect in found.items()} == {"all": 2 / 256, "most": 18 / 256, "half": 1.0}
    assert {arm: effect.p_adjusted for arm, effect in found.items()} == {"all": 6 / 256, "most": 36 / 256, "half": 1.0}
    assert [found[arm].verdict for arm in shifts] == ["better", "not separable", "not separable"]


def test_standardised_and_detectable_by_closed_form() -> None:
    from scipy import stats

    rng = np.random.default_rng(11)
    differences = rng.normal(0.02, 0.05, 20)
    base = np.full(20, 0.5)
    effect = one(study(base=base.tolist(), arm=(base + differences).tolist()))
    sd = differences.std(ddof=1)
    assert effect.standardised == pytest.approx(differences.mean() / sd)
    assert effect.detectable == pytest.approx((stats.t.ppf(0.975, 19) + stats.t.ppf(0.8, 19)) * sd / math.sqrt(20))
    rows = study(base=base.tolist(), arm=(base + differences).tolist(), other=(base - differences).tolist())
    two = paired_effects(case_table(rows, ("dice",)))
    assert two[0].detectable == pytest.approx((stats.t.ppf(0.9875, 19) + stats.t.ppf(0.8, 19)) * sd / math.sqrt(20))
    # with five pairs no sign-flip p can reach 5 %
    assert one(study(base=SPREAD[:5], arm=SPREAD[:5])).detectable == INF


def test_seed_error_adds_both_arms_and_is_unknown_with_one_seed() -> None:
    rows = study(seed="0", base=[0.5] * 8) + study(seed="1", base=[0.6] * 8)
    rows += study(seed="0", arm=[0.7] * 8) + study(seed="1", arm=[0.8] * 8) + study(once=[0.7] * 8, seed="0") + study(floor=[0.1] * 8)
    found = {effect.arm: effect for effect in paired_effects(case_table(rows, ("dice",)))}
    sd = math.sqrt(2 * 0.05**2)  # two seeds, 0.05 from their mean
    assert found["arm"].seed_error == pytest.approx(math.sqrt(sd**2 / 2 + sd**2 / 2))
    assert found["floor"].seed_error == pytest.approx(sd / math.sqrt(2))
    assert math.isnan(found["once"].seed_error)
    assert {arm: effect.single_seed for arm, effect in found.items()} == {"arm": False, "floor": False, "once": True}


def test_clusters_are_what_is_counted() -> None:
    # 12 cases of 4 patients: 12 independent cases would be separable, 4 patients are not
    rows = study(base=[0.5] * 12, arm=[0.6, 0.61, 0.62] * 4)
    patients = {f"case{i:03d}": f"p{i // 3}" for i in range(12)}
    alone = paired_effects(case_table(rows, ("dice",)))[0]
    together = paired_effects(case_table(rows, ("dice",)), clusters=patients)[0]
    assert (alone.n_units, alone.verdict) == (12, "better")
    assert (together.n_pairs, together.n_units, together.verdict) == (12, 4, "not separable")
    assert together.p == 2 / 2**4
    assert together.difference == pytest.approx(alone.difference)
    with pytest.raises(InputError, match=r"no cluster .* case003"):
        paired_effects(case_table(rows, ("dice",)), clusters={case: name for case, name in patients.items() if case != "case003"})


@settings(max_examples=30)
@given(st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=20), st.randoms(use_true_random=False))
def test_neither_the_order_of_the_cases_nor_the_unit_nor_the_sign_matters(differences: list[float], random: object) -> None:
    column = np.array(differences)
    plain = estimate_family([column], [None], resamples=200)[0]
    shuffled = column.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = estimate_family([shuffled], [None], resamples=200)[0]
    assert (other.p, other.lower, other.upper, other.difference) == (plain.p, plain.lower, plain.upper, plain.difference)
    scaled = estimate_family([column * 8], [None], resamples=200)[0]  # a power of two, so that rounding stays away
    assert (scaled.p, scaled.lower, scaled.upper) == (plain.p, plain.lower * 8, plain.upper * 8)
    turned = estimate_family([-column], [None], resamples=200)[0]
    assert (turned.p, turned.difference) == (plain.p, -plain.difference)
    assert (turned.lower, turned.upper) == pytest.approx((-plain.upper, -plain.lower), abs=1e-15)


def test_seeds_are_averaged_within_the_case_before_pairing() -> None:
    rows = study(seed="0", base=[value - 0.05 for value in SPREAD]) + study(seed="1", base=[value + 0.05 for value in SPREAD])
    rows += study(untrained=[value + 0.01 for value in SPREAD])
    effect = one(rows)
    assert effect.n_pairs == 8
    assert effect.difference == pytest.approx(0.01)
    assert effect.upper - effect.lower < 1e-9


def test_infinite_in_both_and_undefined_are_left_out_and_counted() -> None:
    rows = study("hd", base=[10, INF, 30, NAN, 50, 60, 70, 80, 90], arm=[9, INF, 28, 3, NAN, 55, 66, 79, 85])
    effect = one(rows, "hd")
    assert (effect.n_pairs, effect.n_left_out) == (6, 3)
    assert effect.difference == pytest.approx(-(1 + 2 + 5 + 4 + 1 + 5) / 6)
    assert (effect.verdict, effect.share_improved) == ("better", 1)


def test_an_infinity_that_the_arm_repairs_counts_as_improved_and_makes_the_difference_infinite() -> None:
    effect = one(study("hd", base=[10, INF, 30, 40, 50, 60, 70], arm=[11, 20, 31, 41, 51, 61, 71]), "hd")
    assert effect.difference == -INF
    assert effect.lower == -INF
    assert effect.share_improved == 1 / 7
    assert effect.verdict == "not separable"  # all other cases got worse
    opposite = one(study("hd", base=[10, INF, 30], arm=[INF, 10, 30]), "hd")
    assert math.isnan(opposite.difference)
    assert opposite.verdict == "not separable"


def test_no_pair_at_all() -> None:
    effect = one(study("hd", base=[INF, INF], arm=[INF, INF]), "hd")
    assert (effect.n_pairs, effect.n_left_out, effect.verdict) == (0, 2, "not separable")
    assert math.isnan(effect.difference)
    assert math.isnan(effect.share_improved)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=10), st.floats(-1, 1))
def test_a_shift_of_both_changes_nothing_and_of_the_arm_shifts_the_effect(pairs: list[tuple[float, float]], shift: float) -> None:
    base, arm = (list(values) for values in zip(*pairs, strict=True))
    name = "volume_bias_ml"  # may take any value, so no interval is cut
    plain = one(study(name, base=base, arm=arm), name)
    both = one(study(name, base=[value + shift for value in base], arm=[value + shift for value in arm]), name)
    arm_only = one(study(name, base=base, arm=[value + shift for value in arm]), name)
    for field in ("difference", "lower", "upper"):
        assert getattr(both, field) == pytest.approx(getattr(plain, field), abs=1e-9)
        assert getattr(arm_only, field) == pytest.approx(getattr(plain, field) + shift, abs=1e-9)


def test_only_holm_depends_on_other_arms() -> None:
    rng = np.random.default_rng(0)
    rows = study(base=rng.random(12).tolist(), b=rng.random(12).tolist())
    alone = paired_effects(case_table(rows, ("dice",)))[0]
    beside = paired_effects(case_table([*study(a=rng.random(12).tolist()), *rows], ("dice",)))[1]
    for name in ("difference", "lower", "upper", "p", "standardised", "share_improved"):
        assert getattr(alone, name) == getattr(beside, name)
    assert alone.p_adjusted == alone.p <= beside.p_adjusted


def verdicts_of(columns: np.ndarray) -> list[str]:
    """One study per column, one arm each."""
    return [verdict_of(estimate_family([column], [None], resamples=500)[0], "higher") for column in columns.T]


@pytest.mark.parametrize("n", [6, 13, 30])
def test_a_a_studies_are_rarely_called_separable(n: int) -> None:
    # 500 studies whose arm differs by noise; benchmarks/honesty.py has 5,000 from real spreads. 5 % + 2.3 standard errors
    rng = np.random.default_rng(6)
    verdicts = verdicts_of(rng.normal(0, 0.05, (n, 500)))
    assert np.mean([verdict != "not separable" for verdict in verdicts]) <= 0.072


def test_a_large_effect_is_found() -> None:
    rng = np.random.default_rng(7)
    verdicts = verdicts_of(rng.normal(0.05, 0.05, (13, 200)))
    assert verdicts.count("better") >= 165  # the paired t-test has a power of 91 % here
    assert "worse" not in verdicts


def test_differing_cases_are_refused_with_the_difference() -> None:
    rows = [row for row in study(base=SPREAD, arm=SPREAD) if (row.arm, row.case) != ("arm", "case003")]
    rows.append(Score("arm", "-", "-", "other", "dice", 0.5))
    with pytest.raises(InputError, match=r"only 'base' has case003; only 'arm' has other"):
        paired_effects(case_table(rows))


def test_a_missing_base_is_refused() -> None:
    with pytest.raises(InputError, match=r"no arm 'base' .* the rows have a, b"):
        paired_effects(case_table(study(a=SPREAD, b=SPREAD)))


def test_paired_differences_keep_one_sided_infinities() -> None:
    found = paired_differences(np.array([INF, INF, 1.0, NAN, 3.0]), np.array([INF, 1.0, INF, 1.0, 1.0]))
    assert found.tolist() == [INF, -INF, 2.0]


def test_real_results_against_the_half_data_model(shared_data: Path) -> None:
    with (shared_data / "rankings" / "masilab_tbi_nih_vu_per_case.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    rows = [Score(line["algorithm"], "-", "-", line["case"], "dice", float(line["dice"])) for line in table]
    found = {effect.arm: effect for effect in paired_effects(case_table(rows, ("dice",)), base="msl_full")}
    assert set(found) == {"msl_half", "msl_other_half", "nih_ssl", "vu_ssl"}
    values = {arm: {line["case"]: float(line["dice"]) for line in table if line["algorithm"] == arm} for arm in [*found, "msl_full"]}
    for arm, effect in found.items():
        differences = np.array([values[arm][case] - values["msl_full"][case] for case in values[arm]])
        assert effect.difference == pytest.approx(differences.mean(), abs=1e-14)
        assert effect.share_improved == np.mean(differences > 0)
        assert effect.n_pairs == 63
    assert found["vu_ssl"].verdict == "worse"
    assert found["nih_ssl"].verdict == "not separable"
