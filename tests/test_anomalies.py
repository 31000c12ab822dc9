"""Anomaly checks: each fires on a constructed example at its limit, and on real and phantom references they stay silent."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from shapes import box

from ichbench.errors import InputError
from ichbench.scoring import anomalies
from ichbench.scoring.anomalies import CHECKS, Anomaly, components, find_anomalies
from ichbench.scoring.surface import hausdorff, surface_record

CT = (28, 512, 512)
CT_MM = (5.0, 0.45, 0.45)
MM = (1.0, 1.0, 1.0)


def kinds(*arguments: object, **named: object) -> list[str]:
    return [found.kind for found in find_anomalies(*arguments, **named)]  # type: ignore[arg-type]


def only(kind: str, *arguments: object, **named: object) -> Anomaly:
    (found,) = [found for found in find_anomalies(*arguments, **named) if found.kind == kind]  # type: ignore[arg-type]
    return found


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    grids = np.ogrid[tuple(slice(n) for n in shape)]
    return np.asarray(sum(((g - c) / r) ** 2 for g, c, r in zip(grids, centre, radii, strict=True)) <= 1)


def bleed() -> np.ndarray:
    """12 ml, left of the middle and above it, on the grid of a head CT."""
    return ball(CT, (16, 230, 330), (4, 30, 25))


def circle(radius: int, around: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a circle one voxel wide: eight arcs, on each of which every row or column has one voxel."""
    along = np.arange(round(radius / math.sqrt(2)) + 1)
    across = np.rint(np.sqrt(radius**2 - along**2)).astype(int)
    points = {(s * a, t * b) for p, q in zip(along, across, strict=True) for a, b in ((p, q), (q, p)) for s in (1, -1) for t in (1, -1)}
    rows, columns = np.array(sorted(points)).T
    return rows + around[0], columns + around[1]


def outline(shape: tuple[int, int, int], z: int, *corner_and_size: int) -> np.ndarray:
    """A rectangle's border, one voxel wide, on slice z: first row, first column, rows, columns."""
    y, x, rows, columns = corner_and_size
    mask = box(shape, (z, z + 1), (y, y + rows), (x, x + columns))
    return mask & ~box(shape, (z, z + 1), (y + 1, y + rows - 1), (x + 1, x + columns - 1))


# --- guard blobs -------------------------------------------------------------------------------------------------------


def test_the_circle_of_the_viola_docker_is_a_guard_blob() -> None:
    """Radius 100 voxels around the middle of one slice of an otherwise empty mask (facts A6)."""
    mask = np.zeros(CT, dtype=np.uint8)
    mask[13, *circle(100, (256, 256))] = 1
    assert mask.sum() == 564  # a digital circle has about 4 sqrt(2) r voxels
    for reference in (None, bleed(), np.zeros(CT, bool)):
        (found,) = find_anomalies(reference, mask, CT_MM)
        assert found.kind == "guard_blob"
        assert found.evidence == {"voxels": 564, "ml": pytest.approx(564 * 1.0125e-3), "share": 1.0, "outlines": 1, "slice": 13}
        assert "read this case as an empty prediction" in found.text.lower()


def test_an_outline_counts_from_six_times_its_own_voxels() -> None:
    """A border of 26 x 28 has 104 voxels around 24 * 26 = 6 * 104; one of 26 x 27 has 102 around 600 < 6 * 102."""
    shape = (5, 60, 60)
    assert only("guard_blob", None, outline(shape, 2, 10, 10, 26, 28), MM).evidence["voxels"] == 104
    assert "guard_blob" not in kinds(None, outline(shape, 2, 10, 10, 26, 27), MM)


def test_what_is_no_outline() -> None:
    shape = (6, 120, 120)
    whole = outline(shape, 2, 10, 10, 80, 80)
    opened = whole.copy()
    opened[2, 40, 10] = False  # a line that does not close encloses nothing, as a thin subdural bleed
    tube = whole | outline(shape, 3, 10, 10, 80, 80)
    disc = ball(shape, (2, 60, 60), (0.5, 30, 30))
    ring = disc & ~ball(shape, (2, 60, 60), (0.5, 26, 26))
    assert "guard_blob" in kinds(None, whole, MM)
    for mask in (opened, tube, disc, ring):
        assert "guard_blob" not in kinds(None, mask, MM)


