"""One step of a study: a directory with `step.json` (what to do) that ends with `result.json` (that it is done).

    python -m ichbench.ablation.step DIR...

Files are the truth. An attempt works in `attempts/N/` (log, exit code, output) under a lock; `result.json` names the
attempt that counts and is published last, whole or not at all. A scheduler may start a step twice: the second attempt
finds the lock taken (exit 75) or the result there (exit 0), and only one can publish.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ichbench.ablation.dag import Step
from ichbench.ablation.stages import STAGES, Task
from ichbench.cases.files import read_table, write_atomically
from ichbench.compute import Compute
from ichbench.errors import CaseError, InputError

DONE, FAILED, WRONG_INPUT, AGAIN = 0, 1, 2, 75
#: message of an attempt that a signal ended
INTERRUPTED = "interrupted"


def write_step(root: Path, step: Step, compute: Compute) -> Path:
    """Make the directory of a step under `root`; a finished one is left alone. Returns the directory."""
    folder = root / step.id
    path = folder / "step.json"
    # an unfinished step is written again, since the cohort may have moved
    if not (folder / "result.json").exists():
        table = {"kind": step.kind, "spec": step.spec, "inputs": step.inputs, "where": step.where, "label": step.label}
        write_atomically(path, json.dumps(table | {"compute": asdict(compute)}, indent=1, sort_keys=True).encode())
    return folder


def result_of(folder: Path) -> dict[str, Any] | None:
    """The published result of a step, or None while there is none."""
    try:
        table = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'result.json'} is damaged ({error}); delete the folder {folder.name} and run again") from None
    return table if isinstance(table, dict) else None


def is_finished(folder: Path) -> bool:
    """Is there a result, with every file that it lists, at its size? A result whose files are gone is withdrawn."""
    result = result_of(folder)
    if result is None:
        return False
    output = folder / "attempts" / str(result["attempt"]) / "output"
    for name, about in result["files"].items():
        path = output / name
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            (folder / "result.json").unlink()
            return False
    return True


def output_of(folder: Path) -> Path:
    """The output folder of a finished step."""
    result = result_of(folder)
    if result is None:
        raise InputError(f"step {folder.name} is not finished; run the study again")
    return folder / "attempts" / str(result["attempt"]) / "output"


def run_step(folder: Path) -> int:
    """Run one step unless it is done or another process has it. Returns an exit code (0, 1, 2 or 75)."""
    try:
        with FileLock(folder / "lock", timeout=0):
            return DONE if result_of(folder) is not None else _attempt(folder)
    except Timeout:
        return AGAIN


def _attempt(folder: Path) -> int:
    table = read_table(folder / "step.json", f"delete the folder {folder.name} and run again")
    number = 1 + max((int(path.name) for path in folder.glob("attempts/*") if path.name.isdecimal()), default=0)
    attempt = folder / "attempts" / str(number)
    (attempt / "output").mkdir(parents=True)
    _inherit(folder, attempt)
    began = time.monotonic()
    notes: list[str] = []
    with (attempt / "log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        print(f"{table['label']} (attempt {number})", flush=True)  # noqa: T201
        try:
            inputs = {name: output_of(folder.parent / step_id) for name, step_id in table["inputs"].items()}
            task = Task(table["spec"], table["where"], inputs, attempt / "output", Compute(**table["compute"]), attempt / "kept")
            with _collected_warnings(notes):
                extra = STAGES[table["kind"]](task)
        except (InputError, CaseError) as error:
            code = WRONG_INPUT if isinstance(error, InputError) else FAILED
            message = str(error)
            print(message)  # noqa: T201
        except KeyboardInterrupt:
            code, message = AGAIN, INTERRUPTED
        except Exception as error:  # a defect of ours: the log keeps the traceback, the user gets one line
            code, message = FAILED, f"{type(error).__name__}: {error} (see {attempt / 'log'})"
            traceback.print_exc()
        else:
            code, message = DONE, ""
    seconds = round(time.monotonic() - began, 3)
    write_atomically(attempt / "exit.json", json.dumps({"code": code, "message": message, "seconds": seconds}).encode())
    if code == DONE:
        files = {
            str(path.relative_to(attempt / "output")): {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in sorted((attempt / "output").rglob("*"))
            if path.is_file()
        }
        result = {"attempt": number, "seconds": seconds, "notes": list(dict.fromkeys(notes)), "files": files} | extra
        write_atomically(folder / "result.json", json.dumps(result, indent=1, sort_keys=True).encode())
        for old in (folder / "attempts").iterdir():
            shutil.rmtree(old / "kept", ignore_errors=True)
            if old.name != str(number):
                shutil.rmtree(old / "output", ignore_errors=True)
    return code


def _inherit(folder: Path, attempt: Path) -> None:
    """What the last attempt kept for the next one, taken over by one rename: an attempt that still lives somewhere, on a machine
    that knows nothing of our lock, can no longer add to it or take from it."""
    before = [path for path in folder.glob("attempts/*/kept") if path.parent.name.isdecimal()]
    if before:
        max(before, key=lambda path: int(path.parent.name)).rename(attempt / "kept")
    else:
        (attempt / "kept").mkdir()


def last_message(folder: Path) -> str:
    """Why the last attempt of a step failed, in one line."""
    exits = sorted(folder.glob("attempts/*/exit.json"), key=lambda path: int(path.parent.name))
    if not exits:
        return "the process died without a word (killed, or out of memory?)"
    return str(read_table(exits[-1], "see the log beside it")["message"])


@contextlib.contextmanager
def _collected_warnings(notes: list[str]) -> Iterator[None]:
    """Our own warnings (a window that erased everything, say) are kept for the board; others go to the log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for item in caught:
                if issubclass(item.category, UserWarning) and "ichbench" in (
                    item.category.__module__,
                    item.category.__module__.split(".")[0],
                ):
                    notes.append(f"{item.category.__name__}: {item.message}")
                print(f"warning: {item.category.__name__}: {item.message}")  # noqa: T201


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(folders: list[str]) -> int:
    """Run the steps in the given directories in turn; stops at the first that does not end well."""
    for name in folders:
        folder = Path(name)
        if not (folder / "step.json").is_file():
            sys.stderr.write(f"{folder} holds no step.json; give the directory of a step\n")
            return WRONG_INPUT
        code = run_step(folder)
        if code != DONE:
            sys.stderr.write(f"{folder.name}: {'another process has this step' if code == AGAIN else last_message(folder)}\n")
            return code
    return DONE


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
