"""Which files are scored against which: plain folders, nnU-Net data sets, INSTANCE folders, cohort.csv; and what labels mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ichbench.errors import InputError
from ichbench.scoring.layouts import case_id, check_labels, declares_labels, files_by_case, find_pairs, references_in, rules_in, with_images
from ichbench.scoring.score import regions_of


def touch(folder: Path, *names: str) -> Path:
    """Empty files: nothing here opens a mask."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def declare(folder: Path, labels: Any, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz", **more}))
    return path


CLOT = {"background": 0, "clot": 1}


def test_names_are_matched_without_their_ending(tmp_path: Path) -> None:
    references = touch(tmp_path / "r", "2.nii.gz", "10.nii", "a.b.nii.gz", "._2.nii.gz", "notes.txt")
    # as nnU-Net leaves a folder of predictions
    predictions = touch(
        tmp_path / "p", "2.nii", "a.b.nii.gz", "900.nii.gz", "dataset.json", "plans.json", "predict_from_raw_data_args.json"
    )
    (references / "folder.nii.gz").mkdir()
    found = find_pairs(references, predictions)
    assert [(pair.case, pair.reference, pair.prediction) for pair in found.pairs] == [
        ("10", references / "10.nii", None),
        ("2", references / "2.nii.gz", predictions / "2.nii"),
        ("a.b", references / "a.b.nii.gz", predictions / "a.b.nii.gz"),
    ]
    assert (found.extra, found.arm, found.labels) == ((predictions / "900.nii.gz",), "p", None)


def test_case_id() -> None:
    assert [case_id(Path(name)) for name in ("a/001.nii.gz", "phe_1.v2.nii", "x.nrrd")] == ["001", "phe_1.v2", "x.nrrd"]


def test_two_files_need_no_common_name(tmp_path: Path) -> None:
    folder = touch(tmp_path, "truth.nii.gz", "mine.nii")
    (pair,) = find_pairs(folder / "truth.nii.gz", folder / "mine.nii").pairs
    assert (pair.case, pair.reference, pair.prediction) == ("truth", folder / "truth.nii.gz", folder / "mine.nii")


def test_nnunet_data_sets_use_test_labels_where_there_are_any(tmp_path: Path) -> None:
    declare(tmp_path, {"background": 0, "whole": [1, 2], "core": 2})
    touch(tmp_path / "labelsTr", "a.nii.gz")
    assert references_in(tmp_path)[0] == {"a": tmp_path / "labelsTr" / "a.nii.gz"}
    touch(tmp_path / "labelsTs")
    assert list(references_in(tmp_path)[0]) == ["a"]
    touch(tmp_path / "labelsTs", "b.nii.gz")
    found, (labels, label_map) = references_in(tmp_path)
    assert found == {"b": tmp_path / "labelsTs" / "b.nii.gz"}
    assert labels == {"background": 0, "whole": (1, 2), "core": 2}
    assert label_map is None
    with pytest.raises(InputError, match=r"1 match .*labelsTr: give that folder, with --dataset-json"):
        find_pairs(tmp_path, touch(tmp_path / "p", "a.nii.gz"))
    paired = find_pairs(tmp_path / "labelsTr", tmp_path / "p", tmp_path / "dataset.json")
    assert [(pair.case, pair.prediction) for pair in paired.pairs] == [("a", tmp_path / "p" / "a.nii.gz")]
    assert paired.labels == labels


