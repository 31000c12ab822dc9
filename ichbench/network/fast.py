"""The same U-Net, arranged for prediction on a CPU: what it answers differs from `UNet` by rounding alone.

Convolutions go by Winograd where that pays; those of few channels, which torch runs through a plain loop, are matrix products; norms
work in place, by blocks that stay in the cache. Nothing of it can be trained.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ichbench.network.norm import BatchNormAct, NormAct
from ichbench.network.unet import UNet
from ichbench.network.winograd import WinogradConv, is_plain

#: elements that a norm works on at a time: they stay in the second-level cache
BLOCK = 2**17
#: elements of one row of such a block, about
ROW = 1024
#: input channels times taps up to which a convolution is one matrix product over both: an image of one channel, 3 x 3 taps
FEW = 9


def fast_network(network: UNet) -> UNet:
    """`network` with the same weights (shared, not copied) and faster parts. Made for one image: its weights must not change meanwhile.
    A network with batch norm is given back as it is."""
    if any(isinstance(module, BatchNormAct) for module in network.modules()):
        # the parts below rely on a norm that takes every constant away, which stored means do not
        return network.eval()
    shared = {id(value): value for value in (*network.parameters(), *network.buffers())}
    found = copy.deepcopy(network, shared).eval()
    for module in list(found.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NormAct):
                setattr(module, name, FastNormAct(child))
            elif is_plain(child):
                taps = math.prod(child.kernel_size)
                one_product = taps == 1 or taps * child.in_channels <= FEW
                setattr(module, name, ProductConv(child) if one_product else WinogradConv(child))
    return found


class FastNormAct(nn.Module):
    """`NormAct` in place, by blocks."""

    def __init__(self, norm: NormAct) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() <= BLOCK:
            return self.norm(x)  # type: ignore[no-any-return]
        channels = x.shape[1]
        voxels = math.prod(x.shape[2:])
        per_row = math.gcd(voxels, max(1, ROW // channels))
        samples = x.movedim(1, -1).reshape(x.shape[0], voxels // per_row, per_row * channels)
        for rows in samples:
            _normalise(rows, per_row, channels, self.norm)
        return samples.reshape(x.shape[0], *x.shape[2:], channels).movedim(-1, 1)


def _normalise(rows: Tensor, per_row: int, channels: int, norm: NormAct) -> None:
    """(rows, voxels in a row x channels), one sample, in place."""
    blocks = torch.split(rows, max(1, BLOCK // rows.shape[1]))
    # sums about a first guess of the mean, so that squares of large means do not drown a small variance
    guess = _per_channel(blocks[0].sum(0), channels) / (blocks[0].numel() // channels)
    guesses = guess.repeat(per_row)
    total, squares = torch.zeros_like(guesses), torch.zeros_like(guesses)
    for block in blocks:
        moved = block - guesses
        total += moved.sum(0)
        squares += moved.mul_(moved).sum(0)
    voxels = rows.numel() // channels
    shift = _per_channel(total, channels) / voxels
    variance = (_per_channel(squares, channels) / voxels - shift * shift).clamp_(min=0)
    scale = torch.rsqrt(variance + norm.eps) * norm.weight
    scales, biases = scale.repeat(per_row), (norm.bias - shift * scale).repeat(per_row)
    for block in blocks:
        # the guess is taken off alone: close to it the difference is exact
        torch.addcmul(biases, block.sub_(guesses), scales, out=block)
        if norm.leaky_slope != 1:
            F.leaky_relu_(block, norm.leaky_slope)


def _per_channel(row: Tensor, channels: int) -> Tensor:
    return row.view(-1, channels).sum(0)


class ProductConv(nn.Module):
    """A convolution (stride 1, "same" padding) as one matrix product per slice: voxels times channels and taps."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv, dims = self.conv, x.ndim - 2
        weight = conv.weight.movedim(1, -1).flatten(1)
        rows = x.movedim(1, -1)
        if max(conv.kernel_size) == 1:
            return F.linear(rows, weight, conv.bias).movedim(-1, 1)
        padded = F.pad(rows, (0, 0, *(size // 2 for size in reversed(conv.kernel_size) for _ in range(2))))
        # (samples, *spatial, channels, *taps), a view until a slice of it is needed
        windows = padded
        for axis, size in enumerate(conv.kernel_size):
            windows = windows.unfold(axis + 1, size, 1)
        windows = windows.movedim(1 + dims, -1)
        out = x.new_empty(*rows.shape[:-1], conv.out_channels)
        for target, slice_windows in zip(out.flatten(0, dims - 2), windows.flatten(0, dims - 2), strict=True):
            torch.mm(slice_windows.reshape(-1, weight.shape[1]), weight.T, out=target.view(-1, conv.out_channels))
        if conv.bias is not None:
            out.add_(conv.bias)
        return out.movedim(-1, 1)
