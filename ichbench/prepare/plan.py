"""Fingerprint + recipe -> Plan, by nnU-Net v2's planners (facts/nnunet-v2.md, section 3).

Axes in a plan are the working axes: the axis with the coarsest target spacing comes first. Shapes are voxels, spacings mm.
Comparisons are strict exactly where nnU-Net's are, and rounding is Python's (halves to even).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ichbench.errors import InputError
from ichbench.prepare.configuration import Plan
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.normalize import scheme_of
from ichbench.prepare.target import Target, target
from ichbench.prepare.topology import (
    FAMILIES,
    WIDEST,
    Fit,
    Size,
    depth,
    estimated,
    fit_patch,
    topology,
)
from ichbench.prepare.window import is_ct
from ichbench.recipe import PlanRecipe

__all__ = ["Plan", "Planned", "make_plan", "plan_all"]

SMALLEST_BATCH = 2
LOWRES_STEP = 1.03
#: a low-resolution stage that is not at least this many times smaller is not worth its training
LOWRES_GAIN = 2
MASKED_BELOW = 0.75


@dataclass(frozen=True)
class Sized:
    """A plan and why it has its patch and batch. `fit` is None where the recipe chose the patch.

    fitting    samples that fit the budget
    share      samples that show `batch_share` of the cohort's voxels
    """

    plan: Plan
    fit: Fit | None
    fitting: int
    share: int


@dataclass(frozen=True)
class Lowres:
    """Whether a low-resolution stage is made. `sized` is None where none is.

    coverage     share of the median case that the full-resolution patch shows; below `threshold` one is looked for
    steps        how often the spacing was made coarser; `gain` is how many times fewer voxels the case then has
    """

    sized: Sized | None
    coverage: float
    threshold: float
    steps: int
    gain: float


@dataclass(frozen=True)
class Planned:
    """Every configuration that nnU-Net would plan, in its order, with the reasons. `lowres` is None for 2D data."""

    target: Target
    configurations: Mapping[str, Sized]
    lowres: Lowres | None
    notes: tuple[str, ...] = field(default=())


def make_plan(
    fingerprint: Fingerprint,
    recipe: PlanRecipe,
    channel_names: Sequence[str],
    n_labels: int,
    n_cases: int,
    neighbour_slices: int = 0,
    n_classes: int | None = None,
) -> Plan:
    """Plan the configuration that `recipe.dims` and `recipe.stage` name.

    channel_names  of the cohort; where the window flag made several channels of a CT channel, the fingerprint knows
    n_labels       declared labels, background, ignore label and regions included: they count in the memory estimate
    n_cases        training cases (nnU-Net: numTraining)
    n_classes      outputs of the network; n_labels if not given

    A patch size in the recipe is still cut to the median shape and padded to what the topology divides by, so that one
    preset serves many cohorts. Whether a low-resolution stage would exist is decided without such overrides.
    Raises `InputError` for a 3D plan of single slices, and for a low-resolution stage where nnU-Net makes none.
    """
    planner = Planner(fingerprint, recipe, channel_names, n_labels, n_cases, neighbour_slices, n_classes)
    if recipe.dims == 2:
        return planner.sized(planner.start(2)).plan
    if not planner.is_3d:
        raise InputError("the median case has a single slice, so there is nothing for a 3D network to see; set plan.dims = 2")
    lowres = planner.lowres()
    fullres = planner.fullres(lowres).plan
    if recipe.stage == "fullres":
        return fullres
    if lowres.sized is None:
        share = f"nnU-Net's own full-resolution patch shows {lowres.coverage:.1%} of the median case (limit {lowres.threshold:.1%})"
        said = f"plan.stage = {recipe.stage!r}, but there is no low-resolution stage for this cohort: {share}"
        raise InputError(f"{said}, or it would save too little (ichbench plan says which); use stage = 'fullres'")
    return lowres.sized.plan if recipe.stage == "lowres" else second_stage(fullres)


def second_stage(fullres: Plan) -> Plan:
    """The full-resolution plan as the second stage of a cascade: the same network, with the first stage's labels as more inputs."""
    return replace(fullres, configuration="3d_cascade_fullres", previous_stage="3d_lowres")


def plan_all(planner: Planner) -> Planned:
    """Plan every configuration that nnU-Net would: 2d; 3d_fullres unless the cases are single slices; 3d_lowres and
    3d_cascade_fullres where the full-resolution patch shows little of a case.

    `recipe.stage` is not looked at; overrides of patch and batch act where dims agree.
    """
    found = {"2d": planner.sized(planner.start(2))}
    if not planner.is_3d:
        return Planned(planner.target, found, None)
    lowres = planner.lowres()
    fullres = planner.fullres(lowres)
    if lowres.sized is None:
        return Planned(planner.target, found | {"3d_fullres": fullres}, lowres)
    cascade = replace(fullres, plan=second_stage(fullres.plan))
    return Planned(planner.target, found | {"3d_lowres": lowres.sized, "3d_fullres": fullres, "3d_cascade_fullres": cascade}, lowres)


