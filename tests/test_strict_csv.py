"""What spreadsheets do to tables: read in one way, or refused with line and column; never another number."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ichbench.board.runs import read_run
from ichbench.errors import InputError
from ichbench.scoring.score import Score
from ichbench.scoring.strict_csv import columns_of, number_of, read_lines
from ichbench.scoring.tables import read_score_files, read_scores

HEAD = "arm,fold,seed,case,metric,value\n"
TWO = [Score("a", "-", "-", "c", "dice", 0.5), Score("a", "-", "-", "c", "hd", math.inf)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_one_table_in_many_dresses(tmp_path: Path, mark: bytes, end: str, separator: str, quote: str) -> None:
    path = tmp_path / "scores.csv"
    lines = [HEAD.strip().split(","), ["a", "-", "-", "c", "dice", "0.5"], ["a", "-", "-", "c", "hd", "inf"]]
    text = end.join(separator.join(f"{quote}{cell}{quote}" for cell in line) for line in lines)
    for last in ("", end):
        path.write_bytes(mark + (text + last).encode())
        assert read_scores(path) == TWO
        assert columns_of(path) == tuple(HEAD.strip().split(","))


@given(st.floats())
def test_numbers_that_python_writes_come_back(value: float) -> None:
    assert repr(number_of(repr(value))) == repr(value)


def test_numbers_that_are_read() -> None:
    texts = {"1014.45": 1014.45, "+3": 3.0, ".5": 0.5, "5.": 5.0, "1E-7": 1e-7, "007": 7.0, "INF": math.inf, "-inf": -math.inf}
    assert {text: number_of(text) for text in texts} == texts
    assert number_of("Infinity") == math.inf


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,014.45", "a comma may separate thousands or decimals"),
        ("1.014,45", "a comma may separate thousands or decimals"),
        ("0,85", "a comma may separate thousands or decimals"),
        ("1,014", "a comma may separate thousands or decimals"),
        ("1'014.45", "a number, inf or nan is needed"),
        ("1 014.45", "a number, inf or nan is needed"),
        ("1.014.45", "a number, inf or nan is needed"),
        ("95%", "a number, inf or nan is needed"),
        ("½", "a number, inf or nan is needed"),
        ("１", "a number, inf or nan is needed"),
        ("∞", "a number, inf or nan is needed"),
        ("0x10", "a number, inf or nan is needed"),
        ("1_0", "a number, inf or nan is needed"),
        ("-nan", "a number, inf or nan is needed"),
        ("1e", "a number, inf or nan is needed"),
        ("1e400", "too large"),
        ("-9e999", "too large"),
        (" 1", "blanks around"),
        ("1\xa0", "blanks around"),
        ("", "undefined is written nan"),
        ("NA", "undefined is written nan"),
        ("#DIV/0!", "undefined is written nan"),
        ("None", "undefined is written nan"),
    ],
)
def test_numbers_that_are_not_guessed(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        number_of(text)
    path = tmp_path / "scores.csv"
    path.write_text(HEAD.replace(",", ";") + f"a;-;-;c;dice;1\na;-;-;c;hd;{text}\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_scores(path)
    assert f"{path}, line 3: the value is {text!r} (column 6)" in str(error.value)
    assert words in str(error.value)


@given(st.text(alphabet="0123456789.,eE+-_ '%infaINFA", max_size=9))
def test_no_text_is_read_as_another_number(text: str) -> None:
    try:
        value = number_of(text)
    except ValueError:
        return
    assert "," not in text
    assert repr(value) == repr(float(text))


def test_every_wrong_cell_is_named_up_to_eight(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEAD + "".join(f'a,-,-,c{i},hd,"1,0{i}"\n' for i in range(11)))
    with pytest.raises(InputError) as error:
        read_scores(path)
    assert str(error.value).count("(column 6)") == 8
    assert "line 9: the value is '1,07'" in str(error.value)
    assert str(error.value).endswith("; and 3 more like it")


def test_a_decimal_comma_in_a_comma_table_is_a_column_too_many(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEAD + "a,-,-,c,dice,0,85\n")
    with pytest.raises(InputError, match=r"line 2: 7 columns, but there must be 6, separated by commas"):
        read_scores(path)


def test_a_quoted_cell_over_two_lines_keeps_the_count(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEAD + '"a\nb",-,-,c,dice,0.5\na,-,-,c,dice,x\n')
    with pytest.raises(InputError, match="line 4: the value is 'x'"):
        read_scores(path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes((HEAD + "é,-,-,c,dice,0.5\n").encode(encoding))
    for read in (read_scores, columns_of):
        with pytest.raises(InputError, match=r"cannot be read as a table in UTF-8"):
            read(path)  # type: ignore[operator]


def test_numbers_given_twice_are_all_listed_across_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text(HEAD + "a,-,-,c,dice,0.5\nb,-,-,c,dice,0.5\na,-,-,c,dice,0.5\n")
    two.write_text(HEAD + "b,-,-,c,dice,0.7\nb,-,1,c,dice,0.7\n")
    with pytest.raises(InputError) as error:
        read_score_files([one, two])
    text = str(error.value)
    assert f"{one}, line 4: arm 'a', fold '-', seed '-', case 'c', metric 'dice' was already given in line 2" in text
    assert f"{two}, line 2: arm 'b', fold '-', seed '-', case 'c', metric 'dice' was already given in {one}, line 3" in text
    assert text.endswith("Keep one row of each number")
    with pytest.raises(InputError, match=r"two\.csv is given twice"):
        read_score_files([two, tmp_path / "." / "two.csv"])


def test_metrics_with_other_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEAD + "a,-,-,c,dice,0.5\na,-,-,c,Dice,0.5\na,-,-,d,Dice,0.5\na,-,-,c, hd,1\na,-,-,c,nsd@x,1\na,-,-,c,zzz,1\n")
    assert len(read_score_files([path])) == 6
    with pytest.raises(InputError) as error:
        read_score_files([path], known_metrics=True)
    text = str(error.value)
    assert "line 3: there is no metric 'Dice' (column 5, 2 such rows); did you mean 'dice'?" in text
    assert "line 5: there is no metric ' hd' (column 5, 1 such rows); did you mean 'hd'?" in text
    assert "line 6: there is no metric 'nsd@x'" in text
    assert "line 7: there is no metric 'zzz' (column 5, 1 such rows). Metrics are dice, nsd," in text
    path.write_text(HEAD + "a,-,-,c,nsd@1.0/2,0.5\n")
    assert len(read_score_files([path], known_metrics=True)) == 1


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("dice", "57", "dice is a share and cannot be above 1 (in percent? divide by 100)"),
        ("dice", "inf", "dice is a share and cannot be above 1"),
        ("nsd@1.0/2", "1.000001", "nsd@1.0/2 is a share and cannot be above 1"),
        ("dice", "-0.5", "dice cannot be below 0"),
        ("hd", "-3", "hd cannot be below 0"),
        ("hd95", "-inf", "hd95 cannot be below 0"),
        ("rvd", "-0.1", "rvd cannot be below 0"),
        ("missing", "2", "missing is a share and cannot be above 1"),
        ("hd", "1.5e308", "hd cannot be that large; infinite is written inf"),
        ("volume_bias_ml", "-1e101", "volume_bias_ml cannot be that large"),
        ("volume_bias_ml", "-inf", "volume_bias_ml cannot be -inf"),
    ],
)
def test_values_that_a_metric_cannot_have_are_refused(tmp_path: Path, metric: str, value: str, words: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEAD + f"a,-,-,b,{metric},0\na,-,-,c,{metric},{value}\n")
    for read in (lambda: read_score_files([path], known_metrics=True), lambda: read_run(path), lambda: read_run(tmp_path)):
        with pytest.raises(InputError) as error:
            read()
        assert f"{path}, line 3: the value is {value!r} (column 6): {words}" in str(error.value)
    assert len(read_scores(path)) == 2


@pytest.mark.parametrize(
    ("metric", "value"), [("dice", "1.0000000005"), ("hd", "inf"), ("rvd_signed", "-0.9"), ("nsd", "nan"), ("rvd", "7"), ("hd", "-0.0")]
)
def test_values_that_a_metric_can_have_are_read(tmp_path: Path, metric: str, value: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEAD + f"a,-,-,c,{metric},{value}\n")
    assert len(read_score_files([path], known_metrics=True)) == len(read_run(path).rows) == 1


def test_effects_knows_the_same_metrics_as_board(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(HEAD + "a,-,-,c,Hausdorff95,0.5\n")
    for source in (path, tmp_path):
        with pytest.raises(InputError, match="line 2: there is no metric 'Hausdorff95'"):
            read_run(source)


def test_wanted_columns_among_others(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("site,case,age\nA,c1,50\nB,c2,60\n")
    assert [line.cells for line in read_lines(path, ("case", "site"), optional=True)] == [("c1", "A"), ("c2", "B")]
    with pytest.raises(InputError, match="line 1: the header is 'site,case,age', and lacks patient"):
        read_lines(path, ("case", "patient"), optional=True)
    path.write_text("case,case\na,b\n")
    with pytest.raises(InputError, match="a column comes twice"):
        read_lines(path, ("case",), optional=True)


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_one_message(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "scores.csv"
    path.write_bytes(HEAD.encode() + content)
    with contextlib.suppress(InputError):
        read_scores(path)
