"""Distances between the surfaces of two masks, weighted by area: the definition of DeepMind's `surface-distance`.

Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy", J Med Internet Res 2021
(arXiv 1809.04430), and the PyPI package `surface-distance` 0.1, whose table of surface areas is used here. The
INSTANCE 2022 scorer carries the same code. Its functions are the oracle of the tests and not called: they raise on an
empty mask under NumPy 2 and sort in Python.

How it works. Each corner between eight voxels gets an 8-bit code of its neighbours. A code other than 0 and 255 is a
*surfel*; the table gives its area. Distances run from the surfels of one mask to the nearest surfel of the other.

The last bit matters. 0.42 mm is both the tolerance of the challenge and a common voxel edge, so a surface one voxel
off lies exactly on the tolerance and must count as within it. Every distance is therefore built from integer offsets,
sqrt((dz*sz)^2 + (dy*sy)^2 + (dx*sx)^2) summed in array order, as SciPy's distance transform does: the same bits.
Reversing the axes can change a sum of three terms in its last bit; give arrays in file order to get the official bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring.overlap import MaskArray, as_mask, as_spacing, check_same_shape

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Both directions of one pair of masks. Sorted by distance, then area; an empty mask has no surfels.

    reference_mm, reference_mm2   distance of each reference surfel to the predicted surface (inf where there is none), its area
    predicted_mm, predicted_mm2   the same from the predicted surface to the reference
    """

    reference_mm: Floats
    reference_mm2: Floats
    predicted_mm: Floats
    predicted_mm2: Floats


def surface_record(reference_zyx: MaskArray, predicted_zyx: MaskArray, spacing_zyx_mm: Sequence[float]) -> SurfaceDistances:
    """Surfels of both masks with their distances to the other surface.

    Arrays are 3D, of one shape; the spacing is in the order of the array axes, whichever that is. Masks may touch the
    border (a surface is there) and may be empty. InputError for anything else.
    """
    reference, predicted = as_mask(reference_zyx, "the reference"), as_mask(predicted_zyx, "the prediction")
    check_same_shape(reference.shape, predicted.shape)
    spacing_mm = as_spacing(spacing_zyx_mm)
    box = joint_box(reference, predicted)
    codes = [_corner_codes(mask[box]) for mask in (reference, predicted)]
    # 0 and 255 are the two codes without a surface; adding 1 in uint8 makes them 1 and 0
    surfels = [(code + np.uint8(1)) > 1 for code in codes]
    places = [np.flatnonzero(surfel) for surfel in surfels]
    areas_mm2 = surface_areas_mm2(spacing_mm)
    sides: list[Floats] = []
    for own, other in ((0, 1), (1, 0)):
        distances = _distances_mm(places[own], surfels[other], bool(places[other].size), spacing_mm)
        areas = areas_mm2[codes[own].reshape(-1)[places[own]]]
        order = np.lexsort((areas, distances))
        sides += [distances[order], areas[order]]
    return SurfaceDistances(*sides)


def nsd(record: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalised surface Dice: the part of both surfaces, by area, that lies within `tolerance_mm` (<=) of the other.

    0 when one mask is empty, nan when both are.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError(f"the tolerance is {tolerance_mm} mm; a finite number from 0 up is needed")
    total = np.sum(record.reference_mm2) + np.sum(record.predicted_mm2)
    if total == 0:
        return math.nan
    near = [
        np.sum(areas[: np.searchsorted(distances, tolerance_mm, side="right")])
        for distances, areas in ((record.reference_mm, record.reference_mm2), (record.predicted_mm, record.predicted_mm2))
    ]
    return float((near[0] + near[1]) / total)


def hausdorff(record: SurfaceDistances, percent: float) -> float:
    """Robust Hausdorff distance in mm: the larger of the two directions' percentiles by area; 100 is the maximum.

    inf when one mask or both are empty (the convention of the official script; protocols may say otherwise).
    """
    if not 0 <= percent <= 100:
        raise InputError(f"the percentile is {percent}; a number from 0 to 100 is needed")
    sides = ((record.reference_mm, record.reference_mm2), (record.predicted_mm, record.predicted_mm2))
    return max(_percentile_mm(distances, areas, percent) for distances, areas in sides)


def assd(record: SurfaceDistances) -> float:
    """Average symmetric surface distance in mm: the mean over the surfels of both sides together, weighted by area.

    As in Metrics Reloaded (Maier-Hein et al., Nat Methods 2024), not the mean of the two directions' means.
    inf when one mask is empty, nan when both are.
    """
    total = np.sum(record.reference_mm2) + np.sum(record.predicted_mm2)
    if total == 0:
        return math.nan
    return float((np.sum(record.reference_mm * record.reference_mm2) + np.sum(record.predicted_mm * record.predicted_mm2)) / total)


def joint_box(reference: MaskArray, predicted: MaskArray) -> tuple[slice, slice, slice]:
    """The smallest box that holds the foreground of both masks; of size 0 if there is none."""
    union = reference | predicted
    box = [slice(0, 0)] * 3
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        used = np.flatnonzero(union.any(axis=others))
        if not used.size:
            return slice(0, 0), slice(0, 0), slice(0, 0)
        box[axis] = slice(int(used[0]), int(used[-1]) + 1)
        union = union[(slice(None),) * axis + (box[axis],)]
    return box[0], box[1], box[2]


@lru_cache(maxsize=256)
def surface_areas_mm2(spacing_mm: tuple[float, float, float]) -> Floats:
    """Area of each of the 256 corner codes at this spacing (array axis order), from the package's table."""
    from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

    table = np.asarray(create_table_neighbour_code_to_surface_area(spacing_mm), dtype=np.float64)
    table.setflags(write=False)
    return table


def _corner_codes(mask: MaskArray) -> NDArray[np.uint8]:
    """The 8-bit code of every voxel corner of a box, one more per axis than voxels; outside the box is background.

    Weights [[[128, 64], [32, 16]], [[8, 4], [2, 1]]] over the voxels before and after the corner, axis by axis.
    """
    voxel = np.pad(mask, 1).view(np.uint8)
    pair = 2 * voxel[:, :, :-1] | voxel[:, :, 1:]
    quad = 4 * pair[:, :-1] | pair[:, 1:]
    return np.asarray(16 * quad[:-1] | quad[1:], dtype=np.uint8)


def _distances_mm(places: NDArray[np.intp], targets: NDArray[np.bool_], reachable: bool, spacing_mm: tuple[float, float, float]) -> Floats:
    """Distance from each of `places` (flat indices) to the nearest True of `targets`."""
    if not (places.size and reachable):
        return np.full(places.size, math.inf)
    from scipy import ndimage

    # Asking for the indices alone keeps the floating-point work to the surfels instead of the whole box.
    nearest = ndimage.distance_transform_edt(~targets, sampling=spacing_mm, return_distances=False, return_indices=True)
    total = np.zeros(places.size)
    for axis, index in enumerate(np.unravel_index(places, targets.shape)):
        offset = (nearest[axis].reshape(-1)[places] - index).astype(np.float64)
        offset *= spacing_mm[axis]
        total += offset * offset
    return np.asarray(np.sqrt(total))


def _percentile_mm(distances: Floats, areas: Floats, percent: float) -> float:
    if not distances.size:
        return math.inf
    reached = np.cumsum(areas) / np.sum(areas)
    return float(distances[min(int(np.searchsorted(reached, percent / 100.0)), distances.size - 1)])
