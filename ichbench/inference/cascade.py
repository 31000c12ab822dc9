"""The second stage of a cascade sees what the first one found: its labels, one channel each, beside the image.

The labels take the way of a training case's labels (crop, resampling by the largest indicator), so that the network sees at
test time what it saw in training. Source: facts sections 9 and 10.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case
from ichbench.cases.labels import LabelRules
from ichbench.errors import InputError
from ichbench.prepare.pipeline import Prepared, prepare_case
from ichbench.prepare.plan import Plan
from ichbench.recipe import PrepareRecipe


def one_hot(labels_zyx: NDArray[np.integer], labels: tuple[int, ...]) -> NDArray[np.float32]:
    """(z, y, x) -> (labels, z, y, x), 1 where a voxel has the label; -1 (outside the nonzero mask) belongs to none."""
    return np.stack([labels_zyx == label for label in labels]).astype(np.float32)


def with_previous(
    case: Case, previous_zyx: NDArray[np.int16], prepared: Prepared, recipe: PrepareRecipe, plan: Plan, rules: LabelRules | None
) -> NDArray[np.float32]:
    """The prepared image with one channel per foreground label (also where the network predicts regions) of the first stage.

    previous_zyx  labels on the case's native grid
    prepared      the case without labels, as the second stage's plan wants it
    """
    if rules is None:
        raise InputError("the second stage of a cascade needs the cohort's labels, to know how many channels they become")
    labels = previous_labels(case, previous_zyx, prepared, recipe, plan, rules)
    return np.concatenate([prepared.image_czyx, one_hot(labels, rules.foreground_labels)])


def previous_labels(
    case: Case, previous_zyx: NDArray[np.int16], prepared: Prepared, recipe: PrepareRecipe, plan: Plan, rules: LabelRules
) -> NDArray[np.int16]:
    """The first stage's labels on the second stage's prepared grid, -1 outside the nonzero mask; arguments as above."""
    if previous_zyx.shape != case.grid.shape_zyx:
        raise InputError(
            f"case {case.id}: the first stage's labels have shape {previous_zyx.shape}, the image {case.grid.shape_zyx}; "
            "both must lie on the same grid"
        )
    unknown = sorted(set(np.unique(previous_zyx).tolist()) - set(rules.labels))
    if unknown:
        raise InputError(f"case {case.id}: the first stage's labels hold {unknown}, but declared are {list(rules.labels)}")
    # a crop to the reference must not become a crop to the first stage's guess
    recipe = recipe.model_copy(update={"slice_crop": "off"}) if recipe.slice_crop == "reference" else recipe
    labelled = prepare_case(replace(case, labels_zyx=previous_zyx), recipe, plan)
    if labelled.labels_zyx is None or labelled.labels_zyx.shape != prepared.image_czyx.shape[1:]:
        raise InputError(f"case {case.id}: the first stage's labels were not prepared to the image's shape")
    return labelled.labels_zyx
