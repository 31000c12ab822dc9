"""Every frozen plan of nnU-Net's five planners (tests/golden/nnunet_plans.txt says how they were made)."""

from __future__ import annotations

import json

import pytest
from golden.nnunet_plans import COHORTS, FROZEN, lines

from ichbench.prepare.explain import explain_planned, planned_table
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.plan import Planner, make_plan, plan_all
from ichbench.prepare.plans_json import plans_table, plans_text
from ichbench.prepare.plans_read import count_labels, plan_of, plans_of
from ichbench.prepare.topology import FAMILIES, depth, feature_map_elements, topology
from ichbench.recipe import PlanRecipe

FROZEN_LINES = FROZEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COHORTS)
def test_frozen_plans(name: str, family: str) -> None:
    fingerprint, dataset = COHORTS[name]
    found = Fingerprint.from_json(fingerprint)
    n_labels, n_classes = count_labels(dataset["labels"])
    channels = tuple(dataset["channel_names"].values())
    given = (channels, n_labels, dataset["numTraining"], 0, n_classes)
    planned = plan_all(Planner(found, PlanRecipe(family=family), *given))  # type: ignore[arg-type]
    plans = {one: sized.plan for one, sized in planned.configurations.items()}
    table = plans_table(plans, found, "Dataset900_Drawn", family)
    expected = [line for line in FROZEN_LINES if line.startswith(f"{name} {FAMILIES[family].planner} ")]
    assert len(expected) > 0
    assert lines(name, plans_text(table)) == expected
    assert plans_of(json.loads(plans_text(table)), dataset) == plans
    # one configuration alone is the one of the whole set
    for one, plan in plans.items():
        if one != "3d_cascade_fullres":
            stage = "lowres" if one == "3d_lowres" else "fullres"
            assert make_plan(found, PlanRecipe(family=family, dims=plan.dims, stage=stage), *given) == plan  # type: ignore[arg-type]
    if "3d_cascade_fullres" in plans:
        cascade = plan_of(table, "3d_cascade_fullres", dataset)
        assert (cascade.previous_stage, cascade.patch_size) == ("3d_lowres", plans["3d_fullres"].patch_size)


#: facts/golden/vram.out: dims, patch, labels, elements of the plain and of the residual network
ELEMENTS = [
    (3, 128, 2, 450_699_264, 555_323_392),
    (3, 128, 3, 452_796_416, 557_420_544),
    (3, 128, 4, 454_893_568, 559_517_696),
    (3, 128, 117, 691_871_744, 796_495_872),
    (2, 512, 2, 82_624_512, 129_441_792),
    (2, 512, 3, 82_886_656, 129_703_936),
    (2, 512, 4, 83_148_800, 129_966_080),
    (2, 512, 117, 112_771_072, 159_588_352),
]


@pytest.mark.parametrize(("dims", "edge", "n_labels", "plain", "residual"), ELEMENTS)
def test_memory_estimates(dims: int, edge: int, n_labels: int, plain: int, residual: int) -> None:
    made = topology((1.0,) * dims, (edge,) * dims)
    features = [min({2: 512, 3: 320}[dims], 32 * 2**stage) for stage in range(len(made.strides))]
    assert feature_map_elements(made.patch, made.strides, features, n_labels) == plain
    assert feature_map_elements(made.patch, made.strides, features, n_labels, "residual") == residual


def test_memory_estimates_of_the_anisotropic_plan() -> None:
    strides = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    features = (32, 64, 128, 256, 320, 320)
    assert feature_map_elements((20, 256, 224), strides, features, 4) == 310_481_920
    assert feature_map_elements((20, 256, 224), strides, features, 4, "residual") == 427_445_760 - 0


def test_depths() -> None:
    assert depth("plain", 4) == ((2, 2, 2, 2), (2, 2, 2))
    assert depth("residual", 6) == ((1, 3, 4, 6, 6, 6), (1,) * 5)
    assert depth("residual", 2) == ((1, 3), (1,))


@pytest.mark.parametrize("family", ["plain", "resenc_l"])
@pytest.mark.parametrize("name", COHORTS)
def test_the_words_hold_the_numbers(name: str, family: str) -> None:
    fingerprint, dataset = COHORTS[name]
    found, channels = Fingerprint.from_json(fingerprint), tuple(dataset["channel_names"].values())
    n_labels, n_cases = len(dataset["labels"]), dataset["numTraining"]
    planned = plan_all(Planner(found, PlanRecipe(family=family), channels, n_labels, n_cases))  # type: ignore[arg-type]
    words = "\n".join(explain_planned(planned, FAMILIES[family], n_labels, n_cases))
    rows = planned_table(planned)
    assert len(rows) == 1 + len(planned.configurations)
    assert ("3d_lowres: why" in words) is ("3d_lowres" in planned.configurations)
    for one, sized in planned.configurations.items():
        patch = " x ".join(map(str, sized.plan.patch_size))
        assert any(row.startswith(one) and f"  {patch}  " in row for row in rows)
        assert sized.fit is not None
        if one != "3d_cascade_fullres":
            part = words.split(f"{one}: why")[1].split("\n\n")[0]
            assert f"batch {sized.plan.batch_size}." in part
            assert (f"-> {patch}, which needs" in part or f": {patch}, which needs" in part) is bool(sized.fit.shrinks)
            assert ("nothing is cut" in part) is not bool(sized.fit.shrinks)
