"""Exact resume: an interrupted training ends with the bits of an unbroken one; what is wrong is refused, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from test_trainer import FLAT, QUICK, SOLID, blob_cases

from ichbench.augmentation.patches import TrainingWarning
from ichbench.cases import files
from ichbench.compute import Compute
from ichbench.errors import CaseError, InputError
from ichbench.network.unet import make_unet
from ichbench.network.weights import load_weights, read_weights
from ichbench.recipe import AugmentRecipe, EarlyStopping, NetworkRecipe, TrainingRecipe
from ichbench.training import checkpoint as disk
from ichbench.training import folder as training_folder
from ichbench.training import keeper, trainer
from ichbench.training.checkpoint import load_checkpoint, places, read_checkpoint
from ichbench.training.folder import Saving, TrainResult
from ichbench.training.logs import MEASURED
from ichbench.training.optimizers import OPTIMIZERS, optimizer_tensors, restore_optimizer
from ichbench.training.schedule import Best, Position

torch.set_num_threads(1)
EVERY = Saving(every_steps=1)


class Killed(BaseException):
    """Stands in for kill -9: nothing catches it, no checkpoint is written on the way out."""


def learn(out: Path, stop_after: int = 0, saving: Saving = EVERY, **changes: Any) -> TrainResult:
    """Three epochs of three steps; `stop_after` steps the process "dies"."""
    done = 0

    def tick(epoch: int, step: int, steps: int, loss: float) -> None:
        nonlocal done
        done += 1
        if done == stop_after:
            raise Killed

    given = {"plan": SOLID, "network": NetworkRecipe(), "seed": 0, "cases": blob_cases(3), "validation_cases": blob_cases(2, 50)}
    given |= {name: changes.pop(name) for name in list(changes) if name in given}
    options = {name: changes.pop(name) for name in list(changes) if name in ("pretrained", "overwrite", "extend", "compute", "digests")}
    recipe = QUICK.model_copy(update={"epochs": 3} | changes)
    tick_option = {"tick": tick} if stop_after else {}
    return trainer.train(**given, training=recipe, out=out, saving=saving, **options, **tick_option)


def kept_lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def same(one: TrainResult, two: TrainResult) -> None:
    assert (one.final_sha256, one.best_sha256) == (two.final_sha256, two.best_sha256)
    assert kept_lines(one.final.parent) == kept_lines(two.final.parent)
    for name in ("final.json", "best.json", "final.safetensors", "best.safetensors"):
        assert (one.final.parent / name).read_bytes() == (two.final.parent / name).read_bytes()
    fields = ("epochs", "best_epoch", "moving_average", "pseudo_dice", "stopped_early")
    assert [getattr(one, name) for name in fields] == [getattr(two, name) for name in fields]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """An unbroken training; what is broken off must end like it."""
    return learn(tmp_path_factory.mktemp("whole") / "out", saving=Saving(every_seconds=1e9))


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.05},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "2d": {"plan": FLAT, "moving_average": 0.0, "learning_rate": 0.05},
    "bf16": {"precision": "bf16"},
    "no validation": {"validation_iterations": 0},
    "augmented": {"augment": AugmentRecipe(rotation_probability=1, scaling_probability=1, noise_probability=1, gamma_probability=1)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_broken_off_anywhere_it_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    changes = SETTINGS[name]
    whole = learn(tmp_path / "whole", **changes)
    out = tmp_path / "broken"
    # after 1 step (mid epoch), then after 2 more (the end of an epoch), then 4 more; checkpoints lie every 2 steps
    saving = Saving(every_steps=2)
    for steps in (1, 2, 4):
        with pytest.raises(Killed):
            learn(out, steps, saving, **changes)
    same(whole, learn(out, saving=saving, **changes))


def test_every_single_step_can_be_the_last(whole: TrainResult, tmp_path: Path) -> None:
    for steps in (1, 3, 4, 6, 8, 9):
        with pytest.raises(Killed):
            learn(tmp_path / str(steps), steps)
        same(whole, learn(tmp_path / str(steps)))


def test_how_often_it_is_saved_changes_nothing(tmp_path: Path) -> None:
    savings = [Saving(every_seconds=0.0), Saving(every_seconds=1e9, keep=False), EVERY]
    results = [learn(tmp_path / str(index), saving=saving) for index, saving in enumerate(savings)]
    same(results[0], results[1])
    same(results[0], results[2])
    assert not places(tmp_path / "1/checkpoints")
    assert len(places(tmp_path / "2/checkpoints")) == 1


def test_it_goes_on_and_does_not_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests would pass if a killed training always began anew."""
    with pytest.raises(Killed):
        learn(tmp_path, 7)
    steps: list[int] = []
    made = trainer.make_batch

    def counted(cases: Any, sampling: Any, stream: int, step: int, *where: Any) -> Any:
        if stream == trainer.TRAIN_STREAM:
            steps.append(step)
        return made(cases, sampling, stream, step, *where)

    monkeypatch.setattr(trainer, "make_batch", counted)
    learn(tmp_path)
    # step 6 was done but not yet saved when it was "killed" in it
    assert steps == [6, 7, 8]


