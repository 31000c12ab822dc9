"""Rotation, scaling and mirroring of a patch: where each of its voxels is read in the case, and the reading.

A turned patch is read straight from the case (or, under `compatibility = "nnunet"`, from the enlarged box that nnU-Net cuts):
image linear, outside 0; labels by nnU-Net's rule (batchgeneratorsv2 0.3.6): each label's indicator is interpolated, the
highest wins, and ties, which scores in half precision make more common, go to the nearest voxel's label. Only the part of
the patch that labels above 0 can reach is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ichbench.augmentation.boxes import Box, Ints, bounding_box, common_box, ints, slices
from ichbench.augmentation.draw import AugmentDraw
from ichbench.augmentation.straight import at_places, mix, on_cpu

#: fills an array (..., z, y, x) with what lies from a first voxel (z, y, x) on
Cut = Callable[[NDArray[Any], Ints], None]

#: indicators are interpolated as 0 and 1000 and rounded to half precision: scores closer than about 1/4000 tie, as in nnU-Net
SCORE = 1000.0
#: what half precision rounds to 500: these and all between
HALF_DOWN, HALF_UP = 499.875, 500.125
WHOLE = (0, 0, 0)

Places = Sequence[int] | NDArray[np.integer]
#: positions are trusted to this, in voxels
SLACK = 1e-3
#: voxels worked on at once on a CPU
IN_CACHE = 2**16
#: slices read at once: positions and weights are worked out once for all of them, and more would not stay in the cache
#: when rows of the patch run down columns of the case
TOGETHER = 4


@dataclass(frozen=True, eq=False)
class Reading:
    """Voxel o of the patch is read at matrix @ o + shift, all (z, y, x) in voxels of the array that is read."""

    matrix: NDArray[np.floating]
    shift: NDArray[np.floating]

    def moved(self, first_out: Places, first_in: Places) -> Reading:
        """The same reading of the part of the patch from `first_out` on, in the part of the array from `first_in` on."""
        return Reading(self.matrix, self.shift + self.matrix @ np.asarray(first_out) - np.asarray(first_in))

    def extent(self, size: Places) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First voxel, and last plus one, that reading `size` voxels of the patch touches."""
        half = (np.asarray(size) - 1) / 2
        centre, reach = self.matrix @ half + self.shift, np.abs(self.matrix) @ half + SLACK
        return np.floor(centre - reach).astype(np.int64), np.ceil(centre + reach).astype(np.int64) + 1

    @property
    def is_straight(self) -> bool:
        """No turn: each axis is read by itself."""
        return bool(np.all(self.matrix == np.diag(self.matrix.diagonal())))

    def slice_of(self, z: int) -> int:
        """The slice that slice z of the patch is, where slices stay slices."""
        return round(float(self.matrix[0, 0] * z + self.shift[0]))

    def inverse(self) -> Reading:
        back = np.linalg.inv(self.matrix)
        return Reading(back, -back @ self.shift)


def matrix(draw: AugmentDraw) -> NDArray[np.float64]:
    """Offset from the patch's centre -> offset in the case, both (z, y, x) in voxels: Rx Ry Rz S, nnU-Net's order and signs."""
    z, y, x = np.radians(draw.rotation_degrees or (0.0, 0.0, 0.0))
    about_z = np.array([[1, 0, 0], [0, math.cos(z), -math.sin(z)], [0, math.sin(z), math.cos(z)]])
    about_y = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    about_x = np.array([[math.cos(x), -math.sin(x), 0], [math.sin(x), math.cos(x), 0], [0, 0, 1]])
    scale = draw.scale or 1.0
    return np.asarray(about_x @ about_y @ about_z @ np.diag([1.0 if draw.in_plane else scale, scale, scale]))


def reading(draw: AugmentDraw, box: Box, size: Ints) -> Reading:
    """How a patch of `size` in the middle of `box` (in voxels of the case) is read after the turn, scaling and mirroring."""
    half, turn = (np.array(size) - 1) / 2, matrix(draw)
    centre = np.array(box[0]) + (np.array(box[1]) - 1) / 2
    flip = np.where(draw.mirror_zyx, -1.0, 1.0)
    return Reading(turn * flip, centre - turn @ (flip * half))


def source_box(where: Reading, size: Ints, bounds: tuple[Sequence[int], Sequence[int]], in_plane: bool) -> Box | None:
    """The box of the case to cut for a reading: what it touches, at most one voxel beyond `bounds` (first, last plus one),
    so that what lies outside is there to be interpolated with. None: all of it lies outside."""
    first, last = where.extent(size)
    low, high = np.asarray(bounds[0]) - 1, np.asarray(bounds[1]) + 1
    if in_plane:
        first[0] = min(where.slice_of(0), where.slice_of(size[0] - 1))
        last[0] = first[0] + size[0]
        low[0], high[0] = first[0], last[0]
    first, last = np.maximum(first, low), np.minimum(last, high)
    if np.any(last <= first) or np.any(np.asarray(bounds[1]) <= np.asarray(bounds[0])):
        return None
    return ints(first), ints(last - first)


