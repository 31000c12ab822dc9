"""The nonzero box and its -1, against scipy's own hole filling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ichbench.prepare.crop import FEW, crop_to_nonzero, extent, fill_holes, nonzero_box


@given(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)), st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=80)
def test_against_scipy(shape: tuple[int, int, int], density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = (rng.random((2, *shape)) < density * 0.7) * rng.normal(size=(2, *shape)).astype(np.float32)
    labels = rng.integers(0, 3, shape).astype(np.int16)
    filled = ndimage.binary_fill_holes((image != 0).any(axis=0))
    np.testing.assert_array_equal(fill_holes((image != 0).any(axis=0)), filled)
    cropped, new_labels, box = crop_to_nonzero(image.astype(np.float32), labels)
    found = np.argwhere(filled)
    expected = [(a, b + 1) for a, b in zip(found.min(0), found.max(0), strict=True)] if len(found) else [(0, n) for n in shape]
    assert [tuple(span) for span in box] == expected
    assert extent((image != 0).any(axis=0)) == box
    inside = tuple(slice(*span) for span in expected)
    np.testing.assert_array_equal(cropped, image[(slice(None), *inside)])
    np.testing.assert_array_equal(new_labels, np.where((labels == 0) & ~filled, -1, labels)[inside])
    _, without, _ = crop_to_nonzero(image.astype(np.float32), None)
    np.testing.assert_array_equal(without, np.where(filled, 0, -1)[inside])


@pytest.mark.parametrize("seed", range(8))
def test_few_unset_voxels_are_followed_one_by_one(seed: int) -> None:
    """Chains of unset voxels, some from the border inwards, some closed: below `FEW` another way is taken, with the same result."""
    rng = np.random.default_rng(seed)
    mask = np.ones((20, 31, 28), dtype=bool)
    for _ in range(6):
        at = np.array([rng.integers(n) for n in mask.shape])
        for _ in range(int(rng.integers(1, 50))):
            mask[tuple(at)] = False
            at = np.clip(at + rng.permutation([rng.choice([-1, 1]), 0, 0]), 0, np.array(mask.shape) - 1)
    assert 0 < (~mask).sum() < FEW * mask.size
    expected = ndimage.binary_fill_holes(mask)
    np.testing.assert_array_equal(fill_holes(mask), expected)
    # a transposed volume has another order in memory
    for order in ((2, 1, 0), (1, 0, 2), (2, 0, 1)):
        turned = np.ascontiguousarray(mask.transpose(order)).transpose(np.argsort(order))
        np.testing.assert_array_equal(fill_holes(turned), expected)
    thin = np.ones((1, 300, 1), dtype=bool)
    thin[0, 4] = False
    np.testing.assert_array_equal(fill_holes(thin), ndimage.binary_fill_holes(thin))


def test_an_empty_image_keeps_its_size() -> None:
    box, mask = nonzero_box(np.zeros((1, 2, 3, 4), np.float32))
    assert extent(np.zeros((2, 3, 4), bool)) == box
    assert box == ((0, 2), (0, 3), (0, 4))
    assert not mask.any()
