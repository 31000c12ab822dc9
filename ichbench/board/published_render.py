"""Published boards as text, Markdown, CSV and JSON: the order, how it hangs on the rules, and that no interval was published."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ichbench.board.grid import Grid, csv_of, heading, markdown_of, safe, shown_rank, shown_value, text_of, wrapped
from ichbench.board.published import UNRANKED, PublishedRanking, PublishedTable, rank_published, ranks_by_rule, shown_metrics
from ichbench.board.summary import ArmSummary
from ichbench.cases.files import write_atomically

NO_INTERVAL = "interval not published"
#: (arm, metric) -> what was measured here, for arms that stand in a published table
Measured = Mapping[tuple[str, str], ArmSummary]


def published_text(tables: Sequence[PublishedTable], measured: Measured | None = None) -> str:
    """Every table for a terminal; `measured` are arms of the first one that were scored here."""
    return "\n\n\n".join(_text(table, measured or {} if index == 0 else {}) for index, table in enumerate(tables)) + "\n"


def published_markdown(tables: Sequence[PublishedTable], measured: Measured | None = None) -> str:
    parts = []
    for index, table in enumerate(tables):
        ours = measured or {} if index == 0 else {}
        ranking = rank_published(table)
        parts += [f"## {safe(table.title)}", safe(_rule(table)), markdown_of(_main_grid(table, ranking, ours))]
        parts += [markdown_of(grid) for grid in _rule_grid(table, ranking)]
        parts.append(
            "\n".join(f"- {safe(note)}" for note in [*_notes(table, ranking, ours), *(f"source: {source}" for source in table.sources)])
        )
    return "\n\n".join(parts) + "\n"


def published_csv(tables: Sequence[PublishedTable], measured: Measured | None = None) -> str:
    """One line per table, team and metric that has a mean."""
    rows: list[list[str | float | int]] = []
    for index, table in enumerate(tables):
        ranking = rank_published(table)
        for team in [*ranking.teams, *ranking.unranked]:
            for metric in shown_metrics(table):
                mean = table.value(team, metric)
                if math.isnan(mean):
                    continue
                ours = (measured or {}).get((team, metric)) if index == 0 else None
                interval = [ours.lower, ours.upper, "measured"] if ours else ["", "", NO_INTERVAL]
                found = next(row for row in table.rows if (row.team, row.metric, row.statistic) == (team, metric, "mean"))
                place = table.value(team, "-", "place")
                rank = ranking.ranks.get(team, math.nan)
                rows.append([
                    table.name, _cell(rank), _cell(place), team, metric, mean, *interval, found.n, ours.n_infinite if ours else
                    len(table.infinite_cases(metric, team)), _cell(ranking.by_metric.get((team, metric), math.nan)), found.source,
                ])  # fmt: skip
    header = (
        "table",
        "rank",
        "place",
        "team",
        "metric",
        "mean",
        "lower",
        "upper",
        "interval",
        "n",
        "n_infinite_known",
        "metric_rank",
        "source",
    )
    return csv_of(header, rows)


def published_json(tables: Sequence[PublishedTable], measured: Measured | None = None) -> str:
    """The order under every rule; infinite means as "inf"."""
    content = []
    for index, table in enumerate(tables):
        ranking = rank_published(table)
        ours = {arm for arm, _ in measured or {}} if index == 0 else set()
        content.append({
            "table": table.name,
            "title": table.title,
            "scheme": table.scheme,
            "ties": table.ties,
            "metrics": list(table.metrics),
            "ranking": [
                {"team": team, "rank": ranking.ranks.get(team), "mean_of_ranks": ranking.combined.get(team),
                 "kind": "measured" if team in ours else f"published, {NO_INTERVAL}", "n": list(table.n_of(team)),
                 "means": {m: repr(table.value(team, m)) for m in shown_metrics(table) if not math.isnan(table.value(team, m))}}
                for team in ranking.teams
            ],
            "not_ranked": {team: list(lacking) for team, lacking in ranking.unranked.items()},
            "ranks_by_rule": ranks_by_rule(table),
            "infinite_cases": {metric: list(table.infinite_cases(metric)) for metric in table.metrics if table.infinite_cases(metric)},
        })  # fmt: skip
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_published(tables: Sequence[PublishedTable], out: Path, measured: Measured | None = None) -> list[Path]:
    """board.csv, board.md and board.json in `out`; no half-written file is ever seen."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "board.csv": published_csv(tables, measured),
        "board.md": published_markdown(tables, measured),
        "board.json": published_json(tables, measured),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in texts]


def _text(table: PublishedTable, ours: Measured) -> str:
    ranking = rank_published(table)
    grids = [_main_grid(table, ranking, ours), *_rule_grid(table, ranking)]
    return "\n\n".join([f"{table.title}\n{_rule(table)}", *map(text_of, grids), wrapped(_notes(table, ranking, ours))])


