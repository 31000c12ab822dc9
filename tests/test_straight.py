"""Weighted sums along the axes: against matrices in float64, on both ways through the code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.augmentation.straight import TOGETHER, Mix, at_places, mix, swapped

torch.set_num_threads(1)
LENGTHS = st.integers(1, 2 * TOGETHER + 3)


@settings(max_examples=150)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 40))
def test_swapped_is_a_transpose(n: int, h: int, w: int) -> None:
    """Also of values that a sum would spoil."""
    slices = torch.arange(n * h * w, dtype=torch.float32).reshape(n, h, w)
    slices[0, -1, 0] = torch.inf
    slices[-1, 0, -1] = torch.nan
    assert torch.equal(swapped(slices).nan_to_num(-1, -2), slices.mT.contiguous().nan_to_num(-1, -2))


def random_mix(rng: np.random.Generator, length: int, new: int, taps: int) -> Mix:
    return Mix(rng.integers(length, size=(new, taps)), rng.standard_normal((new, taps)))


def matrix_of(given: Mix, length: int) -> np.ndarray:
    out = np.zeros((len(given.index), length))
    for i, (places, weights) in enumerate(zip(given.index, given.weight, strict=True)):
        for place, weight in zip(places, weights, strict=True):
            out[i, place] += weight
    return out


@settings(max_examples=80)
@given(st.integers(0, 10_000), st.tuples(LENGTHS, LENGTHS, LENGTHS), st.tuples(LENGTHS, LENGTHS, LENGTHS), st.integers(1, 3), st.booleans())
def test_any_mix_is_a_product_of_matrices(
    seed: int, size: tuple[int, int, int], new: tuple[int, int, int], channels: int, slices_stay: bool
) -> None:
    rng = np.random.default_rng(seed)
    volume = rng.standard_normal((channels, *size)).astype(np.float32)
    mixes = [random_mix(rng, length, number, int(rng.integers(1, 6))) for length, number in zip(size, new, strict=True)]
    if slices_stay:
        mixes[0] = at_places(np.arange(size[0], dtype=float), size[0])
    z, y, x = (matrix_of(one, length) for one, length in zip(mixes, size, strict=True))
    expected = np.einsum("Zz,Yy,Xx,czyx->cZYX", z, y, x, volume.astype(float))
    scale = np.einsum("Zz,Yy,Xx,czyx->cZYX", *map(np.abs, (z, y, x)), np.abs(volume)).max() + 1
    for one_by_one in (True, False):
        out = torch.full(expected.shape, torch.nan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ichbench.augmentation.straight.on_cpu", lambda tensor, way=one_by_one: way)
            mix(torch.from_numpy(volume), mixes, out)
            np.testing.assert_allclose(out.numpy(), expected, atol=1e-6 * scale)
            if size == expected.shape[1:]:
                same = torch.from_numpy(volume.copy())
                mix(same, mixes, same)
                assert torch.equal(same, out)


def test_mixing_in_place() -> None:
    """Slices read after others were written."""
    rng = np.random.default_rng(0)
    size = (3 * TOGETHER + 1, 7, 6)
    volume = rng.standard_normal((2, *size)).astype(np.float32)
    mixes = [random_mix(rng, length, length, 3) for length in size]
    out, same = torch.empty(2, *size), torch.from_numpy(volume.copy())
    mix(torch.from_numpy(volume), mixes, out)
    mix(same, mixes, same)
    assert torch.equal(same, out)


def test_places_beyond_the_ends_read_the_ends() -> None:
    volume = torch.tensor([[[[1.0, 3.0, 7.0]]]])
    still = at_places(np.zeros(1), 1)
    out = torch.empty(1, 1, 1, 5)
    mix(volume, [still, still, at_places(np.array([-2.0, 0.25, 1.0, 1.5, 9.0]), 3)], out)
    np.testing.assert_array_equal(out.numpy().ravel(), [1.0, 1.5, 3.0, 5.0, 7.0])
    assert at_places(np.arange(4.0), 4).picks_all(4)
    assert not at_places(np.arange(4.0), 5).picks_all(5)
    assert not at_places(np.arange(4.0) + 0.1, 5).picks_all(4)
