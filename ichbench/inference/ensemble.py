"""Several networks, one answer: folds of a model by the mean of their logits, models by the mean of their probabilities.

The two differ on purpose (facts section 9): folds share one prepared grid, models do not, so their probabilities meet on the
native grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ichbench.cases.labels import LabelRules
from ichbench.errors import CaseError, InputError
from ichbench.inference.sliding import Network, PatchPlan, predict_logits
from ichbench.prepare.pipeline import Geometry, restore_logits, restore_scores
from ichbench.recipe import InferenceRecipe


def fold_logits(
    networks: Sequence[Network],
    image_czyx: NDArray[np.float32],
    plan: PatchPlan,
    recipe: InferenceRecipe,
    device: str = "cpu",
    name: str = "image",
) -> NDArray[np.floating]:
    """Mean of the networks' logits (heads, z, y, x) of a prepared image.

    float32; float16 with `compatibility = "nnunet"`, where nnU-Net's sums over folds are rounded to half as well.
    Raises CaseError, with `name`, when a sum is not finite (in half precision: beyond 65504).
    """
    total: torch.Tensor | None = None
    for network in networks:
        logits = torch.from_numpy(predict_logits(network, image_czyx, plan, recipe, device, name))
        total = logits if total is None else total.add_(logits)
    if total is None:
        raise InputError("prediction needs at least one trained network")
    if len(networks) > 1:
        total.div_(len(networks))
        if not all(bool(torch.isfinite(head).all()) for head in total):
            raise CaseError(f"{name}: the sum of {len(networks)} folds' logits is not finite; half precision ends at 65504")
    return np.asarray(total.numpy())


def native_labels(logits_czyx: NDArray[np.floating], geometry: Geometry, rules: LabelRules) -> NDArray[np.int16]:
    """Logits on the prepared grid -> labels on the native grid, resampled in the logits' own dtype."""
    check_heads(len(logits_czyx), rules)
    return restore_logits(logits_czyx, geometry, rules.regions_class_order or None)


def native_probabilities(logits_czyx: NDArray[np.floating], geometry: Geometry, rules: LabelRules) -> NDArray[np.float32]:
    """Logits on the prepared grid -> probabilities (heads, z, y, x) on the native grid, float32.

    Softmax, or a sigmoid per region; background is certain where the network saw nothing.
    """
    check_heads(len(logits_czyx), rules)
    logits = torch.from_numpy(restore_scores(logits_czyx, geometry)).float()
    probabilities = torch.sigmoid(logits) if rules.has_regions else torch.softmax(logits, 0)
    for index, head in enumerate(probabilities):
        head.nan_to_num_(nan=rules.outside(index))
    return np.asarray(probabilities.numpy())


def mean_probabilities(parts: Iterable[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Mean (float32, summed in the order given) of several models' probabilities (heads, *spatial) of one case."""
    total: NDArray[np.float32] | None = None
    count = 0
    for part in parts:
        count += 1
        if total is None:
            total = np.array(part, dtype=np.float32)
            continue
        if part.shape != total.shape:
            raise InputError(f"probabilities of shape {part.shape} cannot join those of shape {total.shape}: other labels or another grid")
        total += part
    if total is None:
        raise InputError("an ensemble needs at least one model")
    total /= count
    return total


def check_heads(n_heads: int, rules: LabelRules) -> None:
    """Raise InputError where a network's outputs are not those of the labels."""
    if n_heads != rules.n_heads:
        what = f"the regions {list(rules.names)}" if rules.has_regions else f"the labels {list(rules.labels)}"
        raise InputError(f"the network has {n_heads} outputs, but {what} need {rules.n_heads}; it was trained on other labels")