def test_early_stopping_counts_across_a_resume(tmp_path: Path) -> None:
    changes = {"epochs": 12, "learning_rate": 1e-12, "iterations_per_epoch": 1, "early_stopping": EarlyStopping(patience_epochs=3)}
    whole = learn(tmp_path / "whole", **changes)
    assert whole.stopped_early
    assert 3 < whole.epochs < 12
    for steps in range(2, whole.epochs + 1):
        with pytest.raises(Killed):
            learn(tmp_path / str(steps), steps, **changes)
        same(whole, learn(tmp_path / str(steps), **changes))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_it_with_a_checkpoint(number: signal.Signals, whole: TrainResult, tmp_path: Path) -> None:
    before = signal.getsignal(number)

    def tick(epoch: int, step: int, steps: int, loss: float) -> None:
        if (epoch, step) == (1, 2):
            os.kill(os.getpid(), number)

    rare = Saving(every_seconds=1e9)
    recipe = QUICK.model_copy(update={"epochs": 3})
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        trainer.train(blob_cases(3), blob_cases(2, 50), SOLID, NetworkRecipe(), recipe, 0, out, saving=rare, tick=tick)
    assert [place.name for place in places(out / "checkpoints")] == ["000001-000002"]
    assert signal.getsignal(number) == before
    same(whole, learn(out))


def test_a_signal_during_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(tmp_path / "whole", validation_iterations=3)
    made, rare = trainer.make_batch, Saving(every_seconds=1e9)

    def interrupted(cases: Any, sampling: Any, stream: int, step: int, *where: Any) -> Any:
        if stream == trainer.VALIDATION_STREAM and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(cases, sampling, stream, step, *where)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "out", saving=rare, validation_iterations=3)
    assert [place.name for place in places(tmp_path / "out/checkpoints")] == ["000001-000003"]
    same(whole, learn(tmp_path / "out", saving=rare, validation_iterations=3))


def broken_off(out: Path, steps: int = 7) -> tuple[Path, Path]:
    """A killed training and its two checkpoints, the newest first."""
    with pytest.raises(Killed):
        learn(out, steps)
    newest, older = places(out / "checkpoints")
    return newest, older


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [disk.TENSORS, disk.STATE, disk.SUMS])
@pytest.mark.parametrize("at", [0.0, 0.37, 1.0])
def test_a_flipped_bit_is_seen_and_the_one_before_is_used(name: str, at: float, whole: TrainResult, tmp_path: Path) -> None:
    newest, older = broken_off(tmp_path / "out")
    if (name, at) == (disk.SUMS, 1.0):
        at = 0.9  # the last byte is the line's end
    flip(newest / name, at)
    with pytest.warns(TrainingWarning, match=rf"{newest.name} is damaged .* going on from the one before it, {older.name}"):
        same(whole, learn(tmp_path / "out"))


