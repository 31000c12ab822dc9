"""Surfels of two masks on the lattice of voxel corners, and the distance from each to the other mask's nearest: fast.

What it computes is defined in surface.py. How it is fast, on bleeds of 512 x 512 x 28 voxels:

- *Islands.* Foreground fills little of a head CT. The joint box is split at empty gaps, so that a false positive on the
  other side of the head does not make everything between the two a matter of interest.
- *Corner codes* of an island come from three shifts of a byte array.
- Where both masks have a surfel at one corner the distance is 0; in a good segmentation that settles most of them.
- *A sweep over rows.* For the others: in every row of corners (all x at one z, y), the nearest surfel of the other mask
  lies next to the query's own x, and one cumulative sum says which two it is. Rows are visited from near to far, for all
  queries at once, until none can hold anything nearer. A second sweep reaches farther for the few that are left.
- *A k-d tree* for those that are still open, usually false positives far from everything.

Axes here are in the order of memory (the longest stride first), whatever order the caller's arrays have; only where
the last bit of a sum depends on it, terms are added in the caller's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.scoring.overlap import MaskArray

Box = tuple[slice, slice, slice]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Places = NDArray[np.intp]
Triple = tuple[float, float, float]

#: boxes smaller than this many voxels are not worth splitting
SPLIT_ABOVE = 200_000
#: a gap is worth a split when it is at least this part of its axis
SPLIT_GAP = 0.15
MOST_ISLANDS = 32
#: rows of the first sweep and of the second; what lies farther than they reach goes to the k-d tree
NEAR_ROWS, FAR_ROWS = 64, 256
#: more queries than this go to the tree at once: it takes long to build and answers quickly
FEW = 1500
#: with more than one query per so many corners, the distance along x is computed once for all corners
CROWDED = 24
#: rows are taken together until there are about so many pairs of a row and a query
TOGETHER = 12_000


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
    order = _memory_order(reference)
    frame = _Frame(tuple(order), tuple(spacing_mm[axis] for axis in order))
    masks = (reference.transpose(order), predicted.transpose(order))
    near, far = _rows(frame.memory_mm, NEAR_ROWS), _rows(frame.memory_mm, FAR_ROWS)
    pieces = [_piece(masks, (box[order[0]], box[order[1]], box[order[2]]), near, frame) for box in boxes]
    sides = []
    for own, other in ((0, 1), (1, 0)):
        reachable = any(piece.targets[other].any() for piece in pieces)
        squares = []
        for piece in pieces:
            places = piece.places[own]
            square = np.full(places.size, math.inf)
            if reachable and places.size:
                limit_mm = _gap_mm(piece, pieces, other, frame)
                _sweep(square, places, piece.targets[other], near, piece.pads[2], frame, limit_mm)
                left = np.flatnonzero(np.isinf(square))
                if 0 < left.size <= FEW and limit_mm > near.reach_mm:
                    square[left] = _sweep_again(piece, places[left], other, far, frame, limit_mm)
                    left = left[np.isinf(square[left])]
                if left.size:
                    square[left] = _ask_tree(_corners(piece, places[left]), pieces, other, frame)
            squares.append(square)
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


def islands(reference: MaskArray, predicted: MaskArray) -> list[Box]:
    """Disjoint boxes, an empty plane or more between any two on some axis, that hold all foreground of both masks."""
    order = _memory_order(reference)
    first, second = reference.transpose(order), predicted.transpose(order)
    todo: list[Box] = [(slice(0, first.shape[0]), slice(0, first.shape[1]), slice(0, first.shape[2]))]
    done: list[Box] = []
    while todo:
        box = todo.pop()
        profile = np.logical_or(first[box].any(axis=(1, 2)), second[box].any(axis=(1, 2)))
        if not profile.any():
            continue
        room = len(todo) + len(done) + 2 <= MOST_ISLANDS
        run = _run(profile)
        plane = np.logical_or(first[box][run].any(axis=0), second[box][run].any(axis=0))
        tight = _inner(box, (run, _run(plane.any(axis=1)), _run(plane.any(axis=0))))
        cut = None
        if room and math.prod(part.stop - part.start for part in tight) > SPLIT_ABOVE:
            cut = _widest_gap([profile, plane.any(axis=1), plane.any(axis=0)])
        if cut is None:
            done.append(tight)
        elif cut[0] == 0:
            todo += [_inner(box, (part, slice(None), slice(None))) for part in (slice(cut[1], None), slice(None, cut[1]))]
        else:
            # the plane tells how narrow the two halves are: only that much of the volume is looked at again
            for part in (slice(cut[1], None), slice(None, cut[1])):
                start = part.start or 0
                half = plane[part] if cut[0] == 1 else plane[:, part]
                high, wide = _run(half.any(axis=1)), _run(half.any(axis=0))
                moved = (_moved(high, start), wide) if cut[0] == 1 else (high, _moved(wide, start))
                todo.append(_inner(box, (run, *moved)))
    back = [order.index(axis) for axis in range(3)]
    return sorted(((box[back[0]], box[back[1]], box[back[2]]) for box in done), key=lambda box: [part.start for part in box])


@dataclass(frozen=True)
class _Frame:
    """Axis k of memory is axis order[k] of the caller; voxel edges in the order of memory."""

    order: tuple[int, ...]
    memory_mm: tuple[float, ...]

    def sum(self, terms: Sequence[Any]) -> Any:
        """Add terms given in the order of memory in the caller's order: the bits of SciPy's distance transform."""
        first, second, third = (terms[self.order.index(axis)] for axis in range(3))
        return first + second + third


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows from near to far: offsets dz, dy and distance; all that is within `reach_mm` lies in one of them."""

    dz: NDArray[np.int64]
    dy: NDArray[np.int64]
    mm: Floats
    reach_mm: float
    pads: tuple[int, ...]

    def padding(self, width: int) -> tuple[int, ...]:
        """Empty corners needed around an island of so many columns: two corners of a row are never farther apart than it is wide."""
        return (*self.pads[:2], min(self.pads[2], width))


