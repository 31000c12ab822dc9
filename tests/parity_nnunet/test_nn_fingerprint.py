"""Fingerprints against nnunetv2's own extractor: drawn data sets and real cases, the whole file character by character."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("nnunetv2")

from ichbench.cases.cohort import read_cohort
from ichbench.prepare.fingerprint import Fingerprint, combine
from ichbench.prepare.survey import cohort_fingerprint
from ichbench.recipe import PrepareRecipe

NNUNET = PrepareRecipe(compatibility="nnunet")
N_SAMPLES = 300_000


@pytest.fixture(autouse=True, scope="module")
def processes_that_start_at_once() -> Iterator[None]:
    """nnunetv2 spawns its workers, and each imports torch anew; forked ones do the same work at once."""
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor as module

    class Forking:
        get_context = staticmethod(lambda _: multiprocessing.get_context("fork"))

    before, module.multiprocessing = module.multiprocessing, Forking
    yield
    module.multiprocessing = before


def theirs(folders: Path, name: str, n_samples: int | None = None) -> str:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    extractor = DatasetFingerprintExtractor(name, num_processes=2)
    extractor.show_progress_bar = False
    if n_samples is not None:
        extractor.num_foreground_voxels_for_intensitystats = n_samples
    extractor.run(overwrite_existing=True)
    return (folders / "preprocessed" / name / "dataset_fingerprint.json").read_text()


def ours(folders: Path, name: str, monkeypatch: pytest.MonkeyPatch, n_samples: int | None = None, workers: int = 2) -> str:
    if n_samples is not None:
        monkeypatch.setattr("ichbench.prepare.survey.combine", lambda facts, sampled, workers: combine(facts, sampled, n_samples, workers))
    cohort = read_cohort(folders / "raw" / name)
    return cohort_fingerprint(cohort, cohort.train_ids, NNUNET, workers).to_text()


def write_data_set(folder: Path, rng: np.random.Generator) -> None:
    """Odd shapes, spacings, orientations and voxel types; borders and whole images of zeros; cases without foreground."""
    n_channels, n_labels = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    ignore = bool(rng.random() < 0.5)
    dtype = rng.choice([np.int16, np.uint8, np.float32])
    n_cases = int(rng.integers(1, 6))
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    affine = np.eye(4)
    affine[:3, :3] = np.diag(rng.choice([-1.0, 1.0], 3))[rng.permutation(3)]
    for number in range(n_cases):
        shape = tuple(int(n) for n in rng.integers(1, 40, 3))
        if rng.random() < 0.2:
            shape = (*shape[:2], 1)
        spacing = np.float32(np.exp(rng.uniform(-1.5, 2, 3)))
        labels = rng.integers(0, n_labels + ignore, shape) * (rng.random(shape) < 0.3)
        if number > 0 and rng.random() < 0.3:
            labels[:] = 0
        if number == 0:
            labels.ravel()[0] = 1
        values = rng.normal(60, 40, (n_channels, *shape)) if rng.random() < 0.8 else np.zeros((n_channels, *shape))
        values = np.clip(values, 0, 250) if dtype == np.uint8 else values
        for axis in range(1, 4):
            cut = int(rng.integers(0, 1 + values.shape[axis] // 3))
            np.moveaxis(values, axis, 0)[:cut] = 0
            if rng.random() < 0.5 and values.shape[axis] > 2 * cut:
                np.moveaxis(values, axis, 0)[values.shape[axis] - cut :] = 0
        placed = affine @ np.diag([*spacing, 1.0])
        if rng.random() < 0.5:
            angle = rng.uniform(-0.4, 0.4)
            turn = np.eye(4)
            turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            placed = turn @ placed
        for channel in range(n_channels):
            image = nibabel.Nifti1Image(values[channel].astype(dtype), placed)
            image.header.set_zooms([float(value) for value in spacing])
            if number % 3 == 1 and dtype == np.int16:
                image.header.set_slope_inter(float(rng.choice([0.5, 2.0, 0.1])), float(rng.choice([0.0, -1024.0, 7.25])))
            nibabel.save(image, folder / "imagesTr" / f"case{number:02d}_{channel:04d}.nii.gz")
        mask = nibabel.Nifti1Image(labels.astype(np.uint8), placed)
        mask.header.set_zooms([float(value) for value in spacing])
        nibabel.save(mask, folder / "labelsTr" / f"case{number:02d}.nii.gz")
    names: dict[str, Any] = {"background": 0} | {f"l{value}": value for value in range(1, n_labels)}
    names |= {"ignore": n_labels} if ignore else {}
    channels = {str(index): "CT" if index == 0 else "MR" for index in range(n_channels)}
    described = {"channel_names": channels, "labels": names, "numTraining": n_cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))


def test_drawn_data_sets(nnunet_folders: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng([fresh_seed, 1])
    for number in range(12):
        name = f"Dataset{910 + number}_Drawn"
        write_data_set(nnunet_folders / "raw" / name, rng)
        n_samples = int(rng.integers(1000, N_SAMPLES))
        assert ours(nnunet_folders, name, monkeypatch, n_samples) == theirs(nnunet_folders, name, n_samples), (number, n_samples)


@pytest.mark.parametrize(("name", "n_cases"), [("Dataset501_PHE", 3), ("Dataset004_Hippocampus", 8)])
def test_real_cases_with_all_samples(
    nnunet_folders: Path, shared_data: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, n_cases: int
) -> None:
    """With nnU-Net's own 1e8 draws; which cases, is drawn anew."""
    source, target = shared_data / name, nnunet_folders / "raw" / name
    ids = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").glob("*.nii.gz"))
    chosen = np.random.default_rng([fresh_seed, 2]).choice(ids, n_cases, replace=False)
    for sub in ("imagesTr", "labelsTr"):
        (target / sub).mkdir(parents=True)
        for path in (source / sub).iterdir():
            if path.name.startswith(tuple(chosen)):
                shutil.copy(path, target / sub)
    described = json.loads((source / "dataset.json").read_text()) | {"numTraining": n_cases}
    (target / "dataset.json").write_text(json.dumps(described))
    expected = theirs(nnunet_folders, name)
    assert ours(nnunet_folders, name, monkeypatch) == expected, list(chosen)
    assert Fingerprint.from_json(json.loads(expected)).to_text() == expected
    check_command(nnunet_folders, name, tmp_path)


