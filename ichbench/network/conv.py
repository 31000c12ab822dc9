"""Convolutions that train faster on a CPU: the same numbers up to rounding, the gradient of the weights by matrix products.

With channels innermost in memory oneDNN convolves, and takes gradients of images, at the speed of the arithmetic; but on a CPU
without AVX-512 it has no good kernel there for the gradient of the weights. One core of an AMD Zen 3, two samples, (1, 3, 3)
kernel, 16 x 128 x 128 voxels, 64 -> 32 channels: 245 ms forward, 290 ms for the image, 1,230 ms for the weights. As matrix
products over blocks that fit the cache: 310 ms, and closer to float64 (largest relative difference 1.5e-6, not 2.7e-5),
because sums are taken block by block. A 1x1 convolution onto few classes is a plain matrix product as well.

A 1x1 kernel with a stride reads one voxel of each box, so those voxels are taken first and convolved without a stride. For the
stride, oneDNN (3.12, of torch 2.13) writes past its workspace when it takes the gradient of the weights of fewer input channels
than its block (8, with AVX-512 16) lying innermost: gradients are wrong now and then, or the process crashes or never ends
(https://github.com/uxlfoundation/oneDNN/issues/6035; seen here as one wrong gradient in a hundred, with two threads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: fewer output channels than this fill no matrix product, and oneDNN does well
NARROW = 32
#: a slice of fewer voxels makes products too small to pay
SMALL_SLICE = 64
#: voxels of one product: what three shifted copies of 32 channels take (1.5 MB) stays in cache
BLOCK_VOXELS = 4096

Axes = Sequence[int]
Item = TypeVar("Item")


def convolve(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)` for a (transposed) convolution; while training on a CPU, as this file does it."""
    if not torch.is_grad_enabled() or x.device.type != "cpu" or layer.groups != 1 or max(layer.dilation) > 1:
        return layer(x)  # type: ignore[no-any-return]
    pointwise = not layer.transposed and max(layer.kernel_size) == 1 and not any(layer.padding)
    stride = layer.stride
    if pointwise and max(stride) > 1:
        first: Any = (..., *(slice(None, None, step) for step in stride))
        x = x[first]
        stride = (1,) * len(stride)
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return _by_torch(layer, x, stride)
    if pointwise and layer.out_channels < NARROW and layer.bias is not None:
        return F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias).movedim(-1, 1)
    # transposed layers of a U-Net have no overlap: the kernel is the stride
    if "AVX512" in torch.backends.cpu.get_cpu_capability() or (layer.transposed and layer.kernel_size != stride):
        return _by_torch(layer, x, stride)
    return _Convolution.apply(x, layer.weight, layer.bias, stride, layer.padding, layer.transposed)  # type: ignore[no-any-return, no-untyped-call]


