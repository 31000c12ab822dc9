"""Surfels of two masks on the lattice of voxel corners, and the distance from each to the other mask's nearest: fast.

What it computes is defined in surface.py. How it is fast, on bleeds of 512 x 512 x 28 voxels: only islands of foreground
are looked at (islands.py); corner codes come from three shifts of a byte array; where both masks have a surfel at one
corner the distance is 0, which in a good segmentation settles most of them; for the others see nearest.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.scoring import nearest
from ichbench.scoring.islands import Box, memory_order
from ichbench.scoring.nearest import Bools, Floats, Frame, Places, Rows
from ichbench.scoring.overlap import MaskArray

Triple = tuple[float, float, float]

#: rows of the sweep; what lies farther than they reach is found in other ways
NEAR_ROWS = 64


@dataclass(frozen=True, eq=False)
class Surface:
    """The surfels of one mask: how many of each corner code lie on the other surface, and the others with their distances.

    shared_codes   256 counts: surfels at distance 0
    codes, mm      code and distance of every other surfel; inf where the other mask has no surface
    """

    shared_codes: NDArray[np.int64]
    codes: NDArray[np.uint8]
    mm: Floats


def surfaces(reference: MaskArray, predicted: MaskArray, spacing_mm: Triple, boxes: Sequence[Box]) -> tuple[Surface, Surface]:
    """Both surfaces of a pair of 3D masks of one shape; spacing in the order of the array axes; `boxes` are the pair's `islands`."""
    # the coarsest axis first, so that rows are long: how the array lies in memory is not the caller's merit
    order = sorted(memory_order(reference), key=lambda axis: -spacing_mm[axis])
    frame = Frame(tuple(order), tuple(spacing_mm[axis] for axis in order))
    masks = (reference.transpose(order), predicted.transpose(order))
    rows = nearest.nearest_rows(frame.edges_mm, NEAR_ROWS)
    pieces = [_piece(masks, (box[order[0]], box[order[1]], box[order[2]]), rows, frame) for box in boxes]
    sides = []
    for own, other in ((0, 1), (1, 0)):
        rivals = [piece for piece in pieces if piece.surfels[other].any()]
        squares = [_squares(piece, own, other, rivals, frame) for piece in pieces]
        codes = [piece.codes[own].take(piece.places[own]) for piece in pieces]
        shared = sum((piece.shared_codes[own] for piece in pieces), np.zeros(256, dtype=np.int64))
        sides.append(Surface(shared, _joined(codes, np.uint8), np.sqrt(_joined(squares, np.float64))))
    return sides[0], sides[1]


def corner_codes(mask: MaskArray, bits: Sequence[int] = (4, 2, 1), pads: Sequence[int] = (0, 0, 0)) -> NDArray[np.uint8]:
    """The 8-bit code of every voxel corner of a box, one more per axis than voxels; outside the box is background.

    A corner's code has one bit per neighbour: 2 to the sum of `bits[axis]` over the axes on which the voxel lies before
    the corner. With the bits 4, 2, 1 for the first, second and third axis it is the code of the package's table.
    `pads` adds corners of code 0: at both ends of the first axis, behind the last of the others.
    """
    depth, height, width = mask.shape
    code = np.zeros((depth + 2 + 2 * pads[0], height + 2 + pads[1], width + 2 + pads[2]), dtype=np.uint8)
    code[pads[0] + 1 : pads[0] + 1 + depth, 1 : 1 + height, 1 : 1 + width] = mask
    for axis in (2, 1, 0):
        before, after = [(slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None))]
        code = code[before] << np.uint8(bits[axis]) | code[after]
    return code


@dataclass(frozen=True, eq=False)
class _Piece:
    """One island: per mask the codes of its (padded) corners, which are surfels, where those not shared are, counts of the shared."""

    box: Box
    rows: Rows
    codes: tuple[NDArray[np.uint8], ...]
    surfels: tuple[Bools, ...]
    places: tuple[Places, ...]
    shared_codes: tuple[NDArray[np.int64], ...]

    @property
    def origin(self) -> Places:
        """Where the first corner lies in the whole volume."""
        return np.array([self.box[0].start - self.rows.pads[0], self.box[1].start, self.box[2].start])

    def corners(self, places: Places) -> Places:
        """Flat indices of corners as (z, y, x), one a row."""
        return np.stack(np.unravel_index(places, self.surfels[0].shape), axis=1)


