"""Logits of a whole image from a network that was trained on patches.

Tiles overlap and are averaged with a Gaussian weight that favours their middle (facts section 9). Instance norm makes a
network's answer depend on the patch it sees, so every tile has exactly the plan's patch size: a smaller image is
padded with 0 about its centre, and the padding is cut off again.

Sums are kept in float32. nnU-Net keeps them in half precision, which rounds the logits of each tile (in a patch's corners,
where its weight is 6e-8, to a few steps); `compatibility = "nnunet"` does the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from ichbench.errors import CaseError, InputError
from ichbench.network.compiled import Compiled, compiled_network
from ichbench.network.fast import fast_network, has_kernels, trim
from ichbench.network.unet import UNet
from ichbench.recipe import InferenceRecipe, check_precision

#: slices of a 2D network that go through it together; more saves nothing on a CPU
SLICES_AT_ONCE = 8
#: batches of tiles with at most so many voxels go through the network in pairs, larger ones alone: two tiles need twice the memory
#: for activations. See `_forward` for why a pair is faster: 4.1 times on a CPU at 16 x 128 x 128 voxels and 8 features, but 0.97
#: times at 32 features, and 1.0 to 1.14 times from 32 x 128 x 128 to 128 x 128 x 128 voxels
PAIR_VOXELS = 2**18
#: a lone volume of fewer elements is worth doubling; see `_forward`
SMALL_ELEMENTS = 2**18

Network = nn.Module | Callable[[Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def half_weights(patch_size: Sequence[int]) -> Tensor:
    """The same as nnU-Net has it: scipy's filter on a single 1, largest 10, float16; what became 0 gets the smallest other value."""
    weights = np.ones(())
    for patch in patch_size:
        line = np.zeros(patch)
        line[patch // 2] = 1
        weights = weights[..., None] * ndimage.gaussian_filter1d(line, patch / 8, mode="constant")
    half = torch.from_numpy(np.asarray(weights / (weights.max() / 10))).to(torch.float16)
    half[half == 0] = half[half != 0].min()
    return half


def predict_logits(
    network: Network,
    image_czyx: NDArray[np.float32],
    plan: PatchPlan,
    recipe: InferenceRecipe,
    device: str = "cpu",
    name: str = "image",
) -> NDArray[np.floating]:
    """Logits (heads, z, y, x) of a prepared image, averaged over tiles and, with `recipe.mirror`, mirrorings.

    float32, or float16 with `compatibility = "nnunet"`. The network must be on `device`. A 2D plan predicts every slice for
    itself. Raises CaseError, with `name`, when a logit is not finite.
    """
    if image_czyx.ndim != 4 or min(image_czyx.shape) < 1:
        raise InputError(f"{name}: expected an image (channels, z, y, x), got shape {image_czyx.shape}")
    if isinstance(network, nn.Module):
        network.eval()
    if isinstance(network, UNet) and recipe.convolution == "compiled":
        network = compiled_network(network)
    elif isinstance(network, UNet) and is_fast(recipe, device):
        network = fast_network(network)
    flips = mirrorings(recipe.mirror, plan.dims)
    try:
        with torch.inference_mode(), _precision(recipe, device):
            logits = _logits(network, torch.from_numpy(np.ascontiguousarray(image_czyx, dtype=np.float32)).to(device), plan, recipe, flips)
            if not all(bool(torch.isfinite(head).all()) for head in logits):
                half = ", or for logits beyond 65504 / 10, the end of half precision" if recipe.compatibility == "nnunet" else ""
                raise CaseError(
                    f"{name}: the network gave a logit that is not finite; check the image for NaN and the training for divergence{half}"
                )
            return np.ascontiguousarray(logits.cpu().numpy())
    except MemoryError as error:
        shape = " x ".join(map(str, image_czyx.shape[1:]))
        raise CaseError(f"{name}: there is not enough memory to predict an image of {shape} voxels") from error
    finally:
        trim()


def _logits(network: Network, image: Tensor, plan: PatchPlan, recipe: InferenceRecipe, flips: Sequence[tuple[int, ...]]) -> Tensor:
    """(c, z, y, x) -> (heads, z, y, x)."""
    if recipe.compatibility == "nnunet":
        return _one_by_one(network, image, plan, recipe, flips)
    if plan.dims == 2:
        # slices are the batch: (z, c, y, x) in and out
        parts = [_tiled(network, part, plan.patch_size, recipe, flips) for part in torch.split(image.movedim(1, 0), SLICES_AT_ONCE)]
        return torch.cat(parts).movedim(0, 1)
    return _tiled(network, image[None], plan.patch_size, recipe, flips)[0]


def mirrorings(mirror: str | bool | tuple[int, ...], dims: int) -> list[tuple[int, ...]]:
    """Every set of axes to flip, in the order in which nnU-Net sums them: none, single axes, pairs, all.

    Axes count from the end of the array (-dims to -1), so that batch and channel axes do not matter.
    """
    if isinstance(mirror, str):
        raise InputError(f"inference.mirror = {mirror!r} hangs on the training; take `Recipe.prediction()`, or name the axes")
    axes = tuple(range(dims)) if mirror is True else tuple(sorted(set(mirror or ())))
    if axes and axes[-1] >= dims:
        raise InputError(f"inference.mirror names the axes {list(axes)}, but a {dims}D network has the axes {list(range(dims))}")
    return [tuple(axis - dims for axis in some) for count in range(len(axes) + 1) for some in itertools.combinations(axes, count)]


def is_fast(recipe: InferenceRecipe, device: str) -> bool:
    """Whether convolutions go by Winograd, whose sums need single precision; nnU-Net's are direct."""
    asked = recipe.convolution == "winograd" and recipe.compatibility != "nnunet"
    return asked and recipe.precision == "fp32" and torch.device(device).type == "cpu"


def gains_from_pairs(network: Network) -> bool:
    """Whether two volumes at a time may be faster than one; not where they need not go through torch's convolutions."""
    return not (isinstance(network, Compiled) or (isinstance(network, nn.Module) and has_kernels(network)))


def _precision(recipe: InferenceRecipe, device: str) -> Any:
    kind = torch.device(device).type
    check_precision(recipe, device)
    if recipe.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=DTYPES[recipe.precision])


