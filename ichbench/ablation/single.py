"""One training outside any study: prepare, plan, train one fold, segment and score its validation cases.

    OUT/fold.json       what the folder is for         OUT/prepared/     prepared cases, plan, fingerprint
        training.json   whether it is finished             checkpoints/  state of the training
        log.jsonl       one line per epoch, curves.png     predictions/  masks of the validation cases
        final.*, best.*, plan.json, model.json: OUT is a model folder for `ichbench predict`;  scores.csv

The stages are those of a study's steps. Started again, every part goes on where it was or is left as it is.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ichbench.ablation.dag import Step, fold_steps
from ichbench.ablation.facts import model_json
from ichbench.ablation.folds import Part, training_part
from ichbench.ablation.replacing import ASIDE, come_back, set_aside
from ichbench.ablation.run import open_cohort, phantom_cohort
from ichbench.ablation.settings import PHANTOM
from ichbench.ablation.stages import STAGES, Task, train_stage
from ichbench.ablation.study import RunDefaults, Study
from ichbench.arms import Arm, load_arm
from ichbench.cases.cohort import Cohort
from ichbench.cases.files import check_writable, seal, unseal, write_atomically
from ichbench.compute import ONE_CORE, Compute
from ichbench.errors import InputError
from ichbench.overlays import flat
from ichbench.recipe import check_precision
from ichbench.scoring.score import Score
from ichbench.scoring.tables import read_scores, write_scores
from ichbench.training.parallel import ALONE, Team

FOLD, SCORED, PREPARED = "fold.json", "scored.json", "prepared.json"
#: what a folder may hold to be taken for a training's
OWN: tuple[str, ...] = (FOLD, SCORED, "prepared", "checkpoints", "predictions", "cohort", "tensorboard")
OWN += ("training.json", "log.jsonl", "curves.png", "scores.csv", "plan.json", "fingerprint.json", "model.json")
OWN += ("final.safetensors", "final.json", "best.safetensors", "best.json")


@dataclass(frozen=True)
class Wanted:
    """What `ichbench train` was asked for. `extend_to` is the new number of epochs of a finished training."""

    cohort: str
    out: Path
    arm: str = "base"
    preset: str = "full"
    fold: str = "0"
    seed: int = 0
    compute: Compute = ONE_CORE
    protocol: str = "instance2022"
    pretrained: Path | None = None
    overwrite: bool = False
    extend_to: int | None = None


@dataclass(frozen=True)
class Fold:
    """A finished training: what the trainer says, the rows of its cases (none where there is nothing to score), the plan in words."""

    training: dict[str, Any]
    rows: tuple[Score, ...]
    plan: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Everything resolved, nothing computed yet."""

    wanted: Wanted
    arm: Arm
    cohort: Cohort
    part: Part
    steps: dict[Any, Step]
    pretrained: Path | None


def plan_fold(wanted: Wanted) -> Job:
    """Resolve recipe, cohort and split; nothing is written but an embedded phantom, and what a killed `--overwrite` left aside.

    Raises InputError for what cannot be trained, and for a folder of another training, with the differences by key.
    """
    arm = load_arm(wanted.arm, wanted.preset)
    if arm.recipe.inference.predictor != "unet":
        raise InputError(f"--recipe {wanted.arm}: its predictor is {arm.recipe.inference.predictor!r}, which needs no training")
    if arm.recipe.plan.stage == "cascade":
        raise InputError(f"--recipe {wanted.arm} is the second stage of a cascade, which learns from five first ones: use run-ablation")
    if wanted.overwrite and wanted.extend_to is not None:
        raise InputError("--overwrite removes the training that --extend-to would give more epochs; leave one of them out")
    recipe = arm.recipe.model_copy(update={"inference": arm.recipe.inference.model_copy(update={"postprocess": "off"})})
    if wanted.extend_to is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": wanted.extend_to})})
    arm = replace(arm, recipe=recipe)
    check_precision(recipe.inference, wanted.compute.device)
    _check_folder(wanted.out)
    if not wanted.overwrite and (wanted.out / ASIDE).is_dir():
        # a killed `--overwrite` left it; before settings are compared the folder must be what it says
        with _held(wanted.out):
            come_back(wanted.out, LEFT)
    study = Study("train", arm.why, arm.name, (arm,), {}, RunDefaults())
    cohort = phantom_cohort(wanted.out / "cohort") if wanted.cohort == PHANTOM else open_cohort(Path(wanted.cohort), study)
    part = training_part(cohort, wanted.fold)
    steps = fold_steps(arm, cohort, part, wanted.fold, wanted.seed, wanted.compute, wanted.protocol)
    job = Job(wanted, arm, cohort, part, steps, _weights_of(wanted.pretrained))
    if not wanted.overwrite:
        _refuse_other(wanted.out, _identity(job))
    return job


