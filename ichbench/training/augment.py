"""Random changes of a training patch: drawn first, as numbers that can be stored, then applied.

In order: rotation and scaling, noise, gamma on the negative, gamma, mirroring (facts section 6). Angles and factors are
in voxels of the working grid, as in nnU-Net. Rotation and scaling read a larger patch around the same centre, exactly
as large as the draw needs, so that no black corners appear inside the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ichbench.recipe import AugmentRecipe
from ichbench.training.patches import patch_zyx

#: a 3D patch whose longest axis is more than this many times its first is turned in plane only
ANISOTROPY = 3.0
#: a 2D patch longer than this many times its other side is turned by at most 15 degrees
ELONGATION = 1.5


@dataclass(frozen=True)
class AugmentDraw:
    """What happens to one patch. `rotation_degrees` turns about the axes (z, y, x); None or empty: not drawn.

    scale               size of the region read, per voxel of the patch: above 1 shows more, smaller
    in_plane            the slice axis takes no part in rotation and scaling
    gamma, gamma_inverted   one exponent per channel
    """

    mirror_zyx: tuple[bool, bool, bool] = (False, False, False)
    rotation_degrees: tuple[float, float, float] | None = None
    scale: float | None = None
    in_plane: bool = False
    noise_sd: float | None = None
    noise_seed: int = 0
    gamma_inverted: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()

    @property
    def is_spatial(self) -> bool:
        return self.rotation_degrees is not None or self.scale is not None


def rotation_limits(recipe: AugmentRecipe, patch_size: Sequence[int]) -> tuple[float, float, float]:
    """The largest angle about (z, y, x) in degrees: nnU-Net's rule for "auto", else the recipe's number."""
    chosen = recipe.rotation_degrees
    if len(patch_size) == 2:
        wide = 15.0 if max(patch_size) / min(patch_size) > ELONGATION else 180.0
        return (wide if chosen == "auto" else chosen), 0.0, 0.0
    if max(patch_size) / patch_size[0] > ANISOTROPY:
        return (180.0 if chosen == "auto" else chosen), 0.0, 0.0
    angle = 30.0 if chosen == "auto" else chosen
    return angle, angle, angle


def draw_augmentation(rng: np.random.Generator, recipe: AugmentRecipe, patch_size: Sequence[int], channels: int) -> AugmentDraw:
    """Draw every transform of one sample. `patch_size` is the plan's, (z, y, x) or (y, x).

    Always takes the same number of values from `rng`, so that switching one transform off leaves the others as they were.
    """
    flat = len(patch_size) == 2
    chance = rng.random(5)
    angles = rng.uniform(-1, 1, 3) * np.array(rotation_limits(recipe, patch_size))
    scale = float(rng.uniform(*recipe.scaling))
    sd = float(rng.uniform(*recipe.noise_sd))
    noise_seed = int(rng.integers(2**63))
    flips = rng.random(3) < 0.5
    inverted, plain = (tuple(_around_one(row, recipe.gamma) for row in rng.random((channels, 2))) for _ in range(2))
    return AugmentDraw(
        mirror_zyx=(bool(flips[0]) and not flat, bool(flips[1]), bool(flips[2])) if recipe.mirror else (False, False, False),
        rotation_degrees=(float(angles[0]), float(angles[1]), float(angles[2])) if chance[0] < recipe.rotation_probability else None,
        scale=scale if chance[1] < recipe.scaling_probability else None,
        in_plane=flat or max(patch_size) / patch_size[0] > ANISOTROPY,
        noise_sd=sd if chance[2] < recipe.noise_probability else None,
        noise_seed=noise_seed,
        gamma_inverted=inverted if chance[3] < recipe.gamma_inverted_probability else (),
        gamma=plain if chance[4] < recipe.gamma_probability else (),
    )


def source_size(patch_size: Sequence[int], draw: AugmentDraw) -> tuple[int, int, int]:
    """The patch (z, y, x) to cut so that every voxel of the turned and scaled patch lies inside; at least the patch."""
    size = patch_zyx(patch_size)
    if not draw.is_spatial:
        return size
    half = (np.array(size) - 1) / 2
    reach = np.abs(_matrix(draw)) @ half
    # 1e-6: a turn by 0 or 90 degrees must not need another voxel because cos(90 degrees) is 6e-17
    grow = np.ceil(np.maximum(reach - half - 1e-6, 0)).astype(int)
    if draw.in_plane:
        grow[0] = 0
    z, y, x = (int(s + 2 * g) for s, g in zip(size, grow, strict=True))
    return z, y, x


def apply(
    image_czyx: NDArray[np.float32], labels_zyx: NDArray[np.int16], draw: AugmentDraw, patch_size: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """The patch after a draw: arrays of the plan's patch size from arrays of `source_size`. The inputs stay as they are."""
    size = patch_zyx(patch_size)
    if draw.is_spatial:
        image, labels = _resample(image_czyx, labels_zyx, draw, size)
    else:
        image, labels = image_czyx, labels_zyx
    if draw.noise_sd is not None:
        noise = np.random.default_rng(draw.noise_seed).standard_normal(image.shape, dtype=np.float32)
        image = image + np.float32(draw.noise_sd) * noise
    if draw.gamma_inverted:
        image = -_gamma(-image, draw.gamma_inverted)
    if draw.gamma:
        image = _gamma(image, draw.gamma)
    axes = [axis for axis, flip in enumerate(draw.mirror_zyx) if flip]
    if axes:
        image, labels = np.flip(image, tuple(axis + 1 for axis in axes)), np.flip(labels, tuple(axes))
    return image, labels


