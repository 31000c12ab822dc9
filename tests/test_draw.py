"""The law of augmentation: how often, how much, how two numbers hang together, and what switching one off leaves alone.

Seeds are fixed. Shares are compared within five standard deviations of a binomial, means of uniform numbers within five of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from ichbench.augmentation.draw import (
    AugmentDraw,
    CascadeDraw,
    acts_in_plane,
    draw_augmentation,
    draw_cascade,
    enlarged_zyx,
    rotation_limits,
)
from ichbench.augmentation.patches import sample_generator
from ichbench.errors import InputError
from ichbench.overlays import make_recipe
from ichbench.recipe import AugmentRecipe

CUBE, SLAB, FLAT = (12, 12, 12), (4, 16, 16), (16, 16)
COUNT = 8_000
NAMES = ("rotation", "scaling", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")
GATES: dict[str, Callable[[AugmentDraw], Any]] = {
    "rotation": lambda draw: draw.rotation_degrees,
    "scaling": lambda draw: draw.scale,
    "noise": lambda draw: draw.noise_sd,
    "blur": lambda draw: draw.blur_sigma_zyx or None,
    "brightness": lambda draw: draw.brightness or None,
    "contrast": lambda draw: draw.contrast or None,
    "low_resolution": lambda draw: draw.low_resolution or None,
    "gamma_inverted": lambda draw: draw.gamma_inverted or None,
    "gamma": lambda draw: draw.gamma or None,
}


def draws(recipe: AugmentRecipe, patch: tuple[int, ...], count: int, channels: int = 2) -> list[AugmentDraw]:
    return [draw_augmentation(sample_generator(0, 0, step, 0), recipe, patch, channels) for step in range(count)]


@pytest.fixture(scope="module")
def found() -> list[AugmentDraw]:
    return draws(AugmentRecipe(), CUBE, COUNT)


def assert_share(hits: int, count: int, p: float, what: str) -> None:
    assert abs(hits / count - p) < 5 * math.sqrt(p * (1 - p) / count), f"{what}: {hits} of {count}, expected {p}"


def assert_uniform(values: Sequence[float] | np.ndarray[Any, Any], low: float, high: float, what: str) -> None:
    """Range, mean, variance, and a tenth of the values in each tenth of the range."""
    array = np.asarray(values, dtype=float).ravel()
    n, width = len(array), high - low
    assert low <= array.min() < low + 0.02 * width, what
    assert high - 0.02 * width < array.max() <= high, what
    assert abs(array.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * n), what
    assert abs(array.var() / (width**2 / 12) - 1) < 5 * math.sqrt(0.8 / n), what
    for share in np.histogram(array, 10, (low, high))[0]:
        assert_share(int(share), n, 0.1, what)


def assert_around_one(values: Sequence[float] | np.ndarray[Any, Any], low: float, high: float, what: str) -> None:
    """Below and above 1 with equal chance, uniform on each side."""
    array = np.asarray(values, dtype=float).ravel()
    assert_share(int((array < 1).sum()), len(array), 0.5, what)
    assert_uniform(array[array < 1], low, 1, what)
    assert_uniform(array[array >= 1], 1, high, what)


def test_frequencies(found: list[AugmentDraw]) -> None:
    """nnU-Net's table (facts section 6). Blur and low resolution need one of two channels as well: 3/4 of their gate."""
    expected = {
        "rotation": 0.2,
        "scaling": 0.2,
        "noise": 0.1,
        "blur": 0.2 * 0.75,
        "brightness": 0.15,
        "contrast": 0.15,
        "low_resolution": 0.25 * 0.75,
        "gamma_inverted": 0.1,
        "gamma": 0.3,
    }
    for name, p in expected.items():
        assert_share(sum(GATES[name](draw) is not None for draw in found), COUNT, p, name)
    assert_share(sum(not draw.is_spatial for draw in found), COUNT, 0.64, "neither turned nor scaled")
    for axis in range(3):
        assert_share(sum(draw.mirror_zyx[axis] for draw in found), COUNT, 0.5, f"flip {axis}")


def test_gates_and_flips_are_independent(found: list[AugmentDraw]) -> None:
    rows = [[float(gate(draw) is not None) for gate in GATES.values()] + [float(flip) for flip in draw.mirror_zyx] for draw in found]
    correlation = np.corrcoef(np.array(rows).T) - np.eye(len(GATES) + 3)
    assert np.abs(correlation).max() < 5 / math.sqrt(COUNT)


