"""Linear resizing to the last bit: logits on their way back, and label maps.

Half precision, an argmax and the tie rule of labels all hang on the last bit of an interpolated value, so the sum is
taken exactly as scipy's `zoom(order=1, mode="nearest", grid_mode=True)` takes it, which is what nnU-Net's resampling
ends in: corners in C order, and each value times its weights one axis after the other, in float64. Its other resampling is
torch's `interpolate`, in float32: along x, then y, then z, one product rounded and the other fused into the sum, as processors
with that instruction do it (those without, and stacks of slices of height + width up to 128, or 3 of them, add otherwise: a last bit).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.prepare.resize import nearest_index

FloatArray = NDArray[np.floating]
Index = NDArray[np.intp]
Weights = NDArray[np.float64]

#: interpolated values are made in pieces of about this many voxels, which stay in a processor's cache
PIECE = 2**19


@dataclass(frozen=True)
class Taps:
    """For each output voxel along an axis: its lower and upper input neighbour and their weights; `apart`: both ever count;
    `single`: torch's, for sums in float32."""

    index: tuple[Index, Index]
    weight: tuple[Weights, Weights]
    apart: bool
    single: bool = False

    def rows(self, part: slice, first: int = 0) -> Taps:
        """The same for some of the output voxels, of an input that begins at voxel `first`."""
        low, high = self.index
        return Taps((low[part] - first, high[part] - first), (self.weight[0][part], self.weight[1][part]), self.apart, self.single)


@lru_cache(maxsize=64)
def taps(n_in: int, n_out: int) -> Taps:
    """Neighbours and weights along one axis, voxel extents kept, the end values held beyond the ends."""
    position = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    low = np.floor(position).astype(np.intp)
    share = position - low
    # beyond an end both neighbours are the end voxel, and its value is still taken in two shares
    ends = np.clip(low, 0, n_in - 1), np.clip(low + 1, 0, n_in - 1)
    return Taps(ends, (1.0 - share, share), bool(share.any()))


@lru_cache(maxsize=64)
def single_taps(n_in: int, n_out: int) -> Taps:
    """`taps` as torch's linear `interpolate` has them: places in single precision, rounded once.

    At voxel 200 such a place is 1.5e-5 off, which an image notices. Before voxel 0 there is nothing to weigh.
    """
    if n_in == n_out:
        return replace(taps(n_in, n_out), single=True)
    scale = float(np.float32(n_in) / np.float32(n_out))
    position = np.maximum(((np.arange(n_out) + 0.5) * scale - 0.5).astype(np.float32), np.float32(0))
    low = np.minimum(position.astype(np.intp), n_in - 1)
    share = np.minimum(position - low.astype(np.float32), np.float32(1))
    weight = (np.float32(1) - share).astype(np.float64), share.astype(np.float64)
    return Taps((low, np.minimum(low + 1, n_in - 1)), weight, bool(share.any()), single=True)


def single_nearest_index(n_in: int, n_out: int) -> Index:
    """Input index nearest to every output voxel as torch's "nearest-exact" finds it."""
    scale = float(np.float32(n_in) / np.float32(n_out))
    return np.minimum(np.floor(((np.arange(n_out) + 0.5) * scale).astype(np.float32)).astype(np.intp), n_in - 1)


def nearest_taps(n_in: int, n_out: int, single: bool = False) -> Taps:
    """The nearest input voxel alone, as taps."""
    index = (single_nearest_index if single else nearest_index)(n_in, n_out)
    return Taps((index, index), (np.ones(n_out), np.zeros(n_out)), False, single)


