"""The same U-Net, arranged for prediction on a CPU: what it answers differs from `UNet` by rounding alone.

Where the machine has a C++ compiler, convolutions, transposed convolutions and norms are the compiled kernels of network/native.cpp.
Elsewhere convolutions go by Winograd in torch's operations where that pays, and norms work in place, by blocks that stay in the cache.
Convolutions of few channels, which torch runs through a plain loop, are matrix products either way. Nothing of it can be trained.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ichbench.network.native import Kernels, kernels
from ichbench.network.norm import BatchNormAct, NormAct
from ichbench.network.unet import UNet, weights_digest
from ichbench.network.winograd import OUTPUTS, WinogradConv, is_plain

#: elements that a norm works on at a time: they stay in the second-level cache
BLOCK = 2**17
#: elements of one row of such a block, about
ROW = 1024
#: input channels times taps up to which a convolution is one matrix product over both: an image of one channel, 3 x 3 taps
FEW = 9
#: bytes of buffers that are kept from one image to the next: those of a patch of 16 x 128 x 128 voxels and 32 features
KEPT = 2**29

#: the last network that predicted, the weights that it had then, and its fast form
_last: WeakKeyDictionary[UNet, tuple[object, UNet, Tools | None]] = WeakKeyDictionary()


def fast_network(network: UNet) -> UNet:
    """`network` with the same weights (shared, not copied) and faster parts.

    One with batch norm, or that is not in float32 on the CPU, is given back as it is. What is made of the weights, five to seven times
    their memory, is kept for the next image until another network predicts, or this one with other weights.
    """
    values = (*network.parameters(), *network.buffers())
    plain = all(value.dtype == torch.float32 and value.device.type == "cpu" for value in values)
    # the parts below rely on a norm that takes every constant away, which stored means do not
    if not plain or any(isinstance(module, (BatchNormAct, *FAST_CONVS)) for module in network.modules()):
        return network.eval()
    weights = weights_digest(network)
    known, fast, _ = _last.get(network, (None, None, None))
    if fast is None or known != weights:
        _last.clear()
        compiled = kernels()
        tools = Tools(compiled, Buffers()) if compiled else None
        fast = _made_fast(network, tools)
        _last[network] = weights, fast, tools
    return fast


def trim() -> None:
    """After an image: give back what large patches needed beside the weights."""
    for _, _, tools in _last.values():
        if tools is not None:
            tools.buffers.trim()


def _made_fast(network: UNet, tools: Tools | None) -> UNet:
    shared = {id(value): value for value in (*network.parameters(), *network.buffers())}
    found = copy.deepcopy(network, shared).eval()
    for module in list(found.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, _faster(child, tools))
    firsts: list[Any] = [level[0].conv for level in found.decoder]  # type: ignore[index]
    if all(isinstance(conv, NativeConv) for conv in firsts):
        found.join = SideBySide()
    return found


def has_kernels(network: nn.Module) -> bool:
    """Whether no convolution of `network` but those of single voxels is left to torch."""
    parts = [child for module in network.modules() if not isinstance(module, FAST_CONVS) for child in module.children()]
    left = any(isinstance(part, nn.Conv2d | nn.Conv3d) and max(part.kernel_size) > 1 for part in parts)
    return not left and any(isinstance(part, NativeConv) for part in parts)


def _faster(module: nn.Module, tools: Tools | None) -> nn.Module:
    if isinstance(module, NormAct):
        return NativeNormAct(module, tools) if tools else FastNormAct(module)
    if tools and is_native(module):
        return NativeConv(module, tools)
    if is_plain(module) and (max(module.kernel_size) == 1 or math.prod(module.kernel_size) * module.in_channels <= FEW):
        return ProductConv(module, tools)
    if is_plain(module) and not tools:
        return WinogradConv(module)
    if tools and isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d) and is_box(module):
        return NativeUp(module, tools)
    return module


def is_box(conv: nn.ConvTranspose2d | nn.ConvTranspose3d) -> bool:
    """Whether every voxel of a transposed convolution becomes a box of its own."""
    plain = conv.groups == 1 and set(conv.dilation) == {1} and not any((*conv.padding, *conv.output_padding))
    return plain and tuple(conv.kernel_size) == tuple(conv.stride)


class Buffers:
    """Arrays that serve again: a large one that comes fresh from the system costs as much time as a convolution that fills it."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.float32]] = []
        self._choosing = Lock()

    def take(self, *shape: int) -> Tensor:
        """An uninitialised float32 array, whose memory comes back when nothing refers to it any more."""
        needed = math.prod(shape)
        with self._choosing:
            fitting = [index for index, base in enumerate(self._free) if needed <= base.size <= 2 * needed]
            best = min(fitting, key=lambda index: self._free[index].size, default=None)
            base = np.empty(needed, np.float32) if best is None else self._free.pop(best)
        view = base[:needed].reshape(shape)
        # the tensor holds the view, and views of the tensor hold its memory
        weakref.finalize(view, self._free.append, base)
        return torch.from_numpy(view)

    def trim(self) -> None:
        """Keep at most KEPT bytes of what is free."""
        with self._choosing:
            while sum(base.nbytes for base in self._free) > KEPT:
                self._free.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffers:
        return Buffers()


