"""Every flag acts where it says, in training and in inference, and the way back lands exactly on the native grid."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import read_image, read_labels
from ichbench.errors import InputError
from ichbench.prepare.downsample import downsample_case
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.locations import foreground_locations
from ichbench.prepare.pipeline import (
    Geometry,
    ShearedGridWarning,
    flagged_case,
    prepare_case,
    restore_labels,
    restore_logits,
    restore_scores,
    roundtrip,
)
from ichbench.prepare.plan import Plan, make_plan
from ichbench.prepare.resample import Resampling
from ichbench.prepare.window import ConstantImageWarning
from ichbench.recipe import Downsample, PlanRecipe, PrepareRecipe, Threshold, Window

LITERAL = Window(level_hu=96.0, width_hu=59.0)
SWAPPED = Window(level_hu=59.0, width_hu=96.0)


def head(shape: tuple[int, int, int] = (12, 48, 40), affine: np.ndarray | None = None, name: str = "head") -> Case:
    """A ball of brain (35 HU, noisy) in air with two clots of labels 1 and 2; 5 mm slices of 2.5 mm pixels."""
    rng = np.random.default_rng(7)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    image = np.full(shape, -1000.0)
    brain = z**2 + y**2 + x**2 < 0.95
    image[brain] = rng.normal(35, 5, brain.sum())
    labels = np.zeros(shape, np.int16)
    labels[(z - 0.1) ** 2 + (y + 0.2) ** 2 + (x - 0.3) ** 2 < 0.08] = 1
    labels[(z + 0.3) ** 2 + (y - 0.3) ** 2 + (x + 0.3) ** 2 < 0.06] = 2
    # wide enough to reach out of every window below: nnU-Net itself clips to the foreground, and a window beyond that is idle
    image[labels > 0] = rng.normal(55, 30, (labels > 0).sum())
    matrix = np.array([[0, 0, 2.5, 0], [0, 2.5, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]]) if affine is None else affine
    return Case(name, np.rint(image)[None].astype(np.float32), labels, Grid(shape, matrix))


def plan_for(cases: list[Case], recipe: PrepareRecipe, names: tuple[str, ...] = ("CT",), **plan: Any) -> Plan:
    found = fingerprint(flagged_case(case, recipe, names)[0] for case in cases)
    n = 0 if recipe.neighbour_slices == "off" else recipe.neighbour_slices
    return make_plan(found, PlanRecipe(**plan), names, 3, len(cases), n)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * ((a > 0) & (a == b)).sum() / ((a > 0).sum() + (b > 0).sum()))


def normalised(case: Case, plan: Plan) -> np.ndarray:
    facts = plan.intensities["0"]
    low, high = facts["percentile_00_5"], facts["percentile_99_5"]
    return (np.clip(case.image_czyx, low, high) - facts["mean"]) / facts["std"]


FLAGS: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"window": SWAPPED},
    "windows": {"window": (SWAPPED, Window(level_hu=35.0, width_hu=80.0))},
    "threshold": {"threshold": Threshold(low_hu=0.0, high_hu=80.0)},
    "max": {"downsample": Downsample(pooling="max")},
    "average": {"downsample": Downsample(pooling="average")},
    "sum": {"downsample": Downsample(pooling="sum")},
    "random": {"downsample": Downsample(pooling="random")},
    "spline": {"downsample": Downsample(factor=1.6, pooling="spline")},
    "thin": {"slice_spacing_mm": 2.2},
    "head": {"slice_crop": "head"},
    "reference": {"slice_crop": "reference"},
    "extension": {"slice_extension": 2},
    "neighbours": {"neighbour_slices": 1},
    "reorient": {"reorient": True},
    "reader": {"reorient": "NibabelIOWithReorient"},
    "reader as nnunet": {"reorient": "SimpleITKIOWithReorient", "compatibility": "nnunet"},
    "file order": {"compatibility": "nnunet"},
    "all": {
        "window": SWAPPED,
        "threshold": Threshold(low_hu=0.0, high_hu=80.0),
        "downsample": Downsample(pooling="average"),
        "slice_spacing_mm": 4.0,
        "slice_crop": "head",
        "slice_extension": 1,
        "neighbour_slices": 1,
    },
}
#: fields that change nothing on this case, which already lies as they want it
TRIVIAL = {"none", "file order", "reader", "reader as nnunet"}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_acts_and_comes_back(name: str, dims: int) -> None:
    case, recipe = head(), PrepareRecipe(**FLAGS[name])
    plan = plan_for([case], recipe, dims=dims)
    prepared = prepare_case(case, recipe, plan)
    blind = prepare_case(replace(case, labels_zyx=None), recipe, plan)
    assert prepared.image_czyx.dtype == np.float32
    assert prepared.image_czyx.shape == (plan.in_channels, *prepared.geometry.shape)
    assert prepared.labels_zyx is not None
    assert prepared.labels_zyx.shape == prepared.geometry.shape
    assert blind.labels_zyx is None
    assert not blind.foreground
    if name != "reference":  # the leak is the only difference that labels make
        np.testing.assert_array_equal(blind.image_czyx, prepared.image_czyx)
    # the flag is alive: the network sees something else than without it, though the plan be the same
    base = prepare_case(case, PrepareRecipe(), plan_for([case], PrepareRecipe(), dims=dims))
    same = base.image_czyx.shape == prepared.image_czyx.shape and bool((base.image_czyx == prepared.image_czyx).all())
    assert same is (name in TRIVIAL)
    back = restore_labels(prepared.labels_zyx, prepared.geometry)
    assert back.shape == case.grid.shape_zyx
    assert back.dtype == np.int16
    assert case.labels_zyx is not None
    changed = {"max", "average", "sum", "random", "spline", "thin", "all"}
    assert dice(back, case.labels_zyx) > 0.8 if name in changed else (back == case.labels_zyx).all()
    again = Geometry.from_json(json.loads(json.dumps(prepared.geometry.to_json())))
    assert again == prepared.geometry


def test_closed_forms_of_what_the_network_sees() -> None:
    case, padding = head(), ((0, 0), (2, 2), (0, 0), (0, 0))
    for name, expected in {
        "none": lambda: case,
        "window": lambda: replace(case, image_czyx=np.clip(case.image_czyx, 11, 107)),
        "threshold": lambda: replace(case, image_czyx=np.clip(case.image_czyx, 0.5, 80)),
        "max": lambda: downsample_case(case, Downsample(pooling="max")),
        "extension": lambda: Case("e", np.pad(case.image_czyx, padding, mode="edge"), None, Grid((16, 48, 40), np.eye(4))),
    }.items():
        # 0.5 instead of 0, so that no voxel counts as empty and the nonzero crop stays out of the comparison
        flags = FLAGS[name] if name != "threshold" else {"threshold": Threshold(low_hu=0.5, high_hu=80.0)}
        recipe = PrepareRecipe(**flags)
        for dims in (2, 3):
            plan = plan_for([case], recipe, dims=dims)
            for one in (case, replace(case, labels_zyx=None)):
                seen = prepare_case(one, recipe, plan)
                np.testing.assert_allclose(seen.image_czyx, normalised(expected(), plan), rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_window_wider_than_the_foreground_is_idle() -> None:
    """nnU-Net clips CT to the training foreground's 0.5-99.5 % anyway; a window that contains that range changes no bit."""
    case, recipe = head(), PrepareRecipe(window=Window(level_hu=55.0, width_hu=400.0))
    plan, windowed = plan_for([case], PrepareRecipe()), plan_for([case], recipe)
    assert {**windowed.to_json(), "intensities": 0} == {**plan.to_json(), "intensities": 0}
    np.testing.assert_array_equal(prepare_case(case, recipe, windowed).image_czyx, prepare_case(case, PrepareRecipe(), plan).image_czyx)


