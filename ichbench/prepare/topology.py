"""The U-Net that fits a patch, and the patch that fits a budget (facts/nnunet-v2.md, sections 3.1, 3.6-3.8).

Axes are the plan's working axes, coarsest first. nnU-Net measures memory in elements of feature maps, for one sample;
comparisons are strict exactly where nnU-Net's are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ichbench.errors import InputError
from ichbench.prepare.resample import ANISOTROPY

Ints = tuple[int, ...]
Floats = tuple[float, ...]
Network = Literal["plain", "residual"]

SMALLEST_EDGE = 4
INITIAL_EDGE = {2: 2048, 3: 256}
#: batch size at which the budget of a family is stated, and widest stage
REFERENCE_BATCH = {2: 12, 3: 2}
WIDEST = {2: 512, 3: 320}
#: residual blocks of the first stages; deeper ones repeat the last number
RESIDUAL_BLOCKS = (1, 3, 4, 6)


@dataclass(frozen=True)
class Family:
    """One of nnU-Net's planners.

    planner       its class name, and `plans_name` the name of the plans it makes
    network       the encoder it plans for
    elements      dims -> feature-map elements that it takes for `reference_gb` at the reference batch size
    batch_share   a batch shows at most this share of the cohort's voxels
    fill_batch    shrink the patch until the whole reference batch fits (in 2D: 12), not only a batch of 2
    """

    planner: str
    plans_name: str
    network: Network
    elements: Mapping[int, int]
    reference_gb: float
    batch_share: float
    fill_batch: bool


FAMILIES: dict[str, Family] = {
    "plain": Family("ExperimentPlanner", "nnUNetPlans", "plain", {2: 85_000_000, 3: 560_000_000}, 8, 0.05, False),
    "resenc": Family("ResEncUNetPlanner", "nnUNetResEncUNetPlans", "residual", {2: 135_000_000, 3: 680_000_000}, 8, 0.05, True),
    "resenc_m": Family("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans", "residual", {2: 135_000_000, 3: 680_000_000}, 8, 1.0, True),
    "resenc_l": Family("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans", "residual", {2: 380_000_000, 3: 2_100_000_000}, 24, 1.0, True),
    "resenc_xl": Family("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans", "residual", {2: 560_000_000, 3: 3_600_000_000}, 40, 1.0, True),
}


@dataclass(frozen=True)
class Topology:
    """U-Net stages for a patch: strides and kernels per stage, the patch padded to a whole number of bottleneck voxels."""

    strides: tuple[Ints, ...]
    kernels: tuple[Ints, ...]
    patch: Ints
    divisor: Ints


@dataclass(frozen=True)
class Shrink:
    """One step of the search: this axis was cut because the estimate of the patch before it was above the budget."""

    axis: int
    patch: Ints
    estimate: int


@dataclass(frozen=True)
class Fit:
    """The patch that fits, and how it was found.

    isotropic    the first guess in voxels: a cube (square) in mm, of 256^3 (2048^2) voxels
    first        that, cut to the median shape and padded; `first_estimate` is its size in elements
    shrinks      what was then cut, in order
    budget       elements that one sample may take
    """

    topology: Topology
    features: Ints
    estimate: int
    isotropic: Ints
    first: Ints
    first_estimate: int
    shrinks: tuple[Shrink, ...]
    budget: float


@dataclass(frozen=True)
class Size:
    """What a configuration is planned for: the family's budget in elements, feature maps and output labels."""

    family: Family
    dims: int
    memory_gb: float
    base_features: int
    widest: int
    n_labels: int

    @property
    def reference(self) -> float:
        """Elements that the reference batch may take."""
        return self.family.elements[self.dims] * (self.memory_gb / self.family.reference_gb)

    @property
    def fits_at(self) -> int:
        """The batch size that the patch is shrunk for."""
        return REFERENCE_BATCH[self.dims] if self.family.fill_batch else 2

    def features(self, n_stages: int) -> Ints:
        """Feature maps a stage: doubled until the widest."""
        return tuple(min(self.widest, self.base_features * 2**stage) for stage in range(n_stages))

    def too_large(self, estimate: int) -> bool:
        """Does a sample of `estimate` elements miss the budget?"""
        if self.family.fill_batch:
            return estimate > self.reference
        return estimate / REFERENCE_BATCH[self.dims] * 2 > self.reference

    def batch(self, estimate: int) -> int:
        """Samples that fit."""
        return round(self.reference / estimate * REFERENCE_BATCH[self.dims])


