"""Probabilities of a case on disk: `<case>.npz` beside its mask, as nnUNetv2_predict --save_probabilities writes it, and what they mean.

probabilities   (heads, k, j, i), float, in the file's own axis order, slowest axis first
labels          ours: JSON of `labels` and `regions_class_order` as in a `dataset.json`; nnU-Net passes it over

In a folder that nnUNetv2_predict wrote a `dataset.json` says the same.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Grid
from ichbench.cases.files import write_atomically
from ichbench.cases.folders import read_declaration
from ichbench.cases.labels import LabelRules, declared, read_rules
from ichbench.errors import InputError
from ichbench.inference.inputs import stem_of
from ichbench.scoring.layouts import SUFFIXES

#: the heads of plain labels sum to 1 within this, also in half precision
SUM_TOLERANCE = 1e-3
#: what reading a damaged or foreign archive may raise
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error, zipfile.BadZipFile)


def archive_of(mask: Path) -> Path:
    """Where the probabilities of a mask lie."""
    return mask.with_name(f"{stem_of(mask)}.npz")


def taken_by(mask: Path) -> tuple[Path, ...]:
    """What lies there of a mask's case already: masks, with the other suffix too, then its archive. Folders are none of it.

    Remove them from the end, so that no archive is ever there without its mask.
    """
    named = (mask, *(mask.with_name(stem_of(mask) + suffix) for suffix in SUFFIXES), archive_of(mask))
    return tuple(path for path in dict.fromkeys(named) if (path.exists() or path.is_symlink()) and not path.is_dir())


def write_probabilities(path: Path, table_czyx: NDArray[np.float32], grid: Grid, rules: LabelRules | None = None) -> None:
    """Write probabilities (heads, z, y, x) on `grid`, in its file's axis order, with what the heads mean."""
    said = {} if rules is None else {"labels": np.array(json.dumps(declared(rules)))}
    packed = io.BytesIO()
    np.savez_compressed(packed, probabilities=in_file_order(table_czyx, grid), **said)  # type: ignore[arg-type]
    write_atomically(path, packed.getvalue())


def in_file_order(table_czyx: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Probabilities (heads, z, y, x) on `grid` as a view (heads, k, j, i), slowest axis of its file first."""
    flips = tuple(slice(None, None, -1) if flip else slice(None) for flip in grid.file_flips)
    to_file = [1 + grid.file_axes.index(axis) for axis in (2, 1, 0)]
    return np.transpose(table_czyx[(slice(None), *flips)], (0, *to_file))


def archived_rules(path: Path) -> LabelRules | None:
    """What the heads of an archive mean, by its own word or by a `dataset.json` beside it; None where neither says it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            table = json.loads(str(archive["labels"])) if "labels" in archive else None
        found = None if table is None else (table["labels"], table.get("regions_class_order"))
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if found is not None:
        return read_rules(*found, path)
    beside = path.with_name("dataset.json")
    return read_declaration(beside)[0] if beside.is_file() else None


def read_probabilities(path: Path, rules: LabelRules | None = None) -> NDArray[np.floating]:
    """The array of an archive, checked; None: plain labels, one per head.

    InputError for a damaged file, for heads that mean something else than `rules`, and for plain labels whose probabilities do
    not sum to 1 in some voxel: those are regions, whose highest head says nothing.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            table: NDArray[np.floating] = archive["probabilities"]
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if table.ndim != 4 or table.dtype.kind != "f" or not np.isfinite(table).all():
        raise InputError(
            f"{path}: 'probabilities' has shape {table.shape} and type {table.dtype}; needed are finite floats (heads, z, y, x)"
        )
    said = archived_rules(path)
    if rules is not None and said is not None and not same_heads(rules, said):
        raise InputError(
            f"{path}: its heads are {_words(said)}, but asked for are {_words(rules)}; give --dataset-json with the model's labels, "
            "or the right folder"
        )
    if rules is None or not rules.has_regions:
        off = float(np.abs(table.sum(0, dtype=np.float32) - 1).max())
        if off > SUM_TOLERANCE:
            raise InputError(
                f"{path}: its {len(table)} heads are taken for plain labels, but their sum is off 1 by up to {off:.3g}, as of regions; "
                "declare the model's labels with --dataset-json"
            )
    return table


def same_heads(one: LabelRules, other: LabelRules) -> bool:
    """Do the outputs of two models mean the same? Names and the ignore label do not matter."""
    return (one.targets, one.regions_class_order) == (other.targets, other.regions_class_order)


def _words(rules: LabelRules) -> str:
    if not rules.has_regions:
        return f"the labels {list(rules.labels)}"
    return f"the regions {list(rules.targets)} painted as {list(rules.regions_class_order)}"


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not an archive with the array 'probabilities' ({error})")
