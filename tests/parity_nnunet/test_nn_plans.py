"""Whole plans files against nnunetv2's own planners, on fingerprints drawn anew in each run and on the real cohorts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nnunetv2")

from nn_planners import their_plans

from ichbench.errors import InputError
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.plan import Planner, plan_all
from ichbench.prepare.plans_json import plans_table, plans_text
from ichbench.prepare.plans_read import count_labels, plan_of, plans_of
from ichbench.prepare.topology import FAMILIES
from ichbench.recipe import PlanRecipe

N_DRAWN = 60
NAMES = ["CT", "ct", "MR", "T1", "noNorm", "zscore", "rescale_to_0_1", "rgb_to_0_1", "PET"]
INTENSITY = ["max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"]


@pytest.fixture(autouse=True, scope="module")
def networks_built_once() -> Iterator[None]:
    """nnunetv2 builds a network for every patch it tries; here one that was built before is asked again."""
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as module

    built: dict[str, Any] = {}
    build = module.get_network_from_plans

    def once(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, kwargs))
        if key not in built:
            built[key] = build(*args, **kwargs)
        return built[key]

    module.get_network_from_plans = once
    yield
    module.get_network_from_plans = build


def drawn_cohort(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A fingerprint, a dataset.json and planner arguments: everyday ones and odd ones."""
    n = int(rng.integers(1, 9))
    kind = rng.choice(["head_ct", "isotropic", "any", "mixed_thick", "flat", "tiny", "large", "ties"])
    if kind == "head_ct":
        spacings = np.stack([rng.choice([2.5, 4.0, 5.0, 4.97], n), *[rng.uniform(0.35, 0.6, n)] * 2], axis=1)
        shapes = np.stack([rng.integers(20, 60, n), *[np.full(n, 512)] * 2], axis=1)
    elif kind == "isotropic":
        spacings = np.repeat(rng.uniform(0.5, 2.0, (n, 1)), 3, axis=1)
        shapes = rng.integers(20, 300, (n, 3))
    elif kind == "mixed_thick":
        spacings = np.stack([rng.choice([1.0, 3.0, 5.0, 10.0], n), rng.uniform(0.3, 1.6, n), rng.uniform(0.3, 1.6, n)], axis=1)
        shapes = np.stack([rng.integers(4, 40, n), rng.integers(100, 400, n), rng.integers(100, 400, n)], axis=1)
    elif kind == "flat":
        in_plane = rng.uniform(0.2, 3.0, (n, 2)) if rng.random() < 0.5 else np.ones((n, 2))
        spacings = np.concatenate([999 * in_plane.max(1, keepdims=True), in_plane], axis=1)
        shapes = np.concatenate([np.ones((n, 1), int), rng.integers(5, 3000, (n, 2))], axis=1)
    elif kind == "tiny":
        spacings = rng.uniform(0.5, 3.0, (n, 3))
        shapes = rng.integers(3, 20, (n, 3))
    elif kind == "large":
        spacings = rng.uniform(0.2, 1.5, (n, 3))
        shapes = rng.integers(300, 1400, (n, 3))
    elif kind == "ties":
        spacings = np.repeat(rng.choice([0.5, 1.0, 2.0, 3.0, 6.0], (1, 3)), n, axis=0)
        shapes = np.repeat(rng.choice([32, 64, 96, 128, 256, 512], (1, 3)), n, axis=0)
    else:
        spacings = np.exp(rng.uniform(-1.5, 2.5, (n, 3)))
        shapes = np.exp(rng.uniform(1.5, 6.5, (n, 3))).astype(int)
    if kind != "flat":
        order = rng.permutation(3) if rng.random() < 0.4 else np.arange(3)
        spacings, shapes = spacings[:, order], shapes[:, order]
    if rng.random() < 0.3:
        spacings = spacings.astype(np.float32).astype(np.float64)
    channels = [str(rng.choice(NAMES)) for _ in range(int(rng.integers(1, 5)))]
    n_labels = int(rng.choice([2, 3, 4, 15, 117]))
    labels: dict[str, Any] = {"background": 0} | {f"l{value}": value for value in range(1, n_labels)}
    dataset: dict[str, Any] = {}
    if n_labels > 2 and rng.random() < 0.3:
        labels = {"background": 0, "whole": list(range(1, n_labels))} | {f"l{value}": value for value in range(2, n_labels)}
        dataset["regions_class_order"] = list(range(1, n_labels))
    if rng.random() < 0.3:
        labels["ignore"] = n_labels
    dataset |= {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": labels,
        "numTraining": int(rng.choice([n, 3, 30, 200, 2000])),
        "file_ending": ".nii.gz",
    }
    fingerprint = {
        "foreground_intensity_properties_per_channel": {
            str(index): {name: float(rng.normal(40, 30)) for name in INTENSITY} for index in range(len(channels))
        },
        "median_relative_size_after_cropping": float(rng.choice([1.0, 0.75, 0.7499, rng.uniform(0.1, 1)])),
        "shapes_after_crop": shapes.tolist(),
        "spacings": spacings.tolist(),
    }
    arguments: dict[str, Any] = {}
    if kind != "flat" and rng.random() < 0.2:
        arguments["overwrite_target_spacing"] = [float(value) for value in np.exp(rng.uniform(-0.5, 1.5, 3))]
    if rng.random() < 0.2:
        arguments["gpu_memory_target_in_gb"] = float(rng.choice([4, 6.5, 11, 48]))
    if rng.random() < 0.1:
        arguments["plans_name"] = "myPlans"
    return fingerprint, dataset, arguments


