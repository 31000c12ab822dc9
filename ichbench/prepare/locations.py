"""Where the classes are: positions of some of each class's voxels, from which training patches are centred (nnU-Net's draw)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

#: a label, or the labels of a region
Location = int | tuple[int, ...]

#: nnU-Net keeps this many locations of a class, or this share of its voxels if that is more
LOCATIONS, LOCATIONS_SHARE, LOCATIONS_SEED = 10_000, 0.01, 1234
#: what lies outside the nonzero mask
OUTSIDE = -1


def location_classes(labels: Iterable[int], ignore_label: int | None = None, regions: Sequence[Location] = ()) -> tuple[Location, ...]:
    """The classes whose voxels are drawn: every label above 0, or the regions where there are any, in their declared order.

    labels        all label values that a region or class may hold, background included, ignore not
    ignore_label  where there is one, "any annotated voxel" is drawn as well: the labels, background and -1 together
    """
    values = sorted({int(label) for label in labels if label != ignore_label})
    classes: list[Location] = list(regions) or [value for value in values if value != 0]
    if ignore_label is not None:
        classes.append((OUTSIDE, *values))
    return tuple(classes)


def foreground_locations(labels_zyx: NDArray[np.integer], classes: Sequence[Location] | None = None) -> dict[Location, NDArray[np.int32]]:
    """Positions (n, 3) of each class: at most 10,000 voxels of it, or 1 % of them if that is more; none of an absent class.

    classes  what to look for, see `location_classes`; by default the labels above 0 that are there

    The draw is nnU-Net's own: one legacy generator for all classes of a case, which an absent class leaves alone, and a
    region's voxels in the order of its labels.
    """
    flat = np.ascontiguousarray(labels_zyx).reshape(-1)
    if classes is None:
        classes = _present(flat)
    generator = np.random.RandomState(LOCATIONS_SEED)
    voxels = _voxels(flat, {label for one in classes for label in _labels_of(one)})
    locations: dict[Location, NDArray[np.int32]] = {}
    for one in classes:
        parts = [voxels[label] for label in _labels_of(one)]
        total = sum(len(part) for part in parts)
        wanted = max(min(LOCATIONS, total), int(np.ceil(total * LOCATIONS_SHARE)))
        chosen = generator.choice(total, wanted, replace=False) if total else np.empty(0, dtype=np.intp)
        places = parts[0][chosen] if len(parts) == 1 else np.concatenate(parts)[chosen]
        locations[one] = np.stack(np.unravel_index(places, labels_zyx.shape), axis=1).astype(np.int32)
    return locations


def _present(flat: NDArray[np.integer]) -> tuple[int, ...]:
    found = np.flatnonzero(np.bincount(flat[flat > 0])) if flat.any() else ()
    return tuple(int(label) for label in found)


def _voxels(flat: NDArray[np.integer], labels: set[int]) -> Mapping[int, NDArray[np.intp]]:
    """Flat indices of each label's voxels, ascending; background is usually most of a volume and looked up only when asked for."""
    foreground = np.flatnonzero(flat)
    values = flat[foreground]
    return {label: np.flatnonzero(flat == 0) if label == 0 else foreground[values == label] for label in labels}


def _labels_of(one: Location) -> tuple[int, ...]:
    return one if isinstance(one, tuple) else (one,)
