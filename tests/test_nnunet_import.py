"""Importing a result folder: weights, folds, labels and mirror axes arrive; what is damaged, hostile or not ours is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from model_folders import LABELS, REGIONS, small_plan, write_results

from ichbench.cases.case import Grid
from ichbench.cases.images import read_labels, write_image
from ichbench.cases.nifti import TURNING_READERS
from ichbench.errors import InputError
from ichbench.inference.model import load_model, predict_path, read_model
from ichbench.inference.nnunet_export import export_nnunet
from ichbench.inference.nnunet_import import import_nnunet
from ichbench.network.weights import read_weights

GRID = Grid((6, 20, 22), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of a plain 3D network with two channels and regions; do not change it."""
    plan = small_plan(channels=("CT", "MR"))
    return write_results(tmp_path_factory.mktemp("nn"), plan, labels=REGIONS, order=[1, 2], folds=("0", "3"))


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(results, tmp_path / results.name))


def test_an_imported_model_is_an_ordinary_one(results: Path, tmp_path: Path) -> None:
    done = import_nnunet(results, tmp_path / "model")
    assert (done.folds, done.trainer, done.mirror_axes, done.notes) == (("0", "3"), "nnUNetTrainer", (0, 1), ())
    found = read_model(tmp_path / "model")
    assert found.recipe.prepare.compatibility == found.recipe.inference.compatibility == "nnunet"
    assert found.recipe.inference.mirror == (0, 1)
    assert found.channel_names == ("CT", "MR")
    assert (found.rules.names, found.rules.targets, found.rules.regions_class_order) == (("whole", "core"), ((1, 2), 2), (1, 2))
    original = read_model(results.parents[2] / "model")
    for fold, path in found.weights("final").items():
        ours, theirs = read_weights(path)[0], read_weights(original.weights("final")[fold])[0]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    for channel in range(2):
        write_image(tmp_path / f"images/a_{channel:04d}.nii.gz", np.random.default_rng(channel).normal(40, 20, GRID.shape_zyx), GRID)
    (predicted,) = predict_path(load_model(tmp_path / "model"), tmp_path / "images", tmp_path / "masks")
    assert predicted.path == tmp_path / "masks/a.nii.gz"
    labels, grid = read_labels(predicted.path)
    assert grid.same_place(GRID)
    assert set(np.unique(labels)) <= {0, 1, 2}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("family", ["plain", "residual"])
def test_every_kind_of_network(tmp_path: Path, dims: int, family: str) -> None:
    plan = small_plan(dims, family=family, n_classes=4)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}
    folder = write_results(tmp_path, plan, labels=labels, mirror=False)
    done = import_nnunet(folder, tmp_path / "imported")
    assert done.mirror_axes == ()
    assert read_model(tmp_path / "imported").recipe.inference.mirror is False
    assert read_model(tmp_path / "imported").rules.ignore == 4
    assert replace(done.plan, estimate=plan.estimate) == plan  # the estimate counts the ignore label


def test_folds_are_chosen(copy: Path, tmp_path: Path) -> None:
    assert import_nnunet(copy, tmp_path / "a", folds=["3"]).folds == ("3",)
    (copy / "fold_3").rename(copy / "fold_all")
    # as nnU-Net does: fold_all only when asked for, or when there is nothing else
    assert import_nnunet(copy, tmp_path / "b").folds == ("0",)
    assert import_nnunet(copy, tmp_path / "c", folds=["all", "0"]).folds == ("all", "0")
    shutil.rmtree(copy / "fold_0")
    assert import_nnunet(copy, tmp_path / "d").folds == ("all",)
    (copy / "fold_all/checkpoint_final.pth").rename(copy / "fold_all/checkpoint_best.pth")
    with pytest.raises(InputError, match=r"no fold holds checkpoint_final.pth; there are checkpoint_best.pth"):
        import_nnunet(copy, tmp_path / "e")
    done = import_nnunet(copy, tmp_path / "f", "best")
    assert read_model(done.folder).recipe.inference.checkpoint == "best"
    load_model(done.folder)
    with pytest.raises(InputError, match=r"no checkpoint_best.pth in fold 7; folds that have it: all"):
        import_nnunet(copy, tmp_path / "g", "best", ["7"])
    with pytest.raises(InputError, match="allowed are final, best"):
        import_nnunet(copy, tmp_path / "g", "latest")


