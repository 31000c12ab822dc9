"""What depends on what: a study on a cohort becomes steps, each named by the digest of everything its result depends on."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ichbench.ablation.folds import N_FOLDS, Part, make_part
from ichbench.ablation.study import UNTRAINED, Study
from ichbench.arms import Arm
from ichbench.cases.cohort import Cohort
from ichbench.compute import Compute
from ichbench.errors import InputError
from ichbench.inference.predictors import find_mask
from ichbench.recipe import digest

Kind = Literal["prepare", "previous", "train", "predict", "postprocess", "score"]

#: the modules whose sources (with all they import) decide a step's result
STAGE_MODULES: dict[Kind, tuple[str, ...]] = {
    "prepare": ("ichbench.cases.cohort", "ichbench.prepare.whole"),
    "previous": ("ichbench.cases.cohort", "ichbench.inference.cascade", "ichbench.prepare.store"),
    "train": ("ichbench.prepare.store", "ichbench.training.trainer"),
    "predict": ("ichbench.cases.cohort", "ichbench.inference.predictors", "ichbench.network.weights"),
    "postprocess": ("ichbench.cases.cohort", "ichbench.inference.postprocess"),
    "score": ("ichbench.cases.cohort", "ichbench.scoring.score", "ichbench.scoring.tables"),
}


@dataclass(frozen=True)
class Step:
    """One unit of work. `spec` is all that its result depends on (inputs aside), `where` only says where things lie."""

    kind: Kind
    spec: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def id(self) -> str:
        """`train-1f0c...`: the same work has the same name in every study and on every machine with the same versions."""
        return f"{self.kind}-{digest({'spec': self.spec, 'inputs': self.inputs})[:16]}"


@dataclass(frozen=True)
class Result:
    """Where one arm's scores of one fold and seed come from."""

    arm: str
    fold: str
    seed: str
    score_step: str
    predict_step: str
    train_step: str | None


@dataclass(frozen=True)
class Dag:
    """Steps in an order in which each comes after its inputs, and what they are for."""

    steps: dict[str, Step]
    results: tuple[Result, ...]

    def needed_by(self, step_id: str) -> set[str]:
        """Every step that a step depends on, directly or not."""
        found: set[str] = set()
        queue = [step_id]
        while queue:
            for name in self.steps[queue.pop()].inputs.values():
                if name not in found:
                    found.add(name)
                    queue.append(name)
        return found


def make_dag(study: Study, cohort: Cohort, seeds: tuple[int, ...], folds: tuple[str, ...], compute: Compute, protocol: str) -> Dag:
    """Steps for every arm, fold and seed. Arms that share prepared data, weights or masks share the steps."""
    maker = _Maker(cohort, compute, protocol)
    results: list[Result] = []
    parts = {fold: make_part(cohort, fold) for fold in folds}
    _refuse_overlap(parts)
    for fold, part in parts.items():
        for arm in study.arms:
            predictor = arm.recipe.inference.predictor
            for seed in (None,) if predictor in UNTRAINED else seeds:
                results.append(maker.result(arm, part, fold, seed, study.predictions.get(arm.name)))
    return Dag(maker.steps, tuple(results))


def fold_steps(arm: Arm, cohort: Cohort, part: Part, fold: str, seed: int, compute: Compute, protocol: str) -> dict[Kind, Step]:
    """The steps of one training of one arm without post-processing, by their kind."""
    maker = _Maker(cohort, compute, protocol)
    maker.result(arm, part, fold, seed, None)
    return {step.kind: step for step in maker.steps.values()}


def _refuse_overlap(parts: dict[str, Part]) -> None:
    """A case that two folds score would count twice, and an untrained arm has no fold to tell the two apart."""
    seen: dict[str, str] = {}
    for fold, part in parts.items():
        for name in part.evaluate:
            if name in seen:
                raise InputError(
                    f"folds {seen[name]} and {fold} both score case {name}; choose folds that do not share cases, such as --folds cv"
                )
            seen[name] = fold


