"""A model folder, or all folds and seeds of a study's arm -> a result folder from which nnU-Net v2 predicts.

    OUT/DatasetXXX_Name/nnUNetTrainer__nnUNetPlans__3d_fullres/
      plans.json  dataset.json  dataset_fingerprint.json  fold_0/checkpoint_final.pth ...

nnU-Net prepares images by its own rules, which know nothing of the paper's flags (window, down-sampling, ...). A model
that was trained under such flags is refused, unless the images are prepared here and exported along with it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ichbench.cases.case import Grid
from ichbench.cases.files import check_writable, write_atomically
from ichbench.cases.images import write_image
from ichbench.cases.labels import declared
from ichbench.cases.nifti import ITK_TURNING, geometry_of, parse_header
from ichbench.errors import InputError
from ichbench.inference.inputs import find_images, read_case
from ichbench.inference.model import ModelFolder, read_model
from ichbench.network.nnunet_weights import weights_to_nnunet
from ichbench.network.unet import make_unet
from ichbench.network.weights import load_weights, manifest_path
from ichbench.prepare.fingerprint import Fingerprint, read_fingerprint
from ichbench.prepare.pipeline import flagged_case
from ichbench.prepare.plan import Plan
from ichbench.prepare.plans_json import plans_table, plans_text
from ichbench.recipe import PrepareRecipe

TRAINER = "nnUNetTrainer"
CHECKPOINTS = ("final", "best")
#: what `run-ablation` calls the models of an arm
MEMBER = re.compile(r"(?P<arm>.+)-fold(?P<fold>\w+)-seed(?P<seed>\d+)")


@dataclass(frozen=True)
class Exported:
    """What was written: the result folder, where each fold came from, the prepared images, and what the user should know.

    command   nnU-Net's own, which predicts with these folds and settings; IMAGES and MASKS stand for the user's folders
    """

    folder: Path
    folds: dict[str, str]
    images: tuple[Path, ...]
    notes: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class _Tables:
    """The JSON files of a result folder."""

    plans: dict[str, Any]
    dataset: dict[str, Any]
    trainer: str
    configuration: str


def export_nnunet(model: Path, out: Path, dataset_name: str | None = None, with_prepared: Path | None = None) -> Exported:
    """Write OUT/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION for a model folder, or for an arm `RUN/ARM` with all its folds and seeds.

    dataset_name   "Dataset501_PHE"; default: the cohort's own name if it is of that form
    with_prepared  an image or folder; written after the flags to OUT/DatasetXXX_Name/imagesPrepared, one file per channel

    Raises InputError for a model that nnU-Net cannot repeat, and where the target exists. Then nothing is written.
    """
    check_writable(out)
    members = find_members(model)
    first = members[0][1]
    _check_exportable(first, with_prepared is not None)
    others = [name for name, member in members if member.plan != first.plan or member.recipe != first.recipe]
    if others:
        raise InputError(f"{model}: {members[0][0]} and {others[0]} have different plans or recipes; export them one by one")
    tables = _tables(first, dataset_name)
    parts = [tables.trainer, str(tables.plans["plans_name"]), tables.configuration]
    for part in (str(tables.plans["dataset_name"]), *parts):
        if not re.fullmatch(r"\w[\w.+-]*", part):
            raise InputError(f"{model}: {part!r} cannot name a folder; use letters, digits, '_', '-'")
    target = out / tables.plans["dataset_name"] / "__".join(parts)
    if target.exists():
        raise InputError(f"{target} exists; give another --out, or remove it first")
    prepared = target.parent / "imagesPrepared"
    if with_prepared is not None and prepared.exists():
        raise InputError(f"{prepared} exists; give another --out, or remove it first")
    images: tuple[Path, ...] = ()
    notes = list(_notes(first))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch, _not_too_deep(model):
        made = Path(scratch) / "model"
        made.mkdir()
        write_atomically(made / "plans.json", plans_text(tables.plans).encode())
        write_atomically(made / "dataset.json", json.dumps(tables.dataset, indent=4).encode())
        if (first.folder / "fingerprint.json").is_file():
            shutil.copyfile(first.folder / "fingerprint.json", made / "dataset_fingerprint.json")
        folds = _number(members)
        for fold, (_, member, inner) in folds.items():
            _write_fold(made / f"fold_{fold}", fold, member, inner, tables)
        if with_prepared is not None:
            names, more = _write_prepared(first, with_prepared, Path(scratch) / prepared.name)
            notes += more
            (Path(scratch) / prepared.name).rename(prepared)
            images = tuple(prepared / name for name in names)
        try:
            made.rename(target)
        except BaseException:
            if images:
                # its own prepared images, which nobody could use
                shutil.rmtree(prepared)
            raise
    command = _command(target, folds, first, images)
    return Exported(target, {fold: name for fold, (name, _, _) in folds.items()}, images, tuple(dict.fromkeys(notes)), command)


@contextmanager
def _not_too_deep(model: Path) -> Iterator[None]:
    """JSON may nest deeper than a checkpoint can."""
    try:
        yield
    except RecursionError:
        raise InputError(
            f"{model}: its model.json or plan.json nests its entries too deeply to be written again; get the original"
        ) from None


def find_members(model: Path) -> list[tuple[str, ModelFolder]]:
    """(name, folder) of a model, or of all models of an arm, sorted by fold and seed. `RUN/models/ARM` and `RUN/ARM` name an arm."""
    if (model / "model.json").is_file():
        return [(model.name, read_model(model))]
    for place in (model.parent, model.parent / "models"):
        found = []
        for path in place.glob("*/model.json"):
            match = MEMBER.fullmatch(path.parent.name)
            if match is not None and match["arm"] == model.name:
                fold = match["fold"]
                found.append(((not fold.isdecimal(), fold.zfill(9), int(match["seed"])), path.parent))
        if found:
            return [(path.name, read_model(path)) for _, path in sorted(found)]
    raise InputError(
        f"{model} is neither a model folder nor an arm of a run; give RUN/models/base-foldfull-seed0, or RUN/base for all of base"
    )


def _number(members: list[tuple[str, ModelFolder]]) -> dict[str, tuple[str, ModelFolder, str]]:
    """nnU-Net's fold -> (where it comes from, its model folder, the fold inside that). Own numbers stay where they are unique."""
    every = [(name, member, inner) for name, member in members for inner in member.weights("final")]
    named = []
    for name, member, inner in every:
        match = MEMBER.fullmatch(name)
        named.append(inner if member.folds else match["fold"] if match else "0")
    # fold_all is left out by nnU-Net when it looks for folds itself, so it is used only where a model came with it
    usable = len(set(named)) == len(named) and all(fold.isdecimal() or (fold == "all" and members[0][1].folds) for fold in named)
    names = [str(int(fold)) if fold.isdecimal() else fold for fold in named] if usable else [str(index) for index in range(len(every))]
    return dict(zip(names, every, strict=True))


