"""What both U-Nets are built of: a convolution block, a residual block, and a stage of either. 2D and 3D from one code.

Source: Isensee et al., Nature Methods 2021 and MICCAI 2024; He et al., CVPR 2019 (residual block "D"); facts section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ichbench.compute import must_repeat
from ichbench.network.conv import convolve
from ichbench.network.norm import NORMS

Axes = Sequence[int]

CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
UP_CONV: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MEAN_POOL: dict[int, Any] = {2: F.avg_pool2d, 3: F.avg_pool3d}

#: the slope with which a norm and its activation are a norm alone
NO_ACTIVATION = 1.0


class ConvBlock(nn.Module):
    """conv - norm - leaky ReLU; "same" padding."""

    def __init__(
        self,
        dims: int,
        channels_in: int,
        channels_out: int,
        kernel: Axes,
        stride: Axes,
        leaky_slope: float,
        norm: str = "instance",
        bias: bool = True,
    ) -> None:
        super().__init__()
        padding = tuple((k - 1) // 2 for k in kernel)
        self.conv = CONV[dims](channels_in, channels_out, tuple(kernel), tuple(stride), padding, bias=bias)
        self.norm = NORMS[norm](channels_out, leaky_slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolve(self.conv, x))  # type: ignore[no-any-return]


class MeanPool(nn.Module):
    """The mean over the stride's boxes."""

    def __init__(self, stride: Axes) -> None:
        super().__init__()
        self.stride = tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        # torch has no gradient of its 3D pooling that repeats itself on a GPU
        return box_mean(x, self.stride) if must_repeat(x.device) else MEAN_POOL[len(self.stride)](x, self.stride, self.stride)


def box_mean(x: Tensor, stride: Axes) -> Tensor:
    """(b, c, *spatial), lengths being multiples of the stride -> the mean over each box of the stride's size."""
    for axis, step in enumerate(stride, start=2):
        x = x.reshape(*x.shape[:axis], -1, step, *x.shape[axis + 1 :]).mean(axis + 1)
    return x


class ResidualBlock(nn.Module):
    """conv block - conv - norm, plus the input, then leaky ReLU.

    Where the block strides, the input is averaged over the stride's boxes; where it changes the channel count, a 1x1 conv
    without bias and a norm follow. Neither: the input itself.
    """

    def __init__(
        self, dims: int, channels_in: int, channels_out: int, kernel: Axes, stride: Axes, leaky_slope: float, norm: str = "instance"
    ) -> None:
        super().__init__()
        one = (1,) * dims
        self.conv1 = ConvBlock(dims, channels_in, channels_out, kernel, stride, leaky_slope, norm)
        self.conv2 = ConvBlock(dims, channels_out, channels_out, kernel, one, NO_ACTIVATION, norm)
        self.shrink = MeanPool(stride) if max(stride) > 1 else nn.Identity()
        projects = channels_in != channels_out
        self.project = ConvBlock(dims, channels_in, channels_out, one, one, NO_ACTIVATION, norm, bias=False) if projects else nn.Identity()
        self.leaky_slope = leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        added = self.conv2(self.conv1(x)) + self.project(self.shrink(x))
        return F.leaky_relu(added, self.leaky_slope, inplace=True)


#: family of a plan -> its block
BLOCKS: dict[str, type[ConvBlock | ResidualBlock]] = {"plain": ConvBlock, "residual": ResidualBlock}


def stage(
    family: str, dims: int, channels: tuple[int, int], kernel: Axes, stride: Axes, blocks: int, leaky_slope: float, norm: str
) -> nn.Sequential:
    """`blocks` blocks; the first changes the channel count and carries the stride."""
    channels_in, channels_out = channels
    block, one = BLOCKS[family], (1,) * dims
    first = block(dims, channels_in, channels_out, kernel, stride, leaky_slope, norm)
    return nn.Sequential(first, *(block(dims, channels_out, channels_out, kernel, one, leaky_slope, norm) for _ in range(blocks - 1)))
