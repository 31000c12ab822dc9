"""Labels of a cascade's first stage: channels, morphology against brute force, components, and errors that name the case."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ichbench.augmentation.batches import Sampling, make_batch
from ichbench.augmentation.cascade_augment import MORPHOLOGIES, change_previous, footprint, one_hot, remove_component
from ichbench.augmentation.draw import MORPHOLOGY, CascadeDraw
from ichbench.augmentation.patches import TRAIN_STREAM, VALIDATION_STREAM, TrainingCase
from ichbench.errors import CaseError
from ichbench.recipe import AugmentRecipe

torch.set_num_threads(1)
Mask = NDArray[np.bool_]
OFF = AugmentRecipe(
    mirror=False,
    morphology_probability=0,
    remove_component_probability=0,
    **{f"{name}_probability": 0.0 for name in ("rotation", "scaling", "noise", "blur", "brightness", "contrast", "low_resolution")},
    gamma_probability=0,
    gamma_inverted_probability=0,
)


def met(mask: Mask, shape: Mask) -> Mask:
    """A voxel is True where a True place of the shape, its middle (the lower of two) on the voxel, falls on a True voxel."""
    out = np.zeros_like(mask)
    for voxel in np.ndindex(*mask.shape):
        for place in np.argwhere(shape):
            at = np.array(voxel) + place - [(n - 1) // 2 for n in shape.shape]
            if np.all(at >= 0) and np.all(at < mask.shape) and mask[tuple(at)]:
                out[voxel] = True
                break
    return out


@settings(max_examples=6)
@given(st.integers(0, 10_000), st.floats(1, 2.9), st.sampled_from([(5, 8, 7), (1, 9, 8)]))
def test_morphology_equals_brute_force(seed: int, radius: float, size: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(size) < rng.choice([0.02, 0.3, 0.9])
    shape = footprint(radius, 2 if size[0] == 1 else 3)
    flat = mask[0] if size[0] == 1 else mask
    expected = {"dilate": met(flat, shape), "erode": ~met(~flat, shape)}
    expected["close"] = ~met(~expected["dilate"], shape)
    expected["open"] = met(expected["erode"], shape)
    for name, work in MORPHOLOGIES.items():
        np.testing.assert_array_equal(work(mask, shape).reshape(flat.shape), expected[name], err_msg=f"{name} {seed} {radius}")


def test_footprints() -> None:
    """Whole radii are the usual ball and disk; fractional ones are what scikit-image makes (facts section 6)."""
    assert footprint(1, 3).sum() == 7
    assert footprint(1, 2).sum() == 5
    assert footprint(2, 2).tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]
    assert footprint(1.5, 3).shape == (4, 4, 4)
    assert footprint(1.5, 2).shape == (4, 4)
    assert footprint(7.99, 3).shape == (16, 16, 16)
    assert set(MORPHOLOGIES) == set(MORPHOLOGY)


def test_gained_voxels_are_taken_from_the_others() -> None:
    labels = np.zeros((1, 7, 9), np.int16)
    labels[0, :, :4], labels[0, :, 4:] = 1, 2
    channels = one_hot(labels, 3)
    assert channels.shape == (3, 1, 7, 9)
    assert not channels[2].any()
    change_previous(channels, CascadeDraw(morphology=((1, "dilate", 2.0),)), 0.15)
    assert channels[0, 0, 3, :6].all()
    assert not channels[0, 0, 3, 6:].any()
    np.testing.assert_array_equal(channels[1], ~channels[0])
    change_previous(channels, CascadeDraw(morphology=((2, "erode", 1.0),)), 0.15)
    assert not (channels[0] & channels[1]).any()
    assert not channels[:, 0, 3, 6].any()


def test_components_that_go() -> None:
    mask = np.zeros((1, 10, 20), bool)
    mask[0, 1, 1] = mask[0, 2, 2] = True  # touch at a corner: one component
    mask[0, 5, 5:9] = True
    mask[0, :, 12:] = True  # 80 of 200 voxels, too large
    seen = set()
    for place in (0.0, 0.49, 0.5, 0.99):
        left = mask.copy()
        remove_component(left, place, 0.15)
        seen.add(int(mask.sum() - left.sum()))
        assert (left <= mask).all()
    assert seen == {2, 4}
    exact = mask.copy()
    # a component of just the share stays: 4 of 200 voxels are 2 %
    for place in (0.0, 0.99):
        remove_component(exact, place, 0.02)
    assert mask.sum() - exact.sum() == 2
    whole = mask.copy()
    remove_component(whole, 0.9, 0.0)
    np.testing.assert_array_equal(whole, mask)
    empty = np.zeros((2, 3, 3), bool)
    remove_component(empty, 0.5, 0.5)
    assert not empty.any()


def cases(previous: bool = True) -> list[TrainingCase]:
    rng = np.random.default_rng(0)
    labels = np.zeros((6, 24, 24), np.int16)
    labels[2:4, 8:14, 8:14] = 1
    labels[2:4, 16:20, 8:14] = 2
    labels[:, :3] = -1
    found = {label: np.argwhere(labels == label) for label in (1, 2)}
    stage = np.maximum(labels, 0).astype(np.uint8) if previous else None
    return [TrainingCase("a", rng.standard_normal((2, *labels.shape), dtype=np.float32), labels, found, stage)]


def test_channels_follow_the_labels() -> None:
    """Cut, turned and mirrored together: where the first stage was right, its channels are the labels' indicators."""
    spatial = OFF.model_copy(update={"mirror": True, "rotation_probability": 1.0, "scaling_probability": 0.7})
    for augment, patch in itertools.product((None, OFF, spatial), ((4, 16, 16), (16, 16), (6, 10, 12))):
        sampling = Sampling(patch, 3, 0.33, 1, augment, previous_labels=2)
        for step in range(4):
            image, labels = make_batch(cases(), sampling, TRAIN_STREAM, step)
            assert image.shape == (3, 4, *patch)
            np.testing.assert_array_equal(image[:, 2].numpy(), (labels == 1).float().numpy())
            np.testing.assert_array_equal(image[:, 3].numpy(), (labels == 2).float().numpy())
            without, same = make_batch(cases(), Sampling(patch, 3, 0.33, 1, augment), TRAIN_STREAM, step)
            np.testing.assert_array_equal(image[:, :2].numpy(), without.numpy())
            np.testing.assert_array_equal(labels.numpy(), same.numpy())


