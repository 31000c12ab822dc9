"""What training asks of a network's outputs: the loss for the cohort's labels, and the Dice that training is watched with.

The watched "pseudo-Dice" is that of hard outputs of validation patches, all patches of an epoch taken as one (facts section 8).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ichbench.cases.labels import LabelRules
from ichbench.errors import InputError
from ichbench.network.losses import Supervision, is_of
from ichbench.recipe import TrainingRecipe, check_loss


def make_supervision(rules: LabelRules, n_outputs: int, planned_batch_dice: bool, training: TrainingRecipe) -> Supervision:
    """What the recipe's loss needs besides logits and labels. Raises InputError for a loss that does not fit the labels."""
    if n_outputs != rules.n_heads:
        raise InputError(f"the plan has {n_outputs} outputs, the cohort's labels need {rules.n_heads}; plan again")
    check_loss(training, rules.outputs, rules.has_regions)
    weights = () if training.class_weights == "equal" else training.class_weights
    batch_dice = planned_batch_dice if training.batch_dice == "auto" else training.batch_dice
    nnunet = training.compatibility == "nnunet"
    return Supervision(rules, batch_dice, weights, training.dice_weight, training.ce_weight, nnunet)


def count_hits(logits: Tensor, labels: Tensor, rules: LabelRules) -> NDArray[np.float64]:
    """(targets, 2): voxels that truth and answer share, and the sum of both, per foreground label or region.

    logits  (b, heads, *spatial); labels (b, *spatial). Plain: the highest head; regions: a logit above 0. Ignored voxels
            count on neither side.
    """
    valid = None if rules.ignore is None else labels != rules.ignore
    top = None if rules.has_regions else logits.argmax(1)
    counts = []
    for head, target in enumerate(rules.targets):
        truth = is_of(labels, target)
        found = logits[:, head] > 0 if top is None else is_of(top, target)
        if valid is not None:
            found = found & valid
        counts.append(torch.stack([(truth & found).sum(), truth.sum() + found.sum()]))
    return torch.stack(counts).cpu().numpy().astype(np.float64)


def dice_of(counts: NDArray[np.float64]) -> tuple[float, ...]:
    """2 shared / sum per target; NaN where neither side has a voxel."""
    return tuple(float(2 * shared / both) if both else math.nan for shared, both in counts)
