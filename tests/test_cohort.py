from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from ichbench.cases.case import Grid
from ichbench.cases.cohort import Cohort, check_orientations, read_cohort, validate
from ichbench.cases.images import read_labels, write_image, write_labels
from ichbench.errors import InputError

SHAPE = (3, 6, 5)
AFFINE = np.array([[0.0, 0.0, -0.5, 9.0], [0.0, -0.5, 0.0, 8.0], [5.0, 0.0, 0.0, 7.0], [0.0, 0.0, 0.0, 1.0]])


def grid(shape: tuple[int, int, int] = SHAPE, affine: np.ndarray = AFFINE) -> Grid:
    return Grid(shape, affine)


def image_of(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.float32)


def labels_of(seed: int, top: int = 1, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    labels = np.random.default_rng(seed).integers(0, top + 1, shape).astype(np.int16)
    labels.flat[0] = top
    return labels


def declare(root: Path, **changes: Any) -> None:
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "ich": 1}, "numTraining": 3, "file_ending": ".nii.gz"}
    content |= changes
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    """Three training and two test cases, one of these without a mask."""
    root = tmp_path / "Dataset001_X"
    declare(root)
    for seed, (tag, case) in enumerate([("Tr", "c"), ("Tr", "a"), ("Tr", "b"), ("Ts", "d"), ("Ts", "e")]):
        write_image(root / f"images{tag}" / f"{case}_0000.nii.gz", image_of(seed), grid())
        if case != "e":
            write_labels(root / f"labels{tag}" / f"{case}.nii.gz", labels_of(seed), grid())
    return root


def test_an_nnunet_folder(nnunet: Path) -> None:
    cohort = read_cohort(nnunet)
    assert (cohort.name, cohort.channel_names, cohort.labels) == ("Dataset001_X", ("CT",), {"background": 0, "ich": 1})
    assert (cohort.train_ids, cohort.test_ids) == (("a", "b", "c"), ("d", "e"))
    assert cohort.foreground_labels == (1,)
    assert cohort.ignore_label is None
    case = cohort.load("c")
    assert np.array_equal(case.image_czyx, image_of(0)[None])
    assert case.labels_zyx is not None
    assert np.array_equal(case.labels_zyx, labels_of(0))
    assert cohort.load("e").labels_zyx is None
    assert cohort.load("c", with_labels=False).labels_zyx is None
    assert validate(cohort) == validate(cohort, voxels=True) == []
    check_orientations(cohort)
    with pytest.raises(InputError, match="no case 'zz'"):
        cohort.load("zz")


def test_several_channels_labels_an_ignore_label_and_a_label_map(nnunet: Path) -> None:
    for case in "abc":
        write_image(nnunet / f"imagesTr/{case}_0001.nii.gz", image_of(9), grid())
    for folder in ("imagesTs", "labelsTs"):
        shutil.rmtree(nnunet / folder)
    labels = labels_of(3, 5)
    write_labels(nnunet / "labelsTr/a.nii.gz", labels, grid())
    declared_labels = {"ignore": 3, "edema": 2, "background": 0, "ich": 1}
    declare(nnunet, channel_names={"1": "T2", "0": "CT"}, labels=declared_labels, label_map={"4": 1, "5": 3})
    cohort = read_cohort(nnunet)
    assert cohort.channel_names == ("CT", "T2")
    assert cohort.labels == {"background": 0, "ich": 1, "edema": 2}
    assert (cohort.ignore_label, cohort.foreground_labels) == (3, (1, 2))
    case = cohort.load("a")
    assert case.image_czyx.shape == (2, *SHAPE)
    assert np.array_equal(case.image_czyx[1], image_of(9))
    expected = labels.copy()
    expected[labels == 4] = 1
    expected[labels == 5] = 3
    assert case.labels_zyx is not None
    assert np.array_equal(case.labels_zyx, expected)


def test_a_label_map_may_swap_labels(nnunet: Path) -> None:
    labels = labels_of(3, 2)
    write_labels(nnunet / "labelsTr/a.nii.gz", labels, grid())
    declare(nnunet, labels={"background": 0, "ich": 1, "edema": 2}, label_map={"1": 2, "2": 1})
    mapped = read_cohort(nnunet).load("a").labels_zyx
    assert mapped is not None
    assert np.array_equal(mapped, np.array([0, 2, 1])[labels])


