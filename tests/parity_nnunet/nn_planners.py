"""Runs nnunetv2's planners on a fingerprint; shared by the tests here and by what rewrites tests/golden."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from ichbench.prepare.topology import FAMILIES


def planners() -> dict[str, Any]:
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as plain
    from nnunetv2.experiment_planning.experiment_planners import resencUNet_planner as older
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as residual

    places = {"plain": plain, "resenc": older, "resenc_m": residual, "resenc_l": residual, "resenc_xl": residual}
    return {family: getattr(place, FAMILIES[family].planner) for family, place in places.items()}


def their_plans(folders: Path, family: str, fingerprint: dict[str, Any], dataset: dict[str, Any], arguments: dict[str, Any]) -> str:
    """The plans file that nnunetv2 writes, as text; its networks are built on torch's `meta` device, which costs nothing."""
    import torch

    raw, preprocessed = folders / "raw" / "Dataset900_Drawn", folders / "preprocessed" / "Dataset900_Drawn"
    for folder in (raw, preprocessed):
        folder.mkdir(exist_ok=True)
    for old in preprocessed.iterdir():
        old.unlink()
    image = raw / "one_0000.nii.gz"
    if not image.exists():
        import nibabel

        nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), image)
    # explicit paths spare nnunetv2 a pool of twelve processes for listing a folder
    listed = dataset | {"dataset": {"one": {"images": [str(image)], "label": str(image)}}}
    (raw / "dataset.json").write_text(json.dumps(listed))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
        planner = planners()[family]("Dataset900_Drawn", **arguments)
        planner.plan_experiment()
    return (preprocessed / f"{planner.plans_identifier}.json").read_text()