@pytest.mark.parametrize("spoil", ["empty", "cut", "gone"])
def test_a_lost_file_is_seen(spoil: str, whole: TrainResult, tmp_path: Path) -> None:
    newest, _ = broken_off(tmp_path / "out")
    path = newest / disk.TENSORS
    {"empty": lambda: path.write_bytes(b""), "cut": lambda: path.write_bytes(path.read_bytes()[:-9]), "gone": path.unlink}[spoil]()
    with pytest.warns(TrainingWarning, match="is damaged"):
        same(whole, learn(tmp_path / "out"))


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_both_damaged_is_refused_and_nothing_is_deleted(whole: TrainResult, tmp_path: Path) -> None:
    newest, older = broken_off(tmp_path / "out")
    flip(newest / disk.TENSORS, 0.5)
    flip(older / disk.STATE, 0.5)
    before = snapshot(tmp_path / "out")
    with pytest.raises(InputError, match=r"no whole checkpoint is left\. Nothing was deleted") as said:
        learn(tmp_path / "out")
    assert newest.name in str(said.value)
    assert older.name in str(said.value)
    assert snapshot(tmp_path / "out") == before
    same(whole, learn(tmp_path / "out", overwrite=True))


def test_the_damaged_one_never_pushes_out_a_whole_one(tmp_path: Path) -> None:
    """Newest damaged, then killed again right after the next checkpoint: the two that are left are whole."""
    newest, older = broken_off(tmp_path / "out", 7)
    flip(newest / disk.TENSORS, 0.5)
    with pytest.warns(TrainingWarning, match="is damaged"), pytest.raises(Killed):
        learn(tmp_path / "out", 2)
    left = places(tmp_path / "out/checkpoints")
    assert [place.name for place in left] == [newest.name, older.name]
    for place in left:
        read_checkpoint(place)


@pytest.mark.parametrize("spoil", ["torn", "ahead", "gone", "edited"])
def test_the_log_is_what_the_checkpoint_says(spoil: str, whole: TrainResult, tmp_path: Path) -> None:
    broken_off(tmp_path / "out", 8)
    path = tmp_path / "out/log.jsonl"
    text = path.read_text()
    assert len(text.splitlines()) == 2
    if spoil == "torn":
        path.write_text(text + '{"epoch": 2, "train')
    elif spoil == "ahead":
        path.write_text(text + text.splitlines()[1].replace('"epoch": 1', '"epoch": 2') + "\n")
    elif spoil == "gone":
        path.unlink()
    else:
        path.write_text(text.replace("train_loss", "train_lost"))
    result = learn(tmp_path / "out")
    same(whole, result)
    assert path.read_text().startswith(text)


