"""`ichbench train`: one fold from cohort to scores, resumable as a whole, never overwritten unasked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import nibabel
import numpy as np
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from ichbench.ablation import single
from ichbench.ablation.single import Fold, Wanted, plan_fold, train_fold
from ichbench.cases.files import seal, unseal
from ichbench.cli import app
from ichbench.errors import CaseError, InputError
from ichbench.inference.model import load_model, predict_path
from ichbench.scoring.tables import read_scores
from ichbench.training.checkpoint import places
from ichbench.training.folder import Saving

TINY = conftest.TINY.replace("epochs = 1", "epochs = 2")


class Killed(BaseException):
    """Stands in for kill -9."""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("presets") / "tiny.toml"
    path.write_text(TINY)
    return path


def go(wanted: Wanted, **options: Any) -> Fold:
    saving = Saving(wanted.out / "checkpoints", every_steps=1)
    return train_fold(plan_fold(wanted), **{"saving": saving} | options)


@pytest.fixture(scope="module")
def done(small_phantom: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Wanted, Fold]:
    """A finished fold; copy its folder before changing anything."""
    wanted = Wanted(str(small_phantom), tmp_path_factory.mktemp("single") / "out", preset=str(preset), fold="full")
    return wanted, go(wanted)


def copy(done: tuple[Wanted, Fold], out: Path) -> Wanted:
    shutil.copytree(done[0].out, out)
    return replace(done[0], out=out)


def facts(out: Path) -> dict[str, bytes]:
    """What a finished fold must give again, bit for bit."""
    names = ["final.safetensors", "final.json", "best.safetensors", "best.json", "scores.csv", "plan.json", "model.json"]
    return {name: (out / name).read_bytes() for name in names} | {path.name: path.read_bytes() for path in (out / "predictions").iterdir()}


def test_from_cohort_to_scores(done: tuple[Wanted, Fold], small_phantom: Path, tmp_path: Path) -> None:
    wanted, fold = done
    rows = read_scores(wanted.out / "scores.csv")
    assert tuple(rows) == fold.rows
    tests = sorted(path.name.removesuffix(".nii.gz") for path in (small_phantom / "labelsTs").iterdir())
    assert sorted({row.case for row in rows}) == tests
    assert {(row.arm, row.fold, row.seed) for row in rows} == {("base", "full", "0")}
    # the folder is a model, and predicts what was scored
    image = next((small_phantom / "imagesTs").iterdir())
    (predicted,) = predict_path(load_model(wanted.out), image, tmp_path / "mask.nii.gz")
    name = image.name.replace("_0000", "")
    assert predicted.path.read_bytes() == (wanted.out / "predictions" / name).read_bytes()


def test_it_is_what_a_study_trains(done: tuple[Wanted, Fold], small_phantom: Path, preset: Path, tmp_path: Path) -> None:
    from ichbench.ablation.run import plan_run, run_study
    from ichbench.ablation.settings import settle
    from ichbench.ablation.study import RunDefaults

    study = tmp_path / "study.toml"
    study.write_text('why = "one arm"\nfloor = false\nceilings = false\n')
    given = {"study": str(study), "cohort": str(small_phantom), "out": str(tmp_path / "out"), "preset": str(preset), "device": "cpu"}
    run_study(plan_run(settle(given, RunDefaults(), {}), {}), lambda event: None)
    model = tmp_path / "out/models/base-foldfull-seed0"
    assert (model / "final.safetensors").read_bytes() == (done[0].out / "final.safetensors").read_bytes()
    assert (tmp_path / "out/scores.csv").read_bytes() == (done[0].out / "scores.csv").read_bytes()


@pytest.mark.parametrize("where", ["preparing", "training", "predicting", "scoring"])
def test_killed_anywhere_it_ends_the_same(where: str, done: tuple[Wanted, Fold], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = replace(done[0], out=tmp_path / "out")
    steps = 0

    def tick(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if where == "training" and steps == 3:
            raise Killed

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if where == "preparing":
            patch.setattr("ichbench.prepare.whole.write_prepared", die)
        elif where == "predicting":
            patch.setattr("ichbench.cases.images.write_labels", die)
        elif where == "scoring":
            patch.setattr(single, "write_scores", die)
        with pytest.raises(Killed):
            go(wanted, tick=tick)
    said: list[str] = []
    fold = go(wanted, say=said.append)
    assert facts(wanted.out) == facts(done[0].out)
    assert fold.rows == done[1].rows
    assert any(("going on from" if where == "training" else "finished") in text for text in said) or where == "preparing"


def test_finished_is_left_alone(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    wanted = copy(done, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (wanted.out / "predictions").iterdir()} | {
        wanted.out / name: (wanted.out / name).stat().st_mtime_ns for name in ("final.safetensors", "scores.csv", "log.jsonl")
    }
    assert go(wanted).rows == done[1].rows
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"arm": "unet2d"}, "plan.dims was 3, is 2"),
        ({"arm": "window_swapped"}, 'prepare.window was "off", is {"level_hu": 59'),
    ],
)
def test_another_training_is_refused_by_key(changes: dict[str, Any], said: str, done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    wanted = copy(done, tmp_path / "out")
    with pytest.raises(InputError, match="belongs to another training; nothing was changed") as error:
        go(replace(wanted, **changes))
    assert said in str(error.value)
    assert facts(wanted.out) == facts(done[0].out)


def test_a_folder_of_a_version_that_wrote_auto_down(done: tuple[Wanted, Fold], preset: Path, tmp_path: Path) -> None:
    """What `inference.mirror = "auto"` comes to is what counts, in the folder as in the recipe that is asked for."""
    wanted = copy(done, tmp_path / "out")
    trained = Path(wanted.preset).read_text()
    (tmp_path / "auto.toml").write_text(trained.replace("mirror = false", 'mirror = "auto"') + "[training.augment]\nmirror = false\n")
    found = unseal(wanted.out / "fold.json")
    assert found["inference.mirror"] is False
    for older in ({"inference.mirror": "auto", "training.augment.mirror": True}, {"inference.mirror": "auto"}):
        (wanted.out / "fold.json").write_bytes(seal(found | {"training.augment.mirror": False} | older))
        asked = replace(wanted, preset=str(tmp_path / "auto.toml"))
        if "training.augment.mirror" in older:
            with pytest.raises(InputError, match=r"inference\.mirror was true, is false"):
                plan_fold(asked)
        else:
            plan_fold(asked)


def test_changed_images_are_refused(done: tuple[Wanted, Fold], small_phantom: Path, tmp_path: Path) -> None:
    wanted = copy(done, tmp_path / "out")
    shutil.copytree(small_phantom, tmp_path / "cohort")
    label = next((tmp_path / "cohort/labelsTr").iterdir())
    image = nibabel.load(label)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 1
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), label)
    with pytest.raises(InputError, match=rf"data\.{label.name.removesuffix('.nii.gz')} was "):
        go(replace(wanted, cohort=str(tmp_path / "cohort")))


def test_overwriting_and_extending(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    wanted = copy(done, tmp_path / "out")
    other = go(replace(wanted, seed=1, overwrite=True))
    assert other.training["final_sha256"] != done[1].training["final_sha256"]
    assert {row.seed for row in read_scores(wanted.out / "scores.csv")} == {"1"}
    longer = go(replace(wanted, seed=1, extend_to=3))
    assert longer.training["epochs"] == 3
    assert json.loads((wanted.out / "model.json").read_text())["recipe"]["training"]["epochs"] == 3
    assert longer.rows != other.rows
    with pytest.raises(InputError, match=r"--extend-to 3 leaves it as it is\s+training\.epochs was 3, is 2"):
        go(replace(wanted, seed=1))
    kept = facts(wanted.out)
    with pytest.raises(InputError, match="--overwrite removes the training that --extend-to would give more epochs"):
        go(replace(wanted, seed=1, extend_to=5, overwrite=True))
    assert go(replace(wanted, seed=1, extend_to=3)).rows == longer.rows
    assert facts(wanted.out) == kept


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), CaseError("a broken case"), KeyboardInterrupt()])
def test_overwriting_that_ends_before_it_trains_loses_nothing(
    error: BaseException, done: tuple[Wanted, Fold], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = copy(done, tmp_path / "out")

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setitem(single.STAGES, "prepare", fail)
        with pytest.raises(type(error)):
            go(replace(wanted, seed=1, overwrite=True))
    assert facts(wanted.out) == facts(done[0].out)
    assert go(wanted).rows == done[1].rows


KILLED_WHILE_PREPARING = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from ichbench.ablation import single
single.STAGES["prepare"] = lambda task: os.kill(os.getpid(), signal.SIGKILL)
cohort, out, preset = sys.argv[1:]
wanted = single.Wanted(cohort, Path(out), preset=preset, fold="full", seed=1, overwrite=True)
single.train_fold(single.plan_fold(wanted))
"""


