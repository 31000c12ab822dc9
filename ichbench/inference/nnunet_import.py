"""A trained nnU-Net result folder -> a model folder, without executing anything from it.

    Trainer__Plans__Configuration/
      plans.json  dataset.json                      (dataset_fingerprint.json is kept where it is there)
      fold_0/checkpoint_final.pth ...               (fold_all, checkpoint_best.pth)

Nothing else in the folder is opened: `postprocessing.pkl` is a pickle. plans.json is data: a network is recognised by its
name, never imported. Checkpoints are read by `network.checkpoint`.
"""

from __future__ import annotations

import json
import reprlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ichbench.cases.files import check_writable, is_free, put_in_place, read_json, staged_in, write_atomically
from ichbench.cases.labels import read_rules
from ichbench.cases.nifti import TURNING_READERS
from ichbench.errors import InputError
from ichbench.inference.model import check_intensities
from ichbench.network.checkpoint import read_checkpoint
from ichbench.network.nnunet_weights import weights_from_nnunet
from ichbench.network.unet import UNet, check_topology
from ichbench.network.weights import save_weights
from ichbench.overlays import make_recipe
from ichbench.prepare.configuration import network_plan
from ichbench.prepare.plan import Plan
from ichbench.prepare.plans_read import plan_of, read_plans
from ichbench.recipe import NetworkRecipe

CHECKPOINTS = ("final", "best")
#: how the folders of work under way begin, which a killed process leaves behind
UNFINISHED = ".import-"
#: what decides how nnU-Net's two networks compute; plans with other settings are refused
ARCHITECTURE = frozenset(
    "n_stages features_per_stage conv_op kernel_sizes strides n_conv_per_stage n_blocks_per_stage n_conv_per_stage_decoder conv_bias "
    "norm_op norm_op_kwargs dropout_op dropout_op_kwargs nonlin nonlin_kwargs deep_supervision".split()
)
#: nnU-Net's readers that take a file's axes as they lie, as ours does under compatibility "nnunet"
PLAIN_READERS = ("SimpleITKIO", "NibabelIO")


@dataclass(frozen=True)
class Imported:
    """What an import made: the model folder, its plan, folds and inputs, and what the user should know."""

    folder: Path
    plan: Plan
    folds: tuple[str, ...]
    trainer: str
    mirror_axes: tuple[int, ...]
    notes: tuple[str, ...]


def import_nnunet(
    folder: Path, out: Path, checkpoint: str = "final", folds: Sequence[str] | None = None, previous: Path | None = None
) -> Imported:
    """Write the model folder `out` from a result folder of nnU-Net v2; every fold found, or the `folds` asked for.

    The second stage of a cascade needs the result folder of the first, `previous`; it is looked for beside `folder`. All of
    its folds are taken.

    Raises InputError where a file is missing, damaged, hostile or does not fit to the others, and for what cannot be
    computed here (other networks, preprocessors). `out` then does not exist, or is the empty folder that it was.
    """
    if checkpoint not in CHECKPOINTS:
        raise InputError(f"--checkpoint {checkpoint!r} is not understood; allowed are {', '.join(CHECKPOINTS)}")
    plans, dataset = _read_tables(folder)
    check_writable(out)
    if not is_free(out, UNFINISHED):
        raise InputError(f"--out {out} exists and is not an empty folder; give a new one")
    names = _choose_folds(folder, f"checkpoint_{checkpoint}.pth", folds)
    with tempfile.TemporaryDirectory(dir=staged_in(out), prefix=UNFINISHED) as scratch:
        made = Path(scratch) / "model"
        try:
            imported = _import_into(made, folder, plans, dataset, checkpoint, names)
            _import_previous(made / "previous", folder, dataset, imported[0], _turning(plans), checkpoint, previous)
        except RecursionError:
            # what could be read may still be too deep to be written
            raise InputError(f"{folder}: plans.json, dataset.json or a checkpoint nests its entries too deeply; get the original") from None
        put_in_place(made, out, last="model.json")
    return Imported(out, *imported)


def _import_previous(
    made: Path, folder: Path, dataset: Mapping[str, Any], plan: Plan, turning: str | bool, checkpoint: str, given: Path | None
) -> None:
    """The first stage below the second one's new folder."""
    stage = plan.previous_stage
    if stage is None:
        if given is not None:
            raise InputError(f"--previous {given}: {plan.configuration} of {folder} is not the second stage of a cascade; leave it out")
        return
    parts = folder.resolve().name.split("__")
    beside = folder.resolve().with_name("__".join([*parts[:-1], stage]))
    if given is None and not beside.is_dir():
        raise InputError(
            f"{folder} is the second stage of a cascade and needs the masks of {stage!r}, but there is no {beside}; "
            "name that model with --previous"
        )
    source = beside if given is None else given
    plans, own = _read_tables(source)
    names = _choose_folds(source, f"checkpoint_{checkpoint}.pth", None)
    first = _import_into(made, source, plans, own, checkpoint, names)[0]
    labels = dataset["labels"]
    if first.configuration != stage or first.previous_stage is not None or own["labels"] != labels:
        raise InputError(f"{source} is {first.configuration!r} with the labels {own['labels']}; needed is {stage!r} with {labels}")
    if _turning(plans) != turning:
        raise InputError(
            f"{source} reads images by {plans.get('image_reader_writer')}, the second stage by another class, so that one of them would "
            "see turned images; plan both stages together"
        )


