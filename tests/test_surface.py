"""Surface distances: bit for bit the package `surface-distance`, brute force, closed forms and invariances."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from shapes import EDGES_MM, MOVES, SPACINGS, Move, box, check_unmoved, pairs

from ichbench.errors import InputError
from ichbench.scoring import surface
from ichbench.scoring.surface import SurfaceDistances, surface_record


def by_package(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, ...]) -> tuple[SurfaceDistances, dict[str, float]]:
    """The record and the metrics as the package computes them. Its use of scipy's old namespaces warns."""
    import surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(reference, predicted, spacing)
    record = SurfaceDistances(
        found["distances_gt_to_pred"], found["surfel_areas_gt"], found["distances_pred_to_gt"], found["surfel_areas_pred"]
    )
    metrics = {f"nsd@{tau}": surface_distance.compute_surface_dice_at_tolerance(found, tau) for tau in (0.0, 0.42, 1.0, 5.0)}
    metrics |= {f"hd@{percent}": surface_distance.compute_robust_hausdorff(found, percent) for percent in (0, 50, 95, 99.9, 100)}
    return record, metrics


def ours(record: SurfaceDistances) -> dict[str, float]:
    metrics = {f"nsd@{tau}": surface.nsd(record, tau) for tau in (0.0, 0.42, 1.0, 5.0)}
    return metrics | {f"hd@{percent}": surface.hausdorff(record, percent) for percent in (0, 50, 95, 99.9, 100)}


def assert_same_bits(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, ...]) -> None:
    record, metrics = by_package(reference, predicted, spacing)
    mine = surface_record(reference, predicted, spacing)
    for name in ("reference_mm", "reference_mm2", "predicted_mm", "predicted_mm2"):
        assert np.array_equal(getattr(mine.settled, name), getattr(record, name)), name
        np.testing.assert_allclose(getattr(mine, name), getattr(record, name), rtol=0 if name.endswith("mm2") else 1e-14, atol=0)
    found = ours(mine)
    # what counts as within the tolerance is decided with the same bits; a distance may be the other of two equal sums
    assert {key: value for key, value in found.items() if key.startswith("nsd")} == {
        k: v for k, v in metrics.items() if k.startswith("nsd")
    }
    assert found == pytest.approx(metrics, rel=1e-14, abs=0, nan_ok=True)


def blob(rng: np.random.Generator, shape: tuple[int, int, int], level: float) -> np.ndarray:
    return np.asarray(ndimage.gaussian_filter(rng.random(shape), 1.5, mode="wrap") > level)


