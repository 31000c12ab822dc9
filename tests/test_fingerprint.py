"""The fingerprint: closed forms, and nnU-Net's draw repeated and converged to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ichbench.cases.case import Case, Grid
from ichbench.errors import InputError
from ichbench.prepare.fingerprint import STATISTICS, Fingerprint, case_facts, combine, fingerprint, read_fingerprint


def case(name: str, values: np.ndarray, channels: int = 1) -> Case:
    """A case whose foreground holds exactly `values` and whose background holds 7."""
    shape = (4, 8, 16)
    image = np.full((channels, *shape), 7, np.float32)
    labels = np.zeros(shape, np.int16)
    labels.ravel()[: len(values)] = 1 + np.arange(len(values)) % 2
    for channel in range(channels):
        image[channel].ravel()[: len(values)] = values * (channel + 1)
    return Case(name, image, labels, Grid(shape, np.diag([5.0, 0.5, 0.4, 1])))


def test_every_case_weighs_the_same() -> None:
    """300 voxels of 10 and 2 voxels of 50 and 70: half the weight is 10, a quarter each 50 and 70."""
    found = fingerprint([case("big", np.full(300, 10.0)), case("small", np.array([50.0, 70.0])), case("none", np.array([]))])
    facts = found.intensities["0"]
    assert facts["mean"] == pytest.approx(35)
    assert facts["std"] == pytest.approx(np.sqrt(0.5 * 25**2 + 0.25 * 15**2 + 0.25 * 35**2))
    assert (facts["min"], facts["max"], facts["percentile_00_5"], facts["percentile_99_5"]) == (10, 70, 10, 70)
    assert facts["median"] == 30  # the weight reaches one half exactly between 10 and 50


def test_equal_sizes_give_the_plain_statistics() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(50, 10, 400).astype(np.float32) for _ in range(3)]
    facts = fingerprint([case(str(index), part, 2) for index, part in enumerate(parts)]).intensities
    pooled = np.concatenate(parts).astype(np.float64)
    assert facts["0"]["mean"] == pytest.approx(pooled.mean())
    assert facts["0"]["std"] == pytest.approx(pooled.std())
    assert facts["0"]["median"] == pytest.approx(np.median(pooled))
    assert facts["0"]["percentile_99_5"] == pytest.approx(np.sort(pooled)[1193:1195].mean())  # 1194 of 1200 lie below
    assert facts["1"]["mean"] == pytest.approx(2 * pooled.mean())


def test_sampled_repeats_nnunets_draw() -> None:
    """RandomState(1234) anew for each case, n // cases values with replacement, channel after channel."""
    values = {"a": np.arange(1, 41, dtype=np.float32), "b": np.arange(100, 110, dtype=np.float32), "c": np.array([])}
    cases = [case(name, one, 2) for name, one in values.items()]
    facts = fingerprint(cases, sampled=True, n_samples=3000).intensities
    drawn = []
    for one in (values["a"], values["b"]):
        generator = np.random.RandomState(1234)
        first = generator.choice(one, 1000)
        drawn.append((first, 2 * generator.choice(one, 1000)))
    for channel in (0, 1):
        pooled = np.concatenate([pair[channel] for pair in drawn])
        assert facts[str(channel)]["mean"] == pytest.approx(pooled.mean(), rel=1e-6)
        assert facts[str(channel)]["percentile_99_5"] == pytest.approx(np.percentile(pooled, 99.5))


def test_the_draw_converges_to_the_law() -> None:
    rng = np.random.default_rng(1)
    cases = [case(str(n), rng.normal(40 + n, 8, n).astype(np.float32)) for n in (10, 100, 500)]
    law, draw = fingerprint(cases).intensities["0"], fingerprint(cases, sampled=True, n_samples=300_000).intensities["0"]
    for key, value in law.items():
        assert draw[key] == pytest.approx(value, abs=0.15), key


def test_shapes_and_spacings() -> None:
    whole = case("whole", np.ones(5))
    image = whole.image_czyx.copy()
    image[:, :, :, 8:] = 0
    half = Case("half", image, whole.labels_zyx, whole.grid)
    found = fingerprint([whole, half, half])
    assert found.spacings == ((5.0, 0.5, 0.4),) * 3
    assert found.shapes_after_crop == ((4, 8, 16), (4, 8, 8), (4, 8, 8))
    assert found.median_relative_size == 0.5


def test_json_uses_nnunets_keys() -> None:
    found = fingerprint([case("a", np.arange(30.0))])
    table = json.loads(json.dumps(found.to_json()))
    assert sorted(table) == [
        "foreground_intensity_properties_per_channel",
        "median_relative_size_after_cropping",
        "shapes_after_crop",
        "spacings",
    ]
    assert Fingerprint.from_json(table) == found
    with pytest.raises(InputError, match="not a dataset fingerprint"):
        Fingerprint.from_json({"spacings": []})