def test_a_case_table_adds_patient_site_and_subtype(nnunet: Path) -> None:
    rows = "a,p1,Beijing,IPH,1\nb,p1,,SDH,2\nunknown,,,,\n"
    (nnunet / "cases.csv").write_text(f"\ufeffcase,patient,site,subtype,other\n{rows}", encoding="utf-8")
    cohort = read_cohort(nnunet)
    assert cohort.groups == {"a": "p1", "b": "p1", "c": None, "d": None, "e": None}
    assert cohort.metadata()[0] == {
        "id": "a", "split": "train", "group": "p1", "site": "Beijing", "subtype": "IPH",
        "spacing_z_mm": "5.0", "spacing_y_mm": "0.5", "spacing_x_mm": "0.5",
    }  # fmt: skip
    (nnunet / "cases.csv").write_text("id,site\na,X\na,Y\n")
    with pytest.raises(InputError, match="'a' came twice"):
        read_cohort(nnunet)
    (nnunet / "cases.csv").write_text("name,site\na,X\n")
    with pytest.raises(InputError, match=r"needs a column id \(or case\), but has name, site"):
        read_cohort(nnunet)


@pytest.mark.parametrize("sub", [".", "train_2"])
def test_an_instance_folder(tmp_path: Path, sub: str) -> None:
    for number in (1, 2):
        write_image(tmp_path / sub / f"data/{number:03d}.nii.gz", image_of(number), grid())
        write_labels(tmp_path / sub / f"label/{number:03d}.nii.gz", labels_of(number), grid())
    cohort = read_cohort(tmp_path)
    assert cohort.train_ids == ("001", "002")
    assert cohort.labels == {"background": 0, "ich": 1}
    assert validate(cohort, voxels=True) == []
    (tmp_path / sub / "label/002.nii.gz").unlink()
    with pytest.raises(InputError, match=r"002\.nii\.gz: image without mask"):
        read_cohort(tmp_path)
    (tmp_path / sub / "data/002.nii.gz").unlink()
    write_labels(tmp_path / sub / "label/003.nii.gz", labels_of(3), grid())
    with pytest.raises(InputError, match=r"003\.nii\.gz: mask without image"):
        read_cohort(tmp_path)


def table(root: Path, rows: list[dict[str, str]]) -> Path:
    path = root / "cohort.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_cohort_table(nnunet: Path) -> None:
    row = {"id": "x", "image": "imagesTr/a_0000.nii.gz", "mask": "labelsTr/a.nii.gz", "split": "train", "group": "p1", "sha256": ""}
    test = row | {"id": "t", "image": "imagesTs/e_0000.nii.gz", "mask": "", "split": "test", "group": ""}
    (nnunet / "sub").mkdir()
    path = table(nnunet, [row, test])
    cohort = read_cohort(path)
    assert (cohort.train_ids, cohort.test_ids, cohort.name) == (("x",), ("t",), "Dataset001_X")
    assert cohort.record("x").group == "p1"
    assert cohort.record("t").group is None
    digest = cohort.case_digest("x")
    assert read_cohort(table(nnunet, [row | {"sha256": digest}])).load("x").id == "x"
    with pytest.raises(InputError, match=rf"has the digest {digest}, but {'0' * 64} is listed"):
        read_cohort(table(nnunet, [row | {"sha256": "0" * 64}])).load("x")
    (nnunet / "cohort.json").write_text(json.dumps({"name": "two", "channel_names": ["CT", "T2"], "labels": {"background": 0, "bleed": 1}}))
    two = read_cohort(table(nnunet, [row | {"image": "imagesTr/a_0000.nii.gz; imagesTr/b_0000.nii.gz"}]))
    assert two.load("x").image_czyx.shape == (2, *SHAPE)
    assert (two.name, two.labels) == ("two", {"background": 0, "bleed": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "val"}, "line 2: split is 'val'; allowed are train, test"),
        ({"image": "nowhere.nii.gz"}, r"line 2: .*nowhere\.nii\.gz does not exist"),
        ({"mask": "nowhere.nii.gz"}, r"line 2: .*nowhere\.nii\.gz does not exist"),
        ({"image": ""}, "line 2: case 'x' has no image"),
        ({"mask": ""}, "image without mask: training case 'x'"),
        ({"sha256": "12"}, "64 hexadecimal digits"),
        ({"id": "../x"}, "case id '../x' cannot name a file"),
        ({"id": ""}, "case id '' cannot name a file"),
        ({"image": "imagesTr/a_0000.nii.gz;imagesTr/b_0000.nii.gz"}, "case 'x' has 2 channels .* but 1 are declared"),
    ],
)
def test_a_cohort_table_that_is_wrong(nnunet: Path, change: dict[str, str], message: str) -> None:
    row = {"id": "x", "image": "imagesTr/a_0000.nii.gz", "mask": "labelsTr/a.nii.gz", "split": "train", "group": "", "sha256": ""}
    with pytest.raises(InputError, match=message):
        read_cohort(table(nnunet, [row | change]))