def test_a_circle_whose_steps_are_diagonal_is_closed() -> None:
    diamond = np.zeros((1, 61, 61), dtype=bool)
    y, x = np.indices((61, 61))
    diamond[0] = abs(y - 30) + abs(x - 30) == 29
    assert only("guard_blob", None, diamond, MM).evidence["voxels"] == 4 * 29


def test_an_outline_beside_a_bleed_and_one_that_is_the_reference() -> None:
    drawn = outline(CT, 3, 100, 100, 60, 60) | outline(CT, 25, 300, 200, 50, 50)
    found = only("guard_blob", bleed(), bleed() | drawn, CT_MM)
    assert found.evidence["outlines"] == 2
    assert found.evidence["slice"] == 3
    assert found.evidence["voxels"] == drawn.sum()
    assert found.evidence["share"] == pytest.approx(drawn.sum() / (drawn | bleed()).sum())
    assert "empty prediction" not in found.text
    assert "Take it out of the mask" in found.text
    assert "guard_blob" not in kinds(drawn, drawn, CT_MM)
    half = drawn & (np.arange(512) >= 130)  # half of the first and all of the second
    assert "guard_blob" not in kinds(half, drawn, CT_MM)
    assert only("guard_blob", drawn & (np.arange(512) >= 131), drawn, CT_MM).evidence["slice"] == 3
    other = drawn.copy()
    other[3] = False  # one of the two is right: the other one is reported
    assert only("guard_blob", other, drawn, CT_MM).evidence["outlines"] == 1


def test_lone_specks() -> None:
    one = np.zeros(CT, dtype=bool)
    one[4, 256, 256] = True
    found = only("guard_blob", bleed(), one, CT_MM)
    assert found.evidence == {"specks": 1, "voxels": 1, "ml": pytest.approx(1.0125e-3), "share": 1.0}
    block = box(CT, (3, 6), (256, 259), (256, 259))  # 27 voxels, 0.027 ml: the largest speck
    assert only("guard_blob", None, block | np.roll(block, 90, axis=1), CT_MM).evidence["specks"] == 2
    block[3, 256, 259] = True
    assert "guard_blob" not in kinds(None, block, CT_MM)
    assert "guard_blob" not in kinds(None, one | block, CT_MM)


def test_a_speck_is_less_than_the_smallest_bleed_but_always_one_voxel() -> None:
    """Voxels of 10 mm3: 5 make 0.05 ml. Voxels of 125 mm3: one is 0.125 ml."""
    pair = box((9, 9, 9), (4, 5), (4, 5), (4, 9))
    assert "guard_blob" in kinds(None, pair, (10.0, 1.0, 1.0))
    pair[3, 4, 4] = True
    assert "guard_blob" not in kinds(None, pair, (10.0, 1.0, 1.0))
    assert "guard_blob" in kinds(None, box((9, 9, 9), (4, 5), (4, 5), (4, 5)), (5.0, 5.0, 5.0))
    assert "guard_blob" not in kinds(None, box((9, 9, 9), (4, 5), (4, 5), (4, 6)), (5.0, 5.0, 5.0))


def test_specks_that_find_something_guard_nothing() -> None:
    """One voxel in a reference of 19 has Dice 2 / 20 = 0.1, in one of 20 it has 2 / 21."""
    speck = box((5, 30, 30), (2, 3), (2, 3), (5, 6))
    assert "guard_blob" not in kinds(box((5, 30, 30), (2, 3), (2, 3), (2, 21)), speck, MM)
    assert "guard_blob" in kinds(box((5, 30, 30), (2, 3), (2, 3), (2, 22)), speck, MM)


def test_a_guard_makes_no_distance_finite_where_the_reference_is_empty() -> None:
    """HD of an empty reference is infinite whatever is predicted, so nothing is said about it."""
    for mask in (outline(CT, 13, 100, 100, 200, 200), box(CT, (4, 5), (256, 257), (256, 257))):
        assert "infinite Hausdorff distance into a finite one" in only("guard_blob", bleed(), mask, CT_MM).text
        for reference in (None, np.zeros(CT, bool)):
            text = only("guard_blob", reference, mask, CT_MM).text
            assert "Hausdorff" not in text
            assert text.endswith(": read this case as an empty prediction")


