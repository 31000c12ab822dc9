"""Class locations: nnU-Net's draw, repeated here by the plainest means."""

from __future__ import annotations

import numpy as np
import pytest

from ichbench.prepare.locations import foreground_locations, location_classes


def test_which_classes_are_drawn() -> None:
    assert location_classes((0, 2, 1)) == (1, 2)
    assert location_classes((0, 1, 2, 3), ignore_label=3) == (1, 2, (-1, 0, 1, 2))
    assert location_classes((0, 1, 2), 3, ((1, 2), 2, (1,))) == ((1, 2), 2, (1,), (-1, 0, 1, 2))


@pytest.mark.parametrize("seed", range(3))
def test_one_generator_for_all_classes_of_a_case(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 0, 1, 2, 4], size=(12, 40, 45), p=[0.1, 0.1, 0.6, 0.1, 0.1]).astype(np.int16)
    classes = (1, 3, (2, 1), (4,), (-1, 0, 1, 2, 3))
    found = foreground_locations(labels, classes)
    assert list(found) == list(classes)
    generator = np.random.RandomState(1234)
    for one in classes:
        places = np.concatenate([np.argwhere(labels == label) for label in (one if isinstance(one, tuple) else (one,))])
        if not len(places):
            assert found[one].shape == (0, 3)
            continue
        wanted = max(min(10_000, len(places)), int(np.ceil(0.01 * len(places))))
        np.testing.assert_array_equal(found[one], places[generator.choice(len(places), wanted, replace=False)])
        assert found[one].dtype == np.int32


def test_more_than_a_million_voxels_are_drawn_by_their_share() -> None:
    labels = np.ones((11, 320, 320), np.int8)
    assert len(foreground_locations(labels)[1]) == int(np.ceil(labels.size * 0.01))


def test_without_classes_the_labels_that_are_there() -> None:
    labels = np.array([[[-1, 0, 3, 3, 1]]], dtype=np.int16)
    assert {key: at.tolist() for key, at in foreground_locations(labels).items()}.keys() == {1, 3}
    assert foreground_locations(np.full((2, 2, 2), -1, np.int16)) == {}
    assert foreground_locations(np.zeros((2, 2, 2), np.int16)) == {}
