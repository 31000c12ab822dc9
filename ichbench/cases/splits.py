"""Which training cases validate in which fold: nnU-Net's five folds, patients kept together, `splits_final.json`.

Source of the numbers: nnU-Net v2 shuffles the sorted case ids with scikit-learn's KFold(5, shuffle, random_state 12345);
`nnunet-v2.md`, section 8, lists what it prints for 10 and 13 cases.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ichbench.cases.files import read_json, write_atomically
from ichbench.errors import InputError

#: One fold: {"train": ids, "val": ids}, both sorted.
Split = dict[str, list[str]]
NNUNET_SEED = 12345


def five_folds(
    ids: Sequence[str], groups: Mapping[str, str | None] | None = None, n_folds: int = 5, seed: int = NNUNET_SEED
) -> list[Split]:
    """Cross-validation folds equal to nnU-Net's; with `groups` (id -> patient) no patient is on both sides of a fold.

    A case whose group is missing, None or "" is its own patient. Raises `InputError` for fewer patients than folds.
    """
    units = _units(ids, groups)
    names = sorted(units)
    what = "cases" if len(names) == len(ids) else f"groups ({len(ids)} cases)"
    if n_folds < 2 or len(names) < n_folds:
        need = f"at least 2 folds, and {max(n_folds, 2)} for that many folds, are needed"
        todo = "add cases, write a splits_final.json of your own, or train on all of them (fold full)"
        raise InputError(f"{n_folds} folds of {len(names)} {what}: {need}; {todo}")
    # The legacy generator, because its stream is what nnU-Net's published folds were drawn from.
    order = np.arange(len(names))
    np.random.RandomState(seed).shuffle(order)
    folds = []
    for part in np.array_split(order, n_folds):
        folds.append(_split(units, {names[i] for i in part}))
    return folds


def random_fold(ids: Sequence[str], fold: int, groups: Mapping[str, str | None] | None = None, seed: int = NNUNET_SEED) -> Split:
    """nnU-Net's answer to a fold beyond the last: 80 % train, 20 % validation, drawn with seed 12345 + fold."""
    units = _units(ids, groups)
    names = sorted(units)
    n_train = int(len(names) * 0.8)
    if not 0 < n_train < len(names):
        raise InputError(f"an 80:20 split needs at least 2 cases (or groups), but there are {len(names)}; add cases")
    train = np.random.RandomState(seed + fold).choice(len(names), n_train, replace=False)
    return _split(units, {name for i, name in enumerate(names) if i not in set(train.tolist())})


def fold_of(splits: Sequence[Split], fold: int, ids: Sequence[str], groups: Mapping[str, str | None] | None = None) -> Split:
    """Fold number `fold` of `splits`, or nnU-Net's random 80:20 split where there is no such fold."""
    if fold < 0:
        raise InputError(f"fold is {fold}; it must be 0 or more")
    return splits[fold] if fold < len(splits) else random_fold(ids, fold, groups)


def read_splits(path: Path, ids: Iterable[str] | None = None) -> list[Split]:
    """Read a `splits_final.json` and check it (see `check_splits`); `ids` are the cohort's training cases."""
    splits = read_json(Path(path), "give nnU-Net's splits_final.json or leave it out")
    try:
        check_splits(splits, ids)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return [{"train": list(fold["train"]), "val": list(fold["val"])} for fold in splits]


def write_splits(path: Path, splits: Sequence[Split]) -> None:
    """Write `splits_final.json` as nnU-Net reads it. Refuses splits that `check_splits` refuses."""
    check_splits(splits)
    folds = [{"train": list(fold["train"]), "val": list(fold["val"])} for fold in splits]
    write_atomically(Path(path), (json.dumps(folds, indent=4) + "\n").encode())


def check_splits(splits: object, ids: Iterable[str] | None = None, groups: Mapping[str, str | None] | None = None) -> list[str]:
    """Raise `InputError` for splits that cannot be used; return notes on those that can but look unintended.

    Refused: another structure, an empty side, an id twice on a side or on both sides, an id that is not in `ids`.
    Noted: a case that is never validated or validated twice, one that is never used, a group on both sides of a fold.
    """
    if not isinstance(splits, (list, tuple)) or not splits:
        raise InputError('splits must be a list with one {"train": [ids], "val": [ids]} per fold')
    known = None if ids is None else set(ids)
    notes: list[str] = []
    validated: list[str] = []
    for number, fold in enumerate(splits):
        if not isinstance(fold, dict) or set(fold) != {"train", "val"}:
            raise InputError(f'fold {number} must have exactly the keys "train" and "val"')
        for side in ("train", "val"):
            _check_side(number, side, fold[side], known)
        both = sorted(set(fold["train"]) & set(fold["val"]))
        if both:
            raise InputError(f"fold {number}: {_some(both)} both in train and in val; a case may be on one side only")
        validated += fold["val"]
        if groups is not None:
            train, val = ({groups.get(case) or None for case in fold[side]} - {None} for side in ("train", "val"))
            leaked = sorted(str(group) for group in train & val)
            notes += [f"fold {number}: group {_some(leaked)} both in train and in val: its scores will look too good"] if leaked else []
    used = {case for fold in splits for side in ("train", "val") for case in fold[side]}
    never = sorted((known or used) & used - set(validated))
    unused = sorted((known or used) - used)
    twice = sorted({case for case in validated if validated.count(case) > 1})
    notes += [f"{_some(never)} never validated"] if never else []
    notes += [f"{_some(unused)} in no fold"] if unused else []
    notes += [f"{_some(twice)} validated more than once"] if twice else []
    return notes


def _check_side(number: int, side: str, members: object, known: set[str] | None) -> None:
    if not isinstance(members, (list, tuple)) or not members or not all(isinstance(case, str) for case in members):
        raise InputError(f'fold {number}: "{side}" must be a list of at least one case id')
    if len(set(members)) < len(members):
        raise InputError(f'fold {number}: "{side}" names {_some(sorted({c for c in members if members.count(c) > 1}))} twice')
    unknown = sorted(set(members) - known) if known is not None else []
    if unknown:
        raise InputError(f'fold {number}: "{side}" names {_some(unknown)}, not among the {len(known or ())} training cases of the cohort')


def _units(ids: Sequence[str], groups: Mapping[str, str | None] | None) -> dict[str, list[str]]:
    """Patients (or, without groups, cases) and the cases of each."""
    if len(set(ids)) < len(ids):
        raise InputError(f"case ids must be different, but {_some(sorted({i for i in ids if list(ids).count(i) > 1}))} came twice")
    units: dict[str, list[str]] = {}
    named = {name for name in (groups or {}).values() if name}
    for case in sorted(ids):
        name = (groups or {}).get(case) or None
        # A lone case may bear the name of somebody's group; it must not join it.
        units.setdefault(name if name else f"{case}\0" if case in named else case, []).append(case)
    return units


def _split(units: Mapping[str, list[str]], val_names: set[str]) -> Split:
    val = sorted(case for name in val_names for case in units[name])
    train = sorted(case for name, cases in units.items() if name not in val_names for case in cases)
    return {"train": train, "val": val}


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