def _around_one(uniform: NDArray[np.floating], limits: tuple[float, float]) -> float:
    """A factor below or above 1 with equal chance (when the limits allow both), uniform on its side."""
    low, high = limits
    if uniform[0] < 0.5 and low < 1:
        return float(low + uniform[1] * (min(1.0, high) - low))
    start = max(low, 1.0)
    return float(start + uniform[1] * (high - start)) if high > start else float(low + uniform[1] * (high - low))


def _matrix(draw: AugmentDraw) -> NDArray[np.float64]:
    """Offset from the patch centre -> offset from the source's centre, both (z, y, x) in voxels: Rz Ry Rx S."""
    z, y, x = np.radians(draw.rotation_degrees or (0.0, 0.0, 0.0))
    about_z = np.array([[1, 0, 0], [0, math.cos(z), -math.sin(z)], [0, math.sin(z), math.cos(z)]])
    about_y = np.array([[math.cos(y), 0, -math.sin(y)], [0, 1, 0], [math.sin(y), 0, math.cos(y)]])
    about_x = np.array([[math.cos(x), -math.sin(x), 0], [math.sin(x), math.cos(x), 0], [0, 0, 1]])
    scale = draw.scale or 1.0
    return np.asarray(about_z @ about_y @ about_x @ np.diag([1.0 if draw.in_plane else scale, scale, scale]))


def _resample(
    image: NDArray[np.float32], labels: NDArray[np.int16], draw: AugmentDraw, size: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Image: linear. Labels: each class' indicator is interpolated, the largest wins (a tie goes to the lower label)."""
    present = np.unique(labels)
    # one indicator per class but the first, whose share is what the others leave
    masks = [labels == label for label in present[1:]]
    stack = np.concatenate([image, np.stack(masks).astype(np.float32)]) if masks else image
    source = torch.from_numpy(stack)[None]
    matrix, before, after = _matrix(draw), stack.shape[1:], tuple(size)
    if draw.in_plane:
        # slices are independent: they become channels of a 2D image
        source = source.reshape(1, -1, *stack.shape[2:])
        matrix, before, after = matrix[1:, 1:], before[1:], after[1:]
    dims = len(matrix)
    # grid_sample counts in half lengths of the input, affine_grid in half lengths of the output, both with x first
    theta = matrix * np.array(after)[None, :] / np.array(before)[:, None]
    theta = np.concatenate([theta[::-1, ::-1], np.zeros((dims, 1))], axis=1)
    grid = F.affine_grid(torch.from_numpy(theta.astype(np.float32))[None], [1, 1, *after], align_corners=False)
    sampled = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    out = sampled.reshape(stack.shape[0], *size).numpy()
    channels = image.shape[0]
    if not masks:
        return out, np.full(size, present[0], dtype=np.int16)
    shares = np.concatenate([1 - out[channels:].sum(0, keepdims=True), out[channels:]])
    return out[:channels], present[shares.argmax(0)].astype(np.int16)


def _gamma(image: NDArray[np.float32], exponents: Sequence[float]) -> NDArray[np.float32]:
    """Per channel: ((v - min)/range)^g between the old ends, then the old mean and standard deviation again."""
    changed = np.empty_like(image)
    for channel, (old, exponent) in enumerate(zip(image, exponents, strict=True)):
        low, width = float(old.min()), float(old.max() - old.min())
        mean, sd = float(old.mean()), float(old.std())
        new = ((old - low) / max(width, 1e-7)) ** np.float32(exponent) * width + low
        changed[channel] = (new - new.mean()) / max(float(new.std()), 1e-8) * sd + mean
    return changed
