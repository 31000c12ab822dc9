"""The compiled kernels against torch's own functions in float64: the same numbers, rounding apart; and what happens without them."""

from __future__ import annotations

import copy
import gc
import math
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import norms
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unet import Plan
from test_winograd import ANISOTROPIC, NETWORKS, needs_compiler, trained_like
from torch import Tensor, nn

from ichbench.errors import CaseError
from ichbench.inference.sliding import gains_from_pairs, predict_logits
from ichbench.network import fast, native
from ichbench.network.fast import Buffers, NativeConv, NativeNormAct, NativeUp, fast_network, has_kernels, is_box, is_native
from ichbench.network.native import Kernels, find_compilers, kernels
from ichbench.network.unet import UNet, make_unet, weights_digest
from ichbench.network.winograd import WinogradConv
from ichbench.recipe import InferenceRecipe, NetworkRecipe, TrainingRecipe
from ichbench.training.optimizers import OPTIMIZERS

#: size along z, strides, points along z
WAYS = [
    (3, (1, 1, 1), True),
    (3, (1, 1, 1), False),
    (1, (1, 1, 1), False),
    (3, (1, 2, 2), False),
    (3, (2, 2, 2), False),
    (1, (1, 2, 2), False),
    (1, (2, 2, 2), False),
    (3, (3, 2, 2), False),
]


@pytest.fixture
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh() -> Iterator[None]:
    """`kernels` is asked again, before and after the test."""
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def compiled() -> Kernels:
    found = kernels()
    assert found is not None, "there is a compiler, but the kernels cannot be had"
    return found


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def convolved(images: list[Tensor], weight: Tensor, way: Any) -> Tensor:
    """The kernel with torch's order of axes."""
    size_z, stride, along_z = way
    shape = [-(-n // step) for n, step in zip(images[0].shape[2:], stride, strict=True)]
    # what the kernel must fill, and not read
    out = torch.full((len(images[0]), *shape, len(weight)), math.nan)
    points = compiled().point_weights(weight, along_z, stride[-1] == 2)
    compiled().winograd([rows(image) for image in images], points, size_z, stride[0], along_z, stride[-1] == 2, out)
    return out.movedim(-1, 1)


@needs_compiler
@given(
    way=st.sampled_from(WAYS),
    samples=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 11), st.integers(1, 37), st.integers(1, 37)),
    channels=st.tuples(st.integers(1, 40), st.integers(0, 20), st.integers(1, 40)),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150)
