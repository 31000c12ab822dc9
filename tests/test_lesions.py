"""Lesions: flood fill and pairs by hand, closed forms, panoptica's published numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from shapes import box

from ichbench.errors import InputError
from ichbench.scoring import lesions
from ichbench.scoring.lesions import STRATA_ML, STRATA_NAMES, LesionRecord, lesion_record

Voxel = tuple[int, int, int]
Lesion = frozenset[Voxel]
UNIT = (1.0, 1.0, 1.0)
SPACING = (5.0, 0.45, 0.41)


def steps(connectivity: int) -> list[Voxel]:
    """The offsets to the neighbours."""
    most = {6: 1, 18: 2, 26: 3}[connectivity]
    return [offset for offset in itertools.product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, offset)) <= most]


def voxels_of(mask: np.ndarray) -> set[Voxel]:
    return {(int(z), int(y), int(x)) for z, y, x in np.argwhere(mask)}


def around(voxels: Iterable[Voxel], connectivity: int) -> set[Voxel]:
    return {(z + dz, y + dy, x + dx) for z, y, x in voxels for dz, dy, dx in steps(connectivity)}


def flood(voxels: set[Voxel], connectivity: int) -> list[Lesion]:
    """Connected components by flood fill."""
    left, found = set(voxels), []
    while left:
        front = part = {min(left)}
        while front:
            front = (around(front, connectivity) & voxels) - part
            part = part | front
        left -= part
        found.append(frozenset(part))
    return found


def masks(most: int = 6) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Two masks of one shape, sparse enough for several lesions; often one slice, sometimes empty."""
    fill = st.sampled_from([False, False, False, True])
    return st.tuples(st.integers(1, 3), st.integers(1, most), st.integers(1, most)).flatmap(
        lambda shape: st.tuples(hnp.arrays(bool, shape, elements=fill), hnp.arrays(bool, shape, elements=fill))
    )


def table(record: LesionRecord) -> list[tuple[int, int, int]]:
    """The overlaps as (size, size, common), free of the numbering."""
    sizes = (record.reference_voxels[record.pair_reference], record.predicted_voxels[record.pair_predicted], record.pair_voxels)
    return sorted(zip(*(column.tolist() for column in sizes), strict=True))


def moved(pair: Sequence[np.ndarray], order: list[int], flips: tuple[bool, ...], pad: tuple[int, ...]) -> list[tuple[Any, Any]]:
    """The pair turned and mirrored, and the pair in a larger array: both masks, with their spacing."""
    turned = [mask[tuple(slice(None, None, -1 if flip else 1) for flip in flips)].transpose(order) for mask in pair]
    wider = [np.pad(mask, [(pad[0], pad[1]), (pad[2], pad[3]), (pad[4], pad[5])]) for mask in pair]
    return [(turned, [SPACING[axis] for axis in order]), (wider, SPACING)]


def refuses_what_is_no_pair_of_masks(call: Callable[..., Any]) -> None:
    mask = box((3, 3, 3), (0, 2), (0, 2), (0, 2))
    with pytest.raises(InputError, match=r"\(3, 3, 3\).*\(3, 3, 4\)"):
        call(mask, np.zeros((3, 3, 4), dtype=bool), UNIT)
    with pytest.raises(InputError, match="spacing"):
        call(mask, mask, (1.0, 0.0, 1.0))
    with pytest.raises(InputError, match=r"prediction contains the value 0\.5"):
        call(mask, mask * 0.5, UNIT)


