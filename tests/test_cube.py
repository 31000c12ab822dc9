"""Rows into arrays, and what is done about absent, undefined and infinite values; never quietly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ichbench.board.cube import INFINITE_KINDS, MISSING_KINDS, Rule, better_of, cube_of_rows, parse_rule, prepare
from ichbench.board.ranking import SCHEMES, rank_arms
from ichbench.board.wins import pair_differences
from ichbench.errors import InputError
from ichbench.scoring import METRICS
from ichbench.scoring.score import Score

INF, NAN = math.inf, math.nan


def rows_of(table: dict[str, dict[str, dict[str, float]]], seed: str = "-", fold: str = "-") -> list[Score]:
    """arm -> metric -> case -> value"""
    return [
        Score(arm, fold, seed, case, metric, value)
        for arm, metrics in table.items()
        for metric, cases in metrics.items()
        for case, value in cases.items()
    ]


TABLE = {
    "b": {"dice": {"c2": 0.5, "c1": 1.0}, "hd": {"c1": INF, "c2": 3.0}},
    "a": {"dice": {"c1": 0.2, "c2": 0.4}, "hd": {"c1": 2.0, "c2": 1.0}},
}


def test_rows_in_any_order_become_one_array() -> None:
    rows = rows_of(TABLE)
    for every in (rows, rows[::-1]):
        cube = cube_of_rows(every, ("dice", "hd"))
        assert (cube.arms, cube.cases) == (("a", "b"), ("c1", "c2"))
        assert cube.values_mac.tolist() == [[[0.2, 0.4], [1.0, 0.5]], [[2.0, 1.0], [INF, 3.0]]]
        assert not cube.absent_mac.any()
        assert (cube.n_empty, cube.n_missing) == ((-1, -1), (-1, -1))


def test_seeds_and_folds_are_averaged_within_a_case() -> None:
    rows = [
        Score("a", fold, seed, "c", "dice", v) for fold, seed, v in (("0", "0", 0.1), ("1", "0", 0.2), ("0", "1", 0.6), ("1", "1", NAN))
    ]
    cube = cube_of_rows([*rows, Score("b", "-", "-", "c", "dice", 0.4)], ("dice",))
    assert cube.values_mac[0, :, 0].tolist() == [pytest.approx(0.375), 0.4]
    # seed 0 has five folds and seed 1 one: each seed counts once
    uneven = [*(Score("a", fold, "0", "c", "dice", 0.9) for fold in "01234"), Score("a", "0", "1", "c", "dice", 0.3)]
    assert cube_of_rows(uneven, ("dice",)).values_mac.item() == pytest.approx(0.6)
    with pytest.raises(InputError, match="arm 'a' has rows with the seed '-'"):
        cube_of_rows([*uneven, Score("a", "-", "-", "c", "dice", 0.9)], ("dice",))
    infinite = cube_of_rows([Score("a", "-", seed, "c", "hd", value) for seed, value in (("0", INF), ("1", 2.0))], ("hd",))
    assert infinite.values_mac.item() == INF
    both = cube_of_rows([Score("a", "-", seed, "c", "hd", value) for seed, value in (("0", INF), ("1", -INF))], ("hd",))
    assert math.isnan(both.values_mac.item())


def test_marks_are_counted() -> None:
    rows = rows_of(TABLE) + [
        Score("b", "-", "-", c, m, v) for c in ("c1", "c2") for m, v in (("missing", c == "c1"), ("empty_prediction", 1.0))
    ]
    cube = cube_of_rows(rows, ("dice",))
    assert (cube.n_empty, cube.n_missing) == ((-1, 2), (-1, 1))
    with pytest.raises(InputError, match=r"missing is 0.5; it must be 0 or 1"):
        cube_of_rows([*rows_of(TABLE), Score("b", "-", "-", "c1", "missing", 0.5)], ("dice",))


def test_what_rows_cannot_be() -> None:
    with pytest.raises(InputError, match="no score rows"):
        cube_of_rows([], ("dice",))
    with pytest.raises(InputError, match=r"duplicate score rows .*b,-,-,c1,dice, a,-,-,c2,hd\. Keep one"):
        cube_of_rows([*rows_of(TABLE), Score("b", "-", "-", "c1", "dice", 1.0), Score("a", "-", "-", "c2", "hd", 7.0)], ("dice", "hd"))
    with pytest.raises(InputError, match="no score row has the metric nsd; the rows have dice, hd"):
        cube_of_rows(rows_of(TABLE), ("dice", "nsd"))


def test_every_metric_declares_its_direction_once() -> None:
    for name, metric in METRICS.items():
        if metric.better == "none":
            with pytest.raises(InputError, match="no better direction"):
                better_of(name)
        else:
            assert better_of(f"{name}/2") == metric.better
    signs = {
        name: prepare(cube_of_rows([Score("a", "-", "-", "c", name, 0.5)], (name,))).lower_mac.item()
        for name in ("dice", "hd", "rvd", "nsd")
    }
    assert signs == {"dice": -0.5, "hd": 0.5, "rvd": 0.5, "nsd": -0.5}


def gaps() -> list[Score]:
    """Arm b has no HD in c3 and an undefined NSD in c2; arm a is complete."""
    full = {"hd": {"c1": 1.0, "c2": 2.0, "c3": 9.0}, "nsd": {"c1": 0.9, "c2": 0.1, "c3": 0.3}}
    return rows_of({"a": full, "b": {"hd": {"c1": 2.0, "c2": 3.0}, "nsd": {"c1": 0.8, "c2": NAN, "c3": 0.4}}})


def test_nobody_is_ranked_on_the_rest_quietly() -> None:
    with pytest.raises(InputError) as error:
        prepare(cube_of_rows(gaps(), ("hd", "nsd")))
    text = str(error.value)
    assert "'b' has no row in hd for 1 of 3 cases (c3)" in text
    assert "'b' has nan in nsd for 1 of 3 cases (c2)" in text
    assert "--missing worst, drop, drop-case" in text


def test_a_seed_that_lacks_a_case_is_a_hole() -> None:
    rows = [Score("a", "-", seed, case, "hd", 1.0) for seed in "01" for case in ("c1", "c2")][:-1] + rows_of(
        {"b": {"hd": {"c1": 1.0, "c2": 2.0}}}
    )
    with pytest.raises(InputError, match=r"'a' has no row in hd for 1 of 2 cases \(c2\)"):
        prepare(cube_of_rows(rows, ("hd",)))


def test_missing_values_by_every_rule() -> None:
    cube = cube_of_rows(gaps(), ("hd", "nsd"))
    worst = prepare(cube, Rule("worst"))
    assert worst.n_worst == (0, 2)
    assert worst.worst_mac[:, 1].tolist() == [[False, False, True], [False, True, False]]
    drop = prepare(cube, Rule("drop"))
    assert drop.n_dropped == (0, 2)
    assert (~drop.kept_mac).sum() == 2
    whole = prepare(cube, Rule("drop-case"))
    assert whole.n_dropped == (0, 0)
    assert (~whole.kept_mac).tolist() == [[[False, False, True]] * 2, [[False, True, False]] * 2]
    assert whole.notes == (
        "hd: 1 of 3 cases are left out for every arm, because a value is missing or undefined: c3",
        "nsd: 1 of 3 cases are left out for every arm, because a value is missing or undefined: c2",
    )
    paid = prepare(cube, Rule("penalty", {"hd": 374.0, "nsd": 0.0}))
    assert paid.n_penalised == (0, 2)
    assert paid.lower_mac[:, 1].tolist() == [[2.0, 3.0, 374.0], [-0.8, -0.0, -0.4]]
    with pytest.raises(InputError, match="nsd has missing or undefined values and no penalty; add nsd=VALUE"):
        prepare(cube, Rule("penalty", {"hd": 374.0}))
    # hd: a 4, b 2.5 on the rest, so dropping changes who is first, and says so; as worst or penalty it does not
    alone = cube_of_rows(gaps(), ("hd",))
    ready = [prepare(alone, rule) for rule in (Rule("worst"), Rule("drop"), Rule("drop-case"))]
    orders = [rank_arms(one, SCHEMES["mean-then-rank"]).ranks_ra[0].tolist() for one in ready]
    assert orders == [[1, 2], [2, 1], [1, 2]]


def test_infinite_values_by_every_rule() -> None:
    cube = cube_of_rows(rows_of(TABLE), ("hd",))
    assert prepare(cube).lower_mac.tolist() == [[[2.0, 1.0], [INF, 3.0]]]
    assert prepare(cube, None, Rule("worst")).n_worst == (0, 1)
    assert prepare(cube, None, Rule("drop")).n_dropped == (0, 1)
    assert prepare(cube, None, Rule("drop-case")).kept_mac.tolist() == [[[False, True]] * 2]
    assert prepare(cube, None, Rule("penalty", {"hd": 2.5})).notes == (
        "the penalty 2.5 of hd is better than 1 measured values: failing pays in those cases",
    )


def test_worst_is_worse_than_infinite() -> None:
    rows = rows_of({"a": {"hd": {"c1": INF, "c2": 1.0}}, "b": {"hd": {"c1": NAN, "c2": 1.0}}, "c": {"hd": {"c1": 2.0, "c2": 1.0}}})
    ready = prepare(cube_of_rows(rows, ("hd",)), Rule("worst"))
    assert rank_arms(ready, SCHEMES["mean-then-rank"]).ranks_ra.tolist() == [[2, 3, 1]]
    first, second = np.triu_indices(3, k=1)
    differences, kept = pair_differences(ready, 0, first, second)
    assert differences.tolist() == [[-INF, 0.0], [INF, 0.0], [INF, 0.0]]
    assert kept.all()
    both = rows_of({"a": {"hd": {"c1": NAN, "c2": INF}}, "b": {"hd": {"c1": NAN, "c2": INF}}, "c": {"hd": {"c1": 2.0, "c2": 1.0}}})
    twice = prepare(cube_of_rows(both, ("hd",)), Rule("worst"))
    assert pair_differences(twice, 0, first, second)[0].tolist() == [[0.0, 0.0], [INF, INF], [INF, INF]]
    gone = pair_differences(prepare(cube_of_rows(both, ("hd",)), Rule("drop")), 0, first, second)[1]
    assert gone.tolist() == [[False, True]] * 3


def test_what_says_nothing_about_anybody_is_left_out() -> None:
    rows = rows_of({arm: {"nsd": {"c1": NAN, "c2": value}} for arm, value in (("a", 0.5), ("b", 0.6))})
    ready = prepare(cube_of_rows(rows, ("nsd",)))
    assert ready.kept_mac.tolist() == [[[False, True]] * 2]
    assert ready.notes == ("nsd: 1 of 2 cases are undefined for every arm and left out",)
    assert ready.n_dropped == (0, 0)
    with pytest.raises(InputError, match="no case is left for nsd"):
        prepare(cube_of_rows(rows_of({arm: {"nsd": {"c1": NAN}} for arm in "ab"}), ("nsd",)))
    # nobody has the row at all: that is not undefined, it is missing
    lacking = rows_of({"a": {"nsd": {"c1": 0.1}, "hd": {"c2": 1.0}}, "b": {"nsd": {"c1": 0.1}, "hd": {"c2": 1.0}}})
    with pytest.raises(InputError, match="no row in nsd"):
        prepare(cube_of_rows(lacking, ("nsd",)))


def test_infinitely_good_is_refused() -> None:
    with pytest.raises(InputError, match=r"dice of arm 'a', case 'c' is inf, which is infinitely good \(1 such values\)"):
        prepare(cube_of_rows([Score("a", "-", "-", "c", "dice", INF)], ("dice",)))
    with pytest.raises(InputError, match="hd of arm 'a', case 'c' is -inf"):
        prepare(cube_of_rows([Score("a", "-", "-", "c", "hd", -INF)], ("hd",)))


def test_rules_from_text() -> None:
    assert parse_rule("worst", MISSING_KINDS, ("hd",), "--missing") == Rule("worst")
    assert parse_rule("hd=374,dice=0", INFINITE_KINDS, ("dice", "hd"), "--infinite") == Rule("penalty", {"hd": 374.0, "dice": 0.0})
    for text, words in (
        ("best", "--missing 'best' is not understood; give one of refuse, worst, drop, drop-case, or penalties"),
        ("exact", "not understood"),
        ("374", "not understood"),
        ("hd=inf", "not understood"),
        ("hd=", "not understood"),
        ("", "not understood"),
        ("nsd=0", "'nsd' is not ranked; the ranking is over dice, hd"),
        ("hd=1,hd=2", "two penalties for 'hd'"),
    ):
        with pytest.raises(InputError, match=words):
            parse_rule(text, MISSING_KINDS, ("dice", "hd"), "--missing")


def test_rankings_of_labels_count_the_labels_own_empty_masks() -> None:
    rows = [Score("a", "-", "-", c, m, 0.5) for c in ("c1", "c2", "c3") for m in ("dice", "dice/2", "dice/3")]
    rows += [Score("a", "-", "-", c, m, 0.0) for c in ("c1", "c2", "c3") for m in ("missing", "empty_prediction")]
    rows += [Score("a", "-", "-", c, "empty_prediction/2", float(c != "c3")) for c in ("c1", "c2", "c3")]
    assert cube_of_rows(rows, ("dice",)).n_empty == (0,)
    assert cube_of_rows(rows, ("dice/2",)).n_empty == (2,)
    assert cube_of_rows(rows, ("dice/2", "dice")).n_empty == (2,)
    assert cube_of_rows(rows, ("dice/3",)).n_empty == (-1,)
    assert cube_of_rows(rows, ("dice/2",)).n_missing == (0,)