@dataclass(frozen=True)
class Tools:
    """What the parts of one network share."""

    kernels: Kernels
    buffers: Buffers


class SideBySide(nn.Module):
    """Features of the decoder and of the encoder, which the next convolution reads where they lie."""

    def forward(self, up: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return up, skip


class NativeConv(nn.Module):
    """`conv`, one that `is_native`, without its bias, by the kernels. For a norm to follow, which takes every constant away."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, tools: Tools) -> None:
        super().__init__()
        self.conv, self.tools = conv, tools
        self.size_z, self.stride_z = (conv.kernel_size[0], conv.stride[0]) if len(conv.kernel_size) == 3 else (1, 1)
        self.strided = conv.stride[-1] == 2
        #: with and without points along z, for patches of different depth
        self.points: dict[bool, Tensor] = {}

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        ndim = x.ndim if isinstance(x, Tensor) else x[0].ndim
        images = [_rows(image) for image in ((x,) if isinstance(x, Tensor) else x)]
        step = (self.stride_z, *(2 * (2,) if self.strided else (1, 1)))
        shape = [-(-n // by) for n, by in zip(images[0].shape[1:4], step, strict=True)]
        along_z = self.size_z == 3 and step == (1, 1, 1) and points_along_z(shape)
        if along_z not in self.points:
            self.points[along_z] = self.tools.kernels.point_weights(self.conv.weight, along_z, self.strided)
        out = self.tools.buffers.take(len(images[0]), *shape, self.conv.out_channels)
        self.tools.kernels.winograd(images, self.points[along_z], self.size_z, self.stride_z, along_z, self.strided, out)
        return _image(out, ndim)


def is_native(conv: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
    """Whether `conv` has filters (3, 3), (3, 3, 3) or (1, 3, 3), "same" padding, and strides of 1, or of 2 along y and x."""
    if not isinstance(conv, nn.Conv2d | nn.Conv3d) or conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
        return False
    (*size_z, y, x), (*stride_z, down, across) = conv.kernel_size, conv.stride
    same = conv.padding == tuple(size // 2 for size in conv.kernel_size)
    return same and (y, x) == (3, 3) and set(size_z) <= {1, 3} and down == across in (1, 2) and (down == 2 or set(stride_z) <= {1})


def points_along_z(shape_zyx: Sequence[int]) -> bool:
    """Whether fewer multiplications along z are worth reading twice the weights (per weight, in nanoseconds: 1 / 40 a product, 1 / 3 to
    read it; 3 taps for each of the slices, or 6 points for every 4 of them)."""
    depth, tiles = shape_zyx[0], -(-shape_zyx[1] // OUTPUTS) * -(-shape_zyx[2] // OUTPUTS)
    return 6 * (-(-depth // OUTPUTS) * tiles / 40 + 1 / 3) < 3 * (depth * tiles / 40 + 1 / 3)


class NativeUp(nn.Module):
    """A transposed convolution whose boxes do not overlap, by the kernels."""

    def __init__(self, conv: nn.ConvTranspose2d | nn.ConvTranspose3d, tools: Tools) -> None:
        super().__init__()
        self.conv, self.tools = conv, tools
        self.box = (1,) * (3 - len(conv.stride)) + tuple(conv.stride)
        self.weights: Tensor | None = None
        self.bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.weights is None:
            weight = self.conv.weight.movedim(1, -1)
            self.weights = self.tools.kernels.packed(weight.reshape(len(weight), -1))
        rows = _rows(x)
        shape = (n * box for n, box in zip(rows.shape[1:4], self.box, strict=True))
        out = self.tools.buffers.take(len(rows), *shape, self.conv.out_channels)
        self.tools.kernels.up(rows, self.weights, self.bias.contiguous(), self.box, out)
        return _image(out, x.ndim)


class NativeNormAct(nn.Module):
    """`NormAct` in place, by the kernels."""

    def __init__(self, norm: NormAct, tools: Tools) -> None:
        super().__init__()
        self.norm, self.tools = norm, tools

    def forward(self, x: Tensor) -> Tensor:
        rows = _rows(x)
        self.tools.kernels.norm_act(rows, self.norm.weight.contiguous(), self.norm.bias.contiguous(), self.norm.eps, self.norm.leaky_slope)
        return _image(rows, x.ndim)


def _rows(x: Tensor) -> Tensor:
    """(samples, channels, [z,] y, x) -> (samples, z, y, x, channels), contiguous."""
    rows = x.movedim(1, -1)
    return (rows if x.ndim == 5 else rows[:, None]).contiguous()


def _image(rows: Tensor, ndim: int) -> Tensor:
    return (rows if ndim == 5 else rows[:, 0]).movedim(-1, 1)


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

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, tools: Tools | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.empty = tools.buffers.take if tools else torch.empty

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
        out = self.empty(*rows.shape[:-1], conv.out_channels)
        for target, slice_windows in zip(out.flatten(0, dims - 2), windows.flatten(0, dims - 2), strict=True):
            torch.mm(slice_windows.reshape(-1, weight.shape[1]), weight.T, out=target.view(-1, conv.out_channels))
        if conv.bias is not None:
            out.add_(conv.bias)
        return out.movedim(-1, 1)


#: the convolutions of a fast network
FAST_CONVS = (NativeConv, ProductConv, WinogradConv)