def test_crop_and_extension_keep_world_positions() -> None:
    case = head()
    flagged, flags, _ = flagged_case(case, PrepareRecipe(slice_crop="reference", slice_extension=1))
    assert case.labels_zyx is not None
    z = np.flatnonzero((case.labels_zyx > 0).any(axis=(1, 2)))
    assert flags.kept_slices == (z[0], z[-1] + 1)
    np.testing.assert_array_equal(flagged.image_czyx, case.image_czyx[:, z[0] - 1 : z[-1] + 2])
    np.testing.assert_allclose(flagged.grid.affine_4x4[:3, 3], [0, 0, 5 * (z[0] - 1)])


def test_the_head_crop_looks_at_the_raw_image_and_drops_the_rest() -> None:
    case = head((14, 48, 40))
    image = case.image_czyx.copy()
    image[:, :3], image[:, -2:] = -1000, -1000
    case = replace(case, image_czyx=image)
    recipe = PrepareRecipe(slice_crop="head", window=SWAPPED)  # after this window no voxel is below 0 HU
    flagged, flags, _ = flagged_case(case, recipe)
    assert flags.kept_slices == (3, 12)
    assert flagged.grid.shape_zyx[0] == 9
    prepared = prepare_case(case, recipe, plan_for([case], recipe))
    ones = np.stack([np.zeros(prepared.geometry.shape), np.ones(prepared.geometry.shape)]).astype(np.float32)
    assert np.flatnonzero(restore_logits(ones, prepared.geometry).any(axis=(1, 2))).tolist() == list(range(3, 12))


