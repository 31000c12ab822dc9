"""Case detection: counts by hand, Wilson's interval from its equation and from SciPy, the ROC curve over all pairs."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ichbench.errors import InputError
from ichbench.scoring.detection import detect, roc, wilson

VOLUMES = st.sampled_from([0.0, 0.0, 0.05, 0.1, 1.0, 7.5, 30.0])
CASES = st.lists(st.tuples(VOLUMES, VOLUMES), max_size=14)


def columns(cases: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [reference for reference, _ in cases], [predicted for _, predicted in cases]


def test_counts_by_hand() -> None:
    """Ten scans at 0.1 ml: a volume of exactly the threshold is not above it."""
    reference = [5.0, 5.0, 5.0, 0.2, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]
    predicted = [4.0, 9.0, 0.2, 0.1, 0.0, 0.0, 0.0, 0.1, 0.5, 2.4]
    found = detect(reference, predicted, 0.1)
    assert (found.tp, found.fn, found.fp, found.tn, found.n) == (3, 2, 2, 3, 10)
    assert (found.sensitivity, found.specificity, found.ppv, found.npv) == (0.6, 0.6, 0.6, 0.6)
    assert (found.false_positive_ml_mean, found.false_positive_ml_median, found.false_positive_ml_max) == (0.6, 0.1, 2.4)
    assert found.sensitivity_interval == wilson(3, 5)
    assert found.threshold_ml == 0.1
    low = detect(reference, predicted)
    assert (low.tp, low.fn, low.fp, low.tn) == (4, 1, 3, 2)
    assert (low.sensitivity, low.specificity, low.ppv, low.npv) == (4 / 5, 2 / 5, 4 / 7, 2 / 3)
    assert (low.sensitivity_interval, low.specificity_interval) == (wilson(4, 5), wilson(2, 5))
    assert low.false_positive_ml_mean == found.false_positive_ml_mean, "volumes do not depend on the threshold"


@given(CASES, st.sampled_from([0.0, 0.05, 1.0, 30.0]))
def test_counts_case_by_case(cases: list[tuple[float, float]], threshold_ml: float) -> None:
    found = detect(*columns(cases), threshold_ml)
    calls = [(reference > 0, predicted > threshold_ml) for reference, predicted in cases]
    assert (found.tp, found.fp, found.tn, found.fn) == tuple(
        calls.count(kind) for kind in ((True, True), (False, True), (False, False), (True, False))
    )
    assert found.n == len(cases)
    for value, part, rest in (
        (found.sensitivity, found.tp, found.fn),
        (found.specificity, found.tn, found.fp),
        (found.ppv, found.tp, found.fp),
        (found.npv, found.tn, found.fn),
    ):
        assert value == part / (part + rest) if part + rest else math.isnan(value)


def test_a_missing_class_is_nan() -> None:
    nothing, bleeds, free = detect([], []), detect([1.0, 2.0], [0.0, 3.0]), detect([0.0, 0.0], [0.0, 3.0])
    for value in (nothing.sensitivity, nothing.specificity, nothing.ppv, nothing.npv, bleeds.specificity, free.sensitivity):
        assert math.isnan(value)
    for interval in (nothing.sensitivity_interval, bleeds.specificity_interval, free.sensitivity_interval):
        assert all(math.isnan(end) for end in interval)
    assert all(math.isnan(ml) for ml in (bleeds.false_positive_ml_mean, bleeds.false_positive_ml_median, bleeds.false_positive_ml_max))
    assert (free.false_positive_ml_mean, free.false_positive_ml_median, free.false_positive_ml_max) == (1.5, 1.5, 3.0)
    for cases in (([], []), ([1.0, 2.0], [0.0, 3.0]), ([0.0, 0.0], [0.0, 3.0])):
        assert math.isnan(roc(*cases).auc)
    assert np.isnan(roc([1.0], [2.0]).false_positive_rate).all()
    assert roc([1.0], [2.0]).sensitivity.tolist() == [0.0, 1.0]
    assert np.isnan(roc([0.0], [2.0]).sensitivity).all()
    assert roc([], []).thresholds_ml.tolist() == [-math.inf]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
)
def test_wilson_as_published(hits: int, n: int, low: float, high: float) -> None:
    """The examples of Newcombe, Stat Med 1998, method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation_and_agrees_with_scipy(case: tuple[int, int]) -> None:
    hits, n = case
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):
        assert (hits / n - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, rel=1e-8, abs=1e-14)
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-12, abs=1e-15)
    assert (low == 0) == (hits == 0)
    assert (high == 1) == (hits == n)
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), rel=1e-9, abs=1e-14)


