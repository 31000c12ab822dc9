"""Boxes of voxels: where labels lie, and cutting a box out of an array that may not hold all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = tuple[int, int, int]
#: first voxel and size along (z, y, x); the first may be negative
Box = tuple[Ints, Ints]


def cut_into(out: NDArray[Any], array: NDArray[Any], lower_zyx: Sequence[int], outside: int | float) -> None:
    """Fill `out` (..., z, y, x) with the box of `array` (..., z, y, x) that begins at `lower_zyx`, and `outside` where there is none.

    Only the box is read, so that a memory map stays on disk; `out` may be a flipped view and have another type.
    """
    source: list[slice] = []
    target: list[slice] = []
    for low, size, length in zip(lower_zyx, out.shape[-3:], array.shape[-3:], strict=True):
        start, stop = min(max(low, 0), length), min(max(low + size, 0), length)
        source.append(slice(start, stop))
        target.append(slice(start - low, stop - low))
    if any(s.stop - s.start < size for s, size in zip(source, out.shape[-3:], strict=True)):
        out[...] = outside
    z, y, x = source
    out[..., target[0], target[1], target[2]] = array[..., z, y, x]


def bounding_box(mask_zyx: NDArray[np.bool_]) -> Box | None:
    """The smallest box that holds all True voxels."""
    rows: NDArray[np.bool_] = np.any(mask_zyx, axis=2)
    z, y = np.flatnonzero(rows.any(axis=1)), np.flatnonzero(rows.any(axis=0))
    if not len(z):
        return None
    x = np.flatnonzero(mask_zyx[z[0] : z[-1] + 1, y[0] : y[-1] + 1].any(axis=(0, 1)))
    return ints((z[0], y[0], x[0])), ints((z[-1] - z[0] + 1, y[-1] - y[0] + 1, x[-1] - x[0] + 1))


def common_box(one: Box, other: Box) -> Box | None:
    """What two boxes share."""
    first = np.maximum(one[0], other[0])
    size = np.minimum(np.add(*one), np.add(*other)) - first
    return None if np.any(size <= 0) else (ints(first), ints(size))


def slices(box: Box) -> tuple[slice, slice, slice]:
    """A box of first voxels from 0 on as an index."""
    z, y, x = (slice(first, first + size) for first, size in zip(*box, strict=True))
    return z, y, x


def ints(values: Sequence[Any] | NDArray[Any]) -> Ints:
    z, y, x = (int(value) for value in values)
    return z, y, x
