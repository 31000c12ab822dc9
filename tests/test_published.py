"""Published boards: the INSTANCE 2022 tables equal their workbook, their order is the official one, and nothing passes for measured."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ichbench.board.published import (
    HEADER,
    PublishedTable,
    is_published,
    rank_published,
    ranks_by_rule,
    read_published,
    read_tables,
    with_measured,
    with_published_rule,
)
from ichbench.board.published_render import NO_INTERVAL, published_csv, published_json, published_markdown, published_text, write_published
from ichbench.board.summary import summarise
from ichbench.errors import InputError
from ichbench.scoring.score import Score

FOLDER = Path(__file__).resolve().parent.parent / "leaderboard" / "instance2022"
#: fact sheet A4: official rank, rank with infinite ties averaged, rank with infinite ties worst
OFFICIAL = {
    "vegetable": (1, 1, 1), "nvauto": (2, 2, 2), "mec-lab": (3, 3, 3), "ibot": (4, 4, 5), "stubmers": (5, 6, 6), "crainet": (6, 7, 7),
    "superembrace": (7, 5, 4), "scan": (8, 9, 9), "dolphins": (9, 10, 10), "nic-vicorob": (10, 11, 12), "2i_mtl": (11, 8, 8),
    "avich": (12, 12, 10), "visal": (13, 13, 13),
}  # fmt: skip
RERUN = {"dice": "B", "rvd": "D", "nsd": "F", "hd": "H"}
SHEETS = {"test": (3, {"dice": "B", "rvd": "C", "nsd": "D", "hd": "E"}), "re-run 1": (1, RERUN), "re-run 2": (2, RERUN)}
HEAD = ",".join(HEADER) + "\n"


@pytest.fixture(scope="module")
def tables() -> dict[str, PublishedTable]:
    return {table.name: table for table in read_tables(FOLDER)}


def sheet(path: Path, number: int) -> list[dict[str, str]]:
    """Rows of a worksheet: column letter -> text."""
    name = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(path) as book:
        texts = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))  # noqa: S314
        strings = ["".join(t.text or "" for t in item.iter(f"{name}t")) for item in texts.findall(f"{name}si")]
        rows = []
        for row in ElementTree.fromstring(book.read(f"xl/worksheets/sheet{number}.xml")).iter(f"{name}row"):  # noqa: S314
            cells = {}
            for cell in row.findall(f"{name}c"):
                value = cell.find(f"{name}v")
                if value is not None and value.text is not None:
                    cells[str(cell.get("r"))[0]] = strings[int(value.text)] if cell.get("t") == "s" else value.text
            rows.append(cells)
    return rows


@pytest.mark.parametrize("name", list(SHEETS))
def test_the_tables_are_the_workbooks(tables: dict[str, PublishedTable], shared_data: Path, name: str) -> None:
    number, columns = SHEETS[name]
    rows = sheet(shared_data / "rankings/instance2022/instance_result.xlsx", number)[1:]
    table = tables[name]
    assert len(rows) == len(table.teams) == (13 if name == "test" else 12)
    for row in rows:
        team = row["A"].removesuffix("_instance")
        for metric, column in columns.items():
            assert table.value(team, metric) == float(row[column]), (team, metric)
            if name != "test":
                sd = float(row[chr(ord(column) + 1)])
                assert repr(table.value(team, metric, "sd")) == repr(sd)
        if name == "test":
            assert table.infinite_cases("hd", team) == tuple(sorted(row[c] for c in "GH" if c in row))
            assert math.isinf(table.value(team, "hd")) == bool(table.infinite_cases("hd", team))


def test_the_official_order_and_the_tie_rules(tables: dict[str, PublishedTable]) -> None:
    rules = ranks_by_rule(tables["test"])
    for team, ranks in OFFICIAL.items():
        assert (rules["ties min"][team], rules["ties average"][team], rules["ties max"][team]) == ranks
    official = rank_published(tables["test"])
    assert official.teams == tuple(OFFICIAL)
    assert [official.ranks[team] for team in official.teams] == list(range(1, 14))
    assert not official.unranked


def test_the_places_that_were_published_agree(tables: dict[str, PublishedTable]) -> None:
    found = {team: tables["test"].value(team, "-", "place") for team in tables["test"].teams}
    known = {team: place for team, place in found.items() if not math.isnan(place)}
    assert known == {"vegetable": 1, "nvauto": 2, "crainet": 6, "scan": 8, "nic-vicorob": 10}
    assert all(rank_published(tables["test"]).ranks[team] == place for team, place in known.items())


def test_dice_alone_does_not_give_the_official_order(tables: dict[str, PublishedTable]) -> None:
    assert rank_published(tables["test"], metrics=["dice"]).teams[0] == "nvauto"
    assert rank_published(with_published_rule(tables["test"], "mean-then-rank", None, ["dice"])).ranks["vegetable"] == 2


def test_what_is_printed(tables: dict[str, PublishedTable]) -> None:
    text = published_text([tables["test"]])
    lines = text.splitlines()
    order = [line.split()[:2] for line in lines[5:18]]
    assert order == [[team, str(rank + 1)] for rank, team in enumerate(OFFICIAL)]
    assert all(line.endswith(NO_INTERVAL) for line in lines[5:18])
    assert "hd: 2 of 70 cases (159, 192) decide the column: they make 8 of 13 means infinite, and those tie." in text
    assert "superembrace is 7th, 5th or 4th as ties of infinite means are broken by minimum, average or maximum rank." in text
    assert text.isascii()


def test_every_row_has_its_source_and_the_board_its_superembrace(tables: dict[str, PublishedTable]) -> None:
    rows = read_published(FOLDER / "published.csv")
    assert all(row.source for row in rows)
    assert {name for name, table in tables.items() if "superembrace" in table.teams} == {"test", "validation"}
    assert sum(len(table.rows) for table in tables.values()) == len(rows)
    validation = tables["validation"]
    assert (validation.value("superembrace", "dice"), validation.value("superembrace", "-", "place")) == (0.7112, 16)
    assert validation.value("junqiangchen", "dice", "sd") == 0.31546329
    assert {row.n for row in tables["test"].rows} == {70}
    assert {row.n for row in validation.rows} == {30}
    assert rank_published(validation).teams[:3] == ("Viola ensemble", "viola-Unet-l", "nnU-Net-r")


def test_the_page_beside_the_data_is_what_the_command_writes(tables: dict[str, PublishedTable]) -> None:
    """Rewrite: `ichbench board leaderboard/instance2022 --out OUT` and copy OUT/board.md under the first lines of README.md."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert readme.split("<!-- board -->\n")[1] == published_markdown(list(tables.values()))


