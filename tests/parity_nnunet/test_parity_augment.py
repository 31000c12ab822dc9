"""Augmentation beside batchgeneratorsv2: the same numbers give the same arrays, and the numbers have the same law.

Ours are drawn, then fed to the transforms that `nnUNetTrainer.get_training_transforms` builds (its own objects). Laws are
compared by two-sample Kolmogorov-Smirnov tests with p > 1e-8: about 30 comparisons, so that a false alarm has less than one
chance in a million.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")
pytest.importorskip("batchgeneratorsv2")

from scipy.stats import binomtest, ks_2samp

from ichbench.augmentation.augment import fill_sample
from ichbench.augmentation.cascade_augment import MORPHOLOGIES, footprint
from ichbench.augmentation.draw import AugmentDraw, CascadeDraw, draw_augmentation, draw_cascade, enlarged_zyx, rotation_limits
from ichbench.augmentation.intensity import change_intensity
from ichbench.augmentation.patches import TrainingCase, draw_patch, patch_zyx, sample_generator
from ichbench.recipe import AugmentRecipe

torch.set_num_threads(1)
PATCHES = [(10, 16, 18), (4, 24, 22), (20, 24), (30, 14)]
FALSE_ALARM = 1e-8
NAMES = ("rotation", "scaling", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted")
ALWAYS = AugmentRecipe(
    **{f"{name}_probability": 1.0 for name in NAMES}, blur_channel_probability=1.0, low_resolution_channel_probability=1.0
)


def transforms(patch: tuple[int, ...], **more: Any) -> list[Any]:
    """nnU-Net's own list of transforms for a patch."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    angle = np.radians(max(rotation_limits(AugmentRecipe(), patch)))
    flat = len(patch) == 3 and max(patch) / patch[0] > 3
    return list(nnUNetTrainer.get_training_transforms(patch, (-angle, angle), None, tuple(range(len(patch))), flat, **more).transforms)


def find(patch: tuple[int, ...], name: str, which: int = 0, **more: Any) -> tuple[Any, float]:
    """The transform of a class, inside its gate or not, and the gate's probability."""
    found = []
    for one in transforms(patch, **more):
        inner, p = (one.transform, one.apply_probability) if hasattr(one, "apply_probability") else (one, 1.0)
        if type(inner).__name__ == name:
            found.append((inner, p))
    return found[which]


