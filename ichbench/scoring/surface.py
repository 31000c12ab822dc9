"""Distances between the surfaces of two masks, weighted by area: the definition of DeepMind's `surface-distance`.

Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy", J Med Internet Res 2021
(arXiv 1809.04430), and the PyPI package `surface-distance` 0.1, whose table of surface areas is used here. The
INSTANCE 2022 scorer carries the same code. Its functions are the oracle of the tests and not called: they raise on an
empty mask under NumPy 2 and sort in Python.

How it works. Each corner between eight voxels gets an 8-bit code of its neighbours. A code other than 0 and 255 is a
*surfel*; the table gives its area. Distances run from the surfels of one mask to the nearest surfel of the other.

The last bit matters. 0.42 mm is both the tolerance of the challenge and a common voxel edge, so a surface one voxel
off lies exactly on the tolerance and must count as within it. Every distance is therefore built from integer offsets,
sqrt((dz*sz)^2 + (dy*sy)^2 + (dx*sx)^2) summed in array order, as SciPy's distance transform does: the same bits. Where two
surfels are equally near, the two sums may differ in the last bit, and which one the transform picks is its own secret:
when that decides about a tolerance (three voxels of 0.14 mm), the transform itself is asked (`SurfaceDistances.settled`).
Reversing the axes can change a sum of three terms in its last bit; give arrays in file order to get the official bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring import islands, lattice
from ichbench.scoring.overlap import MaskArray, as_mask, as_spacing, check_same_shape

Floats = NDArray[np.float64]

#: lengths that differ by less, relative to themselves, may be one length summed in two ways
TIE = 1e-12


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Both directions of one pair of masks. Sorted by distance, then area; an empty mask has no surfels.

    reference_mm, reference_mm2   distance of each reference surfel to the predicted surface (inf where there is none), its area
    predicted_mm, predicted_mm2   the same from the predicted surface to the reference
    spacing_mm                    voxel edges in array order
    masks                         the two masks within their joint box; without them, distances are taken as they are
    """

    reference_mm: Floats
    reference_mm2: Floats
    predicted_mm: Floats
    predicted_mm2: Floats
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    masks: tuple[MaskArray, MaskArray] | None = None

    @cached_property
    def reached(self) -> tuple[Floats, Floats]:
        """Per side: the part of its area up to and including each surfel."""
        own, other = (np.cumsum(areas) / np.sum(areas) if areas.size else areas for areas in (self.reference_mm2, self.predicted_mm2))
        return own, other

    @cached_property
    def settled(self) -> SurfaceDistances:
        """The same with every distance from SciPy's distance transform, as the official script computes them: slower."""
        if self.masks is None:
            return self
        codes = [lattice.corner_codes(mask) for mask in self.masks]
        surfels = [code + np.uint8(1) > 1 for code in codes]
        sides = []
        for own, other in ((0, 1), (1, 0)):
            places = np.flatnonzero(surfels[own])
            distances = _transform_mm(places, surfels[other], self.spacing_mm)
            sides.append(_by_distance(distances, codes[own].take(places), surface_areas_mm2(self.spacing_mm)))
        return SurfaceDistances(*sides[0], *sides[1], self.spacing_mm, self.masks)


def surface_record(
    reference_zyx: MaskArray, predicted_zyx: MaskArray, spacing_zyx_mm: Sequence[float], boxes: Sequence[islands.Box] | None = None
) -> SurfaceDistances:
    """Surfels of both masks with their distances to the other surface.

    Arrays are 3D, of one shape; the spacing is in the order of the array axes, whichever that is. Masks may touch the
    border (a surface is there) and may be empty. `boxes`: `islands.islands` of the two masks where they are already known.
    InputError for anything else.
    """
    reference, predicted = as_mask(reference_zyx, "the reference"), as_mask(predicted_zyx, "the prediction")
    check_same_shape(reference.shape, predicted.shape)
    spacing_mm = as_spacing(spacing_zyx_mm)
    boxes = islands.islands(reference, predicted) if boxes is None else boxes
    areas_mm2 = surface_areas_mm2(spacing_mm)
    by_area = np.argsort(areas_mm2, kind="stable")
    sides = []
    for side in lattice.surfaces(reference, predicted, spacing_mm, boxes):
        distances, areas = _by_distance(side.mm, side.codes, areas_mm2)
        shared_mm2 = np.repeat(areas_mm2[by_area], side.shared_codes[by_area])
        sides.append((np.concatenate([np.zeros(shared_mm2.size), distances]), np.concatenate([shared_mm2, areas])))
    box = _around(boxes)
    return SurfaceDistances(*sides[0], *sides[1], spacing_mm, (reference[box], predicted[box]))


