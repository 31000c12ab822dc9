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
from ichbench.errors import CaseError, InputError


def work(task: Task) -> dict[str, object]:
    (task.out / "made.txt").write_text(task.spec["text"])
    return {"length": len(task.spec["text"])}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(step_module.STAGES, "score", work)
    return write_step(tmp_path, Step("score", {"text": "hello"}, label="a test"), "cpu", 1)


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
    assert write_step(tmp_path, moved, "cpu", 1) == folder
    assert json.loads((folder / "step.json").read_text())["where"] == {"cohort": "new place"}
    run_step(folder)
    before = (folder / "step.json").read_bytes()
    write_step(tmp_path, Step("score", {"text": "hello"}), "cpu", 1)
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
    folder = write_step(tmp_path, Step("score", {"seconds": "60"}), "cpu", 1)
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
