"""Case detection: is there a bleed at all? Read off two volumes per case, in ml; no mask is needed.

A scan has a bleed if its reference volume is above 0, and it is called positive if its predicted volume is above a
threshold. Volumes come as two sequences in the same order of cases, or as two mappings from case to volume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError

#: 97.5 % quantile of the normal distribution: two-sided intervals of 95 %.
Z_95 = 1.959963984540054

Floats = NDArray[np.float64]
Volumes = Sequence[float] | Mapping[str, float] | NDArray[np.floating] | NDArray[np.integer]


@dataclass(frozen=True)
class Detection:
    """Cases called right and wrong at one threshold, and what follows. A share of no cases is nan.

    tp, fn                                   scans with a bleed, called positive and negative
    fp, tn                                   bleed-free scans, called positive and negative
    ppv, npv                                 parts of the positive and negative calls that are right. They hold for the share
                                             of bleeds in this cohort alone
    sensitivity_interval, specificity_interval   Wilson intervals, 95 %
    false_positive_ml_mean, _median, _max    predicted volume on the bleed-free scans: of all of them, silent ones included,
                                             and whatever the threshold; nan if there is no such scan
    """

    threshold_ml: float
    n: int
    tp: int
    fp: int
    tn: int
    fn: int
    sensitivity: float
    specificity: float
    ppv: float
    npv: float
    sensitivity_interval: tuple[float, float]
    specificity_interval: tuple[float, float]
    false_positive_ml_mean: float
    false_positive_ml_median: float
    false_positive_ml_max: float


@dataclass(frozen=True, eq=False)
class RocCurve:
    """Sensitivity against false positive rate over the threshold, from (0, 0) to (1, 1).

    thresholds_ml         falling: every predicted volume that occurs, then -inf, under which every scan is positive
    sensitivity           at each threshold; nan without a scan with a bleed
    false_positive_rate   at each threshold; nan without a bleed-free scan
    auc                   area under the curve; nan if a class is missing
    """

    thresholds_ml: Floats
    sensitivity: Floats
    false_positive_rate: Floats
    auc: float
    n_bleed: int
    n_bleed_free: int


def detect(reference_ml: Volumes, predicted_ml: Volumes, threshold_ml: float = 0.0) -> Detection:
    """Call every case whose predicted volume is above the threshold (>, not >=) positive, and count.

    A missing prediction is a volume of 0. InputError for volumes that are not finite numbers from 0 up, for lists of
    different length, for mappings of different cases, and for a threshold that is below 0 or not finite.
    """
    if not (math.isfinite(threshold_ml) and threshold_ml >= 0):
        raise InputError(f"the threshold is {threshold_ml} ml; a finite number from 0 up is needed")
    reference, predicted = _volumes(reference_ml, predicted_ml)
    bleed, called = reference > 0, predicted > threshold_ml
    tp, fp, fn, tn = (int(np.count_nonzero(both)) for both in (bleed & called, ~bleed & called, bleed & ~called, ~bleed & ~called))
    false_ml = predicted[~bleed]
    mean, median, largest = (
        (math.fsum(false_ml) / false_ml.size, float(np.median(false_ml)), float(false_ml.max())) if false_ml.size else (math.nan,) * 3
    )
    return Detection(
        threshold_ml=float(threshold_ml),
        n=reference.size,
        tp=tp,
        fp=fp,
        tn=tn,
        fn=fn,
        sensitivity=_share(tp, tp + fn),
        specificity=_share(tn, tn + fp),
        ppv=_share(tp, tp + fp),
        npv=_share(tn, tn + fn),
        sensitivity_interval=wilson(tp, tp + fn),
        specificity_interval=wilson(tn, tn + fp),
        false_positive_ml_mean=mean,
        false_positive_ml_median=median,
        false_positive_ml_max=largest,
    )


def roc(reference_ml: Volumes, predicted_ml: Volumes) -> RocCurve:
    """The ROC curve over the threshold of `detect`. Volumes and errors as there.

    The area is the part of all pairs of a scan with a bleed and one without in which the bleed has the larger predicted
    volume, ties counting half (Mann-Whitney U / (n1 n2); Hanley and McNeil, Radiology 1982), which is what straight lines
    between the points enclose. It is counted in whole numbers. Silent scans tie at 0 ml.
    """
    reference, predicted = _volumes(reference_ml, predicted_ml)
    volumes, which = np.unique(predicted, return_inverse=True)
    bleed = np.bincount(which[reference > 0], minlength=volumes.size)[::-1]
    free = np.bincount(which[~(reference > 0)], minlength=volumes.size)[::-1]
    # above[i]: scans of this kind that are called positive at threshold i
    above_bleed, above_free = (np.concatenate([[0], np.cumsum(counts)]) for counts in (bleed, free))
    n_bleed, n_free = int(above_bleed[-1]), int(above_free[-1])
    twice_wins = int(np.sum(free * (above_bleed[:-1] + above_bleed[1:])))
    return RocCurve(
        thresholds_ml=np.append(volumes[::-1], -math.inf),
        sensitivity=above_bleed / n_bleed if n_bleed else np.full(above_bleed.size, math.nan),
        false_positive_rate=above_free / n_free if n_free else np.full(above_free.size, math.nan),
        auc=_share(twice_wins, 2 * n_bleed * n_free),
        n_bleed=n_bleed,
        n_bleed_free=n_free,
    )


def wilson(hits: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share of `hits` in `n` (J Am Stat Assoc 1927); (nan, nan) if n is 0."""
    if n == 0:
        return math.nan, math.nan
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    # the ends 0 and 1 are exact in the formula, but not in floating point
    return centre - half if hits else 0.0, centre + half if hits < n else 1.0


def _volumes(reference_ml: Volumes, predicted_ml: Volumes) -> tuple[Floats, Floats]:
    """Both as arrays in one order of cases, checked."""
    if isinstance(reference_ml, Mapping) and isinstance(predicted_ml, Mapping):
        apart = sorted(set(reference_ml) ^ set(predicted_ml), key=str)
        if apart:
            case = apart[0]
            only = "the reference" if case in reference_ml else "the prediction"
            raise InputError(f"{len(apart)} case(s) have one volume only, the first is {case!r} in {only}; a missing prediction is 0 ml")
        cases = list(reference_ml)
        return _checked([reference_ml[case] for case in cases], "reference"), _checked([predicted_ml[case] for case in cases], "predicted")
    if isinstance(reference_ml, Mapping) or isinstance(predicted_ml, Mapping):
        raise InputError("one of the two is a mapping from case to ml and the other is not; give two mappings or two lists")
    reference, predicted = _checked(reference_ml, "reference"), _checked(predicted_ml, "predicted")
    if reference.size != predicted.size:
        raise InputError(f"{reference.size} reference volumes and {predicted.size} predicted ones; each case needs one of both")
    return reference, predicted


def _checked(volumes_ml: Sequence[float] | NDArray[np.floating] | NDArray[np.integer], which: str) -> Floats:
    try:
        volumes = np.asarray(volumes_ml, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the {which} volumes are not numbers: {error}") from error
    if volumes.ndim != 1:
        raise InputError(f"the {which} volumes have shape {volumes.shape}; a list of numbers, one per case, is needed")
    wrong = volumes[~(np.isfinite(volumes) & (volumes >= 0))]
    if wrong.size:
        raise InputError(f"a {which} volume is {wrong[0]} ml; finite numbers from 0 up are needed")
    return volumes


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