@pytest.mark.parametrize("beside", [False, True])
def test_overwriting_that_is_killed_while_it_prepares_loses_nothing(beside: bool, done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    """kill -9: nobody could bring anything back. The next start does, whichever settings it has, also beside files of the user's."""
    wanted = copy(done, tmp_path / "out")
    if beside:
        (wanted.out / "notes.txt").write_text("mine")
    new = replace(wanted, seed=1)
    command = [sys.executable, "-c", KILLED_WHILE_PREPARING, wanted.cohort, str(wanted.out), wanted.preset]

    def killed() -> None:
        run = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, check=False)
        assert run.returncode == -signal.SIGKILL
        assert not (wanted.out / "scores.csv").exists()

    killed()
    # twice: what lies aside is not taken for rubbish of an earlier attempt
    killed()
    with pytest.raises(InputError, match=r"belongs to another training; nothing was changed(.|\n)*seed was 0, is 1"):
        go(new)
    assert facts(wanted.out) == facts(done[0].out)
    assert go(wanted).rows == done[1].rows
    killed()
    assert go(wanted).rows == done[1].rows
    killed()
    assert {row.seed for row in go(replace(new, overwrite=True)).rows} == {"1"}
    assert {row.seed for row in go(new).rows} == {"1"}
    assert not (wanted.out / ".replaced").exists()


