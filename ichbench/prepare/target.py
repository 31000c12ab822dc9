"""The working spacing and the order of the axes (facts/nnunet-v2.md, sections 3.2-3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ichbench.errors import InputError
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.resample import ANISOTROPY
from ichbench.recipe import PlanRecipe

Floats3 = tuple[float, float, float]
Ints3 = tuple[int, int, int]


@dataclass(frozen=True)
class Target:
    """Working spacing in array order (mm), the transposition, and the median case at that spacing (array order, unrounded).

    median_zyx_mm    per axis the median spacing of the cases, from which the rule starts
    typical_shape    per axis the median shape of the cases as they come
    refined_axis     the thick axis whose spacing was taken from the finest tenth of the cases, or None
    chosen           the recipe fixed the spacing of one axis or more
    """

    spacing_zyx_mm: Floats3
    transpose_forward: Ints3
    median_shape_zyx: Floats3
    median_zyx_mm: Floats3
    typical_shape: Floats3
    refined_axis: int | None
    chosen: bool

    @property
    def transpose_backward(self) -> Ints3:
        """The inverse of `transpose_forward`."""
        back = sorted(range(3), key=self.transpose_forward.__getitem__)
        return back[0], back[1], back[2]

    @property
    def spacing_mm(self) -> Floats3:
        """Working spacing, working axes."""
        first, second, third = self.transpose_forward
        return self.spacing_zyx_mm[first], self.spacing_zyx_mm[second], self.spacing_zyx_mm[third]

    @property
    def median_shape(self) -> Floats3:
        """The median case at the working spacing, working axes."""
        first, second, third = self.transpose_forward
        return self.median_shape_zyx[first], self.median_shape_zyx[second], self.median_shape_zyx[third]


def target(fingerprint: Fingerprint, recipe: PlanRecipe) -> Target:
    """nnU-Net's rule: the median spacing; where slices are thick and few, the thick axis takes the 10th percentile.

    The coarsest axis of the working spacing comes first. `target_spacing_zyx_mm` replaces the rule (and so decides which axis
    is first); `spacing_mm` replaces single entries of its outcome, along the axes that the rule ordered.
    """
    spacings = np.asarray(fingerprint.spacings, dtype=np.float64)
    medians = np.percentile(spacings, 50, axis=0)
    shape = np.percentile(np.asarray(fingerprint.shapes_after_crop, dtype=np.float64), 50, axis=0)
    wanted, refined = medians.copy(), None
    if recipe.target_spacing_zyx_mm != "auto":
        wanted = np.asarray(recipe.target_spacing_zyx_mm, dtype=np.float64)
    else:
        worst = int(np.argmax(wanted))
        others = [axis for axis in range(3) if axis != worst]
        widest_other = max(wanted[axis] for axis in others)
        if wanted[worst] > ANISOTROPY * widest_other and shape[worst] * ANISOTROPY < min(shape[axis] for axis in others):
            tenth = np.percentile(spacings[:, worst], 10)
            wanted[worst], refined = (tenth if tenth >= widest_other else widest_other + 1e-5), worst
    first = int(np.argmax(wanted))
    second, third = (axis for axis in range(3) if axis != first)
    forward = (first, second, third)
    if recipe.spacing_mm != "auto":
        if len(recipe.spacing_mm) != recipe.dims:
            raise InputError(f"plan.spacing_mm = {recipe.spacing_mm}, but dims = {recipe.dims}; give one entry per axis, coarsest first")
        for axis, value in zip(forward[3 - recipe.dims :], recipe.spacing_mm, strict=True):
            wanted[axis] = value
    spacing = _floats3(wanted)
    shapes = [_new_shape(*case, spacing) for case in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)]
    chosen = recipe.spacing_mm != "auto" or recipe.target_spacing_zyx_mm != "auto"
    return Target(spacing, forward, _floats3(np.median(shapes, axis=0)), _floats3(medians), _floats3(shape), refined, chosen)


def _new_shape(shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]) -> list[int]:
    """Voxels at the new spacing, halves to even. Unlike `resampled_shape` it may be 0: nnU-Net's median counts such a case as 0."""
    return [round(old / new * n) for old, new, n in zip(spacing_mm, new_spacing_mm, shape, strict=True)]


def _floats3(values: Sequence[float] | np.ndarray) -> Floats3:
    return float(values[0]), float(values[1]), float(values[2])
