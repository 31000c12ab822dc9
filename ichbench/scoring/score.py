"""Scores: one pair of masks, one case, a folder; and the table of rows that every board is a fold over.

A row is (arm, fold, seed, case, metric, value). `metric` is `name[@parameter][/label]`; a bare name is the protocol's
default for the whole foreground (all labels above 0 merged), `dice/2` is label 2 alone.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ichbench.cases.files import write_atomically
from ichbench.errors import InputError
from ichbench.scoring import overlap, surface
from ichbench.scoring.protocol import Protocol, get_protocol, split_metric

HEADER = ("arm", "fold", "seed", "case", "metric", "value")
SUFFIXES = (".nii.gz", ".nii")

_LOG = logging.getLogger(__name__)


class Score(NamedTuple):
    """One measured number. `fold` and `seed` are "-" for untrained or ensembled arms."""

    arm: str
    fold: str
    seed: str
    case: str
    metric: str
    value: float


@dataclass(frozen=True, eq=False)
class Measured:
    """What all metrics of one pair are computed from."""

    counts: overlap.Counts
    voxel_ml: float
    surfaces: surface.SurfaceDistances
    protocol: Protocol


#: metric name -> its formula; the second argument is the parameter after `@`, None for a bare name.
FORMULAS: dict[str, Callable[[Measured, float | None], float]] = {
    "dice": lambda pair, _: overlap.dice(pair.counts, pair.protocol.dice_smooth),
    "nsd": lambda pair, tolerance_mm: surface.nsd(pair.surfaces, pair.protocol.tolerance_mm if tolerance_mm is None else tolerance_mm),
    "rvd": lambda pair, _: overlap.rvd(pair.counts),
    "hd": lambda pair, percent: surface.hausdorff(pair.surfaces, 100.0 if percent is None else percent),
    "hd95": lambda pair, _: surface.hausdorff(pair.surfaces, 95.0),
    "assd": lambda pair, _: surface.assd(pair.surfaces),
    "iou": lambda pair, _: overlap.iou(pair.counts),
    "sensitivity": lambda pair, _: overlap.sensitivity(pair.counts),
    "precision": lambda pair, _: overlap.precision(pair.counts),
    "reference_ml": lambda pair, _: overlap.volume_ml(pair.counts.reference, pair.voxel_ml),
    "predicted_ml": lambda pair, _: overlap.volume_ml(pair.counts.predicted, pair.voxel_ml),
}


def score_masks(
    reference_zyx: Any,
    predicted_zyx: Any,
    spacing_zyx_mm: Sequence[float],
    protocol: str | Protocol = "instance2022",
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Every metric of the protocol for one pair of masks; never raises on a valid pair, however empty or small.

    reference_zyx, predicted_zyx   3D arrays or torch tensors of one shape, bool, integer, or floats holding whole numbers;
                                   every label above 0 is foreground (the official script needs strictly 0 and 1)
    spacing_zyx_mm                 voxel edges in the order of the array axes
    protocol                       "instance2022", "strict" or a Protocol; it says what an empty mask gets
    metrics                        other names than the protocol's, e.g. ("dice", "nsd@1.0", "hd@90")

    Any axis order will do as long as all three arguments share it. Returns at least dice, nsd, rvd, hd, hd95, assd,
    reference_ml and predicted_ml (unless `metrics` says otherwise). InputError on anything that is not a pair of masks.
    """
    rules = get_protocol(protocol)
    keys = tuple(rules.metrics if metrics is None else metrics)
    wanted = {key: _formula(key) for key in keys}
    reference = overlap.as_mask(reference_zyx, "the reference")
    predicted = overlap.as_mask(predicted_zyx, "the prediction")
    overlap.check_same_shape(reference.shape, predicted.shape)
    spacing_mm = overlap.as_spacing(spacing_zyx_mm)
    counts = overlap.count(reference, predicted)
    surfaces = surface.surface_record(reference, predicted, spacing_mm)
    voxel_ml = math.prod(sorted(spacing_mm)) / 1000.0  # sorted, so that the order of the axes cannot change the last bit
    pair = Measured(counts, voxel_ml, surfaces, rules)
    values: dict[str, float] = {}
    for key, (formula, parameter) in wanted.items():
        declared = rules.empty_rule(key).value(counts.reference, counts.predicted)
        values[key] = formula(pair, parameter) if declared is None else declared
    return values