def test_the_configuration_comes_from_the_checkpoint_or_the_folders_name(copy: Path, tmp_path: Path) -> None:
    def strip(content: dict[str, Any]) -> None:
        del content["init_args"], content["trainer_name"]

    change(copy, strip)
    done = import_nnunet(copy, tmp_path / "a")
    assert (done.plan.configuration, done.trainer) == ("3d_fullres", "nnUNetTrainer")
    copy.rename(tmp_path / "renamed")
    with pytest.raises(InputError, match="TRAINER__PLANS__CONFIGURATION"):
        import_nnunet(tmp_path / "renamed", tmp_path / "b")


def change(folder: Path, how: Callable[[dict[str, Any]], None], fold: str = "*") -> None:
    for path in folder.glob(f"fold_{fold}/*.pth"):
        content = torch.load(path, weights_only=False)
        how(content)
        torch.save(content, path)


def edit(path: Path, how: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_text())
    how(table)
    path.write_text(json.dumps(table))


def refused(folder: Path, tmp_path: Path, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        import_nnunet(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".import-*"))


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("where", ["network_weights", "optimizer_state", "logging", "init_args", "inference_allowed_mirroring_axes"])
def test_a_hostile_checkpoint_creates_nothing(copy: Path, tmp_path: Path, where: str) -> None:
    target = tmp_path / "created"
    change(copy, lambda content: content.update({where: Attack(target)}), "3")
    refused(copy, tmp_path, "nothing in it was executed")
    assert not target.exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("network_weights", [1, 2], "network_weights is a list"),
        ("network_weights", {}, "lacks"),
        ("network_weights", {"encoder.stages.0.0.convs.0.conv.weight": torch.ones(2)}, r"shape \(2,\), but plans.json"),
        ("inference_allowed_mirroring_axes", (0, 5), "axes 0, 1, 2"),
        ("inference_allowed_mirroring_axes", "all", "axes 0, 1, 2"),
        ("inference_allowed_mirroring_axes", [True], "axes 0, 1, 2"),
        ("trainer_name", "nnUNetTrainerOther", "folds of one model share"),
    ],
)
def test_a_checkpoint_that_does_not_fit(copy: Path, tmp_path: Path, key: str, value: Any, said: str) -> None:
    change(copy, lambda content: content.update({key: value}), "3")
    refused(copy, tmp_path, said)


def test_a_checkpoint_of_something_else(copy: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 3}, copy / "fold_0/checkpoint_final.pth")
    refused(copy, tmp_path, "no network_weights")


def test_a_truncated_checkpoint(copy: Path, tmp_path: Path) -> None:
    path = copy / "fold_3/checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(copy, tmp_path, "copy the file again")


