"""nnU-Net's own predictor around any network, and the small networks that both sides share in these tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ichbench.cases.labels import plain_rules
from ichbench.network.losses import Supervision, dice_ce
from ichbench.prepare.plan import Plan

RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def make_predictor(
    network: nn.Module,
    weights: Sequence[dict[str, Tensor]],
    plan: Plan,
    labels: dict[str, Any],
    regions_class_order: Sequence[int] | None = None,
    tile_step: float = 0.5,
    gaussian: bool = True,
    mirror: tuple[int, ...] | None = None,
    previous_stage: bool = False,
) -> Any:
    """An `nnUNetPredictor` for one configuration that says what our plan says; one entry of `weights` per fold."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    configuration = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(plan.patch_size),
        "median_image_size_in_voxels": list(plan.median_shape),
        "spacing": list(plan.spacing),
        "normalization_schemes": list(plan.normalization),
        "use_mask_for_norm": list(plan.use_mask_for_norm),
        "batch_dice": True,
        "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    for what, order, is_seg in (("data", 3, False), ("seg", 1, True), ("probabilities", 1, False)):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = RESAMPLING | {"order": order, "is_seg": is_seg}
    if previous_stage:
        configuration["previous_stage"] = "low"
    plans = {
        "dataset_name": "Dataset999_Parity",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(plan.transpose_forward),
        "transpose_backward": list(plan.transpose_backward),
        "configurations": {"low": {}, "here": configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {key: dict(value) for key, value in plan.intensities.items()},
    }
    declared: dict[str, Any] = {"channel_names": dict(enumerate(plan.channels)), "labels": labels, "file_ending": ".nii.gz"}
    if regions_class_order is not None:
        declared["regions_class_order"] = list(regions_class_order)
    manager = PlansManager(plans)
    predictor = nnUNetPredictor(tile_step, gaussian, mirror is not None, False, torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(network, manager, manager.get_configuration("here"), list(weights), declared, "none", mirror)
    return predictor


def their_labels(predictor: Any, logits: NDArray[np.floating], properties: dict[str, Any], probabilities: bool = False) -> Any:
    """Their way back from logits to the native grid."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert

    return convert(
        torch.from_numpy(logits),
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
        return_probabilities=probabilities,
        num_threads_torch=1,
    )


def small_network(dims: int, channels: int, heads: int, seed: int, width: int = 4) -> nn.Module:
    """A network whose answer depends on the whole patch, as instance norm makes it: the same module serves both sides."""
    torch.manual_seed(seed)
    conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm: Any = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
    layers = [conv(channels, width, 3, padding=1), norm(width, affine=True), nn.LeakyReLU(0.01), conv(width, heads, 1)]
    return nn.Sequential(*layers).eval()


def plain_unet(dims: int, channels: int, heads: int, strides: Sequence[Sequence[int]], features: Sequence[int], seed: int) -> nn.Module:
    """nnU-Net's own U-Net, small."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    torch.manual_seed(seed)
    conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm: Any = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
    stages = len(features)
    made = PlainConvUNet(
        channels, stages, list(features), conv, [[3] * dims] * stages, [list(stride) for stride in strides], [2] * stages, heads,
        [2] * (stages - 1), True, norm, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, False,
    )  # fmt: skip
    return made.eval()


def train_briefly(network: nn.Module, image: NDArray[np.float32], labels: NDArray[np.integer], steps: int, rate: float = 0.004) -> None:
    """Dice and cross-entropy with Adam on patches (n, c, *spatial) and their labels (n, *spatial), two samples a step."""
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), rate)
    images, targets = torch.from_numpy(image), torch.from_numpy(np.maximum(labels, 0)).long()
    for step in range(steps):
        some = [(2 * step) % len(images), (2 * step + 1) % len(images)]
        loss = dice_ce(network(images[some]), targets[some], Supervision(plain_rules(2), True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
