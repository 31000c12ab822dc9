"""Cohort: cases, channels, labels, splits and digests, and the checks that make them trustworthy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case, Grid
from ichbench.cases.folders import CaseRecord, Description, describe
from ichbench.cases.images import read_grid, read_image, read_labels
from ichbench.cases.images import reorient as reorient_volumes
from ichbench.cases.labels import LabelRules
from ichbench.errors import InputError

__all__ = ["CaseRecord", "Cohort", "check_orientations", "read_cohort", "validate"]

#: Relative difference of voxel sizes that is still rounding.
SPACING_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Cohort:
    """The cases of one data set (sorted by id) and what their channels and labels mean.

    channel_names  one per image channel; "CT" means Hounsfield units
    rules          labels or regions, and the ignore label
    label_map      applied to label files on reading (for example BHSD's 1-5 -> 1); values not named stay
    reorient       turn every case to (z superior, y posterior, x left) on loading, or as nnU-Net's reader of that name does
    """

    name: str
    root: Path
    channel_names: tuple[str, ...]
    rules: LabelRules
    label_map: dict[int, int] | None
    records: tuple[CaseRecord, ...]
    reorient: bool | str = False
    #: the folder or file it was read from; reading that again gives the same cohort
    source: Path | None = None
    _cache: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def train_ids(self) -> tuple[str, ...]:
        return tuple(record.id for record in self.records if record.split == "train")

    @property
    def test_ids(self) -> tuple[str, ...]:
        return tuple(record.id for record in self.records if record.split == "test")

    @property
    def labels(self) -> dict[str, int]:
        """name -> value, background 0 included, without gaps; the ignore label is apart. A label without a name is "label 3"."""
        names = {value: name for name, value in zip(self.rules.names, self.rules.targets, strict=True) if isinstance(value, int)}
        return {"background": 0} | {names.get(value, f"label {value}"): value for value in self.rules.foreground_labels}

    @property
    def ignore_label(self) -> int | None:
        """The label that is neither learnt from nor scored, or None."""
        return self.rules.ignore

    @property
    def foreground_labels(self) -> tuple[int, ...]:
        """Label values without background and ignore, ascending."""
        return self.rules.foreground_labels

    @property
    def groups(self) -> dict[str, str | None]:
        """Case id -> patient (or None), as `splits.five_folds` takes it."""
        return {record.id: record.group for record in self.records}

    def record(self, case_id: str) -> CaseRecord:
        """The record of one case; `InputError` for an id that is not in the cohort."""
        for record in self.records:
            if record.id == case_id:
                return record
        raise InputError(f"cohort {self.name}: no case {case_id!r}; its {len(self.records)} cases run from {self.records[0].id!r} on")

    def load(self, case_id: str, keep_file_order: bool = False, with_labels: bool = True, reorient: bool | str | None = None) -> Case:
        """Read one case: channels stacked to (c, z, y, x), labels mapped and checked against the declared set.

        keep_file_order  axes as the file has them, reversed (compatibility "nnunet"); orientation is then not looked at,
                         unless a reader of nnU-Net's is to turn the case
        with_labels      False leaves `labels_zyx` None without opening the file
        reorient         overrides the cohort's own setting
        Raises `InputError`, naming both files and both values, where channels or mask do not lie on the same grid, and
        where this case's axes point another way than the first case's, unless `reorient` is on.
        """
        record = self.record(case_id)
        turn = self.reorient if reorient is None else reorient
        if record.sha256 is not None and with_labels and self.case_digest(case_id) != record.sha256:
            raise InputError(
                f"{record.images[0]}: case {case_id!r} has the digest {self.case_digest(case_id)}, but {record.sha256} is listed; "
                "the digest covers voxels, geometry and labels: restore the files or correct the column sha256"
            )
        case = self._read(record, keep_file_order, with_labels)
        if keep_file_order and not isinstance(turn, str):
            return case
        if turn:
            volumes = [*case.image_czyx, *([] if case.labels_zyx is None else [case.labels_zyx])]
            turned, grid = reorient_volumes(volumes, case.grid, record.images[0], turn)
            n_channels = len(record.images)
            return Case(case_id, np.stack(turned[:n_channels]), turned[n_channels] if len(turned) > n_channels else None, grid)
        expected = self._axis_codes()
        if case.grid.axis_codes_zyx != expected:
            raise InputError(_orientation_message(record, case.grid.axis_codes_zyx, self.records[0], expected))
        return case

    def case_digest(self, case_id: str) -> str:
        """sha256 over the voxels, affine, voxel size and labels of a case, before any reorientation.

        Never over compressed bytes: the same case packed again has the same digest. Computed once per cohort object.
        """
        if case_id not in self._cache:
            record = self.record(case_id)
            case = self._read(record, keep_file_order=False, with_labels=True)
            digest = hashlib.sha256(_canonical({"spacing": case.grid.spacing_zyx_mm, "shape": case.image_czyx.shape}))
            # To a nanometre, and without -0.0: an affine made of a quaternion differs in its last bit between machines.
            digest.update((np.round(case.grid.affine_4x4, 6) + 0.0).astype("<f8").tobytes())
            digest.update(np.ascontiguousarray(case.image_czyx, dtype="<f4").data)
            digest.update(b"no labels" if case.labels_zyx is None else np.ascontiguousarray(case.labels_zyx, dtype="<i2").data)
            self._cache[case_id] = digest.hexdigest()
        return self._cache[case_id]

    def digest(self) -> str:
        """sha256 over every case's digest and all metadata (not over names of folders or files)."""
        about: dict[str, object] = {
            "channels": self.channel_names, "labels": self.labels, "ignore": self.ignore_label, "reorient": self.reorient,
            "cases": [(r.id, r.split, r.group, r.site, r.subtype, self.case_digest(r.id)) for r in self.records],
        }  # fmt: skip
        if self.rules.has_regions:
            about["regions"] = [self.rules.names, self.rules.targets, self.rules.regions_class_order]
        return hashlib.sha256(_canonical(about)).hexdigest()

    def metadata(self) -> list[dict[str, str]]:
        """One row per case for a run's `cases.csv`; spacings in mm, shortest round-trip floats (headers only)."""
        rows = []
        for record in self.records:
            z, y, x = read_grid(record.images[0]).spacing_zyx_mm
            row = {"id": record.id, "split": record.split, "group": record.group or "", "site": record.site, "subtype": record.subtype}
            rows.append(row | {"spacing_z_mm": repr(z), "spacing_y_mm": repr(y), "spacing_x_mm": repr(x)})
        return rows

    def _axis_codes(self) -> str:
        if "axes" not in self._cache:
            self._cache["axes"] = read_grid(self.records[0].images[0]).axis_codes_zyx
        return self._cache["axes"]

    def _read(self, record: CaseRecord, keep_file_order: bool, with_labels: bool) -> Case:
        first, grid = read_image(record.images[0], keep_file_order)
        channels = [first]
        for path in record.images[1:]:
            channel, its_grid = read_image(path, keep_file_order)
            _check_same_grid(record.images[0], grid, path, its_grid)
            channels.append(channel)
        labels = None
        if with_labels and record.label is not None:
            labels, its_grid = read_labels(record.label, keep_file_order)
            _check_same_grid(record.images[0], grid, record.label, its_grid)
            labels = self._mapped(record.label, labels)
        return Case(record.id, np.stack(channels) if len(channels) > 1 else first[None], labels, grid)

    def _mapped(self, path: Path, labels_zyx: NDArray[np.int16]) -> NDArray[np.int16]:
        # background is most of a mask, and comparing with 0 is far faster than counting or sorting it
        foreground = labels_zyx[labels_zyx != 0]
        mapping = self.label_map or {}
        present = [*([0] if len(foreground) < labels_zyx.size else []), *(int(value) for value in np.unique(foreground))]
        declared = {*self.labels.values(), *(() if self.ignore_label is None else (self.ignore_label,))}
        outside = [value for value in present if mapping.get(value, value) not in declared]
        if outside:
            raise InputError(
                f"{path}: holds the label values {outside}, but declared are {sorted(declared)} "
                f"({', '.join(f'{name}={value}' for name, value in self.labels.items())}); correct the mask, declare them or "
                "add a label_map"
            )
        if all(mapping.get(value, value) == value for value in present):
            return labels_zyx
        mapped = labels_zyx.copy()
        for value in present:
            mapped[labels_zyx == value] = mapping.get(value, value)
        return mapped


def read_cohort(folder_or_csv: Path, reorient: bool | str = False) -> Cohort:
    """Read an nnU-Net raw folder, an INSTANCE folder or a `cohort.csv` (see `folders.describe`); no image is opened."""
    source = Path(folder_or_csv)
    found: Description = describe(source)
    return Cohort(
        found.name,
        found.root,
        found.channel_names,
        found.rules,
        found.label_map,
        found.records,
        reorient,
        source,
    )


def check_orientations(cohort: Cohort) -> None:
    """Raise `InputError` where two cases' axes point in different directions and the cohort does not reorient (headers only)."""
    if cohort.reorient:
        return
    first, expected = cohort.records[0], cohort._axis_codes()
    for record in cohort.records[1:]:
        codes = read_grid(record.images[0]).axis_codes_zyx
        if codes != expected:
            raise InputError(_orientation_message(record, codes, first, expected))


def validate(cohort: Cohort, voxels: bool = False) -> list[str]:
    """Every problem of every case, one message each; empty when all is well.

    Reads headers only (about a millisecond a file): shapes, spacings, places and orientations. With `voxels` it loads
    each case, and so finds values that are not finite, labels outside the declared set, damaged files and wrong digests.
    """
    problems: list[str] = []
    for record in cohort.records:
        try:
            grid = read_grid(record.images[0])
            for path in (*record.images[1:], *([record.label] if record.label else [])):
                _check_same_grid(record.images[0], grid, path, read_grid(path))
            if voxels:
                cohort.load(record.id)
            elif not cohort.reorient and grid.axis_codes_zyx != cohort._axis_codes():
                raise InputError(_orientation_message(record, grid.axis_codes_zyx, cohort.records[0], cohort._axis_codes()))
        except InputError as error:
            problems.append(str(error))
    return problems


def _check_same_grid(path_a: Path, a: Grid, path_b: Path, b: Grid) -> None:
    """Raise `InputError` naming both files and both values where two files of one case do not lie on the same voxels."""
    what: str
    one: Any
    other: Any
    if a.shape_zyx != b.shape_zyx:
        what, one, other = "shape (z, y, x)", a.shape_zyx, b.shape_zyx
    elif not np.allclose(a.spacing_zyx_mm, b.spacing_zyx_mm, rtol=SPACING_TOLERANCE, atol=0.0):
        what, one, other = "spacing (z, y, x; mm)", a.spacing_zyx_mm, b.spacing_zyx_mm
    elif a.same_place(b):
        return
    else:
        what, one, other = _difference(a, b)
    raise InputError(
        f"{path_a} and {path_b.name if path_a.parent == path_b.parent else path_b} differ in {what}: {one} and {other}; "
        "both must lie on the same voxels: export the mask again on the image's grid"
    )


def _difference(a: Grid, b: Grid) -> tuple[str, Any, Any]:
    """Which part of two affines differs: the direction, the voxel size, or only the origin."""
    if a.axis_codes_zyx != b.axis_codes_zyx:
        return "orientation (where z, y, x point)", a.axis_codes_zyx, b.axis_codes_zyx
    # The end of every axis must not move by more than the tolerance, so longer axes allow less of an angle.
    moved = np.abs(a.affine_4x4 - b.affine_4x4)[:3, :3] * np.asarray(a.shape_zyx)
    if moved.max() <= np.abs(a.affine_4x4 - b.affine_4x4)[:3, 3].max():
        return "origin (RAS+ mm)", a.affine_4x4[:3, 3].round(6).tolist(), b.affine_4x4[:3, 3].round(6).tolist()
    return "direction (columns z, y, x in RAS+)", a.direction_3x3.round(6).tolist(), b.direction_3x3.round(6).tolist()


def _orientation_message(record: CaseRecord, codes: str, first: CaseRecord, expected: str) -> str:
    return (
        f"{record.images[0]}: its axes (z, y, x) point to {codes}, those of {first.images[0]} to {expected}; the cases of one cohort "
        "must agree: store them in one orientation or set reorient"
    )


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
