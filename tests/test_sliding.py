"""Tiles and weights against nnU-Net's printed numbers; the whole window against networks whose answer is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ichbench.errors import CaseError, InputError
from ichbench.inference import sliding
from ichbench.inference.sliding import gaussian_weights, half_weights, mirrorings, predict_logits, tile_starts
from ichbench.recipe import InferenceRecipe

torch.set_num_threads(1)


@dataclass(frozen=True)
class Plan:
    dims: int
    patch_size: tuple[int, ...]


PLAIN = InferenceRecipe(mirror=False)
HALF = InferenceRecipe(mirror=False, compatibility="nnunet")


@pytest.mark.parametrize(
    ("length", "patch", "starts"),
    [
        (110, 64, (0, 23, 46)),
        (128, 128, (0,)),
        (129, 128, (0, 1)),
        (192, 128, (0, 64)),
        (193, 128, (0, 32, 65)),
        (256, 128, (0, 64, 128)),
        (300, 128, (0, 57, 115, 172)),
        (257, 64, (0, 28, 55, 83, 110, 138, 165, 193)),
    ],
)
def test_tile_starts_golden(length: int, patch: int, starts: tuple[int, ...]) -> None:
    """Printed by nnU-Net 2.8.1 (facts, golden/misc.out)."""
    assert tile_starts(length, patch, 0.5) == starts


@given(st.integers(1, 64), st.integers(0, 300), st.floats(0.05, 1))
def test_tiles_cover_everything(patch: int, extra: int, step: float) -> None:
    starts = tile_starts(patch + extra, patch, step)
    assert starts[0] == 0
    assert starts[-1] == extra
    # rounding may add half a voxel at each end of a gap, and with steps below one voxel it repeats a tile
    assert all(0 <= b - a <= patch * step + 1 for a, b in itertools.pairwise(starts))
    assert all(b - a <= patch for a, b in itertools.pairwise(starts))


def test_gaussian_golden() -> None:
    """First and last weight on the centre line, and the corners, of 128^3 (facts, golden/misc.out); row 32 of 64 x 64."""
    weights = gaussian_weights((128, 128, 128))
    assert weights.max() == 10
    assert np.unravel_index(weights.argmax(), weights.shape) == (64, 64, 64)
    line = weights[64, 64]
    np.testing.assert_allclose([line[0], line[-1]], [0.00335462624207139, 0.0042990208603441715], rtol=1e-6)
    np.testing.assert_allclose([weights[0, 0, 0], weights[-1, -1, -1]], [3.77513464933088e-10, 7.945268887254997e-10], rtol=1e-6)
    flat = gaussian_weights((64, 64))[32]
    np.testing.assert_allclose(flat[:4], [0.00335462624207139, 0.005487802438437939, 0.008838263340294361, 0.014013594016432762], rtol=1e-6)
    np.testing.assert_allclose(flat[28:32], [8.824969291687012, 9.321024894714355, 9.69233226776123, 9.922179222106934], rtol=1e-6)
    assert gaussian_weights((1, 2, 300)).min() > 0


def constant(x: Tensor) -> Tensor:
    return torch.full_like(x, 3.0)


def identity(x: Tensor) -> Tensor:
    return x


def image(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(2, 6), st.integers(2, 12), st.integers(2, 12)),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_identity_gives_the_image_back(
    shape: tuple[int, ...], patch: tuple[int, ...], step: float, gaussian: bool, mirror: bool, flat: bool
) -> None:
    """Whatever the tiling, padding, weighting and mirroring, in 2D and 3D."""
    plan = Plan(2, patch[1:]) if flat else Plan(3, patch)
    x = image(2, *shape)
    out = predict_logits(identity, x, plan, InferenceRecipe(tile_step=step, gaussian=gaussian, mirror=mirror))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, x, atol=2e-6)
    np.testing.assert_allclose(predict_logits(constant, x, plan, PLAIN), np.full_like(x, 3.0), atol=2e-6)


def test_every_tile_has_the_patch_size_and_slices_go_together() -> None:
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    predict_logits(network, image(1, 5, 30, 7), Plan(3, (8, 16, 16)), PLAIN)
    assert {shape[1:] for shape in seen} == {(1, 8, 16, 16)}
    assert sum(shape[0] for shape in seen) in (3, 4)  # a lone tile goes in twice on a CPU
    seen.clear()
    predict_logits(network, image(1, 11, 16, 7), Plan(2, (16, 16)), PLAIN)
    assert seen == [(8, 1, 16, 16), (3, 1, 16, 16)]


@pytest.mark.parametrize("dims", [2, 3])
def test_large_tiles_go_alone_and_give_the_same(monkeypatch: pytest.MonkeyPatch, dims: int) -> None:
    """Two tiles at once need twice the memory, which a large patch does not have."""
    assert 16 * 128 * 128 <= sliding.PAIR_VOXELS < 32 * 128 * 128
    torch.manual_seed(0)
    conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, 2, 3, padding=1)
    seen: list[int] = []

    def network(x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return conv(x)

    patch, x = (8, 16, 16)[-dims:], image(1, 8, 40, 40)
    slices = 8 if dims == 2 else 1
    pairs = predict_logits(network, x, Plan(dims, patch), PLAIN)
    assert set(seen[:-1]) == {2 * slices}
    seen.clear()
    monkeypatch.setattr(sliding, "PAIR_VOXELS", slices * int(np.prod(patch)) - 1)
    monkeypatch.setattr(sliding, "SMALL_ELEMENTS", 0)
    np.testing.assert_allclose(predict_logits(network, x, Plan(dims, patch), PLAIN), pairs, atol=1e-6)
    assert set(seen) == {slices}


def test_a_slice_does_not_see_its_neighbours() -> None:
    def demean(x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)

    x = image(1, 9, 8, 8)
    np.testing.assert_allclose(predict_logits(demean, x, Plan(2, (8, 8)), PLAIN), x - x.mean((2, 3), keepdims=True), atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_mirroring_is_the_mean_over_all_flips(dims: int) -> None:
    """A network that answers with the position: the mean over all flips is the centre; without mirroring it is the position."""
    calls = []

    def place(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.arange(x.shape[-1]).expand_as(x).float()

    x = image(1, 1 if dims == 2 else 4, 6, 8)
    plan = Plan(dims, (6, 8) if dims == 2 else (4, 6, 8))
    np.testing.assert_allclose(predict_logits(place, x, plan, InferenceRecipe(mirror=True)), np.full(x.shape, 3.5))
    assert len(calls) == 4  # in 3D two flips of a lone small tile go in together
    np.testing.assert_allclose(predict_logits(place, x, plan, PLAIN)[0, 0, 0], np.arange(8))


def test_gaussian_average_of_two_tiles() -> None:
    """A network that answers with the tile's first voxel, 0 or 1: the result is the second tile's share of the weight."""

    def first_voxel(x: Tensor) -> Tensor:
        return x[..., :1].expand_as(x)

    steps = (np.arange(12) >= 4).astype(np.float32).reshape(1, 1, 1, 12)
    got = predict_logits(first_voxel, steps, Plan(3, (1, 1, 8)), PLAIN)[0, 0, 0]
    weight = np.exp(-0.5 * (np.arange(8) - 4.0) ** 2)
    wanted = np.concatenate([np.zeros(4), weight[:4] / (weight[:4] + weight[4:]), np.ones(4)])
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_a_case_error(bad: float) -> None:
    with pytest.raises(CaseError, match=r"case_7.*not finite"):
        predict_logits(lambda x: x * bad, image(1, 2, 4, 4), Plan(3, (2, 4, 4)), PLAIN, name="case_7")


def test_wrong_shape_is_an_input_error() -> None:
    with pytest.raises(InputError, match="channels, z, y, x"):
        predict_logits(identity, image(4, 4, 4), Plan(3, (2, 4, 4)), PLAIN)


def test_a_module_is_put_into_eval_mode() -> None:
    network = nn.Dropout(0.9).train()
    np.testing.assert_array_equal(predict_logits(network, image(1, 2, 4, 4), Plan(3, (2, 4, 4)), PLAIN), image(1, 2, 4, 4))
    assert not network.training


@pytest.mark.parametrize("dims", [2, 3])
def test_half_precision_sums_are_those_of_numpy(dims: int) -> None:
    """Tile after tile in float16, written out; also for an image smaller than the patch on one axis."""
    patch, x = ((4, 6, 8)[-dims:], image(1, 7, 5, 13) * 30)
    got = predict_logits(identity, x, Plan(dims, patch), HALF)
    window = half_weights(patch).numpy().astype(np.float32)
    whole = np.pad(x[0], ((0, 0), (0, 1), (0, 0)))
    total, weights = np.zeros(whole.shape, np.float16), np.zeros(whole.shape, np.float16)
    starts = [tile_starts(length, size, 0.5) for length, size in zip(whole.shape[3 - dims :], patch, strict=True)]
    for lead in range(7) if dims == 2 else (Ellipsis,):
        for corner in itertools.product(*starts):
            where = (lead, *(slice(start, start + size) for start, size in zip(corner, patch, strict=True)))
            total[where] = (total[where] + whole[where] * window).astype(np.float16)
            weights[where] = weights[where] + window.astype(np.float16)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got[0], (total / weights)[:, :5])


def test_the_half_precision_window() -> None:
    """nnU-Net's printed numbers (facts, golden/misc.out): 18987 of 128^3 weights are the smallest that float16 has."""
    window = half_weights((128, 128, 128)).numpy()
    assert window.max() == 10
    assert window.min() == np.float16(5.960464477539063e-08)
    assert int((window == window.min()).sum()) == 18987
    assert int((half_weights((20, 320, 256)).numpy() == np.float16(5.960464477539063e-08)).sum()) == 15529


