"""A trained model as a folder, and its use on images from outside any study.

plan.json     the configuration           model.json    recipe, channels, labels or regions, orientation, folds
final.safetensors, final.json             the weights of a model of one fold, or
fold_0/final.safetensors, ...             those of several, whose logits are averaged
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ichbench.cases.case import Case, Grid
from ichbench.cases.files import check_writable
from ichbench.cases.images import write_labels
from ichbench.cases.labels import LabelRules, read_rules
from ichbench.errors import CaseError, InputError
from ichbench.inference.archives import archive_of, taken_by, write_probabilities
from ichbench.inference.inputs import find_images, read_case, suffix_of
from ichbench.inference.postprocess import Postprocessing, read_postprocessing
from ichbench.inference.predictors import Tools, predict_unet, predict_with_probabilities
from ichbench.network.unet import UNet, check_topology, make_unet
from ichbench.network.weights import load_weights
from ichbench.overlays import with_settings
from ichbench.prepare.configuration import network_plan
from ichbench.prepare.normalize import NORMALIZERS
from ichbench.prepare.plan import Plan
from ichbench.recipe import NetworkRecipe, Recipe, check_precision
from ichbench.scoring.layouts import SUFFIXES

#: intensities are computed in single precision
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder says, weights apart.

    channel_names  of the images that it takes, in the order of their files
    rules          what the network's outputs mean
    axes_zyx       where z, y, x of its training cases point; None: unknown, or of no interest (files are read as they lie)
    folds          names of the folds in `fold_<name>/`, or empty where the weights lie beside `model.json`
    about          everything in `model.json`
    """

    folder: Path
    plan: Plan
    recipe: Recipe
    channel_names: tuple[str, ...]
    rules: LabelRules
    axes_zyx: str | None
    folds: tuple[str, ...]
    about: Mapping[str, Any]

    def weights(self, checkpoint: str) -> dict[str, Path]:
        """Fold -> file of its weights; a model of one fold without a name has the fold "0"."""
        if not self.folds:
            return {"0": self.folder / f"{checkpoint}.safetensors"}
        return {fold: self.folder / f"fold_{fold}" / f"{checkpoint}.safetensors" for fold in self.folds}


@dataclass(frozen=True)
class Model:
    """A trained network with all it needs, as `ModelFolder` describes it."""

    tools: Tools
    axes_zyx: str | None
    channel_names: tuple[str, ...] = ("CT",)


@dataclass(frozen=True)
class Predicted:
    """One mask that was written, with the volume of its foreground (ml) and any warnings."""

    path: Path
    volume_ml: float
    notes: tuple[str, ...]


def read_model(folder: Path) -> ModelFolder:
    """Read a model folder, as `run-ablation` leaves it under `models/` or `ichbench nnunet import` writes it, without the weights."""
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8-sig"))
        plan = Plan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8-sig")))
        channels, axes = tuple(str(name) for name in about["channel_names"]), about["axes_zyx"]
        recipe = Recipe.model_validate_json(json.dumps(about["recipe"]))
        folds = tuple(str(fold) for fold in about.get("folds", ()))
        labels, order = about["labels"], about.get("regions_class_order")
        if not (axes is None or isinstance(axes, str)):
            raise ValueError(f"axes_zyx is {axes!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} is not a model folder ({said}); give one such as RUN/models/base-foldfull-seed0") from None
    if not all(re.fullmatch(r"\w+", fold) for fold in folds):
        raise InputError(f"{folder / 'model.json'}: folds are {list(folds)}; a fold is named by letters and digits")
    check_intensities(plan, str(folder / "plan.json"))
    rules = read_rules(labels, order, folder / "model.json")
    return ModelFolder(folder, plan, recipe, channels, rules, axes, folds, about)


