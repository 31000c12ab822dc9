"""What other programs read: nnU-Net's summary.json, grand-challenge's metrics.json, and the protocol beside a CSV.

Each says which protocol it follows, what an empty mask gets, and how many cases were empty or missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ichbench.cases.files import write_atomically
from ichbench.errors import InputError
from ichbench.scoring.pairs import Scored, Voxels
from ichbench.scoring.protocol import MARKS, METRICS, Protocol, split_metric
from ichbench.scoring.score import Labels, Score, regions_of
from ichbench.scoring.tables import Aggregate, aggregate, by_metric, write_scores, write_wide

#: Names of the INSTANCE 2022 server. A metric with a parameter, and every other metric, keeps the name of its rows.
SERVER_NAMES = {"dice": "DiceCoefficient", "nsd": "SurfaceDice", "hd": "HausdorffDistance", "rvd": "RelativeVolumeDifference"}
NNUNET_METRICS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")


@dataclasses.dataclass(frozen=True)
class Targets:
    """The files that are asked for; a CSV gets its protocol beside it, `scores.csv` in `scores.protocol.json`."""

    scores: Path | None = None
    wide: Path | None = None
    summary: Path | None = None
    metrics: Path | None = None

    def paths(self) -> list[Path]:
        """Everything that will be written, in the order in which it is."""
        beside = [protocol_path(path) for path in (self.scores, self.wide) if path is not None]
        given = [path for path in (self.scores, self.wide, self.summary, self.metrics) if path is not None]
        return [*given, *dict.fromkeys(beside)]

    def check(self, inputs: Iterable[Path]) -> None:
        """Before anything is computed: InputError for outputs of one name, an output that is an input, a place that cannot be written."""
        paths = self.paths()
        places = [path.resolve() for path in paths]
        sources = {path.resolve() for path in inputs}
        for path, place in zip(paths, places, strict=True):
            if places.count(place) > 1:
                raise InputError(f"{path} would be written twice (a CSV brings its .protocol.json); give every output its own name")
            if place in sources:
                raise InputError(f"{path} is one of the files to be read; give the output another name")
            folder = next(parent for parent in place.parents if parent.exists())
            if place.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
                what = "is a folder" if place.is_dir() else f"cannot be written: {folder} is not a folder that may be written to"
                raise InputError(f"{path} {what}; give the path of a file")

    def write(self, every: Sequence[Scored], protocol: Protocol, labels: Labels | None) -> list[Path]:
        """Write them all; what cannot be written is found before the first file appears. Returns the paths."""
        rows = [row for scored in every for row in scored.rows]
        texts: dict[Path, str] = {}
        if self.summary is not None:
            texts[self.summary] = summary_json(every, labels)
        if self.metrics is not None:
            texts[self.metrics] = metrics_json(every, protocol)
        for path in (self.scores, self.wide):
            if path is not None:
                texts[protocol_path(path)] = protocol_json(protocol, rows)
        if self.scores is not None:
            write_scores(self.scores, rows)
        if self.wide is not None:
            write_wide(self.wide, rows, protocol)
        for path, text in texts.items():
            write_atomically(path, text.encode())
        return self.paths()


def protocol_path(table: Path) -> Path:
    """Where the protocol of a CSV is written: `scores.protocol.json` beside `scores.csv`."""
    return table.with_name(f"{table.name.removesuffix(table.suffix)}.protocol.json")


def protocol_facts(protocol: Protocol) -> dict[str, Any]:
    """A protocol as JSON: every field, what each metric is, and what an empty mask gets ("formula": what the formula says).

    Numbers that JSON lacks are spelled "inf" and "nan".
    """
    fields = {field.name: _spelled(getattr(protocol, field.name), None) for field in dataclasses.fields(protocol)}
    metrics = {}
    for key in protocol.metrics:
        about = METRICS[split_metric(key)[0]]
        rule = {name: value for name, value in dataclasses.asdict(protocol.empty_rule(key)).items() if name != "metric"}
        metrics[key] = {"text": about.text, "unit": about.unit, "better": about.better, "empty_masks": _spelled(rule, "formula")}
    return {name: value for name, value in fields.items() if name != "empties"} | {"metrics": metrics}


def protocol_json(protocol: Protocol, rows: Iterable[Score]) -> str:
    """What goes beside a CSV: the protocol, and how many cases were empty or missing."""
    return _json({"protocol": protocol_facts(protocol), "cases": case_counts(rows)})


def case_counts(rows: Iterable[Score]) -> dict[str, int]:
    """Number of cases, and of those with an empty or missing mask."""
    values = by_metric(row for row in rows if row.metric in MARKS)
    counts = {f"n_{mark}": sum(value == 1.0 for value in values.get(mark, {}).values()) for mark in MARKS}
    return {"n": max((len(cases) for cases in values.values()), default=0)} | counts


def metrics_json(every: Sequence[Scored], protocol: Protocol) -> str:
    """The metrics.json of a grand-challenge evaluation (evalutils): values per case, and aggregates as pandas describes them.

    std has divisor n - 1, percentiles are linear, count is without undefined cases. Standard JSON: what is infinite or
    undefined is null, as on the challenge's own site; `n_infinite` and `n_undefined` say how often.
    """
    rows = [row for scored in every for row in scored.rows]
    values = by_metric(rows)
    cases = [scored.case for scored in every]
    table: dict[str, dict[str, Any]] = {}
    aggregates: dict[str, dict[str, float | None]] = {}
    for found in aggregate(rows):
        name, slash, part = found.metric.partition("/")
        name = SERVER_NAMES.get(name, name) + slash + part
        table[name] = {str(index): _finite(values[found.metric].get(case, math.nan)) for index, case in enumerate(cases)}
        aggregates[name] = _described(found)
    for column, paths in (("pred_fname", [item.prediction for item in every]), ("gt_fname", [item.reference for item in every])):
        table[column] = {str(index): None if path is None else path.name for index, path in enumerate(paths)}
    about = {"protocol": protocol_facts(protocol), "cases": case_counts(rows), "case_ids": cases}
    return _json({"case": table, "aggregates": aggregates, "ichbench": about})


def summary_json(every: Sequence[Scored], labels: Labels | None) -> str:
    """nnU-Net's summary.json: Dice, IoU and voxel counts of every label and region, their means over cases, and the foreground mean.

    nnU-Net's own definitions, whatever the protocol: no smoothing; nan where neither mask has the label, left out of a label's
    mean (nanmean), but not out of the mean over labels. A missing prediction counts as an empty one, with null for its file; nnU-Net
    itself stops there. Keys are label values, and `(1, 2)` for a region; without declared labels all foreground is label 1.
    NaN is spelled `NaN` as nnU-Net writes and reads it, which strict JSON parsers refuse.
    """
    keys = _nnunet_keys(labels)
    per_case: list[dict[str, Any]] = [
        {
            "metrics": {key: _nnunet_metrics(scored.voxels[part]) for part, key in keys.items()},
            "prediction_file": None if scored.prediction is None else str(scored.prediction),
            "reference_file": None if scored.reference is None else str(scored.reference),
        }
        for scored in every
    ]
    mean = {key: {metric: _mean(case["metrics"][key][metric] for case in per_case) for metric in NNUNET_METRICS} for key in keys.values()}
    foreground = {metric: math.fsum(values[metric] for values in mean.values()) / len(mean) for metric in NNUNET_METRICS}
    rule = {"empty_prediction": 0.0, "empty_reference": 0.0, "both_empty": "nan, left out of the label's mean"}
    about = {
        "protocol": "nnU-Net 2: Dice = 2 TP / (2 TP + FP + FN), IoU = TP / (TP + FP + FN), ignored voxels left out",
        "empty_masks": {"Dice": rule, "IoU": rule},
        "cases": case_counts(row for scored in every for row in scored.rows),
        "labels": {key: _label_counts([scored.voxels[part] for scored in every]) for part, key in keys.items()},
        "missing": [scored.case for scored in every if scored.prediction is None],
    }
    content = {"foreground_mean": foreground, "mean": mean, "metric_per_case": per_case, "ichbench": about}
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def _nnunet_keys(labels: Labels | None) -> dict[str, str]:
    """Row suffix -> key in summary.json."""
    named = {name: str(value) for name, value in (labels or {}).items() if isinstance(value, tuple)}
    return {part: named.get(part, part) for part in regions_of(labels or {})} or {"": "1"}


def _nnunet_metrics(voxels: Voxels) -> dict[str, float | int]:
    tp, fp, fn = voxels.tp, voxels.fp, voxels.fn
    empty = tp + fp + fn == 0
    dice, iou = (math.nan, math.nan) if empty else (2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn))
    return {"Dice": dice, "IoU": iou, "FP": fp, "TP": tp, "FN": fn, "TN": voxels.tn, "n_pred": fp + tp, "n_ref": fn + tp}


def _label_counts(voxels: Sequence[Voxels]) -> dict[str, int]:
    empty = [(count.tp + count.fp == 0, count.tp + count.fn == 0) for count in voxels]
    both = sum(prediction and reference for prediction, reference in empty)
    sides = {"n_empty_prediction": sum(side for side, _ in empty), "n_empty_reference": sum(side for _, side in empty)}
    return {"n": len(voxels) - both, **sides, "n_both_empty": both}


def _described(found: Aggregate) -> dict[str, float | None]:
    """In the order of the site's own file, then what it does not say."""
    numbers = {
        "max": found.maximum, "min": found.minimum, "std": found.sd, "25pc": found.percentile_25, "50pc": found.median,
        "75pc": found.percentile_75, "mean": found.mean, "count": float(found.n),
    }  # fmt: skip
    names = ("n_infinite", "n_undefined", "n_empty_prediction", "n_empty_reference", "n_missing")
    return {name: _finite(value) for name, value in numbers.items()} | {name: getattr(found, name) for name in names}


def _mean(values: Iterable[float]) -> float:
    """nanmean."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spelled(value: Any, none: str | None) -> Any:
    """Any value of a protocol as standard JSON."""
    if value is None:
        return none
    if isinstance(value, Mapping):
        return {str(key): _spelled(item, none) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _spelled(dataclasses.asdict(value), none)
    if isinstance(value, (list, tuple)):
        return [_spelled(item, none) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
