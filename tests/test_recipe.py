"""Recipes: strict, frozen, mergeable; every shipped arm parses, says why, and differs from its base in exactly its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from ichbench.arms import load_arm, load_preset, shipped
from ichbench.errors import InputError
from ichbench.inference.predictors import PREDICTORS
from ichbench.overlays import diff, make_recipe
from ichbench.prepare.downsample import POOLING
from ichbench.recipe import AugmentRecipe, Downsample, InferenceRecipe, PrepareRecipe, Recipe, TrainingRecipe

ARMS = sorted(shipped())


@pytest.mark.parametrize("name", ARMS)
def test_arm_differs_from_the_defaults_in_exactly_its_keys(name: str) -> None:
    arm = load_arm(name)
    assert len(arm.why) > 30
    assert set(diff(arm.recipe, Recipe())) == set(arm.changes)


@pytest.mark.parametrize("name", ARMS)
def test_only_the_stages_that_an_arm_names_get_another_key(name: str) -> None:
    arm = load_arm(name)
    ours, base = arm.recipe.stage_keys(), Recipe().stage_keys()
    assert {stage for stage in ours if ours[stage] != base[stage]} == {key.split(".")[0] for key in arm.changes}


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("preset", sorted(shipped("presets")))
def test_an_arm_keeps_its_keys_under_every_preset(name: str, preset: str) -> None:
    arm = load_arm(name, preset)
    # the preset at the arm's dimensions: what it gives to 2D or 3D alone is not the arm's doing
    base = make_recipe(load_preset(preset), {"plan": {"dims": arm.recipe.plan.dims}})
    changed = {key: pair[1] for key, pair in diff(arm.recipe, base).items()}
    assert set(changed) <= set(arm.changes) - {"plan.dims"}
    for key in set(arm.changes) - set(changed):
        # a preset may already say what an arm says, but never something else
        stage, _, field = key.partition(".")
        assert getattr(getattr(arm.recipe, stage), field) == getattr(getattr(base, stage), field)


def test_both_readings_of_the_papers_window() -> None:
    literal, swapped = load_arm("window_literal").recipe.prepare.window, load_arm("window_swapped").recipe.prepare.window
    assert not isinstance(literal, (str, tuple))
    assert not isinstance(swapped, (str, tuple))
    assert (literal.low_hu, literal.high_hu) == (66.5, 125.5)
    assert (swapped.low_hu, swapped.high_hu) == (11.0, 107.0)


def test_superembrace_sets_every_flag_of_the_paper() -> None:
    keys = set(load_arm("superembrace").changes)
    flags = {"window", "threshold", "downsample", "slice_spacing_mm", "slice_crop", "slice_extension"}
    assert {f"prepare.{flag}" for flag in flags} | {"training.cases", "training.early_stopping", "network.unsupervised_levels"} == keys
    assert set(diff(load_arm("superembrace_swapped").recipe, load_arm("superembrace").recipe)) == {"prepare.window"}


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ({"training": {"losss": "ce"}}, "unknown key 'training.losss'; did you mean 'loss'?"),
        ({"trainin": {}}, "unknown key 'trainin'; did you mean 'training'?"),
        ({"prepare": {"window": {"level": 3, "width_hu": 4}}}, "unknown key 'prepare.window.level'; did you mean 'level_hu'?"),
        ({"prepare": {"window": {"level_hu": 3.0}}}, "prepare.window needs the key 'width_hu'"),
        ({"prepare": {"window": True}}, "prepare.window = True is not allowed"),
        ({"prepare": {"downsample": {"factor": 2.5}}}, "use pooling = 'spline'"),
        ({"prepare": {"slice_extension": "1"}}, "prepare.slice_extension = '1'"),
        ({"prepare": {"threshold": {"low_hu": 5, "high_hu": 1}}}, "must lie below high_hu"),
        ({"plan": {"dims": 4}}, "plan.dims = 4 is not allowed: Input should be 2 or 3"),
        ({"plan": {"patch_size": [16, 16]}}, "patch_size has 2 entries, but dims = 3"),
        ({"training": {"epochs": 1.5}}, "training.epochs = 1.5"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate"),
        ({"training": 3}, "training = 3"),
    ],
)
def test_bad_recipes_get_one_clear_message(overlay: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        make_recipe(overlay, source="mine.toml")
    message = str(caught.value)
    assert message.startswith("mine.toml: ")
    assert said in message
    assert "\n" not in message


def test_a_recipe_never_changes() -> None:
    with pytest.raises(ValidationError):
        Recipe().training.epochs = 3  # type: ignore[misc]


def test_overlays_merge_stage_by_stage_but_values_replace() -> None:
    first = {"prepare": {"window": {"level_hu": 40, "width_hu": 80}}, "training": {"epochs": 3, "augment": {"mirror": False}}}
    second = {"prepare": {"window": "off"}, "training": {"augment": {"noise_probability": 0.5}}}
    merged = make_recipe(first, second)
    assert merged.prepare.window == "off"
    assert merged.training.epochs == 3
    assert merged.training.augment.mirror is False
    assert merged.training.augment.noise_probability == 0.5


def test_a_preset_may_speak_to_2d_or_3d_alone() -> None:
    preset = {"plan": {"batch_size": 2}, "when_2d": {"plan": {"patch_size": [64, 64]}}, "when_3d": {"plan": {"patch_size": [4, 32, 32]}}}
    assert make_recipe(preset).plan.patch_size == (4, 32, 32)
    assert make_recipe(preset, {"plan": {"dims": 2}}).plan.patch_size == (64, 64)
    assert make_recipe(preset, {"plan": {"dims": 2, "patch_size": [16, 16]}}).plan.patch_size == (16, 16)
    assert make_recipe(preset, {"plan": {"dims": 2}}).plan.batch_size == 2


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"when_2d": {"plan": {"patch_sise": [64, 64]}}}, "when_2d: unknown key 'plan.patch_sise'"),
        ({"when_2d": {"plan": {"patch_size": [4, 64, 64]}}}, "patch_size has 3 entries, but dims = 2"),
        ({"when_3d": {"plan": {"dims": 2}}}, "when_3d must be a table of recipe tables that leaves plan.dims alone"),
        ({"when_2d": "no"}, "when_2d must be a table"),
        ({"when_2d": {"plan": 3}}, "when_2d must be a table"),
        ({"plan": 3}, "plan"),
    ],
)
def test_what_a_preset_says_to_one_kind_is_checked_even_when_it_does_not_hold(preset: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe(preset, source="mine.toml")


def test_json_round_trip() -> None:
    for name in ARMS:
        recipe = load_arm(name).recipe
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_literals_name_exactly_what_the_dicts_hold() -> None:
    from ichbench.network.losses import LOSSES

    assert set(get_args(InferenceRecipe.model_fields["predictor"].annotation)) == set(PREDICTORS)
    assert set(get_args(TrainingRecipe.model_fields["loss"].annotation)) == set(LOSSES)
    assert set(get_args(Downsample.model_fields["pooling"].annotation)) == {*POOLING, "spline"}


def test_arm_files_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('why = "a test of an arm file of my own"\n[training]\nloss = "ce"\n')
    assert load_arm(path).changes == {"training.loss": "ce"}
    path.write_text('[training]\nloss = "ce"\n')
    with pytest.raises(InputError, match="must say why"):
        load_arm(path)
    path.write_text('why = "a part for 2D networks alone"\n[when_2d.plan]\nbatch_size = 3\n')
    with pytest.raises(InputError, match="when_2d is for presets"):
        load_arm(path)
    path.write_text("why = [")
    with pytest.raises(InputError, match="not valid TOML"):
        load_arm(path)
    with pytest.raises(InputError, match="did you mean 'window_swapped'"):
        load_arm("window_swaped")
    with pytest.raises(InputError, match="cannot read the arm file"):
        load_arm(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    "overlay",
    [
        {"inference": {"threshold": {"low_hu": 80.0, "high_hu": 20.0}}},
        {"training": {"augment": {"scaling": [1.4, 0.7]}}},
        {"training": {"augment": {"gamma": [1.5, 0.7]}}},
    ],
)
def test_reversed_ranges_are_refused(overlay: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"must lie below|write the smaller number first"):
        make_recipe(overlay)


def test_compatibility_is_one_switch() -> None:
    """Set for one stage it holds for all; values that differ are refused."""
    stages = ("prepare", "training", "inference")
    for stage in stages:
        recipe = make_recipe({stage: {"compatibility": "nnunet"}})
        assert set(diff(recipe, Recipe())) == {f"{name}.compatibility" for name in stages}
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    made = Recipe(prepare=PrepareRecipe(compatibility="nnunet"), inference=InferenceRecipe(mirror=False))
    assert (made.inference.compatibility, made.inference.mirror) == ("nnunet", False)
    with pytest.raises(InputError, match=r"prepare.compatibility = 'nnunet', inference.compatibility = 'ichbench'; set one"):
        make_recipe({"prepare": {"compatibility": "nnunet"}, "inference": {"compatibility": "ichbench"}})
    with pytest.raises(InputError, match="compatibility"):
        make_recipe({"inference": {"compatibility": "theirs"}})


def test_mirror_axes_are_those_of_the_network() -> None:
    with pytest.raises(InputError, match=r"mirror names the axes \[0, 2\], but plan.dims = 2 has the axes \[0, 1\]"):
        make_recipe({"plan": {"dims": 2}, "inference": {"mirror": [0, 2]}})
    assert make_recipe({"plan": {"dims": 2}, "inference": {"mirror": [0, 1]}}).inference.mirror == (0, 1)


def test_mirroring_is_a_switch_or_axes() -> None:
    assert make_recipe({"inference": {"mirror": [0, 2]}}).inference.mirror == (0, 2)
    assert Recipe.model_validate_json(make_recipe({"inference": {"mirror": [1]}}).model_dump_json()).inference.mirror == (1,)
    for wrong in ([3], [-1], "all", 1):
        with pytest.raises(InputError, match="mirror"):
            make_recipe({"inference": {"mirror": wrong}})


@pytest.mark.parametrize("stage", ["inference", "augment"])
def test_an_axis_is_named_once(stage: str) -> None:
    for axes in ([0, 0], [1, 0, 1], [2, 2, 2]):
        table = {"mirror": axes}
        with pytest.raises(InputError, match=rf"mirror names an axis twice: \[{axes[0]}, .*\]; name each once") as error:
            make_recipe({"inference": table} if stage == "inference" else {"training": {"augment": table}}, source="mine.toml")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("trained", "asked", "used"),
    [(True, "auto", True), (False, "auto", False), ((0, 2), "auto", (0, 2)), (False, True, True), (True, (1,), (1,)), (True, False, False)],
)
def test_a_network_is_mirrored_as_it_was_trained(trained: Any, asked: Any, used: Any) -> None:
    training = TrainingRecipe(augment=AugmentRecipe(mirror=trained))
    recipe = Recipe(training=training, inference=InferenceRecipe(mirror=asked, tile_step=0.25))
    assert recipe.prediction().mirror == used
    assert recipe.prediction().tile_step == 0.25


def test_best_weights_need_validation() -> None:
    with pytest.raises(InputError, match="nothing says which weights are best"):
        make_recipe({"training": {"validation_iterations": 0}, "inference": {"checkpoint": "best"}})
    # the model folder of such a training is read
    Recipe(training=TrainingRecipe(validation_iterations=0), inference=InferenceRecipe(checkpoint="best"))
