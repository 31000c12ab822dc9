"""The committed phantom board: it checks out, and one changed line of scorer, phantom or threshold arm makes the check fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from ichbench.ablation import recheck
from ichbench.ablation.recheck import MAX_MASK_BYTES, freeze_board
from ichbench.ablation.study import make_study
from ichbench.board.check import Difference
from ichbench.cli import app
from ichbench.errors import InputError
from ichbench.scoring.score import Score
from ichbench.scoring.tables import read_scores

BOARD = ROOT / "leaderboard" / "phantom"
CHECK = [sys.executable, "-P", "-c", "from ichbench.cli import main; main()", "check", str(BOARD)]

#: file, line as it is, line as a careless change leaves it
MUTATIONS = {
    "surface: tolerance no longer inclusive": ("scoring/surface.py", 'tolerance_mm, side="right"', 'tolerance_mm, side="left"'),
    "overlap: another smoothing": ("scoring/protocol.py", "dice_smooth=1e-5", "dice_smooth=1e-3"),
    "overlap: volume difference relative to the prediction": (
        "scoring/overlap.py",
        "_ratio(counts.predicted - counts.reference, counts.reference)",
        "_ratio(counts.predicted - counts.reference, counts.predicted)",
    ),
    "phantom: a little more noise": ("cases/phantom_render.py", "head.noise_hu * (0.8 ", "head.noise_hu * (0.81 "),
    "threshold arm: lower end raised": ("inference/predictors.py", "case.image_czyx[0] >= low", "case.image_czyx[0] >= low + 1"),
}


def test_the_committed_board_is_complete() -> None:
    rows = read_scores(BOARD / "scores.csv")
    arms = {row.arm for row in rows}
    assert {"base", "window_swapped", "window_literal", "downsample", "slice_extension", "unet2d", "unet25d", "floor_threshold"} <= arms
    means = {arm: sum(values) / len(values) for arm in arms if (values := [r.value for r in rows if r.arm == arm and r.metric == "dice"])}
    # a reference that learnt nothing would check nothing
    assert means["floor_threshold"] < 0.5
    assert means["base"] > means["floor_threshold"] + 0.1
    assert sum(path.stat().st_size for path in (BOARD / "masks").rglob("*.nii.gz")) < MAX_MASK_BYTES


@pytest.mark.slow
def test_check_passes_on_the_committed_board() -> None:
    done = subprocess.run(CHECK, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("check passed: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_check_fails_after_a_one_line_change(name: str, tmp_path: Path) -> None:
    file, old, new = MUTATIONS[name]
    shutil.copytree(ROOT / "ichbench", tmp_path / "ichbench")
    shutil.copytree(ROOT / "baselines", tmp_path / "baselines")
    path = tmp_path / "ichbench" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"{file} no longer holds {old!r}; choose another line to change"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    # the changed copy must be the one that is imported, not the installed one
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(CHECK, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "check FAILED" in done.stdout
    assert "kind" in done.stdout
    assert "Traceback" not in done.stderr


def test_only_a_finished_phantom_run_can_be_frozen(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as JSON"):
        freeze_board(tmp_path, tmp_path / "board")
    (tmp_path / "run.json").write_text('{"cohort": "patients", "failed": {}}')
    with pytest.raises(InputError, match="not a finished run on the embedded phantom"):
        freeze_board(tmp_path, tmp_path / "board")
    assert not (tmp_path / "board").exists()


def test_stale_recipes_are_named_by_key(tmp_path: Path) -> None:
    study = make_study("preprocessing", "smoke")
    shutil.copytree(BOARD / "recipes", tmp_path / "recipes")
    path = tmp_path / "recipes" / "base.json"
    from ichbench.ablation.facts import recipe_json

    for arm in study.arms:
        (tmp_path / "recipes" / f"{arm.name}.json").write_text(recipe_json(arm))
    assert recheck._stale_recipes(tmp_path, study) == ([], len(study.arms))
    table = json.loads(path.read_text())
    was = table["recipe"]["plan"]["base_features"]
    table["recipe"]["plan"]["base_features"] = was + 1
    table["recipe"]["plan"]["colour"] = "red"
    table["recipe"]["inference"]["threshold"]["low_hu"] = 42
    del table["recipe"]["network"]["deep_supervision"]
    table["why"] = "because"
    path.write_text(json.dumps(table))
    (tmp_path / "recipes" / "unet2d.json").unlink()
    found, _ = recheck._stale_recipes(tmp_path, study)
    assert [(one.where, one.text) for one in found] == [
        ("recipes/base", "inference.threshold.low_hu was 42, is fit"),
        ("recipes/base", "network.deep_supervision is new, true"),
        ("recipes/base", f"plan.base_features was {was + 1}, is {was}"),
        ("recipes/base", "plan.colour was red, and is not known any more"),
        ("recipes/base", "its reason changed"),
        ("recipes/unet2d", "only in the study"),
    ]


class FakeCohort:
    """Two test cases and one for training."""

    train_ids, test_ids = ("t",), ("a", "b")

    def metadata(self) -> list[dict[str, str]]:
        return [{"id": name, "split": "test", "group": "", "site": "A"} for name in ("t", "a", "b")]

    def case_digest(self, name: str) -> str:
        return f"digest of {name}"


CASES = "case,split,group,site,reference_ml,digest\na,test,,A,2.5,digest of a\nb,test,,A,2.5,digest of b\n"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("", "", []),
        ("b,test,,A,2.5,digest of b\n", "", [("extra digest", "b"), ("text", "cases.csv:3")]),
        ("b,test,,A,", "b,test,,Z,", [("text", "cases.csv:3")]),
        ("b,test,,A,", "b,test,p1,A,", [("text", "cases.csv:3")]),
        ("b,test,,A,2.5", "b,test,,A,0.5", [("text", "cases.csv:3")]),
        ("digest of b", "digest of c", [("digest", "b"), ("text", "cases.csv:3")]),
        ("b,test", "c,test", [("extra digest", "b"), ("missing digest", "c"), ("text", "cases.csv:3")]),
    ],
)
def test_every_cell_of_the_table_of_cases_is_checked(tmp_path: Path, old: str, new: str, found: list[tuple[str, str]]) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(CASES.replace(old, new))
    rows = [Score("base", "full", "0", case, metric, 2.5) for case in ("a", "b") for metric in ("reference_ml", "hd")]
    differences, compared = recheck._stale_cases(path, FakeCohort(), rows, rows)  # type: ignore[arg-type]
    assert [(one.kind, one.where) for one in differences] == found
    assert compared == 3


@pytest.mark.parametrize("text", ["", "case,site\na,A\n", None])
def test_a_table_of_cases_without_digests_is_bad_input(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "cases.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"cases\.csv"):
        recheck._stale_cases(path, FakeCohort(), [], [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seeds", None), ("seeds", ["0"]), ("seeds", []), ("folds", 1), ("arms", [1]), ("base", "nobody"), ("base", None),
        ("threads", "two"), ("protocol", "nope"), ("rerun_tolerances", None), ("rerun_tolerances", {"dice": "0.1"}),
        ("study", 3), ("preset", []),
    ],
)  # fmt: skip
def test_a_board_of_wrong_types_is_bad_input(tmp_path: Path, key: str, value: object) -> None:
    about = json.loads((BOARD / "board.json").read_text()) | {key: value}
    (tmp_path / "board.json").write_text(json.dumps(about))
    shutil.copyfile(BOARD / "scores.csv", tmp_path / "scores.csv")
    with pytest.raises(InputError, match=rf"board\.json: {key} is "):
        recheck.recheck(tmp_path)


@pytest.mark.parametrize(("differences", "compared", "code"), [((), 7, 0), ((), 0, 1), (("training.loss was dice_ce, is ce",), 7, 1)])
def test_exit_codes_and_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differences: tuple[str, ...], compared: int, code: int
) -> None:
    made = [Difference("text", "recipes/base", "dice_ce", "ce", text) for text in differences]
    monkeypatch.setattr(recheck, "recheck", lambda folder, rerun: (made, compared))
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--junit", str(tmp_path / "new" / "check.xml")])
    assert done.exit_code == code
    assert ("passed" in done.output) == (code == 0)
    assert all(text in done.output for text in differences)
    xml = (tmp_path / "new" / "check.xml").read_text()
    assert xml.count("<testcase") == 4
    assert all(text in xml for text in differences)
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--json"])
    assert (done.exit_code, json.loads(done.output)["passed"]) == (code, code == 0)


def test_a_folder_that_is_no_board_is_bad_input(tmp_path: Path) -> None:
    done = subprocess.run([*CHECK[:-1], str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "board.json" in done.stderr
