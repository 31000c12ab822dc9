"""What `ichbench score` shows: a table with one row per metric, warnings, and progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

from ichbench.scoring.detection import detect, roc
from ichbench.scoring.pairs import Scored
from ichbench.scoring.protocol import METRICS, split_metric
from ichbench.scoring.tables import aggregate, by_metric

#: Fewer cases than this are done before anybody wonders.
QUIET_BELOW = 20
#: Notes of one kind that are spelled out.
SHOWN = 5

Interval = Callable[[str, Sequence[float]], tuple[float, float]]


def score_text(every: Sequence[Scored], interval: Interval) -> str:
    """Mean with its 95 % interval, median, sd, range and counts of every metric over the cases; plain values for a single case.

    interval   (metric, defined values) -> lower and upper end; intervals belong to boards, which this room does not know
    """
    rows = [row for scored in every for row in scored.rows]
    if len(every) == 1:
        lines = [(_title(row.metric), _number(row.value)) for row in rows]
        return f"case {every[0].case}\n" + _columns([("metric", "value"), *lines])
    values = by_metric(rows)
    table: list[tuple[str, ...]] = [
        ("metric", "mean", "95 % interval", "median", "sd", "min", "max", "n", "finite", "empty pred.", "empty ref.", "missing")
    ]
    for found in aggregate(rows):
        defined = [value for value in values[found.metric].values() if not math.isnan(value)]
        low, high = interval(found.metric, defined)
        mean = _number(found.mean) + (f" ({found.n_infinite})" if found.n_infinite else "")
        numbers = [_number(value) for value in (found.median, found.sd, found.minimum, found.maximum)]
        counts = (found.n, found.n_finite, found.n_empty_prediction, found.n_empty_reference, found.n_missing)
        table.append((_title(found.metric), mean, f"[{_number(low)}, {_number(high)}]", *numbers, *map(str, counts)))
    return f"{len(every)} cases\n" + _columns(table)


def detection_text(every: Sequence[Scored]) -> str:
    """Is there a bleed at all? Empty unless some references have one and some have none."""
    ml: dict[str, dict[str, float]] = {"reference_ml": {}, "predicted_ml": {}}
    for scored in every:
        for row in scored.rows:
            if row.metric in ml:
                ml[row.metric][scored.case] = row.value
    references, predictions = ml["reference_ml"], ml["predicted_ml"]
    if references.keys() != predictions.keys() or not 0 < sum(value > 0 for value in references.values()) < len(references):
        return ""
    found, curve = detect(references, predictions), roc(references, predictions)
    ends = [f"[{low:.3f}, {high:.3f}]" for low, high in (found.sensitivity_interval, found.specificity_interval)]
    return (
        f"case detection (any foreground): sensitivity {found.sensitivity:.3f} {ends[0]} of {found.tp + found.fn} cases with a bleed, "
        f"specificity {found.specificity:.3f} {ends[1]} of {found.tn + found.fp} without; "
        f"false-positive volume there: mean {found.false_positive_ml_mean:.3g}, max {found.false_positive_ml_max:.3g} ml; "
        f"area under the ROC over volume {curve.auc:.3f}"
    )


def warnings_of(every: Sequence[Scored], extra: Sequence[str], imageless: Sequence[str] = ()) -> list[str]:
    """What the user should know before quoting the table.

    extra       names of predictions without a reference
    imageless   cases without an image, where images were given
    """
    found: list[str] = []
    missing = [scored.case for scored in every if any(row.metric == "missing" and row.value for row in scored.rows)]
    if missing:
        found.append(f"{len(missing)} of {len(every)} cases have no prediction and are scored as empty: {_some(missing)}")
    if extra:
        found.append(f"{len(extra)} prediction(s) have no reference and are not scored: {_some(extra)}")
    if imageless:
        found.append(f"{len(imageless)} of {len(every)} cases have no image, so nothing is said about their head: {_some(imageless)}")
    values = by_metric(row for scored in every for row in scored.rows)
    infinite: dict[tuple[str, ...], list[str]] = {}
    undefined: dict[str, int] = {}
    for metric, cases in values.items():
        endless = tuple(case for case, value in cases.items() if math.isinf(value))
        if endless and len(every) > 1:
            infinite.setdefault(endless, []).append(metric)
        if lacking := sum(map(math.isnan, cases.values())):
            undefined[metric] = lacking
    for endless, metrics in infinite.items():
        found.append(f"the mean of {', '.join(metrics)} is infinite because of {len(endless)} of {len(every)} cases: {_some(endless)}")
    if undefined:
        counts = ", ".join(f"{metric} ({n})" for metric, n in undefined.items())
        found.append(f"undefined (nan) in so many cases, which are not in the mean: {counts}")
    odd: dict[str, list[tuple[str, str]]] = {}
    for scored in every:
        for anomaly in scored.anomalies:
            odd.setdefault(anomaly.kind, []).append((scored.case, anomaly.text))
    if headless := [case for case, _ in odd.pop("no_head", [])]:
        found.append(
            f"no head was found in the image of {len(headless)} of {len(every)} cases (first: {headless[0]}): "
            "voxels outside the head were not looked for there. Check that these are CTs in HU"
        )
    for kind, ones in odd.items():
        names = "" if len(every) == 1 else f" in {len(ones)} of {len(every)} cases ({_some([case for case, _ in ones])}), in the first"
        found.append(f"{kind}{names}: {ones[0][1]}")
    notes = list(dict.fromkeys(note for scored in every for note in scored.notes))
    more = [f"and {len(notes) - SHOWN} more like these"] if len(notes) > SHOWN else []
    return found + notes[:SHOWN] + more


class Progress:
    """Counts cases on a stream: a bar on a terminal, elsewhere a line for every tenth, nothing for a few cases. A context manager."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total = total
        self.stream = stream
        self.done = 0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if self.total >= QUIET_BELOW and self.stream.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(*Bar.get_default_columns(), console=Console(file=self.stream), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("scoring", total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def each(self, every: Iterable[Scored]) -> Iterable[Scored]:
        """Hand them through, counting."""
        for scored in every:
            yield scored
            tenths = 10 * self.done // self.total
            self.done += 1
            if self.bar is not None:
                self.bar.update(self.task, completed=self.done)
            elif self.total >= QUIET_BELOW and 10 * self.done // self.total > tenths:
                self.stream.write(f"scored {self.done} of {self.total} cases\n")
                self.stream.flush()


def _title(metric: str) -> str:
    unit = METRICS[split_metric(metric)[0]].unit
    return metric if unit in ("", "0/1") else f"{metric} [{unit}]"


def _number(value: float) -> str:
    """Four digits, none of them behind the point from a thousand on."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else repr(value)
    return (f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:#.4g}").removesuffix(".")


def _columns(table: Sequence[tuple[str, ...]]) -> str:
    """The first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
