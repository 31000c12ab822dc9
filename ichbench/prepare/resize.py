"""Resizing kernels: splines, labels, linear interpolation; one axis at a time.

Every size change follows the voxel-extent convention: the first and last voxel's outer edges stay where they are, so
output voxel i of n_out looks at input index (i + 0.5) * n_in / n_out - 0.5. B-spline interpolation is separable, so
one axis at a time equals the n-dimensional call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ichbench.errors import InputError

FloatArray = NDArray[np.floating]


def zoom(array: NDArray[np.float64], shape: Sequence[int], order: int) -> NDArray[np.float64]:
    """Spline resize by scipy's n-dimensional kernel, which is what `skimage.transform.resize(mode="edge")` calls."""
    scipy_zoom: Any = ndimage.zoom  # its stubs want the order as a literal
    factors = [n_out / n_in for n_out, n_in in zip(shape, array.shape, strict=True)]
    out: NDArray[np.float64] = scipy_zoom(array, factors, order=order, mode="nearest", grid_mode=True)
    if out.shape != tuple(shape):
        raise InputError(f"cannot resize an array of {array.shape} voxels to {tuple(shape)}")
    return out


@lru_cache(maxsize=64)
def resize_matrix(n_in: int, n_out: int, order: int) -> NDArray[np.float64]:
    """(n_out, n_in) matrix of `zoom` along one axis.

    A matrix product per axis, instead of 64 taps a voxel, takes a head CT from seconds to tenths; equal to about 1e-15.
    """
    matrix = np.ascontiguousarray(np.stack([zoom(unit, (n_out,), order) for unit in np.eye(n_in)], axis=1))
    matrix.setflags(write=False)
    return matrix


def apply_along_axis(matrix: FloatArray, array: FloatArray, axis: int) -> FloatArray:
    """Multiply `matrix` (n_out, n_in) into one axis of an array."""
    before, after = int(np.prod(array.shape[:axis])), int(np.prod(array.shape[axis + 1 :]))
    shape = (*array.shape[:axis], len(matrix), *array.shape[axis + 1 :])
    if after == 1:
        return np.asarray((array.reshape(before, array.shape[axis]) @ matrix.T).reshape(shape))
    return np.asarray(np.matmul(matrix, array.reshape(before, array.shape[axis], after)).reshape(shape))


def resize(array: FloatArray, shape: Sequence[int], order: int, stacked: bool = False) -> NDArray[np.float64]:
    """Spline resize of an array with any number of axes, clipped to the input's range, float64. No anti-aliasing.

    stacked  the first axis is a stack of separate images: it keeps its length, and each image its own range
    """
    if tuple(shape) == array.shape:
        return array.astype(np.float64)
    if order == 0:
        return np.asarray(_take_nearest(array, shape), dtype=np.float64)
    out: FloatArray = array.astype(np.float64)
    # shrinking axes first keeps the intermediate arrays small; the result does not depend on the order
    for axis in sorted(range(array.ndim), key=lambda axis: shape[axis] / array.shape[axis]):
        if shape[axis] != array.shape[axis]:
            out = apply_along_axis(resize_matrix(array.shape[axis], shape[axis], order), out, axis)
    each = tuple(range(1, array.ndim)) if stacked else None
    return np.asarray(np.clip(out, array.min(axis=each, keepdims=True), array.max(axis=each, keepdims=True)), dtype=np.float64)


def nearest_index(n_in: int, n_out: int) -> NDArray[np.intp]:
    """Input index nearest to every output voxel; halves go up, as in scipy's order 0."""
    position = n_in / n_out * (np.arange(n_out) + 0.5) - 0.5
    return np.asarray(np.clip(np.floor(position + 0.5), 0, n_in - 1), dtype=np.intp)


def resize_labels(labels: NDArray[np.integer], shape: Sequence[int]) -> NDArray[np.integer]:
    """Labels on another shape: the label whose linearly resized indicator is largest.

    Where several share the largest, the nearest neighbour's label if it is one of them, else the lowest of them: the
    rule of batchgenerators 0.25.5 (`resize_segmentation`, order 1). Ties hang on the last bit, so `zoom` itself is used.
    """
    if tuple(shape) == labels.shape:
        return labels
    nearest = _take_nearest(labels, shape)
    values = np.unique(labels)
    best = np.full(tuple(shape), values[0], dtype=labels.dtype)
    if len(values) == 1:
        return best
    height = np.full(tuple(shape), -1.0)
    height_of_nearest = np.empty(tuple(shape))
    for value in values:
        indicator = zoom((labels == value).astype(np.float64), shape, order=1)
        best[indicator > height] = value
        np.maximum(height, indicator, out=height)
        here = nearest == value
        height_of_nearest[here] = indicator[here]
    tied = height_of_nearest == height
    best[tied] = nearest[tied]
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


def _take_nearest(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    for axis, n_out in enumerate(shape):
        if n_out != array.shape[axis]:
            array = array.take(nearest_index(array.shape[axis], n_out), axis=axis)
    return array
