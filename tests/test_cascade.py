"""A cascade as an arm: first-stage masks of held-out cases, a second stage that learns from them, and a model folder with both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from ichbench.ablation.run import Planned, plan_run, run_study
from ichbench.ablation.settings import settle
from ichbench.ablation.step import output_of
from ichbench.ablation.study import RunDefaults
from ichbench.cases.cohort import read_cohort
from ichbench.cases.images import read_labels
from ichbench.cases.phantom import write_phantom
from ichbench.errors import InputError
from ichbench.inference.cascade import previous_labels
from ichbench.inference.model import load_model, predict_path
from ichbench.overlays import make_recipe
from ichbench.prepare.plan import Plan
from ichbench.prepare.store import read_prepared
from ichbench.recipe import Recipe

STUDY = 'why = "x"\nbase = "cascade"\nfloor = false\nceilings = false\n'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planned, Path]:
    folder = tmp_path_factory.mktemp("cascade")
    write_phantom(folder / "cohort", 8, "small", seed=4, n_test=2)
    # a patch that shows less than the whole head makes nnU-Net plan a low-resolution stage
    (folder / "tiny.toml").write_text(TINY.replace("[plan]", "[plan]\nlowres_coverage = 1.0"))
    (folder / "study.toml").write_text(STUDY)
    given = {"study": str(folder / "study.toml"), "cohort": str(folder / "cohort"), "out": str(folder / "out"), "device": "cpu"}
    planned = plan_run(settle(given | {"preset": str(folder / "tiny.toml")}, RunDefaults(), {}), {})
    done = run_study(planned, lambda event: None)
    assert (done.failed, done.code) == ({}, 0)
    return planned, folder


@pytest.mark.slow
def test_the_second_stage_learns_from_masks_of_networks_that_did_not_see_the_case(finished: tuple[Planned, Path]) -> None:
    planned, folder = finished
    steps, root = planned.dag.steps, folder / "out" / "steps"
    (result,) = planned.dag.results
    previous = steps[steps[result.train_step or ""].inputs["previous"]]
    cohort = read_cohort(folder / "cohort")
    plan = Plan.from_json(json.loads((output_of(root / previous.inputs["prepare"]) / "plan.json").read_text()))
    assert plan.previous_stage == "3d_lowres"
    recipe = Recipe().prepare
    told: list[str] = []
    for fold, names in previous.spec["folds"].items():
        predict = steps[previous.inputs[fold]]
        train = steps[predict.inputs["train"]]
        lowres = json.loads((output_of(root / train.inputs["prepare"]) / "plan.json").read_text())
        assert lowres["configuration"] == "3d_lowres"
        assert not set(names) & set(train.spec["train"])
        told += names
        for name in names:
            mask, _ = read_labels(output_of(root / previous.inputs[fold]) / f"{name}.nii.gz")
            prepared = read_prepared(output_of(root / previous.inputs["prepare"]) / "cases", name)
            wanted = np.maximum(previous_labels(cohort.load(name), mask, prepared, recipe, plan, cohort.rules), 0)
            np.testing.assert_array_equal(np.load(output_of(root / previous.id) / f"{name}.npy"), wanted)
    assert sorted(told) == sorted(cohort.train_ids)


@pytest.mark.slow
def test_the_published_model_holds_both_stages_and_repeats_the_study(finished: tuple[Planned, Path]) -> None:
    planned, folder = finished
    model = load_model(folder / "out/models/cascade-foldfull-seed0")
    assert model.tools.previous is not None
    assert model.tools.plan is not None
    assert model.tools.networks[0].encoder is not None
    for name in planned.cohort.test_ids:
        image = planned.cohort.record(name).images[0]
        list(predict_path(model, image, folder / "again" / f"{name}.nii.gz"))
        again, before = (
            read_labels(path / f"{name}.nii.gz")[0] for path in (folder / "again", folder / "out/predictions/cascade-foldfull-seed0")
        )
        np.testing.assert_array_equal(again, before)
        assert again.any(), "an empty mask would repeat itself whatever the first stage said"


def test_what_cannot_be_a_cascade_is_refused() -> None:
    for overlay, said in (
        ({"plan": {"stage": "cascade", "dims": 2}}, "3D configuration"),
        ({"plan": {"stage": "cascade"}, "prepare": {"slice_crop": "reference"}}, "test cases have no such crop"),
        ({"plan": {"stage": "cascade"}, "prepare": {"neighbour_slices": 1}}, "neighbour_slices"),
    ):
        with pytest.raises(InputError, match=said):
            make_recipe(overlay)
