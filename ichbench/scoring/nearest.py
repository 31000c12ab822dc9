"""The nearest surfel on a lattice of voxel corners, found in four ways that agree to the last bit but one.

- `sweep`: in every row of corners (all x at one z, y), the nearest surfel lies next to the query's own x, and one
  cumulative sum says which two it is. Rows are visited from near to far, for all queries at once, until none can hold
  anything nearer. Fast where the two surfaces are close together.
- `within_planes`: squared distances inside each plane, for all corners at once, from shifted copies; then across planes
  for the queries. Fast where a whole region lies away from the other mask.
- `search`: a k-d tree of those surfels that can be nearest at all. For false positives far from everything.
- `transform`: SciPy's distance transform, whose time depends on the volume alone. For very many surfels far from the other
  mask (an inverted mask, a skull taken for blood), where all others would take longer.

Axes are in a working order, the coarsest first, whatever order the caller's arrays have; only where the last bit of a sum
depends on it, terms are added in the caller's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Places = NDArray[np.intp]
Whole = NDArray[np.int32]

#: with more than one query per so many corners, the distance along x is computed once for all corners
CROWDED = 24
#: rows are taken together until there are about so many pairs of a row and a query, but at least so many rows
TOGETHER, LEAST_TOGETHER = 16_000, 4
#: settled queries are dropped when fewer than this part is left: dropping costs about as much as a row
WORTH_DROPPING = 0.75
#: low bits of a plane's integers: the offset in y, above it the squared distance in corners; both fit for planes this wide
OFFSET_BITS, WIDEST_PLANE = 10, 700
#: above the squared distance of any two corners of such a plane
NOWHERE = 1 << 30
#: planes are searched where there is at least one query for so many corners, and no more than so many for each corner of a plane;
SPARSE, DENSE = 1000, 5
#: in volumes that fit the processor's cache; and not farther than so many rows
PLANES_CORNERS, PLANES_ROWS = 1_200_000, 100
#: so many pairs of a layer and a query are in memory at once
PLANES_TOGETHER = 2_000_000
#: a transform takes about as long as a tree for so many pairs of query and surfel per corner, if the tree is at its slowest
TRANSFORM_ABOVE = 150
#: the distance along x is computed for all corners at once only in volumes up to this size
EVERYWHERE_CORNERS = 4_000_000


@dataclass(frozen=True)
class Frame:
    """Working axis k is axis order[k] of the caller; voxel edges in working order."""

    order: tuple[int, ...]
    edges_mm: tuple[float, ...]

    def sum(self, terms: Sequence[Any]) -> Any:
        """Add terms given in working order in the caller's order: the bits of SciPy's distance transform."""
        first, second, third = (terms[self.order.index(axis)] for axis in range(3))
        return first + second + third


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows from near to far: offsets dz, dy and distance; all that is within `reach_mm` lies in one of them.

    pads    empty corners that `sweep` needs: at both ends of the first axis, behind the last of the others
    """

    dz: NDArray[np.int64]
    dy: NDArray[np.int64]
    mm: Floats
    reach_mm: float
    pads: tuple[int, int, int]

    def inside(self, depth: int, height: int, width: int) -> Rows:
        """Those that two corners of a box of so many corners can lie apart, with the padding that these need."""
        kept = (np.abs(self.dz) < depth) & (np.abs(self.dy) < height)
        dz, dy = self.dz[kept], self.dy[kept]
        # one empty layer at least, so that the very first corner, where a negative index is clipped to, is padding
        return Rows(dz, dy, self.mm[kept], self.reach_mm, (max(1, int(np.abs(dz).max())), int(np.abs(dy).max()), min(self.pads[2], width)))


@lru_cache(maxsize=128)
def nearest_rows(edges_mm: tuple[float, ...], number: int) -> Rows:
    """The nearest `number` rows of corners."""
    # an ellipse of this radius holds more than `number` rows, however unlike the two edges are
    radius_mm = math.sqrt(number * edges_mm[0] * edges_mm[1]) + max(edges_mm[:2])
    far_z, far_y = (min(number, int(radius_mm / edge) + 1) for edge in edges_mm[:2])
    z, y = np.arange(-far_z, far_z + 1), np.arange(-far_y, far_y + 1)
    mm = np.hypot(z[:, None] * edges_mm[0], y[None, :] * edges_mm[1])
    nearest = np.argsort(mm, axis=None, kind="stable")[: number + 1]
    dz, dy = (index - far for index, far in zip(np.unravel_index(nearest, mm.shape), (far_z, far_y), strict=True))
    distances = mm.reshape(-1)[nearest]
    pads = (max(1, int(np.abs(dz[:-1]).max())), int(np.abs(dy[:-1]).max()), int(distances[-1] / edges_mm[2]) + 1)
    return Rows(dz[:-1], dy[:-1], distances[:-1], float(distances[-1]), pads)