# --- borders, volume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "kind"), [(0, "touches_end_slice"), (1, "touches_border"), (2, "touches_border")])
@pytest.mark.parametrize("end", ["first", "last"])
def test_each_plane_of_the_border(axis: int, kind: str, end: str) -> None:
    mask = np.moveaxis(box((9, 20, 20), (0, 2) if end == "first" else (7, 9), (5, 10), (5, 11)), 0, axis)
    found = only(kind, None, mask, MM)
    assert found.evidence == {f"{'zyx'[axis]}_{end}": 30}
    assert {"touches_end_slice", "touches_border"} & set(kinds(None, mask, MM)) == {kind}
    assert kind not in kinds(np.moveaxis(box((9, 20, 20), (0, 1) if end == "first" else (8, 9), (0, 1), (0, 1)), 0, axis), mask, MM)
    inner = np.moveaxis(box((9, 20, 20), (1, 8), (5, 10), (5, 11)), 0, axis)
    assert kind not in kinds(None, inner, MM)


@pytest.mark.parametrize("slices", [1, 2])
def test_a_scan_without_inner_slices_has_no_end_slices(slices: int) -> None:
    assert kinds(None, box((slices, 30, 30), (0, slices), (5, 15), (5, 15)), MM) == []
    assert kinds(None, box((3, 30, 30), (0, 3), (5, 15), (5, 15)), MM) == ["touches_end_slice"]


def test_the_limits_of_a_volume_belong_to_it() -> None:
    def of(voxels: int) -> np.ndarray:
        inner = np.zeros((78, 78, 78), dtype=bool)
        inner.reshape(-1)[:voxels] = True
        return np.pad(inner, 1)

    for voxels, odd in ((49, True), (50, False), (300_000, False), (300_001, True)):
        assert ("implausible_volume" in kinds(None, of(voxels), MM)) == odd, voxels
    assert only("implausible_volume", None, of(49), MM).evidence["ml"] == pytest.approx(0.049)
    # what the reference is, is plausible; a reference within the limits does not excuse
    assert "implausible_volume" not in kinds(of(20), of(40), MM)
    assert "implausible_volume" not in kinds(of(310_000), of(400_000), MM)
    assert "implausible_volume" in kinds(of(50), of(40), MM)
    assert "implausible_volume" in kinds(of(40), of(300_001), MM)


def test_the_volume_is_that_of_the_voxels_and_not_of_their_edges() -> None:
    """A sheared grid, whose voxels hold a quarter of the product of their edges: 80 voxels of 1 mm are 0.02 ml there, not 0.08."""
    mask = box((9, 9, 9), (2, 6), (2, 6), (2, 7))
    assert kinds(None, mask, MM) == []
    found = only("implausible_volume", None, mask, MM, voxel_ml=0.25e-3)
    assert found.evidence == {"ml": pytest.approx(0.02)}
    # and a block of 27 voxels is a speck only where it is less than the smallest plausible bleed
    block = box((9, 9, 9), (2, 5), (2, 5), (2, 5))
    assert "guard_blob" in kinds(None, block, MM)
    assert "guard_blob" not in kinds(None, block, MM, voxel_ml=4e-3)


# --- outside the head --------------------------------------------------------------------------------------------------


def head_ct(air: float = -1000.0) -> np.ndarray:
    """20 slices of a head at 1 mm: brain 30 HU, skull 900, an air-filled sinus, a headrest below and a tube above it."""
    shape = (20, 200, 200)
    image = np.full(shape, air)
    image[ball(shape, (9.5, 90, 100), (1e6, 75, 60))] = 900
    image[ball(shape, (9.5, 90, 100), (1e6, 70, 55))] = 30
    image[:, 40:50, 95:105] = air
    image[:, 190:195, 40:160] = 200
    image[:, 3:7, 150:190] = 200
    return image + np.where(image == air, 0, np.random.default_rng(3).normal(0, 5, shape))


