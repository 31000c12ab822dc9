"""The two U-Nets of nnU-Net, "PlainConvUNet" and "ResidualEncoderUNet", 2D and 3D from one class.

Encoder: stages of convolution blocks (plain), or one convolution block and then stages of residual blocks; the first
block of a stage is strided. Decoder, the same for both: transposed conv whose kernel is the stride it undoes,
concatenated with the encoder's features as (up, skip), then convolution blocks. Every decoder level has a 1x1 head; with
deep supervision all of them are trained.
Source: Isensee et al., Nature Methods 2021 and MICCAI 2024; dynamic-network-architectures d35f85c7, facts section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from isal import isal_zlib
from torch import Tensor, nn

from ichbench.errors import InputError
from ichbench.network.blocks import BLOCKS, CONV, UP_CONV, Axes, ConvBlock, ResidualBlock, stage
from ichbench.network.conv import convolve
from ichbench.network.norm import BatchNormAct, NormAct
from ichbench.recipe import NetworkRecipe

#: beyond these a plan is a mistake, or made to exhaust the machine (nnU-Net's largest have 512 features and 40 blocks)
MOST_FEATURES, MOST_BLOCKS = 2**15, 1000
CHANNELS_LAST: dict[int, Any] = {2: torch.channels_last, 3: torch.channels_last_3d}


class Topology(Protocol):
    """The part of a plan that a network is made of; spatial tuples follow the plan's axes (z, y, x) or (y, x)."""

    @property
    def dims(self) -> int: ...
    @property
    def family(self) -> str: ...
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
    @property
    def convs_per_stage(self) -> Sequence[int]:
        """Blocks of each encoder stage."""

    @property
    def decoder_convs(self) -> Sequence[int]:
        """Convolution blocks of each decoder level, in nnU-Net's order: the deepest level first."""


class Join(nn.Module):
    """Features of the decoder, then of the encoder, as channels of one array."""

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        return torch.cat((up, skip), dim=1)


class UNet(nn.Module):
    """Maps (batch, channels, *patch) to logits (batch, classes, *patch).

    While training with deep supervision it returns a list, one entry per decoder level, the highest resolution first.
    Every axis of the input must be a multiple of the product of that axis' strides.
    Parameters are named [stem.]encoder.S.I, up.L, decoder.L.I and heads.L, with level L = 0 the highest resolution.
    """

    def __init__(self, plan: Topology, recipe: NetworkRecipe) -> None:
        super().__init__()
        dims, features, slope, norm = plan.dims, tuple(plan.features), recipe.leaky_slope, recipe.norm
        self.dims = dims
        self.deep_supervision = recipe.deep_supervision
        one, first = (1,) * dims, plan.in_channels
        self.stem = nn.Identity() if plan.family == "plain" else ConvBlock(dims, first, features[0], plan.kernels[0], one, slope, norm)
        channels = pairwise((first if plan.family == "plain" else features[0], *features))
        down, levels = plan.convs_per_stage, plan.decoder_convs
        if recipe.convs_per_stage != "auto":
            down, levels = [recipe.convs_per_stage] * len(down), [recipe.convs_per_stage] * len(levels)
        stages = zip(channels, plan.kernels, plan.strides, down, strict=True)
        self.encoder = nn.ModuleList(stage(plan.family, dims, c, kernel, stride, n, slope, norm) for c, kernel, stride, n in stages)
        self.join: nn.Module = Join()
        self.up, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, convs in enumerate(reversed(levels)):
            here, below, stride = features[level], features[level + 1], tuple(plan.strides[level + 1])
            self.up.append(UP_CONV[dims](below, here, stride, stride))
            self.decoder.append(stage("plain", dims, (2 * here, here), plan.kernels[level], one, convs, slope, norm))
            self.heads.append(CONV[dims](here, plan.n_classes, 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=CHANNELS_LAST[self.dims])
        x = self.stem(x)
        skips = []
        for blocks in self.encoder:
            x = blocks(x)
            skips.append(x)
        every = self.training and self.deep_supervision
        logits = []
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](self.join(convolve(self.up[level], x), skips[level]))
            if every or level == 0:
                logits.append(convolve(self.heads[level], x))
        return logits[::-1] if every else logits[0]


def make_unet(plan: Topology, recipe: NetworkRecipe, seed: int = 0) -> UNet:
    """A U-Net with He-normal weights (leaky slope 0.01) and zero biases, drawn from `seed` alone.

    Residual blocks start as their input alone: scale and shift of their last norm are 0.
    Raises InputError when the plan has fewer than two stages or its parts do not fit together.
    """
    check_topology(plan)
    # building on the meta device leaves torch's global generator where it was
    with torch.device("meta"):
        network = UNet(plan, recipe)
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, NormAct | BatchNormAct):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, BatchNormAct):
            nn.init.zeros_(module.mean)
            nn.init.ones_(module.variance)
        if isinstance(module, tuple(CONV.values()) + tuple(UP_CONV.values())):
            nn.init.kaiming_normal_(module.weight, a=0.01, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.norm.weight)
    return network.to(memory_format=CHANNELS_LAST[plan.dims])  # type: ignore[call-overload, no-any-return]


def weights_digest(network: nn.Module) -> object:
    """Equal as long as the weights are. Of their content, since torch does not count every change of a tensor: those of fused optimizers
    it does not. 125 MB take some hundredths of a second."""
    return tuple(_crc32(value) for value in (*network.parameters(), *network.buffers()))


def _crc32(value: Tensor) -> int:
    value = value.detach().cpu()
    # as it lies in memory, which for channels last needs no copy
    steps = value.stride()
    in_order = value.permute(sorted(range(value.ndim), key=lambda axis: -steps[axis])).contiguous()
    return isal_zlib.crc32(in_order.reshape(-1).view(torch.uint8).numpy())


def check_topology(plan: Topology) -> None:
    """Raise InputError where the parts of a plan make no network."""
    stages = len(plan.features)
    if stages < 2:
        raise InputError(f"the plan has {stages} stage(s); a U-Net needs at least 2: the images (or plan.patch_size) are too small")
    if plan.family not in BLOCKS:
        raise InputError(f"the plan's family is {plan.family!r}; allowed are {', '.join(BLOCKS)}")
    lengths = {name: len(getattr(plan, name)) for name in ("strides", "kernels", "convs_per_stage")}
    wrong = {name: length for name, length in lengths.items() if length != stages}
    if wrong or len(plan.decoder_convs) != stages - 1:
        said = lengths | {"decoder_convs": len(plan.decoder_convs)}
        raise InputError(f"the plan has {stages} stages, but {said}; one entry per stage (decoder: one less) is needed, so plan again")
    if max(plan.features) > MOST_FEATURES or sum(plan.convs_per_stage) + sum(plan.decoder_convs) > MOST_BLOCKS:
        raise InputError(f"the plan has more than {MOST_FEATURES} features a stage or {MOST_BLOCKS} blocks; no network is that large")
    even = [kernel for kernel in plan.kernels if any(size % 2 == 0 or size < 1 for size in kernel)]
    if even:
        raise InputError(f"the plan has the kernel {tuple(even[0])}; only odd sizes keep the shape of the image")
    if any(step < 1 for stride in plan.strides for step in stride):
        raise InputError(f"the plan has the strides {[tuple(stride) for stride in plan.strides]}; every one must be 1 or more")
    if max(plan.strides[0]) > 1:
        raise InputError(
            f"the plan's first stage has the stride {tuple(plan.strides[0])}, so its answers would be smaller than the image; it must be 1"
        )
