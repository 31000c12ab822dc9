"""A trained model as a folder (`plan.json`, `model.json`, weights) and its use on images from outside any study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichbench.cases.case import Case
from ichbench.cases.images import read_image, reorient, write_labels
from ichbench.errors import InputError
from ichbench.inference.predictors import Tools, predict_unet
from ichbench.network.unet import make_unet
from ichbench.network.weights import load_weights
from ichbench.prepare.plan import Plan
from ichbench.recipe import Recipe

SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Model:
    """A trained network with all it needs, and the orientation (where z, y, x point) of the cases it was trained on."""

    tools: Tools
    axes_zyx: str


@dataclass(frozen=True)
class Predicted:
    """One mask that was written, with the volume of its foreground (ml) and any warnings."""

    path: Path
    volume_ml: float
    notes: tuple[str, ...]


def load_model(folder: Path, device: str = "cpu") -> Model:
    """Read a model folder as `run-ablation` leaves it under `models/`."""
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        plan = Plan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        channels, axes = list(about["channel_names"]), str(about["axes_zyx"])
        recipe = Recipe.model_validate_json(json.dumps(about["recipe"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"{folder} is not a model folder ({said}); give one such as RUN/models/base-foldfull-seed0") from None
    if len(channels) != 1:
        raise InputError(f"{folder} was trained on the channels {channels}; prediction from files takes one channel for now")
    network = make_unet(plan, recipe.network)
    load_weights(network, folder / f"{recipe.inference.checkpoint}.safetensors")
    return Model(Tools(recipe.inference, recipe.prepare, plan, (network.to(device).eval(),), device), axes)


def predict_path(model: Model, image: Path, out: Path) -> Iterator[Predicted]:
    """Segment one image, or every image of a folder; masks lie on their image's own grid. An input is never overwritten."""
    if image.is_dir():
        paths = sorted(path for path in image.iterdir() if path.name.endswith(SUFFIXES))
        if not paths:
            raise InputError(f"{image} holds no image ({' or '.join(SUFFIXES)})")
        pairs = [(path, out / _mask_name(path)) for path in paths]
    else:
        pairs = [(image, out / _mask_name(image) if out.is_dir() or not out.name.endswith(SUFFIXES) else out)]
    for source, target in pairs:
        if target.resolve() == source.resolve():
            raise InputError(f"--out {out} would overwrite the image {source}; give another file or folder")
        yield _predict_file(model, source, target)


def _mask_name(image: Path) -> str:
    """`case_0000.nii.gz` -> `case.nii.gz`: nnU-Net's images carry a channel number, its masks do not."""
    suffix = next(suffix for suffix in SUFFIXES if image.name.endswith(suffix)) if image.name.endswith(SUFFIXES) else ""
    return image.name.removesuffix(suffix).removesuffix("_0000") + (suffix or SUFFIXES[0])


def _predict_file(model: Model, source: Path, target: Path) -> Predicted:
    tools = model.tools
    keep = tools.prepare.compatibility == "nnunet"
    image, grid = read_image(source, keep_file_order=keep)
    if not keep and grid.axis_codes_zyx != model.axes_zyx:
        # the network has only seen heads that lie the way its cohort did; the grid remembers how to write the mask back
        (image,), grid = reorient([image], grid)
        if grid.axis_codes_zyx != model.axes_zyx:
            raise InputError(
                f"{source}: its axes (z, y, x) can be turned to {grid.axis_codes_zyx}, but the model was trained on {model.axes_zyx}; "
                "store the image in the model's orientation"
            )
    prediction = predict_unet(Case(_mask_name(source).split(".")[0], image[None], None, grid), tools)
    labels = prediction.labels_zyx if prediction.labels_zyx is not None else np.zeros(grid.shape_zyx, dtype=np.int16)
    write_labels(target, labels, grid)
    return Predicted(target, float(np.count_nonzero(labels)) * grid.voxel_ml, prediction.notes)
