"""The commands `ichbench postprocess` and `ichbench select` on folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from model_folders import REGIONS, small_plan, write_model

from ichbench.cases.case import Grid
from ichbench.cases.folders import read_declaration
from ichbench.cases.images import read_labels, write_image, write_labels
from ichbench.cli import ablation, app
from ichbench.errors import CaseError, InputError
from ichbench.inference.folders import apply_to_folder, find_in_folders, select_folders
from ichbench.inference.model import load_model, predict_path
from ichbench.inference.postprocess import Postprocessing

AFFINE = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]])


def write(folder: Path, **rows: str) -> Path:
    """Masks of one row, a digit a voxel."""
    folder.mkdir()
    for name, row in rows.items():
        labels = np.array([int(digit) for digit in row], np.int16).reshape(1, 1, -1)
        write_labels(folder / f"{name}.nii.gz", labels, Grid((1, 1, len(row)), AFFINE))
    return folder


def row(path: Path) -> str:
    return "".join(map(str, read_labels(path)[0].ravel()))


def run(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


def test_find_and_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = write(tmp_path / "reference", a="0111000", b="0001100")
    predictions = write(tmp_path / "predictions", a="0111001", b="0001100")
    run("postprocess", "find", reference, predictions, "--rule", tmp_path / "rule.json")
    assert "Dice 0.9286 -> 1.0000, kept" in capsys.readouterr().out
    others = write(tmp_path / "others", c="1100110111", d="0000000000")
    run("postprocess", "apply", others, "--rule", tmp_path / "rule.json", "--out", tmp_path / "out")
    assert f"{tmp_path / 'out' / 'c.nii.gz'}: 4 voxels removed" in capsys.readouterr().out
    assert (row(tmp_path / "out/c.nii.gz"), row(tmp_path / "out/d.nii.gz")) == ("0000000111", "0000000000")
    assert row(others / "c.nii.gz") == "1100110111"
    with pytest.raises(InputError, match="nothing is overwritten"):
        run("postprocess", "apply", others, "--rule", tmp_path / "rule.json", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="nothing is overwritten"):
        run("postprocess", "find", reference, predictions, "--rule", tmp_path / "rule.json")


def test_an_out_that_is_named_like_a_file(tmp_path: Path) -> None:
    """It is a file for one mask, and no name of a folder."""
    masks = write(tmp_path / "masks", a="0110100", b="0110100")
    rule = Postprocessing(((1,),))
    assert list(apply_to_folder(rule, masks / "a.nii.gz", tmp_path / "new/one.nii")) == [(tmp_path / "new/one.nii", 1)]
    assert row(tmp_path / "new/one.nii") == "0110000"
    with pytest.raises(InputError, match=r"one.nii exists already; .* nothing is overwritten"):
        list(apply_to_folder(rule, masks / "b.nii.gz", tmp_path / "new/one.nii"))
    for folder in (masks, write(tmp_path / "others", a="0110100")):
        probabilities(folder, "a", [0, 1, 1, 0, 1, 0, 0])
    (tmp_path / "notes").write_text("")
    for name in ("out.nii.gz", "notes"):
        with pytest.raises(InputError, match=f"{name} is a file or named like one; give a folder"):
            list(apply_to_folder(rule, masks, tmp_path / name))
        with pytest.raises(InputError, match=f"{name} is a file or named like one; give a folder"):
            run("ensemble", masks, tmp_path / "others", "--out", tmp_path / name)
    with pytest.raises(InputError, match="notes is a file or named like one"):
        list(apply_to_folder(rule, masks / "a.nii.gz", tmp_path / "notes"))
    assert next(apply_to_folder(rule, masks / "a.nii.gz", tmp_path / "folder"))[0] == tmp_path / "folder/a.nii.gz"


def test_ensembles_and_rules_leave_one_mask_of_a_case(tmp_path: Path) -> None:
    """`a.nii.gz` and an archive of another model's in the new folder: refused, or replaced; never two masks, or a mask with its archive."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write(folder, a="0110")
        (folder / "a.nii.gz").rename(folder / "a.nii")
        probabilities(folder, "a", [0, 1, 1, 0])
    for there in ("a.nii.gz", "a.npz"):
        out = tmp_path / f"out-{there}"
        out.mkdir()
        (out / there).write_bytes(b"another's")
        with pytest.raises(InputError, match=f"{there} exists already"):
            run("ensemble", *folders, "--out", out)
        with pytest.raises(InputError, match=f"{there} exists already; .* nothing is overwritten"):
            list(apply_to_folder(Postprocessing(((1,),)), folders[0], out))
        assert [path.name for path in out.iterdir()] == [there]
        run("ensemble", *folders, "--out", out, "--overwrite")
        assert [path.name for path in out.iterdir()] == ["a.nii"]
        (out / "a.nii").unlink()
        (out / "a.nii").mkdir()
        with pytest.raises(CaseError, match=r"case a: .*: Is a directory; see to it"):
            run("ensemble", *folders, "--out", out, "--overwrite")


