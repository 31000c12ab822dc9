"""Windows and thresholds only clip, in HU, and say so when they erase everything."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.prepare.window import ConstantImageWarning, apply_grey_levels, apply_threshold, apply_window, flagged_channel_names
from ichbench.recipe import PrepareRecipe, Threshold, Window

#: the paper's "width of 59 and a center of 96", read literally and swapped
LITERAL = Window(level_hu=96.0, width_hu=59.0)
SWAPPED = Window(level_hu=59.0, width_hu=96.0)


def ramp() -> NDArray[np.float32]:
    return np.arange(-1024, 2000, dtype=np.float32).reshape(1, 2, 6, 252)


@pytest.mark.parametrize(("window", "low", "high"), [(LITERAL, 66.5, 125.5), (SWAPPED, 11.0, 107.0)])
def test_a_window_clips_to_its_ends_and_rescales_nothing(window: Window, low: float, high: float) -> None:
    image = ramp()
    out = apply_window(image, window)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, np.minimum(np.maximum(image, low), high))
    np.testing.assert_array_equal(out[(image >= low) & (image <= high)], image[(image >= low) & (image <= high)])


def test_several_windows_become_channels_in_their_order() -> None:
    image = np.concatenate([ramp(), -ramp()])
    out = apply_window(image, (LITERAL, SWAPPED), ("CT", "perfusion"))
    assert flagged_channel_names(("CT", "perfusion"), PrepareRecipe(window=(LITERAL, SWAPPED))) == ("CT", "CT", "perfusion")
    np.testing.assert_array_equal(out[0], np.clip(image[0], 66.5, 125.5))
    np.testing.assert_array_equal(out[1], np.clip(image[0], 11, 107))
    np.testing.assert_array_equal(out[2], image[1])


def test_the_threshold_acts_after_the_window_and_on_ct_alone() -> None:
    image = np.concatenate([ramp(), ramp()])
    recipe = PrepareRecipe(window=SWAPPED, threshold=Threshold(low_hu=40.0, high_hu=300.0))
    out, notes = apply_grey_levels(image, recipe, ("ct", "T1"), "a")
    np.testing.assert_array_equal(out[0], np.clip(image[0], 40, 107))
    np.testing.assert_array_equal(out[1], image[1])
    alone = apply_threshold(image, Threshold(low_hu=40.0, high_hu=300.0), ("ct", "T1"))
    np.testing.assert_array_equal(alone[0], np.clip(image[0], 40, 300))
    assert notes == ()


def test_off_returns_the_image_itself() -> None:
    image = ramp()
    assert apply_grey_levels(image, PrepareRecipe(), ("CT",), "a")[0] is image


def test_a_constant_image_is_a_named_warning_and_a_note() -> None:
    image = np.linspace(-20, 60, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    with pytest.warns(ConstantImageWarning, match=r"phe_7: channel 0 is constant \(66.5 HU\) after window level 96 width 59") as caught:
        out, notes = apply_grey_levels(image, PrepareRecipe(window=(LITERAL, SWAPPED)), ("CT",), "phe_7")
    assert len(caught) == 1  # the second window keeps contrast
    assert notes == (str(caught[0].message),)
    assert "[-20, 60] HU" in notes[0]
    assert (out[0] == 66.5).all()
    assert np.ptp(out[1]) == 60 - 11


def test_grey_levels_need_a_ct_channel() -> None:
    with pytest.raises(InputError, match=r"prepare\.window .* needs a CT channel, but the channels are \['T1'\]"):
        apply_window(ramp(), SWAPPED, ("T1",))
    with pytest.raises(InputError, match=r"1 channels, but 2 names"):
        apply_threshold(ramp(), Threshold(low_hu=0.0, high_hu=1.0), ("CT", "T1"))
