"""Grey-level window and threshold of CT channels (the first two flags).

Both only clip: a voxel outside the range gets the nearer end, in HU. Nothing is rescaled to 0..1, because nnU-Net's
normalisation follows and would undo any shift and scale; what a window changes is what can no longer be told apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.recipe import PrepareRecipe, Threshold, Window


class ConstantImageWarning(UserWarning):
    """A preparation left a channel without any contrast: every voxel has one value, so nothing can be learnt from it."""


def is_ct(channel_name: str) -> bool:
    """Is the channel in HU? nnU-Net's rule: its name is "ct" in any case of letters."""
    return channel_name.casefold() == "ct"


def windows_of(recipe: PrepareRecipe) -> tuple[Window, ...]:
    """The recipe's windows as a tuple; empty when the flag is off."""
    if recipe.window == "off":
        return ()
    return (recipe.window,) if isinstance(recipe.window, Window) else tuple(recipe.window)


def flagged_channel_names(channel_names: Sequence[str], recipe: PrepareRecipe) -> tuple[str, ...]:
    """Names of the channels after the window flag: a CT channel appears once per window, in the recipe's order."""
    copies = max(1, len(windows_of(recipe)))
    return tuple(name for name in channel_names for _ in range(copies if is_ct(name) else 1))


def apply_window(
    image_czyx: NDArray[np.float32], window: Window | Sequence[Window], channel_names: Sequence[str] = ("CT",)
) -> NDArray[np.float32]:
    """Clip each CT channel to [level - width/2, level + width/2]; with several windows, one output channel per window.

    Other channels pass unchanged. Output (channels, z, y, x) in the order of `flagged_channel_names`.
    """
    windows = (window,) if isinstance(window, Window) else tuple(window)
    channels: list[NDArray[np.float32]] = []
    for name, channel in zip(_checked(image_czyx, channel_names, "window"), image_czyx, strict=True):
        channels += [_clip(channel, one.low_hu, one.high_hu) for one in windows] if is_ct(name) else [channel]
    return np.stack(channels)


def apply_threshold(image_czyx: NDArray[np.float32], threshold: Threshold, channel_names: Sequence[str] = ("CT",)) -> NDArray[np.float32]:
    """Clip each CT channel to [low_hu, high_hu]; other channels pass unchanged."""
    names = _checked(image_czyx, channel_names, "threshold")
    pairs = zip(names, image_czyx, strict=True)
    return np.stack([_clip(channel, threshold.low_hu, threshold.high_hu) if is_ct(name) else channel for name, channel in pairs])


def apply_grey_levels(
    image_czyx: NDArray[np.float32], recipe: PrepareRecipe, channel_names: Sequence[str], case_id: str
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Window, then threshold, as the recipe says; returns the image and a note for every channel left constant.

    Each note is also raised as a `ConstantImageWarning`.
    """
    image = image_czyx
    names = tuple(channel_names)
    done: list[str] = []
    if recipe.window != "off":
        image = apply_window(image, windows_of(recipe), names)
        names = flagged_channel_names(names, recipe)
        done += [
            f"window level {one.level_hu:g} width {one.width_hu:g} ([{one.low_hu:g}, {one.high_hu:g}] HU)" for one in windows_of(recipe)
        ]
    if recipe.threshold != "off":
        image = apply_threshold(image, recipe.threshold, names)
        done.append(f"threshold [{recipe.threshold.low_hu:g}, {recipe.threshold.high_hu:g}] HU")
    if not done:
        return image, ()
    source = [channel for name, channel in zip(channel_names, image_czyx, strict=True) if is_ct(name)]
    low, high = min(float(one.min()) for one in source), max(float(one.max()) for one in source)
    notes = [
        f"case {case_id}: channel {index} is constant ({channel.flat[0]:g} HU) after {', '.join(done)}; the CT spans [{low:g}, {high:g}] HU"
        for index, (name, channel) in enumerate(zip(names, image, strict=True))
        if is_ct(name) and channel.min() == channel.max()
    ]
    for note in notes:
        warn_constant(note)
    return image, tuple(notes)


def warn_constant(note: str) -> None:
    """Raise a note as a `ConstantImageWarning`, so that it is seen even where nobody reads the notes."""
    warnings.warn(note, ConstantImageWarning, stacklevel=3)


def _clip(channel: NDArray[np.float32], low_hu: float, high_hu: float) -> NDArray[np.float32]:
    return np.clip(channel, np.float32(low_hu), np.float32(high_hu))


def _checked(image_czyx: NDArray[np.float32], channel_names: Sequence[str], flag: str) -> Sequence[str]:
    if len(channel_names) != len(image_czyx):
        raise InputError(f"the image has {len(image_czyx)} channels, but {len(channel_names)} names are declared: {list(channel_names)}")
    if not any(is_ct(name) for name in channel_names):
        raise InputError(
            f"prepare.{flag} is given in HU and needs a CT channel, but the channels are {list(channel_names)}; "
            f"name the CT channel 'CT' or set {flag} = 'off'"
        )
    return channel_names
