"""The kernels: equal to scipy's n-dimensional spline."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ichbench.prepare.resize import interpolate_axis, nearest_index, resize, resize_matrix

SIZES = st.integers(1, 9)


@given(st.tuples(SIZES, SIZES, SIZES), st.tuples(SIZES, SIZES, SIZES), st.sampled_from([0, 1, 3]), st.integers(0, 99))
@settings(max_examples=60)
def test_resize_equals_scipys_zoom_clipped(before: tuple[int, ...], after: tuple[int, ...], order: int, seed: int) -> None:
    image = np.random.default_rng(seed).normal(size=before)
    factors = [n_out / n_in for n_out, n_in in zip(after, before, strict=True)]
    expected = ndimage.zoom(image, factors, order=order, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resize(image, after, order), np.clip(expected, image.min(), image.max()), atol=1e-12)


def test_resize_equals_scikit_image() -> None:
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is a peer, not a dependency")
    image = np.random.default_rng(3).normal(size=(6, 11, 9))
    for shape in [(9, 13, 11), (3, 20, 4)]:
        for order in (0, 1, 3):
            expected = transform.resize(image, shape, order, mode="edge", anti_aliasing=False)
            np.testing.assert_allclose(resize(image, shape, order), expected, atol=1e-12)


def test_a_stack_is_resized_image_by_image() -> None:
    stack = np.random.default_rng(4).normal(size=(3, 7, 6)) * np.array([1, 10, 100])[:, None, None]
    np.testing.assert_allclose(resize(stack, (3, 11, 5), 3, stacked=True), [resize(one, (11, 5), 3) for one in stack], atol=1e-12)


def test_nearest_index_rounds_halves_up() -> None:
    """golden/resample.out: six slices to nine."""
    assert nearest_index(6, 9).tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]


@pytest.mark.parametrize(("before", "after"), [(3, 700), (70, 33), (71, 300), (300, 71), (512, 470), (130, 131)])
def test_matrices_equal_scipys_kernel_on_long_axes(before: int, after: int) -> None:
    """Built from combs of impulses and cut into blocks; nothing of a weight that float64 can see gets lost."""
    image = np.random.default_rng(before).normal(size=(before, 40)) * 1000
    expected = ndimage.zoom(image, (after / before, 41 / 40), order=3, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resize(image, (after, 41), 3), np.clip(expected, image.min(), image.max()), atol=2e-11, rtol=0)
    impulses = [ndimage.zoom(unit, after / before, order=3, mode="nearest", grid_mode=True) for unit in np.eye(before)[:: before // 3]]
    np.testing.assert_allclose(resize_matrix(before, after, 3)[:, :: before // 3].T, impulses, atol=1e-16, rtol=1e-12)


def test_linear_interpolation_of_a_ramp_is_exact_and_holds_beyond_the_ends() -> None:
    ramp = np.arange(6, dtype=np.float32) * 2
    position = np.array([-3, -0.5, 0, 0.25, 4.75, 5, 5.5, 90])
    volume = np.broadcast_to(ramp[None, :, None], (2, 6, 3)).copy()
    out = interpolate_axis(volume, 1, position)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[1, :, 2], np.clip(position, 0, 5) * 2)
    assert interpolate_axis(volume[:, :1], 1, np.array([0.2, 7.0])).tolist() == [[[0.0] * 3] * 2] * 2
