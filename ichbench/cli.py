"""The command line: parse, call one function, print. Heavy imports live inside the commands.

Those about models, plans and boards have files of their own in commands/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ichbench.commands.boards import board
from ichbench.commands.effects import effects
from ichbench.commands.models import ensemble, nnunet, postprocessing, predict, select
from ichbench.commands.named import named_folders
from ichbench.commands.plans import fingerprint, plan, prepare
from ichbench.commands.training import doctor, train
from ichbench.errors import CaseError, InputError

app = typer.Typer(
    name="ichbench",
    help="Ablations, scores and leaderboards that hold up, for intracranial hemorrhage segmentation on head CT.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(postprocessing, name="postprocess", help="Keep only largest components where cross-validation says that it helps.")
app.add_typer(nnunet, name="nnunet", help="Trained models from nnU-Net v2 and to it.")
for command in (fingerprint, plan, prepare, train, predict, select, ensemble, board, effects, doctor):
    app.command()(command)
ablation = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

INTERRUPTED = 75


@ablation.command()
def run_ablation(
    study: Annotated[str | None, typer.Argument(help="a shipped study (preprocessing, phe, ...) or a TOML file")] = None,
    cohort: Annotated[str | None, typer.Option(help="phantom, a cohort folder or a cohort.csv")] = None,
    out: Annotated[str | None, typer.Option(help="folder for everything that is written")] = None,
    preset: Annotated[str | None, typer.Option(help="how much is computed: smoke, small, full")] = None,
    seeds: Annotated[str | None, typer.Option(help="training seeds, such as 0,1,2")] = None,
    folds: Annotated[str | None, typer.Option(help="full, cv, or numbers such as 0,1")] = None,
    workers: Annotated[str | None, typer.Option(help="steps that run at once (default: one per core)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N")] = None,
    threads: Annotated[str | None, typer.Option(help="threads per step; scores depend on it in the last digits")] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="the same bits every time on a GPU, too; slower")] = False,
    compiled: Annotated[str | None, typer.Option("--compile", help="auto (GPUs), yes or no: train compiled networks")] = None,
    protocol: Annotated[str | None, typer.Option(help="scoring protocol: instance2022 or strict")] = None,
    predictions: Annotated[list[str] | None, typer.Option(help="NAME=DIR: somebody else's masks as an arm")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show settings, arms and steps, compute nothing")] = False,
) -> None:
    """Run an ablation study: base and every changed arm, trained, scored and compared; ends with a board.

    Without arguments: the paper's preprocessing flags on the embedded phantom, in minutes. Run it again to resume.
    """
    from ichbench.ablation.run import plan_run, run_study
    from ichbench.ablation.settings import settle, settle_study
    from ichbench.ablation.study import read_study_file

    given = {"study": study, "cohort": cohort, "out": out, "preset": preset, "seeds": seeds, "folds": folds}
    given |= {
        "workers": workers,
        "device": device,
        "threads": threads,
        "protocol": protocol,
        "deterministic": "yes" if deterministic else None,
        "compile": compiled,
    }
    defaults = read_study_file(settle_study(study))[1].run
    settings = settle(given, defaults)
    folders = named_folders(predictions or [])
    if dry_run:
        _dry_run(settings, folders)
        return
    from ichbench.progress import Progress

    typer.echo(f"study {settings.study}, cohort {settings.cohort}, preset {settings.preset}, seeds {','.join(map(str, settings.seeds))}")
    try:
        planned = plan_run(settings, folders)
        with Progress(planned.dag) as progress:
            finished = run_study(planned, progress.show)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; run the same command again to go on after the last finished step", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _print_finished(finished)
    if finished.code:
        raise typer.Exit(finished.code)


def _dry_run(settings: Any, folders: dict[str, Path]) -> None:
    from ichbench.ablation.settings import PHANTOM
    from ichbench.ablation.study import make_study
    from ichbench.cases.cohort import read_cohort

    typer.echo("\n".join(settings.lines()))
    study = make_study(settings.study, settings.preset, folders)
    typer.echo(f"\nstudy {study.name}: {study.why}")
    for arm in study.arms:
        changes = ", ".join(f"{key} = {value}" for key, value in arm.changes.items()) or "nothing"
        typer.echo(f"  {arm.name}: changes {changes}")
    if settings.cohort != PHANTOM:
        from ichbench.ablation.dag import make_dag
        from ichbench.ablation.folds import default_folds, parse_folds

        found = read_cohort(Path(settings.cohort))
        folds = parse_folds(settings.folds or default_folds(found))
        dag = make_dag(study, found, settings.seeds, folds, settings.compute, settings.protocol)
        kinds = [step.kind for step in dag.steps.values()]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        typer.echo(f"\ncohort {found.name}: {len(found.train_ids)} training, {len(found.test_ids)} test cases; folds {','.join(folds)}")
        typer.echo(f"{len(kinds)} steps: {counts}")
    typer.echo("\nnothing was computed (--dry-run)")


def _print_finished(finished: Any) -> None:
    from ichbench.board.render import board_text
    from ichbench.board.report import report_text

    if finished.board is not None:
        typer.echo("")
        typer.echo(board_text(finished.board))
    if finished.report is not None:
        typer.echo(report_text(finished.report, strata=False, effects=False), nl=False)
    for arm, notes in finished.notes.items():
        shown = notes[0] + (f" (and {len(notes) - 1} more like it in run.json)" if len(notes) > 1 else "")
        typer.echo(f"warning, {arm}: {shown}")
    for label, message in finished.failed.items():
        typer.echo(f"failed, {label}: {message}", err=True)
    if finished.written:
        typer.echo("\nwritten:\n" + "\n".join(f"  {path}" for path in finished.written))


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="new folder for the cohort (nnU-Net raw layout)")],
    cases: Annotated[int, typer.Option(min=1, help="number of cases; about a third become test cases")] = 12,
    size: Annotated[str, typer.Option(help="small (96 x 96) or full (512 x 512)")] = "small",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write analytic head CTs with bleeds of known volume."""
    from ichbench.cases.files import check_writable
    from ichbench.cases.phantom import write_phantom

    check_writable(out, "the folder")
    write_phantom(out, cases, size, seed)
    typer.echo(f"{cases} cases written to {out}; true volumes in {out / 'phantom.json'}")


