"""Boards as CSV, Markdown and terminal text. The same facts give the same bytes, and no mean comes without n and interval."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ichbench.board.effects import (
    FEWEST_PAIRS,
    Claim,
    Effect,
    better_direction,
    one_seed,
    paired_effects,
    require_same_cases,
    within_seeds,
)
from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, Method
from ichbench.board.signflip import POWER
from ichbench.board.summary import DEFAULT_METRICS, ROUGH_BELOW_CASES, ArmSummary, Clusters, case_table, listed, summarise_table
from ichbench.board.words import (
    ARM_WIDTH,
    TEXT_WIDTH,
    direction,
    effect_lines,
    exact,
    finds_text,
    heading,
    interval_note,
    markdown_heading,
    markdown_row,
    p_text,
    plain_table,
    rendered,
    safe,
    score_lines,
    verdict_text,
)
from ichbench.cases.files import write_atomically
from ichbench.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from ichbench.scoring.score import Score

COLUMNS = (
    "arm", "metric", "mean", "lower", "upper", "median", "median_lower", "median_upper", "quartile_1", "quartile_3", "sd", "n", "n_units",
    "n_empty_prediction", "n_empty_reference", "n_missing", "n_infinite", "n_seeds", "seed_sd",
    "difference", "difference_lower", "difference_upper", "n_pairs", "share_improved", "standardised", "p", "p_adjusted", "detectable",
    "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Board:
    """What is known about the arms of one study. `effects` is empty if there is no base."""

    summaries: tuple[ArmSummary, ...]
    effects: tuple[Effect, ...]
    base: str | None
    resamples: int
    method: Method = DEFAULT_METHOD
    clustered: bool = False

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
    method: Method = DEFAULT_METHOD,
    clusters: Clusters = None,
    margins: Mapping[str, float] | None = None,
) -> Board:
    """Rows -> board. `arm_order` is the order from top to bottom; by default the base comes first, the others by name.

    `base=None` gives a board without differences (submissions to a challenge). `clusters` names the patient or site of every
    case, `margins` what counts as equivalent. InputError: arms with different cases, an
    `arm_order` that is not exactly the arms of the rows, and whatever `summary.case_table` and `effects.paired_effects` refuse.
    """
    table = case_table(rows, metrics)
    require_same_cases(table)
    effects = paired_effects(table, base, seed, resamples, method, clusters, margins) if base is not None else []
    order = list(arm_order) if arm_order is not None else sorted(table.arms, key=lambda arm: (arm != base, arm))
    if sorted(order) != list(table.arms):
        raise InputError(f"arm_order names {listed(order)}, but the rows have the arms {listed(table.arms)}. Name each arm once")
    place = {arm: index for index, arm in enumerate(order)}
    summaries = sorted(summarise_table(table, seed, resamples, method, clusters), key=lambda summary: place[summary.arm])
    effects = sorted(effects, key=lambda effect: place[effect.arm])
    return Board(tuple(summaries), tuple(effects), base, resamples, method, clusters is not None)


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
        numbers = (s.mean, s.lower, s.upper, s.median, s.median_lower, s.median_upper, s.quartile_1, s.quartile_3, s.sd, s.n, s.n_units)
        counts = (s.n_empty_prediction, s.n_empty_reference, s.n_missing, s.n_infinite, 0 if s.seeds == ("-",) else len(s.seeds), s.seed_sd)
        e = effect_of.get((s.arm, s.metric))
        against = (
            (e.difference, e.lower, e.upper, e.n_pairs, e.share_improved, e.standardised, e.p, e.p_adjusted, e.detectable) if e else ()
        )
        empty = [""] * (len(COLUMNS) - 2 - len(numbers) - len(counts))
        writer.writerow([s.arm, s.metric, *map(exact, numbers), *map(exact, counts), *([*map(exact, against), e.verdict] if e else empty)])
    return out.getvalue()


def board_markdown(board: Board) -> str:
    """A table with one row per arm: mean [lower, upper] per metric, n, empties, and the first metric's difference to the base."""
    primary = board.metrics[0]
    effect_of = {effect.arm: effect for effect in board.effects if effect.metric == primary}
    header = ["arm", "n", "empty", *(markdown_heading(metric) for metric in board.metrics)]
    if board.effects:
        header += [f"{primary} minus {safe(str(board.base))}", "verdict"]
    lines = [markdown_row(header), markdown_row(["---", "---:", "---:"] + ["---"] * (len(header) - 3))]
    for arm, summaries in _by_arm(board.summaries).items():
        cells = [safe(arm) + _mark(summaries[0]), str(_n_cases(summaries[0])), _empties(summaries[0])]
        cells += [" ".join(score_lines(summary)) for summary in summaries]
        if board.effects:
            effect = effect_of.get(arm)
            cells += [" ".join(effect_lines(effect, primary)), safe(verdict_text(effect))] if effect else ["", ""]
        lines.append(markdown_row(cells))
    notes = "\n".join(f"- {safe(note)}" for note in _footnotes(board))
    return "\n".join(lines) + "\n\n" + notes + "\n"


