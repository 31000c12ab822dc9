"""CSV files as people and spreadsheets leave them: read in one documented way, or refused with line and column.

Read: UTF-8 with or without byte order mark; LF or CRLF; commas, or semicolons or tabs where the header has those; rows in any order.
Numbers have a decimal point and nothing else (`1014.45`, `1e-7`), or are `inf`, `-inf`, `nan`. Refused,
because one text could mean two numbers, or none: `1,014.45`, `1.014,45`, `0,85`, `95 %`, an empty cell,
`NA`. Refused too: other encodings, empty lines and empty names.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichbench.errors import InputError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
#: How many offending cells one message spells out.
SHOWN = 8
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity)|nan", re.ASCII | re.IGNORECASE)
_NO_NUMBER = frozenset(("", "na", "n/a", "none", "null", "-", "#n/a", "#value!", "#div/0!"))


@dataclass(frozen=True)
class Line:
    """One line of a table: its number in the file (a quoted cell may span lines: the last of them), and its cells."""

    number: int
    cells: tuple[str, ...]


def read_lines(path: Path, header: Sequence[str], optional: bool = False) -> list[Line]:
    """The lines after the header, which must be `header`; with `optional` there may be other columns too, which are left out.

    InputError with file and line for anything that is not such a table.
    """
    source = Path(path)
    lines: list[Line] = []
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            separator = _separator_of(first)
            stream.seek(0)
            reader = csv.reader(stream, strict=True, delimiter=separator)
            found = next(reader, [])
            if optional and not set(header) <= set(found):
                lacking = ", ".join(name for name in header if name not in found)
                raise InputError(f"{source}, line 1: the header is {','.join(found)!r}, and lacks {lacking}")
            if not optional and tuple(found) != tuple(header):
                raise InputError(f"{source}, line 1: the header is {','.join(found)!r}, but must be {','.join(header)!r}")
            if len(set(found)) != len(found):
                raise InputError(f"{source}, line 1: a column comes twice in {','.join(found)!r}; keep one")
            places = [found.index(name) for name in header]
            for cells in reader:
                if len(cells) != len(found):
                    word = SEPARATORS[separator]
                    raise InputError(
                        f"{source}, line {reader.line_num}: {len(cells)} columns, but there must be {len(found)}, separated by {word}: "
                        f"{','.join(found)} (a cell that holds one of the {word} needs quotes; an empty line has no place)"
                    )
                lines.append(Line(reader.line_num, tuple(cells[place] for place in places)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} cannot be read as a table in UTF-8: {_reason(error)}") from error
    return lines


def columns_of(path: Path) -> tuple[str, ...]:
    """The names in the first line. InputError for a file that cannot be read."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            return tuple(_split(first, _separator_of(first)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table in UTF-8: {_reason(error)}") from error


def number_of(text: str) -> float:
    """The number that a cell says. ValueError with the reason, for a message, where it says none or could say two."""
    if _NUMBER.fullmatch(text):
        value = float(text)
        if math.isinf(value) and "n" not in text.lower():
            raise ValueError("a number too large for a computer; infinite is written inf")
        return value
    if text != text.strip():
        raise ValueError("it has blanks around it")
    if text.lower() in _NO_NUMBER:
        raise ValueError("no number; undefined is written nan")
    if "," in text and re.fullmatch(r"[+-]?[\d.,]+", text, re.ASCII):
        raise ValueError("a comma may separate thousands or decimals; write it with a decimal point and nothing else, such as 1014.45")
    raise ValueError("a number, inf or nan is needed")


def numbers_of(path: Path, lines: Sequence[Line], column: int, name: str) -> list[float]:
    """One column as numbers. InputError listing the cells that are none, each with line and column."""
    values, wrong = [], []
    for line in lines:
        try:
            values.append(number_of(line.cells[column]))
        except ValueError as error:
            wrong.append(f"line {line.number}: the {name} is {line.cells[column]!r} (column {column + 1}): {error}")
    if wrong:
        raise InputError(f"{path}, " + in_short(wrong))
    return values


def check_names(path: Path, lines: Sequence[Line], columns: Sequence[int], header: Sequence[str], hint: str) -> None:
    """InputError for names that are empty, each with line and column."""
    wrong = [f"line {line.number}: a name is empty: {header[c]} (column {c + 1})" for line in lines for c in columns if not line.cells[c]]
    if wrong:
        raise InputError(f"{path}, {in_short(wrong)}; {hint}")


def in_short(messages: Sequence[str]) -> str:
    """The first few messages, and how many more there are."""
    more = f"; and {len(messages) - SHOWN} more like it" if len(messages) > SHOWN else ""
    return "; ".join(messages[:SHOWN]) + more


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}; check the path"
    return f"{error}. A spreadsheet, or a table in another encoding, is saved as CSV UTF-8 first"


def _separator_of(header: str) -> str:
    return next((mark for mark in SEPARATORS if len(_split(header, mark)) > 1), ",")


def _split(line: str, separator: str) -> list[str]:
    return next(csv.reader([line.strip("\r\n")], delimiter=separator), [])
