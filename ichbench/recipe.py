"""The recipe: everything that can change a score, and nothing else.

One strict, frozen model per stage. A flag is a field of the one stage that reads it, and a stage function gets only
its own part, so a flag cannot leak. Defaults live here, once. Paths, devices, worker counts, cohorts and seeds are not
part of a recipe: score = f(recipe, cohort, split, seed).

Arms and presets, which are overlays of TOML on the defaults: arms.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ichbench.errors import InputError
from ichbench.strict import Strict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Off = Literal["off"]


class Window(Strict):
    """A CT grey-level window: HU outside [level - width/2, level + width/2] are set to the nearer end."""

    level_hu: Finite
    width_hu: Positive

    @property
    def low_hu(self) -> float:
        return self.level_hu - self.width_hu / 2

    @property
    def high_hu(self) -> float:
        return self.level_hu + self.width_hu / 2


class Threshold(Strict):
    """Grey values outside [low_hu, high_hu] are set to the nearer end, after the window."""

    low_hu: Finite
    high_hu: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Threshold:
        if self.low_hu >= self.high_hu:
            raise ValueError(f"low_hu ({self.low_hu}) must lie below high_hu ({self.high_hu})")
        return self


class Downsample(Strict):
    """In-plane reduction by `factor`: pooling of factor x factor blocks, or a cubic spline without anti-aliasing."""

    factor: Annotated[float, Field(gt=1, le=16)] = 2
    pooling: Literal["max", "average", "sum", "random", "spline"] = "average"

    @model_validator(mode="after")
    def _whole(self) -> Downsample:
        if self.pooling != "spline" and self.factor != int(self.factor):
            raise ValueError(f"pooling {self.pooling!r} needs a whole factor, but factor is {self.factor}; use pooling = 'spline'")
        return self


class PrepareRecipe(Strict):
    """Case -> Prepared. The paper's flags act in this order, then nnU-Net's own preparation follows."""

    window: Off | Window | Annotated[tuple[Window, ...], Field(min_length=1)] = "off"
    threshold: Off | Threshold = "off"
    downsample: Off | Downsample = "off"
    slice_spacing_mm: Literal["native"] | Positive = "native"
    #: head: slices that show the head, by HU. reference: slices with a label, training cases only (a leak, marked so).
    slice_crop: Literal["off", "head", "reference"] = "off"
    slice_extension: Off | Annotated[int, Field(ge=1)] = "off"
    neighbour_slices: Off | Annotated[int, Field(ge=1)] = "off"
    #: flip cases to one common orientation (left, posterior, superior) instead of refusing a mixed cohort; or turn them to right,
    #: anterior, superior, as the reader of nnU-Net's that is named
    reorient: bool | Literal["NibabelIOWithReorient", "SimpleITKIOWithReorient"] = False
    #: nnunet: keep the file's axis order, as nnU-Net's SimpleITK reader does
    compatibility: Literal["ichbench", "nnunet"] = "ichbench"


class PlanRecipe(Strict):
    """Fingerprint -> Plan, by nnU-Net's rules."""

    dims: Literal[2, 3] = 3
    #: nnU-Net's planner: the plain U-Net, or one with a residual encoder (M, L and XL, and the older one without a letter)
    family: Literal["plain", "resenc", "resenc_m", "resenc_l", "resenc_xl"] = "plain"
    #: lowres: the low-resolution 3D stage that nnU-Net puts below a full-resolution one whose patch shows little of a case;
    #: cascade: the full-resolution stage that sees the low-resolution one's labels beside the image
    stage: Literal["fullres", "lowres", "cascade"] = "fullres"
    #: what nnU-Net calls the GPU memory target; scales patch and batch size; auto: what the family is made for (8, L: 24, XL: 40)
    memory_gb: Literal["auto"] | Positive = "auto"
    base_features: Annotated[int, Field(ge=1)] = 32
    #: auto: 320 in 3D and 512 in 2D
    max_features: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    patch_size: Literal["auto"] | tuple[Annotated[int, Field(ge=4)], ...] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    #: working spacing along the plan's axes (coarsest first), mm; auto: nnU-Net's rule
    spacing_mm: Literal["auto"] | tuple[Positive, ...] = "auto"
    #: nnU-Net's -overwrite_target_spacing: three spacings along the array's axes, mm; the coarsest then comes first
    target_spacing_zyx_mm: Literal["auto"] | tuple[Positive, Positive, Positive] = "auto"
    #: coverage of the median shape below which nnU-Net would add a low-resolution stage (v2: 0.25, the paper: 0.125)
    lowres_coverage: Probability = 0.25


