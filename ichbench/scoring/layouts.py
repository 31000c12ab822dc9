"""Which files are scored against which, and what their labels mean: everything that is known before a voxel is read.

References: a mask file; a folder of masks; an nnU-Net raw data set (`dataset.json` with labelsTs or labelsTr); an INSTANCE
folder (`label/`); a folder with a `cohort.csv`. Predictions: a mask file, or a folder of masks with the references' names, as
nnU-Net writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ichbench.cases.files import read_table
from ichbench.cases.folders import describe, mask_folders, read_declaration
from ichbench.cases.labels import LabelRules, scored_labels, turned_round
from ichbench.errors import InputError
from ichbench.scoring.score import Labels, regions_of

SUFFIXES = (".nii.gz", ".nii")
#: Where the masks of an INSTANCE folder may lie: as unpacked, or as downloaded.
INSTANCE_FOLDERS = ("label", "train_2/label", "train/label")


@dataclass(frozen=True, eq=False)
class Pair:
    """One reference and its prediction: two paths, or two 3D arrays or tensors with their spacing.

    prediction        None where there is none: scored as an empty one, and counted as missing
    spacing_zyx_mm    voxel edges in the order of the array axes; for arrays only, files bring their own
    image             the CT in HU, a path or an array as the masks are; only the anomaly checks look at it
    """

    case: str
    reference: Any
    prediction: Any | None
    spacing_zyx_mm: Sequence[float] | None = None
    image: Any | None = None


@dataclass(frozen=True, eq=False)
class Pairing:
    """What is scored: `pairs` by case id; `extra` are predictions without a reference, which are not scored.

    labels      what the data set declares, None where nothing does
    label_map   applied to the references on reading (value in the file -> value to use), as cohorts do
    arm         the name of the prediction folder
    imageless   cases for which `with_images` found none
    """

    pairs: tuple[Pair, ...]
    labels: Labels | None = None
    label_map: Mapping[int, int] | None = None
    extra: tuple[Path, ...] = ()
    arm: str = "prediction"
    imageless: tuple[str, ...] = ()


def find_pairs(reference: Path, prediction: Path, dataset_json: Path | None = None) -> Pairing:
    """Pair two files, or match a prediction folder to the references; a reference without a prediction is a pair too.

    Names are matched without .nii or .nii.gz. `dataset_json` declares labels and regions where the references are plain files.
    InputError: a path that is missing, a file beside a folder, no reference, two files of one case, and names of which none match.
    """
    if not reference.exists():
        raise InputError(f"{reference} does not exist; give a reference mask or a folder of them")
    if not prediction.exists():
        raise InputError(f"{prediction} does not exist; give a predicted mask or a folder of them")
    if reference.is_dir() != prediction.is_dir():
        kinds = ("a folder", "a file") if reference.is_dir() else ("a file", "a folder")
        raise InputError(f"{reference} is {kinds[0]}, but {prediction} is {kinds[1]}; give two folders or two files")
    if not reference.is_dir():
        labels, label_map = _declared(dataset_json) if dataset_json is not None else (None, None)
        return Pairing((Pair(case_id(reference), reference, prediction),), labels, label_map)
    references, (labels, label_map) = references_in(reference, dataset_json)
    predictions = files_by_case(prediction)
    matched = references.keys() & predictions.keys()
    # an empty folder is a submission of nothing; a full one without a match is a mistake in the names
    if predictions and not matched:
        example = references[min(references)]
        raise InputError(
            f"{prediction} holds no prediction for any of the {len(references)} references in {example.parent}; files must bear the "
            f"references' names, such as {example.name}" + elsewhere(reference, example.parent, predictions)
        )
    pairs = tuple(Pair(case, path, predictions.get(case)) for case, path in sorted(references.items()))
    extra = tuple(path for case, path in sorted(predictions.items()) if case not in matched)
    return Pairing(pairs, labels, label_map, extra, prediction.resolve().name or "prediction")


def with_images(found: Pairing, images: Path) -> Pairing:
    """The same pairs, each with its CT from a folder of CASE.nii.gz or nnU-Net's CASE_0000.nii.gz; or one file for one pair.

    InputError: a path that is missing, one file for several pairs, two files of one case, and names of which none match.
    """
    cases = [pair.case for pair in found.pairs]
    if not images.exists():
        raise InputError(f"{images} does not exist; give the CT of the masks, or a folder of them")
    if images.is_file() and len(cases) > 1:
        raise InputError(f"{images} is one image, but there are {len(cases)} references; give a folder of images")
    files = {cases[0]: images} if images.is_file() else files_by_case(images)
    chosen: dict[str, Path] = {}
    for case in cases:
        match [files[name] for name in (case, f"{case}_0000") if name in files]:
            case [one]:
                chosen[case] = one
            case [one, other]:
                raise InputError(f"{images} holds two images of case {case}: {one.name} and {other.name}; remove one")
    if not chosen:
        raise InputError(
            f"{images} holds no image for any of the {len(cases)} references; files must bear their names, such as {cases[0]}.nii.gz or "
            f"{cases[0]}_0000.nii.gz"
        )
    pairs = tuple(replace(pair, image=chosen.get(pair.case)) for pair in found.pairs)
    return replace(found, pairs=pairs, imageless=tuple(case for case in cases if case not in chosen))


def references_in(folder: Path, dataset_json: Path | None = None) -> tuple[dict[str, Path], tuple[Labels | None, Mapping[int, int] | None]]:
    """The reference masks of a folder by case, with the labels and the label map that `dataset_json`, else the folder, declares."""
    given = None if dataset_json is None else _declared(dataset_json)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of the reference masks")
    if (folder / "dataset.json").is_file():
        declared = given or _declared(folder / "dataset.json")
        for name in ("labelsTs", "labelsTr", "."):
            found = files_by_case(folder / name) if (folder / name).is_dir() else {}
            if found:
                return found, declared
        raise InputError(
            f"{folder} holds no reference: it has a dataset.json, but no mask in labelsTs or labelsTr ending in {_or()}"
            + _other_ending(folder)
        )
    if (folder / "cohort.csv").is_file():
        cohort = describe(folder)
        labelled = {record.id: (record.split, record.label) for record in cohort.records if record.label is not None}
        split = "test" if any(split == "test" for split, _ in labelled.values()) else "train"
        files = {case: path for case, (its, path) in labelled.items() if its == split}
        if files:
            return files, given or (scored_labels(cohort.rules), cohort.label_map)
        raise InputError(f"{folder} holds no reference: no case of its cohort.csv has a mask")
    flat = files_by_case(folder)
    if flat:
        return flat, given or _said_by(_declaration_of(folder))
    for name in INSTANCE_FOLDERS:
        if (folder / name).is_dir() and (found := files_by_case(folder / name)):
            return found, given or _said_by(_declaration_of(folder))
    raise InputError(
        f"{folder} holds no reference: no file ends in {_or()}, and it is neither an nnU-Net data set (dataset.json with labelsTs or "
        "labelsTr) nor an INSTANCE folder (label/)" + _other_ending(folder)
    )


def rules_in(folder: Path) -> LabelRules | None:
    """What the outputs of a network for these references mean, where something declares it for `references_in`."""
    path = _declaration_of(folder)
    if path is not None:
        return read_declaration(path)[0]
    return describe(folder).rules if (folder / "cohort.csv").is_file() else None


def declares_labels(folder: Path) -> bool:
    """Does anything say what the masks of `references_in(folder)` mean?"""
    return _declaration_of(folder) is not None or (folder / "cohort.csv").is_file()


def _declaration_of(folder: Path) -> Path | None:
    """The dataset.json or cohort.json that says what the masks of `references_in(folder)` mean, or None."""
    places = [folder / "dataset.json", folder / "cohort.json"]
    if not places[0].is_file() and not (folder / "cohort.csv").is_file() and files_by_case(folder):
        # a folder of masks may be part of a data set, whose file lies above it
        above = folder.resolve().parent
        places = [above / "dataset.json"] if folder.resolve().name in ("labelsTs", "labelsTr") else []
        if folder.resolve().name == "label":
            places = [place / "cohort.json" for place in ((above.parent, above) if above.name in ("train", "train_2") else (above,))]
        if not any(place.is_file() for place in places):
            # or of a cohort.csv, which may name any folder below it; a table that declares nothing says nothing of labels
            tables = [place / "cohort.csv" for place in (above, *above.parents) if (place / "cohort.csv").is_file()]
            declared = [table for table in tables if table.with_name("cohort.json").is_file()]
            places = [table.with_name("cohort.json") for table in declared if folder.resolve() in mask_folders(table)]
    return next((place for place in places if place.is_file()), None)


def _said_by(path: Path | None) -> tuple[Labels | None, Mapping[int, int] | None]:
    if path is None:
        return None, None
    if path.name == "dataset.json":
        return _declared(path)
    rules, label_map = read_declaration(path)
    return scored_labels(rules), label_map


def files_by_case(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by case id, sorted; hidden files and other kinds are passed over."""
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


