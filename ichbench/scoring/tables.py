"""Tables of scores: the long CSV that everything is a fold over, the wide one for spreadsheets, and sums over cases."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichbench.cases.files import write_atomically
from ichbench.errors import InputError
from ichbench.scoring.protocol import MARKS, METRICS, Protocol, get_protocol, split_metric, why_impossible
from ichbench.scoring.score import Score
from ichbench.scoring.strict_csv import Line, check_names, in_short, numbers_of, read_lines

HEADER = ("arm", "fold", "seed", "case", "metric", "value")


@dataclass(frozen=True)
class Aggregate:
    """One metric over the cases of one arm. Cases whose value is nan (undefined) are not among n; infinite ones are.

    mean               inf where one value is; independent of the order of the cases
    sd                 divisor n - 1; nan below two values and where one is infinite
    percentile_25, 75  linear between the neighbours, as pandas has them; `median` is the 50th
    n_infinite         cases among n that make the mean infinite
    n_empty_prediction, n_empty_reference, n_missing   over all cases, for `dice/2` those of label 2
    """

    metric: str
    n: int
    mean: float
    sd: float
    minimum: float
    percentile_25: float
    median: float
    percentile_75: float
    maximum: float
    n_infinite: int
    n_undefined: int
    n_empty_prediction: int
    n_empty_reference: int
    n_missing: int

    @property
    def n_finite(self) -> int:
        """Cases with a finite value."""
        return self.n - self.n_infinite


def aggregate(rows: Iterable[Score]) -> list[Aggregate]:
    """Every metric of one arm over its cases, in the order in which the rows first name it. InputError for a number that comes twice."""
    values = by_metric(rows)
    marked = {name: sum(value == 1.0 for value in cases.values()) for name, cases in values.items()}

    def marks(metric: str) -> tuple[int, ...]:
        part = metric.partition("/")[2]
        return tuple(marked.get(f"{mark}/{part}" if part and mark != "missing" else mark, 0) for mark in MARKS)

    found = []
    for metric, cases in values.items():
        if metric.partition("/")[0] in MARKS:
            continue
        numbers = sorted(value for value in cases.values() if not math.isnan(value))
        low, middle, high = percentiles(numbers, (25.0, 50.0, 75.0))
        n_missing, n_empty_prediction, n_empty_reference = marks(metric)
        found.append(
            Aggregate(
                metric=metric,
                n=len(numbers),
                mean=_mean(numbers),
                sd=_sd(numbers),
                minimum=numbers[0] if numbers else math.nan,
                percentile_25=low,
                median=middle,
                percentile_75=high,
                maximum=numbers[-1] if numbers else math.nan,
                n_infinite=sum(map(math.isinf, numbers)),
                n_undefined=len(cases) - len(numbers),
                n_empty_prediction=n_empty_prediction,
                n_empty_reference=n_empty_reference,
                n_missing=n_missing,
            )
        )
    return found


def by_metric(rows: Iterable[Score]) -> dict[str, dict[str, float]]:
    """metric -> case -> value, for the rows of one arm, fold and seed."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        cases = values.setdefault(row.metric, {})
        if row.case in cases:
            raise InputError(f"two values for {_where(row)}; cases are summed up for one arm, fold and seed at a time")
        cases[row.case] = row.value
    return values


def percentiles(ordered: Sequence[float], percents: Sequence[float]) -> list[float]:
    """Linear percentiles of sorted values, which may be infinite; nan for none.

    Equal to NumPy and pandas for finite values. Those give nan where a percentile lies exactly on a value beside an infinite
    one (the median of 1, 2, inf, by way of 2 + 0 * inf); here it is that value.
    """
    if not ordered:
        return [math.nan] * len(percents)
    if all(map(math.isfinite, ordered)):
        return [float(value) for value in np.percentile(ordered, percents)]
    found = []
    for percent in percents:
        place = percent / 100.0 * (len(ordered) - 1)
        index = int(place)
        before, after = ordered[index], ordered[min(index + 1, len(ordered) - 1)]
        on_value = place == index or before == after
        found.append(before if on_value else before + (after - before) * (place - index))
    return found


def wide_csv(rows: Iterable[Score], protocol: str | Protocol) -> str:
    """One line per case (and arm, fold, seed), sorted; metrics in the protocol's order, then those of labels and regions, then the marks.

    Numbers as in scores.csv, an empty cell where a case has no such row.
    """
    order = (*get_protocol(protocol).metrics, *MARKS)
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    metrics: dict[str, None] = {}
    for row in rows:
        line = lines.setdefault(row[:4], {})
        if row.metric in line:
            raise InputError(f"two rows for {_where(row)}; each number may appear once")
        line[row.metric] = repr(float(row.value))
        metrics.setdefault(row.metric)
    parts = list(dict.fromkeys(metric.partition("/")[2] for metric in metrics))
    place = {name: index for index, name in enumerate(order)}

    def rank(metric: str) -> tuple[bool, int, int]:
        name, _, part = metric.partition("/")
        return name in MARKS, parts.index(part), place.get(name, len(place))

    columns = sorted(metrics, key=rank)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADER[:4], *columns])
    writer.writerows([*key, *(line.get(column, "") for column in columns)] for key, line in sorted(lines.items()))
    return text.getvalue()