def topology(spacing: Sequence[float], patch: Sequence[float]) -> Topology:
    """Halve the finest axes again and again while the feature map stays at least 4 voxels wide."""
    axes = range(len(patch))
    spacing, size = list(spacing), list(patch)
    pools, kernel = [0] * len(size), [1] * len(size)
    strides, kernels = [(1,) * len(size)], []
    while True:
        wide = [axis for axis in axes if size[axis] >= 2 * SMALLEST_EDGE]
        if not wide:
            break
        finest = min(spacing[axis] for axis in wide)
        pooled = [axis for axis in wide if spacing[axis] / finest < 2]
        if len(pooled) == 1 and size[pooled[0]] < 3 * SMALLEST_EDGE:
            break
        kernel = [3 if kernel[axis] == 3 or spacing[axis] / min(spacing) < 2 else 1 for axis in axes]
        for axis in pooled:
            spacing[axis] *= 2
            size[axis] = np.ceil(size[axis] / 2)
            pools[axis] += 1
        strides.append(tuple(2 if axis in pooled else 1 for axis in axes))
        kernels.append(tuple(kernel))
    kernels.append((3,) * len(size))
    divisor = tuple(2**count for count in pools)
    padded = tuple(int(np.ceil(n / by)) * by for n, by in zip(patch, divisor, strict=True))
    return Topology(tuple(strides), tuple(kernels), padded, divisor)


def depth(network: Network, n_stages: int) -> tuple[Ints, Ints]:
    """Convolutions (plain) or residual blocks of each encoder stage, and convolutions of each decoder level, as nnU-Net plans them."""
    if network == "plain":
        return (2,) * n_stages, (2,) * (n_stages - 1)
    return (RESIDUAL_BLOCKS + RESIDUAL_BLOCKS[-1:] * n_stages)[:n_stages], (1,) * (n_stages - 1)


def feature_map_elements(
    patch: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    n_labels: int,
    network: Network = "plain",
    convs_per_stage: Sequence[int] | None = None,
    decoder_convs: Sequence[int] | None = None,
) -> int:
    """nnU-Net's memory estimate for one sample, in elements of feature maps, without deep supervision.

    Every convolution counts its output: in a residual block two, and one more where its skip is strided or widened.
    n_labels  entries of dataset.json's `labels`, background, ignore label and regions included
    """
    encoder, decoder = depth(network, len(strides))
    encoder, decoder = tuple(convs_per_stage or encoder), tuple(decoder_convs or decoder)
    elements, size, total, before = [], list(patch), 0, features[0]
    for stride, width, convs in zip(strides, features, encoder, strict=True):
        size = [n // by for n, by in zip(size, stride, strict=True)]
        elements.append(width * int(np.prod(size, dtype=np.int64)))
        if network == "plain":
            total += convs * elements[-1]
        else:
            total += (2 * convs + (max(stride) > 1 or width != before)) * elements[-1]
        before = width
    stem = elements[0] if network == "residual" else 0
    up = sum((1 + convs) * each for convs, each in zip(decoder, elements[:-1], strict=True))
    # nnU-Net finds no output layer in a network without a decoder
    output = n_labels * (elements[0] // features[0]) if len(elements) > 1 else 0
    return stem + total + up + output


def fit_patch(spacing: Sequence[float], median_shape: Sequence[float], size: Size) -> Fit:
    """Search the patch as nnU-Net does: from an isotropic cube cut to the median case, shrink the axis that covers most of it."""
    first_guess = _isotropic(spacing)
    found = topology(spacing, [min(a, b) for a, b in zip(first_guess, median_shape, strict=True)])
    if min(found.patch) < 1:
        raise InputError(f"the median case has {_x(median_shape)} voxels at a spacing of {_x(spacing)} mm; choose a finer spacing")
    features, estimate = estimated(found, size)
    first, first_estimate = found.patch, estimate
    shrinks = []
    while size.too_large(estimate):
        ratio = [a / b for a, b in zip(found.patch, median_shape, strict=True)]
        axis = max(range(len(ratio)), key=lambda one: (ratio[one], one))
        # the step is what divides the patch after the cut: 256 with 64 would miss 224, which 32 divides
        step = topology(spacing, _minus(found.patch, axis, found.divisor[axis])).divisor[axis]
        reduced = _minus(found.patch, axis, step)
        if min(reduced) < 1:
            raise InputError(f"no patch fits plan.memory_gb = {size.memory_gb:g} with {size.n_labels} labels; raise memory_gb")
        found = topology(spacing, reduced)
        shrinks.append(Shrink(axis, found.patch, estimate))
        features, estimate = estimated(found, size)
    budget = size.reference * REFERENCE_BATCH[size.dims] / size.fits_at
    return Fit(found, features, estimate, first_guess, first, first_estimate, tuple(shrinks), budget)


def estimated(found: Topology, size: Size) -> tuple[Ints, int]:
    """Features a stage, and the memory estimate of that network."""
    features = size.features(len(found.strides))
    return features, feature_map_elements(found.patch, found.strides, features, size.n_labels, size.family.network)


def is_anisotropic(patch: Sequence[int]) -> bool:
    """A 3D patch more than 3 times wider than deep."""
    return len(patch) == 3 and max(patch) / patch[0] > ANISOTROPY


def _isotropic(spacing: Sequence[float]) -> Ints:
    dims = len(spacing)
    inverse = 1 / np.asarray(spacing, dtype=np.float64)
    return tuple(round(value) for value in inverse * (INITIAL_EDGE[dims] ** dims / np.prod(inverse)) ** (1 / dims))


def _minus(patch: Ints, axis: int, by: int) -> list[int]:
    return [n - by if one == axis else n for one, n in enumerate(patch)]


def _x(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
