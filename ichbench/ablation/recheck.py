"""Measures a committed board afresh: recipes, scorer probes, phantom, scores of the committed masks, untrained arms, the board itself.

What is not learned must come out equal bit for bit. `--rerun` also trains again and compares the arms' means within
the tolerance that the board states.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ichbench.ablation.dag import make_dag
from ichbench.ablation.engine import run_dag
from ichbench.ablation.facts import cases_csv, collect_scores, recipe_json
from ichbench.ablation.run import PHANTOM_COHORT, phantom_cohort
from ichbench.ablation.settings import PHANTOM
from ichbench.ablation.study import UNTRAINED, Study, make_study
from ichbench.arms import shipped
from ichbench.board.check import Difference, compare_digests, compare_scores, compare_text
from ichbench.board.render import board_csv, board_markdown, build_board
from ichbench.cases.cohort import Cohort
from ichbench.cases.files import read_table, write_atomically
from ichbench.cases.images import read_labels
from ichbench.compute import Compute
from ichbench.errors import CaseError, InputError
from ichbench.scoring.probes import probe_rows
from ichbench.scoring.protocol import PROTOCOLS
from ichbench.scoring.score import Score, rows_for_case
from ichbench.scoring.strict_csv import read_lines
from ichbench.scoring.tables import read_scores, write_scores

#: Largest accepted change of an arm's mean when it is trained again on another machine (measured: README of the board).
RERUN_TOLERANCES = {"dice": 0.05, "nsd": 0.05}
#: Committed masks of a board may take this much in all.
MAX_MASK_BYTES = 2_000_000


def freeze_board(run: Path, folder: Path) -> list[Path]:
    """Make a finished run on the embedded phantom the committed board in `folder`; returns what was written."""
    about = _json(run / "run.json")
    if about.get("cohort") != PHANTOM or about.get("failed"):
        raise InputError(f"{run} is not a finished run on the embedded phantom; a board is frozen from one in which nothing failed")
    if about["study"] not in shipped("studies"):
        raise InputError(
            f"{run} is of the study {about['study']}, which is not shipped, so nobody could run it again; "
            f"shipped are {', '.join(shipped('studies'))}"
        )
    stale, _ = _stale_recipes(run, make_study(about["study"], about["preset"]))
    if stale:
        raise InputError(
            f"the recipes of {run} are not those of the shipped study any more: {stale[0].where}: {stale[0].text}; run it again"
        )
    rows = read_scores(run / "scores.csv")
    size = sum(path.stat().st_size for path in (run / "predictions").rglob("*.nii.gz"))
    if size > MAX_MASK_BYTES:
        raise InputError(f"the masks of {run} take {size} bytes, a committed board may hold {MAX_MASK_BYTES}; use fewer arms or cases")
    kept = {name: about[name] for name in ("study", "preset", "seeds", "folds", "protocol", "threads", "phantom", "arms")}
    kept |= {
        "measured_with": about["versions"] | {"python": about["python"]},
        "rerun_tolerances": RERUN_TOLERANCES,
        "base": about["arms"][0],
    }
    for old in ("masks", "recipes"):
        shutil.rmtree(folder / old, ignore_errors=True)
    for mask in sorted((run / "predictions").rglob("*.nii.gz")):
        target = folder / "masks" / mask.relative_to(run / "predictions")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mask, target)
    shutil.copytree(run / "recipes", folder / "recipes")
    write_scores(folder / "scores.csv", rows)
    write_scores(folder / "probes.csv", probe_rows())
    write_atomically(folder / "cases.csv", (run / "cases.csv").read_bytes())
    write_atomically(folder / "board.json", (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())
    table, page = _board_files(rows, kept)
    write_atomically(folder / "board.csv", table.encode())
    write_atomically(folder / "README.md", page.encode())
    return [folder / name for name in ("scores.csv", "probes.csv", "cases.csv", "board.json", "board.csv", "README.md", "recipes", "masks")]


def recheck(folder: Path, rerun: bool = False) -> tuple[list[Difference], int]:
    """Differences between a committed board and what comes out now, and the number of facts compared."""
    about = _json(folder / "board.json")
    committed = read_scores(folder / "scores.csv")
    if about.get("phantom") != PHANTOM_COHORT:
        raise InputError(
            f"{folder / 'board.json'} was made with the phantom {about.get('phantom')}, the embedded one is {PHANTOM_COHORT}; "
            "freeze it again"
        )
    if missing := {"study", "preset", "seeds", "folds", "protocol", "threads", "arms", "base", "rerun_tolerances"} - about.keys():
        raise InputError(f"{folder / 'board.json'} lacks {', '.join(sorted(missing))}; freeze the board again")
    _check_types(folder / "board.json", about, {row.arm for row in committed})
    study = make_study(about["study"], about["preset"])
    untrained = {arm.name for arm in study.arms if arm.recipe.inference.predictor in UNTRAINED}
    differences, compared = _stale_recipes(folder, study)
    probes = probe_rows()
    differences += compare_scores(read_scores(folder / "probes.csv"), probes)
    compared += len(probes)
    with tempfile.TemporaryDirectory(prefix="ichbench-check-") as scratch:
        cohort = phantom_cohort(Path(scratch) / "cohort")
        rescored = _rescored(folder, committed, cohort, about["protocol"])
        found, compared_cases = _stale_cases(folder / "cases.csv", cohort, committed, rescored)
        differences += found
        differences += compare_scores(committed, rescored)
        fresh = _measured(study, untrained, cohort, about, Path(scratch))
        differences += compare_scores([row for row in committed if row.arm in untrained], fresh)
        compared += compared_cases + len(committed) + len(fresh)
        learned: list[Score] = []
        if rerun:
            trained = {arm.name for arm in study.arms} - untrained
            learned = _measured(study, trained, cohort, about, Path(scratch))
            before = _means([row for row in committed if row.arm in trained], about["rerun_tolerances"])
            differences += compare_scores(before, _means(learned, about["rerun_tolerances"]), about["rerun_tolerances"])
            compared += len(before)
    # the board is rebuilt from what was measured now, so it cannot be right by itself
    table, page = _board_files(rescored, about)
    for name, text in (("board.csv", table), ("README.md", page)):
        differences += compare_text(name, (folder / name).read_text(encoding="utf-8"), text)
        compared += 1
    return list(dict.fromkeys(differences)), compared


def _check_types(path: Path, about: dict[str, Any], arms: set[str]) -> None:
    """InputError for values in board.json that are not of their kind."""
    kinds = {"study": str, "preset": str, "protocol": str, "base": str, "threads": int}
    kinds |= {"seeds": list, "folds": list, "arms": list, "rerun_tolerances": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(about[key], kind)]
    if not wrong:
        items = {"seeds": int, "folds": str, "arms": str}
        wrong += [key for key, kind in items.items() if not about[key] or not all(isinstance(item, kind) for item in about[key])]
        wrong += ["rerun_tolerances"] if not all(isinstance(limit, int | float) for limit in about["rerun_tolerances"].values()) else []
        wrong += ["base"] if about["base"] not in arms else []
        wrong += ["protocol"] if about["protocol"] not in PROTOCOLS else []
    if wrong:
        raise InputError(f"{path}: {', '.join(f'{key} is {about[key]!r}' for key in wrong)}, which no board has; freeze the board again")


def _stale_cases(path: Path, cohort: Cohort, committed: list[Score], rescored: list[Score]) -> tuple[list[Difference], int]:
    """Every scored case by its digest, and then the whole table: strata and clusters come from its other columns."""
    digests = {line.cells[0]: line.cells[1] for line in read_lines(path, ("case", "digest"), optional=True)}
    known = set(cohort.train_ids) | set(cohort.test_ids)
    scored = dict.fromkeys(row.case for row in committed if row.case in known)
    found = compare_digests(digests, {name: cohort.case_digest(name) for name in scored})
    found += compare_text(path.name, path.read_text(encoding="utf-8"), cases_csv(cohort, rescored))
    return found, len(scored) + 1


def _measured(study: Study, names: set[str], cohort: Cohort, about: dict[str, Any], scratch: Path) -> list[Score]:
    """Rows of some arms of the study, computed now."""
    part = replace(study, arms=tuple(arm for arm in study.arms if arm.name in names))
    if not part.arms:
        return []
    compute = Compute("cpu", about["threads"])
    dag = make_dag(part, cohort, tuple(about["seeds"]), tuple(about["folds"]), compute, about["protocol"])
    outcome = run_dag(dag, scratch / "steps", compute, 2, lambda event: None)
    if outcome.failed:
        raise CaseError("; ".join(f"{dag.steps[name].label}: {message}" for name, message in outcome.failed.items()))
    return collect_scores(dag, scratch / "steps", dag.results)


def _rescored(folder: Path, committed: list[Score], cohort: Cohort, protocol: str) -> list[Score]:
    """The committed masks, scored now against the phantom as it is now."""
    rows: list[Score] = []
    known = set(cohort.train_ids) | set(cohort.test_ids)
    for arm, fold, seed, name in dict.fromkeys((row.arm, row.fold, row.seed, row.case) for row in committed):
        if name not in known:
            continue
        case = cohort.load(name, keep_file_order=True)
        if case.labels_zyx is None:
            raise CaseError(f"phantom case {name} has no reference mask any more")
        source = folder / "masks" / (arm if fold == "-" else f"{arm}-fold{fold}-seed{seed}") / f"{name}.nii.gz"
        predicted = read_labels(source, keep_file_order=True)[0] if source.is_file() else None
        spacing, axes = case.grid.spacing_zyx_mm, case.grid.file_axes
        volume = None if case.grid.is_regular else case.grid.voxel_ml
        rows += rows_for_case(arm, fold, seed, name, case.labels_zyx, predicted, spacing, protocol, cohort.labels, axes, volume)
    return rows


def _stale_recipes(folder: Path, study: Study) -> tuple[list[Difference], int]:
    """Arms whose recipe is not what it was, key by key: `training.loss was dice_ce, is ce`."""
    committed = {path.stem: _json(path) for path in sorted((folder / "recipes").glob("*.json"))}
    now = {arm.name: arm for arm in study.arms}
    found: list[Difference] = []
    for name in sorted(committed.keys() | now.keys()):
        if name not in now or name not in committed:
            where = "the study" if name in now else "the board"
            found.append(Difference("text", f"recipes/{name}", None, None, f"only in {where}"))
            continue
        was, value = _flat(committed[name].get("recipe")), _flat(json.loads(recipe_json(now[name]))["recipe"])
        for key in sorted(was.keys() | value.keys()):
            if key not in value:
                text = f"{key} was {was[key]}, and is not known any more"
            elif key not in was:
                text = f"{key} is new, {value[key]}"
            else:
                text = f"{key} was {was[key]}, is {value[key]}"
            if key not in was or key not in value or was[key] != value[key]:
                found.append(Difference("text", f"recipes/{name}", was.get(key), value.get(key), text))
        if committed[name].get("why") != now[name].why:
            found.append(Difference("text", f"recipes/{name}", committed[name].get("why"), now[name].why, "its reason changed"))
    return found, len(committed)


def _flat(table: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as written in a TOML file would read, for everything in a nested table."""
    if not isinstance(table, dict):
        return {prefix.removesuffix(".") or "recipe": table if isinstance(table, str) else json.dumps(table)}
    found: dict[str, str] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found or ({prefix.removesuffix("."): "{}"} if prefix else {})


