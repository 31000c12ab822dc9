"""The U-Net of nnU-Net ("PlainConvUNet"), 2D and 3D from one class.

Encoder: stages of conv - instance norm - leaky ReLU, the first conv of a stage strided. Decoder: transposed conv whose
kernel is the stride it undoes, concatenated with the encoder's features as (up, skip), then conv blocks again. Every
decoder level has a 1x1 head; with deep supervision all of them are trained.
Source: Isensee et al., Nature Methods 2021; dynamic-network-architectures d35f85c7, facts section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ichbench.errors import InputError
from ichbench.network.norm import NormAct
from ichbench.recipe import NetworkRecipe

Axes = tuple[int, ...]

CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
UP_CONV: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CHANNELS_LAST: dict[int, Any] = {2: torch.channels_last, 3: torch.channels_last_3d}


class Topology(Protocol):
    """The part of a plan that a network is made of; spatial tuples follow the plan's axes (z, y, x) or (y, x)."""

    @property
    def dims(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def n_classes(self) -> int: ...
    @property
    def features(self) -> Sequence[int]: ...
    @property
    def strides(self) -> Sequence[Axes]: ...
    @property
    def kernels(self) -> Sequence[Axes]: ...


class ConvBlock(nn.Module):
    """conv - instance norm - leaky ReLU; "same" padding."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, kernel: Axes, stride: Axes, leaky_slope: float) -> None:
        super().__init__()
        padding = tuple((k - 1) // 2 for k in kernel)
        self.conv = CONV[dims](channels_in, channels_out, kernel, stride, padding)
        self.norm = NormAct(channels_out, leaky_slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def conv_stage(dims: int, channels: tuple[int, int], kernel: Axes, stride: Axes, recipe: NetworkRecipe) -> nn.Sequential:
    """`convs_per_stage` blocks; the first changes the channel count and carries the stride."""
    channels_in, channels_out = channels
    first = ConvBlock(dims, channels_in, channels_out, kernel, stride, recipe.leaky_slope)
    one = (1,) * dims
    more = (ConvBlock(dims, channels_out, channels_out, kernel, one, recipe.leaky_slope) for _ in range(recipe.convs_per_stage - 1))
    return nn.Sequential(first, *more)


class UNet(nn.Module):
    """Maps (batch, channels, *patch) to logits (batch, classes, *patch).

    While training with deep supervision it returns a list, one entry per decoder level, the highest resolution first.
    Every axis of the input must be a multiple of the product of that axis' strides.
    Parameters are named encoder.S.I, up.L, decoder.L.I and heads.L, with level L = 0 the highest resolution.
    """

    def __init__(self, plan: Topology, recipe: NetworkRecipe) -> None:
        super().__init__()
        dims, features = plan.dims, tuple(plan.features)
        self.dims = dims
        self.deep_supervision = recipe.deep_supervision
        channels = pairwise((plan.in_channels, *features))
        stages = zip(channels, plan.kernels, plan.strides, strict=True)
        self.encoder = nn.ModuleList(conv_stage(dims, c, kernel, stride, recipe) for c, kernel, stride in stages)
        one = (1,) * dims
        self.up, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(len(features) - 1):
            here, below, stride = features[level], features[level + 1], plan.strides[level + 1]
            self.up.append(UP_CONV[dims](below, here, stride, stride))
            self.decoder.append(conv_stage(dims, (2 * here, here), plan.kernels[level], one, recipe))
            self.heads.append(CONV[dims](here, plan.n_classes, 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=CHANNELS_LAST[self.dims])
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        every = self.training and self.deep_supervision
        logits = []
        for level in reversed(range(len(self.decoder))):
            x = torch.cat((self.up[level](x), skips[level]), dim=1)
            x = self.decoder[level](x)
            if every or level == 0:
                logits.append(self.heads[level](x))
        return logits[::-1] if every else logits[0]


def make_unet(plan: Topology, recipe: NetworkRecipe, seed: int = 0) -> UNet:
    """A U-Net with He-normal weights (leaky slope 0.01) and zero biases, drawn from `seed` alone.

    Raises InputError when the plan has fewer than two stages.
    """
    levels = len(plan.features) - 1
    if levels < 1:
        raise InputError(f"the plan has {levels + 1} stage(s); a U-Net needs at least 2: the images (or plan.patch_size) are too small")
    # building on the meta device leaves torch's global generator where it was
    with torch.device("meta"):
        network = UNet(plan, recipe)
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, NormAct):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, tuple(CONV.values()) + tuple(UP_CONV.values())):
            nn.init.kaiming_normal_(module.weight, a=0.01, generator=generator)
            nn.init.zeros_(module.bias)
    return network.to(memory_format=CHANNELS_LAST[plan.dims])  # type: ignore[call-overload, no-any-return]
