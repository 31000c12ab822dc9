"""Boards that others published: means without cases. They are ranked as they are, never resampled, and never pass for measured.

`published.csv` has the columns team, metric, statistic, value, n, source, in any order of rows. `statistic` is mean, sd, median, min, max,
q25, q75, place (metric `-`: the place that was reported) or `infinite:CASE` (value 1: this case's value is infinite). `tables.toml`
beside it says which sources make up a table and how that is ranked; without it every source is a table of its own.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ichbench.board.cube import better_of
from ichbench.board.ranking import SCHEMES, TIES, Ties, get_scheme, ranks_of_means
from ichbench.board.summary import ArmSummary, listed
from ichbench.errors import InputError
from ichbench.scoring.protocol import split_metric, why_impossible
from ichbench.scoring.strict_csv import check_names, in_short, numbers_of, read_lines

HEADER = ("team", "metric", "statistic", "value", "n", "source")
STATISTICS = ("mean", "sd", "median", "min", "max", "q25", "q75", "place")
INFINITE = "infinite:"
#: Schemes that need no cases.
PUBLISHED_SCHEMES = ("instance2022", "mean-then-rank")
#: The scheme of a table that is only shown.
UNRANKED = "none"
PUBLISHED_NAME, TABLES_NAME = "published.csv", "tables.toml"
_KEYS = {"name": str, "title": str, "sources": list, "scheme": str, "ties": str, "metrics": list, "notes": list, "highlight": list}


@dataclass(frozen=True)
class PublishedRow:
    """One published number and where it stands."""

    team: str
    metric: str
    statistic: str
    value: float
    n: int
    source: str


@dataclass(frozen=True)
class PublishedTable:
    """Rows that belong together, and how they are ranked: `metrics` in the order of the columns, the ranked ones."""

    name: str
    title: str
    rows: tuple[PublishedRow, ...]
    scheme: str
    ties: Ties
    metrics: tuple[str, ...]
    notes: tuple[str, ...] = ()
    highlight: tuple[str, ...] = ()

    @property
    def teams(self) -> tuple[str, ...]:
        """In the order in which the rows first name them."""
        return tuple(dict.fromkeys(row.team for row in self.rows))

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.source for row in self.rows))

    def value(self, team: str, metric: str, statistic: str = "mean") -> float:
        """The published number; nan where there is none."""
        found = [row.value for row in self.rows if (row.team, row.metric, row.statistic) == (team, metric, statistic)]
        return found[0] if found else math.nan

    def n_of(self, team: str) -> tuple[int, ...]:
        """The numbers of cases behind a team's means."""
        return tuple(sorted({row.n for row in self.rows if row.team == team and row.statistic == "mean"}))

    def infinite_cases(self, metric: str, team: str | None = None) -> tuple[str, ...]:
        """Cases whose value is known to be infinite, for one team or for any."""
        cases = {
            row.statistic.removeprefix(INFINITE)
            for row in self.rows
            if row.metric == metric and row.statistic.startswith(INFINITE) and row.value == 1.0 and team in (None, row.team)
        }
        return tuple(sorted(cases))


@dataclass(frozen=True)
class PublishedRanking:
    """The order of a table's teams. Teams without all ranked metrics are not ranked at all: rank nan."""

    teams: tuple[str, ...]
    ranks: Mapping[str, float]
    by_metric: Mapping[tuple[str, str], float]
    combined: Mapping[str, float]
    unranked: Mapping[str, tuple[str, ...]]


def is_published(path: Path) -> bool:
    """Whether a command-line argument is a published board: a folder with published.csv, or such a file."""
    return (path / PUBLISHED_NAME).is_file() or (path.name == PUBLISHED_NAME and path.is_file())