@app.command()
def score(
    reference: Annotated[Path, typer.Argument(help="reference mask, folder of masks, nnU-Net data set or INSTANCE folder")],
    prediction: Annotated[Path, typer.Argument(help="predicted mask, or folder with files of the references' names")],
    protocol: Annotated[str, typer.Option(help="scoring protocol: instance2022, strict, ...")] = "instance2022",
    out: Annotated[Path | None, typer.Option(help="write scores.csv here: one line per number")] = None,
    wide: Annotated[Path | None, typer.Option(help="write a CSV with one line per case here")] = None,
    summary: Annotated[Path | None, typer.Option(help="write nnU-Net's summary.json here")] = None,
    metrics_json: Annotated[Path | None, typer.Option(help="write grand-challenge's metrics.json here")] = None,
    each_label: Annotated[bool, typer.Option("--labels", help="also score every label by itself")] = False,
    metrics: Annotated[str | None, typer.Option(help="instead of the protocol's: dice,nsd@1.0,hd@90,lesion_f1@10,...")] = None,
    definitions: Annotated[bool, typer.Option("--definitions", help="the same masks as other tools define the metrics")] = False,
    curve: Annotated[bool, typer.Option("--curve", help="surface Dice (NSD) against its tolerance")] = False,
    anomalies: Annotated[bool, typer.Option(help="warn of what is odd about a prediction; scores stay as they are")] = True,
    images: Annotated[Path | None, typer.Option(help="the CT, or a folder of them: also warn of voxels outside the head")] = None,
    dataset_json: Annotated[Path | None, typer.Option(help="labels and regions of plain files, from nnU-Net's dataset.json")] = None,
    reorient: Annotated[bool, typer.Option("--reorient", help="turn predictions stored in another axis order; no resampling")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: every available core for many cases)")] = None,
) -> None:
    """Score masks against references, case by case, by the official rules. All labels above 0 count as one foreground.

    Every reference is scored: one without a prediction counts as empty. A pair that does not fit stops it, and nothing is written.
    """
    from dataclasses import replace

    from ichbench.scoring.definitions import curve_tolerances, fold_definitions, matrix_metrics, mean_curve, render_curve, render_matrix
    from ichbench.scoring.exports import Targets
    from ichbench.scoring.folders import default_workers, labels_present, score_each
    from ichbench.scoring.layouts import find_pairs, with_images
    from ichbench.scoring.pairs import Settings
    from ichbench.scoring.protocol import get_protocol
    from ichbench.scoring.score import check_metrics
    from ichbench.scoring.screen import Progress, detection_text, score_text, warnings_of

    rules, targets = get_protocol(protocol), Targets(out, wide, summary, metrics_json)
    if metrics is not None:
        rules = replace(rules, metrics=check_metrics(metrics.split(",")))
    compared = matrix_metrics(rules, None if metrics is None else rules.metrics) if definitions else ()
    tolerances_mm = curve_tolerances(rules) if curve else ()
    if images is not None and not anomalies:
        raise InputError("--images is for the checks that --no-anomalies turns off; give one of the two")
    found = find_pairs(reference, prediction, dataset_json)
    found = found if images is None else with_images(found, images)
    masks = [mask for pair in found.pairs for mask in (pair.reference, pair.prediction) if mask is not None]
    targets.check([*masks, *(pair.image for pair in found.pairs if pair.image is not None)])
    n_workers = default_workers(len(found.pairs)) if workers is None else workers
    try:
        labels = labels_present(masks, n_workers) if each_label and found.labels is None else found.labels
        options = Settings(rules, found.arm, labels=labels, label_map=found.label_map, reorient=reorient)
        settings = replace(options, count_voxels=summary is not None, definitions=compared, curve=tolerances_mm, anomalies=anomalies)
        with Progress(len(found.pairs), sys.stderr) as progress:
            scored = list(progress.each(score_each(found.pairs, settings, n_workers)))
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(score_text(scored, _mean_interval))
    if text := detection_text(scored):
        typer.echo(text)
    if definitions:
        typer.echo("\n" + render_matrix(fold_definitions(one.definitions for one in scored)).rstrip())
    if curve:
        typer.echo("\n" + render_curve(mean_curve((one.curve for one in scored), tolerances_mm), rules).rstrip())
    for warning in warnings_of(scored, [path.name for path in found.extra], found.imageless):
        typer.echo(f"warning: {warning}")
    if targets.paths():
        typer.echo("\nwritten:\n" + "\n".join(f"  {path}" for path in targets.write(scored, rules, labels)))


