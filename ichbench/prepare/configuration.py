"""The plan of one network: what nnU-Net calls a configuration.

Axes are the working axes: the axis with the coarsest target spacing comes first. Shapes are voxels, spacings mm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ichbench.cases.files import read_table
from ichbench.cases.labels import LabelRules
from ichbench.errors import InputError
from ichbench.prepare.resample import Resampling
from ichbench.prepare.topology import Floats, Ints, Network, depth, is_anisotropic


@dataclass(frozen=True)
class Plan:
    """What nnU-Net calls a configuration.

    spacing                working spacing, mm (2 entries in 2D: the slice axis keeps each case's own)
    transpose_forward      working axis k is array axis transpose_forward[k]; backward is its inverse
    median_shape           median case at the working spacing, unrounded
    source_channels        channels of the cohort; `channels`: after the window flag; in_channels: with neighbours
    n_classes              outputs of the network: labels with the background and without the ignore label, or regions
    normalization          nnU-Net's scheme per channel; use_mask_for_norm, intensities likewise
    estimate               feature-map elements at batch size 1, which nnU-Net uses for memory
    lowres_spacing         working spacing of the low-resolution stage that nnU-Net puts below this one, or None
    family                 "plain" or "residual" encoder
    convs_per_stage        convolutions (plain) or residual blocks of each encoder stage; decoder_convs: of each decoder level
    configuration          nnU-Net's name of it
    previous_stage         the configuration whose masks are this network's extra input (cascade), or None
    next_stage             the configurations that its masks are made for
    resampling             how images, labels and logits change their spacing (`prepare.resample`)
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
    family: Network = "plain"
    convs_per_stage: Ints = ()
    decoder_convs: Ints = ()
    configuration: str = ""
    previous_stage: str | None = None
    next_stage: tuple[str, ...] = ()
    resampling: Resampling = "spline"

    def __post_init__(self) -> None:
        # plans written before these fields existed were plain and at full resolution
        encoder, decoder = depth(self.family, self.n_stages)
        for name, value in (("convs_per_stage", encoder), ("decoder_convs", decoder)):
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "configuration", self.configuration or ("2d" if self.dims == 2 else "3d_fullres"))

    @property
    def in_channels(self) -> int:
        """Input channels of the network: each channel once per slice that it sees."""
        return len(self.channels) * (2 * self.neighbour_slices + 1)

    @property
    def anisotropic(self) -> bool:
        """A 3D patch more than 3 times wider than deep: spatial augmentation stays in plane."""
        return is_anisotropic(self.patch_size)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; without the usual resampling, as before there was another."""
        table = dataclasses.asdict(self)
        return table if self.resampling != "spline" else {key: value for key, value in table.items() if key != "resampling"}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote, now or before the fields with defaults existed."""
        fields = dataclasses.fields(cls)
        known = {one.name for one in fields}
        needed = {one.name for one in fields if one.default is dataclasses.MISSING}
        if not needed <= set(table) <= known:
            missing, unknown = sorted(needed - set(table)), sorted(set(table) - known)
            raise InputError(f"not a plan: missing {missing}, unknown {unknown}; prepare the cohort again")
        if table.get("resampling", "spline") not in get_args(Resampling):
            raise InputError(f"not a plan: resampling is {table['resampling']!r}; known are {', '.join(get_args(Resampling))}")
        return cls(**{key: _tuples(value) for key, value in table.items()})

    def explain(self) -> list[str]:
        """The decisions in words."""
        spacing = " x ".join(f"{value:g}" for value in self.spacing)
        first = {0: "z", 1: "y", 2: "x"}[self.transpose_forward[0]]
        stages = ", ".join("x".join(map(str, stride)) for stride in self.strides)
        kind = "U-Net" if self.family == "plain" else f"U-Net with residual encoder (blocks {list(self.convs_per_stage)})"
        lines = [
            f"{self.dims}D {kind} at {spacing} mm; axis {first} is coarsest and comes first (transpose {list(self.transpose_forward)}).",
            f"The median case has {' x '.join(f'{n:g}' for n in self.median_shape)} voxels; "
            f"patch {' x '.join(map(str, self.patch_size))}, batch {self.batch_size} ({self.estimate:,} feature-map elements a sample).",
            f"{self.n_stages} stages, features {list(self.features)}, strides {stages}.",
            f"{self.in_channels} input channels ({', '.join(self.channels)}; {self.neighbour_slices} neighbour slices each way), "
            f"{self.n_classes} classes.",
            *self.explain_norm(),
            f"Dice is pooled over {'the batch' if self.batch_dice else 'each sample alone'}.",
        ]
        if self.lowres_spacing is not None and self.configuration == "3d_fullres":
            lowres = " x ".join(f"{value:.3g}" for value in self.lowres_spacing)
            lines.append(f"The patch shows little of the median case: nnU-Net would add a low-resolution stage at {lowres} mm.")
        return lines

    def explain_norm(self) -> list[str]:
        """How each channel is normalised, in words."""
        return [_explain_norm(index, name, self) for index, name in enumerate(self.channels)]


def read_plan(path: Path) -> Plan:
    """A plan.json, as `Plan.to_json` wrote it; `InputError` for anything else."""
    table = read_table(path, "prepare the cohort again")
    try:
        return Plan.from_json(table)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


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


def network_plan(plan: Plan, rules: LabelRules) -> Plan:
    """The plan as its network sees it: the second stage of a cascade has one more input per foreground label."""
    if plan.previous_stage is None:
        return plan
    return replace(plan, channels=(*plan.channels, *(f"{plan.previous_stage} {label}" for label in rules.foreground_labels)))