def _import_into(
    made: Path, folder: Path, plans: dict[str, Any], dataset: dict[str, Any], checkpoint: str, names: tuple[str, ...]
) -> tuple[Plan, tuple[str, ...], str, tuple[int, ...], tuple[str, ...]]:
    """Everything below the new folder; returns what `Imported` says, the folder apart."""
    about: _About | None = None
    for name in names:
        path = folder / f"fold_{name}" / f"checkpoint_{checkpoint}.pth"
        content = read_checkpoint(path)
        found = _about(content, path, folder)
        if about is None:
            about, plan = found, _plan(plans, dataset, found.configuration, folder)
            # on the meta device no weight is allocated; the real ones are then bounded by the size of their file
            with torch.device("meta"):
                network = UNet(network_plan(plan, read_rules(dataset["labels"], dataset.get("regions_class_order"))), NetworkRecipe())
        elif found != about:
            raise InputError(
                f"{path}: was made by {found}, fold_{names[0]} by {about}; the folds of one model share all of these: import them apart "
                "with --folds"
            )
        weights = content["network_weights"]
        if not isinstance(weights, Mapping):
            raise InputError(f"{path}: network_weights is a {type(weights).__name__}, not a table of tensors; the file is damaged")
        network.load_state_dict(weights_from_nnunet(weights, network, plan, str(path), path.stat().st_size), assign=True)
        save_weights(network, made / f"fold_{name}" / f"{checkpoint}.safetensors", {"fold": name, "source": "nnunet", "epoch": found.epoch})
    if about is None:
        raise InputError(f"{folder}: no fold was chosen")
    mirror: bool | list[int] = list(about.mirror_axes) if about.mirror_axes else False
    recipe = make_recipe(
        {
            "prepare": {"compatibility": "nnunet", "reorient": _turning(plans)},
            "plan": {"dims": plan.dims},
            "inference": {"compatibility": "nnunet", "mirror": mirror, "checkpoint": checkpoint},
        },
        source="import",
    )
    model = {
        "arm": f"{about.trainer}__{plans.get('plans_name', 'nnUNetPlans')}__{about.configuration}",
        "why": f"Imported from {plans.get('dataset_name', 'an unnamed cohort')}, trained by nnU-Net.",
        "recipe": recipe.model_dump(mode="json"),
        "labels": dataset["labels"],
        "channel_names": list(plan.source_channels),
        # nnU-Net takes files as they lie, and so does this recipe
        "axes_zyx": None,
        "folds": list(names),
        "ichbench": version("ichbench"),
        "nnunet": {"trainer": about.trainer, "configuration": about.configuration, "plans": plans, "dataset": dataset},
    }
    if dataset.get("regions_class_order") is not None:
        model["regions_class_order"] = dataset["regions_class_order"]
    write_atomically(made / "plan.json", json.dumps(plan.to_json(), indent=1).encode())
    # the order of labels counts where they are regions, so keys are not sorted
    write_atomically(made / "model.json", (json.dumps(model, indent=1) + "\n").encode())
    if (folder / "dataset_fingerprint.json").is_file():
        shutil.copyfile(folder / "dataset_fingerprint.json", made / "fingerprint.json")
    return plan, names, about.trainer, about.mirror_axes, tuple(_notes(plans, dataset, about))


@dataclass(frozen=True)
class _About:
    """What all folds of a model share, and the epoch, which need not be the same."""

    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]
    epoch: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"trainer {self.trainer}, configuration {self.configuration}, mirror axes {list(self.mirror_axes)}"


def _about(content: dict[str, Any], path: Path, folder: Path) -> _About:
    if "network_weights" not in content:
        raise InputError(
            f"{path}: holds no network_weights (but {', '.join(map(str, list(content)[:5]))}); give a checkpoint of nnU-Net v2"
        )
    parts = folder.resolve().name.split("__")
    init = content.get("init_args")
    said = init.get("configuration") if isinstance(init, Mapping) else None
    configuration = said if isinstance(said, str) else parts[2] if len(parts) == 3 else None
    if configuration is None:
        raise InputError(
            f"{path}: does not name its configuration, and the folder {folder.name} is not named TRAINER__PLANS__CONFIGURATION; "
            "give the folder the name that nnU-Net gave it"
        )
    axes = content.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(axes, (tuple, list)) or not all(type(axis) is int and 0 <= axis <= 2 for axis in axes):
        raise InputError(f"{path}: inference_allowed_mirroring_axes is {reprlib.repr(axes)}; a list of the axes 0, 1, 2 is needed")
    trainer, epoch = content.get("trainer_name"), content.get("current_epoch")
    return _About(
        trainer if isinstance(trainer, str) else parts[0], configuration, tuple(sorted(set(axes))), epoch if isinstance(epoch, int) else 0
    )


