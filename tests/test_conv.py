"""Convolutions as they train on a CPU: values and all gradients against torch in float64, on drawn layers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ichbench.network import conv
from ichbench.network.blocks import CONV, UP_CONV
from ichbench.network.conv import convolve

LAST: dict[int, Any] = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers too, on any CPU, and several blocks a slice."""
    torch.manual_seed(0)
    monkeypatch.setattr(conv, "NARROW", 3)
    monkeypatch.setattr(conv, "SMALL_SLICE", 4)
    monkeypatch.setattr(conv, "BLOCK_VOXELS", 40)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def drawn(rng: np.random.Generator) -> tuple[nn.Module, Tensor, str]:
    """A layer and an input: 2D or 3D, any kernel of 1, 3, 5 and stride of 1, 2, 3, or a transposed one, or a head."""
    dims, kind = int(rng.integers(2, 4)), str(rng.choice(["conv", "conv", "conv", "up", "head"]))
    channels_in, channels_out = int(rng.integers(1, 6)), int(rng.integers(1, 7))
    stride = tuple(int(n) for n in rng.integers(1, 4, dims))
    kernel = tuple(int(n) for n in rng.choice([1, 3, 5], dims))
    size = tuple(int(n) for n in rng.integers(1, 13, dims))
    if kind == "up":
        layer = UP_CONV[dims](channels_in, channels_out, stride, stride)
    elif kind == "head":
        layer = CONV[dims](channels_in, 2, 1)
    else:
        layer = CONV[dims](channels_in, channels_out, kernel, stride, tuple((k - 1) // 2 for k in kernel), bias=bool(rng.random() < 0.8))
    x = torch.from_numpy(rng.standard_normal((int(rng.integers(1, 4)), channels_in, *size)).astype(np.float32))
    if rng.random() < 0.8:
        x, layer = x.contiguous(memory_format=LAST[dims]), layer.to(memory_format=LAST[dims])
    return layer, x, f"{layer}, input {tuple(x.shape)}"


def gradients(layer: nn.Module, x: Tensor, run: Any, out_grad: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = run(layer, x)
    grad = torch.from_numpy(np.random.default_rng(7).standard_normal(out.shape)) if out_grad is None else out_grad
    found = torch.autograd.grad(out, [x, *layer.parameters()], grad.to(out.dtype))
    return out.detach(), [one.detach() for one in found]


@pytest.mark.parametrize("threads", [1, 2])
def test_values_and_gradients(threads: int) -> None:
    rng = np.random.default_rng(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(120):
            layer, x, said = drawn(rng)
            out, found = gradients(layer, x, convolve, None)
            assert torch.get_num_threads() == threads
            wanted_out, wanted = gradients(layer.double(), x.double(), lambda one, image: one(image), None)
            assert out.dtype == torch.float32
            torch.testing.assert_close(out.double(), wanted_out, rtol=2e-5, atol=2e-5, msg=lambda text: f"{said}: {text}")  # noqa: B023
            for mine, other in zip(found, wanted, strict=True):
                assert mine.shape == other.shape
                scale = max(1.0, float(other.abs().max()))
                assert float((mine.double() - other).abs().max()) <= 1e-5 * scale, said
    finally:
        torch.set_num_threads(before)


def test_where_it_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in training on a CPU without AVX-512; torch alone in prediction, in float64, under autocast and with AVX-512."""
    asked: list[str] = []
    for name in ("_weights", "_transposed_weights"):
        real = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *args, name=name, real=real: (asked.append(name), real(*args))[1])
    layer, up = nn.Conv3d(4, 4, 3, 1, 1), nn.ConvTranspose3d(4, 4, 2, 2)
    x = torch.randn(1, 4, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    for one in (layer, up):
        convolve(one, x).sum().backward()
    assert asked == ["_weights", "_transposed_weights"]
    asked.clear()
    convolve(layer.double(), x.double()).sum().backward()
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        convolve(layer, x).sum().backward()
    with torch.no_grad():
        assert torch.equal(convolve(layer, x), layer(x))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    convolve(layer, x).sum().backward()
    convolve(nn.Conv3d(4, 4, 3, 1, 2, dilation=2), x).sum().backward()
    convolve(nn.Conv3d(4, 4, 3, 1, 1, groups=2), x).sum().backward()
    convolve(nn.ConvTranspose3d(4, 4, 3, 2), x).sum().backward()
    assert asked == []


def test_gradients_that_nobody_asks_for() -> None:
    """The first layer's input needs none, and frozen weights get none."""
    layer = nn.Conv3d(4, 4, 3, 1, 1)
    x = torch.randn(1, 4, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    convolve(layer, x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None
    frozen = nn.Conv3d(4, 4, 3, 1, 1).requires_grad_(False)
    y = x.clone().requires_grad_()
    convolve(frozen, y).sum().backward()
    assert frozen.weight.grad is None
    assert y.grad is not None


class Asked(TorchDispatchMode):
    """Notes kernel and stride of every gradient that torch's own convolution is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.of.append((tuple(args[2].shape[2:]), tuple(args[4])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("how", ["fp32", "bf16", "compiled"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_pointwise_kernel_with_a_stride_is_never_left_to_onednn(
    dims: int, how: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN writes past its workspace there (issue 6035): gradients are wrong now and then, or the process hangs. So no run
    of it can be a test; what is asked of torch is."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    stride = (2, 1, 3)[:dims]
    layer = CONV[dims](4, 5, 1, stride, bias=dims == 3)
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], generator=torch.Generator().manual_seed(0))
    wanted_out, wanted = gradients(layer.double(), x.double(), lambda one, image: one(image), None)
    layer = layer.float().to(memory_format=LAST[dims])
    run = torch.compile(convolve, backend="aot_eager") if how == "compiled" else convolve
    tolerance = 2e-2 if how == "bf16" else 1e-5
    with Asked() as asked, torch.autocast("cpu", dtype=torch.bfloat16) if how == "bf16" else nullcontext():
        out, found = gradients(layer, x.contiguous(memory_format=LAST[dims]), run, None)
    assert all(of == ((1,) * dims, (1,) * dims) for of in asked.of), asked.of
    assert asked.of
    for mine, other in zip([out, *found], [wanted_out, *wanted], strict=True):
        assert mine.shape == other.shape
        assert float((mine.double() - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))
