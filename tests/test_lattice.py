"""The fast way to surfels and distances against the plain one: every island, sweep and tree, on masks made to need them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ichbench.scoring import islands, lattice, nearest


def plain(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, float, float]) -> list[np.ndarray]:
    """Sorted distances of both sides from SciPy's distance transform over the whole volume."""
    surfels = []
    for mask in (reference, predicted):
        code = lattice.corner_codes(mask)
        surfels.append((code != 0) & (code != 255))
    sides = []
    for own, other in ((0, 1), (1, 0)):
        if surfels[other].any():
            found = ndimage.distance_transform_edt(~surfels[other], sampling=spacing)[surfels[own]]
        else:
            found = np.full(int(surfels[own].sum()), math.inf)
        sides.append(np.sort(found))
    return sides


def fast(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, float, float]) -> list[np.ndarray]:
    sides = lattice.surfaces(reference, predicted, spacing, islands.islands(reference, predicted))
    return [np.sort(np.concatenate([np.zeros(side.shared_codes.sum()), side.mm])) for side in sides]


def assert_same(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, float, float]) -> None:
    for mine, theirs in zip(fast(reference, predicted, spacing), plain(reference, predicted, spacing), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-13, atol=0)


SPACINGS = [(5.0, 0.45, 0.45), (1.0, 1.0, 1.0), (0.45, 0.45, 5.0), (0.5, 3.0, 1.25), (100.0, 0.1, 0.2), (0.14, 0.14, 0.14)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_same_distances_as_a_distance_transform(seed: int, spacing: tuple[float, float, float], order: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 40, size=3))
    masks = [np.zeros(shape, dtype=bool) for _ in range(2)]
    for mask in masks:
        for _ in range(int(rng.integers(1, 6))):
            start = [int(rng.integers(0, n)) for n in shape]
            mask[tuple(slice(a, a + int(rng.integers(1, 12))) for a in start)] = True
    assert_same(masks[0].transpose(order), masks[1].transpose(order), spacing)


