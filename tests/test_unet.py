"""The U-Net against nnU-Net's published size, torch's own layers, and its shape laws."""

from __future__ import annotations

from dataclasses import dataclass

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


def isotropic(dims: int, features: tuple[int, ...], classes: int = 2, channels: int = 1) -> Plan:
    one, two, three = (1,) * dims, (2,) * dims, (3,) * dims
    stages = len(features)
    return Plan(dims, channels, classes, features, (one, *[two] * (stages - 1)), (three,) * stages)


THIN = Plan(3, 2, 3, (4, 8, 16), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3)))


def test_has_exactly_nnunets_parameters() -> None:
    """31,195,594 for 6 stages, 32 to 320 features, one channel, two classes (facts section 7)."""
    with torch.device("meta"):
        network = UNet(isotropic(3, (32, 64, 128, 256, 320, 320)), NetworkRecipe())
    assert sum(p.numel() for p in network.parameters()) == 31_195_594


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


def test_convs_per_stage() -> None:
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


def test_a_plan_of_one_stage_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2"):
        make_unet(Plan(2, 1, 2, (8,), ((1, 1),), ((3, 3),)), NetworkRecipe())


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


def test_norm_falls_back_to_torch_in_other_precisions() -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer = NormAct(4, 0.2).double()
    torch.testing.assert_close(layer(x), F.leaky_relu(F.instance_norm(x), 0.2))
