"""One sample: cut from its case, turned, changed, its labels beside it, all into tensors that are there already.

The order is nnU-Net's (facts section 6): rotation and scaling, intensities, mirroring (done with the cut: it commutes),
masked channels, -1 to 0, the previous stage. In a turn our patch reads the case itself, however far it reaches; under
`compatibility = "nnunet"` it reads the box that nnU-Net cuts, beyond which all is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ichbench.augmentation.boxes import Box, Ints, common_box, cut_into, ints, slices
from ichbench.augmentation.cascade_augment import change_previous, one_hot
from ichbench.augmentation.draw import AugmentDraw, CascadeDraw
from ichbench.augmentation.intensity import change_intensity
from ichbench.augmentation.patches import PatchDraw, TrainingCase
from ichbench.augmentation.spatial import Cut, reading, source_box, turn_image, turn_labels
from ichbench.errors import CaseError

OUTSIDE_IMAGE, OUTSIDE_LABEL = 0.0, -1


def empty(shape: Sequence[int], device: torch.device) -> Tensor:
    """Float32, of any content. On a CPU the memory comes from numpy, which asks the system for large pages: a batch of
    2 x 16 x 320 x 320 is then filled in 1.6 ms, where torch's own memory takes 17 ms."""
    return torch.from_numpy(np.empty(tuple(shape), np.float32)) if device.type == "cpu" else torch.empty(tuple(shape), device=device)


