"""The command line: parse, call one function, print. Heavy imports live inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ichbench.errors import CaseError, InputError

app = typer.Typer(
    name="ichbench",
    help="Ablations, scores and leaderboards that hold up, for intracranial hemorrhage segmentation on head CT.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
postprocessing = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(postprocessing, name="postprocess", help="Keep only largest components where cross-validation says that it helps.")
nnunet = typer.Typer(help="Trained models from nnU-Net v2 and to it.", no_args_is_help=True)
app.add_typer(nnunet, name="nnunet")
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
    given |= {"workers": workers, "device": device, "threads": threads, "protocol": protocol}
    defaults = read_study_file(settle_study(study))[1].run
    settings = settle(given, defaults)
    folders = _named_folders(predictions or [])
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
        dag = make_dag(study, found, settings.seeds, folds, settings.device.split(":")[0], settings.threads, settings.protocol)
        kinds = [step.kind for step in dag.steps.values()]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        typer.echo(f"\ncohort {found.name}: {len(found.train_ids)} training, {len(found.test_ids)} test cases; folds {','.join(folds)}")
        typer.echo(f"{len(kinds)} steps: {counts}")
    typer.echo("\nnothing was computed (--dry-run)")


def _print_finished(finished: Any) -> None:
    from ichbench.board.render import board_text

    if finished.board is not None:
        typer.echo("")
        typer.echo(board_text(finished.board))
    for arm, notes in finished.notes.items():
        shown = notes[0] + (f" (and {len(notes) - 1} more like it in run.json)" if len(notes) > 1 else "")
        typer.echo(f"warning, {arm}: {shown}")
    for label, message in finished.failed.items():
        typer.echo(f"failed, {label}: {message}", err=True)
    if finished.written:
        typer.echo("\nwritten:\n" + "\n".join(f"  {path}" for path in finished.written))


def _named_folders(texts: Sequence[str], what: str = "--predictions") -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise InputError(f"{what} {text!r} is not understood; give NAME=DIR, such as {what} theirs=masks/")
        if name in folders:
            raise InputError(f"{what} {name!r} is given twice, for {folders[name]} and {folder}; every folder needs a name of its own")
        folders[name] = Path(folder)
    return folders


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="new folder for the cohort (nnU-Net raw layout)")],
    cases: Annotated[int, typer.Option(min=1, help="number of cases; about a third become test cases")] = 12,
    size: Annotated[str, typer.Option(help="small (96 x 96) or full (512 x 512)")] = "small",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write analytic head CTs with bleeds of known volume."""
    from ichbench.cases.phantom import write_phantom

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

    from ichbench.board.summary import DEFAULT_RESAMPLES, generator_for, mean_interval

    resamples = max(100, min(DEFAULT_RESAMPLES, 20_000_000 // max(len(values), 1)))  # bounds the memory: all draws are held at once
    return mean_interval(np.array(values), generator_for(0, metric), resamples)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="a model folder, such as RUN/models/base-foldfull-seed0")],
    image: Annotated[Path, typer.Argument(help="one head CT (.nii.gz), or a folder of them")],
    out: Annotated[Path, typer.Option(help="mask file, or folder when the input is a folder")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="also write <case>.npz, for ichbench select")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace masks and archives that exist")] = False,
) -> None:
    """Segment a head CT with a trained model; prints the volume in ml.

    A file that fails does not stop a folder; the failures are named at the end and the exit code is 1.
    """
    from ichbench.ablation.settings import resolve_device
    from ichbench.inference.model import load_model, predict_path

    for done in predict_path(load_model(model, resolve_device(device)), image, out, probabilities, overwrite):
        typer.echo(f"{done.path}: {done.volume_ml:.2f} ml" + "".join(f"  [{note}]" for note in done.notes))


@postprocessing.command()
def find(
    reference: Annotated[Path, typer.Argument(help="folder of reference masks, or an nnU-Net data set")],
    predictions: Annotated[Path, typer.Argument(help="cross-validated masks of the same cases")],
    rule: Annotated[Path, typer.Option(help="write the rule here (JSON)")],
    dataset_json: Annotated[Path | None, typer.Option(help="labels, regions and ignore label of plain folders")] = None,
    compatibility: Annotated[str, typer.Option(help="nnunet: a label that no case shows stops the union, as in nnU-Net")] = "ichbench",
) -> None:
    """Find out where keeping only the largest component raises the Dice."""
    from ichbench.inference.folders import find_in_folders

    _check_compatibility(compatibility)
    if rule.exists():
        raise InputError(f"--rule {rule} exists already; give a new file, nothing is overwritten")
    found = find_in_folders(reference, predictions, dataset_json, compatibility)
    for trial in found.trials:
        labels = ", ".join(map(str, trial.keep_largest))
        typer.echo(
            f"largest component of {labels}: Dice {trial.before:.4f} -> {trial.after:.4f}, {'kept' if trial.accepted else 'not kept'}"
        )
    found.save(rule)
    typer.echo(f"{len(found.steps)} steps from {found.cases} cases written to {rule}")


