"""The command about boards: tables of means, rankings, and boards that others published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ichbench.errors import InputError

if TYPE_CHECKING:
    from ichbench.board.rank_board import RankBoard
    from ichbench.board.ranking import Ties
    from ichbench.scoring.score import Score


def board(
    scores: Annotated[
        list[Path], typer.Argument(help="scores.csv files or their folders; or a published board (leaderboard/instance2022)")
    ],
    out: Annotated[Path | None, typer.Option(help="write the board (CSV, Markdown) and the ranking (CSV, Markdown, JSON) here")] = None,
    base: Annotated[
        str | None, typer.Option(help="arm that the others are compared with (default: base, if there is one); or none")
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="instance2022, mean-then-rank, median-then-rank, rank-then-mean, test-then-rank, or none")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="rank by these, such as dice,hd (default: the scheme's)")] = None,
    ties: Annotated[
        str | None, typer.Option(help="rank of ties within a metric: min, average, max or dense (default: the scheme's)")
    ] = None,
    missing: Annotated[
        str, typer.Option(help="absent and undefined values: refuse, worst, drop, drop-case, or penalties dice=0,hd=374")
    ] = "refuse",
    infinite: Annotated[str, typer.Option(help="infinite values: exact, worst, drop, drop-case, or penalties hd=374")] = "exact",
    resamples: Annotated[int | None, typer.Option(min=1, help="resamples of the whole ranking (default 1000)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the ranking's resamples")] = 0,
    cases: Annotated[Path | None, typer.Option(help="cases.csv with group, site, ... (default: the one beside the scores)")] = None,
    group: Annotated[
        str | None, typer.Option(help="column of cases.csv whose cases are resampled together (default: group); or none")
    ] = None,
    where: Annotated[str | None, typer.Option(help="only cases with COLUMN=VALUE in cases.csv, such as site=A")] = None,
    table: Annotated[str | None, typer.Option(help="which table of a published board (default: its first)")] = None,
) -> None:
    """Make a board from score rows, and rank its arms; or show how a published board was ranked.

    Arms are ranked when there is no base, or with --rank. Holes in the scores are refused unless --missing says what they are worth.
    """
    from ichbench.board.published import is_published
    from ichbench.cases.files import check_writable
    from ichbench.scoring.tables import read_score_files

    if out is not None:
        check_writable(out)
    named = None if metrics is None else [name.strip() for name in metrics.split(",")]
    rule = _tie_rule(ties)
    published = [path for path in scores if is_published(path)]
    files = [path / "scores.csv" if path.is_dir() else path for path in scores if path not in published]
    rows = read_score_files(files, known_metrics=True)
    if published:
        given: dict[str, object] = {"--base": base, "--resamples": resamples, "--where": where}
        given |= {} if files else {"--cases": cases, "--group": group}
        _refuse_given(
            given | {"--missing": None if missing == "refuse" else missing, "--infinite": None if infinite == "exact" else infinite}
        )
        groups = _groups(_case_files(files, cases), group, rows)
        _published(published, files, rows, table, rank, rule, named, out, _shared(groups))
        return
    if table is not None:
        raise InputError("--table is for published boards, and there is none among the arguments")
    if not rows:
        raise InputError(f"{', '.join(map(str, files))}: no score rows after the header. Score a cohort first")
    described = _case_files(files, cases)
    if where is not None:
        rows = _only(rows, where, described)
    arms = sorted({row.arm for row in rows})
    if base not in (None, "none", *arms):
        raise InputError(f"--base {base!r} is not among the arms {', '.join(arms)}; give one of them, or none")
    chosen = base or ("base" if "base" in arms else "none")
    groups = _groups(described, group, rows)
    by_default = chosen == "none" and len(arms) > 1
    ranking = _ranking(rows, rank, by_default, named, rule, missing, infinite, resamples, seed, groups)
    _show(rows, None if chosen == "none" else chosen, ranking, missing != "refuse", named, out, _shared(groups))


def _ranking(
    rows: Sequence[Score], rank: str | None, by_default: bool, metrics: Sequence[str] | None, ties: Ties | None, missing: str,
    infinite: str, resamples: int | None, seed: int, groups: Mapping[str, str] | None,
) -> RankBoard | str | None:  # fmt: skip
    """The ranking; None where none was asked for; a word on why there is none where it was not asked for and cannot be."""
    from ichbench.board.cube import INFINITE_KINDS, MISSING_KINDS, parse_rule
    from ichbench.board.rank_board import build_ranking, ranking_metrics
    from ichbench.board.ranking import INSTANCE_METRICS, get_scheme
    from ichbench.board.resampling import DEFAULT_RESAMPLES

    asked = rank not in (None, "none") or missing != "refuse" or infinite != "exact" or ties is not None or resamples is not None
    asked = asked or metrics is not None
    if rank == "none" or not (asked or by_default):
        return None
    present = {row.metric for row in rows}
    scheme = rank or ("instance2022" if set(metrics or INSTANCE_METRICS) == set(INSTANCE_METRICS) <= present else "mean-then-rank")
    try:
        by = ranking_metrics(get_scheme(scheme), present, metrics)
        holes = parse_rule(missing, MISSING_KINDS, by, "--missing"), parse_rule(infinite, INFINITE_KINDS, by, "--infinite")
        return build_ranking(rows, scheme, by, ties, *holes, resamples or DEFAULT_RESAMPLES, seed, groups)
    except InputError as error:
        if asked:
            raise
        return f"not ranked: {error}"


def _show(
    rows: Sequence[Score],
    base: str | None,
    ranking: RankBoard | str | None,
    lenient: bool,
    metrics: Sequence[str] | None,
    out: Path | None,
    clusters: Mapping[str, str] | None,
) -> None:
    from ichbench.board.rank_board import RankBoard
    from ichbench.board.rank_render import ranking_text, write_ranking
    from ichbench.board.render import board_text, build_board, write_board
    from ichbench.board.summary import DEFAULT_METRICS

    written: list[Path] = []
    shown = tuple(dict.fromkeys((*DEFAULT_METRICS, *(metrics or ()))))
    try:
        made = build_board(rows, base=base, metrics=shown, clusters=clusters)
        typer.echo(board_text(made))
    except InputError as error:
        if not lenient:
            raise
        made = None
        typer.echo(f"no table of means: {error}\n")
    if isinstance(ranking, RankBoard):
        typer.echo(ranking_text(ranking), nl=False)
    elif ranking is not None:
        typer.echo(ranking)
    if out is not None:
        written += write_board(made, out) if made is not None else ()
        written += write_ranking(ranking, out) if isinstance(ranking, RankBoard) else ()
        typer.echo("\nwritten:\n" + "\n".join(f"  {path}" for path in written))


def _published(
    boards: Sequence[Path], files: Sequence[Path], rows: Sequence[Score], name: str | None, rank: str | None, ties: Ties | None,
    metrics: Sequence[str] | None, out: Path | None, clusters: Mapping[str, str] | None,
) -> None:  # fmt: skip
    from ichbench.board.published import read_tables, with_measured, with_published_rule
    from ichbench.board.published_render import published_text, write_published
    from ichbench.board.summary import summarise

    if len(boards) > 1:
        raise InputError(f"one published board at a time; these are {len(boards)}: {', '.join(map(str, boards))}")
    tables = read_tables(boards[0])
    names = [table.name for table in tables]
    if name is not None and name not in names:
        raise InputError(f"there is no table {name!r} in {boards[0]}; it has {', '.join(names)}")
    first = tables[names.index(name) if name is not None else 0]
    chosen = with_published_rule(first, rank, ties, metrics)
    summaries = summarise(rows, chosen.metrics, clusters=clusters) if rows else []
    if summaries:
        chosen = with_measured(chosen, summaries, f"measured here: {', '.join(map(str, files))}")
    measured = {(summary.arm, summary.metric): summary for summary in summaries}
    typer.echo(published_text([chosen], measured), nl=False)
    others = [other for other in tables if other.name != chosen.name]
    if others:
        typer.echo("\nother tables (--table NAME): " + "; ".join(f"{other.name} ({other.title})" for other in others))
    if out is not None:
        typer.echo("\nwritten:\n" + "\n".join(f"  {path}" for path in write_published([chosen, *others], out, measured)))


def _tie_rule(text: str | None) -> Ties | None:
    from ichbench.board.ranking import TIES

    if text is None:
        return None
    found = [rule for rule in TIES if rule == text]
    if not found:
        raise InputError(f"--ties {text!r} is not understood; choose one of {', '.join(TIES)}")
    return found[0]


def _refuse_given(given: Mapping[str, object]) -> None:
    named = [option for option, value in given.items() if value is not None]
    if named:
        raise InputError(
            f"{', '.join(named)}: published boards have means only, which are never resampled, filtered or mended; leave it out"
        )


def _case_files(files: Iterable[Path], given: Path | None) -> list[Path]:
    """The cases.csv that was given, or those beside the scores."""
    if given is not None:
        return [given / "cases.csv" if given.is_dir() else given]
    beside = dict.fromkeys(file.parent / "cases.csv" for file in files)
    return [path for path in beside if path.is_file()]


def _groups(described: Sequence[Path], column: str | None, rows: Iterable[Score]) -> dict[str, str] | None:
    """case -> group, where cases.csv has groups; a case without one is a group of its own."""
    from ichbench.board.runs import case_column, case_columns

    if column == "none" or not described:
        if column not in (None, "none"):
            raise InputError("--group needs a cases.csv; give one with --cases")
        return None
    if "group" not in {name for path in described for name in case_columns(path)} and column is None:
        return None
    values = case_column(described, column or "group")
    # a blank before a name that stands for a case cannot be part of a group, which is stripped
    of_case = {case: values.get(case) or f" {case}" for case in {row.case for row in rows}}
    return of_case if any(values.get(case) for case in of_case) else None


def _shared(groups: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Intervals are by patient where patients have several cases, as at the end of a study."""
    return groups if groups is not None and len(set(groups.values())) < len(groups) else None


def _only(rows: Sequence[Score], where: str, described: Sequence[Path]) -> list[Score]:
    from ichbench.board.runs import case_column

    column, equals, value = where.partition("=")
    if not equals or not column:
        raise InputError(f"--where {where!r} is not understood; give COLUMN=VALUE, such as site=A")
    if not described:
        raise InputError("--where needs a cases.csv beside the scores, or --cases")
    values = case_column(described, column)
    lacking = sorted({row.case for row in rows} - set(values))
    if lacking:
        raise InputError(f"{', '.join(map(str, described))} lacks {len(lacking)} of the scored cases, such as {lacking[0]!r}; complete it")
    kept = [row for row in rows if values[row.case] == value]
    if not kept:
        raise InputError(f"no scored case has {where}; {column} is {', '.join(sorted({repr(values[row.case]) for row in rows}))}")
    return kept
