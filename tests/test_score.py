"""Scores of pairs and of cases."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ichbench.errors import InputError
from ichbench.scoring import METRICS, PROTOCOLS, Score, rows_for_case, score_masks
from ichbench.scoring.score import FORMULAS, check_metrics
from ichbench.scoring.surface import assd, hausdorff, surface_record

SPACING = (5.0, 0.45, 0.45)


def official(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """The INSTANCE 2022 formulas on the package's surface distances (which the official script copies), no mask empty."""
    import surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(reference, predicted, spacing)
    volumes = int(reference.sum()), int(predicted.sum())
    return {
        "dice": (2.0 * int((reference & predicted).sum()) + 0.00001) / (sum(volumes) + 0.00001),
        "rvd": abs((volumes[1] - volumes[0]) / float(volumes[0])),
        "nsd": surface_distance.compute_surface_dice_at_tolerance(found, 0.42),
        "hd": surface_distance.compute_robust_hausdorff(found, 100),
        "hd95": surface_distance.compute_robust_hausdorff(found, 95),
    }


def box_mask(shape: tuple[int, int, int] = (8, 20, 20)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[2:4, 5:9, 5:9] = True
    return mask


def by_metric(rows: list[Score]) -> dict[str, float]:
    return {row.metric: row.value for row in rows}


# --- one pair ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(2, {"dice": 0.75, "nsd": 0.62777, "hd": 0.45, "rvd": 0.0}), (0, {"dice": 0.5, "nsd": 0.72077, "hd": 5.0, "rvd": 0.0})],
)
def test_shifted_box_of_the_facts(axis: int, expected: dict[str, float]) -> None:
    found = score_masks(box_mask(), np.roll(box_mask(), 1, axis=axis), SPACING)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=5e-6)
    assert found["reference_ml"] == found["predicted_ml"] == pytest.approx(32 * 5 * 0.45 * 0.45 / 1000, rel=1e-14)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_the_official_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 16, size=3))
    masks = [rng.random(shape) < level for level in (0.3, 0.5)]
    masks[0][0, 0, 0] = masks[1][-1, -1, -1] = True
    expected = official(masks[0], masks[1], SPACING)
    found = score_masks(masks[0], masks[1], SPACING)
    assert {key: found[key] for key in expected} == expected


