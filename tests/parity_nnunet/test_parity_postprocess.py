"""Post-processing and model choice beside nnunetv2's own functions, on folders of drawn masks and probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

pytest.importorskip("nnunetv2")

from ichbench.cases.case import Grid
from ichbench.cases.images import read_labels, write_labels
from ichbench.cases.labels import LabelRules, read_rules
from ichbench.inference.archives import write_probabilities
from ichbench.inference.ensemble import mean_probabilities
from ichbench.inference.folders import average_folders, select_folders
from ichbench.inference.postprocess import dice_counts, find_postprocessing, foreground_mean, keep_largest, mean_dice
from ichbench.inference.select import Candidate, find_best

PLAIN: dict[str, Any] = {"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
GRID = Grid((7, 16, 14), np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]))


def blobs(rng: np.random.Generator, n_labels: int) -> NDArray[np.int16]:
    """Smooth heights cut into nested labels: a few large pieces."""
    height = ndimage.gaussian_filter(rng.normal(size=GRID.shape_zyx), 1.6)
    return np.digitize(height, np.quantile(height, np.linspace(0.6, 0.97, n_labels))).astype(np.int16)


def spoilt(rng: np.random.Generator, mask: NDArray[np.int16], kind: str) -> NDArray[np.int16]:
    """A prediction: borders eaten, and islands far away (or true pieces lost), so that some steps help and some do not."""
    out = np.where(rng.random(mask.shape) < 0.1, 0, mask).astype(np.int16)
    for _ in range(int(rng.integers(1, 4))):
        corner = [int(rng.integers(0, n - 2)) for n in mask.shape]
        where = tuple(slice(start, start + 2) for start in corner)
        out[where] = 0 if kind == "lost" else int(rng.integers(1, 4))
    return out


def write_folder(folder: Path, masks: dict[str, NDArray[np.int16]]) -> Path:
    folder.mkdir(parents=True)
    for name, mask in masks.items():
        write_labels(folder / f"{name}.nii.gz", mask, GRID)
    return folder


def declared(labels: dict[str, Any]) -> dict[str, Any]:
    order = {"regions_class_order": [1, 2, 3]} if any(isinstance(value, list) for value in labels.values()) else {}
    return {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 6} | order


PLANS = {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager", "configurations": {}, "transpose_forward": [0, 1, 2]}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their worker processes, as a loop: starting one takes longer than all the work."""
    import nnunetv2.evaluation.evaluate_predictions as evaluation
    import nnunetv2.postprocessing.remove_connected_components as theirs

    class Loop:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Loop:
            return self

        def __exit__(self, *_: object) -> None: ...

        def starmap(self, function: Any, items: Any) -> list[Any]:
            return [function(*item) for item in items]

    class Context:
        Pool = Loop

    class Multiprocessing:
        @staticmethod
        def get_context(_: str) -> type[Context]:
            return Context

    for module in (evaluation, theirs):
        monkeypatch.setattr(module, "multiprocessing", Multiprocessing)


@pytest.mark.parametrize(("labels", "kind"), [(PLAIN, "islands"), (PLAIN, "lost"), (REGIONS, "islands"), (REGIONS, "lost")])
def test_the_same_steps_are_chosen(labels: dict[str, Any], kind: str, fresh_seed: int, tmp_path: Path, in_process: None) -> None:
    from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing, determine_postprocessing

    rng = np.random.default_rng([fresh_seed, len(labels), len(kind)])
    rules = read_rules(labels, [1, 2, 3])
    for trial in range(3):
        references = {f"case_{index}": blobs(rng, 3) for index in range(4)}
        predictions = {name: spoilt(rng, mask, kind) for name, mask in references.items()}
        if rules.ignore is not None:
            for mask in references.values():
                mask[:, :4] = rules.ignore
        reference = write_folder(tmp_path / f"{trial}/reference", references)
        prediction = write_folder(tmp_path / f"{trial}/prediction", predictions)
        steps, arguments = determine_postprocessing(str(prediction), str(reference), PLANS, declared(labels), 1)

        def load(name: str, ours: Path = prediction, truth: Path = reference) -> tuple[Any, Any]:
            return read_labels(truth / f"{name}.nii.gz")[0], read_labels(ours / f"{name}.nii.gz")[0]

        rule = find_postprocessing(list(references), load, rules.targets, rules.ignore, "nnunet")
        found = [_labels(one["labels_or_regions"]) for one in arguments]
        assert list(rule.steps) == found, trial
        for name, mask in predictions.items():
            np.testing.assert_array_equal(rule.apply(mask), apply_postprocessing(mask, steps, arguments), err_msg=name)


def _labels(given: Any) -> tuple[int, ...]:
    items = given if isinstance(given, (list, tuple)) else [given]
    return tuple(sorted(int(label) for label in items))


