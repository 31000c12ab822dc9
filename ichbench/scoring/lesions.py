"""Lesions: which bleeds were found and which are made up.

A *lesion* is a connected component of a mask, with 26 neighbours unless said otherwise. Three definitions, whose numbers
must not be mixed:
- by overlap: lesion F1, sensitivity, precision, false positives. ISLES 2022 (`compute_lesion_f1_score` of its evaluation)
- panoptic quality: lesions match one to one at IoU > 0.5. Kirillov et al., "Panoptic segmentation", CVPR 2019
- lesion-wise Dice and HD95: each reference lesion by itself, false positives punished. BraTS 2023 (lesionwise.py)

The record looks at the voxels once; all else is read off it and never raises. Sums of fractions are exact
(`math.fsum`): the numbering of the lesions follows the order of the axes and must not move a bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring.overlap import LabelArray, MaskArray, as_labels, as_spacing, check_same_shape
from ichbench.scoring.surface import joint_box

#: Size classes of ICH practice, half-open: low <= ml < high. A lesion of exactly 1 ml belongs to the second.
STRATA_ML = ((0.0, 1.0), (1.0, 10.0), (10.0, 30.0), (30.0, math.inf))
STRATA_NAMES = ("0-1", "1-10", "10-30", "30-inf")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Numbers = NDArray[np.int32]
Spacing = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class LesionRecord:
    """The lesions of one pair of masks, numbered from 0 in no particular order, and the table of their overlaps.

    reference_voxels, predicted_voxels            voxels of each lesion
    pair_reference, pair_predicted, pair_voxels   for each two lesions with a common voxel: their numbers, common voxels
    voxel_ml                                      volume of one voxel
    """

    reference_voxels: Ints
    predicted_voxels: Ints
    pair_reference: Ints
    pair_predicted: Ints
    pair_voxels: Ints
    voxel_ml: float

    @property
    def reference_ml(self) -> Floats:
        """Volume of each reference lesion."""
        return np.asarray(self.reference_voxels * self.voxel_ml, dtype=np.float64)

    @property
    def predicted_ml(self) -> Floats:
        """Volume of each predicted lesion."""
        return np.asarray(self.predicted_voxels * self.voxel_ml, dtype=np.float64)


@dataclass(frozen=True)
class LesionCounts:
    """Reference lesions `found` and `missed`, predicted ones `right` and `false_positives`.

    `found` and `right` differ where several lesions of one mask share one of the other.
    """

    found: int
    missed: int
    right: int
    false_positives: int


@dataclass(frozen=True)
class PanopticQuality:
    """`pq` = `sq` * `rq`; lesions `matched` at IoU > 0.5, and those left over in the reference and in the prediction."""

    pq: float
    sq: float
    rq: float
    matched: int
    missed: int
    false_positives: int


def lesion_record(
    reference_zyx: LabelArray, predicted_zyx: LabelArray, spacing_zyx_mm: Sequence[float], connectivity: int | None = 26
) -> LesionRecord:
    """The lesions of both masks and their overlaps.

    Arrays are 3D, of one shape, in any axis order; every label above 0 is foreground (for one label give `array == 2`).
    connectivity   6 (faces), 18 (edges too) or 26 (corners too). None: the lesions are numbered already, each label above 0
                   is one, connected or not; the numbers of the two masks need not agree
    On a sheared grid put its own voxel_ml into the record (`dataclasses.replace`).
    InputError for anything that is not a pair of masks on one grid.
    """
    reference, predicted, _, voxel_ml = boxed_pair(reference_zyx, predicted_zyx, spacing_zyx_mm)
    (first, n_first), (second, n_second) = (numbered(labels, connectivity) for labels in (reference, predicted))
    return LesionRecord(sizes(first, n_first), sizes(second, n_second), *overlaps(first, second, n_second), voxel_ml)


def count_lesions(record: LesionRecord, overlap_share: float = 0.0, stratum_ml: tuple[float, float] | None = None) -> LesionCounts:
    """Which lesions were found and which are made up.

    overlap_share   0: one common voxel is enough (ISLES 2022). Otherwise a reference lesion is found if at least this part
                    of it (up to 1) is predicted, by however many lesions; a predicted lesion is right if at least this part
                    of it lies in the reference, else it is a false positive
    stratum_ml      (low, high): only lesions of low <= ml < high, by the reference's volume for `found` and `missed`, by
                    the predicted lesion's for `right` and `false_positives`. None: all
    """
    if not 0 <= overlap_share <= 1:
        raise InputError(f"the share of overlap is {overlap_share}; a number from 0 (one voxel) to 1 (the whole lesion) is needed")
    low, high = (0.0, math.inf) if stratum_ml is None else stratum_ml
    if not 0 <= low < high:
        raise InputError(f"the lesion sizes are {low} to {high} ml; two numbers from 0 up, the smaller first, are needed")
    counts: list[int] = []
    for voxels, pair in ((record.reference_voxels, record.pair_reference), (record.predicted_voxels, record.pair_predicted)):
        covered = sums(pair, record.pair_voxels, voxels.size)
        # whole numbers are divided, not the share multiplied: 7 / 100 is 0.07, but 0.07 * 100 is more than 7
        hit = (covered > 0) & (covered / voxels >= overlap_share)
        # rounded, because 25000 voxels of 0.5 * 0.5 * 4.8 mm are 30 ml, and the product is a hair less
        volumes_ml = np.round(voxels * record.voxel_ml, 9)
        sized = (low <= volumes_ml) & (volumes_ml < high)
        counts += [int(np.count_nonzero(hit & sized)), int(np.count_nonzero(~hit & sized))]
    return LesionCounts(*counts)


def lesion_f1(record: LesionRecord, overlap_share: float = 0.0, stratum_ml: tuple[float, float] | None = None) -> float:
    """2 found / (2 found + missed + false positives); parameters as in `count_lesions`.

    Hits are counted on the reference, as in ISLES 2022, so this is the harmonic mean of sensitivity and precision only
    where found = right. Two empty masks: 1, the `empty_value` of ISLES. A stratum without such a lesion: nan.
    """
    counts = count_lesions(record, overlap_share, stratum_ml)
    below = 2 * counts.found + counts.missed + counts.false_positives
    return 2 * counts.found / below if below else (1.0 if stratum_ml is None else math.nan)


def lesion_sensitivity(record: LesionRecord, overlap_share: float = 0.0, stratum_ml: tuple[float, float] | None = None) -> float:
    """Part of the reference lesions that was found; nan if there is none. Parameters as in `count_lesions`."""
    counts = count_lesions(record, overlap_share, stratum_ml)
    return _ratio(counts.found, counts.found + counts.missed)


def lesion_precision(record: LesionRecord, overlap_share: float = 0.0, stratum_ml: tuple[float, float] | None = None) -> float:
    """Part of the predicted lesions that is right; nan if there is none. Parameters as in `count_lesions`."""
    counts = count_lesions(record, overlap_share, stratum_ml)
    return _ratio(counts.right, counts.right + counts.false_positives)


def panoptic(record: LesionRecord) -> PanopticQuality:
    """Panoptic quality: sum of the matches' IoU / (matched + missed / 2 + false positives / 2).

    No lesion can have IoU > 0.5 with two others, so there is nothing to choose. `sq` is the mean IoU of the matches, nan
    without one; `rq` is the F1 of the matching. Two empty masks: nan, as a class that neither side has is left out of
    the mean. panoptica 2.1 also matches at exactly 0.5 unless `strict_threshold=True`; then its numbers are these.
    """
    union = record.reference_voxels[record.pair_reference] + record.predicted_voxels[record.pair_predicted] - record.pair_voxels
    match = 2 * record.pair_voxels > union
    matched, total = int(np.count_nonzero(match)), math.fsum(record.pair_voxels[match] / union[match])
    missed, false = record.reference_voxels.size - matched, record.predicted_voxels.size - matched
    below = matched + missed / 2 + false / 2
    return PanopticQuality(_ratio(total, below), _ratio(total, matched), _ratio(matched, below), matched, missed, false)


def boxed_pair(
    reference_zyx: LabelArray, predicted_zyx: LabelArray, spacing_zyx_mm: Sequence[float]
) -> tuple[LabelArray, LabelArray, Spacing, float]:
    """Both masks within their joint box, the spacing and the volume of a voxel in ml; checked."""
    reference, predicted = as_labels(reference_zyx, "the reference"), as_labels(predicted_zyx, "the prediction")
    check_same_shape(reference.shape, predicted.shape)
    spacing_mm, box = as_spacing(spacing_zyx_mm), joint_box(reference != 0, predicted != 0)
    # sorted, so that the order of the axes cannot change the last bit
    return reference[box], predicted[box], spacing_mm, math.prod(sorted(spacing_mm)) / 1000.0


def _neighbours(connectivity: int) -> MaskArray:
    from scipy import ndimage

    if connectivity not in (6, 18, 26):
        raise InputError(f"the connectivity is {connectivity!r}; allowed are 6 (faces), 18 (edges too) and 26 (corners too)")
    return np.asarray(ndimage.generate_binary_structure(3, (6, 18, 26).index(connectivity) + 1))


def numbered(labels: LabelArray, connectivity: int | None, dilations: int = 0, dilation_connectivity: int = 26) -> tuple[Numbers, int]:
    """Lesions numbered from 1, and how many; components are dilated first if asked to.

    Only the mask's own box is walked, however large the array is. A dilation may stop at the array's walls: two lesions
    that meet beyond one also meet within, where the way between them is pressed onto the wall.
    """
    from scipy import ndimage

    mask, numbers = labels != 0, np.zeros(labels.shape, dtype=np.int32)
    if connectivity is None:
        values, inverse = np.unique(labels[mask], return_inverse=True)
        numbers[mask] = inverse + 1
        return numbers, values.size
    sides = zip(joint_box(mask, mask), mask.shape, strict=True)
    box = tuple(slice(max(0, side.start - dilations), min(n, side.stop + dilations)) for side, n in sides)
    structure, inside = _neighbours(dilation_connectivity), mask[box]
    if dilations and inside.any():  # SciPy would take 0 iterations for "until nothing changes"
        inside = ndimage.binary_dilation(inside, structure, iterations=dilations)
    return numbers, int(ndimage.label(inside, _neighbours(connectivity), output=numbers[box]))


def overlaps(first: Numbers, second: Numbers, n_second: int) -> tuple[Ints, Ints, Ints]:
    """Number in first, number in second (from 0, sorted) and common voxels of each two labels that meet."""
    both = np.flatnonzero((first != 0) & (second != 0))
    code = (first.reshape(-1)[both].astype(np.int64) - 1) * n_second + (second.reshape(-1)[both] - 1)
    # Runs of one code first: they are few, while a table of all possible pairs would burst for two masks of noise.
    starts = np.flatnonzero(np.diff(code, prepend=-1))
    codes, which = np.unique(code[starts], return_inverse=True)
    voxels = sums(which, np.diff(starts, append=code.size), codes.size)
    return codes // max(1, n_second), codes % max(1, n_second), voxels


def sizes(numbers: Numbers, n: int) -> Ints:
    """Voxels of each of n lesions."""
    return np.asarray(np.bincount(numbers[numbers != 0], minlength=n + 1)[1:], dtype=np.int64)


def sums(which: Ints, values: Ints, size: int) -> Ints:
    """Sum of the values of each number from 0 to size - 1; the float64 inside holds counts of voxels exactly."""
    return np.bincount(which, weights=values, minlength=size).astype(np.int64)


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
