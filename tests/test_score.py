"""Scores of pairs, cases, files and folders, and the table of rows."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ichbench.errors import InputError
from ichbench.scoring import METRICS, PROTOCOLS, Score, read_scores, rows_for_case, score_files, score_folder, score_masks, write_scores
from ichbench.scoring.score import FORMULAS, case_id

SPACING = (5.0, 0.45, 0.45)


def official(reference: np.ndarray, predicted: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """The INSTANCE 2022 formulas on the package's surface distances (which the official script copies), no mask empty."""
    import surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(reference, predicted, spacing)
    volumes = int(reference.sum()), int(predicted.sum())
    return {
        "dice": (2.0 * int((reference & predicted).sum()) + 0.00001) / (sum(volumes) + 0.00001),
        "rvd": abs((volumes[1] - volumes[0]) / float(volumes[0])),
        "nsd": surface_distance.compute_surface_dice_at_tolerance(found, 0.42),
        "hd": surface_distance.compute_robust_hausdorff(found, 100),
        "hd95": surface_distance.compute_robust_hausdorff(found, 95),
    }


def box_mask(shape: tuple[int, int, int] = (8, 20, 20)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[2:4, 5:9, 5:9] = True
    return mask


def by_metric(rows: list[Score]) -> dict[str, float]:
    return {row.metric: row.value for row in rows}


# --- one pair ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(2, {"dice": 0.75, "nsd": 0.62777, "hd": 0.45, "rvd": 0.0}), (0, {"dice": 0.5, "nsd": 0.72077, "hd": 5.0, "rvd": 0.0})],
)
def test_shifted_box_of_the_facts(axis: int, expected: dict[str, float]) -> None:
    found = score_masks(box_mask(), np.roll(box_mask(), 1, axis=axis), SPACING)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=5e-6)
    assert found["reference_ml"] == found["predicted_ml"] == pytest.approx(32 * 5 * 0.45 * 0.45 / 1000, rel=1e-14)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_the_official_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 16, size=3))
    masks = [rng.random(shape) < level for level in (0.3, 0.5)]
    masks[0][0, 0, 0] = masks[1][-1, -1, -1] = True
    expected = official(masks[0], masks[1], SPACING)
    found = score_masks(masks[0], masks[1], SPACING)
    assert {key: found[key] for key in expected} == expected