def test_extension_slices_are_context_and_never_predicted() -> None:
    case, recipe = head(), PrepareRecipe(slice_crop="reference", slice_extension=2)
    prepared = prepare_case(case, recipe, plan_for([case], recipe))
    logits = np.zeros((2, *prepared.geometry.shape), np.float32)
    logits[1, :2] = logits[1, -2:] = 5
    assert not restore_logits(logits, prepared.geometry).any()


SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 14), st.integers(2, 14))
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "window": st.just(SWAPPED),
        "downsample": st.sampled_from(
            [Downsample(factor=f, pooling=p) for f in (2, 3) for p in ("max", "random")] + [Downsample(factor=1.5, pooling="spline")]
        ),
        "slice_spacing_mm": st.sampled_from([1.3, 4.0, 11.0]),
        "slice_crop": st.sampled_from(["head", "reference"]),
        "slice_extension": st.integers(1, 3),
        "neighbour_slices": st.integers(1, 2),
        "reorient": st.sampled_from([True, "NibabelIOWithReorient", "SimpleITKIOWithReorient"]),
        "compatibility": st.just("nnunet"),
    },
)


@given(SHAPES, RECIPES, st.sampled_from([2, 3]), st.booleans(), st.integers(0, 2**16), st.permutations([0, 1, 2]))
@settings(max_examples=120)
def test_the_way_back_ends_on_the_native_grid(
    shape: tuple[int, int, int], flags: dict[str, Any], dims: int, resampled: bool, seed: int, file_axes: list[int]
) -> None:
    """Any shape, any (oblique) grid, any flags together: native shape, declared labels only, and the same in every run."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    # z stays within 45 degrees of the body axis, as reading a file makes it
    turn = turn[:, np.argsort([0 if k == np.argmax(np.abs(turn[2])) else 1 for k in range(3)], kind="stable")]
    affine = np.eye(4)
    affine[:3, :3] = turn * [rng.uniform(1, 8), rng.uniform(0.3, 2), rng.uniform(0.3, 2)]
    grid = replace(Grid(shape, affine), file_axes=(file_axes[0], file_axes[1], file_axes[2]))
    image = np.rint(rng.normal(40, 60, (1, *shape))).astype(np.float32) * (rng.random(shape) < 0.8)
    labels = rng.integers(0, 3, shape).astype(np.int16)
    image.ravel()[[0, -1]] = 50  # the nonzero box is the whole volume
    case, recipe = Case("any", image.astype(np.float32), labels, grid), PrepareRecipe(**flags)
    # brings foreground where downsampling or the crop leaves the first none, and another spacing if resampling is wanted
    second = head((6, 24, 24), None if resampled else affine)
    second = replace(second, grid=replace(second.grid, file_axes=grid.file_axes), labels_zyx=np.ones((6, 24, 24), np.int16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantImageWarning)
        try:
            plan = plan_for([case, second], recipe, dims=dims)
        except InputError:  # thick slices, or a crop, may leave a single one
            plan = plan_for([case, second], recipe, dims=2)
        prepared = prepare_case(case, recipe, plan)
        again = prepare_case(case, recipe, plan)
        result = roundtrip(case, recipe, plan)
    np.testing.assert_array_equal(prepared.image_czyx, again.image_czyx)
    assert np.isfinite(prepared.image_czyx).all()
    assert prepared.image_czyx.shape == (plan.in_channels, *prepared.geometry.shape)
    assert result.shape == shape
    assert set(np.unique(result)) <= {0, 1, 2}
    if not resampled and not flags.keys() & {"downsample", "slice_spacing_mm", "slice_crop"}:
        np.testing.assert_array_equal(result, labels)
    logits = rng.normal(size=(3, *prepared.geometry.shape)).astype(np.float32)
    assert restore_logits(logits, prepared.geometry).shape == shape


def test_without_size_changes_the_way_back_is_argmax_with_ties_to_the_lower_class() -> None:
    case = head()
    geometry = prepare_case(case, PrepareRecipe(), plan_for([case], PrepareRecipe())).geometry
    logits = np.random.default_rng(0).integers(0, 4, (3, *geometry.shape)).astype(np.float32)
    np.testing.assert_array_equal(restore_logits(logits, geometry), logits.argmax(axis=0))
    with pytest.raises(InputError, match=r"logits have shape \(2, 2, 2\), but the case was prepared to"):
        restore_logits(np.zeros((2, 2, 2, 2)), geometry)
    with pytest.raises(InputError, match="labels have shape"):
        restore_labels(np.zeros((2, 2, 2), np.int16), geometry)


def test_logits_are_interpolated_linearly_between_block_centres() -> None:
    case, recipe = head((2, 8, 8)), PrepareRecipe(downsample=Downsample(pooling="average"))
    image = case.image_czyx + 2000  # nothing is zero: no crop
    case = replace(case, image_czyx=image, labels_zyx=np.ones((2, 8, 8), np.int16))
    geometry = prepare_case(case, recipe, plan_for([case], recipe)).geometry
    assert geometry.shape == (2, 4, 4)
    logits = np.zeros((2, 2, 4, 4), np.float32)
    logits[1] = np.array([-1.0, -1.0, 2.0, 2.0])
    # centres at 0.5, 2.5, 4.5, 6.5: class 1 crosses zero at 2.5 + 2 / 3, so from pixel 4 on
    assert np.flatnonzero(restore_logits(logits, geometry)[0, 0]).tolist() == [4, 5, 6, 7]
    logits[1] = np.array([-1.0, -1.0, 4.0, 4.0])  # at 2.9: pixel 3 as well
    assert np.flatnonzero(restore_logits(logits, geometry)[0, 0]).tolist() == [3, 4, 5, 6, 7]


def test_the_empty_rim_is_minus_one_and_comes_back_as_background() -> None:
    case = head()
    image = case.image_czyx.copy()
    image[image == -1000] = 0
    case = replace(case, image_czyx=image)
    plan = plan_for([case], PrepareRecipe())
    prepared = prepare_case(case, PrepareRecipe(), plan)
    assert prepared.labels_zyx is not None
    assert (prepared.labels_zyx == -1).any()
    assert prepared.geometry.box != ((0, 12), (0, 48), (0, 40))
    ones = np.stack([np.zeros(prepared.geometry.shape), np.ones(prepared.geometry.shape)]).astype(np.float32)
    back = restore_logits(ones, prepared.geometry)
    inside = tuple(slice(*span) for span in prepared.geometry.box)
    assert back.sum() == back[inside].size == np.prod(prepared.geometry.cropped_shape)


def test_the_coarsest_axis_comes_first() -> None:
    case = head((40, 48, 12), np.diag([2.5, 2.5, 5.0, 1.0]))
    plan = plan_for([case], PrepareRecipe())
    assert plan.transpose_forward == (2, 0, 1)
    prepared = prepare_case(case, PrepareRecipe(), plan)
    np.testing.assert_allclose(prepared.image_czyx[0], normalised(case, plan)[0].transpose(2, 0, 1), rtol=1e-5, atol=1e-5)
    assert prepared.geometry.spacing_mm == (5.0, 2.5, 2.5)
    np.testing.assert_array_equal(roundtrip(case, PrepareRecipe(), plan), case.labels_zyx)


def test_two_dimensional_plans_leave_the_slices_alone() -> None:
    case = head()
    plan = plan_for([case], PrepareRecipe(), dims=2, spacing_mm=(2.0, 4.0))
    prepared = prepare_case(case, PrepareRecipe(), plan)
    assert prepared.geometry.shape == (12, 60, 25)
    assert prepared.geometry.new_spacing_mm == (5.0, 2.0, 4.0)
    assert case.labels_zyx is not None
    assert dice(roundtrip(case, PrepareRecipe(), plan), case.labels_zyx) > 0.9


def test_a_window_that_misses_the_foreground_says_so() -> None:
    """PHE: the literal window erases the edema, but not the bone; the training foreground is one value, so all is clipped to it."""
    case = head()
    image = case.image_czyx.copy()
    image[0, :, 20:24, 20:24] = 100
    case = replace(case, image_czyx=image, labels_zyx=((image[0] > 0) & (image[0] < 60)).astype(np.int16))
    recipe = PrepareRecipe(window=LITERAL)
    plan = plan_for([case], recipe)
    with pytest.warns(ConstantImageWarning, match=r"because the training foreground spans only \[66\.5, 66\.5\]"):
        prepared = prepare_case(case, recipe, plan)
    assert len(prepared.notes) == 1
    assert np.isfinite(prepared.image_czyx).all()
    assert np.ptp(prepared.image_czyx) == 0


def test_a_plan_for_other_channels_is_refused() -> None:
    case = head()
    with pytest.raises(InputError, match="plan again"):
        prepare_case(case, PrepareRecipe(window=(SWAPPED, LITERAL)), plan_for([case], PrepareRecipe()))
    with pytest.raises(InputError, match="1 channels, but the cohort declares"):
        flagged_case(case, PrepareRecipe(), ("CT", "T1"))
    with pytest.raises(InputError, match="NaN or infinite"):
        flagged_case(replace(case, image_czyx=case.image_czyx * np.float32(np.nan)), PrepareRecipe())
    with pytest.raises(InputError, match="needs a CT channel"):
        flagged_case(case, PrepareRecipe(slice_crop="head"), ("T1",))
    with pytest.raises(InputError, match="needs a reference mask"):
        roundtrip(replace(case, labels_zyx=None), PrepareRecipe(), plan_for([case], PrepareRecipe()))


def test_a_sheared_grid_is_prepared_with_a_word() -> None:
    sheared = head(affine=np.array([[0, 0, 2.5, 0], [0.5, 2.5, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]]))
    plan = plan_for([head()], PrepareRecipe())
    with pytest.warns(ShearedGridWarning, match=r"case head: its axes are 84\.3 degrees apart instead of 90"):
        prepared = prepare_case(sheared, PrepareRecipe(), plan)
    assert len(prepared.notes) == 1
    assert "nnU-Net refuses such files" in prepared.notes[0]


def test_the_mean_of_a_channel_does_not_depend_on_how_the_file_was_read() -> None:
    """float32 sums depend on the order in memory; compatibility = "nnunet" takes nnU-Net's, whichever way the case was read."""
    rng = np.random.default_rng(3)
    image = rng.normal(30_000, 3, (1, 30, 40, 50)).astype(np.float32)
    grid = replace(Grid((30, 40, 50), np.diag([5.0, 1.0, 1.0, 1.0])), file_axes=(0, 2, 1))
    case = Case("bright", image, None, grid)
    recipe = PrepareRecipe(compatibility="nnunet")
    in_file_order, _, _ = flagged_case(case, recipe, ("MR",))
    assert in_file_order.image_czyx.flags.c_contiguous
    assert in_file_order.grid.file_axes == (2, 1, 0)


