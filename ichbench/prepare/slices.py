"""Which slices the method sees, and which way they lie: orientation, slice crop, extension, neighbours as channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import reorient

Shape = tuple[int, int, int]

#: A slice shows the head when this area lies above 0 HU. Air, fat and foam are below 0 HU, so it counts tissue and bone:
#: 20 cm2 is a disc 5 cm across, less than any slice through the brain (the vertex included, a few mm below the skin) and
#: more than what a head holder or a table edge shows.
HEAD_AREA_MM2 = 2000.0


def head_range(ct_zyx: NDArray[np.float32], spacing_zyx_mm: tuple[float, float, float]) -> tuple[int, int]:
    """(first, last + 1) slice of an image in HU that shows the head: at least `HEAD_AREA_MM2` above 0 HU.

    Needs no mask, so it is the same in training and at test time. No such slice: the whole volume.
    """
    area_mm2 = (ct_zyx > 0).sum(axis=(1, 2)) * (spacing_zyx_mm[1] * spacing_zyx_mm[2])
    return _range(area_mm2 >= HEAD_AREA_MM2)


def reference_range(labels_zyx: NDArray[np.integer] | None, n_slices: int) -> tuple[int, int]:
    """(first, last + 1) slice with any foreground label; the whole volume without labels or without foreground.

    A LEAK when scores are computed on such cases: the crop tells the method where the answer is. It reproduces the
    paper's ancestor. At test time hand over the case without labels, as for every other arm.
    """
    if labels_zyx is None:
        return 0, n_slices
    return _range(np.asarray((labels_zyx > 0).any(axis=(1, 2))))


def cover(kept: tuple[int, int], back: NDArray[np.float64], n_slices: int) -> tuple[int, int]:
    """The range of resampled slices needed to interpolate the original slices `kept`.

    `back` is the position of every original slice in the resampled stack of `n_slices`. Without resampling: `kept`.
    """
    first = int(np.floor(back[kept[0]]))
    last = int(np.ceil(back[kept[1] - 1]))
    return min(max(first, 0), n_slices - 1), min(max(last, 0), n_slices - 1) + 1


def take_slices(case: Case, first: int, stop: int, extension: int = 0) -> Case:
    """Slices first..stop-1 and `extension` more at both ends: real neighbours where they exist, else the edge again.

    Labels go with their slices, so a replicated slice carries a copy of the edge's labels.
    """
    n = case.grid.shape_zyx[0]
    wanted = np.arange(first - extension, stop + extension)
    if len(wanted) == n and first == extension:
        return case
    index = np.clip(wanted, 0, n - 1)
    start = np.array([float(wanted[0]), 0.0, 0.0])
    grid = case.grid.resized((len(wanted), *case.grid.shape_zyx[1:]), np.ones(3), start)
    labels = None if case.labels_zyx is None else case.labels_zyx[index]
    # uneven stacks have been made even by now; only a single slice can still carry a position
    return Case(case.id, case.image_czyx[:, index], labels, replace(grid, slice_positions_mm=None))


def neighbours(image_czyx: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Channels of the n slices before and after: copies of the image shifted by -n..n along z, concatenated.

    Channel `(offset + n) * c + k` of slice z is channel k of slice z + offset; at the ends the edge slice is repeated.
    The centre copy (offset 0) is the image itself.
    """
    if n == 0:
        return image_czyx
    z = np.arange(image_czyx.shape[1])
    return np.concatenate([image_czyx[:, np.clip(z + offset, 0, len(z) - 1)] for offset in range(-n, n + 1)])


def oriented(case: Case, how: bool | str = True) -> tuple[Case, Shape, tuple[bool, bool, bool]]:
    """The case turned by `images.reorient` to (superior, posterior, left), or as `how` says there; also which old axis each
    new one was, and which were reversed.

    A case that a reorienting cohort has already turned stays as it is.
    """
    volumes: list[NDArray[Any]] = [*case.image_czyx] if case.labels_zyx is None else [*case.image_czyx, case.labels_zyx]
    turned, grid = reorient(volumes, case.grid, f"case {case.id}", how)
    old, new = case.grid, grid.file_axes
    axes = (old.file_axes.index(new[0]), old.file_axes.index(new[1]), old.file_axes.index(new[2]))
    flips = tuple(bool(grid.file_flips[axis] != old.file_flips[axes[axis]]) for axis in range(3))
    labels = None if case.labels_zyx is None else turned[-1]
    return Case(case.id, np.stack(turned[: len(case.image_czyx)]), labels, grid), axes, (flips[0], flips[1], flips[2])


def permuted(case: Case, order: Shape) -> Case:
    """The same voxels with axis k taken from axis order[k]."""
    if order == (0, 1, 2):
        return case
    old = case.grid
    affine = old.affine_4x4[:, [*order, 3]]
    pixdim = None if old.pixdim_zyx_mm is None else (old.pixdim_zyx_mm[order[0]], old.pixdim_zyx_mm[order[1]], old.pixdim_zyx_mm[order[2]])
    shape, file_axes = ((values[order[0]], values[order[1]], values[order[2]]) for values in (old.shape_zyx, old.file_axes))
    file_flips = (old.file_flips[order[0]], old.file_flips[order[1]], old.file_flips[order[2]])
    grid = Grid(shape, affine, old.slice_positions_mm, file_axes, pixdim, file_flips=file_flips)
    labels = None if case.labels_zyx is None else case.labels_zyx.transpose(order)
    return Case(case.id, case.image_czyx.transpose(0, *(axis + 1 for axis in order)), labels, grid)


def _range(present: NDArray[np.bool_]) -> tuple[int, int]:
    found = np.flatnonzero(present)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, len(present))
