"""Lesion-wise scores: the steps of BraTS 2023 over sets of voxels, closed forms, and the challenge's numbers on real masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lesions import SPACING, UNIT, Lesion, Voxel, around, box, flood, masks, moved, read, refuses_what_is_no_pair_of_masks, voxels_of

from ichbench.errors import InputError
from ichbench.scoring.lesionwise import BRATS_2023, LesionwiseRule, lesionwise_dice, lesionwise_hd, lesionwise_record
from ichbench.scoring.surface import hausdorff, surface_record


def brats(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, ...], rule: LesionwiseRule) -> tuple[float, float, int, int]:
    """The steps of the challenge's file over sets of voxels: Dice, HD95, lesions that count, false positives."""
    shape, ours, parts = reference.shape, voxels_of(reference), flood(voxels_of(predicted), rule.connectivity)

    def dilate(voxels: Iterable[Voxel]) -> set[Voxel]:
        grown = set(voxels)
        for _ in range(rule.dilations):
            grown |= {
                voxel for voxel in around(grown, rule.dilation_connectivity) if all(0 <= v < n for v, n in zip(voxel, shape, strict=True))
            }
        return grown

    def as_mask(voxels: Iterable[Voxel]) -> np.ndarray:
        mask = np.zeros(shape, dtype=bool)
        mask[tuple(np.array(sorted(voxels), dtype=int).reshape(-1, 3).T)] = True
        return mask

    touched: set[Lesion] = set()
    scores = []
    for lesion in (grown & ours for grown in flood(dilate(ours), rule.connectivity)):
        partners = [part for part in parts if part & dilate(lesion)]
        touched |= set(partners)
        union = set().union(*partners)
        far = hausdorff(surface_record(as_mask(lesion), as_mask(union), spacing), rule.percent)
        if len(lesion) * math.prod(spacing) > rule.ignored_mm3:
            scores.append((2 * len(lesion & union) / (len(lesion) + len(union)), rule.penalty_mm if far == math.inf else far))
    false = len(parts) - len(touched)
    below = len(scores) + false
    if not below:
        return 1.0, 0.0, 0, 0
    return sum(d for d, _ in scores) / below, (sum(h for _, h in scores) + false * rule.penalty_mm) / below, len(scores), false


RULES = [
    LesionwiseRule(1, ignored_mm3=2.0),
    LesionwiseRule(3, ignored_mm3=0.0),
    LesionwiseRule(0, 6, 6, 1.0, 40.0, 100.0),
    LesionwiseRule(2),
]


@settings(max_examples=60)
@given(masks(9), st.sampled_from(RULES), st.sampled_from([UNIT, (5.0, 0.5, 0.5)]))
def test_lesionwise_by_brute_force(pair: tuple[np.ndarray, np.ndarray], rule: LesionwiseRule, spacing: tuple[float, float, float]) -> None:
    record = lesionwise_record(*pair, spacing, rule)
    found = (lesionwise_dice(record), lesionwise_hd(record), np.count_nonzero(record.kept), record.false_positives)
    assert found == pytest.approx(brats(*pair, spacing, rule), rel=1e-13)


def test_lesionwise_by_hand() -> None:
    """A found one voxel off, B missed, C of 48 mm3 ignored with a prediction on it, and a false positive of one voxel."""
    shape = (20, 20, 90)
    reference = box(shape, (5, 11), (5, 11), (2, 8)) | box(shape, (5, 10), (5, 10), (25, 30)) | box(shape, (5, 8), (5, 9), (50, 54))
    predicted = box(shape, (5, 11), (5, 11), (3, 9)) | box(shape, (5, 6), (5, 6), (53, 54)) | box(shape, (9, 10), (9, 10), (80, 81))
    record = lesionwise_record(reference, predicted, UNIT)
    assert sorted(record.reference_mm3) == [48.0, 125.0, 216.0]
    assert record.false_positives == 1
    # dice of A: 2 * 180 / 432; its surface is 1 mm off on 72 of 216 faces of each side
    assert lesionwise_dice(record) == pytest.approx((2 * 180 / 432 + 0.0) / 3, rel=1e-15)
    assert lesionwise_hd(record) == pytest.approx((1.0 + 374.0 + 374.0) / 3, rel=1e-15)
    # with C counted, its dice is 2 * 1 / 49
    counted = lesionwise_record(reference, predicted, UNIT, dataclasses.replace(BRATS_2023, ignored_mm3=47.0))
    assert lesionwise_dice(counted) == pytest.approx((2 * 180 / 432 + 2 / 49) / 4, rel=1e-15)


