"""Slice crop, extension, neighbours and orientation, by closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ichbench.cases.case import Case, Grid
from ichbench.prepare.slices import HEAD_AREA_MM2, cover, head_range, neighbours, oriented, permuted, reference_range, take_slices


def numbered(n: int, labels: list[int] | None = None) -> Case:
    """Slice z holds the value 10 z."""
    image = np.broadcast_to(10 * np.arange(n, dtype=np.float32)[None, :, None, None], (1, n, 3, 4)).copy()
    mask = None if labels is None else np.broadcast_to(np.array(labels, np.int16)[:, None, None], (n, 3, 4)).copy()
    return Case("numbered", image, mask, Grid((n, 3, 4), np.diag([5.0, 0.5, 0.5, 1])))


def test_head_range_counts_area_above_0_hu_in_mm2() -> None:
    ct = np.full((6, 100, 100), -1000, np.float32)
    side = int(np.sqrt(HEAD_AREA_MM2)) + 1  # at 1 mm pixels this square is just large enough
    for z in (2, 4):
        ct[z, :side, :side] = 40
    ct[0, :20, :20] = 800  # a head holder
    assert head_range(ct, (5.0, 1.0, 1.0)) == (2, 5)  # the thin slice between stays
    assert head_range(ct, (5.0, 0.9, 1.0)) == (0, 6)  # too small everywhere: the whole volume
    assert head_range(np.zeros_like(ct), (5.0, 1.0, 1.0)) == (0, 6)


def test_reference_range_needs_labels() -> None:
    assert reference_range(numbered(6, [0, 0, 1, 0, 2, 0]).labels_zyx, 6) == (2, 5)
    assert reference_range(numbered(6, [0] * 6).labels_zyx, 6) == (0, 6)
    assert reference_range(None, 6) == (0, 6)


def test_extension_shows_real_neighbours_first_and_then_the_edge_again() -> None:
    case = numbered(6, [0, 1, 2, 3, 4, 5])
    out = take_slices(case, 1, 4, extension=3)
    assert out.image_czyx[0, :, 0, 0].tolist() == [0, 0, 0, 10, 20, 30, 40, 50, 50]
    assert out.labels_zyx is not None
    assert out.labels_zyx[:, 0, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5]
    # slice 2 of the result is slice 0 of the case, wherever that lies in the world
    np.testing.assert_allclose(out.grid.affine_4x4 @ [2, 0, 0, 1], case.grid.affine_4x4 @ [0, 0, 0, 1])
    assert take_slices(case, 0, 6) is case


def test_without_a_crop_the_edge_slices_are_repeated() -> None:
    out = take_slices(numbered(3), 0, 3, extension=2)
    assert out.image_czyx[0, :, 0, 0].tolist() == [0, 0, 0, 10, 20, 20, 20]
    assert out.labels_zyx is None


def test_cover_maps_a_crop_to_resampled_slices() -> None:
    assert cover((1, 4), np.arange(6.0), 6) == (1, 4)
    half = (np.arange(6) + 0.5) / 2 - 0.5  # twice as thick
    assert cover((1, 4), half, 3) == (0, 3)  # slices 1..3 lie at 0.25..1.25, which new slices 0..2 span
    double = (np.arange(6) + 0.5) * 2 - 0.5  # twice as thin
    assert cover((0, 6), double, 12) == (0, 12)


@pytest.mark.parametrize("n", [1, 2])
def test_neighbours_are_shifted_copies(n: int) -> None:
    image = np.random.default_rng(0).normal(size=(2, 5, 3, 3)).astype(np.float32)
    out = neighbours(image, n)
    assert out.shape == (2 * (2 * n + 1), 5, 3, 3)
    for offset in range(-n, n + 1):
        for channel in range(2):
            for z in range(5):
                expected = image[channel, min(max(z + offset, 0), 4)]
                np.testing.assert_array_equal(out[(offset + n) * 2 + channel, z], expected)
    assert neighbours(image, 0) is image


def test_orientation_moves_voxels_and_not_the_patient() -> None:
    rng = np.random.default_rng(5)
    # rows right, anterior, superior; columns z, y, x: z to inferior, y to right, x to anterior
    affine = np.array([[0, 0.5, 0, 1], [0, 0, 0.4, 2], [-5, 0, 0, 3], [0, 0, 0, 1]], dtype=np.float64)
    image, labels = rng.normal(size=(2, 4, 3, 5)).astype(np.float32), rng.integers(0, 3, (4, 3, 5)).astype(np.int16)
    case = Case("turned", image, labels, Grid((4, 3, 5), affine))
    new, axes, flips = oriented(case)
    assert (axes, flips) == ((0, 2, 1), (True, True, True))
    np.testing.assert_allclose(new.grid.direction_3x3, [[0, 0, -1], [0, -1, 0], [1, 0, 0]], atol=1e-12)
    back = np.linalg.inv(case.grid.affine_4x4) @ new.grid.affine_4x4
    assert new.labels_zyx is not None
    assert case.labels_zyx is not None
    for at in np.ndindex(*new.grid.shape_zyx):
        old = tuple(np.rint(back @ [*at, 1])[:3].astype(int))
        np.testing.assert_array_equal(new.image_czyx[(slice(None), *at)], case.image_czyx[(slice(None), *old)])
        assert new.labels_zyx[at] == case.labels_zyx[old]
    again, axes, flips = oriented(new)
    assert (axes, flips) == ((0, 1, 2), (False, False, False))
    np.testing.assert_array_equal(again.image_czyx, new.image_czyx)


def test_permuting_axes_keeps_the_world() -> None:
    case = numbered(6, list(range(6)))
    case = replace(case, grid=replace(case.grid, pixdim_zyx_mm=(5.0, 0.5, 0.25)))
    new = permuted(case, (2, 0, 1))
    assert new.grid.shape_zyx == (4, 6, 3)
    assert new.grid.spacing_zyx_mm == (0.25, 5.0, 0.5)
    np.testing.assert_allclose(new.grid.affine_4x4 @ [3, 1, 2, 1], case.grid.affine_4x4 @ [1, 2, 3, 1])
    assert new.image_czyx[0, 3, 1, 2] == case.image_czyx[0, 1, 2, 3]
    assert permuted(case, (0, 1, 2)) is case
