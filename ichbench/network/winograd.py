"""Convolutions of size 3 with fewer multiplications: Winograd's F(4, 3) along two or three axes, for prediction on a CPU.

Four neighbouring outputs of a filter of size 3 need 6 multiplications instead of 12: the filter and 6 inputs are read as
polynomials, their product is taken at the points 0, +-a, +-b and infinity, and put together again (Winograd 1980; Lavin and Gray,
CVPR 2016). Along two axes that is 36 products instead of 144, along three 216 instead of 1728. What is left are matrix products
over channels, one per point, which BLAS does near the speed limit of the processor; going to the points and back costs additions.

The points decide how far rounding errors grow. Those of the textbook, 1 and 2, lose a decimal place; a = sqrt(1/2) and b = sqrt(2),
about which the largest and the smallest factor balance, keep the error of one convolution where oneDNN's direct one has it
(tests/test_winograd.py measures both against float64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

#: squares of the points a and b; A * B = 1
A, B = 0.5, 2.0
ROOT_A, ROOT_B = math.sqrt(A), math.sqrt(B)
#: outputs and points of a tile along one axis
OUTPUTS, POINTS = 4, 6
#: rows of the matrix product of one point: more do not make BLAS faster, but leave the cache
ROWS_AT_ONCE = 64
#: what a layer costs, in nanoseconds of one core, to choose between ways; only their ratios matter (AMD EPYC 7003, AVX2)
FLOP_DIRECT, FLOP_POINT, WEIGHT, ADDITION, CALL = 1 / 95, 1 / 65, 0.4, 0.27, 2500
#: a way with more additions must promise at least so much, for the estimate is rough
WORTH_IT = 0.85

Axes = tuple[int, ...]


class WinogradConv(nn.Module):
    """`conv` (stride 1, "same" padding, one group) without its bias, by Winograd where that is estimated to be faster.

    Takes and gives (batch, channels, *spatial), channels last in memory. For a norm to follow, which takes every constant away.
    The weights at the points are made when a shape first needs them and kept; `conv` must not be trained meanwhile.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv
        self.kernel: Axes = (1,) * (3 - len(conv.kernel_size)) + tuple(conv.kernel_size)
        self.frozen: dict[Axes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        # slices are independent where the filter has one tap along z: one deep volume then, as for the images of a 2D network
        rows = rows.reshape(1, -1, *rows.shape[-3:]) if self.kernel[0] == 1 else rows.contiguous()
        axes = transformed_axes(rows.shape[1:4], self.kernel, self.conv.in_channels, self.conv.out_channels)
        if not axes:
            return self.conv(x)  # type: ignore[no-any-return]
        if axes not in self.frozen:
            self.frozen[axes] = point_weights(self.conv.weight, axes)
        out = convolve(rows, self.frozen[axes], self.kernel, axes)
        return out.reshape(x.shape[0], *x.shape[2:], out.shape[-1]).movedim(-1, 1)


def is_plain(conv: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
    """Whether `conv` has stride 1, one group, sizes of 1 and 3 and "same" padding."""
    if not isinstance(conv, nn.Conv2d | nn.Conv3d) or conv.groups != 1 or set(conv.stride) | set(conv.dilation) != {1}:
        return False
    return set(conv.kernel_size) <= {1, 3} and conv.padding == tuple(size // 2 for size in conv.kernel_size)


def transformed_axes(shape_zyx: Sequence[int], kernel: Axes, channels_in: int, channels_out: int) -> Axes:
    """The axes along which F(4, 3) is estimated to be fastest: (), (0, 1), (0, 1, 2), (1,) or (1, 2); () is the direct convolution."""
    if kernel[1:] != (3, 3):
        return ()
    must = tuple(axis for axis in (0, 1) if kernel[axis] == 3)
    both = channels_in * channels_out
    best: Axes = ()
    least = WORTH_IT * FLOP_DIRECT * 2 * math.prod(kernel) * both * math.prod(shape_zyx)
    for axes in (must, (*must, 2)):
        grid = [-(-n // OUTPUTS) if axis in axes else n + kernel[axis] - 1 for axis, n in enumerate(shape_zyx)]
        products = POINTS ** len(axes) * (1 if 2 in axes else kernel[2])
        rows = math.prod(grid)
        blocks = math.ceil(rows / max(ROWS_AT_ONCE, rows // grid[0]))
        cost = products * both * (2 * FLOP_POINT * rows + WEIGHT) + blocks * CALL * (products + 24 * len(axes))
        # an axis takes 12 additions to or from 6 points; later axes have more to do, for 4 voxels have become 6 points
        elements = math.prod(shape_zyx) * (channels_in + channels_out)
        cost += sum(2 * ADDITION * elements * 1.5 ** (index + 1) for index in range(len(axes)))
        if cost < least:
            best, least = axes, cost
    return best


def point_weights(weight: Tensor, axes: Axes) -> Tensor:
    """Filters (out, in, [z,] y, x) -> their values (points, taps, in, out) at the points; the taps are those along x, if it keeps them."""
    points = [0.0, ROOT_A, -ROOT_A, ROOT_B, -ROOT_B]
    values = [[p**power / math.prod(p - other for other in points if other != p) for power in range(3)] for p in points]
    to_points = torch.tensor([*values, [0.0, 0.0, 1.0]], dtype=torch.float64)
    kernel = (1,) * (5 - weight.ndim) + tuple(weight.shape[2:])
    # one matrix (z points, y points, x points or taps; taps) for all filters: their values are made in one product
    z, y, x = (to_points if axis in axes else torch.eye(size, dtype=torch.float64) for axis, size in enumerate(kernel))
    whole = torch.einsum("az,by,cx->abczyx", z, y, x).permute(*reversed(axes), *(a for a in range(3) if a not in axes), 3, 4, 5)
    channels_out, channels_in = weight.shape[:2]
    filters = weight.detach().reshape(channels_out, channels_in, -1).permute(2, 1, 0).reshape(-1, channels_in * channels_out)
    result = torch.mm(whole.reshape(-1, math.prod(kernel)).to(weight.dtype), filters)
    return result.view(POINTS ** len(axes), -1, channels_in, channels_out)


def convolve(x: Tensor, weights: Tensor, kernel: Axes, axes: Axes) -> Tensor:
    """(samples, z, y, x, channels in) -> (samples, z, y, x, channels out), with zeros about the image.

    `kernel` has 3 or 1 per axis and is 1 along z or y where `axes` leaves them out; `weights` are those of `point_weights`.
    """
    out = x.new_empty(*x.shape[:4], weights.shape[-1])
    rows_of_z = math.prod(-(-x.shape[axis + 1] // OUTPUTS) if axis in axes else x.shape[axis + 1] for axis in (1, 2))
    for samples, lo, hi in _blocks(x.shape[0], x.shape[1], OUTPUTS if 0 in axes else 1, rows_of_z):
        block = _padded(x[samples], lo, hi, kernel, axes)
        shape = (hi - lo, *x.shape[2:4])
        for count, axis in enumerate(axes):
            block = _to_points(block, count + 1 + axis, -(-shape[axis] // OUTPUTS))
        _to_voxels(_products(block, weights, len(axes)), shape, axes, out[samples, lo:hi])
    return out


def _blocks(samples: int, depth: int, unit: int, rows_of_unit: int) -> Iterator[tuple[slice, int, int]]:
    """Samples and slices [lo, hi) that go together so that each point has ROWS_AT_ONCE rows per thread."""
    wanted = -(-ROWS_AT_ONCE * torch.get_num_threads() // rows_of_unit)
    units = -(-depth // unit)
    together = max(1, wanted // units)
    for first in range(0, samples, together):
        for lo in range(0, depth, wanted * unit):
            yield slice(first, first + together), lo, min(depth, lo + wanted * unit)


def _padded(x: Tensor, lo: int, hi: int, kernel: Axes, axes: Axes) -> Tensor:
    """Slices lo to hi with zeros about the image, up to whole tiles."""
    samples, depth, *_, channels = x.shape
    shape = (hi - lo, *x.shape[2:4])
    full = [(-(-n // OUTPUTS) * OUTPUTS if axis in axes else n) + kernel[axis] - 1 for axis, n in enumerate(shape)]
    out = x.new_zeros(samples, *full, channels)
    z, y, u = (size // 2 for size in kernel)
    first, last = max(0, lo - z), min(depth, hi + z)
    out[:, first - lo + z : last - lo + z, y : y + shape[1], u : u + shape[2]] = x[:, first:last]
    return out


def _to_points(x: Tensor, axis: int, tiles: int) -> Tensor:
    """Six inputs of every tile along `axis` -> their values at the six points, (6, ...) with one entry per tile on that axis."""
    d = [x.narrow(axis, first, OUTPUTS * tiles - 3)[(slice(None),) * axis + (slice(None, None, OUTPUTS),)] for first in range(POINTS)]
    out = x.new_empty(POINTS, *d[0].shape)
    even, odd = torch.sub(d[4], d[2], alpha=B), torch.sub(d[3], d[1], alpha=B)
    torch.add(even, odd, alpha=ROOT_A, out=out[1])
    torch.sub(even, odd, alpha=ROOT_A, out=out[2])
    torch.sub(d[5], d[3], alpha=B, out=out[5]).sub_(odd, alpha=A)
    torch.sub(d[2], d[0], alpha=B, out=odd)
    torch.sub(even, odd, alpha=A, out=out[0])
    torch.sub(d[4], d[2], alpha=A, out=even)
    torch.sub(d[3], d[1], alpha=A, out=odd)
    torch.add(even, odd, alpha=ROOT_B, out=out[3])
    torch.sub(even, odd, alpha=ROOT_B, out=out[4])
    return out


def _products(x: Tensor, weights: Tensor, count: int) -> Tensor:
    """Sums over channels (and over the taps along x): one matrix product per point and tap."""
    points, taps, channels_in, channels_out = weights.shape
    values = x.view(points, -1, channels_in)
    rows = values.shape[1] - taps + 1
    out = x.new_empty(points, values.shape[1], channels_out)
    for value, weight, product in zip(values, weights, out[:, :rows], strict=True):
        torch.mm(value[:rows], weight[0], out=product)
        for tap in range(1, taps):
            # a tap along x is the same rows, some voxels on; the last columns of a line then hold nonsense, which is cut off
            product.addmm_(value[tap : tap + rows], weight[tap])
    return out.view(*x.shape[:-1], channels_out)


def _to_voxels(points: Tensor, shape: tuple[int, ...], axes: Axes, out: Tensor) -> None:
    """Values at the points -> four outputs of every tile, axis by axis, the last straight into `out` (samples, z, y, x, channels)."""
    if 2 not in axes:
        points = points.narrow(-2, 0, shape[2])
    for left, axis in reversed(list(enumerate(axes))):
        whole = shape[axis] % OUTPUTS == 0
        grid = list(points.shape[1:])
        grid[left + 1 + axis] *= OUTPUTS
        target = out if left == 0 and whole else points.new_empty(grid)
        _four(points, target, left + 1 + axis)
        points = target if whole else target.narrow(left + 1 + axis, 0, shape[axis])
    if points is not out:
        out.copy_(points)


def _four(m: Tensor, out: Tensor, axis: int) -> None:
    """out[j] = sum of the values at each point times its j-th power, j = 0 to 3; infinity counts for the highest power alone."""
    y = [out[(slice(None),) * axis + (slice(first, None, OUTPUTS),)] for first in range(OUTPUTS)]
    near, far = m[1] + m[2], m[3] + m[4]
    torch.add(m[0], near, out=y[0]).add_(far)
    torch.add(near, far, alpha=B / A, out=near)
    torch.mul(near, A, out=y[2])
    torch.sub(m[1], m[2], out=near).mul_(ROOT_A)
    torch.sub(m[3], m[4], out=far)
    torch.add(near, far, alpha=ROOT_B, out=y[1])
    torch.add(m[5], near, alpha=A, out=y[3]).add_(far, alpha=ROOT_B * B)
