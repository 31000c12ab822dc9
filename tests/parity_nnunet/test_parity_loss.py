"""Losses and the watched Dice against nnU-Net's own, on drawn logits: labels, regions, ignore label, deep supervision, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.network.losses import LOSSES, Supervision, level_weights, supervised
from ichbench.training.supervision import count_hits

pytest.importorskip("nnunetv2")

#: label rules by name: how many label values a target may hold (the ignore label is the last) and what they mean
RULES = {
    "two labels": (2, plain_rules(2)),
    "four labels": (4, plain_rules(4)),
    "four labels, ignore": (5, plain_rules(4, 4)),
    "regions": (4, LabelRules(("whole", "core", "two"), ((1, 2, 3), (2, 3), 3), (1, 2, 3))),
    "regions, ignore": (5, LabelRules(("whole", "core", "two"), ((1, 2, 3), (2, 3), 3), (1, 2, 3), 4)),
}


def theirs(rules: LabelRules, batch_dice: bool) -> Any:
    """The loss as nnUNetTrainer builds it on one device."""
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    common = {"batch_dice": batch_dice, "smooth": 1e-5, "ddp": False}
    if rules.has_regions:
        return DC_and_BCE_loss(
            {}, common | {"do_bg": True}, use_ignore_label=rules.ignore is not None, dice_class=MemoryEfficientSoftDiceLoss
        )
    return DC_and_CE_loss(
        common | {"do_bg": False}, {}, weight_ce=1, weight_dice=1, ignore_label=rules.ignore, dice_class=MemoryEfficientSoftDiceLoss
    )


def their_target(labels: torch.Tensor, rules: LabelRules) -> torch.Tensor:
    """Labels (b, *spatial) as their transforms hand them to the loss: one channel, or one per region and one for "ignore"."""
    if not rules.has_regions:
        return labels[:, None]
    from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

    regions: list[Any] = [list(target) if isinstance(target, tuple) else [target] for target in rules.targets]
    regions += [] if rules.ignore is None else [[rules.ignore]]
    convert = ConvertSegmentationToRegionsTransform(regions, channel_in_seg=0)
    return torch.stack([convert(segmentation=one[None])["segmentation"] for one in labels])


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", list(RULES))
def test_loss_gradient_and_counts(name: str, batch_dice: bool, fresh_seed: int) -> None:
    from nnunetv2.training.loss.dice import get_tp_fp_fn_tn

    values, rules = RULES[name]
    rng = np.random.default_rng(fresh_seed)
    for number in range(20):
        said = f"draw {number}"
        shape = tuple(int(size) for size in rng.integers(2, 9, int(rng.integers(2, 4))))
        batch = int(rng.integers(1, 4))
        logits = torch.from_numpy(rng.standard_normal((batch, rules.n_heads, *shape)).astype(np.float32) * float(rng.uniform(0.1, 20)))
        labels = torch.from_numpy(rng.integers(0, values, (batch, *shape)))
        if rng.random() < 0.2:
            # one sample whole of one value, the ignore label among them
            labels[0] = int(rng.integers(values))
        own, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        our_loss = LOSSES["dice_ce"](own, labels, Supervision(rules, batch_dice, nnunet=True))
        their_loss = theirs(rules, batch_dice)(other, their_target(labels, rules))
        assert float(our_loss.detach()) == pytest.approx(float(their_loss.detach()), rel=2e-5, abs=2e-6), said
        our_loss.backward()
        their_loss.backward()
        assert own.grad is not None
        assert other.grad is not None
        assert float((own.grad - other.grad).abs().max()) <= 1e-5 * max(1.0, float(other.grad.abs().max())), said
        # what their validation_step counts
        axes = [0, *range(2, logits.ndim)]
        target, mask = their_target(labels, rules), None
        if rules.has_regions:
            answer = (torch.sigmoid(logits) > 0.5).long()
            if rules.ignore is not None:
                mask, target = ~target[:, -1:].bool(), target[:, :-1]
        else:
            answer = torch.zeros_like(logits).scatter_(1, logits.argmax(1)[:, None], 1)
            if rules.ignore is not None:
                mask, target = target != rules.ignore, torch.where(target == rules.ignore, 0, target)
        tp, fp, fn, _ = get_tp_fp_fn_tn(answer, target, axes, None if mask is None else mask.float())
        first = 0 if rules.has_regions else 1
        wanted = torch.stack([tp, 2 * tp + fp + fn], dim=1)[first:]
        assert count_hits(logits, labels, rules).tolist() == wanted.tolist(), said


def test_deep_supervision(fresh_seed: int) -> None:
    """Weights and targets of every level: theirs are made by resampling the target to each output's size."""
    from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

    rng = np.random.default_rng(fresh_seed)
    for name, (values, rules) in RULES.items():
        labels = torch.from_numpy(rng.integers(0, values, (2, 6, 16, 24)))
        scales = ((1, 1, 1), (1, 0.5, 0.5), (0.5, 0.25, 0.25), (0.5, 0.125, 0.125))
        shapes = [tuple(round(size * factor) for size, factor in zip((6, 16, 24), scale, strict=True)) for scale in scales]
        outputs = [torch.from_numpy(rng.standard_normal((2, rules.n_heads, *shape)).astype(np.float32)) for shape in shapes]
        small = DownsampleSegForDSTransform(scales)
        whole = their_target(labels, rules)
        levels = [small(segmentation=one)["segmentation"] for one in whole]
        targets = [torch.stack([sample[level] for sample in levels]) for level in range(len(scales))]
        weights = level_weights(len(scales), 1)
        wanted = float(DeepSupervisionWrapper(theirs(rules, True), weights)(outputs, targets))
        found = float(supervised(LOSSES["dice_ce"], outputs, labels, Supervision(rules, True, nnunet=True), 1))
        assert found == pytest.approx(wanted, rel=2e-5), name