#: (reference empty, prediction empty) -> dice, nsd, rvd, hd, hd95, assd; the official values of facts A1 for 32 voxels
SMOOTHED = 1e-5 / (32 + 1e-5)  # 3.12e-7
EMPTIES = {
    ("instance2022", False, True): (SMOOTHED, 0.0, 1.0, math.inf, math.inf, math.inf),
    ("instance2022", True, False): (SMOOTHED, 0.0, math.inf, math.inf, math.inf, math.inf),
    ("instance2022", True, True): (1.0, math.nan, math.nan, math.inf, math.inf, math.nan),
    ("instance2022", False, False): (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    ("strict", False, True): (0.0, 0.0, 1.0, math.inf, math.inf, math.inf),
    ("strict", True, False): (0.0, 0.0, math.inf, math.inf, math.inf, math.inf),
    ("strict", True, True): (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    ("strict", False, False): (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize(("protocol", "no_reference", "no_prediction"), list(EMPTIES))
def test_empty_masks(protocol: str, no_reference: bool, no_prediction: bool) -> None:
    reference, predicted = box_mask() & (not no_reference), box_mask() & (not no_prediction)
    found = score_masks(reference, predicted, SPACING, protocol)
    values = [found[key] for key in ("dice", "nsd", "rvd", "hd", "hd95", "assd")]
    assert [repr(v) for v in values] == [repr(v) for v in EMPTIES[protocol, no_reference, no_prediction]]
    assert (found["reference_ml"] == 0, found["predicted_ml"] == 0) == (no_reference, no_prediction)


def test_strict_differs_from_instance2022_in_nothing_but_smoothing_and_empties() -> None:
    reference, predicted = box_mask(), np.roll(box_mask(), 2, axis=1)
    loose, strict = (score_masks(reference, predicted, SPACING, protocol) for protocol in ("instance2022", "strict"))
    assert strict.pop("dice") == 0.5
    assert loose.pop("dice") == (32 + 1e-5) / (64 + 1e-5) > 0.5
    assert loose == strict


@settings(max_examples=60)
@given(st.data(), st.tuples(*[st.integers(0, 4)] * 3), st.sampled_from(sorted(PROTOCOLS)))
def test_a_valid_pair_never_raises(data: st.DataObject, shape: tuple[int, int, int], protocol: str) -> None:
    """Zero-size, one-voxel, one-slice, full and empty masks included; dice, hd, nsd and assd do not care which is which."""
    masks = [data.draw(hnp.arrays(bool, shape)) for _ in range(2)]
    found = score_masks(masks[0], masks[1], SPACING, protocol, tuple(FORMULAS))
    # a protocol may drop a row where a mask is empty, and only there
    assert set(found) <= set(FORMULAS) if not (masks[0].any() and masks[1].any()) else set(found) == set(FORMULAS)
    swapped = score_masks(masks[1], masks[0], SPACING, protocol, tuple(FORMULAS))
    for key in {"dice", "nsd", "hd", "hd95", "assd", "iou", "hd_pooled", "nsd_voxels", "boundary_iou"} & found.keys() & swapped.keys():
        assert swapped[key] == pytest.approx(found[key], rel=1e-14, nan_ok=True), key
    for key in {"dice", "nsd", "iou", "sensitivity", "precision", "lesion_f1", "pq", "lesionwise_dice", "boundary_iou"} & found.keys():
        assert not found[key] < 0, key
        assert not found[key] > 1, key


def test_policies_that_are_no_number() -> None:
    mask, empty = box_mask(), np.zeros_like(box_mask())
    diagonal = math.hypot(*(n * edge for n, edge in zip(mask.shape, SPACING, strict=True)))
    assert score_masks(mask, empty, SPACING, "toothfairy")["hd95"] == diagonal
    assert score_masks(empty, empty, SPACING, "toothfairy")["hd95"] == 0.0
    assert score_masks(mask, empty, SPACING, "brats")["hd95"] == 374.0
    missed = score_masks(mask, empty, SPACING, "monai")
    assert missed["hd_directional"] == math.inf
    assert "hd_directional@95" not in missed
    assert set(score_masks(empty, empty, SPACING, "monai")) == {"reference_ml", "predicted_ml"}
    assert set(score_masks(mask, mask, SPACING, "monai")) == set(PROTOCOLS["monai"].metrics)


def test_lesion_rows_by_size() -> None:
    """Two lesions of 24 voxels (24 ml at 10 mm) and one of a single voxel (1 ml); one large one is missed."""
    reference = np.zeros((9, 20, 20), dtype=bool)
    reference[1:3, 1:4, 1:5] = reference[5:7, 1:4, 1:5] = reference[1, 15, 15] = True
    predicted = np.zeros_like(reference)
    predicted[1:3, 2, 2] = predicted[1, 15, 15] = predicted[7, 18, 18] = True
    keys = ("lesion_sensitivity", "lesion_sensitivity@10", "lesion_sensitivity@1", "lesion_sensitivity@30", "lesion_fp", "lesion_fp@1")
    found = score_masks(reference, predicted, (10, 10, 10), metrics=keys)
    assert found["lesion_sensitivity"] == 2 / 3
    assert found["lesion_sensitivity@10"] == 0.5
    assert found["lesion_sensitivity@1"] == 1.0
    assert math.isnan(found["lesion_sensitivity@30"])
    assert (found["lesion_fp"], found["lesion_fp@1"]) == (1.0, 1.0)
    with pytest.raises(InputError, match="no lesion stratum begins at 5 ml"):
        score_masks(reference, predicted, (10, 10, 10), metrics=("lesion_f1@5",))


def test_signed_volumes() -> None:
    reference = box_mask()
    less = reference & (np.cumsum(reference).reshape(reference.shape) <= reference.sum() // 2)
    found = score_masks(reference, less, SPACING, metrics=("rvd", "rvd_signed", "volume_bias_ml", "reference_ml", "predicted_ml"))
    assert found["rvd_signed"] == -found["rvd"] == -0.5
    assert found["volume_bias_ml"] == pytest.approx(found["predicted_ml"] - found["reference_ml"], rel=1e-14)


def test_other_metrics_and_parameters() -> None:
    reference, predicted = box_mask(), np.roll(box_mask(), 1, axis=2)
    found = score_masks(reference, predicted, SPACING, metrics=("nsd@0.42", "nsd@0.45", "hd@100", "iou", "precision"))
    plain = score_masks(reference, predicted, SPACING)
    assert found == {"nsd@0.42": plain["nsd"], "nsd@0.45": 1.0, "hd@100": plain["hd"], "iou": 0.6, "precision": 0.75}
    wide = dataclasses.replace(PROTOCOLS["strict"], tolerance_mm=0.45, metrics=("nsd",))
    assert score_masks(reference, predicted, SPACING, wide) == {"nsd": 1.0}
    for wrong in ("missing", "dice/2", "dize", "nsd@a"):
        with pytest.raises(InputError):
            score_masks(reference, predicted, SPACING, metrics=(wrong,))


def test_a_bare_boundary_iou_looks_two_percent_of_the_diagonal_away() -> None:
    """Boxes one in the other, in a volume of 30 x 100 x 75 mm: 2 % of its 128.5 mm are 2.57, so that rims are two voxels wide."""
    outer, inner = np.zeros((2, 3, 100, 75), dtype=bool)
    outer[1, 20:60, 20:60] = inner[1, 21:59, 21:59] = True
    keys = ("boundary_iou", "boundary_iou@2", "boundary_iou@2.57", "boundary_iou@1.9", "boundary_iou@3", "iou")
    bare, at_two, exact, less, more, iou = score_masks(outer, inner, (10, 1, 1), metrics=keys).values()
    # of rims of 304 and 288 voxels, the ring of 38 x 38 voxels is in both
    assert bare == at_two == exact == 148 / (304 + 288 - 148)
    assert 0 == less < bare < more < iou


def test_names_of_metrics_are_cleaned() -> None:
    assert check_metrics([" dice", "nsd@1.0 ", "dice"]) == ("dice", "nsd@1.0")
    for nothing in ([""], [" "], ["", " "]):
        with pytest.raises(InputError, match=r"^no metric was given; choose from dice, nsd"):
            check_metrics(nothing)
    with pytest.raises(InputError, match="there is no metric ''"):
        check_metrics(["dice", ""])


def test_wrong_pairs_are_refused() -> None:
    mask = box_mask()
    with pytest.raises(InputError, match=r"\(8, 20, 20\).*\(7, 20, 20\)"):
        score_masks(mask, mask[1:], SPACING)
    with pytest.raises(InputError, match=r"the prediction .*0\.5"):
        score_masks(mask, mask * 0.5, SPACING)
    with pytest.raises(InputError, match="the spacing"):
        score_masks(mask, mask, (5, 0.45))
    with pytest.raises(InputError, match="no protocol 'x'"):
        score_masks(mask, mask, SPACING, "x")


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    mask = box_mask()
    moved = np.roll(mask, 1, axis=2)
    expected = score_masks(mask, moved, SPACING)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        predicted = torch.tensor(moved).to(dtype)
        if dtype == torch.float32:
            predicted.requires_grad_()
        assert score_masks(torch.tensor(mask), predicted, torch.tensor(SPACING, dtype=torch.float64)) == expected


def test_importing_does_not_import_torch_or_pandas() -> None:
    code = "import sys, ichbench.scoring; print([name for name in ('torch', 'pandas', 'scipy', 'nibabel') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- one case ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_case() -> None:
    rows = rows_for_case("base", "0", "7", "001", box_mask(), np.roll(box_mask(), 1, axis=2), SPACING)
    assert {row[:4] for row in rows} == {("base", "0", "7", "001")}
    pair = score_masks(box_mask(), np.roll(box_mask(), 1, axis=2), SPACING)
    marks = {"missing": 0.0, "empty_prediction": 0.0, "empty_reference": 0.0}
    assert by_metric(rows) == pytest.approx(pair | marks, rel=1e-14)
    # file order (x, y, z) is the default of a case and this order is that of `score_masks`: asked for, the bits are the same
    rows = rows_for_case("base", "0", "7", "001", box_mask(), np.roll(box_mask(), 1, axis=2), SPACING, file_axes=(0, 1, 2))
    assert by_metric(rows) == pair | marks
    assert all(row.metric in METRICS for row in rows)


def test_a_missing_prediction_is_scored_as_an_empty_one() -> None:
    missing = by_metric(rows_for_case("a", "-", "-", "c", box_mask(), None, SPACING, "strict"))
    empty = by_metric(rows_for_case("a", "-", "-", "c", box_mask(), box_mask() & False, SPACING, "strict"))
    assert (missing.pop("missing"), empty.pop("missing")) == (1.0, 0.0)
    assert missing == empty
    assert (missing["dice"], missing["hd"], missing["empty_prediction"], missing["empty_reference"]) == (0.0, math.inf, 1.0, 0.0)


def test_rows_per_label_and_of_the_whole() -> None:
    labels = {"background": 0, "clot": 1, "edema": 2, "vessel": 5}
    rng = np.random.default_rng(3)
    reference, predicted = rng.choice([0, 1, 2], size=(2, 5, 9, 9))
    found = by_metric(rows_for_case("a", "-", "-", "c", reference, predicted, SPACING, "strict", labels))
    whole = score_masks(reference > 0, predicted > 0, SPACING, "strict")
    assert {key: found[key] for key in whole} == pytest.approx(whole, rel=1e-12)
    for value in (1, 2, 5):
        alone = score_masks(reference == value, predicted == value, SPACING, "strict")
        assert {key: found[f"{key}/{value}"] for key in alone} == pytest.approx(alone, rel=1e-12)
    assert (found["empty_reference/5"], found["empty_prediction/5"], found["empty_reference"], found["dice/5"]) == (1.0, 1.0, 0.0, 1.0)
    assert "missing/1" not in found
    one = by_metric(rows_for_case("a", "-", "-", "c", reference > 0, predicted > 0, SPACING, "strict", {"background": 0, "clot": 1}))
    assert not any("/" in metric for metric in one)


def test_ignored_voxels_count_in_neither_mask() -> None:
    reference, predicted = box_mask().astype(int), np.ones((8, 20, 20), dtype=int)
    reference[reference == 0] = 9
    found = by_metric(rows_for_case("a", "-", "-", "c", reference, predicted, SPACING, "strict", {"clot": 1, "ignore": 9}))
    assert found["dice"] == 1.0
    assert found["predicted_ml"] == found["reference_ml"]


def test_distances_are_summed_in_the_order_of_the_file() -> None:
    """The last bit of sqrt((a + b) + c) depends on the order; the official script has that of the file, here (x, y, z)."""
    reference, predicted = np.zeros((2, 6, 6, 6), dtype=bool)
    reference[1, 1, 1] = predicted[4, 3, 2] = True
    spacing = (5.0, 0.7, 0.49)
    expected = official(reference.T, predicted.T, spacing[::-1])
    assert expected["hd"] != official(reference, predicted, spacing)["hd"], "the pair that this test needs"
    for axes, turned, edges in (
        ((2, 1, 0), (0, 1, 2), spacing),
        ((1, 2, 0), (1, 0, 2), (spacing[1], spacing[0], spacing[2])),  # working axis k is file axis axes[k]
    ):
        rows = rows_for_case("a", "-", "-", "c", reference.transpose(turned), predicted.transpose(turned), edges, file_axes=axes)
        assert by_metric(rows)["hd"] == expected["hd"]


def test_undeclared_labels_and_shapes_name_the_case() -> None:
    with pytest.raises(InputError, match=r"^case 017: the prediction contains the label\(s\) \[3\]"):
        rows_for_case("a", "-", "-", "017", box_mask(), 3 * box_mask(), SPACING, labels={"clot": 1})
    with pytest.raises(InputError, match=r"^case 017: the reference has shape \(8, 20, 20\).*\(8, 20, 19\)"):
        rows_for_case("a", "-", "-", "017", box_mask(), box_mask()[..., 1:], SPACING)
    with pytest.raises(InputError, match=r"^case 017: the reference contains the value 0\.5"):
        rows_for_case("a", "-", "-", "017", box_mask() * 0.5, None, SPACING)
    with pytest.raises(InputError, match=r"^case 017: the prediction contains the value 0\.5"):
        rows_for_case("a", "-", "-", "017", box_mask(), box_mask() * 0.5, SPACING)


def test_a_sheared_voxel_has_one_volume_everywhere() -> None:
    reference, predicted = np.zeros((5, 9, 9), dtype=bool), np.zeros((5, 9, 9), dtype=bool)
    reference[1, 1:3, 1] = predicted[1:3, 1:5, 1:4] = True
    own = dataclasses.replace(PROTOCOLS["strict"], metrics=("reference_ml", "predicted_ml", "volume_bias_ml", "lesion_sensitivity@1"))
    rows = rows_for_case("a", "-", "-", "c", reference, predicted, (5, 1, 1), own, voxel_ml=0.6)
    values = {row.metric: row.value for row in rows}
    assert values["predicted_ml"] - values["reference_ml"] == pytest.approx(values["volume_bias_ml"], rel=1e-14)
    assert values["reference_ml"] == 1.2
    assert values["lesion_sensitivity@1"] == 1.0  # 1.2 ml; by the product of the edges it would be 0.01 ml
    assert all(type(row.value) is float for row in rows)


@pytest.mark.parametrize("wrong", ["hd@nan", "hd@101", "hd@-1", "nsd@-1", "nsd@nan", "nsd@inf", "boundary_iou@-1", "lesion_fp@5"])
def test_a_parameter_that_means_nothing_is_refused_whatever_the_masks(wrong: str) -> None:
    with pytest.raises(InputError, match=r"parameter|stratum"):
        score_masks(box_mask(), np.zeros_like(box_mask()), SPACING, "strict", (wrong,))


def test_a_prediction_may_say_ignore_only_where_the_reference_does() -> None:
    reference = np.zeros((2, 4, 4), dtype=np.uint8)
    reference[0, 0, :3] = (1, 2, 3)
    labels = {"background": 0, "x": 1, "y": 2, "ignore": 3}
    rows = rows_for_case("a", "-", "-", "c", reference, reference, SPACING, "strict", labels)
    assert {row.metric: row.value for row in rows if row.metric.startswith("dice")} == {"dice": 1.0, "dice/1": 1.0, "dice/2": 1.0}
    one = rows_for_case("a", "-", "-", "c", np.minimum(reference, 1), None, SPACING, "strict", {"background": 0, "x": 1, "ignore": 3})
    assert not any("/" in row.metric for row in one)  # beside "ignore" there is one label, which is the foreground
    predicted = reference.copy()
    predicted[1, 1, 1] = 3
    with pytest.raises(InputError, match=r"^case c: the prediction contains the label 3 \(ignore\).*only references may say ignore"):
        rows_for_case("a", "-", "-", "c", reference, predicted, SPACING, "strict", labels)


@pytest.mark.parametrize("spacing", [(1, 1, 1e-6), (1e-6, 1, 1), (5, 0.45, 1e-5), (1e-6, 1e6, 1)])
def test_absurd_spacings_cost_no_memory(spacing: tuple[float, float, float]) -> None:
    one, other = np.zeros((6, 20, 20), dtype=bool), np.zeros((6, 20, 20), dtype=bool)
    one[2:4, 5:9, 5:9] = other[2:5, 8:13, 8:13] = True
    tracemalloc.start()
    found = score_masks(one, other, spacing)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    settled = surface_record(one, other, spacing).settled
    assert found["hd"] == pytest.approx(hausdorff(settled, 100), rel=1e-12)
    assert found["assd"] == pytest.approx(assd(settled), rel=1e-12)
