"""Prediction beside `nnUNetPredictor` with the same weights: tiles, weights, mirroring, folds, half precision, the way back.

Both sides run the very same torch module, so that what differs is the inference alone.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("nnunetv2")

from nn_predictor import make_predictor, plain_unet, small_network, their_labels, train_briefly
from nn_training import train_hippocampus

from ichbench.cases.case import Case, Grid
from ichbench.cases.cohort import Cohort, read_cohort
from ichbench.cases.images import read_labels
from ichbench.cases.labels import LabelRules, read_rules
from ichbench.cases.splits import five_folds
from ichbench.inference.ensemble import fold_logits, native_labels, native_probabilities
from ichbench.inference.model import load_model, predict_path
from ichbench.inference.nnunet_import import import_nnunet
from ichbench.inference.predictors import Tools, predict_ensemble, predict_probabilities, predict_unet
from ichbench.inference.sliding import half_weights, predict_logits, tile_starts
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.pipeline import Geometry, prepare_case
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import InferenceRecipe, PlanRecipe, PrepareRecipe

torch.set_num_threads(1)
NNUNET = InferenceRecipe(compatibility="nnunet", mirror=True)
PREPARE = PrepareRecipe(compatibility="nnunet")


def drawn_case(rng: np.random.Generator, channels: int, shape: tuple[int, ...], spacing: tuple[float, ...], n_labels: int) -> Case:
    """Smooth noise in a frame of zeros, with labels by its height."""
    low = rng.normal(size=(channels, *(max(2, n // 4) for n in shape)))
    image = np.stack([np.kron(channel, np.ones((5, 5, 5)))[tuple(slice(n) for n in shape)] for channel in low])
    image = np.pad(image, [(0, 0), *((0, n - m) for n, m in zip(shape, image.shape[1:], strict=True))], mode="edge")
    image = (image + 0.3 * rng.normal(size=image.shape)).astype(np.float32)
    labels = np.digitize(image[0], np.quantile(image[0], np.linspace(0.5, 1, n_labels + 1)[:-1])).astype(np.int16)
    labels = np.minimum(labels, n_labels - 1)
    if rng.random() < 0.5:
        for axis in (1, 2, 3):
            image[(slice(None),) * axis + (slice(0, rng.integers(0, 3)),)] = 0
        labels[(image == 0).all(0)] = 0
    affine = np.zeros((4, 4))
    for axis in range(3):
        affine[2 - axis, axis] = spacing[axis]
    affine[3, 3] = 1
    return Case("drawn", image, labels, Grid(tuple(shape), affine))  # type: ignore[arg-type]


def plan_for(cases: list[Case], n_labels: int, dims: int, patch: tuple[int, ...], spacing: Any = "auto") -> Plan:
    names = tuple(f"MR{index}" for index in range(len(cases[0].image_czyx)))
    recipe = PlanRecipe(dims=dims, patch_size=patch, spacing_mm=spacing, base_features=4, max_features=16)
    plan = make_plan(fingerprint(iter(cases)), recipe, names, n_labels, len(cases))
    return replace(plan, patch_size=patch)


def properties_of(case: Case, geometry: Geometry) -> dict[str, Any]:
    """What nnU-Net would remember of the preparation."""
    return {
        "spacing": list(case.grid.spacing_zyx_mm),
        "shape_before_cropping": geometry.shape_before_crop,
        "bbox_used_for_cropping": [list(span) for span in geometry.box],
        "shape_after_cropping_and_before_resampling": geometry.cropped_shape,
    }


def test_tiles_and_weights(fresh_seed: int) -> None:
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

    rng = np.random.default_rng(fresh_seed)
    for _ in range(300):
        patch, step = int(rng.integers(1, 200)), float(rng.choice([0.5, 0.25, 1.0, rng.uniform(0.05, 1)]))
        length = patch + int(rng.integers(0, 400))
        assert list(tile_starts(length, patch, step)) == compute_steps_for_sliding_window((length,), (patch,), step)[0], (
            length,
            patch,
            step,
        )
    for patch in [(128, 128, 128), (20, 320, 256), (40, 56, 40), (512, 512), (16, 16), (1, 7, 9), *_patches(rng)]:
        theirs = compute_gaussian(tuple(patch), 1 / 8, 10, device=torch.device("cpu"))
        assert torch.equal(half_weights(patch), theirs), patch


def _patches(rng: np.random.Generator) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in rng.integers(4, 90, size=rng.integers(2, 4))) for _ in range(10)]


@pytest.mark.parametrize("dims", [2, 3])
def test_logits_are_equal_bit_for_bit(dims: int, fresh_seed: int) -> None:
    """Images smaller than the patch in some axes, one tile, many tiles; any step, axes, folds, channels and heads."""
    rng = np.random.default_rng([fresh_seed, dims])
    for trial in range(10):
        channels, heads, folds = int(rng.integers(1, 4)), int(rng.integers(2, 5)), int(rng.integers(1, 4))
        patch = tuple(int(n) for n in rng.choice([8, 12, 16, 20], dims))
        shape = tuple(int(n) for n in rng.integers(3, 40, 3))
        axes = tuple(axis for axis in range(dims) if rng.random() < 0.6)
        step, gaussian = float(rng.choice([0.5, 0.3, 1.0])), bool(rng.random() < 0.8)
        image = rng.normal(size=(channels, *shape)).astype(np.float32)
        networks = [small_network(dims, channels, heads, int(rng.integers(2**31))) for _ in range(folds)]
        plan = plan_for([drawn_case(rng, channels, (24, 24, 24), (1.0, 1.0, 1.0), heads)], heads, dims, patch)
        labels = {"background": 0} | {f"l{value}": value for value in range(1, heads)}
        weights = [network.state_dict() for network in networks]
        predictor = make_predictor(small_network(dims, channels, heads, 0), weights, plan, labels, None, step, gaussian, axes or None)
        theirs = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).numpy()
        recipe = NNUNET.model_copy(update={"tile_step": step, "gaussian": gaussian, "mirror": axes})
        ours = fold_logits(networks, image, plan, recipe)
        assert ours.dtype == theirs.dtype == np.float16
        np.testing.assert_array_equal(ours, theirs, err_msg=f"trial {trial}: shape {shape}, patch {patch}, axes {axes}, step {step}")


LABELS: dict[str, Any] = {"background": 0, "a": 1, "b": 2}
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("declared", "order"), [(LABELS, None), (REGIONS, (1, 2, 3)), (REGIONS, (3, 1, 2))])
def test_masks_and_probabilities_of_drawn_cases(
    dims: int, declared: dict[str, Any], order: tuple[int, ...] | None, fresh_seed: int
) -> None:
    """The whole line: preparation, tiles, resampling back, labels or regions with an ignore label, several channels."""
    rules = read_rules(declared, order)
    rng = np.random.default_rng([fresh_seed, dims, len(declared), *(order or ())])
    for trial in range(3):
        spacing = tuple(rng.choice([0.6, 1.0, 1.3, 5.0], 3))
        shape = tuple(int(n) for n in rng.integers(12, 30, 3))
        case = drawn_case(rng, 2, shape, spacing, len(rules.labels))
        target = [float(value) for value in rng.choice([0.7, 1.0, 2.0, 4.0], 3)]
        plan = plan_for([case], len(rules.labels), dims, (8, 16, 12)[-dims:], tuple(sorted(target, reverse=True))[-dims:])
        network = small_network(dims, 2, rules.n_heads, int(rng.integers(2**31)))
        axes = tuple(range(dims))
        predictor = make_predictor(network, [network.state_dict()], plan, declared, order, mirror=axes)
        tools = Tools(NNUNET, PREPARE, plan, (network,), rules=rules)  # type: ignore[arg-type]
        mask, probabilities = predictor.predict_single_npy_array(case.image_czyx, {"spacing": list(spacing)}, None, None, True)
        ours = predict_unet(case, tools).labels_zyx
        assert ours is not None
        where = f"trial {trial}: spacing {spacing} to {plan.spacing}, shape {shape}, transpose {plan.transpose_forward}"
        # a probability may lie a last bit away, so the voxels that it decides are compared with the mask that needs none
        plain = predictor.predict_single_npy_array(case.image_czyx, {"spacing": list(spacing)}, None, None, False)
        np.testing.assert_array_equal(ours, plain, err_msg=where)
        np.testing.assert_array_equal(rules.from_probabilities(probabilities), mask, err_msg=where)
        np.testing.assert_allclose(predict_probabilities(case, tools), probabilities, atol=1e-3, err_msg=where)


def test_an_ensemble_of_models_averages_probabilities(fresh_seed: int) -> None:
    """A 2D and a 3D model of one case, two folds each: their `.npz` files averaged as nnUNetv2_ensemble does."""
    from nnunetv2.ensembling.ensemble import average_probabilities

    rng = np.random.default_rng([fresh_seed, 7])
    case = drawn_case(rng, 1, (14, 28, 26), (3.0, 1.0, 1.0), 3)
    rules = read_rules(LABELS)
    models, files = [], []
    folder = Path(__import__("tempfile").mkdtemp())
    for dims in (2, 3):
        plan = plan_for([case], 3, dims, (8, 16, 16)[-dims:], (2.0, 1.2, 1.2)[-dims:])
        networks = tuple(small_network(dims, 1, 3, int(rng.integers(2**31))) for _ in range(2))
        weights = [network.state_dict() for network in networks]
        predictor = make_predictor(small_network(dims, 1, 3, 0), weights, plan, LABELS, mirror=tuple(range(dims)))
        properties = {"spacing": list(case.grid.spacing_zyx_mm)}
        _, probabilities = predictor.predict_single_npy_array(case.image_czyx, properties, None, None, True)
        np.savez(folder / f"{dims}.npz", probabilities=probabilities)
        files.append(str(folder / f"{dims}.npz"))
        models.append(Tools(NNUNET, PREPARE, plan, networks, rules=rules))  # type: ignore[arg-type]
        label_manager = predictor.label_manager
    theirs = label_manager.convert_probabilities_to_segmentation(average_probabilities(files))
    np.testing.assert_array_equal(predict_ensemble(case, models).labels_zyx, theirs)


def test_the_second_stage_of_a_cascade(fresh_seed: int) -> None:
    """Its network sees the first stage's labels, prepared like a training case's, one channel a label."""
    rng = np.random.default_rng([fresh_seed, 8])
    for dims in (3, 2):
        case = drawn_case(rng, 1, (18, 26, 22), (2.0, 1.0, 1.3), 3)
        assert case.labels_zyx is not None
        previous = np.ascontiguousarray(np.roll(case.labels_zyx, 1, 2))
        plan = plan_for([case], 3, dims, (8, 12, 16)[-dims:], (1.5, 1.4, 0.9)[-dims:])
        network = small_network(dims, 3, 3, int(rng.integers(2**31)))
        predictor = make_predictor(network, [network.state_dict()], plan, LABELS, mirror=(0, 1), previous_stage=True)
        theirs = predictor.predict_single_npy_array(
            case.image_czyx, {"spacing": list(case.grid.spacing_zyx_mm)}, previous[None].astype(np.float32), None, False
        )
        recipe = NNUNET.model_copy(update={"mirror": (0, 1)})
        tools = Tools(recipe, PREPARE, plan, (network,), rules=read_rules(LABELS), previous=lambda _, found=previous: found)  # type: ignore[arg-type, misc]
        np.testing.assert_array_equal(predict_unet(case, tools).labels_zyx, theirs)


@pytest.fixture(scope="module")
def hippocampus(shared_data: Path) -> tuple[Cohort, Plan, Any, tuple[str, ...]]:
    """nnU-Net's U-Net after a few seconds on real cases; the last four were not trained on."""
    cohort = read_cohort(shared_data / "Dataset004_Hippocampus")
    names = cohort.train_ids[::3]
    cases = [cohort.load(name, keep_file_order=True) for name in names]
    recipe = PlanRecipe(patch_size=(32, 40, 32), base_features=4, max_features=16)
    plan = make_plan(fingerprint(iter(cases)), recipe, cohort.channel_names, 3, len(cases))
    plan = replace(plan, patch_size=(32, 40, 32))
    network = plain_unet(3, 1, 3, [(1, 1, 1), (2, 2, 2), (2, 2, 2)], (6, 12, 24), 0)
    prepared = [prepare_case(case, PREPARE, plan) for case in cases[:-4]]
    images, labels = zip(*(_window(one.image_czyx, one.labels_zyx, plan.patch_size, k) for k in range(8) for one in prepared), strict=True)
    train_briefly(network, np.stack(images), np.stack(labels), 110)
    return cohort, plan, network, names[-4:]


