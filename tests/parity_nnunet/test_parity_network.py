"""Both networks against nnU-Net's own classes: the same weights and input give the same logits, at every level, fp32, 1e-4."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ichbench.network.nnunet_weights import weights_from_nnunet, weights_to_nnunet
from ichbench.network.unet import make_unet
from ichbench.recipe import NetworkRecipe

pytest.importorskip("nnunetv2")

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Plan:
    family: str
    dims: int
    in_channels: int
    n_classes: int
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    convs_per_stage: tuple[int, ...]
    decoder_convs: tuple[int, ...]


def random_plan(rng: np.random.Generator, family: str, dims: int) -> Plan:
    """Kernels of 1 and 3, strides of 1 and 2 (also a whole stage without), widths that grow, stay or saturate."""
    stages = int(rng.integers(2, 6 if dims == 3 else 7))
    features = np.minimum(int(rng.integers(2, 9)) * 2 ** np.arange(stages), int(rng.integers(8, 41)))
    strides = [(1,) * dims, *(tuple(int(n) for n in rng.integers(1, 3, dims)) for _ in range(stages - 1))]
    kernels = [tuple(int(n) for n in rng.choice([1, 3], dims)) for _ in range(stages)]
    most = 4 if family == "plain" else 3
    down = tuple(int(n) for n in rng.integers(1, most, stages))
    up = tuple(int(n) for n in rng.integers(1, 4, stages - 1))
    channels, classes = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    return Plan(family, dims, channels, classes, tuple(int(n) for n in features), tuple(strides), tuple(kernels), down, up)


def patch(plan: Plan, bottom: int) -> list[int]:
    """The patch whose coarsest feature map has `bottom` voxels along every axis (nnU-Net's have at least 4)."""
    return [bottom * math.prod(stride[axis] for stride in plan.strides) for axis in range(plan.dims)]


def theirs(plan: Plan, deep_supervision: bool) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    shared: dict[str, Any] = {
        "input_channels": plan.in_channels,
        "n_stages": len(plan.features),
        "features_per_stage": plan.features,
        "conv_op": {2: nn.Conv2d, 3: nn.Conv3d}[plan.dims],
        "kernel_sizes": plan.kernels,
        "strides": plan.strides,
        "num_classes": plan.n_classes,
        "n_conv_per_stage_decoder": plan.decoder_convs,
        "conv_bias": True,
        "norm_op": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[plan.dims],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": deep_supervision,
    }
    if plan.family == "plain":
        return PlainConvUNet(n_conv_per_stage=plan.convs_per_stage, **shared)
    return ResidualEncoderUNet(n_blocks_per_stage=plan.convs_per_stage, **shared)


def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """He weights as at the start of a training; norms and biases are drawn too, or residual blocks would say nothing."""
    done = set()
    for name, value in network.named_parameters():
        if value.data_ptr() in done:
            continue
        done.add(value.data_ptr())
        with torch.no_grad():
            if value.ndim > 1:
                nn.init.kaiming_normal_(value, a=0.01, generator=generator)
            elif name.endswith("weight"):
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                value.normal_(0, 0.2, generator=generator)


def largest_difference(ours: Any, reference: Any) -> float:
    if isinstance(reference, torch.Tensor):
        ours, reference = [ours], [reference]
    assert [tuple(level.shape) for level in ours] == [tuple(level.shape) for level in reference]
    return max(float((a - b).abs().max()) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("family", ["plain", "residual"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("draw", range(6))
def test_logits_on_random_topologies(fresh_seed: int, family: str, dims: int, draw: int) -> None:
    rng = np.random.default_rng([fresh_seed, draw, dims, family == "plain"])
    plan = random_plan(rng, family, dims)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    reference = theirs(plan, deep_supervision=True)
    draw_weights(reference, generator)
    ours = make_unet(plan, NetworkRecipe())
    ours.load_state_dict(weights_from_nnunet(reference.state_dict(), ours, plan, "reference"))
    x = torch.randn(2, plan.in_channels, *patch(plan, 4 if dims == 2 else 3), generator=generator)
    with torch.no_grad():
        expected = reference(x)
        # now and then a drawn network amplifies rounding: then nnU-Net's own fp32 lies this far from its float64
        rounding = largest_difference([level.double() for level in expected], copy.deepcopy(reference).double()(x.double()))
        tolerance = max(TOLERANCE, 3 * rounding)
        assert largest_difference(ours.train()(x), expected) <= tolerance, plan
        single = theirs(plan, deep_supervision=False)
        # the way back: nnU-Net loads what we write, strictly
        single.load_state_dict(weights_to_nnunet(ours, plan))
        assert largest_difference(ours.eval()(x), single.eval()(x)) <= tolerance, plan
        without = make_unet(plan, NetworkRecipe(deep_supervision=False))
        without.load_state_dict(ours.state_dict())
        assert largest_difference(without.train()(x), single(x)) <= tolerance, plan


@pytest.mark.parametrize("family", ["plain", "residual"])
@pytest.mark.parametrize("dims", [2, 3])
def test_smallest_patches_in_float64(fresh_seed: int, family: str, dims: int) -> None:
    """Two voxels an axis at the bottom: a norm over so few amplifies rounding, in either implementation, to 1e-3 in fp32."""
    rng = np.random.default_rng([fresh_seed, 55, dims, family == "plain"])
    plan = random_plan(rng, family, dims)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    reference = theirs(plan, deep_supervision=True)
    draw_weights(reference, generator)
    ours = make_unet(plan, NetworkRecipe()).train()
    ours.load_state_dict(weights_from_nnunet(reference.state_dict(), ours, plan, "reference"))
    x = torch.randn(2, plan.in_channels, *patch(plan, 2), generator=generator).double()
    with torch.no_grad():
        assert largest_difference(ours.double()(x), reference.double()(x)) <= 1e-9, plan


@pytest.mark.parametrize("family", ["plain", "residual"])
def test_gradients(fresh_seed: int, family: str) -> None:
    """Training moves the same way: gradients of all levels, relative to the largest of each tensor."""
    rng = np.random.default_rng([fresh_seed, 99, family == "plain"])
    plan = random_plan(rng, family, 3)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    reference = theirs(plan, deep_supervision=True)
    draw_weights(reference, generator)
    ours = make_unet(plan, NetworkRecipe()).train()
    ours.load_state_dict(weights_from_nnunet(reference.state_dict(), ours, plan, "reference"))
    x = torch.randn(2, plan.in_channels, *patch(plan, 3), generator=generator)
    for network in (ours, reference):
        sum(level.square().mean() for level in network(x)).backward()
    for value in reference.parameters():
        value.data = value.grad if value.grad is not None else torch.zeros_like(value)
    wanted = weights_from_nnunet(reference.state_dict(), ours, plan, "gradients")
    for name, value in ours.named_parameters():
        assert value.grad is not None, name
        # a bias before a norm has no effect: its gradient is rounding alone
        scale = max(float(wanted[name].abs().max()), 1e-2)
        assert float((value.grad - wanted[name]).abs().max()) <= 1e-3 * scale, (plan, name)


@pytest.mark.parametrize("family", ["plain", "residual"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_law_of_the_first_weights(family: str, dims: int) -> None:
    """Drawn from other generators, so equal in law: per tensor the same constant, or the same spread."""
    down = (2, 2, 2) if family == "plain" else (1, 3, 2)
    plan = Plan(family, dims, 4, 3, (16, 32, 32), ((1,) * dims, *[(2,) * dims] * 2), ((3,) * dims,) * 3, down, (2, 1))
    reference = theirs(plan, deep_supervision=True)
    reference.apply(type(reference).initialize)
    ours = make_unet(plan, NetworkRecipe(), seed=1)
    wanted = weights_from_nnunet(reference.state_dict(), ours, plan, "reference")
    for name, value in ours.state_dict().items():
        if float(wanted[name].std(correction=0)) == 0:
            assert torch.equal(value, wanted[name]), name
        elif value.numel() >= 500:
            assert float(value.std()) == pytest.approx(float(wanted[name].std()), rel=6 / math.sqrt(2 * value.numel())), name
