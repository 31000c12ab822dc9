"""Ranks against scipy, and whole schemes against plain loops that do it the slow way, with ties, infinite and missing values."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from ichbench.board.cube import Cube, Prepared, Rule, prepare
from ichbench.board.ranking import SCHEMES, TIES, Ties, rank_arms, rank_last, ranks_of_means, tied_by_bits, weighted_sums
from ichbench.board.wins import MANY_RESAMPLES, holm, signed_rank_z
from ichbench.errors import InputError

Array = NDArray[np.float64]
METRICS = ("dice", "hd", "rvd", "nsd")
SIGNS = {"dice": -1.0, "hd": 1.0, "rvd": 1.0, "nsd": -1.0}
EVEN = [scheme for scheme in SCHEMES.values() if scheme.name != "test-then-rank"]
SEEDS = st.integers(0, 2**32 - 1)


def cube_of(values_mac: Array, absent: NDArray[np.bool_] | None = None, metrics: tuple[str, ...] = METRICS) -> Cube:
    m, a, c = values_mac.shape
    names = metrics[:m]
    gone = np.zeros(values_mac.shape, dtype=bool) if absent is None else absent
    return Cube(names, tuple(f"arm{i:03}" for i in range(a)), tuple(f"case{i:03}" for i in range(c)), values_mac, gone, (0,) * a, (0,) * a)


def drawn(seed: int, n_arms: int | None = None, n_cases: int | None = None, infinite: bool = True, holes: bool = False) -> Cube:
    """Values on a coarse grid, so that ties are frequent; infinite distances; sometimes equal arms; with `holes` nan."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 5)), n_arms or int(rng.integers(2, 7)), n_cases or int(rng.integers(1, 9)))
    values = rng.integers(0, 5, shape) / 4.0 if rng.random() < 0.5 else rng.random(shape)
    if infinite and shape[0] > 1:
        values[1][rng.random(shape[1:]) < 0.2] = math.inf
    if rng.random() < 0.3:
        values[:, -1] = values[:, 0]
    if holes:
        values[rng.random(shape) < 0.15] = math.nan
    return cube_of(values)


@given(SEEDS, st.sampled_from(TIES))
@settings(max_examples=150)
def test_ranks_are_those_of_scipy(seed: int, ties: Ties) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.choice([0.0, -0.0, 1.0, 2.5, -3.0, math.inf, 1e-300], (5, int(rng.integers(1, 40))))
    assert rank_last(rows, ties).tolist() == [stats.rankdata(row, ties).tolist() for row in rows]


def test_ranks_in_several_blocks_and_dimensions() -> None:
    values = np.random.default_rng(0).integers(0, 9, (3, 700, 300)).astype(float)
    for ties in TIES:
        assert (rank_last(values, ties) == stats.rankdata(values, ties, axis=-1)).all()


def test_nan_takes_the_last_place_under_every_rule() -> None:
    row = np.array([2.0, math.nan, 1.0, math.inf, math.nan, math.inf])
    assert rank_last(row, "min").tolist() == [2, 6, 1, 3, 6, 3]
    assert rank_last(row, "dense").tolist() == [2, 6, 1, 3, 6, 3]
    assert rank_last(row, "max").tolist() == [2, 6, 1, 4, 6, 4]
    assert rank_last(row, "average").tolist() == [2, 6, 1, 3.5, 6, 3.5]


# --- whole schemes, the slow way -----------------------------------------------------------------------------------------


def plain_ranks(keys: list[tuple[int, float]], ties: Ties) -> list[float]:
    """Ranks by comparing everything with everything; a key is (0, value) or (1, 0) for the last place."""
    found = []
    for key in keys:
        before = sum(other < key for other in keys)
        equal = sum(other == key for other in keys)
        distinct = len({other for other in keys if other < key})
        rule = {"min": before + 1, "max": before + equal, "average": before + (equal + 1) / 2, "dense": distinct + 1}
        found.append(float(len(keys) if key[0] else rule[ties]))
    return found