def train_fold(job: Job, sinks: Sequence[Callable[[dict[str, Any]], None]] = (), **options: Any) -> Fold:
    """Do what is not done yet. `options` (tick, say, saving, team) go to `trainer.train`, every sink gets the lines of its log.

    Of a team only the leading process writes; the others get neither rows nor plan.

    Raises InputError for a folder of another training, with the differences by key; then nothing was changed.
    """
    wanted, out = job.wanted, job.wanted.out
    say: Callable[[str], object] = options.get("say", lambda text: None)
    identity = _identity(job)
    team: Team = options.get("team", ALONE)
    if not team.leads:
        team.wait()
        training = train_stage(_task(job, "train", {"prepare": out / "prepared"}, out), **_options(job, options))["training"]
        return Fold(training, (), ())
    out.mkdir(parents=True, exist_ok=True)
    with _held(out):
        come_back(out, LEFT)
        if not wanted.overwrite:
            _refuse_other(out, identity)
        with set_aside(out, LEFT) if wanted.overwrite else contextlib.nullcontext():
            write_atomically(out / FOLD, seal(identity))
            _prepare(job, say)
            team.wait()
            return _train_and_score(job, sinks, options, say)


def _train_and_score(job: Job, sinks: Sequence[Callable[[dict[str, Any]], None]], options: dict[str, Any], say: Any) -> Fold:
    wanted, out = job.wanted, job.wanted.out

    def progress(line: dict[str, Any]) -> None:
        for sink in sinks:
            sink(line)

    task = _task(job, "train", {"prepare": out / "prepared"}, out)
    training = train_stage(task, **{"progress": progress} | _options(job, options))["training"]
    for name in ("plan.json", "fingerprint.json"):
        shutil.copyfile(out / "prepared" / name, out / name)
    write_atomically(out / "model.json", model_json(job.arm, job.cohort).encode())
    rows: list[Score] = []
    if job.part.evaluate:
        checkpoint = job.arm.recipe.inference.checkpoint
        made_of = {"weights": training[f"{checkpoint}_sha256"], "predict": job.steps["predict"].spec["cases"], "protocol": wanted.protocol}
        if _read(out / SCORED) != made_of or not (out / "scores.csv").is_file():
            say(f"segmenting {len(job.part.evaluate)} cases with the {checkpoint} weights")
            shutil.rmtree(out / "predictions", ignore_errors=True)
            (out / "predictions").mkdir()
            STAGES["predict"](_task(job, "predict", {"prepare": out / "prepared", "train": out}, out / "predictions"))
            with tempfile.TemporaryDirectory(dir=out, prefix=".scores-") as scratch:
                STAGES["score"](_task(job, "score", {"predict": out / "predictions"}, Path(scratch)))
                found = read_scores(Path(scratch) / "scores.csv")
            write_scores(out / "scores.csv", [row._replace(arm=job.arm.name, fold=wanted.fold, seed=str(wanted.seed)) for row in found])
            write_atomically(out / SCORED, seal(made_of))
        rows = read_scores(out / "scores.csv")
    from ichbench.prepare.configuration import read_plan

    plan = read_plan(out / "plan.json")
    return Fold(training, tuple(rows), tuple(plan.explain()))


def _options(job: Job, options: dict[str, Any]) -> dict[str, Any]:
    from ichbench.training.folder import Saving

    wanted = job.wanted
    given = {"pretrained": job.pretrained, "overwrite": wanted.overwrite, "extend": wanted.extend_to is not None}
    return {"saving": Saving(wanted.out / "checkpoints")} | given | options