class NetworkRecipe(Strict):
    """The U-Net beyond what the plan says."""

    #: auto: the plan's (2 in nnU-Net's plain network; in the residual one blocks of the encoder); a number holds for every stage
    convs_per_stage: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    leaky_slope: Annotated[float, Field(ge=0)] = 0.01
    #: batch: over the samples of a batch, with running averages for prediction (nnU-Net has a trainer variant of that name)
    norm: Literal["instance", "batch"] = "instance"
    deep_supervision: bool = True
    #: how many of the lowest decoder levels get no loss (nnU-Net v2: 1; the paper: 2)
    unsupervised_levels: Annotated[int, Field(ge=0)] = 1


def _each_once(mirror: str | bool | tuple[int, ...]) -> None:
    if not isinstance(mirror, str | bool) and len(set(mirror)) < len(mirror):
        raise ValueError(f"mirror names an axis twice: {list(mirror)}; name each once")


class AugmentRecipe(Strict):
    """Probabilities and ranges of the training transforms; the defaults are nnU-Net's. Probability 0 switches one off.

    A transform is drawn per sample; where `..._channel_probability` exists, then per channel. Numbers are drawn uniformly
    from their range, those of brightness, contrast and gamma below or above 1 with equal chance.
    """

    #: flip with probability 1/2: every axis, none, or those named (0 is the plan's first axis)
    mirror: bool | tuple[Annotated[int, Field(ge=0, le=2)], ...] = True
    #: rotation and scaling leave the slice axis alone; auto: in a 3D patch more than 3 times as long as deep (nnU-Net's dummy 2D)
    in_plane: Literal["auto"] | bool = "auto"
    rotation_probability: Probability = 0.2
    #: auto: nnU-Net's rule (in plane any angle for thick slices, else 30 degrees about each axis)
    rotation_degrees: Literal["auto"] | Annotated[float, Field(ge=0, le=180)] = "auto"
    scaling_probability: Probability = 0.2
    #: size of the region shown, per voxel of the patch
    scaling: tuple[Positive, Positive] = (0.7, 1.4)
    noise_probability: Probability = 0.1
    noise_sd: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 0.1)
    blur_probability: Probability = 0.2
    blur_channel_probability: Probability = 0.5
    #: of the Gaussian, in voxels, for every axis anew
    blur_sigma: tuple[Positive, Positive] = (0.5, 1.0)
    brightness_probability: Probability = 0.15
    brightness: tuple[Positive, Positive] = (0.75, 1.25)
    contrast_probability: Probability = 0.15
    contrast: tuple[Positive, Positive] = (0.75, 1.25)
    low_resolution_probability: Probability = 0.25
    low_resolution_channel_probability: Probability = 0.5
    #: share of the voxels kept along an axis
    low_resolution: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.5, 1.0)
    gamma_probability: Probability = 0.3
    gamma_inverted_probability: Probability = 0.1
    gamma: tuple[Positive, Positive] = (0.7, 1.5)
    #: the cascade's second stage: labels of the first stage dilated, eroded, opened or closed
    morphology_probability: Probability = 0.4
    morphology_label_probability: Probability = 0.5
    morphology_radius: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1, le=32)]] = (1.0, 8.0)
    #: the cascade's second stage: one component of a label removed, if it fills less than this share of the patch
    remove_component_probability: Probability = 0.2
    remove_component_label_probability: Probability = 0.5
    remove_component_share: Probability = 0.15

    @model_validator(mode="after")
    def _ordered(self) -> AugmentRecipe:
        for name in ("scaling", "noise_sd", "blur_sigma", "brightness", "contrast", "low_resolution", "gamma", "morphology_radius"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} runs from {low} to {high}; write the smaller number first")
        _each_once(self.mirror)
        return self


class EarlyStopping(Strict):
    """Stop when the moving average of the pseudo-Dice has not risen for `patience` epochs."""

    patience_epochs: Annotated[int, Field(ge=1)] = 30


