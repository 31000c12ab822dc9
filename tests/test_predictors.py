"""Predictors: the fitted floor against brute force, the ceiling, and somebody else's folder."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import write_labels
from ichbench.errors import InputError
from ichbench.inference.predictors import PREDICTORS, Tools, find_mask, fit_thresholds, predict_folder, predict_threshold
from ichbench.recipe import InferenceRecipe, PrepareRecipe, ThresholdRecipe

GRID = Grid((3, 4, 5), np.array([[0, 0, -0.5, 0], [0, -0.5, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]]))
TOOLS = {"inference": InferenceRecipe(), "prepare": PrepareRecipe()}


def cases(seed: int, n: int = 3) -> list[Case]:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(n):
        labels = (rng.random(GRID.shape_zyx) < 0.3).astype(np.int16)
        image = np.rint(rng.normal(20, 12, GRID.shape_zyx) + 25 * labels).astype(np.float32)
        made.append(Case(f"c{index}", image[None], labels, GRID))
    return made


def mean_dice(some: list[Case], low: float, high: float) -> float:
    values = []
    for case in some:
        assert case.labels_zyx is not None
        predicted = (case.image_czyx[0] >= low) & (case.image_czyx[0] <= high)
        reference = case.labels_zyx > 0
        values.append((2 * (predicted & reference).sum() + 1e-5) / (predicted.sum() + reference.sum() + 1e-5))
    return float(np.mean(values))


@pytest.mark.parametrize("seed", range(4))
def test_fitted_thresholds_are_the_best_pair(seed: int) -> None:
    some = cases(seed)
    low, high = fit_thresholds(some, ThresholdRecipe())
    best = max(mean_dice(some, a - 0.5, b + 0.5) for a, b in itertools.combinations_with_replacement(range(-20, 90), 2))
    assert mean_dice(some, low, high) == pytest.approx(best, abs=1e-12)


def test_a_given_threshold_is_kept_and_nonsense_is_refused() -> None:
    some = cases(0)
    low, high = fit_thresholds(some, ThresholdRecipe(low_hu=30.0))
    assert low == 30.0
    assert high > 30
    with pytest.raises(InputError, match="low must lie below high"):
        fit_thresholds(some, ThresholdRecipe(low_hu=200.0))
    with pytest.raises(InputError, match="there are none"):
        fit_thresholds([Case("x", some[0].image_czyx, None, GRID)], ThresholdRecipe())


def test_the_threshold_predictor_includes_both_ends() -> None:
    image = np.array([29, 30, 45, 60, 61], np.float32).reshape(1, 1, 1, 5)
    grid = Grid((1, 1, 5), GRID.affine_4x4)
    prediction = predict_threshold(Case("x", image, None, grid), Tools(**TOOLS, thresholds_hu=(30.0, 60.0), foreground_label=2))
    assert prediction.labels_zyx is not None
    assert prediction.labels_zyx.ravel().tolist() == [0, 2, 2, 2, 0]


def test_somebody_elses_folder(tmp_path: Path) -> None:
    case = cases(1)[0]
    tools = Tools(**TOOLS, predictions=tmp_path)
    assert predict_folder(case, tools).labels_zyx is None
    assert case.labels_zyx is not None
    write_labels(tmp_path / "c0.nii.gz", case.labels_zyx, GRID)
    found = predict_folder(case, tools).labels_zyx
    np.testing.assert_array_equal(found, case.labels_zyx)
    write_labels(tmp_path / "c0.nii", case.labels_zyx, GRID)
    with pytest.raises(InputError, match="two masks of case c0"):
        find_mask(tmp_path, "c0")
    (tmp_path / "c0.nii").unlink()
    moved = GRID.resized(GRID.shape_zyx, np.ones(3), np.array([0.0, 0.0, 1.0]))
    write_labels(tmp_path / "c0.nii.gz", case.labels_zyx, moved)
    with pytest.raises(InputError, match="does not lie on the grid of case c0"):
        predict_folder(case, tools)


@pytest.mark.parametrize("name", ["unet", "threshold", "roundtrip", "folder"])
def test_a_predictor_without_its_tools_says_what_it_needs(name: str) -> None:
    with pytest.raises(InputError, match=r"needs|for labelled cases"):
        PREDICTORS[name](Case("x", cases(0)[0].image_czyx, None, GRID), Tools(**TOOLS))
