"""Distances between the edge voxels of two masks: what most tools mean by surface distance, under its own names.

The official numbers of INSTANCE come from surface.py (surfels, weighted by area). Other tools peel a mask instead: an
*edge voxel* is a foreground voxel with at least one of its 6 face neighbours in the background; beyond the array all is
background, so a mask at the border has its edge there. That is `mask ^ binary_erosion(mask)` of SciPy with its
defaults, found in MONAI 1.6 (`get_mask_edges`, which also crops, with no effect), MedPy 0.5 (connectivity 1),
panoptica 2.1, GaNDLF and Metrics Reloaded (`border_map`). Each edge voxel counts once, whatever its area: at slices of
5 mm a voxel of a side wall (0.45 x 5 mm) weighs as much as one of a top face (0.45 x 0.45 mm). Distances run from voxel
centre to voxel centre. The tools differ in what they make of the two lists of distances, hence the names below.

Ties. Distances are built from integer offsets and compared with a tolerance in float32, as MONAI does: 3 voxels of
0.14 mm (0.42000000000000004 in float64) are 0.42 mm here, wherever they lie and however the axes are ordered. Tools that
compare in float64 call that farther than 0.42 mm; so does the official script on its surfels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring.overlap import MaskArray, as_mask, as_spacing, check_same_shape
from ichbench.scoring.surface import joint_box

Floats = NDArray[np.float64]

#: The k-d tree is taken when the box has more voxels than this for each point that asks. Measured: a distance transform
#: costs 60 to 100 ns a voxel of the box, a query about 1.2 us.
BOX_VOXELS_PER_POINT = 16


@dataclass(frozen=True, eq=False)
class EdgeRecord:
    """Both directions of one pair of masks, each sorted; an empty mask has no edge voxels.

    reference_mm   distance of each edge voxel of the reference to the nearest one of the prediction (inf where there is none)
    predicted_mm   the same from the prediction to the reference
    """

    reference_mm: Floats
    predicted_mm: Floats


def edge_record(reference_zyx: MaskArray, predicted_zyx: MaskArray, spacing_zyx_mm: Sequence[float]) -> EdgeRecord:
    """Edge voxels of both masks with their distances to the edge of the other.

    Arrays are 3D, of one shape; the spacing is in the order of the array axes, whichever that is. Masks may touch the
    border and may be empty. InputError for anything else.
    """
    reference, predicted, spacing_mm = _pair(reference_zyx, predicted_zyx, spacing_zyx_mm)
    box = joint_box(reference, predicted)
    edges = [edge_voxels(np.ascontiguousarray(mask[box])) for mask in (reference, predicted)]
    sides = [np.sort(_nearest_mm(np.flatnonzero(edges[own]), edges[other], spacing_mm)) for own, other in ((0, 1), (1, 0))]
    return EdgeRecord(*sides)


def edge_voxels(mask: MaskArray) -> MaskArray:
    """Foreground voxels with a face neighbour in the background; outside of the array is background."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        line, kept = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        kept[1:] &= line[:-1]
        kept[:-1] &= line[1:]
        kept[:1] = kept[-1:] = False
    return np.asarray(mask & ~inside)


def hd_directional(record: EdgeRecord, percent: float) -> float:
    """Hausdorff distance in mm: the larger of the two directions' percentiles, each interpolated linearly; 100 is the maximum.

    MONAI (`compute_hausdorff_distance(percentile=...)`, where 0 means the maximum) and Metrics Reloaded.
    inf when one mask is empty (MONAI: inf for the maximum, nan for a percentile), nan when both are.
    """
    _check_percent(percent)
    declared = _empty(record, math.inf)
    if declared is not None:
        return declared
    return float(max(np.percentile(side, percent) for side in (record.reference_mm, record.predicted_mm)))


def hd_pooled(record: EdgeRecord, percent: float) -> float:
    """Hausdorff distance in mm: one percentile over both directions together, interpolated linearly; 100 is the maximum.

    MedPy (`hd95`), panoptica, GaNDLF, seg-metrics. The edge of a large mask outvotes that of a small one, so a small
    false positive far away moves it less. inf when one mask is empty (MedPy raises), nan when both are.
    """
    _check_percent(percent)
    declared = _empty(record, math.inf)
    if declared is not None:
        return declared
    return float(np.percentile(np.concatenate([record.reference_mm, record.predicted_mm]), percent))


