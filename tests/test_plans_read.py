"""nnU-Net's plans files: what is read back, what is refused and how."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.nnunet_plans import COHORTS

from ichbench.errors import InputError
from ichbench.prepare.configuration import Plan
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.plan import Planner, plan_all
from ichbench.prepare.plans_json import plans_table, plans_text
from ichbench.prepare.plans_read import count_labels, plan_of, plans_of, read_plans
from ichbench.recipe import PlanRecipe

FINGERPRINT, DATASET = COHORTS["CT_abd_2.5"]


def made(family: str = "plain") -> dict[str, Plan]:
    found = Fingerprint.from_json(FINGERPRINT)
    planned = plan_all(Planner(found, PlanRecipe(family=family), ("CT",), 16, 30))  # type: ignore[arg-type]
    return {name: sized.plan for name, sized in planned.configurations.items()}


def table(family: str = "plain") -> dict[str, Any]:
    written: dict[str, Any] = json.loads(plans_text(plans_table(made(family), Fingerprint.from_json(FINGERPRINT), "Dataset001_X", family)))
    return written


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(plans_text(table("resenc_m")))
    assert plans_of(read_plans(path), DATASET) == made("resenc_m")
    assert list(table()) == [
        "dataset_name", "plans_name", "original_median_spacing_after_transp", "original_median_shape_after_transp", "image_reader_writer",
        "transpose_forward", "transpose_backward", "configurations", "experiment_planner_used", "label_manager",
        "foreground_intensity_properties_per_channel",
    ]  # fmt: skip
    assert list(table()["configurations"]) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert table()["configurations"]["3d_cascade_fullres"] == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    assert table()["configurations"]["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    # whole numbers in the low-resolution stage alone, as nnU-Net rounds them there alone
    assert table()["configurations"]["3d_lowres"]["median_image_size_in_voxels"] == [126, 252, 252]
    assert isinstance(table()["configurations"]["3d_fullres"]["median_image_size_in_voxels"][0], float)


def test_data_of_the_residual_planners_are_shared() -> None:
    names = {name: made["data_identifier"] for name, made in table("resenc_m")["configurations"].items() if "data_identifier" in made}
    assert names == {"2d": "nnUNetPlans_2d", "3d_lowres": "nnUNetResEncUNetMPlans_3d_lowres", "3d_fullres": "nnUNetPlans_3d_fullres"}


def test_inheritance_is_followed_to_its_end() -> None:
    plans = table()
    plans["configurations"]["mine"] = {"inherits_from": "3d_cascade_fullres", "batch_size": 7}
    plans["configurations"]["wider"] = {"inherits_from": "mine", "patch_size": [64, 192, 160], "next_stage": ["a", "b"]}
    plan = plan_of(plans, "wider", DATASET)
    assert (plan.batch_size, plan.patch_size, plan.previous_stage) == (7, (64, 192, 160), "3d_lowres")
    assert (plan.configuration, plan.next_stage) == ("wider", ("a", "b"))
    assert plan.strides == made()["3d_fullres"].strides


def test_single_numbers_stand_for_all_stages_and_axes() -> None:
    plans = table()
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs |= {"n_conv_per_stage": 3, "n_conv_per_stage_decoder": 1, "kernel_sizes": 3}
    plan = plan_of(plans, "3d_fullres", DATASET)
    assert (plan.convs_per_stage, plan.decoder_convs, plan.kernels) == ((3,) * 6, (1,) * 5, ((3, 3, 3),) * 6)
    kwargs["n_conv_per_stage"] = [1, 2, 3, 4, 5, 6]
    assert plan_of(plans, "3d_fullres", DATASET).convs_per_stage == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("family", ["plain", "resenc_l"])
def test_files_from_before_architectures_were_named(family: str) -> None:
    new, old = table(family), table(family)
    for configuration in old["configurations"].values():
        if "architecture" not in configuration:
            continue
        kwargs = configuration.pop("architecture")["arch_kwargs"]
        configuration |= {
            "UNet_class_name": "PlainConvUNet" if family == "plain" else "ResidualEncoderUNet",
            "UNet_base_num_features": 32,
            "unet_max_num_features": max(kwargs["features_per_stage"]),
            "n_conv_per_stage_encoder": kwargs.get("n_conv_per_stage") or kwargs["n_blocks_per_stage"],
            "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
            "num_pool_per_axis": [5, 5, 5],
            "pool_op_kernel_sizes": kwargs["strides"],
            "conv_kernel_sizes": kwargs["kernel_sizes"],
        }
    old["foreground_intensity_properties_by_modality"] = old.pop("foreground_intensity_properties_per_channel")
    assert plans_of(old, DATASET) == plans_of(new, DATASET)


def changed(**values: Any) -> dict[str, Any]:
    """plans with keys of 3d_fullres, or below it ("arch_kwargs__norm_op"), changed or removed (None ... "gone")."""
    plans = copy.deepcopy(table())
    place = plans["configurations"]["3d_fullres"]
    for key, value in values.items():
        inner = place
        if key.startswith("arch_kwargs__"):
            inner, key = place["architecture"]["arch_kwargs"], key.removeprefix("arch_kwargs__")
        elif key == "network_class_name":
            inner = place["architecture"]
        if value == "gone":
            del inner[key]
        else:
            inner[key] = value
    return plans


def torch_settings(force_separate_z: bool | None, **more: object) -> dict[str, Any]:
    """What nnU-Net's planners named torchres write, and more."""
    found: dict[str, Any] = {}
    for kind in ("data", "seg", "probabilities"):
        found[f"resampling_fn_{kind}"] = "resample_torch_fornnunet"
        settings = {"is_seg": kind == "seg", "force_separate_z": force_separate_z, "memefficient_seg_resampling": False}
        found[f"resampling_fn_{kind}_kwargs"] = settings | more
    return found


