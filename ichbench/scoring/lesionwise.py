"""Each lesion by itself: lesion-wise Dice and HD95 as in BraTS 2023, where false positives are punished.

Its lesions are not those of lesions.py: the reference is dilated first, so that satellites belong to the bleed beside them,
and small ones do not count. The record looks at the voxels once; the scores are read off it and never raise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring.lesions import Floats, Ints, Numbers, Spacing, boxed_pair, numbered, overlaps, sizes, sums
from ichbench.scoring.overlap import LabelArray
from ichbench.scoring.surface import hausdorff, surface_record


@dataclass(frozen=True)
class LesionwiseRule:
    """Parameters of the lesion-wise scores. The defaults are those of BraTS 2023 for GLI, SSA and PED.

    dilations              times the reference is dilated, in voxels: lesions that meet become one (MEN, MET: 1)
    dilation_connectivity  neighbours in one dilation; BraTS takes 18 although it joins components by 26
    connectivity           neighbours within a component
    ignored_mm3            reference lesions up to this volume (<=) do not count (MET: 2)
    penalty_mm             distance of a missed lesion and of a false positive
    percent                percentile of the surface distances
    """

    dilations: int = 3
    dilation_connectivity: int = 18
    connectivity: int = 26
    ignored_mm3: float = 50.0
    penalty_mm: float = 374.0
    percent: float = 95.0


BRATS_2023 = LesionwiseRule()


@dataclass(frozen=True, eq=False)
class LesionwiseRecord:
    """Reference lesions (label i is number i - 1) with the predicted components that touch them.

    lesions_zyx, components_zyx   reference (not dilated) and prediction, labelled from 1 within their joint box
    reference_mm3, dice           of each lesion, ignored ones too; Dice is with all its partners together
    partners                      labels of the predicted components that touch the dilated lesion
    false_positives               predicted components that touch no dilated lesion, not even an ignored one
    """

    lesions_zyx: Numbers
    components_zyx: Numbers
    spacing_zyx_mm: Spacing
    rule: LesionwiseRule
    reference_mm3: Floats
    dice: Floats
    partners: tuple[Ints, ...]
    false_positives: int

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which lesions are large enough to count."""
        return np.asarray(np.round(self.reference_mm3, 6) > self.rule.ignored_mm3)  # rounded as in `count_lesions`


def lesionwise_record(
    reference_zyx: LabelArray, predicted_zyx: LabelArray, spacing_zyx_mm: Sequence[float], rule: LesionwiseRule = BRATS_2023
) -> LesionwiseRecord:
    """The lesions of BraTS 2023 and what was predicted for them. Masks and errors as in `lesion_record`.

    1. Components of the dilated reference, cut back to the reference, are the lesions: satellites belong to the bleed
    beside them. 2. A predicted component that touches a dilated lesion is its partner, whole, and may be a partner of
    several. 3. Any other predicted component, of whatever size, is a false positive.

    Source: github.com/rachitsaluja/BraTS-2023-Metrics, eval.py at 0e272e6, whose steps the tests repeat by brute force; the
    file itself was not run. An older state of it (7c8bc13) wants partners to touch the lesion itself; which of them ranked
    the challenge is not known. Dilations are in voxels, made for 1 mm: at slices of 5 mm, three join bleeds 30 mm apart.
    """
    reference, predicted, spacing_mm, voxel_ml = boxed_pair(reference_zyx, predicted_zyx, spacing_zyx_mm)
    if rule.dilations < 0:
        raise InputError(f"the reference is to be dilated {rule.dilations} times; a whole number from 0 up is needed")
    grown, n_lesions = numbered(reference, rule.connectivity, rule.dilations, rule.dilation_connectivity)
    components, n_components = numbered(predicted, rule.connectivity)
    lesion, partner, _ = overlaps(grown, components, n_components)
    partners = np.split(partner + 1, np.searchsorted(lesion, np.arange(1, n_lesions)))[:n_lesions]
    lesions = grown * (reference != 0)
    voxels, both = sizes(lesions, n_lesions), sizes(lesions * (components != 0), n_lesions)
    dice = 2.0 * both / (voxels + sums(lesion, sizes(components, n_components)[partner], n_lesions))
    volumes_mm3 = np.asarray(voxels * (1000.0 * voxel_ml), dtype=np.float64)
    lost = n_components - np.unique(partner).size
    return LesionwiseRecord(lesions, components, spacing_mm, rule, volumes_mm3, np.asarray(dice), tuple(partners), lost)


def lesionwise_dice(record: LesionwiseRecord) -> float:
    """Sum of the kept lesions' Dice / (kept lesions + false positives); 1 if there is neither."""
    kept = record.kept
    below = int(np.count_nonzero(kept)) + record.false_positives
    return math.fsum(record.dice[kept]) / below if below else 1.0


def lesionwise_hd(record: LesionwiseRecord) -> float:
    """The same for the Hausdorff distance in mm at the rule's percentile (surface.py); 0 if there is neither.

    A missed lesion and a false positive get the penalty; a distance beyond the penalty stays as it is. Every lesion costs a
    pass over the box round it and its partners: 0.4 ms for a small bleed, 0.6 s where one component fills the whole head, several
    where that is noise. Neither a crop nor a surface kept from the last lesion would help: nearly all of the time goes into
    the distances from the component's surfels to this lesion, and its percentile is over all of them.
    """
    from scipy import ndimage

    kept = np.flatnonzero(record.kept)
    lost = record.false_positives + sum(not record.partners[lesion].size for lesion in kept)
    distances = [record.rule.penalty_mm] * lost
    boxes = [ndimage.find_objects(labels) for labels in (record.lesions_zyx, record.components_zyx)] if kept.size else []
    for lesion in kept:
        partners = record.partners[lesion]
        if partners.size:
            parts = [boxes[0][lesion], *(boxes[1][label - 1] for label in partners)]
            box = tuple(slice(min(part[axis].start for part in parts), max(part[axis].stop for part in parts)) for axis in range(3))
            own, predicted = record.lesions_zyx[box] == lesion + 1, np.isin(record.components_zyx[box], partners)
            distances.append(hausdorff(surface_record(own, predicted, record.spacing_zyx_mm), record.rule.percent))
    return math.fsum(distances) / len(distances) if distances else 0.0
