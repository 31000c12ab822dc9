"""Scores of files, folders and many pairs, in one process and in several."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from test_score import SPACING, box_mask, by_metric, official

from ichbench.errors import CaseError, InputError
from ichbench.scoring import PROTOCOLS, Options, Pair, rows_for_case, score_files, score_folder, score_pairs
from ichbench.scoring import folders as folders_module
from ichbench.scoring.folders import default_workers, in_order, labels_present, score_each
from ichbench.scoring.layouts import case_id
from ichbench.scoring.pairs import Settings, Voxels, as_pair, score_pair


def save(path: Path, mask_ijk: np.ndarray, spacing: tuple[float, ...] = (0.45, 0.43, 5.0), origin: tuple[float, ...] = (0, 0, 0)) -> Path:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(mask_ijk.astype(np.uint8), affine), path)
    return path


def masks_ijk(seed: int, shape: tuple[int, int, int] = (9, 8, 5)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.3, rng.random(shape) < 0.3


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_files_give_the_bits_of_the_official_script(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    """File order of the axes and the float32 pixdim of the header, whatever the working order is."""
    reference, predicted = masks_ijk(5)
    spacing = (0.4300001, 0.42, 4.97)
    columns = np.zeros((4, 4))
    columns[3, 3] = 1.0
    for column, axis in enumerate(axes):
        columns[axis, column] = spacing[axis]
    turned = [mask.transpose(axes) for mask in (reference, predicted)]
    for name, mask in zip("ab", turned, strict=True):
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), columns), tmp_path / f"{name}.nii.gz")
    pixdim = nib.load(tmp_path / "a.nii.gz").header["pixdim"][1:4]
    assert pixdim.dtype == np.float32
    expected = official(turned[0], turned[1], tuple(float(value) for value in pixdim))
    found = by_metric(score_files(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"))
    assert {key: found[key] for key in expected} == expected


def test_folder_walks_the_references(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    references, predictions = tmp_path / "labels", tmp_path / "predicted"
    predictions.mkdir()
    for seed, case in enumerate(["001", "002", "003"]):
        first, second = masks_ijk(seed)
        save(references / f"{case}.nii.gz", first)
        if case != "002":
            save(predictions / (f"{case}.nii" if case == "003" else f"{case}.nii.gz"), second)
    save(predictions / "900.nii.gz", masks_ijk(9)[0])
    (references / "._001.nii.gz").write_bytes(b"left behind by a Mac")
    (references / "notes.txt").write_text("no image")
    rows = score_folder(references, predictions)
    assert {row.case: row.value for row in rows if row.metric == "missing"} == {"001": 0.0, "002": 1.0, "003": 0.0}
    assert {row[:3] for row in rows} == {("predicted", "-", "-")}
    assert "900" in caplog.text
    alone = score_files(references / "003.nii.gz", predictions / "003.nii", arm="predicted")
    assert [row for row in rows if row.case == "003"] == alone
    named = score_folder(references, predictions, "strict", arm="x", fold="0", seed="1")
    assert {row[:3] for row in named} == {("x", "0", "1")}


def test_worker_processes_give_the_same_rows(tmp_path: Path) -> None:
    for seed, case in enumerate("ab"):
        first, second = masks_ijk(seed)
        save(tmp_path / "r" / f"{case}.nii.gz", first)
        save(tmp_path / "p" / f"{case}.nii.gz", second)
    labels = {"background": 0, "bleed": 1}
    assert score_folder(tmp_path / "r", tmp_path / "p", workers=2, labels=labels) == score_folder(tmp_path / "r", tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"origin": (0, 0, 0.01)}, "0.01 mm apart"), ({"spacing": (0.45, 0.45, 5.0)}, "mm apart"), ({"origin": (-3.6, 0, 0)}, "3.6 mm apart")],
)
def test_geometry_is_compared(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    reference, predicted = masks_ijk(1)
    files = save(tmp_path / "r.nii.gz", reference), save(tmp_path / "p.nii.gz", predicted, **change)
    with pytest.raises(InputError, match=words) as error:
        score_files(*files)
    assert all(str(path) in str(error.value) for path in files)
    assert score_files(files[0], save(tmp_path / "near.nii.gz", predicted, origin=(0, 0, 5e-4)))


def test_bad_files_and_folders(tmp_path: Path) -> None:
    reference, predicted = masks_ijk(1)
    good = save(tmp_path / "r" / "1.nii.gz", reference)
    other = save(tmp_path / "p" / "1.nii.gz", predicted[1:])
    with pytest.raises(InputError, match=r"\(9, 8, 5\).*\(8, 8, 5\)") as error:
        score_folder(tmp_path / "r", tmp_path / "p")
    assert str(good) in str(error.value)
    assert str(other) in str(error.value)
    with pytest.raises(InputError, match="does not exist"):
        score_folder(tmp_path / "r", tmp_path / "absent")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no reference"):
        score_folder(tmp_path / "none", tmp_path / "r")
    save(tmp_path / "r" / "1.nii", reference)
    with pytest.raises(InputError, match=r"two files of case 1: 1\.nii and 1\.nii\.gz"):
        score_folder(tmp_path / "r", tmp_path / "r")
    with pytest.raises(InputError, match=str(tmp_path / "absent.nii.gz")):
        score_files(good, tmp_path / "absent.nii.gz")


def test_an_empty_prediction_folder_gives_rows_of_misses(tmp_path: Path) -> None:
    save(tmp_path / "r" / "1.nii.gz", masks_ijk(1)[0])
    (tmp_path / "p").mkdir()
    found = by_metric(score_folder(tmp_path / "r", tmp_path / "p"))
    assert (found["missing"], found["nsd"], found["hd"]) == (1.0, 0.0, math.inf)


def test_real_masks_of_patients(shared_data: Path) -> None:
    """Thresholded blood against edema: every case scores, the missing ones too, and one equals the official formulas."""
    predictions = shared_data / "phe_derived_hematoma"
    references = shared_data / "Dataset501_PHE" / "labelsTs"
    rows = score_folder(references, predictions)
    cases = {case_id(path) for path in references.glob("*.nii.gz")}
    assert {row.case for row in rows} == cases
    assert len(rows) == len(cases) * (len(PROTOCOLS["instance2022"].metrics) + 3)
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        table.setdefault(row.case, {})[row.metric] = row.value
    case = next(case for case, found in table.items() if found["empty_prediction"] == 0)
    images = [nib.load(folder / f"{case}.nii.gz") for folder in (references, predictions)]
    masks = [np.asarray(image.dataobj) > 0 for image in images]
    expected = official(masks[0], masks[1], tuple(float(value) for value in images[0].header["pixdim"][1:4]))
    assert {key: table[case][key] for key in expected} == expected


# --- many pairs --------------------------------------------------------------------------------------------------------


def arrays(n: int = 4) -> list[tuple[str, np.ndarray, np.ndarray | None, tuple[float, ...]]]:
    """Pairs of arrays (z, y, x); the last prediction is missing."""
    pairs = [(f"{seed:02d}", *(mask.T for mask in masks_ijk(seed)), SPACING) for seed in range(n)]
    return [*pairs[:-1], (*pairs[-1][:2], None, SPACING)]


def test_pairs_of_arrays_are_scored_as_their_files_are(tmp_path: Path) -> None:
    """The bits of the file, in which the axes are (x, y, z)."""
    found = list(score_pairs(arrays(), "strict", arm="p", fold="1", seed="2"))
    for case, reference, predicted, _ in arrays():
        save(tmp_path / "r" / f"{case}.nii.gz", reference.T, SPACING[::-1])
        if predicted is not None:
            save(tmp_path / "p" / f"{case}.nii.gz", predicted.T, SPACING[::-1])
    # 0.45 is not a float32, and files hold the voxel size as one
    close = score_folder(tmp_path / "r", tmp_path / "p", "strict", fold="1", seed="2")
    assert [row[:5] for row in found] == [row[:5] for row in close]
    assert [row.value for row in found] == pytest.approx([row.value for row in close], rel=1e-7)
    exact = [row for pair in arrays() for row in rows_for_case("p", "1", "2", *pair, protocol="strict")]
    assert [repr(row) for row in found] == [repr(row) for row in exact]
    paths = [(str(case), str(tmp_path / "r" / f"{case}.nii.gz"), tmp_path / "p" / f"{case}.nii.gz") for case in ("00", "01")]
    assert list(score_pairs(paths, "strict", arm="p", fold="1", seed="2")) == [row for row in close if row.case in ("00", "01")]


def test_tensors_and_workers_give_the_same_rows() -> None:
    torch = pytest.importorskip("torch")
    expected = [repr(row) for row in score_pairs(arrays())]
    turned = [
        Pair(case, torch.tensor(reference.copy()), None if predicted is None else torch.tensor(predicted.copy()).to(torch.uint8), spacing)
        for case, reference, predicted, spacing in arrays()
    ]
    assert [repr(row) for row in score_pairs(turned, workers=2)] == expected
    assert [repr(row) for row in score_pairs(turned, workers=1)] == expected


def test_pairs_are_taken_as_they_are_needed() -> None:
    """A generator of ten thousand scans must not be drawn at once."""
    drawn: list[int] = []

    def many() -> Iterator[Any]:
        for number in range(10_000):
            drawn.append(number)
            yield (str(number), box_mask(), box_mask(), SPACING)

    rows = score_pairs(many())
    assert drawn == []
    assert next(rows).case == "0"
    assert drawn == [0]
    for workers, most in ((1, 3), (2, 2 * folders_module.AHEAD + 2)):
        drawn.clear()
        every = in_order(abs, (int(number) for number, *_ in many()), workers)
        assert [next(every) for _ in range(3)] == [0, 1, 2]
        assert len(drawn) <= most
        every.close()  # type: ignore[attr-defined]


def test_regions_and_ignored_voxels() -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "vessel": 3, "ignore": 4}
    rng = np.random.default_rng(1)
    reference, predicted = rng.integers(0, 5, (6, 7, 8)), rng.integers(0, 4, (6, 7, 8))
    found = by_metric(list(score_pairs([("c", reference, predicted, SPACING)], "strict", labels=labels)))
    kept = reference != 4
    for suffix, values in (("", (1, 2, 3)), ("/whole", (1, 2, 3)), ("/core", (2, 3)), ("/3", (3,))):
        own, other = np.isin(reference, values) & kept, np.isin(predicted, values) & kept
        alone = by_metric(rows_for_case("a", "-", "-", "c", own, other, SPACING, "strict"))
        assert {name: found[name + suffix] for name in alone if name != "missing"} == {n: v for n, v in alone.items() if n != "missing"}
    assert not {"missing/core", "dice/1", "dice/2", "dice/4"} & set(found)
    assert found["missing"] == 0.0
    lost = by_metric(list(score_pairs([("c", reference, None, SPACING)], "strict", labels=labels)))
    assert (lost["missing"], lost["empty_prediction/core"], lost["dice/core"]) == (1.0, 1.0, 0.0)
    with pytest.raises(InputError, match=r"case c: the prediction contains the label\(s\) \[9\]"):
        list(score_pairs([("c", reference, predicted + 8 * (predicted == 1), SPACING)], labels=labels))


def test_plain_labels_are_those_of_a_case() -> None:
    labels = {"background": 0, "clot": 1, "edema": 2, "ignore": 3}
    rng = np.random.default_rng(2)
    reference, predicted = rng.integers(0, 4, (6, 7, 8)), rng.integers(0, 3, (6, 7, 8))
    found = list(score_pairs([("c", reference, predicted, SPACING)], labels=labels, arm="a"))
    assert found == rows_for_case("a", "-", "-", "c", reference, predicted, SPACING, labels=labels)
    assert "dice/2" in by_metric(found)


@pytest.mark.parametrize("labels", [None, {"background": 0, "a": 1, "both": (1, 2), "ignore": 3}])
def test_voxel_counts(labels: Any) -> None:
    rng = np.random.default_rng(4)
    reference, predicted = rng.integers(0, 4, (5, 6, 7)), rng.integers(0, 3, (5, 6, 7))
    settings = Settings(PROTOCOLS["strict"], labels=labels, count_voxels=True)
    found = score_pair((settings, as_pair(("c", reference, predicted, SPACING)))).voxels
    assert list(found) == ([""] if labels is None else ["1", "both"])
    used = reference != 3 if labels else np.ones(reference.shape, dtype=bool)
    for key, values in (("", (1, 2, 3)), ("1", (1,)), ("both", (1, 2))):
        if key in found:
            own, other = np.isin(reference, values)[used], np.isin(predicted, values)[used]
            pairs = [(True, True), (False, True), (True, False), (False, False)]
            assert found[key] == Voxels(*(int(np.sum((own == a) & (other == b))) for a, b in pairs))
    lost = score_pair((settings, as_pair(("c", reference, None, SPACING)))).voxels
    assert all(count.tp == count.fp == 0 and count.fn + count.tn == used.sum() for count in lost.values())


def test_label_maps_are_applied_to_references_at_once(tmp_path: Path) -> None:
    reference = np.zeros((6, 6, 4), dtype=np.uint8)
    reference[1], reference[3], reference[5] = 1, 2, 5
    save(tmp_path / "r.nii.gz", reference)
    save(tmp_path / "p.nii.gz", np.where(reference == 1, 2, np.where(reference == 2, 1, 0)))
    settings = Settings(PROTOCOLS["strict"], labels={"background": 0, "a": 1, "b": 2}, label_map={1: 2, 2: 1, 5: 0})
    found = by_metric(list(score_pair((settings, Pair("c", tmp_path / "r.nii.gz", tmp_path / "p.nii.gz"))).rows))
    assert found["dice"] == found["dice/1"] == found["dice/2"] == 1.0


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int8, np.int16, np.uint16])
def test_a_label_map_does_not_wrap(kind: type) -> None:
    """300 is 44 in eight bits; 70000 needs more than sixteen."""
    reference = np.zeros((6, 6, 4), dtype=kind)
    reference[1] = 1
    for target in (300, 70_000):
        labels = {"background": 0, "a": target, "wrapped": target % 256}
        settings = Settings(PROTOCOLS["strict"], labels=labels, label_map={1: target, 999: 0})
        predicted = reference.astype(np.int64) * target
        found = by_metric(list(score_pair((settings, as_pair(("c", reference, predicted, SPACING)))).rows))
        assert found[f"dice/{target}"] == found["dice"] == 1.0
        assert found[f"empty_reference/{target % 256}"] == 1.0


def test_voxels_of_a_sheared_grid_are_smaller_than_their_edges_say(tmp_path: Path) -> None:
    """A tilted gantry: volumes by the determinant, as everywhere in the project; spacings stay those of the header."""
    affine = np.diag([0.5, 0.5, 5.0, 1.0])
    affine[:3, 2] = (0.0, 3.0, 4.0)
    mask = masks_ijk(1)[0]
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), tmp_path / "r.nii.gz")
    found = by_metric(score_files(tmp_path / "r.nii.gz", None))
    assert found["reference_ml"] == pytest.approx(mask.sum() * 0.5 * 0.5 * 4.0 / 1000, rel=1e-6)
    # 45 voxels have 0.045 ml there, less than the smallest plausible bleed, and not the 0.05625 ml of their edges
    few = np.zeros((9, 8, 5))
    few[1:4, 1:6, 1:4] = 1
    nib.save(nib.Nifti1Image(few.astype(np.uint8), affine), tmp_path / "few.nii.gz")
    nib.save(nib.Nifti1Image(0 * few.astype(np.uint8), affine), tmp_path / "none.nii.gz")
    odd = score_pair(
        (Settings(PROTOCOLS["strict"], anomalies=True), Pair("c", tmp_path / "none.nii.gz", tmp_path / "few.nii.gz"))
    ).anomalies
    assert {"ml": pytest.approx(0.045)} in [one.evidence for one in odd if one.kind == "implausible_volume"]


def test_a_fourth_axis_of_one_voxel_is_none(tmp_path: Path) -> None:
    """As the README says: (x, y, z, 1) is (x, y, z), on either side; two volumes are refused."""
    reference, predicted = masks_ijk(2)
    files = [save(tmp_path / f"{name}.nii.gz", mask) for name, mask in (("r", reference), ("p", predicted))]
    deep = [save(tmp_path / "deep" / f"{name}.nii.gz", mask[..., None]) for name, mask in (("r", reference), ("p", predicted))]
    expected = score_files(*files)
    for pair in (deep, (files[0], deep[1]), (deep[0], files[1])):
        assert score_files(*pair) == expected
    two = save(tmp_path / "two.nii.gz", np.stack([predicted, predicted], axis=-1))
    with pytest.raises(InputError, match=r"two\.nii\.gz: has 4 dimensions"):
        score_files(files[0], two)


def test_labels_present(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}.nii.gz", np.full((2, 2, 2), n)) for n in (0, 3, 7)]
    assert labels_present(paths) == labels_present(paths, workers=2) == {"background": 0, "3": 3, "7": 7}
    assert labels_present(paths[:1]) == {"background": 0}


# --- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "workers"), [("damaged", 1), ("fractions", 1), ("label", 1), ("elsewhere", 1), ("label", 2)])
def test_a_failing_pair_names_case_and_both_files(tmp_path: Path, kind: str, workers: int) -> None:
    for number in range(3):
        first, second = masks_ijk(number)
        save(tmp_path / "r" / f"{number}.nii.gz", first)
        path = save(tmp_path / "p" / f"{number}.nii.gz", second)
        if number == 1 and kind == "damaged":
            path.write_bytes(path.read_bytes()[:60])
        elif number == 1 and kind == "fractions":
            nib.save(nib.Nifti1Image(second * np.float32(0.5), np.diag([0.45, 0.43, 5.0, 1.0])), path)
        elif number == 1:
            save(path, second * 7, origin=(0, 0, 7.0 if kind == "elsewhere" else 0))
    with pytest.raises(InputError) as error:
        score_folder(tmp_path / "r", tmp_path / "p", labels={"background": 0, "bleed": 1}, workers=workers)
    message = str(error.value)
    assert message.startswith("case 1: ")
    for folder in "rp":
        assert message.count(str(tmp_path / folder / "1.nii.gz")) == 1
    assert "\n" not in message


def test_wrong_pairs_name_their_case() -> None:
    mask = box_mask()
    for pair, words in (
        (("c", mask), "2 things came"),
        (("c", mask, mask), "case c: arrays come with spacing_zyx_mm"),
        (("c", Path("a.nii.gz"), mask, SPACING), "case c: give two paths or two arrays"),
        (("c", None, mask, SPACING), "case c: give two paths or two arrays"),
        (("c", mask, mask[1:], SPACING), r"case c: .*\(8, 20, 20\).*\(7, 20, 20\)"),
        (("c", mask, mask * 0.5, SPACING), "case c: the prediction contains the value 0.5"),
        (("c", mask, mask, (5, -1, 1)), "case c: the spacing"),
        (("c", "absent.nii.gz", None), "case c: absent.nii.gz: no such file"),
    ):
        with pytest.raises(InputError, match=words):
            list(score_pairs([pair]))
    with pytest.raises(InputError, match="no protocol 'x'"):
        score_pairs([], "x")
    with pytest.raises(InputError, match="labels: label 'a' is 'b'"):
        score_pairs([], labels={"background": 0, "a": "b"})
    with pytest.raises(InputError, match="workers is 0"):
        list(score_pairs([], workers=0))


def test_keywords_are_the_same_everywhere(tmp_path: Path) -> None:
    """A field of `Options` reaches the rows of all three, and what is no field is refused rather than ignored."""
    first, second = masks_ijk(1)
    files = save(tmp_path / "r" / "c.nii.gz", first), save(tmp_path / "p" / "c.nii.gz", second)
    calls = [
        lambda **options: list(score_pairs([("c", *files)], "strict", **options)),
        lambda **options: score_files(*files, "strict", **options),
        lambda **options: score_folder(tmp_path / "r", tmp_path / "p", "strict", **options),
    ]
    assert [call()[0].arm for call in calls] == ["prediction", "prediction", "p"]
    assert set(Options.__annotations__) == {"arm", "fold", "seed", "labels", "reorient", "workers"}
    labels = {"background": 0, "a": 1, "b": 2}
    for call in calls:
        rows = call(arm="x", fold="0", seed="1", labels=labels, reorient=True, workers=1)
        assert {row[:3] for row in rows} == {("x", "0", "1")}
        assert "dice/2" in by_metric(rows)
        assert by_metric(call())["dice"] == by_metric(rows)["dice"]
        with pytest.raises(TypeError, match="reorientate"):
            call(reorientate=True)


def test_a_folder_brings_its_labels_unless_told_otherwise(tmp_path: Path) -> None:
    """What dataset.json declares: 5 is stored, 2 is meant; the label map holds whichever labels are asked for."""
    stored = np.where(masks_ijk(1)[0], 5, 0)
    save(tmp_path / "labelsTr" / "c.nii.gz", stored)
    save(tmp_path / "p" / "c.nii.gz", np.where(stored == 5, 2, 0))
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz", "label_map": {"5": 2}}')
    assert by_metric(score_folder(tmp_path, tmp_path / "p", "strict"))["dice/2"] == 1.0
    own = by_metric(score_folder(tmp_path, tmp_path / "p", "strict", labels={"background": 0, "both": [1, 2]}))
    assert own["dice/both"] == 1.0
    assert "dice/2" not in own


def test_all_cores_are_asked_for_by_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(tmp_path / "r" / "c.nii.gz", masks_ijk(1)[0])
    asked: list[int] = []

    def score_nothing(pairs: Any, settings: Settings, workers: int) -> Iterator[Any]:
        asked.append(workers)
        return iter(())

    monkeypatch.setattr(folders_module, "score_each", score_nothing)
    monkeypatch.setattr(folders_module, "available_cores", lambda: 7)
    for options in ({}, {"workers": 3}, {"workers": None}):
        assert list(score_pairs([], **options)) == []
        assert score_folder(tmp_path / "r", tmp_path / "r", **options) == []
    assert asked == [1, 1, 3, 3, 7, 1]  # a folder of one case is not worth seven processes


def test_what_nobody_foresaw_names_the_case_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [save(tmp_path / f"{name}.nii.gz", masks_ijk(1)[0]) for name in "rp"]
    for error, words in ((MemoryError(), "not enough memory"), (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug")):

        def broken(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("ichbench.scoring.pairs.rows_for_case", broken)
        with pytest.raises(CaseError, match=words) as found:
            score_files(*files)
        assert all(str(path) in str(found.value) for path in files)
        assert type(found.value.__cause__) is type(error)


def test_a_worker_that_dies_is_said_so() -> None:
    with pytest.raises(CaseError, match="worker process ended abruptly"):
        list(in_order(os._exit, [3, 3, 3], 2))


def test_a_warning_of_the_reader_is_handed_on(tmp_path: Path) -> None:
    path = save(tmp_path / "r.nii.gz", masks_ijk(1)[0])
    image = nib.load(path)
    image.header["pixdim"][1] = 0.9
    image.header.structarr["qform_code"] = 0
    nib.save(image, tmp_path / "odd.nii.gz")
    raw = bytearray(nib.load(tmp_path / "odd.nii.gz").to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    header["pixdim"][1] = 0.9
    (tmp_path / "odd.nii").write_bytes(header.binaryblock + bytes(raw[348:]))
    with pytest.warns(UserWarning, match=r"odd\.nii: its pixdim says"):
        score_files(tmp_path / "odd.nii", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (scored,) = score_each([("odd", tmp_path / "odd.nii", None)], Settings(PROTOCOLS["strict"]))
    assert len(scored.notes) == 1


def test_workers_are_as_many_as_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders_module, "available_cores", lambda: 4)
    assert [default_workers(n) for n in (0, 1, 15, 16, 24, 10_000)] == [1, 1, 1, 2, 3, 4]


def test_a_script_without_guard_gets_an_answer(tmp_path: Path) -> None:
    """Spawned workers import the script again; without its guard that must not hang or end in a traceback of the pool."""
    (tmp_path / "script.py").write_text(
        "from ichbench.scoring import score_pairs\nimport numpy as np\nmask = np.ones((2, 2, 2), bool)\n"
        "print(len(list(score_pairs([('c', mask, mask, (1, 1, 1))], workers=2))))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "lacks its `if __name__" in done.stderr.splitlines()[-1]


SLEEPERS = """
import time
from ichbench.scoring.folders import in_order
for _ in in_order(time.sleep, [0.2] * 1000, 2):
    print("one", flush=True)
"""
IDLE = """
import time
from ichbench.scoring.folders import in_order
def items():
    yield 0.0
    time.sleep(2)
    print("one", flush=True)
    time.sleep(1000)
list(in_order(time.sleep, items(), 2))
"""


@pytest.mark.parametrize("program", ["SLEEPERS", "IDLE"])
def test_an_interrupt_ends_parent_and_workers(program: str) -> None:
    """As a terminal sends it, to all of them; busy or idle, workers leave it to the parent and say nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", globals()[program]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)  # the workers hold the pipes as well: this ends when they have
    assert process.returncode == -signal.SIGINT
    assert said.count("KeyboardInterrupt") == 1
    assert "Process" not in said


def test_workers_do_not_outlive_a_killed_parent() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    process.kill()
    process.communicate(timeout=60)  # hangs if a worker still holds the pipes
