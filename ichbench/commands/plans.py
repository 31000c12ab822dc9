"""Commands about a cohort before training: its fingerprint and nnU-Net's plans."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ichbench.errors import InputError

#: how the folders of work under way begin, which a killed process leaves behind
UNFINISHED = ".prepare-"


def fingerprint(
    cohort: Annotated[Path, typer.Argument(help="a cohort folder or cohort.csv")],
    recipe: Annotated[str | None, typer.Option(help="an arm (name or TOML file) whose flags act first")] = None,
    compatibility: Annotated[str | None, typer.Option(help="ichbench, or nnunet: axes, draws and digits as nnU-Net's")] = None,
    out: Annotated[Path | None, typer.Option(help="write dataset_fingerprint.json and dataset.json into this folder")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files in --out that say something else")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="cases read at once (default: every available core)")] = None,
) -> None:
    """Measure the training cases: spacings, shapes, grey values of the foreground. nnU-Net's dataset_fingerprint.json."""
    from ichbench.prepare.explain import explain_fingerprint
    from ichbench.prepare.window import flagged_channel_names

    _check_out(out)
    found, measured, chosen = _measured(cohort, recipe, compatibility, None, out is not None, workers)
    typer.echo("\n".join(explain_fingerprint(measured, flagged_channel_names(found.channel_names, chosen.prepare))))
    _how_drawn(chosen)
    if out is not None:
        _write_nnunet(out, found, {"dataset_fingerprint.json": measured.to_text()}, overwrite)


def plan(
    cohort: Annotated[Path, typer.Argument(help="a cohort folder or cohort.csv")],
    recipe: Annotated[str | None, typer.Option(help="an arm (name or TOML file); its prepare and plan tables are taken")] = None,
    family: Annotated[str | None, typer.Option(help="nnU-Net's planner: plain, resenc_m, resenc_l, resenc_xl, resenc")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="GPU memory to plan for (default: the family's own)")] = None,
    spacing: Annotated[str | None, typer.Option(help="working spacing z,y,x in mm instead of nnU-Net's rule")] = None,
    compatibility: Annotated[str | None, typer.Option(help="ichbench, or nnunet: axes, draws and digits as nnU-Net's")] = None,
    fingerprint: Annotated[Path | None, typer.Option(help="a dataset_fingerprint.json of this cohort, to save measuring")] = None,
    out: Annotated[Path | None, typer.Option(help="write fingerprint, plans and dataset.json as in nnUNet_preprocessed")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files in --out that say something else")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="cases read at once (default: every available core)")] = None,
) -> None:
    """Plan networks as nnU-Net does, and say why: spacing, patch, batch, low-resolution stage. Every configuration at once."""
    from ichbench.prepare.explain import explain_planned, planned_table
    from ichbench.prepare.nnunet_files import reader_of, with_custom_configurations
    from ichbench.prepare.plans_json import plans_table, plans_text
    from ichbench.prepare.survey import cohort_plans, label_counts
    from ichbench.prepare.topology import FAMILIES

    _check_out(out)
    given = {"family": family, "memory_gb": memory_gb, "target_spacing_zyx_mm": None if spacing is None else _three_numbers(spacing)}
    overlay = {"plan": {key: value for key, value in given.items() if value is not None}}
    found, measured, chosen = _measured(cohort, recipe, compatibility, overlay, out is not None, workers, fingerprint)
    planner = FAMILIES[chosen.plan.family]
    planned = cohort_plans(found, measured, chosen.prepare, chosen.plan)
    n_cases, n_labels = len(measured.spacings), label_counts(found)[0]
    typer.echo(f"cohort {found.name}: {n_cases} training cases; planner {chosen.plan.family} (nnU-Net's {planner.planner})\n")
    typer.echo("\n".join(explain_planned(planned, planner, n_labels, n_cases)))
    typer.echo("\n" + "\n".join(planned_table(planned)))
    if out is not None:
        plans = {name: sized.plan for name, sized in planned.configurations.items()}
        table = plans_table(plans, measured, found.name, chosen.plan.family, reader=reader_of(found))
        name = f"{planner.plans_name}.json"
        table = with_custom_configurations(out / name, table)
        _write_nnunet(out, found, {"dataset_fingerprint.json": measured.to_text(), name: plans_text(table)}, overwrite)