def _check_compatibility(compatibility: str) -> None:
    if compatibility not in ("ichbench", "nnunet"):
        raise InputError(f"--compatibility {compatibility!r} is not known; give ichbench or nnunet")


@postprocessing.command()
def apply(
    predictions: Annotated[Path, typer.Argument(help="one mask, or a folder of them")],
    rule: Annotated[Path, typer.Option(help="what `ichbench postprocess find` wrote")],
    out: Annotated[Path, typer.Option(help="new folder for the masks")],
) -> None:
    """Apply a rule to masks; prints how many voxels each lost."""
    from ichbench.inference.folders import apply_to_folder
    from ichbench.inference.postprocess import read_postprocessing

    for path, removed in apply_to_folder(read_postprocessing(rule), predictions, out):
        typer.echo(f"{path}: {removed} voxels removed")


@app.command()
def select(
    reference: Annotated[Path, typer.Argument(help="folder of reference masks, or an nnU-Net data set")],
    models: Annotated[
        list[str], typer.Argument(metavar="NAME=DIR...", help="cross-validated masks, and <case>.npz probabilities for pairs")
    ],
    out: Annotated[Path | None, typer.Option(help="write the choice here (JSON)")] = None,
    dataset_json: Annotated[Path | None, typer.Option(help="labels, regions and ignore label of plain folders")] = None,
    pairs: Annotated[bool, typer.Option(help="also try the mean probabilities of every two models")] = True,
    compatibility: Annotated[str, typer.Option(help="nnunet: a label that no case shows leaves no choice, as in nnU-Net")] = "ichbench",
) -> None:
    """Choose the best model, or the best two together, by the mean Dice of their cross-validated masks."""
    from ichbench.inference.folders import select_folders

    _check_compatibility(compatibility)
    folders = _named_folders(models, "model")
    if out is not None and out.exists():
        raise InputError(f"--out {out} exists already; give a new file, nothing is overwritten")
    found = select_folders(reference, folders, dataset_json, pairs, compatibility)
    for names, dice in found.scores.items():
        typer.echo(f"{' + '.join(names)}: mean Dice {dice:.4f}{'  <- best' if names == found.members else ''}")
    if out is not None:
        found.save(out)


@app.command()
def ensemble(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="what ichbench predict --probabilities wrote, one per model")],
    out: Annotated[Path, typer.Option(help="folder for the masks")],
    dataset_json: Annotated[Path | None, typer.Option(help="labels or regions (default: one label per output)")] = None,
    rule: Annotated[Path | None, typer.Option(help="what `ichbench postprocess find` wrote for this ensemble")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace masks that exist")] = False,
) -> None:
    """Masks of several models' mean probabilities, such as the pair that `ichbench select` chose."""
    from ichbench.inference.folders import average_folders
    from ichbench.inference.postprocess import read_postprocessing

    for path in average_folders(folders, out, dataset_json, None if rule is None else read_postprocessing(rule), overwrite):
        typer.echo(f"{path}")


@nnunet.command("import")
def nnunet_import(
    folder: Annotated[Path, typer.Argument(help="nnU-Net's result folder, DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION")],
    out: Annotated[Path, typer.Option(help="new model folder, for ichbench predict")],
    checkpoint: Annotated[str, typer.Option(help="final or best")] = "final",
    folds: Annotated[str | None, typer.Option(help="such as 0,1 or all (default: every numbered fold there is)")] = None,
    previous: Annotated[Path | None, typer.Option(help="first stage of a cascade (default: the folder beside it)")] = None,
) -> None:
    """Make a model folder of a trained nnU-Net (weights of one or more folds). Nothing from it is executed; hostile files are refused."""
    from ichbench.inference.nnunet_import import import_nnunet

    chosen = None if folds is None else [name.strip() for name in folds.split(",") if name.strip()]
    done = import_nnunet(folder, out, checkpoint, chosen, previous)
    typer.echo("\n".join([f"{done.trainer}, fold {', '.join(done.folds)}, mirror axes {list(done.mirror_axes)}", *done.plan.explain()]))
    for note in done.notes:
        typer.echo(f"warning: {note}")
    typer.echo(f"\nwritten: {done.folder}; use it with: ichbench predict {done.folder} IMAGE --out MASK")


