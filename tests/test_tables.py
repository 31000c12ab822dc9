"""Score rows in and out of CSV, the wide table, and sums over cases."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.errors import InputError
from ichbench.scoring import PROTOCOLS, Score, aggregate, read_scores, write_scores, write_wide
from ichbench.scoring.tables import percentiles, wide_csv

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6)


@settings(max_examples=30)
@given(st.dictionaries(st.tuples(NAMES, NAMES, NAMES, NAMES, NAMES), st.floats(), max_size=8))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, table: dict[tuple[str, ...], float]) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.csv"
    write_scores(path, [Score(*key, value) for key, value in table.items()])
    rows = read_scores(path)
    assert [row[:5] for row in rows] == sorted(table)
    assert [repr(row.value) for row in rows] == [repr(table[row[:5]]) for row in rows]
    before = path.read_bytes()
    write_scores(path, reversed(rows))
    assert path.read_bytes() == before


def test_the_written_form(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.csv"
    values = {"dice": 0.1, "hd": math.inf, "nsd": math.nan, "rvd": np.float64(1e-7), "assd": 1}
    write_scores(path, [Score("b,1", "-", "-", "é", key, value) for key, value in values.items()] + [Score("a", "0", "1", "2", "hd", -0.0)])
    assert path.read_bytes().decode() == (
        "arm,fold,seed,case,metric,value\n"
        "a,0,1,2,hd,-0.0\n"
        '"b,1",-,-,é,assd,1.0\n"b,1",-,-,é,dice,0.1\n"b,1",-,-,é,hd,inf\n"b,1",-,-,é,nsd,nan\n"b,1",-,-,é,rvd,1e-07\n'
    )
    assert [item.name for item in path.parent.iterdir()] == ["scores.csv"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    row = Score("a", "-", "-", "c", "dice", 1.0)
    with pytest.raises(InputError, match=r"two rows for arm 'a'.*'dice'"):
        write_scores(path, [row, row._replace(value=0.5)])
    for name in ("", "line\nbreak", "\udcff"):
        with pytest.raises(InputError, match="not printable"):
            write_scores(path, [row._replace(case=name)])
    assert not list(tmp_path.iterdir())


HEAD = "arm,fold,seed,case,metric,value\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: the header is ''"),
        ("arm,fold,case,metric,value\n", "line 1: the header is 'arm,fold,case,metric,value'"),
        (HEAD + "a,-,-,c,dice,1.0\na,-,-,c,hd,many\n", "line 3: the value is 'many'"),
        (HEAD + "a,-,-,c,dice,\n", "line 2: the value is ''"),
        (HEAD + "a,-,-,c,dice,1_0\n", "line 2: the value is '1_0'"),
        (HEAD + "a,-,-,c,dice, 1\n", "line 2: the value is ' 1'"),
        (HEAD + "a,-,-,c,dice\n", "line 2: 5 columns"),
        (HEAD + "\n", "line 2: 0 columns"),
        (HEAD + "a,-,,c,dice,1\n", "line 2: a name is empty"),
        (HEAD + "a,-,-,c,dice,1.0\nb,-,-,c,dice,1.0\na,-,-,c,dice,0.5\n", "line 4: arm 'a'.* was already given in line 2"),
        (HEAD + '"a,-,-,c,dice,1.0\n', "cannot be read"),
        (HEAD + "\x00", "."),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as error:
        read_scores(path)
    assert str(path) in str(error.value)


def test_reading_what_other_programs_saved(tmp_path: Path) -> None:
    """A byte order mark and CRLF, as spreadsheets write; not other encodings, not a folder, not nothing."""
    path = tmp_path / "scores.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode() + b"a,-,-,c,dice,0.5\r\na,-,-,c,hd,inf\r\n")
    assert read_scores(path) == [Score("a", "-", "-", "c", "dice", 0.5), Score("a", "-", "-", "c", "hd", math.inf)]
    path.write_bytes(HEAD.encode() + b"a,-,-,\xe9,dice,0.5\n")
    for wrong in (path, tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(InputError, match="cannot be read"):
            read_scores(wrong)


# --- one line per case -------------------------------------------------------------------------------------------------


def case_rows(case: str, values: dict[str, float], arm: str = "a") -> list[Score]:
    return [Score(arm, "-", "-", case, metric, value) for metric, value in values.items()]


def test_wide_has_one_line_per_case_in_the_order_of_the_protocol(tmp_path: Path) -> None:
    two = {"missing": 0.0, "hd": math.inf, "dice": 0.1, "volume_x": 2.0, "hd/2": math.nan, "dice/2": 1e-7, "empty_prediction/2": 1.0}
    rows = case_rows("b,2", two | {"dice/core": 0.5}) + case_rows("a", {"dice": 1.0, "missing": 1.0})
    write_wide(tmp_path / "new" / "wide.csv", rows, "strict")
    assert (tmp_path / "new" / "wide.csv").read_bytes().decode() == (
        "arm,fold,seed,case,dice,hd,volume_x,dice/2,hd/2,dice/core,missing,empty_prediction/2\n"
        "a,-,-,a,1.0,,,,,,1.0,\n"
        'a,-,-,"b,2",0.1,inf,2.0,1e-07,nan,0.5,0.0,1.0\n'
    )
    other = dataclasses.replace(PROTOCOLS["strict"], metrics=("hd", "dice"))
    assert wide_csv(rows, other).startswith("arm,fold,seed,case,hd,dice,")
    assert wide_csv([], "strict") == "arm,fold,seed,case\n"


@settings(max_examples=30)
@given(
    st.dictionaries(st.tuples(st.sampled_from("ab"), st.sampled_from("12345"), st.sampled_from(["dice", "nsd@1.0", "hd/2"])), st.floats())
)
def test_wide_and_long_hold_the_same_numbers(table: dict[tuple[str, str, str], float]) -> None:
    rows = [Score(arm, "0", "7", case, metric, value) for (arm, case, metric), value in table.items()]
    lines = list(csv.DictReader(io.StringIO(wide_csv(rows, "instance2022"))))
    assert len(lines) == len({row[:4] for row in rows})
    names = ("arm", "fold", "seed", "case")
    found = {(*(line[name] for name in names), key): text for line in lines for key, text in line.items() if key not in names and text}
    assert found == {row[:5]: repr(row.value) for row in rows}


def test_what_cannot_be_written_wide(tmp_path: Path) -> None:
    rows = case_rows("c", {"dice": 1.0})
    with pytest.raises(InputError, match=r"two rows for arm 'a'.*'dice'"):
        write_wide(tmp_path / "w.csv", rows + rows, "strict")
    with pytest.raises(InputError, match="not printable"):
        write_wide(tmp_path / "w.csv", case_rows("a\nb", {"dice": 1.0}), "strict")
    with pytest.raises(InputError, match="no protocol"):
        write_wide(tmp_path / "w.csv", rows, "x")
    assert not list(tmp_path.iterdir())


# --- sums over cases ---------------------------------------------------------------------------------------------------

#: `pandas.Series(VALUES[name]).describe()` of pandas 3.1.1 (count, mean, std, min, 25%, 50%, 75%, max). Rewrite: run just that.
VALUES = {name: [((37 * i * i + 11 * i) % 101) / 128 for i in range(n)] for name, n in (("plain", 30), ("undefined", 30), ("one", 1))}
VALUES["one"] = [0.25]
VALUES["undefined"][7] = VALUES["undefined"][19] = math.nan
DESCRIBED = {
    "plain": (30.0, 0.37838541666666664, 0.19987329437615547, 0.0, 0.23828125, 0.4140625, 0.55078125, 0.6640625),
    "undefined": (28.0, 0.3763950892857143, 0.2025795468857281, 0.0, 0.234375, 0.4140625, 0.54296875, 0.6640625),
    "infinite": (28.0, math.inf, math.nan, 0.0, 0.234375, 0.4140625, 0.5546875, math.inf),
    "one": (1.0, 0.25, math.nan, 0.25, 0.25, 0.25, 0.25, 0.25),
    "none": (0.0, *[math.nan] * 7),
}
VALUES["infinite"] = [*VALUES["undefined"][:3], math.inf, *VALUES["undefined"][4:]]
VALUES["none"] = [math.nan, math.nan]


@pytest.mark.parametrize("name", list(DESCRIBED))
def test_aggregates_are_those_of_pandas(name: str) -> None:
    rows = [Score("a", "-", "-", str(index), "dice", value) for index, value in enumerate(VALUES[name])]
    (found,) = aggregate(rows)
    numbers = (found.n, found.mean, found.sd, found.minimum, found.percentile_25, found.median, found.percentile_75, found.maximum)
    assert numbers == pytest.approx(DESCRIBED[name], rel=1e-14, abs=0, nan_ok=True)
    assert found.n_undefined == sum(map(math.isnan, VALUES[name]))
    assert found.n_infinite == sum(map(math.isinf, VALUES[name]))
    assert found.n_finite + found.n_infinite + found.n_undefined == len(VALUES[name])
    assert repr(aggregate(rows[::-1])) == repr([found])


@settings(max_examples=80)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(0, 3))
def test_percentiles_beside_infinite_values(numbers: list[float], n_infinite: int) -> None:
    """As NumPy for finite values; with infinite ones what a very large number would give, up to that number's own size."""
    ordered = [*sorted(numbers), *[math.inf] * n_infinite]
    found = percentiles(ordered, (0.0, 25.0, 50.0, 75.0, 100.0))
    large = np.percentile([*sorted(numbers), *[1e300] * n_infinite], (0.0, 25.0, 50.0, 75.0, 100.0))
    for mine, other in zip(found, large, strict=True):
        assert (mine == math.inf) if other > 1e290 else mine == pytest.approx(other, rel=1e-12, abs=1e-9)
    assert percentiles([1.0, 2.0, math.inf], (50.0,)) == [2.0]
    assert math.isnan(percentiles([], (50.0,))[0])