def _mean_interval(metric: str, values: Sequence[float]) -> tuple[float, float]:
    import numpy as np

    from ichbench.board.summary import DEFAULT_RESAMPLES, generator_for, mean_interval, within_range

    resamples = max(100, min(DEFAULT_RESAMPLES, 5_000_000 // max(len(values), 1)))  # bounds the memory: all draws are held at once
    return within_range(metric, mean_interval(np.array(values), generator_for(0, metric), resamples), values)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="BOARD", help="a committed board, such as leaderboard/phantom")],
    rerun: Annotated[bool, typer.Option("--rerun", help="also train again and compare within the stated tolerance")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
    junit: Annotated[Path | None, typer.Option(help="also write the outcome here as JUnit XML, for CI servers")] = None,
) -> None:
    """Do the committed numbers still come out? Exits with 1 and a table when one does not, with 2 when BOARD is none."""
    from ichbench.ablation.recheck import recheck
    from ichbench.board.check_report import check_json, check_junit, render_check
    from ichbench.cases.files import write_atomically

    differences, compared = recheck(folder, rerun)
    if junit is not None:
        write_atomically(junit, check_junit(differences, compared, folder.resolve().name).encode())
    typer.echo((check_json if as_json else render_check)(differences, compared), nl=False)
    if differences or not compared:
        raise typer.Exit(1)


@app.command()
def freeze(
    run: Annotated[Path, typer.Argument(help="folder of a finished run-ablation on the phantom")],
    folder: Annotated[Path, typer.Argument(metavar="BOARD", help="the committed board to write, such as leaderboard/phantom")],
) -> None:
    """Make a finished run the committed board that `ichbench check` compares with."""
    from ichbench.ablation.recheck import freeze_board

    for path in freeze_board(run, folder):
        typer.echo(f"  {path}")


@app.command()
def validate(cohort: Annotated[Path, typer.Argument(help="a cohort folder or cohort.csv")]) -> None:
    """Read every file of a cohort and report every problem; exits with 2 when there is one."""
    from ichbench.cases.cohort import read_cohort
    from ichbench.cases.cohort import validate as find_problems

    found = read_cohort(cohort)
    problems = find_problems(found, voxels=True)
    typer.echo(f"cohort {found.name}: {len(found.train_ids)} training, {len(found.test_ids)} test cases, {len(problems)} problems")
    for problem in problems:
        typer.echo(f"  {problem}")
    if problems:
        raise typer.Exit(2)


def main() -> None:
    """Entry point of `ichbench`."""
    _guarded(app)


def run_ablation_main() -> None:
    """Entry point of `run-ablation`."""
    _guarded(ablation)


def _guarded(command: typer.Typer) -> None:
    """Run a command; failures a user can cause are one message and an exit code, never a traceback."""
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        command(standalone_mode=True)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except CaseError as error:
        typer.echo(f"failed: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        # a path that cannot be written or read; what the user can do is in the system's own words
        typer.echo(f"error: {error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