def test_the_defaults_are_those_of_brats() -> None:
    assert dataclasses.astuple(BRATS_2023) == (3, 18, 26, 50.0, 374.0, 95.0)


@pytest.mark.parametrize(("voxels", "counts"), [(50, 0), (51, 1)])
def test_a_lesion_of_50_mm3_is_ignored(voxels: int, counts: int) -> None:
    reference = np.zeros((1, 1, 60), dtype=bool)
    reference[..., :voxels] = True
    record = lesionwise_record(reference, np.zeros_like(reference), UNIT)
    assert np.count_nonzero(record.kept) == counts
    assert lesionwise_dice(record) == 1 - counts


def test_50_mm3_in_decimals_are_50_mm3_here() -> None:
    reference = np.ones((5, 5, 5), dtype=bool)
    record = lesionwise_record(reference, reference, (2.5, 0.4, 0.4))
    assert not record.kept.any()


@pytest.mark.parametrize(("gap", "n"), [(6, 1), (7, 2)])
def test_satellites_join_where_the_dilations_touch(gap: int, n: int) -> None:
    """Three voxels from each side, and touching is enough: six background voxels between two lesions make them one."""
    reference = np.zeros((3, 3, 30), dtype=bool)
    reference[1, 1, [4, 5 + gap]] = True
    assert lesionwise_record(reference, reference, UNIT).reference_mm3.size == n


@pytest.mark.parametrize(("connectivity", "furthest"), [(6, 3), (18, 5), (26, 7)])
def test_across_a_corner_a_dilation_of_18_neighbours_reaches_less_far(connectivity: int, furthest: int) -> None:
    """Three steps reach a sum of 3, 6 or 9 along the diagonal, from both sides, and one more voxel per axis by touching."""
    rule = LesionwiseRule(dilation_connectivity=connectivity)
    for apart in range(1, 9):
        reference = np.zeros((12, 12, 12), dtype=bool)
        reference[1, 1, 1] = reference[1 + apart, 1 + apart, 1 + apart] = True
        assert lesionwise_record(reference, reference, UNIT, rule).reference_mm3.size == (1 if apart <= furthest else 2), apart


def test_a_prediction_beside_a_lesion_is_its_partner_and_one_may_have_two() -> None:
    """No voxel in common, two voxels away: Dice 0 but a distance, and no false positive. A band over two lesions counts twice."""
    rule = LesionwiseRule(ignored_mm3=0.0)
    reference, predicted = np.zeros((2, 1, 1, 40), dtype=bool)
    reference[..., 5:8] = predicted[..., 9:12] = True
    beside = lesionwise_record(reference, predicted, UNIT, rule)
    assert (lesionwise_dice(beside), beside.false_positives) == (0.0, 0)
    assert lesionwise_hd(beside) == 4.0
    reference[..., 25:28] = True
    predicted[...] = False
    predicted[..., 5:28] = True
    band = lesionwise_record(reference, predicted, UNIT, dataclasses.replace(rule, percent=100.0))
    assert [labels.tolist() for labels in band.partners] == [[1], [1]]
    assert lesionwise_dice(band) == pytest.approx(2 * 3 / 26, rel=1e-15)
    assert lesionwise_hd(band) == 20.0


def test_each_lesion_is_measured_against_its_own_partner() -> None:
    """Three rods, predicted one, two and three rows away."""
    reference, predicted = np.zeros((2, 1, 20, 60), dtype=bool)
    for rows, start in ((1, 5), (2, 25), (3, 45)):
        reference[0, 5, start : start + 3] = predicted[0, 5 + rows, start : start + 3] = True
    record = lesionwise_record(reference, predicted, UNIT, LesionwiseRule(ignored_mm3=0.0))
    assert [labels.tolist() for labels in record.partners] == [[1], [2], [3]]
    assert (lesionwise_dice(record), lesionwise_hd(record), record.false_positives) == (0.0, 2.0, 0)


