"""Patches: nnU-Net's sampling rule, borders, and the law that any sample can be drawn again alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichbench.augmentation.boxes import bounding_box, common_box, cut_into
from ichbench.augmentation.patches import (
    TrainingCase,
    TrainingWarning,
    choose_cases,
    corner_range,
    draw_patch,
    is_forced,
    sample_generator,
)
from ichbench.errors import InputError


def case(
    shape: tuple[int, int, int] = (6, 20, 24), foreground: tuple[tuple[int, int, int, int], ...] = (), name: str = "a"
) -> TrainingCase:
    """An image that numbers its voxels; `foreground` is (label, z, y, x)."""
    labels = np.zeros(shape, dtype=np.int16)
    for label, *voxel in foreground:
        labels[tuple(voxel)] = label
    places = {label: np.argwhere(labels == label) for label in {entry[0] for entry in foreground}}
    return TrainingCase(name, np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1, labels, places)


@pytest.mark.parametrize(("batch", "forced"), [(2, 1), (3, 1), (4, 1), (5, 2), (8, 3), (12, 4)])
def test_forced_share_of_a_batch(batch: int, forced: int) -> None:
    """nnU-Net's counts at a share of 0.33 (facts section 5); they are the last samples of the batch."""
    flags = [is_forced(i, batch, 0.33) for i in range(batch)]
    assert sum(flags) == forced
    assert flags == sorted(flags)
    assert not any(is_forced(i, batch, 0.0) for i in range(batch))
    assert all(is_forced(i, batch, 1.0) for i in range(batch))


@given(st.integers(1, 40), st.integers(1, 40))
def test_corner_range(length: int, patch: int) -> None:
    """Large images keep the patch inside; small ones lie inside the patch, centred as well as whole voxels allow."""
    low, high = corner_range(length, patch)
    if length >= patch:
        assert (low, high) == (0, length - patch)
    else:
        assert low <= high <= 0
        assert low + patch >= length
        before, after = -low, patch - length + low
        assert abs(before - after) <= 1
        assert abs(-high - (patch - length + high)) <= 1


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.tuples(st.integers(1, 5), st.integers(1, 19), st.integers(1, 23)))
def test_a_forced_patch_is_centred_on_foreground_and_inside(step: int, voxel: tuple[int, int, int]) -> None:
    one = case(foreground=((1, *voxel),))
    draw = draw_patch(sample_generator(0, 0, step, 1), [one], (4, 8, 8), forced=True)
    assert draw.label == 1
    for low, size, place, length in zip(draw.lower_zyx, draw.size_zyx, voxel, one.labels_zyx.shape, strict=True):
        assert low == min(max(0, place - size // 2), length - size)
        assert low <= place < low + size
    labels = np.empty(draw.size_zyx, np.int16)
    cut_into(labels, one.labels_zyx, draw.lower_zyx, -1)
    assert (labels == 1).any()


def test_classes_have_equal_chances_however_rare() -> None:
    rare = case(foreground=((1, 1, 1, 1), *((2, z, y, x) for z in range(2, 5) for y in range(9) for x in range(9))))
    labels = [draw_patch(sample_generator(3, 0, step, 0), [rare], (2, 4, 4), True).label for step in range(1000)]
    # binomial(1000, 1/2): six standard deviations are 95
    assert abs(labels.count(1) - 500) < 95
    assert set(labels) == {1, 2}


def test_unforced_corners_and_cases_are_uniform() -> None:
    cases = [case((6, 8, 8), name=name) for name in "ab"]
    draws = [draw_patch(sample_generator(1, 0, step, 0), cases, (4, 8, 6), False) for step in range(3000)]
    for values, count in (([d.lower_zyx[0] for d in draws], 3), ([d.lower_zyx[2] for d in draws], 3), ([d.case for d in draws], 2)):
        assert set(values) == set(range(count))
        share = np.bincount(values) / 3000
        # six standard deviations of a binomial with p = 1/3 or 1/2
        assert np.abs(share - 1 / count).max() < 6 * np.sqrt(0.25 / 3000)
    assert {draw.label for draw in draws} == {None}


def test_without_foreground_a_forced_patch_lies_anywhere() -> None:
    empty = TrainingCase("e", np.zeros((1, 6, 8, 8), np.float32), np.zeros((6, 8, 8), np.int16), {1: np.empty((0, 3), np.int64)})
    draws = [draw_patch(sample_generator(1, 0, step, 0), [empty], (4, 4, 4), True) for step in range(50)]
    assert {draw.label for draw in draws} == {None}
    assert len({draw.lower_zyx for draw in draws}) > 20


def test_2d_patches_are_one_slice_thick() -> None:
    one = case(foreground=((1, 4, 3, 3),))
    assert {draw_patch(sample_generator(0, 0, s, 0), [one], (8, 8), True).lower_zyx[0] for s in range(20)} == {4}
    draws = [draw_patch(sample_generator(0, 0, s, 0), [one], (8, 8), False) for s in range(200)]
    assert {d.lower_zyx[0] for d in draws} == set(range(6))
    assert {d.size_zyx for d in draws} == {(1, 8, 8)}


@given(
    st.tuples(st.integers(-9, 9), st.integers(-30, 30), st.integers(-30, 30)),
    st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 30)),
)
def test_cut_equals_a_padded_cut(lower: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    one = case((4, 9, 7), foreground=((1, 1, 2, 3),))
    image, labels = np.empty((1, *size), np.float32), np.empty(size, np.int64)
    cut_into(image, one.image_czyx, lower, 0)
    # a flipped view of another type is filled as well
    cut_into(labels[:, ::-1], one.labels_zyx, lower, -1)
    pad = 60
    box = tuple(slice(low + pad, low + pad + n) for low, n in zip(lower, size, strict=True))
    np.testing.assert_array_equal(image[0], np.pad(one.image_czyx[0], pad)[box])
    np.testing.assert_array_equal(labels[:, ::-1], np.pad(one.labels_zyx, pad, constant_values=-1)[box])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(0, 6)), max_size=4))
