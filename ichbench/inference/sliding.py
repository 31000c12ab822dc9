"""Logits of a whole image from a network that was trained on patches.

Tiles overlap and are averaged with a Gaussian weight that favours their middle (facts section 9). Instance norm makes a
network's answer depend on the patch it sees, so every tile has exactly the plan's patch size: a smaller image is
padded with 0 about its centre, and the padding is cut off again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ichbench.errors import CaseError, InputError
from ichbench.recipe import InferenceRecipe

#: slices of a 2D network that go through it together; more saves nothing on a CPU
SLICES_AT_ONCE = 8
#: tiles that go through the network together; see `_forward`
TILES_AT_ONCE = 2


class PatchPlan(Protocol):
    """The part of a plan that tiling needs; `patch_size` follows (z, y, x) or (y, x)."""

    @property
    def dims(self) -> int: ...
    @property
    def patch_size(self) -> Sequence[int]: ...


def tile_starts(length: int, patch: int, tile_step: float) -> tuple[int, ...]:
    """Where tiles begin along one axis of `length` >= `patch`: evenly spread, at most patch * tile_step apart."""
    tiles = math.ceil((length - patch) / (patch * tile_step)) + 1
    spread = (length - patch) / max(1, tiles - 1)
    return tuple(round(i * spread) for i in range(tiles))


def gaussian_weights(patch_size: Sequence[int]) -> NDArray[np.float32]:
    """exp(-d^2 / 2 s^2) about voxel patch//2 with s = patch/8 on each axis; the largest is 10, none is 0."""
    weights = np.full((), 10.0)
    for patch in patch_size:
        distance = np.arange(patch) - patch // 2
        weights = weights[..., None] * np.exp(-0.5 * (distance / (patch / 8)) ** 2)
    return np.asarray(np.maximum(weights, np.finfo(np.float32).tiny), dtype=np.float32)


def predict_logits(
    network: nn.Module | Callable[[Tensor], Tensor],
    image_czyx: NDArray[np.float32],
    plan: PatchPlan,
    recipe: InferenceRecipe,
    device: str = "cpu",
    name: str = "image",
) -> NDArray[np.float32]:
    """Logits (classes, z, y, x) float32 of a prepared image, averaged over tiles and, with `recipe.mirror`, mirrorings.

    The network must be on `device`. A 2D plan predicts every slice for itself. Sums are kept in float32 on `device`.
    Raises CaseError, with `name`, when a logit is not finite.
    """
    if image_czyx.ndim != 4 or min(image_czyx.shape) < 1:
        raise InputError(f"{name}: expected an image (channels, z, y, x), got shape {image_czyx.shape}")
    if isinstance(network, nn.Module):
        network.eval()
    with torch.inference_mode():
        image = torch.from_numpy(np.ascontiguousarray(image_czyx, dtype=np.float32)).to(device)
        if plan.dims == 2:
            # slices are the batch: (z, c, y, x) in and out
            image = image.movedim(1, 0)
            parts = [_tiled(network, part, plan.patch_size, recipe) for part in torch.split(image, SLICES_AT_ONCE)]
            logits = torch.cat(parts).movedim(0, 1)
        else:
            logits = _tiled(network, image[None], plan.patch_size, recipe)[0]
        if not bool(torch.isfinite(logits).all()):
            raise CaseError(f"{name}: the network gave a logit that is not finite; check the image for NaN and the training for divergence")
        return np.ascontiguousarray(logits.cpu().numpy())


def _tiled(network: Callable[[Tensor], Tensor], images: Tensor, patch_size: Sequence[int], recipe: InferenceRecipe) -> Tensor:
    """(batch, c, *spatial) -> (batch, classes, *spatial)."""
    shape = images.shape[2:]
    before = [max(0, patch - length) // 2 for length, patch in zip(shape, patch_size, strict=True)]
    after = [max(0, patch - length) - b for length, patch, b in zip(shape, patch_size, before, strict=True)]
    if any(after):
        images = torch.nn.functional.pad(images, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
    tiles = list(_tiles(images.shape[2:], patch_size, recipe.tile_step))
    if len(tiles) == 1:
        logits = _forward(network, images, recipe.mirror)
    else:
        window = gaussian_weights(patch_size) if recipe.gaussian else np.ones(tuple(patch_size), dtype=np.float32)
        weight = torch.from_numpy(window).to(images.device)
        total = torch.zeros(())
        weights = torch.zeros(images.shape[2:], device=images.device)
        samples = len(images)
        for first in range(0, len(tiles), TILES_AT_ONCE):
            some = tiles[first : first + TILES_AT_ONCE]
            answers = _forward(network, torch.cat([images[tile] for tile in some]), recipe.mirror)
            if total.ndim == 0:
                total = torch.zeros((samples, answers.shape[1], *images.shape[2:]), device=images.device)
            for tile, answer in zip(some, torch.split(answers, samples), strict=True):
                total[tile] += answer * weight
                weights[tile[1:]] += weight
        logits = total / weights
    inner: tuple[Any, ...] = (..., *(slice(b, b + length) for b, length in zip(before, shape, strict=True)))
    return logits[inner]


def _tiles(shape: Sequence[int], patch_size: Sequence[int], tile_step: float) -> Iterator[tuple[Any, ...]]:
    """An index (..., *spatial slices) for every tile."""
    starts = [tile_starts(length, patch, tile_step) for length, patch in zip(shape, patch_size, strict=True)]
    for corner in itertools.product(*starts):
        yield Ellipsis, *(slice(start, start + patch) for start, patch in zip(corner, patch_size, strict=True))


def _forward(network: Callable[[Tensor], Tensor], x: Tensor, mirror: bool) -> Tensor:
    """One answer, or the mean over all 2^k mirrorings of the k spatial axes."""
    if x.shape[0] == 1 and x.ndim == 5 and x.device.type == "cpu":
        # torch hands a lone small volume to a plain loop that takes ten times as long as oneDNN, which it uses from two on
        return _forward(network, torch.cat([x, x]), mirror)[:1]
    if not mirror:
        return network(x).float()
    axes = range(2, x.ndim)
    combinations = [flips for count in range(x.ndim - 1) for flips in itertools.combinations(axes, count)]
    total = network(x).float()
    for flips in combinations[1:]:
        total = total + network(x.flip(flips)).float().flip(flips)
    return total / len(combinations)
