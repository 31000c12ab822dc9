"""Model folders of several folds and channels: which files make a case, whose logits are averaged, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import CT, small_plan, write_model

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import read_image, read_labels, write_image
from ichbench.errors import InputError
from ichbench.inference.inputs import find_images
from ichbench.inference.model import load_model, predict_path, read_model
from ichbench.inference.predictors import predict_unet

GRID = Grid((6, 20, 22), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))
TWO = ("CT", "MR")


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def names(found: dict[str, tuple[Path, ...]]) -> dict[str, list[str]]:
    return {case: [path.name for path in files] for case, files in found.items()}


def test_files_of_one_channel(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "p_0000.nii.gz", "q.nii", "scan_0007.nii.gz", ".hidden.nii.gz", "notes.txt")
    assert names(find_images(folder, ("CT",))) == {"p": ["p_0000.nii.gz"], "q": ["q.nii"], "scan_0007": ["scan_0007.nii.gz"]}
    assert names(find_images(folder / "scan_0007.nii.gz", ("CT",))) == {"scan_0007": ["scan_0007.nii.gz"]}
    # cases that are numbered themselves, without a number 0000 that would make them channels
    numbered = touch(tmp_path / "b", "p_0001.nii.gz", "p_0002.nii.gz")
    assert list(find_images(numbered, ("CT",))) == ["p_0001", "p_0002"]


def test_files_of_several_channels(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "p_0000.nii.gz", "p_0001.nii.gz", "p_q_0000.nii", "p_q_0001.nii")
    expected = {"p": ["p_0000.nii.gz", "p_0001.nii.gz"], "p_q": ["p_q_0000.nii", "p_q_0001.nii"]}
    assert names(find_images(folder, TWO)) == expected
    for name in ("p_0000.nii.gz", "p_0001.nii.gz"):
        assert names(find_images(folder / name, TWO)) == {"p": expected["p"]}


@pytest.mark.parametrize(
    ("files", "given", "channels", "said"),
    [
        (["p_0000.nii.gz"], "", TWO, "takes 2 channels"),
        (["p_0000.nii.gz", "p_0002.nii.gz"], "", TWO, "numbered from 0000"),
        (["p_0000.nii.gz", "p_0001.nii.gz", "p_0002.nii.gz"], "", TWO, "has the files"),
        (["p.nii.gz"], "", TWO, "CASE_0000.nii.gz"),
        (["p_0000.nii.gz"], "p_0000.nii.gz", TWO, "there is no p_0001.nii.gz"),
        (["p.nii.gz"], "p.nii.gz", TWO, "CASE_0000.nii.gz"),
        (["p_0000.nii.gz", "p_0001.nii.gz"], "", ("CT",), "has several channels, but the model takes one"),
        (["p_0000.nii.gz", "p.nii.gz"], "", ("CT",), "the same case 'p'"),
        (["p.nii", "p.nii.gz"], "", ("CT",), "the same case 'p'"),
        (["notes.txt"], "", ("CT",), "holds no image"),
    ],
)
def test_files_that_make_no_case(tmp_path: Path, files: list[str], given: str, channels: tuple[str, ...], said: str) -> None:
    folder = touch(tmp_path / "images", *files)
    with pytest.raises(InputError, match=said):
        find_images(folder / given if given else folder, channels)


def write_case(folder: Path, case_id: str, channels: int, seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).normal(40, 20, (channels, *GRID.shape_zyx)).astype(np.float32)
    for index, channel in enumerate(image):
        write_image(folder / f"{case_id}_{index:04d}.nii.gz", channel, GRID)
    return image


def test_folds_are_averaged_and_channels_keep_their_order(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", small_plan(channels=TWO), folds=("0", "2"), overlay={"inference": {"mirror": False}})
    model = load_model(folder)
    assert len(model.tools.networks) == 2
    image = write_case(tmp_path / "images", "a", 2)
    (done,) = predict_path(model, tmp_path / "images/a_0001.nii.gz", tmp_path / "mask.nii.gz")
    labels, grid = read_labels(done.path)
    expected = predict_unet(Case("a", image, None, grid), model.tools).labels_zyx
    np.testing.assert_array_equal(labels, expected)
    swapped = predict_unet(Case("a", image[::-1].copy(), None, grid), model.tools).labels_zyx
    assert (swapped != labels).any()
    first, second = model.tools.networks
    assert not torch.equal(first.heads[0].weight, second.heads[0].weight)


def test_channels_must_lie_on_the_same_voxels(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "model", small_plan(channels=TWO)))
    images = tmp_path / "images"
    write_case(images, "a", 2)
    volume = read_image(images / "a_0001.nii.gz")[0]
    write_image(images / "a_0001.nii.gz", volume[:, :, 1:], GRID.resized((6, 20, 21), np.ones(3), np.zeros(3)))
    with pytest.raises(InputError, match=r"a_0000.nii.gz and a_0001.nii.gz differ: shape"):
        list(predict_path(model, images, tmp_path / "out"))
    write_image(images / "a_0001.nii.gz", volume, GRID.resized(GRID.shape_zyx, np.ones(3), np.array([0.0, 3.0, 0.0])))
    with pytest.raises(InputError, match="different places"):
        list(predict_path(model, images, tmp_path / "out"))
    # nnU-Net compares shape and spacing alone
    theirs = load_model(write_model(tmp_path / "theirs", small_plan(channels=TWO), overlay={"prepare": {"compatibility": "nnunet"}}))
    (done,) = predict_path(theirs, images, tmp_path / "out")
    assert "lies elsewhere" in done.notes[0]


def test_no_channel_is_overwritten(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "model", small_plan(channels=TWO)))
    write_case(tmp_path / "images", "a", 2)
    before = (tmp_path / "images/a_0001.nii.gz").read_bytes()
    with pytest.raises(InputError, match="would overwrite"):
        list(predict_path(model, tmp_path / "images/a_0000.nii.gz", tmp_path / "images/a_0001.nii.gz"))
    assert (tmp_path / "images/a_0001.nii.gz").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("labels", {"ich": 1}, "background"),
        ("labels", None, "labels"),
        ("folds", ["../other"], "letters and digits"),
        ("axes_zyx", 3, "axes_zyx"),
        ("recipe", {"prepare": {"windows": 1}}, "not a model folder"),
        ("channel_names", None, "not a model folder"),
    ],
)
def test_a_model_json_that_is_none(tmp_path: Path, key: str, value: object, said: str) -> None:
    folder = write_model(tmp_path / "model", small_plan())
    table = json.loads((folder / "model.json").read_text()) | {key: value}
    (folder / "model.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=said):
        read_model(folder)


def test_a_missing_fold_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", small_plan(), folds=("0", "1"))
    (folder / "fold_1/final.safetensors").unlink()
    with pytest.raises(InputError, match="fold_1"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intensities": {}}, "channel 0 is normalised as CT, but the mean .* is None"),
        ({"intensities": {"0": {**CT, "std": math.nan}}}, "the std .* is nan"),
        ({"intensities": {"0": {**CT, "percentile_99_5": 10**400}}}, "the percentile_99_5"),
        ({"intensities": {"0": {**CT, "mean": "40"}}}, "is '40'"),
        ({"intensities": {"0": 3}}, "the mean"),
        ({"intensities": [CT]}, "no table"),
        ({"normalization": None}, "no table"),
        ({"normalization": ["Mine"]}, "'Mine' is not known"),
        ({"normalization": [{}]}, "is not known"),
    ],
)
def test_a_plan_whose_intensities_are_damaged(tmp_path: Path, change: dict[str, object], said: str) -> None:
    folder = write_model(tmp_path / "model", small_plan())
    table = json.loads((folder / "plan.json").read_text()) | change
    (folder / "plan.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=said) as error:
        load_model(folder)
    assert "plan.json" in str(error.value)


def test_other_schemes_need_no_intensities(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", small_plan(channels=("MR",)))
    (folder / "plan.json").write_text(json.dumps(json.loads((folder / "plan.json").read_text()) | {"intensities": {}}))
    load_model(folder)


@pytest.mark.parametrize("name", ["model.json", "plan.json"])
def test_json_that_nests_without_end(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "model", small_plan())
    (folder / name).write_text("[" * 200_000)
    with pytest.raises(InputError, match="not a model folder"):
        read_model(folder)


def test_a_plan_that_claims_a_huge_network_allocates_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", small_plan())
    table = json.loads((folder / "plan.json").read_text()) | {"features": [14_000] * 3}
    (folder / "plan.json").write_text(json.dumps(table))
    monkeypatch.setattr("ichbench.inference.model.make_unet", lambda *_: pytest.fail("the network was allocated"))
    with pytest.raises(InputError, match="fewer bytes than the plan's network has weights"):
        load_model(folder)