def full_disk(monkeypatch: pytest.MonkeyPatch, when: Callable[[str], bool], number: int = errno.ENOSPC) -> None:
    def refuse(path: Path, data: bytes) -> None:
        if when(path.name):
            path.write_bytes(data[: len(data) // 2])
            raise OSError(number, os.strerror(number), str(path))
        written(path, data)

    written = disk._write_synced
    monkeypatch.setattr(disk, "_write_synced", refuse)


@pytest.mark.parametrize("name", [disk.TENSORS, disk.STATE, disk.SUMS])
def test_a_full_disk_leaves_the_one_before(name: str, whole: TrainResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    newest, older = broken_off(out)
    before = snapshot(newest) | snapshot(older)
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, lambda written: written == name)
        with pytest.raises(InputError, match=rf"the disk is full; the one before it, {newest.name}, is as it was: free some space"):
            learn(out)
    assert snapshot(newest) | snapshot(older) == before
    assert not list((out / "checkpoints").glob(".*"))
    same(whole, learn(out))


def test_a_full_disk_at_the_log_and_at_the_end(whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for target in ("final.safetensors", "best.json", "training.json"):
        broken_off(out)
        with monkeypatch.context() as patch:
            written = files.write_atomically

            def refuse(path: Path, data: bytes, target: str = target, written: Any = written) -> None:
                if path.name == target:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
                written(path, data)

            for module in ("ichbench.network.weights", "ichbench.training.folder"):
                patch.setattr(f"{module}.write_atomically", refuse)
            with pytest.raises(InputError, match=f"{target}: No space left on device; see to it and run the same command again"):
                learn(out)
        same(whole, learn(out))
        shutil.rmtree(out)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"loss": "ce"}, 'training.loss was "dice_ce", is "ce"'),
    "augmentation": ({"augment": AugmentRecipe(mirror=False)}, "training.augment.mirror was true, is false"),
    "network": ({"network": NetworkRecipe(leaky_slope=0.02)}, "network.leaky_slope was 0.01, is 0.02"),
    "plan": ({"plan": FLAT}, "plan.batch_size was 2, is 4"),
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "split": ({"validation_cases": blob_cases(1, 50)}, 'split.validation was ["b50", "b51"], is ["b50"]'),
    "epochs": ({"epochs": 4}, "training.epochs was 3, is 4"),
}


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_training_is_refused_with_the_difference(name: str, finished: bool, tmp_path: Path) -> None:
    changes, said = OTHERS[name]
    if finished:
        learn(tmp_path)
    else:
        broken_off(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="belongs to another training; nothing was changed") as error:
        learn(tmp_path, **changes)
    assert said in str(error.value)
    assert snapshot(tmp_path) == before


def test_changed_voxels_are_refused(tmp_path: Path) -> None:
    broken_off(tmp_path)
    cases = blob_cases(3)
    cases[1].image_czyx[0, 0, 0, 0] += 1e-3
    with pytest.raises(InputError, match=r"data\.b1 was "):
        learn(tmp_path, cases=cases)
    cases = blob_cases(3)
    cases[2].labels_zyx[0, 0, 0] = 1
    with pytest.raises(InputError, match=r"data\.b2 was "):
        learn(tmp_path, cases=cases)


