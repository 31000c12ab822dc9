"""What a run folder says beside its scores: cases, base, factors, numbers of training cases. Old and foreign folders may say less."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichbench.board.report import Report, build_report
from ichbench.board.strata import KINDS
from ichbench.board.summary import DEFAULT_METRICS, Clusters, listed
from ichbench.cases.files import read_json, read_table
from ichbench.errors import InputError
from ichbench.scoring.score import Score
from ichbench.scoring.strict_csv import columns_of, read_lines
from ichbench.scoring.tables import read_score_files

#: What `--cluster` may be: group (patients) where cases share one, a column of cases.csv, or nothing.
CLUSTERS = ("auto", "group", "site", "none")


@dataclass(frozen=True)
class Run:
    """A run folder, or a lone scores.csv (then only `rows` is known).

    cases            case -> column -> text of cases.csv
    factors          factor -> levels of a complete factorial study
    training_cases   arm -> number of training cases, for the arms whose recipes differ in nothing else; fewer than two: empty
    """

    rows: list[Score]
    cases: dict[str, dict[str, str]]
    base: str | None
    arms: tuple[str, ...]
    factors: dict[str, list[str]]
    training_cases: dict[str, int]


def read_run(path: Path) -> Run:
    """Read `path`, a folder with scores.csv or such a file. InputError with the file's name for whatever is damaged."""
    if not path.is_dir():
        return Run(read_score_files([path], known_metrics=True), {}, None, (), {}, {})
    if not (path / "scores.csv").is_file():
        raise InputError(f"{path} holds no scores.csv; give the folder of a finished run-ablation, or a scores.csv")
    rows = read_score_files([path / "scores.csv"], known_metrics=True)
    about = _json(path / "run.json") | _json(path / "board.json")
    scored = {row.arm for row in rows}
    named, base = about.get("arms", []), about.get("base")
    if not isinstance(named, list) or not all(isinstance(arm, str) for arm in named) or not isinstance(base, str | None):
        raise InputError(f"{path / 'run.json'} or board.json: arms is a list of names and base one name; run the study again")
    arms = tuple(dict.fromkeys(arm for arm in named if arm in scored))
    factors = _factors(path, about) if about.get("design") == "factorial" else {}
    return Run(rows, read_cases(path / "cases.csv"), base or next(iter(named), None), arms, factors, _training_cases(path, scored))


def read_cases(path: Path) -> dict[str, dict[str, str]]:
    """case -> column -> text without blanks around it; nothing where there is no such file. Files: as `strict_csv` has them.

    InputError: no column `case`, a case without a name or twice, a line of another length, a file that is no such table.
    """
    if not path.is_file():
        return {}
    columns = case_columns(path)
    found: dict[str, dict[str, str]] = {}
    for line in read_lines(path, columns):
        cells = dict(zip(columns, map(str.strip, line.cells), strict=True))
        case = cells["case"]
        if not case or case in found:
            problem = f"case {case!r} comes twice; keep one line of each" if case else "the case has no name"
            raise InputError(f"{path}, line {line.number}: {problem}")
        found[case] = cells
    return found


def case_columns(path: Path) -> tuple[str, ...]:
    """The columns of a cases.csv. InputError: none of them is `case`, or the file cannot be read."""
    columns = columns_of(path)
    if "case" not in columns:
        raise InputError(f"{path}, line 1: there is no column 'case'; the columns are {', '.join(columns) or 'none'}")
    return columns


def case_column(paths: Sequence[Path], column: str) -> dict[str, str]:
    """case -> text of one column of several cases.csv, without blanks around it. An empty cell says nothing and contradicts nothing.

    InputError: no file has the column, or one case has two values.
    """
    found: dict[str, str] = {}
    said_in: dict[str, str] = {}
    for path in [path for path in paths if column in columns_of(path)] or paths:
        for line in read_lines(path, ("case", column), optional=True):
            case, value = map(str.strip, line.cells)
            here = f"{path}, line {line.number}"
            if value and found.get(case) and found[case] != value:
                raise InputError(
                    f"{here}: case {case!r} has two values of {column}, {found[case]!r} and {value!r} (the first in {said_in[case]}); "
                    "keep one"
                )
            if value or case not in found:
                found[case], said_in[case] = value, here
    return found


def clusters_from(cases: Mapping[str, Mapping[str, str]], scored: Sequence[str], by: str = "auto") -> Clusters:
    """case -> cluster for the scored cases.

    `auto` takes the column `group` where at least two scored cases share one, and a case without a group stands for itself;
    `group` and `site` insist on that column. InputError: an unknown name, a column that is not there or empty for a case.
    """
    if by not in CLUSTERS:
        raise InputError(f"--cluster {by!r} is not known; give one of {', '.join(CLUSTERS)}")
    if by == "none":
        return None
    groups = {case: (cases.get(case, {}).get("group" if by == "auto" else by) or "").strip() for case in scored}
    named = [group for group in groups.values() if group]
    if by == "auto":
        # a blank before a name that stands for a case cannot be part of a group, which is stripped
        return {case: group or f" {case}" for case, group in groups.items()} if len(set(named)) < len(named) else None
    if len(named) < len(groups):
        lacking = [case for case, group in groups.items() if not group]
        raise InputError(f"--cluster {by}: cases.csv names no {by} for {listed(lacking)}; name one for every case, or use --cluster none")
    return groups