def test_results_aside_of_which_nothing_is_known(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    """Nothing is removed on a guess; an empty folder, left by a death before anything moved, is no matter."""
    wanted = copy(done, tmp_path / "out")
    (wanted.out / ".replaced").mkdir()
    assert go(wanted).rows == done[1].rows
    (wanted.out / ".replaced").mkdir()
    (wanted.out / "scores.csv").rename(wanted.out / ".replaced/scores.csv")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds results of an earlier training, but its replaced\.json is damaged or missing"):
            go(replace(wanted, overwrite=overwrite))
    assert (wanted.out / ".replaced/scores.csv").is_file()


def test_overwriting_what_cannot_be_moved_loses_nothing(done: tuple[Wanted, Fold], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as prepared cases on a disk of their own: half of the results stood aside already."""
    wanted, rename = copy(done, tmp_path / "out"), Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "prepared" and path.parent == wanted.out:
            raise OSError(16, "Device or resource busy", str(path))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="busy"):
            go(replace(wanted, seed=1, overwrite=True))
    assert facts(wanted.out) == facts(done[0].out)
    assert not (wanted.out / ".replaced").exists()
    assert go(wanted).rows == done[1].rows


def test_a_folder_in_which_nothing_was_trained_is_free(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    wanted = replace(done[0], out=tmp_path / "out")
    other = tmp_path / "wide.toml"
    other.write_text('why = "x"\n[network]\nconvs_per_stage = 3\n')
    with pytest.raises(InputError, match="nothing was loaded"):
        go(replace(wanted, arm=str(other), pretrained=done[0].out / "final.safetensors"))
    assert go(wanted).rows == done[1].rows


def test_full_without_test_cases_and_bad_folds(small_phantom: Path, preset: Path, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    shutil.copytree(small_phantom, cohort)
    shutil.rmtree(cohort / "labelsTs")
    wanted = Wanted(str(cohort), tmp_path / "out", preset=str(preset), fold="full")
    fold = go(wanted)
    assert fold.rows == ()
    assert load_model(wanted.out).channel_names == ("CT",)
    for bad in ("cv", "-1", "x"):
        with pytest.raises(InputError, match="is not understood"):
            plan_fold(replace(wanted, fold=bad))
    with pytest.raises(InputError, match="needs no training"):
        plan_fold(replace(wanted, arm="floor_threshold"))


def test_folders_that_are_not_ours(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"is not a training's folder \(it holds thesis.txt\)"):
            go(replace(done[0], out=tmp_path / "thesis", overwrite=overwrite))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/final.safetensors").write_text("a week")
    with pytest.raises(InputError, match=r"holds a training, but no fold\.json"):
        go(replace(done[0], out=tmp_path / "weights"))
    wanted = copy(done, tmp_path / "out")
    (wanted.out / "fold.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        go(wanted)
    wanted = copy(done, tmp_path / "held")
    with FileLock(wanted.out / ".lock"), pytest.raises(InputError, match="another process is training in"):
        go(wanted)


def test_fine_tuning_from_a_model_folder(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    wanted = replace(done[0], out=tmp_path / "tuned", pretrained=done[0].out)
    fold = go(wanted)
    assert json.loads((wanted.out / "final.json").read_text())["about"]["pretrained"] == done[1].training["final_sha256"]
    assert fold.training["final_sha256"] != done[1].training["final_sha256"]
    with pytest.raises(InputError, match="tensors do not fit") as said:
        go(replace(wanted, out=tmp_path / "flat", arm="unet2d"))
    assert "shape (" in str(said.value)


def test_the_command(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    wanted = copy(done, tmp_path / "out")
    common = ["train", wanted.cohort, "--out", str(wanted.out), "--preset", wanted.preset, "--fold", "full", "--device", "cpu"]
    found = CliRunner().invoke(app, common)
    assert found.exit_code == 0, found.output
    assert "it is not trained again" in found.output
    assert "n = 2" in found.output or "| 2 |" in found.output or " 2 " in found.output
    assert (wanted.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("tensorboard", "mlflow"):
        try:
            __import__(name)
        except ImportError:
            refused = CliRunner().invoke(app, [*common, "--log", name])
            assert isinstance(refused.exception, InputError)
            assert f"pip install 'ichbench[{name}]'" in str(refused.exception)
    unknown = CliRunner().invoke(app, [*common, "--log", "wandb"])
    assert "give tensorboard or mlflow" in str(unknown.exception)
    assert places(wanted.out / "checkpoints")


def test_overwrite_that_cannot_begin_leaves_the_finished_fold_whole(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    """Weights that do not fit, and a batch that no team could split, are found before anything is lost."""
    wanted = copy(done, tmp_path / "out")
    before = {path.relative_to(wanted.out): path.read_bytes() for path in wanted.out.rglob("*") if path.is_file()}
    other = tmp_path / "wide.toml"
    other.write_text('why = "x"\n[network]\nconvs_per_stage = 3\n')
    with pytest.raises(InputError, match="nothing was loaded"):
        go(replace(wanted, arm=str(other), pretrained=done[0].out / "final.safetensors", overwrite=True))
    after = {path.relative_to(wanted.out): path.read_bytes() for path in wanted.out.rglob("*") if path.is_file()}
    assert after == before
    assert go(wanted).rows == done[1].rows
    # and one that can begin replaces everything
    again = go(replace(wanted, seed=1, overwrite=True))
    assert facts(wanted.out) != facts(done[0].out)
    assert {row.seed for row in again.rows} == {"1"}
    assert not (wanted.out / ".replaced").exists()


def test_prepared_arrays_that_changed_are_noticed(done: tuple[Wanted, Fold], tmp_path: Path) -> None:
    wanted = copy(done, tmp_path / "out")
    image = next((wanted.out / "prepared/cases").glob("*/image.npy"))
    content = bytearray(image.read_bytes())
    content[-1] ^= 0x80
    image.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"image\.npy has changed since it was written"):
        go(replace(wanted, extend_to=4))
