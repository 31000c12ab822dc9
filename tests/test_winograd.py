"""Winograd's convolution and the fast U-Net against torch's own in float64: the same function, rounding apart."""

from __future__ import annotations

import math
from typing import Any

import norms
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unet import Plan, isotropic, residual
from torch import Tensor, nn

from ichbench.inference.sliding import predict_logits
from ichbench.network import winograd
from ichbench.network.fast import FastNormAct, NativeConv, ProductConv, fast_network
from ichbench.network.native import find_compilers
from ichbench.network.norm import NormAct
from ichbench.network.unet import UNet, make_unet
from ichbench.network.winograd import WinogradConv, convolve, is_plain, point_weights, transformed_axes
from ichbench.recipe import InferenceRecipe, NetworkRecipe

torch.set_num_threads(1)

WAYS = [((3, 3, 3), (0, 1)), ((3, 3, 3), (0, 1, 2)), ((1, 3, 3), (1,)), ((1, 3, 3), (1, 2))]


needs_compiler = pytest.mark.skipif(not find_compilers(), reason="there is no C++ compiler")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd even where it does not pay, so that small networks prove it."""
    monkeypatch.setattr(winograd, "WORTH_IT", 1e9)


def convolved(x: Tensor, weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`convolve` with torch's order of axes."""
    kernel = tuple(weight.shape[2:])
    return convolve(x.movedim(1, -1).contiguous(), point_weights(weight, axes), kernel, axes).movedim(-1, 1)


