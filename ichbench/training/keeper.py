"""When a checkpoint is written: now and then, at the end, and when somebody asks the training to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ichbench.training.checkpoint import save_checkpoint
from ichbench.training.folder import Saving
from ichbench.training.schedule import Position

#: at most this share of the time goes into checkpoints
SHARE = 0.01


class Run(Protocol):
    """A training whose state can be taken at any time between two steps."""

    at: Position

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


class Keeper:
    """Decides when a checkpoint is written. It moves no result, only what a killed training has to do again."""

    def __init__(self, folder: Path, saving: Saving, about: dict[str, Any], stop: threading.Event) -> None:
        self.folder, self.saving, self.about, self.stop = folder, saving, about, stop
        self.seen = self.written = time.monotonic()
        self.cost_s, self.steps = 0.0, 0

    def clock(self, at: Position) -> None:
        """Count the time since the last call."""
        now = time.monotonic()
        at.seconds, at.epoch_seconds, self.seen = at.seconds + now - self.seen, at.epoch_seconds + now - self.seen, now

    def after_step(self, run: Run, last: bool = False) -> None:
        """Write a checkpoint if it is time, and end here if a signal came. After the `last` step one is kept for an extension."""
        self.steps += 0 if last or run.at.step == 0 else 1
        pause_s = max(self.saving.every_seconds, self.cost_s / SHARE)
        due = time.monotonic() - self.written >= pause_s if self.saving.every_steps is None else self.steps >= self.saving.every_steps
        if due or (last and self.saving.keep) or self.stop.is_set():
            self.clock(run.at)
            began = time.monotonic()
            tensors, state = run.saved()
            save_checkpoint(self.folder, run.at.epoch, run.at.step, tensors, self.about | state)
            self.steps, self.written = 0, time.monotonic()
            self.cost_s = self.written - began
        if self.stop.is_set() and not last:
            raise KeyboardInterrupt


@contextlib.contextmanager
def signals() -> Iterator[threading.Event]:
    """An event that the first signal to stop sets; the same signal once more ends everything at once."""
    seen: set[int] = set()
    stop, before = threading.Event(), dict[int, Any]()

    def note(number: int, _: object) -> None:
        if number in seen:
            raise KeyboardInterrupt
        seen.add(number)
        stop.set()

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
