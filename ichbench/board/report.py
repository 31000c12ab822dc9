"""Everything about effects in one report: arms, factors, strata, learning curves, seeds; as CSV, Markdown and text."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ichbench.board.curves import LearningCurve, learning_curves
from ichbench.board.effects import Claim, Effect, Estimate, paired_effects, require_same_cases
from ichbench.board.factorial import FactorEffect, factorial_effects
from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, Method
from ichbench.board.render import effect_notes
from ichbench.board.strata import KINDS, Cases, StratumEffect, differing_strata, strata_effects
from ichbench.board.summary import DEFAULT_METRICS, ROUGH_BELOW_CASES, CaseTable, Clusters, case_table, sample_sd
from ichbench.board.words import (
    TEXT_WIDTH,
    effect_lines,
    exact,
    format_of,
    interval_note,
    markdown_table,
    p_text,
    score_lines,
    text_table,
    verdict_text,
)
from ichbench.cases.files import write_atomically

if TYPE_CHECKING:
    from ichbench.scoring.score import Score

COLUMNS = (
    "part", "stratum", "term", "base", "metric", "mean", "lower", "upper", "n", "difference", "difference_lower", "difference_upper",
    "n_pairs", "n_left_out", "n_units", "standardised", "share_improved", "p", "p_adjusted", "detectable", "margin", "verdict",
    "single_seed", "seed_error",
)  # fmt: skip
#: A part of the report: heading, columns, rows of texts.
Part = tuple[str, list[str], list[list[str]]]


@dataclass(frozen=True)
class Report:
    """What follows from the rows of one study about its effects."""

    table: CaseTable
    base: str
    effects: tuple[Effect, ...]
    factors: tuple[FactorEffect, ...]
    strata: tuple[StratumEffect, ...]
    curves: tuple[LearningCurve, ...]
    method: Method
    resamples: int
    clustered: bool
    remarks: tuple[str, ...] = ()


def build_report(
    rows: Iterable[Score],
    base: str = "base",
    metrics: Sequence[str] = DEFAULT_METRICS,
    arm_order: Sequence[str] | None = None,
    cases: Cases | None = None,
    factors: Mapping[str, Sequence[str]] | None = None,
    training_cases: Mapping[str, int] | None = None,
    clusters: Clusters = None,
    margins: Mapping[str, float] | None = None,
    method: Method = DEFAULT_METHOD,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    remarks: Sequence[str] = (),
) -> Report:
    """Rows -> report. What is not given (cases.csv, factors, numbers of training cases) leaves its part empty. Errors: as each part's.

    `remarks` are said among the notes.
    """
    table = case_table(rows, metrics)
    require_same_cases(table)
    order = {arm: place for place, arm in enumerate(arm_order or table.arms)}
    effects = paired_effects(table, base, seed, resamples, method, clusters, margins)
    return Report(
        table=table,
        base=base,
        effects=tuple(sorted(effects, key=lambda effect: order.get(effect.arm, len(order)))),
        factors=tuple(factorial_effects(table, base, factors, seed, resamples, method, clusters, margins)) if factors else (),
        strata=tuple(strata_effects(table, base, cases, kinds, seed, resamples, method, clusters, margins)) if cases else (),
        curves=tuple(learning_curves(table, training_cases, seed, resamples, method, clusters)) if training_cases else (),
        method=method,
        resamples=resamples,
        clustered=clusters is not None,
        remarks=tuple(remarks),
    )


def write_report(report: Report, out_dir: Path) -> tuple[Path, Path]:
    """Write effects.csv and effects.md into `out_dir` (made if missing) and return both paths."""
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = out_dir / "effects.csv", out_dir / "effects.md"
    write_atomically(paths[0], report_csv(report).encode())
    write_atomically(paths[1], report_markdown(report).encode())
    return paths


def report_csv(report: Report) -> str:
    """One line per estimate (`COLUMNS`), LF, shortest round-trip floats; a cell is empty where it does not apply."""
    lines: list[dict[str, str]] = []
    for effect in report.effects:
        lines.append({"part": "arm", **_effect_cells(effect)})
    for factor in report.factors:
        lines.append({"part": factor.kind, "term": factor.term, "base": report.base, **_claim_cells(factor)})
    for one in report.strata:
        s = one.summary
        cells = {"part": one.kind, "stratum": one.stratum, "term": s.arm, "metric": s.metric}
        cells |= {"mean": exact(s.mean), "lower": exact(s.lower), "upper": exact(s.upper), "n": exact(s.n), "n_units": exact(s.n_units)}
        lines.append(cells | (_effect_cells(one.effect) if one.effect else {}))
    for curve in report.curves:
        for count, s in curve.points:
            cells = {"part": "learning curve", "stratum": f"{count} training cases", "term": s.arm, "metric": s.metric, "n": exact(s.n)}
            lines.append(cells | {"mean": exact(s.mean), "lower": exact(s.lower), "upper": exact(s.upper), "n_units": exact(s.n_units)})
        lines.append({"part": "learning curve", "term": "per doubling", "metric": curve.metric, **_estimate_cells(curve.per_doubling)})
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def report_markdown(report: Report) -> str:
    """Every part as a table, all metrics, then the notes."""
    parts = [f"## {title}\n\n{markdown_table(header, rows)}" for title, header, rows in report_parts(report, report.table.metrics)]
    notes = "\n".join(f"- {note.replace('*', chr(92) + '*')}" for note in _notes(report))
    return "# Effects\n\n" + "\n".join(parts) + "\n" + notes + "\n"


def report_text(report: Report, width: int = TEXT_WIDTH, strata: bool = True, effects: bool = True) -> str:
    """The parts for a terminal: the first metric of each; `effects.md` has all. Without `effects` only what a board does not show."""
    primary = report.table.metrics[:1]
    shown = []
    for title, header, rows in report_parts(report, primary, effects, strata):
        shown.append(f"{title}\n\n{text_table(header, rows, width)}")
    if not shown:
        return ""
    notes = "".join(textwrap.fill(note, width, subsequent_indent="  ") + "\n" for note in _notes(report))
    return "".join(shown) + (notes if effects else "")


def report_parts(report: Report, metrics: Sequence[str], effects: bool = True, strata: bool = True) -> list[Part]:
    """The tables that have rows."""
    parts: list[Part] = []
    for metric in metrics:
        if effects:
            parts.append(_arms_part(report, metric))
        parts.append(_seeds_part(report, metric))
        parts.append(_factors_part(report, metric))
        parts.append(_curve_part(report, metric))
        if strata:
            parts += [_strata_part(report, metric, kind) for kind in dict.fromkeys(one.kind for one in report.strata)]
    return [part for part in parts if part[2]]


def _arms_part(report: Report, metric: str) -> Part:
    header = ["arm", "difference", "n", "p", "p Holm", "d_z", "better in", "verdict"]
    rows = []
    for e in report.effects:
        if e.metric == metric:
            improved = "-" if math.isnan(e.share_improved) else f"{e.share_improved:.0%}"
            name = e.arm + ("*" if e.single_seed else "")
            numbers = [" ".join(effect_lines(e, metric)), str(e.n_pairs), p_text(e.p), p_text(e.p_adjusted), _standardised(e), improved]
            rows.append([name, *numbers, verdict_text(e)])
    return f"{metric}: arms against {report.base}", header, rows


def _seeds_part(report: Report, metric: str) -> Part:
    """Mean of every seed of the arms that were trained more than once."""
    show = format_of(metric)
    rows = []
    for arm in report.table.arms:
        means = report.table.seed_means.get((arm, metric), ())
        if len(means) > 1:
            named = ", ".join(f"{seed}: {show(mean)}" for seed, mean in zip(report.table.seeds[arm], means, strict=True))
            rows.append([arm, str(len(means)), show(sample_sd(means)), f"{show(min(means))} to {show(max(means))}", named])
    return f"{metric}: between training seeds", ["arm", "seeds", "sd", "range", "mean by seed"], rows


def _factors_part(report: Report, metric: str) -> Part:
    header = ["term", "kind", "effect", "n", "p Holm", "verdict"]
    rows = []
    for f in report.factors:
        if f.metric == metric:
            name = f.term + ("*" if f.single_seed else "")
            rows.append([name, f.kind, " ".join(effect_lines(f, metric)), str(f.n_pairs), p_text(f.p_adjusted), verdict_text(f)])
    return f"{metric}: factors", header, rows


def _curve_part(report: Report, metric: str) -> Part:
    rows = []
    for curve in report.curves:
        if curve.metric == metric:
            rows += [[f"{count} ({s.arm})", " ".join(score_lines(s)), str(s.n)] for count, s in curve.points]
            slope = curve.per_doubling
            rows.append(["per doubling", " ".join(effect_lines(slope, metric)), str(slope.n_pairs)])
    return f"{metric}: number of training cases", ["training cases", metric, "n"], rows


def _strata_part(report: Report, metric: str, kind: str) -> Part:
    header = [kind, "arm", metric, "n", f"minus {report.base}", "p Holm", "verdict"]
    rows = []
    for one in report.strata:
        if one.kind == kind and one.summary.metric == metric:
            s, e = one.summary, one.effect
            against = [" ".join(effect_lines(e, metric)), p_text(e.p_adjusted), verdict_text(e)] if e else ["", "", ""]
            rows.append([one.stratum, s.arm, " ".join(score_lines(s)), str(s.n), *against])
    return f"{metric}: by {kind}", header, rows


def _notes(report: Report) -> list[str]:
    notes = [interval_note(report.method, report.resamples, report.clustered)]
    fewest = min((effect.n_units for effect in report.effects), default=ROUGH_BELOW_CASES)
    if fewest < ROUGH_BELOW_CASES:
        notes.append(f"n is as low as {fewest}: below {ROUGH_BELOW_CASES} cases intervals are rough.")
    if report.effects:
        notes += effect_notes([*report.effects, *report.factors])
    if any(effect.single_seed for effect in report.effects):
        notes.append("*: the arm or the base was trained with one seed only; another seed may move the difference by more than shown.")
    if report.factors:
        notes.append(
            "main effect: mean over all settings of the other factors; interaction: what two levels do together beyond the sum of what "
            "each does alone; Holm over the terms of a kind."
        )
    if report.strata:
        notes.append("strata: Holm over all arms in all strata of a kind; a case with subtypes a+b counts in both.")
        notes += [
            f"{arm} is better in one stratum of {kind} and worse in another ({metric})."
            for kind, arm, metric in differing_strata(report.strata)
        ]
    return [*notes, *report.remarks]


def _standardised(estimate: Estimate) -> str:
    return "-" if math.isnan(estimate.standardised) else f"{estimate.standardised:+.2f}"


def _effect_cells(e: Effect) -> dict[str, str]:
    return {"term": e.arm, "base": e.base, "share_improved": exact(e.share_improved), **_claim_cells(e)}


def _claim_cells(e: Claim) -> dict[str, str]:
    cells = {"metric": e.metric, "margin": exact(e.margin), "verdict": e.verdict}
    return cells | {"single_seed": str(int(e.single_seed)), "seed_error": exact(e.seed_error)} | _estimate_cells(e)


def _estimate_cells(e: Estimate) -> dict[str, str]:
    cells = {"difference": exact(e.difference), "difference_lower": exact(e.lower), "difference_upper": exact(e.upper)}
    cells |= {"n_pairs": exact(e.n_pairs), "n_left_out": exact(e.n_left_out), "n_units": exact(e.n_units), "p": exact(e.p)}
    return cells | {"p_adjusted": exact(e.p_adjusted), "standardised": exact(e.standardised), "detectable": exact(e.detectable)}
