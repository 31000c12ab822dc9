"""Permutation p against enumeration and SciPy, Holm against worked examples, the detectable difference against its power."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ichbench.board.signflip import EXACT_UNITS, FLIPS, detectable, holm, sign_flip_p, signed_ranks


def brute_force(differences: list[float]) -> float:
    """All 2^n patterns, in plain Python."""
    observed = abs(math.fsum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    hits = sum(abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) >= observed - 1e-12 for signs in patterns)
    return hits / len(patterns)


@settings(max_examples=60)
@given(st.lists(st.sampled_from([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.35]), min_size=1, max_size=9))
def test_exact_p_by_enumeration_also_with_ties_and_zeros(differences: list[float]) -> None:
    assert sign_flip_p(np.array(differences)[:, None])[0] == pytest.approx(brute_force(differences))


def test_exact_p_agrees_with_scipy_at_the_largest_exact_size() -> None:
    differences = np.random.default_rng(0).normal(0.03, 0.1, EXACT_UNITS)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(differences[:, None])[0] == pytest.approx(theirs)


@pytest.mark.parametrize("n", [EXACT_UNITS + 1, 70, 501, 1203])
def test_drawn_p_is_near_the_t_test_for_normal_differences(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.08 / math.sqrt(n / 30), 0.25, n)
    expected = stats.ttest_1samp(differences, 0).pvalue
    found = sign_flip_p(differences[:, None])[0]
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / FLIPS) + 0.01)
    assert sign_flip_p(np.full((n, 1), 0.5))[0] == 1 / (1 + FLIPS)


def test_columns_scale_order_and_sign_do_not_matter() -> None:
    rng = np.random.default_rng(3)
    for n in (9, 40):
        values = rng.normal(0.1, 0.3, (n, 700))
        p = sign_flip_p(values)
        assert p[600] == sign_flip_p(values[:, [600]])[0]
        np.testing.assert_array_equal(sign_flip_p(-values), p)
        np.testing.assert_array_equal(sign_flip_p(values[::-1] * 1024), p)


def test_p_values_of_no_effect_are_uniform() -> None:
    values = np.random.default_rng(4).laplace(0, 1, (20, 4000))
    p = sign_flip_p(values)
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * math.sqrt(level / 4000))


def test_nothing_to_flip() -> None:
    assert sign_flip_p(np.zeros((0, 2))).tolist() == [1.0, 1.0]
    assert sign_flip_p(np.zeros((30, 1)))[0] == 1.0
    assert sign_flip_p(np.ones((1, 1)))[0] == 1.0


def test_signed_ranks_put_infinities_highest() -> None:
    assert signed_ranks(np.array([0.2, -0.1, np.inf, -np.inf, 0.0, 0.2])).tolist() == [3.5, -2.0, 5.5, -5.5, 0.0, 3.5]


def test_holm_by_worked_examples() -> None:
    # four hypotheses: 4 x 0.005, 3 x 0.01, 2 x 0.03, 1 x 0.04, made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02]) == [0.02]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    # an undefined test is no member of the family
    found = holm([0.02, math.nan, 0.03])
    assert found[0] == 0.04
    assert found[2] == 0.04
    assert math.isnan(found[1])


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_by_its_definition(p_values: list[float]) -> None:
    # rejected at alpha: while the i-th smallest p is at most alpha / (m - i), one after the other
    adjusted = holm(p_values)
    for alpha in (0.01, 0.05, 0.3):
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        rejected = set()
        for step, index in enumerate(order):
            if p_values[index] * (len(p_values) - step) > alpha:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected


@pytest.mark.parametrize(("n", "n_tests"), [(13, 1), (30, 1), (30, 5), (70, 3)])
def test_the_detectable_difference_has_the_stated_power(n: int, n_tests: int) -> None:
    # power of the two-sided t-test from the noncentral t distribution
    size = detectable(0.2 / math.sqrt(n), n, n_tests)
    critical = stats.t.ppf(1 - 0.05 / n_tests / 2, n - 1)
    assert stats.nct.sf(critical, n - 1, size / (0.2 / math.sqrt(n))) == pytest.approx(0.8, abs=0.015)


def test_what_cannot_be_detected_at_all() -> None:
    assert detectable(0.1, 5) == math.inf
    assert math.isfinite(detectable(0.1, 6))
    assert detectable(0.1, 6, 2) == math.inf  # 2 x 2 / 2^6 is above 5 %
    assert math.isnan(detectable(math.nan, 30))