def load_model(folder: Path, device: str = "cpu", settings: Sequence[str] = ()) -> Model:
    """Read a model folder with its weights; several folds become several networks. Raises InputError for a damaged one.

    settings    "NAME=VALUE", fields of its `inference` that hold instead of what its recipe says (`with_settings`)
    """
    found = read_model(folder)
    networks, topology = [], network_plan(found.plan, found.rules)
    for path in found.weights(found.recipe.inference.checkpoint).values():
        _check_size(topology, found.recipe.network, path)
        network = make_unet(topology, found.recipe.network)
        load_weights(network, path)
        networks.append(network.to(device).eval())
    rule = folder / "postprocessing.json"
    postprocessing = read_postprocessing(rule) if found.recipe.inference.postprocess != "off" else None
    previous = None if found.plan.previous_stage is None else _first_stage(load_model(folder / "previous", device, settings))
    recipe = with_settings(found.recipe, settings)
    tools = Tools(
        recipe.prediction(),
        recipe.prepare,
        found.plan,
        tuple(networks),
        device,
        rules=found.rules,
        previous=previous,
        postprocessing=postprocessing,
    )
    return Model(tools, found.axes_zyx, found.channel_names)


def _check_size(plan: Plan, recipe: NetworkRecipe, weights: Path) -> None:
    """A damaged plan may claim any network; none is allocated that the file of its weights cannot fill."""
    check_topology(plan)
    with torch.device("meta"):
        needed = sum(value.numel() for value in UNet(plan, recipe).parameters())
    if not weights.is_file():
        raise InputError(f"cannot read the weights {weights}: there is no such file; train or import the model again")
    if needed > weights.stat().st_size:
        raise InputError(f"{weights}: has fewer bytes than the plan's network has weights ({needed:,}); they belong to another network")


def check_intensities(plan: Plan, source: str) -> None:
    """Raise InputError where a channel cannot be normalised: a NaN there would be an empty mask without a word."""
    if not isinstance(plan.normalization, tuple) or not isinstance(plan.intensities, Mapping):
        raise InputError(f"{source}: normalization or intensities is no table; the file is damaged: take the original")
    for index, scheme in enumerate(plan.normalization):
        if not isinstance(scheme, str) or scheme not in NORMALIZERS:
            raise InputError(f"{source}: the normalization {scheme!r} is not known; known are {', '.join(NORMALIZERS)}")
        table = plan.intensities.get(str(index))
        facts = table if isinstance(table, Mapping) else {}
        for name in ("mean", "std", "percentile_00_5", "percentile_99_5") if scheme == "CTNormalization" else ():
            value = facts.get(name)
            if not isinstance(value, int | float) or not abs(value) < LARGEST:
                raise InputError(
                    f"{source}: channel {index} is normalised as CT, but the {name} of its training intensities is {value!r}; "
                    "a finite number is needed: take the plans that the model was trained with"
                )


def _first_stage(model: Model) -> Callable[[Case], NDArray[np.int16]]:
    def labels_of(case: Case) -> NDArray[np.int16]:
        found = predict_unet(case, model.tools).labels_zyx
        return found if found is not None else np.zeros(case.grid.shape_zyx, dtype=np.int16)

    return labels_of


def predict_path(model: Model, image: Path, out: Path, probabilities: bool = False, overwrite: bool = False) -> Iterator[Predicted]:
    """Segment one image, or every image of a folder; masks lie on their image's own grid. An input is never overwritten.

    A model of several channels takes the files `case_0000.nii.gz`, `case_0001.nii.gz`, ...; one of them names the case.
    With `probabilities` an archive `<mask's name>.npz` lies beside each mask, as nnU-Net writes it. Files that exist are refused
    before anything is computed (a mask with the other suffix is one of them), unless `overwrite` is set: then masks and archive of a
    case are removed before it is computed, so that one mask is left, no archive outlives the mask it belongs to, and neither does a
    case that fails. In a folder a case that fails does not stop the others: CaseError names all that failed at the end.
    """
    check_precision(model.tools.inference, model.tools.device)

    def one(case_id: str, files: Sequence[Path], target: Path) -> Predicted:
        return predict_files(model, case_id, files, target, probabilities)

    yield from predict_each(find_images(image, model.channel_names), image, out, one, overwrite)


