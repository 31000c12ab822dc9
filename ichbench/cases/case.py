"""A case and the grid it lives on. The axis order of the whole project is stated here, once.

Arrays are indexed (z, y, x), images (c, z, y, x), where z is the slice axis. World coordinates are
RAS+ millimetres (to the patient's right, anterior, superior).
`Grid.affine_4x4` maps *array* indices in (z, y, x, 1) order to the world, so its column 0 is one step
along z. Reading a file permutes its axes so that z is the slice axis and never flips one unless asked to reorient;
`Grid.file_axes` and `Grid.file_flips` record what was done and writing undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError

FloatArray = NDArray[np.floating]

#: Two grids agree when no corner of the volume is further apart than this (mm); headers of one scan differ by
#: rounding in float32, about 1e-4 mm (facts: TorchIO issues 592, 987, 430).
GEOMETRY_TOLERANCE_MM = 1e-3


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array lie in the patient.

    shape_zyx           number of voxels along (z, y, x)
    affine_4x4          array index (z, y, x, 1) -> RAS+ millimetres, float64
    slice_positions_mm  position of every slice along the slice normal, for stacks that are not evenly spaced;
                        None for a regular stack
    file_axes           working axis k is axis file_axes[k] of the file; (2, 1, 0) for the usual (i, j, k) NIfTI
    pixdim_zyx_mm       the voxel size as the file's header spells it; reading warns where the affine says otherwise. Distances at a
                        tolerance equal to the voxel size (0.42 mm) depend on the last bit, and the official scorer reads
                        this number and not the affine
    header              the NIfTI header it came from (348 bytes, 540 for NIfTI-2), so that a mask is written with the same
                        geometry
    file_flips          working axis k runs against its file axis (only after `images.reorient`)
    """

    shape_zyx: tuple[int, int, int]
    affine_4x4: FloatArray
    slice_positions_mm: tuple[float, ...] | None = None
    file_axes: tuple[int, int, int] = (2, 1, 0)
    pixdim_zyx_mm: tuple[float, float, float] | None = None
    header: bytes | None = field(default=None, repr=False)
    file_flips: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        affine = np.array(self.affine_4x4, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(f"the affine must be a finite 4x4 matrix, but is {affine.tolist()}")
        affine.setflags(write=False)
        object.__setattr__(self, "affine_4x4", affine)

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (z, y, x), mm."""
        if self.pixdim_zyx_mm is not None:
            return self.pixdim_zyx_mm
        z, y, x = np.linalg.norm(self.affine_4x4[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres, also for sheared grids."""
        z, y, x = self.spacing_zyx_mm
        if self.is_regular:
            return z * y * x / 1000.0
        return float(abs(np.linalg.det(self.affine_4x4[:3, :3]))) / 1000.0

    @property
    def direction_3x3(self) -> FloatArray:
        """Unit vectors of the (z, y, x) axes in RAS+, as columns."""
        columns = self.affine_4x4[:3, :3]
        return np.asarray(columns / np.linalg.norm(columns, axis=0))

    @property
    def axis_codes_zyx(self) -> str:
        """Where each of the (z, y, x) axes points, one letter each of L/R, P/A, I/S: "SPL" for most head CTs."""
        direction = self.direction_3x3
        # The assignment of world axes to array axes with the largest total cosine, so that no letter pair occurs twice.
        world = max(permutations(range(3)), key=lambda rows: sum(abs(direction[row, k]) for k, row in enumerate(rows)))
        return "".join("LPI"[row] if direction[row, k] < 0 else "RAS"[row] for k, row in enumerate(world))

    @property
    def is_regular(self) -> bool:
        """Evenly spaced slices and axes at right angles (within 1e-3); sheared or uneven stacks are not."""
        direction = self.direction_3x3
        return self.slice_positions_mm is None and bool(np.allclose(direction.T @ direction, np.eye(3), atol=1e-3))

    def same_place(self, other: Grid, tolerance_mm: float = GEOMETRY_TOLERANCE_MM) -> bool:
        """Do both grids put every voxel in the same place, within `tolerance_mm` at each of the eight corners?"""
        if self.shape_zyx != other.shape_zyx:
            return False
        return float(np.abs(self.corners_mm() - other.corners_mm()).max()) <= tolerance_mm

    def corners_mm(self) -> FloatArray:
        """World positions (8, 3) of the corner voxels' centres."""
        ends = [(0, n - 1) for n in self.shape_zyx]
        index = np.array([(z, y, x, 1) for z in ends[0] for y in ends[1] for x in ends[2]], dtype=np.float64)
        return np.asarray((index @ self.affine_4x4.T)[:, :3])

    def resized(self, shape_zyx: tuple[int, int, int], step_zyx: FloatArray, first_zyx: FloatArray) -> Grid:
        """The grid whose voxel i lies at index `first + step * i` of this one (so it may crop, pad and coarsen)."""
        affine = np.array(self.affine_4x4)
        affine[:3, 3] = self.affine_4x4[:3, :3] @ np.asarray(first_zyx, dtype=np.float64) + self.affine_4x4[:3, 3]
        affine[:3, :3] = self.affine_4x4[:3, :3] * np.asarray(step_zyx, dtype=np.float64)
        old = self.spacing_zyx_mm
        pixdim = (old[0] * float(step_zyx[0]), old[1] * float(step_zyx[1]), old[2] * float(step_zyx[2]))
        return replace(self, shape_zyx=shape_zyx, affine_4x4=affine, pixdim_zyx_mm=pixdim, header=None)


@dataclass(frozen=True, eq=False)
class Case:
    """One patient's scan: `image_czyx` float32 (CT channels in HU), `labels_zyx` integer or None, and their grid."""

    id: str
    image_czyx: NDArray[np.float32]
    labels_zyx: NDArray[np.int16] | None
    grid: Grid

    def __post_init__(self) -> None:
        if self.image_czyx.ndim != 4 or tuple(self.image_czyx.shape[1:]) != self.grid.shape_zyx:
            raise InputError(f"case {self.id}: image has shape {self.image_czyx.shape}, its grid is {self.grid.shape_zyx} (z, y, x)")
        if self.labels_zyx is not None and tuple(self.labels_zyx.shape) != self.grid.shape_zyx:
            raise InputError(f"case {self.id}: labels have shape {self.labels_zyx.shape}, its grid is {self.grid.shape_zyx} (z, y, x)")