PLACES = {
    "brain": ((90, 100), False),
    "sinus": ((42, 97), False),
    "air": ((90, 10), True),
    "headrest": ((190, 100), True),
    "tube": ((2, 170), True),
    "beyond the skull": ((172, 100), True),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("air", [-1000.0, -1024.0, -2000.0, -3024.0, -20.0, 0.0])
def test_outside_the_head_with_every_kind_of_air(place: str, air: float) -> None:
    """-20 and 0 are what air becomes in a clipped window."""
    (y, x), odd = PLACES[place]
    image = np.clip(head_ct(air), air, 100 if air > -200 else None)
    mask = box(image.shape, (8, 12), (y, y + 5), (x, x + 5))
    for picture in (image, np.rint(image).astype(np.int16), image.astype(np.float32)):
        found = [a for a in find_anomalies(None, mask, MM, picture) if a.kind == "outside_head"]
        assert len(found) == odd
        for anomaly in found:
            assert anomaly.evidence == {"ml": pytest.approx(0.1), "share": 1.0}
    assert "outside_head" not in kinds(None, mask, MM)


def test_padding_beside_air_and_voxels_that_are_not_numbers() -> None:
    image = head_ct()
    image[:, :, :5] = -3024
    image[:, :3] = np.nan
    image[0, -1, -1] = np.inf
    assert "outside_head" in kinds(None, box(image.shape, (8, 12), (90, 95), (6, 11)), MM, image)
    assert "outside_head" not in kinds(None, box(image.shape, (8, 12), (90, 95), (98, 103)), MM, image)


def test_air_in_a_clipped_window_need_not_be_one_value() -> None:
    image = np.clip(head_ct(-20), -20, 100) + np.random.default_rng(1).uniform(0, 9, (20, 200, 200))
    assert "outside_head" in kinds(None, box(image.shape, (8, 12), (90, 95), (10, 15)), MM, image)


def test_above_the_head_is_outside() -> None:
    image = head_ct()
    image[16:] = -1000
    assert "outside_head" not in kinds(None, box(image.shape, (8, 12), (90, 95), (90, 95)), MM, image)
    assert only("outside_head", None, box(image.shape, (14, 18), (90, 95), (90, 95)), MM, image).evidence["share"] == 0.5


def test_how_much_may_lie_outside() -> None:
    """1 % of the prediction, or 0.05 ml."""
    image, brain = head_ct(), box((20, 200, 200), (5, 15), (80, 90), (70, 120))  # 5000 voxels
    for voxels, odd in ((49, False), (50, True)):
        outside = box(image.shape, (10, 11), (90, 91), (5, 5 + voxels % 10)) | box(image.shape, (10, 11), (92, 92 + voxels // 10), (5, 15))
        assert outside.sum() == voxels
        assert ("outside_head" in kinds(None, brain | outside, MM, image)) == odd
    few = box(image.shape, (10, 11), (90, 91), (5, 10))
    for inside, odd in ((495, True), (496, False)):  # 5 of 500, 5 of 501
        mask = few.copy()
        mask.reshape(-1)[np.flatnonzero(brain)[:inside]] = True
        assert ("outside_head" in kinds(None, mask, MM, image)) == odd


def test_silent_where_the_reference_is_outside_or_there_is_no_head() -> None:
    image = head_ct()
    outside = box(image.shape, (8, 12), (90, 95), (10, 15))
    assert "outside_head" in kinds(bleed()[:20, :200, :200], outside, MM, image)
    assert "outside_head" not in kinds(np.roll(outside, 5, axis=1), outside, MM, image)
    rng = np.random.default_rng(0)
    labels = bleed()[:20, :200, :200].astype(np.int16)
    for other in (rng.normal(0, 1, image.shape), np.zeros(image.shape), np.full(image.shape, -1000), labels):
        assert kinds(None, outside, MM, other) == ["no_head"]
    assert "no_head" not in kinds(None, outside, MM) + kinds(None, outside, MM, image)
    assert only("no_head", None, outside, MM, labels).evidence == {}
    assert find_anomalies(None, outside & False, MM, labels) == ()  # nothing to look for


# --- flips -------------------------------------------------------------------------------------------------------------

WAYS = [axes for n in range(1, 8) for axes in [tuple(k for k in range(3) if n >> k & 1)]]


@pytest.mark.parametrize("axes", WAYS)
def test_every_flip_is_found_and_named(axes: tuple[int, ...]) -> None:
    reference = ball((12, 40, 50), (3, 12, 14), (2, 6, 8)) | ball((12, 40, 50), (5, 20, 20), (1, 3, 5))
    good = np.roll(reference, 1, axis=2)
    found = only("flipped", reference, np.flip(good, axes), MM)
    total = reference.sum() + good.sum()
    assert found.evidence["dice_flipped"] == pytest.approx(2 * (reference & good).sum() / total, rel=1e-14)
    assert found.evidence["dice"] == pytest.approx(2 * (reference & np.flip(good, axes)).sum() / total, rel=1e-14)
    assert [found.evidence[f"flip_{name}"] for name in "zyx"] == [float(axis in axes) for axis in range(3)]
    words = ("top-bottom", "front-back", "left-right")
    assert [word in found.text for word in words] == [axis in axes for axis in range(3)]
    assert "flipped" not in kinds(reference, good, MM)
    assert "flipped" not in kinds(None, good, MM)


def test_the_axes_of_the_file_name_a_flip() -> None:
    reference = ball((12, 40, 50), (3, 20, 14), (2, 6, 8))
    assert "x (front-back)" in only("flipped", reference, reference[:, :, ::-1], MM, axis_codes_zyx="SLA").text
    assert "x (?)" in only("flipped", reference, reference[:, :, ::-1], MM, axis_codes_zyx="???").text


def test_a_symmetric_mask_is_not_flipped_along_its_axis() -> None:
    """The reference is symmetric in y: mirrored in x and y it fits as well as mirrored in x alone, which is what is said."""
    reference = ball((12, 41, 50), (3, 20, 14), (2, 6, 8))
    found = only("flipped", reference, reference[:, :, ::-1], MM)
    assert [found.evidence[f"flip_{name}"] for name in "zyx"] == [0, 0, 1]
    symmetric = ball((11, 41, 51), (5, 20, 25), (2, 6, 8))
    assert kinds(symmetric, symmetric, MM) == []
    assert kinds(symmetric, np.roll(symmetric, 12, axis=2) | symmetric, MM) == []


@pytest.mark.parametrize(
    ("here", "there", "odd"),
    [(0, 50, True), (0, 49, False), (25, 50, True), (26, 50, False), (30, 55, True), (31, 55, False), (37, 62, True), (38, 62, False)],
)
def test_how_much_a_flip_must_gain(here: int, there: int, odd: bool) -> None:
    """Reference and prediction of 100 voxels: `here` overlap as given, `there` when mirrored, so Dice is a percentage."""
    reference = box((3, 30, 60), (1, 2), (5, 15), (5, 15))
    inside = np.flatnonzero(reference)
    parts = np.zeros((3, *reference.shape), dtype=bool)
    parts[0].reshape(-1)[inside[:here]] = True
    parts[1].reshape(-1)[inside[:there]] = True
    parts[2, 0].reshape(-1)[: 100 - here - there] = True  # the rest lies on slice 0, where no flip meets the reference
    mask = parts[0] | parts[1, :, :, ::-1] | parts[2]
    assert mask.sum() == 100
    found = [found for found in find_anomalies(reference, mask, MM) if found.kind == "flipped"]
    assert [anomaly.evidence["dice_flipped"] for anomaly in found] == ([there / 100] if odd else [])


# --- far specks --------------------------------------------------------------------------------------------------------


def test_a_far_speck_and_what_it_costs() -> None:
    reference, predicted = bleed(), np.roll(bleed(), 2, axis=1)
    speck = box(CT, (2, 3), (60, 61), (70, 73))
    found = only("speck_far", reference, predicted | speck, CT_MM)
    with_it, without = (hausdorff(surface_record(reference, mask, CT_MM), 100) for mask in (predicted | speck, predicted))
    assert found.evidence == {"specks": 1, "voxels": 3, "hd_mm": with_it, "hd_without_mm": without}
    assert without < 2 < 100 < with_it
    assert only("speck_far", reference, predicted | speck, CT_MM, hd_mm=with_it).evidence == found.evidence
    assert only("speck_far", reference, predicted | speck, CT_MM, hd_mm=321.0).evidence["hd_mm"] == 321
    assert kinds(None, predicted | speck, CT_MM) == kinds(np.zeros(CT, bool), predicted | speck, CT_MM) == []


SMALL = (8, 120, 120)


def test_what_is_no_far_speck() -> None:
    reference = box(SMALL, (3, 5), (50, 60), (50, 60))
    speck = box(SMALL, (3, 4), (55, 56), (100, 101))
    assert "speck_far" in kinds(reference, reference | speck, MM)
    large = box(SMALL, (3, 4), (10, 20), (10, 20))  # 100 voxels, farther away: the speck is not what HD hangs on
    assert "speck_far" not in kinds(reference, reference | speck | large, MM)
    assert "speck_far" not in kinds(reference, reference | np.roll(speck, -36, axis=2), MM)  # 5 mm away
    assert "speck_far" not in kinds(reference, speck, MM)  # nothing else there: a guard blob
    assert "guard_blob" in kinds(reference, speck, MM)
    # specks may be all there is, if one of them is right
    few = box(SMALL, (3, 4), (50, 53), (50, 53))
    assert "speck_far" in kinds(few, few | speck, MM)
    # the speck is the only thing near a second bleed: without it HD is no better
    assert "speck_far" not in kinds(reference | np.roll(box(SMALL, (3, 4), (50, 60), (90, 99)), 0), reference | speck, MM)


@pytest.mark.parametrize(("gap", "odd"), [(10, True), (9, False)])
def test_a_far_speck_costs_ten_millimetres(gap: int, odd: bool) -> None:
    """The far side of a voxel that begins `gap - 1` mm from the reference lies `gap` mm from its surface."""
    reference = box(SMALL, (3, 5), (50, 60), (50, 60))
    speck = box(SMALL, (3, 4), (55, 56), (60 + gap - 1, 60 + gap))
    assert hausdorff(surface_record(reference, reference | speck, MM), 100) == gap
    assert ("speck_far" in kinds(reference, reference | speck, MM)) == odd


def test_only_far_specks_are_removed() -> None:
    reference = box(SMALL, (3, 5), (50, 60), (50, 60))
    near, far = box(SMALL, (3, 4), (55, 56), (62, 63)), box(SMALL, (3, 4), (55, 57), (100, 102))
    found = only("speck_far", reference, reference | near | far | np.roll(far, 50, axis=1), MM)
    assert (found.evidence["specks"], found.evidence["voxels"]) == (2, 8)
    assert found.evidence["hd_without_mm"] == 3


def test_a_large_reference_is_thinned_out_without_harm() -> None:
    reference = box((40, 120, 120), (5, 35), (20, 60), (20, 60))  # 48,000 voxels
    near, far = box(reference.shape, (20, 21), (40, 41), (66, 67)), box(reference.shape, (20, 21), (40, 41), (100, 101))
    assert only("speck_far", reference, reference | near | far, MM).evidence == {"specks": 1, "voxels": 1, "hd_mm": 41, "hd_without_mm": 7}
    assert "speck_far" not in kinds(reference, reference | near, MM)


def test_specks_all_over_are_noise_and_no_advice() -> None:
    """Beside a bleed 20 specks are worth removing; 21 are noise. The numbers are said either way."""
    reference = box((12, 120, 120), (8, 10), (50, 60), (50, 60))
    for n in (20, 21):
        strewn = np.zeros((5, 120, 120), dtype=bool)
        strewn[2, 4 : 4 + 4 * n : 4, 4] = True
        predicted = reference | np.concatenate([strewn, np.zeros((7, 120, 120), bool)])
        found = only("speck_far", reference, predicted, MM)
        assert (found.evidence["specks"], found.evidence["voxels"], found.evidence["hd_without_mm"]) == (n, n, 0)
        assert f"{n} far speck(s) ({n} voxel(s))" in found.text
        assert f"{found.evidence['hd_mm']:.1f}" in found.text
        assert ("noise" in found.text) == (n > 20)
        assert ("may pay off" in found.text) == (n <= 20)


# --- what they rest on -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 14)] * 3), st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_components_are_those_of_the_whole_volume(seed: int, shape: tuple[int, int, int], share: float) -> None:
    mask = np.random.default_rng(seed).random(shape) < share
    if not mask.any():
        return
    places = np.array(np.nonzero(mask))
    label, number = ndimage.label(mask, np.ones((3, 3, 3)))
    assert np.array_equal(components(places), label[mask] - 1)
    assert np.bincount(components(places)).size == number


def good_pair() -> tuple[np.ndarray, np.ndarray]:
    return bleed(), ball(CT, (16, 232, 331), (4, 29, 26))


def test_nothing_is_said_about_a_good_or_an_empty_prediction() -> None:
    reference, predicted = good_pair()
    assert kinds(reference, predicted, CT_MM) == kinds(None, predicted, CT_MM) == []
    for shape in (CT, (0, 4, 4), (3, 0, 0), (0, 0, 0), (1, 1, 1)):
        empty = np.zeros(shape, dtype=bool)
        assert find_anomalies(empty, empty, MM, np.zeros(shape)) == ()
        assert find_anomalies(np.ones(shape, bool), empty, MM) == ()


def test_several_warnings_come_in_the_order_of_the_checks() -> None:
    image = head_ct()
    reference = box(image.shape, (8, 12), (90, 100), (90, 100))
    odd = reference[:, ::-1, ::-1].copy()
    odd[0, 0, 0] = odd[19, 199, 199] = True
    odd |= outline(image.shape, 4, 5, 5, 50, 50)
    found = find_anomalies(reference, odd, MM, image)
    assert [anomaly.kind for anomaly in found] == [kind for kind in CHECKS if kind in {anomaly.kind for anomaly in found}]
    assert {"guard_blob", "touches_border", "touches_end_slice", "outside_head"} <= {anomaly.kind for anomaly in found}
    assert all(type(value) is float for anomaly in found for value in anomaly.evidence.values())
    assert list(CHECKS) == [check.__name__ for check in CHECKS.values()]


def test_an_anomaly_is_a_plain_frozen_value() -> None:
    found = only("implausible_volume", None, box((9, 9, 9), (3, 5), (3, 5), (3, 5)), MM)
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301 - our own bytes; workers send it to their parent
    assert len({found, found}) == 1
    with pytest.raises(AttributeError):
        found.kind = "other"  # type: ignore[misc]


def test_errors_say_what_came() -> None:
    mask = np.zeros((3, 4, 5), dtype=bool)
    for bad, match in (
        ((mask[0], mask, MM), "the reference has shape"),
        ((mask, mask[:, :2], MM), "same voxel grid"),
        ((None, mask * 0.5 + 0.25, MM), "threshold a probability map"),
        ((None, mask, (0.0, 1.0, 1.0)), "spacing"),
        ((None, mask, MM, np.zeros((3, 4, 6))), r"image has shape \(3, 4, 6\)"),
        ((None, mask, MM, np.full((3, 4, 5), "air")), "type <U3"),
    ):
        with pytest.raises(InputError, match=match):
            find_anomalies(*bad)  # type: ignore[arg-type]


SIDES = st.integers(0, 9)
KINDS_OF_MASK = st.sampled_from([np.bool_, np.uint8, np.int64, np.float32])


@settings(max_examples=150)
@given(
    shape=st.tuples(SIDES, SIDES, SIDES),
    seed=st.integers(0, 2**32 - 1),
    shares=st.tuples(*[st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])] * 2),
    dtype=KINDS_OF_MASK,
    spacing=st.tuples(*[st.sampled_from([1e-6, 0.45, 1.0, 5.0, 40.0, 1e6])] * 3),
    image=st.sampled_from(["none", "noise", "int16", "air", "nan", "huge"]),
    order=st.permutations(range(3)),
)
def test_masks_of_all_kinds_never_raise_and_are_not_changed(
    shape: tuple[int, ...], seed: int, shares: tuple[float, ...], dtype: type, spacing: tuple[float, ...], image: str, order: list[int]
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    masks = [((rng.random(shape) < share) * (1 if dtype is np.bool_ else 3)).astype(dtype).transpose(order) for share in shares]
    noise = rng.normal(0, 900, shape).transpose(order)
    pictures = {
        "none": None,
        "noise": noise,
        "int16": noise.astype(np.int16),
        "air": noise * 0 - 1000,
        "nan": noise * np.nan,
        "huge": noise * 1e300,
    }
    given_arrays = [array for array in (*masks, pictures[image]) if array is not None]
    before = [array.copy() for array in given_arrays]
    for array in given_arrays:
        array.setflags(write=False)
    for reference in (masks[0], None):
        found = find_anomalies(reference, masks[1], spacing, pictures[image])
        assert all(found_one.kind in CHECKS and found_one.text for found_one in found)
        assert all(math.isfinite(value) for found_one in found for value in found_one.evidence.values())
    assert all(np.array_equal(array, copy, equal_nan=True) for array, copy in zip(given_arrays, before, strict=True))


@settings(max_examples=40)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(3, 6), st.integers(3, 9), st.integers(3, 9))), st.integers(0, 2**32 - 1))
def test_reversing_the_axes_of_both_masks_changes_no_kind(predicted: np.ndarray, seed: int) -> None:
    reference = np.random.default_rng(seed).random(predicted.shape) < 0.1
    expected = kinds(reference, predicted, (5.0, 0.9, 0.7))
    for axes in ((0,), (1,), (2,), (0, 1, 2)):
        assert kinds(np.flip(reference, axes), np.flip(predicted, axes), (5.0, 0.9, 0.7)) == expected


