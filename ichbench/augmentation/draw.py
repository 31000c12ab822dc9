"""What happens to a training patch, as numbers: drawn here from a generator, stored in a frozen value, applied elsewhere.

The law is nnU-Net's (facts section 6). Every sample takes the same sequence of values from its generator whatever the
recipe says, so that switching one transform off leaves the others as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ichbench.augmentation.patches import patch_zyx
from ichbench.recipe import AugmentRecipe

#: a 3D patch whose longest axis is more than this many times its first is turned and scaled in plane only
ANISOTROPY = 3.0
#: a 2D patch longer than this many times its other side is turned by at most 15 degrees
ELONGATION = 1.5
#: what may happen to a label of the previous stage, each with equal chance
MORPHOLOGY = ("dilate", "erode", "open", "close")


@dataclass(frozen=True)
class AugmentDraw:
    """What happens to one patch. None or empty: not drawn. Tuples "per channel" hold None for a channel left alone.

    mirror_zyx          axes that are flipped
    rotation_degrees    about the axes (z, y, x), x turned last
    scale               size of the region read, per voxel of the patch: above 1 shows more, smaller
    in_plane            the slice axis takes no part in rotation, scaling and loss of resolution
    noise_sd            standard deviation of noise added to all channels; its field follows from noise_seed and the device
    blur_sigma_zyx      per channel, in voxels
    brightness, contrast, gamma_inverted, gamma   a factor or an exponent per channel
    low_resolution      per channel the share of the voxels kept along an axis
    """

    mirror_zyx: tuple[bool, bool, bool] = (False, False, False)
    rotation_degrees: tuple[float, float, float] | None = None
    scale: float | None = None
    in_plane: bool = False
    noise_sd: float | None = None
    noise_seed: int = 0
    blur_sigma_zyx: tuple[tuple[float, float, float] | None, ...] = ()
    brightness: tuple[float, ...] = ()
    contrast: tuple[float, ...] = ()
    low_resolution: tuple[float | None, ...] = ()
    gamma_inverted: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()

    @property
    def is_spatial(self) -> bool:
        return self.rotation_degrees is not None or self.scale is not None

    @property
    def changes_intensity(self) -> bool:
        return self.noise_sd is not None or any(
            (self.blur_sigma_zyx, self.brightness, self.contrast, self.low_resolution, self.gamma_inverted, self.gamma)
        )


@dataclass(frozen=True)
class CascadeDraw:
    """What happens to the labels of the previous stage: first each (label, operation, radius in voxels) of `morphology`
    in this order, then for each (label, place) of `remove_component` one of its small components, place in [0, 1) saying which.
    """

    morphology: tuple[tuple[int, str, float], ...] = ()
    remove_component: tuple[tuple[int, float], ...] = ()


def acts_in_plane(recipe: AugmentRecipe, patch_size: Sequence[int]) -> bool:
    """Does the slice axis take no part in rotation and scaling? nnU-Net's rule for "auto", else the recipe's word."""
    if len(patch_size) == 2:
        return True
    return max(patch_size) / patch_size[0] > ANISOTROPY if recipe.in_plane == "auto" else recipe.in_plane


def rotation_limits(recipe: AugmentRecipe, patch_size: Sequence[int]) -> tuple[float, float, float]:
    """The largest angle about (z, y, x) in degrees: nnU-Net's rule for "auto", else the recipe's number."""
    chosen, in_plane = recipe.rotation_degrees, acts_in_plane(recipe, patch_size)
    if chosen == "auto" and len(patch_size) == 2:
        angle = 15.0 if max(patch_size) / min(patch_size) > ELONGATION else 180.0
    elif chosen == "auto":
        angle = 180.0 if in_plane else 30.0
    else:
        angle = chosen
    return (angle, 0.0, 0.0) if in_plane else (angle, angle, angle)


def enlarged_zyx(recipe: AugmentRecipe, patch_size: Sequence[int]) -> tuple[int, int, int]:
    """The box (z, y, x) that nnU-Net cuts to turn a patch in: one corner of it turned by the largest angle (at most 90
    degrees) about each axis alone, over 0.85. It is too small for many draws (scaling goes to 1.4), so that zeros come in.
    """
    size, dims = np.array(patch_size, dtype=float), len(patch_size)
    angle = np.radians(min(90.0, max(rotation_limits(recipe, patch_size))))
    cos, sin = np.cos(angle), np.sin(angle)
    reach = [size]
    for first, second in [(0, 1)] if dims == 2 else [(1, 2), (2, 0), (0, 1)]:
        turned = size.copy()
        turned[first], turned[second] = abs(cos * size[first] + sin * size[second]), abs(cos * size[second] - sin * size[first])
        reach.append(turned)
    box = [int(length) for length in np.max(reach, axis=0) / 0.85]
    if dims == 3 and acts_in_plane(recipe, patch_size):
        box[0] = patch_size[0]
    return patch_zyx(box)


def mirror_axes(recipe: AugmentRecipe, patch_size: Sequence[int]) -> tuple[bool, bool, bool]:
    """Which of the axes (z, y, x) may be flipped; the recipe counts the plan's axes, and a 2D plan has no slice axis."""
    dims = len(patch_size)
    axes = range(dims) if recipe.mirror is True else recipe.mirror or ()
    z, y, x = (axis - (3 - dims) in axes for axis in range(3))
    return z, y, x