def turn_image(cut: Cut, box: Box, where: Reading, in_plane: bool, out: Tensor) -> None:
    """Fill `out` (c, z, y, x) by linear interpolation in `box` of the case, beyond whose edge the edge goes on.

    cut     fills an array (c, z, y, x) with the case's values from a first voxel on
    """
    near = where.moved(WHOLE, box[0])
    if near.is_straight:
        source = np.empty((len(out), *box[1]), np.float32)
        cut(source, box[0])
        steps = [at_places(near.matrix[k, k] * np.arange(out.shape[k + 1]) + near.shift[k], box[1][k]) for k in range(3)]
        mix(torch.from_numpy(source).to(out.device), steps, out)
        return
    if not (in_plane and on_cpu(out)):
        source = np.empty((len(out), *box[1]), np.float32)
        cut(source, box[0])
        for planes, values in _planes(torch.from_numpy(source).to(out.device), near, ints(out.shape[1:]), in_plane, "bilinear"):
            out[:, planes] = values
        return
    # few slices at a time, so that they are still in the cache when they are read again
    grid = _grid(near.matrix[1:, 1:], near.shift[1:], box[1][1:], out.shape[2:], out.device)[None]
    for z in range(0, out.shape[1], TOGETHER):
        group = range(z, min(z + TOGETHER, out.shape[1]))
        ends = [near.slice_of(group[0]), near.slice_of(group[-1])]
        source = np.empty((len(out), len(group), *box[1][1:]), np.float32)
        cut(source if ends[0] <= ends[1] else source[:, ::-1], (box[0][0] + min(ends), *box[0][1:]))
        stacked = torch.from_numpy(source).reshape(1, -1, *box[1][1:])
        read = F.grid_sample(stacked, grid, "bilinear", "border", align_corners=False)
        out[:, z : z + len(group)] = read.reshape(len(out), len(group), *out.shape[2:])


def turn_labels(cut: Cut, box: Box, where: Reading, in_plane: bool, labelled: Box | None, out: Tensor) -> None:
    """Fill `out` (z, y, x), of any integer type and zeros, with labels read from `box` of the case; -1 where that wins.

    labelled    the box of the case's labels above 0: voxels that no label above 0 can reach stay 0. None: all of `box` counts
    """
    size = ints(out.shape)
    part = (WHOLE, size) if labelled is None else _reached(where, labelled, size)
    near = None if part is None else _needed(where, part, box)
    if part is None or near is None:
        return
    source = np.empty(near[1], np.int16)
    cut(source, near[0])
    target = out[slices(part)]
    _winners(source, where.moved(part[0], near[0]), part[1], in_plane, target)
    if labelled is not None:
        target.clamp_(min=0)


def _needed(where: Reading, part: Box, box: Box) -> Box | None:
    """The part of `box` that reading a part of the patch touches."""
    first, last = where.moved(part[0], WHOLE).extent(part[1])
    return common_box((ints(first), ints(last - first)), box)


def _winners(labels: NDArray[np.int16], where: Reading, size: Ints, in_plane: bool, out: Tensor) -> None:
    """Write the label with the highest score at each voxel of a patch of `size`."""
    low, high = int(labels.min()), int(labels.max())
    if high - low <= 1:
        present = sorted({low, high})
    else:
        present = [int(label) + low for label in np.flatnonzero(np.bincount(labels.ravel() - low))]
    if len(present) == 1:
        out.fill_(present[0])
        return
    if len(present) == 2:
        (_either if on_cpu(out) else _either_at_once)(labels, present, where, size, in_plane, out)
        return
    source = torch.from_numpy(labels).to(out.device)
    # the score of one label is what the others leave; 0 is nearly everywhere
    rest = 0 if 0 in present else present[0]
    nearest = _all_planes(source, where, size, in_plane)
    best, own = torch.full(size, -1.0, device=out.device), torch.full(size, -2.0, device=out.device)
    left, winner = torch.full(size, SCORE, device=out.device), torch.full(size, rest, device=out.device)
    for label in present:
        found = None if label == rest else bounding_box(labels == label)
        reached = None if found is None else _reached(where, found, size)
        if reached is None:
            continue
        part = slices(reached)
        b, o, w, n, remaining = best[part], own[part], winner[part], nearest[part], left[part]
        for planes, values in _planes(source[None], where.moved(reached[0], WHOLE), reached[1], in_plane, "bilinear", label):
            remaining[planes] -= values[0]
            score = values[0].half().float()
            w[planes] = torch.where(score > b[planes], label, w[planes])
            b[planes] = torch.maximum(b[planes], score)
            o[planes] = torch.where(n[planes] == label, score, o[planes])
    left = left.half().float()
    # labels came from the lowest up, and the first of equals stayed
    winner = torch.where((left > best) | ((left == best) & (winner > rest)), rest, winner)
    own = torch.where(nearest == rest, left, own)
    out.copy_(torch.where(own == torch.maximum(best, left), nearest, winner))