def test_regions_and_ignore_of_a_dataset_json(tmp_path: Path) -> None:
    declared = {"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, "regions_class_order": [1, 2]}
    (tmp_path / "dataset.json").write_text(json.dumps(declared))
    reference = write(tmp_path / "reference", a="012100333")
    predictions = write(tmp_path / "predictions", a="012101000")
    assert find_in_folders(reference, predictions, tmp_path / "dataset.json").steps == ((1, 2),)
    hidden = write(tmp_path / "hidden", a="012103333")
    assert find_in_folders(hidden, predictions, tmp_path / "dataset.json").steps == ()


def cohort(folder: Path, declared: dict[str, object] | None, **rows: str) -> Path:
    """A folder with a cohort.csv (and, where something is declared, a cohort.json) whose masks lie in `masks`."""
    folder.mkdir()
    write(folder / "masks", **rows)
    lines = [f"{name},masks/{name}.nii.gz,masks/{name}.nii.gz" for name in rows]
    (folder / "cohort.csv").write_text("\n".join(["id,image,mask", *lines]) + "\n")
    if declared is not None:
        (folder / "cohort.json").write_text(json.dumps(declared))
    return folder


def instance(folder: Path, declared: dict[str, object], **rows: str) -> Path:
    """An INSTANCE folder with a cohort.json."""
    folder.mkdir()
    write(folder / "data", **rows)
    write(folder / "label", **rows)
    (folder / "cohort.json").write_text(json.dumps(declared))
    return folder


WHOLE = {"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [1]}


def masks_alone(folder: Path, declared: dict[str, object], **rows: str) -> Path:
    """The folder of a cohort.csv's masks, given by itself."""
    return cohort(folder, declared, **rows) / "masks"


@pytest.mark.parametrize("layout", [cohort, instance, masks_alone, "labelsTr"])
def test_what_a_cohort_declares_decides_the_choice(tmp_path: Path, layout: object) -> None:
    """One has the whole bleed but calls all of it core; as plain labels the other would win (Dice 1/3 against 5/6)."""
    if callable(layout):
        reference = layout(tmp_path / "reference", WHOLE, a="0112200")
    else:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/dataset.json").write_text(json.dumps(WHOLE))
        reference = write(tmp_path / "data/labelsTr", a="0112200")
    one, two = write(tmp_path / "one", a="0222200"), write(tmp_path / "two", a="0112000")
    found = select_folders(reference, {"one": one, "two": two}, pairs=False)
    assert found.scores == {("one",): 1.0, ("two",): pytest.approx(6 / 7)}
    (tmp_path / "ds.json").write_text(json.dumps(WHOLE))
    assert select_folders(reference, {"one": one, "two": two}, tmp_path / "ds.json", pairs=False) == found
    with pytest.raises(InputError, match="cannot be read as JSON"):
        select_folders(reference, {"one": one, "two": two}, tmp_path / "none.json", pairs=False)


def test_a_data_set_with_test_labels_says_where_the_training_labels_are(tmp_path: Path) -> None:
    """What comes to a choice or a rule is cross-validated, so of training cases."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset.json").write_text(json.dumps(WHOLE))
    write(data / "labelsTr", a="0112200")
    write(data / "labelsTs", t="0112200", u="0112200")
    for one in (write(tmp_path / "one", a="0222200"), write(tmp_path / "two", a="0222200", t="0112200")):
        hint = r"1 match .*labelsTr: give that folder, with --dataset-json .*data/dataset.json"
        with pytest.raises(InputError, match=rf"no mask of . cases \((t, )?u\); models are compared on all masks in .*labelsTs. {hint}"):
            select_folders(data, {"m": one})
        with pytest.raises(InputError, match=hint):
            find_in_folders(data, one)
        assert select_folders(data / "labelsTr", {"m": one}).scores == {("m",): 1.0}
        assert [trial.before for trial in find_in_folders(data / "labelsTr", one).trials] == [1.0]


@pytest.mark.parametrize("layout", [cohort, instance])
def test_label_maps_and_the_ignore_label_of_a_cohort(tmp_path: Path, layout: object) -> None:
    """BHSD's five labels as one, and a sixth that nobody scores: so for a choice with pairs as for a rule."""
    assert callable(layout)
    declared = {"labels": {"background": 0, "ich": 1, "ignore": 2}, "label_map": {"5": 1, "6": 2}}
    reference = layout(tmp_path / "reference", declared, a="0510006")
    one, two = write(tmp_path / "one", a="0110001"), write(tmp_path / "two", a="0110010")
    probabilities(one, "a", [0, 0.9, 0.9, 0, 0, 0, 0.9])
    probabilities(two, "a", [0, 0.9, 0.9, 0, 0, 0.6, 0])
    found = select_folders(reference, {"one": one, "two": two})
    assert found.scores == {("one",): 1.0, ("two",): pytest.approx(0.8), ("one", "two"): 1.0}
    # the stray voxel of one lies where nothing is known, so nothing is won by removing it; that of two is wrong
    assert find_in_folders(reference, one).steps == ()
    assert find_in_folders(reference, two).steps == ((1,),)


def test_masks_that_nothing_declares_are_said_to_be_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, one = cohort(tmp_path / "reference", WHOLE, a="0112"), write(tmp_path / "one", a="0112")
    bare = write(tmp_path / "bare", a="0112")
    for place, said in ((reference, False), (reference / "masks", False), (bare, True)):
        run("select", place, f"m={one}")
        assert ("declares labels: every value" in capsys.readouterr().err) == said
        run("postprocess", "find", place, one, "--rule", tmp_path / f"{place.name}.json")
        assert ("declares labels: every value" in capsys.readouterr().err) == said


def test_a_reference_with_values_that_nothing_declares(tmp_path: Path) -> None:
    """Without a cohort.json a table's only label is 1; a 2 beside it would be counted nowhere."""
    reference, one = cohort(tmp_path / "reference", None, a="0112"), write(tmp_path / "one", a="0112")
    for what in (lambda: select_folders(reference, {"one": one}), lambda: find_in_folders(reference, one)):
        with pytest.raises(InputError, match=r"a.nii.gz: holds the label values \[2\], but declared are \[0, 1\]"):
            what()


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    reference = write(tmp_path / "reference", a="0110", b="0110")
    some = write(tmp_path / "some", a="0110")
    with pytest.raises(InputError, match=r"no prediction of 1 cases \(b\)"):
        find_in_folders(reference, some)
    wide = write(tmp_path / "wide", a="01100", b="0110")
    with pytest.raises(InputError, match="does not lie on the grid"):
        find_in_folders(reference, wide)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no mask"):
        list(apply_to_folder(Postprocessing(((1,),)), tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(InputError, match=r"no mask of 1 cases \(b\)"):
        select_folders(reference, {"one": some})
    with pytest.raises(InputError, match="give NAME=DIR"):
        run("select", reference, "one")


def probabilities(folder: Path, case: str, foreground: list[float]) -> None:
    table = np.array([1 - np.array(foreground), foreground], np.float32).reshape(2, 1, 1, -1)
    np.savez_compressed(folder / f"{case}.npz", probabilities=table)


def test_select_prints_and_writes_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = write(tmp_path / "reference", a="0110")
    one, two = write(tmp_path / "one", a="0100"), write(tmp_path / "two", a="0010")
    with pytest.raises(InputError, match=r"m1 and m2 lack <case>.npz"):
        run("select", reference, f"m1={one}", f"m2={two}")
    run("select", reference, f"m1={one}", f"m2={two}", "--no-pairs")
    assert "m1: mean Dice 0.6667  <- best" in capsys.readouterr().out
    probabilities(one, "a", [0, 0.9, 0.4, 0])
    probabilities(two, "a", [0, 0.4, 0.9, 0])
    run("select", reference, f"m1={one}", f"m2={two}", "--out", tmp_path / "choice.json")
    assert "m1 + m2: mean Dice 1.0000  <- best" in capsys.readouterr().out
    assert json.loads((tmp_path / "choice.json").read_text())["members"] == ["m1", "m2"]
    out = tmp_path / "mean"
    run("ensemble", one, two, "--out", out)
    assert row(out / "a.nii.gz") == "0110"
    with pytest.raises(InputError, match="exists already"):
        run("ensemble", one, two, "--out", out)
    with pytest.raises(InputError, match="one of the folders"):
        run("ensemble", one, two, "--out", one, "--overwrite")
    with pytest.raises(InputError, match="each once"):
        run("ensemble", one, one, "--out", tmp_path / "new")
    np.savez(two / "b.npz", probabilities=np.zeros((2, 1, 1, 4)))
    with pytest.raises(InputError, match=r"lacks the mask or <case>.npz of 1 cases \(b\)"):
        run("ensemble", one, two, "--out", tmp_path / "new")
    np.savez(two / "a.npz", probabilities=np.array([object()]))
    with pytest.raises(InputError, match="not an archive"):
        run("select", reference, f"m1={one}", f"m2={two}")


def test_a_name_is_given_once(tmp_path: Path) -> None:
    reference, one, two = write(tmp_path / "reference", a="0110"), write(tmp_path / "one", a="0100"), write(tmp_path / "two", a="0010")
    with pytest.raises(InputError, match=r"model 'm' is given twice, for .*one and .*two"):
        run("select", reference, f"m={one}", f"m={two}", "--no-pairs")
    with pytest.raises(InputError, match="--predictions 'm' is given twice"):
        ablation(["phe", "--dry-run", "--predictions", f"m={one}", "--predictions", f"m={two}"], standalone_mode=False)


def test_select_has_the_switch(tmp_path: Path) -> None:
    """A label that no case shows makes nnU-Net's mean NaN, so that nothing can be chosen."""
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2}}))
    reference, one = write(tmp_path / "reference", a="0110"), write(tmp_path / "one", a="0100")
    words = ("select", reference, f"m={one}", "--dataset-json", tmp_path / "dataset.json")
    run(*words)
    with pytest.raises(InputError, match="no model can be chosen"):
        run(*words, "--compatibility", "nnunet")
    with pytest.raises(InputError, match="'v1' is not known"):
        run(*words, "--compatibility", "v1")