def test_convolution(way: Any, samples: int, shape: Any, channels: Any, threads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second, channels_out = channels
    images = [torch.randn(samples, n, *shape, generator=generator) for n in (first, second) if n]
    weight = torch.randn(channels_out, first + second, way[0], 3, 3, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = convolved(images, weight, way)
    finally:
        torch.set_num_threads(before)
    x = torch.cat(images, 1)
    expected = F.conv3d(x.double(), weight.double(), None, way[1], (way[0] // 2, 1, 1))
    assert found.shape == expected.shape
    # what a tile rounds hangs on the largest values in it, and on all taps
    assert float((found - expected).abs().max()) < 1e-6 * float(x.abs().max() * weight.abs().flatten(1).sum(1).max())


@needs_compiler
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1000.0), (0.0, 1e-6)])
def test_errors_stay_small_beside_what_is_summed(way: Any, mean: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(11)
    x = mean + spread * torch.randn(1, 48, 6, 17, 20, generator=generator)
    x[..., ::5, ::5] += 100 * spread
    weight = torch.randn(24, 48, way[0], 3, 3, generator=generator) / math.sqrt(48 * 9 * way[0])
    padding = (way[0] // 2, 1, 1)
    exact = F.conv3d(x.double(), weight.double(), None, way[1], padding)
    summed = F.conv3d(x.double().abs(), weight.double().abs(), None, way[1], padding)
    assert float((convolved([x], weight, way) - exact).abs().max() / summed.max()) < 2e-6


@needs_compiler
@pytest.mark.parametrize("way", WAYS)
def test_as_exact_as_the_direct_one(way: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 128, 8, 16, 16, generator=generator)
    weight = torch.randn(64, 128, way[0], 3, 3, generator=generator) / math.sqrt(128 * 9 * way[0])
    exact = F.conv3d(x.double(), weight.double(), None, way[1], (way[0] // 2, 1, 1))
    error = (convolved([x], weight, way) - exact) / float(exact.std())
    assert float(error.abs().max()) < 1e-4
    assert float(error.square().mean().sqrt()) < 1e-5


@needs_compiler
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_with_any_number_of_threads(way: Any, few_threads: None) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(2, 20, 7, 45, 50), torch.randn(18, 20, way[0], 3, 3)
    scale, bias = torch.randn(2, 20)
    answers, norms = [], []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        answers.append(convolved([x], weight, way))
        normed = rows(x).clone()
        compiled().norm_act(normed, scale, bias, 1e-5, 0.01)
        norms.append(normed)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@needs_compiler
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_every_width(lanes: int, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other processors have narrower or wider ones; here the compiler puts wide ones together."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, f"-DICHBENCH_LANES={lanes}"))
    assert compiled().lanes == lanes
    torch.manual_seed(lanes)
    for way in WAYS:
        for channels_in, channels_out in ((1, 1), (lanes, 2 * lanes), (lanes + 1, 2 * lanes + 1), (3 * lanes - 1, 5 * lanes)):
            x, weight = torch.randn(2, channels_in, 5, 21, 18), torch.randn(channels_out, channels_in, way[0], 3, 3)
            expected = F.conv3d(x.double(), weight.double(), None, way[1], (way[0] // 2, 1, 1))
            error = float((convolved([x], weight, way) - expected).abs().max())
            assert error < 1e-6 * float(x.abs().max() * weight.abs().flatten(1).sum(1).max())


@needs_compiler
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    channels_out=st.integers(1, 40),
    box=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    flat=st.booleans(),
)
@settings(max_examples=60)
def test_transposed_convolution(shape: Any, channels_out: int, box: Any, bias: bool, flat: bool) -> None:
    torch.manual_seed(1)
    kind: Any = nn.ConvTranspose2d if flat else nn.ConvTranspose3d
    size = box[1:] if flat else box
    conv = kind(shape[1], channels_out, size, size, bias=bias)
    assert is_box(conv)
    x = torch.randn(*shape[:2], *shape[3 if flat else 2 :])
    with torch.inference_mode():
        found = NativeUp(conv, fast.Tools(compiled(), Buffers()))(x)
        expected = conv.double()(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.ConvTranspose3d(2, 2, 3, stride=2),
        nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1),
        nn.ConvTranspose3d(2, 2, 2, stride=2, output_padding=1),
        nn.ConvTranspose2d(2, 2, 2, stride=2, groups=2),
        nn.ConvTranspose2d(2, 2, 2, stride=2, dilation=2),
    ],
)
def test_other_transposed_convolutions_are_left_alone(conv: Any) -> None:
    assert not is_box(conv)


@pytest.mark.parametrize(
    ("conv", "native"),
    [
        (nn.Conv3d(2, 2, 3, padding=1), True),
        (nn.Conv3d(2, 2, (1, 3, 3), (2, 2, 2), padding=(0, 1, 1)), True),
        (nn.Conv2d(2, 2, 3, 2, padding=1), True),
        (nn.Conv3d(2, 2, 3, (1, 2, 1), padding=1), False),
        (nn.Conv3d(2, 2, 3, (2, 1, 1), padding=1), False),
        (nn.Conv2d(2, 2, 3, 3, padding=1), False),
        (nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0)), False),
        (nn.Conv3d(2, 2, (3, 3, 1), padding=(1, 1, 0)), False),
        (nn.Conv3d(2, 2, (5, 3, 3), padding=(2, 1, 1)), False),
        (nn.Conv3d(2, 2, 3), False),
        (nn.Conv3d(2, 2, 3, padding="same"), False),
        (nn.Conv3d(2, 2, 3, padding=1, groups=2), False),
        (nn.Conv3d(2, 2, 3, padding=2, dilation=2), False),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), False),
        (nn.ConvTranspose3d(2, 2, 3, padding=1), False),
    ],
)
def test_which_convolutions(conv: Any, native: bool) -> None:
    assert is_native(conv) == native


@needs_compiler
@pytest.mark.parametrize(
    "conv", [nn.Conv2d(9, 5, 3, 2, 1), nn.Conv2d(9, 5, 3, 1, 1), nn.Conv3d(9, 5, 3, (2, 2, 2), 1), nn.Conv3d(9, 5, 3, 1, 1)]
)
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9, 40])
def test_modules_stand_in_for_convolutions(conv: Any, depth: int) -> None:
    module = NativeConv(conv, fast.Tools(compiled(), Buffers()))
    x = torch.randn(2, 9, *(depth, 13, 10)[-len(conv.kernel_size) :])
    with torch.inference_mode():
        expected = F.conv2d(x, conv.weight, None, conv.stride, 1) if x.ndim == 4 else F.conv3d(x, conv.weight, None, conv.stride, 1)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(module((x[:, :4], x[:, 4:])), expected, rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "shape", [(1, 32, 4, 20, 24), (2, 5, 3, 7, 11), (3, 320, 1, 2, 2), (2, 8, 33, 35), (1, 3, 1, 1, 2), (1, 7, 16, 64, 64)]
)
@pytest.mark.parametrize("slope", [0.01, 1.0, 0.0])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1000.0, 1.0), (-3e4, 100.0), (0.0, 1e-4)])
def test_norm(shape: tuple[int, ...], slope: float, mean: float, spread: float) -> None:
    norm, x, exact = norms.drawn(shape, slope, mean, spread)
    with torch.inference_mode():
        found = NativeNormAct(norm, fast.Tools(compiled(), Buffers()))(x)
    norms.assert_close(found, exact, atol=norms.INPUT_ERROR if mean else 1e-5)