def test_even_before_the_first_checkpoint(whole: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        learn(tmp_path, 1)
    assert not places(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="seed was 0, is 1"):
        learn(tmp_path, seed=1)
    same(whole, learn(tmp_path))


def test_a_finished_training_is_not_trained_again(whole: TrainResult, tmp_path: Path) -> None:
    first = learn(tmp_path)
    before = snapshot(tmp_path)
    again = learn(tmp_path, stop_after=1)  # would raise at its first step
    assert again == first
    assert snapshot(tmp_path) == before
    (tmp_path / "final.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match=r"final\.safetensors is not what the training wrote"):
        learn(tmp_path)
    same(whole, learn(tmp_path, overwrite=True))


def test_weights_that_nothing_is_known_of_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "final.safetensors").write_bytes(b"a week of work")
    with pytest.raises(InputError, match=r"holds final\.safetensors of a training that nothing else is known of"):
        learn(tmp_path)
    assert (tmp_path / "final.safetensors").read_bytes() == b"a week of work"
    learn(tmp_path, overwrite=True)


def test_a_damaged_mark(whole: TrainResult, tmp_path: Path) -> None:
    broken_off(tmp_path / "out")
    mark = tmp_path / "out/training.json"
    mark.write_text(mark.read_text().replace('"seed": 0', '"seed": 8'))
    with pytest.raises(InputError, match=r"training\.json is damaged"):
        learn(tmp_path / "out")
    mark.unlink()
    same(whole, learn(tmp_path / "out"))


def test_extending(tmp_path: Path) -> None:
    short = learn(tmp_path / "out")
    with pytest.raises(InputError, match="gets more epochs with --extend-to"):
        learn(tmp_path / "out", epochs=5)
    with pytest.raises(InputError, match="for 3 epochs; extend it to more than that, not to 2"):
        learn(tmp_path / "out", epochs=2, extend=True)
    with pytest.raises(InputError, match="seed was 0, is 1"):
        learn(tmp_path / "out", epochs=5, extend=True, seed=1)
    shutil.copytree(tmp_path / "out", tmp_path / "broken")
    longer = learn(tmp_path / "out", epochs=5, extend=True)
    assert longer.epochs == 5
    lines = kept_lines(tmp_path / "out")
    assert [line["epochs"] for line in lines] == [3, 3, 3, 5, 5]
    assert [line["learning_rate"] for line in lines[3:]] == pytest.approx([0.01 * (1 - e / 5) ** 0.9 for e in (3, 4)])
    assert longer.final_sha256 != short.final_sha256
    # the extension resumes like anything else, by its own command
    with pytest.raises(Killed):
        learn(tmp_path / "broken", 2, epochs=5, extend=True)
    with pytest.raises(InputError, match="not finished; run it to its end before it is extended"):
        learn(tmp_path / "broken", epochs=7, extend=True)
    same(longer, learn(tmp_path / "broken", epochs=5, extend=True))
    assert training_folder.read_mark(tmp_path / "out")["earlier_epochs"] == [3]  # type: ignore[index]
    # the old command does not shorten it, the new one finds it finished
    with pytest.raises(InputError, match=r"training\.epochs was 5, is 3"):
        learn(tmp_path / "out")
    assert learn(tmp_path / "out", epochs=5, extend=True) == longer
    with pytest.raises(InputError, match="no finished training to extend"):
        learn(tmp_path / "nothing", extend=True)


def test_an_extension_without_a_whole_checkpoint_leaves_the_finished_training(tmp_path: Path) -> None:
    first = learn(tmp_path)
    flip(places(tmp_path / "checkpoints")[0] / disk.TENSORS, 0.5)
    with pytest.raises(InputError, match="no whole checkpoint is left"):
        learn(tmp_path, epochs=5, extend=True)
    assert learn(tmp_path) == first


def test_two_at_once(tmp_path: Path) -> None:
    broken_off(tmp_path)
    with FileLock(tmp_path / "checkpoints/lock"), pytest.raises(InputError, match="another process is training in"):
        learn(tmp_path)


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; give a folder"):
        learn(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        learn(tmp_path / "file/below")

    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "out")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match="cannot be written: Permission denied; give a folder that can"):
        learn(tmp_path / "out")


