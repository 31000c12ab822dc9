"""What the way back needs to know about the way there; plain numbers, as JSON on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ichbench.prepare.resample import Resampling

Shape = tuple[int, int, int]
Floats3 = tuple[float, float, float]


@dataclass(frozen=True)
class FlagGeometry:
    """Where the flagged volume lies in the native one.

    native_shape   the case as it came
    axes, flips    working axis k is native axis axes[k], reversed if flips[k] (both trivial unless `reorient`)
    slice_back     for each native slice (in working order) its fractional index in the flagged stack
    kept_slices    (first, last + 1) native slices that the crop kept; extension slices are not among them
    in_plane_ratio native pixel i lies at (i + 0.5) * ratio - 0.5 of the flagged slice, along (y, x)
    file_order     flagged axis k is working axis file_order[k] (trivial unless compatibility = "nnunet")
    """

    native_shape: Shape
    axes: Shape
    flips: tuple[bool, bool, bool]
    slice_back: tuple[float, ...]
    kept_slices: tuple[int, int]
    in_plane_ratio: tuple[float, float]
    file_order: Shape


@dataclass(frozen=True)
class Geometry:
    """All that `restore_logits` needs. Boxes, shapes (voxels) and spacings (mm) are in the plan's axis order."""

    flags: FlagGeometry
    transpose_forward: Shape
    shape_before_crop: Shape
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    spacing_mm: Floats3
    shape: Shape
    new_spacing_mm: Floats3
    resampling: Resampling = "spline"

    @property
    def cropped_shape(self) -> Shape:
        """Voxels inside the box, before resampling."""
        (z0, z1), (y0, y1), (x0, x1) = self.box
        return z1 - z0, y1 - y0, x1 - x0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; without the usual resampling, as before there was another."""
        table = dataclasses.asdict(self)
        return table if self.resampling != "spline" else {key: value for key, value in table.items() if key != "resampling"}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Geometry:
        """Read what `to_json` wrote."""
        values = {key: _tuples(value) for key, value in table.items() if key != "flags"}
        return cls(flags=FlagGeometry(**{key: _tuples(value) for key, value in table["flags"].items()}), **values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
