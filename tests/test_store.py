"""Prepared cases on disk: what is read is what was written, nothing half, nothing changed unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ichbench.errors import InputError
from ichbench.prepare.locations import foreground_locations
from ichbench.prepare.pipeline import FlagGeometry, Geometry, Prepared
from ichbench.prepare.store import list_prepared, read_prepared, write_prepared

SHAPE = (4, 6, 5)


def prepared(name: str = "case_1", seed: int = 0) -> Prepared:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 3, SHAPE).astype(np.int16)
    flags = FlagGeometry(SHAPE, (0, 1, 2), (False, True, False), (0.0, 0.25, 1.5, 3.0), (1, 4), (0.5, 1 / 3), (0, 1, 2))
    geometry = Geometry(flags, (0, 1, 2), SHAPE, ((0, 4), (0, 6), (0, 5)), (5.0, 0.43, 0.43), SHAPE, (5.0, 0.43, 0.43))
    return Prepared(name, rng.normal(size=(2, *SHAPE)).astype(np.float32), labels, geometry, ("a note",), foreground_locations(labels))


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_read_is_what_was_written(tmp_path: Path, mmap: bool) -> None:
    case = prepared()
    assert write_prepared(tmp_path / "new", case) == tmp_path / "new" / "case_1"
    found = read_prepared(tmp_path / "new", "case_1", mmap=mmap, verify=True)
    assert isinstance(found.image_czyx, np.memmap) is mmap
    np.testing.assert_array_equal(found.image_czyx, case.image_czyx)
    assert found.labels_zyx is not None
    np.testing.assert_array_equal(found.labels_zyx, case.labels_zyx)
    assert found.labels_zyx.dtype == np.int16
    assert list(found.foreground) == [1, 2]
    for label, at in case.foreground.items():
        np.testing.assert_array_equal(found.foreground[label], at)
    assert (found.geometry, found.notes, found.id) == (case.geometry, case.notes, case.id)


def test_regions_and_annotated_voxels_keep_their_keys(tmp_path: Path) -> None:
    case = prepared()
    assert case.labels_zyx is not None
    foreground = foreground_locations(case.labels_zyx, (2, (1,), (2, 1), (-1, 0, 1, 2), 7))
    write_prepared(tmp_path, replace(case, foreground=foreground))
    found = read_prepared(tmp_path, case.id, verify=True).foreground
    assert set(found) == {2, (1,), (2, 1), (-1, 0, 1, 2), 7}
    for key, at in foreground.items():
        np.testing.assert_array_equal(found[key], at)


def test_a_test_case_has_no_labels(tmp_path: Path) -> None:
    write_prepared(tmp_path, replace(prepared(), labels_zyx=None, foreground={}))
    assert sorted(path.name for path in (tmp_path / "case_1").iterdir()) == ["case.json", "image.npy"]
    found = read_prepared(tmp_path, "case_1")
    assert found.labels_zyx is None
    assert found.foreground == {}


def test_the_same_case_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_prepared(tmp_path / folder, prepared())
    for path in (tmp_path / "a" / "case_1").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "case_1" / path.name).read_bytes()


def test_writing_again_replaces_the_whole_case(tmp_path: Path) -> None:
    write_prepared(tmp_path, prepared(seed=1))
    write_prepared(tmp_path, replace(prepared(seed=2), labels_zyx=None, foreground={}))
    np.testing.assert_array_equal(read_prepared(tmp_path, "case_1", verify=True).image_czyx, prepared(seed=2).image_czyx)
    assert [path.name for path in tmp_path.iterdir()] == ["case_1"]


def test_listing_is_sorted_and_skips_what_is_unfinished(tmp_path: Path) -> None:
    for name in ("b", "a", "c-1.2"):
        write_prepared(tmp_path, prepared(name))
    (tmp_path / ".a.half").mkdir()
    (tmp_path / ".a.half" / "case.json").write_text("{}")
    assert list_prepared(tmp_path) == ("a", "b", "c-1.2")
    with pytest.raises(InputError, match="there is no folder"):
        list_prepared(tmp_path / "none")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_prepared(tmp_path, replace(prepared(), geometry=replace(prepared().geometry, spacing_mm=(float("nan"), 1.0, 1.0))))
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path: Path) -> None:
    write_prepared(tmp_path, prepared())
    image = tmp_path / "case_1" / "image.npy"
    raw = bytearray(image.read_bytes())
    raw[-1] ^= 1
    image.write_bytes(bytes(raw))
    read_prepared(tmp_path, "case_1")  # a flipped bit costs a hash to find
    with pytest.raises(InputError, match=r"image\.npy has changed since it was written"):
        read_prepared(tmp_path, "case_1", verify=True)
    image.write_bytes(bytes(raw[:40]))
    with pytest.raises(InputError, match=r"image\.npy cannot be read"):
        read_prepared(tmp_path, "case_1")
    image.unlink()
    with pytest.raises(InputError, match=r"image\.npy is missing"):
        read_prepared(tmp_path, "case_1")


def test_bad_descriptions_are_named(tmp_path: Path) -> None:
    write_prepared(tmp_path, prepared())
    path = tmp_path / "case_1" / "case.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "format": 99}))
    with pytest.raises(InputError, match="has format 99, not 1"):
        read_prepared(tmp_path, "case_1")
    del table["notes"]
    wrong = {"{": "cannot be read as JSON", "[]": "must hold a JSON object", "{}": "has format None", json.dumps(table): "lacks notes"}
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(InputError, match=f"{message}.* and prepare the case again"):
            read_prepared(tmp_path, "case_1")
    with pytest.raises(InputError, match="holds no prepared case 'x'; it holds 1: case_1"):
        read_prepared(tmp_path, "x")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\\b"])
def test_ids_that_would_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a folder"):
        write_prepared(tmp_path, prepared(name))