def case_id(path: Path) -> str:
    """The file name without .nii or .nii.gz."""
    suffix = next((end for end in SUFFIXES if path.name.endswith(end)), "")
    return path.name.removesuffix(suffix)


def check_labels(declared: object, where: str) -> Labels:
    """`declared` as name -> value or values, as nnU-Net's dataset.json writes it; InputError that begins with `where`.

    The older form of nnU-Net 1 and the Decathlon, `{"0": "background", "1": "clot"}`, is turned round.
    """
    declared = turned_round(declared)
    if not isinstance(declared, Mapping) or not declared:
        raise InputError(f'{where}: labels are {declared!r}; they must be {{"background": 0, "name": 1, "region": [1, 2], ...}}')
    labels: dict[str, int | tuple[int, ...]] = {}
    for name, value in declared.items():
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise InputError(f"{where}: label {name!r} is {value!r}; a whole number from 0 up, or a list of them for a region, is needed")
        if not isinstance(name, str) or not name or not name.isprintable() or "/" in name:
            raise InputError(f"{where}: the label name {name!r} cannot stand in a row; use printable characters without '/'")
        labels[name] = values if isinstance(value, (list, tuple)) else int(values[0])
    if isinstance(labels.get("ignore"), tuple):
        raise InputError(f"{where}: the label 'ignore' is {labels['ignore']}; it must be one value")
    parts = regions_of(labels)
    n_named = sum(name != "ignore" and value not in (0, (0,)) for name, value in labels.items())
    if not parts or len(parts) < n_named:
        what = "two of them would have rows of one name; rename one" if parts else "at least one besides background is needed"
        raise InputError(f"{where}: labels are {labels}; {what}")
    return labels


