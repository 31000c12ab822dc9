"""What a folder or a table says about a cohort, before any voxel is read: which files belong to which case.

Three layouts: nnU-Net raw (`dataset.json`), INSTANCE (`data/` and `label/`), and a `cohort.csv`. Pairing errors end here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ichbench.cases.files import read_table
from ichbench.cases.labels import LabelRules, read_rules, turned_round
from ichbench.errors import InputError

ENDINGS = (".nii.gz", ".nii")
SPLITS = ("train", "test")
DEFAULT_CHANNELS = ("CT",)
DEFAULT_LABELS = {"background": 0, "ich": 1}


@dataclass(frozen=True)
class CaseRecord:
    """The files of one case (one image per channel, in channel order) and what is known about it.

    split   "train" or "test"; a train case always has a label
    group   the patient (or site) that must not be on both sides of a split
    sha256  the expected `Cohort.case_digest` (over voxels and geometry, not over the file), or None
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    split: str
    group: str | None = None
    site: str = ""
    subtype: str = ""
    sha256: str | None = None


@dataclass(frozen=True)
class Description:
    """Everything that is declared about a cohort."""

    name: str
    root: Path
    channel_names: tuple[str, ...]
    rules: LabelRules
    label_map: dict[int, int] | None
    records: tuple[CaseRecord, ...]


def describe(place: Path) -> Description:
    """Recognise the layout of `place` (a folder or a .csv) and list its cases, sorted by id.

    Raises `InputError` for a missing or empty place, an image without mask, a mask without image, wrong channels,
    duplicate ids, and whatever else can be seen without opening an image.
    """
    place = Path(place)
    if not place.exists():
        raise InputError(f"{place}: no such folder or file; give an nnU-Net raw folder, an INSTANCE folder or a cohort.csv")
    if place.is_file():
        if place.suffix.lower() != ".csv":
            raise InputError(f"{place}: a cohort is a folder or a .csv file; give the folder that holds the cases")
        found = _from_csv(place)
    elif (place / "dataset.json").is_file():
        found = _from_nnunet(place)
    elif (place / "cohort.csv").is_file():
        found = _from_csv(place / "cohort.csv")
    elif instance := next((place / sub for sub in (".", "train_2", "train") if (place / sub / "data").is_dir()), None):
        found = _from_instance(place, instance)
    else:
        raise InputError(
            f"{place}: no cohort found; allowed are dataset.json with imagesTr and labelsTr (nnU-Net), "
            "data and label (INSTANCE), or a cohort.csv"
        )
    return replace(found, records=_checked(place, found.records))


def read_declaration(path: Path) -> tuple[LabelRules, dict[int, int] | None]:
    """What a `dataset.json` or `cohort.json` says about the values in mask files: the rules, and the label map or None."""
    if path.name != "dataset.json":
        found = _with_side_file(path, "", path.parent, ())
        return found.rules, found.label_map
    declared = read_table(path, "correct it")
    return read_rules(turned_round(declared.get("labels")), declared.get("regions_class_order"), path), _label_map(path, declared)


def mask_folders(table: Path) -> set[Path]:
    """The folders (resolved) in which a `cohort.csv` says that masks lie; nothing but the table is read."""
    try:
        rows = _read_table(table, required=())
    except InputError as error:
        raise InputError(f"{error}; without it nobody knows what masks below {table.parent} mean: --dataset-json FILE may say so") from None
    return {(table.parent / row["mask"]).parent.resolve() for row in rows if row.get("mask")}


def _from_nnunet(root: Path) -> Description:
    path = root / "dataset.json"
    declared = read_table(path, "correct it")
    channels = declared.get("channel_names", declared.get("modality"))
    ending = declared.get("file_ending")
    if not any((root / tag).is_dir() for tag in ("imagesTr", "imagesTs")):
        raise InputError(f"{root}: has a dataset.json, but no folder imagesTr; put the images there")
    if ending not in ENDINGS:
        raise InputError(f'{path}: "file_ending" is {ending!r}; allowed are {", ".join(ENDINGS)}: convert the images to NIfTI')
    if "dataset" in declared:
        raise InputError(f'{path}: the key "dataset" (explicit paths) is not supported; list the same files in a cohort.csv')
    channel_names = _channels(path, channels)
    rules = read_rules(declared.get("labels"), declared.get("regions_class_order"), path)
    records: list[CaseRecord] = []
    for split, tag in (("train", "Tr"), ("test", "Ts")):
        images = _nnunet_images(root / f"images{tag}", ending, channel_names)
        masks = _files_by_id(root / f"labels{tag}", (ending,))
        records += _paired(images, masks, split, root / f"images{tag}", root / f"labels{tag}")
    n_train, claimed = sum(record.split == "train" for record in records), declared.get("numTraining")
    if records and n_train != claimed:
        raise InputError(f'{path}: "numTraining" is {claimed!r}, but imagesTr holds {n_train} cases; correct the number or the folder')
    described = _with_case_table(root / "cases.csv", records)
    return Description(root.resolve().name, root, channel_names, rules, _label_map(path, declared), described)


