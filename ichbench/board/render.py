"""Boards as CSV, Markdown and terminal text. The same facts give the same bytes, and no mean comes without n and interval."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ichbench.board.effects import FEWEST_PAIRS, Effect, better_direction, effects_of_table, require_same_cases
from ichbench.board.summary import (
    DEFAULT_METRICS,
    DEFAULT_RESAMPLES,
    LEVEL,
    ROUGH_BELOW_CASES,
    ArmSummary,
    case_table,
    listed,
    summarise_table,
)
from ichbench.cases.files import write_atomically
from ichbench.errors import InputError
from ichbench.scoring.protocol import METRICS, split_metric

if TYPE_CHECKING:
    from rich.table import Table

    from ichbench.scoring.score import Score

COLUMNS = (
    "arm", "metric", "mean", "lower", "upper", "median", "sd", "n", "n_empty_prediction", "n_empty_reference", "n_missing", "n_infinite",
    "difference", "difference_lower", "difference_upper", "n_pairs", "share_improved", "verdict",
)  # fmt: skip
#: Digits after the point on screen, by bare metric name (mm and ml need fewer than shares); 3 for all others.
DECIMALS = {"hd": 1, "hd95": 1, "assd": 2, "reference_ml": 1, "predicted_ml": 1}
TEXT_WIDTH = 120
ARM_WIDTH = 24


@dataclass(frozen=True)
class Board:
    """What is known about the arms of one study. `effects` is empty if there is no base."""

    summaries: tuple[ArmSummary, ...]
    effects: tuple[Effect, ...]
    base: str | None
    resamples: int

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms from top to bottom."""
        return tuple(dict.fromkeys(summary.arm for summary in self.summaries))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics from left to right."""
        return tuple(dict.fromkeys(summary.metric for summary in self.summaries))


def build_board(
    rows: Iterable[Score],
    base: str | None = "base",
    metrics: Sequence[str] = DEFAULT_METRICS,
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    arm_order: Sequence[str] | None = None,
) -> Board:
    """Rows -> board. `arm_order` is the order from top to bottom; by default the base comes first, the others by name.

    `base=None` gives a board without differences (submissions to a challenge). InputError: arms with different cases, an
    `arm_order` that is not exactly the arms of the rows, and whatever `summary.case_table` and `effects.paired_effects` refuse.
    """
    table = case_table(rows, metrics)
    require_same_cases(table)
    effects = effects_of_table(table, base, seed, resamples) if base is not None else []
    order = list(arm_order) if arm_order is not None else sorted(table.arms, key=lambda arm: (arm != base, arm))
    if sorted(order) != list(table.arms):
        raise InputError(f"arm_order names {listed(order)}, but the rows have the arms {listed(table.arms)}. Name each arm once")
    place = {arm: index for index, arm in enumerate(order)}
    summaries = sorted(summarise_table(table, seed, resamples), key=lambda summary: place[summary.arm])
    effects = sorted(effects, key=lambda effect: place[effect.arm])
    return Board(tuple(summaries), tuple(effects), base, resamples)


def write_board(board: Board, out_dir: Path) -> tuple[Path, Path]:
    """Write board.csv and board.md into `out_dir` (made if missing) and return both paths; no half-written file is ever seen."""
    out_dir.mkdir(parents=True, exist_ok=True)
    csv_path, markdown_path = out_dir / "board.csv", out_dir / "board.md"
    write_atomically(csv_path, board_csv(board.summaries, board.effects).encode())
    write_atomically(markdown_path, board_markdown(board).encode())
    return csv_path, markdown_path


def board_csv(summaries: Sequence[ArmSummary], effects: Sequence[Effect]) -> str:
    """One line per arm and metric (`COLUMNS`), LF, shortest round-trip floats, inf and nan spelled so; empty: not known or no base."""
    effect_of = {(effect.arm, effect.metric): effect for effect in effects}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for s in summaries:
        numbers = (s.mean, s.lower, s.upper, s.median, s.sd, s.n, s.n_empty_prediction, s.n_empty_reference, s.n_missing, s.n_infinite)
        e = effect_of.get((s.arm, s.metric))
        against = (e.difference, e.lower, e.upper, e.n_pairs, e.share_improved, e.verdict) if e else ("",) * 6
        writer.writerow([s.arm, s.metric, *map(_exact, numbers), *map(_exact, against)])
    return out.getvalue()


def board_markdown(board: Board) -> str:
    """A table with one row per arm: mean [lower, upper] per metric, n, empties, and the first metric's difference to the base."""
    primary = board.metrics[0]
    effect_of = {effect.arm: effect for effect in board.effects if effect.metric == primary}
    header = ["arm", "n", "empty", *(_markdown_heading(metric) for metric in board.metrics)]
    if board.effects:
        header += [f"{primary} minus {_safe(str(board.base))}", "verdict"]
    lines = [_markdown_row(header), _markdown_row(["---", "---:", "---:"] + ["---"] * (len(header) - 3))]
    for arm, summaries in _by_arm(board.summaries).items():
        cells = [_safe(arm) + _mark(summaries[0]), str(_n_cases(summaries[0])), _empties(summaries[0])]
        cells += [" ".join(_score_lines(summary)) for summary in summaries]
        if board.effects:
            effect = effect_of.get(arm)
            cells += [" ".join(_effect_lines(effect)), effect.verdict] if effect else ["", ""]
        lines.append(_markdown_row(cells))
    notes = "\n".join(f"- {_safe(note)}" for note in _footnotes(board))
    return "\n".join(lines) + "\n\n" + notes + "\n"


