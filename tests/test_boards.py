"""`ichbench board` as people call it: rankings, holes, groups, published boards, wrong files, the worked example of docs/boards.md.

Rewrite the example's tables in the docs: `python tests/test_boards.py MASILAB_CSV`.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ichbench.cli import app
from ichbench.errors import InputError
from ichbench.scoring.score import Score
from ichbench.scoring.tables import write_scores

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "boards.md"
INSTANCE = ROOT / "leaderboard" / "instance2022"
MASILAB = "masilab_tbi_nih_vu_per_case.csv"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def said(*arguments: object) -> str:
    done = call(*arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def refused(*arguments: object) -> str:
    error = call(*arguments).exception
    assert isinstance(error, InputError), repr(error)
    return str(error)


def study(arms: tuple[str, ...] = ("one", "two", "three"), n: int = 35, seed: int = 1) -> list[Score]:
    rng = np.random.default_rng(seed)
    rows = []
    for place, arm in enumerate(arms):
        for c in range(n):
            values = {
                "dice": 0.9 - 0.2 * place + rng.normal(0, 0.05),
                "hd": 5.0 + 9 * place + rng.random(),
                "rvd": 0.1 + 0.1 * place + rng.random() / 9,
            }
            values |= {
                "nsd": 0.8 - 0.2 * place + rng.normal(0, 0.05),
                "hd95": 3.0,
                "missing": 0.0,
                "empty_prediction": 0.0,
                "empty_reference": 0.0,
            }
            # the shares of the last of many arms would fall below 0
            values |= {name: min(max(values[name], 0.0), 1.0) for name in ("dice", "nsd")}
            rows += [Score(arm, "-", "-", f"c{c:02}", metric, float(value)) for metric, value in values.items()]
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scores(tmp_path / "study" / "scores.csv", study())
    return tmp_path / "study"


def ranking_of(out: Path) -> dict[str, float]:
    return {arm["arm"]: arm["rank"] for arm in json.loads((out / "ranking.json").read_text())["arms"]}


def test_arms_without_a_base_are_ranked(folder: Path, tmp_path: Path) -> None:
    text = said("board", folder, "--out", tmp_path / "out")
    assert "ranking: instance2022 over dice, hd, rvd, nsd; ties: min; 35 cases; 1000 resamples of cases" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["one", "1", "1", "to", "1", "1.000", "1.00", "1", "1", "1", "1", "0", "0"] in lines
    assert "3 of 3 pairs are separable" in text
    assert ranking_of(tmp_path / "out") == {"one": 1, "two": 2, "three": 3}
    names = {"board.csv", "board.md", "ranking.csv", "ranking.md", "ranking.json", "blob.csv", "podium.csv", "pairs.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    blob = (tmp_path / "out/blob.csv").read_text().splitlines()
    assert blob == ["arm,rank,resamples,share", "one,1.0,1000,1.0", "two,2.0,1000,1.0", "three,3.0,1000,1.0"]
    assert len((tmp_path / "out/podium.csv").read_text().splitlines()) == 1 + 4 * 35 * 3


def test_one_case_and_many_arms_say_what_they_cannot(tmp_path: Path) -> None:
    write_scores(tmp_path / "one" / "scores.csv", study(n=1))
    text = said("board", tmp_path / "one")
    assert "One case: every resample is the same, so the ranks' intervals and P(rank 1) say nothing." in text
    assert "nan" not in text.split("ranking:")[1]
    write_scores(tmp_path / "many" / "scores.csv", study(tuple(f"arm{i}" for i in range(51)), n=3))
    text = said("board", tmp_path / "many", "--resamples", "20", "--out", tmp_path / "out")
    assert "Pairs are tested for up to 50 arms" in text
    assert "test-then-rank" not in text
    assert json.loads((tmp_path / "out/ranking.json").read_text())["pairs"] is None
    assert "takes up to 50 arms; there are 51" in refused("board", tmp_path / "many", "--rank", "test-then-rank")


def test_the_same_facts_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    rows = (folder / "scores.csv").read_text().splitlines(keepends=True)
    other = tmp_path / "other" / "scores.csv"
    other.parent.mkdir()
    other.write_bytes(b"\xef\xbb\xbf" + "".join([rows[0], *rows[:0:-1]]).replace(",", ";").replace("\n", "\r\n").encode())
    said("board", folder, "--out", tmp_path / "a")
    said("board", other, "--out", tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_base_turns_the_ranking_off_and_asking_turns_it_on(folder: Path) -> None:
    assert "ranking:" not in said("board", folder, "--base", "two")
    assert "ranking:" not in said("board", folder, "--rank", "none")
    assert "ranking: rank-then-mean" in said("board", folder, "--base", "two", "--rank", "rank-then-mean", "--resamples", "50")
    assert "ranking: mean-then-rank over hd95, dice; ties: dense" in said("board", folder, "--metrics", "hd95,dice", "--ties", "dense")


def test_the_ranking_table_shows_no_mean_of_a_metric(folder: Path) -> None:
    """Means stand in the table above it, with n and interval."""
    shown = said("board", folder).split("ranking:")[1]
    assert not re.search(r"\b0\.[6-9]\d\d\b", shown.split("rank under")[0])


def test_options_that_make_no_sense(folder: Path) -> None:
    for arguments, words in (
        (("--rank", "best"), "there is no ranking scheme 'best'; choose one of instance2022, mean-then-rank"),
        (("--ties", "mean"), "--ties 'mean' is not understood; choose one of min, average, max, dense"),
        (("--missing", "zero"), "--missing 'zero' is not understood"),
        (("--infinite", "refuse"), "--infinite 'refuse' is not understood"),
        (("--metrics", "dise"), "there is no metric 'dise'"),
        (("--metrics", "dice,dice"), "names a metric twice"),
        (("--metrics", "reference_ml"), "no better direction"),
        (("--metrics", "assd"), "no score row has the metric assd"),
        (("--metrics", "dice", "--rank", "instance2022"), "instance2022 ranks by dice, hd, rvd, nsd"),
        (("--where", "site=A"), "--where needs a cases.csv"),
        (("--group", "site"), "--group needs a cases.csv"),
        (("--table", "test"), "--table is for published boards"),
        (("--base", "nobody"), "is not among the arms"),
    ):
        assert words in refused("board", folder, *arguments), arguments


# --- holes ---------------------------------------------------------------------------------------------------------------


def test_a_team_with_missing_cases_is_not_ranked_on_the_rest(tmp_path: Path) -> None:
    """Without its worst cases, three would look better than two."""
    rows = [row for row in study() if not (row.arm == "two" and row.case in ("c03", "c04"))]
    write_scores(tmp_path / "scores.csv", rows)
    assert "not scored on the same cases" in refused("board", tmp_path)
    assert "'two' has no row in dice for 2 of 35 cases (c03, c04)" in refused(
        "board", tmp_path, "--missing", "refuse", "--rank", "instance2022"
    ) + (refused("board", tmp_path, "--rank", "instance2022"))
    text = said("board", tmp_path, "--missing", "worst", "--rank", "instance2022", "--out", tmp_path / "out")
    assert "no table of means: arms 'one' and 'two' were not scored on the same cases" in text
    assert "values that take the last place: two 8" in text
    assert ranking_of(tmp_path / "out") == {"one": 1, "two": 3, "three": 2}
    text = said("board", tmp_path, "--missing", "drop", "--rank", "instance2022")
    assert "* two: ranked on 132 of 140 values; the others were dropped for this arm alone." in text
    assert re.search(r"^two\* ", text, re.MULTILINE)


def test_undefined_values_stop_a_ranking_that_was_asked_for_and_no_board(tmp_path: Path) -> None:
    rows = [row._replace(value=math.nan) if row[0] == "one" and row[3] == "c07" and row[4] == "nsd" else row for row in study()]
    write_scores(tmp_path / "scores.csv", rows)
    text = said("board", tmp_path)
    assert "not ranked: not ranked" not in text
    assert "'one' has nan in nsd for 1 of 35 cases (c07)" in text
    assert "ranking:" not in text
    assert "'one' has nan in nsd" in refused("board", tmp_path, "--rank", "instance2022")
    assert "nsd: 1 of 35 cases are left out for every arm, because a value is missing or undefined: c07" in said(
        "board", tmp_path, "--missing", "drop-case"
    )


def test_infinite_distances_by_every_rule(tmp_path: Path) -> None:
    rows = [row._replace(value=math.inf) if row[0] == "one" and row[3] == "c07" and row[4] == "hd" else row for row in study()]
    write_scores(tmp_path / "scores.csv", rows)
    found = {}
    for rule in ("exact", "worst", "drop", "hd=6"):
        text = said("board", tmp_path, "--rank", "mean-then-rank", "--metrics", "hd", "--infinite", rule, "--out", tmp_path / rule)
        found[rule] = ranking_of(tmp_path / rule)["one"]
    assert found == {"exact": 3, "worst": 3, "drop": 1, "hd=6": 1}
    assert "is better than" in text
    assert "3 (1 inf)" in said("board", tmp_path)


# --- groups and strata ---------------------------------------------------------------------------------------------------


def test_groups_beside_the_scores_are_drawn_whole(folder: Path) -> None:
    lines = "".join(f"c{c:02},p{c // 2},{'AB'[c % 2]}\n" for c in range(35))
    (folder / "cases.csv").write_text("case,group,site\n" + lines)
    assert "1000 resamples of 18 groups" in said("board", folder)
    assert "1000 resamples of 2 groups" in said("board", folder, "--group", "site")
    assert "1000 resamples of cases" in said("board", folder, "--group", "none")
    assert "; 18 cases; " in said("board", folder, "--where", "site=A")
    assert "no scored case has site=C; site is 'A', 'B'" in refused("board", folder, "--where", "site=C")
    assert "lacks age" in refused("board", folder, "--where", "age=3")
    assert "is not understood; give COLUMN=VALUE" in refused("board", folder, "--where", "site")
    (folder / "cases.csv").write_text("case,group,site\nc00,p,A\nc00,q,A\n" + lines)
    assert "line 3: case 'c00' has two values of group, 'p' and 'q'" in refused("board", folder)
    (folder / "cases.csv").write_text("case,group,site\nc01,,A\n")
    assert "1000 resamples of cases" in said("board", folder)
    assert "lacks 34 of the scored cases, such as 'c00'" in refused("board", folder, "--where", "site=A")
    (folder / "cases.csv").write_text("case,site\nc01,A\n")
    assert "1000 resamples of cases" in said("board", folder)


def test_few_groups_are_rough_however_many_cases(folder: Path) -> None:
    def grouped(size: int) -> str:
        (folder / "cases.csv").write_text("case,group\n" + "".join(f"c{c:02},p{c // size}\n" for c in range(35)))
        return said("board", folder)

    assert "5 groups: below 30 all of this is rough." in grouped(7)
    assert "One group: every resample is the same, so the ranks' intervals and P(rank 1) say nothing." in grouped(35)
    assert "all of this is rough" not in grouped(1)


def test_the_tables_of_cases_of_all_folders_count(folder: Path) -> None:
    rows = [row._replace(arm="four") for row in study(("four",))]
    other = folder.parent / "other"
    write_scores(other / "scores.csv", rows)
    (folder / "cases.csv").write_text("case,site\n" + "".join(f"c{c:02},A\n" for c in range(35)))
    (other / "cases.csv").write_text("case,group\n" + "".join(f"c{c:02}, p{c // 5} \n" for c in range(35)))
    for order in ((folder, other), (other, folder)):
        text = said("board", *order)
        assert "1000 resamples of 7 groups" in text
        assert "clusters" in text
    assert "; 35 cases; " in said("board", other, folder, "--where", "site=A")
    (folder / "cases.csv").write_text("case,group\n" + "".join(f"c{c:02},p{c // 5}\n" for c in range(34)) + "c34,q\n")
    error = refused("board", folder, other)
    assert f"{other / 'cases.csv'}, line 36: case 'c34' has two values of group, 'q' and 'p6'" in error
    assert f"the first in {folder / 'cases.csv'}, line 36" in error
    for text in ("", "name,group\n", "name\n"):
        (folder / "cases.csv").write_text(text)
        assert "cases.csv, line 1: there is no column 'case'" in refused("board", folder)
    (folder / "cases.csv").write_text("case,group\n" + "".join(f"c{c:02},  \n" for c in range(35)))
    assert "1000 resamples of cases" in said("board", folder)


def test_arms_beside_a_published_board_have_the_same_clusters(folder: Path) -> None:
    def interval(*arguments: object) -> list[str]:
        out = folder.parent / "out"
        said("board", *arguments, "--out", out)
        lines = [line.split(",") for line in (out / "board.csv").read_text().splitlines()]
        by = lines[0].index("team" if "team" in lines[0] else "arm")
        found = next(line for line in lines[1:] if line[by] == "one" and "dice" in line)
        return [found[lines[0].index("lower")], found[lines[0].index("upper")]]

    cases = interval(INSTANCE, folder)
    (folder / "cases.csv").write_text("case,group\n" + "".join(f"c{c:02},p{c // 9}\n" for c in range(35)))
    assert interval(INSTANCE, folder) == interval(folder) != cases
    assert interval(INSTANCE, folder, "--group", "none") == cases
    assert "--group: published boards" in refused("board", INSTANCE, "--group", "none")


# --- published boards ----------------------------------------------------------------------------------------------------


def test_the_published_board(tmp_path: Path) -> None:
    text = said("board", INSTANCE, "--out", tmp_path)
    assert [line.split()[0] for line in text.splitlines()[5:18]] == [
        "vegetable", "nvauto", "mec-lab", "ibot", "stubmers", "crainet", "superembrace", "scan", "dolphins", "nic-vicorob",
        "2i_mtl", "avich", "visal",
    ]  # fmt: skip
    assert "superembrace is 7th, 5th or 4th" in text
    assert "2 of 70 cases (159, 192) decide the column" in text
    assert "other tables (--table NAME): re-run 1" in text
    assert {path.name for path in tmp_path.iterdir()} == {"board.csv", "board.md", "board.json"}
    assert (INSTANCE / "README.md").read_text(encoding="utf-8").endswith((tmp_path / "board.md").read_text(encoding="utf-8"))
    assert "16" in said("board", INSTANCE, "--table", "validation")
    assert said("board", INSTANCE, "--ties", "max").splitlines()[8].split()[:2] == ["superembrace", "4"]
    assert said("board", INSTANCE / "published.csv").startswith("INSTANCE 2022")


def test_published_boards_are_not_resampled_nor_mended(folder: Path) -> None:
    for arguments, words in (
        (("--resamples", "100"), "--resamples: published boards have means only"),
        (("--missing", "worst", "--where", "a=b"), "--where, --missing: published boards"),
        (("--rank", "rank-then-mean"), "needs the value of every case"),
        (("--table", "final"), "there is no table 'final'"),
        ((INSTANCE,), "one published board at a time"),
        (("--metrics", "hd95"), "no team has a mean of each of hd95"),
    ):
        assert words in refused("board", INSTANCE, *arguments), arguments
    text = said("board", INSTANCE, folder)
    marked = [line for line in text.splitlines() if line.endswith("measured here")]
    assert sorted(line.split()[0] for line in marked) == ["one", "three", "two"]
    assert all("[" in line for line in marked)


# --- files that are wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("one,-,-,c00,hd,5", 'one,-,-,c00,hd,"1,05'), None),
        (lambda text: text + text.splitlines(keepends=True)[1], r"line 842: arm 'one'.*already given in line 2"),
        (lambda text: text.replace("two,-,-,c05,dice,", "two,-,-,c05,DSC,"), r"there is no metric 'DSC' \(column 5, 1 such rows\)"),
        (lambda text: text.replace("two,-,-,c05,dice,", "two,-,-,c05,Dice,"), r"did you mean 'dice'"),
        (lambda text: text.replace("two,-,-,c05,", "two,-,-,C05,"), r"only 'one' has c05; only 'two' has C05"),
        (lambda text: text.replace("value\n", "Value\n"), "the header is"),
        (lambda text: text.splitlines(keepends=True)[0], "no score rows after the header"),
        (lambda text: "", "line 1: the header is ''"),
    ],
)
def test_wrong_files_never_make_a_board(folder: Path, change: object, words: str | None) -> None:
    path = folder / "scores.csv"
    text = path.read_text()
    if words is None:
        line = next(k for k, row in enumerate(text.splitlines(), 1) if row.startswith("one,-,-,c00,hd,"))
        path.write_text(re.sub(r"(one,-,-,c00,hd,)[\d.]+", r'\1"1,014.45"', text))
        words = rf"line {line}: the value is '1,014.45' \(column 6\)"
    else:
        path.write_text(change(text))  # type: ignore[operator]
    assert re.search(words, refused("board", folder))


def test_a_file_twice_is_refused(folder: Path) -> None:
    assert "is given twice" in refused("board", folder, folder / "scores.csv")


# --- the worked example --------------------------------------------------------------------------------------------------


def example(source: Path, work: Path) -> dict[str, str]:
    """Run the docs' own program and commands; the parts that the docs show."""
    program = DOCS.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (work / MASILAB).write_bytes(source.read_bytes())
    subprocess.run([sys.executable, "-c", program], cwd=work, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    command = ("board", work / "masilab", "--rank", "rank-then-mean")
    found = {"ALL": said(*command).split("\nranking: ")[1]}
    for site in ("nih", "vu"):
        found[site.upper()] = said(*command, "--where", f"site={site}").split("\nranking: ")[1].split("\n\nrank under")[0]
    return {name: f"ranking: {text}".strip() for name, text in found.items()}


def test_the_worked_example_of_the_docs(shared_data: Path, tmp_path: Path) -> None:
    shown = [block.strip() for block in re.findall(r"```text\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)]
    assert shown == list(example(shared_data / "rankings" / MASILAB, tmp_path).values())


def test_the_example_ranks_what_the_table_says(shared_data: Path, tmp_path: Path) -> None:
    """The mean rank of Dice and RVD over cases with plain pandas."""
    pd = pytest.importorskip("pandas")

    example(shared_data / "rankings" / MASILAB, tmp_path)
    said("board", tmp_path / "masilab", "--rank", "rank-then-mean", "--out", tmp_path / "out")
    table = pd.read_csv(shared_data / "rankings" / MASILAB)
    truth = table["thresholded volume ground truth(mm)"]
    table["rvd"] = (table["thresholded volume(mm)"] - truth).abs() / truth
    ranks = [
        table.groupby("case")[m].rank(method="min", ascending=up).groupby(table["algorithm"]).mean()
        for m, up in (("dice", False), ("rvd", True))
    ]
    expected = sum(ranks) / 2
    found = {arm["arm"]: arm["mean_of_ranks"] for arm in json.loads((tmp_path / "out/ranking.json").read_text())["arms"]}
    assert found == pytest.approx(expected.to_dict(), rel=1e-9)
    assert json.loads((tmp_path / "out/ranking.json").read_text())["n_groups"] == 62


def rewrite(source: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        blocks = iter(example(source, Path(work)).values())
    text = re.sub(r"```text\n.*?```", lambda _: f"```text\n{next(blocks)}\n```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]))