def check_command(folders: Path, name: str, out: Path) -> None:
    """`ichbench plan --out` writes what nnunetv2 has written by the time its planners are done, and nothing else."""
    import torch
    from nn_planners import planners

    from ichbench.cli import app

    measured = folders / "preprocessed" / name / "dataset_fingerprint.json"
    for family in ("plain", "resenc_l"):
        with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
            planners()[family](name).plan_experiment()
        arguments = ["--fingerprint", str(measured), "--family", family, "--compatibility", "nnunet", "--out", str(out)]
        done = CliRunner().invoke(app, ["plan", str(folders / "raw" / name), *arguments])
        assert done.exit_code == 0, done.exception
    written, expected = ({path.name: path.read_text() for path in place.iterdir()} for place in (out, measured.parent))
    assert json.loads(written.pop("dataset.json")) == json.loads(expected.pop("dataset.json"))
    assert written == expected


def test_regions_with_all_files(nnunet_folders: Path, fresh_seed: int, tmp_path: Path) -> None:
    """A region is one label in nnU-Net's memory estimate: with seven counted instead of two, batches come out smaller."""
    rng = np.random.default_rng([fresh_seed, 3])
    name = "Dataset930_Regions"
    folder = nnunet_folders / "raw" / name
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for number in range(4):
        shape = (160, 170, 150)
        labels = np.zeros(shape, dtype=np.uint8)
        labels[50:90, 50:90, 50:90] = rng.integers(1, 8, (40, 40, 40))
        image = rng.integers(1, 50, shape).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / f"imagesTr/c{number}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / f"labelsTr/c{number}.nii.gz")
    regions = {"background": 0, "whole": [1, 2, 3, 4, 5, 6, 7], "core": [2, 3]}
    described: dict[str, Any] = {"channel_names": {"0": "T1"}, "labels": regions, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(described | {"numTraining": 4, "file_ending": ".nii.gz"}))
    theirs(nnunet_folders, name, 100_000)
    check_command(nnunet_folders, name, tmp_path)