def board_text(board: Board, width: int = TEXT_WIDTH) -> str:
    """The board for a terminal of `width` columns, plain ASCII: scores, then differences to the base, then footnotes."""
    from rich.text import Text

    scores = _plain_table()
    scores.add_column("arm", overflow="fold", min_width=12, max_width=ARM_WIDTH)
    scores.add_column("n", justify="right", no_wrap=True)
    scores.add_column("empty", overflow="fold", justify="right")
    for metric in board.metrics:
        scores.add_column(Text(f"{_heading(metric)}\n{_direction(metric)}"), no_wrap=True)
    for arm, summaries in _by_arm(board.summaries).items():
        cells = [arm + _mark(summaries[0]), str(_n_cases(summaries[0])), _empties(summaries[0])]
        scores.add_row(*map(Text, [*cells, *("\n".join(_score_lines(summary)) for summary in summaries)]))
    tables = [scores]
    if board.effects:
        tables.append(_effects_table(board))
    notes = "".join(textwrap.fill(note, width, subsequent_indent="  ") + "\n" for note in _footnotes(board))
    return "".join(_rendered(table, width) for table in tables) + notes


def _effects_table(board: Board) -> Table:
    """Differences of the first two metrics that have a direction, one line per arm; board.csv has all of them."""
    from rich.text import Text

    shown = [metric for metric in board.metrics if better_direction(metric) != "none"][:2]
    effect_of = {(effect.arm, effect.metric): effect for effect in board.effects}
    table = _plain_table()
    table.add_column(Text(f"difference to\n{board.base}"), overflow="fold", min_width=12, max_width=ARM_WIDTH)
    for metric in shown:
        table.add_column(Text(_heading(metric)), no_wrap=True)
        table.add_column(Text("cases\nbetter"), justify="right", no_wrap=True)
        table.add_column(Text("verdict"), no_wrap=True)
    for arm in dict.fromkeys(effect.arm for effect in board.effects):
        cells = [arm]
        for metric in shown:
            e = effect_of[arm, metric]
            improved = 0 if e.n_pairs == 0 else round(e.share_improved * e.n_pairs)
            cells += [" ".join(_effect_lines(e)), f"{improved}/{e.n_pairs}", e.verdict]
        table.add_row(*map(Text, cells))
    return table


