"""In-plane downsampling and slice spacing (flags three and four), and the resizing kernels they share with `resample`.

Every size change follows the voxel-extent convention: the first and last voxel's outer edges stay where they are, so
output voxel i of n_out looks at input index (i + 0.5) * n_in / n_out - 0.5. The grid that comes back says exactly that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ichbench.cases.case import Case
from ichbench.errors import InputError
from ichbench.recipe import Downsample

FloatArray = NDArray[np.floating]
Blocks = NDArray[np.float32]


# ---- kernels: one axis at a time; B-spline interpolation is separable, so this equals the n-dimensional call


@lru_cache(maxsize=64)
def resize_matrix(n_in: int, n_out: int, order: int) -> NDArray[np.float64]:
    """(n_out, n_in) matrix of a spline resize along one axis, from scipy's own kernel.

    It is `scipy.ndimage.zoom(grid_mode=True, mode="nearest")`, which is what `skimage.transform.resize(mode="edge",
    anti_aliasing=False)` calls. A matrix product instead of the 64-tap 3D call takes a head CT from seconds to tenths.
    """
    columns = [ndimage.zoom(unit, n_out / n_in, order=order, mode="nearest", grid_mode=True) for unit in np.eye(n_in)]
    matrix = np.ascontiguousarray(np.stack(columns, axis=1))
    if matrix.shape != (n_out, n_in):
        raise InputError(f"cannot resize an axis of {n_in} voxels to {n_out}")
    matrix.setflags(write=False)
    return matrix


def apply_along_axis(matrix: FloatArray, array: FloatArray, axis: int) -> FloatArray:
    """Multiply `matrix` (n_out, n_in) into one axis of an array."""
    before, after = int(np.prod(array.shape[:axis])), int(np.prod(array.shape[axis + 1 :]))
    shape = (*array.shape[:axis], len(matrix), *array.shape[axis + 1 :])
    if after == 1:
        return (array.reshape(before, array.shape[axis]) @ matrix.T).reshape(shape)
    return np.matmul(matrix, array.reshape(before, array.shape[axis], after)).reshape(shape)


def resize(array: FloatArray, shape: Sequence[int], order: int) -> NDArray[np.float64]:
    """Spline resize of a whole array (any number of axes), clipped to the input's range, float64. No anti-aliasing."""
    if tuple(shape) == array.shape:
        return array.astype(np.float64)
    if order == 0:
        return _take_nearest(array.astype(np.float64), shape)
    out: FloatArray = array.astype(np.float64)
    # shrinking axes first keeps the intermediate arrays small; the result does not depend on the order
    for axis in sorted(range(array.ndim), key=lambda axis: shape[axis] / array.shape[axis]):
        if shape[axis] != array.shape[axis]:
            out = apply_along_axis(resize_matrix(array.shape[axis], shape[axis], order), out, axis)
    return np.clip(out, array.min(), array.max()).astype(np.float64, copy=False)


def nearest_index(n_in: int, n_out: int) -> NDArray[np.intp]:
    """Input index nearest to every output voxel; halves go up, as in scipy's order 0."""
    position = n_in / n_out * (np.arange(n_out) + 0.5) - 0.5
    return np.clip(np.floor(position + 0.5), 0, n_in - 1).astype(np.intp)


def resize_labels(labels: NDArray[np.integer], shape: Sequence[int]) -> NDArray[np.integer]:
    """Labels on another shape: the label whose linearly resized indicator is largest; ties go to the nearest neighbour.

    The rule of batchgenerators 0.25.5 (`resize_segmentation`, order 1).
    """
    if tuple(shape) == labels.shape:
        return labels
    values = np.unique(labels)
    if len(values) == 1:
        return np.full(tuple(shape), values[0], dtype=labels.dtype)
    best = np.full(tuple(shape), values[0], dtype=labels.dtype)
    height = np.full(tuple(shape), -1.0)
    tied = np.zeros(tuple(shape), dtype=bool)
    for value in values:
        indicator = resize(labels == value, shape, order=1)
        tied = (tied & (indicator <= height)) | (indicator == height)
        higher = indicator > height
        best[higher] = value
        np.maximum(height, indicator, out=height)
    if tied.any():
        best[tied] = _take_nearest(labels, shape)[tied]
    return best