def ours(family: str, fingerprint: dict[str, Any], dataset: dict[str, Any], arguments: dict[str, Any]) -> str:
    fields: dict[str, Any] = {"family": family}
    if "overwrite_target_spacing" in arguments:
        fields["target_spacing_zyx_mm"] = tuple(arguments["overwrite_target_spacing"])
    if "gpu_memory_target_in_gb" in arguments:
        fields["memory_gb"] = arguments["gpu_memory_target_in_gb"]
    found = Fingerprint.from_json(fingerprint)
    n_labels, n_classes = count_labels(dataset["labels"])
    channels = tuple(dataset["channel_names"].values())
    planned = plan_all(Planner(found, PlanRecipe(**fields), channels, n_labels, dataset["numTraining"], n_classes=n_classes))
    plans = {name: sized.plan for name, sized in planned.configurations.items()}
    table = plans_table(plans, found, "Dataset900_Drawn", family, arguments.get("plans_name"))
    # what was written comes back as the same plans
    assert plans_of(json.loads(plans_text(table)), dataset) == plans
    return plans_text(table)


@pytest.mark.parametrize("part", range(5))
def test_plans_files_are_equal_character_by_character(nnunet_folders: Path, fresh_seed: int, part: int) -> None:
    rng = np.random.default_rng([fresh_seed, part])
    refused = 0
    for number in range(N_DRAWN // 5):
        fingerprint, dataset, arguments = drawn_cohort(rng)
        for family in FAMILIES:
            about = (fresh_seed, part, number, family, fingerprint["spacings"], fingerprint["shapes_after_crop"], dataset, arguments)
            try:
                expected = their_plans(nnunet_folders, family, fingerprint, dataset, arguments)
            except (ZeroDivisionError, OverflowError, ValueError, AssertionError, IndexError, RuntimeError) as error:
                refused += 1
                with pytest.raises(InputError):
                    ours(family, fingerprint, dataset, arguments)
                print("nnunetv2 dies:", repr(error), about)
                continue
            assert ours(family, fingerprint, dataset, arguments) == expected, about
    assert refused < N_DRAWN // 10


def test_their_manager_resolves_our_file(fresh_seed: int) -> None:
    """Every configuration of our file builds nnunetv2's network with the number of outputs and input channels that we say."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    rng = np.random.default_rng([fresh_seed, 99])
    seen = set()
    for _ in range(12):
        fingerprint, dataset, arguments = drawn_cohort(rng)
        for family in ("plain", "resenc_l"):
            table = json.loads(ours(family, fingerprint, dataset, arguments))
            manager = PlansManager(table)
            heads = manager.get_label_manager(dataset).num_segmentation_heads
            for name in table["configurations"]:
                plan, found = plan_of(table, name, dataset), manager.get_configuration(name)
                seen.add(name)
                assert plan.n_classes == heads
                assert (list(plan.patch_size), plan.batch_size) == (found.patch_size, found.batch_size)
                assert (plan.previous_stage, list(plan.next_stage)) == (found.previous_stage_name, found.next_stage_names or [])
                with torch.device("meta"):
                    network = get_network_from_plans(
                        found.network_arch_class_name,
                        found.network_arch_init_kwargs,
                        found.network_arch_init_kwargs_req_import,
                        len(plan.channels),
                        len(dataset["labels"]),
                        allow_init=False,
                    )
                    if plan.n_stages > 1:
                        assert network.compute_conv_feature_map_size(plan.patch_size) == plan.estimate
    assert {"2d", "3d_fullres"} <= seen