def test_bounding_boxes(voxels: list[tuple[int, int, int]]) -> None:
    mask = np.zeros((4, 9, 7), bool)
    for voxel in voxels:
        mask[voxel] = True
    found = bounding_box(mask)
    assert (found is None) == (not voxels)
    if found is not None:
        low, high = np.min(voxels, axis=0), np.max(voxels, axis=0)
        assert found == (tuple(low), tuple(high - low + 1))
        assert common_box(found, ((0, 0, 0), (4, 9, 7))) == found
        assert common_box(found, ((4, 0, 0), (2, 9, 9))) is None


def test_boxes_of_a_case_are_those_of_its_labels() -> None:
    assert case((6, 20, 24)).labels_box is None
    one = case((6, 20, 24), foreground=((1, 2, 3, 4), (2, 4, 3, 9)))
    one.labels_zyx[0, 0, 0] = -1
    assert one.labels_box == ((2, 3, 4), (3, 1, 6))
    assert one.previous_box is None


def test_no_cases() -> None:
    with pytest.raises(InputError, match="no case"):
        draw_patch(sample_generator(0, 0, 0, 0), [], (4, 4, 4), False)


def test_generators_differ_in_every_part_of_the_key() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    first = [sample_generator(*key).integers(2**62) for key in keys]
    assert len(set(first)) == len(keys)
    assert [sample_generator(*key).integers(2**62) for key in keys] == first


def test_choosing_cases_is_seeded_and_nested() -> None:
    cases = [case((2, 4, 4), name=str(i)) for i in range(12)]
    names = [{c.id for c in choose_cases(cases, n, 0)} for n in (3, 6, 12)]
    assert [len(n) for n in names] == [3, 6, 12]
    assert names[0] < names[1] < names[2]
    assert choose_cases(cases, "all", 0) == cases
    assert {c.id for c in choose_cases(cases, 3, 1)} != names[0]
    with pytest.warns(TrainingWarning, match="there are 12"):
        assert choose_cases(cases, 13, 0) == cases


def test_a_forced_voxel_may_lie_anywhere_in_its_patch() -> None:
    one = case((20, 40, 40), ((1, 10, 20, 20),))
    draws = [draw_patch(sample_generator(0, 0, step, 0), [one], (4, 8, 8), True, centred=False) for step in range(600)]
    places = np.array([[10, 20, 20]] * 600) - np.array([draw.lower_zyx for draw in draws])
    for axis, size in enumerate((4, 8, 8)):
        counts = np.bincount(places[:, axis], minlength=size)
        assert len(counts) == size
        # uniform: each place within five standard deviations of its share
        assert np.all(np.abs(counts - 600 / size) < 5 * np.sqrt(600 / size))


