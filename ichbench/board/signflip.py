"""Sign-flip permutation tests of paired differences, Holm's adjustment, and the difference that such a test would find.

Without an effect arm and base could be swapped in any case, so every pattern of signs is equally likely: the test needs no
other assumption, and of studies without effects it calls at most 5 % separable, whatever the spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ichbench.board.intervals import FloatArray

#: Up to so many units every pattern of signs is looked at (2**13 up to the overall sign), above it FLIPS random ones.
EXACT_UNITS = 14
FLIPS = 9999
#: Level of every verdict, after Holm.
ALPHA = 0.05
#: How often a study should find a difference of the size called detectable.
POWER = 0.8
#: Columns that are tested at once; bounds the memory.
COLUMNS_AT_ONCE = 512
#: Units whose signs are held at once.
UNITS_AT_ONCE = 500


def sign_flip_p(sums: FloatArray) -> FloatArray:
    """Two-sided p (columns,) of the test that flips the sign of whole units; `sums` (units, columns) must be finite.

    Exact enumeration up to EXACT_UNITS units, else (1 + k) / (1 + FLIPS). A pattern counts when its absolute sum is at least the
    observed one; 1e-9 of the sum of absolute values is taken for rounding. 1.0 without units.
    """
    n_units, n_columns = sums.shape
    if n_units == 0:
        return np.ones(n_columns)
    found = np.ones(n_columns)
    # largest first: the result depends on the values, not on the order or the names of the cases
    sizes = -np.sort(-np.abs(sums), axis=0)
    scale = sizes.sum(axis=0)
    for start in range(0, n_columns, COLUMNS_AT_ONCE):
        part = slice(start, start + COLUMNS_AT_ONCE)
        observed = np.abs(sums[:, part].sum(axis=0)) - 1e-9 * scale[part]
        flipped = np.abs(_flipped(sizes[:, part]))
        count = (flipped >= observed).sum(axis=0)
        found[part] = count / len(flipped) if n_units <= EXACT_UNITS else (1 + count) / (1 + FLIPS)
    return found


def signed_ranks(differences: FloatArray) -> FloatArray:
    """Rank of each absolute difference (n,), ties averaged, with its sign; infinite differences rank highest, zeros stay zero."""
    from scipy.stats import rankdata

    return np.asarray(np.sign(differences) * rankdata(np.abs(differences)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p in the given order (Holm 1979): the family's error is at most alpha when p <= alpha is claimed. nan stays nan."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    running = 0.0
    for step, (p, index) in enumerate(known):
        running = max(running, min(1.0, p * (len(known) - step)))
        adjusted[index] = running
    return adjusted


def detectable(error: float, n_units: int, n_tests: int = 1) -> float:
    """Size of a true difference that is called separable with probability POWER, in the unit of `error`.

    error is the standard error of the difference; n_tests tests share ALPHA (Bonferroni, which is Holm's first step). By the t
    distribution: (t_{1 - alpha/2} + t_{power}) x error. inf where no sign-flip p of so few units can be small enough; nan without
    a finite error.
    """
    if n_units < 1 or 2.0 ** (1 - n_units) * n_tests > ALPHA:
        return math.inf
    if not math.isfinite(error):
        return math.nan
    return _detectable_factor(n_units, n_tests) * error


@lru_cache(maxsize=1024)
def _detectable_factor(n_units: int, n_tests: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n_units - 1, 1 - ALPHA / n_tests / 2) + stdtrit(n_units - 1, POWER))


def _flipped(sizes: FloatArray) -> FloatArray:
    """Sum over units of each pattern: (patterns, columns); blocks of units bound the memory."""
    n_units = len(sizes)
    if n_units <= UNITS_AT_ONCE:
        return np.asarray(_signs(n_units, 0) @ sizes)
    blocks = range(0, n_units, UNITS_AT_ONCE)
    found = np.zeros((FLIPS, sizes.shape[1]))
    for number, start in enumerate(blocks):
        part = sizes[start : start + UNITS_AT_ONCE]
        found += _signs(len(part), number, False) @ part
    return found


@lru_cache(maxsize=4)
def _signs(n_units: int, block: int, all_patterns: bool = True) -> FloatArray:
    """Patterns of signs (patterns, units): all there are (up to the overall sign) for few units, else FLIPS drawn ones."""
    if all_patterns and n_units <= EXACT_UNITS:
        bits = (np.arange(2 ** (n_units - 1))[:, None] >> np.arange(n_units)) & 1
        return np.asarray(1 - 2 * bits, dtype=np.float64)
    drawn = np.random.default_rng((n_units, block)).integers(0, 2, size=(FLIPS, n_units), dtype=np.int8)
    return np.asarray(1 - 2 * drawn, dtype=np.float64)
