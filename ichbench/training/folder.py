"""What a training folder is for, and whether it is finished: `training.json`, and a lock.

`training.json` is there from the first moment, sealed with its own sha256. It says which recipe, plan, split, data and seed
the folder belongs to, and once the training is finished how it ended. Nobody's finished training is overwritten unasked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ichbench.augmentation.patches import TrainingCase, TrainingWarning
from ichbench.cases.files import seal, unseal, write_atomically
from ichbench.compute import Compute
from ichbench.errors import InputError
from ichbench.network.weights import weights_digest
from ichbench.overlays import flat
from ichbench.recipe import NetworkRecipe, TrainingRecipe
from ichbench.training.checkpoint import places

MARK, LOG = "training.json", "log.jsonl"
WEIGHTS = ("final.safetensors", "final.json", "best.safetensors", "best.json")
EPOCHS = "training.epochs"
#: differences that are listed by name
SHOWN = 8


@dataclass(frozen=True)
class Saving:
    """How an unfinished training is kept on disk. Nothing here moves a result.

    folder         of the checkpoints; None: OUT/checkpoints
    every_seconds  between checkpoints, but never more than a hundredth of the time is spent on them
    every_steps    instead, after every so many steps
    keep           leave the last checkpoint of a finished training, so that it can be extended
    """

    folder: Path | None = None
    every_seconds: float = 10.0
    every_steps: int | None = None
    keep: bool = True


@dataclass(frozen=True)
class Opened:
    """A folder that may be trained in. `result` is set where it is finished; `earlier` are the lengths (epochs) it had before it
    was extended. `replaced` is the sha256 of the mark that it overwrote, so that a folder never shows one mark twice; `clearing`: what
    else lies there is still the overwritten training's."""

    identity: dict[str, Any]
    earlier: tuple[int, ...] = ()
    result: dict[str, Any] | None = None
    replaced: str | None = None
    clearing: bool = False


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


def check_settings(cases: Sequence[TrainingCase], training: TrainingRecipe, seed: int, validates: bool) -> None:
    """InputError for settings that cannot work, a TrainingWarning for one that cannot act."""
    if not cases:
        raise InputError("there is no training case; check the split")
    if seed < 0:
        raise InputError(f"the seed is {seed}; use a whole number from 0 on")
    if training.early_stopping != "off" and not validates:
        raise InputError("training.early_stopping needs validation cases and validation_iterations above 0; give both or set it to 'off'")
    for said in idle_settings(training):
        warnings.warn(said, TrainingWarning, stacklevel=3)


def idle_settings(training: TrainingRecipe) -> list[str]:
    """A sentence for every setting that says something and cannot act beside the others."""
    said, default = [], TrainingRecipe()
    if training.early_stopping != "off" and training.early_stopping.patience_epochs >= training.epochs:
        patience = training.early_stopping.patience_epochs
        said.append(f"early stopping with a patience of {patience} epochs cannot act in a training of {training.epochs}")
    alone = training.loss not in ("dice_ce", "dice_topk")
    beside = {
        "class_weights": ("loss", training.loss == "dice"),
        "dice_weight": ("loss", alone),
        "ce_weight": ("loss", alone),
        "batch_dice": ("loss", "dice" not in training.loss),
        "momentum": ("optimizer", training.optimizer != "sgd"),
    }
    for name, (other, idle) in beside.items():
        value, cause = getattr(training, name), getattr(training, other)
        if idle and value != getattr(default, name):
            said.append(f"training.{name} = {value!r} does nothing beside training.{other} = {cause!r}")
    return said


def identity_of(
    plan: Any,
    network: NetworkRecipe,
    training: TrainingRecipe,
    seed: int,
    cases: Sequence[TrainingCase],
    validation_cases: Sequence[TrainingCase],
    digests: Mapping[str, str] | None,
    pretrained: str | None,
) -> dict[str, Any]:
    """All that the weights depend on, as {key: JSON value}. Without `digests` of the cases their arrays are hashed here."""
    told = plan.to_json() if hasattr(plan, "to_json") else dataclasses.asdict(plan)
    table = {f"plan.{key}": value for key, value in told.items()}
    table |= flat({"network": network.model_dump(mode="json"), "training": training.model_dump(mode="json")})
    table |= {"seed": seed, "split.train": [case.id for case in cases], "split.validation": [case.id for case in validation_cases]}
    known = {case.id: case for case in [*cases, *validation_cases]}
    table |= {f"data.{name}": _digest(case) if digests is None else digests[name] for name, case in known.items()}
    return json.loads(json.dumps(table | {"pretrained": pretrained}))  # type: ignore[no-any-return]


def environment_of(compute: Compute, processes: int = 1) -> dict[str, Any]:
    """What may move the last bits of a result, and is said when it changes."""
    try:
        own = version("ichbench")
    except PackageNotFoundError:  # pragma: no cover - run from a source tree
        own = ""
    name = torch.cuda.get_device_name(compute.device) if compute.kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    table = {"ichbench": own, "torch": torch.__version__, "numpy": np.__version__, "processes": processes}
    return table | compute.environment() | {"processor": f"{platform.machine()}, {name}"}


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, str]:
    """key -> "was A, is B" for every key in which two identities differ."""
    changed = sorted(key for key in found.keys() | asked.keys() if found.get(key) != asked.get(key))
    return {key: f"{key} was {_short(found.get(key))}, is {_short(asked.get(key))}" for key in changed}


def refuse_other(where: str, found: Mapping[str, Any], asked: Mapping[str, Any], hint: str = "") -> None:
    """InputError that lists the differences, if there are any."""
    changed = list(differences(found, asked).values())
    if changed:
        more = f"\n  and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        listed = "".join(f"\n  {line}" for line in changed[:SHOWN])
        todo = hint or "give the settings that it was made with, another folder, or --overwrite"
        raise InputError(f"{where} belongs to another training; nothing was changed: {todo}{listed}{more}")