def test_single_precision_keeps_what_half_loses() -> None:
    """In the corner of a lone tile the weight is so small that half precision keeps hardly a digit of the logit."""
    x = image(1, 16, 16, 16)
    plan = Plan(3, (16, 16, 16))
    np.testing.assert_array_equal(predict_logits(identity, x, plan, PLAIN), x)
    half = predict_logits(identity, x, plan, HALF)
    assert abs(float(half[0, 0, 0, 0]) - float(x[0, 0, 0, 0])) > 1e-3
    np.testing.assert_allclose(half[0, 8, 8], x[0, 8, 8], rtol=1e-2, atol=1e-2)


def test_mirror_axes() -> None:
    assert mirrorings(True, 3) == [(), (-3,), (-2,), (-1,), (-3, -2), (-3, -1), (-2, -1), (-3, -2, -1)]
    assert mirrorings(False, 3) == mirrorings((), 2) == [()]
    assert mirrorings((1, 0), 2) == [(), (-2,), (-1,), (-2, -1)]
    with pytest.raises(InputError, match=r"names the axes \[2\], but a 2D network has the axes \[0, 1\]"):
        mirrorings((2,), 2)

    def place(x: Tensor) -> Tensor:
        return torch.arange(x.shape[-1]).expand_as(x).float()

    out = predict_logits(place, image(1, 4, 6, 8), Plan(3, (4, 6, 8)), InferenceRecipe(mirror=(0, 1)))
    np.testing.assert_allclose(out[0, 0, 0], np.arange(8))


def test_precision() -> None:
    """bf16 keeps eight bits of a product; sums over tiles stay float32. fp16 is not for CPUs."""
    network = nn.Conv3d(1, 2, 3, padding=1)
    x = image(1, 6, 12, 12)
    plan = Plan(3, (6, 8, 8))
    single = predict_logits(network, x, plan, PLAIN)
    brief = predict_logits(network, x, plan, InferenceRecipe(mirror=False, precision="bf16"))
    assert brief.dtype == np.float32
    assert 0 < np.abs(brief - single).max() < 0.05
    with pytest.raises(InputError, match="fp16' is for GPUs"):
        predict_logits(network, x, plan, InferenceRecipe(mirror=True, precision="fp16"))


def test_mirroring_as_in_training_needs_the_training() -> None:
    with pytest.raises(InputError, match="hangs on the training"):
        predict_logits(identity, image(1, 4, 6, 8), Plan(3, (4, 6, 8)), InferenceRecipe())
