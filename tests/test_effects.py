"""Effects: the sign of better, what is paired with what, and when nothing is claimed."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.board.effects import FEWEST_PAIRS, Effect, better_direction, paired_differences, paired_effects, verdict_of
from ichbench.board.summary import mean_interval
from ichbench.errors import InputError
from ichbench.scoring.protocol import METRICS
from ichbench.scoring.score import Score

INF, NAN = math.inf, math.nan


def study(metric: str = "dice", seed: str = "-", **arms: list[float]) -> list[Score]:
    return [Score(arm, "-", seed, f"case{i:03d}", metric, value) for arm, values in arms.items() for i, value in enumerate(values)]


def one(rows: list[Score], metric: str = "dice") -> Effect:
    found = paired_effects(rows, metrics=(metric,))
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


def test_arm_equal_to_base_is_not_separable() -> None:
    effect = one(study(base=SPREAD, arm=SPREAD))
    assert (effect.difference, effect.lower, effect.upper) == (0, 0, 0)
    assert (effect.share_improved, effect.verdict) == (0, "not separable")


def test_too_few_pairs_give_no_verdict_however_clear() -> None:
    for n in (1, 2, FEWEST_PAIRS - 1, FEWEST_PAIRS):
        effect = one(study(base=SPREAD[:n], arm=[value + 0.1 for value in SPREAD[:n]]))
        assert effect.verdict == ("better" if n >= FEWEST_PAIRS else "not separable")
        assert effect.n_pairs == n
    assert 2 / 2 ** (FEWEST_PAIRS - 1) > 0.05 >= 2 / 2**FEWEST_PAIRS


def test_an_interval_that_touches_zero_is_not_separable() -> None:
    assert verdict_of(0.0, 0.1, 30, "higher") == "not separable"
    assert verdict_of(NAN, NAN, 30, "higher") == "not separable"
    assert verdict_of(1e-9, 0.1, 30, "higher") == "better"
    assert verdict_of(-0.2, -0.1, 30, "higher") == "worse"
    assert verdict_of(-0.2, -0.1, 30, "lower") == "better"


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


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=10), st.floats(-1, 1))
def test_a_shift_of_both_changes_nothing_and_of_the_arm_shifts_the_effect(pairs: list[tuple[float, float]], shift: float) -> None:
    base, arm = (list(values) for values in zip(*pairs, strict=True))
    plain = one(study(base=base, arm=arm))
    both = one(study(base=[value + shift for value in base], arm=[value + shift for value in arm]))
    arm_only = one(study(base=base, arm=[value + shift for value in arm]))
    for field in ("difference", "lower", "upper"):
        assert getattr(both, field) == pytest.approx(getattr(plain, field), abs=1e-9)
        assert getattr(arm_only, field) == pytest.approx(getattr(plain, field) + shift, abs=1e-9)


def test_an_effect_does_not_depend_on_other_arms() -> None:
    rng = np.random.default_rng(0)
    rows = study(base=rng.random(12).tolist(), b=rng.random(12).tolist())
    assert paired_effects(rows, metrics=("dice",))[0] in paired_effects([*study(a=rng.random(12).tolist()), *rows], metrics=("dice",))


@pytest.mark.parametrize(("n", "highest"), [(6, 0.12), (13, 0.085), (30, 0.075)])
def test_a_a_studies_are_rarely_called_separable(n: int, highest: float) -> None:
    # the same score twice plus independent noise; 5 % is nominal and below 30 cases a board says that intervals are rough
    rng = np.random.default_rng(6)
    verdicts = [verdict_of(*mean_interval(rng.normal(0, 0.05, n), rng, 999), n, "higher") for _ in range(800)]
    assert np.mean([verdict != "not separable" for verdict in verdicts]) <= highest


def test_a_large_effect_is_found() -> None:
    rng = np.random.default_rng(7)
    verdicts = [verdict_of(*mean_interval(rng.normal(0.05, 0.05, 13), rng, 999), 13, "higher") for _ in range(200)]
    assert verdicts.count("better") >= 170  # the paired t-test has a power of 91 % here
    assert "worse" not in verdicts


def test_differing_cases_are_refused_with_the_difference() -> None:
    rows = [row for row in study(base=SPREAD, arm=SPREAD) if (row.arm, row.case) != ("arm", "case003")]
    rows.append(Score("arm", "-", "-", "other", "dice", 0.5))
    with pytest.raises(InputError, match=r"only 'base' has case003; only 'arm' has other"):
        paired_effects(rows)


def test_a_missing_base_is_refused() -> None:
    with pytest.raises(InputError, match=r"no arm 'base' .* the rows have a, b"):
        paired_effects(study(a=SPREAD, b=SPREAD))


def test_paired_differences_keep_one_sided_infinities() -> None:
    found = paired_differences(np.array([INF, INF, 1.0, NAN, 3.0]), np.array([INF, 1.0, INF, 1.0, 1.0]))
    assert found.tolist() == [INF, -INF, 2.0]


def test_real_results_against_the_half_data_model(shared_data: Path) -> None:
    with (shared_data / "rankings" / "masilab_tbi_nih_vu_per_case.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    rows = [Score(line["algorithm"], "-", "-", line["case"], "dice", float(line["dice"])) for line in table]
    found = {effect.arm: effect for effect in paired_effects(rows, base="msl_full", metrics=("dice",))}
    assert set(found) == {"msl_half", "msl_other_half", "nih_ssl", "vu_ssl"}
    values = {arm: {line["case"]: float(line["dice"]) for line in table if line["algorithm"] == arm} for arm in [*found, "msl_full"]}
    for arm, effect in found.items():
        differences = np.array([values[arm][case] - values["msl_full"][case] for case in values[arm]])
        assert effect.difference == pytest.approx(differences.mean(), abs=1e-14)
        assert effect.share_improved == np.mean(differences > 0)
        assert effect.n_pairs == 63
    assert found["vu_ssl"].verdict == "worse"
    assert found["nih_ssl"].verdict == "not separable"
