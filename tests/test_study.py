"""Studies: arms from factors, floor, ceilings and somebody else's predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

from ichbench.ablation.study import make_study
from ichbench.arms import shipped
from ichbench.errors import InputError


@pytest.mark.parametrize("name", sorted(shipped("studies")))
def test_every_shipped_study_resolves(name: str) -> None:
    study = make_study(name, "smoke")
    assert study.arms[0].name == study.base
    assert all(arm.why for arm in study.arms)
    assert len({arm.name for arm in study.arms}) == len(study.arms)


def test_one_at_a_time_has_base_and_each_level_alone() -> None:
    names = [arm.name for arm in make_study("preprocessing", "smoke").arms]
    trained = ["base", "window_swapped", "window_literal", "downsample", "slice_extension", "unet2d", "unet25d"]
    assert names == [*trained, "floor_threshold", *[f"ceiling_{name}" for name in trained]]


def test_factorial_has_every_combination_and_merges_recipes(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'why = "all of both"\ndesign = "factorial"\nfloor = false\nceilings = false\n'
        '[factors]\nwindow = ["window_swapped", "window_literal"]\ndims = ["unet2d"]\n'
    )
    study = make_study(str(path), "smoke")
    assert [arm.name for arm in study.arms] == [
        "base", "unet2d", "window_swapped", "window_swapped+unet2d", "window_literal", "window_literal+unet2d",
    ]  # fmt: skip
    both = study.arm("window_literal+unet2d")
    assert both.recipe.plan.dims == 2
    assert both.recipe.prepare.window == study.arm("window_literal").recipe.prepare.window
    assert set(both.changes) == {"prepare.window", "plan.dims"}


def test_one_ceiling_per_distinct_preparation(tmp_path: Path) -> None:
    path = tmp_path / "same.toml"
    path.write_text('why = "early stopping prepares nothing"\n[factors]\nstop = ["early_stopping"]\nwindow = ["window_swapped"]\n')
    names = [arm.name for arm in make_study(str(path), "smoke").arms]
    assert [name for name in names if name.startswith("ceiling")] == ["ceiling_base", "ceiling_window_swapped"]


def test_arm_files_lie_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('why = "only cross entropy"\n[training]\nloss = "ce"\n')
    (tmp_path / "study.toml").write_text('why = "mine"\nfloor = false\nceilings = false\n[factors]\nloss = ["mine.toml"]\n')
    study = make_study(str(tmp_path / "study.toml"), "smoke")
    assert study.arm("mine").recipe.training.loss == "ce"


def test_somebody_elses_predictions_are_an_arm(tmp_path: Path) -> None:
    study = make_study("preprocessing", "smoke", {"theirs": tmp_path})
    assert study.arm("theirs").recipe.inference.predictor == "folder"
    assert study.predictions == {"theirs": tmp_path}
    with pytest.raises(InputError, match="named twice: base"):
        make_study("preprocessing", "smoke", {"base": tmp_path})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("factors = {}\n", "why"),
        ('why = "x"\nfactor = {}\n', "did you mean 'factors'"),
        ('why = "x"\ndesign = "cross"\n', "design = 'cross' is not allowed"),
        ('why = "x"\n[factors]\nwindow = ["windw_swapped"]\n', "did you mean 'window_swapped'"),
        ('why = "x"\n[run]\nseed = [0]\n', "did you mean 'seeds'"),
    ],
)
def test_bad_studies_get_one_clear_message(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        make_study(str(path), "smoke")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_study_and_shipped_path_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'preprocessing'"):
        make_study("preprocesing", "smoke")
    monkeypatch.chdir(tmp_path)
    assert make_study("baselines/studies/phe.toml", "smoke").name == "phe"