@given(
    way=st.sampled_from(WAYS),
    shape=st.tuples(st.integers(1, 3), *[st.integers(1, 14)] * 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rows=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_the_same_function_in_float64(way: Any, shape: Any, channels: Any, rows: int, seed: int) -> None:
    (kernel, axes), (samples, *spatial) = way, shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels[0], *spatial, dtype=torch.float64, generator=generator)
    weight = torch.randn(channels[1], channels[0], *kernel, dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "ROWS_AT_ONCE", rows)
        found = convolved(x, weight, axes)
    expected = F.conv3d(x, weight, padding=tuple(size // 2 for size in kernel))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max() + 1))


@pytest.mark.parametrize(("kernel", "axes"), WAYS)
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1000.0), (0.0, 1e-6)])
def test_errors_stay_small_beside_what_is_summed(kernel: Any, axes: Any, mean: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(11)
    x = mean + spread * torch.randn(1, 48, 6, 17, 20, generator=generator)
    # one hot voxel in every tile or so
    x[..., ::5, ::5] += 100 * spread
    weight = torch.randn(24, 48, *kernel, generator=generator) / math.sqrt(48 * math.prod(kernel))
    padding = tuple(size // 2 for size in kernel)
    exact = F.conv3d(x.double(), weight.double(), padding=padding)
    summed = F.conv3d(x.double().abs(), weight.double().abs(), padding=padding)
    worst = float(((convolved(x, weight, axes) - exact).abs().max()) / summed.max())
    # single precision rounds at 6e-8
    assert worst < 1e-6


def test_as_exact_as_the_direct_one() -> None:
    """Of one wide layer: the textbook's points 1 and 2 would be ten times worse along three axes."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 128, 8, 16, 16, generator=generator)
    weight = torch.randn(64, 128, 3, 3, 3, generator=generator) / math.sqrt(128 * 27)
    exact = F.conv3d(x.double(), weight.double(), padding=1)
    spread = float(exact.std())
    for axes in ((0, 1), (0, 1, 2)):
        error = (convolved(x, weight, axes) - exact) / spread
        assert float(error.abs().max()) < 1e-4
        assert float(error.square().mean().sqrt()) < 1e-5


def test_which_axes() -> None:
    assert transformed_axes((16, 32, 32), (3, 3, 3), 128, 128) == (0, 1, 2)
    assert transformed_axes((4, 8, 8), (3, 3, 3), 320, 320) == (0, 1)
    assert transformed_axes((16, 64, 64), (1, 3, 3), 128, 64) == (1, 2)
    # few channels: the additions cost more than the multiplications saved; one slice: a tile of four would be three quarters empty
    assert transformed_axes((16, 128, 128), (1, 3, 3), 8, 8) == ()
    assert transformed_axes((1, 4, 4), (3, 3, 3), 320, 320) == ()
    assert transformed_axes((16, 64, 64), (3, 1, 1), 128, 128) == ()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(2, 2, 3, stride=2, padding=1),
        nn.Conv3d(2, 2, 5, padding=2),
        nn.Conv3d(2, 2, 3),
        nn.Conv3d(2, 2, 3, padding=1, groups=2),
        nn.Conv3d(2, 2, 3, padding=2, dilation=2),
        nn.ConvTranspose3d(2, 2, 3, padding=1),
    ],
)
def test_other_convolutions_are_left_alone(conv: nn.Module) -> None:
    assert not is_plain(conv)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3, 3), (3, 3, 3), (3, 1, 1), (1, 1, 3), (1, 1)])
@pytest.mark.parametrize("samples", [1, 3])
def test_modules_stand_in_for_convolutions(kernel: tuple[int, ...], samples: int, always: None) -> None:
    torch.manual_seed(3)
    kind: Any = nn.Conv3d if len(kernel) == 3 else nn.Conv2d
    conv = kind(4, 6, kernel, padding=tuple(size // 2 for size in kernel))
    assert is_plain(conv)
    x = torch.randn(samples, 4, *(5, 9, 11)[3 - len(kernel) :])
    with torch.inference_mode():
        expected = conv(x)
        torch.testing.assert_close(ProductConv(conv)(x), expected, rtol=1e-5, atol=1e-5)
        fast = WinogradConv(conv)
        found = fast(x)
        if fast.frozen:
            found = found + conv.bias.view(-1, *[1] * len(kernel))
        assert bool(fast.frozen) == (tuple(kernel[-2:]) == (3, 3))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 32, 4, 20, 24), (2, 5, 3, 7, 11), (3, 320, 1, 2, 2), (2, 8, 33, 35), (1, 3, 1, 1, 2)])
@pytest.mark.parametrize("slope", [0.01, 1.0])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1000.0, 1.0), (-3e4, 100.0), (0.0, 1e-4)])
def test_norm_in_blocks(shape: tuple[int, ...], slope: float, mean: float, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ichbench.network.fast.BLOCK", 0)
    monkeypatch.setattr("ichbench.network.fast.ROW", 64)
    norm, x, exact = norms.drawn(shape, slope, mean, spread)
    with torch.inference_mode():
        found = FastNormAct(norm)(x)
    norms.assert_close(found, exact, atol=norms.INPUT_ERROR if mean else 1e-4)


def test_norm_of_a_constant_is_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ichbench.network.fast.BLOCK", 0)
    norm = NormAct(4, 1.0)
    with torch.inference_mode():
        norm.bias.copy_(torch.arange(4.0))
        found = FastNormAct(norm)(torch.full((2, 4, 3, 8, 8), 12345.678))
    assert torch.equal(found, torch.arange(4.0).view(1, 4, 1, 1, 1).expand(2, 4, 3, 8, 8))


ANISOTROPIC = Plan(3, 2, 3, (6, 12, 20), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3)))
NETWORKS = [ANISOTROPIC, isotropic(3, (6, 12)), isotropic(2, (8, 16, 16), 4, 3), isotropic(2, (4, 8), channels=7)]


def trained_like(plan: Plan, seed: int) -> UNet:
    """Random weights everywhere, norms and biases too."""
    network = make_unet(plan, NetworkRecipe(), seed).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim == 1:
                value.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.5)
    return network


@pytest.mark.parametrize("plan", [*NETWORKS, *(residual(plan) for plan in NETWORKS)])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_whole_networks(plan: Plan, samples: int, compiled: bool, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr("ichbench.network.fast.kernels", lambda: None)
    network = trained_like(plan, 7)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(samples, plan.in_channels, *(8, 20, 28)[3 - plan.dims :])
    fast = fast_network(network)
    assert any(isinstance(module, NativeConv if compiled else WinogradConv) for module in fast.modules())
    assert {id(value) for value in fast.parameters()} == {id(value) for value in network.parameters()}, "weights were copied"
    with torch.inference_mode():
        found, direct = fast(x), network(x)
        exact = network.double()(x.double())
    spread = float(exact.std())
    assert float((found - exact).abs().max()) < 1e-4 * spread
    assert float((found - exact).abs().max()) < 20 * float((direct - exact).abs().max()) + 1e-6 * spread
    network.float()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_only_the_recipe_decides(always: None) -> None:
    network = trained_like(ANISOTROPIC, 1)
    image = torch.randn(2, 9, 24, 20).numpy()

    class Tiles:
        dims, patch_size = 3, (8, 16, 16)

    def logits(**fields: Any) -> Tensor:
        return torch.from_numpy(predict_logits(network, image, Tiles, InferenceRecipe(mirror=(2,), **fields)))

    direct, fast = logits(convolution="direct"), logits(convolution="winograd")
    assert not torch.equal(direct, fast), "Winograd was not used"
    assert float((direct - fast).abs().max()) < 1e-4 * float(direct.std())
    nnunet = [logits(convolution=way, compatibility="nnunet") for way in ("direct", "winograd")]
    assert torch.equal(*nnunet)
    half = [logits(convolution=way, precision="bf16") for way in ("direct", "winograd")]
    assert torch.equal(*half)