def _by_torch(layer: Any, x: Tensor, stride: Axes) -> Tensor:
    """torch's own convolution of `layer`, with this stride."""
    if stride == layer.stride:
        return layer(x)  # type: ignore[no-any-return]
    direct: Any = F.conv2d if x.ndim == 4 else F.conv3d
    return direct(x, layer.weight, layer.bias)  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    """torch's convolution and its gradient, but for the gradient of the weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], up: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.up, ctx.has_bias = stride, padding, up, bias is not None
        one, none = [1] * len(stride), [0] * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, one, up, none, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        last = torch.channels_last if grad.ndim == 4 else torch.channels_last_3d
        grad = grad.contiguous(memory_format=last)

        def by_torch(x: Tensor, grad: Tensor, wanted: tuple[bool, bool, bool]) -> list[Tensor]:
            one, none = [1] * len(ctx.stride), [0] * len(ctx.stride)
            sizes = [grad.shape[1]] if ctx.has_bias else None
            return list(torch.ops.aten.convolution_backward(grad, x, weight, sizes, ctx.stride, ctx.padding, one, ctx.up, none, 1, wanted))

        grad_x = by_torch(x, grad, (True, False, False))[0] if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            grad_weight = None
        elif grad.shape[1] < NARROW:
            grad_weight = by_torch(x, grad, (False, True, False))[1]
        elif grad.shape[-1] * grad.shape[-2] < SMALL_SLICE:
            # so few voxels that turning them around costs nothing
            grad_weight = by_torch(x.contiguous(), grad.contiguous(), (False, True, False))[1]
        else:
            by_products = _transposed_weights if ctx.up else _weights
            grad_weight = by_products(_rows(x), _rows(grad), weight, ctx.stride, ctx.padding)
        grad_bias = grad.sum((0, *range(2, grad.ndim))) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _rows(x: Tensor) -> Tensor:
    """(b, c, [z,] y, x) -> (b, z, y, x, c), a view of what lies with channels innermost."""
    x = x.movedim(1, -1)
    return (x if x.ndim == 5 else x[:, None]).contiguous()


def _weights(x: Tensor, grad: Tensor, weight: Tensor, stride: Axes, padding: Axes) -> Tensor:
    """Sum over voxels of (what the tap saw) x (gradient there), for every tap of the kernel.

    For a block of rows of one slice, the input is laid out once per tap along x, zeros outside the image; the taps along y
    are that layout read some rows further down (or, with a stride, laid out again), and those along z meet other slices
    of the gradient.
    """
    kernel, (stride_z, stride_y, stride_x), (pad_z, pad_y, pad_x) = _three(weight.shape[2:], 1), _three(stride, 1), _three(padding, 0)
    _, depth, height, width, channels_in = x.shape
    _, depth_out, height_out, width_out, channels_out = grad.shape
    rows = max(1, min(height_out, BLOCK_VOXELS // width_out))
    columns = [_reach(tap - pad_x, stride_x, width, 0, width_out) for tap in range(kernel[2])]

    def summed(blocks: Sequence[tuple[int, int, int]]) -> Tensor:
        out = x.new_zeros(kernel[0], kernel[1], kernel[2] * channels_in, channels_out)
        seen = x.new_zeros(rows + kernel[1] - 1, width_out, kernel[2], channels_in)

        def lay_out(sample: int, z: int, source: slice, target: slice) -> None:
            for tap, (inside, read) in enumerate(columns):
                seen[target, inside, tap] = x[sample, z, source, read]

        def add(tap_z: int, tap_y: int, first: int, count: int, sample: int, z: int, y: int) -> None:
            here = seen[first : first + count].view(count * width_out, -1)
            there = grad[sample, z, y : y + count].view(count * width_out, channels_out)
            torch.addmm(out[tap_z, tap_y], here.t(), there, out=out[tap_z, tap_y])

        for sample, top, z in blocks:
            count = min(rows, height_out - top)
            shifted = [(tap, z + pad_z - tap) for tap in range(kernel[0])]
            meets = [(tap, at // stride_z) for tap, at in shifted if at % stride_z == 0 and 0 <= at // stride_z < depth_out]
            if stride_y == 1:
                low, high = top - pad_y, top - pad_y + count + kernel[1] - 1
                seen[: max(0, -low)] = 0
                seen[max(0, height - low) : high - low] = 0
                lay_out(sample, z, slice(max(low, 0), min(high, height)), slice(max(-low, 0), min(high, height) - low))
            for tap_y in range(kernel[1]):
                first, start, number = tap_y, top, count
                if stride_y > 1:
                    inside, read = _reach(tap_y - pad_y, stride_y, height, top, top + count)
                    first, start, number = 0, inside.start, inside.stop - inside.start
                    lay_out(sample, z, read, slice(0, number))
                for tap_z, z_out in meets if number else ():
                    add(tap_z, tap_y, first, number, sample, z_out, start)
        return out

    total = _over_threads(summed, list(product(range(len(x)), range(0, height_out, rows), range(depth))))
    return total.view(*kernel, channels_in, channels_out).permute(4, 3, 0, 1, 2).reshape(weight.shape)


def _transposed_weights(x: Tensor, grad: Tensor, weight: Tensor, stride: Axes, padding: Axes) -> Tensor:
    """The same where every input voxel makes a box of its own in the output: one matrix product per slice."""
    steps = _three(stride, 1)
    channels_in, channels_out = weight.shape[:2]

    def summed(slices: Sequence[tuple[int, int]]) -> Tensor:
        out = x.new_zeros(channels_in, steps[0] * steps[1] * steps[2] * channels_out)
        for sample, z in slices:
            height, width = x.shape[2:4]
            boxes = grad[sample, z * steps[0] : (z + 1) * steps[0]].reshape(steps[0], height, steps[1], width, -1)
            made = boxes.permute(1, 3, 0, 2, 4).reshape(height * width, -1)
            torch.addmm(out, x[sample, z].view(height * width, channels_in).t(), made, out=out)
        return out

    total = _over_threads(summed, list(product(range(len(x)), range(x.shape[1]))))
    return total.view(channels_in, *steps, channels_out).permute(0, 4, 1, 2, 3).reshape(weight.shape)


def _over_threads(summed: Callable[[Sequence[Item]], Tensor], items: Sequence[Item]) -> Tensor:
    """The sum of `summed` over as many equal parts as torch has threads, one thread each: the products alone are too small
    to be shared out."""
    threads = min(torch.get_num_threads(), len(items))
    if threads == 1:
        return summed(items)

    @torch.no_grad()
    def part(share: Sequence[Item]) -> Tensor:
        # a new thread would record gradients of these, too
        return summed(share)

    ends = [len(items) * part // threads for part in range(threads + 1)]
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = list(pool.map(part, (items[a:b] for a, b in pairwise(ends))))
    # threads that start later take over the last number that was set anywhere
    torch.set_num_threads(before)
    return torch.stack(parts).sum(0)


def _reach(shift: int, stride: int, length: int, start: int, stop: int) -> tuple[slice, slice]:
    """Which outputs of [start, stop) read inside the image, and where: output i reads voxel i * stride + shift."""
    low = max(start, -(shift // stride))
    high = max(low, min(stop, (length - 1 - shift) // stride + 1))
    return slice(low, high), slice(low * stride + shift, (high - 1) * stride + shift + 1 if high > low else low * stride + shift, stride)


def _three(values: Sequence[int], missing: int) -> tuple[int, int, int]:
    """Of two axes or three, (z, y, x)."""
    z, y, x = values if len(values) == 3 else (missing, *values)
    return z, y, x