def test_the_mean_of_two_models_lies_as_their_masks_do(tmp_path: Path) -> None:
    """`ichbench predict --probabilities` by two models, averaged: the labels of the mean, in the file's own order."""
    grid = Grid((6, 20, 22), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]), file_axes=(1, 2, 0))
    write_image(tmp_path / "p_0000.nii.gz", np.random.default_rng(0).normal(40, 30, grid.shape_zyx).astype(np.float32), grid)
    tables = []
    for seed in (0, 1):
        write_model(tmp_path / f"model{seed}", small_plan(), seed=seed)
        out = tmp_path / f"out{seed}"
        run("predict", tmp_path / f"model{seed}", tmp_path / "p_0000.nii.gz", "--out", out, "--device", "cpu", "--probabilities")
        tables.append(np.load(out / "p.npz")["probabilities"])
    run("ensemble", tmp_path / "out0", tmp_path / "out1", "--out", tmp_path / "mean")
    made = nibabel.load(tmp_path / "mean/p.nii.gz")
    np.testing.assert_array_equal(np.asarray(made.dataobj).T, (tables[0] + tables[1]).argmax(0))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(made.affine, nibabel.load(tmp_path / "p_0000.nii.gz").affine)  # type: ignore[attr-defined]
    assert 0 < np.asarray(made.dataobj).mean() < 1  # type: ignore[attr-defined]


