"""The U-Nets against nnU-Net's published sizes, torch's own layers, and their shape laws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ichbench.errors import InputError
from ichbench.network.norm import NormAct
from ichbench.network.unet import UNet, make_unet
from ichbench.recipe import NetworkRecipe

torch.set_num_threads(1)


@dataclass(frozen=True)
class Plan:
    dims: int
    in_channels: int
    n_classes: int
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    family: str = "plain"
    convs_per_stage: tuple[int, ...] = ()
    decoder_convs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.convs_per_stage:
            object.__setattr__(self, "convs_per_stage", (2,) * len(self.features))
            object.__setattr__(self, "decoder_convs", (2,) * (len(self.features) - 1))


def residual(plan: Plan) -> Plan:
    """nnU-Net's residual encoder: 1, 3, 4, 6, 6, ... blocks down and one convolution block a level up."""
    stages = len(plan.features)
    return replace(plan, family="residual", convs_per_stage=(1, 3, 4, *[6] * 6)[:stages], decoder_convs=(1,) * (stages - 1))


def isotropic(dims: int, features: tuple[int, ...], classes: int = 2, channels: int = 1) -> Plan:
    one, two, three = (1,) * dims, (2,) * dims, (3,) * dims
    stages = len(features)
    return Plan(dims, channels, classes, features, (one, *[two] * (stages - 1)), (three,) * stages)


THIN = Plan(3, 2, 3, (4, 8, 16), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3)))


SIX, EIGHT = (32, 64, 128, 256, 320, 320), (32, 64, 128, 256, 512, 512, 512, 512)


@pytest.mark.parametrize(
    ("plan", "parameters"),
    [(isotropic(3, SIX), 31_195_594), (residual(isotropic(3, SIX)), 102_349_770), (residual(isotropic(2, EIGHT)), 140_000_000)],
)
def test_has_exactly_nnunets_parameters(plan: Plan, parameters: int) -> None:
    """6 stages in 3D and 8 in 2D, one channel, two classes (facts section 7, the last one given there as 140.0M)."""
    with torch.device("meta"):
        network = UNet(plan, NetworkRecipe())
    found = sum(p.numel() for p in network.parameters())
    assert found == parameters if parameters % 1000 else found == pytest.approx(parameters, abs=5e4)


def test_names_are_unique_and_few() -> None:
    """The 3-stage example of facts section 7 has 48 tensors once its aliases are dropped."""
    plan = Plan(3, 1, 3, (4, 8, 16), THIN.strides, THIN.kernels)
    state = make_unet(plan, NetworkRecipe()).state_dict()
    assert len(state) == 48
    assert len({value.data_ptr() for value in state.values()}) == 48
    assert tuple(state["encoder.0.0.conv.weight"].shape) == (4, 1, 1, 3, 3)
    assert tuple(state["decoder.1.0.conv.weight"].shape) == (8, 16, 3, 3, 3)
    assert tuple(state["up.0.weight"].shape) == (8, 4, 1, 2, 2)
    assert tuple(state["heads.0.weight"].shape) == (3, 4, 1, 1, 1)


@pytest.mark.parametrize(
    ("plan", "shape", "lower"),
    [(THIN, (2, 8, 8), (2, 4, 4)), (isotropic(2, (4, 8, 8), classes=3, channels=2), (16, 8), (8, 4))],
)
def test_deep_supervision_gives_a_list_while_training(plan: Plan, shape: tuple[int, ...], lower: tuple[int, ...]) -> None:
    network = make_unet(plan, NetworkRecipe())
    x = torch.randn(2, 2, *shape)
    levels = network.train()(x)
    assert [tuple(level.shape) for level in levels] == [(2, 3, *shape), (2, 3, *lower)]
    top = network.eval()(x)
    assert isinstance(top, Tensor)
    torch.testing.assert_close(top, levels[0])


def test_without_deep_supervision_always_a_tensor() -> None:
    assert isinstance(make_unet(THIN, NetworkRecipe(deep_supervision=False)).train()(torch.randn(1, 2, 2, 8, 8)), Tensor)


def test_convs_per_stage_of_the_plan_unless_the_recipe_says_otherwise() -> None:
    network = make_unet(replace(THIN, convs_per_stage=(1, 3, 2), decoder_convs=(4, 1)), NetworkRecipe())
    assert [len(stage) for stage in network.encoder] == [1, 3, 2]
    assert [len(stage) for stage in network.decoder] == [1, 4]  # the plan lists the deepest level first
    network = make_unet(THIN, NetworkRecipe(convs_per_stage=3))
    assert [len(stage) for stage in network.encoder] == [3, 3, 3]
    assert [len(stage) for stage in network.decoder] == [3, 3]


