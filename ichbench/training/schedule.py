"""What changes from epoch to epoch: learning rate, moving average, when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass


def poly_learning_rate(epoch: int, epochs: int, first: float, exponent: float) -> float:
    """first (1 - epoch/epochs)^exponent; the rate of epoch 0 is `first`. Source: nnU-Net, facts section 8."""
    return float(first * (1 - epoch / epochs) ** exponent)


def moving_average(old: float | None, value: float, weight: float) -> float | None:
    """weight * old + (1 - weight) * value; the first value counts whole. A NaN (no foreground seen) changes nothing."""
    if math.isnan(value):
        return old
    return value if old is None else weight * old + (1 - weight) * value


@dataclass(frozen=True)
class Best:
    """The best value so far and the epoch that reached it (-1: none yet)."""

    value: float = -math.inf
    epoch: int = -1

    def after(self, epoch: int, value: float | None) -> Best:
        """Replaced when `value` is strictly higher."""
        return Best(value, epoch) if value is not None and value > self.value else self


def should_stop(best: Best, epoch: int, patience_epochs: int) -> bool:
    """Have `patience_epochs` epochs passed since the best one (or since the start, if there is none)?"""
    return epoch - best.epoch >= patience_epochs