def test_counts_travel_with_every_aggregate() -> None:
    rows = []
    for case, (missing, prediction, reference) in {"1": (1, 1, 0), "2": (0, 1, 1), "3": (0, 0, 1), "4": (0, 0, 0)}.items():
        marks = {"missing": missing, "empty_prediction": prediction, "empty_reference": reference, "empty_prediction/2": 1.0}
        rows += case_rows(
            case, {"dice": 0.5, "hd": math.inf if prediction else 1.0, "dice/2": 0.0} | {k: float(v) for k, v in marks.items()}
        )
    by_name = {found.metric: found for found in aggregate(rows)}
    assert list(by_name) == ["dice", "hd", "dice/2"]
    for name, counts in (("dice", (2, 2, 1)), ("hd", (2, 2, 1)), ("dice/2", (4, 0, 1))):
        found = by_name[name]
        assert (found.n_empty_prediction, found.n_empty_reference, found.n_missing) == counts
    assert (by_name["hd"].n, by_name["hd"].n_finite, by_name["hd"].n_infinite, by_name["hd"].mean) == (4, 2, 2, math.inf)
    assert by_name["dice"].sd == statistics.stdev([0.5] * 4)


def test_one_arm_at_a_time() -> None:
    rows = case_rows("c", {"dice": 1.0}) + case_rows("c", {"dice": 1.0}, arm="b")
    with pytest.raises(InputError, match="one arm, fold and seed at a time"):
        aggregate(rows)