def test_an_ensemble_of_regions_with_a_rule(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "all": [1, 2], "core": 2}, "regions_class_order": [1, 2]})
    )
    Postprocessing(((1, 2),)).save(tmp_path / "rule.json")
    folders = [write(tmp_path / name, a="0000000") for name in ("one", "two")]
    for folder, all_, core in zip(folders, ([0, 0.9, 0.9, 0, 0, 0.9, 0], [0, 0.2, 0.9, 0, 0, 0.9, 0]), (0.8, 0.3), strict=True):
        heads = np.array([all_, [0, 0, core, 0, 0, 0, 0]], np.float32).reshape(2, 1, 1, 7)
        np.savez(folder / "a.npz", probabilities=heads)
    words = ("ensemble", *folders, "--dataset-json", tmp_path / "dataset.json", "--out")
    run(*words, tmp_path / "out")
    assert row(tmp_path / "out/a.nii.gz") == "0120010"
    run(*words, tmp_path / "tidy", "--rule", tmp_path / "rule.json")
    assert row(tmp_path / "tidy/a.nii.gz") == "0120000"
    for content, message in ((None, "none.json: cannot be read as JSON .*give nnU-Net's dataset.json"), ("{}", "declares no labels")):
        if content is not None:
            (tmp_path / "none.json").write_text(content)
        with pytest.raises(InputError, match=message):
            run("ensemble", *folders, "--dataset-json", tmp_path / "none.json", "--out", tmp_path / "new")


