"""Shows how a study goes: a bar with an ETA on a terminal, one line per finished step elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from ichbench.ablation.dag import Dag
from ichbench.ablation.engine import Event

#: Without a terminal, a sign of life this often when no step ends.
QUIET_S = 60.0


class Progress:
    """`show` takes the engine's events. Use as a context manager."""

    def __init__(self, dag: Dag) -> None:
        self.total = len(dag.steps)
        self.found = 0
        self.last_line_s = 0.0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = [MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.fields[eta]}")]
            self.bar = Bar(*columns, TextColumn("{task.description}"), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.total, eta="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if kind is None and self.found:
            self._line(f"all {self.found} steps were finished before")

    def show(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "found":
            self.found += 1
            return
        if self.found:
            self._line(f"{self.found} of {self.total} steps were finished before; going on from there")
            self.found = 0
        if self.bar is not None:
            self.bar.update(self.task, completed=event.finished, eta=f"about {_time(event.eta_s)} to go")
            if event.running:
                self.bar.update(self.task, description="; ".join(event.running))
        name = event.step.label if event.step is not None else ""
        head = f"[{event.finished:{len(str(self.total))}}/{self.total}] {_time(event.seconds):>7}"
        if event.kind == "ended" and self.bar is None:
            self._line(f"{head}  {name}; about {_time(event.eta_s)} to go", event.seconds)
        elif event.kind in ("failed", "blocked", "retry"):
            self._line(f"{head}  {event.kind}: {name}: {event.message}", event.seconds)
        elif event.kind == "tick" and self.bar is None and event.seconds - self.last_line_s > QUIET_S:
            self._line(f"{head}  at work: {'; '.join(event.running)}; about {_time(event.eta_s)} to go", event.seconds)

    def _line(self, text: str, seconds: float = 0.0) -> None:
        self.last_line_s = max(self.last_line_s, seconds)
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def _time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s" if whole < 6000 else f"{whole / 3600:.1f} h"