def _from_instance(root: Path, folder: Path) -> Description:
    images: dict[str, tuple[Path, ...]] = {case: (path,) for case, path in _files_by_id(folder / "data", ENDINGS).items()}
    masks = _files_by_id(folder / "label", ENDINGS)
    records = _with_case_table(root / "cases.csv", _paired(images, masks, "train", folder / "data", folder / "label"))
    return _with_side_file(root / "cohort.json", root.resolve().name, root, records)


def _from_csv(path: Path) -> Description:
    """Columns id, image (channels separated by ";"), mask, split, group, site, subtype, sha256; only the first two must be there.
    A `cohort.json` beside the table may declare name, channel_names, labels and label_map."""
    records = []
    rows = _read_table(path, required=("id", "image"))
    for line, row in enumerate(rows, start=2):
        images = tuple(path.parent / part.strip() for part in row["image"].split(";") if part.strip())
        label = path.parent / row["mask"] if row.get("mask") else None
        split = row.get("split") or "train"
        if split not in SPLITS:
            raise InputError(f"{path}, line {line}: split is {split!r}; allowed are {', '.join(SPLITS)}")
        if not images:
            raise InputError(f"{path}, line {line}: case {row['id']!r} has no image; fill the column image or remove the line")
        for file in (*images, *([label] if label else [])):
            if not file.is_file():
                raise InputError(f"{path}, line {line}: {file} does not exist; paths are relative to the table's folder")
        digest = (row.get("sha256") or "").lower() or None
        if digest and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise InputError(f"{path}, line {line}: sha256 is {digest!r}; 64 hexadecimal digits (the case digest) or nothing is allowed")
        group, site, subtype = row.get("group") or row.get("patient") or None, row.get("site", ""), row.get("subtype", "")
        records.append(CaseRecord(row["id"], images, label, split, group, site, subtype, digest))
    name = path.resolve().parent.name if path.stem == "cohort" else path.stem
    return _with_side_file(path.with_name("cohort.json"), name, path.parent, tuple(records))


def _with_side_file(path: Path, name: str, root: Path, records: tuple[CaseRecord, ...]) -> Description:
    declared = read_table(path, "correct it") if path.is_file() else {}
    unknown = sorted(set(declared) - {"name", "channel_names", "labels", "regions_class_order", "label_map"})
    if unknown:
        raise InputError(f"{path}: unknown keys {unknown}; allowed are name, channel_names, labels, regions_class_order, label_map")
    channels = _channels(path, declared["channel_names"]) if "channel_names" in declared else DEFAULT_CHANNELS
    rules = read_rules(declared.get("labels", DEFAULT_LABELS), declared.get("regions_class_order"), path)
    for record in records:
        if len(record.images) != len(channels):
            raise InputError(
                f"{root}: case {record.id!r} has {len(record.images)} channels ({', '.join(p.name for p in record.images)}), "
                f"but {len(channels)} are declared ({', '.join(channels)}); declare channel_names in {path.name} or correct the images"
            )
    return Description(str(declared.get("name", name)), root, channels, rules, _label_map(path, declared), records)