def read_published(path: Path) -> list[PublishedRow]:
    """The rows of a published.csv. InputError with line and column, and for one number that comes twice (all are listed)."""
    lines = read_lines(path, HEADER)
    check_names(path, lines, (0, 1, 2, 5), HEADER, "metric is '-' for a place")
    rows: list[PublishedRow] = []
    wrong: list[str] = []
    seen: dict[tuple[str, str, str, str], int] = {}
    for line, value, n in zip(lines, numbers_of(path, lines, 3, "value"), numbers_of(path, lines, 4, "n"), strict=True):
        team, metric, statistic, _, _, source = line.cells
        wrong += [f"line {line.number}: {problem}" for problem in _problems(metric, statistic, value, n)]
        key = (team, metric, statistic, source)
        first = seen.setdefault(key, line.number)
        if first != line.number:
            wrong.append(f"line {line.number}: {metric} {statistic} of {team!r} was already given in line {first} by the same source")
        rows.append(PublishedRow(team, metric, statistic, value, int(n) if math.isfinite(n) else 0, source))
    if wrong:
        raise InputError(f"{path}, {in_short(wrong)}")
    if not rows:
        raise InputError(f"{path}: has no rows after its header, so there is nothing to rank")
    return rows


def read_tables(path: Path) -> list[PublishedTable]:
    """The tables of a published board (a folder, or its published.csv), the main one first. InputError for anything unclear."""
    file = path / PUBLISHED_NAME if path.is_dir() else path
    rows = read_published(file)
    declared = file.parent / TABLES_NAME
    if not declared.is_file():
        return [
            _table({"name": source, "title": source, "sources": [source]}, rows, file) for source in dict.fromkeys(r.source for r in rows)
        ]
    try:
        tables = tomllib.loads(declared.read_text(encoding="utf-8")).get("table", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{declared} cannot be read: {error}") from error
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{declared}: needs at least one [[table]]")
    found = [_table(table, rows, declared) for table in tables]
    _refuse_twice(f"{declared}: the tables have the name", [table.name for table in found])
    taken = [source for table in found for source in table.sources]
    for source in dict.fromkeys(row.source for row in rows):
        if taken.count(source) != 1:
            raise InputError(f"{declared}: the source {source!r} of {file.name} is in {taken.count(source)} tables; name it in exactly one")
    return found


def rank_published(table: PublishedTable, ties: Ties | None = None, metrics: Sequence[str] | None = None) -> PublishedRanking:
    """Rank a table's teams by their published means. A team that lacks a ranked metric is named in `unranked`, never ranked on the rest.

    With the scheme none there are no ranks, and the teams stand in the order of their published places, else of the rows.
    """
    if table.scheme == UNRANKED:
        place = {team: table.value(team, "-", "place") for team in table.teams}
        teams = tuple(sorted(table.teams, key=lambda team: (math.isnan(place[team]), place[team] if place[team] > 0 else 0.0)))
        return PublishedRanking(teams, {}, {}, {}, {})
    ranked_by = tuple(metrics or table.metrics)
    lacking = {team: tuple(m for m in ranked_by if math.isnan(table.value(team, m))) for team in table.teams}
    teams = tuple(team for team in table.teams if not lacking[team])
    if not teams:
        raise InputError(f"{table.title}: no team has a mean of each of {', '.join(ranked_by)}, so nothing can be ranked")
    values = np.array([[_lower(metric, table.value(team, metric)) for team in teams] for metric in ranked_by])
    by_metric, combined, final = ranks_of_means(values, ties or table.ties)
    order = sorted(range(len(teams)), key=lambda a: (final[a], combined[a], teams[a]))
    return PublishedRanking(
        teams=tuple(teams[a] for a in order),
        ranks={teams[a]: float(final[a]) for a in order},
        by_metric={(teams[a], metric): float(by_metric[m, a]) for a in order for m, metric in enumerate(ranked_by)},
        combined={teams[a]: float(combined[a]) for a in order},
        unranked={team: names for team, names in lacking.items() if names},
    )


def ranks_by_rule(table: PublishedTable) -> dict[str, dict[str, float]]:
    """rule -> team -> rank: every tie rule, and every ranked metric left out (if there are several). Nothing if it is not ranked."""
    if table.scheme == UNRANKED:
        return {}
    rules: dict[str, dict[str, float]] = {f"ties {ties}": dict(rank_published(table, ties).ranks) for ties in TIES}
    if len(table.metrics) > 1:
        full = set(rank_published(table).teams)
        for left_out in table.metrics:
            ranks = rank_published(table, metrics=[metric for metric in table.metrics if metric != left_out]).ranks
            rules[f"without {left_out}"] = {team: rank for team, rank in ranks.items() if team in full}
    return rules


def with_published_rule(table: PublishedTable, scheme: str | None, ties: Ties | None, metrics: Sequence[str] | None) -> PublishedTable:
    """The table ranked another way, or (scheme none) not at all. By other metrics than its scheme prescribes it is mean-then-rank.

    InputError for a scheme that needs cases, metrics that the asked scheme does not rank by, and metrics that come twice.
    """
    chosen = table.scheme if scheme is None else UNRANKED if scheme == UNRANKED else get_scheme(scheme).name
    if chosen not in (*PUBLISHED_SCHEMES, UNRANKED):
        raise InputError(
            f"{chosen} needs the value of every case, and published boards have means only; choose {' or '.join(PUBLISHED_SCHEMES)}"
        )
    _refuse_twice("--metrics names", metrics or ())
    prescribed = SCHEMES[chosen].metrics if chosen != UNRANKED else None
    if metrics is not None and prescribed is not None and set(metrics) != set(prescribed):
        if scheme is not None:
            raise InputError(f"{chosen} ranks by {', '.join(prescribed)}; for others choose another scheme, such as mean-then-rank")
        chosen = "mean-then-rank"
    by = tuple(metrics or (prescribed if scheme is not None else None) or table.metrics)
    for metric in by:
        better_of(metric)
    return replace(table, scheme=chosen, ties=ties or table.ties, metrics=by)


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"{what} {listed(repeated)} twice; each counts once")


