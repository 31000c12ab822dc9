"""The commands as a user meets them: messages, exit codes, nothing overwritten, and a quick --help."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ichbench.scoring.tables import read_scores

CLI = [sys.executable, "-P", "-c", "from ichbench.cli import main; main()"]
RUN = [sys.executable, "-P", "-c", "from ichbench.cli import run_ablation_main; run_ablation_main()"]


Here = Callable[..., "subprocess.CompletedProcess[str]"]


def call(*arguments: object, command: list[str] = CLI, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("ICHBENCH_")} | environment
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, env=env)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error message: exit 2, one line, no traceback."""
    assert done.returncode == 2, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = "import sys\nfrom ichbench.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
    program += "print(sorted(set(sys.modules) & {'torch', 'pandas', 'numpy', 'scipy', 'nibabel', 'pydantic'}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_scoring_and_boards_do_without_torch(tmp_path: Path, small_phantom: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom ichbench.cli import app\n"
        f"app(['score', {str(small_phantom / 'labelsTs')!r}, {str(small_phantom / 'labelsTs')!r}, '--out', {str(tmp_path / 's.csv')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {row.value for row in read_scores(tmp_path / "s.csv") if row.metric == "dice"} == {1.0}


def test_score_of_two_files_prints_the_official_numbers(tmp_path: Path) -> None:
    # facts, F: a 4x4x2 box shifted by one voxel in x at 0.45 x 0.45 x 5 mm
    reference, predicted = np.zeros((20, 20, 8), np.uint8), np.zeros((20, 20, 8), np.uint8)
    reference[5:9, 5:9, 2:4] = 1
    predicted[6:10, 5:9, 2:4] = 1
    for name, mask in (("reference", reference), ("predicted", predicted)):
        nibabel.Nifti1Image(mask, np.diag([0.45, 0.45, 5, 1])).to_filename(tmp_path / f"{name}.nii.gz")
    done = call("score", tmp_path / "reference.nii.gz", tmp_path / "predicted.nii.gz", "--out", tmp_path / "scores.csv")
    assert done.returncode == 0, done.stderr
    values = {row.metric: row.value for row in read_scores(tmp_path / "scores.csv")}
    assert values["dice"] == pytest.approx(0.75, abs=1e-6)
    assert values["nsd"] == pytest.approx(0.62777, abs=1e-5)
    assert values["hd"] == pytest.approx(0.45, abs=1e-6)
    assert "0.6278" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cohort", "absent"], "absent"),
        (["nosuchstudy"], "there is no study 'nosuchstudy'"),
        (["--preset", "huge"], "--preset 'huge' is not known"),
        (["--seeds", "x"], "--seeds 'x' is not understood"),
        (["--predictions", "theirs"], "give NAME=DIR"),
        (["--device", "cuda"], "sees no CUDA device"),
    ],
)
def test_bad_arguments_of_run_ablation(tmp_path: Path, arguments: list[str], said: str) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    out = tmp_path / "out"
    assert said in one_line(call(*arguments, "--out", out, command=RUN))
    assert not (out / "study.json").exists()


