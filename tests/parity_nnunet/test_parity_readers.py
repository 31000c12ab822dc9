"""nnU-Net's readers that turn a file, beside ours: the array, its spacing, cohorts, and a model's masks on the file's own grid."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from model_folders import small_plan, write_model, write_results
from numpy.typing import NDArray

pytest.importorskip("nnunetv2")

from nn_arrays import Labels as Declared
from nn_arrays import dataset_json, managers
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from test_parity_import import predictor_of

from ichbench.cases.cohort import read_cohort
from ichbench.cases.images import read_image, read_labels, reorient, write_labels
from ichbench.inference.inputs import read_case
from ichbench.inference.model import load_model, predict_path
from ichbench.inference.nnunet_export import export_nnunet
from ichbench.inference.nnunet_import import import_nnunet
from ichbench.prepare.pipeline import prepare_case
from ichbench.prepare.survey import cohort_fingerprint
from ichbench.recipe import PrepareRecipe

torch.set_num_threads(1)
#: weights whose masks of noise are neither empty nor full
EVEN = 4
READERS: dict[str, Any] = {"NibabelIOWithReorient": NibabelIOWithReorient, "SimpleITKIOWithReorient": SimpleITKIOWithReorient}


def directions(rng: np.random.Generator, n: int) -> Iterator[NDArray[np.float64]]:
    """All 48 ways to lie along the patient's axes, then n that are oblique: a few degrees, and any."""
    for rows, signs in itertools.product(itertools.permutations(range(3)), itertools.product([1.0, -1.0], repeat=3)):
        yield np.eye(3)[list(rows)] * signs
    for number in range(n):
        tilted = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))[0]
        plain = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        yield tilted @ plain if number % 2 else np.linalg.qr(rng.normal(size=(3, 3)))[0]


def affine_of(rng: np.random.Generator, direction: NDArray[np.float64]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = direction * np.exp(rng.uniform(-0.7, 1.6, 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def write(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64], rng: np.random.Generator) -> Path:
    """Either form or both."""
    image = nibabel.Nifti1Image(voxels, affine)
    form = int(rng.integers(3))
    image.set_qform(affine if form < 2 else None, 1 if form < 2 else 0)
    image.set_sform(affine if form != 1 else None, 2 if form != 1 else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_voxels_and_spacing(reader: str, fresh_seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([fresh_seed, 1])
    recipe = PrepareRecipe(compatibility="nnunet", reorient=reader)  # type: ignore[arg-type]
    for number, direction in enumerate(directions(rng, 60)):
        said = f"seed {fresh_seed}, {number}"
        shape = rng.integers(1, 8, 3)
        path = write(tmp_path / "a_0000.nii.gz", rng.integers(-99, 999, shape).astype(np.int16), affine_of(rng, direction), rng)
        data, properties = READERS[reader]().read_images((str(path),))
        case, _ = read_case("a", [path], recipe, None)
        np.testing.assert_array_equal(case.image_czyx, data, err_msg=said)
        assert list(case.grid.spacing_zyx_mm) == [float(value) for value in properties["spacing"]], said
        # a mask goes back to the file's own grid, as theirs does
        mask = rng.integers(0, 5, data.shape[1:])
        write_labels(tmp_path / "ours.nii.gz", mask, case.grid)
        READERS[reader]().write_seg(mask, str(tmp_path / "theirs.nii.gz"), properties)
        ours, theirs, source = (nibabel.load(tmp_path / name) for name in ("ours.nii.gz", "theirs.nii.gz", path.name))
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj), err_msg=said)
        np.testing.assert_array_equal(ours.affine, source.affine, err_msg=said)
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3, err_msg=said)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_says_nothing_of_directions(reader: str, fresh_seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([fresh_seed, 2])
    image = nibabel.Nifti1Image(rng.integers(0, 99, (3, 4, 5)).astype(np.int16), np.diag([1.5, 0.5, 2.0, 1.0]))
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    data, properties = READERS[reader]().read_images((str(tmp_path / "a.nii.gz"),))
    with pytest.warns(UserWarning, match=f"without sform and qform .* as nnU-Net's {reader}"):
        (turned,), grid = reorient([read_image(tmp_path / "a.nii.gz")[0]], read_image(tmp_path / "a.nii.gz")[1], "a", reader)
    np.testing.assert_array_equal(turned, data[0])
    assert list(grid.spacing_zyx_mm) == [float(value) for value in properties["spacing"]]


@pytest.mark.parametrize("reader", READERS)
def test_channels_that_are_stored_in_two_ways(reader: str, fresh_seed: int, tmp_path: Path) -> None:
    """Each file is turned by its own affine; the mask is written as the first lies."""
    rng = np.random.default_rng([fresh_seed, 3])
    affine = affine_of(rng, np.eye(3))
    first = nibabel.Nifti1Image(rng.normal(size=(4, 5, 6)).astype(np.float32), affine)
    nibabel.save(first, tmp_path / "a_0000.nii.gz")
    other = nibabel.Nifti1Image(rng.normal(size=(4, 5, 6)).astype(np.float32), affine)
    nibabel.save(other.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]])), tmp_path / "a_0001.nii.gz")
    files = [tmp_path / f"a_{channel:04d}.nii.gz" for channel in range(2)]
    recipe = PrepareRecipe(compatibility="nnunet", reorient=reader)  # type: ignore[arg-type]
    data, _ = READERS["NibabelIOWithReorient"]().read_images([str(path) for path in files]) if "Nib" in reader else (None, None)
    case, _ = read_case("a", files, recipe, None)
    expected = np.stack([np.asarray(image.dataobj).transpose() for image in (first, other)]) if data is None else data
    np.testing.assert_array_equal(case.image_czyx, expected)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
