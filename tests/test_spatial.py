"""Rotation, scaling, mirroring: exact flips and quarter turns, images that are their own coordinates, labels against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ichbench.augmentation.augment import fill_sample
from ichbench.augmentation.draw import AugmentDraw, CascadeDraw, acts_in_plane, draw_augmentation, enlarged_zyx
from ichbench.augmentation.patches import PatchDraw, TrainingCase, patch_zyx, sample_generator
from ichbench.augmentation.spatial import HALF_DOWN, HALF_UP, SCORE, matrix
from ichbench.recipe import AugmentRecipe

torch.set_num_threads(1)
CUBE, SLAB, FLAT = (12, 12, 12), (4, 16, 16), (16, 16)
SPATIAL = AugmentRecipe(rotation_probability=0.8, scaling_probability=0.8)
Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]


def only_spatial(draw: AugmentDraw) -> AugmentDraw:
    none: dict[str, Any] = {"noise_sd": None, "blur_sigma_zyx": (), "brightness": (), "contrast": ()}
    return replace(draw, **none, low_resolution=(), gamma=(), gamma_inverted=())


def drawn(step: int, patch: tuple[int, ...], recipe: AugmentRecipe = SPATIAL) -> AugmentDraw:
    return only_spatial(draw_augmentation(sample_generator(9, 0, step, 0), recipe, patch, 1))


def made(
    case: TrainingCase, draw: AugmentDraw, lower: tuple[int, int, int], size: tuple[int, int, int], box: tuple[int, int, int] | None = None
) -> Arrays:
    """The sample (image (c, z, y, x), labels (z, y, x)) whose patch, or box, begins at `lower`; -1 kept apart in no way."""
    # whatever was in the image's memory has to go
    image, labels = torch.full((len(case.image_czyx), *size), torch.nan), torch.zeros(size, dtype=torch.int64)
    fill_sample(case, PatchDraw(0, lower, box or size, None, box is not None), draw, CascadeDraw(), image, labels)
    return image.numpy(), labels.numpy()


def case_of(image: NDArray[Any], labels: NDArray[Any]) -> TrainingCase:
    return TrainingCase("a", np.ascontiguousarray(image, np.float32), np.ascontiguousarray(labels, np.int16), {})


def noisy(size: tuple[int, int, int], seed: int = 0, labels: int = 3) -> TrainingCase:
    rng = np.random.default_rng(seed)
    return case_of(rng.standard_normal((2, *size)), rng.integers(-1, labels, size))


def brute_force(
    case: TrainingCase, draw: AugmentDraw, lower: tuple[int, ...], size: tuple[int, ...], box: tuple[int, ...] | None
) -> Arrays:
    """Every voxel by itself, in float64: the eight voxels around its place, 0 and -1 outside the case or the box."""
    image, labels = np.zeros((len(case.image_czyx), *size)), np.zeros(size, np.int64)
    shape, whole = case.labels_zyx.shape, box or size
    centre, half = np.array(lower) + (np.array(whole) - 1) / 2, (np.array(size) - 1) / 2
    for voxel in np.ndindex(*size):
        flipped = np.where(draw.mirror_zyx, np.array(size) - 1 - voxel, voxel)
        place = matrix(draw) @ (flipped - half) + centre
        base = np.floor(place + 1e-9).astype(int)
        shares: dict[int, float] = {}
        for corner in itertools.product((0, 1), repeat=3):
            at = base + corner
            weight = float(np.prod(np.where(corner, place - base, 1 - (place - base))))
            inside = np.all(at >= 0) and np.all(at < shape)
            if box is not None:
                inside = inside and np.all(at >= lower) and np.all(at < np.add(lower, box))
            label = int(case.labels_zyx[tuple(at)]) if inside else -1
            shares[label] = shares.get(label, 0) + weight
            if inside:
                image[(slice(None), *voxel)] += weight * case.image_czyx[(slice(None), *at)]
        best = max(shares.values())
        # -9 marks a voxel that half precision or rounding may decide either way
        winners = [label for label, share in shares.items() if share > best - 2e-3]
        labels[voxel] = max(winners[0], 0) if len({max(label, 0) for label in winners}) == 1 else -9
    return image.astype(np.float32), labels


@settings(max_examples=25)
@given(
    st.integers(0, 100_000),
    st.sampled_from([(5, 5, 5), (2, 8, 8), (8, 9), (4, 6, 7)]),
    st.tuples(st.integers(-4, 8), st.integers(-6, 12), st.integers(-6, 12)),
    st.booleans(),
)
def test_any_patch_equals_brute_force(step: int, patch: tuple[int, ...], lower: tuple[int, int, int], enlarged: bool) -> None:
    """Inside, across the border, wholly outside; ours and in nnU-Net's box; turned, scaled, mirrored."""
    draw, size = drawn(step, patch), patch_zyx(patch)
    box = enlarged_zyx(SPATIAL, patch) if enlarged else None
    if not draw.is_spatial:
        return
    case = noisy((6, 13, 12), step)
    got, expected = made(case, draw, lower, size, box), brute_force(case, draw, lower, size, box)
    np.testing.assert_allclose(got[0], expected[0], atol=2e-4)
    sure = expected[1] != -9
    np.testing.assert_array_equal(got[1][sure], expected[1][sure])
    assert sure.mean() > 0.5


