"""Batches: every change reaches them, any sample can be made again alone, masked channels, workers, devices, nnU-Net's boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ichbench.augmentation.batches import Sampling, ahead, draw_sample, make_batch, training_sampling
from ichbench.augmentation.draw import AugmentDraw
from ichbench.augmentation.patches import TRAIN_STREAM, VALIDATION_STREAM, TrainingCase
from ichbench.errors import InputError
from ichbench.recipe import AugmentRecipe, TrainingRecipe

torch.set_num_threads(1)
NAMES = ("rotation", "scaling", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted")
OFF = AugmentRecipe(mirror=False, **{f"{name}_probability": 0.0 for name in NAMES})
EVERYTHING = AugmentRecipe(**{f"{name}_probability": 1.0 for name in NAMES})


def cases(count: int = 3) -> list[TrainingCase]:
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        labels = np.zeros((8, 24, 24), np.int16)
        labels[3:5, 10:14, 8:12] = 1
        places = {1: np.argwhere(labels == 1)}
        made.append(TrainingCase(f"c{i}", rng.standard_normal((1, 8, 24, 24), dtype=np.float32), labels, places))
    return made


@pytest.mark.parametrize("patch", [(6, 16, 16), (4, 20, 20), (16, 16)])
def test_any_sample_of_any_batch_can_be_made_alone(patch: tuple[int, ...]) -> None:
    sampling = Sampling(patch, 4, 0.33, 11, EVERYTHING)
    for _ in range(2):
        make_batch(cases(), sampling, TRAIN_STREAM, 0)
    image, labels = make_batch(cases(), sampling, TRAIN_STREAM, 7)
    assert tuple(image.shape) == (4, 1, *patch)
    assert tuple(labels.shape) == (4, *patch)
    assert labels.dtype == torch.int16
    for i in (3, 0):
        alone = make_batch(cases(), sampling, TRAIN_STREAM, 7, samples=range(i, i + 1))
        np.testing.assert_array_equal(image[i].numpy(), alone[0][0].numpy())
        np.testing.assert_array_equal(labels[i].numpy(), alone[1][0].numpy())
    other = make_batch(cases(), sampling, TRAIN_STREAM + 1, 7)[0]
    assert not torch.equal(image, other)


def test_forced_samples_show_foreground_even_when_turned() -> None:
    sampling = Sampling((6, 16, 16), 2, 0.33, 0, EVERYTHING)
    for step in range(30):
        assert (make_batch(cases(), sampling, TRAIN_STREAM, step)[1][1] == 1).any()


def test_voxels_outside_the_image_become_background() -> None:
    sampling = Sampling((12, 32, 32), 2, 0.33, 0, None)
    image, labels = make_batch(cases(), sampling, TRAIN_STREAM, 0)
    assert set(np.unique(labels.numpy())) == {0, 1}
    assert (image[:, :, 0] == 0).all()


def test_working_ahead_in_threads_changes_nothing() -> None:
    sampling, seen = Sampling((6, 16, 16), 2, 0.33, 0, EVERYTHING), cases()

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return make_batch(seen, sampling, TRAIN_STREAM, step)

    for (a, b), (c, d) in zip(ahead(make, range(9), 0), ahead(make, range(9), 3), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_an_error_in_a_thread_reaches_the_reader() -> None:
    def fail(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError(f"batch {step}")

    with pytest.raises(ValueError, match="batch 0"):
        list(ahead(fail, range(3), 2))


@pytest.mark.parametrize("patch", [(6, 16, 16), (4, 20, 20), (16, 16)])
@pytest.mark.parametrize("name", [*NAMES, "mirror"])
def test_every_transform_reaches_the_batch(name: str, patch: tuple[int, ...]) -> None:
    """One at a time, drawn always: the images differ from those of none, and the labels only where places move."""
    update: dict[str, Any] = {"mirror": True} if name == "mirror" else {f"{name}_probability": 1.0}
    # a share of nearly 1 keeps every voxel of a small patch
    update |= {"blur_channel_probability": 1.0, "low_resolution_channel_probability": 1.0, "low_resolution": (0.5, 0.8)}
    alone = Sampling(patch, 2, 0.33, 4, OFF.model_copy(update=update))
    moved = 0
    for step in range(3):
        image, labels = make_batch(cases(), alone, TRAIN_STREAM, step)
        plain, before = make_batch(cases(), Sampling(patch, 2, 0.33, 4, OFF), TRAIN_STREAM, step)
        if name == "mirror":
            assert image.sum().item() == pytest.approx(plain.sum().item(), abs=1e-2)
        else:
            for one, other in zip(image, plain, strict=True):
                assert (one - other).abs().mean() > 1e-3
        moved += int((labels != before).sum())
        still, same = make_batch(cases(), Sampling(patch, 2, 0.33, 4, None), TRAIN_STREAM, step)
        assert torch.equal(still, plain)
        assert torch.equal(same, before)
    assert (moved > 0) == (name in ("rotation", "scaling", "mirror"))


def test_drawn_numbers_are_those_applied() -> None:
    """Brightness and mirroring undone with the numbers of the draw give the plain batch back."""
    sampling = Sampling((6, 16, 16), 2, 0.33, 4, OFF.model_copy(update={"mirror": True, "brightness_probability": 1.0}))
    plain = Sampling((6, 16, 16), 2, 0.33, 4, OFF)
    for step in range(5):
        image, labels = make_batch(cases(), sampling, TRAIN_STREAM, step)
        bare, truth = make_batch(cases(), plain, TRAIN_STREAM, step)
        for i in range(2):
            change = draw_sample(cases(), sampling, TRAIN_STREAM, step, i).change
            axes = [axis for axis, flip in enumerate(change.mirror_zyx) if flip]
            torch.testing.assert_close(image[i].flip([axis + 1 for axis in axes]) / change.brightness[0], bare[i])
            assert torch.equal(labels[i].flip(axes), truth[i])


def masked_case() -> TrainingCase:
    """Two channels with a value outside the mask, too, to see it go; the mask is a box."""
    rng = np.random.default_rng(2)
    labels = np.full((6, 30, 30), -1, np.int16)
    labels[:, 8:22, 8:22] = 0
    labels[2:4, 12:16, 12:16] = 1
    image = rng.standard_normal((2, 6, 30, 30), dtype=np.float32) + 5
    return TrainingCase("m", image, labels, {1: np.argwhere(labels == 1)})


@pytest.mark.parametrize("augment", [OFF, EVERYTHING, EVERYTHING.model_copy(update={"in_plane": False})])
def test_masked_channels_are_0_outside_the_mask(augment: AugmentRecipe) -> None:
    """Only the channel that was normalised inside the mask, only in training; the mask turns with the labels."""
    case = masked_case()
    sampling = Sampling((6, 24, 24), 2, 0.33, 0, augment, masked_channels=(1,))
    for step in range(4):
        image, labels = make_batch([case], sampling, TRAIN_STREAM, step)
        free, same = make_batch([case], Sampling((6, 24, 24), 2, 0.33, 0, augment), TRAIN_STREAM, step)
        assert torch.equal(labels, same)
        assert torch.equal(image[:, 0], free[:, 0])
        gone = image[:, 1] == 0
        assert torch.equal(image[:, 1][~gone], free[:, 1][~gone])
        assert 0.2 < gone.float().mean() < 0.95
        assert not (gone & (labels > 0)).any()
    if augment is OFF:
        low = draw_sample([case], sampling, TRAIN_STREAM, 3, 0).patch.lower_zyx
        inside = case.labels_zyx[:, low[1] : low[1] + 24, low[2] : low[2] + 24] < 0
        np.testing.assert_array_equal(gone[0].numpy(), inside)
    unmasked, _ = make_batch([case], Sampling((6, 24, 24), 2, 0.33, 0, None), VALIDATION_STREAM, 0)
    assert (unmasked != 0).all()


def test_forced_samples_may_be_drawn_one_by_one() -> None:
    """foreground_samples = "random": each with the probability, whatever its place in the batch."""
    sampling = Sampling((2, 4, 4), 2, 0.33, 0, None, random_foreground=True)
    forced = np.array([[draw_sample(cases(), sampling, 0, step, i).patch.label is not None for i in range(2)] for step in range(2000)])
    assert np.abs(forced.mean(axis=0) - 0.33).max() < 5 * np.sqrt(0.33 * 0.67 / 2000)
    assert abs(np.corrcoef(forced.T)[0, 1]) < 5 / np.sqrt(2000)
    fixed = Sampling((2, 4, 4), 2, 0.33, 0, None)
    assert [draw_sample(cases(), fixed, 0, 0, i).patch.label is not None for i in range(2)] == [False, True]


def test_a_recipe_becomes_a_sampling() -> None:
    recipe = TrainingRecipe(foreground_share=0.4, foreground_samples="random", foreground_position="anywhere", compatibility="nnunet")
    made = training_sampling([4, 8, 8], 3, recipe, 7, use_mask_for_norm=(False, True), previous_labels=2)
    assert made == Sampling((4, 8, 8), 3, 0.4, 7, recipe.augment, False, False, True, 2, (1,))
    assert training_sampling((8, 8), 2, TrainingRecipe(), 0) == Sampling((8, 8), 2, 0.33, 0, AugmentRecipe())


@pytest.mark.parametrize("patch", [(6, 16, 16), (2, 16, 16), (16, 16)])
def test_nnunets_boxes(patch: tuple[int, ...]) -> None:
    """compatibility = "nnunet": what lies beyond the enlarged box is not read, so that scaling out brings zeros; ours shows the case."""
    shape = (16, 60, 60)
    bright = TrainingCase("b", np.ones((1, *shape), np.float32), np.ones(shape, np.int16), {1: np.array([[8, 30, 30]])})
    wide = OFF.model_copy(update={"scaling_probability": 1.0, "scaling": (1.4, 1.4)})
    ours, labels = make_batch([bright], Sampling(patch, 2, 1.0, 0, wide), TRAIN_STREAM, 0)
    theirs, seen = make_batch([bright], Sampling(patch, 2, 1.0, 0, wide, clamped=False), TRAIN_STREAM, 0)
    assert (ours == 1).all()
    assert (labels == 1).all()
    assert (theirs == 0).any()
    assert torch.equal(seen == 1, theirs[:, 0] > 0.5)
    unturned, whole = make_batch([bright], Sampling(patch, 2, 1.0, 0, OFF, clamped=False), TRAIN_STREAM, 0)
    assert (unturned == 1).all()
    assert (whole == 1).all()


def test_batches_do_not_share_memory_and_leave_cases_alone() -> None:
    seen = cases()
    kept = [one.image_czyx.copy() for one in seen]
    first, labels = make_batch(seen, Sampling((6, 16, 16), 2, 0.33, 0, EVERYTHING), TRAIN_STREAM, 0)
    copy, marks = first.clone(), labels.clone()
    make_batch(seen, Sampling((6, 16, 16), 2, 0.33, 0, EVERYTHING), TRAIN_STREAM, 1)
    assert torch.equal(first, copy)
    assert torch.equal(labels, marks)
    for one, old in zip(seen, kept, strict=True):
        np.testing.assert_array_equal(one.image_czyx, old)
    first.fill_(0)
    np.testing.assert_array_equal(seen[0].image_czyx, kept[0])


def test_read_only_memory_maps(tmp_path: Any) -> None:
    one = cases(1)[0]
    np.save(tmp_path / "image.npy", one.image_czyx)
    np.save(tmp_path / "labels.npy", one.labels_zyx)
    mapped = TrainingCase(
        "a", np.load(tmp_path / "image.npy", mmap_mode="r"), np.load(tmp_path / "labels.npy", mmap_mode="r"), one.foreground
    )
    for augment in (None, OFF, EVERYTHING):
        sampling = Sampling((6, 16, 16), 2, 0.33, 0, augment)
        for got, expected in zip(make_batch([mapped], sampling, 0, 3), make_batch([one], sampling, 0, 3), strict=True):
            assert torch.equal(got, expected)


def test_a_patch_beyond_every_border() -> None:
    """Images smaller than the patch, turned and not: finite, 0 outside, labels kept."""
    tiny = TrainingCase("t", np.ones((1, 2, 3, 3), np.float32), np.ones((2, 3, 3), np.int16), {1: np.array([[1, 1, 1]])})
    for clamped in (True, False):
        for augment in (None, OFF, EVERYTHING):
            for patch in ((6, 16, 16), (8, 8, 8), (16, 16)):
                image, labels = make_batch([tiny], Sampling(patch, 2, 0.5, 0, augment, clamped=clamped), TRAIN_STREAM, 0)
                assert torch.isfinite(image).all()
                assert set(labels.unique().tolist()) <= {0, 1}
                assert (labels == 1).any()


def test_no_cases() -> None:
    with pytest.raises(InputError, match="no case"):
        make_batch([], Sampling((4, 4, 4), 2, 0.33, 0, None), TRAIN_STREAM, 0)


def test_nothing_drawn_is_no_change() -> None:
    assert draw_sample(cases(), Sampling((4, 4, 4), 2, 0.33, 0, None), 0, 0, 0).change == AugmentDraw()
    assert not AugmentDraw().is_spatial
    assert not AugmentDraw().changes_intensity


@pytest.mark.parametrize("patch", [(6, 16, 16), (3, 20, 20), (16, 16)])
def test_the_way_of_other_devices_gives_the_same(patch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """There whole volumes are worked on, and no number is asked back; noise apart, whose field is another for another kind of device."""
    recipe = AugmentRecipe(**{f"{name}_probability": 0.6 for name in NAMES} | {"noise_probability": 0.0}, in_plane=len(patch) == 2)
    samplings = [Sampling(patch, 2, 0.33, 5, recipe.model_copy(update={"in_plane": flat}), masked_channels=(0,)) for flat in (True, False)]
    expected = [make_batch([masked_case()], sampling, TRAIN_STREAM, step) for sampling in samplings for step in range(6)]
    for module in ("spatial", "straight", "intensity"):
        monkeypatch.setattr(f"ichbench.augmentation.{module}.on_cpu", lambda tensor: False)
    found = [make_batch([masked_case()], sampling, TRAIN_STREAM, step) for sampling in samplings for step in range(6)]
    for (image, labels), (other, truth) in zip(found, expected, strict=True):
        torch.testing.assert_close(image, other, atol=2e-4, rtol=1e-4)
        assert (labels != truth).float().mean() < 1e-3