def test_masks_of_a_model(reader: str, transpose: tuple[int, int, int], fresh_seed: int, tmp_path: Path) -> None:
    """A result folder whose plans name the reader: imported, its masks are nnU-Net's, voxel for voxel, on the file's own grid.

    Both sides run the very same torch module, so that what differs is reading, preparing and writing alone.
    """
    plan = small_plan(transpose=transpose)
    folder = write_results(tmp_path / "nn", plan, seed=EVEN)
    plans = json.loads((folder / "plans.json").read_text()) | {"image_reader_writer": reader}
    (folder / "plans.json").write_text(json.dumps(plans))
    model = load_model(import_nnunet(folder, tmp_path / "model").folder)
    predictor = predictor_of(folder, ("0",))
    model = replace(model, tools=replace(model.tools, networks=(predictor.network.eval(),)))
    rng = np.random.default_rng([fresh_seed, 4, *transpose])
    found = list(directions(rng, 4))
    chosen = [*rng.permutation(48)[:4], *range(48, 52)]
    plain = 0
    for number in chosen:
        said = f"seed {fresh_seed}, {number}"
        affine = np.eye(4)
        affine[:3, :3] = found[number] * rng.uniform(0.8, 1.3, 3) * rng.permutation([1.0, 1.0, 4.0])
        shape = rng.integers(9, 30, 3)
        path = write(tmp_path / f"images/c{number}_0000.nii.gz", (rng.normal(size=shape) * 25 + 40).astype(np.float32), affine, rng)
        theirs = tmp_path / f"theirs/c{number}"
        theirs.parent.mkdir(exist_ok=True)
        predictor.predict_from_files_sequential([[str(path)]], [str(theirs)])
        (done,) = predict_path(model, path, tmp_path / "ours")
        ours, source = nibabel.load(done.path), nibabel.load(path)
        expected = np.asarray(nibabel.load(f"{theirs}.nii.gz").dataobj)
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(np.asarray(ours.dataobj), expected, err_msg=said)
        np.testing.assert_array_equal(ours.affine, source.affine)
        # the turn matters: without it other voxels are marked
        straight = replace(model, tools=replace(model.tools, prepare=PrepareRecipe(compatibility="nnunet")))
        (other,) = predict_path(straight, path, tmp_path / "straight")
        plain += bool((np.asarray(nibabel.load(other.path).dataobj) != expected).any())
    assert plain >= len(chosen) - 3


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("compatibility", ["nnunet", "ichbench"])
def test_what_is_exported_predicts_there_as_here(reader: str, compatibility: str, fresh_seed: int, tmp_path: Path) -> None:
    prepare = {"compatibility": compatibility, "reorient": reader}
    overlay = {"prepare": prepare, "inference": {"compatibility": compatibility, "mirror": False}}
    model = write_model(tmp_path / "model", small_plan(), overlay=overlay, seed=EVEN)
    done = export_nnunet(model, tmp_path / "out")
    assert not any("axes of a file as they lie" in note for note in done.notes)
    predictor = predictor_of(done.folder, (0,))
    rng = np.random.default_rng([fresh_seed, 5])
    affine = affine_of(rng, np.eye(3)[[2, 0, 1]] * [-1, 1, -1])
    affine[:3, :3] = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))[0] @ np.eye(3)[[2, 0, 1]] * [-1.0, 1.1, -4.0]
    path = write(tmp_path / "a_0000.nii.gz", (rng.normal(size=(18, 25, 9)) * 25 + 40).astype(np.float32), affine, rng)
    predictor.predict_from_files_sequential([[str(path)]], [str(tmp_path / "theirs")])
    used = load_model(model)
    (mask,) = predict_path(used, path, tmp_path / "ours")
    ours, theirs = read_labels(mask.path)[0], read_labels(tmp_path / "theirs.nii.gz")[0]
    assert len(np.unique(theirs)) > 1
    # our own network, and our own sums, answer a little apart: this is noise, in which a voxel may be decided otherwise
    assert float((ours != theirs).mean()) <= 0.01
    straight = replace(used, tools=replace(used.tools, prepare=PrepareRecipe(compatibility="nnunet")))
    (mask,) = predict_path(straight, path, tmp_path / "straight")
    assert float((read_labels(mask.path)[0] != theirs).mean()) > 0.05