def _prepare(job: Job, say: Callable[[str], object]) -> None:
    """Prepared cases and plan, unless they are there. They are this training's own, whatever the version that made them."""
    folder = job.wanted.out / "prepared"
    spec = job.steps["prepare"].spec
    made_of = {name: spec[name] for name in ("prepare", "plan", "cases", "labels", "channels")}
    if _read(folder / PREPARED) == json.loads(json.dumps(made_of)):
        return
    say(f"preparing {len(spec['cases'])} cases")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    STAGES["prepare"](_task(job, "prepare", {}, folder))
    write_atomically(folder / PREPARED, seal(made_of))


def _task(job: Job, kind: str, inputs: dict[str, Path], out: Path) -> Task:
    step = job.steps[kind]
    return Task(json.loads(json.dumps(step.spec)), step.where, inputs, out, job.wanted.compute)


def _identity(job: Job) -> dict[str, Any]:
    """What the folder is for, by key. The number of epochs is left to the trainer, which knows about extensions."""
    from ichbench.network.weights import weights_digest

    wanted = job.wanted
    # as it predicts, so that "auto" and what it comes to are the same training
    recipe = job.arm.recipe.model_copy(update={"inference": job.arm.recipe.prediction()})
    table = {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if key != "training.epochs"}
    table |= {
        "fold": wanted.fold,
        "seed": wanted.seed,
        "cohort.labels": job.cohort.rules.to_json(),
        "cohort.channels": list(job.cohort.channel_names),
    }
    table |= {"split.train": list(job.part.train), "split.validation": list(job.part.validate)}
    table |= {f"data.{name}": digest for name, digest in job.steps["prepare"].spec["cases"].items()}
    table |= {f"data.{name}": digest for name, digest in job.steps["predict"].spec["cases"].items()}
    table["pretrained"] = None if job.pretrained is None else weights_digest(job.pretrained)
    return json.loads(json.dumps(table))  # type: ignore[no-any-return]


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder's lock. InputError where another process does."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is training in {out}; wait until it has ended, or give another folder") from None
    try:
        yield
    finally:
        lock.release()


def _check_folder(out: Path) -> None:
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in OWN and path.name[0] != ".") if out.is_dir() else []
    if foreign and not (out / FOLD).is_file() and not (out / ASIDE / FOLD).is_file():
        raise InputError(f"--out {out} is not empty and is not a training's folder (it holds {', '.join(foreign[:5])}); give a new folder")


def _refuse_other(out: Path, identity: dict[str, Any]) -> None:
    from ichbench.training.folder import refuse_other

    try:
        found = unseal(out / FOLD)
    except FileNotFoundError:
        if (out / "training.json").exists() or (out / "final.safetensors").exists():
            raise InputError(
                f"--out {out} holds a training, but no {FOLD}; nothing was changed: give a new folder, or --overwrite"
            ) from None
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{out / FOLD} is damaged ({error}); nothing was changed: give a new folder, or --overwrite") from None
    if any((out / name).exists() for name in ("training.json", "final.safetensors")):
        # else an attempt ended before it trained anything, and the folder is free
        if found.get("inference.mirror") == "auto":
            # an older folder does not say what it came to
            found["inference.mirror"] = found.get("training.augment.mirror")
        refuse_other(f"--out {out}", found, identity)


#: what an earlier training left beside weights and checkpoints, which are the trainer's to remove, once it can begin
LEFT = (FOLD, SCORED, "predictions", "prepared", "scores.csv", "curves.png", "model.json", "plan.json", "fingerprint.json")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return unseal(path)
    except (OSError, ValueError):
        return None


def _weights_of(given: Path | None) -> Path | None:
    """The file of the weights that fine-tuning starts from: itself, or the one of a model folder."""
    if given is None or not given.is_dir():
        return given
    from ichbench.inference.model import read_model

    model = read_model(given)
    found = model.weights(model.recipe.inference.checkpoint)
    if len(found) > 1:
        raise InputError(f"--pretrained {given} has {len(found)} folds; give the weights of one, such as {next(iter(found.values()))}")
    return next(iter(found.values()))