def test_ranges_and_moments(found: list[AugmentDraw]) -> None:
    angles = np.array([draw.rotation_degrees for draw in found if draw.rotation_degrees])
    for axis in range(3):
        assert_uniform(angles[:, axis], -30, 30, f"angle {axis}")
    assert np.abs(np.corrcoef(angles.T) - np.eye(3)).max() < 5 / math.sqrt(len(angles))
    assert_uniform([draw.scale for draw in found if draw.scale], 0.7, 1.4, "scale")
    assert_uniform([draw.noise_sd for draw in found if draw.noise_sd is not None], 0, 0.1, "noise")
    sigmas = np.array([sigma for draw in found for sigma in draw.blur_sigma_zyx if sigma])
    for axis in range(3):
        assert_uniform(sigmas[:, axis], 0.5, 1, f"sigma {axis}")
    assert np.abs(np.corrcoef(sigmas.T) - np.eye(3)).max() < 5 / math.sqrt(len(sigmas))
    assert_uniform([share for draw in found for share in draw.low_resolution if share], 0.5, 1, "low resolution")
    for name, limits in {
        "brightness": (0.75, 1.25),
        "contrast": (0.75, 1.25),
        "gamma": (0.7, 1.5),
        "gamma_inverted": (0.7, 1.5),
    }.items():
        values = np.array([getattr(draw, name) for draw in found if getattr(draw, name)])
        assert_around_one(values, *limits, what=name)
        assert abs(np.corrcoef(values.T)[0, 1]) < 5 / math.sqrt(len(values)), name
    assert len({draw.noise_seed for draw in found}) == COUNT


def test_channels_are_chosen_one_by_one(found: list[AugmentDraw]) -> None:
    for name in ("blur_sigma_zyx", "low_resolution"):
        drawn = [getattr(draw, name) for draw in found if getattr(draw, name)]
        assert {len(one) for one in drawn} == {2}
        # of those with at least one channel a third has both
        assert_share(sum(None not in one for one in drawn), len(drawn), 1 / 3, name)
    always = draws(AugmentRecipe(blur_probability=1, blur_channel_probability=1), CUBE, 20, channels=3)
    assert all(len(draw.blur_sigma_zyx) == 3 and None not in draw.blur_sigma_zyx for draw in always)


@pytest.mark.parametrize(
    ("patch", "limits"),
    [
        ((16, 48, 48), (30, 30, 30)),
        ((16, 49, 48), (180, 0, 0)),
        ((512, 512), (180, 0, 0)),
        ((512, 256), (15, 0, 0)),
        ((96, 64), (180, 0, 0)),
    ],
)
def test_rotation_limits(patch: tuple[int, ...], limits: tuple[float, ...]) -> None:
    """nnU-Net's rule with its strict comparisons: more than 3 times in 3D, more than 1.5 times in 2D."""
    recipe = AugmentRecipe()
    assert rotation_limits(recipe, patch) == limits
    assert acts_in_plane(recipe, patch) == (limits[1] == 0)
    assert rotation_limits(AugmentRecipe(rotation_degrees=7.0), patch) == tuple(7.0 if limit else 0.0 for limit in limits)
    if len(patch) == 3:
        assert rotation_limits(AugmentRecipe(in_plane=True), patch) == (180, 0, 0)
        assert rotation_limits(AugmentRecipe(in_plane=False), patch) == (30, 30, 30)
        assert {draw.in_plane for draw in draws(AugmentRecipe(in_plane=True), patch, 3)} == {True}


@pytest.mark.parametrize(
    ("patch", "degrees", "box"),
    [
        ((128, 128, 128), 30, (205, 205, 205)),
        ((160, 192, 160), 30, (275, 289, 257)),
        ((96, 160, 160), 30, (191, 257, 219)),
        ((40, 56, 40), 30, (73, 80, 64)),
        ((512, 512), 180, (1, 602, 602)),
        ((512, 256), 15, (1, 659, 301)),
        ((20, 320, 256), 180, (20, 376, 376)),
    ],
)
def test_enlarged_boxes(patch: tuple[int, ...], degrees: float, box: tuple[int, ...]) -> None:
    """The values that nnU-Net printed (facts section 5)."""
    assert enlarged_zyx(AugmentRecipe(), patch) == box
    assert enlarged_zyx(AugmentRecipe(rotation_degrees=degrees), patch) == box


def test_mirror_axes_are_those_of_the_plan() -> None:
    for patch, mirror, expected in (
        (CUBE, True, (1, 1, 1)),
        (SLAB, True, (1, 1, 1)),
        (FLAT, True, (0, 1, 1)),
        (CUBE, False, (0, 0, 0)),
        (CUBE, (2,), (0, 0, 1)),
        (CUBE, (0, 1), (1, 1, 0)),
        (FLAT, (0,), (0, 1, 0)),
        (FLAT, (1,), (0, 0, 1)),
        (CUBE, (), (0, 0, 0)),
    ):
        seen = np.array([draw.mirror_zyx for draw in draws(AugmentRecipe(mirror=mirror), patch, 60)])
        np.testing.assert_array_equal(seen.any(axis=0), np.array(expected, bool))
        assert not seen.all(axis=0).any()


