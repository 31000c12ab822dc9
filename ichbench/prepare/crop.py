"""Crop to the nonzero region, nnU-Net's way (facts/nnunet-v2.md, sections 2 and 4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: below this share of unset voxels, following them one by one is faster than labelling the volume
FEW = 0.02

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def nonzero_box(image_czyx: NDArray[np.floating]) -> tuple[Box, NDArray[np.bool_]]:
    """Half-open box around voxels that are nonzero in any channel, and the mask inside it with its holes filled.

    An image of zeros gives the full box and an empty mask. Hole filling cannot enlarge the box, so it is done inside it.
    """
    mask = image_czyx[0] != 0
    for channel in image_czyx[1:]:
        mask |= channel != 0
    box = extent(mask)
    inside = mask[slices(box)]
    return box, fill_holes(inside) if inside.any() else inside


def extent(mask_zyx: NDArray[np.bool_]) -> Box:
    """Half-open box around what is set; the full box where nothing is."""
    spans = []
    for axis in range(3):
        found = np.flatnonzero(mask_zyx.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(found):
            return _full(mask_zyx.shape)
        spans.append((int(found[0]), int(found[-1]) + 1))
    return spans[0], spans[1], spans[2]


def fill_holes(mask_zyx: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Set voxels that cannot reach the array's border through unset faces: scipy's `binary_fill_holes`, but in one pass."""
    unset = ~mask_zyx
    count = int(np.count_nonzero(unset))
    if count == 0:
        return mask_zyx
    if count < FEW * unset.size:
        return ~_reachable(unset)
    regions, count = ndimage.label(unset)
    outside = np.zeros(count + 1, dtype=bool)
    for axis in range(3):
        for end in (0, -1):
            outside[np.unique(regions.take(end, axis=axis))] = True
    outside[0] = False
    return np.asarray(~outside[regions], dtype=np.bool_)


def _reachable(unset_zyx: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those of few marked voxels that the border reaches through marked faces, one layer of voxels after the other."""
    # a rim of unmarked voxels keeps every step inside the array and its row; C order, whatever came, for flat indices
    waiting = np.zeros([n + 2 for n in unset_zyx.shape], dtype=bool)
    waiting[1:-1, 1:-1, 1:-1] = unset_zyx
    reached = np.zeros(waiting.shape, dtype=bool)
    border = waiting.copy()
    border[2:-2, 2:-2, 2:-2] = False
    steps = [sign * int(np.prod(waiting.shape[axis + 1 :])) for axis in range(3) for sign in (-1, 1)]
    front = np.flatnonzero(border)
    flat, found = waiting.reshape(-1), reached.reshape(-1)
    while len(front):
        found[front] = True
        flat[front] = False
        beside = np.unique(np.concatenate([front + step for step in steps]))
        front = beside[flat[beside]]
    return reached[1:-1, 1:-1, 1:-1]


def crop_to_nonzero(
    image_czyx: NDArray[np.float32], labels_zyx: NDArray[np.integer] | None
) -> tuple[NDArray[np.float32], NDArray[np.int16], Box]:
    """Image and labels inside the nonzero box. Labels that are 0 outside the filled mask become -1.

    Without labels the second value is 0 inside the mask and -1 outside, which is all that normalisation asks for.
    """
    box, mask = nonzero_box(image_czyx)
    inside = slices(box)
    labels = np.zeros(mask.shape, dtype=np.int16) if labels_zyx is None else labels_zyx[inside].astype(np.int16)
    labels[(labels == 0) & ~mask] = -1
    return image_czyx[(slice(None), *inside)], labels, box


def slices(box: Box) -> tuple[slice, slice, slice]:
    """The box as an index."""
    return slice(*box[0]), slice(*box[1]), slice(*box[2])


def _full(shape: tuple[int, ...]) -> Box:
    return (0, shape[0]), (0, shape[1]), (0, shape[2])