def test_dice_as_in_their_summary(fresh_seed: int, tmp_path: Path, in_process: None) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    rng = np.random.default_rng([fresh_seed, 2])
    rules = read_rules(PLAIN)
    references = {f"case_{index}": blobs(rng, 3) for index in range(5)}
    for name in ("case_0", "case_1"):
        references[name][references[name] == 2] = 0
    references["case_2"][:2] = 4
    predictions = {name: spoilt(rng, np.where(mask == 4, 0, mask).astype(np.int16), "islands") for name, mask in references.items()}
    predictions["case_0"][predictions["case_0"] == 2] = 0
    summary = compute_metrics_on_folder(
        str(write_folder(tmp_path / "a", references)), str(write_folder(tmp_path / "b", predictions)), None, SimpleITKIO(), ".nii.gz",
        [1, 2, 3], 4, 1,
    )  # fmt: skip
    ours = mean_dice([dice_counts(references[name], predictions[name], rules.targets, rules.ignore) for name in sorted(references)])
    assert [summary["mean"][label]["Dice"] for label in (1, 2, 3)] == ours.tolist()
    assert summary["foreground_mean"]["Dice"] == foreground_mean(ours)


def test_largest_components(fresh_seed: int) -> None:
    from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation as theirs

    rng = np.random.default_rng([fresh_seed, 3])
    for shape in [(9, 20, 22), (1, 30, 30), (3, 3, 3), (25, 7, 4)]:
        for share in (0.02, 0.1, 0.3):
            labels = (rng.integers(1, 4, shape) * (rng.random(shape) < share)).astype(np.int16)
            for wanted in ([1], [1, 2, 3], [2, 3]):
                np.testing.assert_array_equal(keep_largest(labels, wanted), theirs(labels, wanted))


@pytest.mark.parametrize("labels", [PLAIN, REGIONS])
def test_pairs_and_the_best_of_them(labels: dict[str, Any], fresh_seed: int, tmp_path: Path) -> None:
    """Their averaging and thresholding of `.npz` files, their metrics, the first of the highest: against ours."""
    from nnunetv2.ensembling.ensemble import average_probabilities
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    rng = np.random.default_rng([fresh_seed, 4, len(labels)])
    rules: LabelRules = read_rules(labels, [1, 2, 3])
    manager = LabelManager(labels, [1, 2, 3])
    references = {f"case_{index}": blobs(rng, 3) for index in range(3)}
    tables: dict[str, dict[str, NDArray[np.float32]]] = {}
    for model in ("2d", "3d_fullres", "3d_lowres"):
        tables[model] = {name: _probabilities(rng, mask, rules) for name, mask in references.items()}
        (tmp_path / model).mkdir()
        for name, table in tables[model].items():
            if model == "3d_lowres":
                # one of ours, which says what its heads mean
                write_probabilities(tmp_path / model / f"{name}.npz", table, GRID, rules)
            else:
                np.savez_compressed(tmp_path / model / f"{name}.npz", probabilities=table)
    candidates = [
        Candidate(model, lambda name, t=table: rules.from_probabilities(t[name]), table.__getitem__) for model, table in tables.items()
    ]
    found = find_best(candidates, list(references), references.__getitem__, rules, True, "nnunet")
    theirs = {}
    for members in found.scores:
        masks = {}
        for name in references:
            average = average_probabilities([str(tmp_path / model / f"{name}.npz") for model in members])
            np.testing.assert_array_equal(average, mean_probabilities([tables[model][name] for model in members]))
            masks[name] = manager.convert_probabilities_to_segmentation(average).astype(np.int16)
        counts = [dice_counts(references[name], masks[name], rules.targets, rules.ignore) for name in sorted(references)]
        theirs[members] = foreground_mean(mean_dice(counts), "nnunet")
    assert found.scores == theirs
    assert found.members == next(members for members in theirs if theirs[members] == max(theirs.values()))
    # the same from files alone: what the labels mean comes from a dataset.json, a data set's own folder or a cohort's table
    folders = {model: tmp_path / model for model in tables}
    for model, table in tables.items():
        for name, probabilities in table.items():
            write_labels(tmp_path / model / f"{name}.nii.gz", rules.from_probabilities(probabilities), GRID)
    masks_folder = write_folder(tmp_path / "data/labelsTr", references)
    (tmp_path / "data/dataset.json").write_text(json.dumps(declared(labels)))
    lines = [f"{name},../data/labelsTr/{name}.nii.gz,../data/labelsTr/{name}.nii.gz" for name in references]
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort/cohort.csv").write_text("\n".join(["id,image,mask", *lines]))
    (tmp_path / "cohort/cohort.json").write_text(
        json.dumps({key: value for key, value in declared(labels).items() if key in ("labels", "regions_class_order")})
    )
    for place in (tmp_path / "data", masks_folder, tmp_path / "cohort"):
        assert select_folders(place, folders, compatibility="nnunet").scores == theirs
    plain = write_folder(tmp_path / "plain", references)
    assert select_folders(plain, folders, tmp_path / "data/dataset.json", compatibility="nnunet").scores == theirs
    members = [tmp_path / model for model in ("2d", "3d_lowres")]
    for path in average_folders(members, tmp_path / "mean", tmp_path / "data/dataset.json"):
        average = average_probabilities([str(model / path.name.replace(".nii.gz", ".npz")) for model in members])
        np.testing.assert_array_equal(read_labels(path)[0], manager.convert_probabilities_to_segmentation(average))