def test_foreground_locations_are_nnunets_sample() -> None:
    labels = np.zeros((30, 60, 60), np.int16)
    labels[:10], labels[10:12, :5, :5], labels[-1] = 1, 2, -1
    found = foreground_locations(labels)
    assert {label: len(at) for label, at in found.items()} == {1: 10_000, 2: 50}
    for label, at in found.items():
        assert (labels[tuple(at.T)] == label).all()
        assert len(np.unique(at, axis=0)) == len(at)
    generator = np.random.RandomState(1234)
    first = np.argwhere(labels == 1)[generator.choice(36_000, 10_000, replace=False)]
    np.testing.assert_array_equal(found[1], first)
    np.testing.assert_array_equal(found[2], np.argwhere(labels == 2)[generator.choice(50, 50, replace=False)])


def test_a_real_head_survives(shared_data: Path) -> None:
    folder = shared_data / "Dataset501_PHE"
    label_file = sorted((folder / "labelsTr").glob("*.nii.gz"))[0]
    name = label_file.name.removesuffix(".nii.gz")
    image, grid = read_image(folder / "imagesTr" / f"{name}_0000.nii.gz")
    labels, _ = read_labels(label_file)
    case = Case(name, image[None], labels, grid)
    plan = plan_for([case], PrepareRecipe())
    np.testing.assert_array_equal(roundtrip(case, PrepareRecipe(), plan), labels)
    recipe = PrepareRecipe(window=SWAPPED, downsample=Downsample(), slice_crop="head", slice_extension=1, neighbour_slices=1)
    plan = plan_for([case], recipe, dims=2)
    assert plan.in_channels == 3
    assert dice(roundtrip(case, recipe, plan), labels) > 0.85