def test_tables_with_missing_columns_uneven_rows_doubles_or_odd_bytes(nnunet: Path) -> None:
    path = nnunet / "cohort.csv"
    for content, message in [
        (b"id,picture\n", "needs the columns id, image, but has id, picture"),
        (b"", "needs the columns id, image, but has none"),
        (b"id,image\n", "the cohort is empty"),
        (b"id,image\na\n", "line 2: has not 2 cells"),
        (b"id,image\na,b,c\n", "line 2: has not 2 cells"),
        (b"id,image\n\xff,b\n", "UTF-8"),
        (b"id,image,split\n" + b"a,imagesTr/a_0000.nii.gz,test\n" * 2, "case id 'a' came twice"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_cohort(path)


def remove(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / name).unlink() for name in names] and None


def declared(**changes: Any) -> Callable[[Path], None]:
    return lambda root: declare(root, **changes)


def added(name: str) -> Callable[[Path], None]:
    return lambda root: write_labels(root / name, labels_of(0), grid())


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (shutil.rmtree, ["no such folder"]),
        (remove("dataset.json"), ["no cohort found", "imagesTr"]),
        (remove("labelsTr/b.nii.gz"), ["b_0000.nii.gz: image without mask", "labelsTr holds no mask of case 'b'"]),
        (remove("imagesTr/b_0000.nii.gz"), ["b.nii.gz: mask without image", "imagesTr holds no image of case 'b'"]),
        (added("labelsTs/zz.nii.gz"), ["zz.nii.gz: mask without image"]),
        (added("imagesTr/b_0001.nii.gz"), ["case 'b'", "'0001'", "declares 1 (CT)"]),
        (added("imagesTr/b.nii.gz"), ["b.nii.gz: the name must end with a channel number"]),
        (added("imagesTs/a_0000.nii.gz"), ["case id 'a' came twice"]),
        (declared(numTraining=4), ['"numTraining" is 4', "imagesTr holds 3 cases"]),
        (declared(numTraining=None), ['"numTraining" is None', "imagesTr holds 3 cases"]),
        (declared(file_ending=".png"), ["'.png'", "allowed are .nii.gz, .nii"]),
        (declared(file_ending=".nii"), ["the cohort is empty"]),
        (declared(channel_names={"1": "CT"}), ['"channel_names"', "numbered from 0"]),
        (declared(channel_names=None), ['"channel_names" is None']),
        (declared(labels=None), ['"labels" is None']),
        (declared(labels={"background": 0, "ich": "1"}), ["'ich' is '1'", "one integer"]),
        (declared(labels={"background": 0, "whole": [1, 2]}), ["regions_class_order", "1 regions (whole)"]),
        (declared(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1]), ["regions_class_order", "2 regions"]),
        (declared(labels={"background": 0, "ich": 2}), ["without gaps", "label_map"]),
        (declared(labels={"background": 1, "ich": 0}), ['"background": 0']),
        (declared(labels={"background": 0}), ["at least one more"]),
        (declared(labels={"background": 0, "ignore": 1, "ich": 2}), ['"ignore" is 1', "highest label, 2"]),
        (declared(label_map={"one": 1}), ['"label_map"', "in integers"]),
        (declared(label_map={"1": 0.5}), ['"label_map"', "integer"]),
        (declared(label_map=[1]), ['"label_map"']),
        (declared(dataset={}), ['"dataset"', "cohort.csv"]),
        (lambda root: (root / "dataset.json").write_text("{"), ["cannot be read as JSON"]),
        (lambda root: (root / "dataset.json").write_text("[]"), ["must hold a JSON object"]),
        (lambda root: [shutil.rmtree(root / f) for f in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")], ["no folder imagesTr"]),
    ],
)
def test_folders_that_are_wrong(nnunet: Path, spoil: Callable[[Path], object], messages: list[str]) -> None:
    spoil(nnunet)
    with pytest.raises(InputError) as caught:
        read_cohort(nnunet)
    for message in (*messages, "Dataset001_X"):
        assert message in str(caught.value)


def test_an_empty_folder_and_a_file_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cohort found"):
        read_cohort(tmp_path)
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match=r"a folder or a \.csv"):
        read_cohort(tmp_path / "a.nii.gz")
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="the cohort is empty"):
        read_cohort(tmp_path)