def active_flags(recipe: PrepareRecipe) -> dict[str, Any]:
    """The preparation's fields that differ from nnU-Net's own way, which knows none of them (but readers that turn a file)."""
    fields = {name: field.default for name, field in PrepareRecipe.model_fields.items() if name != "compatibility"}
    changed = {name: getattr(recipe, name) for name, default in fields.items() if getattr(recipe, name) != default}
    return {name: value for name, value in changed.items() if name != "reorient" or not isinstance(value, str)}


def _check_exportable(model: ModelFolder, prepared: bool) -> None:
    flags = active_flags(model.recipe.prepare)
    if "neighbour_slices" in flags or model.plan.neighbour_slices:
        raise InputError(f"{model.folder}: shows its network neighbouring slices as channels, which nnU-Net cannot; it cannot be exported")
    if flags and not prepared:
        said = ", ".join(f"prepare.{name} = {value}" for name, value in flags.items())
        raise InputError(
            f"{model.folder}: was trained on images prepared with {said}. nnU-Net would not prepare them so, and its masks would be wrong "
            "without a word; export the images along with it: --with-prepared IMAGES"
        )
    if model.recipe.inference.predictor != "unet":
        raise InputError(f"{model.folder}: the predictor is {model.recipe.inference.predictor!r}; only networks can be exported")
    if model.plan.previous_stage is not None:
        raise InputError(f"{model.folder}: is the second stage of a cascade, which cannot be exported alone; export a single network")


