"""Prepared arrays and the way back, voxel by voxel against nnunetv2's DefaultPreprocessor and export.

Equal means: images within 1e-4 (nearly always bit for bit), the same labels, bounding boxes, shapes and class locations,
and the same labels from the same logits, in float32 and float16. Each run draws other cases; with ICHBENCH_PARITY_ALL=1 all of
Dataset501_PHE take part, which lasts some minutes. What is left out: cases that nnU-Net rounds to an axis
without voxels, where it fails, and sheared files, which ITK does not read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nnunetv2")

import nibabel
import torch
from nn_arrays import (
    FILE_ORDER,
    Labels,
    a_plan,
    check,
    dataset_json,
    leaves_nothing,
    managers,
    ours,
    random_case,
    random_logits,
    their_way_back,
    theirs,
)
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from ichbench.cases.case import Case
from ichbench.cases.cohort import read_cohort
from ichbench.cases.images import read_image, write_image, write_labels
from ichbench.cases.phantom import make_case
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.pipeline import Prepared, flagged_case, prepare_case, restore_logits
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import PlanRecipe

BLEED = Labels({"background": 0, "bleed": 1})


@pytest.mark.parametrize("block", range(4))
def test_random_cases_there_and_back(block: int, fresh_seed: int) -> None:
    for number in range(30):
        rng = np.random.default_rng([fresh_seed, block, number])
        case, plan, labels, what = random_case(rng)
        if leaves_nothing(case, plan):
            continue
        try:
            _, properties, prepared = check(case, plan, labels)
            _check_way_back(rng, case, plan, labels, properties, prepared)
        except AssertionError as error:
            pytest.fail(f"seed [{fresh_seed}, {block}, {number}]: {what}\n{error}")


@pytest.mark.parametrize("index", range(1))
def test_full_size_phantoms_with_odd_spacings(index: int, fresh_seed: int, tmp_path: Path) -> None:
    """Through files with oblique affines and permuted axes: nnU-Net reads and prepares the file, we read and prepare the file."""
    rng = np.random.default_rng([fresh_seed, index])
    case = make_case(index, "full", fresh_seed % 1000).case
    image_file, label_file = _written_askew(rng, case, tmp_path)
    spacing = np.asarray(read_image(image_file, keep_file_order=True)[1].spacing_zyx_mm)
    coarse = int(np.argmax(spacing))
    forward = [coarse, *(axis for axis in range(3) if axis != coarse)]
    target = spacing[forward] * [rng.choice([1.0, 0.83]), *(rng.uniform(0.85, 1.35) * np.ones(2))]
    facts = {"0": {"mean": 55.5, "std": 21.25, "percentile_00_5": 4.0, "percentile_99_5": 103.5}}
    plan = a_plan(target, forward, facts=facts)
    _check_files(rng, image_file, label_file, plan, BLEED)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_small_files_of_every_orientation(ending: str, fresh_seed: int, tmp_path: Path) -> None:
    """Voxels and spacing as SimpleITKIO (.nii.gz) and NibabelIO (.nii) read them: any axes, oblique too, either form, scaled values."""
    reader = (SimpleITKIO if ending == ".nii.gz" else NibabelIO)()
    for number in range(40):
        rng = np.random.default_rng([fresh_seed, number])
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] if rng.random() < 0.6 else np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        affine = np.eye(4)
        affine[:3, :3] = turn * np.exp(rng.uniform(-1.5, 2, 3))
        affine[:3, 3] = rng.uniform(-200, 200, 3)
        dtype = [np.int16, np.uint8, np.float32, np.float64][rng.integers(4)]
        image = nibabel.Nifti1Image((rng.normal(size=rng.integers(1, 9, 3)) * 30 + 60).astype(dtype), affine)
        form = rng.integers(3)
        if form < 2:
            image.set_qform(affine, 1)
        if form != 1:
            image.set_sform(affine, 1)
        else:
            image.set_sform(None, 0)
        if dtype == np.int16 and rng.random() < 0.5:
            image.header.set_slope_inter(0.37, -12.5)
        path = tmp_path / f"image{ending}"
        nibabel.save(image, path)
        data, properties = reader.read_images((str(path),))
        voxels, grid = read_image(path, keep_file_order=True)
        np.testing.assert_array_equal(voxels, data[0], err_msg=f"seed [{fresh_seed}, {number}]")
        assert list(map(float, properties["spacing"])) == list(grid.spacing_zyx_mm), f"seed [{fresh_seed}, {number}]"


@pytest.mark.parametrize("resampled", [False, True])
def test_every_hippocampus(shared_data: Path, resampled: bool) -> None:
    folder = shared_data / "Dataset004_Hippocampus"
    spacing = (1.3, 0.7, 0.9) if resampled else (1.0, 1.0, 1.0)
    plan = a_plan(spacing, schemes=("ZScoreNormalization",))
    labels = Labels(json.loads((folder / "dataset.json").read_text())["labels"])
    for image_file, label_file in _pairs(folder):
        _check_files(np.random.default_rng(0), image_file, label_file, plan, labels)


def test_edema(shared_data: Path, fresh_seed: int) -> None:
    """Real heads at their own spacing and resampled, with the plan that our planner makes of some."""
    folder = shared_data / "Dataset501_PHE"
    labels = Labels(json.loads((folder / "dataset.json").read_text())["labels"])
    cohort = read_cohort(folder)
    found = fingerprint(flagged_case(cohort.load(name, True), FILE_ORDER)[0] for name in cohort.train_ids[:3])
    plan = make_plan(found, PlanRecipe(), cohort.channel_names, len(labels.table), len(cohort.train_ids))
    pairs = _pairs(folder)
    assert len(pairs) == 43
    rng = np.random.default_rng(fresh_seed)
    chosen = rng.permutation(len(pairs))[: None if os.environ.get("ICHBENCH_PARITY_ALL") else 5]
    for number, which in enumerate(chosen):
        _check_files(rng, *pairs[which], plan, labels, back=False)
        if number % 3 == 0:
            spacing = (float(rng.choice([5.0, 4.1])), *rng.uniform(0.45, 0.7, 2))
            _check_files(rng, *pairs[which], replace(plan, spacing=spacing), labels)


def test_regions_ignore_and_several_channels_of_one_size(fresh_seed: int) -> None:
    """The 10,000 voxels and the 1 % of the locations, which need more voxels than the small cases have."""
    rng = np.random.default_rng(fresh_seed)
    shape = (40, 190, 170)
    grid = replace(make_case(0, "small", 0).case.grid, shape_zyx=shape, pixdim_zyx_mm=(3.0, 0.75, 0.75), header=None)
    image = rng.normal(size=(2, *shape)).astype(np.float32)
    segmentation = rng.choice(4, size=shape, p=[0.02, 0.05, 0.9, 0.03]).astype(np.int16)
    table = {"background": 0, "whole": [1, 2], "core": [2], "plain": 1, "ignore": 3}
    labels = Labels(table, (1, 2, 1))
    schemes = ("ZScoreNormalization", "RescaleTo01Normalization")
    plan = a_plan((3.0, 0.7, 0.8), schemes=schemes, masked=(True, False))
    _, properties, prepared = check(Case("large", image, segmentation, grid), plan, labels)
    assert [len(prepared.foreground[key]) for key in [(1, 2), (-1, 0, 1, 2)]] == [
        len(properties["class_locations"][key]) for key in [(1, 2), (-1, 0, 1, 2)]
    ]
    assert len(prepared.foreground[(1, 2)]) > 10_000


def test_ties_of_labels_and_of_half_precision() -> None:
    """Doubling and tripling put output voxels exactly between labels, and logits exactly between two half-precision numbers."""
    rng = np.random.default_rng(5)
    for shape, spacing, target in (
        ((6, 12, 10), (1, 1, 1), (0.5, 0.5, 0.5)),
        ((4, 12, 9), (6, 1, 1), (6, 2 / 3, 1 / 3)),
        ((5, 9, 9), (1, 1, 1), (1.5, 1.5, 3)),
    ):
        grid = replace(make_case(0, "small", 0).case.grid, shape_zyx=shape, pixdim_zyx_mm=tuple(map(float, spacing)), header=None)
        segmentation = rng.integers(0, 5, shape).astype(np.int16)
        case = Case("ties", rng.integers(0, 9, (1, *shape)).astype(np.float32) + 1, segmentation, grid)
        labels, plan = Labels({"background": 0, **{str(i): i for i in range(1, 5)}}), a_plan(target)
        _, properties, prepared = check(case, plan, labels)
        for _ in range(20):
            logits = rng.integers(-64, 64, (5, *prepared.geometry.shape)).astype(np.float16) * np.float16(rng.choice([1, 0.0078125]))
            expected = their_way_back(torch.from_numpy(logits), plan, labels, properties)
            np.testing.assert_array_equal(restore_logits(logits, prepared.geometry), expected)


def test_logits_as_arrays_tensors_and_regions_beside_one_half() -> None:
    """A region needs a probability above one half in float32: scores of half precision next to 0 tell > from >=."""
    grid = replace(make_case(0, "small", 0).case.grid, shape_zyx=(3, 8, 8), pixdim_zyx_mm=(1.0, 1.0, 1.0), header=None)
    case = Case("r", np.ones((1, 3, 8, 8), np.float32), np.ones((3, 8, 8), np.int16), grid)
    labels, plan = Labels({"background": 0, "a": [1, 2], "b": [2]}, (1, 2)), a_plan((1.0, 1.0, 1.0))
    _, _, properties = theirs(case, plan, labels)
    prepared = ours(case, plan, labels)
    logits = (np.arange(-192, 192).reshape(2, 3, 8, 8) * 2.0**-24).astype(np.float16)
    for given in (logits, logits.astype(np.float32) * np.float32(0.7)):
        expected = their_way_back(torch.from_numpy(given), plan, labels, properties)
        np.testing.assert_array_equal(restore_logits(given, prepared.geometry, (1, 2)), expected)
        np.testing.assert_array_equal(their_way_back(given, plan, labels, properties), expected)


def _check_way_back(
    rng: np.random.Generator, case: Case, plan: Plan, labels: Labels, properties: dict[str, object], prepared: Prepared
) -> None:
    order = labels.regions_class_order
    heads = len(order) if order is not None else sum(name != "ignore" for name in labels.table)
    to_file = [case.grid.file_axes.index(axis) for axis in (2, 1, 0)]
    for half in (False, True):
        logits = random_logits(rng, heads, prepared.geometry.shape, half)
        expected = their_way_back(torch.from_numpy(logits.copy()), plan, labels, properties)
        np.testing.assert_array_equal(restore_logits(logits, prepared.geometry, order).transpose(to_file), expected)


def _check_files(rng: np.random.Generator, image: Path, label: Path, plan: Plan, labels: Labels, back: bool = True) -> None:
    """nnU-Net reads and prepares the files; we do it twice, keeping file order and by the axis rule, which must not matter."""
    manager, configuration = managers(plan)
    with contextlib.redirect_stdout(io.StringIO()):
        table = dataset_json(labels)
        data, seg, properties = DefaultPreprocessor(verbose=False).run_case([str(image)], str(label), manager, configuration, table)
    for keep in (True, False):
        (voxels, grid), (segmentation, _) = read_image(image, keep), read_image(label, keep)
        case = Case(image.name, voxels[None], segmentation.astype(np.int16), grid)
        prepared = prepare_case(case, FILE_ORDER, plan, labels.classes)
        assert [list(span) for span in prepared.geometry.box] == [list(span) for span in properties["bbox_used_for_cropping"]], image
        assert prepared.image_czyx.shape == data.shape, image
        assert float(np.abs(prepared.image_czyx - data).max()) <= 1e-4, image
        np.testing.assert_array_equal(prepared.labels_zyx, seg[0], err_msg=str(image))
        for key, found in properties["class_locations"].items():
            np.testing.assert_array_equal(prepared.foreground[key], np.reshape(found, (-1, 4))[:, 1:], err_msg=str(image))
        if back:
            _check_way_back(rng, case, plan, labels, properties, prepared)
            back = False  # once is enough for the slow part


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    found = [
        (image, folder / f"labels{part}" / re.sub(r"_0000\.", ".", image.name))
        for part in ("Tr", "Ts")
        for image in sorted((folder / f"images{part}").glob("*_0000.nii.gz"))
    ]
    return [(image, label) for image, label in found if label.is_file()]


def _written_askew(rng: np.random.Generator, case: Case, folder: Path) -> tuple[Path, Path]:
    """The case in files whose axes are permuted, flipped and turned, with spacings that float32 rounds."""
    image_file, label_file = folder / "image.nii.gz", folder / "label.nii.gz"
    write_image(image_file, case.image_czyx[0], case.grid)
    write_labels(label_file, np.asarray(case.labels_zyx), case.grid)
    order = rng.permutation(3)
    angle = rng.uniform(-0.3, 0.3, 2)
    turn = np.array([[np.cos(angle[0]), -np.sin(angle[0]), 0], [np.sin(angle[0]), np.cos(angle[0]), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(angle[1]), -np.sin(angle[1])], [0, np.sin(angle[1]), np.cos(angle[1])]])
    for path in (image_file, label_file):
        old = nibabel.load(path)
        spacing = (np.array(old.header.get_zooms()) * [1.0137, 1.0137, 0.9871])[order]
        affine = np.eye(4)
        affine[:3, :3] = turn[:, order] * np.array([-1, 1, -1])[order] * spacing
        voxels = np.asarray(old.dataobj).transpose(order)
        new = nibabel.Nifti1Image(voxels, affine)
        new.set_qform(affine, 1)
        nibabel.save(new, path)
    return image_file, label_file
