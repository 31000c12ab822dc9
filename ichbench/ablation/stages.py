"""The work of each kind of step: cases to prepared cases, prepared cases to weights, weights to masks, masks to score rows.

A stage reads its spec and the finished inputs, and writes files into one folder. What it returns is published with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichbench.cases.cohort import Cohort
from ichbench.compute import ONE_CORE, Compute, computing
from ichbench.errors import InputError


@dataclass(frozen=True)
class Task:
    """What a stage function gets: the spec, where the cohort lies, the finished inputs, and a folder to write to.

    What it writes to `kept` is there again in the next attempt, if this one does not end.
    """

    spec: dict[str, Any]
    where: dict[str, str]
    inputs: dict[str, Path]
    out: Path
    compute: Compute = ONE_CORE
    kept: Path | None = None

    def model(self, name: str, model: Any) -> Any:
        """A part of the recipe out of the spec."""
        return model.model_validate_json(json.dumps(self.spec[name]))


def _mask(folder: Path, name: str, keep_file_order: bool, turn: bool | str) -> Any:
    """A predicted mask as `Cohort.load` reads its case."""
    from ichbench.cases.images import read_labels, reorient

    path = folder / f"{name}.nii.gz"
    labels, grid = read_labels(path, keep_file_order)
    turned = isinstance(turn, str) or (turn and not keep_file_order)
    return reorient([labels], grid, path, turn)[0][0] if turned else labels


def _check_digests(cohort: Cohort, expected: dict[str, str]) -> None:
    """The files must still hold what they held when the step was named after them."""
    changed = [name for name, digest in expected.items() if cohort.case_digest(name) != digest]
    if changed:
        raise InputError(
            f"{len(changed)} case(s) of cohort {cohort.name} changed since the study was planned: {', '.join(changed[:5])}; "
            "run the study again"
        )


def _prepare(task: Task) -> dict[str, Any]:
    from ichbench.cases.cohort import read_cohort
    from ichbench.prepare.whole import prepare_cohort
    from ichbench.recipe import PlanRecipe, PrepareRecipe

    prepare = task.model("prepare", PrepareRecipe)
    cohort = read_cohort(Path(task.where["cohort"]), reorient=prepare.reorient)
    _check_digests(cohort, task.spec["cases"])
    plan = prepare_cohort(cohort, list(task.spec["cases"]), prepare, task.model("plan", PlanRecipe), task.out)
    print("\n".join(plan.explain()), flush=True)  # noqa: T201
    return {"plan": plan.explain()}


def _previous(task: Task) -> dict[str, Any]:
    import numpy as np

    from ichbench.cases.cohort import read_cohort
    from ichbench.inference.cascade import previous_labels
    from ichbench.prepare.configuration import read_plan
    from ichbench.prepare.store import read_prepared
    from ichbench.recipe import PrepareRecipe

    prepare = task.model("prepare", PrepareRecipe)
    cohort = read_cohort(Path(task.where["cohort"]), reorient=prepare.reorient)
    _check_digests(cohort, task.spec["cases"])
    keep = prepare.compatibility == "nnunet"
    plan = read_plan(task.inputs["prepare"] / "plan.json")
    for fold, names in task.spec["folds"].items():
        for name in names:
            case = cohort.load(name, keep, with_labels=False)
            labels = _mask(task.inputs[fold], name, keep, prepare.reorient)
            prepared = read_prepared(task.inputs["prepare"] / "cases", name)
            found = previous_labels(case, labels, prepared, prepare, plan, cohort.rules)
            # outside the nonzero mask is background here: it has no channel either way
            np.save(task.out / f"{name}.npy", np.maximum(found, 0).astype(np.uint8))
    return {}


def train_stage(task: Task, **options: Any) -> dict[str, Any]:
    """The stage `train`; `options` are those of `trainer.train`."""
    import numpy as np

    from ichbench.augmentation.patches import TrainingCase
    from ichbench.cases.labels import rules_from_json
    from ichbench.prepare.configuration import network_plan, read_plan
    from ichbench.prepare.store import prepared_digest, read_prepared
    from ichbench.recipe import NetworkRecipe, TrainingRecipe
    from ichbench.training.folder import Saving
    from ichbench.training.trainer import train

    plan = read_plan(task.inputs["prepare"] / "plan.json")
    store = task.inputs["prepare"] / "cases"
    names = list(dict.fromkeys([*task.spec["train"], *task.spec["validate"]]))
    cases, digests = {}, {}
    for name in names:
        # a resumed training must not go on from other arrays than it began with
        prepared = read_prepared(store, name, verify=True)
        digests[name] = prepared_digest(store, name)
        if prepared.labels_zyx is None:
            raise InputError(f"prepared case {name} has no labels; training needs them")
        previous = None
        if "previous" in task.inputs:
            path = task.inputs["previous"] / f"{name}.npy"
            previous = np.load(path, mmap_mode="r", allow_pickle=False)
            digests[name] += hashlib.sha256(path.read_bytes()).hexdigest()
        cases[name] = TrainingCase(name, prepared.image_czyx, prepared.labels_zyx, prepared.foreground, previous)
    rules = rules_from_json(task.spec["labels"])
    result = train(
        [cases[name] for name in task.spec["train"]],
        [cases[name] for name in task.spec["validate"]],
        network_plan(plan, rules),
        task.model("network", NetworkRecipe),
        task.model("training", TrainingRecipe),
        task.spec["seed"],
        task.out,
        task.compute,
        rules=rules,
        digests=digests,
        **options or {"saving": Saving(task.kept, keep=False), "say": lambda text: print(text, flush=True)},  # noqa: T201
    )
    about = {name: getattr(result, name) for name in ("epochs", "best_epoch", "moving_average", "pseudo_dice", "stopped_early")}
    return {"training": about | {"final_sha256": result.final_sha256, "best_sha256": result.best_sha256}}


def _predict(task: Task) -> dict[str, Any]:
    # what has no network needs no torch, which takes seconds to load
    with computing(task.compute) if "train" in task.inputs else contextlib.nullcontext():
        return _masks(task)


def _masks(task: Task) -> dict[str, Any]:
    from ichbench.cases.cohort import read_cohort
    from ichbench.cases.images import write_labels
    from ichbench.inference.predictors import PREDICTORS, Tools, fit_thresholds
    from ichbench.prepare.configuration import read_plan
    from ichbench.recipe import InferenceRecipe, NetworkRecipe, PrepareRecipe

    inference, prepare = task.model("inference", InferenceRecipe), task.model("prepare", PrepareRecipe)
    cohort = read_cohort(Path(task.where["cohort"]), reorient=prepare.reorient)
    _check_digests(cohort, task.spec["cases"] | task.spec.get("fit_on", {}))
    keep = prepare.compatibility == "nnunet"
    tools: dict[str, Any] = {"inference": inference, "prepare": prepare, "device": task.compute.device, "rules": cohort.rules}
    if "prepare" in task.inputs:
        tools["plan"] = read_plan(task.inputs["prepare"] / "plan.json")
    if "train" in task.inputs:
        from ichbench.network.unet import make_unet
        from ichbench.network.weights import load_weights
        from ichbench.prepare.configuration import network_plan

        network = make_unet(network_plan(tools["plan"], cohort.rules), task.model("network", NetworkRecipe))
        load_weights(network, task.inputs["train"] / f"{inference.checkpoint}.safetensors")
        tools["networks"] = [network.to(task.compute.device).eval()]
    if "first" in task.inputs:
        first = task.inputs["first"]
        tools["previous"] = lambda case: _mask(first, case.id, keep, prepare.reorient)
    extra: dict[str, Any] = {}
    if inference.predictor == "threshold":
        tools["thresholds_hu"] = fit_thresholds(
            (cohort.load(name, keep) for name in task.spec["fit_on"]), inference.threshold, cohort.ignore_label
        )
        tools["foreground_label"] = cohort.foreground_labels[0]
        extra["thresholds_hu"] = list(tools["thresholds_hu"])
    if "predictions" in task.where:
        tools["predictions"] = Path(task.where["predictions"])
    seconds: dict[str, float] = {}
    for name in task.spec["cases"]:
        began = time.monotonic()
        case = cohort.load(name, keep)
        prediction = PREDICTORS[inference.predictor](case, Tools(**tools))
        if prediction.labels_zyx is not None:
            write_labels(task.out / f"{name}.nii.gz", prediction.labels_zyx, case.grid)
        seconds[name] = round(time.monotonic() - began, 3)
    return extra | {"seconds_per_case": seconds}


def _postprocess(task: Task) -> dict[str, Any]:
    from ichbench.cases.cohort import read_cohort
    from ichbench.cases.images import read_labels, write_labels
    from ichbench.inference.postprocess import Labels, find_postprocessing

    cohort = read_cohort(Path(task.where["cohort"]))
    _check_digests(cohort, task.spec["cases"] | task.spec["known"])
    held_out = {name: task.inputs[fold] for fold, names in task.spec["folds"].items() for name in names}

    def load(name: str) -> tuple[Labels, Labels]:
        # in file order, as for scores
        reference = cohort.load(name, keep_file_order=True).labels_zyx
        if reference is None:
            raise InputError(f"case {name} of cohort {cohort.name} has no reference mask to find a post-processing on")
        return reference, read_labels(held_out[name] / f"{name}.nii.gz", keep_file_order=True)[0]

    rules = cohort.rules
    found = find_postprocessing(list(held_out), load, rules.targets, rules.ignore, task.spec["compatibility"])
    found.save(task.out / "postprocessing.json")
    for name in task.spec["cases"]:
        labels, grid = read_labels(task.inputs["predict"] / f"{name}.nii.gz")
        write_labels(task.out / f"{name}.nii.gz", found.apply(labels).astype(labels.dtype), grid)
    return {"postprocessing": [list(step) for step in found.steps]}


def _score(task: Task) -> dict[str, Any]:
    from ichbench.cases.cohort import read_cohort
    from ichbench.cases.images import read_labels
    from ichbench.cases.labels import scored_labels
    from ichbench.scoring.score import rows_for_case
    from ichbench.scoring.tables import write_scores

    cohort = read_cohort(Path(task.where["cohort"]))
    _check_digests(cohort, task.spec["cases"])
    labels = scored_labels(cohort.rules)
    rows = []
    for name in task.spec["cases"]:
        # in file order: the two masks must agree voxel by voxel as they lie on disk, whatever the cohort's orientation
        case = cohort.load(name, keep_file_order=True)
        if case.labels_zyx is None:
            raise InputError(f"case {name} of cohort {cohort.name} has no reference mask to score against")
        found = task.inputs["predict"] / f"{name}.nii.gz"
        predicted = read_labels(found, keep_file_order=True)[0] if found.is_file() else None
        spacing, axes = case.grid.spacing_zyx_mm, case.grid.file_axes
        volume = None if case.grid.is_regular else case.grid.voxel_ml
        rows += rows_for_case("-", "-", "-", name, case.labels_zyx, predicted, spacing, task.spec["protocol"], labels, axes, volume)
    write_scores(task.out / "scores.csv", rows)
    return {}


STAGES: dict[str, Callable[[Task], dict[str, Any]]] = {
    "prepare": _prepare,
    "previous": _previous,
    "train": train_stage,
    "predict": _predict,
    "postprocess": _postprocess,
    "score": _score,
}
