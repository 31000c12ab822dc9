"""The way back piece by piece equals the way back at once, regions are decided in float32, and memory stays small."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from ichbench.errors import InputError
from ichbench.prepare import restore as module
from ichbench.prepare.geometry import FlagGeometry, Geometry
from ichbench.prepare.pipeline import restore_logits, restore_scores
from ichbench.prepare.resample import resample_image
from ichbench.prepare.resize import interpolate_axis


def geometry(
    native: tuple[int, int, int], shape: tuple[int, int, int], forward: tuple[int, int, int] = (0, 1, 2), thick: float = 1.0
) -> Geometry:
    """A case that was transposed, cut by a voxel on each side where it has three or more, and resampled to `shape`."""
    turned = tuple(native[axis] for axis in forward)
    box = tuple((1, n - 1) if n > 2 else (0, n) for n in turned)
    flags = FlagGeometry(
        native, (0, 1, 2), (False, False, False), tuple(map(float, range(native[0]))), (0, native[0]), (1.0, 1.0), (0, 1, 2)
    )
    return Geometry(flags, forward, turned, box, (thick, 1.0, 1.0), shape, (thick, 0.9, 0.8))  # type: ignore[arg-type]


CASES = [
    geometry((9, 12, 11), (6, 15, 8)),
    geometry((9, 12, 11), (14, 7, 6), (2, 0, 1)),
    geometry((9, 12, 11), (9, 7, 6), (1, 2, 0), thick=5.0),
    geometry((1, 12, 2), (1, 7, 5), thick=5.0),
    geometry((6, 5, 4), (4, 3, 2)),
]


def at_once(scores: np.ndarray, one: Geometry) -> np.ndarray:
    """nnU-Net's three steps on whole arrays: resample, put back into the box, transpose back."""
    spacings = one.new_spacing_mm, one.spacing_mm
    resampled = resample_image(scores, one.cropped_shape, *spacings, order=1)
    out = np.full((len(scores), *one.shape_before_crop), np.nan, dtype=scores.dtype)
    out[(slice(None), *(slice(*span) for span in one.box))] = resampled
    return out.transpose(0, *(1 + axis for axis in np.argsort(one.transpose_forward)))


@pytest.mark.parametrize("one", CASES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("piece", [1, 2**20])
def test_in_pieces_as_at_once(one: Geometry, dtype: type, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    scores = np.random.default_rng(0).integers(-9, 9, (4, *one.shape)).astype(dtype)
    expected = at_once(scores, one)
    np.testing.assert_array_equal(restore_scores(scores, one), expected)
    labels = np.nan_to_num(expected, nan=-99.0).argmax(axis=0)
    np.testing.assert_array_equal(restore_logits(scores, one), labels)
    regions = np.zeros(labels.shape, np.int16)
    for head, value in zip(expected, (3, 1, 1, 2), strict=True):
        regions[head > module.ABOVE_HALF] = value  # rounding leaves 1e-16 where 0 is meant
    np.testing.assert_array_equal(restore_logits(scores, one, (3, 1, 1, 2)), regions)


def test_flags_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the pixels and two slices out of three were prepared, from a case that lay the other way round."""
    one = geometry((6, 8, 10), (4, 4, 5))
    flags = replace(one.flags, slice_back=tuple(np.arange(6) * 0.6 + 0.1), in_plane_ratio=(0.5, 0.5), flips=(False, True, False))
    one = replace(one, flags=flags, box=((0, 4), (0, 4), (0, 5)), shape_before_crop=(4, 4, 5), new_spacing_mm=one.spacing_mm)
    scores = np.random.default_rng(1).normal(size=(3, 4, 4, 5)).astype(np.float32)
    expected = scores
    for axis, position in ((1, np.arange(6) * 0.6 + 0.1), (2, (np.arange(8) + 0.5) / 2 - 0.5), (3, (np.arange(10) + 0.5) / 2 - 0.5)):
        expected = interpolate_axis(expected, axis, np.clip(position, 0, scores.shape[axis] - 1))
    for piece in (1, 2**20):
        monkeypatch.setattr(module, "PIECE", piece)
        np.testing.assert_allclose(restore_scores(scores, one), expected[:, :, ::-1], atol=1e-6)
        np.testing.assert_array_equal(restore_logits(scores, one), restore_scores(scores, one).argmax(axis=0))


def test_a_region_needs_more_than_one_half_in_float32() -> None:
    """torch: sigmoid(2^-24) is 0.5 and sigmoid(2^-23) is above it; float16 knows both numbers."""
    one = replace(geometry((1, 1, 6), (1, 1, 4)), box=((0, 1), (0, 1), (1, 5)), new_spacing_mm=(1.0, 1.0, 1.0))
    scores = np.array([0.0, 2.0**-24, 2.0**-23, -1.0]).reshape(1, 1, 1, 4)
    for dtype in (np.float16, np.float32):
        assert restore_logits(scores.astype(dtype), one, (7,)).ravel().tolist() == [0, 0, 0, 7, 0, 0]
    with pytest.raises(InputError, match="scores of 1 regions, but labels for 2"):
        restore_logits(scores, one, (1, 2))
    with pytest.raises(InputError, match="scores have shape"):
        restore_scores(scores[:, :, :, :2], one)


def test_memory_does_not_grow_with_the_classes() -> None:
    """A volume of 200 x 200 x 100: labels take 8 MB, a class in float64 32 MB, and all that is held is some slices of one."""
    one = geometry((100, 200, 200), (60, 150, 150))
    scores = np.zeros((3, *one.shape), np.float16)
    tracemalloc.start()
    restore_logits(scores, one)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # two label arrays (one of them in native order) and some slabs of 2^20 voxels in float64
    assert peak < 2 * 8e6 + 10 * 8 * 2**20
