"""Islands: where in a large volume the foreground of two masks is.

Foreground fills little of a head CT. The joint box is split at empty gaps, so that a false positive on the other side of
the head does not make everything between the two a matter of interest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ichbench.scoring.overlap import MaskArray

Box = tuple[slice, slice, slice]

#: boxes smaller than this many voxels are not worth splitting
SPLIT_ABOVE = 200_000
#: a gap is worth a split when it is at least this part of its axis
SPLIT_GAP = 0.15
MOST_ISLANDS = 32


def islands(reference: MaskArray, predicted: MaskArray) -> list[Box]:
    """Disjoint boxes, an empty plane or more between any two on some axis, that hold all foreground of both masks."""
    order = memory_order(reference)
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


def memory_order(mask: MaskArray) -> list[int]:
    """Axes from the longest stride to the shortest."""
    return sorted(range(3), key=lambda axis: (-abs(mask.strides[axis]), axis))


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