def interpolate_axis(array: FloatArray, axis: int, position: NDArray[np.float64]) -> FloatArray:
    """Linear interpolation at fractional indices of one axis; beyond the ends the end value holds. Keeps the dtype."""
    n = array.shape[axis]
    inside = np.clip(position, 0, n - 1)
    low = np.minimum(np.floor(inside).astype(np.intp), max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    share = (inside - low).astype(array.dtype)
    if not share.any():
        return array.take(low, axis=axis)
    shape = [1] * array.ndim
    shape[axis] = len(share)
    share = share.reshape(shape)
    out = array.take(low, axis=axis)
    out *= 1 - share
    out += array.take(high, axis=axis) * share
    return out


def _take_nearest(array: NDArray[np.generic], shape: Sequence[int]) -> NDArray[np.generic]:
    for axis, n_out in enumerate(shape):
        if n_out != array.shape[axis]:
            array = array.take(nearest_index(array.shape[axis], n_out), axis=axis)
    return array


# ---- the in-plane flag


def _max(blocks: Blocks, _: str) -> FloatArray:
    return blocks.max(axis=-1)


def _average(blocks: Blocks, _: str) -> FloatArray:
    return blocks.mean(axis=-1)


def _sum(blocks: Blocks, _: str) -> FloatArray:
    return blocks.sum(axis=-1)


def _random(blocks: Blocks, case_id: str) -> FloatArray:
    """One element of each block, the same one in all channels; the draw depends on the case's id alone."""
    seed = int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).integers(0, blocks.shape[-1], size=blocks.shape[1:-1])
    picked = np.take_along_axis(blocks, np.broadcast_to(drawn, blocks.shape[:-1])[..., None], axis=-1)
    return np.asarray(picked[..., 0])


#: name -> function of (blocks: (c, z, y, x, factor * factor), case id)
POOLING: dict[str, Callable[[Blocks, str], FloatArray]] = {"max": _max, "average": _average, "sum": _sum, "random": _random}


def downsample_case(case: Case, downsample: Downsample) -> Case:
    """Make the voxels of each slice `factor` times larger along y and x. Slices and HU scale stay (except for "sum").

    Pooling: blocks of factor x factor, the far edge replicated to a whole block. Spline: order 3, edge mode, to
    round(n / factor) voxels. Labels: the most frequent label of each block, ties to the lower label; with spline the
    segmentation resampler. The grid's voxels lie at the blocks' centres.
    """
    z, y, x = case.grid.shape_zyx
    if downsample.pooling == "spline":
        shape = (z, max(1, round(y / downsample.factor)), max(1, round(x / downsample.factor)))
        image = np.stack([np.stack([resize(one, shape[1:], 3) for one in channel]) for channel in case.image_czyx]).astype(np.float32)
        labels = None if case.labels_zyx is None else np.stack([resize_labels(one, shape[1:]) for one in case.labels_zyx])
        step = np.array([1.0, y / shape[1], x / shape[2]])
    else:
        factor = int(downsample.factor)
        image = POOLING[downsample.pooling](_blocks(case.image_czyx, factor), case.id).astype(np.float32, copy=False)
        labels = None if case.labels_zyx is None else _majority(case.labels_zyx, factor)
        shape = (z, image.shape[2], image.shape[3])
        step = np.array([1.0, factor, factor])
    grid = case.grid.resized(shape, step, (step - 1) / 2)
    return Case(case.id, image, None if labels is None else labels.astype(np.int16, copy=False), grid)


