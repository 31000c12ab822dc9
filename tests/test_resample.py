"""nnU-Net's default resampling: numbers printed by the reference (facts/golden/resample.out) and its decisions."""

from __future__ import annotations

import numpy as np
import pytest

from ichbench.prepare.resample import resample_image, resample_labels, resampled_shape, separate_axis


def reference_input() -> np.ndarray:
    return np.random.RandomState(0).rand(1, 6, 10, 8).astype(np.float32)


def test_isotropic_order_3_as_the_reference_printed_it() -> None:
    out = resample_image(reference_input(), (9, 13, 11), (1, 1, 1), (0.7, 0.8, 0.7))
    assert out.dtype == np.float32
    assert float(out.mean()) == 0.49834468960762024
    assert (float(out.min()), float(out.max())) == (0.004695476032793522, 0.9988470077514648)
    assert out[0, 0, 0, :4].tolist() == [0.512094259262085, 0.6921427249908447, 0.7680185437202454, 0.6432176232337952]
    assert out[0, 4, 6, :4].tolist() == [0.05822891369462013, 0.6795375347137451, 0.8944445252418518, 0.4231107831001282]


def test_separate_z_as_the_reference_printed_it() -> None:
    out = resample_image(reference_input(), (9, 13, 11), (5, 1, 1), (3, 0.8, 0.7))
    assert float(out.mean()) == 0.5036219954490662
    assert out[0, :, 6, 3].tolist() == [
        0.35970526933670044,
        *[0.956884503364563] * 2,
        0.4953401982784271,
        *[0.4729655385017395] * 2,
        0.5112976431846619,
        *[0.7068236470222473] * 2,
    ]


def test_the_same_shape_is_the_same_object() -> None:
    image, labels = reference_input(), np.ones((6, 10, 8), np.int16)
    assert resample_image(image, (6, 10, 8), (5, 1, 1), (5.001, 1, 1)) is image
    assert resample_labels(labels, (6, 10, 8), (5, 1, 1), (5.001, 1, 1)) is labels


@pytest.mark.parametrize(
    ("before", "after", "axis"),
    [
        ((3.0, 1, 1), (3.0, 1, 1), None),
        ((3.01, 1, 1), (1, 1, 1), 0),
        ((1, 1, 1), (1, 3.5, 1), 1),
        ((1, 1, 4.0), (5.0, 1, 1), 2),
        ((4.0, 4.0, 1), (5.0, 1, 1), None),
        ((2.0, 1, 1), (4.0, 4.0, 1), None),
    ],
)
def test_when_slices_are_resampled_apart(before: tuple[float, ...], after: tuple[float, ...], axis: int | None) -> None:
    assert separate_axis(before, after) == axis


def test_shapes_round_halves_to_even_in_nnunets_order() -> None:
    assert resampled_shape((5, 5, 7), (1.0, 0.5, 1.0), (2.0, 1.0, 2.0)) == (2, 2, 4)
    assert resampled_shape((1, 1, 1), (1.0, 1.0, 1.0), (9.0, 1.0, 1.0)) == (1, 1, 1)
    assert resampled_shape((9, 237, 207), (10.0, 1.56, 1.56), (5.0, 1.56, 1.56)) == (18, 237, 207)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_across_thick_slices_come_from_the_nearest_slice(axis: int) -> None:
    rng = np.random.default_rng(axis)
    labels = np.moveaxis(np.arange(-1, 5, dtype=np.int16)[:, None, None] * np.ones((6, 4, 4), np.int16), 0, axis)
    spacing, shape = [1.0] * 3, [8] * 3
    spacing[axis], shape[axis] = 5.0, 9
    out = resample_labels(labels, shape, spacing, [1.0] * 3)
    expected = np.arange(-1, 5)[[0, 1, 1, 2, 3, 3, 4, 5, 5]]
    np.testing.assert_array_equal(np.moveaxis(out, axis, 0)[:, rng.integers(8), rng.integers(8)], expected)


def test_half_precision_stays_half_precision() -> None:
    assert resample_image(reference_input().astype(np.float16), (9, 13, 11), (1, 1, 1), (1, 1, 1), order=1).dtype == np.float16