def no_labels(shape: Sequence[int], device: torch.device) -> Tensor:
    """Int16 zeros; on a CPU from numpy, too."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(tuple(shape), np.int16))
    return torch.zeros(tuple(shape), dtype=torch.int16, device=device)


def fill_sample(
    case: TrainingCase,
    patch: PatchDraw,
    change: AugmentDraw,
    cascade: CascadeDraw,
    image_czyx: Tensor,
    labels_zyx: Tensor,
    previous_labels: int = 0,
    masked_channels: Sequence[int] = (),
    largest_component: float = 0.0,
) -> None:
    """Write a drawn sample into `image_czyx` float32, of any content, and `labels_zyx`, of any integer type and zeros, both of
    the patch's size and contiguous.

    previous_labels    so many last channels of the image are the labels 1.. of the case's `previous_zyx`
    masked_channels    channels that are 0 wherever the label is -1
    Raises CaseError where the case has no labels of the previous stage, or of another shape.
    """
    own = image_czyx[: len(image_czyx) - previous_labels]
    _fill_image(case, patch, change, own)
    masked = len(masked_channels) > 0
    _fill_labels(case.labels_zyx, case.labels_box, masked, patch, change, labels_zyx)
    if change.changes_intensity:
        change_intensity(own, change)
    if masked:
        for channel in masked_channels:
            own[channel].masked_fill_(labels_zyx < 0, 0)
        labels_zyx.clamp_(min=0)
    if previous_labels:
        found = torch.zeros(labels_zyx.shape, dtype=torch.int16)
        _fill_labels(_previous(case), case.previous_box, False, patch, change, found)
        channels = one_hot(found.numpy(), previous_labels)
        change_previous(channels, cascade, largest_component)
        image_czyx[len(own) :] = torch.from_numpy(channels).to(image_czyx.device)


def _fill_image(case: TrainingCase, patch: PatchDraw, change: AugmentDraw, out: Tensor) -> None:
    size = ints(out.shape[1:])
    if change.is_spatial:
        where = reading(change, (patch.lower_zyx, patch.size_zyx), size)
        box = source_box(where, size, _bounds(case.labels_zyx.shape, patch), change.in_plane)
        if box is not None:
            turn_image(_cutting(case.image_czyx, patch, OUTSIDE_IMAGE), box, where, change.in_plane, out)
        else:
            out.fill_(OUTSIDE_IMAGE)
    elif out.device.type == "cpu":
        cut_into(_flipped(out.numpy(), change), case.image_czyx, _corner(patch, size), OUTSIDE_IMAGE)
    else:
        host = torch.empty(out.shape, pin_memory=out.device.type == "cuda")
        cut_into(_flipped(host.numpy(), change), case.image_czyx, _corner(patch, size), OUTSIDE_IMAGE)
        out.copy_(host, non_blocking=True)


def _fill_labels(array: NDArray[Any], labelled: Box | None, outside: bool, patch: PatchDraw, change: AugmentDraw, out: Tensor) -> None:
    """Labels of a patch. `labelled` is the box of those above 0; with `outside` -1 counts too, or else becomes 0."""
    size = ints(out.shape)
    if labelled is None and not outside:
        return
    if change.is_spatial:
        where = reading(change, (patch.lower_zyx, patch.size_zyx), size)
        box = source_box(where, size, _bounds(array.shape, patch), change.in_plane)
        if box is not None:
            turn_labels(_cutting(array, patch, OUTSIDE_LABEL), box, where, change.in_plane, None if outside else labelled, out)
        elif outside:
            out.fill_(OUTSIDE_LABEL)
    else:
        whole = (_corner(patch, size), size)
        seen = whole if outside or labelled is None else common_box(whole, labelled)
        if seen is not None:
            first = np.subtract(seen[0], whole[0])
            first = np.where(change.mirror_zyx, np.array(size) - first - seen[1], first)
            target = out[slices((ints(first), seen[1]))]
            labels = target.numpy() if out.device.type == "cpu" else np.empty(seen[1], np.int16)
            cut_into(_flipped(labels, change), array, seen[0], OUTSIDE_LABEL)
            if not outside:
                np.maximum(labels, 0, out=labels)
            if out.device.type != "cpu":
                target.copy_(torch.from_numpy(labels))


def _previous(case: TrainingCase) -> NDArray[np.uint8]:
    if case.previous_zyx is None:
        raise CaseError(f"{case.id}: the labels of the previous stage are missing, which this network takes as input; predict them first")
    if case.previous_zyx.shape != case.labels_zyx.shape:
        shapes = f"{case.previous_zyx.shape}, the case has {case.labels_zyx.shape}"
        raise CaseError(f"{case.id}: the labels of the previous stage have the shape {shapes}; predict them again")
    return case.previous_zyx


def _cutting(array: NDArray[Any], patch: PatchDraw, outside: float) -> Cut:
    """Cut from an array of the case; of an enlarged patch nothing beyond its box."""

    def cut(out: NDArray[Any], lower_zyx: Ints) -> None:
        cut_into(out, array, lower_zyx, outside)
        if patch.enlarged:
            for axis, (low, first, size) in enumerate(zip(lower_zyx, patch.lower_zyx, patch.size_zyx, strict=True)):
                rows = np.moveaxis(out, out.ndim - 3 + axis, 0)
                rows[: max(0, first - low)] = outside
                rows[max(0, first + size - low) :] = outside

    return cut


def _bounds(shape: Sequence[int], patch: PatchDraw) -> tuple[Sequence[int], Sequence[int]]:
    """First voxel and last plus one of what may be read."""
    if not patch.enlarged:
        return (0, 0, 0), shape
    ends = [low + size for low, size in zip(patch.lower_zyx, patch.size_zyx, strict=True)]
    return [max(0, low) for low in patch.lower_zyx], [min(n, end) for n, end in zip(shape, ends, strict=True)]


def _corner(patch: PatchDraw, size: Ints) -> Ints:
    """Where the patch begins: in the middle of its box."""
    return ints([low + big // 2 - small // 2 for low, big, small in zip(patch.lower_zyx, patch.size_zyx, size, strict=True)])


def _flipped(array: NDArray[Any], change: AugmentDraw) -> NDArray[Any]:
    """A view that is filled backwards along the mirrored axes, the last three."""
    z, y, x = (slice(None, None, -1 if flip else 1) for flip in change.mirror_zyx)
    return array[..., z, y, x]
