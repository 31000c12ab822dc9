"""Changes of a patch's values, in place: noise, blur, brightness, contrast, low resolution, gamma (facts section 6, rows 3-9).

Every function takes tensors on any device and asks nothing back from it. On a CPU the work goes slice by slice, so that it
stays in the cache, and sums do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ichbench.augmentation.draw import AugmentDraw
from ichbench.augmentation.straight import Mix, between, mix, on_cpu

#: below this a range or a spread counts as this, as in nnU-Net
TINY = 1e-7
#: far above the smallest numbers of float32, with which computing is slow
SMALL = 1e-35
#: a mean square this many times the variance is too far from 0 to subtract the mean's square from it in float32
FAR = 1e3
#: voxels worked on at once on a CPU
IN_CACHE = 2**17
#: voxels whose noise is drawn at once: where rows are no multiple of 16 long, the field depends on it
NOISE_BLOCK = 2**16


def change_intensity(image_czyx: Tensor, draw: AugmentDraw) -> None:
    """Apply what was drawn, in nnU-Net's order, to a contiguous float32 tensor.

    Mirroring, the last of nnU-Net's steps, is here already done: all of these commute with it but the choice of voxels
    that low resolution keeps, which looks at the draw for that.
    """
    if draw.noise_sd is not None:
        add_noise(image_czyx, draw.noise_sd, draw.noise_seed)
    for channel, sigmas in zip(image_czyx, draw.blur_sigma_zyx, strict=False):
        if sigmas is not None:
            blur(channel, sigmas)
    for channel, factor in zip(image_czyx, draw.brightness, strict=False):
        channel.mul_(factor)
    for channel, factor in zip(image_czyx, draw.contrast, strict=False):
        change_contrast(channel, factor)
    for channel, share in zip(image_czyx, draw.low_resolution, strict=False):
        if share is not None:
            lower_resolution(channel, share, draw.in_plane, draw.mirror_zyx)
    for channel, exponent in zip(image_czyx, draw.gamma_inverted, strict=False):
        change_gamma(channel, exponent, inverted=True)
    for channel, exponent in zip(image_czyx, draw.gamma, strict=False):
        change_gamma(channel, exponent, inverted=False)


def add_noise(image: Tensor, sd: float, seed: int) -> None:
    """Independent normal noise in every voxel; the same seed gives the same field on the same kind of device."""
    generator = torch.Generator(image.device)
    generator.manual_seed(seed)
    for block in _blocks(image, NOISE_BLOCK):
        block.add_(torch.empty_like(block).normal_(generator=generator), alpha=sd)


def gaussian_kernel(sigma: float) -> NDArray[np.float64]:
    """Normalised Gaussian of the odd width nearest to 6 sigma + 1/2 (nnU-Net's rule); sigma 0: the value itself."""
    width = _nearest_odd(6 * sigma + 0.5) if sigma > 0 else 1
    steps = np.arange(width) - (width - 1) / 2
    weights = np.exp(-0.5 * (steps / max(sigma, TINY)) ** 2)
    return np.asarray(weights / weights.sum())


def blur(volume_zyx: Tensor, sigma_zyx: Sequence[float]) -> None:
    """Gaussian blur along each axis, reflecting at the borders (without repeating the outermost voxel)."""
    mix(volume_zyx[None], [_blurring(*pair) for pair in zip(sigma_zyx, volume_zyx.shape, strict=True)], volume_zyx[None])


def change_contrast(volume: Tensor, factor: float) -> None:
    """(v - mean) factor + mean, kept within the old ends."""
    blocks = _blocks(volume)
    ends, sums = zip(*((torch.aminmax(block), block.sum(1)) for block in blocks), strict=True)
    (low, high), mean = _ends(ends), _total(sums) / volume.numel()
    move = (mean * (1 - factor)).to(volume.dtype)
    for block in blocks:
        _within(_scale(block, factor, move), low, high)


def lower_resolution(volume_zyx: Tensor, share: float, in_plane: bool, mirror_zyx: Sequence[bool]) -> None:
    """Keep round(length x share) voxels of each axis, those nearest to evenly spread places, and interpolate linearly.

    in_plane    every slice is kept; mirror_zyx: the patch was flipped there, and ties between two voxels fall to the other one
    """
    steps = []
    for axis, length in enumerate(volume_zyx.shape):
        number = length if in_plane and axis == 0 else max(1, round(length * share))
        kept = _kept(length, number, mirror_zyx[axis])
        # where a voxel lies among the kept ones, half a voxel being the outer border of both
        place = np.maximum((np.arange(length) + 0.5) * number / length - 0.5, 0)
        below = np.floor(place).astype(np.int64)
        steps.append(between(kept[below], kept[np.minimum(below + 1, number - 1)], place - below))
    mix(volume_zyx[None], steps, volume_zyx[None])


def change_gamma(volume: Tensor, exponent: float, inverted: bool) -> None:
    """((v - min)/range)^exponent between the old ends, then the old mean and standard deviation again; `inverted`: of -v."""
    blocks = _blocks(volume)
    # all that is asked of a block is asked while it is in the cache
    ends, sums = zip(*((torch.aminmax(block), _sums(block)) for block in blocks), strict=True)
    (low, high), (mean, old) = _ends(ends), _moments(blocks, sums)
    width = (high - low).double()
    # powers are taken as 2^(exponent log2 v), six times faster than pow
    start = high if inverted else -low
    octaves = (width.clamp(min=TINY).log2() * -exponent).to(volume.dtype)
    # the logarithm of 0 is ten times slower than others, and a clipped CT is full of it: a number whose power is still
    # nothing (2^-80 of the range) stands for it, where float32 has one
    least = _known((width * 2 ** (-80 / exponent)).clamp(min=SMALL)) if 80 / exponent < 110 else 0.0
    powers = []
    for block in blocks:
        raised = _scale(block, -1.0 if inverted else 1.0, start)
        _scale(raised.clamp_(min=least).log2_(), exponent, octaves).exp2_()
        powers.append(_sums(block))
    now, spread = _moments(blocks, powers)
    # the power's standard deviation is in units of the range
    factor = width * old / (width * spread).clamp(min=TINY) * (-1 if inverted else 1)
    scale, move = _known(factor), (mean - factor * now).to(volume.dtype)
    for block in blocks:
        _scale(block, scale, move)


def _within(block: Tensor, low: Tensor, high: Tensor) -> None:
    if on_cpu(block):
        block.clamp_(float(low), float(high))
    else:
        block.clamp_(low, high)


def _scale(block: Tensor, factor: float | Tensor, move: Tensor) -> Tensor:
    """block * factor + move, in place; in one pass where the factor is known. `move` has the block's type."""
    if isinstance(factor, Tensor):
        return block.mul_(factor).add_(move)
    return torch.add(move, block, alpha=factor, out=block)


def _blurring(sigma: float, length: int) -> Mix:
    """A blur along an axis of `length` voxels, reflected about its outermost ones for ever."""
    kernel = gaussian_kernel(sigma) if length > 1 else np.ones(1)
    period = max(1, 2 * (length - 1))
    index = (np.arange(length)[:, None] + np.arange(len(kernel)) - len(kernel) // 2) % period
    return Mix(np.minimum(index, period - index), np.broadcast_to(kernel, index.shape))


def _nearest_odd(value: float) -> int:
    below = 2 * math.floor((value - 1) / 2) + 1
    # the middle between two odd numbers goes up
    return below + 2 if value - below >= 1 else below


def _kept(length: int, number: int, backwards: bool) -> NDArray[np.int64]:
    """Which of `length` voxels are kept: those under the middles of `number` equal parts (torch's nearest-exact, in float32)."""
    middles = (np.arange(number, dtype=np.float32) + np.float32(0.5)) * np.float32(length / number)
    index = np.minimum(np.floor(middles).astype(np.int64), length - 1)
    return np.ascontiguousarray((length - 1 - index)[::-1]) if backwards else index


def _blocks(volume: Tensor, voxels: int = IN_CACHE) -> Sequence[Tensor]:
    """Views of whole rows that make up a contiguous tensor."""
    rows = volume.flatten(0, -2)
    return torch.split(rows, max(1, voxels // rows.shape[1])) if on_cpu(volume) else [rows]


def _sums(block: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and root of the sum of squares of every row. Rows come first: the order is then the same for any number of threads."""
    return block.sum(1), torch.linalg.vector_norm(block, dim=1)


def _total(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(rows)).double().sum()


def _ends(blocks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The least and the highest of the blocks' ends."""
    lows, highs = zip(*blocks, strict=True)
    return torch.stack(lows).amin(), torch.stack(highs).amax()


def _moments(blocks: Sequence[Tensor], sums: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1 below the sum), float64, from the `_sums` of blocks."""
    count = sum(block.numel() for block in blocks)
    mean = _total([row for row, _ in sums]) / count
    squares = torch.cat([norm for _, norm in sums]).double().square().sum()
    variance = (squares / count - mean**2).clamp(min=0)
    if on_cpu(blocks[0]) and bool(squares > FAR * count * variance):
        # far from 0 the difference of two large numbers says little
        middle = float(mean)
        variance = torch.cat([torch.linalg.vector_norm(block - middle, dim=1) for block in blocks]).double().square().sum() / count
    return mean, (variance * (count / max(1, count - 1))).sqrt()


def _known(value: Tensor) -> float | Tensor:
    """A number where asking for it costs nothing, and the tensor where it would stop the device."""
    return float(value) if on_cpu(value) else value