def _declared(path: Path) -> tuple[Labels, Mapping[int, int] | None]:
    """Labels and label map of a dataset.json."""
    content = read_table(path, "give nnU-Net's dataset.json")
    if "labels" not in content:
        raise InputError(f'{path} declares no "labels"; give nnU-Net\'s dataset.json')
    mapping = content.get("label_map")
    if mapping is None:
        return check_labels(content["labels"], str(path)), None
    if not isinstance(mapping, dict) or not all(type(new) is int for new in mapping.values()) or not all(map(str.isdigit, mapping)):
        raise InputError(f'{path}: "label_map" is {mapping!r}; it must be {{"value in the file": value to use, ...}} in integers')
    return check_labels(content["labels"], str(path)), {int(old): new for old, new in mapping.items()}


def elsewhere(reference: Path, used: Path, predictions: Mapping[str, Path]) -> str:
    """A word on the training labels of a data set, where it is those that the predictions match."""
    other = reference / "labelsTr"
    if used.name != "labelsTs" or not other.is_dir():
        return ""
    n = len(files_by_case(other).keys() & predictions.keys())
    return f". {n} match {other}: give that folder, with --dataset-json {reference / 'dataset.json'}" if n else ""


def _other_ending(folder: Path) -> str:
    """A word on a data set whose `dataset.json` says that its files are of a kind that is not read."""
    above = folder.resolve().parent if folder.resolve().name in ("labelsTs", "labelsTr") else folder
    path = above / "dataset.json"
    ending = read_table(path, "correct it").get("file_ending", SUFFIXES[0]) if path.is_file() else SUFFIXES[0]
    return "" if ending in SUFFIXES else f'. {path}: "file_ending" is {ending!r}; only {_or()} can be scored: convert the masks to NIfTI'


def _or() -> str:
    return " or ".join(SUFFIXES)
