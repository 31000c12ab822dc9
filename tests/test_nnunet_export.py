"""Exporting: the round trip keeps every weight, an arm's seeds become folds, and flags that nnU-Net does not know are not lost silently."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from model_folders import REGIONS, small_plan, write_model, write_results

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import read_image, write_image
from ichbench.cases.nifti import TURNING_READERS
from ichbench.errors import InputError
from ichbench.inference.inputs import read_case
from ichbench.inference.model import read_model
from ichbench.inference.nnunet_export import active_flags, export_nnunet
from ichbench.inference.nnunet_import import import_nnunet
from ichbench.network.checkpoint import read_checkpoint
from ichbench.network.weights import read_weights
from ichbench.prepare.pipeline import flagged_case
from ichbench.recipe import PrepareRecipe

GRID = Grid((6, 20, 22), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("family", ["plain", "residual"])
def test_import_of_an_export_keeps_every_weight(tmp_path: Path, dims: int, family: str) -> None:
    plan = small_plan(dims, channels=("CT", "MR", "PET"), family=family, transpose=(1, 0, 2))
    overlay = {"inference": {"mirror": [1]}, "plan": {"family": "resenc_m" if family == "residual" else "plain"}}
    model = write_model(tmp_path / "model", plan, labels=REGIONS, order=[2, 1], overlay=overlay)
    done = export_nnunet(model, tmp_path / "out")
    plans = {"plain": "nnUNetPlans", "residual": "nnUNetResEncUNetMPlans"}[family]
    assert done.folder == tmp_path / f"out/Dataset777_Test/nnUNetTrainer__{plans}__{'2d' if dims == 2 else '3d_fullres'}"
    assert sorted(path.name for path in done.folder.iterdir()) == ["dataset.json", "fold_0", "plans.json"]
    dataset = json.loads((done.folder / "dataset.json").read_text())
    assert dataset["channel_names"] == {"0": "CT", "1": "MR", "2": "PET"}
    assert (dataset["labels"], dataset["regions_class_order"], dataset["numTraining"]) == (REGIONS, [2, 1], 9)
    back = import_nnunet(done.folder, tmp_path / "back")
    assert replace(back.plan, estimate=plan.estimate) == plan  # the estimate counts every entry of the labels
    assert back.mirror_axes == (1,)
    ours, theirs = (read_model(folder) for folder in (model, back.folder))
    assert ours.rules == theirs.rules
    assert same_weights(ours.weights("final")["0"], theirs.weights("final")["0"])


def same_weights(one: Path, other: Path) -> bool:
    a, b = read_weights(one)[0], read_weights(other)[0]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_export_of_an_import_gives_the_folder_again(tmp_path: Path) -> None:
    results = write_results(tmp_path, small_plan(channels=("CT", "MR")), folds=("1", "4"))
    plans = json.loads((results / "plans.json").read_text()) | {"an entry of a later release": [1, {"a": None}]}
    (results / "plans.json").write_text(json.dumps(plans))
    (results / "dataset_fingerprint.json").write_text('{"spacings": []}')
    imported = import_nnunet(results, tmp_path / "imported").folder
    done = export_nnunet(imported, tmp_path / "again")
    assert done.folds == {"1": "imported", "4": "imported"}
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        assert json.loads((done.folder / name).read_text()) == json.loads((results / name).read_text())
    for fold in ("fold_1", "fold_4"):
        ours, theirs = (read_checkpoint(folder / fold / "checkpoint_final.pth") for folder in (done.folder, results))
        assert ours["network_weights"].keys() == theirs["network_weights"].keys()
        assert all(torch.equal(ours["network_weights"][key], value) for key, value in theirs["network_weights"].items())
        for key in ("trainer_name", "inference_allowed_mirroring_axes"):
            assert ours[key] == theirs[key]
        assert ours["init_args"]["configuration"] == theirs["init_args"]["configuration"]
        assert ours["init_args"]["fold"] == int(fold[-1])


def test_plans_without_names_get_nnunets_own(tmp_path: Path) -> None:
    imported = import_nnunet(write_results(tmp_path, small_plan()), tmp_path / "imported").folder
    table = json.loads((imported / "model.json").read_text())
    del table["nnunet"]["plans"]["plans_name"], table["nnunet"]["plans"]["dataset_name"]
    (imported / "model.json").write_text(json.dumps(table))
    done = export_nnunet(imported, tmp_path / "again")
    assert done.folder == tmp_path / "again/Dataset999_model/nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert json.loads((done.folder / "plans.json").read_text())["plans_name"] == "nnUNetPlans"
    assert export_nnunet(imported, tmp_path / "again", "Dataset501_PHE").folder.parent.name == "Dataset501_PHE"
    del table["nnunet"]["trainer"]
    (imported / "model.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"nnunet.trainer is missing or damaged"):
        export_nnunet(imported, tmp_path / "third")


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("{}", "not a dataset fingerprint")])
def test_a_damaged_fingerprint_is_named(tmp_path: Path, text: str, message: str) -> None:
    model = write_model(tmp_path / "model", small_plan())
    (model / "fingerprint.json").write_text(text)
    with pytest.raises(InputError, match=rf"fingerprint\.json: {message}"):
        export_nnunet(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*"))


def test_plans_that_nest_too_deeply_for_a_checkpoint(tmp_path: Path) -> None:
    results = write_results(tmp_path, small_plan())
    text = (results / "plans.json").read_text().rstrip().removesuffix("}")
    (results / "plans.json").write_text(f'{text}, "more": {"[" * 600}{"]" * 600}}}')
    imported = import_nnunet(results, tmp_path / "imported").folder
    with pytest.raises(InputError, match="nests its entries too deeply"):
        export_nnunet(imported, tmp_path / "again")
    assert not list((tmp_path / "again").glob("*/*"))


@pytest.mark.parametrize(("mirror", "axes"), [(True, (0, 1, 2)), (False, None), ([0, 2], (0, 2))])
def test_mirror_axes(tmp_path: Path, mirror: Any, axes: Any) -> None:
    model = write_model(tmp_path / "model", small_plan(), overlay={"inference": {"mirror": mirror}})
    content = read_checkpoint(export_nnunet(model, tmp_path).folder / "fold_0/checkpoint_final.pth")
    assert content["inference_allowed_mirroring_axes"] == axes


@pytest.mark.parametrize(
    ("members", "folds"),
    [
        ({"base-fold0-seed0": 1, "base-fold1-seed0": 2, "base-fold10-seed0": 3}, {"0": 1, "1": 2, "10": 3}),
        ({"base-foldfull-seed0": 1, "base-foldfull-seed2": 2, "base-foldfull-seed10": 3}, {"0": 1, "1": 2, "2": 3}),
        ({"base-fold0-seed0": 1, "base-fold1-seed0": 2, "base-fold0-seed1": 3}, {"0": 1, "1": 3, "2": 2}),
        ({"base-foldfull-seed0": 1}, {"0": 1}),
    ],
)
@pytest.mark.parametrize("place", ["models/base", "base"])
def test_folds_and_seeds_of_an_arm(tmp_path: Path, members: dict[str, int], folds: dict[str, int], place: str) -> None:
    for name, seed in members.items():
        write_model(tmp_path / "run/models" / name, small_plan(), seed=seed)
    write_model(tmp_path / "run/models/base-line-fold0-seed0", small_plan())  # another arm
    done = export_nnunet(tmp_path / "run" / place, tmp_path / "out")
    names = {seed: name for name, seed in members.items()}
    assert done.folds == {fold: names[seed] for fold, seed in folds.items()}
    back = import_nnunet(done.folder, tmp_path / "back")
    assert back.folds == tuple(sorted(folds, key=int))
    for fold, seed in folds.items():
        assert same_weights(tmp_path / "run/models" / names[seed] / "final.safetensors", back.folder / f"fold_{fold}/final.safetensors")


def test_both_checkpoints_and_the_recipes_depth_and_slope(tmp_path: Path) -> None:
    overlay = {
        "network": {"convs_per_stage": 1, "leaky_slope": 0.2},
        "inference": {"checkpoint": "best", "tile_step": 0.25, "gaussian": False},
    }
    model = write_model(tmp_path / "model", small_plan(), overlay=overlay)
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(model / f"final{suffix}", model / f"best{suffix}")
    done = export_nnunet(model, tmp_path)
    assert sorted(path.name for path in (done.folder / "fold_0").iterdir()) == ["checkpoint_best.pth", "checkpoint_final.pth"]
    kwargs = json.loads((done.folder / "plans.json").read_text())["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert (kwargs["n_conv_per_stage"], kwargs["n_conv_per_stage_decoder"]) == ([1, 1, 1], [1, 1])
    assert kwargs["nonlin_kwargs"] == {"inplace": True, "negative_slope": 0.2}
    said = " ".join(done.notes)
    for needed in ("-chk checkpoint_best.pth", "-step_size 0.25", "Gaussian", "SPL"):
        assert needed in said


@pytest.mark.parametrize(
    ("members", "folds"),
    [
        (["base-fold1-seed0", "base-fold3-seed0"], "-f 1 3"),
        ([f"base-fold{fold}-seed0" for fold in range(10)], "-f 0 1 2 3 4 5 6 7 8 9"),
        (["base-foldfull-seed0"], "-f 0"),
    ],
)
def test_the_command_names_every_fold(tmp_path: Path, members: list[str], folds: str) -> None:
    """nnU-Net's own default is 0 to 4: too many of one, too few of ten."""
    for name in members:
        write_model(tmp_path / "run/models" / name, small_plan(dims=2))
    done = export_nnunet(tmp_path / "run/base", tmp_path / "out of here")
    assert done.command == f"nnUNetv2_predict_from_modelfolder -i IMAGES -o MASKS -m '{done.folder}' {folds}"
    assert [f"fold_{fold}" for fold in folds.split()[1:]] == sorted(path.name for path in done.folder.glob("fold_*"))