def test_initialisation_is_he_normal_and_depends_on_the_seed_alone() -> None:
    plan = isotropic(2, (32, 64))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (make_unet(plan, NetworkRecipe(), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.0.0.conv.weight"], other["encoder.0.0.conv.weight"])
    weight = one["encoder.1.1.conv.weight"]
    assert float(weight.std()) == pytest.approx((2 / (1 + 0.01**2) / (64 * 9)) ** 0.5, rel=0.02)
    assert all(not value.any() for name, value in one.items() if name.endswith("bias"))
    assert all((value == 1).all() for name, value in one.items() if name.endswith("norm.weight"))


def test_a_residual_block_starts_as_its_input() -> None:
    """The last norm of a block is 0, so an untrained stage without stride or new channels is leaky ReLU of leaky ReLU ..."""
    network = make_unet(residual(isotropic(2, (4, 4))), NetworkRecipe())
    block = network.encoder[0][0]
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(x), F.leaky_relu(x, 0.01))
    averaged = F.leaky_relu(F.avg_pool2d(x, 2), 0.01)
    torch.testing.assert_close(network.encoder[1][0](x), averaged)
    assert all(not value.any() for name, value in network.state_dict().items() if "conv2.norm" in name)
    assert not any("project" in name for name in network.state_dict())


def test_a_residual_skip_projects_without_bias_where_channels_change() -> None:
    state = make_unet(residual(THIN), NetworkRecipe()).state_dict()
    assert tuple(state["stem.conv.weight"].shape) == (4, 2, 1, 3, 3)
    assert tuple(state["encoder.1.0.project.conv.weight"].shape) == (8, 4, 1, 1, 1)
    assert "encoder.1.0.project.conv.bias" not in state
    assert "encoder.1.1.project.conv.weight" not in state
    assert tuple(state["decoder.0.0.conv.weight"].shape) == (4, 8, 1, 3, 3)
    assert "decoder.0.1.conv.weight" not in state


@pytest.mark.parametrize("dims", [2, 3])
def test_a_residual_network_trains(dims: int) -> None:
    """Every parameter gets a gradient, also through the norms that start at 0."""
    network = make_unet(residual(isotropic(dims, (4, 8, 8))), NetworkRecipe(), seed=4).train()
    x = torch.randn(2, 1, *(8,) * dims)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(level.square().mean() for level in network(x)).backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    assert all(bool(p.grad.any()) for name, p in network.named_parameters() if "norm" in name and p.grad is not None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": (8,), "strides": ((1, 1),), "kernels": ((3, 3),), "convs_per_stage": (2,), "decoder_convs": ()}, "at least 2"),
        ({"family": "swin"}, "allowed are plain, residual"),
        ({"decoder_convs": (2, 2)}, "decoder: one less"),
        ({"kernels": ((3, 3), (2, 3))}, "only odd sizes"),
        ({"strides": ((1, 1), (2, -1))}, "must be 1 or more"),
        ({"strides": ((1, 2), (2, 2))}, r"first stage has the stride \(1, 2\)"),
        ({"features": (8, 10**9)}, "no network is that large"),
    ],
)
def test_a_plan_that_makes_no_network_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_unet(replace(isotropic(2, (4, 8)), **changes), NetworkRecipe())


@pytest.mark.parametrize("shape", [(2, 5, 3, 4, 5), (1, 16, 8, 8, 8), (3, 300, 2, 3), (2, 4, 7, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_equals_torchs_own(shape: tuple[int, ...], channels_last: bool) -> None:
    """Forward and every gradient against instance_norm + leaky_relu in float64."""
    torch.manual_seed(0)
    layer = NormAct(shape[1], 0.01)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = 3 + 2 * torch.randn(shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    x.requires_grad_()
    upstream = torch.randn(shape)
    ours = layer(x)
    gradients = torch.autograd.grad(ours, [x, layer.weight, layer.bias], upstream)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    theirs = F.leaky_relu(F.instance_norm(exact[0], weight=exact[1], bias=exact[2], eps=1e-5), 0.01)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, torch.autograd.grad(theirs, exact, upstream.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_with_slope_1_has_no_activation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = NormAct(3, 1.0).to(dtype)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 3, 4, 5, dtype=dtype)
    before = upstream.clone()
    ours, theirs = layer(x), F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for got, want in zip(*(torch.autograd.grad(y, [x, layer.weight], upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(upstream, before)


def test_norm_falls_back_to_torch_in_other_precisions() -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer = NormAct(4, 0.2).double()
    torch.testing.assert_close(layer(x), F.leaky_relu(F.instance_norm(x), 0.2))


def test_batch_norm_is_torchs() -> None:
    from ichbench.network.norm import BatchNormAct, averages_kept

    own, theirs = BatchNormAct(3, 0.01), torch.nn.BatchNorm3d(3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(2, 3, 4, 5, 6, generator=generator) * 3 + 1
        torch.testing.assert_close(own(x), torch.nn.functional.leaky_relu(theirs(x), 0.01))
    assert theirs.running_mean is not None
    assert theirs.running_var is not None
    before = own.mean.clone()
    with averages_kept(own):
        own(x)
        assert not own.training
    assert own.training
    torch.testing.assert_close(own.mean, before, rtol=0, atol=0)
    torch.testing.assert_close(own.mean, theirs.running_mean)
    torch.testing.assert_close(own.variance, theirs.running_var)
    own.eval()
    theirs.eval()
    torch.testing.assert_close(own(x), torch.nn.functional.leaky_relu(theirs(x), 0.01))
