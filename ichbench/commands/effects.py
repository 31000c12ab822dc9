"""The command about effects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ichbench.errors import InputError


def effects(
    run: Annotated[Path, typer.Argument(help="folder of a finished run-ablation or board, or a scores.csv")],
    base: Annotated[str | None, typer.Option(help="arm that the others are compared with (default: the study's base)")] = None,
    metrics: Annotated[str | None, typer.Option(help="such as dice,nsd@1.0 (default: dice,nsd,rvd,hd,hd95)")] = None,
    cluster: Annotated[str, typer.Option(help="draw whole patients or sites: auto, group, site, none")] = "auto",
    by: Annotated[str | None, typer.Option(help="strata, such as volume,subtype,site; or none (default: all that cases.csv has)")] = None,
    margin: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE: what counts as equivalent")] = None,
    interval: Annotated[str, typer.Option(help="outer, t, percentile, expanded, bca, bootstrap-t")] = "outer",
    resamples: Annotated[int, typer.Option(min=1, help="bootstrap resamples")] = 10_000,
    out: Annotated[Path | None, typer.Option(help="write effects.csv and effects.md here")] = None,
) -> None:
    """Did an arm help? Differences to the base with intervals, p, strata, factors and learning curves, from score rows alone."""
    from ichbench.board.intervals import METHODS
    from ichbench.board.report import report_text, write_report
    from ichbench.board.runs import read_run, report_of_run
    from ichbench.board.strata import KINDS
    from ichbench.board.summary import DEFAULT_METRICS

    method = next((name for name in METHODS if name == interval), None)
    if method is None:
        raise InputError(f"--interval {interval!r} is not known; give one of {', '.join(METHODS)}")
    kinds = KINDS if by is None else () if by == "none" else tuple(name.strip() for name in by.split(","))
    chosen = DEFAULT_METRICS if metrics is None else tuple(name.strip() for name in metrics.split(","))
    found = read_run(run)
    if by not in (None, "none") and not found.cases:
        raise InputError(f"--by {by}: {run} has no cases.csv, which says what stratum a case is in")
    asked = by not in (None, "none")
    report = report_of_run(found, base, chosen, cluster, kinds, asked, margins=_margins(margin or []), method=method, resamples=resamples)
    typer.echo(report_text(report), nl=False)
    if out is not None:
        typer.echo("\nwritten:\n" + "\n".join(f"  {path}" for path in write_report(report, out)))


def _margins(texts: list[str]) -> dict[str, float]:
    """metric -> margin of METRIC=VALUE."""
    from ichbench.scoring.protocol import split_metric

    found: dict[str, float] = {}
    for text in texts:
        metric, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not equals or not 0 < number < float("inf"):
            raise InputError(f"--margin {text!r} is not understood; give METRIC=VALUE with a value above 0, such as dice=0.02")
        split_metric(metric)
        found[metric] = number
    return found
