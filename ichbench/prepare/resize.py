"""Resizing kernels: splines, nearest neighbour, linear interpolation; one axis at a time. (`linear.py` has labels.)

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

#: output voxels a block of `resize_blocks`, and the weight below which an input voxel is left out of it
BLOCK_ROWS, NEGLIGIBLE = 32, 1e-18
#: a cubic spline's weights fall by a factor of 3.7 a voxel, so that this many voxels on they no longer change a float64
REACH = 34
#: up to so many output voxels the n-dimensional kernel is as fast. On an axis of two voxels a spline is their mean, which
#: lies half way between two float32 numbers as often as not; the kernel's own last bit then says which one nnU-Net has
SMALL = 2**13


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
    Columns further apart than `REACH` do not meet in any row, so `zoom` is asked for many of them at once.
    """
    period = 2 * REACH + 2
    combs = np.zeros((min(period, n_in), n_in))
    combs[np.arange(n_in) % period, np.arange(n_in)] = 1
    responses = np.stack([zoom(comb, (n_out,), order) for comb in combs], axis=1)
    centre = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    near = np.abs(np.arange(n_in) - centre[:, None]) <= REACH
    matrix = np.where(near, responses[:, np.arange(n_in) % period], 0.0)
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=64)
def resize_blocks(n_in: int, n_out: int, order: int) -> tuple[tuple[slice, slice, NDArray[np.float64]], ...]:
    """`resize_matrix` in blocks (output rows, input columns, values), because entries far from the diagonal are 0."""
    if n_in == n_out:
        return tuple((slice(at, at + 1), slice(at, at + 1), np.ones((1, 1))) for at in range(n_in))
    matrix, blocks = resize_matrix(n_in, n_out, order), []
    for start in range(0, n_out, BLOCK_ROWS):
        rows = matrix[start : start + BLOCK_ROWS]
        used = np.flatnonzero(np.abs(rows).max(axis=0) > NEGLIGIBLE)
        columns = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((slice(start, start + len(rows)), columns, np.ascontiguousarray(rows[:, columns])))
    return tuple(blocks)


def resize_axis(array: NDArray[np.float64], axis: int, n_out: int, order: int) -> NDArray[np.float64]:
    """Spline resize along one axis of an array."""
    n_in = array.shape[axis]
    before, after = int(np.prod(array.shape[:axis])), int(np.prod(array.shape[axis + 1 :]))
    lines = array.reshape(before, n_in, after)
    out = np.empty((before, n_out, after))
    for rows, columns, values in resize_blocks(n_in, n_out, order):
        if after == 1:
            np.matmul(lines[:, columns, 0], values.T, out=out[:, rows, 0])
        else:
            np.matmul(values, lines[:, columns], out=out[:, rows])
    return out.reshape(*array.shape[:axis], n_out, *array.shape[axis + 1 :])


def resize(array: FloatArray, shape: Sequence[int], order: int, stacked: bool = False) -> NDArray[np.float64]:
    """Spline resize of an array with any number of axes, clipped to the input's range, float64. No anti-aliasing.

    stacked  the first axis is a stack of separate images: it keeps its length, and each image its own range
    """
    if tuple(shape) == array.shape:
        return array.astype(np.float64)
    out = np.empty(tuple(shape))
    if stacked:
        for image, place in zip(array, out, strict=True):
            resize_into(place, image, order)
    else:
        resize_into(out, array, order)
    return out


def resize_into(out: FloatArray, array: FloatArray, order: int) -> None:
    """`resize` of one image into `out`, in its shape and type. Only some slices of a volume are held in float64."""
    shape = out.shape
    if order == 0 or shape == array.shape:
        out[...] = _take_nearest(array, shape)
        return
    low, high = array.min(), array.max()
    if int(np.prod(shape)) <= SMALL:
        out[...] = np.clip(zoom(array.astype(np.float64), shape, order), low, high)
    elif array.ndim == 2:
        out[...] = np.clip(_along_all_axes(array.astype(np.float64), shape, order), low, high)
    else:
        for rows, columns, values in resize_blocks(array.shape[0], shape[0], order):
            slab = np.matmul(values, array[columns].astype(np.float64).reshape(values.shape[1], -1))
            for plane, place in zip(slab.reshape(-1, *array.shape[1:]), out[rows], strict=True):
                place[...] = np.clip(_along_all_axes(plane, shape[1:], order), low, high)


def _along_all_axes(array: NDArray[np.float64], shape: Sequence[int], order: int) -> NDArray[np.float64]:
    # shrinking axes first keeps the intermediate arrays small; the result does not depend on the order
    for axis in sorted(range(array.ndim), key=lambda axis: shape[axis] / array.shape[axis]):
        if shape[axis] != array.shape[axis]:
            array = resize_axis(array, axis, shape[axis], order)
    return array


def nearest_index(n_in: int, n_out: int) -> NDArray[np.intp]:
    """Input index nearest to every output voxel; halves go up, as in scipy's order 0."""
    position = n_in / n_out * (np.arange(n_out) + 0.5) - 0.5
    return np.asarray(np.clip(np.floor(position + 0.5), 0, n_in - 1), dtype=np.intp)


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
