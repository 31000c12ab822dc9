"""Prepared arrays as nnU-Net 2.8.1 made them (golden/nnunet_arrays.txt, which says how to rewrite it); live: tests/parity_nnunet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.nnunet_arrays import CT, FACTS, FROZEN, PATTERNS, data_pairs, line, logits_of, pattern

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import read_image, read_labels
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.locations import Location, location_classes
from ichbench.prepare.pipeline import prepare_case, restore_logits
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import PlanRecipe, PrepareRecipe

NNUNET = {(kept := json.loads(text))["name"]: kept for text in FROZEN.read_text(encoding="utf-8").splitlines()}


def plan_of(spacing: tuple[float, ...], forward: tuple[int, ...], schemes: tuple[str, ...], masked: tuple[bool, ...]) -> Plan:
    facts = {str(index): FACTS for index in range(len(schemes))}
    names = tuple("CT" if scheme == CT else f"c{index}" for index, scheme in enumerate(schemes))
    plan = make_plan(Fingerprint(((1.0, 1.0, 1.0),), ((32, 32, 32),), facts, 1.0), PlanRecipe(), names, 2, 1)
    backward = tuple(forward.index(axis) for axis in range(3))
    changed = {"spacing": spacing, "transpose_forward": forward, "transpose_backward": backward, "dims": len(spacing)}
    return replace(plan, **changed, normalization=schemes, use_mask_for_norm=masked)


def same(case: Case, plan: Plan, classes: tuple[Location, ...], order: tuple[int, ...] | None, name: str) -> None:
    prepared = prepare_case(case, PrepareRecipe(compatibility="nnunet"), plan, classes)
    geometry = prepared.geometry
    heads = (
        len(order)
        if order is not None
        else len({label for one in classes for label in ((one,) if isinstance(one, int) else one)} - {-1, 0}) + 1
    )
    back = restore_logits(logits_of(heads, geometry.shape), geometry, order)
    ours = json.loads(
        line(name, geometry.box, geometry.shape_before_crop, prepared.image_czyx, prepared.labels_zyx, dict(prepared.foreground), back)
    )
    theirs: dict[str, Any] = dict(NNUNET[name])
    for key in ("mean", "sd", "voxels"):
        np.testing.assert_allclose(ours.pop(key), theirs.pop(key), atol=1e-4, rtol=0, err_msg=key)
    assert ours == theirs


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str) -> None:
    image, labels, spacing = pattern(name)
    _, _, target, forward, schemes, masked, table, order = PATTERNS[name]
    given = [tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "ignore"]
    values = {label for one in given for label in (one if isinstance(one, tuple) else (one,))}
    classes = location_classes(values, table.get("ignore"), [one for one in given if one != 0] if order else ())
    grid = Grid(labels.shape, np.diag([*spacing, 1.0]))
    same(Case(name, image, labels, grid), plan_of(target, forward, schemes, masked), classes, order, name)


def test_real_cases(shared_data: Path) -> None:
    pairs = data_pairs(shared_data)
    assert len(pairs) == 5
    for name, image_file, label_file, spacing, scheme in pairs:
        for keep in (True, False):  # by the axis rule too: compatibility puts file order back
            (image, grid), (labels, _) = read_image(image_file, keep), read_labels(label_file, keep)
            classes = (1,) if scheme == CT else (1, 2)
            same(Case(name, image[None], labels, grid), plan_of(spacing, (0, 1, 2), (scheme,), (False,)), classes, None, name)
            if scheme == CT and keep:
                break
