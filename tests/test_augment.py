"""Augmentation: how often, how much, the geometry against exact flips and quarter turns, and replay."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ichbench.recipe import AugmentRecipe
from ichbench.training.augment import AugmentDraw, apply, draw_augmentation, rotation_limits, source_size
from ichbench.training.batches import Sampling, ahead, draw_sample, make_batch, make_sample
from ichbench.training.patches import TRAIN_STREAM, TrainingCase, sample_generator

torch.set_num_threads(1)
OFF = AugmentRecipe(
    mirror=False, rotation_probability=0, scaling_probability=0, noise_probability=0, gamma_probability=0, gamma_inverted_probability=0
)
EVERYTHING = AugmentRecipe(
    rotation_probability=1, scaling_probability=1, noise_probability=1, gamma_probability=1, gamma_inverted_probability=1
)
CUBE, SLAB, FLAT = (12, 12, 12), (4, 16, 16), (16, 16)
Arrays = tuple[NDArray[np.float32], NDArray[np.int16]]


def draws(recipe: AugmentRecipe, patch: tuple[int, ...], count: int) -> list[AugmentDraw]:
    return [draw_augmentation(sample_generator(0, 0, step, 0), recipe, patch, 2) for step in range(count)]


def patch_of(size: tuple[int, ...], seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, *size), dtype=np.float32), rng.integers(-1, 3, size).astype(np.int16)


def change(draw: AugmentDraw, patch: tuple[int, ...]) -> tuple[Arrays, Arrays]:
    before = patch_of(source_size(patch, draw))
    return before, apply(*before, draw, patch)


def test_frequencies_and_ranges() -> None:
    """20,000 draws with the default recipe: every gate within five standard deviations, every number within its range."""
    recipe, count = AugmentRecipe(), 20_000
    found = draws(recipe, CUBE, count)
    gates = {
        "rotation": (sum(d.rotation_degrees is not None for d in found), 0.2),
        "scaling": (sum(d.scale is not None for d in found), 0.2),
        "neither": (sum(not d.is_spatial for d in found), 0.64),
        "noise": (sum(d.noise_sd is not None for d in found), 0.1),
        "gamma": (sum(bool(d.gamma) for d in found), 0.3),
        "inverted": (sum(bool(d.gamma_inverted) for d in found), 0.1),
        "flip z": (sum(d.mirror_zyx[0] for d in found), 0.5),
        "flip x": (sum(d.mirror_zyx[2] for d in found), 0.5),
    }
    for name, (hits, p) in gates.items():
        assert abs(hits / count - p) < 5 * math.sqrt(p * (1 - p) / count), name
    angles = np.array([d.rotation_degrees for d in found if d.rotation_degrees])
    assert 29 < np.abs(angles).max() <= 30
    assert np.abs(angles.mean(0)).max() < 2
    scales = np.array([d.scale for d in found if d.scale])
    assert 0.7 <= scales.min() < 0.71
    assert 1.39 < scales.max() <= 1.4
    sd = np.array([d.noise_sd for d in found if d.noise_sd is not None])
    assert 0 <= sd.min() < sd.max() <= 0.1
    gamma = np.concatenate([d.gamma for d in found if d.gamma])
    assert 0.7 <= gamma.min() < gamma.max() <= 1.5
    # half below 1, half above, although the range above 1 is wider
    assert abs((gamma < 1).mean() - 0.5) < 5 * 0.5 / math.sqrt(len(gamma))
    assert len({d.noise_seed for d in found}) == count


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
    assert rotation_limits(AugmentRecipe(), patch) == limits
    assert rotation_limits(AugmentRecipe(rotation_degrees=7.0), patch) == tuple(7.0 if limit else 0.0 for limit in limits)


def test_switching_one_off_leaves_the_others() -> None:
    whole, part = draws(EVERYTHING, CUBE, 20), draws(EVERYTHING.model_copy(update={"noise_probability": 0.0}), CUBE, 20)
    assert [replace(d, noise_sd=None) for d in whole] == part
    assert all(d.noise_sd is not None for d in whole)


@pytest.mark.parametrize("patch", [CUBE, SLAB, FLAT])
def test_off_changes_nothing(patch: tuple[int, ...]) -> None:
    for draw in draws(OFF, patch, 5):
        assert source_size(patch, draw) == ((1, *patch) if len(patch) == 2 else patch)
        before, after = change(draw, patch)
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.parametrize("patch", [CUBE, SLAB, FLAT])
def test_applying_a_draw_twice_is_equal_and_leaves_the_input(patch: tuple[int, ...]) -> None:
    for draw in draws(EVERYTHING, patch, 8):
        before = patch_of(source_size(patch, draw))
        kept = before[0].copy(), before[1].copy()
        one, two = apply(*before, draw, patch), apply(*before, draw, patch)
        for a, b, c, d in zip(one, two, before, kept, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(c, d)
        assert one[0].shape == (2, *((1, *patch) if len(patch) == 2 else patch))
        assert one[0].shape[1:] == one[1].shape
        assert one[0].dtype == np.float32
        assert one[1].dtype == np.int16
        assert set(np.unique(one[1])) <= {-1, 0, 1, 2}
        assert np.isfinite(one[0]).all()


def test_mirroring_is_a_flip_and_its_own_inverse() -> None:
    for flips in np.ndindex(2, 2, 2):
        draw = AugmentDraw(mirror_zyx=(bool(flips[0]), bool(flips[1]), bool(flips[2])))
        before, after = change(draw, SLAB)
        axes = tuple(axis for axis, flip in enumerate(flips) if flip)
        np.testing.assert_array_equal(after[1], np.flip(before[1], axes))
        again = apply(*after, draw, SLAB)
        np.testing.assert_array_equal(again[0], before[0])
        np.testing.assert_array_equal(again[1], before[1])


@pytest.mark.parametrize("degrees", [90, 180, -90])
@pytest.mark.parametrize(("axis", "in_plane"), [(0, True), (0, False), (1, False), (2, False)])
def test_quarter_turns_are_exact(degrees: int, axis: int, in_plane: bool) -> None:
    """A turn by +90 about z reads output (y, x) from the source at (-x, y): numpy's rot90 backwards."""
    angles = [0.0, 0.0, 0.0]
    angles[axis] = degrees
    patch = SLAB if in_plane else CUBE
    draw = AugmentDraw(rotation_degrees=(angles[0], angles[1], angles[2]), in_plane=in_plane)
    assert source_size(patch, draw) == patch
    before, after = change(draw, patch)
    plane = [(1, 2), (0, 2), (0, 1)][axis]
    np.testing.assert_array_equal(after[1], np.rot90(before[1], -degrees // 90, plane))
    np.testing.assert_allclose(after[0], np.rot90(before[0], -degrees // 90, (plane[0] + 1, plane[1] + 1)), atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100_000), st.sampled_from([CUBE, SLAB, (16, 20), (12, 10, 14)]))
def test_geometry_on_a_linear_image(step: int, patch: tuple[int, ...]) -> None:
    """An image that is its own coordinate is read back at the turned and scaled place: no border is ever touched."""
    recipe = OFF.model_copy(update={"rotation_probability": 0.8, "scaling_probability": 0.8})
    draw = draw_augmentation(sample_generator(9, 0, step, 0), recipe, patch, 1)
    source = source_size(patch, draw)
    centre = [(n - 1) / 2 for n in source]
    coordinates = np.stack(np.meshgrid(*[np.arange(n) - c for n, c in zip(source, centre, strict=True)], indexing="ij")).astype(np.float32)
    got, labels = apply(coordinates, np.full(source, 2, np.int16), draw, patch)
    assert (labels == 2).all()
    size = (1, *patch) if len(patch) == 2 else patch
    offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in size], indexing="ij"))
    scale = draw.scale or 1.0
    z, y, x = np.radians(draw.rotation_degrees or (0.0, 0.0, 0.0))
    p = offsets * scale
    if draw.in_plane:
        p[0] = offsets[0]
    p = np.stack([np.cos(x) * p[0] - np.sin(x) * p[1], np.sin(x) * p[0] + np.cos(x) * p[1], p[2]])
    p = np.stack([np.cos(y) * p[0] - np.sin(y) * p[2], p[1], np.sin(y) * p[0] + np.cos(y) * p[2]])
    p = np.stack([p[0], np.cos(z) * p[1] - np.sin(z) * p[2], np.sin(z) * p[1] + np.cos(z) * p[2]])
    np.testing.assert_allclose(got, p, atol=1e-3)


def test_labels_follow_the_image() -> None:
    """Two classes whose border lies at a value of the image: after any turn they still part there, but for the border itself."""
    recipe = OFF.model_copy(update={"rotation_probability": 1.0, "scaling_probability": 1.0})
    for draw in draws(recipe, CUBE, 10):
        source = source_size(CUBE, draw)
        z, y, x = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in source], indexing="ij")
        field = (z + 2 * y - x).astype(np.float32)
        image, labels = apply(np.stack([field, field]), np.where(field > 0, 2, 1).astype(np.int16), draw, CUBE)
        sure = np.abs(image[0]) > 2.5
        np.testing.assert_array_equal(labels[sure], np.where(image[0] > 0, 2, 1)[sure])


