"""Do two masks, or a mask and its image, lie on the same voxels, and if only axis order or direction differs, the way back.

All arrays and grids here come from `images.read_labels(..., keep_file_order=True)`: axes as the file has them, reversed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import GEOMETRY_TOLERANCE_MM, Grid
from ichbench.errors import InputError

Values = TypeVar("Values", bound=NDArray[Any])
Order = tuple[int, int, int]
Flips = tuple[bool, bool, bool]


def onto_reference(values: Values, grid: Grid, reference: Grid, reorient: bool, what: str = "prediction") -> Values:
    """The prediction (or whatever `what` names) in the array order of the reference; unchanged where the grids agree.

    Grids agree when shape, spacing, origin and direction do, within 1e-3 mm at every corner of the volume. With `reorient`,
    axes that are merely permuted or reversed are turned back; no voxel is ever interpolated. InputError for anything else.
    """
    if agree(reference, grid):
        return values
    turn = same_voxels(reference, grid)
    if turn is None:
        raise InputError(_difference(reference, grid, what))
    if not reorient:
        raise InputError(
            f"the same voxels are stored in another order: the axes (i, j, k) of the reference point to {_codes(reference)}, those of "
            f"the {what} to {_codes(grid)}; --reorient (reorient=True) turns the {what} by its affine, without interpolation"
        )
    order, flips = turn
    steps = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    return cast("Values", values.transpose(order)[steps])


def agree(a: Grid, b: Grid, tolerance_mm: float = GEOMETRY_TOLERANCE_MM) -> bool:
    """Is every voxel in the same place? An axis of one voxel has its corners in one place, so its step is compared as well."""
    if not a.same_place(b, tolerance_mm):
        return False
    single = np.array(a.shape_zyx) == 1
    return bool((np.abs(a.affine_4x4 - b.affine_4x4)[:3, :3][:, single] <= tolerance_mm).all())


def same_voxels(reference: Grid, grid: Grid) -> tuple[Order, Flips] | None:
    """How to turn an array on `grid` into the order of `reference`: transpose by `order`, then reverse the marked axes.

    None where no permutation and reversal of axes makes the grids agree, and where a file does not say where its axes point.
    """
    if not (_oriented(reference) and _oriented(grid)):
        return None
    # one step along axis p of the prediction is so many voxels along each axis of the reference
    steps = np.rint(np.linalg.solve(reference.affine_4x4[:3, :3], grid.affine_4x4[:3, :3]))
    if not np.array_equal(np.abs(steps) @ np.abs(steps).T, np.eye(3)):
        return None
    a, b, c = (int(axis) for axis in np.argmax(np.abs(steps), axis=1))
    order: Order = (a, b, c)
    flips: Flips = (bool(steps[0, a] < 0), bool(steps[1, b] < 0), bool(steps[2, c] < 0))
    shape = (grid.shape_zyx[a], grid.shape_zyx[b], grid.shape_zyx[c])
    affine = np.array(grid.affine_4x4[:, [*order, 3]])
    for axis in np.flatnonzero(flips):
        affine[:, 3] += affine[:, axis] * (shape[axis] - 1)
        affine[:3, axis] *= -1.0
    turned = Grid(shape, affine)
    return (order, flips) if agree(reference, turned) else None


def _oriented(grid: Grid) -> bool:
    """Does the file say where its axes point? Without sform and qform readers invent an affine."""
    from ichbench.cases.nifti import geometry_of, parse_header

    header = None if grid.header is None else parse_header(grid.header)
    return header is None or geometry_of(header).oriented


def _difference(a: Grid, b: Grid, name: str) -> str:
    """What differs first, with both values in the order of the file's axes, and what to do."""
    what: str
    pair: tuple[Any, Any]
    remedy, resized = "write the prediction with the header of the scan", "bring the prediction back to the grid of the reference"
    if name != "prediction":
        remedy = resized = f"give the {name} that the masks were drawn on"
    if a.shape_zyx != b.shape_zyx:
        what, pair = "shape (i, j, k)", (a.shape_zyx[::-1], b.shape_zyx[::-1])
        remedy = resized
    else:
        apart = float(np.abs(a.corners_mm() - b.corners_mm()).max())
        sizes = [np.linalg.norm(grid.affine_4x4[:3, :3], axis=0) for grid in (a, b)]
        lengths = np.maximum(np.array(a.shape_zyx) - 1, 1)
        moved = np.abs(a.affine_4x4 - b.affine_4x4)[:3, :3] * lengths
        if (np.abs(sizes[0] - sizes[1]) * lengths).max() > GEOMETRY_TOLERANCE_MM:
            what, pair = "spacing (i, j, k; mm)", (_plain(sizes[0][::-1]), _plain(sizes[1][::-1]))
        elif _codes(a) != _codes(b):
            what, pair = "orientation (where i, j, k point)", (_codes(a), _codes(b))
        elif moved.max() > GEOMETRY_TOLERANCE_MM:
            what = "direction (columns i, j, k in RAS+)"
            pair = (_plain(a.direction_3x3[:, ::-1]), _plain(b.direction_3x3[:, ::-1]))
        else:
            what, pair = "origin (RAS+ mm)", (_plain(a.affine_4x4[:3, 3]), _plain(b.affine_4x4[:3, 3]))
        what = f"{what}, voxels lie up to {apart:.4g} mm apart where {GEOMETRY_TOLERANCE_MM:g} mm is allowed"
        if not (_oriented(a) and _oriented(b)):
            remedy += "; a file without sform and qform does not say where its axes point and cannot be reoriented"
    return f"reference and {name} differ in {what}: {pair[0]} and {pair[1]}; {remedy}"


def _codes(grid: Grid) -> str:
    """Where the axes (i, j, k) of the file point, such as LPS."""
    return replace(grid, header=None).axis_codes_zyx[::-1]


def _plain(values: NDArray[Any]) -> Any:
    return np.round(values, 6).tolist()
