"""Training: epochs of patches, losses and pseudo-Dice logged as JSON lines, weights as safetensors (facts section 8).

An unfinished training goes on from its last checkpoint when it is started again, and ends with the bits of an unbroken one:
a batch depends on (seed, stream, step) alone, so step, weights and optimizer are all the state there is.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ichbench.augmentation.batches import Sampling, ahead, make_batch, training_sampling
from ichbench.augmentation.patches import TRAIN_STREAM, VALIDATION_STREAM, TrainingCase, choose_cases
from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.compute import ONE_CORE, Compute, computing
from ichbench.errors import CaseError, InputError
from ichbench.network.compiled import Compiled
from ichbench.network.losses import LOSSES, Loss, Supervision, supervised
from ichbench.network.norm import averages_kept
from ichbench.network.unet import Topology, UNet, make_unet
from ichbench.network.weights import save_tensors, start_from, weights_digest
from ichbench.recipe import NetworkRecipe, TrainingRecipe
from ichbench.training import checkpoint as disk
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
from ichbench.training.keeper import Keeper, signals
from ichbench.training.logs import LogFile, Sink, Tick, epoch_line, open_log
from ichbench.training.optimizers import OPTIMIZERS, optimizer_tensors, restore_optimizer
from ichbench.training.parallel import ALONE, Team
from ichbench.training.schedule import Position, moving_average, poly_learning_rate, should_stop
from ichbench.training.supervision import count_hits, dice_of, make_supervision

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
    compute: Compute = ONE_CORE,
    progress: Sink | None = None,
    *,
    rules: LabelRules | None = None,
    team: Team = ALONE,
    saving: Saving = DEFAULT_SAVING,
    pretrained: Path | None = None,
    overwrite: bool = False,
    extend: bool = False,
    digests: Mapping[str, str] | None = None,
    tick: Tick | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> TrainResult:
    """Train a U-Net; write `log.jsonl`, `final.safetensors` and `best.safetensors` (with manifests) into `out`.

    `log.jsonl` has one line per epoch (`logs.epoch_line`): epoch, epochs, train_loss, val_loss, pseudo_dice (one per label or
    region), moving_average, learning_rate, and what was measured (`logs.MEASURED`); `progress` receives the same. A value that
    does not exist (no validation, no foreground seen) is null. The same seed and `compute` on the
    same machine give the same weights (on a GPU if it is deterministic).
    `rules` say what the outputs stand for; by default one label each, background first. Every process of a `team` calls this with
    the same arguments; the one that leads writes, all return the same.
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
    if overwrite and extend:
        raise InputError("overwrite removes the training that extend would give more epochs; leave one of them out")
    rules = plain_rules(plan.n_classes) if rules is None else rules
    supervision = make_supervision(rules, plan.n_classes, plan.batch_dice, training)
    if team.size > 1 and network.norm == "batch":
        raise InputError("network.norm = 'batch' needs the whole batch in one process; use 'instance', or train without torchrun")
    if team.size > 1 and "topk" in training.loss:
        raise InputError(
            f"training.loss = {training.loss!r} takes the hardest tenth of a whole batch, which no process sees; "
            "use 'dice_ce', or train without torchrun"
        )
    if team.size > 1:
        supervision = replace(supervision, pooled=team.pooled)
    started = None if pretrained is None else weights_digest(pretrained)
    identity = identity_of(plan, network, training, seed, cases, validation_cases, digests, started) | {"labels": rules.to_json()}
    checkpoints = out / "checkpoints" if saving.folder is None else saving.folder
    with computing(compute):
        # what cannot be built is known before anything is touched
        run = _Run(cases, validation_cases, plan, network, training, seed, compute, supervision, team)
        if pretrained is not None:
            start_from(run.network, pretrained)
        if not team.leads:
            return run.follow(checkpoints)
        with open_folder(out, checkpoints, identity, overwrite, extend) as opened:
            if opened.result is not None:
                say(f"{out} holds this training, finished; it is not trained again")
                team.told(("finished", result := read_finished(out, opened.result)))
                return result
            now, grown = environment_of(compute, team.size), False
            if (found := disk.load_checkpoint(checkpoints)) is not None:
                # an extended training's checkpoint still names its old length
                grown = found.state["identity"].get(EPOCHS) in opened.earlier
                refuse_other(str(checkpoints), found.state["identity"] | ({EPOCHS: identity[EPOCHS]} if grown else {}), identity)
                warn_of_changes(found.state["environment"], now)
                run.restore(found, grown)
                say(f"going on from the checkpoint {found.place.name}: epoch {run.at.epoch + 1}, {run.at.step} steps of it done")
            team.told(("go", grown))
            write_mark(out, opened, now)
            about = {"seed": seed} | ({} if started is None else {"pretrained": started})
            with open_log(out / LOG, run.at.log) as log, signals() as run.stop:
                run.keeper = Keeper(checkpoints, saving, {"identity": identity, "environment": now}, run.stop)
                run.to_the_end(log, progress, tick)
                team.told(("done", result := run.write(out, about)))
            write_mark(out, replace(opened, result=result_table(result)), now)
            disk.clear(checkpoints, 1 if saving.keep else 0)
            if run.stop.is_set() and saving.keep:
                # the training is whole; what would follow it was asked to stop (a study publishes it first)
                raise KeyboardInterrupt
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
        compute: Compute,
        supervision: Supervision,
        team: Team,
    ) -> None:
        self.cases = choose_cases(cases, training.cases, seed)
        self.validation_cases = validation_cases if training.validation_iterations else []
        self.plan, self.recipe, self.device = plan, training, torch.device(compute.device)
        # a plan of nnU-Net's kind says which channels are normalised inside the head alone; neighbouring slices repeat the channels
        masked = tuple(getattr(plan, "use_mask_for_norm", ()))
        channels = cases[0].image_czyx.shape[0]
        masked *= channels // len(masked) if masked else 1
        previous = len(supervision.rules.foreground_labels) if cases[0].previous_zyx is not None else 0
        if channels + previous != plan.in_channels:
            raise InputError(
                f"the cases have {channels} channels and {previous} labels of a first stage; the plan takes {plan.in_channels}"
            )
        self.sampling: Sampling = training_sampling(plan.patch_size, plan.batch_size, training, seed, masked, previous)
        self.team, self.samples = team, team.share(plan.batch_size)
        self.validation_sampling = replace(self.sampling, augment=None)
        self.network: UNet = make_unet(plan, network, seed).to(self.device)
        #: answers as the network does
        self.model: nn.Module = self.network
        if compute.compiles:
            self.model = Compiled(self.network, f"--compile {compute.compiled}", insist=compute.compiled == "yes")
        self.team_model = team.wrapped(self.model)
        self.optimizer = OPTIMIZERS[training.optimizer](self.network.parameters(), training)
        loss: Loss = LOSSES[training.loss]
        self.rules = supervision.rules

        def supervised_loss(outputs: Tensor | list[Tensor], target: Tensor) -> Tensor:
            return supervised(loss, outputs, target, supervision, network.unsupervised_levels)

        self.loss = supervised_loss
        self.workers = GPU_WORKERS if self.device.type == "cuda" else 0

        self.at = Position()
        self.best: dict[str, Tensor] = {}
        self.keeper: Keeper | None = None
        self.stop = threading.Event()

    def restore(self, found: disk.Checkpoint, grown: bool) -> None:
        """Go on from a checkpoint; one that has `grown` was at its end, and is no more."""
        self.network.load_state_dict(disk.named("network", found.tensors))
        restore_optimizer(self.optimizer, found.tensors, found.state["optimizer"])
        self.best = disk.named("best", found.tensors)
        self.at = Position.from_json(found.state["at"])
        if grown:
            self.at.stopped, self.at.extended_at = False, self.at.epoch

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `restore` needs."""
        tensors, plain = optimizer_tensors(self.optimizer)
        tensors |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        return tensors, {"at": self.at.to_json(), "optimizer": plain}

    def follow(self, checkpoints: Path) -> TrainResult:
        """The part of a process that does not lead: the same steps from the same checkpoint, nothing written."""
        nothing: tuple[str, Any] = ("", None)
        word, value = self.team.told(nothing)
        if word == "go":
            if (found := disk.load_checkpoint(checkpoints)) is not None:
                self.restore(found, value)
            with signals() as self.stop:
                self.to_the_end(None, None, None)
            word, value = self.team.told(nothing)
        return value  # type: ignore[no-any-return]

    def between_steps(self, last: bool = False) -> None:
        """A checkpoint, if it is time for one; the end, if a signal came to any process."""
        if self.team.any(self.stop.is_set(), self.device):
            self.stop.set()
        if self.keeper is not None:
            self.keeper.after_step(self, last)
        elif self.stop.is_set() and not last:
            raise KeyboardInterrupt

    def clock(self) -> None:
        if self.keeper is not None:
            self.keeper.clock(self.at)

    def to_the_end(self, log: LogFile | None, progress: Sink | None, tick: Tick | None) -> None:
        # nobody writes a checkpoint before everybody has read the old one
        self.team.wait()
        at, recipe = self.at, self.recipe
        while at.epoch < recipe.epochs and not at.stopped:
            rate = poly_learning_rate(at.epoch, recipe.epochs, recipe.learning_rate, recipe.poly_exponent)
            train_loss = self.train_epoch(at.epoch, rate, tick)
            self.clock()
            train_seconds = at.epoch_seconds
            val_loss, pseudo_dice = self.validate_epoch(at.epoch)
            self.clock()
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
            at.stopped = recipe.early_stopping != "off" and should_stop(
                at.best, at.epoch, recipe.early_stopping.patience_epochs, at.extended_at
            )
            at.epoch, at.step, at.loss_sum, at.epoch_seconds, at.wait_seconds = at.epoch + 1, 0, 0.0, 0.0, 0.0
            if log is not None:
                log.add(line)
            if progress is not None:
                progress(line)
            self.between_steps(last=at.epoch == recipe.epochs or at.stopped)

    def write(self, out: Path, about: dict[str, Any]) -> TrainResult:
        """Final and best weights, and what there is to say about them."""
        at, final, best = self.at, out / "final.safetensors", out / "best.safetensors"
        weights = self.network.state_dict()
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise CaseError("training diverged: a weight is not finite after the last step; lower training.learning_rate")
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
        batches = ahead(lambda step: self.batch(self.cases, self.sampling, TRAIN_STREAM, step), numbers, self.workers)
        for image, target in self.watched(batches, waits=True):
            self.optimizer.zero_grad(set_to_none=True)
            with self.precision():
                outputs = self.team_model(image)
            loss = self.loss(outputs, target)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip)
            self.optimizer.step()
            # asked for last, because a GPU has finished the step by then; weights of a loss that is not finite go no further
            value = float(loss.detach())
            if not math.isfinite(value):
                raise CaseError(
                    f"training diverged: the loss is {value} in epoch {epoch}, step {at.step}; "
                    "check the images for NaN, or lower training.learning_rate"
                )
            at.loss_sum += value
            at.step += 1
            if tick is not None:
                tick(epoch, at.step, steps, value)
            self.between_steps()
        return at.loss_sum / steps

    def batch(self, cases: Sequence[TrainingCase], sampling: Sampling, stream: int, step: int) -> tuple[Tensor, Tensor]:
        """This process's part of a batch, on the device."""
        return make_batch(cases, sampling, stream, step, self.device, self.samples)

    def watched(self, batches: Iterator[tuple[Tensor, Tensor]], waits: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches; the time waited for them is counted, and a signal ends validation between two of them."""
        with contextlib.closing(batches) if isinstance(batches, Generator) else contextlib.nullcontext():
            while True:
                if self.team.size == 1 and self.stop.is_set():
                    self.between_steps()
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
        steps = self.recipe.validation_iterations
        first, total = epoch * steps, 0.0
        counts = np.zeros((len(self.rules.targets), 2))
        cases, sampling = self.validation_cases, self.validation_sampling
        batches = ahead(lambda step: self.batch(cases, sampling, VALIDATION_STREAM, step), range(first, first + steps), self.workers)
        with torch.no_grad(), averages_kept(self.network):
            for image, target in self.watched(batches):
                with self.precision():
                    outputs = self.model(image)
                total += float(self.loss(outputs, target))
                counts += count_hits(outputs if isinstance(outputs, Tensor) else outputs[0], target, self.rules)
        if not math.isfinite(total):
            raise CaseError(
                f"training diverged: the validation loss is {total} after epoch {epoch}; "
                "check the images for NaN, or lower training.learning_rate"
            )
        counts = self.team.summed(torch.from_numpy(counts).to(self.device)).cpu().numpy()
        return total / steps, dice_of(counts)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16")


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
