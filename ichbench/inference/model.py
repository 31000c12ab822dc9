"""A trained model as a folder (`plan.json`, `model.json`, weights) and its use on images from outside any study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichbench.cases.case import Case
from ichbench.cases.images import read_image, write_labels
from ichbench.errors import InputError
from ichbench.inference.predictors import Tools, predict_unet
from ichbench.network.unet import make_unet
from ichbench.network.weights import load_weights
from ichbench.prepare.plan import Plan
from ichbench.recipe import Recipe

SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Predicted:
    """One mask that was written, with the volume of its foreground (ml) and any warnings."""

    path: Path
    volume_ml: float
    notes: tuple[str, ...]


def load_model(folder: Path, device: str = "cpu") -> Tools:
    """Read a model folder as `run-ablation` leaves it under `models/`."""
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        plan = Plan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not a model folder ({error}); give one such as RUN/models/base-foldfull-seed0") from None
    if len(about["channel_names"]) != 1:
        raise InputError(f"{folder} was trained on the channels {about['channel_names']}; prediction from files takes one channel for now")
    recipe = Recipe.model_validate_json(json.dumps(about["recipe"]))
    network = make_unet(plan, recipe.network)
    load_weights(network, folder / f"{recipe.inference.checkpoint}.safetensors")
    return Tools(recipe.inference, recipe.prepare, plan, (network.to(device).eval(),), device)


def predict_path(tools: Tools, image: Path, out: Path) -> Iterator[Predicted]:
    """Segment one image, or every image of a folder; masks lie on their image's own grid. An input is never overwritten."""
    if image.is_dir():
        paths = sorted(path for path in image.iterdir() if path.name.endswith(SUFFIXES))
        if not paths:
            raise InputError(f"{image} holds no image ({' or '.join(SUFFIXES)})")
        pairs = [(path, out / path.name) for path in paths]
    else:
        pairs = [(image, out / image.name if out.is_dir() or not out.name.endswith(SUFFIXES) else out)]
    for source, target in pairs:
        if target.resolve() == source.resolve():
            raise InputError(f"--out {out} would overwrite the image {source}; give another file or folder")
        yield _predict_file(tools, source, target)


def _predict_file(tools: Tools, source: Path, target: Path) -> Predicted:
    image, grid = read_image(source, keep_file_order=tools.prepare.compatibility == "nnunet")
    prediction = predict_unet(Case(source.name.split(".")[0], image[None], None, grid), tools)
    labels = prediction.labels_zyx if prediction.labels_zyx is not None else np.zeros(grid.shape_zyx, dtype=np.int16)
    write_labels(target, labels, grid)
    return Predicted(target, float(np.count_nonzero(labels)) * grid.voxel_ml, prediction.notes)