def warn_of_changes(found: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say aloud that a training goes on elsewhere: its result is valid, but need not be that of an unbroken run to the last bit."""
    if changed := differences(found, now):
        said = f"the training goes on in another environment ({'; '.join(changed.values())})"
        warnings.warn(f"{said}; the result may differ in its last bits from an unbroken one", TrainingWarning, stacklevel=3)


@contextlib.contextmanager
def open_folder(out: Path, checkpoints: Path, identity: dict[str, Any], overwrite: bool, extend: bool) -> Iterator[Opened]:
    """Hold the folder of a training, after it was found to be new, or this training's own.

    Raises InputError for a folder that another process holds, that cannot be written, that holds another training, or a finished
    one that nothing is known of. With `overwrite` what it holds is removed; with `extend` a finished training may get more epochs.
    """
    if not overwrite:
        _look(out, checkpoints, identity, extend)
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = FileLock(checkpoints / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is training in {out}; wait until it has ended, or give another folder") from None
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}; give a folder that can") from None
    try:
        if overwrite:
            # from this one rename on the folder is the new training's; killed before it, the old one is whole
            mark = out / MARK
            replaced = hashlib.sha256(mark.read_bytes()).hexdigest() if mark.is_file() else None
            write_mark(out, Opened(identity, replaced=replaced, clearing=True))
        opened = _look(out, checkpoints, identity, extend)
        if opened.clearing:
            clear(out, checkpoints)
        yield dataclasses.replace(opened, clearing=False)
    except OSError as error:
        place = error.filename or out
        raise InputError(f"{place}: {error.strerror or error}; see to it and run the same command again, it goes on from there") from None
    finally:
        lock.release()


def write_mark(out: Path, opened: Opened, environment: dict[str, Any] | None = None) -> None:
    """Write `training.json`."""
    table: dict[str, Any] = {"identity": opened.identity, "earlier_epochs": list(opened.earlier), "result": opened.result}
    table |= {"replaced": opened.replaced, "clearing": opened.clearing}
    write_atomically(out / MARK, seal(table | {"environment": environment or {}}))


def read_mark(out: Path) -> dict[str, Any] | None:
    """`training.json`, or None where there is none. InputError for a damaged one."""
    try:
        return unseal(out / MARK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{out / MARK} is damaged ({error}); nothing was changed: remove that file to go on from the checkpoints beside it, "
            "or start anew with --overwrite"
        ) from None


def result_table(result: TrainResult) -> dict[str, Any]:
    """As `training.json` keeps it; the files are where they always are."""
    table = {name: value for name, value in dataclasses.asdict(result).items() if not isinstance(value, Path)}
    return table | {"pseudo_dice": list(result.pseudo_dice)}


def read_finished(out: Path, table: dict[str, Any]) -> TrainResult:
    """The result of a finished training, if its weights are still what they were."""
    final, best = out / "final.safetensors", out / "best.safetensors"
    for path, expected in ((final, table["final_sha256"]), (best, table["best_sha256"])):
        if weights_digest(path) != expected:
            raise InputError(f"{path} is not what the training wrote; nothing was changed: bring it back, or train anew with --overwrite")
    return TrainResult(final, best, **table | {"pseudo_dice": tuple(table["pseudo_dice"])})


def clear(out: Path, checkpoints: Path) -> None:
    """Remove what a training wrote, its mark apart, and nothing else."""
    for place in places(checkpoints):
        shutil.rmtree(place)
    for name in (LOG, *WEIGHTS):
        (out / name).unlink(missing_ok=True)


def _look(out: Path, checkpoints: Path, identity: dict[str, Any], extend: bool) -> Opened:
    """What the folder holds, changing nothing."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder")
    mark = read_mark(out)
    if mark is None:
        there = [name for name in (*WEIGHTS, LOG) if (out / name).exists()]
        if there and not places(checkpoints):
            raise InputError(
                f"{out} holds {there[0]} of a training that nothing else is known of; nothing was changed: "
                "give another folder, or --overwrite"
            )
        if extend:
            raise InputError(f"{out} holds no finished training to extend; train first")
        return Opened(identity)
    earlier, result, found = tuple(mark["earlier_epochs"]), mark["result"], mark["identity"]
    replaced, clearing = mark.get("replaced"), mark.get("clearing", False)
    changed = differences(found, identity)
    if result is not None and extend and set(changed) == {EPOCHS}:
        if identity[EPOCHS] <= found[EPOCHS]:
            raise InputError(f"{out}: was trained for {found[EPOCHS]} epochs; extend it to more than that, not to {identity[EPOCHS]}")
        if not places(checkpoints):
            raise InputError(f"{out}: the last checkpoint is gone, so the training cannot be extended; train anew in another folder")
        return Opened(identity, (*earlier, found[EPOCHS]), None, replaced)
    hint = ""
    if set(changed) == {EPOCHS}:
        if result is None:
            hint = "it is not finished; run it to its end before it is extended"
        elif identity[EPOCHS] > found[EPOCHS]:
            hint = "a finished training gets more epochs with --extend-to"
        else:
            hint = f"it is finished, with more epochs than were asked for; --extend-to {found[EPOCHS]} leaves it as it is"
    refuse_other(str(out), found, identity, hint)
    return Opened(identity, earlier, result, replaced, clearing)


def _digest(case: TrainingCase) -> str:
    digest = hashlib.sha256()
    arrays: list[NDArray[Any]] = [case.image_czyx, case.labels_zyx, *(case.foreground[key] for key in sorted(case.foreground, key=str))]
    if case.previous_zyx is not None:
        arrays.append(case.previous_zyx)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
