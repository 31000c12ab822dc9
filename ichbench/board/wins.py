"""Who beats whom: paired Wilcoxon signed-rank tests of every pair of arms, for the data itself and for each resample of its cases.

The p-value is the normal approximation with continuity correction and tie correction, zero differences left out: what R's
wilcox.test(paired=TRUE, exact=FALSE) and scipy.stats.wilcoxon(method="asymptotic", correction=True) give. Infinite values are ordered
exactly: against a finite one the difference is infinite (the largest), two infinite ones are equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ichbench.board.cube import FloatArray, Prepared

#: Level of the tests of the ranking by tests, after Holm's adjustment.
ALPHA = 0.05
#: Below this many pairs that differ no test says that two arms are separable: an exact two-sided one could not reach 5 %.
FEWEST_PAIRS = 6
#: From this many resamples on, matrix products are faster than sorting.
MANY_RESAMPLES = 16
#: Products of matrices up to this size stay on the thread that asks for them; BLAS threads that wait for each other cost ten times more.
SMALL_PRODUCT = 200_000


def wins_mra(prepared: Prepared, weights_rc: FloatArray, alpha: float = ALPHA) -> FloatArray:
    """How many other arms each arm beats in each metric: one-sided p at most `alpha`, Holm over all ordered pairs of the metric."""
    n_arms = len(prepared.arms)
    first, second = np.triu_indices(n_arms, k=1)
    wins = np.zeros((len(prepared.metrics), len(weights_rc), n_arms))
    if n_arms < 2:
        return wins
    winner_of = np.zeros((2 * len(first), n_arms))
    winner_of[np.arange(2 * len(first)), np.concatenate([first, second])] = 1.0
    for m in range(len(prepared.metrics)):
        z_less, z_greater, _ = signed_rank_z(*pair_differences(prepared, m, first, second), weights_rc)
        # lower is better, so the first of a pair wins where the differences are small
        p = np.concatenate([_lower_tail(z_less), _lower_tail(-z_greater)], axis=0)
        wins[m] = (holm(p, axis=0) <= alpha).T.astype(float) @ winner_of
    return wins


def pair_differences(prepared: Prepared, m: int, first: NDArray[np.intp], second: NDArray[np.intp]) -> tuple[FloatArray, NDArray[np.bool_]]:
    """first - second per pair and case, and where both count. A worst cell (0 in `lower_mac`) is worse than inf; two of them, and two inf,
    are equal."""
    lower, worst, kept = prepared.lower_mac[m], prepared.worst_mac[m], prepared.kept_mac[m]
    with np.errstate(invalid="ignore"):
        differences = lower[first] - lower[second]
    differences[np.isnan(differences)] = 0.0  # inf - inf
    differences = np.where(worst[first] & ~worst[second], np.inf, differences)
    differences = np.where(worst[second] & ~worst[first], -np.inf, differences)
    return differences, kept[first] & kept[second]


def signed_rank_z(
    differences_pc: FloatArray, kept_pc: NDArray[np.bool_], weights_rc: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Standard scores (p, r) of the positive signed-rank sum, corrected towards 0 for the alternatives less and greater, and n (p, r).

    A case drawn k times counts as k tied pairs. Where nothing differs the scores are 0 on the side of no evidence.
    """
    sums = _by_products if len(weights_rc) >= MANY_RESAMPLES else _by_sorting
    rank_sum, n, ties = sums(differences_pc, (differences_pc != 0) & kept_pc, weights_rc)
    variance = n * (n + 1) * (2 * n + 1) / 24 - ties / 48
    centred = rank_sum - n * (n + 1) / 4
    spread = np.sqrt(np.where(variance > 0, variance, np.inf))
    nothing = n == 0
    return (
        np.where(nothing, np.inf, (centred + 0.5) / spread),
        np.where(nothing, -np.inf, (centred - 0.5) / spread),
        n,
    )