@pytest.mark.parametrize("seed", range(20))
def test_same_bits_as_the_package_on_random_blobs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 24, size=3))
    first, second = (blob(rng, shape, 0.5) | (rng.random(shape) < 0.02) for _ in range(2))  # border and specks included
    first[tuple(n // 2 for n in shape)] = second[tuple(n // 3 for n in shape)] = True
    assert_same_bits(first, second, SPACINGS[seed % len(SPACINGS)])
    assert_same_bits(first, second, tuple(rng.uniform(0.2, 6, size=3)))


def test_same_bits_as_the_package_on_real_masks(shared_data: Path) -> None:
    """Thresholded blood against the edema around it: touching, ragged, many components. One blood mask is empty."""
    from ichbench.cases.images import read_labels

    compared = 0
    for path in sorted((shared_data / "phe_derived_hematoma").glob("*.nii.gz")):
        matches = [found for found in (shared_data / "Dataset501_PHE").glob(f"labels*/{path.name}")]
        if not matches:
            continue
        reference, grid = read_labels(matches[0])
        predicted, _ = read_labels(path)
        record = surface_record(reference != 0, predicted != 0, grid.spacing_zyx_mm)
        if predicted.any() and compared < 6:
            assert_same_bits(reference != 0, predicted != 0, grid.spacing_zyx_mm)
            compared += 1
        elif not predicted.any():
            assert surface.nsd(record, 0.42) == 0
            assert surface.hausdorff(record, 95) == math.inf
    assert compared >= 3


@pytest.mark.parametrize("empty", [(True, False), (False, True)])
def test_the_package_raises_on_one_empty_mask_and_we_do_not(empty: tuple[bool, bool]) -> None:
    """Why the package's functions are not called: version 0.1 says np.Inf, which NumPy 2 removed."""
    masks = [box((4, 4, 4), *([(0, 0)] * 3 if e else [(1, 3)] * 3)) for e in empty]
    with pytest.raises(AttributeError, match=r"np\.Inf"):
        by_package(masks[0], masks[1], (1.0, 1.0, 1.0))
    record = surface_record(masks[0], masks[1], (1.0, 1.0, 1.0))
    assert surface.nsd(record, 1e9) == 0.0
    assert surface.hausdorff(record, 0) == surface.hausdorff(record, 100) == surface.assd(record) == math.inf
    assert sorted((record.reference_mm.size, record.predicted_mm.size))[0] == 0


@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 1, 1), (0, 4, 4), (0, 0, 0)])
def test_two_empty_masks(shape: tuple[int, int, int]) -> None:
    record = surface_record(np.zeros(shape, bool), np.zeros(shape, bool), (1.0, 1.0, 1.0))
    assert math.isnan(surface.nsd(record, 1.0))
    assert math.isnan(surface.assd(record))
    assert surface.hausdorff(record, 100) == math.inf  # the official convention; `strict` says 0


# --- closed forms and published numbers --------------------------------------------------------------------------------


def test_area_of_one_voxel_is_eight_corners() -> None:
    sz, sy, sx = 5.0, 0.45, 0.4
    corner = 0.125 * math.sqrt((sy * sx) ** 2 + (sz * sx) ** 2 + (sz * sy) ** 2)
    mask = box((3, 3, 3), (1, 2), (1, 2), (1, 2))
    record = surface_record(mask, mask, (sz, sy, sx))
    assert record.reference_mm2 == pytest.approx([corner] * 8, rel=1e-14)
    assert not record.reference_mm.any()
    unit = surface_record(mask, mask, (1.0, 1.0, 1.0))
    assert unit.reference_mm2.sum() == pytest.approx(1.732, abs=5e-4)
    assert surface_record(*[box((6, 6, 6), *[(0, 6)] * 3)] * 2, (1.0, 1.0, 1.0)).reference_mm2.sum() == pytest.approx(194.16, abs=5e-3)


def test_two_voxels_two_steps_apart() -> None:
    """Of the package's own tests: distance 2 along an axis of 1 mm, spacing (3, 2, 1)."""
    first, second = np.zeros((2, 6, 6, 8), dtype=bool)
    first[2, 2, 2] = second[2, 2, 4] = True
    record = surface_record(first, second, (3.0, 2.0, 1.0))
    assert surface.hausdorff(record, 100) == 2.0
    assert surface.nsd(record, 1.0) == pytest.approx(0.5, abs=1e-12)
    assert surface.assd(record) == pytest.approx(1.5, abs=1e-12)


def test_slabs_of_50_and_51() -> None:
    """Of the package's own tests, at (2, 1, 1) mm: average distances .322 and .339, HD 2, NSD@1 .836."""
    first, second = (np.zeros((100, 100, 100), dtype=bool) for _ in range(2))
    first[0:50], second[0:51] = True, True
    record = surface_record(first, second, (2.0, 1.0, 1.0))
    assert surface.hausdorff(record, 100) == surface.hausdorff(record, 95) == 2.0
    assert surface.nsd(record, 1.0) == pytest.approx(0.836, abs=5e-4)
    sides = ((record.reference_mm, record.reference_mm2), (record.predicted_mm, record.predicted_mm2))
    means = [np.average(distances, weights=areas) for distances, areas in sides]
    assert means == pytest.approx([0.322, 0.339], abs=5e-4)
    assert means[0] < surface.assd(record) < means[1]