@pytest.mark.parametrize(("force", "how"), [(False, "torch"), (None, "torch_sepz")])
def test_plans_that_resample_by_torch(force: bool | None, how: str) -> None:
    """Read, kept in plan.json, and written again as they came; what is left out counts as torch's function has it."""
    for values in (torch_settings(force), torch_settings(force, num_threads=2)):
        plan = plan_of(changed(**values), "3d_fullres", DATASET)
        assert plan.resampling == how
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    written = plans_table({"3d_fullres": plan}, Fingerprint(((1.0, 1.0, 1.0),), ((9, 9, 9),), {}, 1.0), "x")["configurations"]["3d_fullres"]
    assert {key: written[key] for key in torch_settings(force)} == torch_settings(force)
    lacking = torch_settings(force)
    for kind in ("data", "probabilities"):
        lacking[f"resampling_fn_{kind}_kwargs"] = {} if force is None else {"force_separate_z": force}
    assert plan_of(changed(**lacking), "3d_fullres", DATASET).resampling == how
    usual = plan_of(table(), "3d_fullres", DATASET)
    assert usual.resampling == "spline"
    assert "resampling" not in usual.to_json()
    with pytest.raises(InputError, match="resampling is 'cubic'; known are spline, torch, torch_sepz"):
        Plan.from_json(plan.to_json() | {"resampling": "cubic"})


