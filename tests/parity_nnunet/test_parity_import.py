"""Weights in both directions, live: a model that nnU-Net trained is imported, ours and imported ones are exported, and nnU-Net predicts."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import REGIONS, small_plan, write_model
from nn_training import training_here

from ichbench.cases.case import Case, Grid
from ichbench.cases.files import write_atomically
from ichbench.cases.images import read_image, read_labels, write_image, write_labels
from ichbench.inference.model import load_model, predict_path, read_model
from ichbench.inference.nnunet_export import export_nnunet
from ichbench.inference.nnunet_import import import_nnunet
from ichbench.inference.sliding import predict_logits
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.pipeline import flagged_case, prepare_case

pytest.importorskip("nnunetv2")

TOLERANCE = 1e-4
ID, NAME = 741, "Dataset741_Import"
LABELS = {"background": 0, "whole": [1, 2], "core": 2}


@pytest.fixture(scope="module")
def raw(nnunet_folders: Path, fresh_seed: int) -> Path:
    """Five cases of two channels with two nested bleeds; shapes and spacing are drawn."""
    rng = np.random.default_rng([fresh_seed, ID])
    folder = nnunet_folders / "raw" / NAME
    spacing = (float(rng.uniform(3, 6)), *rng.uniform(0.8, 1.2, 2).tolist())
    for case in range(5):
        shape = (int(rng.integers(10, 17)), *rng.integers(28, 45, 2).tolist())
        labels = np.zeros(shape, np.int16)
        labels[3:8, 8:22, 8:22] = 1
        labels[4:7, 12:18, 12:18] = 2
        grid = Grid(shape, np.array([[0, 0, -spacing[2], 0], [0, -spacing[1], 0, 0], [spacing[0], 0, 0, 0], [0, 0, 0, 1]]))
        for channel in range(2):
            image = rng.normal(30, 8, shape) + 25 * (labels > channel)
            write_image(folder / f"imagesTr/c{case}_{channel:04d}.nii.gz", image.astype(np.float32), grid)
        write_labels(folder / f"labelsTr/c{case}.nii.gz", labels, grid)
    about = {"channel_names": {"0": "CT", "1": "T2"}, "labels": LABELS, "regions_class_order": [1, 2], "numTraining": 5}
    (folder / "dataset.json").write_text(json.dumps(about | {"file_ending": ".nii.gz"}))
    return folder


@pytest.fixture(scope="module")
def trained(raw: Path, nnunet_folders: Path) -> dict[str, Path]:
    """Configuration -> result folder of an epoch of two iterations: plain 3D (two folds), residual 3D, plain 2D (fold_all)."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import nnUNetPlannerResEncM
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    preprocessed = nnunet_folders / "preprocessed" / NAME
    dataset = json.loads((raw / "dataset.json").read_text())
    # in this process: nnU-Net's commands would spend half a minute starting others
    cases = {f"c{case}": [raw / f"imagesTr/c{case}_{channel:04d}.nii.gz" for channel in range(2)] for case in range(5)}
    found = fingerprint(case_of(files, raw / f"labelsTr/{name}.nii.gz") for name, files in cases.items())
    write_atomically(preprocessed / "dataset_fingerprint.json", json.dumps(found.to_json()).encode())
    for planner in (ExperimentPlanner, nnUNetPlannerResEncM):
        planner(ID, gpu_memory_target_in_gb=0.2).plan_experiment()
    for name in ("nnUNetPlans", "nnUNetResEncUNetMPlans"):
        # an eighth of the features: as fast as a test should be, and plans that only the file describes
        table = json.loads((preprocessed / f"{name}.json").read_text())
        for configuration in table["configurations"].values():
            kwargs = configuration["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [features // 8 for features in kwargs["features_per_stage"]]
        (preprocessed / f"{name}.json").write_text(json.dumps(table))
    manager = PlansManager(str(preprocessed / "nnUNetPlans.json"))
    for configuration in ("2d", "3d_fullres"):
        settings = manager.get_configuration(configuration)
        (preprocessed / settings.data_identifier).mkdir()
        for name, files in cases.items():
            target, label = str(preprocessed / settings.data_identifier / name), str(raw / f"labelsTr/{name}.nii.gz")
            DefaultPreprocessor(verbose=False).run_case_save(target, [str(path) for path in files], label, manager, settings, dataset)
    made = {}
    for name, configuration, folds in (
        ("nnUNetPlans", "3d_fullres", (0, 1)),
        ("nnUNetResEncUNetMPlans", "3d_fullres", (2,)),
        ("nnUNetPlans", "2d", ("all",)),
    ):
        for fold in folds:
            plans = json.loads((preprocessed / f"{name}.json").read_text()) | {"continue_training": False}
            with training_here():
                trainer = nnUNetTrainer(plans, configuration, fold, dataset, torch.device("cpu"))
                trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
                trainer.run_training()
        made[f"{name} {configuration}"] = Path(trainer.output_folder_base)
    return made


def case_of(files: list[Path], label: Path) -> Case:
    images = [read_image(path) for path in files]
    return Case(label.name, np.stack([image for image, _ in images]), read_labels(label)[0], images[0][1])


def predictor_of(folder: Path, folds: tuple[Any, ...], checkpoint: str = "checkpoint_final.pth") -> Any:
    # found by name nnU-Net imports every trainer variant, and with them a broken torchvision: the class is given here instead
    import nnunetv2.inference.predict_from_raw_data as module
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    module.recursive_find_trainer_class_by_name = lambda name: {"nnUNetTrainer": nnUNetTrainer}[name]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    return predictor


def check_logits(predictor: Any, model: Path, seed: int) -> None:
    """Equal logits of every fold on a random patch: within 1e-4, or thrice what nnU-Net's own fp32 is off its float64."""
    networks, plan = load_model(model).tools.networks, read_model(model).plan
    assert len(networks) == len(predictor.list_of_parameters)
    x = torch.randn((2, plan.in_channels, *plan.patch_size), generator=torch.Generator().manual_seed(seed))
    for ours, parameters in zip(networks, predictor.list_of_parameters, strict=True):
        predictor.network.load_state_dict(parameters)
        with torch.no_grad():
            theirs = predictor.network.eval()(x)
            rounding = float((copy.deepcopy(predictor.network).double()(x.double()) - theirs).abs().max())
            assert float((ours(x) - theirs).abs().max()) <= max(TOLERANCE, 3 * rounding)
        assert float(theirs.std()) > 1e-3


KINDS = {"nnUNetPlans 3d_fullres": (0, 1), "nnUNetResEncUNetMPlans 3d_fullres": (2,), "nnUNetPlans 2d": ("all",)}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(trained: dict[str, Path], tmp_path: Path, fresh_seed: int, kind: str) -> None:
    """What nnU-Net trained gives its logits here, and what goes back is loaded by nnU-Net and gives them there."""
    folder, folds = trained[kind], KINDS[kind]
    theirs = predictor_of(folder, folds)
    imported = import_nnunet(folder, tmp_path / "model")
    assert imported.folds == tuple(map(str, folds))
    check_logits(theirs, imported.folder, fresh_seed)
    assert imported.mirror_axes == tuple(theirs.allowed_mirroring_axes)
    found = read_model(imported.folder)
    assert (found.channel_names, found.rules.regions_class_order) == (("CT", "T2"), (1, 2))
    exported = export_nnunet(imported.folder, tmp_path / "out", "Dataset742_Back").folder
    again = predictor_of(exported, folds)
    check_logits(again, imported.folder, fresh_seed + 1)
    assert again.allowed_mirroring_axes == theirs.allowed_mirroring_axes
    assert again.configuration_manager.configuration == theirs.configuration_manager.configuration
    assert again.trainer_name == theirs.trainer_name
    for ours, reference in zip(again.list_of_parameters, theirs.list_of_parameters, strict=True):
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[key], value) for key, value in reference.items())


