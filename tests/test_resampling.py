"""Resampled rankings against a loop that builds every resample as a data set of its own; Kendall's tau and pairs against scipy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_ranking import EVEN, cube_of, drawn

from ichbench.board.cube import prepare
from ichbench.board.ranking import SCHEMES, TIES, Ties, rank_arms
from ichbench.board.resampling import (
    draw_weights,
    kendall_tau_b,
    rank_counts,
    resampled_ranks,
    separable_pairs,
    stability,
    tau_between,
)
from ichbench.board.wins import FEWEST_PAIRS
from ichbench.errors import InputError

SEEDS = st.integers(0, 2**32 - 1)


def test_weights_count_draws() -> None:
    weights = draw_weights(70, 500, seed=3)
    assert weights.shape == (500, 70)
    assert (weights.sum(axis=1) == 70).all()
    assert weights.mean() == 1.0
    # a case is left out of a resample with probability (1 - 1/70)^70 = 0.365, sd of the share over 35,000 cells about 0.003
    assert (weights == 0).mean() == pytest.approx((1 - 1 / 70) ** 70, abs=0.015)
    assert (weights == draw_weights(70, 500, seed=3)).all()
    assert (weights != draw_weights(70, 500, seed=4)).any()


def test_groups_are_drawn_whole() -> None:
    groups = ["p1", "p2", "p1", "p3", "p2", "p1"]
    weights = draw_weights(6, 400, groups=groups)
    for name in set(groups):
        members = [weights[:, c] for c in range(6) if groups[c] == name]
        assert all((column == members[0]).all() for column in members)
    assert ((weights[:, 0] + weights[:, 1] + weights[:, 3]) == 3).all()
    alone = draw_weights(4, 50, groups=["d", "c", "b", "a"])
    assert (np.sort(alone, axis=1) == np.sort(draw_weights(4, 50), axis=1)).all()


def test_weights_refuse_nonsense() -> None:
    with pytest.raises(InputError, match="resamples is 0"):
        draw_weights(3, 0)
    with pytest.raises(InputError, match="2 groups for 3 cases"):
        draw_weights(3, 5, groups=["a", "b"])


@given(SEEDS, st.sampled_from(EVEN), st.sampled_from(TIES))
@settings(max_examples=60)
def test_a_resample_is_ranked_as_a_data_set_of_its_own(seed: int, scheme: object, ties: Ties) -> None:
    """Each drawn case is written out as often as it was drawn, and the whole scheme runs on that."""
    assert isinstance(scheme, type(EVEN[0]))
    cube = drawn(seed, n_cases=6)
    weights = draw_weights(6, 4, seed)
    found = resampled_ranks(prepare(cube), scheme, weights, ties)
    for row, ranks in zip(weights.astype(int), found, strict=True):
        repeated = cube_of(np.repeat(cube.values_mac, row, axis=2))
        assert rank_arms(prepare(repeated), scheme, ties).ranks_ra[0].tolist() == ranks.tolist()


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, weights = prepare(drawn(5, n_arms=6, n_cases=8)), draw_weights(8, 300)
    for scheme in SCHEMES.values():
        whole = resampled_ranks(ready, scheme, weights, threads=1)
        with monkeypatch.context() as patched:
            patched.setattr("ichbench.board.resampling.BLOCK", 100)
            assert (resampled_ranks(ready, scheme, weights, threads=3) == whole).all()


def test_what_is_certain_is_certain() -> None:
    """One arm better in every case and metric, two equal ones behind: nothing that resampling could change."""
    values = np.tile(np.array([0.1, 0.5, 0.5])[None, :, None], (2, 1, 9))
    ready = prepare(cube_of(values, metrics=("rvd", "hd")))
    sure = stability(ready, SCHEMES["mean-then-rank"], draw_weights(9, 200))
    assert sure.lower_a.tolist() == sure.upper_a.tolist() == [1, 2, 2]
    assert sure.p_first_a.tolist() == [1.0, 0.0, 0.0]
    assert set(sure.taus_r) == {1.0}
    assert rank_counts(sure.ranks_ra) == [{1.0: 200}, {2.0: 200}, {2.0: 200}]


def test_interval_and_first_place_by_closed_form() -> None:
    """Arm 0 is worse in one of n cases only, infinitely: it is first unless that case is drawn, (1 - 1/n)^n of the resamples."""
    n, resamples = 10, 20_000
    values = np.full((1, 2, n), 1.0)
    values[0, 1] = 2.0
    values[0, 0, 3] = math.inf
    found = stability(prepare(cube_of(values, metrics=("hd",))), SCHEMES["mean-then-rank"], draw_weights(n, resamples, seed=1))
    p = (1 - 1 / n) ** n
    assert found.p_first_a[0] == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / resamples))
    assert found.p_first_a.sum() == 1.0
    assert (found.lower_a.tolist(), found.upper_a.tolist()) == ([1, 1], [2, 2])


def test_intervals_are_order_statistics() -> None:
    ready, weights = prepare(drawn(11, n_arms=5, n_cases=7)), draw_weights(7, 1000)
    found = stability(ready, SCHEMES["rank-then-mean"], weights)
    for a in range(5):
        ordered = sorted(found.ranks_ra[:, a])
        assert (found.lower_a[a], found.upper_a[a]) == (ordered[25], ordered[974])
        assert found.p_first_a[a] == sum(found.ranks_ra[r, a] == min(found.ranks_ra[r]) for r in range(1000)) / 1000


@given(SEEDS)
@settings(max_examples=150)
def test_tau_is_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, spread = int(rng.integers(2, 60)), int(rng.choice([2, 5, 100]))
    first, others = rng.integers(0, spread, n) / 2, rng.integers(0, spread, (5, n)) / 2
    expected = [stats.kendalltau(first, other).statistic for other in others]
    np.testing.assert_allclose(kendall_tau_b(first, others), expected, atol=1e-12)


def test_tau_of_many_arms() -> None:
    rng = np.random.default_rng(0)
    first, others = rng.permutation(40_000).astype(float), rng.permutation(40_000).astype(float)[None]
    assert kendall_tau_b(first, others)[0] == pytest.approx(stats.kendalltau(first, others[0]).statistic, abs=1e-12)
    assert kendall_tau_b(first, first[None])[0] == 1.0
    assert kendall_tau_b(first, -first[None])[0] == -1.0


def test_tau_between_schemes_names_every_two() -> None:
    taus = tau_between({"a": np.array([1.0, 2, 3]), "b": np.array([1.0, 3, 2]), "c": np.array([1.0, 1, 1])})
    assert taus["a", "b"] == pytest.approx(1 / 3)
    assert list(taus) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert math.isnan(taus["a", "c"])


def test_pairs_are_tested_over_cases_on_mean_ranks() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=(3, 4, 40)) + np.array([0.0, 0.2, 0.9, 3.0])[None, :, None]
    values[1, 1, :3] = math.inf
    cube = cube_of(values, metrics=("rvd", "hd", "assd"))
    ranks = np.array([[stats.rankdata(values[m, :, c]) for c in range(40)] for m in range(3)]).mean(axis=0)
    pairs = {frozenset((pair.better, pair.worse)): pair for pair in separable_pairs(prepare(cube))}
    raw = {}
    for i, j in combinations(range(4), 2):
        d = np.round(ranks[:, i] - ranks[:, j], 9)
        raw[i, j] = stats.wilcoxon(d, method="asymptotic", correction=True).pvalue
        pair = pairs[frozenset((cube.arms[i], cube.arms[j]))]
        assert pair.p == pytest.approx(raw[i, j], rel=1e-9)
        assert pair.better == cube.arms[i if d.sum() <= 0 else j]
        assert pair.n == (d != 0).sum()
    running = 0.0
    for k, key in enumerate(sorted(raw, key=lambda key: raw[key])):
        running = max(running, min(1.0, raw[key] * (6 - k)))
        pair = pairs[frozenset((cube.arms[key[0]], cube.arms[key[1]]))]
        assert pair.p_holm == pytest.approx(running, rel=1e-9)
        assert pair.separable == (running <= 0.05)


def test_few_cases_separate_nobody_and_groups_count_once() -> None:
    values = np.tile(np.array([0.1, 0.9])[None, :, None], (1, 1, 40))
    (pair,) = separable_pairs(prepare(cube_of(values[..., :FEWEST_PAIRS], metrics=("rvd",))))
    assert (pair.better, pair.worse, pair.n, pair.separable) == ("arm000", "arm001", 6, True)
    (pair,) = separable_pairs(prepare(cube_of(values[..., : FEWEST_PAIRS - 1], metrics=("rvd",))))
    assert not pair.separable
    (pair,) = separable_pairs(prepare(cube_of(values, metrics=("rvd",))), groups=[f"patient {c % 5}" for c in range(40)])
    assert (pair.n, pair.separable) == (5, False)
    assert separable_pairs(prepare(cube_of(values[:, :1], metrics=("rvd",)))) == []


def test_equal_arms_are_told_apart_no_oftener_than_said() -> None:
    """A/A: four arms of the same distribution; any pair called separable in at most about 5 % of 200 boards of 30 cases."""
    rng = np.random.default_rng(7)
    wrong = 0
    for _ in range(200):
        values = rng.normal(size=(2, 1, 30)) + rng.normal(size=(2, 4, 30))
        wrong += any(pair.separable for pair in separable_pairs(prepare(cube_of(values, metrics=("rvd", "hd")))))
    assert wrong <= 18  # 10 expected at 5 %, sd 3.1