def plain_scheme(cube: Cube, name: str, ties: Ties, drawn_cases: list[int], holes: str, unending: str) -> list[float]:
    """The final ranks, computed with Python loops and exact fractions, case by drawn case."""
    n_arms = len(cube.arms)
    by_metric: list[list[float]] = []
    mean_ranks: list[list[Fraction]] = []
    for m, metric in enumerate(cube.metrics):
        signed = cube.values_mac[m] * SIGNS[metric]
        cells: list[list[float | str | None]] = [[float(v) for v in row] for row in signed]
        for c in range(len(cube.cases)):
            column = [signed[a, c] for a in range(n_arms)]
            for a in range(n_arms):
                if all(map(math.isnan, column)):
                    cells[a][c] = None
                elif (any(map(math.isnan, column)) and holes == "drop-case") or (any(map(math.isinf, column)) and unending == "drop-case"):
                    cells[a][c] = None  # gone for everybody, whatever else is wrong with it
                elif (math.isnan(column[a]) and holes == "worst") or (math.isinf(column[a]) and unending == "worst"):
                    cells[a][c] = "worst"
                elif (math.isnan(column[a]) and holes == "drop") or (math.isinf(column[a]) and unending == "drop"):
                    cells[a][c] = None
        if name == "rank-then-mean":
            totals, counts = [Fraction(0)] * n_arms, [0] * n_arms
            for c in drawn_cases:
                present = [a for a in range(n_arms) if cells[a][c] is not None]
                keys = [(1, 0.0) if cells[a][c] == "worst" else (0, float(cells[a][c])) for a in present]  # type: ignore[arg-type]
                for a, rank in zip(present, plain_ranks(keys, ties), strict=True):
                    totals[a] += Fraction(rank)
                    counts[a] += 1
            mean_ranks.append([totals[a] / counts[a] if counts[a] else Fraction(n_arms) for a in range(n_arms)])
            continue
        keys = []
        for a in range(n_arms):
            kept = [cells[a][c] for c in drawn_cases if cells[a][c] is not None]
            if not kept:
                keys.append((1, 0.0))
            elif name == "median-then-rank":
                order = sorted((1, 0.0) if v == "worst" else (0, v) for v in kept)  # type: ignore[type-var]
                low, high = order[(len(order) - 1) // 2], order[len(order) // 2]
                keys.append((1, 0.0) if high[0] else (0, statistics.mean([low[1], high[1]]) if low != high else low[1]))
            elif "worst" in kept:
                keys.append((1, 0.0))
            elif math.inf in kept:
                keys.append((0, math.inf))
            else:
                keys.append((0, float(sum(Fraction(v) for v in kept) / len(kept))))  # type: ignore[arg-type]
        by_metric.append(plain_ranks([(k, float(f"{v:.11g}")) for k, v in keys], ties))
    if name == "rank-then-mean":
        combined = [sum(column, Fraction(0)) / len(mean_ranks) for column in zip(*mean_ranks, strict=True)]
    else:
        combined = [sum(map(Fraction, column), Fraction(0)) for column in zip(*by_metric, strict=True)]
    if len(cube.metrics) == 1:
        return plain_ranks([(0, float(v)) for v in combined], ties) if name == "rank-then-mean" else by_metric[0]
    return [1.0 + sum(other < one for other in combined) for one in combined]


KINDS = ("worst", "drop", "drop-case")


@given(SEEDS, st.sampled_from(EVEN), st.sampled_from(TIES), st.sampled_from(KINDS), st.sampled_from(("exact", *KINDS)))
@settings(max_examples=400)
def test_schemes_are_what_plain_loops_give(seed: int, scheme: object, ties: Ties, holes: str, unending: str) -> None:
    assert isinstance(scheme, type(EVEN[0]))
    cube = drawn(seed, holes=True)
    try:
        ready = prepare(cube, Rule(holes), Rule(unending))  # type: ignore[arg-type]
    except InputError:  # no case is left for some metric
        return
    rng = np.random.default_rng(seed + 1)
    cases = len(cube.cases)
    draws = [list(range(cases)), *rng.integers(0, cases, (3, cases)).tolist()]
    weights = np.array([np.bincount(draw, minlength=cases) for draw in draws], dtype=float)
    found = rank_arms(ready, scheme, ties, weights).ranks_ra
    expected = [plain_scheme(cube, scheme.name, ties, draw, holes, unending) for draw in draws]
    assert found.tolist() == expected


def test_the_point_ranking_is_the_resample_with_every_case_once() -> None:
    for seed in range(20):
        ready = prepare(drawn(seed))
        for scheme in SCHEMES.values():
            one = rank_arms(ready, scheme)
            same = rank_arms(ready, scheme, weights_rc=np.ones((2, len(ready.cases))))
            assert (one.ranks_ra == same.ranks_ra).all()


# --- what must not matter ------------------------------------------------------------------------------------------------


def picked(ready: Prepared, arms: NDArray[np.intp], cases: NDArray[np.intp], metrics: NDArray[np.intp]) -> Prepared:
    take = np.ix_(metrics, arms, cases)
    return Prepared(
        tuple(ready.metrics[m] for m in metrics), tuple(ready.arms[a] for a in arms), tuple(ready.cases[c] for c in cases),
        ready.lower_mac[take], ready.worst_mac[take], ready.kept_mac[take], ready.n_dropped, ready.n_worst, ready.n_penalised, (),
    )  # fmt: skip


@given(SEEDS, st.sampled_from(tuple(SCHEMES.values())), st.sampled_from(TIES))
@settings(max_examples=150)
def test_the_order_of_arms_cases_and_metrics_does_not_matter(seed: int, scheme: object, ties: Ties) -> None:
    assert isinstance(scheme, type(EVEN[0]))
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(3, 6, 30)) * 10.0 ** rng.integers(-9, 9, (3, 6, 1))
    values[1][rng.random((6, 30)) < 0.05] = math.inf
    values[:, 5] = values[:, 2]  # an arm twice
    values[:, 4] = values[:, 3][:, rng.permutation(30)]  # the same values in other cases: the means tie
    ready = prepare(cube_of(values))
    weights = rng.multinomial(30, np.full(30, 1 / 30), 5).astype(float)
    arms, cases, metrics = rng.permutation(6), rng.permutation(30), rng.permutation(3)
    before, after = (
        rank_arms(ready, scheme, ties, weights).ranks_ra,
        rank_arms(picked(ready, arms, cases, metrics), scheme, ties, weights[:, cases]).ranks_ra,
    )
    assert (before[:, arms] == after).all()
    assert (before[:, 5] == before[:, 2]).all()


