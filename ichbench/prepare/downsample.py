"""In-plane downsampling and slice spacing (flags three and four).

Sizes change by the voxel-extent convention (see `resize`), and the grid that comes back says exactly where the new
voxels lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case
from ichbench.prepare.linear import resize_labels
from ichbench.prepare.resize import interpolate_axis, resize
from ichbench.recipe import Downsample

FloatArray = NDArray[np.floating]
Blocks = NDArray[np.float32]

# ---- in plane


def _max(blocks: Blocks, _: str) -> FloatArray:
    return np.asarray(blocks.max(axis=-1))


def _average(blocks: Blocks, _: str) -> FloatArray:
    return np.asarray(blocks.mean(axis=-1))


def _sum(blocks: Blocks, _: str) -> FloatArray:
    return np.asarray(blocks.sum(axis=-1))


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
        image = np.stack([resize(channel, shape, 3, stacked=True) for channel in case.image_czyx]).astype(np.float32)
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


def _blocks(array: NDArray[Any], factor: int) -> NDArray[Any]:
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
    return np.asarray(values[counts.argmax(axis=0)], dtype=labels_zyx.dtype)


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
        at_mm: NDArray[np.float64] = np.abs(np.asarray(grid.slice_positions_mm, dtype=np.float64) - grid.slice_positions_mm[0])
        gap_mm = float(np.median(np.diff(at_mm))) if target_mm is None else target_mm
        count = max(2, round(float(at_mm[-1]) / gap_mm) + 1)
        new_at_mm = np.linspace(0.0, at_mm[-1], count)
        position = np.interp(new_at_mm, at_mm, np.arange(n))
        back = at_mm / new_at_mm[1]
        step, first = float(new_at_mm[1]) / spacing_mm, 0.0
    else:
        count = n if target_mm is None else max(1, round(n * spacing_mm / target_mm))
        if count == n:
            return case, np.arange(n, dtype=np.float64)
        step = n / count
        position = step * (np.arange(count, dtype=np.float64) + 0.5) - 0.5
        back = (np.arange(n, dtype=np.float64) + 0.5) / step - 0.5
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
