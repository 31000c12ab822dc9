"""Linear interpolation one axis at a time: scaling without a turn, and the loss of resolution.

Three to four times faster than reading every voxel at a place of its own, and the same numbers but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

#: slices worked on at once on a CPU
TOGETHER = 4


@dataclass(frozen=True, eq=False)
class LinearStep:
    """Along one axis voxel i is (1 - weight[i]) old[first[i]] + weight[i] old[second[i]]."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    weight: NDArray[np.floating]

    def picks_all(self, length: int) -> bool:
        """Does an axis of this length stay as it is?"""
        return bool(np.all(self.weight == 0)) and np.array_equal(self.first, np.arange(length))


def on_cpu(tensor: Tensor) -> bool:
    """Is the work to be done slice by slice, in the cache, and is asking for a number free? Else all at once, and nothing is asked."""
    return tensor.device.type == "cpu"


def at_places(place: NDArray[np.float64], length: int) -> LinearStep:
    """Read an axis of `length` voxels at these places; beyond its ends the ends go on."""
    inside = np.clip(place, 0, length - 1)
    first = np.floor(inside).astype(np.int64)
    return LinearStep(first, np.minimum(first + 1, length - 1), inside - first)


def interpolate(volume_czyx: Tensor, steps_zyx: Sequence[LinearStep], out_czyx: Tensor) -> None:
    """Fill `out`, which may be the volume itself where the sizes agree. In plane first, on a CPU slice by slice."""
    device = volume_czyx.device
    along_z, along_y, along_x = steps_zyx
    if along_z.picks_all(volume_czyx.shape[1]):
        needed, planes = range(volume_czyx.shape[1]), out_czyx
    else:
        needed = np.unique(np.concatenate([along_z.first, along_z.second])).tolist()
        shape = (len(volume_czyx), len(needed), len(along_y.first), len(along_x.first))
        planes = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu(volume_czyx) else torch.empty(shape, device=device)
    if on_cpu(volume_czyx):
        y, x = _pairs(along_y, volume_czyx.shape[2]), _pairs(along_x, volume_czyx.shape[3])
        for old, new in zip(volume_czyx, planes, strict=True):
            for place in range(0, len(needed), TOGETHER):
                chosen = needed[place : place + TOGETHER]
                slices = old[chosen[0] : chosen[-1] + 1] if chosen[-1] - chosen[0] < len(chosen) else old[chosen]
                new[place : place + TOGETHER] = swapped(_mixed(swapped(_mixed(slices, y)), x))
    else:
        along_last = _along(volume_czyx[:, list(needed)], _on(along_x, device), 3)
        planes.copy_(_along(along_last, _on(along_y, device), 2))
    if planes is not out_czyx:
        index = {z: place for place, z in enumerate(needed)}
        for z, (first, second, weight) in enumerate(zip(along_z.first, along_z.second, along_z.weight, strict=True)):
            out_czyx[:, z] = torch.lerp(planes[:, index[int(first)]], planes[:, index[int(second)]], float(weight))


def swapped(slices: Tensor) -> Tensor:
    """A copy of contiguous (n, h, w) float32 on the CPU as (n, w, h).

    Shuffling channels is, for what lies channels last, nothing else, and torch's fastest way by far: 0.2 to 0.4 ns a voxel,
    where `.mT.contiguous()` takes 1 to 1.3.
    """
    n, h, w = slices.shape
    as_channels = slices.as_strided((1, h * w, n, 1), (n * h * w, 1, h * w, h * w))
    return torch.channel_shuffle(as_channels, h).as_strided((n, w, h), (h * w, h, 1))


def _pairs(step: LinearStep, length: int) -> tuple[Tensor, Tensor]:
    """For `TOGETHER` slices of `length` rows one below the other: the two old rows of every new one, and their weights."""
    pair = np.stack([step.first, step.second], 1) + length * np.arange(TOGETHER)[:, None, None]
    weights = np.stack([1 - step.weight, step.weight], 1).astype(np.float32)
    return torch.from_numpy(pair.reshape(-1, 2).astype(np.int32)), torch.from_numpy(np.tile(weights, (TOGETHER, 1)))


def _mixed(slices: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """(n, h, w) -> (n, rows of the pairs, w)."""
    n, _, w = slices.shape
    pair, weights = (part[: n * len(part) // TOGETHER] for part in pairs)
    return F.embedding_bag(pair, slices.reshape(-1, w), mode="sum", per_sample_weights=weights).reshape(n, -1, w)


def _along(volume: Tensor, step: tuple[Tensor, Tensor, Tensor], axis: int) -> Tensor:
    first, second, weight = step
    shape = [-1 if k == axis else 1 for k in range(volume.ndim)]
    return torch.lerp(volume.index_select(axis, first), volume.index_select(axis, second), weight.reshape(shape))


def _on(step: LinearStep, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.from_numpy(step.weight.astype(np.float32))
    return torch.from_numpy(step.first).to(device), torch.from_numpy(step.second).to(device), weight.to(device)
