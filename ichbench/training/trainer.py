"""Training: epochs of patches, losses and pseudo-Dice logged as JSON lines, weights as safetensors (facts section 8)."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ichbench.errors import CaseError, InputError
from ichbench.network.losses import LOSSES, Loss, supervised
from ichbench.network.unet import Topology, UNet, make_unet
from ichbench.network.weights import save_weights
from ichbench.recipe import NetworkRecipe, TrainingRecipe
from ichbench.training.batches import Sampling, ahead, make_batch, training_sampling
from ichbench.training.patches import TRAIN_STREAM, VALIDATION_STREAM, TrainingCase, TrainingWarning, choose_cases
from ichbench.training.schedule import Best, moving_average, poly_learning_rate, should_stop

#: threads that cut and augment patches while a GPU trains; a CPU training does both in one thread
GPU_WORKERS = 8


class TrainingPlan(Topology, Protocol):
    """The part of a plan that training needs."""

    @property
    def patch_size(self) -> tuple[int, ...]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def batch_dice(self) -> bool: ...


@dataclass(frozen=True)
class TrainResult:
    """Where the weights are and how the training went. `final` and `best` are *.safetensors with their sha256;
    `best` has the highest moving average of the pseudo-Dice (it equals `final` when nothing was validated)."""

    final: Path
    best: Path
    final_sha256: str
    best_sha256: str
    epochs: int
    best_epoch: int
    moving_average: float | None
    pseudo_dice: tuple[float | None, ...]
    seconds: float
    stopped_early: bool


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
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a U-Net; write `log.jsonl`, `final.safetensors` and `best.safetensors` (with manifests) into `out`.

    `log.jsonl` has one line per epoch: epoch, epochs, train_loss, val_loss, pseudo_dice (one per class above 0),
    moving_average, learning_rate, seconds, steps_per_second; `progress` receives the same. A value that does not exist
    (no validation, no foreground seen) is null. The same seed, threads and machine give the same weights.
    With no validation cases, or validation_iterations = 0, nothing is validated and `best` is `final`.
    Raises InputError for settings that cannot work, CaseError when the loss is not finite.
    """
    _check(cases, training, seed, validates=bool(validation_cases) and training.validation_iterations > 0)
    out.mkdir(parents=True, exist_ok=True)
    with _threads(threads), (out / "log.jsonl").open("w", buffering=1, encoding="utf-8") as log:
        return _Run(cases, validation_cases, plan, network, training, seed, out, torch.device(device)).to_the_end(log.write, progress)


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
        out: Path,
        device: torch.device,
    ) -> None:
        self.cases = choose_cases(cases, training.cases, seed)
        self.validation_cases = validation_cases if training.validation_iterations else []
        self.plan, self.recipe, self.out, self.device, self.seed = plan, training, out, device, seed
        self.sampling: Sampling = training_sampling(plan.patch_size, plan.batch_size, training, seed)
        self.validation_sampling = replace(self.sampling, augment=None)
        self.network: UNet = make_unet(plan, network, seed).to(device)
        self.optimizer = OPTIMIZERS[training.optimizer](self.network.parameters(), training)
        loss: Loss = LOSSES[training.loss]
        batch_dice = plan.batch_dice if training.batch_dice == "auto" else training.batch_dice

        def supervised_loss(outputs: Tensor | list[Tensor], target: Tensor) -> Tensor:
            return supervised(loss, outputs, target, batch_dice, network.unsupervised_levels)

        self.loss = supervised_loss
        self.workers = GPU_WORKERS if device.type == "cuda" else 0

    def to_the_end(self, write: Callable[[str], Any], progress: Callable[[dict[str, Any]], None] | None) -> TrainResult:
        began, recipe = time.monotonic(), self.recipe
        average: float | None = None
        best, best_sha, stopped, pseudo_dice = Best(), "", False, tuple[float, ...]()
        best_path, final_path = self.out / "best.safetensors", self.out / "final.safetensors"
        for epoch in range(recipe.epochs):
            epoch_began = time.monotonic()
            rate = poly_learning_rate(epoch, recipe.epochs, recipe.learning_rate, recipe.poly_exponent)
            train_loss = self.train_epoch(epoch, rate)
            per_second = recipe.iterations_per_epoch / max(time.monotonic() - epoch_began, 1e-9)
            val_loss, pseudo_dice = self.validate_epoch(epoch)
            average = moving_average(average, _mean(pseudo_dice), recipe.moving_average)
            improved = best.after(epoch, average)
            if improved is not best:
                best = improved
                best_sha = save_weights(self.network, best_path, {"seed": self.seed, "epoch": epoch, "moving_average": average})
            line = {
                "epoch": epoch,
                "epochs": recipe.epochs,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "pseudo_dice": [_or_none(value) for value in pseudo_dice],
                "moving_average": average,
                "learning_rate": rate,
                "seconds": round(time.monotonic() - epoch_began, 3),
                "steps_per_second": round(per_second, 3),
            }
            write(json.dumps(line, allow_nan=False) + "\n")
            if progress is not None:
                progress(line)
            if recipe.early_stopping != "off" and should_stop(best, epoch, recipe.early_stopping.patience_epochs):
                stopped = epoch + 1 < recipe.epochs
                break
        about = {"seed": self.seed, "epoch": epoch, "moving_average": average}
        final_sha = save_weights(self.network, final_path, about)
        if best.epoch < 0:
            best, best_sha = Best(epoch=epoch), save_weights(self.network, best_path, about)
        dice = tuple(_or_none(value) for value in pseudo_dice)
        seconds = time.monotonic() - began
        return TrainResult(final_path, best_path, final_sha, best_sha, epoch + 1, best.epoch, average, dice, seconds, stopped)

    def train_epoch(self, epoch: int, rate: float) -> float:
        """One epoch of steps at one learning rate; the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        steps = self.recipe.iterations_per_epoch
        first, total = epoch * steps, 0.0
        batches = ahead(lambda step: make_batch(self.cases, self.sampling, TRAIN_STREAM, step), range(first, first + steps), self.workers)
        for number, (image, target) in enumerate(batches):
            self.optimizer.zero_grad(set_to_none=True)
            with self.precision():
                outputs = self.network(image.to(self.device, non_blocking=True))
            loss = self.loss(outputs, target.to(self.device, non_blocking=True))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise CaseError(
                    f"training diverged: the loss is {value} in epoch {epoch}, step {number}; "
                    "check the images for NaN, or lower training.learning_rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip)
            self.optimizer.step()
            total += value
        return total / steps

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
            for image, labels in batches:
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


def _sgd(parameters: Iterator[nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(parameters, recipe.learning_rate, recipe.momentum, 0, recipe.weight_decay, nesterov, fused=True)


def _adamw(parameters: Iterator[nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter], TrainingRecipe], torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def _check(cases: Sequence[TrainingCase], training: TrainingRecipe, seed: int, validates: bool) -> None:
    if not cases:
        raise InputError("there is no training case; check the split")
    if seed < 0:
        raise InputError(f"the seed is {seed}; use a whole number from 0 on")
    if training.early_stopping != "off" and not validates:
        raise InputError("training.early_stopping needs validation cases and validation_iterations above 0; give both or set it to 'off'")
    if training.early_stopping != "off" and training.early_stopping.patience_epochs >= training.epochs:
        patience = training.early_stopping.patience_epochs
        said = f"early stopping with a patience of {patience} epochs cannot act in a training of {training.epochs}"
        warnings.warn(said, TrainingWarning, stacklevel=2)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads inside the block: results depend on it, so it never comes from the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