class TrainingRecipe(Strict):
    """Optimisation, sampling and augmentation."""

    #: how many training cases are used; a number takes at most so many, the first of a seeded shuffle (fingerprint and plan
    #: are those of all of them: what changes is the training alone)
    cases: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    epochs: Annotated[int, Field(ge=1)] = 1000
    iterations_per_epoch: Annotated[int, Field(ge=1)] = 250
    validation_iterations: Annotated[int, Field(ge=0)] = 50
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    poly_exponent: Annotated[float, Field(ge=0)] = 0.9
    gradient_clip: Positive = 12.0
    #: topk: the cross-entropy of the hardest tenth of the voxels; with regions the cross-entropy is binary, one per region
    loss: Literal["dice_ce", "dice", "ce", "dice_topk", "topk"] = "dice_ce"
    #: factors of the two terms of dice_ce and dice_topk
    dice_weight: Positive = 1.0
    ce_weight: Positive = 1.0
    #: weights of the cross-entropy, one per output of the network (background first; with regions one per region)
    class_weights: Literal["equal"] | Annotated[tuple[Positive, ...], Field(min_length=1)] = "equal"
    #: auto: nnU-Net's rule (pooled over the batch in 2D and below a cascade)
    batch_dice: Literal["auto"] | bool = "auto"
    foreground_share: Probability = 0.33
    #: last: the last round(share) samples of a batch show foreground; random: each sample with that probability
    foreground_samples: Literal["last", "random"] = "last"
    #: where a forced foreground voxel lies in its patch; nnU-Net puts it in the centre, and a short training then learns to find
    #: foreground in the middle of every tile
    foreground_position: Literal["centre", "anywhere"] = "centre"
    #: nnunet: a patch about a foreground voxel near the far border hangs out of the image
    compatibility: Literal["ichbench", "nnunet"] = "ichbench"
    #: weight of the old value in the moving average of the pseudo-Dice
    moving_average: Annotated[float, Field(ge=0, lt=1)] = 0.9
    early_stopping: Off | EarlyStopping = "off"
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: AugmentRecipe = AugmentRecipe()


class ThresholdRecipe(Strict):
    """The untrained floor: foreground = HU within [low_hu, high_hu]; 'fit' finds both on the training cases."""

    low_hu: Literal["fit"] | Finite = "fit"
    high_hu: Literal["fit"] | Finite = "fit"

    @model_validator(mode="after")
    def _ordered(self) -> ThresholdRecipe:
        if self.low_hu != "fit" and self.high_hu != "fit" and self.low_hu >= self.high_hu:
            raise ValueError(f"low_hu ({self.low_hu}) must lie below high_hu ({self.high_hu})")
        return self


class InferenceRecipe(Strict):
    """How a mask is made."""

    predictor: Literal["unet", "threshold", "roundtrip", "folder"] = "unet"
    #: final: weights at the end; best: weights with the highest moving average
    checkpoint: Literal["final", "best"] = "final"
    tile_step: Annotated[float, Field(gt=0, le=1)] = 0.5
    gaussian: bool = True
    #: mean over mirrorings: of all spatial axes, of none, or of those named (0 is the plan's first axis); auto: of those that
    #: training.augment.mirror showed the network, as in nnU-Net
    mirror: Literal["auto"] | bool | tuple[Annotated[int, Field(ge=0, le=2)], ...] = "auto"
    #: what the network computes in; sums over tiles and mirrorings stay float32. fp16 is for GPUs, bf16 pays where the CPU has it
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    #: winograd: on a CPU in fp32 the same U-Net with fewer multiplications (network/fast.py), else as direct; compiled: as one
    #: program, half a minute of compiling each, for bf16 and GPUs (network/compiled.py); only their rounding differs
    convolution: Literal["direct", "winograd", "compiled"] = "winograd"
    #: nnunet: one tile at a time by direct convolutions, sums over tiles and folds and resampling back in half precision, as nnU-Net does
    compatibility: Literal["ichbench", "nnunet"] = "ichbench"
    #: cross-validate: keep only largest components where that raised the Dice of the five folds (nnU-Net's rule)
    postprocess: Literal["off", "cross-validate"] = "off"
    threshold: ThresholdRecipe = ThresholdRecipe()

    @model_validator(mode="after")
    def _axes(self) -> InferenceRecipe:
        _each_once(self.mirror)
        return self


