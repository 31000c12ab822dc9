"""Intensities: each change against its formula, a loop or scipy.ndimage, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ichbench.augmentation.draw import AugmentDraw
from ichbench.augmentation.intensity import (
    add_noise,
    blur,
    change_contrast,
    change_gamma,
    change_intensity,
    gaussian_kernel,
    lower_resolution,
)

torch.set_num_threads(1)
Volume = NDArray[np.float32]
SHAPES = [(1, 20, 24), (5, 16, 18), (12, 9, 11), (2, 3, 70), (3, 300, 400)]


def volume_of(shape: tuple[int, ...], seed: int = 0, move: float = 0.0) -> Volume:
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + move).astype(np.float32)


def after(volume: Volume, change: Callable[[torch.Tensor], None]) -> NDArray[np.float64]:
    made = torch.from_numpy(volume.copy())
    change(made)
    return made.numpy().astype(np.float64)


def gamma_by_formula(volume: Volume, exponent: float, inverted: bool) -> NDArray[np.float64]:
    x = -volume.astype(np.float64) if inverted else volume.astype(np.float64)
    width = x.max() - x.min()
    y = ((x - x.min()) / max(width, 1e-7)) ** exponent * width + x.min()
    y = (y - y.mean()) * (x.std(ddof=1) / max(y.std(ddof=1), 1e-7)) + x.mean()
    return -y if inverted else y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.5])
def test_gamma(shape: tuple[int, ...], inverted: bool, exponent: float) -> None:
    for move in (0.0, 30.0):
        volume = volume_of(shape, move=move)
        got = after(volume, lambda made: change_gamma(made, exponent, inverted))
        np.testing.assert_allclose(got, gamma_by_formula(volume, exponent, inverted), atol=2e-5 + 3e-6 * move)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.3, 3), st.booleans(), st.floats(-1000, 1000), st.sampled_from([1e-3, 1.0, 100.0]))
def test_gamma_keeps_mean_and_spread_wherever_they_lie(seed: int, exponent: float, inverted: bool, move: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    # skewed, with an outlier: the difference of large sums would be far off
    volume = (rng.gamma(0.7, size=(4, 9, 10)) * scale + move).astype(np.float32)
    volume[0, 0, 0] += 30 * scale
    got = after(volume, lambda made: change_gamma(made, exponent, inverted))
    old = volume.astype(np.float64)
    rounding = 3e-6 * (abs(move) + 40 * scale)
    assert abs(got.mean() - old.mean()) < rounding
    assert abs(got.std(ddof=1) - old.std(ddof=1)) < 2e-3 * old.std(ddof=1) + rounding
    # the order of the voxels stays
    assert np.all(np.diff(got.ravel()[np.argsort(old.ravel(), kind="stable")]) > -2 * rounding)


def test_gamma_of_a_constant_and_of_one_voxel() -> None:
    for volume in (np.full((3, 8, 8), 4.0, np.float32), np.full((1, 1, 1), -2.5, np.float32), np.zeros((2, 4, 4), np.float32)):
        for inverted in (False, True):
            np.testing.assert_allclose(after(volume, lambda made, i=inverted: change_gamma(made, 1.4, i)), volume, atol=1e-6)  # type: ignore[misc]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [0.75, 1.0, 1.25])
def test_contrast(shape: tuple[int, ...], factor: float) -> None:
    volume = volume_of(shape, move=3.0)
    old = volume.astype(np.float64)
    expected = np.clip((old - old.mean()) * factor + old.mean(), old.min(), old.max())
    got = after(volume, lambda made: change_contrast(made, factor))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.min() >= volume.min()
    assert got.max() <= volume.max()


def test_brightness_is_a_factor_per_channel() -> None:
    image = volume_of((2, 4, 8, 8))
    got = after(image, lambda made: change_intensity(made, AugmentDraw(brightness=(0.8, 1.2))))
    np.testing.assert_allclose(got, image * np.array([0.8, 1.2])[:, None, None, None], rtol=1e-6)


@pytest.mark.parametrize(
    ("sigma", "width"), [(0.5, 3), (0.58, 3), (0.584, 5), (0.9, 5), (0.9166, 5), (0.917, 7), (1.0, 7), (0.0, 1), (3.0, 19)]
)
def test_kernel(sigma: float, width: int) -> None:
    """nnU-Net's widths (facts section 6): 3 below 0.583, 5 below 0.917, 7 above."""
    kernel = gaussian_kernel(sigma)
    assert len(kernel) == width
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    if width > 1:
        assert kernel[width // 2 + 1] / kernel[width // 2] == pytest.approx(math.exp(-0.5 / sigma**2))


@settings(max_examples=40)
@given(st.sampled_from(SHAPES[:-1]), st.tuples(*[st.floats(0.5, 2.0)] * 3), st.integers(0, 1000))
def test_blur_equals_scipys(shape: tuple[int, ...], sigmas: tuple[float, float, float], seed: int) -> None:
    """Correlation with the same kernels along each axis, mirrored about the outermost voxels, however short the axis."""
    volume = volume_of(shape, seed)
    expected = volume.astype(np.float64)
    for axis, sigma in enumerate(sigmas):
        expected = scipy.ndimage.correlate1d(expected, gaussian_kernel(sigma), axis=axis, mode="mirror")
    np.testing.assert_allclose(after(volume, lambda made: blur(made, sigmas)), expected, atol=2e-6)


def test_blur_of_a_large_volume_and_of_single_axes() -> None:
    volume = volume_of((7, 200, 310))
    expected = volume.astype(np.float64)
    for axis, sigma in enumerate((0.6, 1.0, 0.5)):
        expected = scipy.ndimage.correlate1d(expected, gaussian_kernel(sigma), axis=axis, mode="mirror")
    np.testing.assert_allclose(after(volume, lambda made: blur(made, (0.6, 1.0, 0.5))), expected, atol=2e-6)
    np.testing.assert_array_equal(after(volume, lambda made: blur(made, (0.0, 0.0, 0.0))), volume)


def low_resolution_by_loop(volume: Volume, share: float, in_plane: bool) -> NDArray[np.float64]:
    """Axis by axis: pick the voxel under the middle of each of m parts, then read it back at half-voxel-aligned places."""
    out = volume.astype(np.float64)
    for axis, n in enumerate(volume.shape):
        m = n if in_plane and axis == 0 else max(1, round(n * share))
        kept = np.take(out, [min(n - 1, int(np.float32(i + 0.5) * np.float32(n / m))) for i in range(m)], axis)
        rows = []
        for i in range(n):
            place = max(0.0, (i + 0.5) * m / n - 0.5)
            low = min(int(place), m - 1)
            high, weight = min(low + 1, m - 1), place - int(place)
            rows.append((1 - weight) * np.take(kept, low, axis) + weight * np.take(kept, high, axis))
        out = np.stack(rows, axis)
    return out


@settings(max_examples=40)
@given(st.sampled_from(SHAPES[:-1]), st.floats(0.05, 1.0), st.booleans(), st.integers(0, 1000))
def test_low_resolution_equals_a_loop(shape: tuple[int, ...], share: float, in_plane: bool, seed: int) -> None:
    volume = volume_of(shape, seed)
    got = after(volume, lambda made: lower_resolution(made, share, in_plane, (False, False, False)))
    np.testing.assert_allclose(got, low_resolution_by_loop(volume, share, in_plane), atol=1e-5)


@pytest.mark.parametrize("flips", [(True, False, False), (False, True, True), (True, True, True)])
def test_low_resolution_commutes_with_mirroring(flips: tuple[bool, bool, bool]) -> None:
    """Also where two voxels tie, for which it has to know that the patch was flipped: 9 of 18 lie in the middle of pairs."""
    volume, axes = volume_of((6, 18, 10)), tuple(axis for axis, flip in enumerate(flips) if flip)
    straight = after(volume, lambda made: lower_resolution(made, 0.5, False, (False, False, False)))
    flipped = after(np.ascontiguousarray(np.flip(volume, axes)), lambda made: lower_resolution(made, 0.5, False, flips))
    np.testing.assert_allclose(np.flip(flipped, axes), straight, atol=1e-6)
    forgotten = after(np.ascontiguousarray(np.flip(volume, axes)), lambda made: lower_resolution(made, 0.5, False, (False, False, False)))
    assert not np.allclose(np.flip(forgotten, axes), straight, atol=1e-6)


def test_low_resolution_with_every_voxel_kept_is_the_identity() -> None:
    volume = volume_of((4, 12, 13))
    np.testing.assert_allclose(after(volume, lambda made: lower_resolution(made, 1.0, False, (False,) * 3)), volume, atol=1e-6)


def test_noise() -> None:
    """Normal, of the drawn spread, independent between voxels and channels, the same from the same seed."""
    nothing = np.zeros((2, 20, 64, 64), np.float32)
    one, same, other = (after(nothing, lambda made, s=seed: add_noise(made, 0.05, s)) for seed in (3, 3, 4))  # type: ignore[misc]
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    count = one.size
    assert abs(one.mean()) < 5 * 0.05 / math.sqrt(count)
    assert abs(one.std() / 0.05 - 1) < 5 / math.sqrt(2 * count)
    assert abs((np.abs(one) < 0.05).mean() - 0.6827) < 5 * math.sqrt(0.68 * 0.32 / count)
    for a, b in ((one[0], one[1]), (one[..., 1:], one[..., :-1]), (one[:, 1:], one[:, :-1]), (one, other)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)
    np.testing.assert_array_equal(after(nothing, lambda made: add_noise(made, 0.0, 3)), nothing)


def test_order_is_nnunets() -> None:
    """Noise, blur, brightness, contrast, low resolution, inverted gamma, gamma: composed by hand."""
    image = volume_of((2, 5, 16, 16))
    draw = AugmentDraw(
        noise_sd=0.1,
        noise_seed=5,
        blur_sigma_zyx=(None, (0.6, 0.7, 0.8)),
        brightness=(0.8, 1.2),
        contrast=(1.2, 0.8),
        low_resolution=(0.6, None),
        gamma_inverted=(0.8, 1.3),
        gamma=(1.3, 0.8),
    )
    got = after(image, lambda made: change_intensity(made, draw))
    by_hand = torch.from_numpy(image.copy())
    add_noise(by_hand, 0.1, 5)
    blur(by_hand[1], (0.6, 0.7, 0.8))
    by_hand *= torch.tensor([0.8, 1.2])[:, None, None, None]
    change_contrast(by_hand[0], 1.2)
    change_contrast(by_hand[1], 0.8)
    lower_resolution(by_hand[0], 0.6, False, (False,) * 3)
    for exponents, inverted in (((0.8, 1.3), True), ((1.3, 0.8), False)):
        for channel, exponent in enumerate(exponents):
            change_gamma(by_hand[channel], exponent, inverted)
    np.testing.assert_allclose(got, by_hand.numpy(), rtol=1e-6, atol=1e-6)


def test_threads_do_not_change_a_bit() -> None:
    image = volume_of((1, 16, 160, 160))
    draw = AugmentDraw(
        noise_sd=0.1, blur_sigma_zyx=((0.9,) * 3,), contrast=(1.2,), low_resolution=(0.7,), gamma=(1.3,), gamma_inverted=(0.8,)
    )
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(after(image, lambda made: change_intensity(made, draw)))
    torch.set_num_threads(1)
    np.testing.assert_array_equal(*results)