def test_logits_come_back_from_the_plans_spacing_by_linear_interpolation() -> None:
    """The same closed form as for downsampling, but now the plan has doubled the spacing in plane."""
    case = head((2, 8, 8))
    case = replace(case, image_czyx=case.image_czyx + 2000, labels_zyx=np.ones((2, 8, 8), np.int16))
    plan = plan_for([case], PrepareRecipe(), dims=2, spacing_mm=(5.0, 5.0))
    geometry = prepare_case(case, PrepareRecipe(), plan).geometry
    assert geometry.shape == (2, 4, 4)
    logits = np.zeros((2, 2, 4, 4), np.float32)
    logits[1] = np.array([-1.0, -1.0, 4.0, 4.0])
    assert np.flatnonzero(restore_logits(logits, geometry)[0, 0]).tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("thick", [1.0, 5.0])
@pytest.mark.parametrize("how", ["torch", "torch_sepz"])
def test_torchs_resampling_there_and_back(thick: float, how: Resampling) -> None:
    """torch itself is the oracle; slices of 5 mm are resampled apart by the rule of thick slices, and only by that."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag([thick, 0.9, 0.8])
    case = head((9, 40, 36), affine)
    plan = replace(plan_for([case], PrepareRecipe()), spacing=(thick * 0.7, 1.3, 0.6), transpose_forward=(0, 1, 2), resampling=how)
    prepared = prepare_case(case, PrepareRecipe(), plan)
    geometry = prepared.geometry
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry
    assert "resampling" not in replace(geometry, resampling="spline").to_json()

    def resized(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None]
        if how == "torch" or thick == 1:
            return interpolate(values, shape, mode="trilinear")[0, 0].numpy()
        in_plane = interpolate(values, (values.shape[2], *shape[1:]), mode="trilinear")
        return interpolate(in_plane, shape, mode="nearest-exact")[0, 0].numpy()

    inside = tuple(slice(*span) for span in geometry.box)
    whole = normalised(case, plan)[0][inside].astype(np.float32)
    np.testing.assert_allclose(prepared.image_czyx[0], resized(whole, geometry.shape), atol=1e-5)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, *geometry.shape)).astype(np.float16)
    native = np.stack([resized(one, geometry.cropped_shape) for one in logits])
    np.testing.assert_allclose(restore_scores(logits, geometry)[(slice(None), *inside)], native, atol=1e-5)
    assert restore_scores(logits, geometry).dtype == np.float32
    back, sure = restore_logits(logits, geometry)[inside], np.sort(native, axis=0)
    assert ((back == native.argmax(0)) | (sure[-1] - sure[-2] < 1e-5)).all()
    # the usual resampling takes the same linear way back, but for thick slices
    usual = restore_logits(logits, replace(geometry, resampling="spline"))[inside]
    assert (back != usual).mean() > 0.05 if how == "torch" and thick > 1 else (back != usual).mean() < 1e-3
