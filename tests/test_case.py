from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import affine_of, rotation

from ichbench.cases.case import Case, Grid
from ichbench.errors import InputError


def test_spacing_and_volume_are_those_of_the_affine() -> None:
    grid = Grid((3, 4, 5), affine_of(rotation((0.3, -0.2, 0.9)) @ np.diag([5.0, 0.5, 0.25])))
    assert grid.spacing_zyx_mm == pytest.approx((5.0, 0.5, 0.25))
    assert grid.voxel_ml == pytest.approx(5.0 * 0.5 * 0.25 / 1000)
    assert grid.is_regular


def test_pixdim_wins_over_the_affine_for_distances() -> None:
    assert Grid((1, 1, 1), np.eye(4), pixdim_zyx_mm=(5.0, 0.42, 0.42)).spacing_zyx_mm == (5.0, 0.42, 0.42)


def test_a_sheared_grid_is_irregular_and_its_voxel_volume_is_the_determinant() -> None:
    columns = np.array([[0.0, 0.0, 0.5], [2.0, 0.5, 0.0], [5.0, 0.0, 0.0]])
    grid = Grid((2, 2, 2), affine_of(columns))
    assert not grid.is_regular
    assert grid.voxel_ml == pytest.approx(5.0 * 0.5 * 0.5 / 1000)
    assert not Grid((2, 2, 2), np.eye(4), slice_positions_mm=(0.0, 7.0)).is_regular


def test_axis_codes_of_every_axis_order_and_sign() -> None:
    for order in permutations(range(3)):
        for signs in product((-1, 1), repeat=3):
            columns = np.zeros((3, 3))
            for k, world in enumerate(order):
                columns[world, k] = signs[k] * 2.0
            expected = "".join(("LPI" if signs[k] < 0 else "RAS")[world] for k, world in enumerate(order))
            assert Grid((2, 2, 2), affine_of(rotation((0.2, 0.1, -0.3)) @ columns)).axis_codes_zyx == expected


@given(st.tuples(*[st.floats(-3, 3)] * 3), st.floats(-2e-3, 2e-3))
@settings(max_examples=50)
def test_same_place_is_about_the_farthest_corner(angles: tuple[float, float, float], shift_mm: float) -> None:
    affine = affine_of(rotation(angles) @ np.diag([5.0, 0.5, 0.5]))
    moved = np.array(affine)
    moved[1, 3] += shift_mm
    if abs(abs(shift_mm) - 1e-3) > 1e-9:
        assert Grid((9, 50, 60), affine).same_place(Grid((9, 50, 60), moved)) == (abs(shift_mm) < 1e-3)
    assert not Grid((9, 50, 60), affine).same_place(Grid((9, 50, 61), affine))


def test_resized_maps_its_voxels_to_the_right_places() -> None:
    grid = Grid((10, 20, 30), affine_of(rotation((0.1, 0.2, 0.3)) @ np.diag([5.0, 0.5, 0.4]), (7.0, -3.0, 2.0)))
    step, first = np.array([2.0, 3.0, 0.5]), np.array([1.0, -4.0, 2.5])
    small = grid.resized((4, 5, 6), step, first)
    index = np.array([3.0, 2.0, 5.0])
    expected = grid.affine_4x4 @ np.append(first + step * index, 1.0)
    assert np.allclose(small.affine_4x4 @ np.append(index, 1.0), expected)
    assert small.spacing_zyx_mm == pytest.approx((10.0, 1.5, 0.2))


def test_a_grid_cannot_be_changed_through_its_affine() -> None:
    affine = np.eye(4)
    grid = Grid((1, 1, 1), affine)
    affine[0, 0] = 9.0
    assert grid.affine_4x4[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        grid.affine_4x4[0, 0] = 2.0


@pytest.mark.parametrize("bad", [np.eye(3), np.full((4, 4), np.nan), np.diag([1, np.inf, 1, 1])])
def test_a_grid_needs_a_finite_affine(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="finite 4x4"):
        Grid((1, 1, 1), bad)


def test_a_case_must_fit_its_grid() -> None:
    grid = Grid((2, 3, 4), np.eye(4))
    image = np.zeros((1, 2, 3, 4), dtype=np.float32)
    Case("a", image, np.zeros((2, 3, 4), dtype=np.int16), grid)
    with pytest.raises(InputError, match="image has shape"):
        Case("a", image[0], None, grid)
    with pytest.raises(InputError, match="labels have shape"):
        Case("a", image, np.zeros((4, 3, 2), dtype=np.int16), grid)