@pytest.mark.parametrize("name", ["morphology", "remove_component"])
def test_faults_reach_the_batch_in_training_alone(name: str) -> None:
    always = OFF.model_copy(update={f"{name}_probability": 1.0, f"{name}_label_probability": 1.0})
    sampling = Sampling((4, 16, 16), 2, 1.0, 1, always, previous_labels=2)
    changed = 0
    for step in range(6):
        image, labels = make_batch(cases(), sampling, TRAIN_STREAM, step)
        changed += int(((image[:, 2] != 0) != (labels == 1)).sum())
        checked, truth = make_batch(cases(), Sampling((4, 16, 16), 2, 1.0, 1, None, previous_labels=2), VALIDATION_STREAM, step)
        np.testing.assert_array_equal(checked[:, 2].numpy(), (truth == 1).float().numpy())
    assert changed > 0


def test_missing_and_misfitting_stages_are_named() -> None:
    sampling = Sampling((4, 16, 16), 2, 0.33, 1, None, previous_labels=1)
    with pytest.raises(CaseError, match="a: the labels of the previous stage are missing"):
        make_batch(cases(previous=False), sampling, TRAIN_STREAM, 0)
    good = cases()[0]
    bad = TrainingCase("b", good.image_czyx, good.labels_zyx, good.foreground, np.zeros((6, 24, 23), np.uint8))
    with pytest.raises(CaseError, match=r"b: .* shape \(6, 24, 23\), the case has \(6, 24, 24\)"):
        make_batch([bad], sampling, TRAIN_STREAM, 0)
