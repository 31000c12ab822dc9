"""Resampling to the plan's spacing and back: nnU-Net's rules (facts/nnunet-v2.md, section 4).

"spline" is nnU-Net's own. "torch" and "torch_sepz" are what its planners named torchres ask for: linear interpolation in
single precision, with "torch_sepz" and "spline" by the rule of thick slices.

Thick slices are resampled apart ("separate z"): splines in plane, nearest neighbour across slices. Axes here are the
plan's working axes, coarsest first, called (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ichbench.prepare.linear import resize_labels, resize_linear, single_nearest_index
from ichbench.prepare.resize import nearest_index, resize_into

#: above this ratio of the coarsest to the finest spacing an axis is resampled apart, and planned as anisotropic
ANISOTROPY = 3
Resampling = Literal["spline", "torch", "torch_sepz"]


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Voxels at the new spacing: round(old / new * n), halves to even, evaluated in this order; at least 1."""
    return tuple(max(1, round(old / new * n)) for old, new, n in zip(spacing_mm, new_spacing_mm, shape, strict=True))


def separate_axis(spacing_mm: Sequence[float], new_spacing_mm: Sequence[float], how: Resampling = "spline") -> int | None:
    """The axis to resample apart, or None: anisotropic (ratio > 3, strictly) before, or else after, with one coarsest axis."""
    if how == "torch":
        return None
    for spacing in (spacing_mm, new_spacing_mm):
        if max(spacing) / min(spacing) > ANISOTROPY:
            coarsest = [axis for axis, value in enumerate(spacing) if value == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resample_image(
    image_czyx: NDArray[np.floating],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
    order: int = 3,
    how: Resampling = "spline",
) -> NDArray[np.floating]:
    """Image or logits (c, z, y, x) on another shape, spline `order` (3 images, 1 logits; torch: 1), order 0 across thick slices.

    Computed in float64 and clipped to the input's range, or, as torch does, in float32 and not clipped; returned in the input's dtype.
    The same shape returns the input.
    """
    if tuple(shape) == image_czyx.shape[1:]:
        return image_czyx
    axis = separate_axis(spacing_mm, new_spacing_mm, how)
    out = np.empty((len(image_czyx), *shape), dtype=image_czyx.dtype)
    for channel, new in zip(image_czyx, out, strict=True):
        if order == 1 or how != "spline":
            new[...] = resize_linear(channel, shape, axis, single=how != "spline")
        elif axis is None:
            resize_into(new, channel, order)
        else:
            slices, new_slices = np.moveaxis(channel, axis, 0), np.moveaxis(new, axis, 0)
            for source, places in _used_slices(len(slices), len(new_slices)):
                resize_into(new_slices[places.start], slices[source], order)
                new_slices[places.start + 1 : places.stop] = new_slices[places.start]
    return out


def resample_labels(
    labels_zyx: NDArray[np.integer],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    new_spacing_mm: Sequence[float],
    how: Resampling = "spline",
) -> NDArray[np.integer]:
    """Labels on another shape: the largest linear indicator (see `resize_labels`); nearest slice across thick slices."""
    if tuple(shape) == labels_zyx.shape:
        return labels_zyx
    axis, single = separate_axis(spacing_mm, new_spacing_mm, how), how != "spline"
    if axis is None:
        return resize_labels(labels_zyx, shape, single)
    out = np.empty(tuple(shape), dtype=labels_zyx.dtype)
    slices, new_slices = np.moveaxis(labels_zyx, axis, 0), np.moveaxis(out, axis, 0)
    for source, places in _used_slices(len(slices), len(new_slices), single):
        new_slices[places] = resize_labels(slices[source], new_slices.shape[1:], single)
    return out


def _used_slices(n_in: int, n_out: int, single: bool = False) -> list[tuple[int, slice]]:
    """Each input slice that is nearest to some output slices, and those output slices."""
    index = (single_nearest_index if single else nearest_index)(n_in, n_out)
    used, first, count = np.unique(index, return_index=True, return_counts=True)
    return [(int(source), slice(int(a), int(a + n))) for source, a, n in zip(used, first, count, strict=True)]
