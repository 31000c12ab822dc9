"""A cohort's dataset.json, fingerprint and plans, as they lie in a folder of nnU-Net's `nnUNet_preprocessed`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ichbench.cases.cohort import Cohort
from ichbench.cases.files import read_json, write_atomically
from ichbench.cases.folders import ENDINGS
from ichbench.cases.images import read_grid
from ichbench.cases.labels import declared
from ichbench.cases.nifti import TURNING_READERS
from ichbench.errors import InputError
from ichbench.recipe import PrepareRecipe

DATASET, SPLITS = "dataset.json", "splits_final.json"
READER_KEY = "overwrite_image_reader_writer"
#: file ending -> nnU-Net's class that reads it
READERS = {".nii.gz": "SimpleITKIO", ".nii": "NibabelIO"}


def dataset_table(cohort: Cohort) -> dict[str, Any]:
    """The content of nnU-Net's dataset.json: the cohort's own where it has one, else what it declares, in nnU-Net's words."""
    own = cohort.root / DATASET
    # a cohort.csv was read for what it says itself, whatever else lies beside it
    if own.is_file() and not (cohort.source is not None and cohort.source.is_file()):
        table: dict[str, Any] = read_json(own, "correct it")
        return table
    return {
        "channel_names": {str(index): name for index, name in enumerate(cohort.channel_names)},
        **declared(cohort.rules),
        "numTraining": len(cohort.train_ids),
        "file_ending": _ending(cohort),
    }


def side_files(cohort: Cohort) -> dict[str, str]:
    """What nnU-Net's planning copies beside its plans: dataset.json, and the cohort's own splits where it has them."""
    own = cohort.root / SPLITS
    splits = {SPLITS: own.read_text(encoding="utf-8")} if own.is_file() else {}
    reader = {READER_KEY: cohort.reorient} if isinstance(cohort.reorient, str) else {}
    return {DATASET: json.dumps(dataset_table(cohort) | reader, indent=4)} | splits


def reader_of(cohort: Cohort) -> str:
    """nnU-Net's class for the cohort's image files: by their ending, unless its dataset.json names one, or it is read as one that turns.

    Raises `InputError` for a class that would read other voxels than are read here (it turns axes otherwise, or is not known).
    """
    named = str(dataset_table(cohort).get(READER_KEY, "None"))
    if named not in ("None", *READERS.values(), *TURNING_READERS):
        raise InputError(
            f"{cohort.root / DATASET}: {READER_KEY} is {named!r}; images are read here as nnU-Net's "
            f"{', '.join(READERS.values())}, {' and '.join(TURNING_READERS)} read them, no other way: name one of these or remove the key"
        )
    turning = cohort.reorient if isinstance(cohort.reorient, str) else "None"
    if turning != named and (named in TURNING_READERS or "None" not in (turning, named)):
        said = repr(cohort.reorient).lower() if turning == "None" else repr(turning)
        remedy = f"set prepare.reorient = {named!r}" if named in TURNING_READERS else f"name {turning!r} there, or leave reorient out"
        raise InputError(
            f"{cohort.root / DATASET}: {READER_KEY} is {named!r}, but prepare.reorient is {said}, so cases would lie otherwise than in "
            f"nnU-Net: {remedy}"
        )
    if turning != "None":
        return turning
    return READERS[_ending(cohort)] if named == "None" else named


def turning_reader(cohort: Cohort) -> str | None:
    """The class that the cohort's dataset.json names, if that one turns axes."""
    named = dataset_table(cohort).get(READER_KEY)
    return named if isinstance(named, str) and named in TURNING_READERS else None


def check_expressible(cohort: Cohort, prepare: PrepareRecipe) -> None:
    """Raise `InputError` where nnU-Net, given these files, would take something else from the same images."""
    plain = PrepareRecipe(compatibility=prepare.compatibility)
    if isinstance(prepare.reorient, str):
        plain = PrepareRecipe(compatibility=prepare.compatibility, reorient=prepare.reorient)
    changed = [name for name in PrepareRecipe.model_fields if getattr(prepare, name) != getattr(plain, name)]
    if changed:
        raise InputError(
            f"nnU-Net's files cannot say prepare.{changed[0]}: it would not apply it; leave out --out, or that key of the recipe"
        )
    reader_of(cohort)
    mapped = {old: new for old, new in (cohort.label_map or {}).items() if old != new}
    if mapped:
        raise InputError(
            f"cohort {cohort.name}: its label_map {mapped} is not known to nnU-Net, which would read the masks as they are; "
            "leave out --out, or write the masks with the new values and remove label_map"
        )
    if prepare.compatibility == "nnunet" or isinstance(prepare.reorient, str):
        return
    for case_id in cohort.train_ids:
        path = cohort.record(case_id).images[0]
        if read_grid(path).file_axes != (2, 1, 0):
            raise InputError(
                f"{path}: its slices do not lie along the file's last axis, which nnU-Net would take for them; "
                "add --compatibility nnunet to take the axes as nnU-Net does"
            )


def check_channel_order(cohort: Cohort) -> None:
    """Raise `InputError` where nnU-Net would normalise a channel by another's name: it goes by place in the list, not by number."""
    table = dataset_table(cohort)
    names = table.get("channel_names", table.get("modality"))
    if isinstance(names, dict) and list(names) != [str(index) for index in range(len(names))]:
        raise InputError(
            f"{cohort.root / DATASET}: channel_names are listed in the order {', '.join(names)}; nnU-Net normalises the files _0000, "
            '_0001, ... by the first, second, ... of them, whatever its number; list them from "0" on'
        )


def write_files(folder: Path, texts: Mapping[str, str], overwrite: bool = False) -> list[tuple[Path, str]]:
    """Write the texts under their names; returns (path, "written" or "unchanged") for each.

    A file that is there and says something else stops everything before anything is written, unless `overwrite`.
    """
    paths = {folder / name: text for name, text in texts.items()}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder")
    different = [path for path, text in paths.items() if path.exists() and path.read_bytes() != text.encode()]
    if different and not overwrite:
        names = ", ".join(path.name for path in different)
        raise InputError(f"{folder}: {names} is there already and says something else; choose another folder or add --overwrite")
    done = []
    for path, text in paths.items():
        same = path.exists() and path not in different
        if not same:
            write_atomically(path, text.encode())
        done.append((path, "unchanged" if same else "written"))
    return done


def with_custom_configurations(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """As nnU-Net does when it plans again: configurations that somebody added to an existing plans file stay in it."""
    try:
        old = read_json(path, "it is not a plans file: choose another folder or remove it") if path.is_file() else {}
        extra = {name: value for name, value in old.get("configurations", {}).items() if name not in table["configurations"]}
    except AttributeError as error:
        raise InputError(f"{path}: is there already and is not a plans file ({error}); choose another folder or remove it") from None
    return table | {"configurations": table["configurations"] | extra}


def _ending(cohort: Cohort) -> str:
    name = cohort.records[0].images[0].name
    return next(ending for ending in ENDINGS if name.endswith(ending))