def write_wide(path: Path, rows: Iterable[Score], protocol: str | Protocol) -> None:
    """Write `wide_csv`; the file appears whole or not at all. Errors as in `write_scores`."""
    every = list(rows)
    _check_names(Path(path), every)
    write_atomically(Path(path), wide_csv(every, protocol).encode())


def write_scores(path: Path, rows: Iterable[Score]) -> None:
    """Write rows as CSV: sorted by (arm, fold, seed, case, metric), LF, UTF-8, shortest floats that read back the same.

    The file appears whole or not at all, and its folder is made if needed. InputError for two rows of one number or a
    name that is empty or not printable.
    """
    target = Path(path)
    ordered = sorted(rows, key=lambda row: row[:5])
    for index, row in enumerate(ordered):
        if index and ordered[index - 1][:5] == row[:5]:
            raise InputError(f"{target}: two rows for {_where(row)}; each number may appear once")
    _check_names(target, ordered)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows((*row[:5], repr(float(row.value))) for row in ordered)
    write_atomically(target, text.getvalue().encode())


def read_scores(path: Path) -> list[Score]:
    """Rows of a scores.csv in the order of the file; what is read and what is refused: see `strict_csv`.

    InputError naming file, line and column for anything that is not such a file, and listing numbers that are given twice.
    """
    return read_score_files([path])


def read_score_files(paths: Sequence[Path], known_metrics: bool = False) -> list[Score]:
    """Rows of several scores.csv, one file after the other; a number may come once in all of them together.

    `known_metrics`: refuse rows of metrics that are not declared in `protocol.METRICS`, with the nearest that is, and values that
    a metric cannot have (a Dice of 57, a negative distance).
    """
    rows: list[Score] = []
    seen: dict[tuple[str, ...], str] = {}
    repeated: list[str] = []
    sources = [Path(path) for path in paths]
    for source in sources:
        if sum(other.resolve() == source.resolve() for other in sources) > 1:
            raise InputError(f"{source} is given twice; give every table of scores once")
        lines = read_lines(source, HEADER)
        check_names(source, lines, range(5), HEADER, "fold and seed are '-' where there is none")
        if known_metrics:
            _check_metrics(source, lines)
        values = numbers_of(source, lines, 5, "value")
        if known_metrics:
            _check_ranges(source, lines, values)
        for line, value in zip(lines, values, strict=True):
            arm, fold, seed, case, metric = line.cells[:5]
            row = Score(arm, fold, seed, case, metric, value)
            where = f"{source}, line {line.number}"
            first = seen.get(row[:5])
            if first is None:
                seen[row[:5]] = where
            else:
                at = first.removeprefix(f"{source}, ") if first.startswith(f"{source}, ") else first
                repeated.append(f"{where}: {_where(row)} was already given in {at}")
            rows.append(row)
    if repeated:
        raise InputError(in_short(repeated) + ". Keep one row of each number")
    return rows


def _check_metrics(source: Path, lines: Sequence[Line]) -> None:
    wrong: dict[str, list[int]] = {}
    for line in lines:
        try:
            split_metric(line.cells[4])
        except InputError:
            wrong.setdefault(line.cells[4], []).append(line.number)
    if wrong:
        texts = []
        for metric, numbers in wrong.items():
            near = difflib.get_close_matches(metric.strip().lower(), METRICS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            texts.append(f"line {numbers[0]}: there is no metric {metric!r} (column 5, {len(numbers)} such rows){hint}")
        raise InputError(f"{source}, {in_short(texts)}. Metrics are {', '.join(METRICS)}")


def _check_ranges(source: Path, lines: Sequence[Line], values: Sequence[float]) -> None:
    wrong = [
        f"line {line.number}: the value is {line.cells[5]!r} (column 6): {why}"
        for line, value in zip(lines, values, strict=True)
        if (why := why_impossible(line.cells[4], value))
    ]
    if wrong:
        raise InputError(f"{source}, {in_short(wrong)}. Correct the rows: one impossible value can turn a mean, a rank or a verdict")


def _check_names(target: Path, rows: Iterable[Score]) -> None:
    for row in rows:
        if not all(name and name.isprintable() for name in row[:5]):
            raise InputError(f"{target}: {_where(row)} has a name that is empty or not printable")


def _mean(numbers: Sequence[float]) -> float:
    if not numbers or (math.inf in numbers and -math.inf in numbers):
        return math.nan
    return math.fsum(numbers) / len(numbers)


def _sd(numbers: Sequence[float]) -> float:
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return math.nan
    mean = _mean(numbers)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1))


def _where(row: Score) -> str:
    return f"arm {row.arm!r}, fold {row.fold!r}, seed {row.seed!r}, case {row.case!r}, metric {row.metric!r}"
