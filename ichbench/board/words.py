"""How numbers, names and tables are written, on screen and in Markdown."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ichbench.board.effects import Claim, Estimate, better_direction, within_seeds
from ichbench.board.intervals import LEVEL, METHOD_TEXT, Method
from ichbench.board.summary import ArmSummary, width_of
from ichbench.scoring.protocol import METRICS, split_metric

if TYPE_CHECKING:
    from rich.table import Table

#: Digits after the point on screen, by bare metric name (mm and ml need fewer than shares); 3 for all others.
DECIMALS = {"hd": 1, "hd95": 1, "assd": 2, "reference_ml": 1, "predicted_ml": 1}
TEXT_WIDTH = 120
ARM_WIDTH = 24


def format_of(metric: str, signed: bool = False) -> Callable[[float], str]:
    """How values of a metric are written."""
    decimals = DECIMALS.get(split_metric(metric)[0], 3)

    def show(value: float) -> str:
        if math.isnan(value):
            return "nan"
        text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
        # a difference that rounds to nothing has no sign worth showing
        return text[1:] if float(text) == 0 and text[0] in "+-" else text

    return show


def score_lines(summary: ArmSummary) -> list[str]:
    """mean (with its own n where that is not the arm's), [lower, upper]; where the mean is infinite the median and its interval."""
    show = format_of(summary.metric)
    lines = [show(summary.mean), f"[{show(summary.lower)}, {show(summary.upper)}]"]
    if summary.n_infinite:
        lines[0] += f" ({summary.n_infinite})"
        lines += [f"median {show(summary.median)}", f"[{show(summary.median_lower)}, {show(summary.median_upper)}]"]
    if summary.n_undefined:
        lines[0] += f" n={summary.n}"
    return lines


def effect_lines(estimate: Estimate, metric: str) -> list[str]:
    """difference, [lower, upper]."""
    show = format_of(metric, signed=True)
    return [show(estimate.difference), f"[{show(estimate.lower)}, {show(estimate.upper)}]"]


def p_text(p: float) -> str:
    """A p value, never 0."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def verdict_text(effect: Claim) -> str:
    """The verdict, with ~ where training seeds alone may have made it; beside "not separable" what such a study would find."""
    if effect.verdict == "equivalent":
        return f"equivalent within {effect.margin:g}"
    if effect.verdict != "not separable":
        return effect.verdict + "~" * within_seeds(effect)
    return f"not separable {finds_text(effect, effect.metric)}"


def finds_text(estimate: Estimate, metric: str) -> str:
    """What a study of this size would find: `(finds 0.115)`; `(finds ?)` where that is not known, `(finds none)` where nothing would do."""
    if math.isnan(estimate.detectable):
        return "(finds ?)"
    beyond = estimate.detectable > width_of(metric)
    return "(finds none)" if beyond or math.isinf(estimate.detectable) else f"(finds {format_of(metric)(estimate.detectable)})"


def interval_note(method: Method, resamples: int, clustered: bool) -> str:
    """What [a, b] is."""
    over = "clusters (patients or sites) of cases" if clustered else "cases"
    drawn = "" if method == "t" else f", {resamples} resamples"
    return (
        f"[a, b]: {LEVEL:.0%} interval of the mean over {over} ({METHOD_TEXT[method]}{drawn}). Seeds and folds are averaged within a case."
    )


def heading(metric: str) -> str:
    """The metric and its unit."""
    unit = METRICS[split_metric(metric)[0]].unit
    return f"{metric} {unit}" if unit else metric


def direction(metric: str) -> str:
    """`higher better`, `lower better`, or nothing."""
    better = better_direction(metric)
    return "" if better == "none" else f"{better} better"


def markdown_heading(metric: str) -> str:
    """The metric, its unit, and an arrow to where it is better."""
    return f"{safe(heading(metric))} {({'higher': '↑', 'lower': '↓', 'none': ''})[better_direction(metric)]}".rstrip()


def safe(text: str) -> str:
    """No character of a name may end a Markdown cell or start emphasis."""
    return "".join(f"\\{character}" if character in "\\|*_`<[]" else character for character in text.replace("\n", " "))


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table; the cells are safe already."""
    return "| " + " | ".join(cells) + " |"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    lines = [markdown_row([safe(cell) for cell in header]), markdown_row(["---"] * len(header))]
    lines += [markdown_row([safe(cell) for cell in row]) for row in rows]
    return "\n".join(lines) + "\n"


def exact(value: str | float | int | None) -> str:
    """A cell of a CSV: shortest float that reads back the same; nothing for None."""
    return "" if value is None else value if isinstance(value, str) else repr(value)


def plain_table() -> Table:
    """An empty table for a terminal."""
    from rich.box import Box
    from rich.table import Table

    # ASCII, so that a log file or a console without UTF-8 shows it too; a line under the header only
    lines = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    return Table(box=lines, show_edge=False, padding=(0, 1, 0, 0))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table of texts for a terminal: the first and the last column fold, the others stay whole."""
    from rich.text import Text

    table = plain_table()
    for place, name in enumerate(header):
        if place == 0:
            table.add_column(Text(name), overflow="fold", min_width=12, max_width=2 * ARM_WIDTH)
        elif place == len(header) - 1:
            table.add_column(Text(name), overflow="fold", min_width=14)
        else:
            table.add_column(Text(name), no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return rendered(table, width)


def rendered(table: Table, width: int) -> str:
    """The table as text without blanks at the ends of lines."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n\n"