def _tables(model: ModelFolder, dataset_name: str | None) -> _Tables:
    if dataset_name is not None and not re.fullmatch(r"Dataset\d{3}_\w[\w-]*", dataset_name):
        raise InputError(
            f"--dataset {dataset_name!r} is not understood; nnU-Net's names are Dataset, three digits, _ and a name: Dataset501_PHE"
        )
    theirs = model.about.get("nnunet")
    if isinstance(theirs, dict):
        return _their_tables(theirs, dataset_name, model.folder / "model.json")
    cohort = str(model.about.get("cohort", model.about.get("arm", "model")))
    if dataset_name is None:
        dataset_name = (
            cohort if re.fullmatch(r"Dataset\d{3}_\w[\w-]*", cohort) else f"Dataset999_{re.sub(r'[^A-Za-z0-9]', '', cohort) or 'model'}"
        )
    plan = _resolved(model)
    reader = model.recipe.prepare.reorient
    plans = plans_table({plan.configuration: plan}, _fingerprint(model), dataset_name, model.recipe.plan.family)
    if isinstance(reader, str):
        plans["image_reader_writer"] = reader
    slope = model.recipe.network.leaky_slope
    if slope != 0.01:
        plans["configurations"][plan.configuration]["architecture"]["arch_kwargs"]["nonlin_kwargs"]["negative_slope"] = slope
    dataset: dict[str, Any] = {"channel_names": {str(index): name for index, name in enumerate(plan.channels)}}
    dataset |= declared(model.rules) | {"numTraining": model.about.get("n_training", 0), "file_ending": ".nii.gz"}
    if isinstance(reader, str):
        dataset["overwrite_image_reader_writer"] = reader
    return _Tables(plans, dataset, TRAINER, plan.configuration)


def _their_tables(theirs: dict[str, Any], dataset_name: str | None, source: Path) -> _Tables:
    """What an import kept: as nnU-Net wrote it, with every entry that we do not know; names that it lacks are put in."""
    for key, kind in {"plans": dict, "dataset": dict, "trainer": str, "configuration": str}.items():
        if not isinstance(theirs.get(key), kind):
            raise InputError(f"{source}: its entry nnunet.{key} is missing or damaged; import the model again")
    plans = dict(theirs["plans"])
    plans["dataset_name"] = str(dataset_name or plans.get("dataset_name") or "Dataset999_model")
    plans["plans_name"] = str(plans.get("plans_name") or "nnUNetPlans")
    return _Tables(plans, dict(theirs["dataset"]), theirs["trainer"], theirs["configuration"])


def _resolved(model: ModelFolder) -> Plan:
    """The plan with the depth that the recipe may have set instead."""
    if model.recipe.network.norm != "instance":
        raise InputError(f"{model.folder}: network.norm = {model.recipe.network.norm!r}; only networks with instance norm are exported")
    convs = model.recipe.network.convs_per_stage
    if convs == "auto":
        return model.plan
    return replace(model.plan, convs_per_stage=(convs,) * model.plan.n_stages, decoder_convs=(convs,) * (model.plan.n_stages - 1))


def _fingerprint(model: ModelFolder) -> Fingerprint:
    path = model.folder / "fingerprint.json"
    if path.is_file():
        return read_fingerprint(path)
    # model folders from before it was kept: the plan's own case stands in; prediction reads none of this
    plan = model.plan
    spacing, shape = (1.0, *plan.spacing)[-3:], (1.0, *plan.median_shape)[-3:]
    z, y, x = plan.transpose_backward
    case = (float(spacing[z]), float(spacing[y]), float(spacing[x])), (round(shape[z]), round(shape[y]), round(shape[x]))
    return Fingerprint((case[0],), (case[1],), plan.intensities, 1.0)