def test_the_best_checkpoint(trained: dict[str, Path], tmp_path: Path, fresh_seed: int) -> None:
    folder = trained["nnUNetPlans 3d_fullres"]
    imported = import_nnunet(folder, tmp_path / "model", "best", ["1"])
    check_logits(predictor_of(folder, (1,), "checkpoint_best.pth"), imported.folder, fresh_seed)


def test_an_imported_model_predicts_from_channel_files(trained: dict[str, Path], raw: Path, tmp_path: Path) -> None:
    """The whole way on real files of two channels; equality of masks is the subject of the inference tests."""
    model = load_model(import_nnunet(trained["nnUNetPlans 3d_fullres"], tmp_path / "model").folder)
    (done,) = predict_path(model, raw / "imagesTr/c3_0000.nii.gz", tmp_path / "masks")
    assert done.path.name == "c3.nii.gz"
    assert set(np.unique(read_labels(done.path)[0])) <= {0, 1, 2}


def test_both_stages_of_a_cascade(trained: dict[str, Path], raw: Path, nnunet_folders: Path, tmp_path: Path) -> None:
    """Two checkpoints that nnU-Net wrote (of networks as they start): its masks after both stages are ours, on a case with two channels."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    table = json.loads((nnunet_folders / "preprocessed" / NAME / "nnUNetPlans.json").read_text())
    full = table["configurations"]["3d_fullres"]
    low = full | {"spacing": [1.5 * value for value in full["spacing"]], "next_stage": "3d_cascade_fullres"}
    table["configurations"] |= {
        "3d_lowres": low,
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    folders = []
    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        plans = json.loads(json.dumps(table)) | {"continue_training": False}
        trainer = nnUNetTrainer(plans, configuration, 0, json.loads((raw / "dataset.json").read_text()), torch.device("cpu"))
        trainer.initialize()
        folder = tmp_path / f"nnUNetTrainer__nnUNetPlans__{configuration}"
        (folder / "fold_0").mkdir(parents=True)
        trainer.save_checkpoint(str(folder / "fold_0/checkpoint_final.pth"))
        (folder / "plans.json").write_text(json.dumps(table))
        (folder / "dataset.json").write_text((raw / "dataset.json").read_text())
        folders.append(folder)
    files = [[str(raw / f"imagesTr/c1_{channel:04d}.nii.gz") for channel in range(2)]]
    masks = [tmp_path / "low", tmp_path / "full", tmp_path / "other"]
    for out in masks:
        out.mkdir()
    for folder, out, before in zip(folders, masks, (None, str(masks[0])), strict=False):
        predictor_of(folder, (0,)).predict_from_files_sequential(files, str(out), folder_with_segs_from_prev_stage=before)
    imported = import_nnunet(folders[1], tmp_path / "model").folder
    (done,) = predict_path(load_model(imported), raw / "imagesTr/c1_0000.nii.gz", tmp_path / "ours")
    ours, theirs = read_labels(done.path)[0], read_labels(masks[1] / "c1.nii.gz")[0]
    assert len(np.unique(theirs)) > 1
    # the first stage's masks matter to the second
    first = Path(files[0][0]).parent.parent / "labelsTr"
    predictor_of(folders[1], (0,)).predict_from_files_sequential(files, str(masks[2]), folder_with_segs_from_prev_stage=str(first))
    assert (read_labels(masks[2] / "c1.nii.gz")[0] != theirs).any()
    assert float((ours != theirs).mean()) <= 1e-4


@pytest.mark.parametrize("family", ["plain", "residual"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_model_of_ours_predicts_in_nnunet(tmp_path: Path, fresh_seed: int, family: str, dims: int) -> None:
    plan = small_plan(dims, channels=("CT", "MR"), family=family)
    overlay: dict[str, Any] = {"inference": {"mirror": [0]}, "plan": {"family": "plain" if family == "plain" else "resenc_m"}}
    for fold in range(2):
        name = f"run/models/base-fold{fold}-seed0"
        write_model(tmp_path / name, plan, labels=REGIONS, order=[1, 2], overlay=overlay, seed=(fresh_seed + fold) % 2**31)
    folder = export_nnunet(tmp_path / "run/base", tmp_path / "out").folder
    for fold in range(2):
        check_logits(predictor_of(folder, (fold,)), tmp_path / f"run/models/base-fold{fold}-seed0", fresh_seed)
    predictor = predictor_of(folder, (0, 1))
    assert predictor.allowed_mirroring_axes == (0,)
    assert predictor.label_manager.num_segmentation_heads == 2
    rng = np.random.default_rng([fresh_seed, dims])
    grid = Grid((9, 24, 21), np.diag([1.0, 1.1, 4.5, 1.0])[:, [2, 1, 0, 3]])
    for channel in range(2):
        write_image(tmp_path / f"images/a_{channel:04d}.nii.gz", rng.normal(40, 25, grid.shape_zyx).astype(np.float32), grid)
    files = [[str(tmp_path / f"images/a_{channel:04d}.nii.gz") for channel in range(2)]]
    predictor.predict_from_files_sequential(files, [str(tmp_path / "a")], save_probabilities=False, overwrite=True)
    labels, found = read_labels(tmp_path / "a.nii.gz")
    assert found.same_place(read_image(Path(files[0][0]))[1])
    assert len(np.unique(labels)) > 1


def test_prepared_images_go_on_in_nnunet_as_here(tmp_path: Path, fresh_seed: int) -> None:
    """Window, pooling and extension act here; nnU-Net's own preparation of the written images gives our network's input."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    rng = np.random.default_rng([fresh_seed, 7])
    flags = {"window": {"level_hu": 40.0, "width_hu": 60.0}, "downsample": {"factor": 2.0, "pooling": "max"}, "slice_extension": 1}
    model = write_model(tmp_path / "model", small_plan(), overlay={"prepare": flags}, seed=fresh_seed % 2**31)
    grid = Grid((7, 50, 46), np.array([[0, 0, -0.6, 0], [0, -0.6, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    write_image(tmp_path / "images/a_0000.nii.gz", np.rint(rng.normal(40, 30, grid.shape_zyx)), grid)
    done = export_nnunet(model, tmp_path / "out", with_prepared=tmp_path / "images")
    predictor = predictor_of(done.folder, (0,))
    data, _, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(path) for path in done.images], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    image, its_grid = read_image(tmp_path / "images/a_0000.nii.gz")
    found = read_model(model)
    prepared = prepare_case(Case("a", image[None], None, its_grid), found.recipe.prepare, found.plan)
    assert prepared.image_czyx.shape == data.shape
    np.testing.assert_allclose(prepared.image_czyx, data, atol=TOLERANCE)
    flagged, _, _ = flagged_case(Case("a", image[None], None, its_grid), found.recipe.prepare)
    assert read_image(done.images[0])[0].shape == flagged.grid.shape_zyx
    ours = predict_logits(load_model(model).tools.networks[0], prepared.image_czyx, found.plan, found.recipe.prediction())
    assert ours.shape[1:] == data.shape[1:]


@pytest.mark.parametrize("members", [["base-fold1-seed0", "base-fold7-seed0"], ["base-foldfull-seed0"]])
def test_the_printed_command_takes_every_fold(members: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's own command line, up to the images: one set of weights per fold that was exported, the chosen checkpoint and step."""
    import nnunetv2.inference.predict_from_raw_data as theirs

    overlay = {"inference": {"checkpoint": "best", "tile_step": 0.25}}
    for index, name in enumerate(members):
        model = write_model(tmp_path / "run/models" / name, small_plan(), overlay=overlay, seed=index)
        for suffix in (".safetensors", ".json"):
            (model / f"final{suffix}").rename(model / f"best{suffix}")
    command = shlex.split(export_nnunet(tmp_path / "run/base", tmp_path / "results").command)
    assert command[0] == "nnUNetv2_predict_from_modelfolder"
    words = [str(tmp_path / "masks") if word == "MASKS" else word for word in command]
    monkeypatch.setattr("sys.argv", [*words, "-device", "cpu"])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    ready: list[Any] = []
    monkeypatch.setattr(theirs.nnUNetPredictor, "predict_from_files", lambda self, *_, **__: ready.append(self))
    theirs.predict_entry_point_modelfolder()
    (predictor,) = ready
    assert predictor.tile_step_size == 0.25
    assert len(predictor.list_of_parameters) == len(members)
    seen = {next(iter(weights.values())).sum().item() for weights in predictor.list_of_parameters}
    assert len(seen) == len(members)