@pytest.mark.parametrize(
    ("spacing_mm", "expected"), [(0.40, 1.0), (0.419, 1.0), (0.42, 1.0), (0.43, 0.8997), (0.45, 0.9013), (0.488, 0.9042)]
)
def test_one_voxel_shift_at_the_tolerance_of_the_challenge(spacing_mm: float, expected: float) -> None:
    z, y, x = np.meshgrid(np.arange(20) - 10, np.arange(160) - 80, np.arange(160) - 80, indexing="ij")
    mask = (z * 5 / 9) ** 2 + (y * 0.45 / 8) ** 2 + (x * 0.45 / 10) ** 2 <= 1
    record = surface_record(mask, np.roll(mask, 1, axis=2), (5.0, spacing_mm, spacing_mm))
    assert surface.nsd(record, 0.42) == pytest.approx(expected, abs=5e-5 if expected < 1 else 0)


@pytest.mark.parametrize(("axis", "nsd", "hd"), [(2, 0.62777, 0.45), (0, 0.72077, 5.0)])
def test_shifted_box(axis: int, nsd: float, hd: float) -> None:
    mask = box((8, 20, 20), (2, 4), (5, 9), (5, 9))
    record = surface_record(mask, np.roll(mask, 1, axis=axis), (5.0, 0.45, 0.45))
    assert surface.nsd(record, 0.42) == pytest.approx(nsd, abs=5e-6)
    assert surface.hausdorff(record, 100) == hd


@pytest.mark.parametrize(("spacing_mm", "steps"), [(0.42, 1), (0.21, 2), (0.105, 4)])
def test_the_tolerance_itself_is_within_the_tolerance_at_500_places(spacing_mm: float, steps: int) -> None:
    """steps * spacing is 0.42 exactly; from scaled coordinates (i*s - j*s) it would be 0.42000000000000171 at some i."""
    assert steps * spacing_mm == 0.42
    scaled = np.arange(520) * spacing_mm
    assert (scaled[steps:] - scaled[:-steps] > 0.42).any(), "the trap that this test is about"
    mask = np.zeros((3, 3, 520), dtype=bool)
    for place in range(500):
        mask[...] = False
        mask[1, 1, place : place + 8] = True
        mask[0, 0, 0] = True  # keeps the box at the origin, so that the place is a different one each time
        moved = np.roll(mask, steps, axis=2)
        moved[0, 0, :] = mask[0, 0, :]
        assert surface.nsd(surface_record(mask, moved, (5.0, 0.42, spacing_mm)), 0.42) == 1.0


@pytest.mark.parametrize("spacing", [(0.14, 0.28, 0.28), (0.28, 0.28, 0.14), (5.0, 0.084, 0.084), (5.0, 0.14, 0.14), (0.42, 0.3, 0.3)])
def test_sums_that_land_on_the_tolerance_are_decided_as_the_package_does(spacing: tuple[float, float, float]) -> None:
    shape = (12, 14, 14)
    mask = box(shape, (3, 6), (4, 7), (4, 7))
    for shift in itertools.product((0, 1), (0, 1, 3), (0, 1, 3, 4)):
        assert_same_bits(mask, np.roll(mask, shift, axis=(0, 1, 2)), spacing)


