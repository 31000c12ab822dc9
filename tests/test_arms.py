"""No dead flags: under every shipped arm the array that its flag is about changes as a closed form says.

In training (with labels) and in inference (without), for 2D and 3D plans, with the same case; the digests of all other
stages stay equal (tests/test_recipe.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ichbench.arms import load_arm, load_preset, shipped
from ichbench.cases.case import Case
from ichbench.cases.phantom import draw_case, make_case
from ichbench.overlays import make_recipe
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.pipeline import flagged_case, prepare_case, restore_logits
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import Recipe

Image = NDArray[np.float32]
HEAD_MM2 = 2000.0


@pytest.fixture(scope="module")
def case() -> Case:
    """A phantom with blood; some air-only slices are added below so that a crop to the head has something to do."""
    drawn = (index for index in range(40) if draw_case(index, "small", 0).bleeds and draw_case(index, "small", 0).spacing_zyx_mm[0] < 4.6)
    found = make_case(next(drawn), "small", 0).case
    air = np.full((1, 2, *found.image_czyx.shape[2:]), -1000, np.float32)
    image = np.concatenate([air, found.image_czyx], axis=1)
    assert found.labels_zyx is not None
    labels = np.concatenate([np.zeros_like(found.labels_zyx[:2]), found.labels_zyx])
    return Case(found.id, image, labels, replace(found.grid, shape_zyx=image.shape[1:], header=None))  # type: ignore[arg-type]


def clip(low: float, high: float) -> Callable[[Case], Image]:
    return lambda case: np.clip(case.image_czyx, low, high)


def blocks(case: Case) -> NDArray[Any]:
    c, z, y, x = case.image_czyx.shape
    return case.image_czyx.reshape(c, z, y // 2, 2, x // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(c, z, y // 2, x // 2, 4)


def spline(case: Case) -> Image:
    from scipy import ndimage

    made = ndimage.zoom(case.image_czyx.astype(np.float64), (1, 1, 0.5, 0.5), order=3, mode="nearest", grid_mode=True)
    slices = case.image_czyx
    low, high = slices.min(axis=(2, 3), keepdims=True), slices.max(axis=(2, 3), keepdims=True)
    return np.clip(made, low, high).astype(np.float32)


def respaced(case: Case) -> Image:
    n, spacing = case.grid.shape_zyx[0], case.grid.spacing_zyx_mm[0]
    new = round(n * spacing / 5.0)
    position = np.clip((np.arange(new) + 0.5) * n / new - 0.5, 0, n - 1)
    below = np.minimum(position.astype(int), n - 2)
    share = (position - below)[None, :, None, None]
    return (case.image_czyx[:, below] * (1 - share) + case.image_czyx[:, below + 1] * share).astype(np.float32)


def head(case: Case) -> Image:
    _, y, x = case.grid.spacing_zyx_mm
    shown = np.flatnonzero((case.image_czyx[0] > 0).sum(axis=(1, 2)) * y * x >= HEAD_MM2)
    return case.image_czyx[:, shown[0] : shown[-1] + 1]


def labelled(case: Case) -> Image:
    if case.labels_zyx is None:
        return case.image_czyx
    shown = np.flatnonzero(case.labels_zyx.any(axis=(1, 2)))
    return case.image_czyx[:, shown[0] : shown[-1] + 1]


def extended(case: Case) -> Image:
    return np.concatenate([case.image_czyx[:, :1], case.image_czyx, case.image_czyx[:, -1:]], axis=1)


#: arm -> what the flags make of the image
CLOSED_FORMS: dict[str, Callable[[Case], Image]] = {
    "base": lambda case: case.image_czyx,
    "window_swapped": clip(11, 107),
    "window_literal": clip(66.5, 125.5),
    "window_multi": lambda case: np.concatenate([np.clip(case.image_czyx, *range_hu) for range_hu in ((0, 80), (-20, 180), (-150, 230))]),
    "threshold": clip(0, 100),
    "downsample": lambda case: blocks(case).mean(axis=-1, dtype=np.float64).astype(np.float32),
    "downsample_max": lambda case: blocks(case).max(axis=-1),
    "downsample_sum": lambda case: blocks(case).sum(axis=-1),
    "downsample_spline": spline,
    "slice_spacing": respaced,
    "slice_crop_head": head,
    "slice_crop_reference": labelled,
    "slice_extension": extended,
}


def flagged(case: Case, name: str, training: bool) -> Image:
    given = case if training else Case(case.id, case.image_czyx, None, case.grid)
    return flagged_case(given, load_arm(name).recipe.prepare)[0].image_czyx


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", sorted(CLOSED_FORMS))
def test_the_flags_make_what_the_closed_form_says(case: Case, name: str, training: bool) -> None:
    given = case if training else Case(case.id, case.image_czyx, None, case.grid)
    made, expected = flagged(case, name, training), CLOSED_FORMS[name](given)
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-3)
    alive = made.shape != case.image_czyx.shape or not np.array_equal(made, case.image_czyx)
    # a crop to the reference has nothing to crop to at test time: that is the leak which its file names
    assert alive == (name != "base" and (training or name != "slice_crop_reference"))


def test_random_pooling_takes_one_voxel_of_each_block(case: Case) -> None:
    made = flagged(case, "downsample_random", training=True)
    assert (blocks(case) == made[..., None]).any(axis=-1).all()
    np.testing.assert_array_equal(made, flagged(case, "downsample_random", training=False))
    assert not np.array_equal(made, blocks(case)[..., 0])


def planned(case: Case, recipe: Recipe) -> Plan:
    neighbours = 0 if recipe.prepare.neighbour_slices == "off" else recipe.prepare.neighbour_slices
    return make_plan(fingerprint([flagged_case(case, recipe.prepare)[0]]), recipe.plan, ("CT",), 2, 24, neighbours)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", sorted(name for name in shipped() if load_arm(name).recipe.inference.predictor == "unet"))
def test_every_arm_prepares_alike_in_training_and_inference_and_comes_back(case: Case, name: str, dims: int) -> None:
    arm = load_arm(name).recipe
    recipe = make_recipe(load_preset("smoke"), {"prepare": arm.prepare.model_dump(), "plan": {"dims": dims}})
    plan = planned(case, recipe)
    trained = prepare_case(case, recipe.prepare, plan)
    seen = prepare_case(Case(case.id, case.image_czyx, None, case.grid), recipe.prepare, plan)
    assert trained.image_czyx.shape[0] == plan.in_channels
    assert np.isfinite(trained.image_czyx).all()
    if arm.prepare.slice_crop != "reference":
        np.testing.assert_array_equal(trained.image_czyx, seen.image_czyx)
    logits = np.random.default_rng(0).normal(size=(2, *seen.image_czyx.shape[1:])).astype(np.float32)
    assert restore_logits(logits, seen.geometry).shape == case.grid.shape_zyx


def test_neighbours_are_the_slices_above_and_below(case: Case) -> None:
    recipe = make_recipe(load_preset("smoke"), {"prepare": {"neighbour_slices": 1}, "plan": {"dims": 2}})
    plan = planned(case, recipe)
    image = prepare_case(case, recipe.prepare, plan).image_czyx
    assert plan.in_channels == 3
    np.testing.assert_array_equal(image[0, 1:], image[1, :-1])
    np.testing.assert_array_equal(image[2, :-1], image[1, 1:])
    np.testing.assert_array_equal(image[0, 0], image[1, 0])


def test_the_2d_arm_has_its_own_plan(case: Case) -> None:
    flat, deep = (planned(case, load_arm(name, "smoke").recipe) for name in ("unet2d", "base"))
    assert (flat.dims, len(flat.patch_size), deep.dims, len(deep.patch_size)) == (2, 2, 3, 3)
    assert flat.batch_size != deep.batch_size
    assert flat.batch_dice
    assert not deep.batch_dice


def test_training_cases_and_deep_supervision_of_superembrace() -> None:
    from ichbench.augmentation.patches import TrainingCase, choose_cases
    from ichbench.network.losses import level_weights

    recipe = load_arm("superembrace").recipe
    cases = [TrainingCase(f"c{i:02d}", np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1), np.int16), {}) for i in range(40)]
    assert len(choose_cases(cases, recipe.training.cases, 0)) == 30
    assert [weight == 0 for weight in level_weights(5, recipe.network.unsupervised_levels)] == [False, False, False, True, True]
    assert [weight == 0 for weight in level_weights(5, Recipe().network.unsupervised_levels)] == [False, False, False, False, True]
