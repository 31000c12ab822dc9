"""Soft Dice and cross-entropy with deep supervision, as nnU-Net computes them (facts section 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: (logits (b, c, *spatial), target (b, *spatial) integer, batch_dice, ignore label) -> scalar
Loss = Callable[[Tensor, Tensor, bool, int | None], Tensor]

SMOOTH = 1e-5


def soft_dice(logits: Tensor, target: Tensor, batch_dice: bool, ignore: int | None = None) -> Tensor:
    """Mean over classes (and samples) of (2 I + s) / (G + P + s), s = 1e-5, background excluded; 1 is perfect.

    I, G and P are sums over voxels of target x probability, target and probability; with `batch_dice` also over the
    batch, before the division. Voxels with the label `ignore` take no part.
    """
    axes = (0, *range(2, logits.ndim)) if batch_dice else tuple(range(2, logits.ndim))
    probability = torch.softmax(logits.float(), dim=1)
    terms = []
    valid = None if ignore is None else (target != ignore).to(probability.dtype)
    spatial = tuple(axis - 1 for axis in axes if axis > 1)
    spatial = (0, *spatial) if batch_dice else spatial
    for label in range(1, logits.shape[1]):
        truth = (target == label).to(probability.dtype)
        guess = probability[:, label] if valid is None else probability[:, label] * valid
        overlap, reference, predicted = (truth * guess).sum(spatial), truth.sum(spatial), guess.sum(spatial)
        terms.append((2 * overlap + SMOOTH) / (reference + predicted + SMOOTH).clamp_min(1e-8))
    return torch.stack(terms).mean()


def cross_entropy(logits: Tensor, target: Tensor, ignore: int | None = None) -> Tensor:
    """Mean over the voxels that are not `ignore` of -log softmax at the target; 0 when none is left."""
    if ignore is not None and not bool((target != ignore).any()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), target, ignore_index=-100 if ignore is None else ignore)


def dice_ce(logits: Tensor, target: Tensor, batch_dice: bool, ignore: int | None = None) -> Tensor:
    """Cross-entropy minus soft Dice, so -1 is perfect, as in nnU-Net's logs."""
    return cross_entropy(logits, target, ignore) - soft_dice(logits, target, batch_dice, ignore)


def dice(logits: Tensor, target: Tensor, batch_dice: bool, ignore: int | None = None) -> Tensor:
    """Minus soft Dice."""
    return -soft_dice(logits, target, batch_dice, ignore)


def ce(logits: Tensor, target: Tensor, batch_dice: bool, ignore: int | None = None) -> Tensor:
    """Cross-entropy alone; `batch_dice` has no meaning here."""
    return cross_entropy(logits, target, ignore)


LOSSES: dict[str, Loss] = {"dice_ce": dice_ce, "dice": dice, "ce": ce}


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


def supervised(
    loss: Loss, outputs: Tensor | list[Tensor], target: Tensor, batch_dice: bool, unsupervised_levels: int, ignore: int | None = None
) -> Tensor:
    """The weighted loss over all decoder levels (or the plain loss of a single tensor)."""
    if isinstance(outputs, Tensor):
        return loss(outputs, target, batch_dice, ignore)
    weights = level_weights(len(outputs), unsupervised_levels)
    used = [(weight, logits) for weight, logits in zip(weights, outputs, strict=True) if weight]
    total = [weight * loss(logits, shrink_target(target, logits.shape[2:]), batch_dice, ignore) for weight, logits in used]
    return torch.stack(total).sum()