def egg(shape: tuple[int, ...], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    terms = zip(np.ogrid[tuple(slice(0, n) for n in shape)], centre, radii, strict=True)
    return np.asarray(sum(((axis - c) / radius) ** 2 for axis, c, radius in terms) <= 1)


def test_equal_sums_on_both_sides_of_the_tolerance_are_decided_by_the_transform() -> None:
    """At 0.084 mm, five voxels are 0.42 mm: 5 + 0 + 0, or 4 + 3 + 0, whose last bit is another."""
    rng = np.random.default_rng(2022)
    spacing, tolerance_mm, decided = (0.084, 0.084, 0.084), 0.42, 0
    for _ in range(120):
        masks = [egg((12, 30, 30), rng.normal((6, 15, 15), (0.5, 2, 2)), rng.uniform((2, 4, 4), (4, 9, 9))) for _ in range(2)]
        record, expected = surface_record(*masks, spacing), by_package(*masks, spacing)[1]["nsd@0.42"]
        assert surface.nsd(record, tolerance_mm) == expected
        sides = ((record.reference_mm, record.reference_mm2), (record.predicted_mm, record.predicted_mm2))
        bare = sum(areas[distances <= tolerance_mm].sum() for distances, areas in sides) / sum(areas.sum() for _, areas in sides)
        decided += abs(bare - expected) > 1e-9
    assert decided > 0, "no pair here needed the transform: draw others"


@pytest.mark.parametrize(
    ("spacing", "tolerance_mm"),
    [
        ((0.084,) * 3, 0.42),
        ((0.14,) * 3, 0.42),
        ((5.0, 0.42, 0.42), 0.42),
        ((0.1,) * 3, 0.3),
        ((0.43, 0.5, 0.71), 0.42),
        ((1.0,) * 3, 3.0),
        ((0.7, 0.1, 0.3), 1.1),
    ],
)
def test_where_equal_sums_lie_on_both_sides(spacing: tuple[float, float, float], tolerance_mm: float) -> None:
    reach = range(int(max(tolerance_mm / edge for edge in spacing)) + 3)
    lengths = [
        math.sqrt(sum((n * edge) ** 2 for n, edge in zip(steps, spacing, strict=True))) for steps in itertools.product(reach, repeat=3)
    ]
    close = [length for length in lengths if abs(length - tolerance_mm) <= 1e-12 * tolerance_mm]
    expected = any(length <= tolerance_mm for length in close) and any(length > tolerance_mm for length in close)
    assert surface._straddled(spacing, tolerance_mm) == expected


KNIFE = (
    """
    190 191 202 203 214 215 281 282 283 293 294 295 305 306 307 322 323 334 335 346 347 413 414 415 425 426 427 437 438
    439 454 455 466 467 478 479 545 546 547 557 558 559 569 570 571 677 678 679 689 690 691 701 702 703 746 747 878 879
    1010 1011
    """,
    """
    599 606 607 608 609 611 623 731 743 755 1194 1206 1218 1232 1233 1234 1235 1244 1245 1246 1247
    """,
)


def test_a_percentile_that_hangs_on_the_last_bit_of_two_equal_distances() -> None:
    """Found by drawing percentiles from the package's own cumulative areas: one of 2,636 such pairs came out otherwise."""
    masks = [np.isin(np.arange(10 * 11 * 12), np.array(text.split(), dtype=int)).reshape(10, 11, 12) for text in KNIFE]
    record = surface_record(*masks, (5.0, 0.14, 0.14))
    assert surface.hausdorff(record, 45.75265918897241) == 5.0


# --- brute force and invariances ---------------------------------------------------------------------------------------


def corners(mask: np.ndarray, spacing: tuple[float, ...]) -> list[tuple[tuple[int, ...], float]]:
    """Surfels by loops: place and area of each corner whose eight voxels are neither all in nor all out."""
    areas = surface.surface_areas_mm2(spacing)
    found = []
    for corner in itertools.product(*(range(n + 1) for n in mask.shape)):
        code = 0
        for bit, step in enumerate(itertools.product((0, 1), repeat=3)):  # the voxel before the corner comes first and weighs most
            voxel = tuple(c + s - 1 for c, s in zip(corner, step, strict=True))
            inside = all(0 <= v < n for v, n in zip(voxel, mask.shape, strict=True)) and bool(mask[voxel])
            code |= inside << (7 - bit)
        if code not in (0, 255):
            found.append((corner, float(areas[code])))
    return found


@settings(max_examples=60)
@given(pairs(), EDGES_MM)
def test_brute_force(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    first, second = (corners(mask, spacing) for mask in masks)

    def nearest(place: tuple[int, ...], others: list[tuple[tuple[int, ...], float]]) -> float:
        return min(math.dist([p * s for p, s in zip(place, spacing, strict=True)], [o * s for o, s in zip(other, spacing, strict=True)])
                   for other, _ in others)  # fmt: skip

    sides = [[(nearest(place, other), area) for place, area in own] for own, other in ((first, second), (second, first))]
    total = sum(area for side in sides for _, area in side)
    record = surface_record(masks[0], masks[1], spacing)
    assert surface.hausdorff(record, 100) == pytest.approx(max(d for side in sides for d, _ in side), rel=1e-12, abs=1e-12)
    assert surface.nsd(record, 0.9) == pytest.approx(sum(a for side in sides for d, a in side if d <= 0.9) / total, rel=1e-12)
    assert surface.assd(record) == pytest.approx(sum(a * d for side in sides for d, a in side) / total, rel=1e-12, abs=1e-12)


def summary(record: SurfaceDistances) -> list[float]:
    return [surface.nsd(record, 0.9), surface.nsd(record, 2.1), surface.hausdorff(record, 100), surface.assd(record)]


@settings(max_examples=60)
@given(pairs(), EDGES_MM, MOVES)
def test_turning_mirroring_padding_and_swapping_change_nothing(
    masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float], move: Move
) -> None:
    check_unmoved(lambda *pair: summary(surface_record(*pair)), masks, spacing, move)


@settings(max_examples=40)
@given(pairs(), EDGES_MM, st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_space_scales_distances(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float], factor: float) -> None:
    """Powers of two, so that the scaled numbers are exact and the comparison is too."""
    record, scaled = (surface_record(masks[0], masks[1], [s * f for s in spacing]) for f in (1.0, factor))
    for tolerance_mm in (0.0, 0.43, 1.42):
        assert surface.nsd(scaled, factor * tolerance_mm) == surface.nsd(record, tolerance_mm)
    assert surface.hausdorff(scaled, 95) == factor * surface.hausdorff(record, 95)
    assert surface.assd(scaled) == pytest.approx(factor * surface.assd(record), rel=1e-14)


@settings(max_examples=40)
@given(pairs(), EDGES_MM)
def test_order_of_the_metrics(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    record = surface_record(masks[0], masks[1], spacing)
    curve = [surface.nsd(record, tolerance_mm) for tolerance_mm in np.linspace(0, 30, 31)]
    assert curve == sorted(curve)
    percentiles = [surface.hausdorff(record, percent) for percent in (0, 10, 50, 95, 100)]
    assert percentiles == sorted(percentiles)
    assert surface.assd(record) <= percentiles[-1] + 1e-12
    assert surface.nsd(record, percentiles[-1]) == 1.0
    same = surface_record(masks[0], masks[0].copy(), spacing)
    assert [surface.nsd(same, 0.0), surface.hausdorff(same, 100), surface.assd(same)] == [1.0, 0.0, 0.0]


def test_joint_box() -> None:
    first, second = box((9, 9, 9), (1, 3), (2, 4), (8, 9)), box((9, 9, 9), (2, 6), (0, 1), (3, 4))
    assert surface.joint_box(first, second) == (slice(1, 6), slice(0, 4), slice(3, 9))


def test_bad_parameters() -> None:
    record = surface_record(box((2, 2, 2), *[(0, 1)] * 3), box((2, 2, 2), *[(1, 2)] * 3), (1, 1, 1))
    for tolerance_mm in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="tolerance"):
            surface.nsd(record, tolerance_mm)
    for percent in (-1, 100.5, math.nan):
        with pytest.raises(InputError, match="percentile"):
            surface.hausdorff(record, percent)
    with pytest.raises(InputError, match=r"\(2, 2, 2\).*\(2, 2, 3\)"):
        surface_record(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool), (1, 1, 1))
