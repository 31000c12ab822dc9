"""`ichbench predict` on files: where masks go, what is never overwritten, and files that are no head CT."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from model_folders import small_plan, write_model

from ichbench.cases.case import Grid
from ichbench.cases.images import read_labels, write_image
from ichbench.errors import CaseError, InputError
from ichbench.inference import model as module
from ichbench.inference.inputs import read_case
from ichbench.inference.model import Model, load_model, predict_path
from ichbench.prepare.window import ConstantImageWarning
from ichbench.recipe import InferenceRecipe, PrepareRecipe

GRID = Grid((6, 20, 22), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))

ACTING = [((), "a.nii"), (("tile_step=0.2",), "b.nii"), (("mirror=true",), "c.nii"), (("gaussian=false",), "d.nii")]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(write_model(tmp_path / "model", small_plan(), overlay={"inference": {"mirror": False}}))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        image = np.random.default_rng(seed).normal(40, 20, GRID.shape_zyx).astype(np.float32)
        write_image(tmp_path / f"images/{name}_0000.nii.gz", image, GRID)
    return tmp_path / "images"


@pytest.mark.parametrize("there", ["out/c.nii.gz", "out/c.npz"])
def test_a_file_that_exists_is_refused_before_anything_is_computed(model: Model, images: Path, tmp_path: Path, there: str) -> None:
    old = tmp_path / there
    old.parent.mkdir()
    old.write_bytes(b"a week's work")
    with pytest.raises(InputError, match=f"{there} would be overwritten; nothing was computed: .*--overwrite"):
        list(predict_path(model, images, tmp_path / "out", probabilities=True))
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert old.read_bytes() == b"a week's work"
    assert len(list(predict_path(model, images, tmp_path / "out", probabilities=True, overwrite=True))) == 3
    assert len(list(old.parent.iterdir())) == 6
    assert old.read_bytes() != b"a week's work"


def test_a_single_mask_that_exists_is_refused(model: Model, images: Path, tmp_path: Path) -> None:
    old = tmp_path / "mask.nii.gz"
    old.write_bytes(b"a week's work")
    with pytest.raises(InputError, match=r"mask.nii.gz would be overwritten"):
        list(predict_path(model, images / "a_0000.nii.gz", old))
    assert old.read_bytes() == b"a week's work"
    list(predict_path(model, images / "a_0000.nii.gz", old, overwrite=True))
    assert read_labels(old)[0].shape == GRID.shape_zyx
    with pytest.raises(InputError, match="would overwrite the image"):
        list(predict_path(model, images / "a_0000.nii.gz", images / "a_0000.nii.gz", overwrite=True))


def test_no_image_of_the_folder_is_overwritten(model: Model, images: Path) -> None:
    """Masks beside images: `a.nii.gz` of `a_0000.nii.gz` is none of the images, `d.nii.gz` of `d.nii.gz` is."""
    (images / "d.nii.gz").write_bytes((images / "a_0000.nii.gz").read_bytes())
    with pytest.raises(InputError, match=r"would overwrite the image .*d.nii.gz"):
        list(predict_path(model, images, images, overwrite=True))
    assert len(list(images.iterdir())) == 4


@pytest.mark.parametrize(
    ("image", "out", "said"),
    [
        ("a_0000.nii.gz", "mask.mha", "neither a folder nor a name ending in .nii.gz or .nii"),
        ("a_0000.nii.gz", "mask.gz", "neither a folder"),
        ("a_0000.nii.gz", "notes", "neither a folder"),
        (".", "new.nii.gz", "is a folder, so --out must be a folder too"),
        (".", "notes", "is a folder, so --out must be a folder too"),
        (".", "mask.mha", "neither a folder"),
    ],
)
def test_an_out_that_fits_no_input(model: Model, images: Path, tmp_path: Path, image: str, out: str, said: str) -> None:
    (tmp_path / "notes").write_text("precious")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=said):
        list(predict_path(model, images / image, tmp_path / out))
    assert sorted(tmp_path.iterdir()) == before


def test_folders_with_dots(model: Model, images: Path, tmp_path: Path) -> None:
    (tmp_path / "masks.new").mkdir()
    for out in ("masks.new", "run1.2"):
        (done,) = predict_path(model, images / "a_0000.nii.gz", tmp_path / out)
        assert done.path == tmp_path / out / "a.nii.gz"


def test_one_bad_file_does_not_stop_the_others(model: Model, images: Path, tmp_path: Path) -> None:
    (images / "b_0000.nii.gz").write_bytes(b"no image")
    done = []
    with pytest.raises(CaseError, match=r"1 of 3 cases have no mask; the others were written\n  b: .*b_0000.nii.gz"):
        done.extend(one.path.name for one in predict_path(model, images, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]


@pytest.mark.parametrize("probabilities", [True, False])
def test_nothing_old_outlives_an_overwrite(model: Model, images: Path, tmp_path: Path, probabilities: bool) -> None:
    """Neither the archive of another model beside a new mask, nor the mask and archive of a case that fails."""
    out = tmp_path / "out"
    list(predict_path(model, images, out, probabilities=True))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (images / "b_0000.nii.gz").write_bytes(b"no image")
    other = load_model(write_model(tmp_path / "other", small_plan(), overlay={"inference": {"mirror": False}}, seed=1))
    with pytest.raises(CaseError, match="1 of 3 cases have no mask"):
        list(predict_path(other, images, out, probabilities, overwrite=True))
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(after) == (["a.nii.gz", "a.npz", "c.nii.gz", "c.npz"] if probabilities else ["a.nii.gz", "c.nii.gz"])
    assert all(content != before[name] for name, content in after.items())
    with pytest.raises(InputError, match="is not a NIfTI file"):
        list(predict_path(other, images / "b_0000.nii.gz", out, overwrite=True))


def test_an_archive_without_its_mask_is_refused_too(model: Model, images: Path, tmp_path: Path) -> None:
    """It would come to lie beside a mask that it does not belong to."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.npz").write_bytes(b"another model's")
    with pytest.raises(InputError, match=r"a.npz would be overwritten; nothing was computed"):
        list(predict_path(model, images, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.npz"]


@pytest.mark.parametrize("single", [True, False])
def test_a_case_has_one_mask_whatever_its_suffix(model: Model, images: Path, tmp_path: Path, single: bool) -> None:
    """`a.nii.gz` of another model is the case's mask, too: refused, or replaced with its archive, never left beside `a.nii`."""
    out = tmp_path / "out"
    list(predict_path(model, images / "a_0000.nii.gz", out / "a.nii.gz" if single else out, probabilities=True))
    image = tmp_path / "plain/a_0000.nii"
    image.parent.mkdir()
    nibabel.save(nibabel.load(images / "a_0000.nii.gz"), image)
    target = out / "a.nii" if single else out
    (out / "a.npz").rename(out / "kept")
    with pytest.raises(InputError, match=r"a\.nii\.gz would be overwritten; nothing was computed"):
        list(predict_path(model, image, target))
    (out / "kept").rename(out / "a.npz")
    old = (out / "a.npz").read_bytes()
    other = load_model(write_model(tmp_path / "other", small_plan(), overlay={"inference": {"mirror": False}}, seed=1))
    for probabilities in (True, False):
        list(predict_path(other, image, target, probabilities, overwrite=True))
        assert sorted(path.name for path in out.iterdir()) == (["a.nii", "a.npz"] if probabilities else ["a.nii"])
        assert not probabilities or (out / "a.npz").read_bytes() != old


def test_an_image_beside_its_mask_is_no_mask(model: Model, images: Path, tmp_path: Path) -> None:
    image = (images / "a_0000.nii.gz").rename(tmp_path / "head.nii.gz")
    before = image.read_bytes()
    list(predict_path(model, image, tmp_path / "head.nii"))
    list(predict_path(model, image, tmp_path / "head.nii", overwrite=True))
    assert image.read_bytes() == before
    assert (tmp_path / "head.nii").is_file()


def test_a_mask_that_is_a_link_to_itself(model: Model, images: Path, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to("a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz would be overwritten"):
        list(predict_path(model, images / "a_0000.nii.gz", tmp_path / "a.nii.gz"))
    list(predict_path(model, images / "a_0000.nii.gz", tmp_path / "a.nii.gz", overwrite=True))
    assert not (tmp_path / "a.nii.gz").is_symlink()


@pytest.mark.parametrize("there", ["b.npz", "b.nii.gz"])
def test_a_folder_in_the_place_of_a_file(model: Model, images: Path, tmp_path: Path, there: str) -> None:
    (tmp_path / "out" / there).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"case b: .*{there} is a folder"):
        list(predict_path(model, images, tmp_path / "out", overwrite=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [there]


def test_a_mask_that_cannot_be_written_is_one_failed_case(
    model: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is no traceback: the case is named, the others are written, and no archive is left without its mask."""
    write = module.write_labels

    def fails(path: Path, *rest: object) -> None:
        if path.name == "b.nii.gz":
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_labels", fails)
    with pytest.raises(CaseError, match=r"1 of 3 cases have no mask(.|\n)*case b: .*b\.nii\.gz: No space left on device"):
        list(predict_path(model, images, tmp_path / "out", probabilities=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "a.npz", "c.nii.gz", "c.npz"]
    with pytest.raises(CaseError, match=r"case b: .*No space left"):
        list(predict_path(model, images / "b_0000.nii.gz", tmp_path / "alone"))

    def held(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", held)
    with pytest.raises(CaseError, match=r"case a: .*a\.npz: Permission denied"):
        list(predict_path(model, images / "a_0000.nii.gz", tmp_path / "out", overwrite=True))


def test_an_image_with_one_value_is_said_to_be_none(model: Model, images: Path, tmp_path: Path) -> None:
    write_image(images / "b_0000.nii.gz", np.zeros(GRID.shape_zyx, np.float32), GRID)
    with pytest.warns(ConstantImageWarning, match="every voxel of channel 0 is 0"):
        (done,) = predict_path(model, images / "b_0000.nii.gz", tmp_path / "b.nii.gz")
    assert done.notes == ("case b: every voxel of channel 0 is 0; this is no head CT, the mask means nothing",)
    assert next(predict_path(model, images / "a_0000.nii.gz", tmp_path / "a.nii.gz")).notes == ()


def test_half_precision_is_refused_before_an_image_is_read(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(write_model(tmp_path / "half", small_plan(), overlay={"inference": {"precision": "fp16"}}))
    monkeypatch.setattr(module, "read_case", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(InputError, match="'fp16' is for GPUs"):
        list(predict_path(model, images, tmp_path / "out"))


def test_a_model_of_turned_cases_takes_every_orientation(tmp_path: Path) -> None:
    """prepare.reorient turns every case to one orientation, so the file's own is of no interest, and the mask is written back in it."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 10, 6)).astype(np.float32)
    affines = {"one": np.diag([2.0, 3, 5, 1]), "other": np.diag([-2.0, -3, -5, 1])}
    nibabel.save(nibabel.Nifti1Image(values, affines["one"]), tmp_path / "one.nii.gz")
    nibabel.save(nibabel.Nifti1Image(values[::-1, ::-1, ::-1], affines["other"]), tmp_path / "other.nii.gz")
    recipe = PrepareRecipe(reorient=True)
    one, other = (read_case(name, [tmp_path / f"{name}.nii.gz"], recipe, "SAR")[0] for name in affines)
    np.testing.assert_array_equal(one.image_czyx, other.image_czyx)
    with pytest.raises(InputError, match="store the image in the model's orientation"):
        read_case("other", [tmp_path / "other.nii.gz"], PrepareRecipe(), "RAS")


def test_an_image_that_does_not_say_where_its_axes_point(model: Model, tmp_path: Path) -> None:
    """A network that has seen heads in one orientation needs to know; the file is named, and what is to be done."""
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(40, 20, (22, 20, 6)).astype(np.float32), np.diag([1, 1, 5, 1]))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "bare.nii.gz")
    with pytest.raises(InputError, match=r"bare.nii.gz: without sform and qform .*; write one of them$"):
        list(predict_path(model, tmp_path / "bare.nii.gz", tmp_path / "out"))


def test_settings_that_may_change_after_training(images: Path, tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "model", small_plan(), overlay={"inference": {"mirror": False}, "training": {"augment": {"mirror": [1]}}}
    )

    def inference(*settings: str) -> InferenceRecipe:
        return load_model(folder, settings=settings).tools.inference

    assert inference() == InferenceRecipe(mirror=False)
    given = ("tile_step=0.75", "gaussian=false", "precision=bf16", "convolution = 'direct'", "mirror=[0, 2]")
    assert inference(*given) == InferenceRecipe(mirror=(0, 2), tile_step=0.75, gaussian=False, precision="bf16", convolution="direct")
    assert inference("mirror=auto") == InferenceRecipe(mirror=(1,)), "what training showed, not what the recipe says"
    assert inference("mirror=true", "mirror=false") == InferenceRecipe(mirror=False)
    for wrong in ("checkpoint=best", "tile_step", "=1", "step=1", "compatibility=nnunet"):
        with pytest.raises(InputError, match=f"--set '{wrong}' is not understood; give NAME=VALUE with one of the names mirror, tile_step"):
            inference(wrong)
    for wrong, said in {
        "tile_step=2": "tile_step = 2 ",
        "precision=fp8": "precision = 'fp8' ",
        "mirror=[0,0]": "",
        "tile_step=half": "",
    }.items():
        with pytest.raises(InputError, match=f"^--set: .*{said}"):
            inference(wrong)
    # and they act
    masks = [next(predict_path(load_model(folder, settings=one), images / "a_0000.nii.gz", tmp_path / name)) for one, name in ACTING]
    assert len({mask.path.read_bytes() for mask in masks}) == len(ACTING)
