"""The check: equal means equal, and every way of not being equal is found and named."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.board.check import Difference, compare_digests, compare_scores, compare_text
from ichbench.board.check_report import SHOWN, SUITES, check_json, check_junit, render_check
from ichbench.errors import InputError
from ichbench.scoring.score import Score

ROWS = [
    Score("base", "-", "0", "c1", "dice", 0.1 + 0.2),
    Score("base", "-", "0", "c1", "hd", math.inf),
    Score("base", "-", "0", "c1", "nsd", math.nan),
    Score("base", "-", "0", "c1", "nsd@1.0", 0.25),
    Score("base", "-", "0", "c1", "dice/2", 0.5),
]


def changed(index: int, value: float) -> list[Score]:
    return [row._replace(value=value) if i == index else row for i, row in enumerate(ROWS)]


def test_equal_rows_pass_in_any_order_with_inf_and_nan() -> None:
    assert compare_scores(ROWS, reversed(ROWS)) == []


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *[(0, 0.3), (0, math.nan), (0, math.inf), (1, 1e300), (1, -math.inf), (1, math.nan)],
        *[(2, 0.0), (2, math.inf), (3, math.nextafter(0.25, 1))],
    ],
)
def test_any_changed_bit_is_found(index: int, value: float) -> None:
    found = compare_scores(ROWS, changed(index, value))
    assert [(d.kind, d.where) for d in found] == [("score", "/".join(ROWS[index][:5]))]
    assert (found[0].committed, found[0].fresh) == (repr(ROWS[index].value), repr(value))


def test_the_sign_of_zero_is_a_bit() -> None:
    row = Score("a", "-", "-", "c", "rvd", 0.0)
    assert len(compare_scores([row], [row._replace(value=-0.0)])) == 1


def test_missing_and_extra_rows_are_differences() -> None:
    other = Score("base", "-", "0", "c2", "dice", 0.5)
    found = compare_scores(ROWS, [*ROWS[1:], other])
    assert [(d.kind, d.where) for d in found] == [("missing row", "base/-/0/c1/dice"), ("extra row", "base/-/0/c2/dice")]
    assert len(compare_scores(ROWS, [])) == len(ROWS)


def test_tolerances_hold_for_their_metric_and_its_variants_only() -> None:
    assert compare_scores(ROWS, changed(0, 0.35), {"dice": 0.06}) == []
    assert compare_scores(ROWS, changed(4, 0.55), {"dice": 0.06}) == []
    assert len(compare_scores(ROWS, changed(4, 0.55), {"dice": 0.06, "dice/2": 0.01})) == 1
    assert len(compare_scores(ROWS, changed(0, 0.37), {"dice": 0.06})) == 1
    assert len(compare_scores(ROWS, changed(3, 0.26), {"dice": 0.06})) == 1
    assert compare_scores(ROWS, changed(3, 0.26), {"nsd": 0.06}) == []


@pytest.mark.parametrize("value", [1.0, math.nan, -math.inf])
def test_a_tolerance_does_not_forgive_a_change_of_kind(value: float) -> None:
    assert len(compare_scores(ROWS, changed(1, value), {"hd": 1e9})) == 1


@settings(max_examples=50)
@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 2))
def test_within_tolerance_is_what_the_word_says(old: float, new: float, tolerance: float) -> None:
    first, second = Score("a", "-", "-", "c", "dice", old), Score("a", "-", "-", "c", "dice", new)
    assert (compare_scores([first], [second], {"dice": tolerance}) == []) == (repr(old) == repr(new) or abs(new - old) <= tolerance)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_meaningless_tolerances_are_refused(tolerance: float) -> None:
    with pytest.raises(InputError, match="tolerance of 'dice'"):
        compare_scores(ROWS, ROWS, {"dice": tolerance})


def test_an_empty_or_doubled_board_is_refused() -> None:
    with pytest.raises(InputError, match="no rows"):
        compare_scores([], ROWS)
    with pytest.raises(InputError, match=r"fresh scores have duplicate rows: base/-/0/c1/dice"):
        compare_scores(ROWS, [*ROWS, ROWS[0]])


def test_digests() -> None:
    found = compare_digests({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert [(d.kind, d.where, d.committed, d.fresh) for d in found] == [
        ("digest", "b", "2", "9"), ("missing digest", "c", "3", None), ("extra digest", "d", None, "4"),
    ]  # fmt: skip
    assert compare_digests({"a": "1"}, {"a": "1"}) == []


def test_text_names_the_first_line_that_differs() -> None:
    assert compare_text("board.csv", "a\nb\n", "a\nb\n") == []
    (found,) = compare_text("board.csv", "a\nb\nc\n", "a\nX\nc\n")
    assert (found.where, found.committed, found.fresh) == ("board.csv:2", "b\n", "X\n")
    assert "1 of 3 lines" in found.text
    (several,) = compare_text("board.csv", "a\nb\nc\n", "a\nX\nY\n")
    assert (several.where, several.fresh) == ("board.csv:2", "X\n")
    assert "2 of 3 lines" in several.text
    (longer,) = compare_text("board.csv", "a\n", "a\nb\n")
    assert (longer.where, longer.committed, longer.fresh) == ("board.csv:2", None, "b\n")
    assert len(compare_text("board.csv", "a\n", "a\r\n")) == 1
    assert len(compare_text("board.csv", "a\n", "a")) == 1


def test_the_table_says_what_moved() -> None:
    text = render_check(compare_scores(ROWS, changed(3, 0.5)), len(ROWS))
    assert text.splitlines()[0] == "check FAILED: 1 differences in 5 facts compared (1 score)"
    assert "base/-/0/c1/nsd@1.0  0.25       0.5    moved by +0.25; must be exact" in text
    assert render_check([], 5) == "check passed: 5 facts compared, none differs\n"
    assert max(map(len, render_check(compare_text("b", "x" * 500, "y" * 500), 1).splitlines())) < 200


def test_nothing_compared_is_not_a_pass() -> None:
    assert "FAILED" in render_check([], 0)
    assert json.loads(check_json([], 0))["passed"] is False


def test_a_long_table_says_how_much_it_leaves_out() -> None:
    rows = [Score(arm, "-", "-", f"c{i:03d}", "dice", 0.5) for arm in ("a", "b") for i in range(50)]
    text = render_check(compare_scores(rows, [row._replace(value=0.6) for row in rows]), 100)
    assert f"... and {100 - SHOWN} more: 10 in a, 50 in b" in text


def test_json_is_strict_and_complete() -> None:
    outcome = json.loads(check_json(compare_scores(ROWS, changed(1, math.nan)), len(ROWS)), parse_constant=pytest.fail)
    assert (outcome["passed"], outcome["n_compared"]) == (False, 5)
    assert outcome["differences"] == [
        {"kind": "score", "where": "base/-/0/c1/hd", "committed": "inf", "fresh": "nan", "text": "moved by +nan; must be exact"}
    ]


def junit(differences: list[Difference], n_compared: int) -> ElementTree.Element:
    return ElementTree.fromstring(check_junit(differences, n_compared, "phantom"))  # noqa: S314 (our own text)


def test_junit_has_the_same_cases_whether_they_pass_or_fail() -> None:
    passed = junit([], 5)
    assert [case.get("name", "").split(":")[0] for case in passed.iter("testcase")] == list(SUITES)
    assert list(passed.iter("failure")) == []
    assert passed.get("failures") == "0"
    everything = [
        Difference("text", "recipes/base", "dice_ce", "ce", "training.loss was dice_ce, is ce"),
        *compare_digests({"case1": "a", "case2": "b"}, {"case1": "c"}),
        *compare_scores(ROWS, changed(3, 0.5)),
        *compare_text("board.csv", "a\n", "b\x00\x1b]<&>\n"),
    ]
    failed = junit(everything, 9)
    texts = {failure.get("type"): failure.text or "" for failure in failed.iter("failure")}
    assert list(texts) == list(SUITES)
    assert (failed.get("tests"), failed.get("failures")) == ("4", "4")
    assert "training.loss was dice_ce, is ce" in texts["recipes"]
    assert texts["phantom"].count("\n") == 1  # both digests
    assert "base/-/0/c1/nsd@1.0: moved by +0.25" in texts["scores"]
    assert "board.csv:1" in texts["board"]


def test_junit_of_a_board_with_a_strange_name_is_still_xml() -> None:
    text = check_junit([], 5, "a\x01\x1b<&>b")
    assert ElementTree.fromstring(text).get("name") == "ichbench check a\\x01\\x1b<&>b"  # noqa: S314 (our own text)


def test_junit_of_nothing_is_no_pass() -> None:
    assert {failure.text for failure in junit([], 0).iter("failure")} == {"nothing was compared"}
