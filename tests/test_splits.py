from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.cases.splits import check_splits, five_folds, fold_of, random_fold, read_splits, write_splits
from ichbench.errors import InputError


def names(n: int) -> list[str]:
    return [f"case_{i:03d}" for i in range(n)]


# What nnU-Net v2 prints for 10 and 13 cases (facts, nnunet-v2.md section 8).
@pytest.mark.parametrize(
    ("n", "validation"),
    [
        (10, [(0, 7), (3, 9), (4, 6), (1, 8), (2, 5)]),
        (13, [(0, 7, 9), (3, 6, 10), (8, 11, 12), (1, 4), (2, 5)]),
    ],
)
def test_the_folds_are_nnunets(n: int, validation: list[tuple[int, ...]]) -> None:
    ids = names(n)
    for fold, expected in zip(five_folds(list(reversed(ids))), validation, strict=True):
        assert fold["val"] == [ids[i] for i in expected]
        assert fold["train"] == [ids[i] for i in range(n) if i not in expected]


@given(st.integers(2, 7), st.integers(0, 40), st.integers(0, 5))
@settings(max_examples=60)
def test_folds_partition_the_cases_and_never_part_a_patient(n_folds: int, extra: int, per_patient: int) -> None:
    ids = names(n_folds * max(per_patient, 1) + extra)
    groups = {case: f"p{i // per_patient}" if per_patient and i % 3 else None for i, case in enumerate(ids)}
    folds = five_folds(ids, groups, n_folds)
    assert sorted(case for fold in folds for case in fold["val"]) == ids
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == ids
        train, val = ({groups[case] for case in fold[side]} - {None} for side in ("train", "val"))
        assert not train & val
    assert check_splits(folds, ids, groups) == []


def test_groups_of_one_give_the_ungrouped_folds() -> None:
    ids = names(13)
    assert five_folds(ids, dict.fromkeys(ids)) == five_folds(ids, {case: case for case in ids}) == five_folds(ids)


def test_a_lone_case_named_like_a_group_stays_alone() -> None:
    ids = ["a", "b", "c", "d", "e", "f"]
    folds = five_folds(ids, {"b": "a", "c": "a"})
    together = [fold for fold in folds if "b" in fold["val"]]
    assert together[0]["val"] == ["b", "c"]


def test_too_few_cases_or_patients() -> None:
    with pytest.raises(InputError, match="5 folds of 4 cases"):
        five_folds(names(4))
    with pytest.raises(InputError, match=r"5 folds of 4 groups \(8 cases\)"):
        five_folds(names(8), {case: f"p{i % 4}" for i, case in enumerate(names(8))})
    with pytest.raises(InputError, match="came twice"):
        five_folds([*names(6), "case_000"])


def test_folds_beyond_the_last_are_nnunets_random_80_20() -> None:
    ids = names(11)
    fold = random_fold(ids, 7)
    train = np.random.RandomState(12345 + 7).choice(11, 8, replace=False)
    assert fold["train"] == sorted(ids[i] for i in train)
    assert sorted(fold["train"] + fold["val"]) == ids
    folds = five_folds(ids)
    assert fold_of(folds, 4, ids) == folds[4]
    assert fold_of(folds, 7, ids) == fold
    with pytest.raises(InputError, match="0 or more"):
        fold_of(folds, -1, ids)
    with pytest.raises(InputError, match="at least 2"):
        random_fold(["a"], 5)


def test_splits_final_json_is_read_and_written(tmp_path: Path) -> None:
    folds = five_folds(names(12))
    path = tmp_path / "splits_final.json"
    write_splits(path, folds)
    assert json.loads(path.read_text()) == folds
    assert read_splits(path, names(12)) == folds


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "list with one"),
        ({"train": []}, "list with one"),
        ([{"train": ["case_000"]}], 'exactly the keys "train" and "val"'),
        ([{"train": [], "val": ["case_000"]}], 'fold 0: "train" must be a list'),
        ([{"train": ["case_000"], "val": "case_001"}], 'fold 0: "val" must be a list'),
        ([{"train": [1], "val": ["case_001"]}], '"train" must be a list'),
        ([{"train": ["case_000"], "val": ["case_000"]}], "'case_000' both in train and in val"),
        ([{"train": ["case_000", "case_000"], "val": ["case_001"]}], "'case_000' twice"),
        ([{"train": ["case_000"], "val": ["other"]}], "'other', not among the 3 training cases"),
    ],
)
def test_splits_that_are_refused(tmp_path: Path, splits: object, message: str) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps(splits))
    with pytest.raises(InputError, match=message) as caught:
        read_splits(path, names(3))
    assert str(path) in str(caught.value)


def test_a_broken_or_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_splits(tmp_path / "splits_final.json")
    (tmp_path / "splits_final.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_splits(tmp_path / "splits_final.json")


def test_what_looks_unintended_is_noted() -> None:
    ids = names(4)
    splits = [{"train": [ids[0], ids[1]], "val": [ids[2]]}, {"train": [ids[0]], "val": [ids[2]]}]
    notes = check_splits(splits, ids, {ids[0]: "p", ids[2]: "p"})
    assert notes == [
        "fold 0: group 'p' both in train and in val: its scores will look too good",
        "fold 1: group 'p' both in train and in val: its scores will look too good",
        "'case_000', 'case_001' never validated",
        "'case_003' in no fold",
        "'case_002' validated more than once",
    ]
