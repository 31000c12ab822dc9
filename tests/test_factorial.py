"""Factorial effects against least squares and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.board.factorial import FactorEffect, design_arms, factorial_effects
from ichbench.board.summary import case_table
from ichbench.errors import InputError
from ichbench.scoring.score import Score

TWO = {"window": ["w"], "dims": ["d"]}
THREE = {"window": ["w1", "w2"], "dims": ["d"], "crop": ["c1", "c2", "c3"]}


def study(factors: dict[str, list[str]], values: dict[str, list[float]]) -> list[Score]:
    return [Score(arm, "-", "-", f"c{i:02d}", "dice", value) for arm, column in values.items() for i, value in enumerate(column)]


def effects(factors: dict[str, list[str]], values: dict[str, list[float]], **options: object) -> dict[str, FactorEffect]:
    table = case_table(study(factors, values), ("dice",))
    return {effect.term: effect for effect in factorial_effects(table, "base", factors, resamples=200, **options)}  # type: ignore[arg-type]


def drawn(factors: dict[str, list[str]], seed: int, n: int = 9) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {arm: rng.random(n).tolist() for arm in design_arms("base", factors).values()}


def test_two_by_two_by_hand() -> None:
    values = {"base": [0.1] * 8, "w": [0.2] * 8, "d": [0.4] * 8, "w+d": [0.9] * 8}
    found = effects(TWO, values)
    assert found["w"].difference == pytest.approx((0.1 + 0.5) / 2)
    assert found["d"].difference == pytest.approx((0.3 + 0.7) / 2)
    assert found["w x d"].difference == pytest.approx(0.5 - 0.1)
    assert {term: effect.kind for term, effect in found.items()} == {"w": "main effect", "d": "main effect", "w x d": "interaction"}
    assert {effect.verdict for effect in found.values()} == {"better"}
    assert found["w"].p_adjusted == pytest.approx(2 * 2 / 2**8)  # two main effects
    assert found["w x d"].p_adjusted == pytest.approx(2 / 2**8)  # one interaction


def test_arm_names_are_those_of_the_study() -> None:
    from ichbench.ablation.study import make_study

    made = make_study("window_by_dims", "smoke")
    factors = {name: list(levels) for name, levels in made.factors.items()}
    assert made.design == "factorial"
    assert set(design_arms(made.base, factors).values()) <= {arm.name for arm in made.arms}
    assert len(design_arms(made.base, factors)) == 4


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_effects_are_the_coefficients_of_least_squares(seed: int) -> None:
    values = drawn(THREE, seed)
    found = effects(THREE, values)
    # sum-to-zero coding: a main effect is the level's coefficient minus that of off, an interaction the double difference
    rows, target = [], []
    names = list(THREE)
    codes = []
    for name in names:
        k = len(THREE[name])
        codes.append({level: np.eye(k)[i] for i, level in enumerate(THREE[name])} | {None: -np.ones(k)})
    for setting, arm in design_arms("base", THREE).items():
        parts = [codes[i][level] for i, level in enumerate(setting)]
        line = [1.0, *np.concatenate(parts)]
        for i, j in itertools.combinations(range(3), 2):
            line += np.outer(parts[i], parts[j]).ravel().tolist()
        line += np.einsum("a,b,c->abc", *parts).ravel().tolist()
        for value in values[arm]:
            rows.append(line)
            target.append(value)
    solution = np.linalg.lstsq(np.array(rows), np.array(target), rcond=None)[0]
    sizes = [len(THREE[name]) for name in names]
    place, mains = 1, []
    for size in sizes:
        mains.append(solution[place : place + size])
        place += size
    for name, main in zip(names, mains, strict=True):
        for i, level in enumerate(THREE[name]):
            assert found[level].difference == pytest.approx(main[i] + main.sum(), abs=1e-10)
    for i, j in itertools.combinations(range(3), 2):
        block = solution[place : place + sizes[i] * sizes[j]].reshape(sizes[i], sizes[j])
        place += block.size
        whole = np.zeros((sizes[i] + 1, sizes[j] + 1))  # with the implied row and column of off
        whole[:-1, :-1] = block
        whole[-1, :-1], whole[:-1, -1], whole[-1, -1] = -block.sum(0), -block.sum(1), block.sum()
        for (a, one), (b, two) in itertools.product(enumerate(THREE[names[i]]), enumerate(THREE[names[j]])):
            expected = whole[a, b] - whole[a, -1] - whole[-1, b] + whole[-1, -1]
            assert found[f"{one} x {two}"].difference == pytest.approx(expected, abs=1e-10)


def test_arms_without_any_effect_make_no_effect_of_rounding() -> None:
    column = np.random.default_rng(1).random(9).tolist()
    found = effects(THREE, {arm: column for arm in design_arms("base", THREE).values()})
    assert {(effect.difference, effect.p, effect.verdict) for effect in found.values()} == {(0.0, 1.0, "equivalent")}


def test_infinite_and_undefined_cells_leave_the_case_out() -> None:
    values = drawn(TWO, 3)
    values["w"][0], values["d"][1] = math.inf, math.nan
    values["base"][0] = math.inf
    found = effects(TWO, values)
    # case 1 has a nan in d, which every contrast needs; in case 0 infinities of both signs meet in w and in w x d
    assert {term: effect.n_left_out for term, effect in found.items()} == {"w": 2, "d": 1, "w x d": 2}
    assert found["d"].difference == -math.inf  # both arms without d are infinite there


def test_clusters_reach_the_contrasts() -> None:
    values = drawn(TWO, 4, 12)
    found = effects(TWO, values, clusters={f"c{i:02d}": f"p{i // 2}" for i in range(12)})
    assert {effect.n_units for effect in found.values()} == {6}


def test_incomplete_designs_and_wrong_factors_are_refused() -> None:
    values = drawn(TWO, 5)
    del values["w+d"]
    with pytest.raises(InputError, match=r"lacks scores of w\+d"):
        effects(TWO, values)
    with pytest.raises(InputError, match="two factors"):
        effects({"window": ["w"]}, values)
    with pytest.raises(InputError, match="two factors"):
        effects({"window": ["w"], "dims": []}, values)
    uneven = drawn(TWO, 6)
    uneven["d"] = uneven["d"][:-1]
    with pytest.raises(InputError, match="same cases"):
        effects(TWO, uneven)


def test_seed_error_is_that_of_the_weighted_arms() -> None:
    # every arm has two seeds 0.1 apart: sd^2 = 0.005, and 0.0025 for the mean of two
    values = drawn(TWO, 7)
    rows = [row._replace(seed=seed, value=row.value + shift) for row in study(TWO, values) for seed, shift in (("0", -0.05), ("1", 0.05))]
    found = {one.term: one for one in factorial_effects(case_table(rows, ("dice",)), "base", TWO, resamples=100)}
    assert found["w"].seed_error == pytest.approx(math.sqrt(4 * 0.5**2 * 0.0025))
    assert found["w x d"].seed_error == pytest.approx(math.sqrt(4 * 0.0025))
    assert not found["w"].single_seed
    once = factorial_effects(case_table([row for row in rows if row.seed == "0"], ("dice",)), "base", TWO, resamples=100)
    assert {one.single_seed for one in once} == {True}
