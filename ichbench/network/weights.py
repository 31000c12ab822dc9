"""Weights on disk: safetensors beside a JSON manifest that holds their sha256. No pickle is read or written.

`final.safetensors` comes with `final.json`: {"sha256": ..., "tensors": {name: shape}, "about": {...}}. The digest is
checked before a byte of the weights is parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor, nn

from ichbench.cases.files import write_atomically
from ichbench.errors import InputError

#: parameters that stay behind in fine-tuning
HEADS = "heads."


def save_weights(network: nn.Module, path: Path, about: dict[str, Any] | None = None) -> str:
    """Write the network's parameters to `path` (*.safetensors) and the manifest beside it; returns the sha256.

    Each file appears whole or not at all. `about` is any JSON that describes them (seed, epoch).
    """
    return save_tensors(network.state_dict(), path, about)


def save_tensors(named: Mapping[str, Tensor], path: Path, about: dict[str, Any] | None = None) -> str:
    """The same for parameters by name."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    data = format_safetensors(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    manifest = {"sha256": sha256, "tensors": {name: list(value.shape) for name, value in tensors.items()}, "about": about or {}}
    write_atomically(path, data)
    write_atomically(manifest_path(path), (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    return sha256


def load_weights(network: nn.Module, path: Path) -> dict[str, Any]:
    """Fill `network` from `path` and return the manifest's `about`.

    Raises InputError for a missing or unreadable file, a digest that does not match, or weights of another network.
    """
    tensors, about = read_weights(path)
    own = network.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys())
    if wrong:
        more = f" and {len(wrong) - 1} more names" if wrong[1:] else ""
        raise InputError(f"{path}: these weights belong to another network: {wrong[0]!r}{more} do not match the plan")
    for name, value in sorted(tensors.items()):
        if value.shape != own[name].shape:
            raise InputError(f"{path}: {name} has shape {tuple(value.shape)}, but the plan's network has {tuple(own[name].shape)}")
    network.load_state_dict(tensors)
    return about


def start_from(network: nn.Module, path: Path) -> None:
    """Fill `network` with all that `path` holds but the heads, to fine-tune it.

    The heads keep what they were drawn as: labels differ from task to task (nnU-Net's -pretrained_weights, facts section 8).
    Raises InputError with the list of names and shapes where the two networks are not the same.
    """
    tensors, _ = read_weights(path)
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(HEADS)}
    given = {name: value for name, value in tensors.items() if not name.startswith(HEADS)}
    wrong = [f"{name}: the plan's network has it, the weights do not" for name in sorted(own.keys() - given.keys())]
    wrong += [f"{name}: the weights have it, the plan's network does not" for name in sorted(given.keys() - own.keys())]
    wrong += [
        f"{name}: shape {tuple(given[name].shape)} in the weights, {tuple(own[name].shape)} in the plan's network"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    if wrong:
        listed = "".join(f"\n  {line}" for line in wrong)
        raise InputError(
            f"{path}: {len(wrong)} of {len(own)} tensors do not fit, so nothing was loaded; plan the same network "
            f"(family, features, kernels, strides, input channels) as these weights were trained with{listed}"
        )
    network.load_state_dict(given, strict=False)


def weights_digest(path: Path) -> str:
    """sha256 of a file of weights; InputError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {error.strerror or error}; give a *.safetensors file") from None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, about), after the digest was found right. Raises InputError."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        data = path.read_bytes()
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the weights {path} and their manifest {manifest_path(path).name}: {error}") from None
    expected = manifest.get("sha256") if isinstance(manifest, dict) else None
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise InputError(f"{path}: sha256 is {found}, but its manifest says {expected}; it was damaged or replaced: train again")
    try:
        tensors = parse_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a safetensors file: {error}") from None
    return {name: value.to(torch.float32) for name, value in tensors.items()}, dict(manifest.get("about", {}))


def manifest_path(path: Path) -> Path:
    """final.safetensors -> final.json"""
    return path.with_suffix(".json")