def without_labels(folder: Path) -> None:
    """As nnU-Net writes an archive: the probabilities alone."""
    for path in folder.glob("*.npz"):
        with np.load(path) as archive:
            table = archive["probabilities"]
        np.savez(path, probabilities=table)


def test_an_ensemble_of_regions_knows_them(tmp_path: Path) -> None:
    """Heads of regions are painted, not compared: by what the archives say, or a dataset.json beside them, as nnU-Net leaves it."""
    grid = Grid((6, 20, 22), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))
    write_image(tmp_path / "p_0000.nii.gz", np.random.default_rng(0).normal(40, 30, grid.shape_zyx).astype(np.float32), grid)
    folders, tables = [tmp_path / "one", tmp_path / "two"], []
    for seed, folder in enumerate(folders):
        write_model(tmp_path / f"model{seed}", small_plan(), labels=REGIONS, order=[1, 2], seed=seed)
        run("predict", tmp_path / f"model{seed}", tmp_path / "p_0000.nii.gz", "--out", folder, "--device", "cpu", "--probabilities")
        tables.append(np.load(folder / "p.npz")["probabilities"])
    whole, core = (tables[0] + tables[1]) / 2 > 0.5
    expected = np.where(core, 2, whole)
    assert set(np.unique(expected)) == {0, 1, 2}

    def made(out: str) -> np.ndarray:
        run("ensemble", *folders, "--out", tmp_path / out)
        return read_labels(tmp_path / out / "p.nii.gz")[0]

    np.testing.assert_array_equal(made("mean"), expected)
    write_model(tmp_path / "other", small_plan(), labels=REGIONS, order=[2, 1])
    run("predict", tmp_path / "other", tmp_path / "p_0000.nii.gz", "--out", tmp_path / "third", "--device", "cpu", "--probabilities")
    with pytest.raises(InputError, match=r"one/p.npz and .*third/p.npz are of models with other labels or regions"):
        run("ensemble", *folders, tmp_path / "third", "--out", tmp_path / "new")
    (tmp_path / "plain.json").write_text(json.dumps({"labels": {"background": 0, "ich": 1}}))
    with pytest.raises(InputError, match=r"p.npz: its heads are the regions .*, but asked for are the labels \[0, 1\]"):
        run("ensemble", *folders, "--dataset-json", tmp_path / "plain.json", "--out", tmp_path / "new")
    # masks of 0 and 1 alone need two heads, as there are
    reference = tmp_path / "reference"
    reference.mkdir()
    write_labels(reference / "p.nii.gz", whole, grid)
    with pytest.raises(InputError, match=r"p.npz: its heads are the regions"):
        run("select", reference, f"m1={folders[0]}", f"m2={folders[1]}")
    for folder in folders:
        without_labels(folder)
    for words in (("ensemble", *folders, "--out", tmp_path / "new"), ("select", reference, f"m1={folders[0]}", f"m2={folders[1]}")):
        with pytest.raises(InputError, match=r"one/p.npz: its 2 heads .* as of regions; declare the model's labels with --dataset-json"):
            run(*words)
    assert not (tmp_path / "new").exists()
    (folders[1] / "dataset.json").write_text(json.dumps({"labels": REGIONS, "regions_class_order": [1, 2]}))
    np.testing.assert_array_equal(made("mean2"), expected)