@needs_compiler
def test_norm_of_a_constant_is_its_bias_and_nan_stays() -> None:
    norm = fast.NormAct(4, 1.0)
    module = NativeNormAct(norm, fast.Tools(compiled(), Buffers()))
    with torch.inference_mode():
        norm.bias.copy_(torch.arange(4.0))
        assert torch.equal(module(torch.full((2, 4, 3, 8, 8), 12345.678)), torch.arange(4.0).view(1, 4, 1, 1, 1).expand(2, 4, 3, 8, 8))
        norm.leaky_slope = 0.01
        x = torch.randn(1, 4, 3, 8, 8)
        x[0, 2, 1, 1, 1] = math.nan
        assert torch.isnan(module(x)).any((0, 2, 3, 4)).tolist() == [False, False, True, False]


@needs_compiler
@pytest.mark.parametrize("plan", NETWORKS)
def test_a_broken_logit_is_not_hidden(plan: Any) -> None:
    network = trained_like(plan, 3)
    x = torch.randn(1, plan.in_channels, *(8, 20, 28)[3 - plan.dims :])
    x.view(-1)[17] = math.nan
    with torch.inference_mode():
        assert bool(torch.isnan(fast_network(network)(x)).any())


@needs_compiler
def test_prepared_weights_are_kept_until_weights_change_or_another_network_comes() -> None:
    network, other = trained_like(ANISOTROPIC, 1), trained_like(ANISOTROPIC, 2)
    x = torch.randn(1, 2, 8, 20, 28)
    with torch.inference_mode():
        first = fast_network(network)
        before = first(x)
    assert fast_network(network) is first
    assert has_kernels(first)
    with torch.no_grad():
        network.encoder[0][0].conv.weight.mul_(1.5)  # type: ignore[index, union-attr, operator]
        network.decoder[0][0].conv.weight.add_(0.01)  # type: ignore[index, union-attr, operator]
    with torch.inference_mode():
        changed = fast_network(network)
        assert changed is not first
        assert not torch.equal(changed(x), before)
        torch.testing.assert_close(changed(x), network(x), rtol=1e-3, atol=1e-3)
        fast_network(other)
    assert fast_network(network) is not changed
    del network, first, changed
    fast_network(other)
    del other
    gc.collect()
    assert not len(fast._last)


