"""nnU-Net's `plans.json` as its planners write it (facts/nnunet-v2.md, section 3.11). Read back: plans_read.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ichbench.prepare.configuration import Plan
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.resample import Resampling
from ichbench.prepare.topology import FAMILIES, Network

NETWORKS: dict[Network, str] = {
    "plain": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "residual": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}
#: name of the entry that holds convolutions or blocks per encoder stage
DEPTH_KEY: dict[Network, str] = {"plain": "n_conv_per_stage", "residual": "n_blocks_per_stage"}
ORDER = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
RESAMPLING = {
    "data": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "seg": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "probabilities": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
}
RESAMPLER, PREPROCESSOR, LABEL_MANAGER = "resample_data_or_seg_to_shape", "DefaultPreprocessor", "LabelManager"
#: what nnU-Net's planners named torchres write instead, and what `force_separate_z` says there
TORCH_RESAMPLER = "resample_torch_fornnunet"
TORCH_SEPARATE: dict[Resampling, bool | None] = {"torch": False, "torch_sepz": None}
NORM = {"eps": 1e-5, "affine": True}
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def plans_table(
    plans: Mapping[str, Plan],
    fingerprint: Fingerprint,
    dataset_name: str,
    family: str = "plain",
    plans_name: str | None = None,
    reader: str = "SimpleITKIO",
) -> dict[str, Any]:
    """The content of nnU-Net's plans file, key by key in its order.

    plans         configuration name -> plan, of one cohort
    family        of `topology.FAMILIES`: names the planner, and the plans unless `plans_name` does
    reader        nnU-Net's class for the image files
    """
    planner = FAMILIES[family]
    name = planner.plans_name if plans_name is None else plans_name
    first = next(iter(plans.values()))
    forward = list(first.transpose_forward)
    spacing = np.median(np.asarray(fingerprint.spacings), axis=0)[forward]
    shape = np.median(np.asarray(fingerprint.shapes_after_crop), axis=0)[forward]
    known = [one for one in ORDER if one in plans] + [one for one in plans if one not in ORDER]
    return {
        "dataset_name": dataset_name,
        "plans_name": name,
        "original_median_spacing_after_transp": [float(value) for value in spacing],
        "original_median_shape_after_transp": [round(float(value)) for value in shape],
        "image_reader_writer": reader,
        "transpose_forward": forward,
        "transpose_backward": list(first.transpose_backward),
        "configurations": {one: _configuration(one, plans, name) for one in known},
        "experiment_planner_used": planner.planner,
        "label_manager": LABEL_MANAGER,
        "foreground_intensity_properties_per_channel": {key: dict(value) for key, value in fingerprint.intensities.items()},
    }


def plans_text(table: Mapping[str, Any]) -> str:
    """As nnU-Net prints it: four spaces, keys in their order."""
    return json.dumps(table, indent=4)


def resampling_settings(kind: str, how: Resampling) -> dict[str, Any]:
    """What nnU-Net's planners write for the resampling of "data", "seg" or "probabilities"."""
    if how == "spline":
        return dict(RESAMPLING[kind])
    return {"is_seg": kind == "seg", "force_separate_z": TORCH_SEPARATE[how], "memefficient_seg_resampling": False}


def _configuration(name: str, plans: Mapping[str, Plan], plans_name: str) -> dict[str, Any]:
    plan = plans[name]
    if name == "3d_cascade_fullres" and "3d_fullres" in plans:
        return {"inherits_from": "3d_fullres", "previous_stage": plan.previous_stage}
    # nnU-Net's residual planners share the prepared data of the plain one where the spacing is the same
    shared = plan.family == "residual" and name in ("2d", "3d_fullres") and plan.resampling == "spline"
    resampler = RESAMPLER if plan.resampling == "spline" else TORCH_RESAMPLER
    table: dict[str, Any] = {
        "data_identifier": f"{FAMILIES['plain'].plans_name if shared else plans_name}_{name}",
        "preprocessor_name": PREPROCESSOR,
        "batch_size": plan.batch_size,
        "patch_size": list(plan.patch_size),
        "median_image_size_in_voxels": list(plan.median_shape),
        "spacing": list(plan.spacing),
        "normalization_schemes": list(plan.normalization),
        "use_mask_for_norm": list(plan.use_mask_for_norm),
        "resampling_fn_data": resampler,
        "resampling_fn_seg": resampler,
        "resampling_fn_data_kwargs": resampling_settings("data", plan.resampling),
        "resampling_fn_seg_kwargs": resampling_settings("seg", plan.resampling),
        "resampling_fn_probabilities": resampler,
        "resampling_fn_probabilities_kwargs": resampling_settings("probabilities", plan.resampling),
        "architecture": _architecture_table(plan),
        "batch_dice": plan.batch_dice,
    }
    if plan.previous_stage is not None:
        table["previous_stage"] = plan.previous_stage
    if plan.next_stage and plan.next_stage[0] in plans:
        table["next_stage"] = plan.next_stage[0] if len(plan.next_stage) == 1 else list(plan.next_stage)
    return table


def _architecture_table(plan: Plan) -> dict[str, Any]:
    kwargs = {
        "n_stages": plan.n_stages,
        "features_per_stage": list(plan.features),
        "conv_op": f"torch.nn.modules.conv.Conv{plan.dims}d",
        "kernel_sizes": [list(kernel) for kernel in plan.kernels],
        "strides": [list(stride) for stride in plan.strides],
        DEPTH_KEY[plan.family]: list(plan.convs_per_stage),
        "n_conv_per_stage_decoder": list(plan.decoder_convs),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{plan.dims}d",
        "norm_op_kwargs": dict(NORM),
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {"network_class_name": NETWORKS[plan.family], "arch_kwargs": kwargs, "_kw_requires_import": list(IMPORTED)}