def _by_sorting(differences_pc: FloatArray, counts: NDArray[np.bool_], weights_rc: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Sum of positive ranks, n, and the sum of t^3 - t over tied groups, each (p, r)."""
    size = np.where(counts, np.abs(differences_pc), -1.0)  # what does not count comes first, and never among infinite differences
    order = np.argsort(size, axis=1, kind="stable")
    sorted_size = np.take_along_axis(size, order, axis=1)
    weights_pcr = weights_rc.T[order] * np.take_along_axis(counts, order, axis=1)[:, :, None]
    cumulated = np.cumsum(weights_pcr, axis=1)
    n_cases = size.shape[1]
    place = np.arange(n_cases)
    new = np.ones(size.shape, dtype=bool)
    new[:, 1:] = sorted_size[:, 1:] != sorted_size[:, :-1]
    end = np.ones(size.shape, dtype=bool)
    end[:, :-1] = new[:, 1:]
    start_of = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    end_of = np.minimum.accumulate(np.where(end, place, n_cases)[:, ::-1], axis=1)[:, ::-1]
    upto = np.take_along_axis(cumulated, end_of[:, :, None], axis=1)
    before = np.where((start_of > 0)[:, :, None], np.take_along_axis(cumulated, np.maximum(start_of - 1, 0)[:, :, None], axis=1), 0.0)
    tied = upto - before
    positive = np.take_along_axis(differences_pc > 0, order, axis=1)
    rank_sum = ((before + upto + 1) / 2 * weights_pcr * positive[:, :, None]).sum(axis=1)
    return rank_sum, cumulated[:, -1], (weights_pcr * (tied * tied - 1)).sum(axis=1)


def _by_products(
    differences_pc: FloatArray, counts: NDArray[np.bool_], weights_rc: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The same numbers as `_by_sorting`, as quadratic forms in the weights: w' Q w, one matrix product per pair.

    The rank of case i is the weight of the smaller differences, plus half that of the equal ones, plus a half. All of it is whole and
    half numbers, which single precision holds exactly below 2**23.
    """
    kind = np.float32 if float(weights_rc.sum(axis=1).max()) ** 2 < 2**22 else np.float64
    weights = np.ascontiguousarray(weights_rc, dtype=kind)
    n = counts @ weights_rc.T
    rank_sum = np.empty(n.shape)
    ties = counts @ (weights_rc**3 - weights_rc).T  # where only a case that was drawn several times ties, with itself
    for pair, (differences, count) in enumerate(zip(differences_pc, counts, strict=True)):
        size = np.abs(differences)
        equal = (size[None, :] == size[:, None]) & count[None, :] & count[:, None]
        smaller = (size[None, :] < size[:, None]) & count[None, :]
        form = (smaller + 0.5 * equal)[(differences > 0) & count].astype(kind)
        positive = weights[:, (differences > 0) & count]
        ranks = np.empty(positive.shape, dtype=kind)
        step = max(1, SMALL_PRODUCT // max(1, form.size))
        for start in range(0, len(weights), step):
            np.matmul(weights[start : start + step], form.T, out=ranks[start : start + step])
        rank_sum[pair] = (ranks * positive).sum(axis=1, dtype=np.float64) + positive.sum(axis=1) / 2
        if equal.sum() > count.sum():
            tied = weights_rc @ equal.T.astype(float)
            ties[pair] = (weights_rc * (tied * tied - 1) * count).sum(axis=1)
    return rank_sum, n, ties


def two_sided_p(differences_pc: FloatArray, kept_pc: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Two-sided p per pair for the data as they are, and the number of pairs of values that differ."""
    weights = np.ones((1, differences_pc.shape[1]))
    z_less, z_greater, n = signed_rank_z(differences_pc, kept_pc, weights)
    p = np.minimum(1.0, 2 * np.minimum(_lower_tail(z_less), _lower_tail(-z_greater)))
    return p[:, 0], n[:, 0]


def holm(p: FloatArray, axis: int = 0) -> FloatArray:
    """Holm's adjusted p-values along an axis: never below p, never above 1."""
    moved = np.moveaxis(np.asarray(p, dtype=np.float64), axis, -1)
    n = moved.shape[-1]
    order = np.argsort(moved, axis=-1, kind="stable")
    raised = np.take_along_axis(moved, order, axis=-1) * np.arange(n, 0, -1)
    adjusted = np.empty(moved.shape)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(raised, axis=-1)), axis=-1)
    return np.moveaxis(adjusted, -1, axis)


def _lower_tail(z: FloatArray) -> FloatArray:
    from scipy.special import ndtr  # scipy starts slowly and only tests need it

    return np.asarray(ndtr(z))
