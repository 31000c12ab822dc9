"""Tables of ready-made cells as plain text (ASCII), Markdown and CSV. Knows nothing of what is in them."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ichbench.scoring.protocol import METRICS, split_metric

#: Digits after the point on screen, by bare metric name; 3 for all others.
DECIMALS = {"hd": 1, "hd95": 1, "assd": 2, "reference_ml": 1, "predicted_ml": 1}
TEXT_WIDTH = 120


@dataclass(frozen=True)
class Grid:
    """A header and rows of as many cells. The first `n_left` columns are aligned to the left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    n_left: int = 1


def text_of(grid: Grid) -> str:
    """Columns two blanks apart, a line under the header, no trailing blanks."""
    lines = [grid.header, *grid.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(grid.header))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < grid.n_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_of(grid: Grid) -> str:
    """The same as a Markdown table; no character of a cell ends it or starts emphasis."""
    marks = ["---" if column < grid.n_left else "---:" for column in range(len(grid.header))]
    lines = [list(map(safe, grid.header)), marks, *(list(map(safe, row)) for row in grid.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_of(header: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> str:
    """LF, shortest round-trip floats, inf and nan spelled so."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([cell if isinstance(cell, str) else repr(cell) for cell in row] for row in rows)
    return out.getvalue()


def safe(text: str) -> str:
    """Text in a Markdown cell."""
    return "".join(f"\\{character}" if character in "\\|*_`<[]" else character for character in text.replace("\n", " "))


def wrapped(notes: Sequence[str], width: int = TEXT_WIDTH) -> str:
    """One note after the other, each on as many lines as it needs."""
    return "\n".join(textwrap.fill(note, width, subsequent_indent="  ") for note in notes)


def shown_value(metric: str, value: float) -> str:
    """A value of a metric as boards show it."""
    return "nan" if math.isnan(value) else f"{value:.{DECIMALS.get(split_metric(metric)[0], 3)}f}"


def shown_rank(rank: float) -> str:
    """1, 2.5; "-" where there is none."""
    return "-" if math.isnan(rank) else f"{rank:g}"


def heading(metric: str) -> str:
    """The metric with its unit."""
    unit = METRICS[split_metric(metric)[0]].unit
    return f"{metric} {unit}" if unit else metric
