"""Which patch a training sample is cut from: drawn from (seed, stream, step, sample) alone, then cut.

The rule is nnU-Net's (facts section 5): cases with replacement; the last round(share) of a batch are centred on a voxel
of a random class that the case has, the others lie anywhere. One thing differs: a patch centred near the far border is
moved back inside, where nnU-Net (and `compatibility = "nnunet"`) lets it hang out by up to half its size.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ichbench.augmentation.boxes import Box, bounding_box
from ichbench.errors import InputError
from ichbench.prepare.locations import Location

#: streams of random numbers; a batch for validation never repeats one for training
TRAIN_STREAM, VALIDATION_STREAM, CHOICE_STREAM = 0, 1, 2


class TrainingWarning(UserWarning):
    """A setting of the recipe cannot act here as it is written."""


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """A prepared case: normalised `image_czyx` float32, `labels_zyx` int16 (-1 lies outside the head's box) and
    `foreground`, voxel coordinates (n, 3) in (z, y, x) for every class above 0 or region, and with an ignore label for the
    annotated voxels (a region that holds -1). `previous_zyx` holds the labels that a cascade's earlier stage gave, uint8.
    Arrays may be memory maps.
    """

    id: str
    image_czyx: NDArray[np.float32]
    labels_zyx: NDArray[np.int16]
    foreground: Mapping[Location, NDArray[np.integer]]
    previous_zyx: NDArray[np.uint8] | None = None

    @cached_property
    def labels_box(self) -> Box | None:
        """The box of all labels above 0; elsewhere a patch needs none of the labels. Read once."""
        return bounding_box(self.labels_zyx > 0)

    @cached_property
    def previous_box(self) -> Box | None:
        return None if self.previous_zyx is None else bounding_box(self.previous_zyx > 0)


@dataclass(frozen=True)
class PatchDraw:
    """One patch: the case by its place in the sequence, the corner and size along (z, y, x); `label` is the class it
    was centred on, or None for a patch that may lie anywhere. The corner may be negative. With `enlarged` the box is
    nnU-Net's larger one: the patch lies in its middle, and nothing beyond it is read.
    """

    case: int
    lower_zyx: tuple[int, int, int]
    size_zyx: tuple[int, int, int]
    label: Location | None
    enlarged: bool = False


def sample_generator(seed: int, stream: int, step: int, sample: int) -> np.random.Generator:
    """A counter-based generator (Philox): any sample of any batch can be drawn again alone, in any order."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, stream, sample]))


def is_forced(sample: int, batch_size: int, foreground_share: float) -> bool:
    """Must sample `sample` of a batch show foreground? nnU-Net's rule: from place round(batch (1 - share)) on."""
    return sample >= round(batch_size * (1 - foreground_share))


def patch_zyx(patch_size: Sequence[int]) -> tuple[int, int, int]:
    """A plan's patch as (z, y, x): a 2D patch is one slice thick."""
    z, y, x = (1, *patch_size) if len(patch_size) == 2 else patch_size
    return z, y, x


def draw_patch(
    rng: np.random.Generator,
    cases: Sequence[TrainingCase],
    patch_size: Sequence[int],
    forced: bool,
    centred: bool = True,
    clamped: bool = True,
    box_zyx: Sequence[int] | None = None,
) -> PatchDraw:
    """Draw case and corner for one sample. A case without foreground gives a patch anywhere, also when `forced`.

    centred  the forced voxel lies in the middle of the patch (nnU-Net's rule), or else anywhere in it
    clamped  a patch about a voxel near the far border is moved back inside; nnU-Net lets it hang out
    box_zyx  the larger box, in (z, y, x), of which nnU-Net makes the patch by turning and scaling; it is this that is placed

    With an ignore label every patch is placed about an annotated voxel, where no class is asked for or present.
    """
    if not cases:
        raise InputError("there is no case to draw patches from; give at least one training case")
    index = int(rng.integers(len(cases)))
    case, patch = cases[index], patch_zyx(patch_size)
    size = patch if box_zyx is None else (int(box_zyx[0]), int(box_zyx[1]), int(box_zyx[2]))
    present = _present(case.foreground, forced)
    label = present[int(rng.integers(len(present)))] if present else None
    voxel = None if label is None else case.foreground[label][int(rng.integers(len(case.foreground[label])))]
    lower = []
    for axis in range(3):
        low, high = corner_range(case.labels_zyx.shape[axis], size[axis], size[axis] - patch[axis])
        if voxel is None:
            lower.append(int(rng.integers(low, high + 1)))
        else:
            # of a larger box the patch is the middle
            before = size[axis] // 2 if centred else size[axis] // 2 - patch[axis] // 2 + int(rng.integers(patch[axis]))
            corner = max(low, int(voxel[axis]) - before)
            lower.append(min(corner, high) if clamped else corner)
    return PatchDraw(index, (lower[0], lower[1], lower[2]), size, label, enlarged=box_zyx is not None)


def _present(foreground: Mapping[Location, NDArray[np.integer]], forced: bool) -> list[Location]:
    """The classes to choose from: those with voxels, or the annotated voxels where no class is forced or there is none."""
    found = [location for location, voxels in foreground.items() if len(voxels)]
    annotated: list[Location] = [location for location in found if isinstance(location, tuple) and location[0] < 0]
    classes = sorted(
        (location for location in found if location not in annotated), key=lambda one: one if isinstance(one, tuple) else (one,)
    )
    return (classes if forced else []) or annotated


def corner_range(length: int, patch: int, margin: int = 0) -> tuple[int, int]:
    """Lowest and highest corner along one axis, both allowed: inside the image, or the image centred in the patch.

    margin    voxels by which the patch is larger than what will be made of it: so many may lie outside, half on each side
    """
    missing = max(margin, patch - length)
    return -((missing + 1) // 2), length - patch + missing - missing // 2


def choose_cases(cases: Sequence[TrainingCase], number: int | str, seed: int) -> list[TrainingCase]:
    """All cases, or the first `number` of a shuffle by `seed`: a larger number keeps those of a smaller one.

    Where there are fewer, all are used, with a `TrainingWarning`.
    """
    if isinstance(number, str):
        return list(cases)
    if number > len(cases):
        warnings.warn(f"training.cases = {number}, but there are {len(cases)}; all of them are used", TrainingWarning, stacklevel=2)
        return list(cases)
    order = sample_generator(seed, CHOICE_STREAM, 0, 0).permutation(len(cases))
    return [cases[i] for i in sorted(order[:number])]