@nnunet.command("export")
def nnunet_export(
    model: Annotated[Path, typer.Argument(help="a model folder, or RUN/ARM for all folds and seeds of an arm")],
    out: Annotated[Path, typer.Option(help="folder for DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION, such as nnUNet_results")],
    dataset: Annotated[str | None, typer.Option(help="name of the data set, such as Dataset501_PHE")] = None,
    with_prepared: Annotated[
        Path | None, typer.Option(help="images to write as the recipe's flags leave them, along with the model")
    ] = None,
) -> None:
    """Write a result folder from which nnU-Net v2 predicts. Recipes with flags that nnU-Net does not know need --with-prepared."""
    from ichbench.inference.nnunet_export import export_nnunet

    done = export_nnunet(model, out, dataset, with_prepared)
    for fold, source in done.folds.items():
        typer.echo(f"fold_{fold}: {source}")
    for note in done.notes:
        typer.echo(f"note: {note}")
    if done.images:
        typer.echo(f"{len(done.images)} prepared images in {done.images[0].parent}")
    typer.echo(f"\nwritten: {done.folder}; use it with: nnUNetv2_predict_from_modelfolder -i IMAGES -o MASKS -m {done.folder}")


@app.command()
def board(
    scores: Annotated[list[Path], typer.Argument(help="one or more scores.csv, or folders that hold one")],
    out: Annotated[Path | None, typer.Option(help="write board.csv and board.md here")] = None,
    base: Annotated[
        str | None, typer.Option(help="arm that the others are compared with (default: base, if there is one); or none")
    ] = None,
) -> None:
    """Make a board from score rows."""
    from ichbench.board.render import board_text, build_board, write_board
    from ichbench.scoring.tables import read_scores

    rows = [row for path in scores for row in read_scores(path / "scores.csv" if path.is_dir() else path)]
    arms = sorted({row.arm for row in rows})
    if base not in (None, "none", *arms):
        raise InputError(f"--base {base!r} is not among the arms {', '.join(arms)}; give one of them, or none")
    chosen = base or ("base" if "base" in arms else "none")
    made = build_board(rows, base=None if chosen == "none" else chosen)
    typer.echo(board_text(made))
    if out is not None:
        typer.echo("\nwritten:\n" + "\n".join(f"  {path}" for path in write_board(made, out)))


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="BOARD", help="a committed board, such as leaderboard/phantom")],
    rerun: Annotated[bool, typer.Option("--rerun", help="also train again and compare within the stated tolerance")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> None:
    """Do the committed numbers still come out? Exits with 1 and a table when one does not."""
    from ichbench.ablation.recheck import recheck
    from ichbench.board.check import check_json, render_check

    differences, compared = recheck(folder, rerun)
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


@app.command()
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

    found, measured, chosen = _measured(cohort, recipe, compatibility, None, out is not None, workers)
    typer.echo("\n".join(explain_fingerprint(measured, flagged_channel_names(found.channel_names, chosen.prepare))))
    _how_drawn(chosen)
    if out is not None:
        _write_nnunet(out, found, {"dataset_fingerprint.json": measured.to_text()}, overwrite)


@app.command()
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
    from ichbench.prepare.fingerprint import read_fingerprint
    from ichbench.prepare.nnunet_files import check_expressible, reader_of
    from ichbench.prepare.survey import cohort_fingerprint
    from ichbench.recipe import make_recipe
    from ichbench.scoring.folders import available_cores

    below = load_overlay(arm)[1] if arm is not None else {}
    switch = {} if compatibility is None else {"prepare": {"compatibility": compatibility}}
    chosen = make_recipe(below, switch, overlay or {}, source="command line" if arm is None else arm)
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


def _counted(n_cases: int) -> Callable[[str], None]:
    """Shows on a terminal, and only there, how many cases were measured."""
    done: list[str] = []

    def show(case_id: str) -> None:
        done.append(case_id)
        if sys.stderr.isatty():
            end = "\n" if len(done) == n_cases else ""
            typer.echo(f"\rmeasured {len(done)} of {n_cases} cases{end}", err=True, nl=False)

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
