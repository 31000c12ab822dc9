"""Losses against brute force, closed forms and torch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.network.losses import LOSSES, Supervision, cross_entropy, level_weights, shrink_target, soft_dice, supervised
from ichbench.recipe import TrainingRecipe

torch.set_num_threads(1)


def plain(classes: int, batch_dice: bool = False, ignore: int | None = None) -> Supervision:
    return Supervision(plain_rules(classes, ignore), batch_dice)


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
    wanted = brute_dice(logits, target, batch_dice, ignore)
    assert float(soft_dice(logits, target, plain(classes, batch_dice, ignore))) == pytest.approx(wanted, abs=1e-6)


def test_soft_dice_closed_forms() -> None:
    """Uniform logits of two classes: p = 1/2, so with G foreground voxels of N it is G / (G + N/2); perfect is 1."""
    target = torch.zeros(1, 2, 4, 4, dtype=torch.long)
    target[0, 0] = 1
    assert float(soft_dice(torch.zeros(1, 2, 2, 4, 4), target, plain(2))) == pytest.approx(16 / 32, abs=1e-6)
    sure = F.one_hot(target, 2).movedim(-1, 1) * 200.0
    assert float(soft_dice(sure, target, plain(2))) == pytest.approx(1, abs=1e-6)
    empty = torch.zeros_like(target)
    assert float(soft_dice(F.one_hot(empty, 2).movedim(-1, 1) * 200.0, empty, plain(2))) == pytest.approx(1)
    assert float(soft_dice(torch.zeros(1, 2, 2, 4, 4), empty, plain(2))) < 1e-5


def test_batch_dice_pools_before_dividing() -> None:
    logits, target = torch.zeros(2, 2, 8), torch.zeros(2, 8, dtype=torch.long)
    target[0] = 1
    assert float(soft_dice(logits, target, plain(2, True))) == pytest.approx(8 / 16, abs=1e-5)
    assert float(soft_dice(logits, target, plain(2))) == pytest.approx((8 / 12 + 0) / 2, abs=1e-5)


def test_cross_entropy_closed_form_and_ignore() -> None:
    logits, target = random_case()
    assert float(cross_entropy(torch.zeros_like(logits), target, plain(3))) == pytest.approx(math.log(3), rel=1e-6)
    ignored = target.clone()
    ignored[:, 0] = 3
    wanted = float(F.cross_entropy(logits[:, :, 1:], target[:, 1:]))
    assert float(cross_entropy(logits, ignored, plain(3, ignore=3))) == pytest.approx(wanted, rel=1e-6)
    nothing = cross_entropy(logits.requires_grad_(), torch.full_like(target, 3), plain(3, ignore=3))
    nothing.backward()  # type: ignore[no-untyped-call]
    assert float(nothing.detach()) == 0
    assert logits.grad is not None


def test_the_table_of_losses() -> None:
    logits, target = random_case()
    dice, ce, both = (float(LOSSES[name](logits, target, plain(3))) for name in ("dice", "ce", "dice_ce"))
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
    how = plain(3, True)
    wanted = 2 / 3 * loss(logits, target, how) + 1 / 3 * loss(middle, shrink_target(target, (3, 2, 5)), how)
    assert float(supervised(loss, [logits, middle, lowest], target, how, 1).detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(supervised(loss, logits, target, plain(3, True), 1)) == float(loss(logits, target, plain(3, True)))


def test_gradient_check() -> None:
    target = torch.randint(0, 3, (2, 3, 2), generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    loss = LOSSES["dice_ce"]
    (gradient,) = torch.autograd.grad(loss(x, target, plain(3)), x)
    step = torch.zeros_like(x)
    step[1, 2, 1, 0] = 1e-2
    slope = (loss((x + step).detach(), target, plain(3)) - loss((x - step).detach(), target, plain(3))) / 2e-2
    assert float(gradient[1, 2, 1, 0]) == pytest.approx(float(slope), abs=1e-4)


REGIONS = LabelRules(("whole", "core", "two"), ((1, 2, 3), (3,), 2), (1, 3, 2))
REGIONS_IGNORE = LabelRules(REGIONS.names, REGIONS.targets, REGIONS.regions_class_order, 4)


def region_case(ignore: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 3, 4, 5, generator=generator), torch.randint(0, 5 if ignore else 4, (2, 3, 4, 5), generator=generator)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_regions_are_heads_of_their_own(batch_dice: bool, ignore: bool) -> None:
    """Against loops over regions, samples and voxels: sigmoid Dice over every head, binary cross-entropy, ignored voxels nowhere."""
    logits, labels = region_case(ignore)
    how = Supervision(REGIONS_IGNORE if ignore else REGIONS, batch_dice)
    parts, entropy, counted = [], 0.0, 0
    for group in [(0, 1)] if batch_dice else [(0,), (1,)]:
        for head, members in enumerate(((1, 2, 3), (3,), (2,))):
            overlap = reference = predicted = 0.0
            for sample in group:
                for label, logit in zip(labels[sample].flatten().tolist(), logits[sample, head].flatten().tolist(), strict=True):
                    if ignore and label == 4:
                        continue
                    p, truth = 1 / (1 + math.exp(-logit)), label in members
                    overlap += p * truth
                    reference += truth
                    predicted += p
                    entropy -= math.log(p if truth else 1 - p)
                    counted += 1
            parts.append((2 * overlap + 1e-5) / (reference + predicted + 1e-5))
    assert float(soft_dice(logits, labels, how)) == pytest.approx(sum(parts) / len(parts), abs=1e-6)
    assert float(cross_entropy(logits, labels, how)) == pytest.approx(entropy / counted, rel=1e-5)


def test_an_ignore_label_nobody_uses_changes_nothing_and_nnunets_sum_is_one_factor() -> None:
    logits, labels = region_case(False)
    for loss in ("dice_ce", "dice", "ce"):
        with_ignore = LOSSES[loss](logits, labels, Supervision(REGIONS_IGNORE))
        assert float(with_ignore) == pytest.approx(float(LOSSES[loss](logits, labels, Supervision(REGIONS))), rel=1e-6)
    summed = cross_entropy(logits, labels, Supervision(REGIONS_IGNORE, nnunet=True))
    assert float(summed) == pytest.approx(3 * float(cross_entropy(logits, labels, Supervision(REGIONS))), rel=1e-6)
    target = labels.clamp(max=2)
    plain_logits = logits.clone()
    for loss in LOSSES:
        found = [float(LOSSES[loss](plain_logits, target, Supervision(plain_rules(3, ignore)))) for ignore in (None, 3)]
        assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("rules", [REGIONS_IGNORE, plain_rules(3, 3)])
def test_ignored_voxels_have_no_gradient(rules: LabelRules) -> None:
    logits, labels = region_case(True)
    labels = labels.clamp(max=rules.ignore)
    for name, loss in LOSSES.items():
        if rules.has_regions and "topk" in name:
            continue
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, labels, Supervision(rules, True)), x)
        ignored = (labels == rules.ignore)[:, None].expand_as(gradient)
        assert bool(ignored.any())
        assert float(gradient[ignored].abs().max()) == 0
        assert float(gradient[~ignored].abs().max()) > 0


def test_everything_ignored_is_nothing_to_learn() -> None:
    logits, labels = region_case(True)
    for rules in (REGIONS_IGNORE, plain_rules(3, 4)):
        value = cross_entropy(logits.clone().requires_grad_(), torch.full_like(labels, 4), Supervision(rules))
        value.backward()  # type: ignore[no-untyped-call]
        assert float(value.detach()) == 0


def test_class_weights_are_torchs_weighted_mean() -> None:
    logits, target = random_case()
    weights = (0.2, 1.0, 3.0)
    how = Supervision(plain_rules(3), class_weights=weights)
    log_p = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    factor = torch.tensor(weights)[target]
    assert float(cross_entropy(logits, target, how)) == pytest.approx(float(-(log_p * factor).sum() / factor.sum()), rel=1e-6)
    region_logits, labels = region_case(False)
    alone = [
        float(cross_entropy(region_logits[:, head : head + 1], labels, Supervision(LabelRules(("one",), (target,), (1,)))))
        for head, target in enumerate(REGIONS.targets)
    ]
    weighted = cross_entropy(region_logits, labels, Supervision(REGIONS, class_weights=weights))
    assert float(weighted) == pytest.approx(sum(w * value for w, value in zip(weights, alone, strict=True)) / 3, rel=1e-6)


def test_the_weights_of_the_two_terms() -> None:
    logits, target = random_case()
    how = Supervision(plain_rules(3), dice_weight=0.25, ce_weight=3.0)
    wanted = 3 * float(cross_entropy(logits, target, how)) - 0.25 * float(soft_dice(logits, target, how))
    assert float(LOSSES["dice_ce"](logits, target, how)) == pytest.approx(wanted, rel=1e-6)


def test_top_cross_entropy_is_the_mean_of_the_hardest_tenth() -> None:
    logits, target = random_case()
    each = sorted(F.cross_entropy(logits, target, reduction="none").flatten().tolist(), reverse=True)
    assert float(LOSSES["topk"](logits, target, plain(3))) == pytest.approx(sum(each[:12]) / 12, rel=1e-6)
    both = float(LOSSES["dice_topk"](logits, target, plain(3)))
    assert both == pytest.approx(sum(each[:12]) / 12 - float(soft_dice(logits, target, plain(3))), rel=1e-6)


def test_pooled_sums_make_two_processes_one() -> None:
    """With batch_dice the sums of all processes are added before the division: two halves give the Dice of the whole batch."""
    logits, target = random_case()
    whole = float(soft_dice(logits, target, plain(3, True)))
    sums: list[Tensor] = []

    def remember(own: Tensor) -> Tensor:
        sums.append(own)
        return own

    for half in (slice(0, 1), slice(1, 2)):
        soft_dice(logits[half], target[half], Supervision(plain_rules(3), True, pooled=remember))
    for own, other in ((0, 1), (1, 0)):
        how = Supervision(plain_rules(3), True, pooled=partial(torch.add, sums[other]))
        assert float(soft_dice(logits[own : own + 1], target[own : own + 1], how)) == pytest.approx(whole, rel=1e-6)