PER_CHANNEL = "foreground_intensity_properties_per_channel"
DAMAGED: list[tuple[dict[str, object], str]] = [
    ({PER_CHANNEL: [1]}, "must hold a table for each channel"),
    ({PER_CHANNEL: {"0": [1]}}, "must hold a table for each channel"),
    ({PER_CHANNEL: {"0": {}}}, "channel 0: max is missing, but must be a finite number"),
    ({PER_CHANNEL: {}}, "the channels are \\[\\]; they must be numbered from 0"),
    ({PER_CHANNEL: {"1": dict.fromkeys(STATISTICS, 1.0)}}, "the channels are \\['1'\\]"),
    ({PER_CHANNEL: {"0": dict.fromkeys(STATISTICS, 1.0) | {"std": float("nan")}}}, "channel 0: std is nan"),
    ({"spacings": [[0, 1, 1]]}, "the spacing .* is not three positive numbers"),
    ({"spacings": [[float("nan"), 1, 1]]}, "the spacing"),
    ({"spacings": [[1, float("inf"), 1]]}, "the spacing"),
    ({"spacings": [[1, 1, -1]]}, "the spacing"),
    ({"spacings": [[1, 1, 1]] * 2}, "2 spacings and 1 shapes; each case needs one of both"),
    ({"spacings": [], "shapes_after_crop": []}, "0 spacings and 0 shapes"),
    ({"shapes_after_crop": [[0, 10, 10]]}, "the shape .* is not three numbers of voxels"),
    ({"shapes_after_crop": [[10**12] * 3]}, "the shape"),
    ({"shapes_after_crop": [[10.5, 10, 10]]}, "whole numbers are needed, not 10.5"),
    ({"shapes_after_crop": [[float("inf"), 10, 10]]}, "OverflowError"),
    ({"median_relative_size_after_cropping": float("nan")}, "median_relative_size_after_cropping is nan"),
]


@pytest.mark.parametrize(("values", "message"), DAMAGED)
def test_files_that_cannot_have_been_measured(values: dict[str, object], message: str, tmp_path: Path) -> None:
    good = fingerprint([case("a", np.arange(30.0))]).to_json()
    path = tmp_path / "dataset_fingerprint.json"
    path.write_text(json.dumps(good | values))
    with pytest.raises(InputError, match=f"dataset_fingerprint.json: not a dataset fingerprint: .*{message}"):
        read_fingerprint(path, 1)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "dataset_fingerprint.json"
    for text, message in (("[1]", "it is a list, not a table"), ("[" * 200_000, "cannot be read as JSON"), ("{", "cannot be read")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_fingerprint(path, 1)


def test_refusals() -> None:
    with pytest.raises(InputError, match="no training cases"):
        combine([])
    with pytest.raises(InputError, match="none of the 1 training cases has a labelled voxel after the flags"):
        fingerprint([case("none", np.array([]))])
    with pytest.raises(InputError, match="case x has no labels"):
        fingerprint([Case("x", np.zeros((1, 1, 1, 1), np.float32), None, Grid((1, 1, 1), np.eye(4)))])


def test_the_draw_is_numpys_to_the_last_bit() -> None:
    """Means, deviations and interpolated percentiles of the pool as numpy computes them, float64 once a case has no foreground."""
    rng = np.random.default_rng(4)
    for n in (1, 2, 7, 999, 30_000):
        for empty in (False, True):
            parts = [rng.normal(40, 9, 300).astype(np.float32), rng.integers(0, 80, 500).astype(np.float32)]
            parts += [np.zeros(0, np.float32)] if empty else []
            cases = [case(str(index), part, 2) for index, part in enumerate(parts)]
            facts = fingerprint(cases, sampled=True, n_samples=n * len(cases)).intensities
            pools: list[list[np.ndarray]] = [[], []]
            for part in parts:
                generator = np.random.RandomState(1234)
                for channel, pool in enumerate(pools):
                    pool.append(generator.choice(part * (channel + 1), n) if len(part) else np.array([]))
            for channel, pool in enumerate(pools):
                drawn = np.concatenate(pool)
                assert drawn.dtype == (np.float64 if empty else np.float32)
                low, median, high = np.percentile(drawn, (0.5, 50.0, 99.5))
                expected = {"max": drawn.max(), "mean": drawn.mean(), "median": median, "min": drawn.min()}
                expected |= {"percentile_00_5": low, "percentile_99_5": high, "std": drawn.std()}
                assert facts[str(channel)] == {name: float(value) for name, value in expected.items()}
                assert list(facts[str(channel)]) == sorted(expected)


def test_threads_change_nothing() -> None:
    rng = np.random.default_rng(5)
    facts = [case_facts(case(str(n), rng.normal(40, 9, n), 2)) for n in (40, 200, 511)]
    assert combine(facts, True, 9000, workers=3) == combine(facts, True, 9000)


def test_black_images_single_slices_and_the_ignore_label() -> None:
    """An image of zeros keeps its full box; a 2D image is one slice; an ignore label (the highest) counts as foreground."""
    affine = np.diag([999.0, 1, 1, 1])
    labels = np.array([[[0, 1, 2], [0, 0, 2]]], np.int16)
    black = Case("black", np.zeros((1, 1, 2, 3), np.float32), labels, Grid((1, 2, 3), affine))
    shown = Case("shown", np.array([[[[0, 5, 6], [0, 7, 8]]]], np.float32), labels, Grid((1, 2, 3), affine))
    found = fingerprint([black, shown])
    assert found.shapes_after_crop == ((1, 2, 3), (1, 2, 2))
    assert found.spacings == ((999.0, 1.0, 1.0),) * 2
    assert found.median_relative_size == pytest.approx((1 + 4 / 6) / 2)
    # voxels 5, 6 and 8 of one case and three zeros of the other
    assert found.intensities["0"]["mean"] == pytest.approx((5 + 6 + 8) / 6)


def test_files(tmp_path: Path) -> None:
    found = fingerprint([case("a", np.arange(5.0)), case("b", np.arange(9.0))])
    path = tmp_path / "dataset_fingerprint.json"
    path.write_text(found.to_text())
    assert read_fingerprint(path, 2) == found
    assert found.to_text().startswith('{\n    "foreground_intensity_properties_per_channel": {\n        "0": {\n            "max": 8.0,')
    with pytest.raises(InputError, match="was taken of 2 cases, but there are 3"):
        read_fingerprint(path, 3)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_fingerprint(path, 2)