def test_the_command_has_the_models_settings(tmp_path: Path) -> None:
    overlay = {"inference": {"checkpoint": "best", "tile_step": 0.25}, "prepare": {"slice_extension": 1}}
    model = write_model(tmp_path / "model", small_plan(), overlay=overlay, folds=("all",))
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(model / f"fold_all/final{suffix}", model / f"fold_all/best{suffix}")
    write_image(tmp_path / "images/a_0000.nii.gz", np.zeros(GRID.shape_zyx, np.float32), GRID)
    done = export_nnunet(model, tmp_path / "out", with_prepared=tmp_path / "images")
    assert done.command.endswith("-f all -chk checkpoint_best.pth -step_size 0.25")
    assert f"-i {tmp_path}/out/Dataset777_Test/imagesPrepared -o MASKS" in done.command


FLAGS = {
    "window": {"level_hu": 40.0, "width_hu": 80.0},
    "threshold": {"low_hu": 0.0, "high_hu": 90.0},
    "downsample": {"factor": 2.0, "pooling": "average"},
    "slice_spacing_mm": 7.5,
    "slice_crop": "head",
    "slice_extension": 1,
    "neighbour_slices": 1,
    "reorient": True,
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_is_refused_by_name(tmp_path: Path, flag: str) -> None:
    model = write_model(tmp_path / "model", small_plan(), overlay={"prepare": {flag: FLAGS[flag]}})
    with pytest.raises(InputError, match="neighbouring slices" if flag == "neighbour_slices" else f"prepare.{flag} = .*--with-prepared"):
        export_nnunet(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_flag_is_known() -> None:
    """A field that is added to the preparation is a flag until somebody says otherwise."""
    assert set(FLAGS) == set(PrepareRecipe.model_fields) - {"compatibility"}
    assert active_flags(PrepareRecipe()) == {}
    assert active_flags(PrepareRecipe(compatibility="nnunet")) == {}
    assert active_flags(PrepareRecipe(compatibility="nnunet", reorient="NibabelIOWithReorient")) == {}
    assert active_flags(PrepareRecipe(slice_extension=2, reorient=True)) == {"slice_extension": 2, "reorient": True}


@pytest.mark.parametrize("reader", TURNING_READERS)
def test_a_reader_that_turns_files_is_no_flag_but_is_named(tmp_path: Path, reader: str) -> None:
    model = write_model(tmp_path / "model", small_plan(), overlay={"prepare": {"reorient": reader}})
    done = export_nnunet(model, tmp_path / "out")
    assert done.notes == ()
    assert json.loads((done.folder / "plans.json").read_text())["image_reader_writer"] == reader
    assert json.loads((done.folder / "dataset.json").read_text())["overwrite_image_reader_writer"] == reader


@pytest.mark.parametrize("compatibility", ["ichbench", "nnunet"])
def test_prepared_images_are_what_the_preparation_goes_on_with(tmp_path: Path, compatibility: str) -> None:
    windows = [{"level_hu": 40.0, "width_hu": 80.0}, {"level_hu": 60.0, "width_hu": 30.0}]
    flags = {"window": windows, "downsample": FLAGS["downsample"], "slice_extension": 1, "compatibility": compatibility}
    plan = small_plan(channels=("CT", "CT"))
    plan = replace(plan, source_channels=("CT",))
    model = write_model(tmp_path / "model", plan, overlay={"prepare": flags})
    volume = np.random.default_rng(0).normal(40, 30, GRID.shape_zyx).astype(np.float32)
    write_image(tmp_path / "images/a_0000.nii.gz", volume, GRID)
    # the same head stored with its slices first: turned for our own preparation, taken as it lies for nnU-Net's
    turned = nibabel.load(tmp_path / "images/a_0000.nii.gz").as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))
    turned.to_filename(tmp_path / "images/b_0000.nii.gz")
    done = export_nnunet(model, tmp_path / "out", with_prepared=tmp_path / "images")
    assert [path.name for path in done.images] == [f"{case}_{channel:04d}.nii.gz" for case in "ab" for channel in range(2)]
    assert done.images[0].parent == tmp_path / "out/Dataset777_Test/imagesPrepared"
    assert json.loads((done.folder / "dataset.json").read_text())["channel_names"] == {"0": "CT", "1": "CT"}
    recipe = read_model(model).recipe.prepare
    for case_id in "ab" if compatibility == "nnunet" else "a":
        image, grid = read_image(tmp_path / f"images/{case_id}_0000.nii.gz", keep_file_order=compatibility == "nnunet")
        flagged, _, _ = flagged_case(Case(case_id, image[None], None, grid), recipe)
        for channel in range(2):
            # as nnU-Net reads it: the file's axes reversed
            stored = nibabel.load(tmp_path / f"out/Dataset777_Test/imagesPrepared/{case_id}_{channel:04d}.nii.gz")
            np.testing.assert_allclose(np.asarray(stored.dataobj).transpose(), flagged.image_czyx[channel], rtol=1e-6)
            np.testing.assert_allclose(stored.header.get_zooms()[::-1], flagged.grid.spacing_zyx_mm, rtol=1e-6)
    if compatibility == "ichbench":
        first, second = (np.asarray(nibabel.load(done.images[index]).dataobj) for index in (0, 2))
        np.testing.assert_array_equal(first, second)


