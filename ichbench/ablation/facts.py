"""What a finished study leaves at the top of --out: scores.csv, cases.csv, recipes, run.json, and the board made of them."""

from __future__ import annotations

import csv
import io
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ichbench
from ichbench.ablation.dag import Dag, Result, Step, first_stage
from ichbench.ablation.step import output_of, result_of
from ichbench.ablation.study import Study
from ichbench.arms import Arm
from ichbench.cases.cohort import Cohort
from ichbench.cases.files import write_atomically
from ichbench.cases.images import read_grid
from ichbench.cases.labels import declared
from ichbench.scoring.score import Score
from ichbench.scoring.tables import read_scores

VERSIONS = ("torch", "numpy", "scipy", "nibabel", "surface-distance", "pydantic")


def collect_scores(dag: Dag, root: Path, finished: Iterable[Result]) -> list[Score]:
    """The rows of all finished results, under their arm, fold and seed."""
    rows: list[Score] = []
    for result in finished:
        for row in read_scores(output_of(root / result.score_step) / "scores.csv"):
            rows.append(row._replace(arm=result.arm, fold=result.fold, seed=result.seed))
    return rows


def cases_csv(cohort: Cohort, rows: Iterable[Score]) -> str:
    """One line per scored case: metadata, spacing, the digest of its voxels, and its reference volume in ml."""
    volume = {row.case: row.value for row in rows if row.metric == "reference_ml"}
    table = [line for line in cohort.metadata() if line["id"] in volume]
    out = io.StringIO()
    columns = ["case", *[name for name in (table[0] if table else {"id": ""}) if name != "id"], "reference_ml", "digest"]
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for line in table:
        name = line.pop("id")
        writer.writerow({"case": name} | line | {"reference_ml": repr(volume[name]), "digest": cohort.case_digest(name)})
    return out.getvalue()


def recipe_json(arm: Arm) -> str:
    """An arm whole: why it is there, what it sets, and every resolved value."""
    table = {"arm": arm.name, "why": arm.why, "recipe": arm.recipe.model_dump(mode="json")}
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def run_notes(dag: Dag, root: Path, finished: Iterable[Result]) -> dict[str, list[str]]:
    """Arm -> warnings of its steps, in order and without repetition."""
    notes: dict[str, list[str]] = {}
    for result in finished:
        steps = [result.predict_step, *sorted(dag.needed_by(result.predict_step))]
        for step_id in steps:
            for note in (result_of(root / step_id) or {}).get("notes", []):
                if note not in notes.setdefault(result.arm, []):
                    notes[result.arm].append(note)
    return {arm: found for arm, found in notes.items() if found}


def environment() -> dict[str, Any]:
    """Versions, commit and machine class (no host names, no paths)."""
    from ichbench.network.native import about_kernels

    return {
        "ichbench": version("ichbench"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "commit": _commit(),
        "processor": platform.machine(),
        "system": platform.system(),
        "kernels": about_kernels(),
    }


def write_run(out: Path, study: Study, cohort: Cohort, dag: Dag, root: Path, finished: list[Result], about: dict[str, Any]) -> list[Score]:
    """Write the facts of a run: scores.csv, cases.csv, recipes/, run.json, models/ and predictions/. Returns the rows."""
    from ichbench.scoring.tables import write_scores

    rows = collect_scores(dag, root, finished)
    write_scores(out / "scores.csv", rows)
    write_atomically(out / "cases.csv", cases_csv(cohort, rows).encode())
    for arm in study.arms:
        write_atomically(out / "recipes" / f"{arm.name}.json", recipe_json(arm).encode())
    for result in finished:
        name = "-".join([result.arm, *([f"fold{result.fold}", f"seed{result.seed}"] if result.train_step else [])])
        _copy_files(output_of(root / result.predict_step), out / "predictions" / name)
        if result.train_step is not None:
            last, folder = dag.steps[result.predict_step], out / "models" / name
            tidied = last.kind == "postprocess"
            _publish(dag, root, dag.steps[last.inputs["predict"]] if tidied else last, study.arm(result.arm), cohort, folder)
            if tidied:
                rule = "postprocessing.json"
                shutil.copyfile(output_of(root / result.predict_step) / rule, folder / rule)
    seconds = {step.label: (result_of(root / step_id) or {}).get("seconds") for step_id, step in dag.steps.items()}
    table = about | environment() | {"notes": run_notes(dag, root, finished), "seconds": seconds, "cohort_digest": cohort.digest()}
    write_atomically(out / "run.json", (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    return rows


def _publish(dag: Dag, root: Path, predict: Step, arm: Arm, cohort: Cohort, folder: Path) -> None:
    """The model folder of a prediction step: weights, plan, recipe, and the first stage of a cascade in `previous/`."""
    train = predict.inputs["train"]
    _copy_files(output_of(root / train), folder)
    for file in ("plan.json", "fingerprint.json"):
        shutil.copyfile(output_of(root / dag.steps[train].inputs["prepare"]) / file, folder / file)
    write_atomically(folder / "model.json", model_json(arm, cohort).encode())
    if "first" in predict.inputs:
        _publish(dag, root, dag.steps[predict.inputs["first"]], first_stage(arm), cohort, folder / "previous")


def model_json(arm: Arm, cohort: Cohort) -> str:
    """What `ichbench predict` needs beside plan and weights: the recipe and what channels and labels mean."""
    table: dict[str, Any] = {"arm": arm.name, "why": arm.why, "recipe": arm.recipe.model_dump(mode="json")}
    # keys in this order: that of regions counts
    table |= declared(cohort.rules) | {"channel_names": list(cohort.channel_names)}
    table["axes_zyx"] = read_grid(cohort.records[0].images[0]).axis_codes_zyx
    table |= {"cohort": cohort.name, "n_training": len(cohort.train_ids), "ichbench": version("ichbench")}
    return json.dumps(table, indent=1) + "\n"


def _copy_files(source: Path, target: Path) -> None:
    """The files of a step under a readable name. Copies, so that an edit never reaches the step; what is not there any more goes."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def _commit() -> str:
    """The git commit of the source tree, with `+` when it was changed; empty for an installed wheel."""
    git = shutil.which("git")
    folder = Path(ichbench.__file__).resolve().parent.parent
    if git is None or not (folder / ".git").exists():
        return ""
    try:
        head = subprocess.run([git, "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [git, "-C", str(folder), "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed.strip() else "")