def spoil(cohort: Path, kind: str) -> None:
    image = sorted((cohort / "imagesTr").iterdir())[0]
    label = sorted((cohort / "labelsTr").iterdir())[0]
    loaded = nibabel.load(image)
    data, affine = np.asanyarray(loaded.dataobj), loaded.affine
    match kind:
        case "image without mask":
            label.unlink()
        case "mask without image":
            image.unlink()
        case "truncated":
            image.write_bytes(image.read_bytes()[:3000])
        case "not NIfTI":
            image.write_bytes(gzip.compress(b"hello" * 200))
        case "2D":
            nibabel.Nifti1Image(data[..., 0], affine).to_filename(image)
        case "4D":
            nibabel.Nifti1Image(np.stack([data, data], -1), affine).to_filename(image)
        case "NaN":
            holed = data.astype(np.float32)
            holed[3, 3, 3] = np.nan
            nibabel.Nifti1Image(holed, affine).to_filename(image)
        case "shape":
            nibabel.Nifti1Image(data[:-1], affine).to_filename(image)
        case "spacing":
            nibabel.Nifti1Image(data, affine @ np.diag([2, 1, 1, 1])).to_filename(image)
        case "undeclared label":
            mask = np.asanyarray(nibabel.load(label).dataobj).copy()
            mask[0, 0, 0] = 7
            nibabel.Nifti1Image(mask, nibabel.load(label).affine).to_filename(label)
        case "empty cohort":
            for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
                shutil.rmtree(cohort / folder)
                (cohort / folder).mkdir()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("image without mask", "phantom_000"),
        ("mask without image", "phantom_000"),
        ("truncated", "phantom_000_0000.nii.gz"),
        ("not NIfTI", "phantom_000_0000.nii.gz"),
        ("2D", "2 dimensions"),
        ("4D", "4 dimensions"),
        ("NaN", "NaN"),
        ("shape", "differ in shape"),
        ("spacing", "differ in spacing"),
        ("undeclared label", "[7]"),
        ("empty cohort", ""),
    ],
)
def test_bad_cohorts_get_one_clear_message(small_phantom: Path, tmp_path: Path, kind: str, said: str) -> None:
    cohort = tmp_path / "cohort"
    shutil.copytree(small_phantom, cohort)
    spoil(cohort, kind)
    before = {path.name: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    message = one_line(call("--cohort", cohort, "--out", tmp_path / "out", command=RUN))
    assert said in message
    assert not (tmp_path / "out" / "study.json").exists()
    assert {path.name: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


def test_dry_run_says_where_each_value_came_from_and_computes_nothing(small_phantom: Path, tmp_path: Path) -> None:
    done = call("--cohort", small_phantom, "--out", tmp_path / "out", "--dry-run", command=RUN, ICHBENCH_SEEDS="0,1,2")
    assert done.returncode == 0, done.stderr
    assert "0,1,2   (ICHBENCH_SEEDS)" in done.stdout
    assert "smoke   (default)" in done.stdout
    assert "86 steps: 7 prepare, 21 train, 29 predict, 29 score" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_in_ones_own_arm_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('why = "a typo"\n[training]\nlosss = "ce"\n')
    (tmp_path / "study.toml").write_text('why = "x"\n[factors]\nloss = ["mine.toml"]\n')
    message = one_line(call(tmp_path / "study.toml", "--out", tmp_path / "out", command=RUN))
    assert "mine.toml: unknown key 'training.losss'; did you mean 'loss'?" in message


def test_phantom_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert str(tmp_path) in one_line(call("phantom", tmp_path, "--cases", 1))
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert "huge" in one_line(call("phantom", tmp_path / "new", "--size", "huge"))


def test_validate_lists_every_problem(small_phantom: Path, tmp_path: Path) -> None:
    assert "0 problems" in call("validate", small_phantom).stdout
    cohort = tmp_path / "cohort"
    shutil.copytree(small_phantom, cohort)
    spoil(cohort, "undeclared label")
    done = call("validate", cohort)
    assert done.returncode == 2
    assert "1 problems" in done.stdout
    assert "[7]" in done.stdout


def test_an_interrupted_study_goes_on(small_phantom: Path, tiny_preset: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text('why = "x"\nceilings = false\n')
    command = [
        *RUN,
        str(tmp_path / "study.toml"),
        "--cohort",
        str(small_phantom),
        "--preset",
        str(tiny_preset),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("steps/prepare-*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "run the same command again" in said
    assert "Traceback" not in said
    finished = {path.parent.name for path in (tmp_path / "out").glob("steps/*/result.json")}
    assert finished
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(finished)} of 6 steps were finished before" in done.stdout
    about = json.loads((tmp_path / "out/run.json").read_text())
    assert about["failed"] == {}


def test_boards_are_rebuilt_byte_for_byte(small_phantom: Path, tmp_path: Path) -> None:
    call("score", small_phantom / "labelsTs", small_phantom / "labelsTs", "--out", tmp_path / "scores.csv")
    for name in ("one", "two"):
        done = call("board", tmp_path / "scores.csv", "--out", tmp_path / name, "--base", "none")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one/board.csv").read_bytes() == (tmp_path / "two/board.csv").read_bytes()


def test_the_installed_wheel_works_in_an_empty_folder(tmp_path: Path, small_phantom: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "run-ablation"
    program = "import ichbench, pathlib; print(pathlib.Path(ichbench.__file__).parent)"
    package = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()
    if not script.exists() or not (Path(package) / "baselines").is_dir():
        pytest.skip("ichbench is not installed as a wheel here; tox installs it so")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ICHBENCH_", "PYTHONPATH"))}
    command = [str(script), "phe", "--dry-run", "--cohort", str(small_phantom)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "window_literal: changes prepare.window" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_predictions_under_other_names_are_refused(small_phantom: Path) -> None:
    message = one_line(call("score", small_phantom / "labelsTs", small_phantom / "labelsTr"))
    assert "holds no prediction for any of the 2 references" in message


def test_labels_are_scored_one_by_one_when_asked(tmp_path: Path) -> None:
    mask = np.zeros((12, 12, 6), np.uint8)
    mask[2:5, 2:9, 2:4], mask[6:9, 2:9, 2:4] = 1, 2
    swapped = np.where(mask == 1, 2, np.where(mask == 2, 1, 0)).astype(np.uint8)
    for name, array in (("reference", mask), ("swapped", swapped)):
        nibabel.Nifti1Image(array, np.diag([0.5, 0.5, 5, 1])).to_filename(tmp_path / f"{name}.nii.gz")
    done = call(
        "score", tmp_path / "reference.nii.gz", tmp_path / "swapped.nii.gz", "--labels", "--protocol", "strict", "--out", tmp_path / "s.csv"
    )
    assert done.returncode == 0, done.stderr
    values = {row.metric: row.value for row in read_scores(tmp_path / "s.csv")}
    assert (values["dice"], values["dice/1"], values["dice/2"]) == (1.0, 0.0, 0.0)


def test_paths_that_cannot_be_written_get_one_message(small_phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("precious")
    labels = small_phantom / "labelsTs"
    one_line(call("score", labels, labels, "--out", tmp_path))
    one_line(call("phantom", tmp_path / "file.txt" / "x", "--cases", 1))
    one_line(call("--cohort", small_phantom, "--out", tmp_path / "file.txt" / "x", command=RUN))
    call("score", labels, labels, "--out", tmp_path / "s.csv")
    one_line(call("board", tmp_path / "s.csv", "--out", tmp_path / "file.txt"))
    assert "is not among the arms labelsTs" in one_line(call("board", tmp_path / "s.csv", "--base", "bsae"))
    assert (tmp_path / "file.txt").read_text() == "precious"


# --- ichbench score ----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """`call` without a new process."""
    from ichbench.cli import main

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["ichbench", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), said.out, said.err)

    return run


def mask_file(path: Path, mask_ijk: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(mask_ijk.astype(np.uint8), np.diag([0.5, 0.5, 5, 1]) if affine is None else affine).to_filename(path)
    return path


def small_masks(folder: Path, n: int) -> tuple[Path, Path]:
    """n references, the last without a prediction, and one prediction too many."""
    rng = np.random.default_rng(n)
    for number in range(n):
        mask_file(folder / "refs" / f"{number:03d}.nii.gz", rng.random((9, 8, 5)) < 0.3)
        mask_file(folder / "theirs" / f"{number + (number == n - 1) * 900:03d}.nii.gz", rng.random((9, 8, 5)) < 0.3)
    return folder / "refs", folder / "theirs"


def test_score_shows_and_writes_everything(here: Here, tmp_path: Path) -> None:
    references, predictions = small_masks(tmp_path, 3)
    out = tmp_path / "out"
    options = [
        "--out",
        out / "scores.csv",
        "--wide",
        out / "wide.csv",
        "--summary",
        out / "summary.json",
        "--metrics-json",
        out / "metrics.json",
    ]
    done = here("score", references, predictions, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert shown["3"] == ["3", "cases"]
    assert shown["dice"][-5:] == ["3", "3", "1", "0", "1"]
    assert shown["hd"][2:4] == ["inf", "(1)"]
    assert "warning: 1 of 3 cases have no prediction and are scored as empty: 002" in done.stdout
    assert "warning: 1 prediction(s) have no reference and are not scored: 902.nii.gz" in done.stdout
    # table, warnings, what was written
    places = [done.stdout.index(words) for words in ("metric", "warning:", "written:")]
    assert places == sorted(places)
    written = done.stdout.split("written:\n")[1].split()
    assert sorted(written) == sorted(str(path) for path in out.iterdir())
    rows = read_scores(out / "scores.csv")
    assert {row.arm for row in rows} == {"theirs"}
    assert {row.case for row in rows if row.metric == "missing" and row.value} == {"002"}
    assert len((out / "wide.csv").read_text().splitlines()) == 4
    assert json.loads((out / "metrics.json").read_text())["aggregates"]["HausdorffDistance"]["mean"] is None
    assert json.loads((out / "summary.json").read_text())["metric_per_case"][2]["prediction_file"] is None
    for name in ("scores.protocol.json", "wide.protocol.json"):
        assert json.loads((out / name).read_text())["protocol"]["metrics"]["hd"]["empty_masks"]["empty_prediction"] == "inf"


def test_score_with_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    references, predictions = small_masks(tmp_path, 21)
    texts = []
    for workers in (1, 2):
        done = call("score", references, predictions, "--workers", workers, "--out", tmp_path / f"{workers}.csv")
        assert done.returncode == 0, done.stderr
        texts.append((tmp_path / f"{workers}.csv").read_bytes())
        assert done.stderr.splitlines()[-1] == "scored 21 of 21 cases"
        assert len(done.stderr.splitlines()) == 10
    assert texts[0] == texts[1]


def test_score_takes_a_data_set_with_regions(here: Here, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 4, (9, 8, 5))
    mask_file(tmp_path / "set" / "labelsTs" / "a.nii.gz", reference)
    mask_file(tmp_path / "p" / "a.nii.gz", np.where(reference == 2, 1, np.where(reference == 3, 0, reference)))
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    options = ["--protocol", "strict", "--out", tmp_path / "s.csv", "--summary", tmp_path / "s.json"]
    done = here("score", tmp_path / "set", tmp_path / "p", *options)
    assert done.returncode == 0, done.stderr
    values = {row.metric: row.value for row in read_scores(tmp_path / "s.csv")}
    assert (values["dice"], values["dice/whole"], values["dice/core"]) == (1.0, 1.0, 0.0)
    assert list(json.loads((tmp_path / "s.json").read_text())["mean"]) == ["(1, 2)", "(2,)"]
    files = [tmp_path / "set" / "labelsTs" / "a.nii.gz", tmp_path / "p" / "a.nii.gz"]
    done = here("score", *files, "--dataset-json", tmp_path / "set" / "dataset.json")
    assert done.returncode == 0, done.stderr
    assert "dice/core" in done.stdout


def test_score_turns_predictions_when_asked(here: Here, tmp_path: Path) -> None:
    mask, affine = np.random.default_rng(0).random((9, 8, 5)) < 0.3, np.diag([0.5, 0.5, 5, 1])
    flipped = affine @ np.diag([-1, 1, 1, 1])
    flipped[0, 3] = 4.0
    reference, prediction = mask_file(tmp_path / "r.nii.gz", mask), mask_file(tmp_path / "p.nii.gz", mask[::-1], flipped)
    message = one_line(here("score", reference, prediction))
    for words in (str(reference), str(prediction), "RAS", "LAS", "--reorient"):
        assert words in message
    done = here("score", reference, prediction, "--reorient", "--protocol", "strict")
    assert done.returncode == 0, done.stderr
    assert {line.split()[-1] for line in done.stdout.splitlines() if line.startswith(("dice", "nsd"))} == {"1.000"}


@pytest.mark.parametrize(
    "kind", ["protocol", "absent", "file and folder", "shape", "damaged", "labels", "output", "twice", "over a mask", "json"]
)
def test_bad_input_of_score_is_one_message_and_nothing_overwritten(here: Here, tmp_path: Path, kind: str) -> None:
    references, predictions = small_masks(tmp_path, 2)
    (tmp_path / "scores.csv").write_text("precious")
    arguments: list[object] = [references, predictions, "--out", tmp_path / "scores.csv"]
    said = {
        "protocol": "there is no protocol 'x'", "absent": "absent does not exist", "file and folder": "give two folders or two files",
        "shape": "case 000: ", "damaged": "case 000: ", "labels": "case 000: ", "output": "file is not a folder", "twice": "written twice",
        "over a mask": "is one of the files to be read", "json": "cannot be read as JSON",
    }  # fmt: skip
    match kind:
        case "protocol":
            arguments += ["--protocol", "x"]
        case "absent":
            arguments[1] = tmp_path / "absent"
        case "file and folder":
            arguments[1] = predictions / "000.nii.gz"
        case "shape":
            mask_file(predictions / "000.nii.gz", np.ones((9, 8, 4)))
        case "damaged":
            (predictions / "000.nii.gz").write_bytes(b"no image")
        case "labels":
            mask_file(predictions / "000.nii.gz", np.full((9, 8, 5), 3))
            (tmp_path / "d.json").write_text('{"labels": {"background": 0, "clot": 1}}')
            arguments += ["--dataset-json", tmp_path / "d.json"]
        case "output":
            (tmp_path / "file").write_text("precious")
            arguments += ["--summary", tmp_path / "file" / "summary.json"]
        case "twice":
            arguments += ["--wide", tmp_path / "refs" / ".." / "scores.csv"]
        case "over a mask":
            arguments += ["--metrics-json", references / "000.nii.gz"]
        case "json":
            (tmp_path / "d.json").write_text("{")
            arguments += ["--dataset-json", tmp_path / "d.json"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = one_line(here("score", *arguments))
    assert said[kind] in message
    if said[kind] == "case 000: ":
        assert all(str(folder / "000.nii.gz") in message for folder in (references, predictions))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_interrupted_score_writes_nothing(tmp_path: Path) -> None:
    program = "import ichbench.scoring.folders as folders\ndef stop(*_):\n    yield from ()\n    raise KeyboardInterrupt\n"
    program += "folders.score_each = stop\nfrom ichbench.cli import main\nmain()"
    done = call("score", *small_masks(tmp_path, 2), "--out", tmp_path / "s.csv", command=[sys.executable, "-P", "-c", program])
    assert (done.returncode, done.stdout, done.stderr.strip()) == (75, "", "interrupted; nothing was written")
    assert not (tmp_path / "s.csv").exists()


def test_score_of_real_masks(here: Here, shared_data: Path, tmp_path: Path) -> None:
    done = here("score", shared_data / "Dataset501_PHE", shared_data / "phe_derived_hematoma", "--metrics-json", tmp_path / "metrics.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "13 cases"
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["ichbench"]["cases"] == {"n": 13, "n_missing": 0, "n_empty_prediction": 1, "n_empty_reference": 0}
    assert found["aggregates"]["HausdorffDistance"]["n_infinite"] == 1


def test_score_looks_outside_the_head_when_given_the_images(here: Here, small_phantom: Path, tmp_path: Path) -> None:
    """Case 0 gets a block in the air, case 1 has no image; images turned round are turned back by --reorient."""
    import nibabel

    references = sorted((small_phantom / "labelsTr").iterdir())[:2]
    images, predictions = tmp_path / "images", tmp_path / "p"
    images.mkdir()
    for number, path in enumerate(references):
        loaded = nibabel.load(path)
        mask = np.asarray(loaded.dataobj).copy()
        mask_file(tmp_path / "r" / path.name, mask, loaded.affine)
        if number == 0:
            mask[3:6, 3:6, 4:7] = 1
        mask_file(predictions / path.name, mask, loaded.affine)
    case = references[0].name.removesuffix(".nii.gz")
    image = nibabel.load(small_phantom / "imagesTr" / f"{case}_0000.nii.gz")
    image.to_filename(images / f"{case}_0000.nii.gz")
    arguments = ("score", tmp_path / "r", predictions, "--out", tmp_path / "s.csv")
    plain = here(*arguments)
    assert plain.returncode == 0, plain.stderr
    rows = (tmp_path / "s.csv").read_bytes()
    assert "outside_head" not in plain.stdout
    done = here(*arguments, "--images", images)
    assert done.returncode == 0, done.stderr
    assert f"outside_head in 1 of 2 cases ({case})" in done.stdout
    assert "warning: 1 of 2 cases have no image, so nothing is said about their head: " + references[1].name[:-7] in done.stdout
    assert (tmp_path / "s.csv").read_bytes() == rows
    assert "one of the files to be read" in one_line(here(*arguments, "--images", images, "--wide", images / f"{case}_0000.nii.gz"))
    other = nibabel.as_closest_canonical(image)
    assert nibabel.aff2axcodes(other.affine) != nibabel.aff2axcodes(image.affine)
    other.to_filename(images / f"{case}_0000.nii.gz")
    assert "turns the image" in one_line(here(*arguments, "--images", images))
    assert f"outside_head in 1 of 2 cases ({case})" in here(*arguments, "--images", images, "--reorient").stdout
    assert "--no-anomalies" in one_line(here(*arguments, "--images", images, "--no-anomalies"))


def test_score_says_more_when_asked(here: Here, tmp_path: Path) -> None:
    """Case 0: one voxel of 0.43 mm off (headers hold float32: slightly more); case 1: no bleed, none found; case 2: none, but a speck."""
    ball = np.zeros((40, 40, 6), dtype=np.uint8)
    ball[10:20, 10:20, 1:5] = 1
    speck = np.zeros_like(ball)
    speck[30, 30, 3] = 1
    pairs = [(ball, np.roll(ball, 1, axis=0)), (0 * ball, 0 * ball), (0 * ball, speck)]
    affine = np.diag([0.43, 0.43, 5.0, 1.0])
    for number, (reference, predicted) in enumerate(pairs):
        mask_file(tmp_path / "r" / f"{number}.nii.gz", reference, affine)
        mask_file(tmp_path / "p" / f"{number}.nii.gz", predicted, affine)
    more = ("--metrics", "dice,nsd@0.44,lesion_f1,lesion_fp@0,volume_bias_ml", "--definitions", "--curve")
    done = here("score", tmp_path / "r", tmp_path / "p", *more, "--out", tmp_path / "s.csv")
    assert done.returncode == 0, done.stderr
    values = {(row.case, row.metric): row.value for row in read_scores(tmp_path / "s.csv")}
    assert values["0", "nsd@0.44"] == 1.0
    assert values["0", "lesion_f1"] == 1.0
    assert values["2", "lesion_fp@0"] == 1.0
    assert {metric for _, metric in values} == {
        *("dice", "nsd@0.44", "lesion_f1", "lesion_fp@0", "volume_bias_ml", "missing", "empty_prediction", "empty_reference")
    }
    assert "nsd@0.44: the definition alone moves the mean by" in done.stdout
    assert "official: the formulas of INSTANCE 2022" in done.stdout
    assert "hd95: " not in done.stdout  # not asked for
    plain = here("score", tmp_path / "r", tmp_path / "p", "--protocol", "kits", "--definitions", "--curve").stdout
    assert "nsd@1.033: the definition alone moves the mean by" in plain
    assert "hd95: the definition alone moves the mean by" in plain
    assert [line.split()[0] for line in plain.splitlines() if line.endswith("protocol kits")] == ["1.033"]
    message = one_line(here("score", tmp_path / "r", tmp_path / "p", "--metrics", "rvd", "--definitions"))
    assert "none of them is among the metrics given" in message
    curve = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.strip().startswith(("0.42 ", "0.45 "))}
    assert float(curve["0.42"]) < float(curve["0.45"])
    assert "guard_blob in 1 of 3 cases (2)" in done.stdout
    quiet = here("score", tmp_path / "r", tmp_path / "p", "--no-anomalies")
    assert "guard_blob" not in quiet.stdout
    # with the volumes among the metrics, the cases are told apart as well
    assert "case detection (any foreground): sensitivity 1.000" in quiet.stdout
    assert "specificity 0.500" in quiet.stdout
    for wrong in ("dice,bogus", "lesion_f1@5", "nsd@x", ""):
        one_line(here("score", tmp_path / "r", tmp_path / "p", "--metrics", wrong))


def test_nnunet_import_and_export(tmp_path: Path) -> None:
    """A model goes out and comes back; what cannot go is one line."""
    from model_folders import small_plan, write_model

    model = write_model(tmp_path / "run/models/base-fold1-seed0", small_plan(channels=("CT", "MR")))
    done = call("nnunet", "export", tmp_path / "run/base", "--out", tmp_path / "results", "--dataset", "Dataset501_PHE")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results/Dataset501_PHE/nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert "fold_1: base-fold1-seed0" in done.stdout
    assert f"nnUNetv2_predict_from_modelfolder -i IMAGES -o MASKS -m {folder} -f 1\n" in done.stdout
    done = call("nnunet", "import", folder, "--out", tmp_path / "model", "--folds", "1")
    assert done.returncode == 0, done.stderr
    assert "nnUNetTrainer, fold 1, mirror axes [0, 1, 2]" in done.stdout
    assert "2 input channels (CT, MR" in done.stdout
    weights = [path.read_bytes() for path in (model / "final.safetensors", tmp_path / "model/fold_1/final.safetensors")]
    assert weights[0] == weights[1]
    assert "no checkpoint_final.pth in fold 4; folds that have it: 1" in one_line(
        call("nnunet", "import", folder, "--out", tmp_path / "other", "--folds", "1,4")
    )
    flagged = write_model(tmp_path / "flagged", small_plan(), overlay={"prepare": {"slice_extension": 2}})
    assert "prepare.slice_extension = 2" in one_line(call("nnunet", "export", flagged, "--out", tmp_path / "results"))


def test_a_hostile_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    import torch
    from model_folders import small_plan, write_results

    folder = write_results(tmp_path / "made", small_plan())

    class Attack:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path / 'created'}",)

    torch.save({"network_weights": {}, "optimizer_state": Attack()}, folder / "fold_0/checkpoint_final.pth")
    said = one_line(call("nnunet", "import", folder, "--out", tmp_path / "model"))
    assert "nothing in it was executed" in said
    assert "posix.system" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
