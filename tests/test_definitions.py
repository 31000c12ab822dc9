"""The definition matrix and the tolerance curve: official numbers kept, folds by hand, knife edges, and the text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from ichbench.errors import InputError
from ichbench.scoring import edges, overlap, surface
from ichbench.scoring.definitions import (
    DEFINITIONS,
    MATRIX_METRICS,
    TOLERANCES_MM,
    CurvePoint,
    curve_tolerances,
    definition_matrix,
    fold_definitions,
    matrix_metrics,
    mean_curve,
    pair_definitions,
    render_curve,
    render_matrix,
    tolerance_curve,
)
from ichbench.scoring.protocol import METRICS, PROTOCOLS
from ichbench.scoring.score import score_masks

SPACING = (5.0, 0.45, 0.45)


def ellipsoid(radii_mm: tuple[float, ...], centre: tuple[int, ...] = (10, 80, 80)) -> np.ndarray:
    """On 20 x 160 x 160 voxels of 5 x 0.45 x 0.45 mm; radii in z, y, x."""
    terms = zip(np.ogrid[:20, :160, :160], centre, SPACING, radii_mm, strict=True)
    return np.asarray(sum(((axis - c) * edge / radius) ** 2 for axis, c, edge, radius in terms) <= 1)


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = [ndimage.gaussian_filter(rng.random((6, 20, 24)), 2, mode="wrap") for _ in range(2)]
    return smooth[0] > np.quantile(smooth[0], 0.7), smooth[0] + smooth[1] > np.quantile(smooth[0] + smooth[1], 0.7)


# --- one pair ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_first_definition_is_the_official_number(seed: int) -> None:
    pair = random_pair(seed)
    metrics = (*MATRIX_METRICS, "nsd@1.0")
    values = pair_definitions(*pair, SPACING, metrics)
    official = score_masks(*pair, SPACING, "instance2022", metrics)
    first = {metric: value for (metric, _), value in reversed(values.items())}
    assert first == official


def test_the_other_definitions() -> None:
    first, second = random_pair(7)
    record, surfels = edges.edge_record(first, second, SPACING), surface.surface_record(first, second, SPACING)
    values = pair_definitions(first, second, SPACING, (*MATRIX_METRICS, "nsd@2.0"))
    means = [
        np.average(d, weights=a) for d, a in ((surfels.reference_mm, surfels.reference_mm2), (surfels.predicted_mm, surfels.predicted_mm2))
    ]
    expected = {
        ("dice", "strict"): overlap.dice(overlap.count(first, second)),
        ("nsd", "voxels_count"): edges.nsd_voxels(record, 0.42),
        ("nsd", "voxels_fractions"): edges.nsd_fractions(record, 0.42),
        ("hd", "voxels"): edges.hd_pooled(record, 100),
        ("hd95", "voxels_directional"): edges.hd_directional(record, 95),
        ("hd95", "voxels_pooled"): edges.hd_pooled(record, 95),
        ("assd", "surfels_directional"): pytest.approx(np.mean(means), rel=1e-14),
        ("assd", "voxels_pooled"): edges.assd_pooled(record),
        ("assd", "voxels_directional"): edges.assd_directional(record),
        ("nsd@2.0", "voxels_count"): edges.nsd_voxels(record, 2.0),
        ("nsd@2.0", "voxels_fractions"): edges.nsd_fractions(record, 2.0),
    }
    assert {key: values[key] for key in expected} == expected
    official = {(d.metric, d.name) for d in DEFINITIONS if d.formula is None} | {("nsd@2.0", "surfels_area")}
    assert set(values) == set(expected) | official
    assert len(set(values.values())) == len(values), "on this pair no two definitions agree, so none can stand in for another"


def test_box_of_the_facts() -> None:
    """Facts, F: shifted by a voxel in x Dice .75, NSD .62777, HD .45; by a slice Dice .5, NSD .72077, HD 5. Edges: 8 or 16 of 32 move."""
    mask = np.zeros((8, 20, 20), dtype=bool)
    mask[2:4, 5:9, 5:9] = True
    for axis, official, voxels in ((2, (0.75, 0.62777, 0.45), 0.75), (0, (0.5, 0.72077, 5.0), 0.5)):
        values = pair_definitions(mask, np.roll(mask, 1, axis=axis), SPACING, ("dice", "nsd", "hd"))
        assert [values["dice", "smoothed"], values["nsd", "surfels_area"], values["hd", "surfels"]] == pytest.approx(official, abs=5e-6)
        assert values["nsd", "voxels_count"] == values["nsd", "voxels_fractions"] == values["dice", "strict"] == voxels
        assert values["hd", "voxels"] == values["hd", "surfels"]


def test_empty_masks_get_the_official_value_under_every_definition() -> None:
    full, empty = random_pair(1)[0], np.zeros((6, 20, 24), bool)
    for pair in ((full, empty), (empty, full), (empty, empty)):
        official = score_masks(*pair, SPACING, "instance2022")
        values = pair_definitions(*pair, SPACING)
        for (metric, name), value in values.items():
            if name == "strict":
                assert value == 0.0 if pair[0].any() or pair[1].any() else math.isnan(value)
            else:
                assert value == official[metric] or (math.isnan(value) and math.isnan(official[metric]))


@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 1, 1), (1, 5, 5), (3, 1, 1)])
def test_odd_shapes_do_not_raise(shape: tuple[int, int, int]) -> None:
    for mask in (np.zeros(shape, bool), np.ones(shape, bool)):
        rows = definition_matrix([(mask, mask, SPACING)])
        assert len(rows) == len(DEFINITIONS)
        assert render_matrix(rows)


@pytest.mark.parametrize("metric", ["rvd", "hd@90", "iou", "nsd/2", "dice@1", "surface"])
def test_metrics_that_are_not_in_the_matrix(metric: str) -> None:
    with pytest.raises(InputError):
        pair_definitions(*random_pair(0), SPACING, (metric,))


def test_the_list_of_definitions() -> None:
    """Names are unique within a metric, the official one comes first and alone, and every metric of the matrix has a rival."""
    for metric in MATRIX_METRICS:
        own = [d for d in DEFINITIONS if d.metric == metric]
        assert [d.formula is None for d in own] == [True] + [False] * (len(own) - 1)
        assert len({d.name for d in own}) == len(own) >= 2
        assert all(d.tools for d in own)
    assert {d.metric for d in DEFINITIONS} == set(MATRIX_METRICS) <= set(METRICS)


# --- over cases ------------------------------------------------------------------------------------------------------------------


def hand_made() -> list[dict[tuple[str, str], float]]:
    """Three cases: one without a finite official HD, one whose voxel HD is missing."""
    hd = [(2.0, 3.0, 2.5), (math.inf, 9.0, 8.0), (4.0, math.nan, 1.0)]
    return [{("hd95", "surfels_area"): a, ("hd95", "voxels_directional"): b, ("hd95", "voxels_pooled"): c} for a, b, c in hd]


def test_fold_by_hand() -> None:
    rows = {row.definition: row for row in fold_definitions(hand_made())}
    official, directional, pooled = rows["surfels_area"], rows["voxels_directional"], rows["voxels_pooled"]
    assert (official.mean, official.finite, official.cases, official.difference, official.largest) == (3.0, 2, 3, 0.0, 0.0)
    assert (directional.mean, directional.finite, directional.difference, directional.largest) == (6.0, 2, 1.0, 1.0)
    assert (pooled.mean, pooled.finite, pooled.difference, pooled.largest) == (11.5 / 3, 3, -1.25, -3.0)
    assert {row.spread for row in rows.values()} == {1.0}  # only in the first case are all three finite: 3 - 2
    assert pooled.tools == "MedPy, panoptica, GaNDLF, seg-metrics"


def test_fold_does_not_depend_on_the_order_of_the_cases() -> None:
    cases = [pair_definitions(*random_pair(seed), SPACING) for seed in range(5)]
    assert fold_definitions(cases) == fold_definitions(cases[::-1]) == definition_matrix((*random_pair(s), SPACING) for s in range(5))


def test_fold_sums_exactly() -> None:
    """1e16 + 1 - 1e16 is 1, whatever comes first."""
    cases = [{("hd", "surfels"): 0.0, ("hd", "voxels"): value} for value in (1e16, 1.0, -1e16)]
    row = fold_definitions(cases)[1]
    assert (row.mean, row.difference) == (1 / 3, 1 / 3)


def test_fold_of_nothing_and_of_cases_that_do_not_fit() -> None:
    assert fold_definitions([]) == ()
    assert render_matrix(()) == "no cases\n"
    with pytest.raises(InputError, match="different metrics"):
        fold_definitions([*hand_made(), {("dice", "strict"): 1.0}])
    none = fold_definitions([{("nsd", "surfels_area"): math.nan, ("nsd", "voxels_count"): math.nan}])
    assert [(row.finite, row.cases) for row in none] == [(0, 1)] * 2
    assert all(math.isnan(number) for row in none for number in (row.mean, row.difference, row.largest, row.spread))
    assert render_matrix(none).splitlines()[2:] == [
        "nsd     surfels_area  undefined        official                        0/1  INSTANCE 2022, DeepMind, MONAI with use_subvoxels",
        "        voxels_count  undefined       undefined          undefined     0/1  MONAI by default, Metrics Reloaded",
        "",
        "nsd: undefined (no case with both masks)",
    ]


def test_rendered_matrix() -> None:
    text = render_matrix(fold_definitions(hand_made()))
    assert text.splitlines() == [
        "official: the formulas of INSTANCE 2022, under every protocol; hd95 and assd, which it lacks, from the same surfaces",
        "metric  definition            mean  minus official  largest in a case  finite  who computes it so",
        "hd95    surfels_area        3.0000        official                        2/3  DeepMind: percentile by area",
        "        voxels_directional  6.0000         +1.0000            +1.0000     2/3  MONAI, Metrics Reloaded",
        "        voxels_pooled       3.8333         -1.2500            -3.0000     3/3  MedPy, panoptica, GaNDLF, seg-metrics",
        "",
        "hd95: the definition alone moves the mean by 1.0000 mm",
    ]
    assert text.endswith("\n")
    lines = render_matrix(definition_matrix([(*random_pair(3), SPACING)], ("dice", "nsd@1.0"))).splitlines()
    assert "e-" in next(line for line in lines if "strict" in line), "the 1e-9 of smoothing is not shown as nothing"
    assert [line.split(":")[0] for line in lines[-2:]] == ["dice", "nsd@1.0"]
    assert not lines[-2].endswith("mm")


# --- the tolerance curve -----------------------------------------------------------------------------------------------------------


def test_curve_of_a_record() -> None:
    record = surface.surface_record(*random_pair(5), SPACING)
    curve = tolerance_curve(record)
    assert list(curve) == [surface.nsd(record, tolerance_mm) for tolerance_mm in TOLERANCES_MM]
    assert list(curve) == sorted(curve)
    assert curve[0] < curve[-1]
    assert tolerance_curve(record, (2.0, 0.42)) == (surface.nsd(record, 2.0), surface.nsd(record, 0.42))
    with pytest.raises(InputError, match="tolerance"):
        tolerance_curve(record, (0.42, -1.0))


def test_the_default_grid() -> None:
    assert list(TOLERANCES_MM) == sorted(set(TOLERANCES_MM))
    assert {0.1, 0.40, PROTOCOLS["instance2022"].tolerance_mm, 0.43, 0.45, 0.488, 0.5, 1.0, 2.0, 3.0} <= set(TOLERANCES_MM)


@pytest.mark.parametrize(
    ("spacing_mm", "expected"), [(0.40, 1.0), (0.419, 1.0), (0.42, 1.0), (0.43, 0.8997), (0.45, 0.9013), (0.488, 0.9042)]
)
def test_the_knife_edge_of_the_challenge(spacing_mm: float, expected: float) -> None:
    """Facts, A1: the same shift by one voxel, on grids of different spacing. The curve jumps to 1 at the spacing itself."""
    mask = ellipsoid((9, 8, 10))
    moved = np.roll(mask, 1, axis=2)
    spacing = (5.0, spacing_mm, spacing_mm)
    grid = (spacing_mm - 1e-9, spacing_mm, 0.42)
    before, at, official = tolerance_curve(surface.surface_record(mask, moved, spacing), grid)
    assert official == pytest.approx(expected, abs=5e-5 if expected < 1 else 0)
    assert before < 0.905
    assert at == 1.0
    values = pair_definitions(mask, moved, spacing, ("nsd",))
    assert values["nsd", "surfels_area"] == official
    assert (values["nsd", "voxels_count"] == 1.0) == (expected == 1.0), "the edge is as sharp in every definition"


def test_curves_of_empty_masks() -> None:
    full, empty = random_pair(1)[0], np.zeros((6, 20, 24), bool)
    assert set(tolerance_curve(surface.surface_record(full, empty, SPACING))) == {0.0}
    assert all(math.isnan(value) for value in tolerance_curve(surface.surface_record(empty, empty, SPACING)))


def test_mean_curve_by_hand() -> None:
    points = mean_curve([(0.25, 1.0), (0.75, math.nan), (0.5, 0.5)], (0.42, 1))
    assert points == (CurvePoint(0.42, 0.5, 3, 3), CurvePoint(1.0, 0.75, 2, 3))
    assert render_curve(points).splitlines() == [
        "tolerance mm  NSD as INSTANCE 2022  finite",
        "        0.42                0.5000     3/3  INSTANCE 2022",
        "           1                0.7500     2/3",
    ]
    assert render_curve(mean_curve([(math.nan,)], (1,))).splitlines()[1] == "           1             undefined     0/1"
    nothing = mean_curve([])
    assert [point.tolerance_mm for point in nothing] == list(TOLERANCES_MM)
    assert all(math.isnan(point.mean) and point.cases == 0 for point in nothing)
    with pytest.raises(InputError, match="3 values"):
        mean_curve([(0.1, 0.2, 0.3)], (0.42, 1.0))


@pytest.mark.parametrize(
    ("protocol", "marks"),
    [
        ("instance2022", {"0.42": "INSTANCE 2022"}),
        ("strict", {"0.42": "INSTANCE 2022, protocol strict"}),
        ("monai", {"0.42": "INSTANCE 2022, protocol monai"}),
        ("kits", {"0.42": "INSTANCE 2022", "1.033": "protocol kits"}),
        ("nnunet", {"0.42": "INSTANCE 2022"}),  # it has no surface Dice
    ],
)
def test_the_curve_marks_the_tolerance_of_the_protocol(protocol: str, marks: dict[str, str]) -> None:
    tolerances_mm = curve_tolerances(PROTOCOLS[protocol])
    assert list(tolerances_mm) == sorted({*TOLERANCES_MM, PROTOCOLS[protocol].tolerance_mm})
    text = render_curve(mean_curve([(0.5,) * len(tolerances_mm)], tolerances_mm), PROTOCOLS[protocol])
    cells = [line.split(maxsplit=3) for line in text.splitlines()[1:]]
    assert {line[0]: line[3] for line in cells if len(line) == 4} == marks


# --- what is asked for -----------------------------------------------------------------------------------------------------------


def test_the_matrix_takes_the_tolerance_of_the_protocol_and_says_it() -> None:
    assert matrix_metrics(PROTOCOLS["instance2022"]) == ("dice", "nsd@0.42", "hd", "hd95", "assd")
    assert matrix_metrics(PROTOCOLS["kits"]) == ("dice", "nsd@1.033", "hd", "hd95", "assd")
    asked = ("nsd@2.0", "lesion_f1@10", "hd@90", "nsd", "hd", "nsd@1.033", "rvd")
    assert matrix_metrics(PROTOCOLS["kits"], asked) == ("nsd@2.0", "nsd@1.033", "hd")
    with pytest.raises(InputError, match="--definitions compares dice, nsd, hd, hd95, assd and nsd@TOLERANCE; none of them"):
        matrix_metrics(PROTOCOLS["kits"], ("rvd", "hd@90"))
    pair = random_pair(3)
    values = pair_definitions(*pair, SPACING, matrix_metrics(PROTOCOLS["kits"]))
    assert values["nsd@1.033", "surfels_area"] == score_masks(*pair, SPACING, "kits")["nsd"]
    assert values["nsd@1.033", "surfels_area"] > pair_definitions(*pair, SPACING)["nsd", "surfels_area"]


def test_a_matrix_without_a_case_with_both_masks_has_no_nan() -> None:
    full, empty = random_pair(1)[0], np.zeros((6, 20, 24), bool)
    for cases in ([(full, empty)], [(empty, empty)], [(full, empty), (empty, full), (empty, empty)]):
        text = render_matrix(definition_matrix((*case, SPACING) for case in cases))
        assert "nan" not in text
        assert "hd95: undefined (no case with both masks)" in text
    assert "hd95: the definition" in render_matrix(definition_matrix([(full, empty, SPACING), (full, full, SPACING)]))


# --- how much the definition matters -------------------------------------------------------------------------------------------------

#: nsd@0.42 and nsd@2.0 (area, count, fractions), hd95 (area, directional, pooled), assd (area, pooled, directional)
MEASURED = {
    (22, 20, 25): (0.6929168591640967, 0.80676550, 0.8067675600745448, 0.9938123309149741, 0.99715346, 0.9971551245787185,
                   1.35, 1.0062305898749055, 1.0062305898749055, 0.2704531689286069, 0.15860760, 0.1585967048619183),
    (9, 8, 10): (0.7448557564452803, 0.85386819, 0.8538689737714010, 1.0, 1.0, 1.0,
                 1.0062305898749055, 0.9, 0.6363961030678927, 0.1804301063455020, 0.09779561, 0.09780076371437801),
    (4, 3, 3): (0.6685503481397602, 0.78571427, 0.7860752386299832, 1.0, 1.0, 1.0,
                0.9, 0.9, 0.9, 0.2154392174101773, 0.13627705, 0.13602143409225748),
}  # fmt: skip


@pytest.mark.parametrize("radii_mm", list(MEASURED))
def test_the_sizes_of_the_facts_as_the_peers_measure_them(radii_mm: tuple[int, int, int]) -> None:
    """NSD moves by up to 11 points with the tool. Sizes of facts, C4, whose own pairs are in tests/golden; here the second is 5 %
    longer in y, 5 % shorter in x and moved by 1 and 2 voxels. By area: surface-distance 0.1. Count, directional percentile,
    pooled mean: MONAI 1.6.1 (float32). Pooled percentile: MedPy 0.5.2. Fractions, mean of means: the formula of panoptica on
    SciPy's distances. tests/parity compares the same pairs with the tools themselves.
    """
    moved = ellipsoid((radii_mm[0], radii_mm[1] * 1.05, radii_mm[2] * 0.95), (10, 81, 82))
    values = pair_definitions(ellipsoid(radii_mm), moved, SPACING, ("nsd", "nsd@2.0", "hd95", "assd"))
    del values["assd", "surfels_directional"]
    assert list(values.values()) == pytest.approx(MEASURED[radii_mm], rel=2e-7)
    assert 0.1 < values["nsd", "voxels_count"] - values["nsd", "surfels_area"] < 0.12
