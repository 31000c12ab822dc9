"""What is shown: numbers with their counts, warnings, progress."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
from test_score import SPACING, box_mask

from ichbench.scoring import PROTOCOLS, Pair
from ichbench.scoring.folders import score_each
from ichbench.scoring.pairs import Scored, Settings
from ichbench.scoring.screen import Progress, _number, score_text, warnings_of


def scored(*names: str) -> list[Scored]:
    box, empty = box_mask(), np.zeros((8, 20, 20), dtype=bool)
    known = {
        "hit": (box, box),
        "shifted": (box, np.roll(box, 1, axis=2)),
        "miss": (box, empty),
        "calm": (empty, empty),
        "lost": (box, None),
    }
    return list(score_each([(name, *known[name], SPACING) for name in names], Settings(PROTOCOLS["instance2022"])))


def interval(metric: str, values: Sequence[float]) -> tuple[float, float]:
    return float(len(metric)), float(len(values))


def lines_of(text: str) -> dict[str, list[str]]:
    """First word -> the other cells of the line."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_one_row_per_metric_with_its_counts() -> None:
    text = score_text(scored("hit", "shifted", "miss", "calm", "lost"), interval)
    rows = lines_of(text)
    assert text.splitlines()[0] == "5 cases"
    assert list(rows)[2:] == ["dice", "nsd", "rvd", "hd", "hd95", "assd", "reference_ml", "predicted_ml"]
    # mean, interval, median, sd, min, max, n, finite, empty predictions, empty references, missing
    assert rows["nsd"] == ["0.4069", "[3.000,", "4.000]", "0.3139", "0.4939", "0", "1.000", "4", "4", "3", "1", "1"]
    # an infinite mean stands with the number of cases that cause it
    assert rows["hd"] == ["[mm]", "inf", "(3)", "[2.000,", "5.000]", "inf", "nan", "0", "inf", "5", "2", "3", "1", "1"]
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert len({len(line) for line in text.splitlines()[2:]}) == 1


def test_the_numbers_are_those_of_the_aggregate() -> None:
    rows = lines_of(score_text(scored("hit", "shifted"), interval))
    assert rows["dice"][0] == "0.8750"
    assert rows["dice"][4] == "0.1768"


def test_a_single_case_is_a_list_of_values() -> None:
    text = score_text(scored("shifted"), interval)
    rows = lines_of(text)
    assert text.splitlines()[0] == "case shifted"
    assert rows["nsd"] == ["0.6278"]
    assert rows["hd"] == ["[mm]", "0.4500"]
    assert rows["missing"] == ["0"]
    assert lines_of(score_text(scored("miss"), interval))["dice"] == ["3.125e-07"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (-0.0, "0"), (1.0, "1.000"), (0.05377, "0.05377"), (1.5e-9, "1.500e-09"), (35.274, "35.27"), (999.96, "1000"),
        (12345.6, "12346"), (2.5e12, "2.500e+12"), (-3.25, "-3.250"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers(value: float, shown: str) -> None:
    assert _number(value) == shown


def test_warnings_name_the_cases() -> None:
    found = warnings_of(scored("hit", "miss", "calm", "lost"), ["900.nii.gz"])
    assert found == [
        "1 of 4 cases have no prediction and are scored as empty: lost",
        "1 prediction(s) have no reference and are not scored: 900.nii.gz",
        "the mean of hd, hd95 is infinite because of 3 of 4 cases: miss, calm, lost",
        "the mean of assd is infinite because of 2 of 4 cases: miss, lost",
        "undefined (nan) in so many cases, which are not in the mean: nsd (1), rvd (1), assd (1)",
    ]
    assert warnings_of(scored("hit", "shifted"), []) == warnings_of(scored("miss"), []) == []
    many = warnings_of(scored("hit"), [f"{n}.nii.gz" for n in range(9)])
    assert many == ["9 prediction(s) have no reference and are not scored: 0.nii.gz, 1.nii.gz, 2.nii.gz, 3.nii.gz, 4.nii.gz and 4 more"]


def test_notes_of_the_reader_are_shown_once() -> None:
    (hit,) = scored("hit")
    notes = tuple(f"note {n}" for n in range(7))
    every = [Scored(hit.case, None, None, hit.rows, {}, notes), Scored("other", None, None, (), {}, notes[:2])]
    assert warnings_of(every, []) == [*notes[:5], "and 2 more like these"]


def test_images_without_a_head_are_one_warning() -> None:
    """Labels given as the CTs, and an image of zeros: the check of the head had nothing to check."""
    box = box_mask((20, 60, 60))
    head = np.full((20, 60, 60), -1000)
    head[:, 5:55, 5:55] = 40
    images = {"a": head, "b": box.astype(np.int16), "c": 0 * head, "d": None}
    pairs = [Pair(name, box, box, (5.0, 2.0, 2.0), image) for name, image in images.items()]
    every = list(score_each(pairs, Settings(PROTOCOLS["instance2022"], anomalies=True)))
    assert warnings_of(every, [], ["d"]) == [
        "1 of 4 cases have no image, so nothing is said about their head: d",
        "no head was found in the image of 2 of 4 cases (first: b): voxels outside the head were not looked for there. "
        "Check that these are CTs in HU",
    ]
    assert warnings_of(every[:1], []) == []


@pytest.mark.parametrize(("total", "lines"), [(1, 0), (19, 0), (20, 10), (105, 10), (10_000, 10)])
def test_progress_in_a_pipe_is_a_line_for_every_tenth(total: int, lines: int) -> None:
    stream = io.StringIO()
    (hit,) = scored("hit")
    with Progress(total, stream) as progress:
        assert sum(1 for _ in progress.each([hit] * total)) == total
    said = stream.getvalue().splitlines()
    assert len(said) == lines
    if lines:
        assert said[-1] == f"scored {total} of {total} cases"
        assert said[0] == f"scored {math.ceil(total / 10)} of {total} cases"


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (hit,) = scored("hit")
    stream = Terminal()
    with Progress(30, stream) as progress:
        assert len(list(progress.each([hit] * 30))) == 30
    assert "scored" not in stream.getvalue()
    few = Terminal()
    with Progress(5, few) as progress:
        list(progress.each([hit] * 5))
    assert few.getvalue() == ""