def _piece(masks: tuple[MaskArray, MaskArray], box: Box, rows: Rows, frame: Frame) -> _Piece:
    rows = rows.inside(*_corner_counts(box))
    bits = [4 >> axis for axis in frame.order]
    codes = [corner_codes(mask[box], bits, rows.pads) for mask in masks]
    # 0 and 255 are the two codes without a surface; adding 1 in uint8 makes them 1 and 0
    first, second = (code + np.uint8(1) > 1 for code in codes)
    shared = np.flatnonzero(first & second)
    return _Piece(
        box,
        rows,
        (codes[0], codes[1]),
        (first, second),
        (np.flatnonzero(first > second), np.flatnonzero(second > first)),
        (np.bincount(codes[0].take(shared), minlength=256), np.bincount(codes[1].take(shared), minlength=256)),
    )


def _squares(piece: _Piece, own: int, other: int, rivals: Sequence[_Piece], frame: Frame) -> Floats:
    """Squared distances (mm2) of an island's surfels of mask `own` to mask `other`, which has surfels in `rivals`."""
    places = piece.places[own]
    squares = np.full(places.size, math.inf)
    if not (rivals and places.size):
        return squares
    if piece in rivals:
        limit_mm = _gap_mm(piece, rivals, frame)
        nearest.sweep(squares, places, piece.surfels[other], piece.rows, frame, limit_mm)
        if limit_mm > piece.rows.reach_mm:
            _look_farther(squares, piece, own, other, frame, limit_mm)
    left = np.flatnonzero(np.isinf(squares))
    if left.size:
        corners = piece.corners(places[left]) + piece.origin
        low, high = corners.min(axis=0), corners.max(axis=0)
        targets = [nearest.facing(rival.surfels[other], low - rival.origin, high - rival.origin) + rival.origin for rival in rivals]
        squares[left] = nearest.search(corners, np.concatenate(targets), frame)
    return squares


def _look_farther(squares: Floats, piece: _Piece, own: int, other: int, frame: Frame, limit_mm: float) -> None:
    """Fill in what the sweep left, up to `limit_mm`, in the ways that look at the whole island, where they are worth it."""
    # without the padding, whose corners are nobody's
    pad = piece.rows.pads[0]
    depth, height, width = _corner_counts(piece.box)
    inner = piece.surfels[other][pad : pad + depth, :height, :width]
    left = np.flatnonzero(np.isinf(squares))
    if left.size and nearest.can_use_planes(left.size, inner, frame):
        found = nearest.within_planes(_inner_corners(piece, own, left), inner, frame, piece.rows.reach_mm)
        squares[left] = np.where(found <= limit_mm * limit_mm, found, math.inf)
        left = np.flatnonzero(np.isinf(squares))
    if left.size and nearest.prefer_transform(left.size, int(np.count_nonzero(inner)), inner.size):
        found = nearest.transform(_inner_corners(piece, own, left), inner, frame)
        squares[left] = np.where(found <= limit_mm * limit_mm, found, math.inf)


def _inner_corners(piece: _Piece, own: int, left: Places) -> Places:
    """Those of the island's surfels of mask `own` that are numbered `left`, as (z, y, x) without the padding."""
    return np.asarray(piece.corners(piece.places[own][left]) - np.array([piece.rows.pads[0], 0, 0]))


def _corner_counts(box: Box) -> tuple[int, int, int]:
    z, y, x = (part.stop - part.start + 1 for part in box)
    return z, y, x


def _gap_mm(piece: _Piece, rivals: Sequence[_Piece], frame: Frame) -> float:
    """Distance from an island to the nearest of the others; inf if there is none."""
    gaps = [math.inf]
    for rival in rivals:
        if rival is not piece:
            boxes = zip(piece.box, rival.box, frame.edges_mm, strict=True)
            apart = (max(0, theirs.start - ours.stop, ours.start - theirs.stop) * edge for ours, theirs, edge in boxes)
            gaps.append(math.hypot(*apart))
    return min(gaps)


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])
