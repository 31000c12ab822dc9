"""The schedule against nnU-Net's printed learning rates and closed forms."""

from __future__ import annotations

import math

import pytest

from ichbench.training.schedule import Best, Position, moving_average, poly_learning_rate, should_stop


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.01), (1, 0.009990999549834914), (500, 0.005358867312681466), (999, 1.995262314968881e-05)]
)
def test_poly_golden(epoch: int, rate: float) -> None:
    """Printed by nnU-Net 2.8.1 (facts, golden/misc.out)."""
    assert poly_learning_rate(epoch, 1000, 0.01, 0.9) == pytest.approx(rate, rel=1e-12)


def test_exponent_zero_is_constant() -> None:
    assert {poly_learning_rate(e, 10, 0.5, 0.0) for e in range(10)} == {0.5}


def test_moving_average() -> None:
    """A constant 1 after a first 0: after n steps 1 - 0.9^n."""
    value = moving_average(None, 0.0, 0.9)
    for n in range(1, 6):
        value = moving_average(value, 1.0, 0.9)
        assert value == pytest.approx(1 - 0.9**n)
    assert moving_average(None, 0.7, 0.9) == 0.7
    assert moving_average(0.4, math.nan, 0.9) == 0.4
    assert moving_average(None, math.nan, 0.9) is None
    assert moving_average(0.4, 0.8, 0.0) == 0.8


def test_best_rises_strictly_and_patience_counts_from_it() -> None:
    best = Best()
    for epoch, value in enumerate([0.1, 0.3, 0.3, 0.2]):
        best = best.after(epoch, value)
    assert best == Best(0.3, 1)
    assert best.after(4, None) is best
    assert not should_stop(best, 3, 3)
    assert should_stop(best, 4, 3)
    assert [should_stop(Best(), epoch, 2) for epoch in range(3)] == [False, True, True]
    # extended with epoch 9 as its next: three epochs of patience from there on
    assert [should_stop(best, epoch, 3, 9) for epoch in (9, 10, 11, 12)] == [False, False, True, True]
    assert not should_stop(Best(0.5, 10), 12, 3, 9)


def test_a_position_of_an_older_version_is_read() -> None:
    table = Position(epoch=3, average=0.5, best=Best(0.5, 2)).to_json()
    del table["extended_at"]
    assert Position.from_json(table) == Position(epoch=3, average=0.5, best=Best(0.5, 2))