def prepare(
    cohort: Annotated[Path, typer.Argument(help="a cohort folder or cohort.csv")],
    out: Annotated[Path, typer.Option(help="new folder for fingerprint.json, plan.json and cases/")],
    recipe: Annotated[str | None, typer.Option(help="an arm (name or TOML file); its prepare and plan tables are taken")] = None,
    compatibility: Annotated[str | None, typer.Option(help="ichbench, or nnunet: axes, draws and digits as nnU-Net's")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="cases measured at once (default: every available core)")] = None,
) -> None:
    """Prepare every case as training sees it: .npy arrays on the working grid, with their sha256 and the way back.

    Where one case fails nothing is written, so that the folder is whole or not there.
    """
    from ichbench.cases.files import check_writable, is_free, put_in_place, staged_in
    from ichbench.prepare.whole import prepare_cohort

    check_writable(out)
    if not is_free(out, UNFINISHED):
        raise InputError(f"--out {out} exists and is not an empty folder; give a new one")
    found, measured, chosen = _measured(cohort, recipe, compatibility, None, False, workers)
    ids = [record.id for record in found.records]
    with tempfile.TemporaryDirectory(dir=staged_in(out), prefix=UNFINISHED) as scratch:
        made = Path(scratch) / "prepared"
        planned = prepare_cohort(found, ids, chosen.prepare, chosen.plan, made, measured, _counted(len(ids), "prepared"))
        put_in_place(made, out, last="plan.json")
    typer.echo("\n".join(planned.explain()))
    typer.echo(
        f"\n{len(ids)} cases in {out / 'cases'}, one folder each: image.npy (c, z, y, x), labels.npy where there is a mask, case.json"
    )


def _check_out(out: Path | None) -> None:
    from ichbench.cases.files import check_writable

    if out is not None:
        check_writable(out)


def _measured(
    cohort: Path,
    arm: str | None,
    compatibility: str | None,
    overlay: dict[str, Any] | None,
    for_nnunet: bool,
    workers: int | None,
    fingerprint: Path | None = None,
) -> tuple[Any, Any, Any]:
    """The cohort, its fingerprint (read, if a file is given) and the recipe."""
    from ichbench.arms import load_overlay
    from ichbench.cases.cohort import read_cohort
    from ichbench.overlays import make_recipe
    from ichbench.prepare.fingerprint import read_fingerprint
    from ichbench.prepare.nnunet_files import check_expressible, reader_of, turning_reader
    from ichbench.prepare.survey import cohort_fingerprint
    from ichbench.scoring.folders import available_cores

    below = load_overlay(arm)[1] if arm is not None else {}
    switch = {} if compatibility is None else {"prepare": {"compatibility": compatibility}}
    chosen = make_recipe(below, switch, overlay or {}, source="command line" if arm is None else arm)
    found = read_cohort(cohort, reorient=chosen.prepare.reorient)
    reader = turning_reader(found) if for_nnunet or chosen.prepare.compatibility == "nnunet" else None
    if reader is not None and chosen.prepare.reorient is False:
        typer.echo(f"dataset.json names {reader}: cases are turned as it turns them (prepare.reorient = {reader!r}).\n")
        chosen = chosen.model_copy(update={"prepare": chosen.prepare.model_copy(update={"reorient": reader})})
        found = read_cohort(cohort, reorient=chosen.prepare.reorient)
    if not found.train_ids:
        raise InputError(f"{cohort}: has no training cases, which are what is measured")
    if for_nnunet:
        check_expressible(found, chosen.prepare)
    elif chosen.prepare.compatibility == "nnunet":
        reader_of(found)
    if fingerprint is not None:
        return found, read_fingerprint(fingerprint, len(found.train_ids)), chosen
    n_cases = len(found.train_ids)
    n_workers = min(available_cores(), n_cases) if workers is None else workers
    measured = cohort_fingerprint(found, found.train_ids, chosen.prepare, n_workers, _counted(n_cases))
    return found, measured, chosen


def _counted(n_cases: int, done_to: str = "measured") -> Callable[[str], None]:
    """Shows on a terminal, and only there, how many cases were measured (or whatever is done to them)."""
    done: list[str] = []

    def show(case_id: str) -> None:
        done.append(case_id)
        if sys.stderr.isatty():
            end = "\n" if len(done) == n_cases else ""
            typer.echo(f"\r{done_to} {len(done)} of {n_cases} cases{end}", err=True, nl=False)

    return show


def _how_drawn(chosen: Any) -> None:
    if chosen.prepare.compatibility == "nnunet":
        typer.echo("Drawn as nnU-Net draws them, so its file comes out to the last digit.")
    else:
        typer.echo("Computed from all voxels; --compatibility nnunet repeats nnU-Net's random draw instead.")


def _write_nnunet(out: Path, cohort: Any, texts: dict[str, str], overwrite: bool) -> None:
    from ichbench.prepare.nnunet_files import side_files, write_files

    done = write_files(out, texts | side_files(cohort), overwrite)
    typer.echo("\nin nnU-Net's layout:\n" + "\n".join(f"  {path} ({what})" for path, what in done))


def _three_numbers(text: str) -> tuple[float, ...]:
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--spacing {text!r} is not understood; give three numbers in mm, z,y,x, such as 5,0.45,0.45") from None
    return first, second, third
