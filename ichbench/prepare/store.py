"""Prepared cases on disk: one .npy memory map per array, its sha256, and the geometry as JSON.

    FOLDER/<case id>/image.npy          float32 (c, z, y, x)
                     labels.npy         int16 (z, y, x), training cases only
                     foreground_<L>.npy int32 (n, 3) positions (z, y, x) of label L; region_<L>_<M>.npy of a region
                     case.json          id, geometry, notes, sha256 of every file

A case appears whole or not at all: it is written beside its place and renamed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.files import read_table
from ichbench.errors import InputError
from ichbench.prepare.geometry import Geometry
from ichbench.prepare.locations import Location
from ichbench.prepare.pipeline import Prepared

#: changes when the files above change their meaning
FORMAT = 1
CASE_FILE = "case.json"
_FOREGROUND = re.compile(r"(foreground|region)_(-?\d+(?:_\d+)*)\.npy")


def write_prepared(folder: Path, prepared: Prepared) -> Path:
    """Write one case into `folder`, replacing an older version of it; returns the case's folder."""
    target = _place(folder, prepared.id)
    folder.mkdir(parents=True, exist_ok=True)
    # dots keep an unfinished case out of `list_prepared`
    fresh = Path(tempfile.mkdtemp(prefix=f".{prepared.id}.", dir=folder))
    try:
        arrays: dict[str, NDArray[Any]] = {"image.npy": prepared.image_czyx.astype(np.float32, copy=False)}
        if prepared.labels_zyx is not None:
            arrays["labels.npy"] = prepared.labels_zyx.astype(np.int16, copy=False)
        for location, positions in prepared.foreground.items():
            arrays[_location_file(location)] = positions.astype(np.int32, copy=False)
        digests = {name: _write_array(fresh / name, array) for name, array in arrays.items()}
        table = {
            "format": FORMAT,
            "id": prepared.id,
            "geometry": prepared.geometry.to_json(),
            "notes": list(prepared.notes),
            "sha256": digests,
        }
        with (fresh / CASE_FILE).open("w", encoding="utf-8", newline="\n") as file:
            json.dump(table, file, indent=1, sort_keys=True, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        fresh.chmod(0o755)
        if target.exists():
            # a folder cannot be replaced in one step; the old one steps aside first
            old = Path(tempfile.mkdtemp(prefix=f".{prepared.id}.", dir=folder))
            target.rename(old / "old")
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
    return target


def read_prepared(folder: Path, case_id: str, mmap: bool = True, verify: bool = False) -> Prepared:
    """Read one case. `mmap`: arrays are read-only memory maps. `verify`: compare every file with its sha256 first."""
    place = _place(folder, case_id)
    table = _case_table(place, folder)
    files = {name: place / name for name in table["sha256"]}
    for name, path in files.items():
        if not path.is_file():
            raise InputError(f"{path} is missing; remove {place} and prepare the case again")
        if verify and _sha256(path) != table["sha256"][name]:
            raise InputError(f"{path} has changed since it was written; remove {place} and prepare the case again")
    mode: Literal["r"] | None = "r" if mmap else None
    arrays = {name: _read_array(path, mode) for name, path in files.items()}
    foreground = {_location(match[1], match[2]): arrays[name] for name in arrays if (match := _FOREGROUND.fullmatch(name))}
    return Prepared(
        table["id"],
        arrays["image.npy"],
        arrays.get("labels.npy"),
        Geometry.from_json(table["geometry"]),
        tuple(table["notes"]),
        dict(sorted(foreground.items(), key=lambda item: (isinstance(item[0], tuple), item[0]))),
    )


def prepared_digest(folder: Path, case_id: str) -> str:
    """One digest for all arrays of a case, from those in its `case.json`; nothing is read but that file."""
    table = _case_table(_place(folder, case_id), folder)
    return hashlib.sha256(json.dumps(table["sha256"], sort_keys=True).encode()).hexdigest()


def list_prepared(folder: Path) -> tuple[str, ...]:
    """Ids of the cases in a folder, sorted; unfinished ones are not listed."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} with prepared cases; run the study again")
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{CASE_FILE}") if not path.parent.name.startswith(".")))


def _location_file(location: Location) -> str:
    return f"region_{'_'.join(map(str, location))}.npy" if isinstance(location, tuple) else f"foreground_{location}.npy"


def _location(kind: str, labels: str) -> Location:
    return tuple(int(label) for label in labels.split("_")) if kind == "region" else int(labels)


def _place(folder: Path, case_id: str) -> Path:
    if not case_id or case_id.startswith(".") or Path(case_id).name != case_id or "\\" in case_id:
        raise InputError(f"{case_id!r} cannot name a folder; case ids must not start with a dot or hold a slash")
    return folder / case_id


def _case_table(place: Path, folder: Path) -> Mapping[str, Any]:
    path = place / CASE_FILE
    if not path.is_file():
        known = list_prepared(folder)
        raise InputError(f"{folder} holds no prepared case {place.name!r}; it holds {len(known)}: {', '.join(known[:5]) or 'none'}")
    again = f"remove {place} and prepare the case again"
    table = read_table(path, again)
    if table.get("format") != FORMAT:
        raise InputError(f"{path} has format {table.get('format')}, not {FORMAT}; {again}")
    keys = ("id", "geometry", "notes", "sha256")
    if missing := [key for key in keys if key not in table]:
        raise InputError(f"{path} lacks {', '.join(missing)}; {again}")
    return {key: table[key] for key in keys}


def _write_array(path: Path, array: NDArray[Any]) -> str:
    """Write a .npy file and return its sha256, without reading it again."""
    array = np.ascontiguousarray(array)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    digest = hashlib.sha256(head.getvalue())
    digest.update(array.reshape(-1).view(np.uint8).data)
    with path.open("wb") as file:
        file.write(head.getvalue())
        array.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _read_array(path: Path, mode: Literal["r"] | None) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove {path.parent} and prepare the case again") from None
    return array


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
