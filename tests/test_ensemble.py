"""Folds by logits, models by probabilities, the way back for labels and regions, the first stage's labels as channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ichbench.cases.case import Case, Grid
from ichbench.cases.labels import plain_rules, read_rules
from ichbench.errors import CaseError, InputError
from ichbench.inference.cascade import one_hot, with_previous
from ichbench.inference.ensemble import fold_logits, mean_probabilities, native_labels, native_probabilities
from ichbench.inference.predictors import Tools, predict_ensemble, predict_probabilities, predict_unet
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.pipeline import Prepared, prepare_case
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import InferenceRecipe, PlanRecipe, PrepareRecipe

PLAIN = InferenceRecipe(mirror=False)
HALF = InferenceRecipe(mirror=False, compatibility="nnunet")
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2], "core": 2}


def make_case(shape: tuple[int, int, int] = (12, 20, 16), spacing: tuple[float, float, float] = (2.0, 1.0, 1.0)) -> Case:
    rng = np.random.default_rng(1)
    image = rng.normal(50, 10, (1, *shape)).astype(np.float32)
    image[:, :, :3] = 0
    labels = (image[0] > 55).astype(np.int16) + (image[0] > 62)
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = [*spacing, 1]
    return Case("c", image, labels.astype(np.int16), Grid(shape, affine))


@pytest.fixture(scope="module")
def prepared() -> tuple[Case, Plan, Prepared]:
    case = make_case()
    recipe = PlanRecipe(patch_size=(8, 16, 16), spacing_mm=(2.5, 1.5, 1.2))
    plan = make_plan(fingerprint(iter([case])), recipe, ("MR",), 3, 1)
    return case, plan, prepare_case(replace(case, labels_zyx=None), PrepareRecipe(), plan)


def shift(by: float) -> Any:
    """A network of two heads: the image, and the image and a number."""
    return lambda x: torch.cat([x[:, :1], x[:, :1] + by], dim=1)


def test_folds_are_averaged_as_logits() -> None:
    image = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)

    class Flat:
        dims, patch_size = 3, (4, 8, 8)

    out = fold_logits([shift(1.0), shift(-3.0), shift(0.5)], image, Flat(), PLAIN)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, np.concatenate([image, image - 0.5]), atol=1e-6)
    half = fold_logits([shift(1.0), shift(-3.0)], image, Flat(), HALF)
    assert half.dtype == np.float16
    single = [fold_logits([one], image, Flat(), HALF) for one in (shift(1.0), shift(-3.0))]
    np.testing.assert_array_equal(half, (single[0] + single[1]) / np.float16(2))


def test_sums_beyond_half_precision_name_the_case() -> None:
    class Flat:
        dims, patch_size = 3, (4, 8, 8)

    def large(x: Tensor) -> Tensor:
        return torch.full_like(x, 40000.0)

    image = np.zeros((1, 4, 8, 8), np.float32)
    with pytest.raises(CaseError, match=r"case_9.*half precision"):
        fold_logits([large], image, Flat(), HALF, name="case_9")

    def sizeable(x: Tensor) -> Tensor:
        return torch.full_like(x, 5000.0)

    # one fold stays below 65504 / 10, the sum over fourteen does not
    with pytest.raises(CaseError, match=r"case_9: the sum of 14 folds"):
        fold_logits([sizeable] * 14, image, Flat(), HALF, name="case_9")
    assert np.isfinite(fold_logits([sizeable] * 14, image, Flat(), PLAIN)).all()
    with pytest.raises(InputError, match="at least one trained network"):
        fold_logits([], image, Flat(), PLAIN)


def test_probabilities_are_certain_where_nothing_was_seen(prepared: tuple[Case, Plan, Prepared]) -> None:
    case, _, one = prepared
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, *one.geometry.shape)).astype(np.float32)
    table = native_probabilities(logits, one.geometry, plain_rules(3))
    assert table.shape == (3, *case.grid.shape_zyx)
    np.testing.assert_allclose(table.sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(table[:, :, :3], np.array([1, 0, 0], np.float32)[:, None, None, None] * np.ones((1, 12, 3, 16)))
    np.testing.assert_array_equal(plain_rules(3).from_probabilities(table), native_labels(logits, one.geometry, plain_rules(3)))
    rules = read_rules(REGIONS, [1, 2])
    regions = native_probabilities(logits[:2], one.geometry, rules)
    assert not regions[:, :, :3].any()
    np.testing.assert_array_equal(rules.from_probabilities(regions), native_labels(logits[:2], one.geometry, rules))


def test_regions_are_painted_in_their_order(prepared: tuple[Case, Plan, Prepared]) -> None:
    _, _, one = prepared
    heads = np.ones((2, *one.geometry.shape), np.float32)
    heads[1, :, :, 4:] = -1
    first = native_labels(heads, one.geometry, read_rules(REGIONS, [1, 2]))
    last = native_labels(heads, one.geometry, read_rules(REGIONS, [2, 1]))
    assert set(np.unique(first)) == {0, 1, 2}
    np.testing.assert_array_equal(last, np.where(first > 0, np.where(first == 2, 1, 2), 0))
    with pytest.raises(InputError, match="3 outputs"):
        native_labels(np.ones((3, *one.geometry.shape), np.float32), one.geometry, read_rules(REGIONS, [1, 2]))


def test_models_are_averaged_as_probabilities(prepared: tuple[Case, Plan, Prepared]) -> None:
    """Where the two means disagree: one model is a little for 1, the other very sure of 0 (logits) but not twice as sure (probability)."""
    case, plan, _ = prepared

    def sure(x: Tensor) -> Tensor:
        return torch.cat([x * 0 + 0.9, x * 0], dim=1)

    def other(x: Tensor) -> Tensor:
        return torch.cat([x * 0, x * 0 + 1], dim=1)

    one, two = (Tools(PLAIN, PrepareRecipe(), plan, (network,)) for network in (sure, other))  # type: ignore[arg-type]
    assert predict_ensemble(case, [one, two]).labels_zyx is not None
    found = mean_probabilities([predict_probabilities(case, one), predict_probabilities(case, two)])
    inside = found[:, 5, 10, 8]
    expected = (np.array([np.exp(0.9), 1]) / (np.exp(0.9) + 1) + np.array([1, np.e]) / (1 + np.e)) / 2
    np.testing.assert_allclose(inside, expected, rtol=1e-6)
    assert predict_ensemble(case, [one, two]).labels_zyx[5, 10, 8] == 1  # type: ignore[index]
    assert predict_ensemble(case, [one, one, two]).labels_zyx[5, 10, 8] == 0  # type: ignore[index]
    with pytest.raises(InputError, match="cannot join"):
        mean_probabilities([found, found[:, 1:]])
    with pytest.raises(InputError, match="at least one model"):
        mean_probabilities([])


def test_the_first_stage_becomes_channels(prepared: tuple[Case, Plan, Prepared]) -> None:
    case, plan, one = prepared
    rules = plain_rules(3)
    assert case.labels_zyx is not None
    image = with_previous(case, case.labels_zyx, one, PrepareRecipe(), plan, rules)
    labelled = prepare_case(case, PrepareRecipe(), plan)
    assert labelled.labels_zyx is not None
    np.testing.assert_array_equal(image[:1], one.image_czyx)
    np.testing.assert_array_equal(image[1:], one_hot(labelled.labels_zyx, (1, 2)))
    assert (image[1:].sum(0) <= 1).all()
    seen: list[NDArray[np.float32]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(x.numpy())
        return torch.cat([x[:, 1:2] * 0 + 0.5, x[:, 1:]], dim=1)

    tools = Tools(PLAIN, PrepareRecipe(), plan, (network,), rules=rules, previous=lambda _: case.labels_zyx)  # type: ignore[arg-type, return-value]
    found = predict_unet(case, tools).labels_zyx
    assert seen[0].shape[1] == 3
    assert found is not None
    assert (found == case.labels_zyx).mean() > 0.75
    for wrong, message in ((case.labels_zyx[1:], "same grid"), (case.labels_zyx + 5, r"hold \[")):
        with pytest.raises(InputError, match=message):
            with_previous(case, wrong, one, PrepareRecipe(), plan, rules)
    with pytest.raises(InputError, match="cohort's labels"):
        with_previous(case, case.labels_zyx, one, PrepareRecipe(), plan, None)
