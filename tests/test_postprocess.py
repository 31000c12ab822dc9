"""Largest components: the operation against brute force, the rule on masks whose Dice is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.inference.postprocess import (
    Postprocessing,
    Target,
    dice_counts,
    find_postprocessing,
    foreground_mean,
    keep_largest,
    mean_dice,
    read_postprocessing,
)

Mask = NDArray[np.int16]


def line(text: str) -> Mask:
    """A mask of one row, a digit a voxel."""
    return np.array([int(digit) for digit in text], np.int16).reshape(1, 1, -1)


def flood(mask: NDArray[np.bool_]) -> list[set[tuple[int, ...]]]:
    """Components of touching voxels (corners count), the slow way."""
    left = {tuple(int(i) for i in place) for place in np.argwhere(mask)}
    found = []
    while left:
        queue = [left.pop()]
        component = set(queue)
        while queue:
            here = queue.pop()
            near = {other for other in left if max(abs(a - b) for a, b in zip(here, other, strict=True)) <= 1}
            left -= near
            component |= near
            queue += near
        found.append(component)
    return found


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.4))
def test_keep_largest_against_a_flood_fill(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.integers(1, 4, (4, 6, 5)) * (rng.random((4, 6, 5)) < share)).astype(np.int16)
    for wanted in ((1,), (1, 3), (1, 2, 3)):
        components = flood(np.isin(labels, wanted))
        expected = labels.copy()
        for component in components:
            if len(component) < max(map(len, components)):
                for place in component:
                    expected[place] = 0
        before = labels.copy()
        np.testing.assert_array_equal(keep_largest(labels, wanted), expected)
        np.testing.assert_array_equal(labels, before)


def test_ties_stay_and_corners_connect() -> None:
    assert keep_largest(line("1101011"), [1]).ravel().tolist() == [1, 1, 0, 0, 0, 1, 1]
    corner = np.zeros((2, 2, 3), np.int16)
    corner[0, 0, 0] = corner[1, 1, 1] = corner[0, 0, 2] = 1
    np.testing.assert_array_equal(keep_largest(corner, [1]), corner)
    assert not keep_largest(np.zeros((1, 2, 2), np.int16), [1]).any()


def found(cases: Sequence[tuple[str, str]], targets: Sequence[Target], ignore: int | None = None) -> Postprocessing:
    pairs = {f"c{index}": (line(reference), line(predicted)) for index, (reference, predicted) in enumerate(cases)}
    return find_postprocessing(list(pairs), pairs.__getitem__, targets, ignore)


#: reference, prediction: a far island, two labels side by side, two true pieces
ISLAND, SIDES, PIECES = ("0111000", "0111001"), ("0111220", "0111221"), ("0110110", "0110100")


@pytest.mark.parametrize(
    ("cases", "targets", "ignore", "steps", "mask", "after"),
    [
        # an island of one label goes; with a single label the union is all that is tried
        ([ISLAND], [1], None, ((1,),), "1110001", "1110000"),
        # what lowers the mean is refused, and so is what changes nothing
        ([PIECES], [1], None, (), "1110001", "1110001"),
        ([("0111000", "0111000")], [1], None, (), "1110001", "1110001"),
        # label 1 has a far island that touches label 2: the union sees one piece, label 1 by itself does not
        ([SIDES], [1, 2], None, ((1,),), "0111221", "0111220"),
        # the union would help label 1 but take the piece of label 2 away: it is refused, and label 1 is tidied by itself
        ([("1111000200", "1111010200"), ("0000220000", "1000220000")], [1, 2], None, ((1,),), "1111010200", "1111000200"),
        # the island lies where the reference is ignored: nothing is gained
        ([("0111004", "0111001")], [1], 4, (), "1110001", "1110001"),
        # regions: the island of the whole goes, the core stays as it is
        ([("0112000", "0112001")], [(1, 2), (2,)], None, ((1, 2),), "0112001", "0112000"),
    ],
)
def test_the_rule_flips_these_masks(
    cases: list[tuple[str, str]], targets: list[Target], ignore: int | None, steps: tuple[tuple[int, ...], ...], mask: str, after: str
) -> None:
    rule = found(cases, targets, ignore)
    assert rule.steps == steps
    assert "".join(map(str, rule.apply(line(mask)).ravel())) == after


def test_a_class_that_no_case_shows_does_not_stop_the_rule() -> None:
    """In nnU-Net it makes the mean NaN, and the union is never accepted: so with `compatibility = "nnunet"`."""
    pairs = {"a": (line(ISLAND[0]), line(ISLAND[1]))}
    assert find_postprocessing(["a"], pairs.__getitem__, [1, 2]).steps == ((1, 2),)
    theirs = find_postprocessing(["a"], pairs.__getitem__, [1, 2], compatibility="nnunet")
    assert theirs.steps == ((1,),)
    assert np.isnan(theirs.trials[0].before)


def test_dice_without_the_cases_that_show_nothing() -> None:
    counts = [dice_counts(line("0110"), line("0100"), [1, 2]), dice_counts(line("0000"), line("0000"), [1, 2])]
    np.testing.assert_array_equal(mean_dice(counts), [2 / 3, np.nan])
    assert foreground_mean(mean_dice(counts)) == 2 / 3
    assert np.isnan(foreground_mean(mean_dice(counts), "nnunet"))
    assert mean_dice([dice_counts(line("00"), line("01"), [1])])[0] == 0


def test_the_file_is_json_and_comes_back(tmp_path: Path) -> None:
    rule = found([SIDES, ISLAND], [1, 2, (3,)])
    rule.save(tmp_path / "rule.json")
    assert read_postprocessing(tmp_path / "rule.json").steps == rule.steps
    table = json.loads((tmp_path / "rule.json").read_text())
    assert table["keep_largest"] == [list(step) for step in rule.steps]
    assert table["cases"] == 2
    (tmp_path / "rule.json").write_text(json.dumps(table | {"keep_largest": [[0]]}))
    with pytest.raises(InputError, match="labels from 1 to 65535"):
        read_postprocessing(tmp_path / "rule.json")
    (tmp_path / "postprocessing.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"\.pkl files are not read"):
        read_postprocessing(tmp_path / "postprocessing.pkl")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="at least one case"):
        find_postprocessing([], lambda _: (line("1"), line("1")), [1])
    with pytest.raises(InputError, match="same grid"):
        find_postprocessing(["a"], lambda _: (line("1"), line("11")), [1])
