"""nnU-Net's `plans.json` read back into plans (facts/nnunet-v2.md, section 3.11).

Only data is read: a network is recognised by its name, nothing is imported or executed. What this project does not
build or prepare (another architecture, preprocessor or resampling) is refused with one message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from ichbench.cases.files import read_json
from ichbench.errors import InputError
from ichbench.prepare.configuration import Plan
from ichbench.prepare.normalize import CT_FACTS, NORMALIZERS
from ichbench.prepare.plans_json import (
    DEPTH_KEY,
    LABEL_MANAGER,
    NETWORKS,
    NORM,
    PREPROCESSOR,
    RESAMPLER,
    RESAMPLING,
    TORCH_RESAMPLER,
    resampling_settings,
)
from ichbench.prepare.resample import Resampling
from ichbench.prepare.topology import Ints, Network, feature_map_elements

MOST_STAGES = 32
#: no plan is finer or coarser than this (nnU-Net makes plans of 1.4 m slices from odd enough cohorts), and no machine holds a larger
#: patch (2**28 voxels: 1 GiB a channel)
LEAST_MM, MOST_MM, MOST_PATCH_VOXELS, MOST_BATCH = 0.01, 1e5, 2**28, 10**6
#: what nnU-Net's resampling takes for an entry that its settings lack (nnunetv2 2.8.1, resample_data_or_seg_to_shape)
RESAMPLER_DEFAULTS = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": False, "separate_z_anisotropy_threshold": 3}
#: the same of resample_torch_fornnunet; how many threads it takes changes nothing
TORCH_DEFAULTS = {
    "is_seg": False,
    "force_separate_z": None,
    "memefficient_seg_resampling": False,
    "separate_z_anisotropy_threshold": 3,
    "mode": "linear",
    "aniso_axis_mode": "nearest-exact",
}
#: where else a release of nnU-Net says that the same two networks are
ALIASES: dict[str, Network] = {
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": "residual",
}


def read_plans(path: Path) -> dict[str, Any]:
    """A plans file as a table; `InputError` where it is not one."""
    table = read_json(Path(path), "give nnU-Net's plans.json")
    if not isinstance(table, dict) or not isinstance(table.get("configurations"), dict) or not table["configurations"]:
        raise InputError(f"{path}: is not an nnU-Net plans file: it has no configurations; give plans.json of a model or a planner")
    for key in ("dataset_name", "plans_name"):
        if not isinstance(table.get(key), str) or not table[key]:
            came = repr(table[key]) if key in table else "missing"
            raise InputError(f"{path}: {key} is {came}, but must be a name; take the file as nnU-Net wrote it")
    return table


def plan_of(table: Mapping[str, Any], configuration: str, dataset: Mapping[str, Any], source: str = "plans.json") -> Plan:
    """The plan of one configuration of a plans file, `inherits_from` followed to its end.

    table    what `read_plans` read, in today's format or the one before (`UNet_class_name`)
    dataset  content of the `dataset.json` beside it: channel names and labels
    """
    where = f"{source}, configuration {configuration!r}"
    try:
        chain = _chain(table["configurations"], configuration, source)
        merged: dict[str, Any] = {}
        for name in reversed(chain):
            merged |= table["configurations"][name]
        network, kwargs = _architecture(merged, where)
        return _plan(table, configuration, chain, merged, network, kwargs, dataset, where)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{where}: the entry {error} is missing; plan again with nnU-Net or take a complete file") from None
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{where}: does not read as a plan ({error}); plan again with nnU-Net or correct the file") from None


def plans_of(table: Mapping[str, Any], dataset: Mapping[str, Any], source: str = "plans.json") -> dict[str, Plan]:
    """Every configuration of a plans file."""
    return {name: plan_of(table, name, dataset, source) for name in table["configurations"]}


def count_labels(labels: Mapping[str, Any]) -> tuple[int, int]:
    """(entries of dataset.json's `labels`, outputs of a network for them).

    Outputs are the labels with the background and without `ignore`; with regions (a list of two values or more) the regions
    that are not background.
    """
    kept = {name: value for name, value in labels.items() if name != "ignore"}
    if any(isinstance(value, list | tuple) and len(value) > 1 for value in kept.values()):
        return len(labels), sum(set(value if isinstance(value, list | tuple) else [value]) != {0} for value in kept.values())
    return len(labels), len({value[0] if isinstance(value, list | tuple) else value for value in kept.values()})


def _chain(configurations: Mapping[str, Any], name: str, source: str) -> list[str]:
    """The configuration and what it inherits from, nearest first."""
    chain = [name]
    while True:
        found = configurations.get(chain[-1])
        if not isinstance(found, Mapping):
            raise InputError(f"{source}: there is no configuration {chain[-1]!r}; there are {', '.join(map(repr, configurations))}")
        parent = found.get("inherits_from")
        if parent is None:
            return chain
        if parent in chain:
            raise InputError(f"{source}: configurations inherit from each other in a circle: {' -> '.join([*chain, str(parent)])}")
        chain.append(parent)


def _architecture(merged: Mapping[str, Any], where: str) -> tuple[Network, Mapping[str, Any]]:
    """The encoder and its settings; files from before nnU-Net 2.4 say the same in other words."""
    if "architecture" in merged:
        said, kwargs = merged["architecture"]["network_class_name"], merged["architecture"]["arch_kwargs"]
        names: dict[str, Network] = {path: network for network, path in NETWORKS.items()} | ALIASES
    else:
        said, n_stages = merged["UNet_class_name"], len(merged["n_conv_per_stage_encoder"])
        names = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
        widest, base = merged["unet_max_num_features"], merged["UNet_base_num_features"]
        kwargs = {
            "n_stages": n_stages,
            "features_per_stage": [min(widest, base * 2**stage) for stage in range(n_stages)],
            "kernel_sizes": merged["conv_kernel_sizes"],
            "strides": merged["pool_op_kernel_sizes"],
            "n_conv_per_stage_decoder": merged["n_conv_per_stage_decoder"],
            **{key: merged["n_conv_per_stage_encoder"] for key in DEPTH_KEY.values()},
        }
    if said not in names:
        raise InputError(f"{where}: the network is {said!r}; PlainConvUNet and ResidualEncoderUNet can be read, no others")
    return names[said], kwargs


def _plan(
    table: Mapping[str, Any],
    configuration: str,
    chain: Sequence[str],
    merged: Mapping[str, Any],
    network: Network,
    kwargs: Mapping[str, Any],
    dataset: Mapping[str, Any],
    where: str,
) -> Plan:
    patch = _ints(merged["patch_size"])
    dims, n_stages = len(patch), _ints([kwargs["n_stages"]])[0]
    if dims not in (2, 3) or n_stages > MOST_STAGES:
        raise InputError(f"{where}: a patch of {dims} axes and a network of {n_stages} stages cannot be; correct the file")
    _check_supported(table, merged, kwargs, dims, where)
    names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    channels = tuple(str(names[key]) for key in sorted(names, key=int))
    n_labels, n_classes = count_labels(dataset["labels"])
    intensities = table.get("foreground_intensity_properties_per_channel", table.get("foreground_intensity_properties_by_modality"))
    strides, kernels = _per_stage(kwargs["strides"], n_stages, dims), _per_stage(kwargs["kernel_sizes"], n_stages, dims)
    features = _counts(kwargs["features_per_stage"], n_stages)
    convs, decoder = _counts(kwargs[DEPTH_KEY[network]], n_stages), _counts(kwargs["n_conv_per_stage_decoder"], n_stages - 1)
    low = table["configurations"].get("3d_lowres") if "3d_fullres" in chain else None
    next_stage = merged.get("next_stage") or ()
    plan = Plan(
        dims=dims,
        spacing=_numbers(merged["spacing"]),
        transpose_forward=_ints(table["transpose_forward"], least=0),
        transpose_backward=_ints(table["transpose_backward"], least=0),
        patch_size=patch,
        batch_size=_ints([merged["batch_size"]])[0],
        median_shape=_numbers(merged["median_image_size_in_voxels"]),
        n_stages=n_stages,
        features=features,
        strides=strides,
        kernels=kernels,
        source_channels=channels,
        channels=channels,
        neighbour_slices=0,
        n_classes=n_classes,
        normalization=tuple(merged["normalization_schemes"]),
        use_mask_for_norm=tuple(bool(value) for value in merged["use_mask_for_norm"]),
        intensities={str(key): {name: float(one) for name, one in value.items()} for key, value in (intensities or {}).items()},
        batch_dice=bool(merged["batch_dice"]),
        estimate=feature_map_elements(patch, strides, features, n_labels, network, convs, decoder),
        lowres_spacing=_numbers(low["spacing"]) if low else None,
        family=network,
        convs_per_stage=convs,
        decoder_convs=decoder,
        configuration=configuration,
        previous_stage=merged.get("previous_stage"),
        next_stage=(next_stage,) if isinstance(next_stage, str) else tuple(next_stage),
        resampling=_resampling(merged, where),
    )
    _check_consistent(plan, where)
    return plan


def _check_supported(table: Mapping[str, Any], merged: Mapping[str, Any], kwargs: Mapping[str, Any], dims: int, where: str) -> None:
    """Refuse what would be prepared or built differently here."""
    slope = (kwargs.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    last = {name: str(kwargs.get(name)).rpartition(".")[2] for name in ("conv_op", "norm_op", "nonlin")}
    said = {
        "preprocessor_name": (merged.get("preprocessor_name", PREPROCESSOR), PREPROCESSOR),
        "label_manager": (table.get("label_manager", LABEL_MANAGER), LABEL_MANAGER),
        "conv_op": (last["conv_op"] if "conv_op" in kwargs else f"Conv{dims}d", f"Conv{dims}d"),
        "norm_op": (last["norm_op"] if "norm_op" in kwargs else f"InstanceNorm{dims}d", f"InstanceNorm{dims}d"),
        "norm_op_kwargs": ({**NORM, **(kwargs.get("norm_op_kwargs") or {})}, NORM),
        "nonlin": (last["nonlin"] if "nonlin" in kwargs else "LeakyReLU", "LeakyReLU"),
        "negative_slope": (slope, 0.01),
        "conv_bias": (kwargs.get("conv_bias", True), True),
        "dropout_op": (kwargs.get("dropout_op"), None),
    }
    for scheme in merged["normalization_schemes"]:
        if scheme not in NORMALIZERS:
            raise InputError(f"{where}: the normalization {scheme!r} is not known; known are {', '.join(NORMALIZERS)}")
    for name, (came, allowed) in said.items():
        if came != allowed:
            raise InputError(f"{where}: {name} is {came!r}, but only {allowed!r} is built here; use nnU-Net itself for this model")


def _resampling(merged: Mapping[str, Any], where: str) -> Resampling:
    """The one way in which images, labels and logits are resampled; other settings, and mixtures, are refused."""
    fitting = {kind: _ways(merged, kind) for kind in RESAMPLING}
    for how in get_args(Resampling):
        if all(how in ways for ways in fitting.values()):
            return cast("Resampling", how)
    names = {kind: merged[f"resampling_fn_{kind}"] for kind in RESAMPLING}
    said = ", ".join(f"resampling_fn_{kind} is {name!r}" for kind, name in names.items())
    allowed = f"{RESAMPLER!r} for all three, or {TORCH_RESAMPLER!r} for all three with one force_separate_z, is"
    for kind in RESAMPLING:
        if set(names.values()) in ({RESAMPLER}, {TORCH_RESAMPLER}) and not fitting[kind]:
            settings = [resampling_settings(kind, how) for how in get_args(Resampling) if (how == "spline") == (names[kind] == RESAMPLER)]
            said = f"resampling_fn_{kind}_kwargs is {merged[f'resampling_fn_{kind}_kwargs']!r}"
            allowed = f"{' or '.join(map(repr, settings))} (what is left out counts as the function's own default) is"
            break
    raise InputError(f"{where}: {said}, but only {allowed} built here; use nnU-Net itself for this model")


def _ways(merged: Mapping[str, Any], kind: str) -> list[str]:
    """The ways of resampling that the settings for "data", "seg" or "probabilities" mean: one or none."""
    by_torch = merged[f"resampling_fn_{kind}"] == TORCH_RESAMPLER
    if not by_torch and merged[f"resampling_fn_{kind}"] != RESAMPLER:
        return []
    defaults = TORCH_DEFAULTS if by_torch else RESAMPLER_DEFAULTS
    given = {**defaults, **merged[f"resampling_fn_{kind}_kwargs"]}
    if by_torch:
        given.pop("num_threads", None)
    ways = [how for how in get_args(Resampling) if (how != "spline") == by_torch]
    return [how for how in ways if given == {**defaults, **resampling_settings(kind, how)}]


def _check_consistent(plan: Plan, where: str) -> None:
    divisor = np.prod(np.asarray(plan.strides), axis=0)
    if sorted(plan.transpose_forward) != [0, 1, 2] or any(plan.transpose_forward[k] != i for i, k in enumerate(plan.transpose_backward)):
        raise InputError(f"{where}: transpose_forward {list(plan.transpose_forward)} and transpose_backward do not undo each other")
    if len(plan.spacing) != plan.dims or len(plan.median_shape) != plan.dims:
        raise InputError(f"{where}: patch_size has {plan.dims} axes, but spacing or median_image_size_in_voxels has not")
    if math.prod(plan.patch_size) > MOST_PATCH_VOXELS:
        raise InputError(f"{where}: patch_size {list(plan.patch_size)} has more than {MOST_PATCH_VOXELS:,} voxels; correct the file")
    if plan.batch_size > MOST_BATCH:
        raise InputError(f"{where}: batch_size {plan.batch_size:.3g} is above {MOST_BATCH:,}; correct the file")
    if not all(LEAST_MM <= value <= MOST_MM for value in plan.spacing):
        raise InputError(f"{where}: spacing {list(plan.spacing)} is not within {LEAST_MM:g} to {MOST_MM:,.0f} mm; correct the file")
    if any(n % by for n, by in zip(plan.patch_size, divisor, strict=True)):
        raise InputError(f"{where}: patch_size {list(plan.patch_size)} is not a multiple of the strides' product {divisor.tolist()}")
    if not len(plan.channels) == len(plan.normalization) == len(plan.use_mask_for_norm):
        raise InputError(f"{where}: normalises {len(plan.normalization)} channels, but dataset.json names {len(plan.channels)}")
    for index, scheme in enumerate(plan.normalization):
        facts = plan.intensities.get(str(index), {})
        for name in CT_FACTS if scheme == "CTNormalization" else ():
            if not math.isfinite(facts.get(name, math.nan)):
                raise InputError(
                    f"{where}: channel {index} ({plan.channels[index]}) is normalised as CT, but {name} in "
                    f"foreground_intensity_properties_per_channel is {facts.get(name, 'missing')}; it must be a finite number"
                )


def _per_stage(said: Any, n_stages: int, dims: int) -> tuple[Ints, ...]:
    """One entry a stage and axis; a single number stands for all axes, or all stages."""
    stages = [said] * n_stages if isinstance(said, int) else list(said)
    found = tuple((stage,) * dims if isinstance(stage, int) else _ints(stage) for stage in stages)
    if len(found) != n_stages or any(len(stage) != dims for stage in found):
        raise ValueError(f"{n_stages} stages of {dims} axes are needed, not {said}")
    return found


def _counts(said: Any, n: int) -> Ints:
    found = (said,) * n if isinstance(said, int) else _ints(said)
    if len(found) != n:
        raise ValueError(f"{n} numbers are needed, not {said}")
    return found


def _ints(values: Any, least: int = 1) -> Ints:
    if any(isinstance(value, bool) or value != int(value) or value < least for value in values):
        raise ValueError(f"whole numbers from {least} are needed, not {values}")
    return tuple(int(value) for value in values)


def _numbers(values: Any) -> tuple[float, ...]:
    """Positive numbers as they are: a whole one stays whole, as nnU-Net writes it."""
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
        raise ValueError(f"positive numbers are needed, not {values}")
    return tuple(values)