class _Maker:
    """Collects steps; asking twice for the same work gives the same step."""

    def __init__(self, cohort: Cohort, compute: Compute, protocol: str) -> None:
        self.cohort, self.compute, self.protocol = cohort, compute, protocol
        self.steps: dict[str, Step] = {}
        self.where = {"cohort": str((cohort.source or cohort.root).resolve())}

    def result(self, arm: Arm, part: Part, fold: str, seed: int | None, predictions: Path | None) -> Result:
        predict, train = self._predict(arm, part, fold, seed, predictions)
        if arm.recipe.inference.postprocess == "cross-validate":
            predict = self._postprocess(arm, part, fold, seed, predict)
        score = self._add(
            Step(
                "score",
                {
                    "protocol": self.protocol,
                    "cases": self._digests(part.evaluate),
                    "labels": self.cohort.rules.to_json(),
                    "sources": sources_digest("score"),
                    "environment": {name: version(name) for name in ("numpy", "scipy")},
                },
                {"predict": predict.id},
                self.where,
                f"score {_named(arm, fold, seed)}",
            )
        )
        trained = arm.recipe.inference.predictor not in UNTRAINED
        return Result(arm.name, fold if trained else "-", str(seed) if trained else "-", score.id, predict.id, train.id if train else None)

    def _predict(self, arm: Arm, part: Part, fold: str, seed: int | None, predictions: Path | None) -> tuple[Step, Step | None]:
        recipe, predictor = arm.recipe, arm.recipe.inference.predictor
        train = None
        spec: dict[str, Any] = {
            # masks before any post-processing, so that an arm with and one without it share them
            "inference": recipe.prediction().model_copy(update={"postprocess": "off"}).model_dump(mode="json"),
            "prepare": recipe.prepare.model_dump(mode="json"),
            "cases": self._digests(part.evaluate),
            "labels": self.cohort.rules.to_json(),
            "sources": sources_digest("predict"),
            "environment": self._environment(),
        }
        inputs, where = {}, dict(self.where)
        if predictor in ("unet", "roundtrip"):
            prepare = self._prepare(arm)
            inputs["prepare"] = prepare.id
        if predictor == "unet":
            train = self._train(arm, prepare, part, fold, seed if seed is not None else 0)
            inputs["train"] = train.id
            spec["network"] = recipe.network.model_dump(mode="json")
            if recipe.plan.stage == "cascade":
                inputs["first"] = self._predict(first_stage(arm), part, fold, seed, None)[0].id
        if predictor == "threshold":
            spec["fit_on"] = self._digests(part.train)
        if predictor == "folder":
            if predictions is None:
                raise InputError(f"arm {arm.name} shows somebody else's predictions; name their folder with --predictions {arm.name}=DIR")
            spec["masks"] = _folder_digest(predictions, part.evaluate)
            where["predictions"] = str(predictions.resolve())
        return self._add(Step("predict", spec, inputs, where, f"predict {_named(arm, fold, seed)}")), train

    def _postprocess(self, arm: Arm, part: Part, fold: str, seed: int | None, predict: Step) -> Step:
        """Find the rule on the five folds' predictions of the training cases, and apply it to this fold's masks."""
        if arm.recipe.inference.predictor not in ("unet", "threshold"):
            raise InputError(
                f"arm {arm.name}: inference.postprocess = 'cross-validate' needs a predictor with folds (unet or threshold), "
                f"not for {arm.recipe.inference.predictor!r}; set it to 'off'"
            )
        inputs, folds = self._held_out(arm, seed)
        inputs["predict"] = predict.id
        spec = {
            "folds": folds,
            "cases": self._digests(part.evaluate),
            "known": self._digests(tuple(name for names in folds.values() for name in names)),
            "compatibility": arm.recipe.inference.compatibility,
            "labels": self.cohort.rules.to_json(),
            "sources": sources_digest("postprocess"),
            "environment": {name: version(name) for name in ("numpy", "scipy")},
        }
        return self._add(Step("postprocess", spec, inputs, self.where, f"postprocess {_named(arm, fold, seed)}"))

    def _held_out(self, arm: Arm, seed: int | None) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Inputs `fold 0` to `fold 4`: an arm's predictions of the cases that each fold did not train on, and which these are."""
        inputs, folds = {}, {}
        for number in range(N_FOLDS):
            part = make_part(self.cohort, str(number))
            inputs[f"fold {number}"] = self._predict(arm, part, str(number), seed, None)[0].id
            folds[f"fold {number}"] = list(part.evaluate)
        return inputs, folds

    def _previous(self, arm: Arm, prepare: Step, seed: int) -> Step:
        """What the first stage of a cascade says about every training case, by the network of the fold that held it out."""
        inputs, folds = self._held_out(first_stage(arm), seed)
        known = tuple(name for names in folds.values() for name in names)
        if missing := sorted(set(self.cohort.train_ids) - set(known)):
            raise InputError(
                f"arm {arm.name}: the second stage of a cascade learns from the first stage's masks of held-out cases, but none of "
                f"the folds 0 to {N_FOLDS - 1} holds out {', '.join(missing[:5])}; let these five cover every training case"
            )
        spec = {
            "prepare": arm.recipe.prepare.model_dump(mode="json"),
            "folds": folds,
            "cases": self._digests(known),
            "labels": self.cohort.rules.to_json(),
            "sources": sources_digest("previous"),
            "environment": {name: version(name) for name in ("numpy", "scipy")},
        }
        return self._add(Step("previous", spec, inputs | {"prepare": prepare.id}, self.where, f"first stage of {arm.name}, seed {seed}"))

    def _prepare(self, arm: Arm) -> Step:
        # as in nnU-Net, fingerprint and plan see all training cases, those of the validation folds included
        spec = {
            "prepare": arm.recipe.prepare.model_dump(mode="json"),
            "plan": arm.recipe.plan.model_dump(mode="json"),
            "cases": self._digests(self.cohort.train_ids),
            "labels": self.cohort.rules.to_json(),
            "channels": list(self.cohort.channel_names),
            "sources": sources_digest("prepare"),
            "environment": {name: version(name) for name in ("numpy", "scipy")},
        }
        return self._add(Step("prepare", spec, {}, self.where, f"prepare {arm.name}"))

    def _train(self, arm: Arm, prepare: Step, part: Part, fold: str, seed: int) -> Step:
        spec = {
            "network": arm.recipe.network.model_dump(mode="json"),
            "training": arm.recipe.training.model_dump(mode="json"),
            "labels": self.cohort.rules.to_json(),
            "train": list(part.train),
            "validate": list(part.validate),
            "seed": seed,
            "sources": sources_digest("train"),
            "environment": self._environment(),
        }
        inputs = {"prepare": prepare.id}
        if arm.recipe.plan.stage == "cascade":
            inputs["previous"] = self._previous(arm, prepare, seed).id
        return self._add(Step("train", spec, inputs, self.where, f"train {arm.name}, fold {fold}, seed {seed}"))

    def _add(self, step: Step) -> Step:
        return self.steps.setdefault(step.id, step)

    def _digests(self, ids: tuple[str, ...]) -> dict[str, str]:
        return {name: self.cohort.case_digest(name) for name in ids}

    def _environment(self) -> dict[str, Any]:
        return self.compute.environment() | {name: version(name) for name in ("torch", "numpy", "scipy")}


