"""What is shown of a training: the log's lines, the line for people, the picture, sinks and trackers."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ichbench.augmentation.patches import TrainingWarning
from ichbench.errors import InputError
from ichbench.training.logs import (
    MEASURED,
    TRACKERS,
    draw_curves,
    duration,
    epoch_line,
    line_text,
    live,
    open_log,
    peak_cuda_mb,
    peak_rss_mb,
    read_log,
    scalars,
    trackers,
)

ABOUT = {"epoch": 3, "epochs": 10, "train_loss": -0.5, "val_loss": -0.25, "pseudo_dice": [0.75, None], "moving_average": 0.7}
ABOUT |= {"learning_rate": 0.01}
BARE = ABOUT | {"epoch": 9, "val_loss": None, "pseudo_dice": [], "moving_average": None}


def line(about: dict[str, Any] = ABOUT, waited: float = 1.0) -> dict[str, Any]:
    return epoch_line(about, seconds=10.0, waited=waited, train_seconds=8.0, steps=4, batch_size=3, eta_s=60.0, device="cpu")


def test_a_line_is_arithmetic() -> None:
    made = line()
    assert {name: made[name] for name in ABOUT} == ABOUT
    assert set(made) - set(ABOUT) == set(MEASURED)
    assert (made["seconds"], made["steps_per_second"], made["patches_per_second"], made["data_wait_share"]) == (10.0, 0.5, 1.5, 0.125)
    assert (made["eta_seconds"], made["peak_cuda_mb"]) == (60.0, None)
    assert line(waited=9.0)["data_wait_share"] == 1.0
    json.dumps(made, allow_nan=False)


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_rss_mb()
    assert before is not None
    held = bytearray(200 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    after = peak_rss_mb()
    assert after is not None
    assert 20 < before <= after < 100_000
    assert peak_cuda_mb("cpu") is None


def test_the_line_for_people() -> None:
    text = line_text(line())
    assert text.startswith("epoch 4/10, loss -0.500, validation -0.250, Dice 0.750 -, lr 0.01, 1.5 patches/s, data wait 12%")
    assert text.endswith("60 s to go")
    assert "validation" not in line_text(line(BARE))
    assert [duration(seconds) for seconds in (3, 300, 9000, 500_000)] == ["3 s", "5 min", "2.5 h", "6 days"]


@pytest.mark.parametrize("before", [None, "", "torn {", '{"epoch": 9}\n'])
def test_a_log_holds_exactly_its_lines(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    if before is not None:
        path.write_text(before)
    with open_log(path, [{"epoch": 0}]) as log:
        log.add({"epoch": 1})
        # others can read it at once
        assert read_log(path) == [{"epoch": 0}, {"epoch": 1}]
    path.write_text(path.read_text() + '{"epo')
    assert read_log(path) == [{"epoch": 0}, {"epoch": 1}]


def test_without_a_terminal_lines_are_rare() -> None:
    out = io.StringIO()
    with live(out) as (show, tick):
        for epoch in range(10):
            tick(epoch, 1, 2, 0.5)
            show(line(ABOUT | {"epoch": epoch}))
    assert [text.split(",")[0] for text in out.getvalue().splitlines()] == ["epoch 1/10", "epoch 10/10"]


def test_on_a_terminal_it_moves() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with live(out) as (show, tick):
        tick(0, 1, 2, 0.5)
        show(line())
        tick(1, 2, 2, 0.25)
    assert "epoch 4/10" in out.getvalue()


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    from matplotlib.axes import Axes

    drawn: list[str] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *args, **options: drawn.append(options.get("label", "")) or plot(axes, *args, **options))
    for lines in ([line(), line(ABOUT | {"epoch": 4})], [line(BARE)], []):
        assert draw_curves(lines, path, ["bleed"]) is None
        assert path.read_bytes().startswith(b"\x89PNG")
    labels = ["bleed", *(f"label {number}" for number in range(2, len(line()["pseudo_dice"]) + 1))]
    assert drawn[:6] == ["training", "validation", *labels, "moving average of the mean", ""][:6]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_curves([], path) == "curves.png was not drawn: matplotlib is not installed (pip install 'ichbench[plots]')"


def test_scalars_leave_out_what_does_not_exist() -> None:
    found = scalars(line())
    assert found["pseudo_dice/1"] == 0.75
    assert "pseudo_dice/2" not in found
    assert "peak_cuda_mb" not in found
    assert found["train_loss"] == -0.5


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.utils.tensorboard", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(InputError, match=rf"--log {name}: .* is not installed; pip install 'ichbench\[{name}\]'"),
        trackers([name], tmp_path, "a"),
    ):
        pass
    with pytest.raises(InputError, match="'wandb' is not known; give tensorboard or mlflow"), trackers(["wandb"], tmp_path, "a"):
        pass


def test_trackers_get_every_number_and_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins with the same calls: the real ones are not among the test dependencies."""
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            seen.append(("open", folder))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            seen.append((key, value, step))

        def flush(self) -> None:
            seen.append("flush")

        def close(self) -> None:
            seen.append("close")

    class Run:
        def __enter__(self) -> None:
            seen.append("start")

        def __exit__(self, *_: object) -> None:
            seen.append("end")

    board, flow = ModuleType("torch.utils.tensorboard"), ModuleType("mlflow")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    flow.start_run = lambda run_name: Run()  # type: ignore[attr-defined]
    flow.log_metrics = lambda values, step: seen.append((values, step))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "mlflow", flow)
    with trackers(["tensorboard", "mlflow", "tensorboard"], tmp_path, "a") as sinks:
        assert len(sinks) == 2
        for sink in sinks:
            sink(line())
    assert seen[0] == ("open", str(tmp_path / "tensorboard"))
    assert ("train_loss", -0.5, 3) in seen
    ((values, step),) = [item for item in seen if isinstance(item, tuple) and isinstance(item[0], dict)]
    assert (values["pseudo_dice_1"], step) == (0.75, 3)
    assert seen[-2:] == ["end", "close"]


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def gone(values: object, step: int) -> None:
        calls.append(step)
        raise ConnectionError("the server is gone")

    flow = ModuleType("mlflow")
    flow.start_run = lambda run_name: contextlib.nullcontext()  # type: ignore[attr-defined]
    flow.log_metrics = gone  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", flow)
    with trackers(["mlflow"], tmp_path, "a") as (sink,):
        with pytest.warns(TrainingWarning, match=r"--log mlflow failed \(the server is gone\); the training goes on"):
            sink(line())
        sink(line())
    assert calls == [3]

    def refuse(run_name: str) -> None:
        raise RuntimeError("a store of another kind is wanted\nand so on")

    flow.start_run = refuse  # type: ignore[attr-defined]
    said = "--log mlflow: does not open: a store of another kind is wanted; see"
    with pytest.raises(InputError, match=said), trackers(["mlflow"], tmp_path, "a"):
        pass
