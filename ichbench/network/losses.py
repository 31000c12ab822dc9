"""Soft Dice and cross-entropy with deep supervision, as nnU-Net computes them (facts section 8).

Plain labels compete (softmax over the heads, background among them); a region has a head of its own (sigmoid), and regions
may overlap. Voxels with the ignore label take no part in anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ichbench.cases.labels import LabelRules, Target, members
from ichbench.compute import must_repeat

SMOOTH = 1e-5
#: torch's value for "no label is ignored"
NOTHING = -100


#: sums over the samples of this process -> sums over those of all processes
Pooled = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Supervision:
    """What the heads stand for, and how a loss counts them.

    batch_dice      Dice sums run over all samples of a batch before the division
    class_weights   of the cross-entropy, one per head; empty: all alike. Plain labels: a weighted mean over voxels, as torch's
    dice_weight, ce_weight   of the two terms of a sum
    nnunet          with regions and an ignore label, nnU-Net adds the heads' cross-entropies up, where it averages them
                    without an ignore label; ours averages them always, so that an ignore label nobody uses changes nothing
    pooled          in a training of several processes: how their sums become one, so that the loss is that of the whole batch
    """

    rules: LabelRules
    batch_dice: bool = False
    class_weights: tuple[float, ...] = ()
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    nnunet: bool = False
    pooled: Pooled | None = None


#: (logits (b, heads, *spatial), labels (b, *spatial) integer, supervision) -> scalar
Loss = Callable[[Tensor, Tensor, Supervision], Tensor]


def _wide(logits: Tensor) -> Tensor:
    """At least float32: autocast may hand over half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def is_of(labels: Tensor, target: Target) -> Tensor:
    """Where the labels are a label, or one of a region's."""
    found = [labels == label for label in members(target)]
    return found[0] if len(found) == 1 else torch.stack(found).any(0)


def _weights(logits: Tensor, how: Supervision) -> Tensor | None:
    return torch.tensor(how.class_weights, dtype=_wide(logits).dtype, device=logits.device) if how.class_weights else None


def soft_dice(logits: Tensor, labels: Tensor, how: Supervision) -> Tensor:
    """Mean over foreground heads (and samples) of (2 I + s) / (G + P + s), s = 1e-5; 1 is perfect.

    I, G and P are sums over voxels of truth x probability, truth and probability; with `batch_dice` also over the batch,
    before the division.
    """
    rules, spatial = how.rules, tuple(range(1, labels.ndim))
    probability = torch.sigmoid(_wide(logits)) if rules.has_regions else torch.softmax(_wide(logits), dim=1)
    valid = None if rules.ignore is None else (labels != rules.ignore).to(probability.dtype)
    terms = []
    for head, target in enumerate(rules.targets, start=0 if rules.has_regions else 1):
        truth = is_of(labels, target).to(probability.dtype)
        guess = probability[:, head] if valid is None else probability[:, head] * valid
        terms.append(torch.stack([(truth * guess).sum(spatial), truth.sum(spatial), guess.sum(spatial)]))
    # (heads, 3, b)
    sums = torch.stack(terms)
    if how.batch_dice:
        sums = sums.sum(2, keepdim=True)
        sums = sums if how.pooled is None else how.pooled(sums)
    overlap, reference, predicted = sums.unbind(1)
    each = (2 * overlap + SMOOTH) / (reference + predicted + SMOOTH).clamp_min(1e-8)
    return each.mean() if how.batch_dice else _mean(each, how)


def cross_entropy(logits: Tensor, labels: Tensor, how: Supervision) -> Tensor:
    """Mean over the voxels that are not ignored of -log softmax at the label, or of every region's binary cross-entropy;
    0 when no voxel is left."""
    ignore = how.rules.ignore
    if how.pooled is None and ignore is not None and not bool((labels != ignore).any()):
        return logits.sum() * 0.0
    weights = _weights(logits, how)
    if not how.rules.has_regions:
        skipped = NOTHING if ignore is None else ignore
        # labels come in a narrow type; torch's cross-entropy takes int64 alone
        labels = labels.long()
        if how.pooled is None:
            return label_cross_entropy(_wide(logits), labels, weights, skipped)
        total = label_cross_entropy(_wide(logits), labels, weights, skipped, "sum")
        kept = labels[labels != skipped]
        return _ratio(total, weights[kept].sum() if weights is not None else kept.new_tensor(kept.numel(), dtype=total.dtype), how)
    truth = torch.stack([is_of(labels, target) for target in how.rules.targets], dim=1).to(_wide(logits).dtype)
    each = F.binary_cross_entropy_with_logits(_wide(logits), truth, reduction="none")
    if weights is not None:
        each = each * weights.reshape(1, -1, *(1,) * (each.ndim - 2))
    if ignore is None:
        return _mean(each, how)
    valid = (labels != ignore)[:, None]
    heads = 1 if how.nnunet else each.shape[1]
    return _ratio((each * valid).sum(), valid.sum().to(each.dtype) * heads, how)