# --- false alarms ------------------------------------------------------------------------------------------------------


def test_real_references_are_not_odd(shared_data: Path) -> None:
    """Edema (rings, specks, 43 scans) and blood on clipped head CT, glioma, blast_ct: silent with and without the reference."""
    from ichbench.cases.images import read_image, read_labels

    paths = sorted(shared_data.glob("Dataset501_PHE/labels*/*.nii.gz"))[::2] + sorted(shared_data.glob("phe_derived_hematoma/*.nii.gz"))
    paths += sorted(shared_data.glob("brats_toolkit/*/segmentation/*.nii.gz"))[::3]
    paths += sorted(shared_data.glob("Dataset004_Hippocampus/labelsTr/*.nii.gz"))[::8]
    paths += sorted(shared_data.glob("blast_ct/*_segmentation.nii.gz"))
    looked = 0
    for number, path in enumerate(paths):
        labels, grid = read_labels(path)
        images = sorted(shared_data.glob(f"Dataset501_PHE/images*/{path.name.replace('.nii', '_0000.nii')}")) if number % 4 == 0 else []
        image = read_image(images[0])[0] if images else None
        looked += bool(images)
        assert find_anomalies(None, labels, grid.spacing_zyx_mm, image) == (), path
        assert find_anomalies(labels, labels, grid.spacing_zyx_mm, image) == (), path
        if image is not None and labels.any():
            air = box(labels.shape, (2, 4), (20, 30), (20, 30))
            assert "outside_head" in kinds(labels, air, grid.spacing_zyx_mm, image), path
    assert looked >= 5