def _lower(metric: str, value: float) -> float:
    return value if better_of(metric) == "lower" else -value


def _problems(metric: str, statistic: str, value: float, n: float) -> list[str]:
    found = []
    if not (1 <= n <= 1e9 and n == int(n)):
        found.append(f"n is {n:g} (column 5); it is the number of cases, a whole number from 1")
    if metric != "-":
        try:
            split_metric(metric)
        except InputError as error:
            found.append(f"(column 2) {error}")
        else:
            # a spread has the unit of its metric, and none is negative
            why = "sd cannot be below 0" if statistic == "sd" and value < 0 else ""
            if statistic != "sd" and statistic in STATISTICS:
                why = why_impossible(metric, value)
            found += [f"the value is {value:g} (column 4): {why}"] if why else []
    elif statistic == "place" and not 1 <= value < math.inf:
        found.append(f"the value is {value:g} (column 4): a place is 1 or more")
    if statistic.startswith(INFINITE):
        if statistic == INFINITE or value not in (0.0, 1.0) or metric == "-":
            found.append(f"{statistic!r} (column 3) names a case after the colon, a metric, and has the value 1")
    elif statistic not in STATISTICS:
        found.append(f"there is no statistic {statistic!r} (column 3); choose one of {', '.join(STATISTICS)}, {INFINITE}CASE")
    elif (statistic == "place") != (metric == "-"):
        found.append("a place, and nothing else, has the metric '-'")
    return found