def label_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, skipped: int, reduction: str = "mean") -> Tensor:
    """torch's cross-entropy of labels, in operations that repeat themselves bit for bit where that is asked for."""
    if not must_repeat(logits.device):
        return F.cross_entropy(logits, labels, weights, ignore_index=skipped, reduction=reduction)
    return repeatable_cross_entropy(logits, labels, weights, skipped, reduction)


def repeatable_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, skipped: int, reduction: str) -> Tensor:
    """The same numbers by comparison and sums alone; torch reads the label's logit by its index, and has no such gradient on a GPU."""
    log_p, each, weight = F.log_softmax(logits, 1), logits.new_zeros(labels.shape), logits.new_zeros(labels.shape)
    for head in range(logits.shape[1]):
        here = labels == head if head != skipped else torch.zeros_like(labels, dtype=torch.bool)
        factor = logits.new_ones(()) if weights is None else weights[head]
        each = each - torch.where(here, log_p[:, head] * factor, 0.0)
        weight = weight + here * factor
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / weight.sum()


def _mean(values: Tensor, how: Supervision) -> Tensor:
    """The mean over the values of all processes."""
    return values.mean() if how.pooled is None else _ratio(values.sum(), values.new_tensor(values.numel()), how)


def _ratio(total: Tensor, count: Tensor, how: Supervision) -> Tensor:
    """Total over count, each summed over all processes; nothing counted is a total of nothing."""
    if how.pooled is not None:
        total, count = how.pooled(torch.stack([total, count])).unbind()
    return total / count.clamp_min(1e-8)


def top_cross_entropy(logits: Tensor, labels: Tensor, how: Supervision) -> Tensor:
    """Mean cross-entropy of the tenth of all voxels where it is highest (plain labels only); ignored voxels count 0.

    Of one process alone: the highest tenth of a batch is not known to one that holds a part of it.
    """
    weights = _weights(logits, how)
    ignore = NOTHING if how.rules.ignore is None else how.rules.ignore
    each = label_cross_entropy(_wide(logits), labels.long(), weights, ignore, "none").flatten()
    return each.topk(max(1, each.numel() // 10), sorted=False).values.mean()


def dice_ce(logits: Tensor, labels: Tensor, how: Supervision) -> Tensor:
    """Cross-entropy minus soft Dice, so -1 is perfect, as in nnU-Net's logs."""
    return how.ce_weight * cross_entropy(logits, labels, how) - how.dice_weight * soft_dice(logits, labels, how)


def dice_topk(logits: Tensor, labels: Tensor, how: Supervision) -> Tensor:
    """The cross-entropy of the hardest tenth of the voxels minus soft Dice."""
    return how.ce_weight * top_cross_entropy(logits, labels, how) - how.dice_weight * soft_dice(logits, labels, how)


def dice(logits: Tensor, labels: Tensor, how: Supervision) -> Tensor:
    """Minus soft Dice."""
    return -soft_dice(logits, labels, how)


LOSSES: dict[str, Loss] = {
    "dice_ce": dice_ce,
    "dice": dice,
    "ce": cross_entropy,
    "dice_topk": dice_topk,
    "topk": top_cross_entropy,
}


def level_weights(levels: int, unsupervised_levels: int) -> tuple[float, ...]:
    """Weights 1/2^i of the decoder's levels, the highest resolution first; they sum to 1.

    The lowest `unsupervised_levels` get 0, except that the highest resolution is always trained.
    """
    kept = max(1, levels - unsupervised_levels)
    raw = [0.5**i if i < kept else 0.0 for i in range(levels)]
    return tuple(weight / sum(raw) for weight in raw)


def shrink_target(target: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels (b, *spatial) at another size: the nearest voxel, counted from voxel centres."""
    if tuple(target.shape[1:]) == tuple(shape):
        return target
    for axis, size in enumerate(shape, start=1):
        length = target.shape[axis]
        if length != size:
            index = ((torch.arange(size, dtype=torch.float64) + 0.5) * (length / size)).floor().long().to(target.device)
            target = target.index_select(axis, index)
    return target


def supervised(loss: Loss, outputs: Tensor | list[Tensor], labels: Tensor, how: Supervision, unsupervised_levels: int) -> Tensor:
    """The weighted loss over all decoder levels (or the plain loss of a single tensor)."""
    if isinstance(outputs, Tensor):
        return loss(outputs, labels, how)
    weights = level_weights(len(outputs), unsupervised_levels)
    used = [(weight, logits) for weight, logits in zip(weights, outputs, strict=True) if weight]
    return torch.stack([weight * loss(logits, shrink_target(labels, logits.shape[2:]), how) for weight, logits in used]).sum()
