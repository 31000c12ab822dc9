"""Training: epochs of patches, losses and pseudo-Dice logged as JSON lines, weights as safetensors (facts section 8).

An unfinished training goes on from its last checkpoint when it is started again, and ends with the bits of an unbroken one:
a batch depends on (seed, stream, step) alone, so step, weights and optimizer are all the state there is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ichbench.errors import CaseError
from ichbench.network.losses import LOSSES, Loss, supervised
from ichbench.network.unet import Topology, UNet, make_unet
from ichbench.network.weights import save_tensors, start_from, weights_digest
from ichbench.recipe import NetworkRecipe, TrainingRecipe
from ichbench.training import checkpoint as disk
from ichbench.training.batches import Sampling, ahead, make_batch
from ichbench.training.folder import (
    EPOCHS,
    LOG,
    Saving,
    TrainResult,
    check_settings,
    environment_of,
    identity_of,
    open_folder,
    read_finished,
    refuse_other,
    result_table,
    warn_of_changes,
    write_mark,
)
from ichbench.training.keeper import Keeper, signals, torch_threads
from ichbench.training.logs import LogFile, Sink, Tick, epoch_line, open_log
from ichbench.training.optimizers import OPTIMIZERS, optimizer_tensors, restore_optimizer
from ichbench.training.patches import TRAIN_STREAM, VALIDATION_STREAM, TrainingCase, choose_cases
from ichbench.training.schedule import Position, moving_average, poly_learning_rate, should_stop

#: threads that cut and augment patches while a GPU trains; a CPU training does both in one thread
GPU_WORKERS = 8
DEFAULT_SAVING = Saving()


class TrainingPlan(Topology, Protocol):
    """The part of a plan that training needs."""

    @property
    def patch_size(self) -> tuple[int, ...]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def batch_dice(self) -> bool: ...


def train(
    cases: Sequence[TrainingCase],
    validation_cases: Sequence[TrainingCase],
    plan: TrainingPlan,
    network: NetworkRecipe,
    training: TrainingRecipe,
    seed: int,
    out: Path,
    device: str = "cpu",
    threads: int = 1,
    progress: Sink | None = None,
    *,
    saving: Saving = DEFAULT_SAVING,
    pretrained: Path | None = None,
    overwrite: bool = False,
    extend: bool = False,
    digests: Mapping[str, str] | None = None,
    tick: Tick | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> TrainResult:
    """Train a U-Net; write `log.jsonl`, `final.safetensors` and `best.safetensors` (with manifests) into `out`.

    `log.jsonl` has one line per epoch (`logs.epoch_line`): epoch, epochs, train_loss, val_loss, pseudo_dice (one per class above
    0), moving_average, learning_rate, and what was measured (`logs.MEASURED`); `progress` receives the same. A value that does
    not exist (no validation, no foreground seen) is null. The same seed, threads and machine give the same weights.
    With no validation cases, or validation_iterations = 0, nothing is validated and `best` is `final`.

    Called again on the same `out`, an unfinished training goes on from its last checkpoint; a finished one is returned as it is.
    SIGINT, SIGTERM and SIGUSR1 end it after the current step, with a checkpoint, by KeyboardInterrupt.
    pretrained  weights that all but the heads start from
    overwrite   remove what `out` holds of a training and begin anew
    extend      `out` may hold a finished training of the same settings with fewer epochs; it gets the rest. Its learning rate
                then follows the longer schedule, so it is not what a training of that length from the start would be
    digests     case id -> digest of its data, to save hashing the arrays
    tick        called after every step; `say` with a sentence about where the training begins
    Raises InputError for settings that cannot work and for a folder of another training (the differences are listed), CaseError
    when the loss is not finite.
    """
    check_settings(cases, training, seed, validates=bool(validation_cases) and training.validation_iterations > 0)
    started = None if pretrained is None else weights_digest(pretrained)
    identity = identity_of(plan, network, training, seed, cases, validation_cases, digests, started)
    checkpoints = out / "checkpoints" if saving.folder is None else saving.folder
    with torch_threads(threads):
        # what cannot be built is known before anything is touched
        run = _Run(cases, validation_cases, plan, network, training, seed, torch.device(device))
        if pretrained is not None:
            start_from(run.network, pretrained)
        with open_folder(out, checkpoints, identity, overwrite, extend) as opened:
            if opened.result is not None:
                say(f"{out} holds this training, finished; it is not trained again")
                return read_finished(out, opened.result)
            now = environment_of(device, threads)
            if (found := disk.load_checkpoint(checkpoints)) is not None:
                # an extended training's checkpoint still names its old length
                grown = found.state["identity"].get(EPOCHS) in opened.earlier
                refuse_other(str(checkpoints), found.state["identity"] | ({EPOCHS: identity[EPOCHS]} if grown else {}), identity)
                warn_of_changes(found.state["environment"], now)
                run.restore(found, grown)
                say(f"going on from the checkpoint {found.place.name}: epoch {run.at.epoch + 1}, {run.at.step} steps of it done")
            write_mark(out, opened, now)
            about = {"seed": seed} | ({} if started is None else {"pretrained": started})
            with open_log(out / LOG, run.at.log) as log, signals() as stop:
                keeper = Keeper(checkpoints, saving, {"identity": identity, "environment": now}, stop)
                run.to_the_end(keeper, log, progress, tick)
                result = run.write(out, about)
            write_mark(out, replace(opened, result=result_table(result)), now)
            disk.clear(checkpoints, 1 if saving.keep else 0)
            return result


class _Run:
    """The state of one training; `train` is the way in."""

    def __init__(
        self,
        cases: Sequence[TrainingCase],
        validation_cases: Sequence[TrainingCase],
        plan: TrainingPlan,
        network: NetworkRecipe,
        training: TrainingRecipe,
        seed: int,
        device: torch.device,
    ) -> None:
        self.cases = choose_cases(cases, training.cases, seed)
        self.validation_cases = validation_cases if training.validation_iterations else []
        self.plan, self.recipe, self.device = plan, training, device
        centred = training.foreground_position == "centre"
        clamped = training.compatibility == "ichbench"
        share = training.foreground_share
        self.sampling = Sampling(tuple(plan.patch_size), plan.batch_size, share, seed, training.augment, centred, clamped)
        self.validation_sampling = replace(self.sampling, augment=None)
        self.network: UNet = make_unet(plan, network, seed).to(device)
        self.optimizer = OPTIMIZERS[training.optimizer](self.network.parameters(), training)
        loss: Loss = LOSSES[training.loss]
        batch_dice = plan.batch_dice if training.batch_dice == "auto" else training.batch_dice

        def supervised_loss(outputs: Tensor | list[Tensor], target: Tensor) -> Tensor:
            return supervised(loss, outputs, target, batch_dice, network.unsupervised_levels)

        self.loss = supervised_loss
        self.workers = GPU_WORKERS if device.type == "cuda" else 0

        self.at = Position()
        self.best: dict[str, Tensor] = {}
        self.keeper: Keeper | None = None

    def restore(self, found: disk.Checkpoint, grown: bool) -> None:
        """Go on from a checkpoint; one that has `grown` was at its end, and is no more."""
        self.network.load_state_dict(disk.named("network", found.tensors))
        restore_optimizer(self.optimizer, found.tensors, found.state["optimizer"])
        self.best = disk.named("best", found.tensors)
        self.at = Position.from_json(found.state["at"])
        self.at.stopped = self.at.stopped and not grown

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `restore` needs."""
        tensors, plain = optimizer_tensors(self.optimizer)
        tensors |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        return tensors, {"at": self.at.to_json(), "optimizer": plain}

    def to_the_end(self, keeper: Keeper, log: LogFile, progress: Sink | None, tick: Tick | None) -> None:
        at, recipe = self.at, self.recipe
        self.keeper = keeper
        while at.epoch < recipe.epochs and not at.stopped:
            rate = poly_learning_rate(at.epoch, recipe.epochs, recipe.learning_rate, recipe.poly_exponent)
            train_loss = self.train_epoch(at.epoch, rate, tick)
            keeper.clock(at)
            train_seconds = at.epoch_seconds
            val_loss, pseudo_dice = self.validate_epoch(at.epoch)
            keeper.clock(at)
            at.average = moving_average(at.average, _mean(pseudo_dice), recipe.moving_average)
            at.pseudo_dice = tuple(_or_none(value) for value in pseudo_dice)
            if (improved := at.best.after(at.epoch, at.average)) is not at.best:
                at.best = improved
                self.best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            about: dict[str, Any] = {"epoch": at.epoch, "epochs": recipe.epochs, "train_loss": train_loss, "val_loss": val_loss}
            about |= {"pseudo_dice": list(at.pseudo_dice), "moving_average": at.average, "learning_rate": rate}
            recent = [*(line["seconds"] for line in at.log[-4:]), at.epoch_seconds]
            to_go = sum(recent) / len(recent) * (recipe.epochs - at.epoch - 1)
            steps, size, device = recipe.iterations_per_epoch, self.plan.batch_size, str(self.device)
            line = epoch_line(about, at.epoch_seconds, at.wait_seconds, train_seconds, steps, size, to_go, device)
            at.log.append(line)
            at.stopped = recipe.early_stopping != "off" and should_stop(at.best, at.epoch, recipe.early_stopping.patience_epochs)
            at.epoch, at.step, at.loss_sum, at.epoch_seconds, at.wait_seconds = at.epoch + 1, 0, 0.0, 0.0, 0.0
            log.add(line)
            if progress is not None:
                progress(line)
            keeper.after_step(self, last=at.epoch == recipe.epochs or at.stopped)

    def write(self, out: Path, about: dict[str, Any]) -> TrainResult:
        """Final and best weights, and what there is to say about them."""
        at, final, best = self.at, out / "final.safetensors", out / "best.safetensors"
        weights = self.network.state_dict()
        final_sha = save_tensors(weights, final, about | {"epoch": at.epoch - 1, "moving_average": at.average})
        value, epoch = (at.best.value, at.best.epoch) if at.best.epoch >= 0 else (at.average, at.epoch - 1)
        best_sha = save_tensors(self.best or weights, best, about | {"epoch": epoch, "moving_average": value})
        early = at.stopped and at.epoch < self.recipe.epochs
        return TrainResult(final, best, final_sha, best_sha, at.epoch, epoch, at.average, at.pseudo_dice, at.seconds, early)

    def train_epoch(self, epoch: int, rate: float, tick: Tick | None) -> float:
        """One epoch of steps at one learning rate, or what is left of it; the mean loss of all its steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        at, steps = self.at, self.recipe.iterations_per_epoch
        numbers = range(epoch * steps + at.step, (epoch + 1) * steps)
        batches = ahead(lambda step: make_batch(self.cases, self.sampling, TRAIN_STREAM, step), numbers, self.workers)
        for image, target in self.watched(batches, waits=True):
            self.optimizer.zero_grad(set_to_none=True)
            with self.precision():
                outputs = self.network(image.to(self.device, non_blocking=True))
            loss = self.loss(outputs, target.to(self.device, non_blocking=True))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise CaseError(
                    f"training diverged: the loss is {value} in epoch {epoch}, step {at.step}; "
                    "check the images for NaN, or lower training.learning_rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip)
            self.optimizer.step()
            at.loss_sum += value
            at.step += 1
            if tick is not None:
                tick(epoch, at.step, steps, value)
            if self.keeper is not None:
                self.keeper.after_step(self)
        return at.loss_sum / steps

    def watched(self, batches: Iterator[tuple[Tensor, Tensor]], waits: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches; the time waited for them is counted, and a signal ends validation between two of them."""
        with contextlib.closing(batches) if isinstance(batches, Generator) else contextlib.nullcontext():
            while True:
                if self.keeper is not None and self.keeper.stop.is_set():
                    self.keeper.after_step(self)
                began = time.monotonic()
                batch = next(batches, None)
                self.at.wait_seconds += time.monotonic() - began if waits else 0.0
                if batch is None:
                    return
                yield batch

    def validate_epoch(self, epoch: int) -> tuple[float | None, tuple[float, ...]]:
        """Mean loss, and per class the Dice of all validation patches of the epoch taken together (NaN: class unseen)."""
        if not self.validation_cases:
            return None, ()
        steps, classes = self.recipe.validation_iterations, self.plan.n_classes
        first, total = epoch * steps, 0.0
        overlap, both = np.zeros(classes), np.zeros(classes)
        cases, sampling = self.validation_cases, self.validation_sampling
        batches = ahead(lambda step: make_batch(cases, sampling, VALIDATION_STREAM, step), range(first, first + steps), self.workers)
        with torch.no_grad():
            for image, labels in self.watched(batches):
                target = labels.to(self.device)
                with self.precision():
                    outputs = self.network(image.to(self.device))
                total += float(self.loss(outputs, target))
                top: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
                guess = top.argmax(1)
                for label in range(1, classes):
                    truth, found = target == label, guess == label
                    overlap[label] += float((truth & found).sum())
                    both[label] += float(truth.sum() + found.sum())
        dice = [2 * overlap[label] / both[label] if both[label] else math.nan for label in range(1, classes)]
        return _or_none(total / steps), tuple(float(value) for value in dice)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16")


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
