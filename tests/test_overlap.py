"""Voxel counts against closed forms, and what is taken as a mask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ichbench.errors import InputError
from ichbench.scoring import overlap
from ichbench.scoring.overlap import Counts


def test_counts_and_ratios_of_a_known_pair() -> None:
    reference = np.zeros((4, 10, 10), dtype=bool)
    predicted = np.zeros_like(reference)
    reference[1:3, 2:6, 2:6] = True  # 32 voxels
    predicted[1:3, 2:6, 3:7] = True  # shifted by one of four columns
    counts = overlap.count(reference, predicted)
    assert counts == Counts(32, 32, 24)
    assert overlap.dice(counts) == 0.75
    assert overlap.iou(counts) == 24 / 40
    assert overlap.sensitivity(counts) == overlap.precision(counts) == 0.75
    assert overlap.rvd(counts) == 0.0
    assert overlap.dice(counts, 1e-5) == (2 * 24 + 1e-5) / (64 + 1e-5)


def test_rvd_has_no_sign_and_no_upper_bound() -> None:
    assert overlap.rvd(Counts(10, 0, 0)) == 1.0
    assert overlap.rvd(Counts(10, 5, 5)) == 0.5
    assert overlap.rvd(Counts(10, 45, 10)) == 3.5
    assert overlap.rvd(Counts(0, 3, 0)) == math.inf
    assert math.isnan(overlap.rvd(Counts(0, 0, 0)))


@pytest.mark.parametrize("metric", [overlap.dice, overlap.iou, overlap.sensitivity, overlap.precision])
def test_nothing_over_nothing_is_nan(metric: Any) -> None:
    assert math.isnan(metric(Counts(0, 0, 0)))


def test_volume() -> None:
    assert overlap.volume_ml(1000, 0.5 * 0.5 * 4 / 1000) == pytest.approx(1.0, rel=1e-15)


@settings(max_examples=60)
@given(hnp.arrays(bool, (3, 4, 4)), hnp.arrays(bool, (3, 4, 4)))
def test_ratios_agree_with_sets_of_voxels(first: np.ndarray, second: np.ndarray) -> None:
    ours, theirs = ({tuple(i) for i in np.argwhere(mask)} for mask in (first, second))
    counts = overlap.count(first, second)
    assert counts == Counts(len(ours), len(theirs), len(ours & theirs))
    if ours | theirs:
        dice, iou = overlap.dice(counts), overlap.iou(counts)
        assert iou == len(ours & theirs) / len(ours | theirs)
        assert dice == pytest.approx(2 * iou / (1 + iou), rel=1e-14)
        assert overlap.dice(Counts(counts.predicted, counts.reference, counts.both)) == dice


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64, np.uint64, np.float16, np.float32, np.float64])
def test_every_way_to_store_a_mask_means_the_same(dtype: type) -> None:
    mask = np.random.default_rng(0).random((3, 5, 4)) < 0.4
    assert np.array_equal(overlap.as_mask(mask.astype(dtype), "it"), mask)


def test_labels_above_zero_are_foreground_and_strides_do_not_matter() -> None:
    labels = np.random.default_rng(1).choice([0, 1, 4, 255], size=(4, 6, 5)).astype(np.uint8)
    assert np.array_equal(overlap.as_mask(labels, "it"), labels > 0)
    assert np.array_equal(overlap.as_mask(labels[::-1, ::2].transpose(2, 0, 1), "it"), (labels > 0)[::-1, ::2].transpose(2, 0, 1))
    assert np.array_equal(overlap.as_mask(labels.tolist(), "it"), labels > 0)
    big_endian = labels.astype(">i2")
    assert np.array_equal(overlap.as_mask(big_endian, "it"), labels > 0)


def test_tensors_are_recognised_by_their_methods() -> None:
    class Tensor:
        """Refuses to become an array until it is detached and on the CPU, as a CUDA tensor with a gradient does."""

        steps = ""

        def detach(self) -> Tensor:
            self.steps += "d"
            return self

        def cpu(self) -> Tensor:
            self.steps += "c"
            return self

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            if self.steps != "dc":
                raise TypeError("not on the CPU")
            return np.ones((1, 2, 3), dtype=bool)

    assert overlap.as_mask(Tensor(), "it").all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((2, 2, 2), 0.5), "0.5"),
        (np.full((2, 2, 2), np.nan), "nan"),
        (np.full((2, 2, 2), np.inf), "inf"),
        (np.full((2, 2, 2), 1e300), "1e[+]300"),
        (np.full((2, 2, 2), -1), "label -1"),
        (np.full((2, 2, 2), -1.0), "label -1"),
        (np.zeros((2, 2)), r"shape \(2, 2\)"),
        (np.zeros((1, 2, 2, 2)), r"shape \(1, 2, 2, 2\)"),
        (np.zeros((2, 2, 2), dtype=complex), "complex"),
        (np.full((2, 2, 2), "a"), "type <U1"),
        (np.full((2, 2, 2), None), "object"),
        ([[1, 2], [3]], "cannot read"),
        (None, "shape"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(array: Any, words: str) -> None:
    with pytest.raises(InputError, match=f"^the prediction .*{words}"):
        overlap.as_mask(array, "the prediction")


def test_spacing() -> None:
    assert overlap.as_spacing(np.array([5, 0.5, 0.25], dtype=np.float32)) == (5.0, 0.5, 0.25)
    # float32 pixdim becomes the float64 of the same value: that is what the official script computes with
    assert overlap.as_spacing([np.float32(0.42)] * 3)[0] == 0.41999998688697815


WRONG_SPACINGS = [(1, 1), (1, 1, 1, 1), (0, 1, 1), (-1, 1, 1), (math.nan, 1, 1), (math.inf, 1, 1), (1e-9, 1, 1), 1.0, None, "abc"]


@pytest.mark.parametrize("spacing", WRONG_SPACINGS)
def test_wrong_spacing_is_refused(spacing: Any) -> None:
    with pytest.raises(InputError, match="the spacing is"):
        overlap.as_spacing(spacing)


@given(st.tuples(*[st.integers(0, 3)] * 3), st.tuples(*[st.integers(0, 3)] * 3))
def test_shapes_must_be_equal(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    if first == second:
        overlap.check_same_shape(first, second)
        return
    with pytest.raises(InputError) as error:
        overlap.check_same_shape(first, second)
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)
