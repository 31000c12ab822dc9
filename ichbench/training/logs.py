"""How a training is watched. `log.jsonl` is the truth, one line per epoch; the rest is drawn from the same lines.

A *sink* is a function that takes an epoch's line: the live line on the terminal, TensorBoard, MLflow, or your own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ichbench.augmentation.patches import TrainingWarning
from ichbench.cases.files import write_atomically
from ichbench.errors import InputError

Sink = Callable[[dict[str, Any]], None]
#: (epoch, step of it that was just done, steps of an epoch, loss) during an epoch
Tick = Callable[[int, int, int, float], None]

#: fields of a line that are measured, not computed: they differ from run to run
MEASURED = ("seconds", "steps_per_second", "patches_per_second", "data_wait_share", "peak_rss_mb", "peak_cuda_mb", "eta_seconds")
#: without a terminal, a line this often
QUIET_S = 10.0
#: the curves are drawn anew at most this often
REDRAW_S = 60.0


@dataclass
class LogFile:
    """`log.jsonl`, open for the next epochs."""

    path: Path
    stream: TextIO

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; it is on disk for other readers at once, and for good with the next checkpoint."""
        self.stream.write(json.dumps(line, allow_nan=False) + "\n")
        self.stream.flush()


@contextlib.contextmanager
def open_log(path: Path, lines: Iterable[dict[str, Any]]) -> Iterator[LogFile]:
    """The log with exactly `lines` in it: what came after the checkpoint, or was torn, goes; what was lost comes back."""
    wanted = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    if not path.exists() or path.read_bytes() != wanted:
        write_atomically(path, wanted)
    with path.open("a", encoding="utf-8", newline="\n") as stream:
        yield LogFile(path, stream)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a torn last one is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return lines


def epoch_line(
    about: dict[str, Any], seconds: float, waited: float, train_seconds: float, steps: int, batch_size: int, eta_s: float, device: str
) -> dict[str, Any]:
    """A line of the log: what was computed, then what was measured.

    train_seconds  of the training steps alone (`seconds` has validation in it); `waited`: of those, for batches
    """
    train_seconds = max(train_seconds, 1e-9)
    return about | {
        "seconds": round(seconds, 3),
        "steps_per_second": round(steps / train_seconds, 3),
        "patches_per_second": round(steps * batch_size / train_seconds, 3),
        "data_wait_share": round(min(waited / train_seconds, 1.0), 4),
        "peak_rss_mb": peak_rss_mb(),
        "peak_cuda_mb": peak_cuda_mb(device),
        "eta_seconds": round(eta_s, 1),
    }