def architecture(table: dict[str, Any]) -> dict[str, Any]:
    return table["configurations"]["3d_fullres"]["architecture"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: architecture(t).update(network_class_name="os.system"), "PlainConvUNet and ResidualEncoderUNet"),
        (lambda t: architecture(t).update(network_class_name="my.UMamba"), "PlainConvUNet and ResidualEncoderUNet"),
        (lambda t: architecture(t)["arch_kwargs"].update(features_per_stage=[8, 8, 8]), "the three files must come from one training"),
        (lambda t: architecture(t)["arch_kwargs"].update(features_per_stage=[2**40] * 3), "no network is that large"),
        (lambda t: architecture(t)["arch_kwargs"].update(n_conv_per_stage=[2**40] * 3), "no network is that large"),
        (lambda t: architecture(t)["arch_kwargs"].update(nonlin_first=True), "nonlin_first"),
        (lambda t: architecture(t)["arch_kwargs"].update(n_stages="many"), "does not read as a plan"),
        (lambda t: architecture(t)["arch_kwargs"].pop("strides"), "'strides' is missing"),
        (lambda t: t["configurations"]["3d_fullres"].update(previous_stage="3d_lowres"), r"\(4, 2.*but plans.json .* make it \(4, 4"),
        (lambda t: t["configurations"]["3d_fullres"].update(preprocessor_name="Mine"), "preprocessor_name is 'Mine'"),
        (lambda t: t["configurations"].clear(), "no configurations"),
        (lambda t: t["configurations"].update({"2d": t["configurations"].pop("3d_fullres")}), "no configuration '3d_fullres'"),
        (lambda t: t.update(image_reader_writer="MyIOWithReorient"), "turned on reading by 'MyIOWithReorient'.*SimpleITKIOWithReorient"),
        (lambda t: t.update(foreground_intensity_properties_per_channel={}), "channel 0|intensit"),
        (lambda t: t["foreground_intensity_properties_per_channel"]["0"].update(std=math.nan), "channel 0|intensit"),
    ],
)
def test_plans_that_are_not_ours_or_not_theirs(copy: Path, tmp_path: Path, how: Callable[[dict[str, Any]], None], said: str) -> None:
    edit(copy / "plans.json", how)
    refused(copy, tmp_path, said)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: t.update(labels=LABELS), r"seg_layers.*shape|need \d outputs|network has"),
        (lambda t: t.pop("labels"), "needs"),
        (lambda t: t.update(labels=["background", "ich"]), "needs"),
        (lambda t: t.pop("regions_class_order"), "regions_class_order"),
        (lambda t: t.update(channel_names={"0": "CT"}), "normalises 2 channels"),
    ],
)
def test_a_dataset_json_of_another_training(copy: Path, tmp_path: Path, how: Callable[[dict[str, Any]], None], said: str) -> None:
    # two regions and two labels both need two outputs: the heads cannot tell, so three labels are what shows
    edit(copy / "dataset.json", how)
    if said.startswith("seg_layers"):
        edit(copy / "dataset.json", lambda t: t.update(labels={"background": 0, "a": 1, "b": 2}))
    refused(copy, tmp_path, said)


def test_a_folder_that_is_no_result_folder(results: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", tmp_path, "no such folder")
    refused(results.parent, tmp_path, "did you mean .*3d_fullres")
    refused(results / "fold_0", tmp_path, "did you mean")
    for name in ("plans.json", "dataset.json"):
        copy = shutil.copytree(results, tmp_path / name / results.name)
        (copy / name).unlink()
        refused(copy, tmp_path, f"no {name}")
        (copy / name).write_text("{")
        refused(copy, tmp_path, "cannot be read as JSON")


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_json_that_nests_without_end(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).write_text("[" * 200_000)
    refused(copy, tmp_path, f"{name}: cannot be read as JSON")


def test_json_that_can_be_read_but_not_written(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on reading goes deeper than writing."""

    def fail(*_: Any, **__: Any) -> str:
        raise RecursionError

    monkeypatch.setattr(json, "dumps", fail)
    refused(results, tmp_path, "nests its entries too deeply")


def test_a_mark_of_the_byte_order_is_no_error(copy: Path, tmp_path: Path) -> None:
    path = copy / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert import_nnunet(copy, tmp_path / "model").folds == ("0", "3")


def test_plans_of_before_2_4_that_inherit_from_nothing(copy: Path, tmp_path: Path) -> None:
    def old(table: dict[str, Any]) -> None:
        one = table["configurations"]["3d_fullres"]
        kwargs = one.pop("architecture")["arch_kwargs"]
        one |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 8, "inherits_from": None}
        one |= {"n_conv_per_stage_encoder": kwargs["n_conv_per_stage"], "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"]}
        one |= {"pool_op_kernel_sizes": kwargs["strides"], "conv_kernel_sizes": kwargs["kernel_sizes"]}

    edit(copy / "plans.json", old)
    assert import_nnunet(copy, tmp_path / "model").plan.features == (4, 8, 8)


def test_a_network_larger_than_its_file_is_refused(copy: Path, tmp_path: Path) -> None:
    """A few numbers in the file, a whole network in memory."""

    def share(content: dict[str, Any]) -> None:
        weights = content["network_weights"]
        shared = torch.zeros(max(value.numel() for value in weights.values()))
        content["network_weights"] = {key: shared[: value.numel()].view(value.shape) for key, value in weights.items()}

    change(copy, share)
    refused(copy, tmp_path, "weights would take")


def test_an_existing_model_is_never_overwritten(results: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    import_nnunet(results, tmp_path / "model", folds=["0"])
    before = (tmp_path / "model/model.json").read_bytes()
    with pytest.raises(InputError, match="not an empty folder"):
        import_nnunet(results, tmp_path / "model")
    assert (tmp_path / "model/model.json").read_bytes() == before


def test_an_empty_folder_is_filled_and_not_replaced(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mounted disk, the current folder, or a link to either; after a failure it is as empty as before."""
    disk = tmp_path / "disk"
    for name in ("lost+found", ".import-killed"):
        (disk / name).mkdir(parents=True)
    before, rename = disk.stat().st_ino, Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "plan.json":
            raise OSError(28, "No space left on device", str(path))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="No space left"):
            import_nnunet(results, disk)
    assert sorted(path.name for path in disk.iterdir()) == [".import-killed", "lost+found"]
    import_nnunet(results, disk)
    assert disk.stat().st_ino == before
    (tmp_path / "here").mkdir()
    (tmp_path / "aim").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "aim")
    monkeypatch.chdir(tmp_path / "here")
    import_nnunet(results, Path())
    import_nnunet(results, tmp_path / "link")
    for place in (disk, tmp_path / "here", tmp_path / "aim"):
        assert load_model(place).channel_names == read_model(place).channel_names
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == sorted(path.name for path in (tmp_path / "aim").iterdir())


