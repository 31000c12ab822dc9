"""Label rules: what a dataset.json may declare, how many heads that makes, and which label wins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ichbench.cases.labels import ZERO_LOGIT, mask_of, plain_rules, read_rules
from ichbench.errors import InputError

REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}


def test_plain_labels_are_ordered_by_value() -> None:
    rules = read_rules({"edema": 2, "background": 0, "ich": [1], "ignore": 3})
    assert (rules.names, rules.targets, rules.ignore) == (("ich", "edema"), (1, 2), 3)
    assert (rules.labels, rules.foreground_labels, rules.n_heads, rules.has_regions) == ((0, 1, 2), (1, 2), 3, False)


def test_regions_keep_their_order_and_have_no_background_head() -> None:
    rules = read_rules(REGIONS | {"nothing": [0]}, [1, 2, 3])
    assert rules.names == ("whole", "core", "enhancing")
    assert rules.targets == ((1, 2, 3), (2, 3), 3)
    assert (rules.labels, rules.n_heads, rules.ignore, rules.regions_class_order) == ((0, 1, 2, 3), 3, 4, (1, 2, 3))
    assert [rules.outside(head) for head in range(3)] == [0, 0, 0]
    assert [plain_rules(3).outside(head) for head in range(3)] == [1, 0, 0]


def test_the_highest_head_wins_and_ties_go_to_the_lower_label() -> None:
    heads = np.array([[1, 2, 2, 0], [1, 2, 3, 0], [0, 2, 3, 1]], np.float32).reshape(3, 1, 1, 4)
    rules = plain_rules(3)
    assert rules.from_logits(heads).ravel().tolist() == [0, 0, 1, 2]
    rng = np.random.default_rng(0)
    many = rng.integers(0, 3, (5, 4, 5, 6)).astype(np.float16)
    np.testing.assert_array_equal(plain_rules(5).from_logits(many), many.argmax(0))


def test_a_later_region_overwrites_an_earlier_one() -> None:
    heads = np.array([[5, 5, 5, -1], [-1, 5, 5, -1], [-1, -1, 5, 5]], np.float32).reshape(3, 1, 1, 4)
    assert read_rules(REGIONS, [1, 2, 3]).from_logits(heads).ravel().tolist() == [1, 2, 3, 3]
    assert read_rules(REGIONS, [3, 1, 2]).from_logits(heads).ravel().tolist() == [3, 1, 2, 2]
    probabilities = 1 / (1 + np.exp(-heads))
    assert read_rules(REGIONS, [3, 1, 2]).from_probabilities(probabilities).ravel().tolist() == [3, 1, 2, 2]


def test_half_a_probability_is_background() -> None:
    rules = read_rules({"background": 0, "both": [1, 2]}, [1])
    assert rules.from_probabilities(np.full((1, 1, 1, 1), 0.5, np.float32)).item() == 0
    # the sigmoid of fp16's two smallest numbers is 0.5 and the next float32 above it
    assert rules.from_logits(np.full((1, 1, 1, 1), ZERO_LOGIT, np.float16)).item() == 0
    assert rules.from_logits(np.full((1, 1, 1, 1), 2 * ZERO_LOGIT, np.float16)).item() == 1


def test_mask_of_a_label_and_of_a_region() -> None:
    labels = np.arange(5)
    assert mask_of(labels, 2).tolist() == [False, False, True, False, False]
    assert mask_of(labels, (1, 4)).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("declared", "order", "message"),
    [
        (None, None, '"labels" is None'),
        ({"ich": 1}, None, '"background": 0'),
        ({"background": [0, 1], "ich": 1}, None, '"background": 0'),
        ({"background": 0}, None, "at least one more"),
        ({"background": 0, "a": 1, "b": 1}, None, "without gaps"),
        ({"background": 0, "a": 0, "b": 1}, None, "without gaps"),
        ({"background": 0, "a": 1, "b": 3}, None, "without gaps"),
        ({"background": 0, "a": [1, 3]}, [1], "without gaps"),
        ({"background": 0, "a": True}, None, "one integer"),
        ({"background": 0, "a": [1, 1]}, None, "one integer"),
        ({"background": 0, "a": []}, None, "one integer"),
        ({"background": 0, "a": 1, "ignore": [2]}, None, '"ignore" is the list'),
        ({"background": 0, "a": 1, "ignore": 5}, None, "highest label, 2"),
        (REGIONS, None, '"regions_class_order" is None'),
        (REGIONS, [1, 2], "3 regions"),
        (REGIONS, [1, 2, 4], "3 regions"),
    ],
)
def test_what_is_refused(declared: object, order: object, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        read_rules(declared, order, "dataset.json")


def test_heads_of_another_network_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 heads came, but the labels \[0, 1, 2\] need 3"):
        plain_rules(3).from_logits(np.zeros((2, 1, 1, 1), np.float32))