@pytest.mark.parametrize("reader", READERS)
def test_a_cohort_that_names_it(reader: str, fresh_seed: int, tmp_path: Path) -> None:
    """Cases stored in all ways: fingerprint to the last digit, prepared arrays within 1e-4, labels equal."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    rng = np.random.default_rng([fresh_seed, 6])
    folder, found = tmp_path / "Dataset744_Turned", list(directions(rng, 4))
    facts: dict[str, list[Any]] = {"spacings": [], "shapes_after_crop": []}
    for number in range(6):
        affine = affine_of(rng, found[int(rng.integers(48))] if number < 4 else found[48 + number - 4])
        voxels = (rng.normal(size=rng.integers(8, 20, 3)) * 20 + 40).astype(np.float32)
        for place, values in (("imagesTr", voxels), ("labelsTr", (voxels > 60).astype(np.uint8))):
            name = f"c{number}{'_0000' if place == 'imagesTr' else ''}.nii.gz"
            write(folder / place / name, values, affine, np.random.default_rng([fresh_seed, number]))
    declared = Declared({"background": 0, "bleed": 1})
    table = {**dataset_json(declared), "numTraining": 6, "channel_names": {"0": "CT"}, "overwrite_image_reader_writer": reader}
    (folder / "dataset.json").write_text(json.dumps(table))
    cohort = read_cohort(folder, reorient=reader)
    recipe = PrepareRecipe(compatibility="nnunet", reorient=reader)  # type: ignore[arg-type]
    measured = cohort_fingerprint(cohort, cohort.train_ids, recipe)
    for name in cohort.train_ids:
        shape, spacing, *_ = DatasetFingerprintExtractor.analyze_case(
            [str(folder / f"imagesTr/{name}_0000.nii.gz")], str(folder / f"labelsTr/{name}.nii.gz"), READERS[reader], 1000
        )
        facts["shapes_after_crop"].append(tuple(shape))
        facts["spacings"].append(tuple(float(value) for value in spacing))
    assert [tuple(spacing) for spacing in measured.spacings] == facts["spacings"]
    # their list begins with the crop's shape
    assert [tuple(shape) for shape in measured.shapes_after_crop] == facts["shapes_after_crop"]
    plan = replace(small_plan(transpose=(1, 0, 2)), spacing=(1.3, 0.9, 1.1))
    manager, configuration = managers(plan, reader)
    for name in cohort.train_ids:
        files = [str(folder / f"imagesTr/{name}_0000.nii.gz")]
        data, seg, _ = DefaultPreprocessor(verbose=False).run_case(
            files, str(folder / f"labelsTr/{name}.nii.gz"), manager, configuration, table
        )
        for keep in (True, False):
            prepared = prepare_case(cohort.load(name, keep_file_order=keep), recipe, plan)
            np.testing.assert_allclose(prepared.image_czyx, data, atol=1e-4)
            assert prepared.labels_zyx is not None
            np.testing.assert_array_equal(prepared.labels_zyx, seg[0])


def test_a_file_whose_forms_differ(fresh_seed: int, tmp_path: Path) -> None:
    """nibabel takes the sform; ITK takes either, so that for its reader such a file is refused."""
    from ichbench.errors import InputError

    rng = np.random.default_rng([fresh_seed, 7])
    image = nibabel.Nifti1Image(rng.normal(size=(3, 4, 5)).astype(np.float32), np.eye(4))
    image.set_qform(np.diag([1.0, -1.0, 1.0, 1.0]), 1)
    image.set_sform(np.diag([-1.0, 1.0, 1.0, 1.0]), 2)
    path = tmp_path / "a.nii.gz"
    nibabel.save(image, path)
    data, _ = NibabelIOWithReorient().read_images((str(path),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case, _ = read_case("a", [path], PrepareRecipe(reorient="NibabelIOWithReorient"), None)
    np.testing.assert_array_equal(case.image_czyx, data)
    with pytest.raises(InputError, match="its sform and its qform let its axes run to different sides"):
        read_case("a", [path], PrepareRecipe(reorient="SimpleITKIOWithReorient"), None)
