"""Which files are the images of which case, and a case as a model wants it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import read_image, reorient
from ichbench.errors import InputError
from ichbench.recipe import PrepareRecipe
from ichbench.scoring.layouts import SUFFIXES


def find_images(image: Path, channel_names: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Case -> its files in channel order, for an image, one channel of an image, or a folder.

    nnU-Net's names, `<case>_<four digits>`, are needed for several channels; with one channel any name is a case.
    """
    if not image.is_dir():
        if len(channel_names) == 1:
            return {_case_id(image): (image,)}
        match = re.fullmatch(r"(.+)_(\d{4})", stem_of(image))
        if match is None:
            raise InputError(f"{image}: this model takes {_channels(channel_names)}, so the name must be CASE_0000.nii.gz and so on")
        siblings = [image.with_name(f"{match[1]}_{index:04d}{suffix_of(image)}") for index in range(len(channel_names))]
        lacking = [path.name for path in siblings if not path.is_file()]
        if lacking:
            raise InputError(f"{image}: this model takes {_channels(channel_names)}, but beside it there is no {', '.join(lacking)}")
        return {match[1]: tuple(siblings)}
    paths = sorted(path for path in image.iterdir() if path.name.endswith(SUFFIXES) and not path.name.startswith("."))
    if not paths:
        raise InputError(f"{image} holds no image ({' or '.join(SUFFIXES)})")
    if len(channel_names) == 1:
        return _one_file_each(image, paths)
    found: dict[str, list[Path]] = {}
    for path in paths:
        match = re.fullmatch(r"(.+)_\d{4}", stem_of(path))
        if match is None:
            raise InputError(f"{path}: this model takes {_channels(channel_names)}, so the name must be CASE_0000.nii.gz and so on")
        found.setdefault(match[1], []).append(path)
    for case_id, files in found.items():
        if [stem_of(path) for path in files] != [f"{case_id}_{index:04d}" for index in range(len(channel_names))]:
            raise InputError(
                f"{image}: case {case_id!r} has the files {[path.name for path in files]}, but the model takes {_channels(channel_names)}; "
                "one file per channel is needed, numbered from 0000"
            )
    return {case_id: tuple(files) for case_id, files in found.items()}


def _one_file_each(folder: Path, paths: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    cases: dict[str, tuple[Path, ...]] = {}
    stems = {stem_of(path) for path in paths}
    for path in paths:
        case_id = _case_id(path)
        if case_id in cases:
            raise InputError(f"{folder}: {cases[case_id][0].name} and {path.name} are the same case {case_id!r}; keep one")
        if f"{case_id}_0000" in stems and f"{case_id}_0001" in stems:
            raise InputError(
                f"{folder}: case {case_id!r} has several channels, but the model takes one; keep the right one, or rename the cases"
            )
        cases[case_id] = (path,)
    return cases


def read_case(case_id: str, files: Sequence[Path], recipe: PrepareRecipe, axes_zyx: str | None) -> tuple[Case, tuple[str, ...]]:
    """The case as a model wants it: channels stacked, axes turned to those of its training cases (`axes_zyx`, or what
    `recipe.reorient` turns every case to); and notes."""
    keep = recipe.compatibility == "nnunet"
    notes: list[str] = []
    by_reader = recipe.reorient if isinstance(recipe.reorient, str) else None
    first, grid = _read(files[0], keep, by_reader)
    volumes = [first]
    for path in files[1:]:
        volume, other = _read(path, keep, by_reader)
        if other.shape_zyx != grid.shape_zyx or not np.allclose(other.spacing_zyx_mm, grid.spacing_zyx_mm, rtol=1e-4):
            raise InputError(
                f"{files[0]} and {path.name} differ: shape {grid.shape_zyx} and {other.shape_zyx}, spacing {grid.spacing_zyx_mm} and "
                f"{other.spacing_zyx_mm} mm (z, y, x); all channels of a case must lie on the same voxels"
            )
        if not other.same_place(grid):
            if not keep:
                raise InputError(f"{files[0]} and {path.name} lie in different places of the world; resample one onto the other's grid")
            # as in nnU-Net, which compares shape and spacing alone
            notes.append(f"{path.name} lies elsewhere than {files[0].name}; the voxels were taken as they lie")
        volumes.append(volume)
    if recipe.reorient is True and not keep:
        volumes, grid = reorient(volumes, grid, files[0])
    elif not (keep or by_reader) and axes_zyx is not None and grid.axis_codes_zyx != axes_zyx:
        # the network has only seen heads that lie the way its cohort did; the grid remembers how to write the mask back
        volumes, grid = reorient(volumes, grid, files[0])
        if grid.axis_codes_zyx != axes_zyx:
            raise InputError(
                f"{files[0]}: its axes (z, y, x) can be turned to {grid.axis_codes_zyx}, but the model was trained on {axes_zyx}; "
                "store the image in the model's orientation"
            )
    return Case(case_id, np.stack(volumes), None, grid), tuple(notes)


def _read(path: Path, keep_file_order: bool, reader: str | None) -> tuple[NDArray[np.float32], Grid]:
    """One channel; a reader of nnU-Net's turns each file by its own affine."""
    volume, grid = read_image(path, keep_file_order)
    if reader is None:
        return volume, grid
    (turned,), grid = reorient([volume], grid, path, reader)
    return turned, grid


def _channels(channel_names: Sequence[str]) -> str:
    return f"{len(channel_names)} channel{'s' if channel_names[1:] else ''} ({', '.join(channel_names)})"


def suffix_of(image: Path) -> str:
    return next((suffix for suffix in SUFFIXES if image.name.endswith(suffix)), SUFFIXES[0])


def stem_of(image: Path) -> str:
    """The name without its suffix."""
    return image.name.removesuffix(suffix_of(image))


def _case_id(image: Path) -> str:
    """`case_0000.nii.gz` -> `case`: nnU-Net's images carry a channel number, its masks do not."""
    return stem_of(image).removesuffix("_0000")
