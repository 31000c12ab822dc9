"""What changes from epoch to epoch: learning rate, moving average, when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


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


def should_stop(best: Best, epoch: int, patience_epochs: int, extended_at: int = 0) -> bool:
    """Have `patience_epochs` epochs passed since the best one (since the start, if there is none; since a finished training
    was extended, if that came later, with this as its next epoch)?"""
    return epoch - max(best.epoch, extended_at - 1) >= patience_epochs


@dataclass
class Position:
    """Where a training stands, weights and optimizer apart. It goes into checkpoints as JSON, which keeps every bit of a float.

    epoch, step   the next epoch, and the steps of it that are done; `loss_sum` over those
    average       moving average of the pseudo-Dice; `best` of it; `pseudo_dice` of the last epoch, one per class (None: unseen)
    log           the log's lines, so that a log file that was torn or lost can be written again
    seconds       in all attempts; `epoch_seconds` and `wait_seconds` (for batches) of the epoch at work
    stopped       by early stopping
    extended_at   the next epoch when a finished training was last given more
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    average: float | None = None
    best: Best = Best()
    pseudo_dice: tuple[float | None, ...] = ()
    log: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    wait_seconds: float = 0.0
    stopped: bool = False
    extended_at: int = 0

    def to_json(self) -> dict[str, Any]:
        """Every field; a best value that does not exist yet is null."""
        best = {"value": self.best.value if self.best.epoch >= 0 else None, "epoch": self.best.epoch}
        return {**vars(self), "best": best, "pseudo_dice": list(self.pseudo_dice), "log": list(self.log)}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Position:
        """What `to_json` made."""
        best = table["best"]
        # a field that an older version did not write has its default
        known = {name: table[name] for name in cls.__dataclass_fields__ if name in table}
        known["best"] = Best() if best["value"] is None else Best(best["value"], best["epoch"])
        return cls(**known | {"pseudo_dice": tuple(table["pseudo_dice"])})