def test_readers_and_trainers_that_matter_are_named(copy: Path, tmp_path: Path) -> None:
    edit(copy / "plans.json", lambda t: t.update(image_reader_writer="NaturalImage2DIO"))
    change(copy, lambda content: content.update(trainer_name="MyTrainer"))
    first, second = import_nnunet(copy, tmp_path / "out").notes
    assert "NaturalImage2DIO" in first
    assert "MyTrainer" in second


@pytest.mark.parametrize("reader", TURNING_READERS)
def test_a_reader_that_turns_files_becomes_a_field_and_comes_back(copy: Path, tmp_path: Path, reader: str) -> None:
    edit(copy / "plans.json", lambda t: t.update(image_reader_writer=reader))
    edit(copy / "dataset.json", lambda t: t.update(overwrite_image_reader_writer=reader))
    assert import_nnunet(copy, tmp_path / "out").notes == ()
    assert read_model(tmp_path / "out").recipe.prepare.reorient == reader
    exported = export_nnunet(tmp_path / "out", tmp_path / "back")
    assert json.loads((exported.folder / "plans.json").read_text())["image_reader_writer"] == reader
    volumes = [np.random.default_rng(channel).normal(40, 20, GRID.shape_zyx) for channel in range(2)]
    for channel, volume in enumerate(volumes):
        write_image(tmp_path / f"a_{channel:04d}.nii.gz", volume, GRID)
        stored = nibabel.load(tmp_path / f"a_{channel:04d}.nii.gz")
        nibabel.save(stored.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]])), tmp_path / f"b_{channel:04d}.nii.gz")
    model = load_model(tmp_path / "out")
    masks = [nibabel.load(next(predict_path(model, tmp_path / f"{case}_0000.nii.gz", tmp_path / "masks")).path) for case in "ab"]
    assert len(np.unique(masks[0].dataobj)) > 1
    same = [mask.as_reoriented(nibabel.io_orientation(mask.affine)) for mask in masks]
    np.testing.assert_array_equal(np.asarray(same[0].dataobj), np.asarray(same[1].dataobj))
    np.testing.assert_allclose(masks[1].affine, nibabel.load(tmp_path / "b_0000.nii.gz").affine)