@dataclass(frozen=True)
class Planner:
    """What all configurations of a cohort share. The fields are the arguments of `make_plan`; `target` follows from them."""

    fingerprint: Fingerprint
    recipe: PlanRecipe
    channel_names: Sequence[str]
    n_labels: int
    n_cases: int
    neighbour_slices: int = 0
    n_classes: int | None = None
    target: Target = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", target(self.fingerprint, self.recipe))

    @property
    def is_3d(self) -> bool:
        return self.target.median_shape[0] != 1

    @property
    def voxels(self) -> float:
        """Of the cohort at the working spacing, as nnU-Net counts them: all of them, for 2D too."""
        return float(np.prod(self.target.median_shape, dtype=np.float64) * self.n_cases)

    def start(self, dims: int) -> Plan:
        """The plan before its size is known."""
        spacing, median = self.target.spacing_mm, self.target.median_shape
        channels = _channels(tuple(self.channel_names), len(self.fingerprint.intensities))
        schemes = tuple(scheme_of(name) for name in channels)
        masked = self.fingerprint.median_relative_size < MASKED_BELOW
        return Plan(
            dims=dims,
            spacing=spacing if dims == 3 else spacing[1:],
            transpose_forward=self.target.transpose_forward,
            transpose_backward=self.target.transpose_backward,
            patch_size=(),
            batch_size=0,
            median_shape=median if dims == 3 else median[1:],
            n_stages=1,
            features=(),
            strides=(),
            kernels=(),
            source_channels=tuple(self.channel_names),
            channels=channels,
            neighbour_slices=self.neighbour_slices if dims == self.recipe.dims else 0,
            n_classes=self.n_labels if self.n_classes is None else self.n_classes,
            normalization=schemes,
            use_mask_for_norm=tuple(masked and scheme == "ZScoreNormalization" for scheme in schemes),
            intensities=self.fingerprint.intensities,
            batch_dice=dims == 2,
            estimate=0,
            family=FAMILIES[self.recipe.family].network,
        )

    def size(self, dims: int) -> Size:
        recipe, family = self.recipe, FAMILIES[self.recipe.family]
        memory_gb = family.reference_gb if recipe.memory_gb == "auto" else recipe.memory_gb
        widest = WIDEST[dims] if recipe.max_features == "auto" else recipe.max_features
        return Size(family, dims, memory_gb, recipe.base_features, widest, self.n_labels)

    def sized(self, plan: Plan, voxels: float | None = None, overrides: bool = True) -> Sized:
        """Patch, topology, features and batch size for the plan's spacing and median shape."""
        size, recipe, fit = self.size(plan.dims), self.recipe, None
        overrides = overrides and plan.dims == recipe.dims
        if overrides and recipe.patch_size != "auto":
            if len(recipe.patch_size) != plan.dims:
                raise InputError(f"plan.patch_size = {recipe.patch_size}, but dims = {plan.dims}; give one entry per axis, coarsest first")
            shape = topology(plan.spacing, [min(a, b) for a, b in zip(recipe.patch_size, plan.median_shape, strict=True)])
            features, estimate = estimated(shape, size)
        else:
            fit = fit_patch(plan.spacing, plan.median_shape, size)
            shape, features, estimate = fit.topology, fit.features, fit.estimate
        fitting = size.batch(estimate)
        seen = self.voxels if voxels is None else voxels
        share = round(seen * size.family.batch_share / float(np.prod(shape.patch, dtype=np.float64)))
        batch = max(min(fitting, share), SMALLEST_BATCH)
        if overrides and recipe.batch_size != "auto":
            batch = recipe.batch_size
        encoder, decoder = depth(size.family.network, len(shape.strides))
        made = replace(
            plan,
            patch_size=shape.patch,
            batch_size=batch,
            n_stages=len(shape.strides),
            features=features,
            strides=shape.strides,
            kernels=shape.kernels,
            estimate=estimate,
            convs_per_stage=encoder,
            decoder_convs=decoder,
        )
        return Sized(made, fit, fitting, share)

    def lowres(self) -> Lowres:
        """The low-resolution stage that belongs below a 3D plan whose patch shows little of the median case."""
        threshold, fullres = self.recipe.lowres_coverage, self.start(3)
        if threshold == 0:
            return Lowres(None, 1.0, 0.0, 0, 1.0)
        low = self.sized(fullres, overrides=False)
        spacing = np.asarray(fullres.spacing)
        all_voxels = voxels = float(np.prod(fullres.median_shape, dtype=np.float64))
        coverage = np.prod(low.plan.patch_size, dtype=np.float64) / voxels
        steps = 0
        while np.prod(low.plan.patch_size, dtype=np.int64) / voxels < threshold:
            finer = max(spacing) / spacing > 2
            spacing = spacing * np.where(finer if finer.any() else True, LOWRES_STEP, 1.0)
            shape = np.asarray(fullres.spacing) / spacing * np.asarray(fullres.median_shape)
            voxels = float(np.prod(shape, dtype=np.float64))
            smaller = replace(fullres, spacing=tuple(map(float, spacing)), median_shape=tuple(round(float(n)) for n in shape))
            low = self.sized(smaller, voxels * self.n_cases, overrides=False)
            steps += 1
        gain = float(all_voxels / voxels)
        if gain < LOWRES_GAIN or steps == 0:
            return Lowres(None, float(coverage), threshold, steps, gain)
        low = self.sized(replace(low.plan, configuration="3d_lowres", next_stage=("3d_cascade_fullres",)), voxels * self.n_cases)
        return Lowres(low, float(coverage), threshold, steps, gain)

    def fullres(self, lowres: Lowres) -> Sized:
        below = lowres.sized
        start = self.start(3)
        return self.sized(start if below is None else replace(start, batch_dice=True, lowres_spacing=below.plan.spacing))


def _channels(source: tuple[str, ...], n_flagged: int) -> tuple[str, ...]:
    n_ct = sum(is_ct(name) for name in source)
    copies = (n_flagged - len(source)) // n_ct + 1 if n_ct else 1
    names = tuple(name for name in source for _ in range(copies if is_ct(name) else 1))
    if len(names) != n_flagged:
        raise InputError(f"the fingerprint has {n_flagged} channels, which do not follow from the cohort's {list(source)}; take it again")
    return names