def test_two_dimensions_have_two_axes() -> None:
    everything = AugmentRecipe(**{f"{name}_probability": 1.0 for name in NAMES})
    for draw in draws(everything, FLAT, 20):
        assert draw.in_plane
        assert draw.rotation_degrees is not None
        assert draw.rotation_degrees[1:] == (0, 0)
        assert all(sigma is None or (sigma[0] == 0 and min(sigma[1:]) >= 0.5) for sigma in draw.blur_sigma_zyx)


@pytest.mark.parametrize("name", NAMES)
def test_switching_one_off_leaves_the_others(name: str) -> None:
    recipe = AugmentRecipe(**{f"{one}_probability": 0.7 for one in NAMES})
    whole, part = draws(recipe, CUBE, 60), draws(recipe.model_copy(update={f"{name}_probability": 0.0}), CUBE, 60)
    assert any(GATES[name](draw) is not None for draw in whole)
    assert all(GATES[name](draw) is None for draw in part)
    field = {"rotation": "rotation_degrees", "scaling": "scale", "noise": "noise_sd", "blur": "blur_sigma_zyx"}.get(name, name)
    empty = {one.name: one.default for one in fields(AugmentDraw)}[field]
    assert [replace(draw, **{field: empty}) for draw in whole] == part


def test_limits_on_one_side_of_one() -> None:
    for low, high in ((1.1, 1.3), (0.5, 0.9), (1.0, 1.5), (0.5, 1.0), (1.2, 1.2), (0.8, 0.8), (1.0, 1.0)):
        recipe = AugmentRecipe(brightness_probability=1, brightness=(low, high))
        values = np.array([draw.brightness for draw in draws(recipe, CUBE, 400)])
        assert low <= values.min() <= values.max() <= high
        if high > low:
            assert_share(int((values < (low + high) / 2).sum()), values.size, 0.5, str((low, high)))


@pytest.mark.parametrize("labels", [1, 3])
def test_law_of_the_previous_stage(labels: int) -> None:
    found = [draw_cascade(sample_generator(5, 0, step, 0), AugmentRecipe(), labels) for step in range(COUNT)]
    changed = [draw.morphology for draw in found]
    at_least_one = 1 - 0.5**labels
    assert_share(sum(bool(one) for one in changed), COUNT, 0.4 * at_least_one, "morphology")
    assert_share(sum(bool(draw.remove_component) for draw in found), COUNT, 0.2 * at_least_one, "component")
    every = [entry for one in changed for entry in one]
    assert_uniform([radius for _, _, radius in every], 1, 8, "radius")
    for operation in ("dilate", "erode", "open", "close"):
        assert_share(sum(name == operation for _, name, _ in every), len(every), 0.25, operation)
    for label in range(1, labels + 1):
        assert_share(sum(label in {entry[0] for entry in one} for one in changed), COUNT, 0.2, f"label {label}")
        assert_share(sum(label in {entry[0] for entry in draw.remove_component} for draw in found), COUNT, 0.1, f"label {label}")
    assert_uniform([place for draw in found for _, place in draw.remove_component], 0, 1, "place")
    if labels == 3:
        # any order of the three is as likely
        first = [one[0][0] for one in changed if len(one) == 3]
        for label in (1, 2, 3):
            assert_share(first.count(label), len(first), 1 / 3, "order")
    both = np.corrcoef([bool(one) for one in changed], [bool(draw.remove_component) for draw in found])[0, 1]
    assert abs(both) < 5 / math.sqrt(COUNT)
    off = AugmentRecipe(morphology_probability=0, remove_component_probability=0)
    assert draw_cascade(sample_generator(5, 0, 0, 0), off, labels) == CascadeDraw()


def test_bad_ranges_and_axes_are_refused() -> None:
    for name in ("scaling", "noise_sd", "blur_sigma", "brightness", "contrast", "low_resolution", "gamma", "morphology_radius"):
        low, high = getattr(AugmentRecipe(), name)
        with pytest.raises(InputError, match=f"{name} runs from .* write the smaller number first"):
            make_recipe({"training": {"augment": {name: [max(high, 1.0), max(low, 0.5)]}}})
    with pytest.raises(InputError, match=r"training.augment.mirror names the axes \[2\], but plan.dims = 2"):
        make_recipe({"plan": {"dims": 2}, "training": {"augment": {"mirror": [2]}}})
    with pytest.raises(InputError, match="names an axis twice"):
        make_recipe({"training": {"augment": {"mirror": [1, 1]}}})
    for wrong in (
        {"low_resolution": [0.5, 1.1]},
        {"blur_sigma": [0.0, 1.0]},
        {"morphology_radius": [0.5, 3]},
        {"mirror": [3]},
        {"mirror": 1},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            make_recipe({"training": {"augment": wrong}})
