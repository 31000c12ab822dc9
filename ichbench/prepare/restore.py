"""Class scores on the prepared grid -> labels (or the scores) on the native grid, some slices at a time.

nnU-Net's part first (linear, or nearest across thick slices, in the precision of the scores), then one linear
interpolation per axis that a flag has resized, then the decision: the highest score, ties to the lower class, or for
regions each score on its own. What no prepared voxel shows is background. A case of 512 x 512 x 400 voxels needs less than
1 GB beside its scores, because nothing but the labels is ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.prepare.geometry import FlagGeometry, Geometry, Shape
from ichbench.prepare.linear import Taps, linear_rows, linear_taps
from ichbench.prepare.resample import separate_axis
from ichbench.prepare.resize import interpolate_axis

FloatArray = NDArray[np.floating]
#: scores of class `index` on some slices of the prepared grid, in the plan's axis order
Scores = Callable[[int, slice], FloatArray]

#: the largest float32 whose sigmoid, computed in float32 as torch does, is still one half and not above it
ABOVE_HALF = np.float32(1.5 * 2.0**-24)

#: about so many native voxels are decided at once
PIECE = 2**20


def restore(n: int, scores: Scores, geometry: Geometry, regions: Sequence[int] | None = None) -> NDArray[np.int16]:
    """The class of each native voxel: the index of the highest of n scores, or with `regions` the value of the last region
    whose probability (the sigmoid of its score) is above one half."""
    out = np.zeros(_working_shape(geometry.flags), dtype=np.int16)
    for part, native in _pieces(scores, geometry):
        out[part] = _highest(n, native) if regions is None else _regions(regions, native)
    return _turned(out, geometry.flags)


def restore_each(n: int, scores: Scores, geometry: Geometry, dtype: np.dtype[np.floating]) -> FloatArray:
    """The n scores (n, z, y, x) themselves on the native grid, NaN where no prepared voxel shows anything."""
    out = np.full((n, *_working_shape(geometry.flags)), np.nan, dtype=dtype)
    for part, native in _pieces(scores, geometry):
        for index in range(n):
            out[(index, *part)] = native(index)
    return _turned(out, geometry.flags)


def _pieces(scores: Scores, geometry: Geometry) -> Iterator[tuple[tuple[slice, slice, slice], Callable[[int], FloatArray]]]:
    """Boxes that together are all native voxels (in working order) that the case shows, each with its scores by class."""
    flags = geometry.flags
    to_working = [flags.file_order[axis] for axis in geometry.transpose_forward]
    order = [to_working.index(axis) for axis in range(3)]
    along = to_working[0]  # the working axis that the plan's first axis is
    places = [_place(axis, geometry.box[order[axis]], flags) for axis in range(3)]
    axes = None
    if geometry.cropped_shape != geometry.shape:
        apart = separate_axis(geometry.new_spacing_mm, geometry.spacing_mm, geometry.resampling)
        axes = linear_taps(geometry.shape, geometry.cropped_shape, apart, single=geometry.resampling != "spline")
    first, position = places[along]
    step = max(1, PIECE // max(1, int(np.prod(geometry.cropped_shape[1:]))))
    for begin in range(0, len(position), step):
        wanted = position[begin : begin + step]
        start, stop = int(np.floor(wanted.min())), int(np.ceil(wanted.max())) + 1
        here = [wanted - start if axis == along else places[axis][1] for axis in range(3)]
        part = [slice(at, at + len(values)) for at, values in places]
        part[along] = slice(first + begin, first + begin + len(wanted))

        def native(index: int, start: int = start, stop: int = stop, here: Sequence[NDArray[np.float64]] = here) -> FloatArray:
            rounded = None if geometry.resampling == "spline" else np.dtype(np.float32)
            return _to_native(_resampled(scores, index, axes, start, stop, rounded).transpose(order), here)

        yield (part[0], part[1], part[2]), native


def _working_shape(flags: FlagGeometry) -> Shape:
    z, y, x = (flags.native_shape[axis] for axis in flags.axes)
    return z, y, x


def _turned(volume: NDArray[Any], flags: FlagGeometry) -> NDArray[Any]:
    """From working order to the case's own; leading axes stay."""
    lead = volume.ndim - 3
    flipped = volume[(..., *(slice(None, None, -1) if flip else slice(None) for flip in flags.flips))]
    return np.ascontiguousarray(flipped.transpose(*range(lead), *(lead + axis for axis in np.argsort(flags.axes))))


def _resampled(
    scores: Scores, index: int, axes: tuple[Taps, Taps, Taps] | None, start: int, stop: int, rounded: np.dtype[np.floating] | None
) -> FloatArray:
    """Rows start..stop-1 of one class at the native spacing, rounded as nnU-Net does; None: to the precision that the scores came in."""
    if axes is None:
        return scores(index, slice(start, stop))
    dtype = rounded or scores(index, slice(0, 1)).dtype
    return linear_rows(lambda rows: scores(index, rows), axes, start, stop).astype(dtype)


def _to_native(values: FloatArray, positions: Sequence[NDArray[np.float64]]) -> FloatArray:
    for axis, position in enumerate(positions):
        if len(position) != values.shape[axis] or not np.array_equal(position, np.arange(len(position))):
            values = interpolate_axis(values, axis, position)
    return values


def _highest(n: int, native: Callable[[int], FloatArray]) -> NDArray[np.int16]:
    height = np.array(native(0))
    best = np.zeros(height.shape, dtype=np.int16)
    for index in range(1, n):
        values = native(index)
        best[values > height] = index
        np.maximum(height, values, out=height)
    return best


def _regions(regions: Sequence[int], native: Callable[[int], FloatArray]) -> NDArray[np.int16]:
    best: NDArray[np.int16] | None = None
    for index, value in enumerate(regions):
        probable = native(index).astype(np.float32, copy=False) > ABOVE_HALF
        best = np.zeros(probable.shape, dtype=np.int16) if best is None else best
        best[probable] = value
    assert best is not None  # noqa: S101 - `restore_logits` refuses a list without regions
    return best


def _place(axis: int, span: tuple[int, int], flags: FlagGeometry) -> tuple[int, NDArray[np.float64]]:
    """Along one working axis: the first native voxel that the box shows, and the positions of it and its followers in the box."""
    if axis == 0:
        position = np.asarray(flags.slice_back)
        shown = np.zeros(len(position), dtype=bool)
        shown[slice(*flags.kept_slices)] = True
    else:
        position = (np.arange(flags.native_shape[flags.axes[axis]]) + 0.5) * flags.in_plane_ratio[axis - 1] - 0.5
        shown = np.ones(len(position), dtype=bool)
    shown &= (position >= span[0] - 0.5) & (position < span[1] - 0.5)
    first = int(np.argmax(shown))
    return first, np.clip(position[shown] - span[0], 0, span[1] - span[0] - 1)