def _window(image: Any, labels: Any, patch: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """One patch of a prepared case, in a place of its own."""
    pads = [(0, max(0, n - m)) for n, m in zip(patch, labels.shape, strict=True)]
    image, labels = np.pad(image, [(0, 0), *pads]), np.pad(labels, pads)
    starts = np.random.default_rng(seed).integers(0, np.array(labels.shape) - np.array(patch) + 1)
    where = tuple(slice(int(start), int(start) + n) for start, n in zip(starts, patch, strict=True))
    return image[(slice(None), *where)], labels[where]


def dice(a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    return float(2 * ((a > 0) & (b > 0)).sum() / ((a > 0).sum() + (b > 0).sum()))


def test_real_cases_with_a_trained_network(hippocampus: tuple[Cohort, Plan, Any, tuple[str, ...]]) -> None:
    """Held-out Dice well above nothing after seconds of training, masks equal voxel for voxel, also on other working grids."""
    cohort, plan, network, names = hippocampus
    rules = cohort.rules
    for name, spacing in zip(names, (plan.spacing, plan.spacing, (0.8, 1.1, 0.9), (1.3, 0.9, 1.2)), strict=True):
        here = replace(plan, spacing=spacing)
        case = cohort.load(name, keep_file_order=True)
        predictor = make_predictor(network, [network.state_dict()], here, LABELS, mirror=(0, 1, 2))
        theirs = predictor.predict_single_npy_array(case.image_czyx, {"spacing": list(case.grid.spacing_zyx_mm)}, None, None, False)
        ours = predict_unet(case, Tools(NNUNET, PREPARE, here, (network,), rules=rules)).labels_zyx
        assert ours is not None
        assert case.labels_zyx is not None
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        if spacing == plan.spacing:
            assert dice(ours, case.labels_zyx) > 0.2, name


def test_a_model_that_nnunet_trained(shared_data: Path, nnunet_folders: Path, fresh_seed: int, tmp_path: Path) -> None:
    """Planned, prepared and trained by nnunetv2 for a minute: its own prediction of the held-out cases against ours after the import.

    ICHBENCH_NNUNET_MODEL may name another result folder for Dataset004_Hippocampus.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    given = os.environ.get("ICHBENCH_NNUNET_MODEL")
    model = Path(given) if given else train_hippocampus(shared_data, nnunet_folders, fresh_seed)
    cohort = read_cohort(shared_data / "Dataset004_Hippocampus")
    names = five_folds(cohort.train_ids)[0]["val"]
    predictor = nnUNetPredictor(0.5, True, True, False, torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    files = [[str(cohort.record(name).images[0])] for name in names]
    predictor.predict_from_files_sequential(files, [str(tmp_path / name) for name in names], False, True, None)
    import_nnunet(model, tmp_path / "model", "final", ["0"])
    imported = load_model(tmp_path / "model")
    found = []
    for name in names:
        list(predict_path(imported, cohort.record(name).images[0], tmp_path / "ours" / f"{name}.nii.gz"))
        theirs, ours = (read_labels(folder / f"{name}.nii.gz")[0] for folder in (tmp_path, tmp_path / "ours"))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        truth = cohort.load(name).labels_zyx
        assert truth is not None
        found.append(dice(ours, truth))
    assert len(found) == 8
    assert np.mean(found) > 0.5, "a model that finds nothing proves nothing"


def test_real_head_ct(shared_data: Path, fresh_seed: int) -> None:
    """512 x 512 voxels of 5 mm slices, cropped and resampled, 2D and 3D patches: bright voxels by a network that sees the patch."""
    cohort = read_cohort(shared_data / "Dataset501_PHE")
    rng = np.random.default_rng([fresh_seed, 9])
    name = str(rng.choice(cohort.train_ids))
    case = cohort.load(name, keep_file_order=True)
    facts = fingerprint(iter([case]))
    for dims in (2, 3):
        recipe = PlanRecipe(dims=dims, patch_size=(8, 128, 128)[-dims:], spacing_mm=(5.0, 1.1, 1.1)[-dims:], base_features=4)
        plan = replace(make_plan(facts, recipe, cohort.channel_names, 2, 1), patch_size=(8, 128, 128)[-dims:])
        network = small_network(dims, 1, 2, int(rng.integers(2**31)), width=3)
        predictor = make_predictor(network, [network.state_dict()], plan, {"background": 0, "edema": 1}, mirror=(1,))
        theirs = predictor.predict_single_npy_array(case.image_czyx, {"spacing": list(case.grid.spacing_zyx_mm)}, None, None, False)
        tools = Tools(NNUNET.model_copy(update={"mirror": (1,)}), PREPARE, plan, (network,), rules=cohort.rules)  # type: ignore[arg-type]
        np.testing.assert_array_equal(predict_unet(case, tools).labels_zyx, theirs, err_msg=name)


def half_resolution(network: Any, image: NDArray[np.float32], plan: Plan, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """By how much half precision may move each logit (heads, z, y, x), from its three roundings.

    The weights are rounded (that part is computed: the exact mean with the rounded weights); every partial sum is, by half a
    step of the largest that a voxel may have had; and so is the quotient.
    """
    tile_largest, exact = np.zeros(logits.shape), np.zeros(logits.shape)
    weight = np.zeros(logits.shape[1:])
    count = np.zeros(logits.shape[1:])
    window = half_weights(plan.patch_size).numpy().astype(np.float64)
    shape = image.shape[1:]
    with torch.inference_mode():
        for z in tile_starts(shape[0], plan.patch_size[0], 0.5):
            for y in tile_starts(shape[1], plan.patch_size[1], 0.5):
                for x in tile_starts(shape[2], plan.patch_size[2], 0.5):
                    where = tuple(slice(start, start + n) for start, n in zip((z, y, x), plan.patch_size, strict=True))
                    answer = network(torch.from_numpy(image[(slice(None), *where)][None]))[0].numpy()
                    tile_largest[(slice(None), *where)] += np.abs(answer) * window
                    exact[(slice(None), *where)] += answer * window
                    weight[where] += window
                    count[where] += 1
    step = np.spacing(tile_largest.astype(np.float16)).astype(np.float64)
    quotient = np.spacing(np.abs(logits).astype(np.float16)).astype(np.float64)
    return np.abs(exact / weight - logits) + count * step / 2 / weight * 1.01 + quotient


def test_where_single_precision_decides_otherwise_half_could_not_tell(hippocampus: tuple[Cohort, Plan, Any, tuple[str, ...]]) -> None:
    """Our default sums in float32. Every voxel whose label then differs lies within half precision's resolution of the decision."""
    cohort, plan, network, names = hippocampus
    plan = replace(plan, patch_size=(16, 24, 16))
    recipe = InferenceRecipe(mirror=False)
    differing = 0
    for name in names:
        case = cohort.load(name, keep_file_order=True)
        prepared = prepare_case(replace(case, labels_zyx=None), PREPARE, plan)
        single = predict_logits(network, prepared.image_czyx, plan, recipe).astype(np.float32)
        half = predict_logits(network, prepared.image_czyx, plan, recipe.model_copy(update={"compatibility": "nnunet"}))
        resolution = half_resolution(network, prepared.image_czyx, plan, single)
        ours, theirs = single.argmax(0), half.argmax(0)
        for place in zip(*np.nonzero(ours != theirs), strict=True):
            a, b = (ours[place], *place), (theirs[place], *place)
            differing += 1
            assert single[a] - single[b] <= resolution[a] + resolution[b], (name, place)
    assert differing < 200


@pytest.mark.parametrize(("declared", "order"), [(LABELS, None), (REGIONS, (2, 3, 1))])
def test_the_way_back_from_given_logits(declared: dict[str, Any], order: tuple[int, ...] | None, fresh_seed: int) -> None:
    """Ties, zeros and half precision's smallest numbers among the logits; labels, regions and probabilities."""
    rules: LabelRules = read_rules(declared, order)
    rng = np.random.default_rng([fresh_seed, 10, len(declared)])
    for trial in range(8):
        case = drawn_case(rng, 1, tuple(int(n) for n in rng.integers(6, 18, 3)), tuple(rng.choice([1.0, 2.0, 6.5], 3)), 3)
        plan = plan_for([case], len(rules.labels), 3, (8, 8, 8), tuple(sorted(rng.choice([0.8, 1.0, 2.0], 3), reverse=True)))
        prepared = prepare_case(replace(case, labels_zyx=None), PREPARE, plan)
        tiny = rng.choice([0.0, 2.0**-24, 2.0**-23, 2.0**-22, -(2.0**-24), 1.0, -1.0], (rules.n_heads, *prepared.geometry.shape))
        logits = (tiny if trial % 2 else rng.normal(size=tiny.shape)).astype(np.float16)
        small = small_network(3, 1, rules.n_heads, 0)
        predictor = make_predictor(small, [small.state_dict()], plan, declared, order)
        theirs = their_labels(predictor, logits, properties_of(case, prepared.geometry))
        np.testing.assert_array_equal(native_labels(logits, prepared.geometry, rules), theirs)
        _, probabilities = their_labels(predictor, logits, properties_of(case, prepared.geometry), True)
        # resampled logits are rounded to half, so a last bit before that may become half a step: 2^-11 of a logit
        np.testing.assert_allclose(native_probabilities(logits, prepared.geometry, rules), probabilities, atol=1e-3)
