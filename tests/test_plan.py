"""Planning against vectors printed by nnU-Net 2.8.1 (facts/golden/plan.out, plan2.out, vram.out; default planner)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ichbench.errors import InputError
from ichbench.overlays import make_recipe
from ichbench.prepare.configuration import read_plan
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.plan import Plan, Planner, make_plan, plan_all
from ichbench.prepare.topology import FAMILIES, feature_map_elements, topology
from ichbench.recipe import PlanRecipe

FACTS = {"mean": 40.0, "std": 10.0, "median": 40.0, "min": 0.0, "max": 90.0, "percentile_00_5": 10.0, "percentile_99_5": 80.0}


def cohort(spacings: list[tuple[float, ...]], shapes: list[tuple[int, ...]], channels: int = 1, relative: float = 1.0) -> Fingerprint:
    facts = {str(index): FACTS for index in range(channels)}
    return Fingerprint(tuple(spacings), tuple(shapes), facts, relative)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Given:
    fingerprint: Fingerprint
    channels: tuple[str, ...]
    n_labels: int
    n_cases: int


COHORTS = {
    "ct_liver": Given(cohort([(1.0, 0.77, 0.77)] * 9, [(482, 512, 512)] * 9), ("CT",), 3, 131),
    "cine_mr": Given(cohort([(10.0, 1.56, 1.56)] * 8 + [(5.0, 1.56, 1.56)] * 2, [(9, 237, 207)] * 10), ("cine",), 4, 200),
    "mr_4ch": Given(cohort([(1.0, 1.0, 1.0)] * 9, [(140, 171, 137)] * 9, 4), ("a", "b", "c", "d"), 4, 484),
    "hippocampus": Given(cohort([(1.0, 1.0, 1.0)] * 9, [(36, 50, 35)] * 9), ("MR",), 3, 260),
    "prostate": Given(cohort([(3.6, 0.62, 0.62)] * 9, [(20, 320, 320)] * 9, 2), ("T2", "ADC"), 3, 32),
    "ct_abdomen": Given(cohort([(2.5, 0.8, 0.8)] * 9, [(160, 512, 512)] * 9), ("ct",), 15, 30),
    "last_axis": Given(cohort([(0.9, 0.9, 4.0)] * 9, [(256, 256, 30)] * 9), ("MR",), 2, 100),
    "mid_axis": Given(cohort([(0.8, 5.0, 0.8)] * 8 + [(0.8, 0.5, 0.8)] * 2, [(300, 40, 300)] * 10), ("MR",), 2, 100),
    "exactly_3": Given(cohort([(3.0, 1.0, 1.0)] * 9, [(60, 200, 200)] * 9), ("MR",), 2, 100),
    "tiny": Given(cohort([(1.0, 1.0, 1.0)] * 4, [(64, 64, 64)] * 4), ("MR",), 2, 4),
    "rgb": Given(cohort([(999.0, 1.0, 1.0)] * 9, [(1, 2048, 2048)] * 9, 3), ("rgb_to_0_1",) * 3, 2, 1000),
    "wide_2d": Given(cohort([(999.0, 1.0, 1.0)] * 9, [(1, 1024, 1024)] * 9), ("x",), 2, 1000),
}
A, B = (1, 2, 2), (2, 2, 2)

#: cohort, dims, spacing, median, patch, batch, stages, batch_dice, transpose, strides (None: all 2), thin first kernels
GOLDEN: list[tuple[Any, ...]] = [
    ("ct_liver", 2, (0.77, 0.77), (512, 512), (512, 512), 12, 8, True, (0, 1, 2), None, 0),
    ("ct_liver", 3, (1.0, 0.77, 0.77), (482, 512, 512), (128,) * 3, 2, 6, True, (0, 1, 2), None, 0),
    ("cine_mr", 2, (1.56, 1.56), (237, 207), (256, 224), 56, 6, True, (0, 1, 2), None, 0),
    ("cine_mr", 3, (5.0, 1.56, 1.56), (18, 237, 207), (20, 256, 224), 4, 6, False, (0, 1, 2), (A, B, B, A, A), 1),
    ("mr_4ch", 2, (1.0, 1.0), (171, 137), (192, 160), 105, 6, True, (0, 1, 2), None, 0),
    ("mr_4ch", 3, (1.0,) * 3, (140, 171, 137), (128,) * 3, 2, 6, False, (0, 1, 2), None, 0),
    ("hippocampus", 2, (1.0, 1.0), (50, 35), (56, 40), 366, 4, True, (0, 1, 2), None, 0),
    ("hippocampus", 3, (1.0,) * 3, (36, 50, 35), (40, 56, 40), 9, 4, False, (0, 1, 2), None, 0),
    ("prostate", 2, (0.62, 0.62), (320, 320), (320, 320), 32, 7, True, (0, 1, 2), None, 0),
    ("prostate", 3, (3.6, 0.62, 0.62), (20, 320, 320), (20, 320, 256), 2, 7, False, (0, 1, 2), (A, A, B, B, A, A), 2),
    ("ct_abdomen", 2, (0.8, 0.8), (512, 512), (512, 512), 12, 8, True, (0, 1, 2), None, 0),
    ("ct_abdomen", 3, (2.5, 0.8, 0.8), (160, 512, 512), (56, 192, 160), 2, 6, True, (0, 1, 2), (A, B, B, B, A), 1),
    ("last_axis", 2, (0.9, 0.9), (256, 256), (256, 256), 49, 7, True, (2, 0, 1), None, 0),
    ("last_axis", 3, (4.0, 0.9, 0.9), (30, 256, 256), (28, 256, 256), 2, 7, False, (2, 0, 1), (A, A, B, B, A, A), 2),
    ("mid_axis", 2, (0.8, 0.8), (300, 300), (320, 320), 32, 7, True, (1, 0, 2), None, 0),
    ("mid_axis", 3, (0.80001, 0.8, 0.8), (250, 300, 300), (128,) * 3, 2, 6, True, (1, 0, 2), None, 0),
    ("exactly_3", 2, (1.0, 1.0), (200, 200), (224, 224), 65, 6, True, (0, 1, 2), None, 0),
    ("exactly_3", 3, (3.0, 1.0, 1.0), (60, 200, 200), (56, 192, 192), 2, 6, False, (0, 1, 2), (A, B, B, B, A), 1),
    ("tiny", 2, (1.0, 1.0), (64, 64), (64, 64), 13, 5, True, (0, 1, 2), None, 0),
    ("tiny", 3, (1.0,) * 3, (64,) * 3, (64,) * 3, 2, 5, False, (0, 1, 2), None, 0),
    ("rgb", 2, (1.0, 1.0), (2048, 2048), (1280, 1024), 2, 9, True, (0, 1, 2), None, 0),
    ("wide_2d", 2, (1.0, 1.0), (1024, 1024), (1024, 1024), 3, 9, True, (0, 1, 2), None, 0),
]


def plan(name: str, **recipe: Any) -> Plan:
    given = COHORTS[name]
    return make_plan(given.fingerprint, PlanRecipe(**recipe), given.channels, given.n_labels, given.n_cases)


@pytest.mark.parametrize("row", GOLDEN, ids=[f"{row[0]}-{row[1]}d" for row in GOLDEN])
def test_nnunets_vectors(row: tuple[Any, ...]) -> None:
    name, dims, spacing, median, patch, batch, stages, batch_dice, forward, strides, thin = row
    made = plan(name, dims=dims)
    assert made.spacing == spacing
    assert made.median_shape == median
    assert (made.patch_size, made.batch_size, made.n_stages) == (patch, batch, stages)
    assert made.batch_dice is batch_dice
    assert made.transpose_forward == forward
    assert [forward[axis] for axis in made.transpose_backward] == [0, 1, 2]
    assert made.strides == ((1,) * dims, *(strides or ((2,) * dims,) * (stages - 1)))
    assert made.kernels == ((1, 3, 3),) * thin + ((3,) * dims,) * (stages - thin)
    widest = {2: 512, 3: 320}[dims]
    assert made.features == tuple(min(widest, 32 * 2**stage) for stage in range(stages))


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("ct_liver", (2.50008, 1.925062, 1.925062)),
        ("ct_abdomen", (3.166925, 1.626235, 1.626235)),
        ("mid_axis", (1.140623, 1.140609, 1.140609)),
    ],
)
def test_the_low_resolution_stage_that_nnunet_adds(name: str, spacing: tuple[float, ...]) -> None:
    made = plan(name)
    assert made.lowres_spacing == pytest.approx(spacing, abs=1e-6)
    assert any("low-resolution stage" in line for line in made.explain())
    assert plan(name, lowres_coverage=0.0).lowres_spacing is None
    assert plan(name, lowres_coverage=0.0).batch_dice is False


@pytest.mark.parametrize(("n_labels", "elements"), [(2, 450_699_264), (3, 452_796_416), (4, 454_893_568), (117, 691_871_744)])
def test_memory_estimate_3d(n_labels: int, elements: int) -> None:
    made = topology((1.0,) * 3, (128,) * 3)
    assert feature_map_elements(made.patch, made.strides, [32, 64, 128, 256, 320, 320], n_labels) == elements


@pytest.mark.parametrize(("n_labels", "elements"), [(2, 82_624_512), (3, 82_886_656), (4, 83_148_800), (117, 112_771_072)])
def test_memory_estimate_2d(n_labels: int, elements: int) -> None:
    made = topology((1.0,) * 2, (512,) * 2)
    assert feature_map_elements(made.patch, made.strides, [32, 64, 128, 256, 512, 512, 512, 512], n_labels) == elements


def test_memory_estimate_of_the_anisotropic_plan() -> None:
    assert plan("cine_mr").estimate == 310_481_920


def test_topology_comparisons_are_strict() -> None:
    assert topology((2.0, 1.0, 1.0), (64, 64, 64)).strides[1] == (1, 2, 2)  # ratio 2 does not pool ...
    assert topology((1.999, 1.0, 1.0), (64, 64, 64)).strides[1] == (2, 2, 2)  # ... just below does
    assert len(topology((1.0, 1.0), (7, 7)).strides) == 1
    assert len(topology((1.0, 1.0), (8, 8)).strides) == 2
    assert len(topology((1.0, 1.0), (7, 11)).strides) == 1  # a single axis needs 12
    assert len(topology((1.0, 1.0), (7, 12)).strides) == 2
    assert topology((1.0, 1.0), (18.5, 9)).patch == (20, 10)


def test_overrides_are_cut_to_the_median_and_padded() -> None:
    made = plan("hippocampus", patch_size=(30, 64, 20), batch_size=3, base_features=8, max_features=48)
    assert made.patch_size == (32, 56, 20)
    assert made.features == (8, 16, 32, 48)
    assert made.batch_size == 3
    assert all(n % (2 ** sum(stride[axis] == 2 for stride in made.strides)) == 0 for axis, n in enumerate(made.patch_size))
    assert made.estimate == feature_map_elements(made.patch_size, made.strides, made.features, 3)
    assert plan("tiny", dims=2, patch_size=(4, 4)).n_stages == 1


def test_a_small_patch_does_not_switch_batch_dice() -> None:
    assert plan("hippocampus", patch_size=(8, 8, 8)).batch_dice is False
    assert plan("ct_liver", patch_size=(8, 8, 8)).batch_dice is True


def test_spacing_override_is_along_the_working_axes() -> None:
    made = plan("last_axis", spacing_mm=(8.0, 1.8, 1.2))
    assert (made.spacing, made.transpose_forward) == ((8.0, 1.8, 1.2), (2, 0, 1))
    assert made.median_shape == (15, 128, 192)
    flat = plan("last_axis", dims=2, spacing_mm=(1.8, 1.2))
    assert (flat.spacing, flat.median_shape) == ((1.8, 1.2), (128, 192))


def test_more_memory_gives_more() -> None:
    small, large = plan("ct_liver", memory_gb=2.0), plan("ct_liver", memory_gb=24.0)
    assert np.prod(small.patch_size) < 128**3 < np.prod(large.patch_size)
    assert small.estimate <= 560e6 / 4
    assert large.estimate <= 560e6 * 3
    with pytest.raises(InputError, match=r"no patch fits plan\.memory_gb"):
        plan("ct_liver", memory_gb=1e-7)


def test_windows_and_neighbours_widen_the_input() -> None:
    found = cohort([(5.0, 0.5, 0.5)] * 3, [(30, 100, 100)] * 3, channels=3, relative=0.5)
    made = make_plan(found, PlanRecipe(), ("CT", "T1"), 2, 3, neighbour_slices=1)
    assert made.channels == ("CT", "CT", "T1")
    assert made.source_channels == ("CT", "T1")
    assert made.in_channels == 9
    assert made.normalization == ("CTNormalization", "CTNormalization", "ZScoreNormalization")
    assert made.use_mask_for_norm == (False, False, True)
    with pytest.raises(InputError, match="3 channels, which do not follow"):
        make_plan(found, PlanRecipe(), ("T2", "T1"), 2, 3)
    with pytest.raises(InputError, match="3 channels, which do not follow"):
        make_plan(found, PlanRecipe(), ("CT", "CT"), 2, 3)


def test_json_and_words() -> None:
    for dims in (2, 3):
        made = plan("ct_liver", dims=dims)
        assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
        words = " ".join(made.explain())
        for fact in (f"{dims}D U-Net", "clipped to [10, 80] HU", f"batch {made.batch_size}", str(list(made.features))):
            assert fact in words
    table = plan("tiny").to_json()
    with pytest.raises(InputError, match=r"missing \['dims'\], unknown \['dim'\]"):
        Plan.from_json({**{key: value for key, value in table.items() if key != "dims"}, "dim": 3})


def test_a_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for before in ("", "\ufeff"):
        path.write_text(before + json.dumps(plan("tiny").to_json()), encoding="utf-8")
        assert read_plan(path) == plan("tiny")
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("[]", "JSON object"),
        ("{}", "not a plan"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*{message}.*; prepare the cohort again$"):
            read_plan(path)


def test_anisotropic_patches_are_named() -> None:
    assert plan("cine_mr").anisotropic
    assert not plan("exactly_3", patch_size=(64, 192, 192)).anisotropic
    assert not plan("cine_mr", dims=2).anisotropic


@pytest.mark.parametrize(
    ("thick", "slices", "expected"),
    [(3.0, 40, 3.0), (3.01, 40, 1.5), (3.01, 66, 1.5), (3.01, 67, 3.01), (3.01, 200 / 3, 3.01)],
)
def test_thick_slices_are_refined_only_beyond_both_limits(thick: float, slices: float, expected: float) -> None:
    """The 10th percentile of the coarse spacing is taken if it is more than 3 times coarser and has more than 3 times fewer voxels."""
    found = cohort([(thick, 1.0, 1.0)] * 8 + [(1.5, 1.0, 1.0)] * 2, [(slices, 200, 200)] * 10)
    assert make_plan(found, PlanRecipe(), ("MR",), 2, 100).spacing == (expected, 1.0, 1.0)


def test_a_single_slice_has_no_3d_plan() -> None:
    with pytest.raises(InputError, match=r"a single slice.*set plan\.dims = 2"):
        plan("rgb")
    given = COHORTS["rgb"]
    planned = plan_all(Planner(given.fingerprint, PlanRecipe(), given.channels, given.n_labels, given.n_cases))
    assert list(planned.configurations) == ["2d"]
    assert planned.lowres is None


def test_the_trigger_of_the_low_resolution_stage_is_a_field() -> None:
    """A patch that shows less than a quarter of the case, but more than the paper's eighth."""
    found = cohort([(3.0, 0.5, 0.5)] * 9, [(90, 300, 300)] * 9)
    for coverage, asked in ((0.25, True), (0.125, False)):
        planned = plan_all(Planner(found, PlanRecipe(lowres_coverage=coverage), ("CT",), 2, 30))
        assert planned.lowres is not None
        assert 0.125 < planned.lowres.coverage < 0.25
        assert (planned.lowres.steps > 0) is asked