@dataclass(frozen=True, eq=False)
class _Piece:
    """One island: per mask the codes of its (padded) corners, which are surfels, where those not shared are, counts of the shared."""

    box: Box
    pads: tuple[int, ...]
    codes: tuple[NDArray[np.uint8], ...]
    targets: tuple[Bools, ...]
    places: tuple[Places, ...]
    shared_codes: tuple[NDArray[np.int64], ...]


def _piece(masks: tuple[MaskArray, MaskArray], box: Box, rows: _Rows, frame: _Frame) -> _Piece:
    pads = rows.padding(box[2].stop - box[2].start + 1)
    bits = [4 >> axis for axis in frame.order]
    codes = [corner_codes(mask[box], bits, pads) for mask in masks]
    # 0 and 255 are the two codes without a surface; adding 1 in uint8 makes them 1 and 0
    first, second = (code + np.uint8(1) > 1 for code in codes)
    shared = np.flatnonzero(first & second)
    return _Piece(
        box,
        pads,
        (codes[0], codes[1]),
        (first, second),
        (np.flatnonzero(first > second), np.flatnonzero(second > first)),
        (np.bincount(codes[0].take(shared), minlength=256), np.bincount(codes[1].take(shared), minlength=256)),
    )


def _sweep(best: Floats, places: Places, targets: Bools, rows: _Rows, pad: int, frame: _Frame, limit_mm: float) -> None:
    """Write into `best` the squared distances (mm2) within the reach of the rows and within `limit_mm`; others stay inf.

    places    flat indices of the queries among the corners of `targets`, which has `rows.padding()` empty ones around it
    pad       the empty ones behind each row
    """
    # with a far one at both ends: found[before[i]] is the last surfel up to i, the one after it the first beyond i
    far = 1 << 30
    if targets.size >= far:
        return  # indices are 32 bits wide: such a volume is left to the tree
    reach_mm = min(rows.reach_mm, limit_mm)
    layer, width = targets.shape[1] * targets.shape[2], targets.shape[2]
    flat = targets.reshape(-1)
    before = np.cumsum(flat, dtype=np.int32)
    found = np.concatenate([[-far], np.flatnonzero(flat), [far]]).astype(np.int32)
    beyond = found[1:]
    # An index off the end of a row or a layer lands in the padding, whose next surfel is farther than the last entry here.
    steps = np.arange(pad + 2, dtype=np.float64) * frame.memory_mm[2]
    along = steps * steps
    along[-1] = math.inf
    across = [((offsets * edge) ** 2)[:, None] for offsets, edge in zip((rows.dz, rows.dy), frame.memory_mm, strict=False)]
    jumps = (rows.dz * layer + rows.dy * width).astype(np.int32)[:, None]
    n_rows = int(np.searchsorted(rows.mm, reach_mm, side="right"))

    def computed(there: NDArray[np.int32]) -> Floats:
        # clip: a line before the very first one has a negative index, and nothing within reach
        count = before.take(there, mode="clip")
        gap = np.minimum(there - found.take(count), beyond.take(count) - there)
        return np.asarray(along.take(gap, mode="clip"))

    everywhere = None
    if places.size * CROWDED > flat.size:
        everywhere = computed(np.arange(flat.size, dtype=np.int32))
        everywhere[0] = math.inf  # where clipped indices end: padding

    query, current, open_ = places.astype(np.int32), best.copy(), np.arange(places.size)
    row = 0
    while row < n_rows and query.size:
        taken = slice(row, min(n_rows, row + max(2, TOGETHER // query.size)))
        there = query + jumps[taken]
        squares_along = computed(there) if everywhere is None else everywhere.take(there, mode="clip")
        squares = frame.sum([across[0][taken], across[1][taken], squares_along])
        np.minimum(current, squares.min(axis=0), out=current)
        row = taken.stop
        if row < n_rows:
            best[open_] = current
            keep = current > rows.mm[row] ** 2
            open_, query, current = open_[keep], query[keep], current[keep]
    best[open_] = current
    best[best > reach_mm * reach_mm] = math.inf


def _sweep_again(piece: _Piece, places: Places, other: int, rows: _Rows, frame: _Frame, limit_mm: float) -> Floats:
    """The sweep with more rows about the same surfels, which needs wider padding."""
    inner = piece.targets[other]
    depth, height, width = (n - pad for n, pad in zip(inner.shape, (2 * piece.pads[0], *piece.pads[1:]), strict=True))
    pads = rows.padding(width)
    targets = np.zeros((depth + 2 * pads[0], height + pads[1], width + pads[2]), dtype=bool)
    targets[pads[0] : pads[0] + depth, :height, :width] = inner[piece.pads[0] : piece.pads[0] + depth, :height, :width]
    z, y, x = np.unravel_index(places, inner.shape)
    best = np.full(places.size, math.inf)
    moved = np.ravel_multi_index((z - piece.pads[0] + pads[0], y, x), targets.shape)
    _sweep(best, moved, targets, rows, pads[2], frame, limit_mm)
    return best


def _ask_tree(corners: Places, pieces: list[_Piece], other: int, frame: _Frame) -> Floats:
    """Squared distances from corners of the whole volume to the nearest surfel of mask `other`, wherever it is."""
    from scipy.spatial import cKDTree

    targets = np.concatenate([_corners(piece, np.flatnonzero(piece.targets[other])) for piece in pieces])
    targets = _facing(targets, corners)
    edges_mm = np.array(frame.memory_mm)
    # the tree is asked few questions: one that is quick to build answers them soonest
    tree = cKDTree(targets * edges_mm, balanced_tree=False, compact_nodes=False)
    nearest = targets[tree.query(corners * edges_mm)[1]]
    return np.asarray(frame.sum([(offset * edge) ** 2 for offset, edge in zip((nearest - corners).T, edges_mm, strict=True)]))


def _facing(targets: Places, corners: Places) -> Places:
    """The targets that can be nearest to one of `corners`: of each row along an axis whose one end they all lie beyond, that end."""
    for axis in (2, 1, 0):
        before = corners[:, axis].max() < targets[:, axis].min()
        if before or corners[:, axis].min() > targets[:, axis].max():
            one, two = (other for other in range(3) if other != axis)
            key = targets[:, one] * (int(targets[:, two].max()) + 1) + targets[:, two]
            order = np.lexsort((targets[:, axis] if before else -targets[:, axis], key))
            ends = np.concatenate([[True], np.diff(key[order]) != 0])
            targets = targets[order[ends]]
    return targets


def _corners(piece: _Piece, places: Places) -> Places:
    """Corner indices in the whole volume, one row each."""
    inside = np.stack(np.unravel_index(places, piece.targets[0].shape), axis=1)
    start = (piece.box[0].start - piece.pads[0], piece.box[1].start, piece.box[2].start)
    return np.asarray(inside + np.array(start))


def _gap_mm(piece: _Piece, pieces: list[_Piece], other: int, frame: _Frame) -> float:
    """Distance from an island to the nearest other island with a surface of mask `other`; inf if there is none."""
    gaps = [math.inf]
    for rival in pieces:
        if rival is not piece and rival.targets[other].any():
            boxes = zip(piece.box, rival.box, frame.memory_mm, strict=True)
            apart = (max(0, theirs.start - ours.stop, ours.start - theirs.stop) * edge for ours, theirs, edge in boxes)
            gaps.append(math.hypot(*apart))
    return min(gaps)


@lru_cache(maxsize=128)
def _rows(memory_mm: tuple[float, ...], number: int) -> _Rows:
    """The nearest `number` rows of corners."""
    # an ellipse of this radius holds more than `number` rows, however unlike the two edges are
    radius_mm = math.sqrt(number * memory_mm[0] * memory_mm[1]) + max(memory_mm[:2])
    far_z, far_y = (min(number, int(radius_mm / edge) + 1) for edge in memory_mm[:2])
    z, y = np.arange(-far_z, far_z + 1), np.arange(-far_y, far_y + 1)
    mm = np.hypot(z[:, None] * memory_mm[0], y[None, :] * memory_mm[1])
    nearest = np.argsort(mm, axis=None, kind="stable")[: number + 1]
    dz, dy = (index - far for index, far in zip(np.unravel_index(nearest, mm.shape), (far_z, far_y), strict=True))
    distances = mm.reshape(-1)[nearest]
    # one empty layer at least, so that the very first corner, where a negative index is clipped to, is padding
    pads = (max(1, int(np.abs(dz[:-1]).max())), int(np.abs(dy[:-1]).max()), int(distances[-1] / memory_mm[2]) + 1)
    return _Rows(dz[:-1], dy[:-1], distances[:-1], float(distances[-1]), pads)


def _widest_gap(profiles: Sequence[Any]) -> tuple[int, int] | None:
    """(axis, plane to cut at) of the gap that is the largest part of its axis, or None if none is worth it."""
    widest, where = SPLIT_GAP, None
    for axis, profile in enumerate(profiles):
        used = np.flatnonzero(profile)
        empty = np.diff(used) - 1
        extent = int(used[-1] - used[0]) + 1
        if empty.size and empty.max() / extent >= widest:
            at = int(np.argmax(empty))
            widest, where = float(empty[at] / extent), (axis, int(used[at]) + 1)
    return where


def _memory_order(mask: MaskArray) -> list[int]:
    return sorted(range(3), key=lambda axis: (-abs(mask.strides[axis]), axis))


def _run(profile: Any) -> slice:
    used = np.flatnonzero(profile)
    return slice(int(used[0]), int(used[-1]) + 1)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _inner(box: Box, parts: Sequence[slice]) -> Box:
    """Parts of a box, given from its own start, in the whole volume."""
    inner = []
    for outer, part in zip(box, parts, strict=True):
        start, stop, _ = part.indices(outer.stop - outer.start)
        inner.append(slice(outer.start + start, outer.start + stop))
    return inner[0], inner[1], inner[2]


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])