@given(SEEDS, st.sampled_from(TIES))
@settings(max_examples=60)
def test_a_monotone_change_of_units_leaves_ranks_of_cases_and_medians_of_odd_n(seed: int, ties: Ties) -> None:
    cube = drawn(seed, n_cases=7)
    with np.errstate(over="ignore"):
        bent = cube_of(np.exp(3 * cube.values_mac) + 5)
    for name in ("rank-then-mean", "median-then-rank"):
        one, two = (rank_arms(prepare(c), SCHEMES[name], ties).ranks_ra for c in (cube, bent))
        assert (one == two).all()


def test_a_scale_leaves_ranks_of_means() -> None:
    for seed in range(30):
        cube = drawn(seed)
        one, two = (rank_arms(prepare(c), SCHEMES["mean-then-rank"]).ranks_ra for c in (cube, cube_of(cube.values_mac * 1024.0)))
        assert (one == two).all()


def test_one_arm_and_one_case() -> None:
    for scheme in SCHEMES.values():
        assert rank_arms(prepare(cube_of(np.full((4, 1, 1), 0.5))), scheme).ranks_ra.tolist() == [[1.0]]
        assert rank_arms(prepare(cube_of(np.full((4, 3, 1), 0.5))), scheme).ranks_ra.tolist() == [[1.0, 1.0, 1.0]]