def _rule(table: PublishedTable) -> str:
    if table.scheme == UNRANKED:
        return "published means, not ranked"
    how = f"rank in each of {', '.join(table.metrics)}, mean of the ranks" if len(table.metrics) > 1 else f"rank by {table.metrics[0]}"
    return f"{table.scheme}: published means, {how}; ties: {table.ties}"


def _main_grid(table: PublishedTable, ranking: PublishedRanking, ours: Measured) -> Grid:
    metrics = shown_metrics(table)
    places = any(not math.isnan(table.value(team, "-", "place")) for team in table.teams)
    header = ["team", "rank", *(["place"] if places else []), *map(heading, metrics), "n", "infinite cases", "interval"]
    rows = []
    for team in [*ranking.teams, *ranking.unranked]:
        cells = [team, shown_rank(ranking.ranks.get(team, math.nan))]
        cells += [shown_rank(table.value(team, "-", "place"))] if places else []
        cells += [_mean(table, ranking, team, metric, ours) for metric in metrics]
        mine = [summary for (arm, _), summary in ours.items() if arm == team]
        known = sorted({case for metric in metrics for case in table.infinite_cases(metric, team)})
        infinite = any(math.isinf(table.value(team, metric)) for metric in metrics)
        cells.append("/".join(map(str, table.n_of(team))) or "-")
        cells.append(
            ", ".join(known) or ("?" if infinite and not mine else str(max((s.n_infinite for s in mine), default=0)) if mine else "-")
        )
        cells.append("measured here" if mine else NO_INTERVAL)
        rows.append(tuple(cells))
    return Grid(tuple(header), tuple(rows))


def _mean(table: PublishedTable, ranking: PublishedRanking, team: str, metric: str, ours: Measured) -> str:
    value = table.value(team, metric)
    if math.isnan(value):
        return "-"
    rank = ranking.by_metric.get((team, metric), math.nan)
    text = shown_value(metric, value)
    if (team, metric) in ours:
        s = ours[team, metric]
        text += f" [{shown_value(metric, s.lower)}, {shown_value(metric, s.upper)}]"
    return text if math.isnan(rank) or len(table.metrics) == 1 else f"{text} ({shown_rank(rank)})"


def _rule_grid(table: PublishedTable, ranking: PublishedRanking) -> list[Grid]:
    """The final rank under every rule; nothing where all rules agree."""
    rules = ranks_by_rule(table)
    if len({tuple(ranks.get(team, math.nan) for team in ranking.teams) for ranks in rules.values()}) < 2:
        return []
    rows = tuple((team, *(shown_rank(ranks.get(team, math.nan)) for ranks in rules.values())) for team in ranking.teams)
    return [Grid(("rank with", *rules), rows)]


def _notes(table: PublishedTable, ranking: PublishedRanking, ours: Measured) -> list[str]:
    n = sorted({n for team in table.teams for n in table.n_of(team)})
    notes = [f"Published rows: {NO_INTERVAL}, so nobody can say how sure this order is; they are never resampled. (k): rank in the metric."]
    for metric in table.metrics:
        infinite = [team for team in ranking.teams if math.isinf(table.value(team, metric))]
        cases = table.infinite_cases(metric)
        if infinite and cases:
            notes.append(
                f"{metric}: {len(cases)} of {'/'.join(map(str, n))} cases ({', '.join(cases)}) decide the column: they make "
                f"{len(infinite)} of {len(ranking.teams)} means infinite, and those tie."
            )
        elif infinite:
            notes.append(
                f"{metric}: {len(infinite)} of {len(ranking.teams)} means are infinite and tie; which cases make them so is not published."
            )
    rules = ranks_by_rule(table)
    for team in table.highlight if rules else ():
        low, mean, high = (rules[f"ties {ties}"].get(team, math.nan) for ties in ("min", "average", "max"))
        if team in ranking.ranks and len({low, mean, high}) > 1:
            notes.append(
                f"{team} is {_ordinal(low)}, {_ordinal(mean)} or {_ordinal(high)} as ties of infinite means are broken by "
                "minimum, average or maximum rank."
            )
    notes += [f"{team}: not ranked, because no mean of {', '.join(lacking)} is published." for team, lacking in ranking.unranked.items()]
    if ours:
        arms = sorted({arm for arm, _ in ours})
        notes.append(f"Measured here, not published: {', '.join(arms)}. Nothing says that their cases are those of the published rows.")
    if len(n) > 1:
        notes.append(f"The means are over different numbers of cases ({', '.join(map(str, n))}), so their order says little.")
    return [*notes, *table.notes]


def _ordinal(rank: float) -> str:
    if math.isnan(rank) or rank != int(rank):
        return shown_rank(rank)
    whole = int(rank)
    ending = "th" if whole % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(whole % 10, "th")
    return f"{whole}{ending}"


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:g}"
