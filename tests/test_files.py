"""Where things are written: places at which nothing can be made are found before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ichbench.cases.files import check_writable, is_free, put_in_place, staged_in
from ichbench.cli import ablation, app
from ichbench.errors import InputError


def test_places_at_which_something_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "file").write_text("x")
    for place in ("folder", "link", "link/new", "new", "new/below/that", ".", "file", "../new"):
        check_writable(Path(place))
        check_writable(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("dangling", "--out .*dangling: is a link to nowhere/at all, which does not exist; make it, or remove the link"),
        ("dangling/new", "--out .*new: .*dangling is a link to nowhere/at all, which does not exist"),
        ("link", "is a link to dangling, which does not exist"),
        ("circle", "is a link to circle, which does not exist"),
        ("file/new", "file is a file, so nothing can be made below it"),
        ("x" * 300, "File name too long"),
    ],
)
def test_places_at_which_nothing_can_be_made(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "dangling").symlink_to("nowhere/at all")
    (tmp_path / "link").symlink_to("dangling")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=said):
        check_writable(tmp_path / place)


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the superuser may write everywhere
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(InputError, match=r"--rule .*may not be written; give another place, or change its permissions"):
        check_writable(tmp_path / "new/file.json", "--rule")


COMMANDS = {
    "prepare": "prepare {cohort} --out {out}",
    "fingerprint": "fingerprint {cohort} --out {out}",
    "plan": "plan {cohort} --out {out}",
    "train": "train {cohort} --out {out} --preset smoke --fold full --device cpu",
    "predict": "predict {cohort}/model {cohort}/imagesTr --out {out}",
    "predict file": "predict {cohort}/model {cohort}/imagesTr/a.nii.gz --out {out}/a.nii.gz",
    "import": "nnunet import {cohort}/results --out {out}",
    "export": "nnunet export {cohort}/model --out {out}",
    "apply": "postprocess apply {cohort}/labelsTr --rule {cohort}/rule.json --out {out}",
    "find": "postprocess find {cohort} {cohort}/labelsTr --rule {out}/rule.json",
    "select": "select {cohort} m={cohort}/labelsTr --out {out}/choice.json",
    "ensemble": "ensemble {cohort}/labelsTr {cohort}/labelsTs --out {out}",
    "phantom": "phantom {out}",
    "board": "board {cohort}/scores.csv --out {out}",
    "run-ablation": "phe --cohort {cohort} --preset smoke --out {out}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_finds_a_link_to_nothing_at_once(
    name: str, small_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_folders import small_plan, write_model, write_results

    from ichbench.inference.postprocess import Postprocessing

    cohort, out = tmp_path / "cohort", tmp_path / "dangling"
    cohort.mkdir()
    for path in small_phantom.iterdir():
        (cohort / path.name).symlink_to(path)
    (cohort / "imagesTr").unlink()
    (cohort / "imagesTr").mkdir()
    for path in (small_phantom / "imagesTr").iterdir():
        (cohort / "imagesTr" / path.name).symlink_to(path)
    if name in ("predict", "predict file", "export"):
        write_model(cohort / "model", small_plan())
    if name == "predict file":
        (cohort / "imagesTr/a.nii.gz").symlink_to(next((small_phantom / "imagesTr").iterdir()))
    if name == "import":
        write_results(tmp_path / "made", small_plan()).rename(cohort / "results")
    Postprocessing(((1,),)).save(cohort / "rule.json")
    out.symlink_to("nowhere")
    # nothing is measured, prepared, trained or predicted before
    for where in ("ichbench.cases.cohort.read_image", "ichbench.cases.images.read_image", "ichbench.inference.inputs.read_image"):
        monkeypatch.setattr(where, lambda *_, **__: pytest.fail("an image was read"))
    words = COMMANDS[name].format(cohort=cohort, out=out).split()
    with pytest.raises(InputError, match=r"dangling:? is a link to nowhere, which does not exist; make it, or remove the link"):
        (ablation if name == "run-ablation" else app)(words, standalone_mode=False)
    assert out.is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_is_put_in_place_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str) -> Path:
        for path in ("b", "a", "last"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / path).write_text(path)
        return tmp_path / name

    order: list[str] = []
    rename = Path.rename

    def noted(path: Path, target: Path) -> Path:
        order.append(path.name)
        if failing == path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", noted)
    failing = ""
    put_in_place(made("one"), tmp_path / "new", "last")
    assert order == ["one"]
    (tmp_path / "there").mkdir()
    for failing, seen in (("a", ["a"]), ("last", ["a", "b", "last", "b", "a"]), ("", ["a", "b", "last"])):
        order.clear()
        source = made("two")
        if failing:
            with pytest.raises(OSError, match="Input/output"):
                put_in_place(source, tmp_path / "there", "last")
            assert not list((tmp_path / "there").iterdir())
            assert len(list(source.iterdir())) == 3
        else:
            put_in_place(source, tmp_path / "there", "last")
        assert order == seen
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["a", "b", "last"]


def test_free_places(tmp_path: Path) -> None:
    (tmp_path / "disk/.x-1").mkdir(parents=True)
    (tmp_path / "disk/lost+found").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.hidden").write_text("")
    (tmp_path / "file").write_text("")
    assert [is_free(tmp_path / name, ".x-") for name in ("disk", "new", "new/below", "full", "file")] == [True, True, True, False, False]
    assert staged_in(tmp_path / "disk") == tmp_path / "disk"
    assert staged_in(tmp_path / "a/b") == tmp_path / "a"
    assert (tmp_path / "a").is_dir()
