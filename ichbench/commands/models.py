"""Commands about trained models: predict, post-process, choose, average, and nnU-Net's in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ichbench.commands.named import named_folders
from ichbench.errors import InputError

postprocessing = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
nnunet = typer.Typer(no_args_is_help=True)


def predict(
    model: Annotated[
        Path, typer.Argument(help="a model folder, such as RUN/models/base-foldfull-seed0, or CHOICE.json of ichbench select")
    ],
    image: Annotated[Path, typer.Argument(help="one head CT (.nii.gz), or a folder of them")],
    out: Annotated[Path, typer.Option(help="mask file, or folder when the input is a folder")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="also write <case>.npz, for ichbench select")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace masks and archives that exist")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="other than the model's recipe: mirror=false, tile_step=0.75, ..."),
    ] = None,
) -> None:
    """Segment a head CT with a trained model, or as `ichbench select` chose; prints the volume in ml.

    With CHOICE.json: by the one model chosen, or by the mean probabilities of two, then with the post-processing found for them, as
    predict --probabilities, ensemble and postprocess apply do one after another.

    --set changes how tiles are predicted, not what was trained: mirror (false: one pass instead of 8 in 3D), tile_step,
    gaussian, precision (bf16, where the hardware has it), convolution (compiled: for bf16 and GPUs).

    A file that fails does not stop a folder; the failures are named at the end and the exit code is 1.
    """
    from ichbench.compute import resolve_device
    from ichbench.inference.choice import load_choice, predict_choice
    from ichbench.inference.model import load_model, predict_path

    place = resolve_device(device)
    if model.is_file():
        found = predict_choice(load_choice(model, place, settings or ()), image, out, probabilities, overwrite)
    else:
        found = predict_path(load_model(model, place, settings or ()), image, out, probabilities, overwrite)
    for done in found:
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
    from ichbench.cases.files import check_writable
    from ichbench.inference.folders import find_in_folders

    _check_compatibility(compatibility)
    check_writable(rule.parent, "--rule")
    if rule.exists():
        raise InputError(f"--rule {rule} exists already; give a new file, nothing is overwritten")
    found = find_in_folders(reference, predictions, dataset_json, compatibility)
    for trial in found.trials:
        labels = ", ".join(map(str, trial.keep_largest))
        typer.echo(
            f"largest component of {labels}: Dice {trial.before:.4f} -> {trial.after:.4f}, {'kept' if trial.accepted else 'not kept'}"
        )
    found.save(rule)
    _say_what_labels_mean(reference, dataset_json)
    typer.echo(f"{len(found.steps)} steps from {found.cases} cases written to {rule}")


@postprocessing.command()
def apply(
    predictions: Annotated[Path, typer.Argument(help="one mask, or a folder of them")],
    rule: Annotated[Path, typer.Option(help="what `ichbench postprocess find` wrote")],
    out: Annotated[Path, typer.Option(help="new folder for the masks, or a new file for one mask")],
) -> None:
    """Apply a rule to masks; prints how many voxels each lost."""
    from ichbench.inference.folders import apply_to_folder
    from ichbench.inference.postprocess import read_postprocessing

    for path, removed in apply_to_folder(read_postprocessing(rule), predictions, out):
        typer.echo(f"{path}: {removed} voxels removed")


def select(
    reference: Annotated[Path, typer.Argument(help="folder of reference masks, or an nnU-Net data set")],
    models: Annotated[
        list[str], typer.Argument(metavar="NAME=DIR...", help="cross-validated masks, and <case>.npz probabilities for pairs")
    ],
    out: Annotated[Path | None, typer.Option(help="write the choice here (JSON)")] = None,
    dataset_json: Annotated[Path | None, typer.Option(help="labels, regions and ignore label of plain folders")] = None,
    pairs: Annotated[bool, typer.Option(help="also try the mean probabilities of every two models")] = True,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="the model folder of a name, so that ichbench predict can use --out")
    ] = None,
    postprocess: Annotated[bool, typer.Option("--postprocess", help="also find the winner's rule, as ichbench postprocess find")] = False,
    compatibility: Annotated[str, typer.Option(help="nnunet: a label that no case shows leaves no choice, as in nnU-Net")] = "ichbench",
) -> None:
    """Choose the best model, or the best two together, by the mean Dice of their cross-validated masks.

    What --out writes is applied in one command: ichbench predict CHOICE.json IMAGE --out OUT. For that it must know the model folders:
    the one that a DIR lies in (as ichbench train leaves it), or --model NAME=FOLDER; a relative one is kept relative to the file.
    """
    from ichbench.cases.files import check_writable
    from ichbench.inference.folders import select_folders

    _check_compatibility(compatibility)
    folders = named_folders(models, "model")
    if out is not None:
        check_writable(out.parent)
    if out is not None and out.exists():
        raise InputError(f"--out {out} exists already; give a new file, nothing is overwritten")
    known = _model_folders(folders, model or [])
    found = replace(select_folders(reference, folders, dataset_json, pairs, compatibility, postprocess), models=known)
    for names, dice in found.scores.items():
        typer.echo(f"{' + '.join(names)}: mean Dice {dice:.4f}{'  <- best' if names == found.members else ''}")
    _say_what_labels_mean(reference, dataset_json)
    if found.postprocessing is not None:
        steps = found.postprocessing.steps
        kept = "; ".join(f"largest component of {', '.join(map(str, step))}" for step in steps)
        typer.echo(f"post-processing of {' + '.join(found.members)}: {kept or 'none, it raised no Dice'}")
    if out is not None:
        found.save(out)
        unknown = [name for name in found.members if name not in known]
        todo = f"say where its models are to use it: --model {unknown[0]}=FOLDER" if unknown else "use it with: ichbench predict"
        typer.echo(f"\nwritten: {out}; " + (todo if unknown else f"{todo} {out} IMAGE --out MASK"))


def ensemble(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="what ichbench predict --probabilities wrote, one per model")],
    out: Annotated[Path, typer.Option(help="folder for the masks")],
    dataset_json: Annotated[Path | None, typer.Option(help="labels or regions, where the archives do not say them")] = None,
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
    typer.echo(f"\nwritten: {done.folder}; use it with: {done.command}")


def _model_folders(masks: Mapping[str, Path], given: Sequence[str]) -> dict[str, Path]:
    """Name -> model folder: the one given, or the one that the masks lie in. InputError for a folder that is none."""
    named = named_folders(given, "--model")
    for name, folder in named.items():
        if name not in masks:
            raise InputError(f"--model {name}={folder}: the models to choose from are {', '.join(masks)}; give one of these names")
        if not (folder / "model.json").is_file():
            raise InputError(
                f"--model {name}={folder} is not a model folder (it holds no model.json); give the one that ichbench predict takes"
            )
    # "." and ".." do not name the folder that they lie in
    above = {name: folder.parent if folder.name.strip(".") else folder.resolve().parent for name, folder in masks.items()}
    return {name: folder for name, folder in above.items() if (folder / "model.json").is_file()} | named


def _check_compatibility(compatibility: str) -> None:
    if compatibility not in ("ichbench", "nnunet"):
        raise InputError(f"--compatibility {compatibility!r} is not known; give ichbench or nnunet")


def _say_what_labels_mean(reference: Path, dataset_json: Path | None) -> None:
    """Masks alone do not say that some labels are regions or not to be scored."""
    from ichbench.scoring.layouts import declares_labels

    if dataset_json is None and reference.is_dir() and not declares_labels(reference):
        what = "every value in its masks was taken for a label; --dataset-json declares regions or an ignore label"
        typer.echo(f"note: nothing beside {reference} declares labels: {what}", err=True)