# --- exact sums ----------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=60)
def test_sums_are_exact_to_46_bits_of_the_largest_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(4, 50)) * 10.0 ** rng.integers(-300, 300, (4, 1)).astype(float)
    weights = rng.multinomial(50, np.full(50, 0.02), 3).astype(float)
    sums, exponent = weighted_sums(values, weights)
    for r in range(3):
        for a in range(4):
            exact = sum(Fraction(float(v)) * int(w) for v, w in zip(values[a], weights[r], strict=True))
            found = Fraction(float(sums[r, a])) * Fraction(2) ** int(exponent[a])
            assert abs(found - exact) <= Fraction(float(np.abs(values[a]).max())) * 50 / 2**45


def test_one_absurd_value_of_one_arm_does_not_blur_the_others() -> None:
    values = np.array([[[1e300, 1.0], [0.1, 0.2], [0.1, 0.2000001], [0.2, 0.1]]])
    assert rank_arms(prepare(cube_of(values, metrics=("rvd",))), SCHEMES["mean-then-rank"]).ranks_ra.tolist() == [[4.0, 1.0, 3.0, 1.0]]


def test_binary_rounding_breaks_no_tie() -> None:
    values = np.array([[[0.1, 0.2], [0.15, 0.15], [0.30000000001, 0.0]]])
    assert 0.1 + 0.2 != 0.15 + 0.15
    assert rank_arms(prepare(cube_of(values, metrics=("rvd",))), SCHEMES["mean-then-rank"]).ranks_ra.tolist() == [[1.0, 1.0, 3.0]]
    assert tied_by_bits(np.array([0.1 + 0.2, math.inf, -0.0])).tolist() == [tied_by_bits(np.array(0.3)), math.inf, 0.0]


def test_zero_times_infinity_is_nothing() -> None:
    values = np.array([[[math.inf, 1.0], [2.0, 3.0]]])
    weights = np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])
    found = rank_arms(prepare(cube_of(values, metrics=("hd",))), SCHEMES["mean-then-rank"], None, weights)
    assert found.values_mra[0].tolist() == [[1.0, 3.0], [math.inf, 2.5], [math.inf, 2.0]]
    assert found.ranks_ra.tolist() == [[1.0, 2.0], [2.0, 1.0], [2.0, 1.0]]