@settings(max_examples=200)
@given(CASES)
def test_auc_is_the_share_of_pairs_won(cases: list[tuple[float, float]]) -> None:
    """Mann-Whitney by two loops, and the trapezes under the curve."""
    curve = roc(*columns(cases))
    bleeds, free = ([predicted for reference, predicted in cases if (reference > 0) == kind] for kind in (True, False))
    assert (curve.n_bleed, curve.n_bleed_free) == (len(bleeds), len(free))
    if not (bleeds and free):
        assert math.isnan(curve.auc)
        return
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in bleeds for b in free)
    assert curve.auc == won / (len(bleeds) * len(free))
    assert curve.auc == pytest.approx(np.trapezoid(curve.sensitivity, curve.false_positive_rate), rel=1e-12)
    assert curve.auc == stats.mannwhitneyu(bleeds, free).statistic / (len(bleeds) * len(free))


@settings(max_examples=100)
@given(CASES)
def test_each_point_of_the_curve_is_a_detection(cases: list[tuple[float, float]]) -> None:
    reference, predicted = columns(cases)
    curve = roc(reference, predicted)
    assert curve.thresholds_ml.tolist() == [*sorted(set(predicted), reverse=True), -math.inf]
    for threshold, sensitivity, rate in zip(curve.thresholds_ml[:-1], curve.sensitivity, curve.false_positive_rate, strict=False):
        found = detect(reference, predicted, threshold)
        assert [sensitivity, 1 - rate] == pytest.approx([found.sensitivity, found.specificity], rel=1e-14, nan_ok=True)
    if curve.n_bleed and curve.n_bleed_free:
        assert (curve.sensitivity[0], curve.false_positive_rate[0]) == (0.0, 0.0)
        assert (curve.sensitivity[-1], curve.false_positive_rate[-1]) == (1.0, 1.0)
        assert (np.diff(curve.sensitivity) >= 0).all()
        assert (np.diff(curve.false_positive_rate) >= 0).all()


@given(CASES, st.randoms())
def test_order_of_cases_and_unit_do_not_matter(cases: list[tuple[float, float]], random: Any) -> None:
    mixed = random.sample(cases, len(cases))
    assert repr(detect(*columns(mixed), 0.05)) == repr(detect(*columns(cases), 0.05))
    scaled = [(8 * reference, 8 * predicted) for reference, predicted in mixed]
    assert repr(roc(*columns(scaled)).auc) == repr(roc(*columns(cases)).auc)
    swapped = [(float(reference == 0), predicted) for reference, predicted in cases]
    assert roc(*columns(swapped)).auc == pytest.approx(1 - roc(*columns(cases)).auc, nan_ok=True)