def _nnunet_images(folder: Path, ending: str, channel_names: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """Channel files by case: `<case>_0000<ending>`, `<case>_0001<ending>`, ..."""
    channels: dict[str, dict[int, Path]] = {}
    for stem, path in _files_by_id(folder, (ending,)).items():
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None:
            raise InputError(f"{path}: the name must end with a channel number, as in {stem}_0000{ending}")
        channels.setdefault(match[1], {})[int(match[2])] = path
    for case, found in channels.items():
        if sorted(found) != list(range(len(channel_names))):
            raise InputError(
                f"{folder}: case {case!r} has the channels {[f'{c:04d}' for c in sorted(found)]}, but dataset.json declares "
                f"{len(channel_names)} ({', '.join(channel_names)}), numbered from 0000; correct the files or channel_names"
            )
    return {case: tuple(found[c] for c in sorted(found)) for case, found in channels.items()}


def _paired(
    images: dict[str, tuple[Path, ...]], masks: dict[str, Path], split: str, image_folder: Path, mask_folder: Path
) -> list[CaseRecord]:
    for case in sorted(set(masks) - set(images)):
        raise InputError(f"{masks[case]}: mask without image: {image_folder} holds no image of case {case!r}; add it or remove the mask")
    for case in sorted(set(images) - set(masks)) if split == "train" else ():
        raise InputError(f"{images[case][0]}: image without mask: {mask_folder} holds no mask of case {case!r}; add it or remove the image")
    return [CaseRecord(case, paths, masks.get(case), split) for case, paths in images.items()]


def _files_by_id(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The image files of a folder by their name without ending; hidden files and other kinds are passed over."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ending = next((e for e in endings if path.name.endswith(e)), None)
        if ending is None or path.name.startswith(".") or not path.is_file():
            continue
        stem = path.name.removesuffix(ending)
        if stem in found:
            raise InputError(f"{path} and {found[stem].name} are the same case {stem!r}; remove one of them")
        found[stem] = path
    return found


def _checked(place: Path, records: Iterable[CaseRecord]) -> tuple[CaseRecord, ...]:
    ordered = sorted(records, key=lambda record: record.id)
    if not ordered:
        raise InputError(f"{place}: the cohort is empty; at least one image ending with {' or '.join(ENDINGS)} is needed")
    for before, record in zip([None, *ordered], ordered, strict=False):
        if not re.fullmatch(r"\w[\w.+@ -]*", record.id):
            raise InputError(f"{place}: case id {record.id!r} cannot name a file; use letters, digits, '_', '-', '.'")
        if before is not None and before.id == record.id:
            raise InputError(f"{place}: case id {record.id!r} came twice: {before.images[0]} and {record.images[0]}; ids must be different")
        if record.split == "train" and record.label is None:
            what = f"image without mask: training case {record.id!r} has none"
            raise InputError(f"{record.images[0]}: {what}; add it or set its split to test")
    return tuple(ordered)


def _with_case_table(path: Path, records: list[CaseRecord]) -> tuple[CaseRecord, ...]:
    """Add group, site and subtype from a `cases.csv`, where there is one; it may cover more or fewer cases."""
    if not path.is_file():
        return tuple(records)
    rows: dict[str, dict[str, str]] = {}
    for row in _read_table(path, required=()):
        case = row.get("id") or row.get("case") or ""
        if case in rows:
            raise InputError(f"{path}: case {case!r} came twice; keep one row")
        rows[case] = row
    if rows and set(rows) == {""}:
        raise InputError(f"{path}: needs a column id (or case), but has {', '.join(next(iter(rows.values())))}")
    described = []
    for record in records:
        row = rows.get(record.id, {})
        group = row.get("group") or row.get("patient") or None
        described.append(replace(record, group=group, site=row.get("site", ""), subtype=row.get("subtype", "")))
    return tuple(described)


def _read_table(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            missing = [name for name in required if name not in columns]
            if missing:
                raise InputError(f"{path}: needs the columns {', '.join(required)}, but has {', '.join(columns) or 'none'}")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    what = f"has not {len(columns)} cells as the first line"
                    raise InputError(f"{path}, line {reader.line_num}: {what}; quote cells that hold commas")
                rows.append({key.strip(): value.strip() for key, value in row.items()})
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a comma-separated UTF-8 table ({error})") from error


def _channels(path: Path, declared: object) -> tuple[str, ...]:
    """Channel names in order, from {"0": name, ...} or a list."""
    if isinstance(declared, list):
        declared = {str(i): name for i, name in enumerate(declared)}
    wanted = [str(i) for i in range(len(declared))] if isinstance(declared, dict) else []
    if not isinstance(declared, dict) or not declared or sorted(declared, key=str) != sorted(wanted):
        raise InputError(f'{path}: "channel_names" is {declared!r}; it must be {{"0": "CT", ...}}, numbered from 0')
    return tuple(str(declared[key]) for key in wanted)


def _label_map(path: Path, declared: dict[str, Any]) -> dict[int, int] | None:
    given = declared.get("label_map")
    if given is None:
        return None
    try:
        pairs = {int(old): int(new) for old, new in given.items() if not isinstance(new, (bool, float))}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f'{path}: "label_map" is {given!r}; it must be {{"value in the file": value to use, ...}} in integers') from error
    if len(pairs) != len(given):
        raise InputError(f'{path}: "label_map" is {given!r}; every value must be an integer, and every key must occur once')
    return pairs