@pytest.mark.parametrize(
    "constants",
    [
        {"SPLIT_ABOVE": 10, "SPLIT_GAP": 0.01},
        {"SPLIT_ABOVE": 10, "MOST_ISLANDS": 3},
        {"CROWDED": 10**9},
        {"CROWDED": 0},
        {"NEAR_ROWS": 3},
        {"NEAR_ROWS": 1, "SPARSE": 0},
        {"NEAR_ROWS": 1, "SPARSE": 10**9},
        {"NEAR_ROWS": 1, "SPARSE": 10**9, "SPLIT_ABOVE": 10, "SPLIT_GAP": 0.01},
        {"NEAR_ROWS": 1, "WIDEST_PLANE": 20},
        {"NEAR_ROWS": 1, "PLANES_ROWS": 3},
        {"NEAR_ROWS": 1, "PLANES_TOGETHER": 7},
        {"NEAR_ROWS": 1, "DENSE": 0, "TRANSFORM_ABOVE": 0},
        {"NEAR_ROWS": 2, "PLANES_CORNERS": 0, "TRANSFORM_ABOVE": 1e12},
        {"EVERYWHERE_CORNERS": 0},
        {"TOGETHER": 1, "LEAST_TOGETHER": 1},
        {"TOGETHER": 10**7},
        {"WORTH_DROPPING": 0.0},
        {"WORTH_DROPPING": 2.0},
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_no_constant_of_speed_moves_a_distance(constants: dict[str, float], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in constants.items():
        (room,) = (module for module in (islands, lattice, nearest) if hasattr(module, name))
        monkeypatch.setattr(room, name, value)
    rng = np.random.default_rng(seed)
    smooth = [ndimage.gaussian_filter(rng.random((12, 50, 60)), (1, 3, 3)) for _ in range(2)]
    masks = [(field > np.quantile(field, 0.97)) for field in smooth]
    masks[1][-1, -1, -1] = masks[0][0, 0, 0] = True
    for spacing in SPACINGS[:4]:
        assert_same(masks[0], masks[1], spacing)


@settings(max_examples=150)
@given(st.data())
def test_islands_hold_all_foreground_and_do_not_touch(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(0, 9)] * 3))
    size = math.prod(shape)
    bits = [np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool).reshape(shape) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(islands, "SPLIT_ABOVE", 1)
        patch.setattr(islands, "SPLIT_GAP", 0.01)
        boxes = islands.islands(*bits)
    union = bits[0] | bits[1]
    inside = sum(int(union[box].sum()) for box in boxes)
    assert inside == union.sum()
    for index, box in enumerate(boxes):
        assert all(union[box].any(axis=tuple(a for a in range(3) if a != axis))[[0, -1]].all() for axis in range(3))
        for other in boxes[:index]:
            assert any(a.start > b.stop or b.start > a.stop for a, b in zip(box, other, strict=True))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_boxes_that_fill_their_island_to_its_corners(spacing: tuple[float, float, float]) -> None:
    mask = np.zeros((9, 12, 12), dtype=bool)
    mask[2:5, 3:6, 3:6] = True
    for shift in [(0, 0, 3), (0, 1, 4), (1, 3, 0), (0, -3, -1), (2, -1, 3)]:
        assert_same(mask, np.roll(mask, shift, axis=(0, 1, 2)), spacing)


def test_a_far_false_positive_is_an_island_of_its_own() -> None:
    reference = np.zeros((28, 300, 300), dtype=bool)
    reference[10:15, 40:80, 50:90] = True
    predicted = reference.copy()
    predicted[20:22, 250:255, 240:246] = True
    assert islands.islands(reference, predicted) == [
        (slice(10, 15), slice(40, 80), slice(50, 90)),
        (slice(20, 22), slice(250, 255), slice(240, 246)),
    ]
    assert_same(reference, predicted, (5.0, 0.45, 0.45))


@pytest.mark.parametrize("memory_mm", [(5.0, 0.45, 0.45), (1.0, 1.0, 1.0), (1e-3, 1.0, 1.0), (100.0, 0.1, 0.1), (0.45, 5.0, 0.45)])
@pytest.mark.parametrize("number", [1, 5, 64, 256])
def test_rows_are_the_nearest_ones(memory_mm: tuple[float, float, float], number: int) -> None:
    rows = nearest.nearest_rows(memory_mm, number)
    far = 2 * number + 2
    every = np.sort(np.hypot(*np.meshgrid(np.arange(-far, far + 1) * memory_mm[0], np.arange(-far, far + 1) * memory_mm[1])).reshape(-1))
    np.testing.assert_allclose(rows.mm, every[:number], rtol=1e-12)
    assert rows.reach_mm == pytest.approx(every[number], rel=1e-12)
    assert len({*zip(rows.dz.tolist(), rows.dy.tolist(), strict=True)}) == number


@pytest.mark.parametrize("spacing", [(5.0, 0.45, 0.45), (0.7, 0.7, 0.7), (0.3, 2.0, 2.0)])
@pytest.mark.parametrize("seed", range(6))
def test_planes_against_every_pair(seed: int, spacing: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, [9, 40, 40]))
    surfels = rng.random(shape) < rng.choice([0.002, 0.02, 0.3])
    surfels[tuple(int(rng.integers(0, n)) for n in shape)] = True
    corners = np.stack([rng.integers(0, n, 60) for n in shape], axis=1)
    frame = nearest.Frame((0, 1, 2), spacing)
    offsets = (corners[:, None] - np.argwhere(surfels)) * np.array(spacing)
    for least_mm in (0.0, 3.0, 100.0):
        found = nearest.within_planes(corners, surfels, frame, least_mm)
        np.testing.assert_allclose(found, (offsets**2).sum(axis=2).min(axis=1), rtol=1e-14, atol=0)