def test_phantom_references_are_not_odd(small_phantom: Path) -> None:
    """The small phantom shows a slab of the head: without its reference, a bleed may reach the last slice. Nothing else is said."""
    from ichbench.cases.images import read_image, read_labels

    flips = 0
    for path in sorted(small_phantom.glob("labels*/*.nii.gz")):
        labels, grid = read_labels(path)
        image, _ = read_image(next(small_phantom.glob(f"images*/{path.name.replace('.nii', '_0000.nii')}")))
        assert find_anomalies(labels, labels, grid.spacing_zyx_mm, image, axis_codes_zyx=grid.axis_codes_zyx) == ()
        assert set(kinds(None, labels, grid.spacing_zyx_mm, image)) <= {"touches_end_slice"}
        if labels.any():
            flips += "flipped" in kinds(labels, labels[:, :, ::-1], grid.spacing_zyx_mm)
            # the same slab of air around every head
            assert "outside_head" in kinds(labels, box(labels.shape, (6, 8), (2, 8), (2, 8)), grid.spacing_zyx_mm, image)
    assert flips >= 2


def test_thin_bleeds_of_the_phantom_are_no_outlines() -> None:
    """Each slice on its own of a subdural and a subarachnoid bleed, shells of two or three voxels under the skull."""
    from ichbench.cases.phantom import draw_case, make_case

    for subtype in ("subdural", "subarachnoid"):
        index = next(index for index in range(60) if draw_case(index, "small", 0).subtype == subtype)
        case = make_case(index, "small", 0).case
        slices = [labels for labels in np.asarray(case.labels_zyx) if labels.sum() > 20]
        assert slices
        for labels in slices:
            assert "guard_blob" not in kinds(None, labels[None], case.grid.spacing_zyx_mm)


def test_limits_are_what_the_texts_say() -> None:
    assert anomalies.PLAUSIBLE_ML == (0.05, 300.0)
    assert (anomalies.SPECK_VOXELS, anomalies.OUTLINE_HOLLOW, anomalies.SPECK_DROP_MM) == (27, 6.0, 10.0)
