"""The local engine: runs a study's steps in child processes, a few at a time, and tells how it goes.

Every step runs in a process of its own, forked from a server that has imported torch once (2 s a step saved); what it does
is exactly `python -m ichbench.ablation.step DIR`. Files are the truth: a step with a `result.json` is not run again.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ichbench.ablation.dag import Dag, Step
from ichbench.ablation.step import AGAIN, DONE, INTERRUPTED, is_finished, last_message, result_of, run_step, write_step
from ichbench.cases.files import read_table
from ichbench.compute import Compute

#: glibc gives large blocks back to the system after every use and takes them again, 10 % of a training step and a third of a
#: prediction on a CPU; these settings keep them
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
#: rough seconds per kind before anything is measured; only the ETA of the first steps depends on it
FIRST_GUESS_S = {"prepare": 5.0, "previous": 5.0, "train": 30.0, "predict": 5.0, "postprocess": 2.0, "score": 2.0}
RETRIES = 1


@dataclass(frozen=True)
class Event:
    """Something to show: a step began, ended or was found finished; or time passed (`tick`)."""

    kind: str
    step: Step | None
    finished: int
    total: int
    seconds: float
    eta_s: float
    running: tuple[str, ...] = ()
    message: str = ""


@dataclass
class Outcome:
    """What is left when the engine stops: failed steps with their reasons, and steps that could not run because of them."""

    failed: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)


def run_dag(dag: Dag, root: Path, compute: Compute, workers: int, show: Callable[[Event], None]) -> Outcome:
    """Run all steps of a DAG under `root`, at most `workers` at once (one at a time for training on a GPU).

    A failed step stops what depends on it and nothing else. Ctrl-C ends the children and is passed on.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(compute.threads)
    for name, value in MALLOC.items():
        os.environ.setdefault(name, value)
    context = _context()
    folders = {step_id: write_step(root, step, compute) for step_id, step in dag.steps.items()}
    done = {step_id for step_id, folder in folders.items() if is_finished(folder)}
    waiting = [step_id for step_id in _most_urgent_first(dag) if step_id not in done]
    clock = _Clock(dag, done)
    outcome, running, tries = Outcome(), dict[Any, str](), dict[str, int]()
    for step_id in sorted(done):
        show(clock.event("found", dag.steps[step_id], ()))
    try:
        while waiting or running:
            for step_id in list(waiting):
                if len(running) >= workers:
                    break
                step = dag.steps[step_id]
                if bad := [name for name in step.inputs.values() if name in outcome.failed or name in outcome.blocked]:
                    waiting.remove(step_id)
                    outcome.blocked.append(step_id)
                    show(clock.event("blocked", step, (), f"needs {bad[0]}"))
                elif all(name in done for name in step.inputs.values()) and not _gpu_taken(step, dag, compute, running):
                    waiting.remove(step_id)
                    process = context.Process(target=_child, args=(str(folders[step_id]),), name=step_id)
                    process.start()
                    running[process] = step_id
                    clock.began(step_id)
                    show(clock.event("began", step, ()))
            ready = wait([process.sentinel for process in running], timeout=0.5)
            shares = {step_id: share for step_id in running.values() if (share := _epochs_done(folders[step_id])) is not None}
            clock.shares = {step_id: done_epochs / epochs for step_id, (done_epochs, epochs) in shares.items()}
            names = tuple(
                dag.steps[step_id].label + (" ({}/{} epochs)".format(*shares[step_id]) if step_id in shares else "")
                for step_id in running.values()
            )
            if not ready:
                show(clock.event("tick", None, names))
            for process in [process for process in running if process.sentinel in ready]:
                process.join()
                step_id = running.pop(process)
                if process.exitcode == DONE and result_of(folders[step_id]) is not None:
                    done.add(step_id)
                    clock.ended(step_id)
                    show(clock.event("ended", dag.steps[step_id], names))
                    continue
                tries[step_id] = tries.get(step_id, 0) + 1
                # a process that was killed says nothing about the step; one with a message would fail again
                interrupted = process.exitcode == AGAIN and last_message(folders[step_id]) == INTERRUPTED
                if ((process.exitcode or 0) < 0 or interrupted) and tries[step_id] <= RETRIES:
                    waiting.insert(0, step_id)
                    why = "interrupted" if interrupted else f"ended by signal {-(process.exitcode or 0)}"
                    show(clock.event("retry", dag.steps[step_id], names, why))
                    continue
                code = process.exitcode if process.exitcode is not None and process.exitcode > 0 else 1
                outcome.codes[step_id] = code
                outcome.failed[step_id] = (
                    "another process is at work on it; wait for it and run again" if code == AGAIN else last_message(folders[step_id])
                )
                show(clock.event("failed", dag.steps[step_id], names, outcome.failed[step_id]))
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join(timeout=10)
    return outcome