def test_many_lesions_half_of_them_hit() -> None:
    reference = np.zeros((20, 20, 20), dtype=bool)
    reference[::2, ::2, ::2] = True
    predicted = reference.copy()
    predicted[10:] = False
    record = lesionwise_record(reference, predicted, UNIT, LesionwiseRule(dilations=0, ignored_mm3=0.0))
    assert (lesionwise_dice(record), lesionwise_hd(record)) == (0.5, 187.0)


@pytest.mark.parametrize("shape", [(0, 0, 0), (0, 4, 4), (1, 1, 1), (1, 5, 5), (3, 4, 5)])
def test_empty_masks(shape: tuple[int, int, int]) -> None:
    nothing, everything = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    record = lesionwise_record(nothing, nothing, UNIT)
    assert (lesionwise_dice(record), lesionwise_hd(record)) == (1.0, 0.0)
    if not everything.size:
        return
    for reference, predicted in ((everything, nothing), (nothing, everything)):
        record = lesionwise_record(reference, predicted, UNIT, LesionwiseRule(ignored_mm3=0.0))
        assert (lesionwise_dice(record), lesionwise_hd(record)) == (0.0, 374.0)


@settings(max_examples=60)
@given(masks(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.tuples(*[st.integers(0, 5)] * 6))
def test_turning_mirroring_and_padding_change_nothing(
    pair: tuple[np.ndarray, np.ndarray], order: list[int], flips: tuple[bool, ...], pad: tuple[int, ...]
) -> None:
    rule = LesionwiseRule(dilations=1, ignored_mm3=1.0)

    def summary(reference: np.ndarray, predicted: np.ndarray, spacing_mm: Any) -> tuple[float, float]:
        record = lesionwise_record(reference, predicted, spacing_mm, rule)
        return lesionwise_dice(record), lesionwise_hd(record)

    dice, hd_mm = summary(*pair, SPACING)
    for other, spacing_mm in moved(pair, order, flips, pad):
        assert summary(*other, spacing_mm) == (dice, pytest.approx(hd_mm, rel=1e-12))


def test_what_is_no_pair_of_masks_or_rule_is_refused() -> None:
    mask = box((3, 3, 3), (0, 2), (0, 2), (0, 2))
    with pytest.raises(InputError, match="dilated -1 times"):
        lesionwise_record(mask, mask, UNIT, LesionwiseRule(dilations=-1))
    refuses_what_is_no_pair_of_masks(lesionwise_record)


# --- real masks --------------------------------------------------------------------------------------------------------


#: lesion-wise Dice, HD95, lesions and false positives of tumour core against the fusion `simple`. From a run of the steps of
#: BraTS-2023-Metrics, eval.py at 0e272e6, over full volumes with scipy.ndimage.label and surface-distance 0.1.
BRATS_CORE = {
    "hnfnetv1-20": (0.06723404255319149, 343.01967233145837, 1, 11),
    "isen-20": (0.16585998271391528, 299.4828427124746, 1, 4),
    "sanet0-20": (0.0410551798981551, 357.10163945352275, 1, 21),
    "scan-20": (0.039587669739320056, 354.4736842105263, 1, 18),
    "yixinmpl-20": (0.7751547100618841, 4.242640687119285, 1, 0),
}


def test_brats_scores_of_real_predictions(shared_data: Path) -> None:
    folder = shared_data / "brats_toolkit" / "OtherEXampleFromTCIA"
    reference, spacing = read(folder / "fusion" / "simple.nii.gz")
    for name, expected in BRATS_CORE.items():
        predicted, _ = read(folder / "segmentation" / f"{name}.nii.gz")
        record = lesionwise_record(reference == 1, predicted == 1, spacing)
        found = (lesionwise_dice(record), lesionwise_hd(record), np.count_nonzero(record.kept), record.false_positives)
        assert found == pytest.approx(expected, rel=1e-13), name