@pytest.mark.parametrize("damage", ["cut", "empty", "npy", "text", "labels"])
def test_damaged_archives_are_one_message(tmp_path: Path, damage: str) -> None:
    folders = [write(tmp_path / name, a="0110") for name in ("one", "two")]
    for folder in folders:
        probabilities(folder, "a", [0, 0.9, 0.4, 0])
    path = folders[1] / "a.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "npy":
        with path.open("wb") as stream:
            np.save(stream, np.zeros((2, 1, 1, 4), np.float32))
    elif damage == "labels":
        np.savez(path, probabilities=np.load(path)["probabilities"], labels=np.array("[1]"))
    else:
        path.write_text("" if damage == "empty" else "probabilities")
    with pytest.raises(InputError, match=r"two/a.npz is not an archive with the array 'probabilities'"):
        run("ensemble", *folders, "--out", tmp_path / "out")


@pytest.mark.parametrize("order", ["kji", "ikj"])
def test_probabilities_lie_in_file_order_beside_the_mask(tmp_path: Path, order: str) -> None:
    """The archive's array, slowest file axis first, gives the mask's file back; so also where the file stores another order."""
    grid = Grid((6, 20, 22), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))
    if order == "ikj":
        grid = replace(grid, file_axes=(1, 2, 0), affine_4x4=np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))
    image = np.random.default_rng(0).normal(40, 30, grid.shape_zyx).astype(np.float32)
    write_image(tmp_path / "p_0000.nii.gz", image, grid)
    write_model(tmp_path / "model", small_plan())
    plain, both = tmp_path / "plain", tmp_path / "both"
    model = load_model(tmp_path / "model")
    list(predict_path(model, tmp_path / "p_0000.nii.gz", plain / "p.nii.gz"))
    run("predict", tmp_path / "model", tmp_path / "p_0000.nii.gz", "--out", both / "p.nii.gz", "--device", "cpu", "--probabilities")
    with np.load(both / "p.npz") as archive:
        table = archive["probabilities"]
    stored = np.asarray(nibabel.load(both / "p.nii.gz").dataobj)  # type: ignore[attr-defined]
    assert table.shape[1:] == stored.shape[::-1]
    assert 0 < stored.mean() < 1
    np.testing.assert_array_equal(table.argmax(0), stored.T)
    assert row(both / "p.nii.gz") == row(plain / "p.nii.gz")


def test_the_decathlons_labels_above_a_folder_of_masks(tmp_path: Path) -> None:
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "clot", "2": "edema"}}')
    rules, _ = read_declaration(tmp_path / "dataset.json")
    assert (rules.names, rules.targets) == (("clot", "edema"), (1, 2))
