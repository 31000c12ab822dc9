"""Voxel-edge definitions: SciPy's own erosion and distance transform, brute force, closed forms, knife edges, invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from shapes import EDGES_MM, MOVES, SPACINGS, Move, box, check_unmoved, pairs

from ichbench.errors import InputError
from ichbench.scoring import edges, overlap
from ichbench.scoring.edges import EdgeRecord, boundary_iou, edge_record


def random_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A blob that touches the border, and specks."""
    smooth = ndimage.gaussian_filter(rng.random(shape), 1.5, mode="wrap")
    return np.asarray((smooth > np.quantile(smooth, 0.6)) | (rng.random(shape) < 0.02))


def record_of(reference_mm: list[float], predicted_mm: list[float]) -> EdgeRecord:
    return EdgeRecord(np.array(reference_mm, dtype=np.float64), np.array(predicted_mm, dtype=np.float64))


def summary(record: EdgeRecord) -> list[float]:
    return [
        *[definition(record, tolerance_mm) for definition in (edges.nsd_voxels, edges.nsd_fractions) for tolerance_mm in (0.0, 0.9, 2.1)],
        *[definition(record, percent) for definition in (edges.hd_directional, edges.hd_pooled) for percent in (0, 50, 95, 100)],
        edges.assd_pooled(record),
        edges.assd_directional(record),
    ]