REFUSED = [
    ({"network_class_name": "os.system"}, "the network is 'os.system'; PlainConvUNet and ResidualEncoderUNet can be read"),
    ({"network_class_name": "nnunetv2.Primus"}, "the network is 'nnunetv2.Primus'"),
    ({"preprocessor_name": "Mine"}, "preprocessor_name is 'Mine', but only 'DefaultPreprocessor' is built here"),
    ({"resampling_fn_data": "resample_torch_fornnunet"}, "resampling_fn_data is 'resample_torch_fornnunet'"),
    ({"resampling_fn_probabilities": "no_resampling_hack"}, "resampling_fn_probabilities is 'no_resampling_hack', but only"),
    (torch_settings(True), "resampling_fn_data_kwargs is {'is_seg': False, 'force_separate_z': True"),
    (torch_settings(False, mode="nearest"), "'mode': 'nearest'}, but only {'is_seg': False, 'force_separate_z': False, "),
    (torch_settings(False, memefficient_seg_resampling=True), "resampling_fn_data_kwargs is"),
    (torch_settings(False, device="cuda"), "resampling_fn_data_kwargs is"),
    (torch_settings(False) | {"resampling_fn_seg_kwargs": {"is_seg": True}}, "for all three with one force_separate_z, is built here"),
    (torch_settings(None) | {"resampling_fn_seg_kwargs": {}}, "resampling_fn_seg_kwargs is {}, but only"),
    ({"resampling_fn_seg_kwargs": {"order": 0}}, "resampling_fn_seg_kwargs is"),
    # what is left out counts as nnU-Net's function has it: force_separate_z = False, and order = 3 for masks too
    ({"resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0}}, "resampling_fn_data_kwargs is"),
    ({"resampling_fn_seg_kwargs": {"is_seg": True, "order_z": 0, "force_separate_z": None}}, "resampling_fn_seg_kwargs is"),
    ({"resampling_fn_seg_kwargs": {"order": 1, "order_z": 0, "force_separate_z": None}}, "resampling_fn_seg_kwargs is"),
    ({"resampling_fn_probabilities_kwargs": {}}, "resampling_fn_probabilities_kwargs is"),
    ({"resampling_fn_probabilities_kwargs": "gone"}, "the entry 'resampling_fn_probabilities_kwargs' is missing"),
    ({"resampling_fn_data": "gone"}, "the entry 'resampling_fn_data' is missing"),
    ({"spacing": [1e-3] * 3}, "is not within 0.01 to 100,000 mm"),
    ({"spacing": [5e5, 1.0, 1.0]}, "is not within 0.01 to 100,000 mm"),
    ({"patch_size": [40_000_000] * 3}, "has more than 268,435,456 voxels"),
    ({"batch_size": 10**30}, "batch_size 1e+30 is above"),
    ({"normalization_schemes": ["Own"]}, "the normalization 'Own' is not known; known are CTNormalization"),
    ({"arch_kwargs__norm_op": "torch.nn.BatchNorm3d"}, "norm_op is 'BatchNorm3d', but only 'InstanceNorm3d'"),
    ({"arch_kwargs__conv_op": "torch.nn.Conv2d"}, "conv_op is 'Conv2d'"),
    ({"arch_kwargs__nonlin_kwargs": {"negative_slope": 0.1}}, "negative_slope is 0.1"),
    ({"arch_kwargs__dropout_op": "torch.nn.Dropout"}, "dropout_op is 'torch.nn.Dropout'"),
    ({"arch_kwargs__conv_bias": False}, "conv_bias is False"),
    ({"arch_kwargs__strides": "gone"}, "the entry 'strides' is missing"),
    ({"batch_dice": "gone"}, "the entry 'batch_dice' is missing"),
    ({"patch_size": [56, 192, 161]}, "is not a multiple of the strides' product"),
    ({"patch_size": [56.5, 192, 160]}, "does not read as a plan"),
    ({"patch_size": 56}, "does not read as a plan"),
    ({"arch_kwargs__n_stages": 5}, "does not read as a plan"),
    ({"arch_kwargs__n_conv_per_stage": [2, 2]}, "6 numbers are needed"),
    ({"spacing": [1.0, 2.0]}, "has 3 axes, but spacing"),
    ({"batch_size": 0}, "whole numbers from 1 are needed, not [0]"),
    ({"spacing": [1.0, -2.0, 1.0]}, "positive numbers are needed"),
    ({"use_mask_for_norm": [False, False], "normalization_schemes": ["CTNormalization"] * 2}, "but dataset.json names 1"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[f"{next(iter(values))}-{n}" for n, (values, _) in enumerate(REFUSED)])
def test_what_cannot_be_built_here_is_refused_with_one_message(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(changed(**values), "3d_fullres", DATASET, "some/plans.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("some/plans.json, configuration '3d_fullres': ")
    assert str(caught.value).count("some/plans.json") == 1
    # the others are read all the same
    assert plan_of(changed(**values), "2d", DATASET).dims == 2


def test_circles_and_unknown_configurations() -> None:
    plans = table()
    plans["configurations"] |= {"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}, "c": {"inherits_from": "nowhere"}}
    with pytest.raises(InputError, match="in a circle: a -> b -> a"):
        plan_of(plans, "a", DATASET)
    with pytest.raises(InputError, match="no configuration 'nowhere'; there are '2d', '3d_lowres'"):
        plan_of(plans, "c", DATASET)
    plans["transpose_backward"] = [1, 2, 0]
    with pytest.raises(InputError, match="do not undo each other"):
        plan_of(plans, "2d", DATASET)


def test_files_that_are_not_plans(tmp_path: Path) -> None:
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "not an nnU-Net plans file"),
        ('{"configurations": {}}', "not an nnU-Net"),
        ("[" * 200_000, "cannot be read as JSON"),
        (json.dumps(table() | {"plans_name": ""}), "plans_name is '', but must be a name"),
        (json.dumps({key: value for key, value in table().items() if key != "dataset_name"}), "dataset_name is missing"),
    ):
        (tmp_path / "plans.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_plans(tmp_path / "plans.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_plans(tmp_path / "none.json")


def test_settings_that_nnunet_fills_alike_may_be_left_out() -> None:
    kwargs = {"force_separate_z": None, "separate_z_anisotropy_threshold": 3}
    assert plan_of(changed(resampling_fn_data_kwargs=kwargs), "3d_fullres", DATASET) == made()["3d_fullres"]


@pytest.mark.parametrize("facts", [{}, {"0": {"percentile_00_5": 0, "percentile_99_5": 1, "std": 1}}, {"0": {"mean": float("nan")}}])
def test_a_ct_channel_needs_its_statistics(facts: dict[str, Any]) -> None:
    plans = table()
    known = plans["foreground_intensity_properties_per_channel"]["0"]
    plans["foreground_intensity_properties_per_channel"] = {key: known | one if "mean" in one else one for key, one in facts.items()}
    with pytest.raises(InputError, match=r"channel 0 \(CT\) is normalised as CT, but (mean|percentile_00_5) in foreground_"):
        plan_of(plans, "3d_fullres", DATASET)
    for configuration in plans["configurations"].values():
        if "normalization_schemes" in configuration:
            configuration["normalization_schemes"] = ["ZScoreNormalization"]
    assert plan_of(plans, "3d_fullres", DATASET).normalization == ("ZScoreNormalization",)


def test_labels_and_outputs() -> None:
    assert count_labels({"background": 0, "a": 1, "b": 2}) == (3, 3)
    assert count_labels({"background": 0, "a": 1, "ignore": 2}) == (3, 2)
    assert count_labels({"background": 0, "whole": [1, 2], "core": 2}) == (3, 2)
    assert count_labels({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}) == (4, 2)
    assert count_labels({"background": 0, "a": [1], "b": [2]}) == (3, 3)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def test_whatever_a_file_says_it_is_a_plan_or_one_message() -> None:
    """A thousand damaged files: a value anywhere replaced, or removed, never ends in anything but a plan or an `InputError`."""
    rng = np.random.default_rng(11)
    values = [None, -1, 0, 2, 1e9, 0.5, float("nan"), float("inf"), "", "x", [], [1], [1, 2, 3], [[1]], {}, {"a": 1}, True, [None], ["a"]]
    good = table("resenc_m") | {"dataset": DATASET}
    everywhere = [path for path in places(good) if path]
    outcomes = {"plan": 0, "refused": 0}
    for _ in range(1000):
        damaged = copy.deepcopy(good)
        for _ in range(int(rng.integers(1, 3))):
            inner, path = damaged, everywhere[rng.integers(len(everywhere))]
            try:
                for key in path[:-1]:
                    inner = inner[key]
                if rng.random() < 0.2:
                    del inner[path[-1]]
                else:
                    inner[path[-1]] = copy.deepcopy(values[rng.integers(len(values))])
            except (KeyError, IndexError, TypeError):
                continue  # an earlier damage took the place away
        dataset = damaged.pop("dataset", DATASET)
        for name in ("3d_cascade_fullres", "2d"):
            try:
                assert isinstance(plan_of(damaged, name, dataset), Plan)
                outcomes["plan"] += 1
            except InputError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
