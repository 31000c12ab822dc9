"""Instance norm followed by leaky ReLU, in a form that is fast on a CPU.

oneDNN convolves up to twice as fast when channels lie innermost in memory, but torch's own instance norm turns such
arrays around first, which costs more than the convolution saves (16 channels, 2 x 16 x 64 x 64 voxels, one core: 23 ms
for the norm, 24 ms for a (1, 3, 3) convolution). This one works on the layout as it lies (14 ms with the leaky ReLU).
On other devices torch's own functions are used.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormAct(nn.Module):
    """Per sample and channel: (x - mean) / sqrt(var + eps) * weight + bias, then leaky ReLU; a slope of 1 leaves that out."""

    def __init__(self, channels: int, leaky_slope: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.leaky_slope, self.eps = leaky_slope, eps

    def forward(self, x: Tensor) -> Tensor:
        # a compiler joins torch's own functions with what stands before and after
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            way = _ChannelsLast.apply if torch.is_grad_enabled() else _in_place
            return way(x, self.weight, self.bias, self.leaky_slope, self.eps)
        # torch.nn.functional's would refuse a single voxel, which becomes the bias here as above
        normed = torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, torch.backends.cudnn.enabled)
        return normed if self.leaky_slope == 1 else F.leaky_relu(normed, self.leaky_slope, inplace=True)


class BatchNormAct(nn.Module):
    """The same over all samples of a batch; prediction uses running averages (a tenth of each new batch), as torch's batch norm does."""

    def __init__(self, channels: int, leaky_slope: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.leaky_slope, self.eps = leaky_slope, eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, self.training, 0.1, self.eps)
        return normed if self.leaky_slope == 1 else F.leaky_relu(normed, self.leaky_slope, inplace=True)


#: `network.norm` of a recipe -> its module
NORMS: dict[str, type[NormAct | BatchNormAct]] = {"instance": NormAct, "batch": BatchNormAct}


@contextlib.contextmanager
def averages_kept(network: nn.Module) -> Iterator[None]:
    """Inside, batch norms use their averages and leave them alone, whatever the rest of the network does."""
    norms = [module for module in network.modules() if isinstance(module, BatchNormAct) and module.training]
    for module in norms:
        module.eval()
    try:
        yield
    finally:
        for module in norms:
            module.train()


def _in_place(x: Tensor, weight: Tensor, bias: Tensor, leaky_slope: float, eps: float) -> Tensor:
    """`_ChannelsLast` for prediction, the same bits with one new array instead of three; `x`, a convolution's answer, is used up."""
    samples, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    per_row = math.gcd(voxels, max(1, 256 // channels))
    rows = x.movedim(1, -1).reshape(samples, voxels // per_row, per_row * channels)
    rows.sub_(_tile(_voxel_sum(rows, channels) / voxels, per_row))
    out = rows * rows
    scale = torch.rsqrt(_voxel_sum(out, channels) / voxels + eps)
    rows.mul_(_tile(scale, per_row))
    torch.addcmul(bias.repeat(per_row), rows, weight.repeat(per_row), out=out)
    if leaky_slope != 1:
        F.leaky_relu_(out, leaky_slope)
    return _image(out, x.shape)


class _ChannelsLast(torch.autograd.Function):
    """The same, over rows of several voxels at once: a row of few channels alone would not fill a vector loop."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, leaky_slope: float, eps: float) -> Tensor:
        samples, channels = x.shape[:2]
        voxels = math.prod(x.shape[2:])
        per_row = math.gcd(voxels, max(1, 256 // channels))
        rows = x.movedim(1, -1).reshape(samples, voxels // per_row, per_row * channels)
        normed = rows - _tile(_voxel_sum(rows, channels) / voxels, per_row)
        variance = _voxel_sum(normed * normed, channels) / voxels
        scale = torch.rsqrt(variance + eps)
        normed.mul_(_tile(scale, per_row))
        out = torch.addcmul(bias.repeat(per_row), normed, weight.repeat(per_row))
        if leaky_slope != 1:
            F.leaky_relu_(out, leaky_slope)
        ctx.save_for_backward(normed, out, scale, weight)
        ctx.leaky_slope, ctx.shape, ctx.per_row = leaky_slope, x.shape, per_row
        return _image(out, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, out, scale, weight = ctx.saved_tensors
        channels, voxels = ctx.shape[1], math.prod(ctx.shape[2:])
        rows = grad.movedim(1, -1).reshape(normed.shape)
        # the next lines write into `rows`, which must not be the caller's gradient
        rows = torch.ops.aten.leaky_relu_backward(rows, out, ctx.leaky_slope, True) if ctx.leaky_slope != 1 else rows.clone()
        grad_bias, grad_weight = _voxel_sum(rows, channels), _voxel_sum(rows * normed, channels)
        # d/dx of the norm: what moves the mean and what moves the variance is taken out
        rows.sub_(_tile(grad_bias / voxels, ctx.per_row))
        rows.addcmul_(normed, _tile(grad_weight / voxels, ctx.per_row), value=-1)
        rows.mul_(_tile(scale * weight, ctx.per_row))
        return _image(rows, ctx.shape), grad_weight.sum((0, 1)), grad_bias.sum((0, 1)), None, None


def _voxel_sum(rows: Tensor, channels: int) -> Tensor:
    """(samples, rows, voxels in a row x channels) -> (samples, 1, channels)."""
    return rows.sum(1).reshape(rows.shape[0], -1, channels).sum(1, keepdim=True)


def _tile(values: Tensor, per_row: int) -> Tensor:
    return values.repeat(1, 1, per_row)


def _image(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
