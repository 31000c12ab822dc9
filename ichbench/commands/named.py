"""Folders that the command line gives a name: NAME=DIR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ichbench.errors import InputError


def named_folders(texts: Sequence[str], what: str = "--predictions") -> dict[str, Path]:
    """name -> folder; InputError for text that is not NAME=DIR and for a name given twice. `what` names the option."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise InputError(f"{what} {text!r} is not understood; give NAME=DIR, such as {what} theirs=masks/")
        if name in folders:
            raise InputError(f"{what} {name!r} is given twice, for {folders[name]} and {folder}; every folder needs a name of its own")
        folders[name] = Path(folder)
    return folders