@pytest.mark.filterwarnings("ignore:.*without sform and qform")
def test_prepared_images_that_nnunet_would_turn_once_more(tmp_path: Path) -> None:
    flags = {"reorient": "SimpleITKIOWithReorient", "compatibility": "nnunet", "window": [{"level_hu": 40.0, "width_hu": 80.0}]}
    model = write_model(tmp_path / "model", small_plan(), overlay={"prepare": flags})
    (tmp_path / "images").mkdir()
    image = nibabel.Nifti1Image(np.zeros((22, 20, 6), np.float32), None)
    image.header.set_zooms((1, 1, 5))
    nibabel.save(image, tmp_path / "images/a_0000.nii.gz")
    with pytest.raises(InputError, match=r"a_0000\.nii\.gz: without sform and qform nnU-Net's SimpleITKIOWithReorient would turn"):
        export_nnunet(model, tmp_path / "out", with_prepared=tmp_path / "images")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_channels_are_turned_each_by_its_own_affine(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(40, 30, GRID.shape_zyx).astype(np.float32)
    write_image(tmp_path / "a_0000.nii.gz", volume, GRID)
    turned = nibabel.load(tmp_path / "a_0000.nii.gz").as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))
    turned.to_filename(tmp_path / "a_0001.nii.gz")
    files = [tmp_path / f"a_{channel:04d}.nii.gz" for channel in range(2)]
    case, _ = read_case("a", files, PrepareRecipe(reorient="NibabelIOWithReorient", compatibility="nnunet"), "")
    np.testing.assert_array_equal(case.image_czyx[0], case.image_czyx[1])
    with pytest.raises(InputError, match="differ: shape"):
        read_case("a", files, PrepareRecipe(compatibility="nnunet"), "")