def _plan(plans: dict[str, Any], dataset: dict[str, Any], configuration: str, folder: Path) -> Plan:
    source = str(folder / "plans.json")
    plan = plan_of(plans, configuration, dataset, source)
    where = f"{source}, configuration {configuration!r}"
    table = plans["configurations"][configuration]
    while "architecture" not in table and table.get("inherits_from") is not None:
        table = plans["configurations"][table["inherits_from"]]
    kwargs = table["architecture"]["arch_kwargs"] if "architecture" in table else {}
    unknown = sorted(name for name, value in kwargs.items() if name not in ARCHITECTURE and value not in (None, False))
    if unknown:
        raise InputError(
            f"{where}: the network has the setting {unknown[0]} = {kwargs[unknown[0]]!r}, which is not built here; use nnU-Net"
        )
    reader = plans.get("image_reader_writer")
    if isinstance(reader, str) and reader.endswith("WithReorient") and reader not in TURNING_READERS:
        raise InputError(
            f"{source}: its images were turned on reading by {reader!r}, which is not nnU-Net's own; known are "
            f"{' and '.join(TURNING_READERS)}; use nnU-Net itself for this model"
        )
    rules = read_rules(dataset["labels"], dataset.get("regions_class_order"), folder / "dataset.json")
    if rules.n_heads != plan.n_classes:
        raise InputError(f"{folder / 'dataset.json'}: its labels need {rules.n_heads} outputs, the plan has {plan.n_classes}")
    check_intensities(plan, where)
    check_topology(plan)
    return plan


def _turning(plans: Mapping[str, Any]) -> str | bool:
    """`prepare.reorient` of a model: nnU-Net's predictor reads and writes by the class that its plans name."""
    reader = plans.get("image_reader_writer")
    return reader if isinstance(reader, str) and reader in TURNING_READERS else False


def _read_tables(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give nnU-Net's result folder, DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION")
    missing = [name for name in ("plans.json", "dataset.json") if not (folder / name).is_file()]
    if missing:
        near = sorted(str(path.parent) for path in [*folder.glob("*/plans.json"), *folder.parent.glob("plans.json")])
        hint = f"; did you mean {' or '.join(near[:5])}?" if near else "; give DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION"
        raise InputError(f"{folder} holds no {' and no '.join(missing)}, so it is no result folder of nnU-Net{hint}")
    plans = read_plans(folder / "plans.json")
    path = folder / "dataset.json"
    dataset = read_json(path, "correct it")
    channels = dataset.get("channel_names", dataset.get("modality")) if isinstance(dataset, dict) else None
    if not isinstance(dataset, dict) or not isinstance(dataset.get("labels"), dict) or not isinstance(channels, dict):
        raise InputError(f'{path}: needs "channel_names" and "labels"; take the dataset.json that the model was trained with')
    return plans, dataset


def _choose_folds(folder: Path, file: str, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The folds asked for, else all numbered ones that hold the file, else fold_all (nnU-Net's own choice leaves that one out)."""
    found = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{file}"))
    numbered = sorted((name for name in found if name.isdecimal()), key=int)
    shown = ", ".join(found) or "none"
    if asked is None:
        chosen = numbered or [name for name in found if name == "all"]
        if not chosen:
            others = sorted({path.name for path in folder.glob("fold_*/*.pth")})
            hint = f"; there are {', '.join(others)}" if others else ""
            raise InputError(f"{folder}: no fold holds {file}{hint}; finish the training, or choose --checkpoint best")
        return tuple(chosen)
    wanted = list(dict.fromkeys(str(name) for name in asked))
    missing = [name for name in wanted if name not in found]
    if missing or not wanted:
        raise InputError(f"{folder}: no {file} in fold {', '.join(missing)}; folds that have it: {shown}")
    return tuple(wanted)


def _notes(plans: Mapping[str, Any], dataset: Mapping[str, Any], about: _About) -> list[str]:
    notes = []
    reader = dataset.get("overwrite_image_reader_writer", plans.get("image_reader_writer"))
    if reader not in (None, "None", *PLAIN_READERS, *TURNING_READERS):
        notes.append(f"its images were read by {reader}; `ichbench predict` reads NIfTI alone, so convert them without changing voxels")
    if not about.trainer.startswith("nnUNetTrainer"):
        notes.append(f"the trainer {about.trainer} is not nnU-Net's own; if it changes more than training, masks may differ")
    return notes