def _child(folder: str) -> None:
    """Entry of a child process: ends with its parent, runs one step, exits with its code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(run_step(Path(folder)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # the engine is gone (kill -9, say): its steps must not go on beside those of the next run
        os._exit(AGAIN)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # the server must import the package that runs here, not one that happens to lie in the current folder
    os.environ["PYTHONSAFEPATH"] = "1"
    context.set_forkserver_preload(["ichbench.ablation.preload"])
    return context


def _most_urgent_first(dag: Dag) -> list[str]:
    """Steps in the order in which they are offered: those with the longest work behind them first."""
    behind: dict[str, float] = {}
    for step_id in reversed(list(dag.steps)):
        after = [name for name, step in dag.steps.items() if step_id in step.inputs.values()]
        behind[step_id] = FIRST_GUESS_S[dag.steps[step_id].kind] + max((behind[name] for name in after), default=0.0)
    order = list(dag.steps)
    return sorted(order, key=lambda name: (-behind[name], order.index(name)))


def _gpu_taken(step: Step, dag: Dag, compute: Compute, running: dict[Any, str]) -> bool:
    uses_gpu = compute.kind != "cpu" and step.kind in ("train", "predict")
    return uses_gpu and any(dag.steps[name].kind in ("train", "predict") for name in running.values())


def _epochs_done(folder: Path) -> tuple[int, int] | None:
    """(epochs done, epochs in all) of a training step at work, from its log; None for other steps and at the very start."""
    logs = sorted(folder.glob("attempts/*/output/log.jsonl"), key=lambda path: int(path.parent.parent.name))
    if not logs:
        return None
    with logs[-1].open(encoding="utf-8") as stream:
        done = sum(1 for _ in stream)
    return done, int(read_table(folder / "step.json", f"delete the folder {folder.name} and run again")["spec"]["training"]["epochs"])


class _Clock:
    """Elapsed time and the time still to go, from how long steps of each kind have taken so far."""

    def __init__(self, dag: Dag, done: set[str]) -> None:
        self.dag, self.start = dag, time.monotonic()
        self.left = {name: step.kind for name, step in dag.steps.items() if name not in done}
        self.total = len(dag.steps)
        self.since: dict[str, float] = {}
        self.taken: dict[str, list[float]] = {}
        #: how far running steps are that can tell
        self.shares: dict[str, float] = {}
        self.workers_seen = 1

    def began(self, name: str) -> None:
        self.since[name] = time.monotonic()
        self.workers_seen = max(self.workers_seen, len(self.since))

    def ended(self, name: str) -> None:
        self.taken.setdefault(self.left.pop(name), []).append(time.monotonic() - self.since.pop(name))

    def event(self, kind: str, step: Step | None, running: tuple[str, ...], message: str = "") -> Event:
        if kind in ("failed", "blocked") and step is not None:
            self.left.pop(step.id, None)
            self.since.pop(step.id, None)
        now = time.monotonic()
        foreseen = {name: (now - self.since[name]) / share for name, share in self.shares.items() if share > 0 and name in self.since}
        to_go = 0.0
        for name, what in self.left.items():
            known = [*self.taken.get(what, []), *(seconds for other, seconds in foreseen.items() if self.left.get(other) == what)]
            guess = foreseen.get(name, sum(known) / len(known) if known else FIRST_GUESS_S[what])
            to_go += max(guess - (now - self.since[name]), 0.5) if name in self.since else guess
        return Event(kind, step, self.total - len(self.left), self.total, now - self.start, to_go / self.workers_seen, running, message)