def test_overrides_act_where_dims_agree() -> None:
    given = COHORTS["ct_liver"]
    arguments = (given.channels, given.n_labels, given.n_cases)
    recipe = PlanRecipe(patch_size=(32, 64, 64), batch_size=5)
    free, fixed = (plan_all(Planner(given.fingerprint, one, *arguments)).configurations for one in (PlanRecipe(), recipe))
    assert fixed["2d"] == free["2d"]
    for name in ("3d_lowres", "3d_fullres", "3d_cascade_fullres"):
        assert (fixed[name].plan.patch_size, fixed[name].plan.batch_size) == ((32, 64, 64), 5)
        assert fixed[name].plan.spacing == free[name].plan.spacing
    assert fixed["3d_lowres"].fit is None


def test_stage_lowres() -> None:
    made = plan("ct_liver", stage="lowres")
    assert (made.configuration, made.next_stage, made.batch_dice) == ("3d_lowres", ("3d_cascade_fullres",), False)
    assert made.spacing == plan("ct_liver").lowres_spacing
    with pytest.raises(InputError, match="there is no low-resolution stage for this cohort: nnU-Net's own full-resolution patch shows"):
        plan("hippocampus", stage="lowres")
    with pytest.raises(InputError, match="stage = 'lowres' is a 3D configuration"):
        make_recipe({"plan": {"stage": "lowres", "dims": 2}})
    with pytest.raises(InputError, match="both fix the spacing"):
        make_recipe({"plan": {"spacing_mm": [5.0, 1.0, 1.0], "target_spacing_zyx_mm": [5.0, 1.0, 1.0]}})


def test_target_spacing_decides_the_order_of_the_axes() -> None:
    made = plan("last_axis", target_spacing_zyx_mm=(1.0, 3.0, 2.0))
    assert (made.transpose_forward, made.spacing) == ((1, 0, 2), (3.0, 1.0, 2.0))
    # 256, 256 and 30 voxels of 0.9, 0.9 and 4 mm
    assert made.median_shape == (77, 230, 60)


def test_plans_from_before_families_are_read() -> None:
    table = plan("prostate").to_json()
    for key in ("family", "convs_per_stage", "decoder_convs", "configuration", "previous_stage", "next_stage"):
        del table[key]
    assert Plan.from_json(table) == plan("prostate")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_in_the_recipe_and_plans(family: str) -> None:
    made = plan("cine_mr", family=family)
    assert made.family == FAMILIES[family].network
    assert made.convs_per_stage == ((2,) * 6 if family == "plain" else (1, 3, 4, 6, 6, 6))
    assert made.decoder_convs == ((2,) * 5 if family == "plain" else (1,) * 5)
    assert set(PlanRecipe.model_fields["family"].annotation.__args__) == set(FAMILIES)  # type: ignore[union-attr]
    assert ("residual encoder" in made.explain()[0]) is (family != "plain")
