"""The pooled definitions against MedPy (measured with 0.5.2), and all of them against plain SciPy as the tools write it.

The SciPy half needs no peer: it follows the steps of MedPy, panoptica, GaNDLF and Metrics Reloaded on the whole array.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from parity_pairs import Pair, random_pairs, real_pairs
from scipy import ndimage

from ichbench.scoring import edges


@pytest.fixture(scope="module")
def medpy() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("medpy.metric.binary", reason="the peer MedPy is not installed; the tox environment `parity` has it")


def assert_as_medpy(medpy: ModuleType, pair: Pair) -> None:
    record = edges.edge_record(pair.reference, pair.predicted, pair.spacing_mm)
    masks = (pair.predicted, pair.reference, pair.spacing_mm)
    assert edges.hd_pooled(record, 100) == pytest.approx(medpy.hd(*masks), rel=1e-12), pair.name
    assert edges.hd_pooled(record, 95) == pytest.approx(medpy.hd95(*masks), rel=1e-12), pair.name
    assert edges.assd_pooled(record) == pytest.approx(medpy.assd(*masks), rel=1e-12), pair.name
    means = [medpy.asd(*masks), medpy.asd(pair.reference, pair.predicted, pair.spacing_mm)]
    assert edges.assd_directional(record) == pytest.approx(sum(means) / 2, rel=1e-12), pair.name  # what assd was up to 0.4


def test_medpy_on_random_masks(medpy: ModuleType) -> None:
    for pair in random_pairs():
        assert_as_medpy(medpy, pair)


def test_medpy_on_real_masks(medpy: ModuleType, shared_data: Path) -> None:
    for pair in real_pairs(shared_data)[::3]:
        assert_as_medpy(medpy, boxed(pair))


def test_medpy_raises_on_an_empty_mask(medpy: ModuleType) -> None:
    """Ours is inf; a folder with one miss stops MedPy."""
    full = random_pairs()[0].reference
    with pytest.raises(RuntimeError, match="does not contain any binary object"):
        medpy.hd95(np.zeros_like(full), full, (5.0, 0.45, 0.45))
    assert edges.hd_pooled(edges.edge_record(full, np.zeros_like(full), (5.0, 0.45, 0.45)), 95) == np.inf


def boxed(pair: Pair) -> Pair:
    """Cropped to what is foreground in either: these tools transform the whole array, which takes seconds and changes nothing."""
    box = ndimage.find_objects((pair.reference | pair.predicted).astype(np.uint8))[0]
    return pair._replace(reference=pair.reference[box], predicted=pair.predicted[box])


def by_scipy(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Distances of the reference's edge and of the prediction's, from transforms of the whole array."""
    outlines = [mask ^ ndimage.binary_erosion(mask) for mask in (pair.reference, pair.predicted)]
    maps = [ndimage.distance_transform_edt(~outline, sampling=pair.spacing_mm) for outline in outlines]
    return maps[1][outlines[0]], maps[0][outlines[1]]


def assert_as_scipy(pair: Pair) -> None:
    there, back = by_scipy(pair)
    record = edges.edge_record(pair.reference, pair.predicted, pair.spacing_mm)
    for percent in (50, 95, 100):
        directional = max(np.percentile(there, percent), np.percentile(back, percent))
        assert edges.hd_directional(record, percent) == pytest.approx(directional, rel=1e-12, abs=1e-12), pair.name
        pooled = np.percentile(np.hstack([there, back]), percent)
        assert edges.hd_pooled(record, percent) == pytest.approx(pooled, rel=1e-12, abs=1e-12), pair.name
    assert edges.assd_directional(record) == pytest.approx((there.mean() + back.mean()) / 2, rel=1e-12, abs=1e-12), pair.name
    for tau in (0.0, 0.42, 1.0, 2.0):
        if 0.14 in pair.spacing_mm and tau == 0.42:
            continue  # three voxels are 0.42000000000000004 mm, which these tools call farther: the next test
        near = [side <= tau for side in (there, back)]
        count = np.count_nonzero(near[0]) + np.count_nonzero(near[1])
        assert edges.nsd_voxels(record, tau) == count / (there.size + back.size), (pair.name, tau)  # Metrics Reloaded
        hits, misses = sum(n.mean() for n in near), sum((~n).mean() for n in near)
        fractions = hits / (hits + misses + sys.float_info.min)  # panoptica, GaNDLF
        assert edges.nsd_fractions(record, tau) == pytest.approx(fractions, rel=1e-12), (pair.name, tau)


def test_scipy_on_random_masks() -> None:
    for pair in random_pairs():
        assert_as_scipy(pair)


def test_scipy_on_real_masks(shared_data: Path) -> None:
    for pair in real_pairs(shared_data)[1::3]:
        assert_as_scipy(boxed(pair))


def test_float64_tools_call_three_voxels_of_0_14_mm_too_far() -> None:
    """In panoptica, GaNDLF and Metrics Reloaded a shift by 3 * 0.14 mm fails a tolerance of 0.42 mm; in MONAI and here it does not."""
    pair = next(p for p in random_pairs() if p.name.startswith("ball2@") and 0.14 in p.spacing_mm)
    there, back = by_scipy(pair)
    record = edges.edge_record(pair.reference, pair.predicted, pair.spacing_mm)
    assert there.max() == back.max() == 3 * 0.14 > 0.42
    assert edges.nsd_voxels(record, 0.42) == edges.nsd_fractions(record, 0.42) == 1.0
    assert edges.nsd_voxels(record, 0.41) == (np.count_nonzero(there <= 0.42) + np.count_nonzero(back <= 0.42)) / (there.size + back.size)
