"""Strata: which case is where, and effects within them by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ichbench.board.effects import paired_effects
from ichbench.board.strata import KINDS, differing_strata, strata_effects, strata_of
from ichbench.board.summary import case_table
from ichbench.errors import InputError
from ichbench.scoring.score import Score


def cases(**columns: list[str]) -> dict[str, dict[str, str]]:
    n = len(next(iter(columns.values())))
    return {f"c{i:02d}": {name: column[i] for name, column in columns.items()} for i in range(n)}


def test_volume_bins_are_those_of_the_lesions_and_ends_belong_above() -> None:
    found = strata_of(cases(reference_ml=["0", "0.0", "0.99", "1.0", "9.999", "10", "29.9", "30", "400", ""]))
    assert found == {
        "volume": {
            "no bleed": ("c00", "c01"),
            "< 1 ml": ("c02",),
            "1 to < 10 ml": ("c03", "c04"),
            "10 to < 30 ml": ("c05", "c06"),
            ">= 30 ml": ("c07", "c08"),
            "?": ("c09",),
        }
    }
    assert list(found["volume"]) == ["no bleed", "< 1 ml", "1 to < 10 ml", "10 to < 30 ml", ">= 30 ml", "?"]


def test_a_case_counts_in_each_of_its_subtypes() -> None:
    found = strata_of(cases(subtype=["a+b", "b", " b + c ", "", "a+a"]))
    assert found["subtype"] == {"a": ("c00", "c04"), "b": ("c00", "c01", "c02"), "c": ("c02",), "?": ("c03",)}


def test_spacing_and_site() -> None:
    found = strata_of(
        cases(
            spacing_z_mm=["5.0", "1.49", "1.5", "3"],
            spacing_y_mm=["0.42", "0.41999998", "0.4300000071525574", "0.3"],
            spacing_x_mm=["0.42", "0.4200000166893005", "0.3", "0.3"],
            site=["A", "B", "A", ""],
        )
    )
    assert found["slice spacing"] == {"< 1.5 mm": ("c01",), "1.5 to < 3 mm": ("c02",), ">= 3 mm": ("c00", "c03")}
    assert found["in-plane spacing"] == {"<= 0.42 mm": ("c00", "c01", "c03"), "> 0.42 mm": ("c02",)}
    assert found["site"] == {"A": ("c00", "c02"), "B": ("c01",), "?": ("c03",)}


def test_columns_that_split_nothing_are_left_out() -> None:
    assert strata_of(cases(site=["A", "A"], reference_ml=["2", "3"])) == {}
    assert strata_of({}) == {}
    assert list(strata_of(cases(site=["A", "B"], reference_ml=["2", "30"]), ("site",))) == ["site"]


@pytest.mark.parametrize("text", ["many", "-1", "nan", "inf", "1_0"])
def test_cells_that_are_no_number_are_named(text: str) -> None:
    with pytest.raises(InputError, match=f"case c01: reference_ml is '{text}'"):
        strata_of(cases(reference_ml=["1", text]))
    with pytest.raises(InputError, match="no such strata: age; known are volume"):
        strata_of(cases(site=["A", "B"]), ("age",))


def study() -> tuple[list[Score], dict[str, dict[str, str]]]:
    """20 cases: at site A the arm gains 0.1, at site B it loses 0.1; a third arm changes nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        value = float(rng.uniform(0.3, 0.7))
        change = (0.1 if i < 10 else -0.1) + float(rng.normal(0, 0.005))
        for arm, dice in (("base", value), ("arm", value + change), ("same", value)):
            rows.append(Score(arm, "-", "-", f"c{i:02d}", "dice", dice))
    return rows, cases(site=["A"] * 10 + ["B"] * 10)


def test_effects_within_strata_are_those_of_their_rows_alone() -> None:
    rows, described = study()
    found = strata_effects(case_table(rows, ("dice",)), "base", described)
    assert len(found) == 2 * 3
    for one in found:
        within = [row for row in rows if described[row.case]["site"] == one.stratum]
        assert one.summary.n == 10
        if one.effect is None:
            assert one.summary.arm == "base"
            continue
        alone = next(effect for effect in paired_effects(case_table(within, ("dice",))) if effect.arm == one.effect.arm)
        for name in ("difference", "lower", "upper", "p", "n_pairs", "share_improved"):
            assert getattr(one.effect, name) == getattr(alone, name)
        # two arms in two strata are four tests
        if one.effect.arm == "arm":
            assert one.effect.p == pytest.approx(2 / 2**10)
            assert one.effect.p_adjusted == pytest.approx(4 * 2 / 2**10)
    verdicts = {(one.stratum, one.effect.arm): one.effect.verdict for one in found if one.effect}
    assert verdicts == {("A", "arm"): "better", ("B", "arm"): "worse", ("A", "same"): "equivalent", ("B", "same"): "equivalent"}
    assert differing_strata(found) == [("site", "arm", "dice")]


def test_small_strata_show_n_and_claim_nothing() -> None:
    rows, described = study()
    described = {case: line | {"site": "rare" if case < "c03" else "B"} for case, line in described.items()}
    found = [one for one in strata_effects(case_table(rows, ("dice",)), "base", described) if one.stratum == "rare"]
    assert {one.summary.n for one in found} == {3}
    assert {one.effect.verdict for one in found if one.effect} == {"not separable"}
    assert {one.effect.detectable for one in found if one.effect} == {math.inf}


def test_cases_without_a_line_are_refused() -> None:
    rows, described = study()
    del described["c07"]
    with pytest.raises(InputError, match="no line for c07"):
        strata_effects(case_table(rows, ("dice",)), "base", described)
    assert set(KINDS) == {"volume", "subtype", "slice spacing", "in-plane spacing", "site"}