def test_another_torch_is_said_and_allowed(whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        with pytest.warns(TrainingWarning, match=r'torch was ".*", is "2\.99\.0"\); the result may differ in its last bits'):
            same(whole, learn(tmp_path / "out"))
    broken_off(tmp_path / "threads")
    with pytest.warns(TrainingWarning, match="threads was 1, is 2"):
        learn(tmp_path / "threads", compute=Compute(threads=2))


def test_another_number_of_processes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(tmp_path / "out")
    before = trainer.environment_of
    monkeypatch.setattr(trainer, "environment_of", lambda compute, processes: before(compute, 2))
    with pytest.warns(TrainingWarning, match="processes was 1, is 2"):
        learn(tmp_path / "out")


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(tmp_path)
    monkeypatch.setattr(disk, "FORMAT", 2)
    with pytest.raises(InputError, match="has format 1, this version reads 2"):
        learn(tmp_path)


def test_nan_ends_it_and_the_checkpoints_stay(tmp_path: Path) -> None:
    cases = blob_cases(1)
    cases[0].image_czyx[...] = float("nan")
    for _ in range(2):
        with pytest.raises(CaseError, match="the loss is nan in epoch 0, step 0"):
            learn(tmp_path, cases=cases, augment=AugmentRecipe(mirror=False, rotation_probability=0, scaling_probability=0))


def test_times_add_up(tmp_path: Path) -> None:
    broken_off(tmp_path)
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    at = Position.from_json(found.state["at"])
    assert at.seconds >= sum(line["seconds"] for line in at.log) - 0.002
    result = learn(tmp_path)
    total = sum(json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert at.seconds < result.seconds
    assert result.seconds >= total - 0.01


def test_the_mean_loss_is_that_of_the_epochs_own_steps(tmp_path: Path) -> None:
    seen: dict[int, list[float]] = {}
    recipe = QUICK.model_copy(update={"epochs": 3})
    given = (blob_cases(2), [], SOLID, NetworkRecipe(), recipe, 0, tmp_path)
    trainer.train(*given, tick=lambda epoch, step, steps, loss: seen.setdefault(epoch, []).append(loss))
    assert [line["train_loss"] for line in kept_lines(tmp_path)] == [sum(losses) / 3 for losses in seen.values()]


def test_what_lies_ahead_of_the_one_that_was_used_goes(tmp_path: Path) -> None:
    """The newest is damaged and the next one lies before it: the two that are kept are the two whole ones."""
    with pytest.raises(Killed):
        learn(tmp_path, 7, Saving(every_steps=2))
    flip(places(tmp_path / "checkpoints")[0] / disk.STATE, 0.5)
    assert [place.name for place in places(tmp_path / "checkpoints")] == ["000001-000003", "000001-000001"]
    with pytest.warns(TrainingWarning, match="is damaged"), pytest.raises(Killed):
        learn(tmp_path, 2)
    assert [place.name for place in places(tmp_path / "checkpoints")] == ["000001-000002", "000001-000001"]


def test_checkpoints_say_what_they_are_of(tmp_path: Path) -> None:
    broken_off(tmp_path)
    (tmp_path / "training.json").unlink()
    with pytest.raises(InputError, match="checkpoints belongs to another training") as said:
        learn(tmp_path, seed=1)
    assert "seed was 0, is 1" in str(said.value)


def test_a_training_that_stopped_early_can_be_extended(tmp_path: Path) -> None:
    changes = {"learning_rate": 1e-12, "iterations_per_epoch": 1, "early_stopping": EarlyStopping(patience_epochs=3)}
    first = learn(tmp_path, epochs=12, **changes)
    assert first.stopped_early
    # patience counts anew, and the end may come first
    longer = learn(tmp_path, epochs=13, extend=True, **changes)
    assert longer.epochs == min(13, first.epochs + 3)
    assert longer.epochs > first.epochs + 1


@pytest.mark.parametrize(("every_s", "cost_s", "expected"), [(10, 0.0, 10), (10, 0.5, 2), (0, 0.0, 100), (1e9, 0.0, 0)])
def test_checkpoints_come_by_the_clock_and_cost_a_hundredth(
    every_s: float, cost_s: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred steps of a second each: one every ten seconds; every fifty after the first where writing takes half a second."""
    clock = [0.0]
    written: list[float] = []

    def save(*_: Any) -> None:
        clock[0] += cost_s
        written.append(clock[0])

    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(keeper, "save_checkpoint", save)
    run = SimpleNamespace(at=Position(step=1), saved=lambda: ({}, {}))
    held = keeper.Keeper(tmp_path, Saving(every_seconds=every_s), {}, threading.Event())
    for _ in range(100):
        clock[0] += 1.0
        held.after_step(run)  # type: ignore[arg-type]
    assert len(written) == pytest.approx(expected, abs=1)
    assert run.at.seconds <= clock[0]


def test_a_position_survives_json() -> None:
    for at in (Position(), Position(3, 2, 0.1 + 0.2, 1 / 3, Best(0.7, 2), (None, 0.1), [{"epoch": 0}], 1.5, 0.5, 0.25, True)):
        assert Position.from_json(json.loads(json.dumps(at.to_json(), allow_nan=False))) == at


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers_come_back_in_the_memory_format_of_their_parameters(name: str) -> None:
    """A fused step walks parameter and buffers side by side in memory."""
    network = make_unet(SOLID, NetworkRecipe())
    optimizer = OPTIMIZERS[name](network.parameters(), TrainingRecipe())
    network(torch.randn(1, 1, 4, 16, 16))[0].square().sum().backward()
    optimizer.step()
    other = OPTIMIZERS[name](network.parameters(), TrainingRecipe())
    tensors, plain = optimizer_tensors(optimizer)
    restore_optimizer(other, {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, plain)
    assert len(tensors) >= sum(1 for _ in network.parameters())
    for parameter in network.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)
            steps = [step for step, size in zip(value.stride(), value.shape, strict=True) if size > 1]
            assert [step for step, size in zip(other.state[parameter][key].stride(), value.shape, strict=True) if size > 1] == steps


def test_fine_tuning(tmp_path: Path) -> None:
    first = learn(tmp_path / "first", validation_iterations=0)
    plain = learn(tmp_path / "plain", seed=5)
    tuned = learn(tmp_path / "tuned", seed=5, pretrained=first.final, learning_rate=1e-12, weight_decay=0.0)
    before, after = read_weights(first.final)[0], read_weights(tuned.final)[0]
    heads = [name for name in before if name.startswith("heads.")]
    assert heads
    for name in before:
        close = torch.allclose(before[name], after[name], atol=1e-6)
        assert close == (name not in heads or not before[name].any()) or name.endswith("bias"), name
    assert json.loads((tmp_path / "tuned/final.json").read_text())["about"]["pretrained"] == first.final_sha256
    assert tuned.final_sha256 != plain.final_sha256
    # the weights are part of what the training is
    with pytest.raises(InputError, match="pretrained was"):
        learn(tmp_path / "tuned", seed=5, learning_rate=1e-12, weight_decay=0.0)
    with pytest.raises(Killed):
        learn(tmp_path / "broken", 4, seed=5, pretrained=first.final, learning_rate=1e-12, weight_decay=0.0)
    same(tuned, learn(tmp_path / "broken", seed=5, pretrained=first.final, learning_rate=1e-12, weight_decay=0.0))


def test_weights_that_do_not_fit_are_listed_and_nothing_is_touched(tmp_path: Path) -> None:
    from dataclasses import replace

    first = learn(tmp_path / "first", validation_iterations=0)
    done = learn(tmp_path / "done")
    wider = replace(SOLID, features=(4, 12))
    with pytest.raises(InputError, match=r"tensors do not fit, so nothing was loaded") as said:
        learn(tmp_path / "done", plan=wider, pretrained=first.final, overwrite=True)
    lines = str(said.value).splitlines()[1:]
    assert all("shape (" in line for line in lines)
    assert any("(8, 4, 3, 3, 3) in the weights, (12, 4, 3, 3, 3) in the plan's network" in line for line in lines)
    assert not any("heads." in line for line in lines)
    assert learn(tmp_path / "done") == done
    deeper = replace(SOLID, convs_per_stage=(2, 3))
    with pytest.raises(InputError, match="the plan's network has it, the weights do not"):
        learn(tmp_path / "new", plan=deeper, pretrained=first.final)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="cannot read the weights"):
        learn(tmp_path / "new", pretrained=tmp_path / "nothing.safetensors")
    # another number of classes is no hindrance
    three = learn(tmp_path / "three", plan=replace(SOLID, n_classes=3), pretrained=first.final)
    network = make_unet(replace(SOLID, n_classes=3), NetworkRecipe())
    load_weights(network, three.final)


def test_other_labels_of_the_first_stage_are_other_data(tmp_path: Path) -> None:
    plan = replace(SOLID, in_channels=2)
    cases = [replace(case, previous_zyx=(case.labels_zyx > 0).astype(np.uint8)) for case in blob_cases(3)]
    empty = [replace(case, previous_zyx=np.zeros_like(case.previous_zyx)) for case in cases]
    with pytest.raises(Killed):
        learn(tmp_path, 4, plan=plan, cases=cases, validation_cases=[])
    with pytest.raises(InputError, match=r"data\.b0 was"):
        learn(tmp_path, plan=plan, cases=empty, validation_cases=[])
    learn(tmp_path, plan=plan, cases=cases, validation_cases=[])