def test_a_curve_by_hand() -> None:
    """Bleeds at 3, 1, 0 ml, bleed-free at 1, 0, 0 ml: of nine pairs the bleeds win 3, 2.5 and 1."""
    curve = roc([9.0, 9.0, 9.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert curve.thresholds_ml.tolist() == [3.0, 1.0, 0.0, -math.inf]
    assert curve.sensitivity.tolist() == [0.0, 1 / 3, 2 / 3, 1.0]
    assert curve.false_positive_rate.tolist() == [0.0, 0.0, 1 / 3, 1.0]
    assert curve.auc == (3 + 2.5 + 1) / 9


def test_mappings_are_matched_by_case() -> None:
    reference, predicted = {"a": 1.0, "b": 0.0, "c": 2.0}, {"c": 0.0, "a": 3.0, "b": 0.4}
    assert detect(reference, predicted, 0.1) == detect([1.0, 0.0, 2.0], [3.0, 0.4, 0.0], 0.1)
    assert roc(reference, predicted).auc == roc(np.array([1, 0, 2]), np.array([3.0, 0.4, 0.0])).auc == 0.5
    with pytest.raises(InputError, match=r"2 case\(s\) have one volume only, the first is 'b' in the reference"):
        detect(reference, {"c": 0.0, "a": 3.0, "d": 1.0})
    with pytest.raises(InputError, match="'d' in the prediction"):
        roc(reference, predicted | {"d": 1.0})
    with pytest.raises(InputError, match="mapping"):
        detect(reference, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("reference", "predicted", "words"),
    [
        ([1.0, 2.0], [1.0], "2 reference volumes and 1 predicted"),
        ([1.0, math.nan], [1.0, 2.0], "a reference volume is nan"),
        ([1.0, 2.0], [1.0, math.inf], "a predicted volume is inf"),
        ([1.0, 2.0], [1.0, -0.5], r"a predicted volume is -0\.5"),
        ([[1.0, 2.0]], [1.0, 2.0], r"shape \(1, 2\)"),
        (1.0, [1.0], r"shape \(\)"),
        (["one"], [1.0], "the reference volumes are not numbers"),
        ([1.0], [[1.0], [2.0, 3.0]], "the predicted volumes are not numbers"),
        ([None], [1.0], "a reference volume is nan"),
    ],
)
def test_what_is_no_list_of_volumes_is_refused(reference: Any, predicted: Any, words: str) -> None:
    for call in (detect, roc):
        with pytest.raises(InputError, match=words):
            call(reference, predicted)


@pytest.mark.parametrize("threshold_ml", [-0.1, math.nan, math.inf])
def test_a_threshold_is_a_volume(threshold_ml: float) -> None:
    with pytest.raises(InputError, match="the threshold is"):
        detect([1.0], [1.0], threshold_ml)


#: model -> severe hematomas called severe, others called severe (as the authors flagged them), AUC (Mann-Whitney by SciPy)
SEVERE = {
    "msl_full": (16, 0, 0.9610526315789474),
    "msl_half": (16, 1, 0.9189473684210526),
    "msl_other_half": (15, 0, 0.9505263157894737),
    "nih_ssl": (17, 2, 0.9463157894736842),
    "vu_ssl": (16, 0, 0.9726315789473684),
}


@pytest.mark.parametrize("model", SEVERE)
def test_real_volumes(shared_data: Path, model: str) -> None:
    """Five models of MASILab on 63 head CTs. Every scan has a bleed, so what is detected is a severe one, of over 25 ml."""
    with (shared_data / "rankings" / "masilab_tbi_nih_vu_per_case.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["algorithm"] == model]
    severe = [float(row["severe hematoma ground truth"]) for row in rows]
    predicted_ml = [float(row["largest hematoma prediction(mm)"]) / 1000 for row in rows]
    found, curve = detect(severe, predicted_ml, 25.0), roc(severe, predicted_ml)
    flags = [(row["severe hematoma ground truth"], row["severe hematoma pred"]) for row in rows]
    assert (found.tp, found.fp) == (flags.count(("1", "1")), flags.count(("0", "1"))) == SEVERE[model][:2]
    assert (found.tp + found.fn, found.fp + found.tn) == (curve.n_bleed, curve.n_bleed_free) == (25, 38)
    assert curve.auc == pytest.approx(SEVERE[model][2], rel=1e-15)
