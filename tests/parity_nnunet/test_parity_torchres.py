"""nnU-Net's torch resampling, which its planners named torchres ask for: prepared arrays, labels and the way back, beside ours.

On processors that fuse products into sums all is equal bit for bit, but for stacks of slices of height + width up to 128, which torch
adds in another order there. What a last bit decides (two labels or classes just as high) may then be decided otherwise.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import small_plan, write_results

pytest.importorskip("nnunetv2")

from nn_arrays import Labels, a_plan, dataset_json, leaves_nothing, managers, ours, random_case, random_logits
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as their_way_back
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage
from test_parity_import import predictor_of

from ichbench.cases.case import Case, Grid
from ichbench.cases.cohort import read_cohort
from ichbench.cases.images import read_labels, write_image
from ichbench.cases.labels import read_rules
from ichbench.inference.ensemble import native_probabilities
from ichbench.inference.model import load_model, predict_path
from ichbench.inference.nnunet_import import import_nnunet
from ichbench.prepare.pipeline import restore_logits
from ichbench.prepare.plan import Plan
from ichbench.prepare.plans_json import TORCH_RESAMPLER, TORCH_SEPARATE, resampling_settings
from ichbench.prepare.resample import Resampling, resample_image, resample_labels

torch.set_num_threads(1)
#: seen on AVX2; CI may pin something older
FUSED = torch.backends.cpu.get_cpu_capability() == "AVX2"
#: without fused products torch's places are off by another rounding, which raw grey values that rise by tens a voxel show
TOLERANCE = 1e-4 if FUSED else 1e-2
#: probabilities of logits of some hundreds, where a last bit is 3e-5
CLOSE = 1e-4 if FUSED else 1e-3
HOW: tuple[Resampling, ...] = ("torch", "torch_sepz")


def allowed(how: Resampling) -> float:
    """Share of voxels of noise that a last bit may decide otherwise."""
    if FUSED:
        return 0 if how == "torch" else 1e-5
    return 2e-4


def with_torch(table: dict[str, Any], how: Resampling) -> dict[str, Any]:
    """A configuration of a plans file as those planners write it."""
    for kind in ("data", "seg", "probabilities"):
        table[f"resampling_fn_{kind}"] = TORCH_RESAMPLER
        table[f"resampling_fn_{kind}_kwargs"] = resampling_settings(kind, how)
    return table


def torch_managers(plan: Plan) -> tuple[PlansManager, Any]:
    manager, _ = managers(plan)
    plans = json.loads(json.dumps(manager.plans))
    with_torch(plans["configurations"]["it"], plan.resampling)
    manager = PlansManager(plans)
    return manager, manager.get_configuration("it")


def arrays_of(case: Case, plan: Plan, labels: Labels) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    order = [case.grid.file_axes.index(axis) for axis in (2, 1, 0)]
    image = np.ascontiguousarray(case.image_czyx.transpose(0, *(axis + 1 for axis in order)))
    seg = None if case.labels_zyx is None else np.ascontiguousarray(case.labels_zyx.transpose(order)).astype(np.float32)[None]
    properties: dict[str, Any] = {"spacing": [case.grid.spacing_zyx_mm[axis] for axis in order]}
    table = dataset_json(labels, len(image))
    return DefaultPreprocessor(verbose=False).run_case_npy(image, seg, properties, *torch_managers(plan), table)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", HOW)
def test_the_function_itself(how: Resampling, fresh_seed: int) -> None:
    """Any shapes to any, also the same on some axes; labels with -1, many of them, and up to 300."""
    compared = different = 0
    for number in range(150):
        rng = np.random.default_rng([fresh_seed, number])
        shape, new = rng.integers(1, 40, 3), rng.integers(1, 40, 3)
        if number % 10 == 9:
            shape, new = rng.integers([2, 60, 60], [9, 90, 90]), rng.integers([2, 66, 66], [9, 90, 90])
        if number % 4 == 0:
            new[rng.integers(3)] = shape[rng.integers(3)]
        if number % 5 == 0:
            axis = rng.integers(3)
            new[axis] = shape[axis]
        if number % 7 == 0:
            new = np.maximum(1, shape * rng.choice([1, 2, 3], 3) // rng.choice([1, 2], 3))
        spacing, new_spacing = rng.uniform(0.5, 2, 3), rng.uniform(0.5, 2, 3)
        if number % 2:
            (spacing if number % 3 else new_spacing)[rng.integers(3)] *= rng.uniform(2.9, 5)
        image = (rng.normal(size=(int(rng.integers(1, 3)), *shape)) * 3).astype(np.float32)
        settings = {"force_separate_z": TORCH_SEPARATE[how]}
        theirs = resample_torch_fornnunet(image, new, spacing, new_spacing, num_threads=1, **settings)  # type: ignore[arg-type]
        found = resample_image(image, tuple(new), spacing, new_spacing, how=how)
        np.testing.assert_allclose(found, theirs, atol=TOLERANCE, rtol=0, err_msg=f"seed [{fresh_seed}, {number}]")
        if how == "torch" and FUSED:
            np.testing.assert_array_equal(found, theirs, err_msg=f"seed [{fresh_seed}, {number}]")
        labels = (rng.integers(-1, rng.choice([1, 2, 5, 300]) + 1, shape) * (rng.random(shape) < rng.choice([0.3, 0.9]))).astype(np.int16)
        theirs = resample_torch_fornnunet(labels[None], new, spacing, new_spacing, True, 1, **settings)[0]  # type: ignore[arg-type]
        resized = resample_labels(labels, tuple(new), spacing, new_spacing, how)
        different, compared = different + int((resized != theirs).sum()), compared + theirs.size
    assert compared > 10**6
    assert different <= allowed(how) * compared


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("block", range(2))
def test_drawn_cases(how: Resampling, block: int, fresh_seed: int) -> None:
    """Prepared arrays within 1e-4, labels equal; from the same logits the same labels, but for last bits, and probabilities."""
    different = mislabelled = compared = 0
    for number in range(40):
        rng = np.random.default_rng([fresh_seed, block, number])
        case, plan, labels, what = random_case(rng)
        plan = replace(plan, resampling=how)
        if leaves_nothing(case, plan):
            continue
        said = f"seed [{fresh_seed}, {block}, {number}]: {what}"
        data, seg, properties = arrays_of(case, plan, labels)
        prepared = ours(case, plan, labels)
        # one step of single precision is 6e-5 from 512 on, and images without normalisation go to thousands
        np.testing.assert_allclose(prepared.image_czyx, data, atol=TOLERANCE, rtol=2.5e-7, err_msg=said)
        if prepared.labels_zyx is not None:
            mislabelled += int((prepared.labels_zyx != seg[0]).sum())
        manager, configuration = torch_managers(plan)
        table = dataset_json(labels)
        rules = read_rules(labels.table, labels.regions_class_order)
        half = bool(rng.random() < 0.5)
        logits = random_logits(rng, rules.n_heads, prepared.image_czyx.shape[1:], half)
        order = [case.grid.file_axes.index(axis) for axis in (2, 1, 0)]
        given = torch.from_numpy(logits)
        _, table_czyx = their_way_back(
            given, manager, configuration, manager.get_label_manager(table), properties, return_probabilities=True, num_threads_torch=1
        )
        theirs_labels = their_way_back(given, manager, configuration, manager.get_label_manager(table), properties, num_threads_torch=1)
        found = restore_logits(logits, prepared.geometry, rules.regions_class_order or None).transpose(order)
        # where two classes come out within a last bit of each other either may win, as it may on another processor there
        off = found != theirs_labels
        sure = np.sort(table_czyx, axis=0)
        if rules.has_regions:
            near = (np.abs(table_czyx - 0.5) < CLOSE).any(0)
        else:
            near = sure[-1] - sure[-2] < CLOSE if len(sure) > 1 else np.zeros(off.shape, bool)
        assert not (off & ~near).any(), said
        different, compared = different + int(off.sum()), compared + off.size
        probabilities = native_probabilities(logits, prepared.geometry, rules)
        np.testing.assert_allclose(probabilities.transpose(0, *(axis + 1 for axis in order)), table_czyx, atol=CLOSE, err_msg=said)
    assert compared > 10**4
    assert mislabelled <= allowed(how) * compared
    # these logits are made of ties
    assert different <= max(1e-5, 10 * allowed(how)) * compared


@pytest.mark.parametrize("how", HOW)
def test_a_real_head(how: Resampling, shared_data: Path, fresh_seed: int) -> None:
    """Images and labels of a head CT, and labels of smooth logits on the way back: no voxel differs where products are fused."""
    cohort = read_cohort(shared_data / "Dataset501_PHE")
    rng = np.random.default_rng([fresh_seed, 10])
    case = cohort.load(str(rng.choice(cohort.train_ids)), keep_file_order=True)
    facts = {"0": {"mean": 55.5, "std": 21.25, "percentile_00_5": 4.0, "percentile_99_5": 103.5}}
    spacing = np.asarray(case.grid.spacing_zyx_mm) * [0.8, *rng.uniform(1.1, 1.5, 2)]
    plan, labels = replace(a_plan(spacing, facts=facts), resampling=how), Labels(dict(cohort.labels))
    data, seg, properties = arrays_of(case, plan, labels)
    prepared = ours(case, plan, labels)
    np.testing.assert_allclose(prepared.image_czyx, data, atol=1e-4 if FUSED else 1e-3, rtol=0)
    assert prepared.labels_zyx is not None
    off = int((prepared.labels_zyx != seg[0]).sum())
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *prepared.geometry.shape)), (0, 1, 2, 2))
    logits = (40 * smooth).astype(np.float16)
    manager, configuration = torch_managers(plan)
    table = manager.get_label_manager(dataset_json(labels))
    theirs = their_way_back(torch.from_numpy(logits), manager, configuration, table, properties, num_threads_torch=1)
    off += int((restore_logits(logits, prepared.geometry) != theirs).sum())
    assert off == 0 if FUSED else off < 1000


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("thick", [1.4, 5.2])
def test_masks_of_a_model(how: Resampling, thick: float, tmp_path: Path, fresh_seed: int) -> None:
    """Imported and predicted from files, with the very same torch module on both sides."""
    folder = write_results(tmp_path / "nn", small_plan(), seed=4)
    plans = json.loads((folder / "plans.json").read_text())
    with_torch(plans["configurations"]["3d_fullres"], how)
    (folder / "plans.json").write_text(json.dumps(plans))
    imported = import_nnunet(folder, tmp_path / "model")
    assert imported.plan.resampling == how
    predictor, model = predictor_of(folder, ("0",)), load_model(imported.folder)
    model = replace(model, tools=replace(model.tools, networks=(predictor.network.eval(),)))
    rng = np.random.default_rng([fresh_seed, 9])
    for number in range(3):
        grid = Grid((14, 33, 41), np.array([[0, 0, -0.83, 0], [0, -0.77, 0, 0], [thick, 0, 0, 0], [0, 0, 0, 1]]))
        path = tmp_path / f"images/c{number}_0000.nii.gz"
        write_image(path, (rng.normal(size=grid.shape_zyx) * 25 + 40).astype(np.float32), grid)
        predictor.predict_from_files_sequential([[str(path)]], [str(tmp_path / f"theirs{number}")])
        (done,) = predict_path(model, path, tmp_path / "ours")
        expected = read_labels(tmp_path / f"theirs{number}.nii.gz")[0]
        assert len(np.unique(expected)) > 1
        # our images differ by a last bit here and there, and with them the network's answers in noise
        assert float((read_labels(done.path)[0] != expected).mean()) <= 1e-4
