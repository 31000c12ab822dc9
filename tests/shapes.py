"""Masks, affines and how to move them, for several tests. Not a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

SPACINGS = [(5.0, 0.45, 0.45), (1.0, 1.0, 1.0), (4.97, 0.43, 0.488), (0.5, 3.0, 1.25)]
SMALL = st.tuples(*[st.integers(1, 5)] * 3)
EDGES_MM = st.tuples(*[st.sampled_from([0.43, 0.5, 0.71, 1.3, 5.0])] * 3)  # no sum of three of their multiples is a tolerance used here
#: the new order of the axes, which of the old ones are mirrored, and how many voxels of background each of the six sides gets
Move = tuple[list[int], tuple[bool, ...], tuple[int, ...]]
MOVES = st.tuples(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.tuples(*[st.integers(0, 2)] * 6))


def box(shape: tuple[int, ...], *ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SMALL)
    first, second = draw(hnp.arrays(bool, shape)), draw(hnp.arrays(bool, shape))
    assume(first.any() and second.any())
    return first, second


def check_unmoved(
    measure: Callable[[np.ndarray, np.ndarray, Sequence[float]], list[float]],
    masks: tuple[np.ndarray, np.ndarray],
    spacing: tuple[float, float, float],
    move: Move,
) -> None:
    """What is measured of a pair stays when both are turned and mirrored, padded (to the last bit), or swapped."""
    order, flips, pad = move
    before = measure(*masks, spacing)
    flipped = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    first, second = (mask[flipped].transpose(order) for mask in masks)
    assert measure(first, second, [spacing[axis] for axis in order]) == pytest.approx(before, rel=1e-12, abs=1e-12)
    first, second = (np.pad(mask, [(pad[0], pad[1]), (pad[2], pad[3]), (pad[4], pad[5])]) for mask in masks)
    assert measure(first, second, spacing) == before
    assert measure(masks[1], masks[0], spacing) == pytest.approx(before, rel=1e-15)


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    return np.asarray(Rotation.from_euler("xyz", angles).as_matrix())


def affine_of(columns: np.ndarray, origin: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = origin
    return affine