def moved(column: int, row: int, by: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[row, column] += by
    return affine


@pytest.mark.parametrize(
    ("shape", "affine", "messages"),
    [
        ((3, 6, 4), AFFINE, ["shape", "(3, 6, 5)", "(3, 6, 4)"]),
        (SHAPE, moved(0, 2, 0.5), ["spacing", "(5.0, 0.5, 0.5)", "(5.5, 0.5, 0.5)"]),
        (SHAPE, moved(3, 1, 0.25), ["origin", "[9.0, 8.0, 7.0]", "[9.0, 8.25, 7.0]"]),
        (SHAPE, moved(0, 1, 0.05), ["direction", "[0.01, -1.0, 0.0]"]),
        (SHAPE, AFFINE @ np.diag([1.0, -1.0, 1.0, 1.0]), ["orientation", "SPL", "SAL"]),
    ],
)
def test_a_mask_on_another_grid_is_refused_with_both_files_and_values(
    nnunet: Path, shape: tuple[int, int, int], affine: np.ndarray, messages: list[str]
) -> None:
    write_labels(nnunet / "labelsTr/b.nii.gz", labels_of(0, shape=shape), grid(shape, affine))
    cohort = read_cohort(nnunet)
    with pytest.raises(InputError) as caught:
        cohort.load("b")
    for message in (*messages, "b_0000.nii.gz", "b.nii.gz"):
        assert message in str(caught.value)
    assert validate(cohort) == [str(caught.value)]
    assert cohort.load("b", with_labels=False).labels_zyx is None


def test_rounding_of_the_affine_is_no_difference(nnunet: Path) -> None:
    write_labels(nnunet / "labelsTr/b.nii.gz", labels_of(0), grid(SHAPE, moved(3, 0, 5e-4)))
    assert read_cohort(nnunet).load("b").id == "b"


def test_a_mask_stored_in_another_axis_order_still_lies_on_its_image(nnunet: Path) -> None:
    labels = labels_of(1)
    other = Grid(SHAPE, AFFINE, file_axes=(0, 2, 1))
    write_labels(nnunet / "labelsTr/a.nii.gz", labels, other)
    assert nibabel.load(nnunet / "labelsTr/a.nii.gz").shape == (3, 5, 6)
    loaded = read_cohort(nnunet).load("a").labels_zyx
    assert loaded is not None
    assert np.array_equal(loaded, labels)


def test_label_values_outside_the_declared_set(nnunet: Path) -> None:
    write_labels(nnunet / "labelsTr/b.nii.gz", labels_of(0, 3), grid())
    cohort = read_cohort(nnunet)
    with pytest.raises(InputError, match=r"b\.nii\.gz: holds the label values \[2, 3\], but declared are \[0, 1\] \(background=0, ich=1\)"):
        cohort.load("b")
    assert validate(cohort) == []
    assert len(validate(cohort, voxels=True)) == 1


def test_channels_on_different_grids(nnunet: Path) -> None:
    shutil.rmtree(nnunet / "imagesTs")
    shutil.rmtree(nnunet / "labelsTs")
    declare(nnunet, channel_names={"0": "CT", "1": "CT"})
    for case in "abc":
        write_image(nnunet / f"imagesTr/{case}_0001.nii.gz", image_of(9), grid(SHAPE, moved(3, 2, 1.0)))
    with pytest.raises(InputError, match=r"a_0000\.nii\.gz and a_0001\.nii\.gz differ in origin"):
        read_cohort(nnunet).load("a")


def test_cases_that_point_another_way_are_refused_unless_reoriented(nnunet: Path, tmp_path: Path) -> None:
    turned = AFFINE @ np.diag([-1.0, 1.0, -1.0, 1.0])
    labels = labels_of(2)
    write_image(nnunet / "imagesTr/b_0000.nii.gz", image_of(2), grid(SHAPE, turned))
    write_labels(nnunet / "labelsTr/b.nii.gz", labels, grid(SHAPE, turned))
    cohort = read_cohort(nnunet)
    for call in (lambda: cohort.load("b"), lambda: check_orientations(cohort)):
        with pytest.raises(InputError, match=r"b_0000\.nii\.gz: its axes \(z, y, x\) point to IPR, those of .*a_0000\.nii\.gz to SPL"):
            call()
    assert len(validate(cohort)) == 1
    assert np.array_equal(cohort.load("b", keep_file_order=True).image_czyx[0], image_of(2))

    steady = read_cohort(nnunet, reorient=True)
    check_orientations(steady)
    assert validate(steady, voxels=True) == []
    case = steady.load("b")
    assert case.grid.axis_codes_zyx == "SPL"
    assert np.array_equal(case.image_czyx[0], image_of(2)[::-1, :, ::-1])
    assert case.labels_zyx is not None
    write_labels(tmp_path / "back.nii.gz", case.labels_zyx, case.grid)
    assert np.array_equal(read_labels(tmp_path / "back.nii.gz")[0], labels)
    assert np.array_equal(nibabel.load(tmp_path / "back.nii.gz").affine, nibabel.load(nnunet / "labelsTr/b.nii.gz").affine)
    assert steady.case_digest("b") == cohort.case_digest("b")
    assert steady.digest() != cohort.digest()


@pytest.mark.parametrize("keep", [False, True])
def test_cases_are_turned_as_a_reader_of_nnunets_does(nnunet: Path, keep: bool) -> None:
    turned = AFFINE @ np.diag([-1.0, 1.0, -1.0, 1.0])
    write_image(nnunet / "imagesTr/b_0000.nii.gz", image_of(2), grid(SHAPE, turned))
    write_labels(nnunet / "labelsTr/b.nii.gz", labels_of(2), grid(SHAPE, turned))
    cohort = read_cohort(nnunet, reorient="NibabelIOWithReorient")
    check_orientations(cohort)
    case = cohort.load("b", keep_file_order=keep)
    assert case.grid.axis_codes_zyx == "SAR"
    np.testing.assert_array_equal(case.image_czyx[0], image_of(2)[::-1, ::-1])
    assert case.labels_zyx is not None
    np.testing.assert_array_equal(case.labels_zyx, labels_of(2)[::-1, ::-1])
    np.testing.assert_array_equal(cohort.load("b", keep_file_order=True, reorient=False).image_czyx[0], image_of(2))


def test_digests_see_every_change_and_nothing_else(nnunet: Path, tmp_path: Path) -> None:
    first = read_cohort(nnunet)
    copy = tmp_path / "elsewhere"
    shutil.copytree(nnunet, copy)
    for path in copy.rglob("*.nii.gz"):
        nibabel.save(nibabel.load(path), path)  # packed by another library
    same = read_cohort(copy)
    assert same.digest() == first.digest()

    def changed(change: Callable[[], None]) -> Cohort:
        change()
        return read_cohort(copy)

    seen = {first.digest()}
    image = image_of(1)
    image[1, 2, 3] += 1
    for change in (
        lambda: write_image(copy / "imagesTr/a_0000.nii.gz", image, grid()),
        lambda: write_labels(copy / "labelsTr/a.nii.gz", 1 - labels_of(1), grid()),
        lambda: [write_image(copy / "imagesTs/e_0000.nii.gz", image_of(4), grid(SHAPE, moved(3, 0, 0.1)))] and None,
        lambda: (copy / "cases.csv").write_text("id,site\na,X\n") and None,
        lambda: declare(copy, labels={"background": 0, "edema": 1}),
    ):
        seen.add(changed(change).digest())
    assert len(seen) == 6
    assert read_cohort(copy).case_digest("b") == first.case_digest("b")


def test_damaged_files_are_reported_case_by_case(nnunet: Path) -> None:
    path = nnunet / "imagesTr/b_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    (nnunet / "labelsTr/c.nii.gz").write_bytes(b"")
    problems = validate(read_cohort(nnunet))
    assert len(problems) == 2
    assert "b_0000.nii.gz" in problems[0]
    assert "c.nii.gz: is empty" in problems[1]


def test_real_cohorts(shared_data: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phe = read_cohort(shared_data / "Dataset501_PHE")
        assert (len(phe.train_ids), len(phe.test_ids)) == (30, 13)
        assert phe.labels == {"background": 0, "edema": 1}
        assert validate(phe) == []
        assert {row["spacing_z_mm"] for row in phe.metadata()} == {"5.0"}
        case = phe.load("phe_0051")
        assert case.image_czyx.shape == (1, 25, 512, 512)
        assert case.grid.axis_codes_zyx == "SPL"
        assert (float(case.image_czyx.min()), float(case.image_czyx.max())) == (-20.0, 100.0)

        hippocampus = read_cohort(shared_data / "Dataset004_Hippocampus")
        assert (len(hippocampus.train_ids), len(hippocampus.test_ids)) == (38, 0)
        assert hippocampus.foreground_labels == (1, 2)
        assert validate(hippocampus, voxels=True) == []
        assert hippocampus.load("hippocampus_001").grid.axis_codes_zyx == "SAR"
        assert len(hippocampus.digest()) == 64