def _footnotes(board: Board) -> list[str]:
    fewest = min(summary.n for summary in board.summaries)
    notes = [
        f"[a, b]: {LEVEL:.0%} bootstrap interval of the mean over cases ({board.resamples} resamples, expanded percentile). "
        "Seeds and folds are averaged within a case."
    ]
    if fewest < ROUGH_BELOW_CASES:
        notes.append(f"n is as low as {fewest}: below {ROUGH_BELOW_CASES} cases intervals are rough.")
    if any(summary.n_undefined for summary in board.summaries):
        notes.append("n=k beside a mean: it is over k cases only, because the metric is undefined (nan) in the others.")
    if any(summary.n_infinite for summary in board.summaries):
        notes.append("inf (k): k cases are infinite (a mask is empty there), so the mean is; the median is over all cases.")
    references = max(summary.n_empty_reference or 0 for summary in board.summaries)
    if references:
        notes.append(f"In {references} of the cases the reference is empty; what that scores is said by the protocol.")
    if any(summary.n_empty_prediction is None for summary in board.summaries):
        notes.append("empty ?: the rows do not say whether predictions were empty.")
    if any(_mark(summary) for summary in board.summaries):
        notes.append("*: one training seed only; another seed may move the score by more than the interval shows.")
    if board.effects:
        pairs = min(effect.n_pairs for effect in board.effects)
        few = f" With fewer than {FEWEST_PAIRS} pairs every verdict is 'not separable'." if pairs < FEWEST_PAIRS else ""
        notes.append("verdict: better or worse if the interval of the paired difference leaves out 0; not adjusted for several arms." + few)
    return notes


def _score_lines(summary: ArmSummary) -> list[str]:
    """mean (with its own n where that is not the arm's), [lower, upper], and the median where the mean is infinite."""
    show = _format_of(summary.metric)
    lines = [show(summary.mean), f"[{show(summary.lower)}, {show(summary.upper)}]"]
    if summary.n_infinite:
        lines[0] += f" ({summary.n_infinite})"
        lines.append(f"median {show(summary.median)}")
    if summary.n_undefined:
        lines[0] += f" n={summary.n}"
    return lines


def _effect_lines(effect: Effect) -> list[str]:
    show = _format_of(effect.metric, signed=True)
    return [show(effect.difference), f"[{show(effect.lower)}, {show(effect.upper)}]"]


def _format_of(metric: str, signed: bool = False) -> Callable[[float], str]:
    decimals = DECIMALS.get(split_metric(metric)[0], 3)

    def show(value: float) -> str:
        if math.isnan(value):
            return "nan"
        text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
        # a difference that rounds to nothing has no sign worth showing
        return text[1:] if float(text) == 0 and text[0] in "+-" else text

    return show


def _n_cases(summary: ArmSummary) -> int:
    return summary.n + summary.n_undefined


def _empties(summary: ArmSummary) -> str:
    """Empty predictions, and how many of them were missing files."""
    text = "?" if summary.n_empty_prediction is None else str(summary.n_empty_prediction)
    return f"{text} ({summary.n_missing} missing)" if summary.n_missing else text


def _mark(summary: ArmSummary) -> str:
    return "*" if len(summary.seeds) == 1 and summary.seeds != ("-",) else ""


def _heading(metric: str) -> str:
    unit = METRICS[split_metric(metric)[0]].unit
    return f"{metric} {unit}" if unit else metric


def _direction(metric: str) -> str:
    better = better_direction(metric)
    return "" if better == "none" else f"{better} better"


def _markdown_heading(metric: str) -> str:
    return f"{_safe(_heading(metric))} {({'higher': '↑', 'lower': '↓', 'none': ''})[better_direction(metric)]}".rstrip()


def _by_arm(summaries: Sequence[ArmSummary]) -> dict[str, list[ArmSummary]]:
    groups: dict[str, list[ArmSummary]] = {}
    for summary in summaries:
        groups.setdefault(summary.arm, []).append(summary)
    return groups


def _safe(text: str) -> str:
    """No character of a name may end a Markdown cell or start emphasis."""
    return "".join(f"\\{character}" if character in "\\|*_`<[]" else character for character in text.replace("\n", " "))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _exact(value: str | float | int | None) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _plain_table() -> Table:
    from rich.box import Box
    from rich.table import Table

    # ASCII, so that a log file or a console without UTF-8 shows it too; a line under the header only
    lines = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    return Table(box=lines, show_edge=False, padding=(0, 1, 0, 0))


def _rendered(table: Table, width: int) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n\n"
