"""Boards on paper and on screen: the same bytes every time, nothing cut, and no mean alone."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest

from ichbench.board.render import COLUMNS, TEXT_WIDTH, Board, board_csv, board_markdown, board_text, build_board, write_board
from ichbench.errors import InputError
from ichbench.scoring.score import Score, score_masks
from ichbench.scoring.tables import read_scores, write_scores

INF, NAN = math.inf, math.nan
LONG = "ceiling_roundtrip_downsample_random_and_more"


def study(n: int = 13, arms: tuple[str, ...] = ("base", "window", "floor", LONG)) -> list[Score]:
    """Rows like those of a real study: base with two seeds, one arm with one, untrained arms, an empty prediction."""
    rng = np.random.default_rng(0)
    easy = rng.beta(6, 2, n)
    seeds = {"base": ("0", "1"), "window": ("0",)}
    rows = []
    for arm in arms:
        for seed in seeds.get(arm, ("-",)):
            for i in range(n):
                empty = arm == "floor" and i == 3
                dice = 0.0 if empty else float(np.clip(easy[i] + rng.normal(0, 0.02), 0, 1))
                values = {"dice": dice, "nsd": 0.8 * dice, "rvd": 1 - dice, "hd": INF if empty else 100 - 90 * dice}
                values["hd95"] = INF if empty else 60 - 50 * dice
                values |= {"missing": 0.0, "empty_prediction": float(empty), "empty_reference": 0.0}
                rows += [Score(arm, "-", seed, f"c{i:03d}", metric, value) for metric, value in values.items()]
    return rows


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_the_declared_columns_and_reads_back_exactly() -> None:
    board = build_board(study())
    text = board_csv(board.summaries, board.effects)
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert "\r" not in text
    lines = parsed(text)
    assert len(lines) == 4 * 5
    effects = {(effect.arm, effect.metric): effect for effect in board.effects}
    for line, summary in zip(lines, board.summaries, strict=True):
        assert (line["arm"], line["metric"]) == (summary.arm, summary.metric)
        for name in ("mean", "lower", "upper", "median", "sd"):
            assert repr(float(line[name])) == line[name] == repr(getattr(summary, name))
        assert int(line["n"]) == summary.n == 13
        effect = effects.get((summary.arm, summary.metric))
        assert line["difference"] == (repr(effect.difference) if effect else "")
        assert line["verdict"] == (effect.verdict if effect else "")
    floor = next(line for line in lines if (line["arm"], line["metric"]) == ("floor", "hd"))
    assert (floor["mean"], floor["sd"], floor["n_infinite"], floor["n_empty_prediction"]) == ("inf", "nan", "1", "1")


def test_boards_are_rebuilt_byte_for_byte_from_the_file(tmp_path: Path) -> None:
    rows = study()
    write_scores(tmp_path / "scores.csv", rows)
    first = write_board(build_board(rows), tmp_path / "a")
    second = write_board(build_board(read_scores(tmp_path / "scores.csv")), tmp_path / "b" / "deep")
    assert [path.name for path in first] == ["board.csv", "board.md"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes().endswith(b"\n")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["board.csv", "board.md"]  # no temporary file stays


def test_writing_replaces_an_older_board(tmp_path: Path) -> None:
    write_board(build_board(study()), tmp_path)
    path, _ = write_board(build_board(study(n=7)), tmp_path)
    assert parsed(path.read_text())[0]["n"] == "7"


def test_the_base_comes_first_and_another_order_can_be_given() -> None:
    rows = study(arms=("base", "a", "z"))
    assert build_board(rows).arms == ("base", "a", "z")
    assert build_board(rows, base="z").arms == ("z", "a", "base")
    assert build_board(rows, base=None).arms == ("a", "base", "z")
    board = build_board(rows, arm_order=("z", "base", "a"))
    assert board.arms == ("z", "base", "a")
    assert list(dict.fromkeys(effect.arm for effect in board.effects)) == ["z", "a"]
    for wrong in (("z", "base"), ("z", "base", "a", "a"), ("z", "base", "q")):
        with pytest.raises(InputError, match="arm_order"):
            build_board(rows, arm_order=wrong)


def test_markdown_has_one_row_per_arm_and_no_mean_without_interval_and_n() -> None:
    board = build_board(study())
    table = [line for line in board_markdown(board).splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table]
    assert {len(row) for row in cells} == {3 + 5 + 2}
    summary = board.summaries[0]
    assert cells[2][3].strip() == f"{summary.mean:.3f} [{summary.lower:.3f}, {summary.upper:.3f}]"
    assert [row[1].strip() for row in cells[2:]] == ["13"] * 4
    floor = next(row for row in cells if row[0].strip() == "floor")
    assert floor[2].strip() == "1"
    assert re.fullmatch(r"inf \(1\) \[\d+\.\d, inf\] median \d+\.\d \[\d+\.\d, \d+\.\d\]", floor[6].strip())


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    rows = [Score(arm, "-", "-", f"c{i}", "dice", 0.5 - shift) for arm, shift in (("base", 0.0), ("arm", 1e-5)) for i in range(8)]
    assert "| 0.000 [0.000, 0.000] | worse |" in board_markdown(build_board(rows))
    text = board_text(build_board(rows))
    assert "0.000" in text
    assert "-0.000" not in text


def test_names_cannot_break_the_markdown_table() -> None:
    table = board_markdown(build_board(study(arms=("base", "a|b_*[x]")))).splitlines()
    assert table[3].startswith(r"| a\|b\_\*\[x\] | 13 |")


@pytest.mark.parametrize("n", [2, 13, 130])
@pytest.mark.parametrize("metrics", [("dice", "nsd", "rvd", "hd", "hd95"), ("hd", "hd95", "dice", "rvd", "nsd")])
def test_text_fits_the_terminal_and_cuts_no_number(n: int, metrics: tuple[str, ...]) -> None:
    board = build_board(study(n), metrics=metrics)
    text = board_text(board)
    assert max(map(len, text.splitlines())) <= TEXT_WIDTH
    assert text.isascii()  # a console without UTF-8 must be able to print it
    assert "\x1b" not in text
    for summary in board.summaries:
        digits = 1 if summary.metric in ("hd", "hd95") else 3
        assert f"[{summary.lower:.{digits}f}, {summary.upper:.{digits}f}]" in text
    for effect in board.effects:
        if effect.metric in metrics[:2] and effect.metric in ("dice", "nsd"):
            assert f"{effect.n_pairs}  {effect.verdict}" in text
    starts = [line[:12] for line in text.splitlines()]
    assert starts.count(LONG[:12]) == 2  # folded over several lines, in both tables


def test_footnotes_say_what_a_reader_must_know() -> None:
    few, many = board_text(build_board(study(13))), board_text(build_board(study(30, arms=("base", "other"))))
    assert "n is as low as 13: below 30 cases intervals are rough" in few
    assert "rough" not in many
    assert "window*" in few
    assert "one training seed only" in few
    assert "base*" not in few  # two seeds
    assert "floor*" not in few  # not trained
    assert "one training seed only" not in many
    assert "inf (1)" in few
    assert "inf (k): k cases" in few
    assert "inf (k)" not in many
    assert "Holm over the arms" in few
    assert "fewer than 6 pairs" in board_text(build_board(study(5)))
    assert "fewer than 6 pairs" not in few
    # 13 cases, but HD is infinite in all of them for both arms, so there is not one pair
    endless = [row._replace(value=INF) if row.metric == "hd" else row for row in study(13, arms=("base", "other"))]
    assert "fewer than 6 pairs" in board_text(build_board(endless))


def test_an_undefined_metric_shows_its_own_n() -> None:
    rows = [row._replace(value=NAN) if (row.metric, row.case) == ("nsd", "c001") else row for row in study(arms=("base", "other"))]
    board = build_board(rows)
    assert " n=12" in board_text(board)
    assert " n=12 [" in board_markdown(board)
    assert "n=k" in board_text(board)


def test_missing_predictions_and_unknown_emptiness_are_visible() -> None:
    rows = [
        row._replace(value=1.0) if row.metric in ("missing", "empty_prediction") and (row.arm, row.case) == ("floor", "c003") else row
        for row in study()
    ]
    assert "1 (1 missing)" in board_markdown(build_board(rows))
    bare = [row for row in rows if row.metric not in ("missing", "empty_prediction", "empty_reference")]
    board = build_board(bare)
    assert "empty ?" in board_text(board)
    assert parsed(board_csv(board.summaries, board.effects))[0]["n_missing"] == ""


def test_a_board_without_a_base_shows_no_difference() -> None:
    board = build_board(study(), base=None)
    assert board.effects == ()
    assert "difference" not in board_text(board)
    assert "verdict" not in board_markdown(board)
    assert parsed(board_csv(board.summaries, board.effects))[0]["difference"] == ""


def test_arms_with_different_cases_are_refused_even_without_a_base() -> None:
    rows = [row for row in study(arms=("a", "b")) if (row.arm, row.case) != ("b", "c002")]
    with pytest.raises(InputError, match="only 'a' has c002"):
        build_board(rows, base=None)


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(InputError, match="no arm 'base'"):
        build_board(study(arms=("a", "b")))


def test_a_single_arm_that_is_the_base() -> None:
    board = build_board(study(arms=("base",)))
    assert isinstance(board, Board)
    assert board.effects == ()
    assert "base" in board_text(board)


def test_from_masks_to_board() -> None:
    # cubes of side 4 to 10 against the same cube shifted by one voxel: Dice is (side - 1) / side
    rows = []
    for side in range(4, 11):
        reference, shifted = np.zeros((2, 14, 14, 14), bool)
        reference[1 : 1 + side, 1 : 1 + side, 1 : 1 + side] = True
        shifted[1 : 1 + side, 1 : 1 + side, 2 : 2 + side] = True
        for arm, mask in (("base", shifted), ("perfect", reference)):
            found = score_masks(reference, mask, (5.0, 1.0, 1.0), "strict")
            rows += [Score(arm, "-", "-", f"side{side:02d}", metric, value) for metric, value in found.items()]
    board = build_board(rows)
    dice = next(summary for summary in board.summaries if (summary.arm, summary.metric) == ("base", "dice"))
    assert dice.mean == pytest.approx(np.mean([(side - 1) / side for side in range(4, 11)]))
    verdicts = {effect.metric: effect.verdict for effect in board.effects}
    assert verdicts == {"dice": "better", "nsd": "better", "rvd": "not separable", "hd": "better", "hd95": "better"}


def test_real_algorithms_as_arms(shared_data: Path) -> None:
    with (shared_data / "rankings" / "masilab_tbi_nih_vu_per_case.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    rows = []
    for line in table:
        empty = float(line["thresholded volume(mm)"]) == 0
        values = {"dice": float(line["dice"]), "missing": 0.0, "empty_prediction": float(empty), "empty_reference": 0.0}
        rows += [Score(line["algorithm"], "-", "-", line["case"], metric, value) for metric, value in values.items()]
    board = build_board(rows, base="msl_full")
    assert board.metrics == ("dice",)
    assert len(board.arms) == 5
    assert all(summary.n == 63 for summary in board.summaries)
    text = board_text(board)
    assert "rough" not in text
    assert max(map(len, text.splitlines())) <= TEXT_WIDTH
