"""Linear resizing equals scipy's kernel bit for bit, and labels follow the stated rule by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn.functional import interpolate

from ichbench.prepare import linear
from ichbench.prepare.linear import linear_rows, linear_taps, resize_labels, resize_linear, single_nearest_index, taps
from ichbench.prepare.resize import nearest_index

SIZES = st.integers(1, 9)
SHAPES = st.tuples(SIZES, SIZES, SIZES)


def zoom(array: np.ndarray, shape: tuple[int, ...], order: int = 1) -> np.ndarray:
    factors = [n_out / n_in for n_out, n_in in zip(shape, array.shape, strict=True)]
    return ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)


@given(SHAPES, SHAPES, st.integers(0, 99))
@settings(max_examples=80)
def test_every_bit_is_scipys(before: tuple[int, int, int], after: tuple[int, int, int], seed: int) -> None:
    image = np.random.default_rng(seed).normal(size=before)
    np.testing.assert_array_equal(resize_linear(image, after), zoom(image, after))


@pytest.mark.parametrize("n_in", [1, 2, 3, 31, 200, 511])
def test_long_axes_too(n_in: int) -> None:
    image = np.random.default_rng(n_in).normal(size=(n_in, 1, 1))
    for n_out in (1, 2, 7, 199, 512, 640):
        np.testing.assert_array_equal(resize_linear(image, (n_out, 1, 1)), zoom(image, (n_out, 1, 1)))


def test_an_axis_may_be_nearest_and_the_type_stays() -> None:
    image = np.random.default_rng(1).normal(size=(5, 6, 7)).astype(np.float16)
    for axis in range(3):
        shape = (8, 4, 9)
        index = nearest_index(image.shape[axis], shape[axis])
        chosen = image.take(index, axis=axis).astype(np.float64)
        out = resize_linear(image, shape, axis)
        assert out.dtype == np.float16
        np.testing.assert_array_equal(out, zoom(chosen, shape).astype(np.float16))


def test_rows_are_the_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(2).normal(size=(11, 5, 6)).astype(np.float32)
    shape = (17, 8, 3)
    whole = resize_linear(image, shape)
    axes = linear_taps(image.shape, shape, None)
    for start, stop in ((0, 1), (3, 9), (16, 17)):
        np.testing.assert_array_equal(linear_rows(image.__getitem__, axes, start, stop).astype(np.float32), whole[start:stop])
    monkeypatch.setattr(linear, "PIECE", 1)  # one row at a time
    np.testing.assert_array_equal(resize_linear(image, shape), whole)


def test_equal_neighbours_give_their_value() -> None:
    """Weights that do not add up to 1 in float64 must not show in the type that came."""
    for n_out in range(1, 60):
        out = resize_linear(np.full((7, 1, 3), 0.1, np.float32), (n_out, 1, 5))
        assert np.unique(out).tolist() == [np.float32(0.1)]
    assert not taps(5, 5).apart


@given(st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60)
def test_labels_by_brute_force(before: tuple[int, int], after: tuple[int, int], n: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(-1, n, before).astype(np.int16)
    out = resize_labels(labels, after)
    if before == after:
        assert out is labels
        return
    values = np.unique(labels)
    heights = [zoom((labels == value) * 1.0, after) for value in values]
    nearest = labels[np.ix_(nearest_index(before[0], after[0]), nearest_index(before[1], after[1]))]
    for at in np.ndindex(*after):
        here = [height[at] for height in heights]
        tied = [int(value) for value, height in zip(values, here, strict=True) if height == max(here)]
        assert out[at] == (nearest[at] if nearest[at] in tied else min(tied))
    assert out.dtype == np.int16


@pytest.mark.parametrize("seed", range(6))
def test_large_label_maps_with_much_of_one_label(seed: int) -> None:
    """Where only some of the volume is contested, the shortcut around the rest changes nothing."""
    rng = np.random.default_rng(seed)
    shape, after = tuple(rng.integers(8, 40, 3)), tuple(int(n) for n in rng.integers(5, 55, 3))
    labels = np.full(shape, rng.integers(-1, 2), dtype=np.int16)
    for _ in range(int(rng.integers(0, 4))):
        low = [int(rng.integers(n)) for n in shape]
        labels[tuple(slice(a, a + int(rng.integers(1, 9))) for a in low)] = rng.integers(-1, 5)
    values = np.unique(labels)
    heights = np.stack([zoom((labels == value) * 1.0, after) for value in values])
    nearest = labels[np.ix_(*(nearest_index(a, b) for a, b in zip(shape, after, strict=True)))]
    expected = values[heights.argmax(axis=0)]
    height_of_nearest = np.take_along_axis(heights, np.searchsorted(values, nearest)[None], axis=0)[0]
    expected = np.where(height_of_nearest == heights.max(axis=0), nearest, expected)
    np.testing.assert_array_equal(resize_labels(labels, after), expected)


def test_a_three_way_tie_that_the_nearest_label_lost_goes_to_the_lowest() -> None:
    block = np.array([3, 1, 1, 1, 2, 2, 2, 3], dtype=np.int16).reshape(2, 2, 2)
    assert resize_labels(block, (1, 1, 1)).item() == 1


@given(SHAPES, SHAPES, st.integers(0, 99), st.sampled_from([None, 0, 2]))
@settings(max_examples=80)
def test_torchs_rule(before: tuple[int, int, int], after: tuple[int, int, int], seed: int, nearest_axis: int | None) -> None:
    """torch itself, a last bit apart: processors differ in how they add."""
    image = np.random.default_rng(seed).normal(size=before).astype(np.float32)
    expected = image
    if nearest_axis is not None:
        shape = [*before]
        shape[nearest_axis] = after[nearest_axis]
        expected = interpolate(torch.from_numpy(image)[None, None], shape, mode="nearest-exact")[0, 0].numpy()
    expected = interpolate(torch.from_numpy(expected)[None, None], after, mode="trilinear")[0, 0].numpy()
    np.testing.assert_allclose(resize_linear(image, after, nearest_axis, single=True), expected, atol=1e-5)


@pytest.mark.parametrize("n_in", [1, 2, 3, 31, 200, 511])
def test_places_of_torchs_rule_on_long_axes(n_in: int) -> None:
    """A ramp shows the places: within one rounding of them, which is far less than what double precision would be off."""
    ramp = np.arange(n_in, dtype=np.float32).reshape(-1, 1, 1)
    for n_out in (1, 2, 7, 199, 512, 640, 7 * n_in):
        expected = interpolate(torch.from_numpy(ramp)[None, None], (n_out, 1, 1), mode="trilinear")[0, 0, :, 0, 0].numpy()
        np.testing.assert_allclose(resize_linear(ramp, (n_out, 1, 1), single=True)[:, 0, 0], expected, rtol=2e-7, atol=1e-6)
        nearest = interpolate(torch.from_numpy(ramp)[None, None], (n_out, 1, 1), mode="nearest-exact")[0, 0, :, 0, 0].numpy()
        np.testing.assert_array_equal(single_nearest_index(n_in, n_out), nearest.astype(int))


@given(SHAPES, SHAPES, st.integers(0, 999), st.integers(2, 5))
@settings(max_examples=80)
def test_labels_by_torchs_rule(before: tuple[int, int, int], after: tuple[int, int, int], seed: int, n: int) -> None:
    """Brute force over whole volumes: a thousand times each indicator in half precision, the lowest of the largest."""
    labels = np.random.default_rng(seed).integers(-1, n, before).astype(np.int16)
    values = np.unique(labels)
    ours = resize_labels(labels, after, single=True)
    if after == before:
        np.testing.assert_array_equal(ours, labels)
        return
    heights = np.stack([resize_linear(np.float32(1000) * (labels == value), after, single=True) for value in values]).astype(np.float16)
    np.testing.assert_array_equal(ours, values[heights.argmax(0)])


def test_labels_of_equal_height_go_to_the_lowest() -> None:
    """Half way between 2 and 1: scipy's rule takes the nearest neighbour's, torch's the lower."""
    labels = np.array([[[2, 1]]], np.int16)
    assert resize_labels(labels, (1, 1, 3)).tolist() == [[[2, 1, 1]]]
    assert resize_labels(labels[..., ::-1].copy(), (1, 1, 3)).tolist() == [[[1, 2, 2]]]
    for stored in (labels, labels[..., ::-1].copy()):
        assert resize_labels(stored, (1, 1, 3), single=True)[0, 0, 1] == 1
