"""The official definition against DeepMind's `surface-distance` 0.1, which the INSTANCE 2022 scorer copies: equal to 1e-12."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity_pairs import Pair, random_pairs, real_pairs

from ichbench.scoring import overlap, score_masks, surface

surface_distance = pytest.importorskip("surface_distance", reason="the peer `surface-distance` is not installed")

# 0.1 still asks for scipy.ndimage.filters and .morphology, which SciPy 2 removes
pytestmark = pytest.mark.filterwarnings("ignore:Please import `.*` from the `scipy.ndimage` namespace:DeprecationWarning")

TOLERANCES_MM = (0.0, 0.14, 0.42, 0.45, 1.0, 2.0, 3.0, 5.0)
PERCENTS = (0.0, 10.0, 50.0, 95.0, 99.9, 100.0)


def by_package(pair: Pair) -> dict[str, float]:
    found = surface_distance.compute_surface_distances(pair.reference, pair.predicted, pair.spacing_mm)
    values = {f"nsd@{tau}": surface_distance.compute_surface_dice_at_tolerance(found, tau) for tau in TOLERANCES_MM}
    values |= {f"hd@{percent}": surface_distance.compute_robust_hausdorff(found, percent) for percent in PERCENTS}
    distances = [found["distances_gt_to_pred"], found["distances_pred_to_gt"]]
    areas = [found["surfel_areas_gt"], found["surfel_areas_pred"]]
    values["assd"] = float(np.average(np.concatenate(distances), weights=np.concatenate(areas)))
    values["dice"] = surface_distance.compute_dice_coefficient(pair.reference, pair.predicted)
    return values


def by_us(pair: Pair) -> dict[str, float]:
    record = surface.surface_record(pair.reference, pair.predicted, pair.spacing_mm)
    values = {f"nsd@{tau}": surface.nsd(record, tau) for tau in TOLERANCES_MM}
    values |= {f"hd@{percent}": surface.hausdorff(record, percent) for percent in PERCENTS}
    return values | {"assd": surface.assd(record), "dice": overlap.dice(overlap.count(pair.reference, pair.predicted))}


def assert_equal(pair: Pair) -> None:
    expected = by_package(pair)
    assert by_us(pair) == pytest.approx(expected, rel=1e-12, abs=0), pair.name
    scored = score_masks(pair.reference, pair.predicted, pair.spacing_mm, "instance2022")
    assert [scored["nsd"], scored["hd"], scored["hd95"]] == pytest.approx(
        [expected["nsd@0.42"], expected["hd@100.0"], expected["hd@95.0"]], rel=1e-12, abs=0
    )


def test_random_masks() -> None:
    for pair in random_pairs():
        assert_equal(pair)


def test_real_masks(shared_data: Path) -> None:
    for pair in real_pairs(shared_data):
        assert_equal(pair)


def test_two_means_of_the_package() -> None:
    """`assd/surfels_directional` of the definition matrix is the mean of the package's two averages."""
    from ichbench.scoring.definitions import pair_definitions

    for pair in random_pairs()[::7]:
        found = surface_distance.compute_surface_distances(pair.reference, pair.predicted, pair.spacing_mm)
        means = surface_distance.compute_average_surface_distance(found)
        value = pair_definitions(pair.reference, pair.predicted, pair.spacing_mm, ("assd",))["assd", "surfels_directional"]
        assert value == pytest.approx(sum(means) / 2, rel=1e-12)
