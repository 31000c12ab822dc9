"""Losses against brute force, closed forms and torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ichbench.network.losses import LOSSES, cross_entropy, level_weights, shrink_target, soft_dice, supervised
from ichbench.recipe import TrainingRecipe

torch.set_num_threads(1)


def random_case(classes: int = 3, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, classes, 3, 4, 5, generator=generator)
    target = torch.randint(0, classes, (2, 3, 4, 5), generator=generator)
    if ignore is not None:
        target[:, 0] = ignore
    return logits, target


def brute_dice(logits: Tensor, target: Tensor, batch_dice: bool, ignore: int | None) -> float:
    probability = logits.softmax(1)
    groups = [(0, 1)] if batch_dice else [(0,), (1,)]
    terms = []
    for group in groups:
        for label in range(1, logits.shape[1]):
            overlap = reference = predicted = 0.0
            for sample in group:
                for z in range(3):
                    for y in range(4):
                        for x in range(5):
                            truth = int(target[sample, z, y, x])
                            if truth == ignore:
                                continue
                            p = float(probability[sample, label, z, y, x])
                            overlap += p * (truth == label)
                            reference += truth == label
                            predicted += p
            terms.append((2 * overlap + 1e-5) / (reference + predicted + 1e-5))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("classes", [2, 3])
def test_soft_dice_equals_brute_force(batch_dice: bool, ignore: int | None, classes: int) -> None:
    logits, target = random_case(classes, ignore)
    assert float(soft_dice(logits, target, batch_dice, ignore)) == pytest.approx(brute_dice(logits, target, batch_dice, ignore), abs=1e-6)


def test_soft_dice_closed_forms() -> None:
    """Uniform logits of two classes: p = 1/2, so with G foreground voxels of N it is G / (G + N/2); perfect is 1."""
    target = torch.zeros(1, 2, 4, 4, dtype=torch.long)
    target[0, 0] = 1
    assert float(soft_dice(torch.zeros(1, 2, 2, 4, 4), target, False)) == pytest.approx(16 / 32, abs=1e-6)
    sure = F.one_hot(target, 2).movedim(-1, 1) * 200.0
    assert float(soft_dice(sure, target, False)) == pytest.approx(1, abs=1e-6)
    empty = torch.zeros_like(target)
    assert float(soft_dice(F.one_hot(empty, 2).movedim(-1, 1) * 200.0, empty, False)) == pytest.approx(1)
    assert float(soft_dice(torch.zeros(1, 2, 2, 4, 4), empty, False)) < 1e-5


def test_batch_dice_pools_before_dividing() -> None:
    logits, target = torch.zeros(2, 2, 8), torch.zeros(2, 8, dtype=torch.long)
    target[0] = 1
    assert float(soft_dice(logits, target, True)) == pytest.approx(8 / 16, abs=1e-5)
    assert float(soft_dice(logits, target, False)) == pytest.approx((8 / 12 + 0) / 2, abs=1e-5)


def test_cross_entropy_closed_form_and_ignore() -> None:
    logits, target = random_case()
    assert float(cross_entropy(torch.zeros_like(logits), target)) == pytest.approx(math.log(3), rel=1e-6)
    ignored = target.clone()
    ignored[:, 0] = 3
    assert float(cross_entropy(logits, ignored, 3)) == pytest.approx(float(F.cross_entropy(logits[:, :, 1:], target[:, 1:])), rel=1e-6)
    nothing = cross_entropy(logits.requires_grad_(), torch.full_like(target, 3), 3)
    nothing.backward()  # type: ignore[no-untyped-call]
    assert float(nothing.detach()) == 0
    assert logits.grad is not None


def test_the_table_of_losses() -> None:
    logits, target = random_case()
    dice, ce, both = (float(LOSSES[name](logits, target, False, None)) for name in ("dice", "ce", "dice_ce"))
    assert both == pytest.approx(dice + ce)
    assert -1 <= dice <= 0 < ce
    assert set(LOSSES) == set(TrainingRecipe.model_fields["loss"].annotation.__args__)  # type: ignore[union-attr]


def test_level_weights_golden() -> None:
    """nnU-Net's own printed weights (facts, golden/misc.out); the paper leaves two levels out."""
    assert level_weights(5, 1) == pytest.approx((0.5333333333333333, 0.26666666666666666, 0.13333333333333333, 0.06666666666666667, 0))
    assert level_weights(3, 1) == pytest.approx((2 / 3, 1 / 3, 0))
    assert level_weights(5, 2) == pytest.approx((4 / 7, 2 / 7, 1 / 7, 0, 0))
    assert level_weights(2, 5) == (1.0, 0.0)
    assert level_weights(1, 1) == (1.0,)


@pytest.mark.parametrize("shape", [(4, 6, 5), (2, 3, 5), (4, 2, 2), (1, 1, 1)])
def test_targets_shrink_like_nearest_exact(shape: tuple[int, ...]) -> None:
    target = torch.randint(0, 9, (2, 4, 6, 5), generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(target[:, None].double(), shape, mode="nearest-exact")[:, 0].long()
    assert torch.equal(shrink_target(target, shape), wanted)


def test_deep_supervision_is_the_weighted_sum_and_skips_the_lowest() -> None:
    logits, target = random_case()
    middle = torch.randn(2, 3, 3, 2, 5, requires_grad=True)
    lowest = torch.full((2, 3, 1, 1, 1), torch.nan, requires_grad=True)
    loss = LOSSES["dice_ce"]
    wanted = 2 / 3 * loss(logits, target, True, None) + 1 / 3 * loss(middle, shrink_target(target, (3, 2, 5)), True, None)
    assert float(supervised(loss, [logits, middle, lowest], target, True, 1).detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(supervised(loss, logits, target, True, 1)) == float(loss(logits, target, True, None))


def test_gradient_check() -> None:
    target = torch.randint(0, 3, (2, 3, 2), generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    loss = LOSSES["dice_ce"]
    (gradient,) = torch.autograd.grad(loss(x, target, False, None), x)
    step = torch.zeros_like(x)
    step[1, 2, 1, 0] = 1e-2
    slope = (loss((x + step).detach(), target, False, None) - loss((x - step).detach(), target, False, None)) / 2e-2
    assert float(gradient[1, 2, 1, 0]) == pytest.approx(float(slope), abs=1e-4)
