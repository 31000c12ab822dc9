"""A model that nnunetv2 itself plans, prepares and trains: Hippocampus at 1.5 mm, 8 features, a minute on one core."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

NUMBER, STEPS, EPOCHS = 904, 60, 5


@contextmanager
def training_here() -> Iterator[None]:
    """While it lasts nnU-Net trains in this process, without workers and without compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("nnUNet_compile", "f")
        yield


def train_hippocampus(shared_data: Path, folders: Path, seed: int) -> Path:
    """Run nnU-Net's own planning, preprocessing and training on Dataset004 and return the result folder of 3d_fullres, fold 0.

    What is ours: few features, Adam (a few hundred steps of SGD learn nothing) no augmentation, which
    would take most of the time; so it predicts without mirroring, which other tests compare.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Quick(nnUNetTrainer):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.network.parameters(), 6e-3)
            return optimizer, PolyLRScheduler(optimizer, 6e-3, self.num_epochs)

        def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:
            rotation, dummy, _, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            # nothing is turned, so nothing needs room around the patch; what is not mirrored here must not be at prediction
            self.inference_allowed_mirroring_axes = None
            return rotation, dummy, self.configuration_manager.patch_size, None

        @staticmethod
        def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
            names = ("is_cascaded", "foreground_labels", "regions", "ignore_label")
            scales = kwargs.get("deep_supervision_scales", args[2] if len(args) > 2 else None)
            return nnUNetTrainer.get_validation_transforms(scales, **{name: kwargs[name] for name in names if name in kwargs})

    # a result folder is named after its trainer, and found again by that name
    Quick.__name__ = "nnUNetTrainer"
    # under a number of its own: other tests plan Dataset004
    data = f"Dataset{NUMBER}_Hippocampus"
    shutil.copytree(shared_data / "Dataset004_Hippocampus", folders / "raw" / data, copy_function=os.symlink)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    extract_fingerprints([NUMBER], num_processes=1, check_dataset_integrity=False)
    plan_experiments([NUMBER], overwrite_target_spacing=(1.5, 1.5, 1.5))
    where = folders / "preprocessed" / data
    plans = json.loads((where / "nnUNetPlans.json").read_text())
    chosen = plans["configurations"]["3d_fullres"]
    network = chosen["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(64, 8 * 2**stage) for stage in range(network["n_stages"])]
    chosen["batch_size"] = 2
    (where / "nnUNetPlans.json").write_text(json.dumps(plans))
    preprocess([NUMBER], configurations=("3d_fullres",), num_processes=(1,))
    dataset = json.loads((where / "dataset.json").read_text())
    with training_here():
        trainer = Quick(plans | {"continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = EPOCHS, STEPS, 1
        trainer.run_training()
    return folders / "results" / data / "nnUNetTrainer__nnUNetPlans__3d_fullres"