@needs_compiler
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weights_that_an_optimizer_changed(name: str) -> None:
    """Fused ones change tensors without torch counting it."""
    network = trained_like(ANISOTROPIC, 1)
    x = torch.randn(1, 2, 8, 16, 16)
    with torch.inference_mode():
        before = fast_network(network)(x)
    optimizer = OPTIMIZERS[name](network.parameters(), TrainingRecipe())
    for _ in range(3):
        optimizer.zero_grad()
        answer = network.train()(x)
        answer[0].square().mean().backward()
        optimizer.step()
    network.eval()
    with torch.inference_mode():
        assert not torch.allclose(before, network(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fast_network(network)(x), network(x), rtol=1e-3, atol=1e-3)


def test_digest_of_weights_in_any_order_of_memory() -> None:
    conv = nn.Conv3d(3, 4, 3)
    digest = weights_digest(conv)
    assert weights_digest(copy.deepcopy(conv)) == digest
    conv.weight.data.view(-1)[7] += 1e-3
    assert weights_digest(conv) != digest
    last = conv.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    digest = weights_digest(last)
    with torch.no_grad():
        last.weight[0, 0], last.weight[0, 1] = last.weight[0, 1].clone(), last.weight[0, 0].clone()
    assert weights_digest(last) != digest


@needs_compiler
def test_one_network_for_patches_of_two_depths() -> None:
    network = trained_like(NETWORKS[1], 4)
    with torch.inference_mode():
        for depth in (32, 4, 32, 8):
            x = torch.randn(1, NETWORKS[1].in_channels, depth, 24, 24)
            torch.testing.assert_close(fast_network(network)(x), network(x), rtol=1e-3, atol=1e-3)


@needs_compiler
def test_other_networks_are_left_as_they_are() -> None:
    network = trained_like(ANISOTROPIC, 1)
    fast_one = fast_network(network)
    assert fast_network(fast_one) is fast_one
    x = torch.randn(1, 2, 8, 16, 16)
    with torch.inference_mode():
        expected = fast_one(x)
        assert torch.equal(copy.deepcopy(fast_one)(x), expected)
        normed = plan_network(norm="batch")
        assert fast_network(normed) is normed
        assert not normed.training
        assert fast_network(network.double()) is network
        # weights that lie apart in memory
        strided = trained_like(ANISOTROPIC, 1)
        for module in strided.modules():
            for key, value in list(module._parameters.items()):
                if value is not None and value.ndim == 1:
                    module._parameters[key] = nn.Parameter(value.detach().repeat_interleave(2)[::2])
        torch.testing.assert_close(fast_network(strided)(x), expected, rtol=0, atol=0)
        with pytest.raises(TypeError, match="float64"):
            fast_network(strided)(x.double())


def plan_network(norm: Any) -> UNet:
    return make_unet(ANISOTROPIC, NetworkRecipe(norm=norm)).train()


@needs_compiler
def test_too_little_memory_is_a_failed_case(monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained_like(ANISOTROPIC, 1)

    class Tiles:
        dims, patch_size = 3, (8, 16, 16)

    # 2^60 elements are more than any machine has
    def far_too_many(x: Tensor, *rest: object) -> None:
        compiled()._run("norm_act", x, x, x, 2**20, 2**20, 2**20, 1e-5, 0.01, 1)

    monkeypatch.setattr(fast_network(network).encoder[0][0].norm.tools.kernels, "norm_act", far_too_many)  # type: ignore[index, union-attr]
    with pytest.raises(CaseError, match="case 7: there is not enough memory to predict an image of 8 x 16 x 16 voxels"):
        predict_logits(network, torch.randn(2, 8, 16, 16).numpy(), Tiles, InferenceRecipe(mirror=False), name="case 7")


@needs_compiler
def test_large_buffers_are_given_back_after_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained_like(ANISOTROPIC, 1)

    class Tiles:
        dims, patch_size = 3, (8, 16, 16)

    def kept() -> int:
        predict_logits(network, torch.randn(2, 8, 16, 16).numpy(), Tiles, InferenceRecipe(mirror=False))
        ((_, _, tools),) = fast._last.values()
        return sum(base.nbytes for base in tools.buffers._free)  # type: ignore[union-attr]

    assert kept() > 10_000
    monkeypatch.setattr(fast, "KEPT", 10_000)
    assert 0 <= kept() <= 10_000


@needs_compiler
def test_pairs_are_for_what_torch_convolves() -> None:
    assert has_kernels(fast_network(trained_like(ANISOTROPIC, 1)))
    mixed = Plan(3, 2, 3, (6, 12), ((1, 1, 1), (1, 2, 2)), ((1, 1, 3), (3, 3, 3)))
    assert not has_kernels(fast_network(trained_like(mixed, 1)))
    assert gains_from_pairs(fast_network(trained_like(mixed, 1)))
    assert not gains_from_pairs(fast_network(trained_like(ANISOTROPIC, 1)))


def test_weights_made_in_inference_mode() -> None:
    x = torch.randn(1, 2, 8, 16, 16)
    with torch.inference_mode():
        network = copy.deepcopy(trained_like(ANISOTROPIC, 1))
        before = fast_network(network)(x)
        for value in network.parameters():
            value.mul_(1.1)
        torch.testing.assert_close(fast_network(network)(x), network(x), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(before, network(x), rtol=1e-3, atol=1e-3)


def test_buffers_serve_again_only_when_nothing_refers_to_them() -> None:
    buffers = Buffers()
    first = buffers.take(3, 100)
    view = first.movedim(0, 1)[5:]
    view.fill_(1)
    at = first.data_ptr()
    del first
    other = buffers.take(3, 100)
    assert other.data_ptr() != at, "somebody still looks at it"
    assert bool((view == 1).all())
    del view
    again = buffers.take(2, 90)
    assert again.data_ptr() == at
    assert buffers.take(1, 100).data_ptr() not in (at, other.data_ptr())
    assert buffers.take(1000).shape == (1000,)


@pytest.mark.parametrize("plan", NETWORKS)
def test_without_a_compiler_torch_does_it(plan: Any, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not find_compilers()
    assert kernels() is None
    network = trained_like(plan, 7)
    found = fast_network(network)
    assert any(isinstance(module, WinogradConv) for module in found.modules())
    assert not has_kernels(found)
    x = torch.randn(1, plan.in_channels, *(8, 20, 28)[3 - plan.dims :])
    with torch.inference_mode():
        torch.testing.assert_close(found(x), network(x), rtol=1e-3, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("text", ["exit 1", "sleep 400", "exit 0", "for last; do :; done; echo no program > $4; exit 0"])
def test_a_compiler_that_fails_or_hangs_is_passed_over(text: str, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "FLAGS", ("-O1", *native.FLAGS[1:]))
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\n{text}\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    assert find_compilers()[0] == str(broken)
    if "sleep" in text:
        monkeypatch.setattr(native, "PATIENCE", 0.5)
        assert native._made_by(str(broken)) is None
        running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"sleep\0400\0" == path.read_bytes()]
        assert running == [], "what the compiler started goes on"
        return
    assert compiled().compiler != "broken"
    assert len(list((tmp_path / "cache" / "ichbench").iterdir())) == 1, "a program that does not work was kept"
    monkeypatch.setattr(native, "COMPILERS", ())
    kernels.cache_clear()
    assert kernels() is None


@needs_compiler
def test_a_cache_that_others_can_write_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = native._cache_folder()
    assert own == tmp_path / "ichbench"
    own.chmod(0o777)
    other = native._cache_folder()
    assert other != own
    shutil.rmtree(other)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert native._cache_folder() == tmp_path / "home" / ".cache" / "ichbench"


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ROOT_A = 0.7071", "ROOT_A = 0.7171"),
        ("taps[0], taps[2]", "taps[2], taps[0]"),
        ("+ shift;", "- shift;"),
        ("from + channel, n) +", "from + channel, n) -"),
    ],
)
def test_kernels_that_compute_something_else_are_not_taken(
    right: str, wrong: str, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = {path.name: path.read_text() for path in native.SOURCE.parent.glob("native*") if path.suffix in (".cpp", ".h")}
    assert sum(text.count(right) for text in sources.values()) == 1
    for name, text in sources.items():
        (tmp_path / name).write_text(text.replace(right, wrong))
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")
    # fast to compile, and computes the same
    monkeypatch.setattr(native, "FLAGS", ("-O1", *native.FLAGS[1:]))
    monkeypatch.setattr(native, "COMPILERS", ("g++",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels() is None
    assert list((tmp_path / "cache" / "ichbench").iterdir()) == [], "a wrong program was kept"
    assert "torch's numbers" in native.about_kernels()
    monkeypatch.setattr(native, "is_right", lambda found: True)
    kernels.cache_clear()
    assert kernels() is not None, "it was refused for another reason"


@needs_compiler
def test_the_program_is_built_once_in_the_users_cache(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "FLAGS", ("-O1", *native.FLAGS[1:]))
    assert kernels() is not None
    (program,) = (tmp_path / "cache" / "ichbench").iterdir()
    assert stat.S_IMODE(program.parent.stat().st_mode) == 0o700
    built = program.stat().st_mtime_ns
    kernels.cache_clear()
    assert kernels() is not None
    assert [file.stat().st_mtime_ns for file in program.parent.iterdir()] == [built]
    # half a program, as a full disk may leave one, in a file that this process has not loaded
    content = program.read_bytes()
    program.unlink()
    program.write_bytes(content[: len(content) // 2])
    kernels.cache_clear()
    assert kernels() is not None
    assert [file.stat().st_size for file in program.parent.iterdir()] == [len(content)]
    # what torch computes with decides, as ATEN_CPU_CAPABILITY has it, not what the processor could do
    lanes = {}
    for capability in ("DEFAULT", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        kernels.cache_clear()
        lanes[capability] = compiled().lanes
    if platform.machine() == "x86_64":
        assert lanes == {"DEFAULT": 4, "AVX2": 8}


@needs_compiler
def test_a_cache_that_cannot_be_written(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native, "FLAGS", ("-O1", *native.FLAGS[1:]))
    found = native._cache_folder()
    shutil.rmtree(found)
    assert kernels() is not None
    assert (tmp_path / "file").read_bytes() == b""