def test_noise_has_the_drawn_standard_deviation() -> None:
    draw = AugmentDraw(noise_sd=0.05, noise_seed=3)
    before, after = change(draw, (20, 40, 40))
    assert float((after[0] - before[0]).std()) == pytest.approx(0.05, rel=0.02)
    assert np.corrcoef((after[0] - before[0])[0].ravel(), (after[0] - before[0])[1].ravel())[0, 1] == pytest.approx(0, abs=0.03)
    other = apply(*before, replace(draw, noise_seed=4), (20, 40, 40))
    assert not np.array_equal(other[0], after[0])


def test_gamma_keeps_mean_spread_and_order() -> None:
    for name in ("gamma", "gamma_inverted"):
        draw = replace(AugmentDraw(), **{name: (0.7, 1.4)})  # type: ignore[arg-type]
        before, after = change(draw, CUBE)
        for channel in range(2):
            old, new = before[0][channel].ravel(), after[0][channel].ravel()
            np.testing.assert_allclose([new.mean(), new.std()], [old.mean(), old.std()], atol=1e-4)
            assert np.array_equal(old.argsort(), new.argsort()) or np.abs(np.diff(new[old.argsort()]).clip(max=0)).max() < 1e-6
            assert not np.allclose(old, new, atol=1e-3)
    one = AugmentDraw(gamma=(1.0, 1.0), gamma_inverted=(1.0, 1.0))
    before, after = change(one, CUBE)
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)


