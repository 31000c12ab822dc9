"""Fingerprint + recipe -> Plan, by nnU-Net v2's default rules (facts/nnunet-v2.md, section 3).

Axes in a plan are the working axes: the axis with the coarsest target spacing comes first. Shapes are voxels, spacings mm.
Comparisons are strict exactly where nnU-Net's are, and rounding is Python's (halves to even).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ichbench.errors import InputError
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.normalize import scheme_of
from ichbench.prepare.resample import ANISOTROPY, resampled_shape
from ichbench.prepare.window import is_ct
from ichbench.recipe import PlanRecipe

Ints = tuple[int, ...]
Floats = tuple[float, ...]

#: per number of dimensions: feature-map elements that nnU-Net takes for 8 GB, batch size at that size, widest stage
REFERENCE = {2: (85_000_000, 12, 512), 3: (560_000_000, 2, 320)}
REFERENCE_GB = 8
INITIAL_EDGE = {2: 2048, 3: 256}
SMALLEST_EDGE = 4
SMALLEST_BATCH = 2
#: a batch shows at most this share of the cohort's voxels
BATCH_SHARE = 0.05
LOWRES_STEP = 1.03
MASKED_BELOW = 0.75


@dataclass(frozen=True)
class Topology:
    """U-Net stages for a patch: strides and kernels per stage, the patch padded to a whole number of bottleneck voxels."""

    strides: tuple[Ints, ...]
    kernels: tuple[Ints, ...]
    patch: Ints
    divisor: Ints


@dataclass(frozen=True)
class Plan:
    """What nnU-Net calls a configuration.

    spacing                working spacing, mm (2 entries in 2D: the slice axis keeps each case's own)
    transpose_forward      working axis k is array axis transpose_forward[k]; backward is its inverse
    median_shape           median case at the working spacing, unrounded
    source_channels        channels of the cohort; `channels`: after the window flag; in_channels: with neighbours
    normalization          nnU-Net's scheme per channel; use_mask_for_norm, intensities likewise
    estimate               feature-map elements at batch size 1, which nnU-Net uses for memory
    lowres_spacing         working spacing of the low-resolution stage that nnU-Net would put below this one, or None
    """

    dims: int
    spacing: Floats
    transpose_forward: Ints
    transpose_backward: Ints
    patch_size: Ints
    batch_size: int
    median_shape: Floats
    n_stages: int
    features: Ints
    strides: tuple[Ints, ...]
    kernels: tuple[Ints, ...]
    source_channels: tuple[str, ...]
    channels: tuple[str, ...]
    neighbour_slices: int
    n_classes: int
    normalization: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensities: Mapping[str, Mapping[str, float]]
    batch_dice: bool
    estimate: int
    lowres_spacing: Floats | None = None

    @property
    def in_channels(self) -> int:
        """Input channels of the network: each channel once per slice that it sees."""
        return len(self.channels) * (2 * self.neighbour_slices + 1)

    @property
    def anisotropic(self) -> bool:
        """A 3D patch more than 3 times wider than deep: spatial augmentation stays in plane."""
        return self.dims == 3 and max(self.patch_size) / self.patch_size[0] > ANISOTROPY

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(table) != known:
            missing, unknown = sorted(known - set(table)), sorted(set(table) - known)
            raise InputError(f"not a plan: missing {missing}, unknown {unknown}; prepare the cohort again")
        return cls(**{key: _tuples(value) for key, value in table.items()})

    def explain(self) -> list[str]:
        """The decisions in words."""
        spacing = " x ".join(f"{value:g}" for value in self.spacing)
        first = {0: "z", 1: "y", 2: "x"}[self.transpose_forward[0]]
        stages = ", ".join("x".join(map(str, stride)) for stride in self.strides)
        lines = [
            f"{self.dims}D U-Net at {spacing} mm; axis {first} is coarsest and comes first (transpose {list(self.transpose_forward)}).",
            f"The median case has {' x '.join(f'{n:g}' for n in self.median_shape)} voxels; "
            f"patch {' x '.join(map(str, self.patch_size))}, batch {self.batch_size} ({self.estimate:,} feature-map elements a sample).",
            f"{self.n_stages} stages, features {list(self.features)}, strides {stages}.",
            f"{self.in_channels} input channels ({', '.join(self.channels)}; {self.neighbour_slices} neighbour slices each way), "
            f"{self.n_classes} classes.",
            *(_explain_norm(index, name, self) for index, name in enumerate(self.channels)),
            f"Dice is pooled over {'the batch' if self.batch_dice else 'each sample alone'}.",
        ]
        if self.lowres_spacing is not None:
            lowres = " x ".join(f"{value:.3g}" for value in self.lowres_spacing)
            lines.append(f"The patch shows little of the median case: nnU-Net would add a low-resolution stage at {lowres} mm.")
        return lines


def make_plan(
    fingerprint: Fingerprint,
    recipe: PlanRecipe,
    channel_names: Sequence[str],
    n_labels: int,
    n_cases: int,
    neighbour_slices: int = 0,
) -> Plan:
    """Plan a 2D or 3D configuration.

    channel_names  of the cohort; where the window flag made several channels of a CT channel, the fingerprint knows
    n_labels       declared labels, background included
    n_cases        training cases (nnU-Net: numTraining)

    A patch size in the recipe is still cut to the median shape and padded to what the topology divides by, so that one
    preset serves many cohorts. Whether a low-resolution stage would exist is decided without such overrides.
    """
    fullres_zyx, forward = _target(fingerprint, recipe)
    shapes = [resampled_shape(shape, spacing, fullres_zyx) for shape, spacing in _cases(fingerprint)]
    median_zyx = np.median(shapes, axis=0)
    spacing: Floats = tuple(fullres_zyx[axis] for axis in forward)
    median: Floats = tuple(float(median_zyx[axis]) for axis in forward)
    voxels = float(np.prod(median, dtype=np.float64)) * n_cases
    kept = slice(3 - recipe.dims, None)
    channels = _channels(tuple(channel_names), len(fingerprint.intensities))
    schemes = tuple(scheme_of(name) for name in channels)
    masked = fingerprint.median_relative_size < MASKED_BELOW
    start = Plan(
        dims=recipe.dims,
        spacing=spacing[kept],
        transpose_forward=forward,
        transpose_backward=tuple(forward.index(axis) for axis in range(3)),
        patch_size=(),
        batch_size=0,
        median_shape=median[kept],
        n_stages=0,
        features=(),
        strides=(),
        kernels=(),
        source_channels=tuple(channel_names),
        channels=channels,
        neighbour_slices=neighbour_slices,
        n_classes=n_labels,
        normalization=schemes,
        use_mask_for_norm=tuple(masked and scheme == "ZScoreNormalization" for scheme in schemes),
        intensities=fingerprint.intensities,
        batch_dice=recipe.dims == 2,
        estimate=0,
    )
    if recipe.dims == 3 and recipe.lowres_coverage > 0:
        auto = recipe.model_copy(update={"patch_size": "auto", "batch_size": "auto"})
        lowres = _lowres(_sized(start, auto, voxels), auto, n_cases)
        if lowres is not None:
            start = replace(start, batch_dice=True, lowres_spacing=lowres.spacing)
    return _sized(start, recipe, voxels)


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


def feature_map_elements(patch: Sequence[int], strides: Sequence[Sequence[int]], features: Sequence[int], n_labels: int) -> int:
    """nnU-Net's memory estimate of the plain U-Net for one sample: 2 maps a stage down, 3 a stage up, and the output."""
    volumes, size = [], list(patch)
    for stride in strides:
        size = [n // by for n, by in zip(size, stride, strict=True)]
        volumes.append(int(np.prod(size, dtype=np.int64)))
    down = sum(2 * width * volume for width, volume in zip(features, volumes, strict=True))
    up = sum(3 * width * volume for width, volume in zip(features[:-1], volumes[:-1], strict=True))
    return down + up + n_labels * volumes[0]


def _target(fingerprint: Fingerprint, recipe: PlanRecipe) -> tuple[Floats, Ints]:
    """Target spacing in array order, and the transposition that puts its coarsest axis first."""
    spacings = np.asarray(fingerprint.spacings, dtype=np.float64)
    target = np.percentile(spacings, 50, axis=0)
    shape = np.percentile(np.asarray(fingerprint.shapes_after_crop, dtype=np.float64), 50, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    widest_other = max(target[axis] for axis in others)
    if target[worst] > ANISOTROPY * widest_other and shape[worst] * ANISOTROPY < min(shape[axis] for axis in others):
        tenth = np.percentile(spacings[:, worst], 10)
        target[worst] = tenth if tenth >= widest_other else widest_other + 1e-5
    first = int(np.argmax(target))
    forward = (first, *(axis for axis in range(3) if axis != first))
    if recipe.spacing_mm != "auto":
        if len(recipe.spacing_mm) != recipe.dims:
            raise InputError(f"plan.spacing_mm = {recipe.spacing_mm}, but dims = {recipe.dims}; give one entry per axis, coarsest first")
        for axis, value in zip(forward[3 - recipe.dims :], recipe.spacing_mm, strict=True):
            target[axis] = value
    return tuple(float(value) for value in target), forward


def _sized(plan: Plan, recipe: PlanRecipe, voxels: float) -> Plan:
    """Patch, topology, features and batch size for the plan's spacing and median shape."""
    elements_8gb, reference_batch, widest = REFERENCE[plan.dims]
    reference = elements_8gb * (recipe.memory_gb / REFERENCE_GB)
    widest = widest if recipe.max_features == "auto" else recipe.max_features

    def measured(patch: Sequence[float]) -> tuple[Topology, Ints, int]:
        shape = topology(plan.spacing, patch)
        features = tuple(min(widest, recipe.base_features * 2**stage) for stage in range(len(shape.strides)))
        return shape, features, feature_map_elements(shape.patch, shape.strides, features, plan.n_classes)

    if recipe.patch_size != "auto":
        if len(recipe.patch_size) != plan.dims:
            raise InputError(f"plan.patch_size = {recipe.patch_size}, but dims = {plan.dims}; give one entry per axis, coarsest first")
        shape, features, estimate = measured([min(a, b) for a, b in zip(recipe.patch_size, plan.median_shape, strict=True)])
    else:
        shape, features, estimate = measured(_initial_patch(plan))
        while estimate / reference_batch * 2 > reference:
            ratio = [a / b for a, b in zip(shape.patch, plan.median_shape, strict=True)]
            axis = max(range(plan.dims), key=lambda one: (ratio[one], one))
            smaller = topology(plan.spacing, _minus(shape.patch, axis, shape.divisor[axis]))
            reduced = _minus(shape.patch, axis, smaller.divisor[axis])
            if min(reduced) < 1:
                raise InputError(f"no patch fits plan.memory_gb = {recipe.memory_gb:g} with {plan.n_classes} labels; raise memory_gb")
            shape, features, estimate = measured(reduced)
    if recipe.batch_size != "auto":
        batch = recipe.batch_size
    else:
        fitting = round(reference / estimate * reference_batch)
        share = round(voxels * BATCH_SHARE / float(np.prod(shape.patch, dtype=np.float64)))
        batch = max(min(fitting, share), SMALLEST_BATCH)
    return replace(
        plan,
        patch_size=shape.patch,
        batch_size=batch,
        n_stages=len(shape.strides),
        features=features,
        strides=shape.strides,
        kernels=shape.kernels,
        estimate=estimate,
    )


def _initial_patch(plan: Plan) -> list[float]:
    """An isotropic cube (in mm) of about 256^3 voxels, a square of 2048^2 in 2D, cut to the median shape."""
    inverse = 1 / np.asarray(plan.spacing)
    edge = [round(value) for value in inverse * (INITIAL_EDGE[plan.dims] ** plan.dims / np.prod(inverse)) ** (1 / plan.dims)]
    return [min(a, b) for a, b in zip(edge, plan.median_shape, strict=True)]


def _lowres(fullres: Plan, recipe: PlanRecipe, n_cases: int) -> Plan | None:
    """The low-resolution stage that nnU-Net would put below a 3D plan whose patch shows little of the median case."""
    low = fullres
    spacing = np.asarray(fullres.spacing)
    voxels = float(np.prod(fullres.median_shape, dtype=np.float64))
    while np.prod(low.patch_size, dtype=np.int64) / voxels < recipe.lowres_coverage:
        finer = max(spacing) / spacing > 2
        spacing = spacing * np.where(finer if finer.any() else True, LOWRES_STEP, 1.0)
        shape = np.asarray(fullres.spacing) / spacing * np.asarray(fullres.median_shape)
        voxels = float(np.prod(shape, dtype=np.float64))
        smaller = replace(fullres, spacing=tuple(map(float, spacing)), median_shape=tuple(float(round(n)) for n in shape))
        low = _sized(smaller, recipe, voxels * n_cases)
    if np.prod(fullres.median_shape, dtype=np.float64) / voxels < 2:
        return None
    return replace(low, batch_dice=False)


def _channels(source: tuple[str, ...], n_flagged: int) -> tuple[str, ...]:
    n_ct = sum(is_ct(name) for name in source)
    copies = (n_flagged - len(source)) // n_ct + 1 if n_ct else 1
    names = tuple(name for name in source for _ in range(copies if is_ct(name) else 1))
    if len(names) != n_flagged:
        raise InputError(f"the fingerprint has {n_flagged} channels, which do not follow from the cohort's {list(source)}; take it again")
    return names


def _cases(fingerprint: Fingerprint) -> list[tuple[tuple[int, int, int], tuple[float, float, float]]]:
    return list(zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True))


def _minus(patch: Ints, axis: int, by: int) -> list[int]:
    return [n - by if one == axis else n for one, n in enumerate(patch)]


def _explain_norm(index: int, name: str, plan: Plan) -> str:
    scheme = plan.normalization[index]
    if scheme == "CTNormalization":
        facts = plan.intensities[str(index)]
        return (
            f"Channel {index} ({name}): clipped to [{facts['percentile_00_5']:g}, {facts['percentile_99_5']:g}] HU, "
            f"then (HU - {facts['mean']:.4g}) / {facts['std']:.4g}, from the training foreground."
        )
    return f"Channel {index} ({name}): {scheme}{' inside the nonzero mask' if plan.use_mask_for_norm[index] else ''}."


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