# --- SciPy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 12, 11), (1, 14, 14), (2, 3, 4), (1, 1, 1), (0, 3, 3), (5, 1, 1)])
def test_edge_voxels_are_what_scipys_erosion_takes_away(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(5)
    for mask in (random_mask(rng, shape) if math.prod(shape) else np.zeros(shape, bool), np.ones(shape, bool), np.zeros(shape, bool)):
        before = mask.copy()
        assert np.array_equal(edges.edge_voxels(mask), mask ^ ndimage.binary_erosion(mask))
        assert np.array_equal(mask, before)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("per_point", [0, 10**9], ids=["tree", "transform"])
def test_distances_are_those_of_scipys_transform(seed: int, per_point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole array, no box, no shortcut; both ways of searching."""
    monkeypatch.setattr(edges, "BOX_VOXELS_PER_POINT", per_point)
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 20, size=3))
    first, second = random_mask(rng, shape), random_mask(rng, shape)
    first.flat[0] = second.flat[-1] = True
    for spacing in (SPACINGS[seed % 4], tuple(rng.uniform(0.2, 6, size=3))):
        record = edge_record(first, second, spacing)
        outlines = [mask ^ ndimage.binary_erosion(mask) for mask in (first, second)]
        for found, own, other in ((record.reference_mm, 0, 1), (record.predicted_mm, 1, 0)):
            expected = np.sort(ndimage.distance_transform_edt(~outlines[other], sampling=spacing)[outlines[own]])
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


def test_the_search_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A speck far away widens the box and so turns the transform into the tree."""
    first = np.zeros((24, 60, 60), dtype=bool)
    first[2:6, 4:14, 4:14] = True
    second = np.roll(first, (1, 2, 1), axis=(0, 1, 2))
    first[-1, -1, -1] = second[-1, -1, -1] = True
    found = {}
    for name in ("_by_tree", "_by_transform"):
        function = getattr(edges, name)
        monkeypatch.setattr(edges, name, lambda *a, name=name, function=function: found.setdefault(name, function(*a)))
    near = edge_record(first[:8, :20, :20], second[:8, :20, :20], (5.0, 0.43, 0.45))
    assert set(found) == {"_by_transform"}
    far = edge_record(first, second, (5.0, 0.43, 0.45))
    assert set(found) == {"_by_transform", "_by_tree"}
    assert np.array_equal(far.reference_mm[1:], near.reference_mm)  # the shared speck adds one 0
    assert np.array_equal(far.predicted_mm[1:], near.predicted_mm)


def test_a_search_with_a_reach_is_exact_within_it() -> None:
    """Beyond the reach the tree does not look; nothing there may come out as near."""
    targets = np.zeros((1, 1, 40), dtype=bool)
    targets[..., 38:] = True
    found = edges._nearest_mm(np.arange(40)[::20], targets, (1.0, 1.0, 0.5), reach_mm=10.0)  # 2 points: the box is large for them
    assert found.tolist() == [math.inf, 9.0]
    assert edges._nearest_mm(np.arange(40)[::20], targets, (1.0, 1.0, 0.5)).tolist() == [19.0, 9.0]


# --- brute force -----------------------------------------------------------------------------------------------------------


def outline(mask: np.ndarray) -> list[tuple[int, ...]]:
    steps = [tuple(sign * (axis == a) for a in range(3)) for axis in range(3) for sign in (-1, 1)]

    def inside(place: tuple[int, ...]) -> bool:
        return all(0 <= p < n for p, n in zip(place, mask.shape, strict=True)) and bool(mask[place])

    neighbours = lambda place: [tuple(p + s for p, s in zip(place, step, strict=True)) for step in steps]  # noqa: E731
    return [place for place in itertools.product(*map(range, mask.shape)) if mask[place] and not all(map(inside, neighbours(place)))]


def apart_mm(first: tuple[int, ...], second: tuple[int, ...], spacing: tuple[float, ...]) -> float:
    return math.sqrt(sum(((a - b) * s) ** 2 for a, b, s in zip(first, second, spacing, strict=True)))


def percentile(values: list[float], percent: float) -> float:
    """Linear between the closest ranks, as numpy.percentile and torch.quantile by default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@settings(max_examples=60)
@given(pairs(), EDGES_MM)
def test_brute_force(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    own, other = outline(masks[0]), outline(masks[1])
    there = [min(apart_mm(a, b, spacing) for b in other) for a in own]
    back = [min(apart_mm(a, b, spacing) for a in own) for b in other]
    record = edge_record(masks[0], masks[1], spacing)
    near = [sum(d <= 0.9 for d in side) for side in (there, back)]
    expected = {
        edges.nsd_voxels(record, 0.9): sum(near) / (len(there) + len(back)),
        edges.nsd_fractions(record, 0.9): (near[0] / len(there) + near[1] / len(back)) / 2,
        edges.hd_directional(record, 95): max(percentile(there, 95), percentile(back, 95)),
        edges.hd_pooled(record, 95): percentile(there + back, 95),
        edges.hd_directional(record, 100): max(there + back),
        edges.hd_pooled(record, 100): max(there + back),
        edges.assd_pooled(record): sum(there + back) / len(there + back),
        edges.assd_directional(record): (sum(there) / len(there) + sum(back) / len(back)) / 2,
    }
    assert list(expected) == pytest.approx(list(expected.values()), rel=1e-12, abs=1e-12)


# --- closed forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "step_mm"), [(2, 0.45), (0, 5.0)])
def test_shifted_box(axis: int, step_mm: float) -> None:
    """Box of facts, F. Two slices have no interior, so all 32 voxels are edge; a shift parts 8 (x) or 16 (z) from either mask."""
    mask = box((8, 20, 20), (2, 4), (5, 9), (5, 9))
    record = edge_record(mask, np.roll(mask, 1, axis=axis), (5.0, 0.45, 0.45))
    moved = {2: 8, 0: 16}[axis]
    assert record.reference_mm.tolist() == record.predicted_mm.tolist() == [0.0] * (32 - moved) + [step_mm] * moved
    assert edges.nsd_voxels(record, 0.42) == edges.nsd_fractions(record, 0.42) == 1 - moved / 32
    assert edges.nsd_voxels(record, step_mm) == 1.0
    assert edges.hd_directional(record, 95) == edges.hd_pooled(record, 100) == step_mm
    assert edges.assd_pooled(record) == pytest.approx(step_mm * moved / 32, rel=1e-15)


def test_a_solid_box_is_hollow() -> None:
    """6 x 7 x 8 voxels have 4 x 5 x 6 within; a box inside it, 1 voxel smaller on each side, is at the spacing of an axis."""
    outer, inner = box((10, 11, 12), (2, 8), (2, 9), (2, 10)), box((10, 11, 12), (3, 7), (3, 8), (3, 9))
    record = edge_record(outer, inner, (5.0, 0.5, 0.5))
    assert record.reference_mm.size == 6 * 7 * 8 - 4 * 5 * 6
    assert record.predicted_mm.size == 4 * 5 * 6 - 2 * 3 * 4
    # from within, half a millimetre sideways for all but the 3 x 4 inmost voxels of both faces, which go up or down a slice
    assert np.array_equal(record.predicted_mm, np.sort([0.5] * (4 * 2 * (5 + 6 - 2)) + [1.0] * (2 * 2 * (3 + 4 - 2)) + [1.5] * (2 * 2)))


def test_pooled_and_directional_percentiles() -> None:
    """One false positive of 5 voxels far from a lesion of 100: a tenth of one direction, a twentieth of both."""
    record = record_of([0.0] * 100, [0.0] * 45 + [40.0] * 5)
    assert edges.hd_directional(record, 90) == pytest.approx(4.0, abs=1e-12)  # rank 44.1 of 0..49: a tenth of the way from 0 to 40
    assert edges.hd_directional(record, 95) == 40.0
    assert edges.hd_pooled(record, 95) == 0.0
    assert edges.hd_pooled(record, 100 * 144.5 / 149) == pytest.approx(20.0, abs=1e-9)
    assert edges.hd_pooled(record, 100) == 40.0
    assert [edges.assd_pooled(record), edges.assd_directional(record)] == [200 / 150, 2.0]
    assert [edges.nsd_voxels(record, 1.0), edges.nsd_fractions(record, 1.0)] == [145 / 150, 0.95]


def test_one_voxel_each() -> None:
    first, second = np.zeros((2, 6, 6, 8), dtype=bool)
    first[2, 2, 2] = second[4, 2, 3] = True
    record = edge_record(first, second, (3.0, 2.0, 8.0))
    assert record.reference_mm.tolist() == record.predicted_mm.tolist() == [10.0]
    assert {edges.hd_directional(record, p) for p in (0, 50, 100)} == {edges.hd_pooled(record, 37)} == {10.0}
    assert edges.assd_pooled(record) == edges.assd_directional(record) == 10.0


# --- empty masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [False, True])
def test_one_empty_mask(turn: bool) -> None:
    full, empty = box((4, 4, 4), (1, 3), (0, 2), (0, 4)), np.zeros((4, 4, 4), bool)
    masks = (empty, full) if turn else (full, empty)
    record = edge_record(*masks, (5.0, 0.45, 0.45))
    assert sorted([record.reference_mm.tolist(), record.predicted_mm.tolist()]) == [[], [math.inf] * 16]
    assert {edges.nsd_voxels(record, t) for t in (0, 0.42, 1e300)} == {edges.nsd_fractions(record, 1e300)} == {0.0}
    assert {d(record, p) for d in (edges.hd_directional, edges.hd_pooled) for p in (0, 95, 100)} == {math.inf}
    assert edges.assd_pooled(record) == edges.assd_directional(record) == math.inf
    assert boundary_iou(*masks, (5.0, 0.45, 0.45), 2.0) == 0.0


@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 1, 1), (0, 4, 4), (0, 0, 0)])
def test_two_empty_masks(shape: tuple[int, int, int]) -> None:
    masks = np.zeros(shape, bool), np.zeros(shape, bool)
    assert all(math.isnan(value) for value in summary(edge_record(*masks, (1.0, 1.0, 1.0))))
    assert math.isnan(boundary_iou(*masks, (1.0, 1.0, 1.0), 1.0))


# --- the knife edge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_point", [0, 10**9], ids=["tree", "transform"])
@pytest.mark.parametrize(("spacing_mm", "steps"), [(0.42, 1), (0.21, 2), (0.14, 3), (0.07, 6)])
def test_the_tolerance_itself_is_within_it_at_500_places(
    spacing_mm: float, steps: int, per_point: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 * 0.14 is 0.42000000000000004 and 6 * 0.07 too: MONAI, in float32, says 0.42, and so must every place."""
    monkeypatch.setattr(edges, "BOX_VOXELS_PER_POINT", per_point)
    mask = np.eye(500, 520, dtype=bool)[None]  # a voxel at each of 500 places, in rows a metre apart
    moved = np.roll(mask, steps, axis=2)
    spacing = (5.0, 1000.0, spacing_mm)
    record = edge_record(mask, moved, spacing)
    assert edges.nsd_voxels(record, 0.42) == edges.nsd_fractions(record, 0.42) == 1.0
    assert record.reference_mm[0] == record.reference_mm[-1] == steps * spacing_mm
    # lines of 3 * steps voxels side by side: all but `steps` voxels on either side lie within 0.42 mm of the background
    wide = np.zeros((1, 1, 5000), dtype=bool)
    wide[..., [place + step for place in range(7, 4900, 9 * steps) for step in range(3 * steps)]] = True
    halved = wide & np.roll(wide, steps, axis=2) & np.roll(wide, -steps, axis=2)
    assert boundary_iou(wide, wide & ~halved, (5.0, 5.0, spacing_mm), 0.42) == 1.0


def test_a_tie_of_two_ways_counts_as_within_whichever_is_found() -> None:
    """One slice of 0.42 mm up or three voxels of 0.14 mm aside: equally near, but 0.42 and 0.42000000000000004 in float64."""
    mask, other = np.zeros((2, 3, 4, 9), dtype=bool)
    mask[1, 1, 4] = other[0, 1, 4] = other[1, 1, 1] = other[1, 1, 7] = True
    for order in itertools.permutations(range(3)):
        spacing = [(0.42, 0.14, 0.14)[axis] for axis in order]
        assert edges.nsd_voxels(edge_record(mask.transpose(order), other.transpose(order), spacing), 0.42) == 1.0


@pytest.mark.parametrize("distance_mm", [0.4200001, 0.421, 0.43])
def test_a_little_more_than_the_tolerance_is_beyond_it(distance_mm: float) -> None:
    record = record_of([0.0, distance_mm], [0.0])
    assert edges.nsd_voxels(record, 0.42) == 2 / 3
    assert edges.nsd_fractions(record, 0.42) == 0.75
    assert edges.nsd_voxels(record, distance_mm) == 1.0


# --- boundary IoU ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(pairs(), EDGES_MM, st.sampled_from([0.0, 0.6, 1.45, 5.2]), st.sampled_from([0, 10**9]))
def test_boundary_iou_by_brute_force(
    masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float], distance_mm: float, per_point: int
) -> None:
    reach = max(distance_mm, min(spacing))
    rims = []
    for mask in masks:
        wide = np.pad(mask, 1)
        inside, outside = (np.argwhere(m) * np.array(spacing) for m in (wide, ~wide))
        nearest = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(axis=2)).min(axis=1)
        rims.append({tuple(place) for place in np.argwhere(wide)[nearest <= reach + 1e-9]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edges, "BOX_VOXELS_PER_POINT", per_point)
        found = boundary_iou(masks[0], masks[1], spacing, distance_mm)
    assert found == len(rims[0] & rims[1]) / len(rims[0] | rims[1])


@pytest.mark.parametrize("pixels", [1, 2, 3, 20])
def test_boundary_iou_of_rectangles_is_that_of_the_paper(pixels: int) -> None:
    """The original on a slice: erosion by 3 x 3, `pixels` times. Square and round distance agree inside a rectangle."""
    first, second = box((1, 30, 40), (0, 1), (3, 18), (0, 22)), box((1, 30, 40), (0, 1), (5, 21), (2, 20))
    rims = [m[0] & ~ndimage.binary_erosion(m[0], np.ones((3, 3)), iterations=pixels) for m in (first, second)]
    expected = np.count_nonzero(rims[0] & rims[1]) / np.count_nonzero(rims[0] | rims[1])
    assert boundary_iou(first, second, (1000.0, 1.0, 1.0), float(pixels)) == expected
    assert 0 < expected < 1


def test_boundary_iou_of_two_cubes() -> None:
    """A cube of 8 and one of 6 within it, a voxel in on each side: their rims of one voxel do not meet, of two they do."""
    outer, inner = box((10, 10, 10), *[(1, 9)] * 3), box((10, 10, 10), *[(2, 8)] * 3)
    assert boundary_iou(outer, inner, (1.0, 1.0, 1.0), 1.0) == 0.0
    assert boundary_iou(outer, inner, (1.0, 1.0, 1.0), 0.0) == 0.0  # less than a voxel is a voxel
    rims = {n: [edge**3 - max(edge - 2 * n, 0) ** 3 for edge in (8, 6)] for n in (2, 3)}
    for n in (2, 3):
        both = 6**3 - (8 - 2 * n) ** 3
        assert boundary_iou(outer, inner, (1.0, 1.0, 1.0), float(n)) == both / (sum(rims[n]) - both)
    # slices of 5 mm: the faces at top and bottom are 5 mm from the background, too far for 2 mm
    walls = [8 * (8**2 - 4**2), 6 * (6**2 - 2**2)]
    both = 6 * (6**2 - 4**2)
    assert boundary_iou(outer, inner, (5.0, 1.0, 1.0), 2.0) == both / (sum(walls) - both)


@settings(max_examples=40)
@given(pairs(), EDGES_MM)
def test_a_rim_as_wide_as_the_mask_gives_iou(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    assert boundary_iou(masks[0], masks[1], spacing, 1e4) == overlap.iou(overlap.count(*masks))
    assert boundary_iou(masks[0], masks[0].copy(), spacing, 0.0) == 1.0


# --- invariances -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(pairs(), EDGES_MM, MOVES)
def test_turning_mirroring_padding_and_swapping_change_nothing(
    masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float], move: Move
) -> None:
    check_unmoved(lambda *pair: [*summary(edge_record(*pair)), boundary_iou(*pair, 1.45)], masks, spacing, move)


@settings(max_examples=40)
@given(pairs(), EDGES_MM, st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_space_scales_distances(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float], factor: float) -> None:
    record, scaled = (edge_record(masks[0], masks[1], [s * f for s in spacing]) for f in (1.0, factor))
    for tolerance_mm in (0.0, 0.43, 1.42):
        assert edges.nsd_voxels(scaled, factor * tolerance_mm) == edges.nsd_voxels(record, tolerance_mm)
    assert edges.hd_pooled(scaled, 95) == factor * edges.hd_pooled(record, 95)
    assert boundary_iou(*masks, [s * factor for s in spacing], factor * 1.45) == boundary_iou(*masks, spacing, 1.45)


@settings(max_examples=40)
@given(pairs(), EDGES_MM)
def test_order_of_the_metrics(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    record = edge_record(masks[0], masks[1], spacing)
    for definition in (edges.nsd_voxels, edges.nsd_fractions):
        curve = [definition(record, tolerance_mm) for tolerance_mm in np.linspace(0, 30, 31)]
        assert curve == sorted(curve)
        assert definition(record, edges.hd_pooled(record, 100)) == 1.0
    for definition in (edges.hd_directional, edges.hd_pooled):
        percentiles = [definition(record, percent) for percent in (0, 10, 50, 95, 100)]
        assert percentiles == sorted(percentiles)
    assert max(edges.assd_pooled(record), edges.assd_directional(record)) <= edges.hd_pooled(record, 100) + 1e-12
    same = summary(edge_record(masks[0], masks[0].copy(), spacing))
    assert same == [1.0] * 6 + [0.0] * 10


# --- what is refused, and extremes ---------------------------------------------------------------------------------------------------


def test_bad_parameters() -> None:
    masks = box((2, 2, 2), *[(0, 1)] * 3), box((2, 2, 2), *[(1, 2)] * 3)
    record = edge_record(*masks, (1, 1, 1))
    for number in (-0.1, math.nan, math.inf):
        for definition in (edges.nsd_voxels, edges.nsd_fractions):
            with pytest.raises(InputError, match="tolerance"):
                definition(record, number)
        with pytest.raises(InputError, match="distance"):
            boundary_iou(*masks, (1, 1, 1), number)
    for percent in (-1, 100.5, math.nan):
        for definition in (edges.hd_directional, edges.hd_pooled):
            with pytest.raises(InputError, match="percentile"):
                definition(record, percent)
    for function in (edge_record, lambda *a: boundary_iou(*a, 1.0)):
        with pytest.raises(InputError, match=r"\(2, 2, 2\).*\(2, 2, 3\)"):
            function(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool), (1, 1, 1))
        with pytest.raises(InputError, match="spacing"):
            function(*masks, (1, 1, 0))


def test_extreme_spacings_do_not_overflow() -> None:
    masks = box((2, 3, 300), (0, 1), (0, 1), (0, 1)), box((2, 3, 300), (1, 2), (2, 3), (299, 300))
    for edge_mm in overlap.SPACING_RANGE_MM:
        record = edge_record(*masks, [edge_mm] * 3)
        assert edges.hd_directional(record, 100) == pytest.approx(edge_mm * math.sqrt(1 + 4 + 299**2), rel=1e-15)
        assert edges.nsd_voxels(record, 1e300) == 1.0
        assert edges.nsd_voxels(record, edge_mm) == 0.0
    assert boundary_iou(*masks, (1e6, 1e6, 1e6), 1e300) == 0.0


def test_labels_and_other_types_are_masks() -> None:
    labels = np.array([[[0, 3, 1, 255]]], dtype=np.uint8)
    expected = summary(edge_record(labels != 0, labels == 3, (5, 1, 1)))
    assert summary(edge_record(labels, (labels == 3).astype(np.float32), (5, 1, 1))) == expected  # type: ignore[arg-type]
