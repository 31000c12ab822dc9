"""nnU-Net's checkpoints (`.pth`, a zip that holds a pickle), read without running anything that is written in them.

A pickle is a program. torch's restricted reader (`weights_only=True`) runs only the part of it that builds tensors and
plain containers. nnU-Net's checkpoints need one thing more, numpy's scalars (losses, the best Dice): the two names that
a pickled scalar asks for are answered by the stand-ins below, so that numpy's own unpickling is not reached either.
There is no fallback: what is refused stays closed.
"""

from __future__ import annotations

import re
import stat
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ichbench.errors import InputError

#: nnU-Net's largest checkpoints, with the state of their optimizer, are below 2 GiB
MOST_BYTES = 16 * 2**30
#: numpy's name of a plain number type -> how `struct` reads it
SCALARS = {"b1": "?", "f2": "e", "f4": "f", "f8": "d"}
SCALARS |= {"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}


class _Type:
    """Stands in for `numpy.dtype` of one plain number; anything else is refused."""

    def __init__(self, name: object = None, *_: object) -> None:
        if name not in SCALARS:
            raise ValueError(f"a numpy type {name!r}; only plain numbers are read")
        self.code, self.order = SCALARS[str(name)], "<"

    def __setstate__(self, state: object) -> None:
        # (version, byte order, ...): "|" is a single byte's
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = str(state[1])


def _scalar(kind: object = None, data: object = None, *_: object) -> float | int | bool:
    """Stands in for numpy's function that makes a scalar of its bytes."""
    if not isinstance(kind, _Type) or not isinstance(data, bytes):
        raise ValueError("a numpy object that is not a plain number")
    return struct.unpack(kind.order + kind.code, data)[0]  # type: ignore[no-any-return]


#: the only names that are known beyond those of torch's restricted reader
STAND_INS = [(_Type, "numpy.dtype"), (_scalar, "numpy._core.multiarray.scalar"), (_scalar, "numpy.core.multiarray.scalar")]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint as plain containers, numbers and tensors on the CPU.

    Raises InputError for a file that is missing, cut off, not a checkpoint, or asks for anything beyond tensors, plain
    containers and numbers. Nothing in the file is executed, whatever it holds.
    """
    size = _size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch stores its records as they are; a small file that unpacks to terabytes would have to compress them
            packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            # or to name the same bytes again and again
            claimed = sum(max(entry.file_size, entry.compress_size) for entry in entries)
            # torch itself does not look at the check sums: a flipped bit would be a wrong weight without a word
            broken = archive.testzip() if packed is None and claimed <= size else None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror or error}; check the path") from None
    except Exception as error:
        raise InputError(
            f"{path} is no checkpoint of nnU-Net v2, or is cut off ({error}): those are zip archives. Nothing in it was "
            "executed, a bare pickle is never opened; copy the file again, or write it again with nnU-Net v2"
        ) from None
    if packed is not None:
        raise InputError(f"{path}: the entry {packed} is compressed, which torch.save never does; the file was changed: get the original")
    if claimed > size:
        raise InputError(f"{path}: its entries claim {claimed:,} bytes, but the file has {size:,}; it was changed: get the original")
    if broken is not None:
        raise InputError(f"{path} is damaged: the check sum of its entry {broken} is wrong; copy the file again")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise InputError(f"{path}: there is not enough memory to read this checkpoint") from None
    except Exception as error:  # whatever a damaged or hostile file makes torch's reader raise
        if "can't allocate memory" in str(error):
            raise InputError(f"{path}: there is not enough memory to read this checkpoint") from None
        raise InputError(_refusal(path, error)) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint of nnU-Net; give a checkpoint_final.pth")
    return content


def _size(path: Path) -> int:
    """Bytes of the file. A pipe would be waited for, a device read for ever: neither is opened."""
    try:
        about = path.stat()
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror or error}; check the path") from None
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"cannot read the checkpoint {path}: it is no file (but a folder, pipe or device); check the path")
    if about.st_size > MOST_BYTES:
        raise InputError(f"{path}: has {about.st_size:,} bytes, but at most {MOST_BYTES:,} are read; give a checkpoint of nnU-Net v2")
    return about.st_size


def _refusal(path: Path, error: Exception) -> str:
    """One sentence for the user: what the file asked for, or that it is damaged."""
    said = str(error)
    asked = re.search(r"(?:GLOBAL|function|get) (<?\w[\w.]*\w)", said)
    if type(error).__name__ == "UnpicklingError" or (isinstance(error, ValueError) and "numpy" in said):
        if asked:
            what = f"asks for {asked[1]}"
        else:
            what = f"holds {said}" if "numpy" in said else "holds what torch's restricted reader refuses"
        return (
            f"{path} is refused, and nothing in it was executed: it {what}. A checkpoint of nnU-Net needs tensors, plain containers "
            "and numbers, anything else may be an attack. If you trust its source, load it with nnU-Net itself and save "
            "network_weights, init_args, trainer_name and inference_allowed_mirroring_axes alone"
        )
    return f"{path} is damaged or no checkpoint ({said.splitlines()[0][:200] if said else type(error).__name__}); copy the file again"