def test_nnunets_patches_hang_out_at_the_far_border() -> None:
    """Its printed case (facts, section 5): length 482, voxel 481, patch 205 of which the middle lies on the voxel: 379 to 584."""
    one = case((482, 9, 9), ((1, 481, 4, 4),))
    theirs = draw_patch(sample_generator(0, 0, 0, 0), [one], (205, 9, 9), True, clamped=False)
    ours = draw_patch(sample_generator(0, 0, 0, 0), [one], (205, 9, 9), True)
    assert (theirs.lower_zyx[0], theirs.lower_zyx[0] + 205) == (379, 584)
    assert (ours.lower_zyx[0], ours.lower_zyx[0] + 205) == (277, 482)
    inner = case((482, 9, 9), ((1, 200, 4, 4),))
    corners = [draw_patch(sample_generator(0, 0, 0, 0), [inner], (205, 9, 9), True, clamped=clamped).lower_zyx for clamped in (True, False)]
    assert corners[0] == corners[1]


def test_regions_are_classes_and_an_ignore_label_keeps_patches_on_annotated_voxels() -> None:
    """nnU-Net's rule: forced patches choose among labels and regions, the others, and cases without either, an annotated voxel."""
    labels = np.zeros((1, 30, 40), dtype=np.int16)
    image = np.ones((1, *labels.shape), np.float32)
    annotated = (-1, 0, 1, 2)
    spots = {1: np.array([[0, 2, 3]]), (2, 1): np.array([[0, 20, 30]]), 2: np.empty((0, 3), int), annotated: np.array([[0, 10, 10]])}
    for foreground, forced, expected in (
        (spots, True, {1, (2, 1)}),
        (spots, False, {annotated}),
        ({annotated: spots[annotated]}, True, {annotated}),
        ({1: spots[1]}, False, {None}),
    ):
        draws = [
            draw_patch(sample_generator(0, 0, step, 0), [TrainingCase("a", image, labels, foreground)], (5, 5), forced)
            for step in range(40)
        ]
        assert {draw.label for draw in draws} == expected
        for draw in draws:
            if draw.label is not None:
                y, x = foreground[draw.label][0][1:]
                assert draw.lower_zyx == (0, max(0, y - 2), max(0, x - 2))


def test_nnunets_enlarged_boxes_lie_where_it_puts_them() -> None:
    """Its range of corners (facts, section 5): by half of what the box exceeds the patch, or of what the image lacks, outside."""
    for length, box, patch in ((30, 20, 12), (15, 20, 12), (9, 21, 12), (30, 20, 20), (7, 20, 20)):
        need = max(box - patch, box - length)
        expected = (-need // 2, length + need // 2 + need % 2 - box)
        one = case((length, 9, 9))
        draws = [draw_patch(sample_generator(0, 0, s, 0), [one], (patch, 9, 9), False, box_zyx=(box, 9, 9)) for s in range(400)]
        corners = {draw.lower_zyx[0] for draw in draws}
        assert (min(corners), max(corners)) == expected
        assert len(corners) == expected[1] - expected[0] + 1
        assert {(draw.size_zyx, draw.enlarged) for draw in draws} == {((box, 9, 9), True)}
    forced = case((30, 9, 9), ((1, 28, 4, 4),))
    draw = draw_patch(sample_generator(0, 0, 0, 0), [forced], (12, 9, 9), True, clamped=False, box_zyx=(20, 9, 9))
    assert draw.lower_zyx[0] == 18


@pytest.mark.parametrize("patch", [(4, 8, 8), (5, 7, 8), (4, 4, 4)])
def test_anywhere_means_anywhere_in_the_patch_also_in_nnunets_larger_box(patch: tuple[int, int, int]) -> None:
    """The patch is the middle of the box; far from all borders it always shows the forced voxel, and at every place of it."""
    one, box = case((60, 60, 60), ((1, 30, 30, 30),)), (12, 17, 20)
    places = [set() for _ in range(3)]  # type: ignore[var-annotated]
    for step in range(400):
        draw = draw_patch(sample_generator(5, 0, step, 0), [one], patch, True, centred=False, clamped=False, box_zyx=box)
        for axis in range(3):
            places[axis].add(30 - (draw.lower_zyx[axis] + box[axis] // 2 - patch[axis] // 2))
    assert places == [set(range(length)) for length in patch]