def _either(labels: NDArray[np.int16], present: Sequence[int], where: Reading, size: Ints, in_plane: bool, out: Tensor) -> None:
    """Of two labels that with the higher score. The scores sum to 1000, so that one of them says all. Comparing is numpy's
    work, which does so ten times faster than torch."""
    lower, upper = present
    for planes, values in _planes(torch.from_numpy(labels)[None], where, size, in_plane, "bilinear", upper):
        score, target = values[0].numpy(), out[planes].numpy()
        won, reached = score > HALF_UP, score >= HALF_DOWN
        target[...] = lower
        np.copyto(target, upper, where=won)
        if np.count_nonzero(reached) > np.count_nonzero(won):
            tied = np.argwhere(reached & ~won)
            places = (tied + np.array([planes.start, 0, 0])) @ where.matrix.T + where.shift
            nearest = np.clip(np.rint(places).astype(np.int64), 0, np.array(labels.shape) - 1)
            target[tuple(tied.T)] = labels[tuple(nearest.T)]


def _either_at_once(labels: NDArray[np.int16], present: Sequence[int], where: Reading, size: Ints, in_plane: bool, out: Tensor) -> None:
    """The same on another device, of which no number is asked."""
    source = torch.from_numpy(labels).to(out.device)
    lower, upper = source.new_tensor(present)
    ((_, values),) = _planes(source[None], where, size, in_plane, "bilinear", present[1])
    won = torch.where(values[0] > HALF_UP, upper, lower)
    tied = (values[0] >= HALF_DOWN) & (values[0] <= HALF_UP)
    out.copy_(torch.where(tied, _all_planes(source, where, size, in_plane), won))


def _all_planes(source: Tensor, where: Reading, size: Ints, in_plane: bool) -> Tensor:
    """The nearest voxel's label."""
    return torch.cat([values[0] for _, values in _planes(source[None], where, size, in_plane, "nearest")]).to(source.dtype)


def _planes(
    source: Tensor, where: Reading, size: Ints, in_plane: bool, mode: str, label: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the patch and what they read in `source` (c, z, y, x), or in the indicator of a label: (c, n, y, x).
    On a CPU so few at a time that they stay in the cache."""
    step = max(TOGETHER if in_plane else 1, IN_CACHE // (size[1] * size[2])) if on_cpu(source) else size[0]
    if in_plane:
        flat = _grid(where.matrix[1:, 1:], where.shift[1:], source.shape[2:], size[1:], source.device)[None]
    else:
        source = _as_values(source, label)
    for z in range(0, size[0], step):
        planes = slice(z, min(z + step, size[0]))
        count = planes.stop - z
        if in_plane:
            ends = [where.slice_of(i) for i in (z, planes.stop - 1)]
            taken = _as_values(source[:, min(ends) : max(ends) + 1], label)
            taken = taken.flip(1) if ends[0] > ends[1] else taken
            read = F.grid_sample(taken.reshape(1, -1, *source.shape[2:]), flat, mode, "border", align_corners=False)
            yield planes, read.reshape(source.shape[0], count, *size[1:])
        else:
            part = where.moved((z, 0, 0), WHOLE)
            grid = _grid(part.matrix, part.shift, source.shape[1:], (count, *size[1:]), source.device)[None]
            yield planes, F.grid_sample(source[None], grid, mode, "border", align_corners=False)[0]


def _as_values(source: Tensor, label: int | None) -> Tensor:
    if label is None:
        return source.float()
    if on_cpu(source):
        # numpy compares ten times faster
        return torch.from_numpy(np.equal(source.numpy(), label).astype(np.float32)).mul_(SCORE)
    return (source == label) * SCORE


def _grid(
    turn: NDArray[np.floating], move: NDArray[np.floating], shape: Sequence[int], size: Sequence[int], device: torch.device
) -> Tensor:
    """grid_sample's positions: x first, -1 and 1 at the outer borders of the outermost voxels."""
    dims = len(size)
    grid = torch.empty((*size, dims), device=device)
    for axis in range(dims):
        factor = 2 / float(shape[axis])
        total = torch.tensor((move[axis] + 0.5) * factor - 1, dtype=torch.float32, device=device)
        for other in range(dims):
            steps = torch.arange(size[other], dtype=torch.float32, device=device).mul_(float(turn[axis, other]) * factor)
            steps = steps.reshape([-1 if k == other else 1 for k in range(dims)])
            # the last one fills the grid
            total = torch.add(total, steps, out=grid[..., dims - 1 - axis] if other == dims - 1 else None)
    return grid


def _reached(where: Reading, box: Box, size: Ints) -> Box | None:
    """The part of the patch that interpolates with voxels of `box`, or None."""
    back = where.inverse().moved(np.asarray(box[0]) - 1, WHOLE)
    first, last = back.extent(np.asarray(box[1]) + 2)
    first, last = np.maximum(first, 0), np.minimum(last, size)
    return None if np.any(last <= first) else (ints(first), ints(last - first))