def _one_by_one(network: Network, image: Tensor, plan: PatchPlan, recipe: InferenceRecipe, flips: Sequence[tuple[int, ...]]) -> Tensor:
    """(c, z, y, x) -> (heads, z, y, x) float16 in nnU-Net's order of operations: a tile alone, weighted, added, rounded."""
    padded, inner = _padded(image, plan.patch_size)
    window: Any = half_weights(plan.patch_size).to(image.device) if recipe.gaussian else 1
    total = torch.zeros(())
    weights = torch.zeros(padded.shape[1:], dtype=torch.float16, device=image.device)
    for tile in _tiles(padded.shape[1:], plan.patch_size, recipe.tile_step):
        # what lies before the tile's own axes: the slices of a 2D network, else nothing
        for lead in range(len(padded[0])) if plan.dims == 2 else (Ellipsis,):
            where = (lead, *tile[1:])
            patch = padded[(slice(None), *where)][None].contiguous()
            answer = _mirrored(network, patch, flips)[0]
            if total.ndim == 0:
                total = torch.zeros((len(answer), *padded.shape[1:]), dtype=torch.float16, device=image.device)
            # the product keeps the answer's precision; the sum is rounded to half at every tile
            total[(slice(None), *where)] += answer * window
            weights[where] += window
    return (total.div_(weights))[inner]


def _tiled(
    network: Network, images: Tensor, patch_size: Sequence[int], recipe: InferenceRecipe, flips: Sequence[tuple[int, ...]]
) -> Tensor:
    """(batch, c, *spatial) -> (batch, heads, *spatial)."""
    images, inner = _padded(images, patch_size)
    tiles = list(_tiles(images.shape[2:], patch_size, recipe.tile_step))
    if len(tiles) == 1:
        return _forward(network, images, flips)[inner]
    window = gaussian_weights(patch_size) if recipe.gaussian else np.ones(tuple(patch_size), dtype=np.float32)
    weight = torch.from_numpy(window).to(images.device)
    total = torch.zeros(())
    weights = torch.zeros(images.shape[2:], device=images.device)
    samples = len(images)
    at_once = 2 if samples * math.prod(patch_size) <= PAIR_VOXELS and gains_from_pairs(network) else 1
    for first in range(0, len(tiles), at_once):
        some = tiles[first : first + at_once]
        answers = _forward(network, torch.cat([images[tile] for tile in some]), flips)
        if total.ndim == 0:
            total = torch.zeros((samples, answers.shape[1], *images.shape[2:]), device=images.device)
        for tile, answer in zip(some, torch.split(answers, samples), strict=True):
            total[tile] += answer * weight
            weights[tile[1:]] += weight
    # in place: a whole-body scan's logits are gigabytes
    return total.div_(weights)[inner]


def _padded(images: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, tuple[Any, ...]]:
    """Zeros about the last axes up to the patch size (an odd voxel at the end), and the index that cuts them off again."""
    shape = images.shape[images.ndim - len(patch_size) :]
    before = [max(0, patch - length) // 2 for length, patch in zip(shape, patch_size, strict=True)]
    after = [max(0, patch - length) - b for length, patch, b in zip(shape, patch_size, before, strict=True)]
    if any(after):
        images = torch.nn.functional.pad(images, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
    return images, (..., *(slice(b, b + length) for b, length in zip(before, shape, strict=True)))


def _tiles(shape: Sequence[int], patch_size: Sequence[int], tile_step: float) -> Iterator[tuple[Any, ...]]:
    """An index (..., *spatial slices) for every tile."""
    spatial = shape[len(shape) - len(patch_size) :]
    starts = [tile_starts(length, patch, tile_step) for length, patch in zip(spatial, patch_size, strict=True)]
    for corner in itertools.product(*starts):
        yield Ellipsis, *(slice(start, start + patch) for start, patch in zip(corner, patch_size, strict=True))


def _mirrored(network: Network, x: Tensor, flips: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean over mirrorings, summed in the network's own precision."""
    total = network(x)
    for axes in flips[1:]:
        total = total + network(x.flip(axes)).flip(axes)
    return total / len(flips) if len(flips) > 1 else total


def _forward(network: Network, x: Tensor, flips: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean over mirrorings, summed in float32."""
    # torch hands a lone small volume to a plain loop that takes ten times as long as oneDNN, which it uses from two on
    lone = x.shape[0] == 1 and x.ndim == 5 and x.device.type == "cpu" and x.numel() < SMALL_ELEMENTS and gains_from_pairs(network)
    at_once = 2 if lone else 1
    total: Tensor | None = None
    for first in range(0, len(flips), at_once):
        some = flips[first : first + at_once]
        batch = torch.cat([x.flip(axes) for axes in some]) if len(some) > 1 else x.flip(some[0])
        if lone and len(some) == 1:
            batch = torch.cat([batch, batch])
        for axes, answer in zip(some, torch.split(network(batch).float(), len(x)), strict=False):
            total = answer.flip(axes) if total is None else total + answer.flip(axes)
    if total is None:
        raise InputError("there is no mirroring to predict with")
    return total / len(flips)
