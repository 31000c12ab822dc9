"""A study from settings to board: cohort, steps, facts, board."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ichbench.ablation.dag import Dag, Result, make_dag
from ichbench.ablation.engine import Event, run_dag
from ichbench.ablation.facts import run_notes, write_run
from ichbench.ablation.folds import default_folds, parse_folds, used_split
from ichbench.ablation.settings import PHANTOM, Settings
from ichbench.ablation.step import result_of
from ichbench.ablation.study import UNTRAINED, Study, make_study
from ichbench.board.render import Board, build_board, write_board
from ichbench.board.report import Report, write_report
from ichbench.board.runs import clusters_from, read_run, report_of_run
from ichbench.cases.cohort import Cohort, check_orientations, read_cohort
from ichbench.cases.files import check_writable, read_table, write_atomically
from ichbench.cases.splits import write_splits
from ichbench.errors import InputError
from ichbench.prepare.nnunet_files import reader_of
from ichbench.recipe import check_loss, check_precision

#: the embedded default cohort. Its seed was chosen so that all five kinds of bleed are in training and test, and that no test case is
#: without a bleed: there the official rules make the Hausdorff distance infinite for every arm (facts A1), and a column says nothing
PHANTOM_COHORT = {"n_cases": 40, "n_test": 16, "size": "small", "seed": 29}


@dataclass(frozen=True)
class Planned:
    """A study on a cohort, before anything is computed."""

    settings: Settings
    study: Study
    cohort: Cohort
    folds: tuple[str, ...]
    dag: Dag


@dataclass(frozen=True)
class Finished:
    """What a run ended with. `board` is None where no arm has all its scores, `report` (its effects) where the base has not."""

    board: Board | None
    report: Report | None
    written: tuple[Path, ...]
    notes: dict[str, list[str]]
    failed: dict[str, str]
    code: int


def plan_run(settings: Settings, predictions: dict[str, Path]) -> Planned:
    """Resolve arms, cohort, folds and steps; makes the output folder (and the phantom in it) but computes nothing else."""
    study = make_study(settings.study, settings.preset, predictions)
    for arm in study.arms:
        # else every arm is trained before its first prediction fails
        check_precision(arm.recipe.inference, settings.compute.device, f"arm {arm.name}: ")
    check_out(settings, study)
    cohort = phantom_cohort(settings.out / "cohort") if settings.cohort == PHANTOM else open_cohort(Path(settings.cohort), study)
    folds = parse_folds(settings.folds or default_folds(cohort))
    dag = make_dag(study, cohort, settings.seeds, folds, settings.compute, settings.protocol)
    return Planned(settings, study, cohort, folds, dag)


def open_cohort(path: Path, study: Study) -> Cohort:
    """Read a cohort; refuse what a study cannot train on, and mixed orientations unless every arm reorients."""
    cohort = read_cohort(path)
    for arm in study.arms:
        if arm.recipe.inference.predictor not in UNTRAINED:
            check_loss(arm.recipe.training, cohort.rules.outputs, cohort.rules.has_regions, f"arm {arm.name}: ")
    for arm in study.arms:
        if arm.recipe.prepare.compatibility == "nnunet":
            reader_of(replace(cohort, reorient=arm.recipe.prepare.reorient))
    if not all(arm.recipe.prepare.reorient or arm.recipe.prepare.compatibility == "nnunet" for arm in study.arms):
        check_orientations(cohort)
    return cohort


def phantom_cohort(folder: Path) -> Cohort:
    """The embedded phantom, written to `folder` unless it is there already."""
    from ichbench.cases.phantom import GENERATOR, write_phantom

    if not folder.exists():
        # written beside its place and moved there whole, so that an interrupted run leaves no half of a cohort
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".cohort-") as scratch:
            write_phantom(Path(scratch) / "cohort", **PHANTOM_COHORT)  # type: ignore[arg-type]
            (Path(scratch) / "cohort").rename(folder)
    sidecar = read_table(folder / "phantom.json", f"remove {folder} and run again")
    try:
        found = {"n_cases": len(sidecar["cases"]), "size": sidecar["size"], "seed": sidecar["seed"], "generator": sidecar["generator"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder} does not hold the embedded phantom ({error}); remove that folder and run again") from None
    expected = {name: PHANTOM_COHORT[name] for name in ("n_cases", "size", "seed")} | {"generator": GENERATOR}
    if found != expected:
        raise InputError(f"{folder} holds the phantom {found}, the embedded one is {expected}; remove that folder and run again")
    return replace(read_cohort(folder), name=PHANTOM)


def run_study(planned: Planned, show: Callable[[Event], None]) -> Finished:
    """Run what is not finished yet, then write facts and board."""
    settings, study, began = planned.settings, planned.study, time.time()
    out = settings.out
    claim(planned)
    root = out / "steps"
    outcome = run_dag(planned.dag, root, settings.compute, settings.workers, show)
    complete = _complete_arms(planned.dag, root)
    finished = [result for result in planned.dag.results if result.arm in complete]
    about: dict[str, Any] = {
        "study": study.name,
        "why": study.why,
        "cohort": planned.cohort.name,
        "preset": settings.preset,
        "seeds": list(settings.seeds),
        "folds": list(planned.folds),
        "protocol": settings.protocol,
        "device": settings.compute.device,
        "threads": settings.compute.threads,
        "deterministic": settings.compute.deterministic,
        "arms": [arm.name for arm in study.arms],
        "base": study.base,
        "design": study.design,
        # a list, because run.json sorts its keys and the names of arms follow the order of the factors
        "factors": [[name, list(levels)] for name, levels in study.factors.items()],
        "failed": outcome.failed,
        "wall_seconds": round(time.time() - began, 1),
    }
    if settings.cohort == PHANTOM:
        about["phantom"] = PHANTOM_COHORT
    written: list[Path] = []
    board = report = None
    if finished:
        if planned.folds != ("full",):
            write_splits(out / "splits_final.json", [used_split(planned.cohort, fold) for fold in planned.folds])
        rows = write_run(out, study, planned.cohort, planned.dag, root, finished, about)
        written = [out / "scores.csv", out / "cases.csv", out / "run.json"]
        order = [arm.name for arm in study.arms if arm.name in complete]
        base = study.base if study.base in complete else None
        run = read_run(out)
        clusters = clusters_from(run.cases, sorted({row.case for row in rows}))
        board = build_board(rows, base=base, arm_order=order, clusters=clusters)
        written += write_board(board, out)
        if base is not None:
            report = report_of_run(run)
            written += write_report(report, out)
    labels = {planned.dag.steps[step_id].label: message for step_id, message in outcome.failed.items()}
    code = 0 if not outcome.failed else max(outcome.codes.values())
    return Finished(board, report, tuple(written), run_notes(planned.dag, root, finished), labels, code)


def check_out(settings: Settings, study: Study) -> None:
    """Refuse an output folder that holds something other than this study, before anything is written to it."""
    out = settings.out
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / "study.json").exists():
        _refuse_other(settings, _identity(settings, study))
        return
    inside = sorted(path.name for path in out.iterdir() if not path.name.startswith(".cohort-"))
    if not set(inside) <= {"cohort", "steps"}:
        raise InputError(f"--out {out} is not empty and is not a study's folder (it holds {', '.join(inside[:5])}); give a new folder")


def claim(planned: Planned) -> None:
    """Write what the folder is for, or refuse it when it is for something else."""
    identity = _identity(planned.settings, planned.study) | {"cohort": planned.cohort.digest(), "folds": list(planned.folds)}
    if (planned.settings.out / "study.json").exists():
        _refuse_other(planned.settings, identity)
    write_atomically(planned.settings.out / "study.json", json.dumps(identity, indent=1, sort_keys=True).encode())


def _identity(settings: Settings, study: Study) -> dict[str, Any]:
    """What a folder is for, as far as it is known before the cohort is read."""
    # as they predict, so that "auto" and what it comes to are the same study
    arms = {arm.name: arm.recipe.model_copy(update={"inference": arm.recipe.prediction()}).model_dump(mode="json") for arm in study.arms}
    source = PHANTOM if settings.cohort == PHANTOM else "given"
    return {"study": study.name, "arms": arms, "seeds": list(settings.seeds), "protocol": settings.protocol, "source": source}


def _refuse_other(settings: Settings, identity: dict[str, Any]) -> None:
    found = read_table(settings.out / "study.json", "give another --out")
    if isinstance(found.get("arms"), dict):
        found["arms"] = {name: _decided(recipe) for name, recipe in found["arms"].items()}
    different = [name for name in identity if found.get(name) != json.loads(json.dumps(identity[name]))]
    if different:
        changes = "; ".join(_change(name, found.get(name), identity[name]) for name in different)
        raise InputError(
            f"--out {settings.out} belongs to another study: {changes}. "
            "Nothing was changed; give a new --out, or the settings that the folder was made with"
        )


def _decided(recipe: Any) -> Any:
    """The recipe of an arm in an older `study.json`, which may say "auto" where ours say what it comes to (`Recipe.prediction`)."""
    try:
        if recipe["inference"]["mirror"] != "auto":
            return recipe
        return recipe | {"inference": recipe["inference"] | {"mirror": recipe["training"]["augment"]["mirror"]}}
    except (KeyError, TypeError):
        return recipe


def _change(name: str, old: Any, new: Any) -> str:
    if name == "arms" and isinstance(old, dict):
        changed = sorted(arm for arm in old.keys() | new.keys() if old.get(arm) != json.loads(json.dumps(new.get(arm))))
        return f"arms that differ: {', '.join(changed)}"
    return f"its {name} is {_short(old)}, asked for is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _complete_arms(dag: Dag, root: Path) -> set[str]:
    """Arms all of whose scores are there; a half-scored arm is not shown as if it were whole."""
    per_arm: dict[str, list[Result]] = {}
    for result in dag.results:
        per_arm.setdefault(result.arm, []).append(result)
    return {arm for arm, results in per_arm.items() if all(result_of(root / result.score_step) is not None for result in results)}
