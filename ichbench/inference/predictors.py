"""How a mask is made: by networks, by a threshold, by sending the reference through the preparation, or by somebody else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case
from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.errors import InputError
from ichbench.inference.postprocess import Postprocessing
from ichbench.prepare.pipeline import Prepared, prepare_case, restore_labels
from ichbench.prepare.plan import Plan
from ichbench.prepare.window import warn_constant
from ichbench.recipe import InferenceRecipe, PrepareRecipe, ThresholdRecipe

if TYPE_CHECKING:
    from ichbench.network.unet import UNet

#: HU range in which thresholds are looked for: from fat to fresh, dense clot and thin calcification.
SEARCH_HU = (-50, 150)


@dataclass(frozen=True)
class Tools:
    """What a predictor may need; the command that runs it fills in what it has."""

    inference: InferenceRecipe
    prepare: PrepareRecipe
    plan: Plan | None = None
    networks: Sequence[UNet] = ()
    device: str = "cpu"
    #: HU limits of the threshold predictor and the label it gives
    thresholds_hu: tuple[float, float] | None = None
    foreground_label: int = 1
    predictions: Path | None = None
    #: what the networks' outputs mean; None: plain labels, one per output
    rules: LabelRules | None = None
    #: what `predict_unet` does to its masks at the end
    postprocessing: Postprocessing | None = None
    #: a cascade's second stage: the first stage's labels of a case on its native grid
    previous: Callable[[Case], NDArray[np.int16]] | None = None


@dataclass(frozen=True)
class Prediction:
    """`labels_zyx` on the native grid, or None where somebody else's folder holds no mask; notes are warnings to show."""

    labels_zyx: NDArray[np.int16] | None
    notes: tuple[str, ...] = ()


def predict_unet(case: Case, tools: Tools) -> Prediction:
    """Prepare, sliding window, mean of the networks' logits, back to the native grid."""
    # torch is imported here so that the untrained arms and the board check do without it
    from ichbench.inference.ensemble import native_labels

    logits, prepared, rules = _logits(case, tools)
    labels = native_labels(logits, prepared.geometry, rules)
    return Prediction(labels if tools.postprocessing is None else tools.postprocessing.apply(labels).astype(np.int16), prepared.notes)


def predict_probabilities(case: Case, tools: Tools) -> NDArray[np.float32]:
    """Probabilities (heads, z, y, x) of one model on the native grid: softmax over labels, or a sigmoid per region."""
    from ichbench.inference.ensemble import native_probabilities

    logits, prepared, rules = _logits(case, tools)
    return native_probabilities(logits, prepared.geometry, rules)


def predict_with_probabilities(case: Case, tools: Tools) -> tuple[Prediction, NDArray[np.float32]]:
    """Labels and probabilities of one model at the price of one; as in nnU-Net the labels are then those of the probabilities."""
    from ichbench.inference.ensemble import native_probabilities

    logits, prepared, rules = _logits(case, tools)
    table = native_probabilities(logits, prepared.geometry, rules)
    labels = rules.from_probabilities(table)
    tidy = labels if tools.postprocessing is None else tools.postprocessing.apply(labels).astype(np.int16)
    return Prediction(tidy, prepared.notes), table


def predict_ensemble(case: Case, models: Sequence[Tools]) -> Prediction:
    """Several models (each with its own preparation and plan, its folds among `networks`): the mean of their probabilities."""
    from ichbench.inference.ensemble import mean_probabilities

    mean = mean_probabilities(predict_probabilities(case, tools) for tools in models)
    rules = models[0].rules or plain_rules(len(mean))
    return Prediction(rules.from_probabilities(mean))


def _logits(case: Case, tools: Tools) -> tuple[NDArray[np.floating], Prepared, LabelRules]:
    from ichbench.inference.cascade import with_previous
    from ichbench.inference.ensemble import fold_logits

    if not tools.networks:
        raise InputError("the unet predictor needs at least one trained network")
    plan = _plan(tools)
    unlabelled = Case(case.id, case.image_czyx, None, case.grid)
    flat = _flat_notes(case)
    prepared = prepare_case(unlabelled, tools.prepare, plan)
    prepared = replace(prepared, notes=(*flat, *prepared.notes))
    image = prepared.image_czyx
    if tools.previous is not None:
        image = with_previous(unlabelled, tools.previous(case), prepared, tools.prepare, plan, tools.rules)
    logits = fold_logits(tools.networks, image, plan, tools.inference, tools.device, case.id)
    return logits, prepared, tools.rules or plain_rules(len(logits))


def _flat_notes(case: Case) -> tuple[str, ...]:
    """Channels with one value throughout: an empty export or the wrong file, to which a network still gives some answer."""
    flat = [index for index, channel in enumerate(case.image_czyx) if channel.min() == channel.max()]
    notes = tuple(
        f"case {case.id}: every voxel of channel {index} is {case.image_czyx[index].flat[0]:g}; this is no head CT, the mask means nothing"
        for index in flat
    )
    for note in notes:
        warn_constant(note)
    return notes


def predict_threshold(case: Case, tools: Tools) -> Prediction:
    """Foreground where the first channel lies within the two thresholds (HU, both ends included), on the native image."""
    if tools.thresholds_hu is None:
        raise InputError("the threshold predictor needs its two thresholds; fit them with fit_thresholds")
    low, high = tools.thresholds_hu
    inside = (case.image_czyx[0] >= low) & (case.image_czyx[0] <= high)
    return Prediction((inside * tools.foreground_label).astype(np.int16))