def predict_each(
    cases: Mapping[str, tuple[Path, ...]], image: Path, out: Path, one: Callable[[str, Sequence[Path], Path], Predicted], overwrite: bool
) -> Iterator[Predicted]:
    """`one(case, files, target)` for every case, with all that `predict_path` says of files that exist and cases that fail."""
    targets = _targets(cases, image, out, overwrite)
    sources = {_real(source) for files in cases.values() for source in files}
    failed: dict[str, Exception] = {}
    for case_id, files in cases.items():
        try:
            try:
                for old in reversed(taken_by(targets[case_id])):
                    if _real(old) not in sources:
                        old.unlink(missing_ok=True)
                done = one(case_id, files, targets[case_id])
            except OSError as error:
                said = f"{error.filename or targets[case_id]}: {error.strerror or error}"
                raise CaseError(f"case {case_id}: {said}; see to it and give the same command again, with --overwrite") from None
        except (InputError, CaseError) as error:
            if len(cases) == 1:
                raise
            failed[case_id] = error
        else:
            yield done
    if failed:
        said = "".join(f"\n  {case_id}: {error}" for case_id, error in failed.items())
        raise CaseError(f"{len(failed)} of {len(cases)} cases have no mask; the others were written{said}")


def _targets(cases: Mapping[str, tuple[Path, ...]], image: Path, out: Path, overwrite: bool) -> Mapping[str, Path]:
    """Case -> its mask's file; InputError for an `--out` that fits no input, an input among the targets, or an existing file."""
    named = out.name.endswith(SUFFIXES)
    # a mask's file may be a link to nothing: it is replaced
    check_writable(out.parent if named and not image.is_dir() and not out.is_dir() else out)
    if not out.is_dir():
        if image.is_dir() and (named or out.exists()):
            raise InputError(f"{image} is a folder, so --out must be a folder too, but {out} is a file or named like one")
        if not named and (out.exists() or re.fullmatch(r"\.[A-Za-z]\w*", out.suffix)):
            raise InputError(
                f"--out {out} is neither a folder nor a name ending in {' or '.join(SUFFIXES)}; make a folder with a dot first"
            )
    single = named and not image.is_dir() and not out.is_dir()
    targets = {case_id: out if single else out / (case_id + suffix_of(files[0])) for case_id, files in cases.items()}
    sources = {_real(source): source for files in cases.values() for source in files}
    for case_id, target in targets.items():
        if _real(target) in sources:
            raise InputError(f"--out {out} would overwrite the image {sources[_real(target)]}; give another file or folder")
        for path in (target, archive_of(target)):
            if path.is_dir():
                raise InputError(f"case {case_id}: {path} is a folder, where a file of the case belongs; move it, or give another --out")
    # an archive that is there belongs to another mask, also where none is written; an image beside its mask is none
    there = [old for target in targets.values() for old in taken_by(target) if _real(old) not in sources]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if there[1:] else ""
        raise InputError(f"{there[0]}{more} would be overwritten; nothing was computed: give another --out, or --overwrite")
    return targets


def predict_files(
    model: Model, case_id: str, files: Sequence[Path], target: Path, probabilities: bool = False, rule: Postprocessing | None = None
) -> Predicted:
    """The mask of one case, after the model's own post-processing and then `rule`, and its archive, if it is to have one."""
    case, notes = read_case(case_id, files, model.tools.prepare, model.axes_zyx)
    if probabilities:
        prediction, table = predict_with_probabilities(case, model.tools)
        write_probabilities(archive_of(target), table, case.grid, model.tools.rules)
    else:
        prediction = predict_unet(case, model.tools)
    labels = prediction.labels_zyx if prediction.labels_zyx is not None else np.zeros(case.grid.shape_zyx, dtype=np.int16)
    labels = labels if rule is None else rule.apply(labels).astype(np.int16)
    return write_mask(target, labels, case.grid, notes + prediction.notes)


def write_mask(target: Path, labels_zyx: NDArray[np.int16], grid: Grid, notes: tuple[str, ...]) -> Predicted:
    """Write a case's mask, after its archive if it has one: that is only ever there beside its mask."""
    try:
        write_labels(target, labels_zyx, grid)
    except BaseException:
        archive_of(target).unlink(missing_ok=True)
        raise
    return Predicted(target, float(np.count_nonzero(labels_zyx)) * grid.voxel_ml, notes)


def _real(path: Path) -> str:
    # `Path.resolve` does not take links that go in a circle
    return os.path.realpath(path)