def peak_rss_mb() -> float | None:
    """The most main memory that this process has held, MB; None where the system does not say."""
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def peak_cuda_mb(device: str) -> float | None:
    """The most GPU memory that tensors have held, MB; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)


def line_text(line: dict[str, Any]) -> str:
    """An epoch in one line for people."""
    parts = [f"epoch {line['epoch'] + 1}/{line['epochs']}", f"loss {line['train_loss']:.3f}"]
    if line["val_loss"] is not None:
        parts.append(f"validation {line['val_loss']:.3f}")
    if line["pseudo_dice"]:
        parts.append("Dice " + " ".join("-" if value is None else f"{value:.3f}" for value in line["pseudo_dice"]))
    parts += [f"lr {line['learning_rate']:.2g}", f"{line['patches_per_second']:.3g} patches/s"]
    memory = line["peak_cuda_mb"] or line["peak_rss_mb"]
    parts.append(f"data wait {line['data_wait_share']:.0%}" + ("" if memory is None else f", {memory / 1024:.1f} GB"))
    return ", ".join(parts) + f"; {duration(line['eta_seconds'])} to go"


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2.5 h`, `12 days`."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (360_000, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{int(name == 'h')}f} {name}"
    return f"{seconds / 86400:,.0f} days"


@contextlib.contextmanager
def live(out: TextIO) -> Iterator[tuple[Sink, Tick]]:
    """Show a training: a line that moves on a terminal, else one line per epoch, at most one in ten seconds."""
    if not out.isatty():
        yield _lines(out), lambda epoch, step, steps, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"), console=Console(file=out), transient=True
    )
    last = [""]
    with bar:
        task = bar.add_task("starting", total=None)

        def tick(epoch: int, step: int, steps: int, loss: float) -> None:
            bar.update(task, total=steps, completed=step, description=f"epoch {epoch + 1}, step {step}/{steps}, loss {loss:.3f}  {last[0]}")

        def show(line: dict[str, Any]) -> None:
            last[0] = f"({duration(line['eta_seconds'])} to go)"
            bar.console.print(line_text(line), highlight=False, markup=False)

        yield show, tick


def _lines(out: TextIO) -> Sink:
    last = [-QUIET_S]

    def show(line: dict[str, Any]) -> None:
        if time.monotonic() - last[0] >= QUIET_S or line["epoch"] + 1 == line["epochs"]:
            last[0] = time.monotonic()
            out.write(line_text(line) + "\n")
            out.flush()

    return show


def draw_curves(lines: list[dict[str, Any]], path: Path, names: Sequence[str] = ()) -> str | None:
    """Draw losses, pseudo-Dice (of labels or regions that have these names) and learning rate over epochs into `path` (*.png).

    Returns why not, where that cannot be done.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path.name} was not drawn: matplotlib is not installed (pip install 'ichbench[plots]')"
    epochs = [line["epoch"] + 1 for line in lines]
    figure = Figure(figsize=(7, 8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    losses, dice, rate = figure.subplots(3, 1, sharex=True)
    losses.plot(epochs, [line["train_loss"] for line in lines], label="training")
    losses.plot(epochs, _numbers(line["val_loss"] for line in lines), label="validation")
    losses.set_ylabel("loss")
    losses.legend()
    for index in range(max((len(line["pseudo_dice"]) for line in lines), default=0)):
        name = names[index] if index < len(names) else f"label {index + 1}"
        dice.plot(epochs, _numbers(line["pseudo_dice"][index] for line in lines), lw=0.8, label=name)
    dice.plot(epochs, _numbers(line["moving_average"] for line in lines), color="black", label="moving average of the mean")
    dice.set_ylabel("pseudo-Dice of patches")
    dice.set_ylim(0, 1)
    dice.legend()
    rate.plot(epochs, [line["learning_rate"] for line in lines])
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    part = path.with_name(f".{path.name}")
    with part.open("wb") as stream:
        canvas.print_png(stream)  # type: ignore[no-untyped-call]
    part.replace(path)
    return None


def curves_sink(path: Path, log: Path, names: Sequence[str] = ()) -> Sink:
    """Draws the curves of a log now and then. Says nothing where matplotlib is missing."""
    drawn = [time.monotonic()]

    def show(line: dict[str, Any]) -> None:
        if time.monotonic() - drawn[0] >= REDRAW_S:
            draw_curves(read_log(log), path, names)
            drawn[0] = time.monotonic()

    return show


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line under flat names; what does not exist (null) is left out."""
    flat = {f"pseudo_dice/{index + 1}": value for index, value in enumerate(line["pseudo_dice"])}
    flat |= {name: value for name, value in line.items() if name not in ("epoch", "epochs", "pseudo_dice")}
    return {name: float(value) for name, value in flat.items() if value is not None}


@contextlib.contextmanager
def _tensorboard(out: Path, name: str) -> Iterator[Sink]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--log tensorboard: TensorBoard is not installed; pip install 'ichbench[tensorboard]'") from None
    writer: Any = SummaryWriter(str(out / "tensorboard"))

    def show(line: dict[str, Any]) -> None:
        for key, value in scalars(line).items():
            writer.add_scalar(key, value, line["epoch"])
        writer.flush()

    try:
        yield show
    finally:
        writer.close()


@contextlib.contextmanager
def _mlflow(out: Path, name: str) -> Iterator[Sink]:
    try:
        import mlflow
    except ImportError:
        raise InputError("--log mlflow: MLflow is not installed; pip install 'ichbench[mlflow]'") from None
    # where to: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, as with every other program
    with mlflow.start_run(run_name=name):
        yield lambda line: mlflow.log_metrics({key.replace("/", "_"): value for key, value in scalars(line).items()}, step=line["epoch"])


#: what --log may name
TRACKERS: dict[str, Callable[[Path, str], contextlib.AbstractContextManager[Sink]]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}


@contextlib.contextmanager
def trackers(names: Iterable[str], out: Path, name: str) -> Iterator[list[Sink]]:
    """The sinks that `names` ask for, closed at the end. InputError for one that is unknown, not installed, or does not open.

    One that fails later (a server that is gone) is left with a TrainingWarning: the training goes on, and log.jsonl has every line.
    """
    with contextlib.ExitStack() as stack:
        sinks = []
        for which in dict.fromkeys(names):
            if which not in TRACKERS:
                raise InputError(f"--log {which!r} is not known; give {' or '.join(TRACKERS)}")
            try:
                sink = stack.enter_context(TRACKERS[which](out, name))
            except InputError:
                raise
            except Exception as error:  # whatever a tracker raises: a server that does not answer, a store it does not want
                said = (str(error).splitlines() or [type(error).__name__])[0]
                raise InputError(f"--log {which}: does not open: {said}; see to it, or train without it") from None
            sinks.append(_forgiving(sink, which))
        yield sinks


def _forgiving(sink: Sink, which: str) -> Sink:
    failed: list[Exception] = []

    def show(line: dict[str, Any]) -> None:
        if failed:
            return
        try:
            sink(line)
        except Exception as error:
            failed.append(error)
            said = f"--log {which} failed ({error}); the training goes on without it, and log.jsonl has every line"
            warnings.warn(said, TrainingWarning, stacklevel=2)

    return show


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