def test_planes_at_their_widest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "PLANES_ROWS", nearest.WIDEST_PLANE)
    surfels = np.zeros((1, nearest.WIDEST_PLANE, nearest.WIDEST_PLANE), dtype=bool)
    surfels[0, 0, 0] = True
    frame = nearest.Frame((0, 1, 2), (1.0, 1.0, 1.0))
    last = nearest.WIDEST_PLANE - 1
    corners = np.array([[0, last, last], [0, last, 0], [0, 0, last], [0, 0, 0]])
    assert nearest.within_planes(corners, surfels, frame, 0.0).tolist() == [2 * last**2, last**2, last**2, 0]
    wider = np.zeros((1, 1, nearest.WIDEST_PLANE + 1), dtype=bool)
    assert nearest.can_use_planes(100, surfels[:, :10], frame)
    assert not nearest.can_use_planes(100, wider, frame)
    assert not nearest.can_use_planes(100, surfels[:, :10], nearest.Frame((0, 1, 2), (1.0, 1.0, 1.0 + 1e-15)))


def test_planes_give_up_after_so_many_rows() -> None:
    surfels = np.zeros((1, 300, 5), dtype=bool)
    surfels[0, 0, 0] = True
    corners = np.array([[0, nearest.PLANES_ROWS, 0], [0, nearest.PLANES_ROWS + 1, 0], [0, 299, 4]])
    found = nearest.within_planes(corners, surfels, nearest.Frame((0, 1, 2), (1.0, 1.0, 1.0)), 0.0)
    assert found[0] == nearest.PLANES_ROWS**2
    assert np.isinf(found[2])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_transform_against_every_pair(seed: int, order: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    surfels = rng.random((5, 11, 9)) < 0.05
    surfels[0, 0, 0] = True
    frame = nearest.Frame(order, (3.0, 0.5, 0.7))
    corners = np.stack([rng.integers(0, n, 40) for n in surfels.shape], axis=1)
    offsets = (corners[:, None] - np.argwhere(surfels)) * np.array(frame.edges_mm)
    np.testing.assert_allclose(nearest.transform(corners, surfels, frame), (offsets**2).sum(axis=2).min(axis=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 5000), (5000, 1, 1), (1, 5000, 1)])
def test_thin_volumes_are_padded_by_no_more_than_they_are_thick(shape: tuple[int, int, int]) -> None:
    box = [slice(0, n) for n in shape]
    rows = nearest.nearest_rows((1.0, 1.0, 1.0), 64).inside(*(part.stop + 1 for part in box))
    assert math.prod(n + 1 + pad * (2 if axis == 0 else 1) for axis, (n, pad) in enumerate(zip(shape, rows.pads, strict=True))) < 40 * 5000
    masks = [np.zeros(shape, dtype=bool) for _ in range(2)]
    masks[0].reshape(-1)[[3, 700]] = masks[1].reshape(-1)[[9, 4990]] = True
    assert_same(*masks, (1.0, 1.0, 1.0))


@pytest.mark.parametrize("seed", range(20))
def test_facing_keeps_the_nearest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    surfels = rng.random((6, 12, 12)) < 0.2
    low = rng.integers(-15, 20, 3)
    high = low + rng.integers(0, 5, 3)
    corners = np.stack([rng.integers(a, b + 1, 30) for a, b in zip(low, high, strict=True)], axis=1)
    kept = nearest.facing(surfels, low, high)
    assert surfels[tuple(kept.T)].all()
    frame = nearest.Frame((0, 1, 2), (3.0, 0.5, 0.7))
    offsets = (corners[:, None] - np.argwhere(surfels)) * np.array(frame.edges_mm)
    np.testing.assert_allclose(nearest.search(corners, kept, frame), (offsets**2).sum(axis=2).min(axis=1), rtol=1e-14, atol=0)


def test_corner_codes_by_hand() -> None:
    mask = np.zeros((2, 2, 2), dtype=bool)
    mask[0, 0, 0] = True
    codes = lattice.corner_codes(mask)
    assert codes.shape == (3, 3, 3)
    # the voxel lies after the first corner on every axis (bit 0), before the one diagonally opposite (bit 7)
    assert codes[0, 0, 0] == 1
    assert codes[1, 1, 1] == 128
    assert codes[1, 0, 0] == 16
    assert codes[0, 0, 1] == 2
    padded = lattice.corner_codes(mask, pads=(1, 2, 3))
    assert padded.shape == (5, 5, 6)
    assert np.array_equal(padded[1:4, :3, :3], codes)
    assert padded.sum() == codes.sum()
