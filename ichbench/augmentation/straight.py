"""Linear interpolation one axis at a time: scaling without a turn, and the loss of resolution.

Three to four times faster than reading every voxel at a place of its own, and the same numbers but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
    y, x = _on(along_y, device), _on(along_x, device)
    if on_cpu(volume_czyx):
        # slice by slice, two axes at a time, for which torch is at its fastest; first the axis that makes the slice smaller
        one, two = ((y, 0), (x, 1)) if len(along_y.first) < volume_czyx.shape[2] else ((x, 1), (y, 0))
        for old, new in zip(volume_czyx, planes, strict=True):
            for place, z in enumerate(needed):
                _along(_along(old[z], *one), *two, out=new[place])
    else:
        planes.copy_(_along(_along(volume_czyx[:, list(needed)], x, 3), y, 2))
    if planes is not out_czyx:
        index = {z: place for place, z in enumerate(needed)}
        for z, (first, second, weight) in enumerate(zip(along_z.first, along_z.second, along_z.weight, strict=True)):
            out_czyx[:, z] = torch.lerp(planes[:, index[int(first)]], planes[:, index[int(second)]], float(weight))


def _along(volume: Tensor, step: tuple[Tensor, Tensor, Tensor], axis: int, out: Tensor | None = None) -> Tensor:
    first, second, weight = step
    shape = [-1 if k == axis else 1 for k in range(volume.ndim)]
    return torch.lerp(volume.index_select(axis, first), volume.index_select(axis, second), weight.reshape(shape), out=out)


def _on(step: LinearStep, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.from_numpy(step.weight.astype(np.float32))
    return torch.from_numpy(step.first).to(device), torch.from_numpy(step.second).to(device), weight.to(device)