def _table(given: Mapping[str, Any], rows: Sequence[PublishedRow], path: Path) -> PublishedTable:
    strange = [key for key, value in given.items() if key not in _KEYS or not isinstance(value, _KEYS[key])]
    strange += [key for key, value in given.items() if isinstance(value, list) and not all(isinstance(item, str) for item in value)]
    if strange or "name" not in given or not given.get("sources"):
        raise InputError(
            f"{path}: a [[table]] has name, sources, and perhaps {', '.join(_KEYS)}; not clear: {listed(strange) or 'name, sources'}"
        )
    for key in ("sources", "metrics", "highlight"):
        _refuse_twice(f"{path}: table {given['name']!r}: {key} names", given.get(key, ()))
    members = tuple(row for row in rows if row.source in given["sources"])
    lacking = [source for source in given["sources"] if source not in {row.source for row in rows}]
    if lacking:
        raise InputError(f"{path}: no row has the source {lacking[0]!r} of table {given['name']!r}; check the spelling")
    scheme = str(given.get("scheme", "mean-then-rank"))
    if scheme not in PUBLISHED_SCHEMES or given.get("ties", "min") not in TIES:
        raise InputError(f"{path}: table {given['name']!r}: scheme is one of {', '.join(PUBLISHED_SCHEMES)}, ties one of {', '.join(TIES)}")
    repeated = _twice(members)
    if repeated:
        raise InputError(f"{path}: table {given['name']!r} has two values, by two sources, of {listed(repeated)}; a table can show one")
    known = dict.fromkeys(row.metric for row in members if row.statistic == "mean" and split_metric(row.metric))
    by = tuple(given.get("metrics") or SCHEMES[scheme].metrics or known)
    prescribed = SCHEMES[scheme].metrics
    if prescribed is not None and set(by) != set(prescribed):
        raise InputError(
            f"{path}: table {given['name']!r}: {scheme} ranks by {', '.join(prescribed)}; for others the scheme is mean-then-rank"
        )
    for metric in by:
        better_of(metric)
    if unknown := [team for team in given.get("highlight", ()) if team not in {row.team for row in members}]:
        raise InputError(f"{path}: table {given['name']!r}: highlight names {listed(unknown)}, and no row has such a team")
    ties: Ties = next(rule for rule in TIES if rule == given.get("ties", "min"))
    notes, highlight = tuple(map(str, given.get("notes", ()))), tuple(map(str, given.get("highlight", ())))
    return PublishedTable(str(given["name"]), str(given.get("title", given["name"])), members, scheme, ties, by, notes, highlight)


def _twice(rows: Sequence[PublishedRow]) -> list[str]:
    keys = [(row.team, row.metric, row.statistic) for row in rows]
    return sorted({" ".join(key) for key in keys if keys.count(key) > 1})


def shown_metrics(table: PublishedTable) -> tuple[str, ...]:
    """The ranked metrics, then the others that have a mean."""
    others = dict.fromkeys(row.metric for row in table.rows if row.statistic == "mean")
    return tuple(dict.fromkeys((*table.metrics, *others)))


def with_measured(table: PublishedTable, summaries: Sequence[ArmSummary], source: str) -> PublishedTable:
    """The table with arms that were scored here as further rows; `published_render` marks them.

    InputError: an arm that is called like a team, lacks a ranked metric, or has cases in which one is undefined.
    """
    arms = tuple(dict.fromkeys(summary.arm for summary in summaries))
    have = {(summary.arm, summary.metric): summary for summary in summaries}
    for arm in arms:
        if arm in table.teams:
            raise InputError(f"the arm {arm!r} is called like a published team; rename it, so that nobody takes one for the other")
        lacking = [metric for metric in table.metrics if (arm, metric) not in have]
        if lacking:
            raise InputError(
                f"the arm {arm!r} has no {listed(lacking)}, which {table.name!r} ranks by; score it with the protocol instance2022"
            )
        holes = [f"{metric} ({have[arm, metric].n_undefined} cases)" for metric in table.metrics if have[arm, metric].n_undefined]
        if holes:
            raise InputError(f"the arm {arm!r} is undefined in {listed(holes)}, and is not ranked on the rest beside published means")
    added = tuple(PublishedRow(s.arm, s.metric, "mean", s.mean, s.n, source) for s in summaries)
    return replace(table, rows=table.rows + added)