def test_gamma_of_a_constant_channel_stays_finite() -> None:
    image = np.full((1, *CUBE), 3.0, np.float32)
    after, _ = apply(image, np.zeros(CUBE, np.int16), AugmentDraw(gamma=(1.4,), gamma_inverted=(0.8,)), CUBE)
    np.testing.assert_allclose(after, 3.0, atol=1e-6)


def cases(count: int = 3) -> list[TrainingCase]:
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        labels = np.zeros((8, 24, 24), np.int16)
        labels[3:5, 10:14, 8:12] = 1
        places = {1: np.argwhere(labels == 1)}
        made.append(TrainingCase(f"c{i}", rng.standard_normal((1, 8, 24, 24), dtype=np.float32), labels, places))
    return made


@pytest.mark.parametrize("patch", [(6, 16, 16), (4, 20, 20), (16, 16)])
def test_any_sample_of_any_batch_can_be_made_alone(patch: tuple[int, ...]) -> None:
    sampling = Sampling(patch, 4, 0.33, 11, EVERYTHING)
    for _ in range(2):
        make_batch(cases(), sampling, TRAIN_STREAM, 0)
    image, labels = make_batch(cases(), sampling, TRAIN_STREAM, 7)
    assert tuple(image.shape) == (4, 1, *patch)
    assert tuple(labels.shape) == (4, *patch)
    assert labels.dtype == torch.int64
    for i in (3, 0):
        alone = make_sample(cases(), sampling, *draw_sample(cases(), sampling, TRAIN_STREAM, 7, i))
        np.testing.assert_array_equal(image[i].numpy().reshape(alone[0].shape), alone[0])
        np.testing.assert_array_equal(labels[i].numpy().reshape(alone[1].shape), alone[1])
    other = make_batch(cases(), sampling, TRAIN_STREAM + 1, 7)[0]
    assert not torch.equal(image, other)


def test_forced_samples_show_foreground_even_when_turned() -> None:
    sampling = Sampling((6, 16, 16), 2, 0.33, 0, EVERYTHING)
    for step in range(30):
        assert (make_batch(cases(), sampling, TRAIN_STREAM, step)[1][1] == 1).any()


def test_voxels_outside_the_image_become_background() -> None:
    sampling = Sampling((12, 32, 32), 2, 0.33, 0, None)
    image, labels = make_batch(cases(), sampling, TRAIN_STREAM, 0)
    assert set(np.unique(labels.numpy())) == {0, 1}
    assert (image[:, :, 0] == 0).all()


def test_working_ahead_in_threads_changes_nothing() -> None:
    sampling, seen = Sampling((6, 16, 16), 2, 0.33, 0, EVERYTHING), cases()

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return make_batch(seen, sampling, TRAIN_STREAM, step)

    for (a, b), (c, d) in zip(ahead(make, range(9), 0), ahead(make, range(9), 3), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_an_error_in_a_thread_reaches_the_reader() -> None:
    def fail(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError(f"batch {step}")

    with pytest.raises(ValueError, match="batch 0"):
        list(ahead(fail, range(3), 2))