def rows_for_case(
    arm: str,
    fold: str,
    seed: str,
    case: str,
    reference_zyx: Any,
    predicted_zyx: Any | None,
    spacing_zyx_mm: Sequence[float],
    protocol: str | Protocol = "instance2022",
    labels: Mapping[str, int] | None = None,
    file_axes: tuple[int, int, int] = (2, 1, 0),
    voxel_ml: float | None = None,
) -> list[Score]:
    """All rows of one case: the metrics of the whole foreground, of each label where there are several, and the 0/1 marks.

    predicted_zyx   None for a missing prediction: scored as an empty one, with `missing` and `empty_prediction` 1
    labels          name -> value; more than one value above 0 adds rows such as `dice/2`. Values outside it are an
                    InputError. Voxels of a label named "ignore" in the reference count as background in both
    file_axes       `Grid.file_axes`: distances are summed in the order of the file's axes, so that their last bit is
                    the one of the official script, which reads the file
    voxel_ml        `Grid.voxel_ml` of a sheared grid, whose voxels are smaller than the product of the spacings; volumes only
    """
    rules = get_protocol(protocol)
    to_file = tuple(file_axes.index(axis) for axis in range(3))
    spacing = overlap.as_spacing(spacing_zyx_mm)
    spacing_file_mm = tuple(spacing[axis] for axis in to_file)
    reference = overlap.as_labels(reference_zyx, f"case {case}: the reference").transpose(to_file)
    if predicted_zyx is None:
        predicted: overlap.LabelArray = np.zeros(reference.shape, dtype=np.bool_)
    else:
        predicted = overlap.as_labels(predicted_zyx, f"case {case}: the prediction").transpose(to_file)
        if reference.shape != predicted.shape:
            raise InputError(
                f"case {case}: the reference has shape {tuple(np.shape(reference_zyx))} and the prediction "
                f"{tuple(np.shape(predicted_zyx))} (z, y, x); both must lie on the same voxel grid"
            )
    if labels is not None:
        _check_values(case, "reference", reference, labels)
        _check_values(case, "prediction", predicted, labels)
        if "ignore" in labels:
            kept = reference != labels["ignore"]
            reference, predicted = reference * kept, predicted * kept
    values = sorted({value for name, value in (labels or {}).items() if value > 0 and name != "ignore"})
    parts = [("", reference != 0, predicted != 0)]
    if len(values) > 1:
        parts += [(f"/{value}", reference == value, predicted == value) for value in values]
    rows: list[Score] = []
    for suffix, own, other in parts:
        found = score_masks(own, other, spacing_file_mm, rules)
        if voxel_ml is not None:
            volumes = {"reference_ml": voxel_ml * np.count_nonzero(own), "predicted_ml": voxel_ml * np.count_nonzero(other)}
            found |= {name: value for name, value in volumes.items() if name in found}
        found["empty_prediction"] = float(not other.any())
        found["empty_reference"] = float(not own.any())
        if not suffix:
            found["missing"] = float(predicted_zyx is None)
        rows += [Score(arm, fold, seed, case, name + suffix, value) for name, value in found.items()]
    return rows


def score_files(
    reference: Path,
    prediction: Path | None,
    protocol: str | Protocol = "instance2022",
    *,
    arm: str = "prediction",
    fold: str = "-",
    seed: str = "-",
    labels: Mapping[str, int] | None = None,
) -> list[Score]:
    """Rows of one pair of mask files; the case is named after the reference file. `prediction` None is a missing one.

    The spacing is the pixdim of the reference's header, as in the official script. Both files must put every voxel in the
    same place within 1e-3 mm, else InputError with both files and both values (the official script compares shapes only).
    """
    from ichbench.cases.images import read_labels

    labels_zyx, grid = read_labels(Path(reference))
    predicted_zyx = None
    if prediction is not None:
        predicted_zyx, other = read_labels(Path(prediction))
        if grid.shape_zyx != other.shape_zyx:
            raise InputError(
                f"{reference} has shape {grid.shape_zyx} and {prediction} has shape {other.shape_zyx} (z, y, x); "
                "bring the prediction back to the grid of the reference"
            )
        if not grid.same_place(other):
            apart = float(np.abs(grid.corners_mm() - other.corners_mm()).max())
            raise InputError(
                f"{reference} and {prediction} put their voxels up to {apart:.4g} mm apart (1e-3 mm is allowed): "
                f"affine {grid.affine_4x4.tolist()} against {other.affine_4x4.tolist()} (z, y, x to RAS+ mm); "
                "write the prediction with the header of the scan"
            )
    try:
        case = case_id(Path(reference))
        return rows_for_case(arm, fold, seed, case, labels_zyx, predicted_zyx, grid.spacing_zyx_mm, protocol, labels, grid.file_axes)
    except InputError as error:
        raise InputError(f"{error} (reference {reference}, prediction {prediction})") from error