# --- tests as a ranking --------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=120)
def test_signed_ranks_are_those_of_scipy(seed: int) -> None:
    """Also for a resample: a case drawn k times is k pairs."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 40))
    differences = np.round(rng.normal(0.3, 1, n), int(rng.integers(0, 3)))
    for extreme in (math.inf, -math.inf, 0.0):
        differences[rng.random(n) < rng.choice([0.0, 0.2])] = extreme
    weights = np.stack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n))])
    ones = np.ones((1, n), dtype=bool)
    less, greater, counted = signed_rank_z(differences[None], ones, weights)
    many = signed_rank_z(differences[None], ones, np.tile(weights, (MANY_RESAMPLES // 2, 1)))
    assert [found[:, :2].tolist() for found in many] == [less.tolist(), greater.tolist(), counted.tolist()]
    for r in range(2):
        pairs = np.repeat(differences, weights[r].astype(int))
        assert counted[0, r] == (pairs != 0).sum()
        if not (pairs != 0).any():
            assert (less[0, r], greater[0, r]) == (math.inf, -math.inf)
            continue
        for alternative, p in (("less", stats.norm.cdf(less[0, r])), ("greater", stats.norm.sf(greater[0, r]))):
            theirs = stats.wilcoxon(pairs, alternative=alternative, method="asymptotic", correction=True, zero_method="wilcox").pvalue
            assert p == pytest.approx(theirs, abs=1e-12)


def plain_wins(lower: Array, alpha: float = 0.05) -> list[int]:
    """Wins of each arm (a, c), lower better: scipy's test of every ordered pair, Holm's rule step by step."""
    n = len(lower)
    p = {}
    for i in range(n):
        for j in range(n):
            if i != j:
                with np.errstate(invalid="ignore"):
                    d = np.nan_to_num(lower[i] - lower[j], nan=0.0, posinf=math.inf, neginf=-math.inf)
                same = not (d != 0).any()
                p[i, j] = 1.0 if same else stats.wilcoxon(d, alternative="less", method="asymptotic", correction=True).pvalue
    wins = [0] * n
    for k, (i, j) in enumerate(sorted(p, key=lambda pair: p[pair])):
        if p[i, j] * (len(p) - k) > alpha:
            break
        wins[i] += 1
    return wins


def test_wins_are_what_plain_loops_give() -> None:
    for seed in [85, 116, 208, *np.random.default_rng().integers(1000, 2**31, 5).tolist()]:
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(2, 5, 25)) + rng.integers(0, 3, (2, 5, 1)) * 0.8
        values[1][rng.random((5, 25)) < 0.1] = math.inf
        found = rank_arms(prepare(cube_of(values)), SCHEMES["test-then-rank"])
        for m, sign in enumerate((-1, 1)):
            assert (-found.values_mra[m, 0]).tolist() == plain_wins(sign * values[m]), seed


def test_holm_by_hand() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == [0.03, 0.06, 0.06, 0.02]
    assert holm(np.array([[0.5, 0.9]]), axis=1).tolist() == [[1.0, 1.0]]


def test_ranking_by_tests_takes_fifty_arms() -> None:
    with pytest.raises(InputError, match="up to 50 arms; there are 51"):
        rank_arms(prepare(cube_of(np.zeros((1, 51, 2)))), SCHEMES["test-then-rank"])
    assert set(rank_arms(prepare(cube_of(np.zeros((1, 50, 2)))), SCHEMES["test-then-rank"]).ranks_ra[0]) == {1.0}


def test_one_metric_has_the_ranks_of_its_rule_as_challenger_gives_them() -> None:
    """meanThenRank, medianThenRank, rankThenMean with R's rank(ties.method=): by hand, three algorithms, four cases, higher better."""
    values = np.array([[[0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9], [0.9, 0.9, 0.1, 0.1]]])
    ready = prepare(cube_of(values))
    assert rank_arms(ready, SCHEMES["mean-then-rank"], "min").ranks_ra.tolist() == [[1, 1, 3]]
    assert rank_arms(ready, SCHEMES["mean-then-rank"], "average").ranks_ra.tolist() == [[1.5, 1.5, 3]]
    assert rank_arms(ready, SCHEMES["mean-then-rank"], "max").ranks_ra.tolist() == [[2, 2, 3]]
    by_case = rank_arms(ready, SCHEMES["rank-then-mean"], "min")
    # ranks in the cases: (1, 2, 2, 2), (3, 3, 1, 1), (1, 1, 3, 3)
    assert by_case.values_mra[0].tolist() == [tied_by_bits(np.array([1.75, 2.0, 2.0])).tolist()]
    assert by_case.ranks_ra.tolist() == [[1, 2, 2]]


def test_published_means_are_ranked_alike() -> None:
    rng = np.random.default_rng(1)
    values = rng.choice([0.1, 0.2, 0.3, math.inf], (4, 9))
    for ties in TIES:
        by_metric, combined, final = ranks_of_means(values, ties)
        assert by_metric.tolist() == [stats.rankdata(row, ties).tolist() for row in values]
        assert final.tolist() == stats.rankdata(combined, "min").tolist()