def resize_linear(array: FloatArray, shape: Sequence[int], nearest_axis: int | None = None, single: bool = False) -> FloatArray:
    """A three-dimensional array on another shape, in its own dtype; along `nearest_axis` each voxel is the nearest one."""
    axes = linear_taps(array.shape, shape, nearest_axis, single)
    out = np.empty(tuple(shape), dtype=array.dtype)
    step = max(1, PIECE // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        out[start:stop] = linear_rows(array.__getitem__, axes, start, stop)
    return out


def linear_taps(
    shape_in: Sequence[int], shape_out: Sequence[int], nearest_axis: int | None, single: bool = False
) -> tuple[Taps, Taps, Taps]:
    """The taps of three axes. An axis of unchanged length is left alone, so a stack of slices is resized slice by slice.

    single  torch's places instead of scipy's
    """
    linear = single_taps if single else taps
    z, y, x = (
        nearest_taps(n_in, n_out, single) if axis == nearest_axis else linear(n_in, n_out)
        for axis, (n_in, n_out) in enumerate(zip(shape_in, shape_out, strict=True))
    )
    return z, y, x


def linear_rows(rows: Callable[[slice], FloatArray], axes: tuple[Taps, Taps, Taps], start: int, stop: int) -> NDArray[np.float64]:
    """Output rows start..stop-1 of axis 0 in float64; `rows(slice)` hands out rows of the input."""
    low, high = axes[0].index
    span = slice(int(low[start]), int(high[stop - 1]) + 1)
    here = axes[0].rows(slice(start, stop), span.start), axes[1], axes[2]
    return (_interpolate_single if axes[0].single else _interpolate)(rows(span).astype(np.float64), here)


def _interpolate(values: NDArray[np.float64], axes: tuple[Taps, Taps, Taps]) -> NDArray[np.float64]:
    """The weighted sum of up to eight neighbours; corners in C order, weights multiplied in the order of the axes."""
    z, y, x = axes
    columns = [values if _still(x, values.shape[2]) else values.take(index, axis=2) for index in _neighbours(x)]
    planes = {}
    for (a, index), (c, column) in product(enumerate(_neighbours(z)), enumerate(columns)):
        plane = column if _still(z, values.shape[0]) else column.take(index, axis=0)
        planes[a, c] = plane if not z.apart else plane * z.weight[a][:, None, None]
    total: NDArray[np.float64] | None = None
    for a, b, c in product(range(1 + z.apart), range(1 + y.apart), range(1 + x.apart)):
        term = planes[a, c]
        fresh = not _still(y, values.shape[1])
        if fresh:
            term = term.take(y.index[b], axis=1)
        for apart, weight in ((y.apart, y.weight[b][:, None]), (x.apart, x.weight[c])):
            if apart:
                term = np.multiply(term, weight, out=term if fresh else None)
                fresh = True
        total = (term if fresh else term.copy()) if total is None else np.add(total, term, out=total)
    assert total is not None  # noqa: S101 - at least one corner
    return total


def _interpolate_single(values: NDArray[np.float64], axes: tuple[Taps, Taps, Taps]) -> NDArray[np.float64]:
    """The same by torch's rule; every value that comes, and that goes, is a float32."""
    for number in (2, 1, 0):
        axis = axes[number]
        if not _still(axis, values.shape[number]):
            sides = [values.take(index, axis=number) for index in _neighbours(axis)]
            weights = [weight.reshape([-1 if other == number else 1 for other in range(3)]) for weight in axis.weight]
            values = _fused(sides, weights) if axis.apart else sides[0]
    return values


def _fused(sides: Sequence[NDArray[np.float64]], weights: Sequence[Weights]) -> NDArray[np.float64]:
    """low * weight + high * weight in float32, the second product rounded, the first not."""
    rounded = (sides[1] * weights[1]).astype(np.float32)
    return (sides[0] * weights[0] + rounded).astype(np.float32).astype(np.float64)


def _neighbours(axis: Taps) -> tuple[Index, ...]:
    return axis.index if axis.apart else axis.index[:1]


def _still(axis: Taps, n_in: int) -> bool:
    """Does output voxel i look at input voxel i alone?"""
    return not axis.apart and len(axis.index[0]) == n_in and bool((axis.index[0] == np.arange(n_in)).all())


def resize_labels(labels: NDArray[np.integer], shape: Sequence[int], single: bool = False) -> NDArray[np.integer]:
    """Labels on another shape: the label whose linearly resized indicator is largest.

    Where several share the largest, the nearest neighbour's label if it is one of them, else the lowest of them: the
    rule of batchgenerators 0.25.5 (`resize_segmentation`, order 1). An axis of unchanged length is left alone.
    Any number of axes; only voxels whose neighbours differ cost anything.

    single  torch's places, and the rule of nnU-Net's torch resampling: a thousand times the indicator is rounded to half
            precision, and the lowest of several largest labels is taken
    """
    if tuple(shape) == labels.shape:
        return labels
    axes = [(single_taps if single else taps)(n_in, n_out) for n_in, n_out in zip(labels.shape, shape, strict=True)]
    common = labels[(0,) * labels.ndim]
    out = np.full(tuple(shape), common, dtype=labels.dtype)
    inner, outer = _box(labels != common, axes)
    if inner:
        part = [axis.rows(where, span.start) for axis, span, where in zip(axes, inner, outer, strict=True)]
        nearest = [
            nearest_index(n_in, n_out)[where] - span.start
            for n_in, n_out, span, where in zip(labels.shape, shape, inner, outer, strict=True)
        ]
        out[outer] = _resized(np.ascontiguousarray(labels[inner]), part, nearest, single)
    return out


def _box(differs: NDArray[np.bool_], axes: Sequence[Taps]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The input box that the outputs with a marked neighbour look at, and the box of those outputs; empty without marks."""
    inner, outer = [], []
    for number, axis in enumerate(axes):
        marked = np.flatnonzero(differs.any(axis=tuple(other for other in range(len(axes)) if other != number)))
        if not len(marked):
            return (), ()
        touched = np.flatnonzero((axis.index[1] >= marked[0]) & (axis.index[0] <= marked[-1]))
        if not len(touched):
            return (), ()
        outer.append(slice(int(touched[0]), int(touched[-1]) + 1))
        inner.append(slice(int(axis.index[0][touched[0]]), int(axis.index[1][touched[-1]]) + 1))
    return tuple(inner), tuple(outer)


def _resized(labels: NDArray[np.integer], axes: Sequence[Taps], nearest: Sequence[Index], single: bool) -> NDArray[np.integer]:
    out = lowest = highest = labels
    for number, axis in enumerate(axes):
        if _still(axis, labels.shape[number]):
            continue
        out = out.take(nearest[number], axis=number)
        sides = _neighbours(axis)
        below = reduce(np.minimum, (lowest.take(side, axis=number) for side in sides))
        above = reduce(np.maximum, (highest.take(side, axis=number) for side in sides))
        lowest, highest = below, above
    if out is labels:
        return labels
    # where all neighbours agree the nearest one is right
    contested = np.flatnonzero(lowest != highest)
    winners = out.reshape(-1)
    for first in range(0, len(contested), PIECE // 8):
        at = contested[first : first + PIECE // 8]
        winners[at] = _winner(labels, axes, np.unravel_index(at, out.shape), winners[at], single)
    return out


def _winner(
    labels: NDArray[np.integer], axes: Sequence[Taps], at: tuple[Index, ...], nearest: NDArray[np.integer], single: bool
) -> NDArray[np.integer]:
    """The label with the largest indicator at the output voxels `at`, whose nearest labels are `nearest`."""
    flat = labels.reshape(-1)
    steps = [int(np.prod(labels.shape[number + 1 :])) for number in range(labels.ndim)]
    sides = [
        [(index[where] * step, weight[where]) for index, weight in zip(_neighbours(axis), axis.weight, strict=False)]
        for axis, where, step in zip(axes, at, steps, strict=True)
    ]
    corners = [flat[reduce(np.add, (place for place, _ in corner))] for corner in product(*sides)]
    pairs = [[weight for _, weight in side] for side in sides]
    shares = [] if single else [reduce(np.multiply, weights) for weights in product(*pairs)]
    best = nearest.copy()
    height = np.full(len(nearest), -1.0)
    height_of_nearest = np.empty(len(nearest))
    for value in np.unique(np.concatenate(corners)):
        if single:
            indicator = _half_indicator([corner == value for corner in corners], pairs)
        else:
            indicator = np.zeros(len(nearest))
            for label, share in zip(corners, shares, strict=True):
                indicator += share * (label == value)
        best[indicator > height] = value
        np.maximum(height, indicator, out=height)
        here = nearest == value
        height_of_nearest[here] = indicator[here]
    if single:
        return best
    tied = height_of_nearest == height
    best[tied] = nearest[tied]
    return best


def _half_indicator(corners: Sequence[NDArray[Any]], weights: Sequence[Sequence[Weights]]) -> NDArray[np.float64]:
    """A thousand times the interpolated indicator from its corners (in C order), by torch's sum, in half precision.

    weights  of each axis: one side's, which is 1, or two
    """
    values: list[NDArray[np.float64]] = [1000.0 * corner for corner in corners]
    for pair in reversed(weights):
        if len(pair) == 2:
            values = [_fused(values[first : first + 2], pair) for first in range(0, len(values), 2)]
    return values[0].astype(np.float16).astype(np.float64)