def read(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    from ichbench.cases.images import read_labels

    labels, grid = read_labels(path)
    return labels, grid.spacing_zyx_mm


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


# --- the record and the counts -----------------------------------------------------------------------------------------


@settings(max_examples=120)
@given(
    masks(), st.sampled_from([6, 18, 26]), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.sampled_from([None, (0.0, 0.003), (0.003, math.inf)])
)
def test_components_overlaps_and_counts_by_brute_force(
    pair: tuple[np.ndarray, np.ndarray], connectivity: int, share: float, stratum: tuple[float, float] | None
) -> None:
    record = lesion_record(*pair, UNIT, connectivity)
    ours, theirs = (flood(voxels_of(mask), connectivity) for mask in pair)
    assert sorted(record.reference_voxels.tolist()) == sorted(len(lesion) for lesion in ours)
    assert sorted(record.predicted_voxels.tolist()) == sorted(len(lesion) for lesion in theirs)
    assert table(record) == sorted((len(a), len(b), len(a & b)) for a in ours for b in theirs if a & b)
    assert record.reference_ml.sum() == pytest.approx(pair[0].sum() / 1000, rel=1e-12)
    assert record.predicted_ml.sum() == pytest.approx(pair[1].sum() / 1000, rel=1e-12)

    def hits(lesions: list[Lesion], other: np.ndarray) -> tuple[int, int]:
        covered = voxels_of(other)
        chosen = [lesion for lesion in lesions if stratum is None or stratum[0] <= len(lesion) / 1000 < stratum[1]]
        good = sum(bool(lesion & covered) and len(lesion & covered) >= share * len(lesion) for lesion in chosen)
        return good, len(chosen) - good

    counts = lesions.count_lesions(record, share, stratum)
    (found, missed), (right, false) = hits(ours, pair[1]), hits(theirs, pair[0])
    assert dataclasses.astuple(counts) == (found, missed, right, false)
    assert same(lesions.lesion_sensitivity(record, share, stratum), found / (found + missed) if found + missed else math.nan)
    assert same(lesions.lesion_precision(record, share, stratum), right / (right + false) if right + false else math.nan)
    if found + missed + false:
        assert lesions.lesion_f1(record, share, stratum) == found / (found + (missed + false) / 2)
    else:
        assert same(lesions.lesion_f1(record, share, stratum), math.nan if stratum else 1.0)


@settings(max_examples=120)
@given(masks())
def test_panoptic_quality_over_all_pairs(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = lesions.panoptic(lesion_record(*pair, UNIT))
    ours, theirs = (flood(voxels_of(mask), 26) for mask in pair)
    ious = [Fraction(len(a & b), len(a | b)) for a in ours for b in theirs if Fraction(len(a & b), len(a | b)) > Fraction(1, 2)]
    assert (found.matched, found.missed, found.false_positives) == (len(ious), len(ours) - len(ious), len(theirs) - len(ious))
    if not ours and not theirs:
        assert all(math.isnan(value) for value in (found.pq, found.sq, found.rq))
        return
    assert found.pq == pytest.approx(float(2 * sum(ious) / (len(ours) + len(theirs))), rel=1e-15)
    assert found.rq == 2 * len(ious) / (len(ours) + len(theirs))
    assert same(found.sq, float(sum(ious)) / len(ious) if ious else math.nan) or found.sq == pytest.approx(
        float(sum(ious) / len(ious)), rel=1e-15
    )
    assert not ious or found.pq == pytest.approx(found.sq * found.rq, rel=1e-15)


def test_an_iou_of_one_half_is_no_match() -> None:
    half = lesion_record(box((1, 1, 4), (0, 1), (0, 1), (0, 2)), box((1, 1, 4), (0, 1), (0, 1), (0, 4)), UNIT)
    assert dataclasses.astuple(lesions.panoptic(half))[3:] == (0, 1, 1)
    more = lesion_record(box((1, 1, 5), (0, 1), (0, 1), (0, 3)), box((1, 1, 5), (0, 1), (0, 1), (0, 5)), UNIT)
    assert lesions.panoptic(more).pq == 0.6


@pytest.mark.parametrize(("offset", "apart_below"), [((0, 0, 1), 0), ((0, 1, 1), 18), ((1, 1, 0), 18), ((1, 1, 1), 26), ((0, 0, 2), 99)])
def test_connectivity(offset: Voxel, apart_below: int) -> None:
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[1, 1, 1] = mask[tuple(1 + step for step in offset)] = True
    for connectivity in (6, 18, 26):
        record = lesion_record(mask, mask, UNIT, connectivity)
        assert record.reference_voxels.tolist() == ([1, 1] if connectivity < apart_below else [2])


def test_a_bridge_is_one_prediction_and_two_finds() -> None:
    """Two bleeds under one prediction: ISLES counts two hits; the prediction is one, and right. Then the other way round."""
    two, bridge = np.zeros((2, 1, 1, 9), dtype=bool)
    two[0, 0, [1, 2, 6, 7]] = bridge[0, 0, 1:8] = True
    record = lesion_record(two, bridge, UNIT)
    assert lesions.count_lesions(record) == lesions.LesionCounts(found=2, missed=0, right=1, false_positives=0)
    assert lesions.lesion_f1(record) == lesions.lesion_precision(record) == 1.0
    assert lesions.count_lesions(lesion_record(bridge, two, UNIT)) == lesions.LesionCounts(1, 0, 2, 0)
    # 4 of 7 voxels lie in the reference, in two lesions together
    assert lesions.count_lesions(record, 4 / 7) == lesions.LesionCounts(2, 0, 1, 0)
    assert lesions.count_lesions(record, 0.6) == lesions.LesionCounts(2, 0, 0, 1)


def test_the_share_itself_is_enough() -> None:
    reference = box((1, 10, 10), (0, 1), (0, 10), (0, 10))
    predicted = box((1, 10, 10), (0, 1), (0, 1), (0, 7))
    assert 0.07 * 100 > 7, "the trap that this test is about"
    record = lesion_record(reference, predicted, UNIT)
    assert lesions.lesion_sensitivity(record) == lesions.lesion_sensitivity(record, 0.07) == 1.0
    assert lesions.lesion_sensitivity(record, 0.0701) == 0.0
    assert lesions.lesion_precision(record, 1.0) == 1.0


def test_strata_are_half_open_and_each_side_is_binned_by_its_own_size() -> None:
    """At 10 x 10 x 10 mm a voxel has 1 ml: lesions of 1, 9, 10, 29, 30 ml, and a false positive of 2 ml."""
    reference = np.zeros((1, 11, 60), dtype=bool)
    for row, voxels in zip((0, 2, 4, 6, 8), (1, 9, 10, 29, 30), strict=True):
        reference[0, row, :voxels] = True
    predicted = reference.copy()
    predicted[0, 2, :12] = True  # 9 ml found with 12 ml
    predicted[0, 6] = False  # 29 ml missed
    predicted[0, 10, 58:] = True
    record = lesion_record(reference, predicted, (10.0, 10.0, 10.0))
    counts = dict(
        zip(STRATA_NAMES, (dataclasses.astuple(lesions.count_lesions(record, 0.0, stratum)) for stratum in STRATA_ML), strict=True)
    )
    assert counts == {"0-1": (0, 0, 0, 0), "1-10": (2, 0, 1, 1), "10-30": (1, 1, 2, 0), "30-inf": (1, 0, 1, 0)}
    assert [lesions.lesion_sensitivity(record, 0.0, stratum) for stratum in STRATA_ML[1:]] == [1.0, 0.5, 1.0]
    assert [lesions.lesion_precision(record, 0.0, stratum) for stratum in STRATA_ML[1:]] == [0.5, 1.0, 1.0]
    assert [lesions.lesion_f1(record, 0.0, stratum) for stratum in STRATA_ML[1:]] == [4 / 5, 2 / 3, 1.0]
    for metric in (lesions.lesion_sensitivity, lesions.lesion_precision, lesions.lesion_f1):
        assert math.isnan(metric(record, 0.0, STRATA_ML[0]))
    assert dataclasses.astuple(lesions.count_lesions(record)) == tuple(map(sum, zip(*counts.values(), strict=True)))


def test_a_volume_that_is_a_bound_in_decimals_is_one_here() -> None:
    mask = np.ones((25, 25, 40), dtype=bool)
    record = lesion_record(mask, mask, (4.8, 0.5, 0.5))
    assert record.reference_ml[0] < 30, "the trap that this test is about"
    assert lesions.count_lesions(record, 0.0, (30.0, math.inf)).found == 1
    assert lesions.count_lesions(record, 0.0, (10.0, 30.0)).found == 0


@pytest.mark.parametrize("shape", [(0, 0, 0), (0, 4, 4), (1, 1, 1), (1, 5, 5), (3, 4, 5)])
def test_empty_masks(shape: tuple[int, int, int]) -> None:
    nothing, everything = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    both = lesion_record(nothing, nothing, UNIT)
    assert lesions.lesion_f1(both) == 1.0  # ISLES 2022
    assert math.isnan(lesions.lesion_sensitivity(both))
    assert math.isnan(lesions.lesion_precision(both))
    assert math.isnan(lesions.panoptic(both).pq)
    if not everything.size:
        return
    for reference, predicted in ((everything, nothing), (nothing, everything)):
        record = lesion_record(reference, predicted, UNIT)
        found = lesions.panoptic(record)
        assert (lesions.lesion_f1(record), found.pq, found.rq) == (0.0, 0.0, 0.0)
        assert math.isnan(found.sq)
        assert same(lesions.lesion_sensitivity(record), 0.0 if reference.any() else math.nan)
        assert same(lesions.lesion_precision(record), 0.0 if predicted.any() else math.nan)


@settings(max_examples=60)
@given(masks(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.tuples(*[st.integers(0, 5)] * 6))
def test_turning_mirroring_and_padding_change_nothing(
    pair: tuple[np.ndarray, np.ndarray], order: list[int], flips: tuple[bool, ...], pad: tuple[int, ...]
) -> None:
    def summary(reference: np.ndarray, predicted: np.ndarray, spacing_mm: Any) -> tuple[Any, ...]:
        record = lesion_record(reference, predicted, spacing_mm)
        strata = [lesions.count_lesions(record, 0.3, stratum) for stratum in ((0, 0.002), (0.002, 1))]
        return table(record), sorted(record.predicted_ml), strata, repr(lesions.panoptic(record))

    before = summary(*pair, SPACING)
    for other, spacing_mm in moved(pair, order, flips, pad):
        assert summary(*other, spacing_mm) == before


def test_numbered_lesions_are_taken_as_they_are() -> None:
    """Label 7 has two parts, 200 and 300 touch; the prediction numbers otherwise."""
    reference = np.array([[[7, 0, 7, 0, 200, 200, 300, 300]]], dtype=np.int16)
    predicted = np.array([[[1, 0, 1, 0, 9, 9, 9, 2]]], dtype=np.uint8)
    record = lesion_record(reference, predicted, UNIT, connectivity=None)
    assert table(record) == [(2, 1, 1), (2, 2, 2), (2, 3, 1), (2, 3, 2)]
    found = lesions.panoptic(record)  # 7-1 IoU 1, 200-9 IoU 2/3; 300-2 IoU 1/2 and 300-9 IoU 1/4 are none
    assert (found.matched, found.missed, found.false_positives) == (2, 1, 1)
    assert found.sq == pytest.approx((1 + 2 / 3) / 2)
    assert lesion_record(reference, predicted, UNIT).reference_voxels.tolist() == [1, 1, 4]


def test_many_lesions() -> None:
    """A lattice of 1000 single voxels, half of them hit; and noise, whose table of all pairs would not fit into memory."""
    reference = np.zeros((20, 20, 20), dtype=bool)
    reference[::2, ::2, ::2] = True
    predicted = reference.copy()
    predicted[10:] = False
    record = lesion_record(reference, predicted, UNIT)
    assert lesions.count_lesions(record) == lesions.LesionCounts(500, 500, 500, 0)
    assert lesions.panoptic(record).pq == pytest.approx(2 / 3, rel=1e-15)
    rng = np.random.default_rng(0)
    noise = [rng.random((8, 256, 256)) < 0.02 for _ in range(2)]
    record = lesion_record(*noise, UNIT, 6)
    assert record.reference_voxels.size * record.predicted_voxels.size > 5e7
    assert record.pair_voxels.sum() == np.count_nonzero(noise[0] & noise[1])


def test_what_is_no_pair_of_masks_or_parameter_is_refused() -> None:
    mask = box((3, 3, 3), (0, 2), (0, 2), (0, 2))
    record = lesion_record(mask, mask, UNIT)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="share of overlap"):
            lesions.count_lesions(record, bad)
    for stratum in ((1.0, 1.0), (-1.0, 2.0), (math.nan, 2.0), (5.0, 1.0)):
        with pytest.raises(InputError, match="lesion sizes"):
            lesions.lesion_f1(record, 0.0, stratum)
    for connectivity in (4, 8, 27):
        with pytest.raises(InputError, match=f"connectivity is {connectivity}"):
            lesion_record(mask, mask, UNIT, connectivity)
    refuses_what_is_no_pair_of_masks(lesion_record)


# --- real masks --------------------------------------------------------------------------------------------------------


def test_panoptica_publishes_the_same_quality(shared_data: Path) -> None:
    """Printed in the notebooks of github.com/BrainLesion/tutorials (panoptica/example_spine_*.ipynb, panoptica 0.5)."""
    folder = shared_data / "panoptica_spine" / "unmatched_instance"
    (reference, spacing), (predicted, _) = (read(folder / name) for name in ("ref.nii.gz", "pred.nii.gz"))
    found = lesions.panoptic(lesion_record(reference, predicted, spacing, connectivity=None))
    assert (found.matched, found.missed, found.false_positives) == (19, 3, 3)
    assert (found.rq, found.sq, found.pq) == pytest.approx((0.8636363636363636, 0.8328184295330797, 0.7192522800512962), rel=1e-14)


def test_panoptica_publishes_the_same_quality_of_components(shared_data: Path) -> None:
    """The same with instances made of the 26-connected components of each label: 87 in the reference, 89 in the prediction."""
    folder = shared_data / "panoptica_spine" / "semantic"
    instances = []
    for name in ("ref.nii.gz", "pred.nii.gz"):
        labels, spacing = read(folder / name)
        instance = np.zeros(labels.shape, dtype=np.int64)
        for label, part in enumerate(ndimage.find_objects(labels), start=1):
            if part is not None:
                numbers, _ = ndimage.label(labels[part] == label, np.ones((3, 3, 3)))
                instance[part] += np.where(numbers > 0, 1000 * label + numbers, 0)
        instances.append(instance)
    found = lesions.panoptic(lesion_record(*instances, spacing, connectivity=None))
    assert (found.matched, found.missed, found.false_positives) == (73, 14, 16)
    assert (found.rq, found.sq, found.pq) == pytest.approx((0.8295454545454546, 0.7940127477906024, 0.6586696657808406), rel=1e-14)


def test_lesions_of_a_real_map(shared_data: Path) -> None:
    """70 components by faces (PROVENANCE); one label of four, shifted by a voxel, finds some of them. Counted again by a loop."""
    labels, spacing = read(shared_data / "blast_ct" / "scan_0_segmentation.nii.gz")
    assert [lesion_record(labels, labels, spacing, connectivity).reference_voxels.size for connectivity in (6, 18, 26)] == [70, 24, 22]
    reference, predicted = labels != 0, np.roll(labels == 3, 1, axis=2)
    record = lesion_record(reference, predicted, spacing, 6)
    numbers, n = ndimage.label(reference)
    overlaps = [(int(np.sum(numbers == i)), int(np.sum(predicted[numbers == i]))) for i in range(1, n + 1)]
    assert sorted(record.reference_voxels.tolist()) == sorted(size for size, _ in overlaps)
    for share in (0.0, 0.1):
        for low, high in ((0.0, 0.002), (0.002, 1.0), (1.0, 10.0), (10.0, math.inf)):
            sized = [(size, both) for size, both in overlaps if low <= size / 1000 < high]
            counts = lesions.count_lesions(record, share, (low, high))
            found = sum(both > 0 and both >= share * size for size, both in sized)
            assert (counts.found, counts.missed) == (found, len(sized) - found)
    assert dataclasses.astuple(lesions.count_lesions(record)) == (30, 40, 35, 30)