def _write_fold(folder: Path, fold: str, model: ModelFolder, inner: str, tables: _Tables) -> None:
    folder.mkdir()
    mirror, dims = model.recipe.prediction().mirror, model.plan.dims
    axes = tuple(range(dims)) if mirror is True else tuple(mirror or ())
    written = False
    for checkpoint in CHECKPOINTS:
        path = model.weights(checkpoint)[inner]
        if not path.is_file() or not manifest_path(path).is_file():
            continue
        network = make_unet(model.plan, model.recipe.network)
        about = load_weights(network, path)
        number: int | str = int(fold) if fold.isdecimal() else fold
        content = {
            "network_weights": weights_to_nnunet(network, model.plan),
            "optimizer_state": {},
            "grad_scaler_state": None,
            "logging": {},
            "_best_ema": None,
            "current_epoch": int(about["epoch"]) + 1 if isinstance(about.get("epoch"), int) else 0,
            "init_args": {"plans": tables.plans, "configuration": tables.configuration, "fold": number, "dataset_json": tables.dataset},
            "trainer_name": tables.trainer,
            "inference_allowed_mirroring_axes": axes or None,
        }
        torch.save(content, folder / f"checkpoint_{checkpoint}.pth")
        written = True
    if not written:
        raise InputError(f"{model.folder}: no weights for fold {inner} (final.safetensors or best.safetensors); train or import it again")


def _write_prepared(model: ModelFolder, images: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Images after the flags, as the network's preparation continues with them, on their own grid; their names, and notes."""
    recipe = model.recipe.prepare
    written, notes = [], []
    for case_id, files in find_images(images, model.channel_names).items():
        case, said = read_case(case_id, files, recipe, model.axes_zyx)
        header = case.grid.header
        if recipe.reorient == ITK_TURNING and header is not None and not geometry_of(parse_header(header)).oriented:
            raise InputError(
                f"{files[0]}: without sform and qform nnU-Net's {ITK_TURNING} would turn its prepared image once more; write one of them"
            )
        flagged, _, more = flagged_case(case, recipe, model.channel_names)
        notes += [*said, *more]
        # a grid without a file behind it: nnU-Net then reads the very array that our preparation would go on with
        grid = Grid(flagged.grid.shape_zyx, flagged.grid.affine_4x4, pixdim_zyx_mm=flagged.grid.spacing_zyx_mm)
        for index, channel in enumerate(flagged.image_czyx):
            written.append(f"{case_id}_{index:04d}.nii.gz")
            write_image(folder / written[-1], channel, grid)
    notes.append("nnU-Net's masks will lie on the grid of the prepared images, not of the originals")
    return written, notes


def _command(folder: Path, folds: Iterable[str], model: ModelFolder, images: Sequence[Path]) -> str:
    """Without -f nnU-Net takes the folds 0 to 4, whichever there are."""
    inference = model.recipe.inference
    words = ["nnUNetv2_predict_from_modelfolder", "-i", str(images[0].parent) if images else "IMAGES", "-o", "MASKS", "-m", str(folder)]
    words += ["-f", *folds]
    words += ["-chk", "checkpoint_best.pth"] if inference.checkpoint == "best" else []
    words += ["-step_size", str(inference.tile_step)] if inference.tile_step != 0.5 else []
    return shlex.join(words)


def _notes(model: ModelFolder) -> list[str]:
    inference, notes = model.recipe.inference, []
    if model.recipe.prepare.compatibility != "nnunet" and not isinstance(model.recipe.prepare.reorient, str):
        axes = f" ({model.axes_zyx} along z, y, x)" if model.axes_zyx else ""
        notes.append(
            f"nnU-Net takes the axes of a file as they lie: give it images stored as those of the training cohort{axes}, slices last"
        )
    if inference.checkpoint == "best":
        notes.append("this model uses its best checkpoint: predict with -chk checkpoint_best.pth")
    if inference.tile_step != 0.5:
        notes.append(f"tiles overlap otherwise than by nnU-Net's default: predict with -step_size {inference.tile_step}")
    if inference.postprocess != "off":
        notes.append(
            "post-processing is not part of a result folder (nnU-Net keeps it as pickled functions): apply it with nnU-Net, or here"
        )
    if not inference.gaussian:
        notes.append("tiles are averaged without a Gaussian, which nnU-Net's command cannot switch off: masks will differ a little")
    return notes
