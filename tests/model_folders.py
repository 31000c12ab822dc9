"""Small model folders with drawn weights, and nnU-Net result folders made of them, for several test modules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ichbench.cases.labels import declared, read_rules
from ichbench.inference.nnunet_export import export_nnunet
from ichbench.network.unet import UNet, make_unet
from ichbench.network.weights import save_weights
from ichbench.overlays import make_recipe
from ichbench.prepare.plan import Plan
from ichbench.prepare.topology import feature_map_elements, topology
from ichbench.recipe import Recipe

CT = {"mean": 40.0, "median": 40.0, "std": 20.0, "min": -50.0, "max": 120.0, "percentile_00_5": -20.0, "percentile_99_5": 100.0}
LABELS = {"background": 0, "ich": 1}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def small_plan(
    dims: int = 3, channels: Sequence[str] = ("CT",), n_classes: int = 2, family: str = "plain", transpose: Sequence[int] = (0, 1, 2)
) -> Plan:
    """Three stages of 4, 8 and 8 features on patches of 16 voxels, 5 x 1 x 1 mm."""
    spacing = (5.0, 1.0, 1.0)[-dims:]
    shape = topology(spacing, (8, 16, 16)[-dims:])
    features = (4, 8, 8)[: len(shape.strides)]
    schemes = tuple("CTNormalization" if name == "CT" else "ZScoreNormalization" for name in channels)
    return Plan(
        dims=dims,
        spacing=spacing,
        transpose_forward=tuple(transpose),
        transpose_backward=tuple(list(transpose).index(axis) for axis in range(3)),
        patch_size=shape.patch,
        batch_size=2,
        median_shape=(10.0, 20.0, 20.0)[-dims:],
        n_stages=len(shape.strides),
        features=features,
        strides=shape.strides,
        kernels=shape.kernels,
        source_channels=tuple(channels),
        channels=tuple(channels),
        neighbour_slices=0,
        n_classes=n_classes,
        normalization=schemes,
        use_mask_for_norm=(False,) * len(channels),
        intensities={str(index): CT for index in range(len(channels))},
        batch_dice=dims == 2,
        estimate=feature_map_elements(shape.patch, shape.strides, features, n_classes),
        family=family,  # type: ignore[arg-type]
    )


def drawn_network(plan: Plan, recipe: Recipe, seed: int) -> UNet:
    """Every parameter is a draw, so that no two tensors are equal and residual blocks say something."""
    network = make_unet(plan, recipe.network, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("norm.weight"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.ndim == 1:
                value.normal_(0, 0.2, generator=generator)
    return network


def write_model(
    folder: Path,
    plan: Plan,
    labels: dict[str, Any] | None = None,
    order: Sequence[int] | None = None,
    overlay: dict[str, Any] | None = None,
    folds: Sequence[str] = (),
    seed: int = 0,
    **about: Any,
) -> Path:
    """A model folder as `run-ablation` leaves it, or of several folds as an import does."""
    recipe = make_recipe({"plan": {"dims": plan.dims}}, overlay or {})
    folder.mkdir(parents=True)
    table = {"arm": "base", "why": "a test", "recipe": recipe.model_dump(mode="json"), "channel_names": list(plan.source_channels)}
    table |= declared(read_rules(labels or LABELS, order)) | {"axes_zyx": "SPL", "cohort": "Dataset777_Test", "n_training": 9, **about}
    if folds:
        table["folds"] = list(folds)
    (folder / "model.json").write_text(json.dumps(table))
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    for index, fold in enumerate(folds or ("",)):
        place = folder / f"fold_{fold}" if folds else folder
        save_weights(drawn_network(plan, recipe, seed + index), place / "final.safetensors", {"seed": seed, "epoch": 1})
    return folder


def write_results(folder: Path, plan: Plan, **kwargs: Any) -> Path:
    """A result folder whose checkpoints hold the state of a training, as nnU-Net's do: momentum, numpy's numbers, a device."""
    mirror = kwargs.pop("mirror", [0, 1])
    model = write_model(folder / "model", plan, overlay={"inference": {"mirror": mirror}}, **kwargs)
    out = export_nnunet(model, folder / "results").folder
    for path in out.glob("fold_*/*.pth"):
        content = torch.load(path, weights_only=True)
        number = np.float32(0.25)
        content["optimizer_state"] = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.01, "params": [0]}]}
        content |= {"logging": {"mean_fg_dice": [number], "dice_per_class_or_region": [[number]], "lrs": [0.01]}, "_best_ema": number}
        content["init_args"]["device"] = torch.device("cpu")
        torch.save(content, path)
    return out
