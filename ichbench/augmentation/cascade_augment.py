"""The labels of the earlier stage as input channels of a cascade's second stage, and their random faults (facts section 6, row 13).

In training they are dilated, eroded, opened or closed, and small components vanish, so that the second stage learns not to
trust the first blindly. This happens on the host, before the channels go to a device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from ichbench.augmentation.draw import CascadeDraw

Mask = NDArray[np.bool_]


def one_hot(labels_zyx: NDArray[np.integer], number: int) -> Mask:
    """One channel for each of the labels 1..number."""
    return np.asarray(labels_zyx == np.arange(1, number + 1).reshape(-1, *[1] * labels_zyx.ndim))


def change_previous(channels_lzyx: Mask, draw: CascadeDraw, largest_share: float) -> None:
    """Apply a draw in place to the channels of the labels 1, 2, ...; components of `largest_share` of the voxels or more stay.

    A voxel that one label gains is taken from all others; a voxel that it loses belongs to none.
    """
    for label, operation, radius in draw.morphology:
        old = channels_lzyx[label - 1].copy()
        channels_lzyx[label - 1] = MORPHOLOGIES[operation](old, footprint(radius, old.ndim if len(old) > 1 else 2))
        gained = channels_lzyx[label - 1] & ~old
        for other in range(len(channels_lzyx)):
            if other != label - 1:
                channels_lzyx[other][gained] = False
    for label, place in draw.remove_component:
        remove_component(channels_lzyx[label - 1], place, largest_share)


def remove_component(mask: Mask, place: float, largest_share: float) -> None:
    """Clear one of the components (voxels that touch, also at corners) below the share: number int(place x how many)."""
    found, count = scipy.ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(found.ravel(), minlength=count + 1)[1:]
    small = np.flatnonzero(sizes < mask.size * largest_share) + 1
    if len(small):
        mask[found == small[int(place * len(small))]] = False


def footprint(radius: float, dims: int) -> Mask:
    """A ball or, for two axes, a disk. A fractional radius gives what scikit-image makes of it, which nnU-Net uses:
    a ball of int(2 radius + 1) evenly spread points an axis, a disk of points one apart from -radius on."""
    if dims == 2:
        points = np.arange(-radius, radius + 1)
        return np.asarray(points[:, None] ** 2 + points**2 <= radius**2)
    number = int(2 * radius + 1)
    # not linspace: whether the outermost points belong to the ball hangs on the last bit; this, and the order of the sum, is
    # scikit-image's
    points = np.arange(number) * (2 * radius / (number - 1)) - radius
    return np.asarray(points**2 + points[:, None] ** 2 + points[:, None, None] ** 2 <= radius * radius)


def dilate(mask: Mask, shape: Mask) -> Mask:
    """True where the shape, its middle (of an even length the lower one) laid there, meets the mask; nothing lies outside."""
    return _within_reach(mask, shape, 1, lambda part: _met(part, shape))


def erode(mask: Mask, shape: Mask) -> Mask:
    """False where the shape meets a voxel that is not of the mask; beyond the patch there are none."""
    return _within_reach(mask, shape, 1, lambda part: ~_met(~part, shape))


def opened(mask: Mask, shape: Mask) -> Mask:
    return _within_reach(mask, shape, 2, lambda part: _met(~_met(~part, shape), shape))


def closed(mask: Mask, shape: Mask) -> Mask:
    return _within_reach(mask, shape, 2, lambda part: ~_met(~_met(part, shape), shape))


MORPHOLOGIES: dict[str, Callable[[Mask, Mask], Mask]] = {"dilate": dilate, "erode": erode, "open": opened, "close": closed}


def _within_reach(mask: Mask, shape: Mask, steps: int, work: Callable[[Mask], Mask]) -> Mask:
    """Do the work in the box of the mask and as many voxels around as it can reach; elsewhere nothing is and nothing comes."""
    if shape.ndim < mask.ndim:
        return _within_reach(mask[0], shape, steps, work)[None]
    out = np.zeros_like(mask)
    if not mask.any():
        return out
    (box,) = scipy.ndimage.find_objects(mask.astype(np.uint8))
    near = tuple(slice(max(0, s.start - steps * n), s.stop + steps * n) for s, n in zip(box, shape.shape, strict=True))
    out[near] = work(mask[near])
    return out


def _met(mask: Mask, shape: Mask) -> Mask:
    """Voxels i with a True mask[i - (n - 1)//2 + j] for a True shape[j]: counted by Fourier transforms."""
    # scipy.signal takes 0.3 s to import, and few trainings are cascades
    from scipy.signal import fftconvolve

    count = fftconvolve(mask.astype(np.float32), np.flip(shape).astype(np.float32))
    start = [n - 1 - (n - 1) // 2 for n in shape.shape]
    return np.asarray(count[tuple(slice(a, a + n) for a, n in zip(start, mask.shape, strict=True))] > 0.5)
