"""Pairs of masks that every peer is compared on: random ones on many grids, and the real ones beside the checkout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

#: z, y, x in mm: thick slices, the knife edges of 0.42 mm, isotropic, and odd ones
SPACINGS = [
    (5.0, 0.45, 0.45),
    (5.0, 0.42, 0.42),
    (5.0, 0.21, 0.21),
    (2.5, 0.14, 0.14),
    (1.0, 1.0, 1.0),
    (4.97, 0.43, 0.488),
    (0.5, 3.0, 1.25),
]


class Pair(NamedTuple):
    name: str
    reference: np.ndarray
    predicted: np.ndarray
    spacing_mm: tuple[float, float, float]


@lru_cache(maxsize=1)
def random_pairs() -> tuple[Pair, ...]:
    """Blobs with specks, touching every border; nested, shifted, one slice, one voxel, and a speck far away."""
    pairs = []
    for seed in range(21):
        rng = np.random.default_rng(seed)
        spacing = SPACINGS[seed % len(SPACINGS)] if seed < 14 else tuple(float(edge) for edge in rng.uniform(0.2, 6, size=3))
        shape = tuple(int(n) for n in rng.integers(3, 30, size=3))
        smooth = [ndimage.gaussian_filter(rng.random(shape), 1.5, mode="wrap") for _ in range(2)]
        first = (smooth[0] > np.quantile(smooth[0], 0.7)) | (rng.random(shape) < 0.01)
        mixed = smooth[0] + seed % 3 * smooth[1]
        second = (mixed > np.quantile(mixed, 0.65)) | (rng.random(shape) < 0.01)
        pairs.append(Pair(f"blobs{seed}", first, second, spacing))
    z, y, x = np.ogrid[:10, :60, :60]
    ball = ((z - 4.5) / 3.5) ** 2 + ((y - 28) / 15.0) ** 2 + ((x - 30) / 12.0) ** 2 <= 1
    speck = np.zeros_like(ball)
    speck[9, 59, 0] = True
    full = np.ones_like(ball)
    for spacing in SPACINGS:
        shifts = [np.roll(ball, (dz, 0, dx), axis=(0, 1, 2)) for dz, dx in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 2))]
        for number, other in enumerate([*shifts, ball | speck, full, speck, ball]):
            pairs.append(Pair(f"ball{number}@{spacing}", ball, other, spacing))
        pairs.append(Pair(f"slice@{spacing}", ball[4:5], shifts[1][4:5], spacing))
        pairs.append(Pair(f"voxels@{spacing}", speck, np.roll(speck, (1, 2, 3), axis=(0, 1, 2)), spacing))
    for name, radii_mm in (("large", (22, 20, 25)), ("medium", (9, 8, 10)), ("small", (4, 3, 3))):
        moved = ellipsoid([radius * factor for radius, factor in zip(radii_mm, (1.0, 1.05, 0.95), strict=True)], (10, 81, 82))
        pairs.append(Pair(name, ellipsoid(radii_mm, (10, 80, 80)), moved, (5.0, 0.45, 0.45)))
    return tuple(pairs)


def ellipsoid(radii_mm: Sequence[float], centre: Sequence[int]) -> np.ndarray:
    """On 20 x 160 x 160 voxels of 5 x 0.45 x 0.45 mm; with the radii of facts, C4, whose second ellipsoids are not recorded."""
    terms = zip(np.ogrid[:20, :160, :160], centre, (5.0, 0.45, 0.45), radii_mm, strict=True)
    return np.asarray(sum(((axis - c) * edge / radius) ** 2 for axis, c, edge, radius in terms) <= 1)


@lru_cache(maxsize=1)
def real_pairs(folder: Path) -> tuple[Pair, ...]:
    """Spine labels, glioma maps and threshold blood against the edema around it; only pairs with foreground in both."""
    from ichbench.cases.images import read_labels

    files: list[tuple[Path, Path]] = []
    spine = folder / "panoptica_spine"
    files += [(spine / kind / "ref.nii.gz", spine / kind / "pred.nii.gz") for kind in ("semantic", "matched_instance")]
    for case in sorted((folder / "brats_toolkit").iterdir()):
        files += [(case / "fusion" / "simple.nii.gz", path) for path in sorted(case.glob("segmentation/*.nii.gz"))[:1]]
    for path in sorted((folder / "phe_derived_hematoma").glob("*.nii.gz")):
        files += [(label, path) for label in (folder / "Dataset501_PHE").glob(f"labels*/{path.name}")]
    pairs = []
    for reference, predicted in files:
        (own, grid), (other, _) = read_labels(reference), read_labels(predicted)
        name = "/".join(predicted.parts[-3:])
        pairs.append(Pair(name, own != 0, other != 0, grid.spacing_zyx_mm))
        if "matched" in name:  # the first few instances as well: small, and close together
            labels = [int(label) for label in np.unique(own[own != 0])[:3]]
            pairs += [Pair(f"{name}/{label}", own == label, other == label, grid.spacing_zyx_mm) for label in labels]
    found = tuple(pair for pair in pairs if pair.reference.any() and pair.predicted.any())
    assert len(found) >= 16, "the shared data hold more pairs than that"
    return found