#: (reference empty, prediction empty) -> dice, nsd, rvd, hd, hd95, assd; the official values of facts A1 for 32 voxels
SMOOTHED = 1e-5 / (32 + 1e-5)  # 3.12e-7
EMPTIES = {
    ("instance2022", False, True): (SMOOTHED, 0.0, 1.0, math.inf, math.inf, math.inf),
    ("instance2022", True, False): (SMOOTHED, 0.0, math.inf, math.inf, math.inf, math.inf),
    ("instance2022", True, True): (1.0, math.nan, math.nan, math.inf, math.inf, math.nan),
    ("instance2022", False, False): (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    ("strict", False, True): (0.0, 0.0, 1.0, math.inf, math.inf, math.inf),
    ("strict", True, False): (0.0, 0.0, math.inf, math.inf, math.inf, math.inf),
    ("strict", True, True): (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    ("strict", False, False): (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize(("protocol", "no_reference", "no_prediction"), list(EMPTIES))
def test_empty_masks(protocol: str, no_reference: bool, no_prediction: bool) -> None:
    reference, predicted = box_mask() & (not no_reference), box_mask() & (not no_prediction)
    found = score_masks(reference, predicted, SPACING, protocol)
    values = [found[key] for key in ("dice", "nsd", "rvd", "hd", "hd95", "assd")]
    assert [repr(v) for v in values] == [repr(v) for v in EMPTIES[protocol, no_reference, no_prediction]]
    assert (found["reference_ml"] == 0, found["predicted_ml"] == 0) == (no_reference, no_prediction)


def test_strict_differs_from_instance2022_in_nothing_but_smoothing_and_empties() -> None:
    reference, predicted = box_mask(), np.roll(box_mask(), 2, axis=1)
    loose, strict = (score_masks(reference, predicted, SPACING, protocol) for protocol in ("instance2022", "strict"))
    assert strict.pop("dice") == 0.5
    assert loose.pop("dice") == (32 + 1e-5) / (64 + 1e-5) > 0.5
    assert loose == strict


@settings(max_examples=60, deadline=None)
@given(st.data(), st.tuples(*[st.integers(0, 4)] * 3), st.sampled_from(sorted(PROTOCOLS)))
def test_a_valid_pair_never_raises(data: st.DataObject, shape: tuple[int, int, int], protocol: str) -> None:
    """Zero-size, one-voxel, one-slice, full and empty masks included; dice, hd, nsd and assd do not care which is which."""
    masks = [data.draw(hnp.arrays(bool, shape)) for _ in range(2)]
    found = score_masks(masks[0], masks[1], SPACING, protocol, tuple(FORMULAS))
    assert set(found) == set(FORMULAS)
    swapped = score_masks(masks[1], masks[0], SPACING, protocol)
    for key in ("dice", "nsd", "hd", "hd95", "assd"):
        assert swapped[key] == pytest.approx(found[key], rel=1e-14, nan_ok=True)
    for key in ("dice", "nsd", "iou", "sensitivity", "precision"):
        assert not found[key] < 0
        assert not found[key] > 1


def test_other_metrics_and_parameters() -> None:
    reference, predicted = box_mask(), np.roll(box_mask(), 1, axis=2)
    found = score_masks(reference, predicted, SPACING, metrics=("nsd@0.42", "nsd@0.45", "hd@100", "iou", "precision"))
    plain = score_masks(reference, predicted, SPACING)
    assert found == {"nsd@0.42": plain["nsd"], "nsd@0.45": 1.0, "hd@100": plain["hd"], "iou": 0.6, "precision": 0.75}
    wide = dataclasses.replace(PROTOCOLS["strict"], tolerance_mm=0.45, metrics=("nsd",))
    assert score_masks(reference, predicted, SPACING, wide) == {"nsd": 1.0}
    for wrong in ("missing", "dice/2", "dize", "nsd@a"):
        with pytest.raises(InputError):
            score_masks(reference, predicted, SPACING, metrics=(wrong,))


def test_wrong_pairs_are_refused() -> None:
    mask = box_mask()
    with pytest.raises(InputError, match=r"\(8, 20, 20\).*\(7, 20, 20\)"):
        score_masks(mask, mask[1:], SPACING)
    with pytest.raises(InputError, match=r"the prediction .*0\.5"):
        score_masks(mask, mask * 0.5, SPACING)
    with pytest.raises(InputError, match="the spacing"):
        score_masks(mask, mask, (5, 0.45))
    with pytest.raises(InputError, match="no protocol 'x'"):
        score_masks(mask, mask, SPACING, "x")


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    mask = box_mask()
    moved = np.roll(mask, 1, axis=2)
    expected = score_masks(mask, moved, SPACING)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        predicted = torch.tensor(moved).to(dtype)
        if dtype == torch.float32:
            predicted.requires_grad_()
        assert score_masks(torch.tensor(mask), predicted, torch.tensor(SPACING, dtype=torch.float64)) == expected


def test_importing_does_not_import_torch_or_pandas() -> None:
    code = "import sys, ichbench.scoring; print([name for name in ('torch', 'pandas', 'scipy', 'nibabel') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- one case ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_case() -> None:
    rows = rows_for_case("base", "0", "7", "001", box_mask(), np.roll(box_mask(), 1, axis=2), SPACING)
    assert {row[:4] for row in rows} == {("base", "0", "7", "001")}
    pair = score_masks(box_mask(), np.roll(box_mask(), 1, axis=2), SPACING)
    marks = {"missing": 0.0, "empty_prediction": 0.0, "empty_reference": 0.0}
    assert by_metric(rows) == pytest.approx(pair | marks, rel=1e-14)
    # file order (x, y, z) is the default of a case and this order is that of `score_masks`: asked for, the bits are the same
    rows = rows_for_case("base", "0", "7", "001", box_mask(), np.roll(box_mask(), 1, axis=2), SPACING, file_axes=(0, 1, 2))
    assert by_metric(rows) == pair | marks
    assert all(row.metric in METRICS for row in rows)


def test_a_missing_prediction_is_scored_as_an_empty_one() -> None:
    missing = by_metric(rows_for_case("a", "-", "-", "c", box_mask(), None, SPACING, "strict"))
    empty = by_metric(rows_for_case("a", "-", "-", "c", box_mask(), box_mask() & False, SPACING, "strict"))
    assert (missing.pop("missing"), empty.pop("missing")) == (1.0, 0.0)
    assert missing == empty
    assert (missing["dice"], missing["hd"], missing["empty_prediction"], missing["empty_reference"]) == (0.0, math.inf, 1.0, 0.0)


def test_rows_per_label_and_of_the_whole() -> None:
    labels = {"background": 0, "clot": 1, "edema": 2, "vessel": 5}
    rng = np.random.default_rng(3)
    reference, predicted = rng.choice([0, 1, 2], size=(2, 5, 9, 9))
    found = by_metric(rows_for_case("a", "-", "-", "c", reference, predicted, SPACING, "strict", labels))
    whole = score_masks(reference > 0, predicted > 0, SPACING, "strict")
    assert {key: found[key] for key in whole} == pytest.approx(whole, rel=1e-12)
    for value in (1, 2, 5):
        alone = score_masks(reference == value, predicted == value, SPACING, "strict")
        assert {key: found[f"{key}/{value}"] for key in alone} == pytest.approx(alone, rel=1e-12)
    assert (found["empty_reference/5"], found["empty_prediction/5"], found["empty_reference"], found["dice/5"]) == (1.0, 1.0, 0.0, 1.0)
    assert "missing/1" not in found
    one = by_metric(rows_for_case("a", "-", "-", "c", reference > 0, predicted > 0, SPACING, "strict", {"background": 0, "clot": 1}))
    assert not any("/" in metric for metric in one)


def test_ignored_voxels_count_in_neither_mask() -> None:
    reference, predicted = box_mask().astype(int), np.ones((8, 20, 20), dtype=int)
    reference[reference == 0] = 9
    found = by_metric(rows_for_case("a", "-", "-", "c", reference, predicted, SPACING, "strict", {"clot": 1, "ignore": 9}))
    assert found["dice"] == 1.0
    assert found["predicted_ml"] == found["reference_ml"]


def test_distances_are_summed_in_the_order_of_the_file() -> None:
    """The last bit of sqrt((a + b) + c) depends on the order; the official script has that of the file, here (x, y, z)."""
    reference, predicted = np.zeros((2, 6, 6, 6), dtype=bool)
    reference[1, 1, 1] = predicted[4, 3, 2] = True
    spacing = (5.0, 0.7, 0.49)
    expected = official(reference.T, predicted.T, spacing[::-1])
    assert expected["hd"] != official(reference, predicted, spacing)["hd"], "the pair that this test needs"
    for axes, turned, edges in (
        ((2, 1, 0), (0, 1, 2), spacing),
        ((1, 2, 0), (1, 0, 2), (spacing[1], spacing[0], spacing[2])),  # working axis k is file axis axes[k]
    ):
        rows = rows_for_case("a", "-", "-", "c", reference.transpose(turned), predicted.transpose(turned), edges, file_axes=axes)
        assert by_metric(rows)["hd"] == expected["hd"]


def test_undeclared_labels_and_shapes_name_the_case() -> None:
    with pytest.raises(InputError, match=r"case 017: the prediction contains the label\(s\) \[3\]"):
        rows_for_case("a", "-", "-", "017", box_mask(), 3 * box_mask(), SPACING, labels={"clot": 1})
    with pytest.raises(InputError, match=r"case 017.*\(8, 20, 20\).*\(8, 20, 19\)"):
        rows_for_case("a", "-", "-", "017", box_mask(), box_mask()[..., 1:], SPACING)
    with pytest.raises(InputError, match=r"case 017: the reference contains the value 0\.5"):
        rows_for_case("a", "-", "-", "017", box_mask() * 0.5, None, SPACING)


# --- files -------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match=r"\(5, 8, 9\).*\(5, 8, 8\)") as error:
        score_folder(tmp_path / "r", tmp_path / "p")
    assert str(good) in str(error.value)
    assert str(other) in str(error.value)
    with pytest.raises(InputError, match="is not a folder"):
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


def test_case_id() -> None:
    assert [case_id(Path(name)) for name in ("a/001.nii.gz", "phe_1.v2.nii", "x.nrrd")] == ["001", "phe_1.v2", "x.nrrd"]


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


# --- the table ---------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.tuples(NAMES, NAMES, NAMES, NAMES, NAMES), st.floats(), max_size=8))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, table: dict[tuple[str, ...], float]) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.csv"
    write_scores(path, [Score(*key, value) for key, value in table.items()])
    rows = read_scores(path)
    assert [row[:5] for row in rows] == sorted(table)
    assert [repr(row.value) for row in rows] == [repr(table[row[:5]]) for row in rows]
    before = path.read_bytes()
    write_scores(path, reversed(rows))
    assert path.read_bytes() == before


def test_the_written_form(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.csv"
    values = {"dice": 0.1, "hd": math.inf, "nsd": math.nan, "rvd": np.float64(1e-7), "assd": 1}
    write_scores(path, [Score("b,1", "-", "-", "é", key, value) for key, value in values.items()] + [Score("a", "0", "1", "2", "hd", -0.0)])
    assert path.read_bytes().decode() == (
        "arm,fold,seed,case,metric,value\n"
        "a,0,1,2,hd,-0.0\n"
        '"b,1",-,-,é,assd,1.0\n"b,1",-,-,é,dice,0.1\n"b,1",-,-,é,hd,inf\n"b,1",-,-,é,nsd,nan\n"b,1",-,-,é,rvd,1e-07\n'
    )
    assert [item.name for item in path.parent.iterdir()] == ["scores.csv"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    row = Score("a", "-", "-", "c", "dice", 1.0)
    with pytest.raises(InputError, match=r"two rows for arm 'a'.*'dice'"):
        write_scores(path, [row, row._replace(value=0.5)])
    for name in ("", "line\nbreak", "\udcff"):
        with pytest.raises(InputError, match="not printable"):
            write_scores(path, [row._replace(case=name)])
    assert not list(tmp_path.iterdir())


HEAD = "arm,fold,seed,case,metric,value\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: the header is ''"),
        ("arm,fold,case,metric,value\n", "line 1: the header is 'arm,fold,case,metric,value'"),
        (HEAD + "a,-,-,c,dice,1.0\na,-,-,c,hd,many\n", "line 3: the value is 'many'"),
        (HEAD + "a,-,-,c,dice,\n", "line 2: the value is ''"),
        (HEAD + "a,-,-,c,dice,1_0\n", "line 2: the value is '1_0'"),
        (HEAD + "a,-,-,c,dice, 1\n", "line 2: the value is ' 1'"),
        (HEAD + "a,-,-,c,dice\n", "line 2: 5 columns"),
        (HEAD + "\n", "line 2: 0 columns"),
        (HEAD + "a,-,,c,dice,1\n", "line 2: a name is empty"),
        (HEAD + "a,-,-,c,dice,1.0\nb,-,-,c,dice,1.0\na,-,-,c,dice,0.5\n", "line 4: arm 'a'.* was already given in line 2"),
        (HEAD + '"a,-,-,c,dice,1.0\n', "cannot be read"),
        (HEAD + "\x00", "."),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as error:
        read_scores(path)
    assert str(path) in str(error.value)


def test_reading_what_other_programs_saved(tmp_path: Path) -> None:
    """A byte order mark and CRLF, as spreadsheets write; not other encodings, not a folder, not nothing."""
    path = tmp_path / "scores.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode() + b"a,-,-,c,dice,0.5\r\na,-,-,c,hd,inf\r\n")
    assert read_scores(path) == [Score("a", "-", "-", "c", "dice", 0.5), Score("a", "-", "-", "c", "hd", math.inf)]
    path.write_bytes(HEAD.encode() + b"a,-,-,\xe9,dice,0.5\n")
    for wrong in (path, tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(InputError, match="cannot be read"):
            read_scores(wrong)