def report_of_run(
    run: Run,
    base: str | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    cluster: str = "auto",
    kinds: Sequence[str] = KINDS,
    strata_asked: bool = False,
    **options: Any,
) -> Report:
    """The report of a run; `options` as `build_report` takes them. InputError: no base is known, and whatever a part refuses.

    Strata need every scored case in cases.csv. Where it lacks some, that is an error if strata were asked for, else a note.
    """
    chosen = base or run.base or "base"
    arms = {row.arm for row in run.rows}
    if chosen not in arms:
        raise InputError(f"there is no arm {chosen!r} to compare with; the rows have {listed(sorted(arms))}. Name the base with --base")
    scored = sorted({row.case for row in run.rows})
    # arms that failed leave a design incomplete: its contrasts would mix, so that part is left out
    complete = run.factors if chosen == run.base and _has_design(run, arms) else {}
    lacking = [case for case in scored if case not in run.cases]
    notes: list[str] = []
    if run.cases and kinds and lacking and not strata_asked:
        notes.append(f"no strata: cases.csv has no line for {len(lacking)} of {len(scored)} scored cases: {listed(lacking)}.")
    described = {} if lacking and not strata_asked else run.cases
    return build_report(
        run.rows,
        chosen,
        metrics,
        run.arms,
        described if kinds else None,
        complete,
        run.training_cases,
        clusters_from(run.cases, scored, cluster),
        kinds=kinds,
        remarks=notes,
        **options,
    )


def _factors(path: Path, about: Mapping[str, Any]) -> dict[str, list[str]]:
    factors = about.get("factors", [])
    try:
        if any(isinstance(levels, str) for _, levels in factors):
            raise TypeError
        found = {str(name): [str(level) for level in levels] for name, levels in factors}
        levels = [level for its in found.values() for level in its]
        if len(found) < len(factors) or len(set(levels)) < len(levels):
            raise ValueError
        return found
    except (TypeError, ValueError):
        raise InputError(f"{path / 'run.json'}: factors must be a list of [name, levels]; run the study again") from None


def _has_design(run: Run, arms: set[str]) -> bool:
    from ichbench.board.factorial import design_arms

    return len(run.factors) > 1 and set(design_arms(run.base or "base", run.factors).values()) <= arms


def _training_cases(path: Path, scored: set[str]) -> dict[str, int]:
    """From recipes/*.json: arms that differ from each other in training.cases alone. `all` is what the models were trained on."""
    counts: dict[str, int] = {}
    groups: dict[str, list[str]] = {}
    for file in sorted((path / "recipes").glob("*.json")):
        recipe = _json(file).get("recipe", {})
        parts = [recipe, *(recipe.get(part, {}) for part in ("inference", "training"))] if isinstance(recipe, dict) else [recipe]
        if not all(isinstance(part, dict) for part in parts):
            raise InputError(f"{file} holds no recipe; run the study again, or give its scores.csv alone")
        if file.stem not in scored or recipe.get("inference", {}).get("predictor") != "unet":
            continue
        cases = recipe.get("training", {}).pop("cases", "all")
        if cases != "all" and not (str(cases).isdecimal() and int(cases) > 0):
            raise InputError(f"{file}: training.cases is {cases!r}; it is all or a whole number from 1. Run the study again")
        whole = _all_cases(path, file.stem)
        if cases != "all" or whole is not None:
            counts[file.stem] = min(int(cases), whole or int(cases)) if cases != "all" else int(whole or 0)
            groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(file.stem)
    for names in groups.values():
        if len({counts[name] for name in names}) > 1:
            return {name: counts[name] for name in names}
    return {}


def _all_cases(path: Path, arm: str) -> int | None:
    """How many training cases a fold of the run has."""
    splits = path / "splits_final.json"
    if splits.is_file():
        folds = read_json(splits, "run the study again")
        try:
            return len(folds[0]["train"])
        except (LookupError, TypeError):
            raise InputError(f"{splits} is damaged; run the study again") from None
    for file in sorted((path / "models").glob(f"{arm}-*/model.json")):
        count = _json(file).get("n_training", 0)
        if not isinstance(count, int):
            raise InputError(f"{file}: n_training is {count!r}; it is a whole number. Run the study again")
        return count or None
    return None


def _json(path: Path) -> dict[str, Any]:
    return read_table(path, "run the study again, or give its scores.csv alone") if path.is_file() else {}
