"""Closed forms of every pooling, of slice spacing, and of the places where the new voxels lie."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.cases.case import Case, Grid
from ichbench.prepare.downsample import POOLING, downsample_case, in_plane_ratio, respace_slices
from ichbench.recipe import Downsample

OBLIQUE = np.array([[0.1, 0.2, -0.45, 3], [0.3, -0.4, 0.1, -7], [5.0, 0.02, 0.01, 40], [0, 0, 0, 1]])


def case(shape: tuple[int, int, int], seed: int = 0, channels: int = 1) -> Case:
    rng = np.random.default_rng(seed)
    image = rng.integers(-100, 100, (channels, *shape)).astype(np.float32)
    return Case(f"case{seed}", image, rng.integers(0, 3, shape).astype(np.int16), Grid(shape, OBLIQUE))


def test_the_table_is_what_the_recipe_allows() -> None:
    assert {*POOLING, "spline"} == set(get_args(Downsample.model_fields["pooling"].annotation))


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=40)
def test_pooling_by_brute_force(z: int, y: int, x: int, factor: int, seed: int) -> None:
    """Also the far edge, which is replicated to a whole block, and the labels: most frequent, ties to the lower."""
    full = case((z, y, x), seed, channels=2)
    assert full.labels_zyx is not None
    out = {name: downsample_case(full, Downsample(factor=factor, pooling=name)) for name in ("max", "average", "sum", "random")}
    rows, columns = -(-y // factor), -(-x // factor)
    for at in np.ndindex(z, rows, columns):
        ys = np.minimum(np.arange(at[1] * factor, (at[1] + 1) * factor), y - 1)
        xs = np.minimum(np.arange(at[2] * factor, (at[2] + 1) * factor), x - 1)
        block = full.image_czyx[:, at[0]][:, ys[:, None], xs].reshape(2, -1)
        assert (out["max"].image_czyx[:, at[0], at[1], at[2]] == block.max(1)).all()
        assert (out["sum"].image_czyx[:, at[0], at[1], at[2]] == block.sum(1)).all()
        np.testing.assert_allclose(out["average"].image_czyx[:, at[0], at[1], at[2]], block.mean(1), rtol=1e-5, atol=1e-5)
        # the same element in every channel
        drawn = out["random"].image_czyx[:, at[0], at[1], at[2]]
        assert any((drawn == column).all() for column in block.T)
        counts = np.bincount(full.labels_zyx[at[0]][ys[:, None], xs].ravel(), minlength=3)
        labels = out["max"].labels_zyx
        assert labels is not None
        assert labels[at] == counts.argmax()
    assert out["max"].grid.shape_zyx == (z, rows, columns)


@pytest.mark.parametrize("pooling", ["max", "average", "sum", "random", "spline"])
def test_voxels_lie_at_the_centres_of_their_blocks(pooling: str) -> None:
    full = case((2, 8, 12))
    small = downsample_case(full, Downsample(factor=4, pooling=pooling))  # type: ignore[arg-type]
    assert small.grid.shape_zyx == (2, 2, 3)
    np.testing.assert_allclose(np.array(small.grid.spacing_zyx_mm), np.array(full.grid.spacing_zyx_mm) * [1, 4, 4])
    for z, y, x in np.ndindex(2, 2, 3):
        centre = full.grid.affine_4x4 @ [z, 4 * y + 1.5, 4 * x + 1.5, 1]
        np.testing.assert_allclose(small.grid.affine_4x4 @ [z, y, x, 1], centre, atol=1e-9)
    assert in_plane_ratio((2, 8, 12), Downsample(factor=4, pooling=pooling)) == (0.25, 0.25)  # type: ignore[arg-type]


def test_the_random_draw_depends_on_the_case_alone() -> None:
    full = case((3, 16, 16))
    draw = Downsample(factor=2, pooling="random")
    first = downsample_case(full, draw).image_czyx
    np.random.default_rng(0).random()
    np.testing.assert_array_equal(first, downsample_case(replace(full, labels_zyx=None), draw).image_czyx)
    assert (first != downsample_case(replace(full, id="another"), draw).image_czyx).any()


def test_spline_takes_any_factor_and_keeps_a_ramp() -> None:
    ramp = np.broadcast_to(np.arange(60, dtype=np.float32), (1, 2, 40, 60)).copy()
    full = Case("ramp", ramp, np.ones((2, 40, 60), np.int16), Grid((2, 40, 60), np.diag([5, 0.5, 0.5, 1])))
    small = downsample_case(full, Downsample(factor=2.5, pooling="spline"))
    assert small.grid.shape_zyx == (2, 16, 24)
    np.testing.assert_allclose(small.grid.spacing_zyx_mm, (5, 1.25, 1.25))
    # away from the replicated edges a cubic spline reproduces a ramp: the value is the position
    np.testing.assert_allclose(small.image_czyx[0, 0, 8, 6:-6], (np.arange(24)[6:-6] + 0.5) * 2.5 - 0.5, atol=1e-2)
    assert small.labels_zyx is not None
    assert (small.labels_zyx == 1).all()


def test_labels_vanish_where_there_were_none() -> None:
    test_case = replace(case((2, 6, 6)), labels_zyx=None)
    assert downsample_case(test_case, Downsample()).labels_zyx is None
    assert respace_slices(test_case, 2.0)[0].labels_zyx is None


@pytest.mark.parametrize(("target", "count"), [(2.5, 8), (10.0, 2), (3.0, 7), (400.0, 1)])
def test_slice_spacing_interpolates_a_ramp_at_its_world_position(target: float, count: int) -> None:
    grid = Grid((4, 2, 2), OBLIQUE @ np.diag([5 / np.linalg.norm(OBLIQUE[:3, 0]), 1, 1, 1]))
    ramp = np.broadcast_to(np.arange(4, dtype=np.float32)[None, :, None, None], (1, 4, 2, 2)).copy()
    new, back = respace_slices(Case("ramp", ramp, np.ones((4, 2, 2), np.int16), grid), target)
    assert new.grid.shape_zyx == (count, 2, 2)
    assert new.grid.spacing_zyx_mm[0] == pytest.approx(20 / count)
    # where each new slice lies in the world says which value it must show (held at the ends)
    to_old = np.linalg.inv(grid.affine_4x4)
    position = np.array([(to_old @ new.grid.affine_4x4 @ [z, 0, 0, 1])[0] for z in range(count)])
    np.testing.assert_allclose(new.image_czyx[0, :, 1, 1], np.clip(position, 0, 3), atol=1e-6)
    to_new = np.linalg.inv(new.grid.affine_4x4)
    np.testing.assert_allclose(back, [(to_new @ grid.affine_4x4 @ [z, 0, 0, 1])[0] for z in range(4)], atol=1e-9)


def test_slice_labels_go_to_the_lower_on_a_tie() -> None:
    labels = np.array([2, 0], dtype=np.int16).reshape(2, 1, 1)
    pair = Case("pair", np.zeros((1, 2, 1, 1), np.float32), labels, Grid((2, 1, 1), np.diag([5.0, 1, 1, 1])))
    merged, _ = respace_slices(pair, 10.0)
    assert merged.labels_zyx is not None
    assert merged.labels_zyx.ravel().tolist() == [0]
    finer, _ = respace_slices(pair, 2.5)
    assert finer.labels_zyx is not None
    assert finer.labels_zyx.ravel().tolist() == [2, 2, 0, 0]


def test_uneven_slices_are_made_even() -> None:
    at_mm = (0.0, 5.0, 10.0, 20.0, 30.0)
    grid = replace(Grid((5, 2, 2), np.diag([5.0, 1, 1, 1])), slice_positions_mm=at_mm)
    image = np.broadcast_to(np.array(at_mm, np.float32)[None, :, None, None], (1, 5, 2, 2)).copy()
    even, back = respace_slices(Case("gap", image, None, grid), 5.0)
    assert even.grid.is_regular
    np.testing.assert_allclose(even.image_czyx[0, :, 0, 0], np.arange(0, 31, 5))
    np.testing.assert_allclose(back * even.grid.spacing_zyx_mm[0], at_mm)
    assert respace_slices(Case("gap", image, None, grid), None)[0].grid.shape_zyx[0] == 5  # median gap 7.5 mm