def in_plane_ratio(shape_zyx: Sequence[int], downsample: Downsample) -> tuple[float, float]:
    """Reduced voxels per original voxel along (y, x): original voxel i lies at (i + 0.5) * ratio - 0.5 of the reduced grid."""
    if downsample.pooling != "spline":
        return 1 / int(downsample.factor), 1 / int(downsample.factor)
    y, x = (max(1, round(n / downsample.factor)) / n for n in shape_zyx[1:])
    return y, x


def _blocks(array: NDArray[np.generic], factor: int) -> NDArray[np.generic]:
    """(..., y, x) -> (..., y / factor, x / factor, factor * factor), the far edges replicated to whole blocks."""
    *lead, y, x = array.shape
    pad = [(0, 0)] * len(lead) + [(0, -y % factor), (0, -x % factor)]
    padded = np.pad(array, pad, mode="edge") if (y % factor or x % factor) else array
    rows, columns = padded.shape[-2] // factor, padded.shape[-1] // factor
    split = padded.reshape(*lead, rows, factor, columns, factor)
    return np.moveaxis(split, -3, -2).reshape(*lead, rows, columns, factor * factor)


def _majority(labels_zyx: NDArray[np.integer], factor: int) -> NDArray[np.integer]:
    blocks = _blocks(labels_zyx, factor)
    values = np.unique(labels_zyx)
    counts = np.stack([(blocks == value).sum(axis=-1) for value in values])
    return values[counts.argmax(axis=0)].astype(labels_zyx.dtype)


# ---- slice spacing


def respace_slices(case: Case, target_mm: float | None) -> tuple[Case, NDArray[np.float64]]:
    """Linear interpolation along z to (about) `target_mm`; labels by the largest interpolated indicator, ties to the lower.

    An evenly spaced stack of n slices gets round(n * spacing / target) slices, at least one, over the same extent, so
    the spacing that results is extent / count. An unevenly spaced stack is first of all made even: None means its
    median gap. Returns the case and, for each of its original slices, the (fractional) index in the new stack.
    """
    grid = case.grid
    n, spacing_mm = grid.shape_zyx[0], grid.spacing_zyx_mm[0]
    if grid.slice_positions_mm is not None and n > 1:
        at_mm = np.asarray(grid.slice_positions_mm, dtype=np.float64) - grid.slice_positions_mm[0]
        at_mm = at_mm * np.sign(at_mm[-1])
        gap_mm = float(np.median(np.diff(at_mm))) if target_mm is None else target_mm
        count = max(2, round(float(at_mm[-1]) / gap_mm) + 1)
        new_at_mm = np.linspace(0.0, at_mm[-1], count)
        position, back = np.interp(new_at_mm, at_mm, np.arange(n)), at_mm / new_at_mm[1]
        step, first = float(new_at_mm[1]) / spacing_mm, 0.0
    else:
        count = n if target_mm is None else max(1, round(n * spacing_mm / target_mm))
        if count == n:
            return case, np.arange(n, dtype=np.float64)
        step = n / count
        position, back = step * (np.arange(count) + 0.5) - 0.5, (np.arange(n) + 0.5) / step - 0.5
        first = (step - 1) / 2
    new_grid = grid.resized((count, *grid.shape_zyx[1:]), np.array([step, 1.0, 1.0]), np.array([first, 0.0, 0.0]))
    image = interpolate_axis(case.image_czyx, 1, position)
    labels = None if case.labels_zyx is None else _labels_at(case.labels_zyx, position)
    return Case(case.id, image.astype(np.float32, copy=False), labels, replace(new_grid, slice_positions_mm=None)), back


def _labels_at(labels_zyx: NDArray[np.int16], position: NDArray[np.float64]) -> NDArray[np.int16]:
    shape = (len(position), *labels_zyx.shape[1:])
    best = np.zeros(shape, dtype=np.int16)
    height = np.full(shape, -1.0, dtype=np.float32)
    for value in np.unique(labels_zyx):
        indicator = interpolate_axis((labels_zyx == value).astype(np.float32), 0, position)
        higher = indicator > height
        best[higher] = value
        height[higher] = indicator[higher]
    return best