def predict_roundtrip(case: Case, tools: Tools) -> Prediction:
    """The reference mask through prepare and restore: what this preparation costs even a perfect network."""
    if case.labels_zyx is None:
        raise InputError(f"case {case.id} has no reference mask; the roundtrip predictor is for labelled cases")
    # a crop to the reference is not to be had at test time, so it must not lower the ceiling either
    recipe = tools.prepare.model_copy(update={"slice_crop": "off"}) if tools.prepare.slice_crop == "reference" else tools.prepare
    prepared = prepare_case(case, recipe, _plan(tools))
    if prepared.labels_zyx is None:
        raise InputError(f"case {case.id}: preparation lost the reference mask")
    labels = restore_labels(prepared.labels_zyx, prepared.geometry)
    if tools.rules is not None and tools.rules.ignore is not None:
        # no network predicts "ignore"; a voxel that it spilled onto is background
        labels[labels == tools.rules.ignore] = 0
    return Prediction(labels, prepared.notes)


def predict_folder(case: Case, tools: Tools) -> Prediction:
    """Somebody else's mask `<case>.nii.gz` (or .nii) from a folder; it must lie on the case's own grid."""
    from ichbench.cases.images import read_labels

    if tools.predictions is None:
        raise InputError("the folder predictor needs the folder with the predictions")
    path = find_mask(tools.predictions, case.id)
    if path is None:
        return Prediction(None)
    labels, grid = read_labels(path)
    if not grid.same_place(case.grid):
        raise InputError(
            f"{path} does not lie on the grid of case {case.id}: shape {grid.shape_zyx} and spacing {grid.spacing_zyx_mm} mm (z, y, x), "
            f"the case has {case.grid.shape_zyx} and {case.grid.spacing_zyx_mm} mm; write predictions on the input's own grid"
        )
    return Prediction(labels)


def find_mask(folder: Path, case_id: str) -> Path | None:
    """The mask of a case in a folder of predictions, or None; two files of one case are an error."""
    paths = [path for path in (folder / f"{case_id}.nii.gz", folder / f"{case_id}.nii") if path.is_file()]
    if len(paths) > 1:
        raise InputError(f"{folder} holds two masks of case {case_id}: {paths[0].name} and {paths[1].name}; keep one")
    return paths[0] if paths else None


PREDICTORS: dict[str, Callable[[Case, Tools], Prediction]] = {
    "unet": predict_unet,
    "threshold": predict_threshold,
    "roundtrip": predict_roundtrip,
    "folder": predict_folder,
}


def fit_thresholds(cases: Iterable[Case], recipe: ThresholdRecipe, ignore: int | None = None) -> tuple[float, float]:
    """The two HU thresholds with the highest mean Dice (smooth 1e-5) over the training cases; given ones are kept.

    Every pair of whole HU in SEARCH_HU is tried, by one histogram per case, so the result is exact for images in whole HU.
    Voxels with the label `ignore` do not count.
    """
    low_hu, high_hu = SEARCH_HU
    edges = np.arange(low_hu, high_hu + 2) - 0.5
    # cumulative[i] = voxels below edge i, so a range is a difference of two entries
    total = np.zeros((len(edges), len(edges)))
    count = 0
    for case in cases:
        if case.labels_zyx is None:
            continue
        image = case.image_czyx[0]
        known = case.labels_zyx != ignore if ignore is not None else np.ones(image.shape, dtype=bool)
        foreground = (case.labels_zyx > 0) & known
        inside = np.concatenate([[0], np.cumsum(np.histogram(image[foreground], edges)[0])])
        everything = np.concatenate([[0], np.cumsum(np.histogram(image[known], edges)[0])])
        hit = inside[None, :] - inside[:, None]
        predicted = everything[None, :] - everything[:, None]
        total += (2 * hit + 1e-5) / (predicted + int(foreground.sum()) + 1e-5)
        count += 1
    if count == 0:
        raise InputError("thresholds are fitted on labelled training cases, but there are none")
    allowed = np.triu(np.ones_like(total, dtype=bool), k=1)
    if recipe.low_hu != "fit":
        allowed &= np.arange(len(edges))[:, None] == int(np.argmin(np.abs(edges - recipe.low_hu)))
    if recipe.high_hu != "fit":
        allowed &= np.arange(len(edges))[None, :] == int(np.argmin(np.abs(edges - recipe.high_hu)))
    if not allowed.any():
        raise InputError(
            f"inference.threshold has low_hu = {recipe.low_hu} and high_hu = {recipe.high_hu}; "
            f"low must lie below high, both within {SEARCH_HU} HU"
        )
    best = int(np.argmax(np.where(allowed, total, -1.0)))
    low, high = edges[best // len(edges)], edges[best % len(edges)]
    return (
        float(low) if recipe.low_hu == "fit" else float(recipe.low_hu),
        float(high) if recipe.high_hu == "fit" else float(recipe.high_hu),
    )


def _plan(tools: Tools) -> Plan:
    if tools.plan is None:
        raise InputError("this predictor needs the plan of a prepared cohort")
    return tools.plan