def nsd(record: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalised surface Dice: the part of both surfaces, by area, that lies within `tolerance_mm` (<=) of the other.

    0 when one mask is empty, nan when both are.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError(f"the tolerance is {tolerance_mm} mm; a finite number from 0 up is needed")
    if _undecided(record, tolerance_mm):
        record = record.settled
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
    share = percent / 100.0
    # equal distances that differ in their last bit may be sorted, and so summed, in another order: the transform has the last word
    if percent < 100 and any(bool((np.abs(reached - share) <= TIE).any()) for reached in record.reached):
        record = record.settled
    sides = zip((record.reference_mm, record.predicted_mm), record.reached, strict=True)
    return max(_percentile_mm(distances, reached, percent) for distances, reached in sides)


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
    return _around(islands.islands(reference, predicted))


@lru_cache(maxsize=256)
def surface_areas_mm2(spacing_mm: tuple[float, float, float]) -> Floats:
    """Area of each of the 256 corner codes at this spacing (array axis order), from the package's table."""
    from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

    table = np.asarray(create_table_neighbour_code_to_surface_area(spacing_mm), dtype=np.float64)
    table.setflags(write=False)
    return table


def _around(boxes: Sequence[islands.Box]) -> islands.Box:
    if not boxes:
        return slice(0, 0), slice(0, 0), slice(0, 0)
    ends = [slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3)]
    return ends[0], ends[1], ends[2]


def _by_distance(distances: Floats, codes: NDArray[np.uint8], areas_mm2: Floats) -> tuple[Floats, Floats]:
    """Distances and areas sorted by distance, then area. Integer keys sort several times faster than pairs of floats."""
    order = np.argsort(distances)
    distances = distances[order]
    by_area = np.argsort(areas_mm2, kind="stable")
    rank = np.empty(256, dtype=np.int64)
    rank[by_area] = np.arange(256)
    steps = np.zeros(distances.size, dtype=np.int64)
    np.cumsum(distances[1:] != distances[:-1], out=steps[1:])
    key = steps * 256 + rank[codes[order]]
    key.sort()
    return distances, areas_mm2[by_area][key & 255]


def _undecided(record: SurfaceDistances, tolerance_mm: float) -> bool:
    """Is a surfel so exactly at the tolerance that the last bit of its distance decides, and can that bit be either?"""
    low, high = tolerance_mm * (1 - TIE), tolerance_mm * (1 + TIE)
    sides = (record.reference_mm, record.predicted_mm)
    if all(np.searchsorted(side, low, side="left") == np.searchsorted(side, high, side="right") for side in sides):
        return False
    return _straddled(record.spacing_mm, tolerance_mm)


@lru_cache(maxsize=1024)
def _straddled(spacing_mm: tuple[float, float, float], tolerance_mm: float) -> bool:
    """Do offsets on this lattice that are equally long, and as long as the tolerance, fall on both sides of it by their last bit?"""
    reach = [int(tolerance_mm * (1 + TIE) / edge) + 1 for edge in spacing_mm]
    if reach[0] * reach[1] > 4_000_000:
        return True  # too many to look at: the transform will know
    first, second = ((np.arange(n + 1) * edge) ** 2 for n, edge in zip(reach[:2], spacing_mm[:2], strict=True))
    rest = np.maximum(tolerance_mm**2 - (first[:, None] + second[None, :]), 0)
    third = (np.rint(np.sqrt(rest) / spacing_mm[2]) * spacing_mm[2]) ** 2
    lengths = np.sqrt(first[:, None] + second[None, :] + third)
    close = lengths[np.abs(lengths - tolerance_mm) <= 2 * TIE * tolerance_mm]
    return bool((close <= tolerance_mm).any() and (close > tolerance_mm).any())


def _transform_mm(places: NDArray[np.intp], targets: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> Floats:
    """Distance from each of `places` (flat indices) to the nearest True of `targets`, by SciPy's distance transform."""
    if not (places.size and targets.any()):
        return np.full(places.size, math.inf)
    from scipy import ndimage

    nearest = ndimage.distance_transform_edt(~targets, sampling=spacing_mm, return_distances=False, return_indices=True)
    total = np.zeros(places.size)
    for axis, index in enumerate(np.unravel_index(places, targets.shape)):
        offset = (nearest[axis].reshape(-1)[places] - index).astype(np.float64)
        offset *= spacing_mm[axis]
        total += offset * offset
    return np.asarray(np.sqrt(total))


def _percentile_mm(distances: Floats, reached: Floats, percent: float) -> float:
    if not distances.size:
        return math.inf
    return float(distances[min(int(np.searchsorted(reached, percent / 100.0)), distances.size - 1)])