def draw_augmentation(rng: np.random.Generator, recipe: AugmentRecipe, patch_size: Sequence[int], channels: int) -> AugmentDraw:
    """Draw every transform of one sample of `channels` channels. `patch_size` is the plan's, (z, y, x) or (y, x)."""
    gate = rng.random(9)
    angles = rng.uniform(-1, 1, 3) * np.array(rotation_limits(recipe, patch_size))
    scale = float(rng.uniform(*recipe.scaling))
    sd = float(rng.uniform(*recipe.noise_sd))
    noise_seed = int(rng.integers(2**63))
    flips = rng.random(3) < 0.5
    inverted, plain = (_around_one(rng, channels, recipe.gamma) for _ in range(2))
    blurred = rng.random(channels) < recipe.blur_channel_probability
    sigmas = rng.uniform(*recipe.blur_sigma, (channels, 3))
    brightness, contrast = (_around_one(rng, channels, limits) for limits in (recipe.brightness, recipe.contrast))
    coarse = rng.random(channels) < recipe.low_resolution_channel_probability
    kept = rng.uniform(*recipe.low_resolution, channels)
    flat = patch_zyx(patch_size)[0] == 1
    blur = tuple(_sigmas(row, flat) if yes else None for row, yes in zip(sigmas, blurred, strict=True))
    low = tuple(float(share) if yes else None for share, yes in zip(kept, coarse, strict=True))
    z, y, x = (bool(flip and allowed) for flip, allowed in zip(flips, mirror_axes(recipe, patch_size), strict=True))
    return AugmentDraw(
        mirror_zyx=(z, y, x),
        rotation_degrees=(float(angles[0]), float(angles[1]), float(angles[2])) if gate[0] < recipe.rotation_probability else None,
        scale=scale if gate[1] < recipe.scaling_probability else None,
        in_plane=acts_in_plane(recipe, patch_size),
        noise_sd=sd if gate[2] < recipe.noise_probability else None,
        noise_seed=noise_seed,
        gamma_inverted=inverted if gate[3] < recipe.gamma_inverted_probability else (),
        gamma=plain if gate[4] < recipe.gamma_probability else (),
        blur_sigma_zyx=blur if gate[5] < recipe.blur_probability and blurred.any() else (),
        brightness=brightness if gate[6] < recipe.brightness_probability else (),
        contrast=contrast if gate[7] < recipe.contrast_probability else (),
        low_resolution=low if gate[8] < recipe.low_resolution_probability and coarse.any() else (),
    )


def draw_cascade(rng: np.random.Generator, recipe: AugmentRecipe, labels: int) -> CascadeDraw:
    """Draw what happens to the labels 1..`labels` of the previous stage."""
    gate = rng.random(2)
    order = [int(label) for label in rng.permutation(labels) + 1]
    chosen, removed = rng.random((2, labels))
    operations = rng.integers(len(MORPHOLOGY), size=labels)
    radii = rng.uniform(*recipe.morphology_radius, labels)
    places = rng.random(labels)
    changed = tuple(
        (label, MORPHOLOGY[operations[label - 1]], float(radii[label - 1]))
        for label in order
        if chosen[label - 1] < recipe.morphology_label_probability
    )
    lost = tuple((label, float(places[label - 1])) for label in order if removed[label - 1] < recipe.remove_component_label_probability)
    return CascadeDraw(
        morphology=changed if gate[0] < recipe.morphology_probability else (),
        remove_component=lost if gate[1] < recipe.remove_component_probability else (),
    )


def _around_one(rng: np.random.Generator, channels: int, limits: tuple[float, float]) -> tuple[float, ...]:
    """A factor per channel, below or above 1 with equal chance (when the limits allow both), uniform on its side."""
    low, high = limits
    middle = min(max(low, 1.0), high)
    values = []
    for side, place in rng.random((channels, 2)).tolist():
        # with the limits on one side of 1, that side has every draw
        below = (side < 0.5 and low < middle) or middle >= high
        values.append(low + place * (middle - low) if below else middle + place * (high - middle))
    return tuple(values)


def _sigmas(row: NDArray[np.float64], flat: bool) -> tuple[float, float, float]:
    return (0.0 if flat else float(row[0])), float(row[1]), float(row[2])