def first_stage(arm: Arm) -> Arm:
    """The low-resolution stage below a cascade: the same recipe on the coarser plan."""
    plan = arm.recipe.plan.model_copy(update={"stage": "lowres"})
    inference = arm.recipe.inference.model_copy(update={"postprocess": "off"})
    return replace(arm, name=f"{arm.name}'s first stage", recipe=arm.recipe.model_copy(update={"plan": plan, "inference": inference}))


def _named(arm: Arm, fold: str, seed: int | None) -> str:
    return f"{arm.name}, fold {fold}" + (f", seed {seed}" if seed is not None else "")


def _folder_digest(folder: Path, ids: tuple[str, ...]) -> dict[str, str]:
    if not folder.is_dir():
        raise InputError(f"predictions folder {folder} does not exist or is not a folder; give the folder that holds one mask per case")
    found = {name: path for name in ids if (path := find_mask(folder, name)) is not None}
    if not found:
        raise InputError(f"predictions folder {folder} holds no mask of this study's cases; expected files such as {ids[0]}.nii.gz")
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@cache
def sources_digest(kind: Kind) -> str:
    """sha256 over the source files that a stage's result depends on: its modules and all of ichbench that they import, with the C++ beside
    a module that has its name."""
    seen: dict[str, bytes] = {}
    queue = list(STAGE_MODULES[kind])
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin)
        source = path.read_bytes()
        compiled = [file for file in sorted(path.parent.glob(f"{path.stem}*")) if file.suffix in (".cpp", ".h")]
        seen[name] = b"".join([source, *(file.read_bytes() for file in compiled)])
        queue += _imports(source)
    # the glue between stages and files; not its imports, which are all of ichbench
    glue = Path(sys.modules[__name__].__file__ or "").with_name("stages.py").read_bytes()
    text = "".join(f"{name} {hashlib.sha256(seen[name]).hexdigest()}\n" for name in sorted(seen))
    return hashlib.sha256(text.encode() + glue).hexdigest()


def _imports(source: bytes) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ichbench":
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names if _is_module(f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "ichbench"]
    return found


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