@pytest.fixture
def cascade(tmp_path: Path) -> Path:
    """The second stage, its first stage beside it; three labels, so three more inputs."""
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    write_results(tmp_path / "low", replace(small_plan(n_classes=4), configuration="3d_lowres"), labels=labels, folds=("0", "1"))
    # a network of the width that the second stage has, exported under a plan that hides where its inputs come from
    wide = small_plan(channels=("CT", "x", "x", "x"), n_classes=4)
    second = write_results(tmp_path / "full", wide, labels=labels, seed=7)
    low = tmp_path / "low/results/Dataset777_Test/nnUNetTrainer__nnUNetPlans__3d_lowres"
    folder = second.with_name("nnUNetTrainer__nnUNetPlans__3d_cascade_fullres")
    second.rename(folder)
    low.rename(folder.with_name(low.name))
    plans = json.loads((folder / "plans.json").read_text())
    one = plans["configurations"]["3d_fullres"]
    for key in ("normalization_schemes", "use_mask_for_norm"):
        one[key] = one[key][:1]
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (folder / "plans.json").write_text(json.dumps(plans))
    edit(folder / "dataset.json", lambda t: t.update(channel_names={"0": "CT"}))
    change(folder, lambda content: content["init_args"].update(configuration="3d_cascade_fullres"))
    return folder


def test_both_stages_of_a_cascade_turn_files_or_neither(cascade: Path, tmp_path: Path) -> None:
    first, second = TURNING_READERS
    low = cascade.with_name("nnUNetTrainer__nnUNetPlans__3d_lowres")
    edit(cascade / "plans.json", lambda t: t.update(image_reader_writer=first))
    refused(cascade, tmp_path, "reads images by SimpleITKIO, the second stage by another class")
    edit(low / "plans.json", lambda t: t.update(image_reader_writer=second))
    refused(cascade, tmp_path, f"reads images by {second}, the second stage by another class")
    edit(low / "plans.json", lambda t: t.update(image_reader_writer=first))
    import_nnunet(cascade, tmp_path / "model")
    write_image(tmp_path / "a.nii.gz", np.random.default_rng(1).normal(40, 20, GRID.shape_zyx), GRID)
    nibabel.save(nibabel.load(tmp_path / "a.nii.gz").slicer[::-1, :, ::-1], tmp_path / "b.nii.gz")
    model = load_model(tmp_path / "model")
    masks = [nibabel.load(next(predict_path(model, tmp_path / f"{case}.nii.gz", tmp_path / "masks")).path) for case in "ab"]
    assert len(np.unique(masks[0].dataobj)) > 1
    np.testing.assert_array_equal(np.asarray(masks[0].dataobj)[::-1, :, ::-1], np.asarray(masks[1].dataobj))


def test_a_cascade_is_imported_with_its_first_stage(cascade: Path, tmp_path: Path) -> None:
    done = import_nnunet(cascade, tmp_path / "model")
    assert done.plan.previous_stage == "3d_lowres"
    assert read_model(tmp_path / "model/previous").folds == ("0", "1")
    model = load_model(tmp_path / "model")
    assert model.tools.networks[0].encoder[0][0].conv.weight.shape[1] == 4
    write_image(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(40, 20, GRID.shape_zyx), GRID)
    (predicted,) = predict_path(model, tmp_path / "a.nii.gz", tmp_path / "mask.nii.gz")
    with_first = read_labels(predicted.path)[0]
    nothing = replace(model, tools=replace(model.tools, previous=lambda case: np.zeros(case.grid.shape_zyx, np.int16)))
    (predicted,) = predict_path(nothing, tmp_path / "a.nii.gz", tmp_path / "other.nii.gz")
    assert (read_labels(predicted.path)[0] != with_first).any()


def test_a_cascade_without_its_first_stage(results: Path, cascade: Path, tmp_path: Path) -> None:
    low = cascade.with_name("nnUNetTrainer__nnUNetPlans__3d_lowres")
    low.rename(tmp_path / "elsewhere")
    refused(cascade, tmp_path, "needs the masks of '3d_lowres'.*--previous")
    assert import_nnunet(cascade, tmp_path / "model", previous=tmp_path / "elsewhere").plan.previous_stage == "3d_lowres"
    for other in (results, cascade):
        with pytest.raises(InputError, match="needed is '3d_lowres'"):
            import_nnunet(cascade, tmp_path / "out", previous=other)
    with pytest.raises(InputError, match="not the second stage"):
        import_nnunet(results, tmp_path / "out", previous=tmp_path / "elsewhere")
    assert not (tmp_path / "out").exists()