@pytest.mark.parametrize(
    ("name", "said"), [("Dataset5_x", "three digits"), ("../../Dataset001_x", "three digits"), ("Dataset001_../x", "three digits")]
)
def test_names_that_are_no_folder(tmp_path: Path, name: str, said: str) -> None:
    model = write_model(tmp_path / "model", small_plan())
    with pytest.raises(InputError, match=said):
        export_nnunet(model, tmp_path / "out", name)


def test_names_out_of_an_import_cannot_leave_the_folder(tmp_path: Path) -> None:
    results = write_results(tmp_path, small_plan())
    table = json.loads((results / "plans.json").read_text()) | {"dataset_name": "../../Dataset001_x"}
    (results / "plans.json").write_text(json.dumps(table))
    imported = import_nnunet(results, tmp_path / "imported").folder
    with pytest.raises(InputError, match="cannot name a folder"):
        export_nnunet(imported, tmp_path / "out")
    assert export_nnunet(imported, tmp_path / "out", "Dataset002_y").folder.parent.name == "Dataset002_y"


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a model folder nor an arm"):
        export_nnunet(tmp_path / "none", tmp_path / "out")
    write_model(tmp_path / "models/base-fold0-seed0", small_plan())
    write_model(tmp_path / "models/base-fold1-seed0", small_plan(n_classes=3), labels={"background": 0, "a": 1, "b": 2})
    with pytest.raises(InputError, match="different plans"):
        export_nnunet(tmp_path / "base", tmp_path / "out")
    model = write_model(tmp_path / "model", small_plan(), overlay={"inference": {"predictor": "threshold"}})
    with pytest.raises(InputError, match="only networks"):
        export_nnunet(model, tmp_path / "out")
    model = write_model(tmp_path / "batch", small_plan(), overlay={"network": {"norm": "batch"}})
    with pytest.raises(InputError, match="only networks with instance norm"):
        export_nnunet(model, tmp_path / "out")
    model = write_model(tmp_path / "empty", small_plan())
    (model / "final.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        export_nnunet(model, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", small_plan())
    done = export_nnunet(model, tmp_path / "out", "Dataset003_z")
    with pytest.raises(InputError, match="exists"):
        export_nnunet(model, tmp_path / "out", "Dataset003_z")
    assert (done.folder / "fold_0/checkpoint_final.pth").is_file()
