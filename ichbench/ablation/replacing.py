"""`ichbench train --overwrite`: earlier results step aside until the new training begins, and come back if it never does.

OUT/.replaced/replaced.json   which results step aside, and the sha256 of the trainer's mark then; written before any of them moves
              scores.csv ...  the results, moved by renames

The trainer's mark decides. As long as it is the old one, the old weights are whole, and what lies aside belongs to them.
Everything here can be killed at any moment and done again. Weights, checkpoints and the mark itself are the trainer's.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ichbench.cases.files import seal, unseal, write_atomically
from ichbench.errors import InputError

ASIDE, NAMES, MARK = ".replaced", "replaced.json", "training.json"


@contextlib.contextmanager
def set_aside(out: Path, left: tuple[str, ...]) -> Iterator[None]:
    """Inside, the results `left` by an earlier training lie aside; they come back if the new training could not even begin.

    The caller holds the folder's lock, and has called `come_back`.
    """
    try:
        names = [name for name in left if (out / name).exists()]
        write_atomically(out / ASIDE / NAMES, seal({"mark": _digest(out / MARK), "names": names}))
        for name in names:
            (out / name).rename(out / ASIDE / name)
        yield
    finally:
        come_back(out, left)


def come_back(out: Path, left: tuple[str, ...]) -> None:
    """Bring back what lies aside, or remove it if the training that replaces it has begun. Does nothing where nothing lies aside.

    Raises InputError where something lies aside of which nothing is known.
    """
    aside = out / ASIDE
    for path in out.glob(f"{ASIDE}.*.old"):
        shutil.rmtree(path, ignore_errors=True)
    if not aside.is_dir():
        return
    there = [name for name in left if (aside / name).exists()]
    try:
        before = unseal(aside / NAMES)
    except (OSError, ValueError) as error:
        if there:
            raise InputError(
                f"{aside} holds results of an earlier training, but its {NAMES} is damaged or missing ({error}); nothing was changed: "
                f"move them back into {out} if its weights are the earlier ones, or remove that folder"
            ) from None
        # killed before anything moved
        shutil.rmtree(aside)
        return
    # a mark that is gone was removed by hand: the trainer only ever replaces it
    begun = (out / MARK).exists() and _digest(out / MARK) != before["mark"]
    if begun:
        # in one step, so that nothing left of it is ever taken for what lies aside; what cannot be removed stays under that name
        gone = aside.with_name(f"{ASIDE}.{secrets.token_hex(4)}.old")
        aside.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return
    for name in left:
        if name in there:
            _remove(out / name)
            (aside / name).rename(out / name)
        elif name not in before["names"]:
            # made by the training that never began; what has a name there is back already, or never moved
            _remove(out / name)
    (aside / NAMES).unlink()
    shutil.rmtree(aside)


def _digest(mark: Path) -> str | None:
    return hashlib.sha256(mark.read_bytes()).hexdigest() if mark.is_file() else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
