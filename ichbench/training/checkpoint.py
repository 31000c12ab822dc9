"""The state of an unfinished training on disk. One checkpoint is one folder, named by epoch and step:

    CHECKPOINTS/000005-000120/tensors.safetensors   weights, optimizer, best weights so far
                              state.json            everything else
                              SHA256SUMS            of both; `sha256sum -c SHA256SUMS` checks them by hand

A checkpoint appears whole or not at all: it is written beside its place, synced, and renamed. The last two are kept. Digests
are compared before a byte is parsed; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from ichbench.augmentation.patches import TrainingWarning
from ichbench.cases.files import sync_folder
from ichbench.errors import InputError

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
#: changes when the files above change their meaning
FORMAT = 1
KEPT = 2
_NAME = re.compile(r"\d{6,}-\d{6,}")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named tensors on the CPU, and `state` as JSON knows it."""

    place: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, epoch: int, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write a checkpoint into `folder` (which exists) and drop all but the last two; returns its place.

    Raises InputError where the disk is full or refuses; then the earlier checkpoints are as they were.
    """
    target = folder / f"{epoch:06d}-{step:06d}"
    part = folder / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        part.mkdir()
        files = {TENSORS: format_safetensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})}
        files[STATE] = json.dumps(state | {"format": FORMAT}, allow_nan=False).encode()
        files[SUMS] = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()
        for name, data in files.items():
            _write_synced(part / name, data)
        sync_folder(part)
        if target.exists():
            # a damaged one that was passed over, or one of a time line that was left
            _discard(target)
        part.rename(target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        kept = [place.name for place in places(folder)] if folder.is_dir() else []
        left = f"the one before it, {kept[0]}, is as it was" if kept else "there is no earlier one"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        said = "the disk is full" if full else f"{error.strerror or error}"
        todo = "free some space" if full else "see that the folder can be written"
        raise InputError(
            f"{folder}: the checkpoint {target.name} (epoch-step) could not be written: {said}; {left}: "
            f"{todo} and run the same command again"
        ) from None
    with contextlib.suppress(OSError):
        _prune(folder, target.name)
    return target


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, or None where there is none at all.

    A damaged one is passed over with a TrainingWarning. Raises InputError where all are damaged; nothing is deleted.
    """
    damaged: list[str] = []
    for place in places(folder):
        try:
            found = read_checkpoint(place)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            damaged.append(f"{place} is damaged ({error})")
            continue
        for text in damaged:
            warnings.warn(f"{text}; going on from the one before it, {found.place.name}", TrainingWarning, stacklevel=2)
        return found
    if damaged:
        raise InputError(
            f"{'; '.join(damaged)}: no whole checkpoint is left. Nothing was deleted; bring the files back from a copy, "
            f"or remove {folder} (ichbench train: --overwrite) to start the training anew"
        )
    return None


def read_checkpoint(place: Path) -> Checkpoint:
    """One checkpoint, its digests compared first. ValueError or OSError where it is damaged."""
    lines = (place / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if set(sums) != {TENSORS, STATE}:
        raise ValueError(f"{SUMS} does not name {TENSORS} and {STATE}")
    data = {}
    for name, expected in sums.items():
        data[name] = (place / name).read_bytes()
        if hashlib.sha256(data[name]).hexdigest() != expected:
            raise ValueError(f"{name} does not have the sha256 that {SUMS} says")
    state = json.loads(data[STATE])
    if state["format"] != FORMAT:
        raise InputError(f"{place} has format {state['format']}, this version reads {FORMAT}; go on with the version that wrote it")
    try:
        tensors = parse_safetensors(data[TENSORS])
    except SafetensorError as error:
        raise ValueError(f"{TENSORS}: {error}") from None
    return Checkpoint(place, tensors, state)


def places(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, damaged ones included, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), reverse=True)


def clear(folder: Path, kept: int) -> None:
    """Remove all but the newest `kept` checkpoints of a finished training."""
    for place in places(folder)[kept:]:
        _discard(place)


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def _prune(folder: Path, newest: str) -> None:
    """Keep this checkpoint and the one before it; what lies ahead belongs to a time line that was left."""
    found = places(folder)
    kept = [place for place in found if place.name <= newest][:KEPT]
    stale = [path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith((".part", ".old"))]
    for place in found:
        if place not in kept:
            _discard(place)
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)


def _discard(place: Path) -> None:
    """Remove a checkpoint so that at no time a part of it looks like one."""
    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.old")
    place.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
