"""Which model, or which two models together, by the Dice of their cross-validated predictions (nnU-Net's rule, facts section 10).

Every model is scored by its masks, every pair by the mean of its two models' probabilities. The highest mean over labels
wins, the first on a tie: models come before pairs, so a pair must be strictly better.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.files import read_table, write_atomically
from ichbench.cases.labels import LabelRules
from ichbench.errors import InputError
from ichbench.inference.postprocess import (
    Labels,
    Postprocessing,
    dice_counts,
    find_postprocessing,
    foreground_mean,
    mean_dice,
    parse_postprocessing,
)

FORMAT = "ichbench selection 1"


@dataclass(frozen=True)
class Candidate:
    """One model: `mask(case)` and, for pairs, `probabilities(case)` (heads, z, y, x), both on the reference's grid."""

    name: str
    mask: Callable[[str], Labels]
    probabilities: Callable[[str], NDArray[np.floating]] | None = None


@dataclass(frozen=True)
class Selection:
    """The winner's members (one or two names) and every combination's mean Dice, in the order in which they were tried.

    postprocessing  found on the winner's masks; None: it was not looked for
    models          name -> model folder, of those that are known
    """

    members: tuple[str, ...]
    scores: Mapping[tuple[str, ...], float]
    postprocessing: Postprocessing | None = None
    models: Mapping[str, Path] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON; a model folder that is given relative is written relative to the file's own place."""
        tried = [{"members": list(names), "dice": None if math.isnan(dice) else dice} for names, dice in self.scores.items()]
        table: dict[str, Any] = {"format": FORMAT, "members": list(self.members), "tried": tried}
        table |= {"models": {name: _seen_from(path, folder) for name, folder in self.models.items()}}
        table |= {"postprocessing": None if self.postprocessing is None else self.postprocessing.to_json()}
        write_atomically(path, (json.dumps(table, indent=1) + "\n").encode())


def read_selection(path: Path) -> Selection:
    """Read what `save` wrote; InputError for anything else."""
    table = read_table(path, "give what `ichbench select` wrote")
    try:
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}")
        scores = {tuple(item["members"]): math.nan if item["dice"] is None else float(item["dice"]) for item in table["tried"]}
        members, rule = table["members"], table.get("postprocessing")
        if not isinstance(members, list) or tuple(members) not in scores:
            raise ValueError(f"members {members!r} are none of those that were tried")
        if not 1 <= len(set(members)) == len(members) <= 2 or not all(isinstance(name, str) for name in members):
            raise ValueError(f"members {members!r} are not one or two names")
        models = {name: path.resolve().parent / folder for name, folder in table.get("models", {}).items()}
        return Selection(tuple(members), scores, None if rule is None else parse_postprocessing(rule, path), models)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is not a selection of `ichbench select` ({error})") from None


def _seen_from(path: Path, folder: Path) -> str:
    if folder.is_absolute():
        return str(folder)
    return Path(os.path.relpath(folder.resolve(), path.parent.resolve())).as_posix()


def find_best(
    candidates: Sequence[Candidate],
    cases: Sequence[str],
    reference: Callable[[str], Labels],
    rules: LabelRules,
    pairs: bool = True,
    compatibility: str = "ichbench",
    postprocess: bool = False,
) -> Selection:
    """Score every candidate and, with `pairs`, every two of them on the same cases; with `postprocess` also find the winner's rule."""
    # imported here: what only finds a rule for masks needs no torch
    from ichbench.inference.ensemble import mean_probabilities

    names = [candidate.name for candidate in candidates]
    if not candidates or not cases or len(set(names)) != len(names):
        raise InputError(f"a selection needs at least one case and models with names of their own, but has {len(cases)} cases and {names}")
    lacking = [candidate.name for candidate in candidates if candidate.probabilities is None]
    if pairs and lacking and len(candidates) > 1:
        raise InputError(
            f"pairs of models are averaged by their probabilities, but {' and '.join(lacking)} {'lack' if lacking[1:] else 'lacks'} "
            "<case>.npz for some case or all; write them with ichbench predict --probabilities, or leave pairs out with --no-pairs"
        )

    def combined(case: str, first: Candidate, second: Candidate) -> Labels:
        # both have probabilities: checked above
        parts = [candidate.probabilities(case) for candidate in (first, second) if candidate.probabilities is not None]
        return rules.from_probabilities(mean_probabilities(parts))

    def score(mask: Callable[[str], Labels]) -> float:
        counts = [dice_counts(reference(case), mask(case), rules.targets, rules.ignore) for case in sorted(cases)]
        return foreground_mean(mean_dice(counts), compatibility)

    masks: dict[tuple[str, ...], Callable[[str], Labels]] = {(candidate.name,): candidate.mask for candidate in candidates}
    for first, second in combinations(candidates, 2) if pairs else ():
        masks[first.name, second.name] = partial(combined, first=first, second=second)
    scores = {names: score(mask) for names, mask in masks.items()}
    known = {names: dice for names, dice in scores.items() if not math.isnan(dice)}
    if not known:
        raise InputError("no model can be chosen: no case shows a label, in any reference or prediction")
    # max keeps the first of equals
    best = max(known, key=lambda names: known[names])
    if not postprocess:
        return Selection(best, scores)
    rule = find_postprocessing(cases, lambda case: (reference(case), masks[best](case)), rules.targets, rules.ignore, compatibility)
    return Selection(best, scores, rule)
