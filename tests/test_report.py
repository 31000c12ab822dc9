"""The report: every part on screen, in CSV and Markdown; what a run folder says; the command."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ichbench.board.effects import paired_effects
from ichbench.board.render import board_text, build_board
from ichbench.board.report import COLUMNS, build_report, report_csv, report_markdown, report_text, write_report
from ichbench.board.runs import case_column, clusters_from, read_cases, read_run, report_of_run
from ichbench.board.summary import case_table
from ichbench.board.words import TEXT_WIDTH
from ichbench.cli import app
from ichbench.errors import InputError
from ichbench.scoring.score import Score
from ichbench.scoring.tables import write_scores

CASES = [f"c{i:02d}" for i in range(16)]


def rows(effects: dict[str, float], seeds: tuple[str, ...] = ("0", "1"), spread: float = 0.01) -> list[Score]:
    """Arms that differ from base by a number and a little noise, in Dice and HD."""
    rng = np.random.default_rng(0)
    easy = rng.uniform(0.3, 0.7, len(CASES))
    found = []
    for arm, gain in {"base": 0.0, **effects}.items():
        for seed in seeds:
            for case, level in zip(CASES, easy, strict=True):
                dice = float(np.clip(level + gain + rng.normal(0, spread), 0, 1))
                found += [Score(arm, "full", seed, case, "dice", dice), Score(arm, "full", seed, case, "hd", 100 * (1 - dice))]
    return found


def run_folder(path: Path, effects: dict[str, float], about: dict[str, object] | None = None, **columns: list[str]) -> Path:
    path.mkdir(parents=True)
    write_scores(path / "scores.csv", rows(effects))
    described: dict[str, object] = {"arms": ["base", *effects], "base": "base"}
    (path / "run.json").write_text(json.dumps(described | (about or {})))
    if columns:
        with (path / "cases.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["case", *columns])
            writer.writerows(zip(CASES, *columns.values(), strict=True))
    return path


def add_recipe(path: Path, arm: str, **training: object) -> None:
    (path / "recipes").mkdir(exist_ok=True)
    table = {"recipe": {"inference": {"predictor": "unet"}, "training": training, "plan": {"dims": 3}}}
    (path / "recipes" / f"{arm}.json").write_text(json.dumps(table))


FACTORIAL = {"design": "factorial", "factors": [["window", ["w"]], ["dims", ["d"]]]}
SITES = {"site": ["A", "B"] * 8, "reference_ml": ["5", "5", "50", "50"] * 4, "group": [""] * 16}


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_factorial_run_with_strata_has_every_part(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", {"w": 0.1, "d": -0.1, "w+d": 0.0}, FACTORIAL, **SITES))
    report = report_of_run(run, resamples=300)
    lines = parsed(report_csv(report))
    assert list(lines[0]) == list(COLUMNS)
    parts = {line["part"] for line in lines}
    assert parts == {"arm", "main effect", "interaction", "volume", "site"}
    main = {line["term"]: line for line in lines if line["part"] == "main effect" and line["metric"] == "dice"}
    assert main["w"]["verdict"] == "better"
    assert main["d"]["verdict"] == "worse"
    alone = {effect.arm: effect for effect in paired_effects(case_table(run.rows, ("dice",)), resamples=300)}
    for line in lines:
        if line["part"] == "arm" and line["metric"] == "dice":
            effect = alone[line["term"]]
            assert float(line["difference"]) == effect.difference
            assert float(line["p_adjusted"]) == effect.p_adjusted
            assert line["verdict"] == effect.verdict
            assert line["single_seed"] == "0"
    text = report_text(report)
    for heading in ("dice: arms against base", "dice: between training seeds", "dice: factors", "dice: by volume", "dice: by site"):
        assert heading in text
    assert max(map(len, text.splitlines())) <= TEXT_WIDTH
    assert text.isascii()
    shorter = report_text(report, strata=False, effects=False)
    assert "by site" not in shorter
    assert "arms against" not in shorter
    assert "factors" in shorter
    markdown = report_markdown(report)
    assert "## hd: factors" in markdown
    assert r"| w\*" not in markdown
    assert "| w+d |" in markdown


def test_reports_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", {"w": 0.1}, **SITES))
    first = write_report(report_of_run(run), tmp_path / "a")
    second = write_report(report_of_run(read_run(tmp_path / "run")), tmp_path / "b")
    assert [path.name for path in first] == ["effects.csv", "effects.md"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_every_not_separable_says_what_it_could_have_found() -> None:
    report = build_report(rows({"same": 0.0, "noise": 0.001, "more": 0.2}, spread=0.2), metrics=("dice", "hd"))
    said = [effect for effect in report.effects if effect.verdict == "not separable"]
    assert len(said) >= 2
    assert report_markdown(report).count("not separable (finds ") == len(said)
    assert "finds d: a study of this size" in report_markdown(report)
    lines = [line for line in parsed(report_csv(report)) if line["verdict"] == "not separable"]
    assert all(float(line["detectable"]) > 0 for line in lines)


def test_single_seeds_and_seed_noise_are_marked() -> None:
    once = build_report(rows({"arm": 0.1}, seeds=("0",)), metrics=("dice",))
    assert "arm*" in report_text(once)
    assert "one seed only" in report_text(once)
    twice = build_report(rows({"arm": 0.1}), metrics=("dice",))
    assert "arm*" not in report_text(twice)
    assert "between training seeds" in report_text(twice)
    # two seeds of base that lie 0.2 apart, and an arm that gains 0.05 in every case: cases separate it, seeds do not
    moved = [row._replace(value=row.value + (0.2 if (row.arm, row.seed) == ("base", "1") else 0.15 if row.arm == "arm" else 0)) for row in
             rows({"arm": 0.0}) if row.metric == "dice"]  # fmt: skip
    noisy = build_report(moved, metrics=("dice",))
    assert noisy.effects[0].verdict == "better"
    assert "better~" in report_text(noisy)
    assert "better~" in board_text(build_board(moved, metrics=("dice",)))
    assert "training seeds alone" in report_text(noisy)


def test_learning_curves_come_from_recipes_that_differ_in_nothing_else(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run", {"half": -0.05, "quarter": -0.1, "other": 0.0})
    add_recipe(path, "base", cases="all", epochs=5)
    add_recipe(path, "half", cases=15, epochs=5)
    add_recipe(path, "quarter", cases=8, epochs=5)
    add_recipe(path, "other", cases=8, epochs=6)
    (path / "splits_final.json").write_text(json.dumps([{"train": [str(i) for i in range(30)], "val": []}]))
    run = read_run(path)
    assert run.training_cases == {"base": 30, "half": 15, "quarter": 8}
    report = report_of_run(run, resamples=300)
    curve = report.curves[0]
    assert [count for count, _ in curve.points] == [8, 15, 30]
    assert curve.per_doubling.difference == pytest.approx(0.1 / math.log2(30 / 8), abs=0.01)
    assert "number of training cases" in report_text(report)
    assert any(line["term"] == "per doubling" for line in parsed(report_csv(report)))


def test_a_failed_arm_leaves_the_factors_out_and_nothing_else(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run", {"w": 0.1, "d": -0.1}, FACTORIAL | {"arms": ["base", "w", "d", "w+d"]})
    report = report_of_run(read_run(path), resamples=200)
    assert report.factors == ()
    assert [effect.arm for effect in report.effects if effect.metric == "dice"] == ["w", "d"]


def test_patients_with_several_scans_are_clusters_by_themselves() -> None:
    cases = {"a": {"group": "p1"}, "b": {"group": "p1"}, "c": {"group": ""}, "d": {"group": "p2"}}
    found = clusters_from(cases, ["a", "b", "c", "d"])
    assert found is not None
    assert len(set(found.values())) == 3
    assert clusters_from({"a": {"group": "p1"}, "b": {"group": "p2"}}, ["a", "b"]) is None
    assert clusters_from({}, ["a", "b"]) is None
    assert clusters_from(cases, ["a"], "none") is None
    with pytest.raises(InputError, match="names no group for c"):
        clusters_from(cases, ["a", "c"], "group")
    with pytest.raises(InputError, match="names no site for a, c"):
        clusters_from(cases, ["a", "c"], "site")
    with pytest.raises(InputError, match="'patient' is not known; give one of auto"):
        clusters_from(cases, ["a"], "patient")


def test_clusters_reach_every_part(tmp_path: Path) -> None:
    path = run_folder(
        tmp_path / "run", {"w": 0.1, "d": -0.1, "w+d": 0.0}, FACTORIAL, **SITES | {"group": [f"p{i // 2}" for i in range(16)]}
    )
    report = report_of_run(read_run(path), resamples=200)
    assert report.clustered
    assert {effect.n_units for effect in report.effects} == {8}
    assert {factor.n_units for factor in report.factors} == {8}
    assert "clusters (patients or sites)" in report_text(report)
    assert not report_of_run(read_run(path), cluster="none", resamples=200).clustered


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,site\nc00,A\n", "line 1: there is no column 'case'"),
        ("case,site\nc00,A\nc00,B\n", "line 3: case 'c00' comes twice"),
        ("case,site\nc00,A,more\n", "line 2: 3 columns, but there must be 2"),
        ("case,site\nc00\n", "line 2: 1 columns, but there must be 2"),
        ('case,site\n"c00,A\n', "cannot be read as a table"),
        ("", "there is no column 'case'"),
        ("case,site\n ,A\n", "line 2: the case has no name"),
        ("\x00", "there is no column 'case'"),
    ],
)
def test_damaged_tables_of_cases_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "cases.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_cases(tmp_path / "cases.csv")
    assert read_cases(tmp_path / "no.csv") == {}


def test_tables_of_cases_from_spreadsheets_and_with_blanks(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_bytes("\ufeffcase;group\r\nc00; p1 \r\nc01;  \r\n".encode())
    assert read_cases(tmp_path / "cases.csv") == {"c00": {"case": "c00", "group": "p1"}, "c01": {"case": "c01", "group": ""}}
    assert case_column([tmp_path / "cases.csv"], "group") == {"c00": "p1", "c01": ""}


def test_strata_of_an_incomplete_table_are_an_error_or_a_note(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run", {"w": 0.1}, **SITES)
    lines = (path / "cases.csv").read_text().splitlines(keepends=True)
    (path / "cases.csv").write_text("".join(lines[:-1]))
    found = read_run(path)
    report = report_of_run(found, resamples=200)
    assert report.strata == ()
    assert "no strata: cases.csv has no line for 1 of 16 scored cases: c15." in report_text(report)
    assert "no strata: " in report_markdown(report)
    assert "no strata" not in report_text(report_of_run(found, kinds=(), resamples=200))
    done = CliRunner().invoke(app, ["effects", str(path), "--by", "site", "--resamples", "200"])
    assert isinstance(done.exception, InputError)
    assert "cases.csv has no line for c15; strata need every scored case" in str(done.exception)
    assert CliRunner().invoke(app, ["effects", str(path), "--by", "none", "--resamples", "200"]).exit_code == 0


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "\x00",
        *('{"arms": ' + value + "}" for value in ("null", "5", '"base"', "[1]", "[[]]")),
        *('{"arms": ["base", "w"], "base": ' + value + "}" for value in ("5", '["w"]')),
        *(
            '{"design": "factorial", "factors": ' + value + "}"
            for value in ('{"w": 1}', "3", "null", '[["a", "w"]]', '[["a", ["w"]], ["b", ["w"]]]', '[["a", ["w"]], ["a", ["d"]]]')
        ),
    ],
)
def test_damaged_run_files_are_named(tmp_path: Path, content: str) -> None:
    path = run_folder(tmp_path / "run", {"w": 0.1})
    (path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        read_run(path)


@pytest.mark.parametrize(
    "recipe",
    [
        "[1]",
        '"x"',
        '{"inference": "unet"}',
        '{"inference": {"predictor": "unet"}, "training": 3}',
        *('{"inference": {"predictor": "unet"}, "training": {"cases": ' + value + "}}" for value in ('"many"', "null", "0", "2.5", "[]")),
    ],
)
def test_damaged_recipes_are_named(tmp_path: Path, recipe: str) -> None:
    path = run_folder(tmp_path / "run", {"w": 0.1})
    (path / "recipes").mkdir()
    (path / "recipes" / "w.json").write_text('{"recipe": ' + recipe + "}")
    with pytest.raises(InputError, match=r"w\.json"):
        read_run(path)


def test_an_arm_that_a_run_names_twice_comes_once(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run", {"w": 0.1}, {"arms": ["base", "w", "w", "gone"]})
    assert read_run(path).arms == ("base", "w")


def test_the_command_on_a_run_a_file_and_nonsense(tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str, object]:
        done = CliRunner().invoke(app, ["effects", *arguments, "--resamples", "200"])
        return done.exit_code, done.output, done.exception

    path = str(run_folder(tmp_path / "run", {"w": 0.1, "same": 0.0}, **SITES))
    code, text, _ = call(path, "--out", str(tmp_path / "out"), "--margin", "hd=5", "--margin", "dice=0.02")
    assert code == 0
    assert "equivalent within 0.02" in text
    assert (tmp_path / "out" / "effects.csv").is_file()
    assert call(path, "--by", "none")[1].count("by site") == 0
    assert call(path, "--by", "site")[1].count("by volume") == 0
    code, text, _ = call(str(Path(path) / "scores.csv"), "--base", "w", "--metrics", "hd")
    assert code == 0
    assert "hd: arms against w" in text
    for arguments, message in {
        (path, "--interval", "best"): "give one of outer, t, percentile",
        (path, "--margin", "dice"): "METRIC=VALUE",
        (path, "--margin", "dice=-1"): "METRIC=VALUE",
        (path, "--margin", "dicee=1"): "no metric 'dicee'",
        (path, "--by", "age"): "no such strata: age",
        (path, "--metrics", "dicee"): "no score row has the metric dicee",
        (path, "--base", "nobody"): "no arm 'nobody'",
        (path, "--cluster", "scanner"): "give one of auto",
        (str(Path(path) / "scores.csv"), "--by", "site"): "has no cases.csv",
        (str(tmp_path),): "holds no scores.csv",
    }.items():
        code, _, error = call(*arguments)
        assert isinstance(error, InputError), (arguments, error)
        assert message in str(error)


def test_real_results_by_patient_and_site(shared_data: Path, tmp_path: Path) -> None:
    with (shared_data / "rankings" / "masilab_tbi_nih_vu_per_case.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    write_scores(tmp_path / "scores.csv", [Score(line["algorithm"], "-", "-", line["case"], "dice", float(line["dice"])) for line in table])
    first = {line["case"]: line for line in table if line["algorithm"] == "msl_full"}
    with (tmp_path / "cases.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case", "group", "site", "reference_ml"])
        for case, line in first.items():
            writer.writerow([case, line["patient"], line["site"], float(line["thresholded volume ground truth(mm)"]) / 1000])
    report = report_of_run(read_run(tmp_path), base="msl_full", metrics=("dice",))
    assert report.clustered
    assert {effect.n_pairs for effect in report.effects} == {63}
    assert {effect.n_units for effect in report.effects} == {len({line["patient"] for line in table})}
    verdicts = {effect.arm: effect.verdict for effect in report.effects}
    assert verdicts["vu_ssl"] == "worse"
    assert verdicts["nih_ssl"] == "not separable"
    n_by_site = {one.stratum: one.summary.n for one in report.strata if one.kind == "site"}
    assert n_by_site == {site: sum(line["site"] == site for line in first.values()) for site in ("nih", "vu")}
