"""Voxel-edge and sub-voxel definitions against MONAI (measured with 1.6.1), and where MONAI differs on purpose or not.

MONAI gives float32, so numbers agree to about 1e-7. torch.quantile also computes the rank in float32: among 10,000 edge
voxels it is off by up to 1e-3 of a step between two distances, so percentiles agree to 2e-4.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from parity_pairs import Pair, random_pairs, real_pairs

from ichbench.scoring import edges, surface

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("monai", reason="the peer MONAI is not installed; the tox environment `parity` has it")
    from monai.metrics import HausdorffDistanceMetric, compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

import torch

# MONAI 1.6 calls its own function with an argument that it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")

EMPTY_WARNING = "is all 0, this may result in nan/inf distance"


def nsd(pair: Pair, tolerance_mm: float, use_subvoxels: bool = False) -> float:
    options = {"include_background": True, "spacing": pair.spacing_mm, "use_subvoxels": use_subvoxels}
    return float(compute_surface_dice(tensor(pair.predicted), tensor(pair.reference), [tolerance_mm], **options))


def hd(pair: Pair, percentile: float | None) -> float:
    options = {"include_background": True, "spacing": pair.spacing_mm, "percentile": percentile}
    return float(compute_hausdorff_distance(tensor(pair.predicted), tensor(pair.reference), **options))


def assd(pair: Pair) -> float:
    options = {"include_background": True, "spacing": pair.spacing_mm, "symmetric": True}
    return float(compute_average_surface_distance(tensor(pair.predicted), tensor(pair.reference), **options))


def tensor(mask: np.ndarray) -> torch.Tensor:
    """Batch and channel in front."""
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]


def sums_of_three(pair: Pair) -> bool:
    """At 0.14 mm, 3 voxels make 0.42000000000000004 mm: see `test_three_voxels_of_a_third_of_the_tolerance`."""
    return 0.14 in pair.spacing_mm


def assert_same(pair: Pair, tolerances_mm: tuple[float, ...]) -> None:
    record = edges.edge_record(pair.reference, pair.predicted, pair.spacing_mm)
    surfels = surface.surface_record(pair.reference, pair.predicted, pair.spacing_mm)
    for tolerance_mm in tolerances_mm:
        assert nsd(pair, tolerance_mm) == pytest.approx(edges.nsd_voxels(record, tolerance_mm), rel=1e-6), (pair.name, tolerance_mm)
        if not (sums_of_three(pair) and tolerance_mm == 0.42):
            official = surface.nsd(surfels, tolerance_mm)
            assert nsd(pair, tolerance_mm, use_subvoxels=True) == pytest.approx(official, rel=2e-6), (pair.name, tolerance_mm)
    assert hd(pair, None) == pytest.approx(edges.hd_directional(record, 100), rel=1e-6), pair.name
    assert hd(pair, 95) == pytest.approx(edges.hd_directional(record, 95), rel=2e-4), pair.name
    assert assd(pair) == pytest.approx(edges.assd_pooled(record), rel=1e-6), pair.name


def test_random_masks() -> None:
    for pair in random_pairs():
        assert_same(pair, (0.42, 2.0))


def test_other_percentiles() -> None:
    for pair in random_pairs()[::5]:
        record = edges.edge_record(pair.reference, pair.predicted, pair.spacing_mm)
        for percent in (25, 50, 90, 99.5, 100):
            assert hd(pair, percent) == pytest.approx(edges.hd_directional(record, percent), rel=2e-4), (pair.name, percent)


def test_real_masks(shared_data: Path) -> None:
    for pair in real_pairs(shared_data):
        assert_same(pair, (0.42,))


# --- where MONAI differs ---------------------------------------------------------------------------------------------------------


def test_three_voxels_of_a_third_of_the_tolerance() -> None:
    """0.42000000000000004 <= 0.42 holds in float32 (MONAI), not in float64 (DeepMind, the official script): 11 points of NSD.

    Our voxel edges decide as MONAI does, our surfels as the official script does.
    """
    pair = next(pair for pair in random_pairs() if pair.name.startswith("ball2@") and sums_of_three(pair))
    assert nsd(pair, 0.42, use_subvoxels=True) == 1.0
    official = surface.nsd(surface.surface_record(pair.reference, pair.predicted, pair.spacing_mm), 0.42)
    assert official == pytest.approx(0.88612, abs=5e-6)
    assert edges.nsd_voxels(edges.edge_record(pair.reference, pair.predicted, pair.spacing_mm), 0.42) == nsd(pair, 0.42) == 1.0


def test_spacings_that_float32_takes_for_the_tolerance() -> None:
    """0.4200000005 mm is 0.42 mm for MONAI and our voxel edges; the official surfels tell them apart."""
    mask = np.zeros((1, 5, 20), dtype=bool)
    mask[0, 1:4, 5:9] = True
    pair = Pair("", mask, np.roll(mask, 1, axis=2), (5.0, 5.0, 0.4200000005))
    assert nsd(pair, 0.42) == nsd(pair, 0.42, use_subvoxels=True) == 1.0
    assert edges.nsd_voxels(edges.edge_record(*pair[1:]), 0.42) == 1.0
    assert surface.nsd(surface.surface_record(*pair[1:]), 0.42) < 1.0


def one_empty(turn: bool) -> Pair:
    full, empty = random_pairs()[0].reference, np.zeros_like(random_pairs()[0].reference)
    return Pair("", empty, full, (5.0, 0.45, 0.45)) if turn else Pair("", full, empty, (5.0, 0.45, 0.45))


@pytest.mark.filterwarnings(f"ignore:.*{EMPTY_WARNING}:UserWarning")
@pytest.mark.parametrize("turn", [False, True])
def test_one_empty_mask(turn: bool) -> None:
    """The maximum is inf, but a percentile of inf is nan in MONAI (its issue 9095); ours is inf both times."""
    pair = one_empty(turn)
    record = edges.edge_record(*pair[1:])
    with pytest.warns(UserWarning, match=EMPTY_WARNING):
        assert nsd(pair, 0.42) == edges.nsd_voxels(record, 0.42) == 0.0
    assert nsd(pair, 0.42, use_subvoxels=True) == surface.nsd(surface.surface_record(*pair[1:]), 0.42) == 0.0
    assert hd(pair, None) == edges.hd_directional(record, 100) == math.inf
    assert assd(pair) == edges.assd_pooled(record) == math.inf
    assert math.isnan(hd(pair, 95))
    assert math.isnan(hd(pair, 100))
    assert edges.hd_directional(record, 95) == math.inf


@pytest.mark.filterwarnings(f"ignore:.*{EMPTY_WARNING}:UserWarning")
def test_a_missed_case_vanishes_from_monais_mean() -> None:
    """Because of that nan, a hit and a miss average to the hit; and nothing but misses averages to 0, a perfect distance."""
    miss, hit = one_empty(False), random_pairs()[0]
    metric = HausdorffDistanceMetric(include_background=True, percentile=95)
    for pair in (hit, miss):
        metric(tensor(pair.predicted), tensor(pair.reference), spacing=hit.spacing_mm)
    alone = hd(hit, 95)
    assert float(metric.aggregate()) == pytest.approx(alone, rel=1e-6)
    metric.reset()
    metric(tensor(miss.predicted), tensor(miss.reference), spacing=hit.spacing_mm)
    assert float(metric.aggregate()) == 0.0


@pytest.mark.filterwarnings(f"ignore:.*{EMPTY_WARNING}:UserWarning")
def test_two_empty_masks() -> None:
    """nan everywhere, as ours."""
    empty = np.zeros((3, 4, 5), dtype=bool)
    pair = Pair("", empty, empty, (1.0, 1.0, 1.0))
    record = edges.edge_record(*pair[1:])
    theirs = [nsd(pair, 0.42), nsd(pair, 0.42, use_subvoxels=True), hd(pair, None), hd(pair, 95), assd(pair)]
    ours = [edges.nsd_voxels(record, 0.42), edges.hd_directional(record, 95), edges.assd_pooled(record)]
    assert all(math.isnan(value) for value in theirs + ours)


def test_percentile_0_is_the_maximum() -> None:
    """`if not percentile` in MONAI; ours is the smallest distance."""
    pair = random_pairs()[0]
    assert hd(pair, 0) == hd(pair, None) > 0
    assert edges.hd_directional(edges.edge_record(*pair[1:]), 0) == 0.0