def test_files_say_that_nothing_is_known_about_intervals(tables: dict[str, PublishedTable], tmp_path: Path) -> None:
    paths = write_published(list(tables.values()), tmp_path / "new")
    assert [path.name for path in paths] == ["board.csv", "board.md", "board.json"]
    lines = paths[0].read_text().splitlines()
    assert all(NO_INTERVAL in line for line in lines[1:])
    assert len(lines) == 1 + sum(row.statistic == "mean" for table in tables.values() for row in table.rows)
    assert published_json(list(tables.values())).count('"superembrace": 7.0') > 0


# --- arms that were measured here ----------------------------------------------------------------------------------------


def measured(name: str = "mine", nsd: float = 0.9) -> list[Score]:
    values = {"dice": (0.9, 0.8), "hd": (1.0, math.inf), "rvd": (0.1, 0.1), "nsd": (0.9, nsd)}
    return [Score(name, "-", "-", f"c{i}", metric, value) for metric, both in values.items() for i, value in enumerate(both)]


def test_measured_arms_are_marked(tables: dict[str, PublishedTable]) -> None:
    summaries = summarise(measured(), tables["test"].metrics)
    mixed = with_measured(tables["test"], summaries, "measured here: s.csv")
    ours = {(s.arm, s.metric): s for s in summaries}
    text = published_text([mixed], ours)
    (line,) = [line for line in text.splitlines() if line.startswith("mine") and "measured" in line]
    assert "0.850 [" in line
    assert line.endswith("measured here")
    assert "Measured here, not published: mine." in text
    assert "The means are over different numbers of cases (2, 70)" in text
    assert text.count(NO_INTERVAL) == 13 + 1
    rows = published_csv([mixed], ours).splitlines()
    assert sum(",measured," in row for row in rows) == 4
    assert all((",measured," in row) != (NO_INTERVAL in row) for row in rows[1:])
    assert '"kind": "measured"' in published_json([mixed], ours)