def test_instance_folders(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two" / "train_2"):
        touch(folder / "data", "001.nii.gz", "002.nii.gz")
        touch(folder / "label", "001.nii.gz", "002.nii.gz")
    assert list(references_in(tmp_path / "one")[0].values()) == [tmp_path / "one" / "label" / f"00{n}.nii.gz" for n in (1, 2)]
    found = find_pairs(tmp_path / "two", touch(tmp_path / "p", "002.nii.gz"))
    assert [(pair.case, pair.prediction is None) for pair in found.pairs] == [("001", True), ("002", False)]


@pytest.mark.parametrize("where", ["one/label", "two/train_2/label"])
def test_what_an_instance_folder_declares(tmp_path: Path, where: str) -> None:
    """Its cohort.json, also for the folder of its masks alone; a --dataset-json wins."""
    root = tmp_path / Path(where).parts[0]
    touch(tmp_path / where, "001.nii.gz")
    touch((tmp_path / where).with_name("data"), "001.nii.gz")
    predictions = touch(tmp_path / "p", "001.nii.gz")
    assert find_pairs(root, predictions).labels is None
    (root / "cohort.json").write_text('{"labels": {"background": 0, "clot": 1, "ignore": 2}, "label_map": {"5": 1}}')
    for place in (root, tmp_path / where):
        found = find_pairs(place, predictions)
        assert (found.labels, found.label_map) == ({"background": 0, "clot": 1, "ignore": 2}, {5: 1})
        given = find_pairs(place, predictions, declare(tmp_path, CLOT))
        assert (given.labels, given.label_map) == (CLOT, None)
    (root / "cohort.json").write_text("{")
    with pytest.raises(InputError, match=r"cohort.json: cannot be read as JSON"):
        references_in(root)


def test_the_masks_of_a_data_set_mean_what_its_dataset_json_says(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    declare(tmp_path, labels, label_map={"5": 1})
    for name in ("labelsTr", "labelsTs", "masks"):
        found, (said, label_map) = references_in(touch(tmp_path / name, "a.nii.gz"))
        assert list(found) == ["a"]
        expected = (None, None) if name == "masks" else ({**labels, "whole": (1, 2)}, {5: 1})
        assert (said, label_map) == expected


def test_a_cohort_table(tmp_path: Path) -> None:
    touch(tmp_path / "x", "i.nii.gz", "m1.nii.gz", "m2.nii.gz")
    table = "id,image,mask,split\na,x/i.nii.gz,x/m1.nii.gz,{}\nb,x/i.nii.gz,x/m2.nii.gz,train\n"
    (tmp_path / "cohort.json").write_text('{"labels": {"background": 0, "clot": 1, "ignore": 2}, "label_map": {"5": 1}}')
    (tmp_path / "cohort.csv").write_text(table.format("train"))
    found, (labels, label_map) = references_in(tmp_path)
    assert found == {"a": tmp_path / "x/m1.nii.gz", "b": tmp_path / "x/m2.nii.gz"}
    assert labels == {"background": 0, "clot": 1, "ignore": 2}
    assert label_map == {5: 1}
    (tmp_path / "cohort.csv").write_text(table.format("test"))
    assert list(references_in(tmp_path)[0]) == ["a"]


def test_real_data_sets(shared_data: Path) -> None:
    found = find_pairs(shared_data / "Dataset501_PHE", shared_data / "phe_derived_hematoma")
    assert len(found.pairs) == 13
    assert all(pair.reference.parent.name == "labelsTs" and pair.prediction is not None for pair in found.pairs)
    assert found.labels == {"background": 0, "edema": 1}
    hippocampus = shared_data / "Dataset004_Hippocampus"
    found = find_pairs(hippocampus, hippocampus / "labelsTr")
    assert len(found.pairs) == len(list((hippocampus / "labelsTr").glob("*.nii.gz")))
    assert regions_of(found.labels or {}) == {"1": (1,), "2": (2,)}


def test_what_cannot_be_paired(tmp_path: Path) -> None:
    full, empty = touch(tmp_path / "full", "1.nii.gz"), touch(tmp_path / "empty", "notes.txt")
    other = touch(tmp_path / "other", "x.nii.gz")
    file = full / "1.nii.gz"
    for reference, prediction, words in (
        (tmp_path / "absent", full, "absent does not exist; give a reference mask"),
        (full, tmp_path / "absent", "absent does not exist; give a predicted mask"),
        (full, file, "full is a folder, but .*1.nii.gz is a file"),
        (file, full, "1.nii.gz is a file, but .*full is a folder"),
        (empty, full, "empty holds no reference: no file ends in .nii.gz or .nii, and it is neither"),
        (full, other, "other holds no prediction for any of the 1 references in .*full; .* such as 1.nii.gz"),
    ):
        with pytest.raises(InputError, match=words):
            find_pairs(reference, prediction)
    # nothing handed in is a submission all the same
    assert [pair.prediction for pair in find_pairs(full, empty).pairs] == [None]
    touch(full, "1.nii")
    with pytest.raises(InputError, match=r"two files of case 1: 1\.nii and 1\.nii\.gz"):
        files_by_case(full)
    declare(empty, CLOT)
    with pytest.raises(InputError, match="no mask in labelsTs or labelsTr"):
        find_pairs(empty, other)


def test_masks_of_a_cohort_csv_given_alone(tmp_path: Path) -> None:
    """Its cohort.json holds for the folders that the table names, however deep below it, and for no other."""
    other = touch(tmp_path / "p", "1.nii.gz")
    near, far, deep, stray = (touch(tmp_path / "set" / name, "1.nii.gz") for name in ("masks", "site/masks", "a/b/c/masks", "drafts"))
    table, declared = tmp_path / "set/cohort.csv", tmp_path / "set/cohort.json"
    # images need not be there to score masks
    table.write_text(
        "id,image,mask\n1,gone.nii.gz,masks/1.nii.gz\n2,gone.nii.gz,site/masks/1.nii.gz\n3,gone.nii.gz,\n4,gone.nii.gz,a/b/c/masks/1.nii.gz\n"
    )
    assert find_pairs(near, other).labels is None
    declared.write_text('{"labels": {"background": 0, "whole": [1, 2], "ignore": 3}, "regions_class_order": [1], "label_map": {"5": 2}}')
    for folder in (near, far, deep):
        found = find_pairs(folder, other)
        assert (found.labels, found.label_map) == ({"background": 0, "whole": (1, 2), "ignore": 3}, {5: 2})
        assert declares_labels(folder)
        assert (rules_in(folder) or pytest.fail("no rules")).regions_class_order == (1,)
    assert find_pairs(stray, other).labels is None
    assert not declares_labels(stray)
    # what is given goes first, also past a table that cannot be read
    table.write_text('id,mask\n1,"masks')
    with pytest.raises(InputError, match=r"cohort\.csv: cannot be read.*; without it .*: --dataset-json FILE may say so"):
        find_pairs(near, other)
    assert find_pairs(near, other, declare(tmp_path / "own", CLOT)).labels == {"background": 0, "clot": 1}


@pytest.mark.parametrize("ending", [".mha", ".nrrd", 5])
@pytest.mark.parametrize("inside", [False, True])
def test_another_ending_is_said_where_nothing_can_be_read(tmp_path: Path, ending: object, inside: bool) -> None:
    """What a data set calls its files is of no interest while masks that can be read are there, in it or given alone."""
    declared = declare(tmp_path / "set", CLOT, file_ending=ending, label_map={"5": 1})
    masks = touch(tmp_path / "set/labelsTr", "1.nii.gz")
    other = touch(tmp_path / "p", "1.nii.gz")
    reference = masks if inside else tmp_path / "set"
    for given in (None, declared):
        found = find_pairs(reference, other, given)
        assert [pair.reference for pair in found.pairs] == [masks / "1.nii.gz"]
        assert (found.labels, found.label_map) == ({"background": 0, "clot": 1}, {5: 1})
    assert rules_in(reference) is not None
    (masks / "1.nii.gz").rename(masks / "1.mha")
    said = rf'holds no reference: .*"file_ending" is {ending!r}; only \.nii\.gz or \.nii can be scored: convert the masks'
    with pytest.raises(InputError, match=said):
        find_pairs(reference, other)
    with pytest.raises(InputError, match="convert the masks"):
        references_in(reference)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", 'declares no "labels"'),
        ('{"labels": []}', "labels are"),
        ('{"labels": {"background": 0}}', "at least one besides background"),
        ('{"labels": {"background": 0, "a": 1.5}}', "label 'a' is 1.5"),
        ('{"labels": {"background": 0, "a": true}}', "label 'a' is True"),
        ('{"labels": {"background": 0, "a": []}}', r"label 'a' is \[\]"),
        ('{"labels": {"background": 0, "a": [1, -2]}}', r"label 'a' is \[1, -2\]"),
        ('{"labels": {"background": 0, "a/b": 1}}', "label name 'a/b' cannot stand in a row"),
        ('{"labels": {"background": 0, "a": 1, "ignore": [2]}}', "'ignore' is"),
        ('{"labels": {"background": 0, "a": 2, "2": [1, 2]}}', "two of them would have rows of one name"),
        ('{"labels": {"background": 0, "a": 1}, "label_map": {"x": 1}}', '"label_map" is'),
        ('{"labels": {"background": 0, "a": 1}, "label_map": {"5": 1.0}}', '"label_map" is'),
    ],
)
def test_what_a_dataset_json_must_say(tmp_path: Path, content: str, words: str) -> None:
    path = touch(tmp_path / "labelsTr", "1.nii.gz").parent / "dataset.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words) as error:
        find_pairs(tmp_path, tmp_path / "labelsTr")
    assert str(path) in str(error.value)