def nsd_voxels(record: EdgeRecord, tolerance_mm: float) -> float:
    """Normalised surface Dice by counting: edge voxels of both masks within `tolerance_mm` (<=), of all edge voxels.

    MONAI (`compute_surface_dice` by default) and Metrics Reloaded. 0 when one mask is empty, nan when both are.
    """
    near = _near(record, tolerance_mm)
    declared = _empty(record, 0.0)
    if declared is not None:
        return declared
    return (near[0] + near[1]) / (record.reference_mm.size + record.predicted_mm.size)


def nsd_fractions(record: EdgeRecord, tolerance_mm: float) -> float:
    """Normalised surface Dice as the mean of the two masks' fractions of edge voxels within `tolerance_mm` (<=).

    GaNDLF and panoptica, whose source warns that it is not the official surface Dice: a small prediction weighs as much
    as a large reference. 0 when one mask is empty, nan when both are.
    """
    near = _near(record, tolerance_mm)
    declared = _empty(record, 0.0)
    if declared is not None:
        return declared
    return (near[0] / record.reference_mm.size + near[1] / record.predicted_mm.size) / 2.0


def assd_pooled(record: EdgeRecord) -> float:
    """Average symmetric surface distance in mm: the mean over the edge voxels of both masks together.

    MedPy from 0.5, MONAI (`compute_average_surface_distance(symmetric=True)`), Metrics Reloaded (ASSD).
    inf when one mask is empty, nan when both are.
    """
    declared = _empty(record, math.inf)
    if declared is not None:
        return declared
    total_mm = np.sum(record.reference_mm) + np.sum(record.predicted_mm)
    return float(total_mm / (record.reference_mm.size + record.predicted_mm.size))


def assd_directional(record: EdgeRecord) -> float:
    """Average symmetric surface distance in mm: the mean of the two directions' means.

    panoptica, MedPy up to 0.4, and MASD of Metrics Reloaded. inf when one mask is empty, nan when both are.
    """
    declared = _empty(record, math.inf)
    if declared is not None:
        return declared
    return float((np.mean(record.reference_mm) + np.mean(record.predicted_mm)) / 2.0)


def boundary_iou(reference_zyx: MaskArray, predicted_zyx: MaskArray, spacing_zyx_mm: Sequence[float], distance_mm: float) -> float:
    """Jaccard index of the inner rims of two masks: the voxels of each whose nearest background lies within `distance_mm`.

    After B. Cheng et al., "Boundary IoU", CVPR 2021 (arXiv 2103.16562): overlap of the rims alone, so that the core of a
    large lesion cannot make up for a bad outline.
    Distance runs from voxel centre to voxel centre, in mm along each axis, and beyond the array all is background. Less
    than the smallest voxel edge would leave no rim and is taken as that edge. As wide as the mask, it is plain IoU.

    How it differs from the original, which is 2D and counts pixels: there `distance` is 2 % of the image diagonal (at
    least one pixel; 14 pixels or 6.5 mm at 512 x 512 and 0.45 mm), measured by repeated 3 x 3 erosion and so as a square
    (a diagonal step is 1 pixel). In mm at 5 mm slices, the top and bottom faces belong to the rim only from 5 mm on.

    0 when one mask is empty, nan when both are. InputError unless `distance_mm` is finite and from 0 up.
    """
    if not (math.isfinite(distance_mm) and distance_mm >= 0):
        raise InputError(f"the distance is {distance_mm} mm; a finite number from 0 up is needed")
    reference, predicted, spacing_mm = _pair(reference_zyx, predicted_zyx, spacing_zyx_mm)
    box = joint_box(reference, predicted)
    reach_mm = max(float(distance_mm), min(spacing_mm))
    own, other = (_rim(mask[box], spacing_mm, reach_mm) for mask in (reference, predicted))
    either = int(np.count_nonzero(own | other))
    return int(np.count_nonzero(own & other)) / either if either else math.nan


def _rim(mask: MaskArray, spacing_mm: tuple[float, float, float], reach_mm: float) -> MaskArray:
    """Voxels of `mask` at most `reach_mm` from the background."""
    wide = np.pad(np.ascontiguousarray(mask), 1)
    # the nearest background voxel always has a face neighbour in the mask, so only those need to be looked at
    grown = wide.copy()
    for axis in range(3):
        line, more = np.moveaxis(wide, axis, 0), np.moveaxis(grown, axis, 0)
        more[1:] |= line[:-1]
        more[:-1] |= line[1:]
    places = np.flatnonzero(wide)
    near = _within(_nearest_mm(places, grown & ~wide, spacing_mm, reach_mm), reach_mm)
    rim = np.zeros(wide.shape, dtype=np.bool_)
    rim.reshape(-1)[places[near]] = True
    return rim


