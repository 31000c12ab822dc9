"""Compares two sets of facts: what is committed, and what comes out now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from ichbench.board.summary import listed
from ichbench.errors import InputError

if TYPE_CHECKING:
    from ichbench.scoring.score import Score

Kind = Literal["score", "missing row", "extra row", "digest", "missing digest", "extra digest", "text"]
#: What identifies a score row: arm, fold, seed, case, metric.
RowKey = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Difference:
    """One fact that is not what it was. `committed` and `fresh` are spelled out exactly; None where there is nothing."""

    kind: Kind
    where: str
    committed: str | None
    fresh: str | None
    text: str


def compare_scores(committed: Iterable[Score], fresh: Iterable[Score], tolerances: Mapping[str, float] | None = None) -> list[Difference]:
    """Compare two sets of score rows, in any order; missing and extra rows are differences.

    Values must be equal bit for bit (nan equals nan, 0.0 is not -0.0), unless `tolerances` has the row's metric, or else its
    bare name: then |fresh - committed| may be at most that, and infinite or undefined values must still be the same.
    InputError: no committed rows (nothing would be checked), duplicate rows, a tolerance that is not a number >= 0.
    """
    old, new = _by_key(committed, "committed"), _by_key(fresh, "fresh")
    if not old:
        raise InputError("the committed scores have no rows, so nothing can be checked. Point the check at a board with a scores.csv")
    allowed = dict(tolerances or {})
    for metric, limit in allowed.items():
        if not 0 <= limit < float("inf"):
            raise InputError(f"the tolerance of {metric!r} is {limit!r}; it must be a finite number, 0 or more")
    found: list[Difference] = []
    for key in sorted(old.keys() | new.keys()):
        where = "/".join(key)
        if key not in new:
            found.append(Difference("missing row", where, repr(old[key]), None, "was scored, is not any more"))
        elif key not in old:
            found.append(Difference("extra row", where, None, repr(new[key]), "is scored, was not before"))
        elif repr(old[key]) != repr(new[key]):
            change = new[key] - old[key]
            tolerance = _tolerance_of(key[-1], allowed)
            if tolerance is None:
                found.append(Difference("score", where, repr(old[key]), repr(new[key]), f"moved by {change:+.6g}; must be exact"))
            elif not abs(change) <= tolerance:
                note = f"moved by {change:+.6g}; allowed {tolerance:g}"
                found.append(Difference("score", where, repr(old[key]), repr(new[key]), note))
    return found


def compare_digests(committed: Mapping[str, str], fresh: Mapping[str, str]) -> list[Difference]:
    """Compare named digests (of cases, masks, files); a name that only one side has is a difference."""
    found: list[Difference] = []
    for name in sorted(committed.keys() | fresh.keys()):
        old, new = committed.get(name), fresh.get(name)
        if old == new:
            continue
        if new is None:
            found.append(Difference("missing digest", name, old, None, "was there, is not any more"))
        elif old is None:
            found.append(Difference("extra digest", name, None, new, "is there, was not before"))
        else:
            found.append(Difference("digest", name, old, new, "content changed"))
    return found


def compare_text(where: str, committed: str, fresh: str) -> list[Difference]:
    """Compare two texts, line ends included; one difference that names the first line that differs."""
    if committed == fresh:
        return []
    old_lines, new_lines = committed.splitlines(keepends=True), fresh.splitlines(keepends=True)
    differing = [i for i, (old, new) in enumerate(zip_longest(old_lines, new_lines)) if old != new]
    first = differing[0]
    old_line = old_lines[first] if first < len(old_lines) else None
    new_line = new_lines[first] if first < len(new_lines) else None
    text = f"{len(differing)} of {max(len(old_lines), len(new_lines))} lines differ, the first is line {first + 1}"
    return [Difference("text", f"{where}:{first + 1}", old_line, new_line, text)]


def _by_key(rows: Iterable[Score], name: str) -> dict[RowKey, float]:
    table: dict[RowKey, float] = {}
    repeated: list[str] = []
    for row in rows:
        key = (row.arm, row.fold, row.seed, row.case, row.metric)
        if key in table:
            repeated.append("/".join(key))
        table[key] = float(row.value)
    if repeated:
        raise InputError(f"the {name} scores have duplicate rows: {listed(repeated)}. Keep one row of each")
    return table


def _tolerance_of(metric: str, tolerances: Mapping[str, float]) -> float | None:
    bare = metric.split("@")[0].split("/")[0]
    return tolerances.get(metric, tolerances.get(bare))