class Recipe(Strict):
    """One method, whole. `DESIGN: score = f(recipe, cohort, split, seed)`."""

    prepare: PrepareRecipe = PrepareRecipe()
    plan: PlanRecipe = PlanRecipe()
    network: NetworkRecipe = NetworkRecipe()
    training: TrainingRecipe = TrainingRecipe()
    inference: InferenceRecipe = InferenceRecipe()

    @model_validator(mode="after")
    def _one_switch(self) -> Recipe:
        """`compatibility` is one switch with a field in three stages: set once it holds for all."""
        parts = {name: getattr(self, name) for name in COMPATIBLE}
        said = {name: part.compatibility for name, part in parts.items() if "compatibility" in part.model_fields_set}
        if len(set(said.values())) > 1:
            raise ValueError(f"{', '.join(f'{name}.compatibility = {value!r}' for name, value in said.items())}; set one, or all alike")
        for name, part in parts.items() if said else ():
            if name not in said:
                # the model is frozen for its users; here it is still being made
                object.__setattr__(self, name, part.model_copy(update={"compatibility": next(iter(said.values()))}))
        return self

    @model_validator(mode="after")
    def _cascade(self) -> Recipe:
        if self.plan.stage == "cascade" and self.prepare.slice_crop == "reference":
            raise ValueError(
                "plan.stage = 'cascade' with prepare.slice_crop = 'reference': test cases have no such crop; use 'head' or 'off'"
            )
        if self.plan.stage == "cascade" and self.prepare.neighbour_slices != "off":
            raise ValueError("plan.stage = 'cascade' is a 3D network and sees its slices anyway; set prepare.neighbour_slices to 'off'")
        return self

    @model_validator(mode="after")
    def _mirror_axes(self) -> Recipe:
        dims = self.plan.dims
        for name, axes in (("inference.mirror", self.inference.mirror), ("training.augment.mirror", self.training.augment.mirror)):
            if not isinstance(axes, bool | str) and any(axis >= dims for axis in axes):
                raise ValueError(f"{name} names the axes {list(axes)}, but plan.dims = {dims} has the axes {list(range(dims))}")
        return self

    @field_validator("plan", mode="after")
    @classmethod
    def _axes(cls, plan: PlanRecipe) -> PlanRecipe:
        for name in ("patch_size", "spacing_mm"):
            value = getattr(plan, name)
            if value != "auto" and len(value) != plan.dims:
                raise ValueError(f"{name} has {len(value)} entries, but dims = {plan.dims}")
        if plan.stage != "fullres" and plan.dims == 2:
            raise ValueError(f"stage = {plan.stage!r} is a 3D configuration, but dims = 2")
        if plan.spacing_mm != "auto" and plan.target_spacing_zyx_mm != "auto":
            raise ValueError("spacing_mm and target_spacing_zyx_mm both fix the spacing; set one of them")
        return plan

    def prediction(self) -> InferenceRecipe:
        """`inference` with what it leaves to the rest of the recipe decided: the mirrorings."""
        if self.inference.mirror != "auto":
            return self.inference
        return self.inference.model_copy(update={"mirror": self.training.augment.mirror})

    def stage_keys(self) -> dict[str, str]:
        """A digest per stage: equal digests mean that the stage's part of two recipes is equal."""
        return {stage: digest(getattr(self, stage).model_dump(mode="json")) for stage in STAGES}


def check_precision(recipe: InferenceRecipe, device: str, where: str = "") -> None:
    """Raise InputError for a precision that the device does not compute in; `where` comes first in the message."""
    if recipe.precision == "fp16" and device.split(":")[0] == "cpu":
        raise InputError(f"{where}inference.precision = 'fp16' is for GPUs; use 'fp32', or 'bf16' where the CPU computes in it")


def check_loss(recipe: TrainingRecipe, outputs: Sequence[str], regions: bool, where: str = "") -> None:
    """Raise InputError for a loss that does not fit the network's outputs, which are regions or labels; `where` comes first."""
    if regions and "topk" in recipe.loss:
        raise InputError(f"{where}training.loss = {recipe.loss!r} needs labels that exclude each other, but the cohort declares regions")
    if recipe.class_weights != "equal" and len(recipe.class_weights) != len(outputs):
        raise InputError(
            f"{where}training.class_weights has {len(recipe.class_weights)} numbers, but the network has {len(outputs)} outputs: "
            f"{', '.join(outputs)}; give one number for each"
        )


#: stages with the field `compatibility`
COMPATIBLE = ("prepare", "training", "inference")
STAGES = ("prepare", "plan", "network", "training", "inference")


def digest(value: Any) -> str:
    """sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
