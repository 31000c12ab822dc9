"""`ichbench predict CHOICE.json`: the masks of the separate commands, bit for bit, and files that are no choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from model_folders import LABELS, REGIONS, drawn_network, small_plan, write_model

from ichbench.cases.case import Grid
from ichbench.cases.images import read_labels, write_image
from ichbench.cli import app
from ichbench.errors import CaseError, InputError
from ichbench.inference.select import read_selection
from ichbench.network.weights import save_weights
from ichbench.overlays import make_recipe

AFFINE = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]])
#: an axial file, and one whose slices are its first axis
ORDERS = {"a": (2, 1, 0), "b": (1, 2, 0)}
#: logits
RARE = 2.5


def run(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, (name, axes) in enumerate(ORDERS.items()):
        grid = Grid((6, 20, 22), AFFINE, file_axes=axes)
        image = np.random.default_rng(seed).normal(40, 30, grid.shape_zyx).astype(np.float32)
        write_image(tmp_path / f"images/{name}_0000.nii.gz", image, grid)
    return tmp_path / "images"


def models(folder: Path, labels: dict[str, Any], order: list[int] | None = None) -> dict[str, Path]:
    """Two models that turn the images each its own way."""
    overlays = ({"inference": {"mirror": False}}, {"inference": {"mirror": False}, "prepare": {"reorient": True}})
    plan, found = small_plan(), {}
    for seed, (name, overlay) in enumerate(zip(("m1", "m2"), overlays, strict=True)):
        found[name] = write_model(folder / name, plan, seed=seed, overlay=overlay, labels=labels, order=order)
        network = drawn_network(plan, make_recipe({"plan": {"dims": 3}}, overlay), seed)
        with torch.no_grad():
            # background is nearly everywhere, so that a mask has many components
            network.get_parameter("heads.0.bias")[0 if order else 1 :] -= RARE
        save_weights(network, found[name] / "final.safetensors", {"seed": seed, "epoch": 1})
    return found


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.endswith(".nii.gz")}


def truth(folder: Path, mean: Path) -> Path:
    """References that the mean of both models fits best: its largest components."""
    run("postprocess", "apply", mean, "--rule", rule_of(folder.parent), "--out", folder)
    return folder


def rule_of(folder: Path) -> Path:
    path = folder / "largest.json"
    path.write_text(json.dumps({"format": "ichbench postprocessing 1", "keep_largest": [[1, 2]], "cases": 1, "tried": []}))
    return path


@pytest.mark.parametrize("what", ["labels", "regions"])
@pytest.mark.parametrize("pairs", [True, False])
def test_it_is_what_the_separate_commands_give(what: str, pairs: bool, images: Path, tmp_path: Path) -> None:
    order = [1, 2] if what == "regions" else None
    table = {"labels": REGIONS if order else LABELS} | ({"regions_class_order": order} if order else {})
    declares = ("--dataset-json", tmp_path / "labels.json")
    declares[1].write_text(json.dumps(table))
    folders = models(tmp_path, table["labels"], order)  # type: ignore[arg-type]
    for name, folder in folders.items():
        run("predict", folder, images, "--out", tmp_path / f"out-{name}", "--device", "cpu", "--probabilities")
    one, two = tmp_path / "out-m1", tmp_path / "out-m2"
    run("ensemble", one, two, "--out", tmp_path / "mean", *declares)
    reference = truth(tmp_path / "truth", tmp_path / "mean" if pairs else two)
    choice = tmp_path / "results/choice.json"
    choice.parent.mkdir()
    known = [word for name, folder in folders.items() for word in ("--model", f"{name}={folder}")]
    both = ("--pairs" if pairs else "--no-pairs", "--postprocess")
    run("select", reference, f"m1={one}", f"m2={two}", "--out", choice, *known, *both, *declares)
    chosen = read_selection(choice)
    assert chosen.members == (("m1", "m2") if pairs else ("m2",))
    assert chosen.postprocessing is not None
    assert chosen.postprocessing.steps, "a rule was found, so that it is seen to be applied"
    # by hand
    before = tmp_path / "mean" if pairs else two
    run("postprocess", "find", reference, before, "--rule", tmp_path / "rule.json", *declares)
    run("postprocess", "apply", before, "--rule", tmp_path / "rule.json", "--out", tmp_path / "by-hand")
    run("predict", choice, images, "--out", tmp_path / "at-once", "--device", "cpu", "--probabilities")
    assert masks(tmp_path / "at-once") == masks(tmp_path / "by-hand")
    assert masks(tmp_path / "by-hand") != masks(before)
    assert 0 < np.mean([read_labels(path)[0].mean() for path in (tmp_path / "at-once").glob("*.nii.gz")]) < 2
    for name in ORDERS:
        tables = [np.load(folder / f"{name}.npz")["probabilities"] for folder in ((one, two) if pairs else (two,))]
        np.testing.assert_array_equal(np.load(tmp_path / f"at-once/{name}.npz")["probabilities"], sum(tables) / np.float32(len(tables)))
    # one image, and without archives
    run("predict", choice, images / "a_0000.nii.gz", "--out", tmp_path / "a.nii.gz", "--device", "cpu")
    assert (tmp_path / "a.nii.gz").read_bytes() == masks(tmp_path / "by-hand")["a.nii.gz"]
    assert not (tmp_path / "a.npz").exists()


@pytest.fixture
def choice(images: Path, tmp_path: Path) -> Path:
    """Two models and what was chosen, with the folders relative to it."""
    for name in models(tmp_path / "models", LABELS):
        run("predict", tmp_path / "models" / name, images, "--out", tmp_path / f"models/{name}/predictions", "--device", "cpu")
    names = ("m1", "m2")
    shutil.copytree(tmp_path / "models/m1/predictions", tmp_path / "truth")
    folders = [f"{name}={tmp_path / 'models' / name / 'predictions'}" for name in names]
    run("select", tmp_path / "truth", *folders, "--no-pairs", "--out", tmp_path / "absolute.json")
    content = json.loads((tmp_path / "absolute.json").read_text())
    assert content["models"] == {name: str(tmp_path / "models" / name) for name in names}
    path = tmp_path / "models/choice.json"
    path.write_text(json.dumps(content | {"models": {name: name for name in names}}))
    return path


def test_a_folder_of_models_can_be_moved_with_its_choice(
    choice: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    words = ("truth", "m1=models/m1/predictions", "m2=models/m2/predictions", "--no-pairs", "--out", "results/choice.json")
    run("select", *words)
    assert json.loads(Path("results/choice.json").read_text())["models"] == {"m1": "../models/m1", "m2": "../models/m2"}
    assert "use it with: ichbench predict results/choice.json" in capsys.readouterr().out
    Path("moved").mkdir()
    for name in ("results", "models"):
        Path(name).rename(Path("moved") / name)
    for number, path in enumerate(("moved/results/choice.json", "moved/models/choice.json")):
        monkeypatch.chdir(tmp_path if number else tmp_path / "images")
        run("predict", tmp_path / path, images, "--out", tmp_path / f"out{number}", "--device", "cpu")
        assert masks(tmp_path / f"out{number}") == masks(tmp_path / "truth")
    # relative to the file itself, not to a link to it
    (tmp_path / "link.json").symlink_to("moved/results/choice.json")
    run("predict", tmp_path / "link.json", images, "--out", tmp_path / "linked", "--device", "cpu")
    assert masks(tmp_path / "linked") == masks(tmp_path / "truth")


def test_a_folder_named_by_a_dot_lies_in_its_model(choice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "models/m1/predictions")
    run("select", tmp_path / "truth", "m1=.", f"m2={tmp_path / 'models/m2/predictions'}", "--no-pairs", "--out", tmp_path / "dot.json")
    assert Path(json.loads((tmp_path / "dot.json").read_text())["models"]["m1"]) == tmp_path / "models/m1"


def test_files_are_kept_and_cases_fail_as_with_one_model(choice: Path, images: Path, tmp_path: Path) -> None:
    run("predict", choice, images, "--out", tmp_path / "out", "--device", "cpu")
    with pytest.raises(InputError, match=r"would be overwritten; nothing was computed"):
        run("predict", choice, images, "--out", tmp_path / "out", "--device", "cpu")
    (images / "b_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(CaseError, match=r"1 of 2 cases have no mask; the others were written\n  b: "):
        run("predict", choice, images, "--out", tmp_path / "out", "--device", "cpu", "--overwrite")
    assert list(masks(tmp_path / "out")) == ["a.nii.gz"]


RULE: dict[str, Any] = {"format": "ichbench postprocessing 1", "keep_largest": [], "cases": 1, "tried": []}
DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (lambda text: text[: len(text) // 2], "cannot be read as JSON"),
    "nothing": (lambda text: "", "cannot be read as JSON"),
    "a list": (lambda text: "[]", "must hold a JSON object"),
    "a rule": (
        lambda text: json.dumps({"format": "ichbench postprocessing 1", "keep_largest": []}),
        "is not a selection of `ichbench select`",
    ),
    "nobody": (lambda text: edited(text, members=[]), "is not a selection"),
    "three": (lambda text: edited(text, members=["m1", "m2", "m3"]), "is not a selection"),
    "twice": (lambda text: edited(text, members=["m1", "m1"], tried=[{"members": ["m1", "m1"], "dice": 1}]), "are not one or two names"),
    "a word": (lambda text: edited(text, members="m1"), "is not a selection"),
    "numbers": (lambda text: edited(text, members=[1]), "is not a selection"),
    "no folders": (lambda text: edited(text, models=None), "is not a selection"),
    "a number for a folder": (lambda text: edited(text, models={"m1": 5}), "is not a selection"),
    "an older file": (
        lambda text: edited(text, models={}),
        r"does not say where the model 'm1' is; choose again with .* --model m1=FOLDER",
    ),
    "gone": (lambda text: edited(text, models={"m1": "gone"}), r"the model 'm1' should be in .*gone, but there is no such folder"),
    "no model": (lambda text: edited(text, models={"m1": ".."}), "is not a model folder"),
    "a number without end": (lambda text: text.replace('"dice": 1.0', f'"dice": {10**400}'), "is not a selection"),
    "a half label": (lambda text: edited(text, postprocessing=RULE | {"keep_largest": [[1.5]]}), "must list labels from 1 to 65535"),
    "words": (lambda text: edited(text, postprocessing=RULE | {"keep_largest": ["12"]}), "must list labels from 1 to 65535"),
    "a label that no file holds": (
        lambda text: edited(text, postprocessing=RULE | {"keep_largest": [[10**30]]}),
        "must list labels from 1",
    ),
    "endless": (lambda text: edited(text, postprocessing=RULE | {"cases": float("inf")}), "is not a rule of"),
    "a bad rule": (lambda text: edited(text, postprocessing={"format": "x"}), "is not a rule of"),
    "a rule that is none": (lambda text: edited(text, postprocessing=[1]), "is not a rule of"),
}


def edited(text: str, **changes: Any) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_choice_is_one_message(damage: str, choice: Path, images: Path, tmp_path: Path) -> None:
    change, said = DAMAGES[damage]
    choice.write_text(change(choice.read_text()))
    with pytest.raises(InputError, match=said) as error:
        run("predict", choice, images, "--out", tmp_path / "new", "--device", "cpu")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_models_that_do_not_go_together(choice: Path, images: Path, tmp_path: Path) -> None:
    both = {"members": ["m1", "other"], "tried": [{"members": ["m1", "other"], "dice": 1}]}
    others = {
        "other labels": write_model(tmp_path / "regions", small_plan(), labels=REGIONS, order=[1, 2]),
        "take other images": write_model(tmp_path / "two", small_plan(channels=("CT", "CTA"))),
    }
    for said, folder in others.items():
        choice.write_text(edited(choice.read_text(), models={"m1": "m1", "other": str(folder)}, **both))
        with pytest.raises(InputError, match=said):
            run("predict", choice, images, "--out", tmp_path / "new", "--device", "cpu")


def test_model_folders_are_checked_when_one_chooses(choice: Path, tmp_path: Path) -> None:
    words = ("select", tmp_path / "truth", f"m1={tmp_path / 'models/m1/predictions'}", "--out", tmp_path / "new.json", "--model")
    for given, said in (("m3=models", "the models to choose from are m1"), (f"m1={tmp_path}", "is not a model folder"), ("m1", "NAME=DIR")):
        with pytest.raises(InputError, match=said):
            run(*words, given)
    assert not (tmp_path / "new.json").exists()


def test_one_label_that_no_file_stores_in_another_order(choice: Path, images: Path, tmp_path: Path) -> None:
    """Every mask lies on its image's own grid, whatever the order of its axes."""
    run("predict", choice, images, "--out", tmp_path / "out", "--device", "cpu")
    for name in ORDERS:
        mask, image = nibabel.load(tmp_path / f"out/{name}.nii.gz"), nibabel.load(images / f"{name}_0000.nii.gz")
        assert mask.shape == image.shape  # type: ignore[attr-defined]
        np.testing.assert_array_equal(mask.affine, image.affine)  # type: ignore[attr-defined]