def _nearest_mm(places: NDArray[np.intp], targets: MaskArray, spacing_mm: tuple[float, float, float], reach_mm: float = math.inf) -> Floats:
    """Distance from each of `places` (flat indices into `targets`) to the nearest True of `targets`.

    inf without one. Beyond `reach_mm` the answer may be inf as well, which spares the search.
    """
    distances = np.zeros(places.size)
    away = np.flatnonzero(~targets.reshape(-1)[places])
    ends = np.flatnonzero(targets)
    if not ends.size:
        distances[away] = math.inf
    if not (away.size and ends.size):
        return distances
    starts = places[away]
    if targets.size > BOX_VOXELS_PER_POINT * starts.size:
        nearest = _by_tree(starts, ends, targets.shape, spacing_mm, reach_mm)
    else:
        nearest = _by_transform(starts, targets, spacing_mm)
    total = np.zeros(starts.size)
    found = nearest >= 0
    for axis, (start, end) in enumerate(zip(*(np.unravel_index(i, targets.shape) for i in (starts, nearest.clip(0))), strict=True)):
        offset = (end - start).astype(np.float64) * spacing_mm[axis]
        total += offset * offset
    distances[away] = np.where(found, np.sqrt(total), math.inf)
    return distances


def _by_tree(
    starts: NDArray[np.intp], ends: NDArray[np.intp], shape: tuple[int, ...], spacing_mm: tuple[float, float, float], reach_mm: float
) -> NDArray[np.intp]:
    """Flat index of the nearest of `ends` for each of `starts`, -1 beyond the reach."""
    from scipy.spatial import cKDTree

    at_mm = [np.stack(np.unravel_index(index, shape), axis=1) * np.asarray(spacing_mm) for index in (starts, ends)]
    # a lattice has many equal coordinates: the balanced tree splits them badly, and boxes need no tightening
    tree = cKDTree(at_mm[1], leafsize=32, balanced_tree=False, compact_nodes=False)
    # a little farther than asked for: coordinates are rounded, and the caller decides on exact offsets
    index = np.asarray(tree.query(at_mm[0], distance_upper_bound=reach_mm * (1 + 1e-6))[1])
    return np.asarray(np.where(index < ends.size, ends[np.minimum(index, ends.size - 1)], -1))


def _by_transform(starts: NDArray[np.intp], targets: MaskArray, spacing_mm: tuple[float, float, float]) -> NDArray[np.intp]:
    from scipy import ndimage

    index = ndimage.distance_transform_edt(~targets, sampling=spacing_mm, return_distances=False, return_indices=True)
    return np.asarray(np.ravel_multi_index(tuple(axis.reshape(-1)[starts] for axis in index), targets.shape))


def _within(distances_mm: Floats, tolerance_mm: float) -> MaskArray:
    """Both sides in float32, which forgets the last bits of float64. The largest float32 stands for all above: inf is never within."""
    limit = np.float32(min(tolerance_mm, float(np.finfo(np.float32).max)))
    return np.asarray(distances_mm.astype(np.float32) <= limit)


def _near(record: EdgeRecord, tolerance_mm: float) -> tuple[int, int]:
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError(f"the tolerance is {tolerance_mm} mm; a finite number from 0 up is needed")
    sides = (record.reference_mm, record.predicted_mm)
    near = [int(np.count_nonzero(_within(side, tolerance_mm))) for side in sides]
    return near[0], near[1]


def _empty(record: EdgeRecord, one_empty: float) -> float | None:
    """The value for an empty mask, None where the formula holds."""
    if record.reference_mm.size and record.predicted_mm.size:
        return None
    return one_empty if record.reference_mm.size or record.predicted_mm.size else math.nan


def _check_percent(percent: float) -> None:
    if not 0 <= percent <= 100:
        raise InputError(f"the percentile is {percent}; a number from 0 to 100 is needed")


def _pair(
    reference_zyx: MaskArray, predicted_zyx: MaskArray, spacing_zyx_mm: Sequence[float]
) -> tuple[MaskArray, MaskArray, tuple[float, float, float]]:
    reference, predicted = as_mask(reference_zyx, "the reference"), as_mask(predicted_zyx, "the prediction")
    check_same_shape(reference.shape, predicted.shape)
    return reference, predicted, as_spacing(spacing_zyx_mm)