def _probabilities(rng: np.random.Generator, mask: NDArray[np.int16], rules: LabelRules) -> NDArray[np.float32]:
    if rules.has_regions:
        heads = np.stack([np.isin(mask, target) for target in rules.targets]) * 1.0
        return np.clip(0.2 + 0.6 * heads + 0.3 * rng.normal(size=heads.shape), 0, 1).astype(np.float32)
    heads = np.stack([mask == label for label in rules.labels]) * 2.0 + rng.normal(size=(len(rules.labels), *mask.shape))
    return (np.exp(heads) / np.exp(heads).sum(0)).astype(np.float32)


def test_find_best_configuration(fresh_seed: int, nnunet_folders: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their whole command on result folders of two configurations: the same winner, and the same post-processing of it."""
    import nnunetv2.ensembling.ensemble as ensembling
    import nnunetv2.evaluation.find_best_configuration as theirs

    monkeypatch.setattr(
        ensembling, "multiprocessing", __import__("nnunetv2.evaluation.evaluate_predictions", fromlist=["x"]).multiprocessing
    )
    rng = np.random.default_rng([fresh_seed, 5])
    labels = {name: value for name, value in PLAIN.items() if name != "ignore"}
    rules = read_rules(labels)
    dataset = "Dataset997_Select"
    root = nnunet_folders / "results" / dataset
    truth = {f"case_{index}": blobs(rng, 3) for index in range(5)}
    write_folder(nnunet_folders / "preprocessed" / dataset / "gt_segmentations", truth)
    (nnunet_folders / "raw" / dataset).mkdir()
    empty = {"architecture": {}, "patch_size": []}
    plans = PLANS | {"configurations": {name: empty for name in ("2d", "3d_fullres")}, "dataset_name": dataset, "plans_name": "nnUNetPlans"}
    (nnunet_folders / "preprocessed" / dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
    tables: dict[str, dict[str, NDArray[np.float32]]] = {}
    for configuration in ("2d", "3d_fullres"):
        folder = root / f"nnUNetTrainer__nnUNetPlans__{configuration}"
        tables[folder.name] = {}
        for fold, name in enumerate(truth):
            validation = folder / f"fold_{fold}" / "validation"
            validation.mkdir(parents=True)
            table = _probabilities(rng, truth[name], rules)
            tables[folder.name][name] = table
            write_labels(validation / f"{name}.nii.gz", rules.from_probabilities(table), GRID)
            np.savez_compressed(validation / f"{name}.npz", probabilities=table)
            _pickle(validation / f"{name}.pkl", validation / f"{name}.nii.gz")
            (validation / "summary.json").write_text("{}")
        for file, content in (("plans.json", plans), ("dataset.json", declared(labels))):
            (folder / file).write_text(json.dumps(content))
    models = [{"plans": "nnUNetPlans", "configuration": name, "trainer": "nnUNetTrainer"} for name in ("2d", "3d_fullres")]
    said = theirs.find_best_configuration(dataset, models, True, 1, True)
    candidates = [
        Candidate(name, lambda case, t=table: rules.from_probabilities(t[case]), table.__getitem__) for name, table in tables.items()
    ]
    found = find_best(candidates, list(truth), truth.__getitem__, rules, True, "nnunet")
    assert list(said["all_results"].values()) == list(found.scores.values())
    chosen = [
        f"{one['trainer']}__{one['plans_identifier']}__{one['configuration']}"
        for one in said["best_model_or_ensemble"]["selected_model_or_models"]
    ]
    assert tuple(chosen) == found.members

    def load(case: str) -> tuple[Any, Any]:
        parts = [tables[name][case] for name in found.members]
        return truth[case], rules.from_probabilities(mean_probabilities(parts))

    rule = find_postprocessing(list(truth), load, rules.targets, rules.ignore, "nnunet")
    counts = [dice_counts(load(case)[0], rule.apply(load(case)[1]), rules.targets) for case in sorted(truth)]
    assert said["best_model_or_ensemble"]["result_on_crossval_post_pp"] == foreground_mean(mean_dice(counts))


def _pickle(path: Path, mask: Path) -> None:
    """The properties that their ensembling reads to write a mask."""
    import pickle

    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    path.write_bytes(pickle.dumps(SimpleITKIO().read_seg(str(mask))[1]))
