"""One step: fenced, resumable, published last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from ichbench.ablation import step as step_module
from ichbench.ablation.dag import Step
from ichbench.ablation.step import (
    AGAIN,
    DONE,
    FAILED,
    WRONG_INPUT,
    Task,
    is_finished,
    last_message,
    main,
    output_of,
    result_of,
    run_step,
    write_step,
)
from ichbench.compute import ONE_CORE
from ichbench.errors import CaseError, InputError


def work(task: Task) -> dict[str, object]:
    (task.out / "made.txt").write_text(task.spec["text"])
    return {"length": len(task.spec["text"])}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(step_module.STAGES, "score", work)
    return write_step(tmp_path, Step("score", {"text": "hello"}, label="a test"), ONE_CORE)


def test_a_step_ends_with_a_result(folder: Path) -> None:
    assert result_of(folder) is None
    with pytest.raises(InputError, match="not finished"):
        output_of(folder)
    assert run_step(folder) == DONE
    result = result_of(folder)
    assert result is not None
    assert (result["attempt"], result["length"], list(result["files"])) == (1, 5, ["made.txt"])
    assert (output_of(folder) / "made.txt").read_text() == "hello"


def test_a_finished_step_is_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_step(folder) == DONE

    def never(task: Task) -> dict[str, object]:
        raise RuntimeError("ran again")

    monkeypatch.setitem(step_module.STAGES, "score", never)
    assert run_step(folder) == DONE
    assert len(list(folder.glob("attempts/*"))) == 1


def test_only_one_attempt_at_a_time(folder: Path) -> None:
    with FileLock(folder / "lock"):
        assert run_step(folder) == AGAIN
    assert not list(folder.glob("attempts/*"))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("the mask is upside down"), WRONG_INPUT, "the mask is upside down"),
        (CaseError("case 7 has no brain"), FAILED, "case 7 has no brain"),
        (ZeroDivisionError("division by zero"), FAILED, "ZeroDivisionError: division by zero (see "),
    ],
)
def test_a_failure_leaves_a_message_and_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    def fail(task: Task) -> dict[str, object]:
        (task.out / "half.txt").write_text("half")
        raise error

    monkeypatch.setitem(step_module.STAGES, "score", fail)
    assert run_step(folder) == code
    assert result_of(folder) is None
    assert last_message(folder).startswith(said)
    assert ("Traceback" in (folder / "attempts/1/log").read_text()) == isinstance(error, ZeroDivisionError)
    monkeypatch.setitem(step_module.STAGES, "score", work)
    assert run_step(folder) == DONE
    assert output_of(folder) == folder / "attempts/2/output"
    assert not (folder / "attempts/1/output").exists()


def test_our_warnings_become_notes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from ichbench.prepare.window import ConstantImageWarning

    def warn(task: Task) -> dict[str, object]:
        warnings.warn("case 3 is constant", ConstantImageWarning, stacklevel=1)
        warnings.warn("somebody else's business", UserWarning, stacklevel=1)
        return {}

    monkeypatch.setitem(step_module.STAGES, "score", warn)
    assert run_step(folder) == DONE
    assert (result_of(folder) or {})["notes"] == ["ConstantImageWarning: case 3 is constant"]


def test_an_unfinished_step_learns_that_the_cohort_moved(tmp_path: Path, folder: Path) -> None:
    moved = Step("score", {"text": "hello"}, where={"cohort": "new place"})
    assert write_step(tmp_path, moved, ONE_CORE) == folder
    assert json.loads((folder / "step.json").read_text())["where"] == {"cohort": "new place"}
    run_step(folder)
    before = (folder / "step.json").read_bytes()
    write_step(tmp_path, Step("score", {"text": "hello"}), ONE_CORE)
    assert (folder / "step.json").read_bytes() == before


def test_a_damaged_result_is_named(folder: Path) -> None:
    (folder / "result.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        result_of(folder)


@pytest.mark.parametrize("spoil", ["gone", "cut"])
def test_a_result_whose_files_are_gone_is_withdrawn(folder: Path, spoil: str) -> None:
    run_step(folder)
    assert is_finished(folder)
    made = output_of(folder) / "made.txt"
    if spoil == "gone":
        made.unlink()
    else:
        made.write_text("hel")
    assert not is_finished(folder)
    assert run_step(folder) == DONE
    assert (output_of(folder) / "made.txt").read_text() == "hello"


def test_main_refuses_a_folder_that_is_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == WRONG_INPUT
    assert "holds no step.json" in capsys.readouterr().err


def test_kill_9_leaves_no_result_and_the_next_attempt_succeeds(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom ichbench.ablation import step\n"
        "def work(task):\n    (task.out / 'half.txt').write_text('half')\n    time.sleep(float(task.spec['seconds']))\n    return {}\n"
        "step.STAGES['score'] = work\nsys.exit(step.main(sys.argv[1:]))\n"
    )
    folder = write_step(tmp_path, Step("score", {"seconds": "60"}), ONE_CORE)
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)])
    deadline = time.monotonic() + 30
    while not (folder / "attempts/1/output/half.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert result_of(folder) is None
    table = json.loads((folder / "step.json").read_text())
    table["spec"]["seconds"] = "0"
    (folder / "step.json").write_text(json.dumps(table))
    done = subprocess.run([sys.executable, "-c", program, str(folder)], env=os.environ, check=False)
    assert done.returncode == DONE
    assert (result_of(folder) or {})["attempt"] == 2


class Killed(BaseException):
    """Stands in for kill -9 inside a stage: no exit.json, no result."""


THREE_EPOCHS = (
    "[plan]\nbase_features = 4\nmax_features = 8\nmemory_gb = 0.01\n"
    "[training]\nepochs = 3\niterations_per_epoch = 2\nvalidation_iterations = 1\n"
)


def training_step(cohort: Path, root: Path, preset: Path) -> Path:
    """The folder of a training step whose preparation is done."""
    from ichbench.ablation.dag import make_dag
    from ichbench.ablation.study import make_study
    from ichbench.cases.cohort import read_cohort

    preset.write_text(THREE_EPOCHS)
    study = preset.with_name("study.toml")
    study.write_text('why = "one arm"\nfloor = false\nceilings = false\n')
    dag = make_dag(make_study(str(study), str(preset)), read_cohort(cohort), (0,), ("full",), ONE_CORE, "instance2022")
    folders = {step.kind: write_step(root, step, ONE_CORE) for step in dag.steps.values()}
    assert run_step(folders["prepare"]) == DONE
    return folders["train"]


def test_a_killed_training_step_goes_on_in_the_next_attempt(small_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from ichbench.training import folder as training_folder
    from ichbench.training import trainer
    from ichbench.training.checkpoint import places, save_checkpoint

    monkeypatch.setattr(training_folder, "Saving", partial(training_folder.Saving, every_steps=1))
    whole, broken = (training_step(small_phantom, tmp_path / name, tmp_path / "preset.toml") for name in ("whole", "broken"))
    assert run_step(whole) == DONE
    made, drawn = trainer.make_batch, list[int]()

    def dies_at(last: int) -> None:
        def batch(cases: object, sampling: object, stream: int, step: int, *where: object) -> object:
            if stream == trainer.TRAIN_STREAM:
                drawn.append(step)
                if step == last:
                    raise Killed
            return made(cases, sampling, stream, step, *where)  # type: ignore[arg-type]

        monkeypatch.setattr(trainer, "make_batch", batch)

    for attempt, last in enumerate((3, 4), start=1):
        dies_at(last)
        with pytest.raises(Killed):
            run_step(broken)
        assert len(places(broken / f"attempts/{attempt}/kept")) == 2
        assert not (broken / "attempts/1/kept").exists() or attempt == 1
    # an attempt that lives on somewhere cannot add to what the others went on from
    with pytest.raises(InputError, match="could not be written"):
        save_checkpoint(broken / "attempts/1/kept", 9, 9, {}, {})
    dies_at(-1)
    drawn.clear()
    assert run_step(broken) == DONE
    assert drawn == [4, 5]
    assert "going on from the checkpoint 000001-000002" in (broken / "attempts/3/log").read_text()
    one, two = result_of(whole), result_of(broken)
    assert one is not None
    assert two is not None
    assert one["training"] == two["training"]
    assert {name: one["files"][name] for name in ("final.safetensors", "best.safetensors")} == {
        name: two["files"][name] for name in ("final.safetensors", "best.safetensors")
    }
    assert sorted(two["files"]) == ["best.json", "best.safetensors", "final.json", "final.safetensors", "log.jsonl", "training.json"]
    assert not list(broken.glob("attempts/*/kept"))


def test_an_interrupted_training_step_keeps_its_state(small_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ichbench.training import trainer
    from ichbench.training.checkpoint import places

    folder = training_step(small_phantom, tmp_path / "steps", tmp_path / "preset.toml")
    made = trainer.make_batch

    def interrupted(cases: object, sampling: object, stream: int, step: int, *where: object) -> object:
        if stream == trainer.TRAIN_STREAM and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(cases, sampling, stream, step, *where)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_batch", interrupted)
        assert run_step(folder) == AGAIN
    assert last_message(folder) == "interrupted"
    assert [place.name for place in places(folder / "attempts/1/kept")] == ["000001-000002"]
    assert run_step(folder) == DONE
    assert "going on from" in (folder / "attempts/2/log").read_text()