def test_labels_and_regions() -> None:
    declared = {"background": 0, "whole": [1, 2, 3], "core": [3], "vessel": 2, "ignore": 4}
    assert regions_of(check_labels(declared, "x")) == {"whole": (1, 2, 3), "core": (3,), "2": (2,)}
    assert check_labels({"0": "background", "1": "clot"}, "x") == {"background": 0, "clot": 1}


def test_label_maps_of_data_sets(tmp_path: Path) -> None:
    declare(tmp_path, CLOT, label_map={"2": 1, "5": 1})
    touch(tmp_path / "labelsTr", "1.nii.gz")
    assert find_pairs(tmp_path, tmp_path / "labelsTr").label_map == {2: 1, 5: 1}


def test_images_are_matched_by_case(tmp_path: Path) -> None:
    """As INSTANCE names them, as nnU-Net does, and a case that itself ends in _0000; other channels and cases do not matter."""
    masks = ("a.nii.gz", "b.nii.gz", "c_0000.nii", "d.nii.gz")
    found = find_pairs(touch(tmp_path / "r", *masks), touch(tmp_path / "p", *masks))
    images = touch(tmp_path / "i", "a.nii", "b_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz", "d_0001.nii.gz", "e.nii.gz")
    paired = with_images(found, images)
    assert [pair.image for pair in paired.pairs] == [images / "a.nii", images / "b_0000.nii.gz", images / "c_0000.nii.gz", None]
    assert paired.imageless == ("d",)
    assert [pair.image for pair in found.pairs] == [None] * 4
    (single,) = with_images(find_pairs(tmp_path / "r" / "a.nii.gz", tmp_path / "p" / "b.nii.gz"), images / "e.nii.gz").pairs
    assert (single.case, single.image) == ("a", images / "e.nii.gz")
    for given, words in (
        (images / "a.nii", "one image, but there are 4 references"),
        (tmp_path / "absent", "absent does not exist"),
        (touch(tmp_path / "others", "x.nii.gz"), r"no image for any of the 4 references.*a\.nii\.gz or a_0000\.nii\.gz"),
        (touch(tmp_path / "twice", "a.nii", "a_0000.nii.gz"), r"two images of case a: a\.nii and a_0000\.nii\.gz"),
    ):
        with pytest.raises(InputError, match=words):
            with_images(found, given)


def test_images_of_a_real_data_set(shared_data: Path) -> None:
    folder = shared_data / "Dataset501_PHE"
    found = with_images(find_pairs(folder, shared_data / "phe_derived_hematoma"), folder / "imagesTs")
    assert not found.imageless
    assert all(pair.image.name == f"{pair.case}_0000.nii.gz" for pair in found.pairs)