def score_folder(
    reference_dir: Path,
    prediction_dir: Path,
    protocol: str | Protocol = "instance2022",
    *,
    arm: str | None = None,
    fold: str = "-",
    seed: str = "-",
    labels: Mapping[str, int] | None = None,
    workers: int = 1,
) -> list[Score]:
    """Rows of every reference in a folder, in the order of their names; matched on the file name without .nii or .nii.gz.

    Walks the references: one without a prediction is scored as a missing prediction, a prediction without a reference
    is only mentioned in the log. `arm` is the name of the prediction folder unless given. `workers` > 1 uses processes.
    InputError for a missing folder, no reference at all, two files of one case, or a pair that does not fit.
    """
    rules = get_protocol(protocol)
    references, predictions = _files_by_case(Path(reference_dir)), _files_by_case(Path(prediction_dir))
    if not references:
        raise InputError(f"{reference_dir} holds no reference: no file ends in {' or '.join(SUFFIXES)}")
    # an empty folder is a submission of nothing; a full one without a match is a mistake in the names
    if predictions and not set(references) & set(predictions):
        raise InputError(
            f"{prediction_dir} holds no prediction for any of the {len(references)} references in {reference_dir}; "
            f"files must bear the references' names, such as {next(iter(sorted(references.values()))).name}"
        )
    extra = sorted(set(predictions) - set(references))
    if extra:
        _LOG.warning("%d prediction(s) in %s have no reference and are not scored: %s", len(extra), prediction_dir, ", ".join(extra[:5]))
    name = Path(prediction_dir).resolve().name if arm is None else arm
    tasks = [_Task(path, predictions.get(case), rules, name, fold, seed, labels) for case, path in sorted(references.items())]
    if workers <= 1:
        return [row for task in tasks for row in _run(task)]
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_run, tasks) for row in rows]


def labels_present(reference: Path) -> dict[str, int]:
    """Every label value of a reference file, or of a folder of them, as the `labels` of `score_files`: {"1": 1, "2": 2}."""
    from ichbench.cases.images import read_labels

    paths = sorted(_files_by_case(reference).values()) if reference.is_dir() else [reference]
    values = {int(value) for path in paths for value in np.unique(read_labels(path)[0])}
    return {str(value): value for value in sorted(values | {0})}


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
        if not all(name and name.isprintable() for name in row[:5]):
            raise InputError(f"{target}: {_where(row)} has a name that is empty or not printable")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows((*row[:5], repr(float(row.value))) for row in ordered)
    write_atomically(target, text.getvalue().encode())


def read_scores(path: Path) -> list[Score]:
    """Rows of a scores.csv in the order of the file. InputError naming file and line for anything that is not such a file."""
    source = Path(path)
    rows: list[Score] = []
    seen: dict[tuple[str, ...], int] = {}
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            if tuple(header) != HEADER:
                raise InputError(f"{source}, line 1: the header is {','.join(header)!r}, but must be {','.join(HEADER)!r}")
            for cells in reader:
                row = _parse(cells, f"{source}, line {reader.line_num}")
                first = seen.setdefault(row[:5], reader.line_num)
                if first != reader.line_num:
                    raise InputError(f"{source}, line {reader.line_num}: {_where(row)} was already given in line {first}")
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} cannot be read as a table of scores: {error}") from error
    return rows


def case_id(path: Path) -> str:
    """The file name without .nii or .nii.gz."""
    suffix = next((end for end in SUFFIXES if path.name.endswith(end)), "")
    return path.name.removesuffix(suffix)


class _Task(NamedTuple):
    reference: Path
    prediction: Path | None
    protocol: Protocol
    arm: str
    fold: str
    seed: str
    labels: Mapping[str, int] | None


def _run(task: _Task) -> list[Score]:
    return score_files(task.reference, task.prediction, task.protocol, arm=task.arm, fold=task.fold, seed=task.seed, labels=task.labels)


def _formula(key: str) -> tuple[Callable[[Measured, float | None], float], float | None]:
    name, parameter = split_metric(key)
    if name not in FORMULAS or "/" in key:
        raise InputError(f"{key!r} cannot be computed from a pair of masks; choose from {', '.join(FORMULAS)}")
    return FORMULAS[name], parameter


def _check_values(case: str, what: str, array: overlap.LabelArray, labels: Mapping[str, int]) -> None:
    unknown = sorted({int(value) for value in np.unique(array[array != 0])} - set(labels.values()))
    if unknown:
        raise InputError(f"case {case}: the {what} contains the label(s) {unknown}, but the declared ones are {dict(labels)}")


def _files_by_case(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # files such as ._001.nii.gz are left behind by macOS and are no images
        if path.name.startswith(".") or not path.name.endswith(SUFFIXES) or not path.is_file():
            continue
        case = case_id(path)
        if case in found:
            raise InputError(f"{folder} holds two files of case {case}: {found[case].name} and {path.name}; remove one")
        found[case] = path
    return found


def _where(row: Score) -> str:
    return f"arm {row.arm!r}, fold {row.fold!r}, seed {row.seed!r}, case {row.case!r}, metric {row.metric!r}"


def _parse(cells: list[str], where: str) -> Score:
    if len(cells) != len(HEADER):
        raise InputError(f"{where}: {len(cells)} columns, but there must be {len(HEADER)}: {','.join(HEADER)}")
    text = cells[5]
    try:
        # float() also takes "1_000" and blanks around a number, which no writer of this format makes
        value = float(text if "_" not in text and text == text.strip() else "")
    except ValueError:
        raise InputError(f"{where}: the value is {text!r}; a number, inf or nan is needed") from None
    if not all(cells[:5]):
        raise InputError(f"{where}: a name is empty; fold and seed are '-' where there is none")
    return Score(cells[0], cells[1], cells[2], cells[3], cells[4], value)