@pytest.mark.parametrize("patch", [(5, 5, 5), (2, 9, 9), (12, 12)])
def test_nothing_beyond_nnunets_box_is_read(patch: tuple[int, ...]) -> None:
    """A box inside the case, zoomed out of as far as it goes: what lies around it in the case must not show."""
    size, box = patch_zyx(patch), enlarged_zyx(SPATIAL, patch)
    case = noisy((24, 40, 40))
    reached = 0
    for step in range(8):
        draw = replace(drawn(step, patch), scale=1.4)
        lower = (6, 8, 9)
        got, expected = made(case, draw, lower, size, box), brute_force(case, draw, lower, size, box)
        np.testing.assert_allclose(got[0], expected[0], atol=2e-4)
        sure = expected[1] != -9
        np.testing.assert_array_equal(got[1][sure], expected[1][sure])
        centre = tuple(low + big // 2 - small // 2 for low, big, small in zip(lower, box, size, strict=True))
        reached += not np.allclose(expected[0], brute_force(case, draw, (centre[0], centre[1], centre[2]), size, None)[0], atol=1e-3)
    assert reached >= 2


def test_identity_where_nothing_is_drawn() -> None:
    case = noisy((6, 20, 20))
    image, labels = made(case, AugmentDraw(), (1, 2, 3), SLAB)
    np.testing.assert_array_equal(image, case.image_czyx[:, 1:5, 2:18, 3:19])
    np.testing.assert_array_equal(labels, np.maximum(case.labels_zyx[1:5, 2:18, 3:19], 0))
    # a turn by nothing and a scale of 1 are the identity as well
    for draw in (AugmentDraw(rotation_degrees=(0, 0, 0)), AugmentDraw(scale=1.0), AugmentDraw(scale=1.0, in_plane=True)):
        turned = made(case, draw, (1, 2, 3), SLAB)
        np.testing.assert_allclose(turned[0], image, atol=1e-5)
        np.testing.assert_array_equal(turned[1], labels)


@pytest.mark.parametrize("turn", [None, (40.0, 0.0, 0.0)])
def test_mirroring_is_a_flip(turn: tuple[float, float, float] | None) -> None:
    """Also after a turn, which is drawn before it."""
    case = noisy((8, 40, 40))
    plain = made(case, AugmentDraw(rotation_degrees=turn, in_plane=True), (2, 10, 10), SLAB)
    for flips in itertools.product((False, True), repeat=3):
        draw = AugmentDraw(mirror_zyx=(flips[0], flips[1], flips[2]), rotation_degrees=turn, in_plane=True)
        got, axes = made(case, draw, (2, 10, 10), SLAB), tuple(axis for axis, flip in enumerate(flips) if flip)
        np.testing.assert_allclose(got[0], np.flip(plain[0], [axis + 1 for axis in axes]), atol=1e-4 if turn else 0)
        assert np.mean(got[1] != np.flip(plain[1], axes)) < (2e-3 if turn else 1e-9)


@pytest.mark.parametrize("degrees", [90, 180, -90])
@pytest.mark.parametrize(("axis", "in_plane"), [(0, True), (0, False), (1, False), (2, False)])
def test_quarter_turns_are_exact(degrees: int, axis: int, in_plane: bool) -> None:
    """A turn by +90 about z reads output (y, x) from the source at (-x, y): numpy's rot90 backwards; about y the other way round."""
    angles = [0.0, 0.0, 0.0]
    angles[axis] = degrees
    size = SLAB if in_plane else CUBE
    case = noisy(size)
    image, labels = made(case, AugmentDraw(rotation_degrees=(angles[0], angles[1], angles[2]), in_plane=in_plane), (0, 0, 0), size)
    plane = [(1, 2), (2, 0), (0, 1)][axis]
    np.testing.assert_array_equal(labels, np.rot90(np.maximum(case.labels_zyx, 0), -degrees // 90, plane))
    np.testing.assert_allclose(image, np.rot90(case.image_czyx, -degrees // 90, (plane[0] + 1, plane[1] + 1)), atol=2e-5)


def test_turning_there_and_back() -> None:
    """A smooth image comes back to itself but for what interpolation blurs, in the part that both turns keep."""
    z, y, x = np.meshgrid(*[np.linspace(-2, 2, n) for n in (24, 48, 48)], indexing="ij")
    smooth = np.sin(x + 0.5 * y) + np.cos(y - 0.3 * z)
    blob = (x**2 + y**2 + z**2 < 0.8).astype(np.int16)
    size = (24, 48, 48)
    there = made(case_of(smooth[None], blob), AugmentDraw(rotation_degrees=(25.0, 0, 0), in_plane=True), (0, 0, 0), size)
    back = made(case_of(*there), AugmentDraw(rotation_degrees=(-25.0, 0, 0), in_plane=True), (0, 0, 0), size)
    inner = np.s_[:, 14:34, 14:34]
    assert np.abs(back[0][0][inner] - smooth[inner]).max() < 0.02
    overlap = 2 * (back[1] & blob).sum() / (back[1].sum() + blob.sum())
    assert overlap > 0.95
    third = made(case_of(smooth[None], blob), AugmentDraw(rotation_degrees=(25.0, 10.0, -20.0)), (0, 0, 0), size)
    inverse = np.linalg.inv(matrix(AugmentDraw(rotation_degrees=(25.0, 10.0, -20.0))))
    np.testing.assert_allclose(inverse, matrix(AugmentDraw(rotation_degrees=(25.0, 10.0, -20.0))).T, atol=1e-12)
    assert abs(int(third[1].sum()) - int(blob.sum())) < 0.05 * blob.sum()


@settings(max_examples=40)
@given(st.integers(0, 100_000), st.sampled_from([CUBE, SLAB, (16, 20), (12, 10, 14)]))
def test_geometry_on_a_linear_image(step: int, patch: tuple[int, ...]) -> None:
    """An image that is its own coordinate is read back at the turned and scaled place."""
    draw, size = drawn(step, patch), patch_zyx(patch)
    room = tuple(n + 40 for n in size)
    centre = [20 + (n - 1) / 2 for n in size]
    coordinates = np.stack(np.meshgrid(*[np.arange(n) - c for n, c in zip(room, centre, strict=True)], indexing="ij"))
    got, labels = made(case_of(coordinates, np.full(room, 2)), draw, (20, 20, 20), size)
    assert (labels == 2).all()
    offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in size], indexing="ij"))
    p = offsets * np.where(draw.mirror_zyx, -1, 1)[:, None, None, None]
    p = p * np.array([1 if draw.in_plane else draw.scale or 1, draw.scale or 1, draw.scale or 1])[:, None, None, None]
    z, y, x = np.radians(draw.rotation_degrees or (0.0, 0.0, 0.0))
    p = np.stack([p[0], np.cos(z) * p[1] - np.sin(z) * p[2], np.sin(z) * p[1] + np.cos(z) * p[2]])
    p = np.stack([np.cos(y) * p[0] + np.sin(y) * p[2], p[1], np.cos(y) * p[2] - np.sin(y) * p[0]])
    p = np.stack([np.cos(x) * p[0] - np.sin(x) * p[1], np.sin(x) * p[0] + np.cos(x) * p[1], p[2]])
    np.testing.assert_allclose(got, p, atol=2e-3)


def test_in_plane_follows_the_rule() -> None:
    assert not acts_in_plane(SPATIAL, (4, 12, 12))
    assert acts_in_plane(SPATIAL, (4, 13, 12))


@pytest.mark.parametrize(("below", "above"), [(0, 1), (1, 0), (2, 1), (1, 3)])
def test_ties_go_to_the_nearest_voxel(below: int, above: int) -> None:
    """Every second place of 0.5, 2.5, 4.5, 6.5 read across a border at 2.5: the labels tie, and half to even means voxel 2."""
    labels = np.full((1, 8, 8), below, np.int16)
    labels[:, :, 3:] = above
    got = made(case_of(np.zeros((1, 1, 8, 8)), labels), AugmentDraw(scale=2.0, in_plane=True), (0, 2, 2), (1, 4, 4))[1]
    np.testing.assert_array_equal(got[0], [[below, below, above, above]] * 4)
    # a third label in the patch takes the other way through the code
    labels[:, 0, :] = 7
    got = made(case_of(np.zeros((1, 1, 8, 8)), labels), AugmentDraw(scale=2.0, in_plane=True), (0, 2, 2), (1, 4, 4))[1]
    np.testing.assert_array_equal(got[0, 1:], [[below, below, above, above]] * 3)


def test_what_half_precision_calls_a_tie() -> None:
    """Between two labels: every float32 about the two limits is on the side on which half precision puts it."""
    for limit in (HALF_DOWN, HALF_UP):
        near = torch.tensor(limit) + torch.arange(-2000, 2001) * 2**-15
        near = torch.cat([near, torch.nextafter(torch.tensor([limit, limit]), torch.tensor([0.0, SCORE]))])
        assert torch.equal(near.half().float() > SCORE / 2, near > HALF_UP)
        assert torch.equal(near.half().float() == SCORE / 2, (near >= HALF_DOWN) & (near <= HALF_UP))


@pytest.mark.parametrize("way", [True, False])
@pytest.mark.parametrize(("below", "above"), [(0, 1), (3, 1), (-1, 2)])
def test_ties_in_any_slice(way: bool, below: int, above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place is the middle of eight voxels; four of each label tie, and the voxel with even numbers decides. One slice at a time."""
    monkeypatch.setattr("ichbench.augmentation.spatial.IN_CACHE", 1)
    monkeypatch.setattr("ichbench.augmentation.spatial.on_cpu", lambda tensor: way)
    labels = np.where(np.random.default_rng(3).random((16, 16, 16)) < 0.5, below, above).astype(np.int16)
    got = made(case_of(np.zeros((1, 16, 16, 16)), labels), AugmentDraw(scale=2.0), (4, 4, 4), (8, 8, 8))[1]
    number = (labels == above).reshape(8, 2, 8, 2, 8, 2).sum(axis=(1, 3, 5))
    even = labels[*np.ix_(*[2 * np.round((np.arange(8) * 2 + 0.5) / 2).astype(int)] * 3)]
    expected = np.where(number == 4, even, np.where(number > 4, above, below))
    assert (number == 4).mean() > 0.2
    np.testing.assert_array_equal(got, np.maximum(expected, 0))


def test_three_labels_meet() -> None:
    """The highest share wins although it lies below a half; a label that no voxel around has never comes out."""
    labels = np.zeros((1, 3, 3), np.int16)
    labels[0, 1] = [5, 5, 2]
    labels[0, 2] = [9, 9, 2]
    case = case_of(np.zeros((1, 1, 3, 3)), labels)
    for angle in np.linspace(1, 359, 37):
        draw = AugmentDraw(rotation_degrees=(float(angle), 0, 0), scale=0.9, in_plane=True)
        got, expected = made(case, draw, (0, 0, 0), (1, 3, 3))[1], brute_force(case, draw, (0, 0, 0), (1, 3, 3), None)[1]
        sure = expected != -9
        np.testing.assert_array_equal(got[sure], expected[sure])
        assert set(np.unique(got)) <= {0, 2, 5, 9}


def test_many_labels_equal_brute_force() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(-1, 120, (4, 10, 10))
    case = case_of(rng.standard_normal((1, 4, 10, 10)), labels)
    for draw in (AugmentDraw(rotation_degrees=(33.0, 0, 0), in_plane=True), AugmentDraw(rotation_degrees=(20.0, -10, 5), scale=1.2)):
        got, expected = made(case, draw, (0, 1, 1), (4, 8, 8)), brute_force(case, draw, (0, 1, 1), (4, 8, 8), None)
        sure = expected[1] != -9
        np.testing.assert_array_equal(got[1][sure], expected[1][sure])


def test_threads_do_not_change_a_bit() -> None:
    case = noisy((20, 90, 90))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(made(case, AugmentDraw(rotation_degrees=(20.0, 5.0, 3.0)), (2, 10, 10), (16, 64, 64)))
    torch.set_num_threads(1)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