def shaped(volume: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """As nnU-Net holds it: a 2D patch has no slice axis."""
    return volume[:, 0] if len(patch) == 2 else volume


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("name", ["blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted"])
def test_intensities_with_the_same_numbers(patch: tuple[int, ...], name: str, fresh_seed: int) -> None:
    rng = np.random.default_rng(fresh_seed)
    for step in range(6):
        draw = draw_augmentation(sample_generator(fresh_seed, 0, step, 0), ALWAYS, patch, 2)
        field = "blur_sigma_zyx" if name == "blur" else name
        ours = torch.from_numpy((rng.standard_normal((2, *patch_zyx(patch))) * 3 + 1).astype(np.float32))
        theirs = shaped(ours.clone(), patch)
        if name == "blur":
            # reflection pads with at most all but one of the voxels in torch
            draw = replace(draw, blur_sigma_zyx=tuple(s and (min(s[0], 0.9), s[1], s[2]) for s in draw.blur_sigma_zyx))
        values = getattr(draw, field)
        change_intensity(ours, replace(AugmentDraw(in_plane=draw.in_plane), **{field: values}))
        both, dims = torch.tensor([0, 1]), len(patch)
        params: dict[str, Any]
        if name == "blur":
            transform, _ = find(patch, "GaussianBlurTransform")
            params = {"apply_to_channel": torch.tensor([True, True]), "sigmas": [list(s[3 - dims :]) for s in values]}
        elif name == "low_resolution":
            transform, _ = find(patch, "SimulateLowResolutionTransform")
            scales = torch.tensor([[value] * dims for value in values])
            if transform.ignore_axes is not None:
                scales[:, transform.ignore_axes] = 1
            params = {"apply_to_channel": both, "scales": scales}
        elif name in ("brightness", "contrast"):
            transform, _ = find(patch, "MultiplicativeBrightnessTransform" if name == "brightness" else "ContrastTransform")
            params = {"apply_to_channel": both, "multipliers": torch.tensor(values)}
        else:
            transform, _ = find(patch, "GammaTransform", 0 if name == "gamma_inverted" else 1)
            inverted = torch.tensor([name == "gamma_inverted"] * 2)
            params = {
                "apply_to_channel": both,
                "gamma": torch.tensor(values),
                "retain_stats": torch.tensor([True] * 2),
                "invert_image": inverted,
            }
        theirs = transform._apply_to_image(theirs, **params)
        told = f"seed {fresh_seed}, step {step}, {values}"
        torch.testing.assert_close(shaped(ours, patch), theirs, atol=2e-5, rtol=1e-5, msg=lambda m, t=told: f"{m} {t}")


@pytest.mark.parametrize("patch", PATCHES)
def test_turned_patches_with_the_same_numbers(patch: tuple[int, ...], fresh_seed: int) -> None:
    """nnU-Net's boxes cut by its loader at our corner, its spatial and mirror transforms fed with our angles, scale and axes:
    images within 4e-4 (of values up to 5), labels equal but where scores tie within half precision (under 1 in 2000;
    3 of 4.4 million were seen)."""
    from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
    from batchgeneratorsv2.transforms.spatial.spatial import create_affine_matrix_2d, create_affine_matrix_3d

    rng = np.random.default_rng(fresh_seed)
    recipe = ALWAYS.model_copy(update={"rotation_probability": 0.7, "scaling_probability": 0.7})
    voxels = differing = 0
    for step in range(12):
        shape = tuple(int(n) for n in rng.integers(3, 60, 3))
        smooth = rng.standard_normal(shape).cumsum(1).cumsum(2)
        labels = np.digitize(smooth, np.quantile(smooth, [0.3, 0.7])) - 1
        case = TrainingCase("a", rng.standard_normal((2, *shape), dtype=np.float32), labels.astype(np.int16), {1: np.argwhere(labels == 1)})
        generator = sample_generator(fresh_seed, 0, step, 0)
        box, size = enlarged_zyx(recipe, patch), patch_zyx(patch)
        place = draw_patch(generator, [case], patch, step % 2 == 1, clamped=False, box_zyx=box)
        draw = draw_augmentation(generator, recipe, patch, 2)
        only = AugmentDraw(draw.mirror_zyx, draw.rotation_degrees, draw.scale, draw.in_plane)
        ours, truth = torch.zeros((2, *size)), torch.zeros(size, dtype=torch.int64)
        fill_sample(case, place, only, CascadeDraw(), ours, truth)

        limits = [[low, low + n] for low, n in zip(place.lower_zyx, box, strict=True)]
        image = torch.from_numpy(crop_and_pad_nd(case.image_czyx, limits, 0)).float()
        seg = torch.from_numpy(crop_and_pad_nd(case.labels_zyx[None], limits, -1)).to(torch.int16)
        data: dict[str, Any] = {"image": shaped(image, patch), "segmentation": shaped(seg, patch)}
        for one in transforms(patch):
            kind = type(one).__name__
            if kind == "SpatialTransform":
                angles = np.radians(draw.rotation_degrees or (0.0, 0.0, 0.0))
                dims = data["image"].ndim - 1
                scales = [draw.scale or 1.0] * dims
                affine = create_affine_matrix_3d(angles, scales) if dims == 3 else create_affine_matrix_2d(angles[0], scales)
                data = one.apply(data, **spatial_parameters(one, data["image"].shape[1:], affine if draw.is_spatial else None))
            elif kind in ("Convert3DTo2DTransform", "Convert2DTo3DTransform", "RemoveLabelTransform"):
                data = one(**data)
            elif kind == "MirrorTransform":
                data = one.apply(data, axes=[axis for axis, flip in enumerate(draw.mirror_zyx[3 - len(patch) :]) if flip])
        told = f"seed {fresh_seed}, step {step}"
        torch.testing.assert_close(shaped(ours, patch), data["image"], atol=4e-4, rtol=0, msg=lambda m, t=told: f"{m} {t}")
        other = data["segmentation"][0].long()
        mine = truth[0] if len(patch) == 2 else truth
        voxels, differing = voxels + other.numel(), differing + int((mine != other).sum())
    assert differing <= voxels / 2000, f"{differing} of {voxels} labels differ, seed {fresh_seed}"


def spatial_parameters(transform: Any, shape: Any, affine: Any) -> dict[str, Any]:
    """What `get_parameters` would return for this matrix: its own helpers, called with it."""
    from batchgeneratorsv2.transforms.spatial.spatial import _convert_my_grid_to_grid_sample_grid

    grid = None
    if affine is not None:
        grid = torch.matmul(transform._get_base_grid_clone(), torch.from_numpy(affine.T).float())
        grid = _convert_my_grid_to_grid_sample_grid(grid, shape)
    return {"center_location_in_pixels": [n / 2 for n in shape], "grid": grid, "affine": affine, "elastic_offsets": None}


@pytest.mark.parametrize(
    "patch", [*PATCHES, (128, 128, 128), (20, 320, 256), (40, 56, 40), (96, 160, 160), (512, 256), (9, 27, 27), (9, 28, 27)]
)
def test_boxes_and_limits(patch: tuple[int, ...]) -> None:
    """The trainer's own method, on a stand-in for the trainer."""
    from types import SimpleNamespace

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    told = SimpleNamespace(configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *_: None)
    rotation, flat, box, mirror = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(told)
    limits = rotation_limits(AugmentRecipe(), patch)
    assert max(limits) == pytest.approx(np.degrees(max(np.abs(rotation))))
    assert (limits[1] == 0) == (flat or len(patch) == 2)
    assert enlarged_zyx(AugmentRecipe(), patch) == patch_zyx([int(n) for n in box])
    assert len(mirror) == len(patch)


@pytest.mark.parametrize("forced", [False, True])
def test_corners_follow_the_loaders_law(forced: bool, fresh_seed: int) -> None:
    from types import SimpleNamespace

    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

    rng = np.random.default_rng(fresh_seed)
    np.random.seed(fresh_seed % 2**32)  # noqa: NPY002 (nnU-Net draws from it)
    for patch, shape in (((4, 24, 22), (9, 40, 31)), ((10, 16, 18), (7, 50, 12)), ((20, 24), (5, 33, 21))):
        labels = (rng.random(shape) < 0.01).astype(np.int16)
        labels[-1, -1, -1] = 1
        case = TrainingCase("a", np.zeros((1, *shape), np.float32), labels, {1: np.argwhere(labels == 1)})
        box, size = enlarged_zyx(AugmentRecipe(), patch), patch_zyx(patch)
        loader = SimpleNamespace(
            need_to_pad=np.array(box) - np.array(size), patch_size=box, has_ignore=False, annotated_classes_key=(-1, 0, 1)
        )
        places = {1: np.argwhere(labels[None] == 1)}
        theirs = np.array([nnUNetDataLoader.get_bbox(loader, shape, forced, places)[0] for _ in range(3000)])
        ours = np.array(
            [
                draw_patch(sample_generator(fresh_seed, 0, s, 0), [case], patch, forced, clamped=False, box_zyx=box).lower_zyx
                for s in range(3000)
            ]
        )
        for axis in range(3):
            assert ours[:, axis].min() >= theirs[:, axis].min() - 1
            same_law(ours[:, axis], theirs[:, axis], f"{patch} {shape} axis {axis}", fresh_seed)


def same_law(ours: Any, theirs: Any, what: str, seed: int) -> None:
    p = ks_2samp(np.asarray(ours, float).ravel(), np.asarray(theirs, float).ravel(), method="asymp").pvalue
    assert p > FALSE_ALARM, f"{what}: p = {p}, seed {seed}"


def test_drawn_numbers_have_the_same_law(fresh_seed: int) -> None:
    """Every number of every transform, as nnU-Net's own objects draw it, in a 3D patch, in one of thick slices, and in 2D."""
    torch.manual_seed(fresh_seed)
    np.random.seed(fresh_seed % 2**32)  # noqa: NPY002 (nnU-Net draws from it)
    count = 3000
    for patch in ((10, 16, 18), (4, 24, 22), (20, 24)):
        flat = len(patch) == 2 or max(patch) / patch[0] > 3
        dims = len(patch)
        found = [draw_augmentation(sample_generator(fresh_seed, 0, s, 0), AugmentRecipe(), patch, 2) for s in range(count)]
        image = torch.zeros((2, *patch))
        spatial, _ = find(patch, "SpatialTransform")
        folded = torch.zeros((2, *patch[1:])) if dims == 3 and flat else image
        drawn = [spatial.get_parameters(image=folded)["affine"] for _ in range(count)]
        neither = sum(one is None for one in drawn)
        assert binomtest(neither, count, 0.64).pvalue > FALSE_ALARM
        assert binomtest(sum(not one.is_spatial for one in found), count, 0.64).pvalue > FALSE_ALARM
        from ichbench.augmentation.spatial import matrix

        mine = [matrix(one) for one in found if one.is_spatial]
        size = 2 if flat else 3
        for row in range(size):
            for column in range(size):
                entries = [one[3 - size + row, 3 - size + column] for one in mine]
                same_law(entries, [one[row, column] for one in drawn if one is not None], f"matrix {row} {column}", fresh_seed)
        pairs = {
            "noise": ("GaussianNoiseTransform", 0, "sigmas", lambda one: one.noise_sd),
            "brightness": ("MultiplicativeBrightnessTransform", 0, "multipliers", lambda one: one.brightness or None),
            "contrast": ("ContrastTransform", 0, "multipliers", lambda one: one.contrast or None),
            "gamma_inverted": ("GammaTransform", 0, "gamma", lambda one: one.gamma_inverted or None),
            "gamma": ("GammaTransform", 1, "gamma", lambda one: one.gamma or None),
        }
        for name, (kind, which, key, get) in pairs.items():
            transform, p = find(patch, kind, which)
            assert p == getattr(AugmentRecipe(), f"{name}_probability")
            theirs = [transform.get_parameters(image=image)[key] for _ in range(1500)]
            same_law([get(one) for one in found if get(one) is not None], np.array([np.asarray(v) for v in theirs]), name, fresh_seed)
        blur, p = find(patch, "GaussianBlurTransform")
        assert p == AugmentRecipe().blur_probability
        blurred = [blur.get_parameters(image=image) for _ in range(3000)]
        sigmas = np.array([s for one in blurred for s in one["sigmas"]])
        ours = np.array([s[3 - dims :] for one in found for s in one.blur_sigma_zyx if s])
        for axis in range(dims):
            same_law(ours[:, axis], sigmas[:, axis], f"sigma {axis}", fresh_seed)
        assert blur.p_per_channel == AugmentRecipe().blur_channel_probability
        coarse, p = find(patch, "SimulateLowResolutionTransform")
        assert (p, coarse.p_per_channel) == (AugmentRecipe().low_resolution_probability, AugmentRecipe().low_resolution_channel_probability)
        scales = [row[-1].item() for _ in range(1500) for row in coarse.get_parameters(image=image)["scales"]]
        same_law([s for one in found for s in one.low_resolution if s], scales, "low resolution", fresh_seed)
        assert (coarse.ignore_axes == (0,)) == (flat and dims == 3)


@pytest.mark.parametrize("size", [(7, 12, 11), (14, 13)])
def test_morphology_with_the_same_numbers(size: tuple[int, ...], fresh_seed: int) -> None:
    from batchgeneratorsv2.transforms.nnunet import random_binary_operator as theirs
    from skimage.morphology import ball, disk

    rng = np.random.default_rng(fresh_seed)
    for _ in range(12):
        radius, share = float(rng.uniform(1, 8)), float(rng.choice([0.01, 0.1, 0.6, 0.97]))
        mask = rng.random(size) < share
        shape = footprint(radius, len(size))
        np.testing.assert_array_equal(shape, ball(radius, dtype=bool) if len(size) == 3 else disk(radius, dtype=bool))
        for name, work in (
            ("dilate", theirs.binary_dilation_torch),
            ("erode", theirs.binary_erosion_torch),
            ("open", theirs.binary_opening_torch),
            ("close", theirs.binary_closing_torch),
        ):
            got = MORPHOLOGIES[name](mask if len(size) == 3 else mask[None], shape).reshape(size)
            expected = work(torch.from_numpy(mask), torch.from_numpy(shape)).numpy()
            np.testing.assert_array_equal(got, expected, err_msg=f"{name} radius {radius} seed {fresh_seed}")


def test_law_of_the_cascades_faults(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    np.random.seed(fresh_seed % 2**32)  # noqa: NPY002 (nnU-Net draws from it)
    patch, labels = (10, 16, 18), [1, 2, 3]
    operator, p = find(patch, "ApplyRandomBinaryOperatorTransform", is_cascaded=True, foreground_labels=labels)
    remover, q = find(patch, "RemoveRandomConnectedComponentFromOneHotEncodingTransform", is_cascaded=True, foreground_labels=labels)
    recipe = AugmentRecipe()
    assert (p, operator.p_per_label) == (recipe.morphology_probability, recipe.morphology_label_probability)
    assert (q, remover.p_per_label) == (recipe.remove_component_probability, recipe.remove_component_label_probability)
    assert remover.dont_do_if_covers_more_than_x_percent == recipe.remove_component_share
    assert remover.fill_with_other_class_p == 0
    always = recipe.model_copy(update={"morphology_probability": 1.0})
    ours = [draw_cascade(sample_generator(fresh_seed, 0, s, 0), always, 3).morphology for s in range(3000)]
    drawn = [operator.get_parameters(image=torch.zeros((4, 4, 4, 4))) for _ in range(3000)]
    same_law([len(one) for one in ours], [len(one["apply_to_channels"]) for one in drawn], "how many labels", fresh_seed)
    same_law([e[2] for one in ours for e in one], [s for one in drawn for s in one["strel_size"]], "radius", fresh_seed)
    # channel -3 is label 1
    same_law(
        [e[0] for one in ours for e in one[:1]],
        [one["apply_to_channels"][0] + 4 for one in drawn if one["apply_to_channels"]],
        "first",
        fresh_seed,
    )
    names = {"binary_dilation_torch": 0, "binary_erosion_torch": 1, "binary_opening_torch": 2, "binary_closing_torch": 3}
    order = {"dilate": 0, "erode": 1, "open": 2, "close": 3}
    theirs = [names[operation.__name__] for one in drawn for operation in one["operators"]]
    same_law([order[e[1]] for one in ours for e in one], theirs, "operation", fresh_seed)