def sweep(best: Floats, places: Places, targets: Bools, rows: Rows, frame: Frame, limit_mm: float) -> None:
    """Write into `best` the squared distances (mm2) within the reach of the rows and within `limit_mm`; others stay inf.

    places    flat indices of the queries among the corners of `targets`, which has `rows.pads` empty ones around it
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
    steps = np.arange(rows.pads[2] + 2, dtype=np.float64) * frame.edges_mm[2]
    along = steps * steps
    along[-1] = math.inf
    across = [((offsets * edge) ** 2)[:, None] for offsets, edge in zip((rows.dz, rows.dy), frame.edges_mm, strict=False)]
    jumps = (rows.dz * layer + rows.dy * width)[:, None]
    n_rows = int(np.searchsorted(rows.mm, reach_mm, side="right"))

    def squared(here: Places, count: NDArray[np.int32]) -> Floats:
        gap = np.minimum(here - found.take(count), beyond.take(count) - here)
        return np.asarray(along.take(gap, mode="clip"))

    everywhere = None
    if places.size * CROWDED > flat.size and flat.size <= EVERYWHERE_CORNERS:
        everywhere = squared(np.arange(flat.size), before)
        everywhere[0] = math.inf  # where clipped indices end: padding

    query, current, open_ = places, best.copy(), np.arange(places.size)
    row = 0
    while row < n_rows and query.size:
        taken = slice(row, min(n_rows, row + max(LEAST_TOGETHER, TOGETHER // query.size)))
        there = query + jumps[taken]
        # clip: a line before the very first one has a negative index, and nothing within reach
        squares_along = squared(there, before.take(there, mode="clip")) if everywhere is None else everywhere.take(there, mode="clip")
        squares = frame.sum([across[0][taken], across[1][taken], squares_along])
        np.minimum(current, squares.min(axis=0), out=current)
        row = taken.stop
        if row < n_rows:
            keep = np.flatnonzero(current > rows.mm[row] ** 2)
            if keep.size < WORTH_DROPPING * query.size:
                best[open_] = current
                open_, query, current = open_.take(keep), query.take(keep), current.take(keep)
    best[open_] = current
    best[best > reach_mm * reach_mm] = math.inf


def can_use_planes(n_queries: int, surfels: Bools, frame: Frame) -> bool:
    """Are the two edges within a plane one number, the planes not too wide for the integers, and the work worth it?"""
    _, height, width = surfels.shape
    possible = frame.edges_mm[1] == frame.edges_mm[2] and max(height, width) <= WIDEST_PLANE
    worth_it = surfels.size <= min(SPARSE * n_queries, PLANES_CORNERS) and n_queries <= DENSE * height * width
    return possible and worth_it


def within_planes(corners: Places, surfels: Bools, frame: Frame, least_mm: float) -> Floats:
    """Squared distances (mm2) from corners, one (z, y, x) a row, to the nearest of `surfels`; inf where that is too many rows away.

    surfels     holds at least one
    least_mm    a guess at the least distance: where to begin. The result does not depend on it
    """
    across_mm, edge_mm, _ = frame.edges_mm
    depth, height, width = surfels.shape
    layers = np.flatnonzero(surfels.any(axis=(1, 2)))
    one_row = _along_rows(surfels[layers])
    plane, moved = one_row.copy(), np.empty_like(one_row)
    # per layer and z: squared distance between them
    apart = ((layers[:, None] - np.arange(depth)) * across_mm) ** 2
    found = np.full(len(corners), math.inf)
    open_ = np.arange(len(corners))
    last = min(height - 1, PLANES_ROWS)
    seen, reach = 0, min(last, int(1.5 * least_mm / edge_mm) + 1)
    together = max(1, PLANES_TOGETHER // len(layers))
    while open_.size:
        for dy in range(seen + 1, reach + 1):
            # rows at the same distance come with the same offset: the smaller integer is the nearer surfel
            np.add(one_row, (dy * dy << OFFSET_BITS) | dy, out=moved)
            np.minimum(plane[:, dy:], moved[:, :-dy], out=plane[:, dy:])
            np.minimum(plane[:, :-dy], moved[:, dy:], out=plane[:, :-dy])
        seen = reach
        # nothing in the rows that were not looked at can be nearer than the first of them
        sure = math.inf if seen >= height - 1 else ((seen + 1) * edge_mm) ** 2
        rest = []
        for part in np.split(open_, range(together, open_.size, together)):
            z, y, x = corners[part].T
            packed = plane.reshape(len(layers), -1).take(y * width + x, axis=1)
            squares = (packed >> OFFSET_BITS) * edge_mm**2 + apart.take(z, axis=1)
            layer, each = squares.argmin(axis=0), np.arange(part.size)
            done = np.flatnonzero(squares[layer, each] <= sure)
            layer, best = layer[done], packed[layer[done], done]
            dy = best & ((1 << OFFSET_BITS) - 1)
            dx = np.rint(np.sqrt((best >> OFFSET_BITS) - dy * dy))
            offsets = (layers[layer] - z[done], dy, dx)
            found[part[done]] = frame.sum([(offset * edge) ** 2 for offset, edge in zip(offsets, frame.edges_mm, strict=True)])
            rest.append(np.delete(part, done))
        open_ = np.concatenate(rest)
        if seen >= last:
            break
        reach = min(last, reach + reach // 2 + 1)
    return found


def prefer_transform(n_queries: int, n_surfels: int, n_corners: int) -> bool:
    """Would a k-d tree, at its slowest, take longer than a transform of the whole volume?"""
    return n_queries * n_surfels > TRANSFORM_ABOVE * n_corners


def transform(corners: Places, surfels: Bools, frame: Frame) -> Floats:
    """Squared distances (mm2) from corners, one (z, y, x) a row, to the nearest of `surfels`, which holds some."""
    from scipy import ndimage

    nearest = ndimage.distance_transform_edt(~surfels, sampling=frame.edges_mm, return_distances=False, return_indices=True)
    inside = tuple(corners.T)
    offsets = [(index[inside] - axis) * edge for index, axis, edge in zip(nearest, inside, frame.edges_mm, strict=True)]
    return np.asarray(frame.sum([offset * offset for offset in offsets]))


def search(corners: Places, targets: Places, frame: Frame) -> Floats:
    """Squared distances (mm2) from corners to the nearest of `targets`, one (z, y, x) a row each."""
    from scipy.spatial import cKDTree

    edges_mm = np.array(frame.edges_mm)
    low, high = corners.min(axis=0), corners.max(axis=0)
    # seen from the box of all queries, some surfels are farther at their nearest than another is at its farthest
    nearest = (np.maximum(np.maximum(low - targets, targets - high), 0) * edges_mm) ** 2
    farthest = (np.maximum(targets - low, high - targets) * edges_mm) ** 2
    targets = targets[nearest.sum(axis=1) <= farthest.sum(axis=1).min() * (1 + 1e-9)]
    # the tree is asked few questions: one that is quick to build answers them soonest
    tree = cKDTree(targets * edges_mm, balanced_tree=False, compact_nodes=False)
    found = targets[tree.query(corners * edges_mm)[1]]
    return np.asarray(frame.sum([(offset * edge) ** 2 for offset, edge in zip((found - corners).T, edges_mm, strict=True)]))


def facing(surfels: Bools, low: Places, high: Places) -> Places:
    """Surfels, one (z, y, x) a row, that can be nearest to a corner in the box from `low` to `high` (inclusive).

    Where all lie beyond the box on one axis, that is the near end of each row along that axis; else all of them.
    """
    for axis in (2, 1, 0):
        used = np.flatnonzero(surfels.any(axis=tuple(rest for rest in range(3) if rest != axis)))
        if used.size and (used[0] > high[axis] or used[-1] < low[axis]):
            rows = np.argwhere(surfels.any(axis=axis))
            ahead = bool(used[0] > high[axis])
            end = (surfels if ahead else np.flip(surfels, axis)).argmax(axis=axis)[rows[:, 0], rows[:, 1]]
            return np.asarray(np.insert(rows, axis, end if ahead else surfels.shape[axis] - 1 - end, axis=1))
    return np.argwhere(surfels)


def _along_rows(surfels: Bools) -> Whole:
    """For every corner the squared distance in corners to the nearest surfel of its row, shifted; NOWHERE in empty rows."""
    width = surfels.shape[2]
    x = np.arange(width, dtype=np.int32)
    last, following = np.where(surfels, x, np.int32(-2 * WIDEST_PLANE)), np.where(surfels, x, np.int32(3 * WIDEST_PLANE))
    np.maximum.accumulate(last, axis=2, out=last)
    np.minimum.accumulate(following[..., ::-1], axis=2, out=following[..., ::-1])
    gap = np.minimum(x - last, following - x)
    squared = (gap * gap) << OFFSET_BITS
    squared[gap > WIDEST_PLANE] = NOWHERE
    return np.asarray(squared, dtype=np.int32)
