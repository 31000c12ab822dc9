"""Learning curves: order, slopes per doubling, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ichbench.board.curves import learning_curves
from ichbench.board.summary import case_table
from ichbench.errors import InputError
from ichbench.scoring.score import Score


def study(**arms: list[float]) -> list[Score]:
    return [Score(arm, "-", "0", f"c{i:02d}", "dice", value) for arm, values in arms.items() for i, value in enumerate(values)]


def test_the_slope_is_what_a_doubling_brings() -> None:
    rng = np.random.default_rng(0)
    level, gain = rng.uniform(0.2, 0.4, 12), rng.normal(0.05, 0.01, 12)
    sizes = {"some": 10, "all": 80, "few": 5}
    rows = study(**{arm: (level + gain * math.log2(count)).tolist() for arm, count in sizes.items()})
    curve = learning_curves(case_table(rows, ("dice",)), sizes)[0]
    assert [(count, one.arm) for count, one in curve.points] == [(5, "few"), (10, "some"), (80, "all")]
    assert curve.per_doubling.difference == pytest.approx(gain.mean())
    assert curve.per_doubling.lower < gain.mean() < curve.per_doubling.upper
    assert (curve.per_doubling.n_pairs, curve.per_doubling.p) == (12, 2 / 2**12)


def test_slopes_agree_with_polyfit_and_skip_infinite_cases() -> None:
    rng = np.random.default_rng(1)
    sizes = {"a": 3, "b": 7, "c": 30, "d": 24}
    values = {arm: rng.random(8) for arm in sizes}
    values["b"][2] = math.inf
    curve = learning_curves(case_table(study(**{arm: column.tolist() for arm, column in values.items()}), ("dice",)), sizes)[0]
    doublings = np.log2(list(sizes.values()))
    slopes = [np.polyfit(doublings, [values[arm][i] for arm in sizes], 1)[0] for i in range(8) if i != 2]
    assert curve.per_doubling.difference == pytest.approx(np.mean(slopes))
    assert curve.per_doubling.n_left_out == 1


def test_what_is_no_curve() -> None:
    table = case_table(study(a=[0.1, 0.2], b=[0.2, 0.3]), ("dice",))
    for sizes in ({"a": 5}, {"a": 5, "b": 5}, {"a": 0, "b": 5}):
        with pytest.raises(InputError, match="two different numbers"):
            learning_curves(table, sizes)
    with pytest.raises(InputError, match="no scores of c"):
        learning_curves(table, {"a": 5, "c": 6})
    with pytest.raises(InputError, match="same cases"):
        learning_curves(case_table(study(a=[0.1, 0.2], b=[0.2]), ("dice",)), {"a": 5, "b": 6})
