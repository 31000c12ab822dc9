"""Intensity normalisation, chosen by channel name as nnU-Net does (facts/nnunet-v2.md, sections 3.5 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError

Channel = NDArray[np.float32]
Mask = NDArray[np.bool_]
SMALLEST = 1e-8
#: what CT normalisation takes from the fingerprint
CT_FACTS = ("percentile_00_5", "percentile_99_5", "mean", "std")


def _ct(channel: Channel, properties: Mapping[str, float], _: Mask | None) -> Channel:
    out: Channel = np.clip(channel, np.float32(properties["percentile_00_5"]), np.float32(properties["percentile_99_5"]))
    out -= np.float32(properties["mean"])
    out /= np.float32(max(properties["std"], SMALLEST))
    return out


def _z_score(channel: Channel, _: Mapping[str, float], inside: Mask | None) -> Channel:
    if inside is None:
        scored: Channel = (channel - channel.mean()) / np.float32(max(float(channel.std()), SMALLEST))
        return scored
    out = channel.copy()
    values = channel[inside]
    if values.size:
        out[inside] = (values - values.mean()) / np.float32(max(float(values.std()), SMALLEST))
    return out


def _none(channel: Channel, _: Mapping[str, float], __: Mask | None) -> Channel:
    return channel


def _rescale_to_01(channel: Channel, _: Mapping[str, float], __: Mask | None) -> Channel:
    out: Channel = channel - channel.min()
    out /= np.float32(max(float(out.max()), SMALLEST))
    return out


def _rgb_to_01(channel: Channel, _: Mapping[str, float], __: Mask | None) -> Channel:
    if channel.min() < 0 or channel.max() > 255:
        span = f"[{channel.min():g}, {channel.max():g}]"
        raise InputError(f"an RGB channel must lie within 0..255, but spans {span}; name it 'zscore' instead")
    return channel / np.float32(255.0)


#: name -> function of (channel, the channel's fingerprint, mask or None)
NORMALIZERS: dict[str, Callable[[Channel, Mapping[str, float], Mask | None], Channel]] = {
    "CTNormalization": _ct,
    "ZScoreNormalization": _z_score,
    "NoNormalization": _none,
    "RescaleTo01Normalization": _rescale_to_01,
    "RGBTo01Normalization": _rgb_to_01,
}

#: casefolded channel name -> scheme; every other name is z-scored
SCHEME_OF_CHANNEL = {
    "ct": "CTNormalization",
    "nonorm": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}


def scheme_of(channel_name: str) -> str:
    """nnU-Net's name of the normalisation for a channel of that name."""
    return SCHEME_OF_CHANNEL.get(channel_name.casefold(), "ZScoreNormalization")


def normalize(
    image_czyx: NDArray[np.float32],
    labels_zyx: NDArray[np.integer],
    schemes: tuple[str, ...],
    use_mask: tuple[bool, ...],
    properties: Mapping[str, Mapping[str, float]],
) -> NDArray[np.float32]:
    """Normalise each channel. A standard deviation of 0 never divides: it counts as 1e-8, so a constant stays finite.

    use_mask    per channel: take statistics and act only where `labels_zyx` >= 0 (inside the nonzero mask)
    properties  channel index as text -> mean, std, percentile_00_5, percentile_99_5 of the training foreground
    """
    if not len(schemes) == len(use_mask) == len(image_czyx):
        raise InputError(f"the image has {len(image_czyx)} channels, but the plan normalises {len(schemes)}")
    out = np.empty(image_czyx.shape, dtype=np.float32)
    for index, (scheme, masked) in enumerate(zip(schemes, use_mask, strict=True)):
        inside = labels_zyx >= 0 if masked else None
        out[index] = NORMALIZERS[scheme](image_czyx[index], properties.get(str(index), {}), inside)
    return out