def _board_files(rows: Iterable[Score], about: dict[str, Any]) -> tuple[str, str]:
    """board.csv and the board's README, both functions of the rows."""
    board = build_board(rows, base=about["base"], arm_order=about["arms"])
    phantom = about["phantom"]
    heading = (
        f"# {about['study']} on the phantom\n\n"
        f"Generated, do not edit. The shipped study `{about['study']}`, preset `{about['preset']}`, seeds {about['seeds']}, protocol "
        f"`{about['protocol']}`, on {phantom['n_test']} test cases of the embedded phantom ({phantom['n_cases'] - phantom['n_test']} "
        "for training).\n"
        "A synthetic head proves that the machinery works; it says nothing about patients.\n\n"
        "Check: `ichbench check leaderboard/phantom`. Rewrite: `run-ablation --out RUN` and `ichbench freeze RUN leaderboard/phantom`.\n\n"
    )
    return board_csv(board.summaries, board.effects), heading + board_markdown(board)


def _means(rows: list[Score], metrics: Iterable[str]) -> list[Score]:
    """One row per arm and metric: the mean over cases and seeds."""
    wanted, values = set(metrics), dict[tuple[str, str], list[float]]()
    for row in rows:
        if row.metric in wanted:
            values.setdefault((row.arm, row.metric), []).append(row.value)
    return [Score(arm, "-", "-", "mean", metric, sum(found) / len(found)) for (arm, metric), found in values.items()]


def _json(path: Path) -> dict[str, Any]:
    return read_table(path, "give the folder of a committed board, such as leaderboard/phantom, or freeze it again")
