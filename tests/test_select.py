"""The choice of a model or a pair, on masks and probabilities whose Dice is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ichbench.cases.labels import plain_rules, read_rules
from ichbench.errors import InputError
from ichbench.inference.select import Candidate, find_best, read_selection

REFERENCE = {"a": np.array([0, 1, 1, 0, 0, 0], np.int16).reshape(1, 1, 6), "b": np.array([0, 0, 0, 1, 1, 0], np.int16).reshape(1, 1, 6)}
RULES = plain_rules(2)


def candidate(name: str, foreground: dict[str, list[float]]) -> Candidate:
    """A model by its foreground probabilities."""
    table = {case: np.array([1 - np.array(row), row], np.float32).reshape(2, 1, 1, 6) for case, row in foreground.items()}
    return Candidate(name, lambda case: RULES.from_probabilities(table[case]), table.__getitem__)


#: each misses one voxel where it is unsure and the other is sure
HALF = candidate("2d", {"a": [0, 0.9, 0.4, 0, 0, 0], "b": [0, 0, 0, 0.9, 0.4, 0]})
OTHER = candidate("3d", {"a": [0, 0.4, 0.9, 0, 0, 0], "b": [0, 0, 0, 0.4, 0.9, 0]})
WHOLE = candidate("big", {"a": [0, 0.9, 0.9, 0, 0, 0], "b": [0, 0, 0, 0.9, 0.9, 0]})


def best(*candidates: Candidate, pairs: bool = True) -> tuple[str, ...]:
    return find_best(candidates, ["a", "b"], REFERENCE.__getitem__, RULES, pairs).members


def test_a_pair_that_is_better_wins() -> None:
    found = find_best([HALF, OTHER], ["a", "b"], REFERENCE.__getitem__, RULES)
    assert found.members == ("2d", "3d")
    assert found.scores == {("2d",): 2 / 3, ("3d",): 2 / 3, ("2d", "3d"): 1.0}


def test_ties_go_to_the_first_and_to_single_models() -> None:
    assert best(HALF, OTHER, pairs=False) == ("2d",)
    assert best(OTHER, HALF, pairs=False) == ("3d",)
    found = find_best([HALF, OTHER, WHOLE], ["a", "b"], REFERENCE.__getitem__, RULES)
    assert found.members == ("big",)
    # every pair is as good as the winner, and comes later
    assert [dice for names, dice in found.scores.items() if names == ("big",) or len(names) == 2] == [1.0] * 4


def test_the_ignore_label_and_regions_count() -> None:
    """What a model finds beside the target is not held against it where the reference is ignored."""
    wide = candidate("wide", {"a": [0, 0.9, 0.9, 0.9, 0.9, 0.9], "b": [0.9, 0.9, 0.9, 0.9, 0.9, 0]})
    hidden = {case: np.where(mask == 0, 2, mask) for case, mask in REFERENCE.items()}
    assert best(HALF, wide, pairs=False) == ("2d",)
    assert find_best([HALF, wide], ["a", "b"], hidden.__getitem__, plain_rules(2, ignore=2), False).members == ("wide",)
    rules = read_rules({"background": 0, "all": [1, 2], "core": 2}, [1, 2])
    core = np.array([0, 1, 2, 0, 0, 0], np.int16).reshape(1, 1, 6)

    def model(name: str, rows: list[list[float]]) -> Candidate:
        heads: NDArray[np.float32] = np.array(rows, np.float32).reshape(2, 1, 1, 6)
        return Candidate(name, lambda _: rules.from_probabilities(heads), lambda _: heads)

    # by hand: `one` has the whole right and a false core voxel (1, 2/3); `two` has another one, outside the whole (4/5, 2/3)
    one = model("one", [[0, 0.9, 0.9, 0, 0, 0], [0, 0.6, 0.6, 0, 0, 0]])
    two = model("two", [[0, 0.9, 0.9, 0, 0, 0], [0, 0.2, 0.6, 0, 0, 0.6]])
    found = find_best([one, two], ["a"], lambda _: core, rules)
    assert found.members == ("one", "two")
    assert found.scores == pytest.approx({("one",): (1 + 2 / 3) / 2, ("two",): (4 / 5 + 2 / 3) / 2, ("one", "two"): 1.0}, abs=1e-12)


def test_a_class_that_is_nowhere_does_not_decide() -> None:
    three = plain_rules(3)
    empty = {case: np.zeros_like(mask) for case, mask in REFERENCE.items()}
    nothing = Candidate("nothing", empty.__getitem__)
    right = Candidate("right", REFERENCE.__getitem__)
    assert find_best([nothing, right], ["a", "b"], REFERENCE.__getitem__, three, False).members == ("right",)
    with pytest.raises(InputError, match="no case shows a label"):
        find_best([nothing], ["a"], empty.__getitem__, three, False)


def test_it_is_stored_as_json(tmp_path: Path) -> None:
    found = find_best([HALF, OTHER], ["a", "b"], REFERENCE.__getitem__, RULES)
    found.save(tmp_path / "selection.json")
    assert read_selection(tmp_path / "selection.json") == found
    for content, message in (("[]", "must hold a JSON object"), ("{}", "is not a selection"), ("{", "cannot be read as JSON")):
        (tmp_path / "selection.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_selection(tmp_path / "selection.json")


def test_what_cannot_be_chosen_from() -> None:
    with pytest.raises(InputError, match="names of their own"):
        find_best([HALF, HALF], ["a"], REFERENCE.__getitem__, RULES)
    with pytest.raises(InputError, match=r"big lacks <case>.npz .* ichbench predict --probabilities, .* --no-pairs"):
        find_best([HALF, Candidate("big", HALF.mask)], ["a"], REFERENCE.__getitem__, RULES)