def board_text(board: Board, width: int = TEXT_WIDTH) -> str:
    """The board for a terminal of `width` columns, plain ASCII: scores, then differences to the base, then footnotes."""
    from rich.text import Text

    scores = plain_table()
    scores.add_column("arm", overflow="fold", min_width=12, max_width=ARM_WIDTH)
    scores.add_column("n", justify="right", no_wrap=True)
    scores.add_column("empty", overflow="fold", justify="right")
    for metric in board.metrics:
        scores.add_column(Text(f"{heading(metric)}\n{direction(metric)}"), no_wrap=True)
    for arm, summaries in _by_arm(board.summaries).items():
        cells = [arm + _mark(summaries[0]), str(_n_cases(summaries[0])), _empties(summaries[0])]
        scores.add_row(*map(Text, [*cells, *("\n".join(score_lines(summary)) for summary in summaries)]))
    tables = [scores]
    if board.effects:
        tables.append(_effects_table(board))
    notes = "".join(textwrap.fill(note, width, subsequent_indent="  ") + "\n" for note in _footnotes(board))
    return "".join(rendered(table, width) for table in tables) + notes


def _effects_table(board: Board) -> Table:
    """Differences of the first two metrics that have a direction, one line per arm; board.csv has all of them."""
    from rich.text import Text

    shown = [metric for metric in board.metrics if better_direction(metric) != "none"][:2]
    effect_of = {(effect.arm, effect.metric): effect for effect in board.effects}
    table = plain_table()
    table.add_column(Text(f"difference to\n{board.base}"), overflow="fold", min_width=12, max_width=ARM_WIDTH)
    for metric in shown:
        table.add_column(Text(heading(metric)), no_wrap=True)
        table.add_column(Text("p\nHolm"), justify="right", no_wrap=True)
        table.add_column(Text("cases\nbetter"), justify="right", no_wrap=True)
        table.add_column(Text("verdict"), no_wrap=True)
    for arm in dict.fromkeys(effect.arm for effect in board.effects):
        cells = [arm + ("*" if any(effect_of[arm, metric].single_seed for metric in shown) else "")]
        for metric in shown:
            e = effect_of[arm, metric]
            improved = 0 if e.n_pairs == 0 else round(e.share_improved * e.n_pairs)
            verdict = f"{e.verdict}\n{finds_text(e, metric)}" if e.verdict == "not separable" else e.verdict + "~" * within_seeds(e)
            cells += ["\n".join(effect_lines(e, metric)), p_text(e.p_adjusted), f"{improved}/{e.n_pairs}", verdict]
        table.add_row(*map(Text, cells))
    return table


def _footnotes(board: Board) -> list[str]:
    fewest = min(summary.n_units for summary in board.summaries)
    notes = [interval_note(board.method, board.resamples, board.clustered)]
    if fewest < ROUGH_BELOW_CASES:
        what = "clusters" if board.clustered else "cases"
        notes.append(f"n is as low as {fewest}: below {ROUGH_BELOW_CASES} {what} intervals are rough.")
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
        notes += effect_notes(board.effects)
    return notes


def effect_notes(effects: Sequence[Claim]) -> list[str]:
    """What a reader of verdicts must know."""
    notes = [
        "verdict: better or worse if the permutation p (sign flips of the paired differences, Holm over the arms of a metric) is at most "
        "0.05 and the interval leaves out 0."
    ]
    if any(effect.verdict == "not separable" for effect in effects):
        notes.append(f"finds d: a study of this size and spread calls a true difference of d separable in {POWER:.0%} of cases.")
    if margins := {effect.metric: effect.margin for effect in effects if effect.verdict == "equivalent"}:
        within = ", ".join(f"{metric} {margin:g}" for metric, margin in margins.items())
        notes.append(f"equivalent: the whole interval of the difference lies within the margin ({within}).")
    if any(within_seeds(effect) for effect in effects):
        notes.append("~: the difference is less than twice the error that training seeds alone make.")
    if min(effect.n_units for effect in effects) < FEWEST_PAIRS:
        notes.append(f"With fewer than {FEWEST_PAIRS} pairs every verdict is 'not separable'.")
    return notes


def _n_cases(summary: ArmSummary) -> int:
    return summary.n + summary.n_undefined


def _empties(summary: ArmSummary) -> str:
    """Empty predictions, and how many of them were missing files."""
    text = "?" if summary.n_empty_prediction is None else str(summary.n_empty_prediction)
    return f"{text} ({summary.n_missing} missing)" if summary.n_missing else text


def _mark(summary: ArmSummary) -> str:
    return "*" if one_seed(summary.seeds) else ""


def _by_arm(summaries: Sequence[ArmSummary]) -> dict[str, list[ArmSummary]]:
    groups: dict[str, list[ArmSummary]] = {}
    for summary in summaries:
        groups.setdefault(summary.arm, []).append(summary)
    return groups