def test_measured_arms_that_do_not_fit(tables: dict[str, PublishedTable]) -> None:
    for rows, words in (
        (measured("nvauto"), "called like a published team"),
        (measured(nsd=math.nan), r"undefined in nsd \(1 cases\), and is not ranked on the rest"),
        ([row for row in measured() if row.metric != "hd"], "has no hd, which 'test' ranks by"),
    ):
        with pytest.raises(InputError, match=words):
            with_measured(tables["test"], summarise(rows, [m for m in tables["test"].metrics if any(r.metric == m for r in rows)]), "x")


# --- other people's tables -----------------------------------------------------------------------------------------------


def table_of(tmp_path: Path, text: str, toml: str | None = None) -> list[PublishedTable]:
    (tmp_path / "published.csv").write_text(HEAD + text, encoding="utf-8")
    if toml is not None:
        (tmp_path / "tables.toml").write_text(toml, encoding="utf-8")
    return read_tables(tmp_path)


def test_a_table_without_more_than_rows(tmp_path: Path) -> None:
    (one, two) = table_of(tmp_path, "b,dice,mean,0.5,10,S\na,dice,mean,0.6,10,S\na,hd,mean,inf,10,T\nb,hd,mean,nan,10,T\n")
    assert rank_published(one).ranks == {"a": 1, "b": 2}
    assert is_published(tmp_path)
    assert is_published(tmp_path / "published.csv")
    assert not is_published(tmp_path / "scores.csv")
    found = rank_published(two)
    assert found.ranks == {"a": 1}
    assert found.unranked == {"b": ("hd",)}
    assert "b: not ranked, because no mean of hd is published." in published_text([two])
    assert read_tables(tmp_path / "published.csv")[0].teams == ("b", "a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,dice,mean,0.5,10,S\nb,dice,mean,0.5,10,S\na,dice,mean,0.6,10,S\n", "line 4: dice mean of 'a' was already given in line 2"),
        ("a,Dice,mean,0.5,10,S\n", r"line 2: \(column 2\) there is no metric 'Dice'"),
        ("a,dice,average,0.5,10,S\n", r"line 2: there is no statistic 'average' \(column 3\); choose one of mean, sd"),
        ('a,dice,mean,"1,014.45",10,S\n', r"line 2: the value is '1,014.45' \(column 4\): a comma"),
        ("a,dice,mean,0.5,,S\n", r"line 2: the n is '' \(column 5\)"),
        ("a,dice,mean,0.5,0,S\n", r"line 2: n is 0 \(column 5\)"),
        ("a,dice,mean,0.5,7.5,S\n", r"n is 7.5 \(column 5\)"),
        ("a,dice,mean,0.5,inf,S\n", r"n is inf \(column 5\)"),
        ("a,dice,mean,0.5,nan,S\n", r"n is nan \(column 5\)"),
        ("a,dice,mean,0.5,1e300,S\n", r"n is 1e\+300 \(column 5\)"),
        ("a,dice,mean,0.5,10,\n", r"line 2: a name is empty: source \(column 6\)"),
        ("a,dice,place,1,10,S\n", "a place, and nothing else, has the metric '-'"),
        ("a,-,mean,1,10,S\n", "a place, and nothing else, has the metric '-'"),
        ("a,hd,infinite:,1,10,S\n", "names a case after the colon"),
        ("a,hd,infinite:7,192,10,S\n", "names a case after the colon"),
        ("a,dice,mean,65,10,S\n", r"line 2: the value is 65 \(column 4\): dice is a share and cannot be above 1 \(in percent"),
        ("a,dice,median,inf,10,S\n", r"line 2: the value is inf \(column 4\): dice is a share"),
        ("a,hd,mean,5,10,S\nb,hd,min,-5,10,S\n", r"line 3: the value is -5 \(column 4\): hd cannot be below 0"),
        ("a,hd,mean,-inf,10,S\n", r"line 2: the value is -inf \(column 4\): hd cannot be below 0"),
        ("a,hd,sd,-1,10,S\n", r"line 2: the value is -1 \(column 4\): sd cannot be below 0"),
        ("a,-,place,-2.5,10,S\n", r"line 2: the value is -2.5 \(column 4\): a place is 1 or more"),
        ("", "has no rows"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        table_of(tmp_path, text)


ROWS = "a,dice,mean,0.5,10,S\nb,dice,mean,0.4,10,T\n"


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('[[table]]\nname = "x"\nsources = ["S"]\n', "the source 'T' of published.csv is in 0 tables"),
        (
            '[[table]]\nname = "x"\nsources = ["S", "T"]\n[[table]]\nname = "y"\nsources = ["S"]\n',
            "the source 'S' of published.csv is in 2 tables",
        ),
        ('[[table]]\nname = "x"\nsources = ["S", "T", "U"]\n', "no row has the source 'U'"),
        ('[[table]]\nname = "x"\nsources = ["S", "T"]\nscheme = "rank-then-mean"\n', "scheme is one of instance2022, mean-then-rank"),
        ('[[table]]\nname = "x"\nsources = ["S", "T"]\nmetrics = ["reference_ml"]\n', "no better direction"),
        ('[[table]]\nname = "x"\nsources = ["S", "T"]\nsort = "dice"\n', "not clear: sort"),
        ('[[table]]\nname = 3\nsources = ["S", "T"]\n', "not clear: name"),
        ("table = 1\n", r"at least one \[\[table\]\]"),
        ("[[table\n", "cannot be read"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        table_of(tmp_path, ROWS, toml)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("sources = [1]", "not clear: sources"),
        ('sources = ["S", "T"]\nmetrics = [1]', "not clear: metrics"),
        ('sources = ["S", "T"]\nhighlight = [[]]', "not clear: highlight"),
        ('sources = ["S", "T"]\nties = ["min"]', "not clear: ties"),
        ('sources = ["S", "S", "T"]', "sources names S twice"),
        ('sources = ["S", "T"]\nmetrics = ["dice", "dice"]', "metrics names dice twice"),
        ('sources = ["S", "T"]\nhighlight = ["nobody"]', "highlight names nobody, and no row has such a team"),
        ('sources = ["S", "T"]\nscheme = "instance2022"\nmetrics = ["dice"]', "instance2022 ranks by dice, hd, rvd, nsd; for others"),
        ('sources = ["S"]\n[[table]]\nname = "x"\nsources = ["T"]', "the tables have the name x twice"),
    ],
)
def test_tables_of_wrong_types_and_twice(tmp_path: Path, more: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        table_of(tmp_path, ROWS, f'[[table]]\nname = "x"\n{more}\n')


def test_a_table_by_other_metrics_or_unranked(tables: dict[str, PublishedTable]) -> None:
    table = tables["test"]
    with pytest.raises(InputError, match="instance2022 ranks by dice, hd, rvd, nsd; for others choose another scheme"):
        with_published_rule(table, "instance2022", None, ["dice", "hd"])
    with pytest.raises(InputError, match="--metrics names dice twice"):
        with_published_rule(table, None, None, ["dice", "dice", "hd"])
    fewer = with_published_rule(table, None, None, ["dice", "hd"])
    assert (fewer.scheme, fewer.metrics) == ("mean-then-rank", ("dice", "hd"))
    assert "mean-then-rank: published means, rank in each of dice, hd" in published_text([fewer])
    assert with_published_rule(table, "instance2022", None, ["nsd", "hd", "rvd", "dice"]).scheme == "instance2022"
    shown = with_published_rule(table, "none", None, None)
    text = published_text([shown])
    assert "published means, not ranked" in text
    assert "rank with" not in text
    assert "interval not published" in text
    assert rank_published(shown).ranks == {}
    assert [entry["rank"] for entry in json.loads(published_json([shown]))[0]["ranking"]] == [None] * 13
    assert published_csv([shown]).count("\n") == published_csv([table]).count("\n")
    assert "not ranked" in published_markdown([shown])


def test_two_sources_cannot_say_two_things_in_one_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two values, by two sources, of a dice mean"):
        table_of(tmp_path, "a,dice,mean,0.5,10,S\na,dice,mean,0.4,10,T\n", '[[table]]\nname = "x"\nsources = ["S", "T"]\n')


def test_schemes_that_need_cases_are_refused(tables: dict[str, PublishedTable]) -> None:
    with pytest.raises(InputError, match="rank-then-mean needs the value of every case, and published boards have means only"):
        with_published_rule(tables["test"], "rank-then-mean", None, None)
    assert rank_published(with_published_rule(tables["test"], None, "max", None)).ranks["superembrace"] == 4
