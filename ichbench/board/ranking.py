"""Ranking schemes over several metrics: arrays in, ranks out. No rows, no names of arms, no text.

Axes are in the names: m metrics, a arms, c cases, r resamples. A resample is a row of weights, how often each case was drawn;
the ranking itself is the resample in which every case was drawn once. Lower is better everywhere (`cube.prepare` turns the rest).

Sums over cases are exact: each arm's values are rounded to whole multiples of a power of two so small that all sums stay below
2**53 (a part in 2**46 of the arm's largest value for 100 cases). So the order of cases and arms, the number of threads and the machine
change no rank, and 0 times inf never happens. Averages that agree to 40 bits (12 digits) tie: 0.1 + 0.2 is 0.3 on a board.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ichbench.board.cube import FloatArray, Prepared
from ichbench.board.wins import wins_mra
from ichbench.errors import InputError

Ties = Literal["min", "average", "max", "dense"]
TIES: tuple[Ties, ...] = ("min", "average", "max", "dense")
#: Averages that agree to this many bits tie.
TIE_BITS = 40
#: How many numbers are sorted at once; keeps the work inside the processor's cache.
BLOCK = 1 << 17


@dataclass(frozen=True, eq=False)
class Ranked:
    """One ranking per resample.

    values_mra    what is ranked per metric, lower is better: a mean or median over cases, a mean rank over cases, minus the wins
    by_metric_mra the ranks in each metric, ties by the chosen rule
    combined_ra   the mean over metrics that decides
    ranks_ra      the final ranks
    """

    values_mra: FloatArray
    by_metric_mra: FloatArray
    combined_ra: FloatArray
    ranks_ra: FloatArray


Order = Callable[[Prepared, FloatArray, Ties], tuple[FloatArray, FloatArray, FloatArray]]


@dataclass(frozen=True)
class Scheme:
    """A way to rank. `metrics` are those it prescribes (None: any), `ties` its default, `most_arms` its limit."""

    name: str
    text: str
    order: Order
    ties: Ties = "min"
    metrics: tuple[str, ...] | None = None
    most_arms: int | None = None


def rank_last(values: FloatArray, ties: Ties) -> FloatArray:
    """Ranks along the last axis, 1 for the lowest. inf ties with inf; nan takes the last place, the number of columns, whatever the rule.

    min: 1, 2, 2, 4; average: 1, 2.5, 2.5, 4; max: 1, 3, 3, 4; dense: 1, 2, 2, 3.
    """
    n = values.shape[-1]
    flat = np.ascontiguousarray(values, dtype=np.float64).reshape(-1, n)
    ranks = np.empty(flat.shape)
    step = max(1, BLOCK // max(n, 1))
    for start in range(0, len(flat), step):
        ranks[start : start + step] = _ranks_of_block(flat[start : start + step], ties)
    return ranks.reshape(values.shape)


def _ranks_of_block(block: FloatArray, ties: Ties) -> FloatArray:
    n = block.shape[1]
    order = np.argsort(block, axis=1)
    ordered = np.take_along_axis(block, order, axis=1)
    starts = np.ones(block.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    place = np.arange(n, dtype=np.int32)
    if ties == "dense":
        ranks = np.cumsum(starts, axis=1, dtype=np.float64)
    else:
        first = np.maximum.accumulate(np.where(starts, place, np.int32(0)), axis=1)
        if ties == "min":
            ranks = first + 1.0
        else:
            ends = np.ones(block.shape, dtype=bool)
            ends[:, :-1] = starts[:, 1:]
            last = np.minimum.accumulate(np.where(ends, place, np.int32(n))[:, ::-1], axis=1)[:, ::-1]
            ranks = last + 1.0 if ties == "max" else (first + last) / 2.0 + 1.0
    found = np.empty(block.shape)
    np.put_along_axis(found, order, ranks, axis=1)
    found[np.isnan(block)] = n
    return found


def case_ranks_mca(prepared: Prepared, ties: Ties) -> FloatArray:
    """The rank of each arm within each case and metric, among the arms that count there; nan where one does not."""
    kept = prepared.kept_mac.transpose(0, 2, 1)
    values = np.where(kept & ~prepared.worst_mac.transpose(0, 2, 1), prepared.lower_mac.transpose(0, 2, 1), np.nan)
    ranks = rank_last(values, ties)
    if not kept.all():
        # those in last place take the last of the places that are given
        present = np.broadcast_to(kept.sum(axis=2, keepdims=True), ranks.shape)
        ranks = np.where(kept, np.where(np.isnan(values), present, ranks), np.nan)
    return ranks


def weighted_sums(values_ac: FloatArray, weights_rc: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Exact sums over cases of finite values: whole numbers (r, a), and the exponent of two (a,) that they are multiples of."""
    most = float(weights_rc.sum(axis=1).max(initial=1.0))
    largest = np.abs(values_ac).max(axis=1, initial=0.0)
    exponent = np.frexp(largest)[1] + np.frexp(most)[1] - 53
    whole = np.rint(np.ldexp(values_ac, -exponent[:, None]))
    return weights_rc @ whole.T, exponent


def tied_by_bits(values: FloatArray) -> FloatArray:
    """Values rounded to `TIE_BITS` significant bits; inf and nan stay."""
    part, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.rint(np.ldexp(part, TIE_BITS)), exponent - TIE_BITS))


def mean_ra(values_ac: FloatArray, counts_ac: FloatArray | None, weights_rc: FloatArray) -> FloatArray:
    """Weighted means (r, a) of finite values over the cells that count (`counts_ac` 0 or 1; None: all); nan where none does."""
    sums, exponent = weighted_sums(values_ac, weights_rc)
    totals = weights_rc.sum(axis=1, keepdims=True) if counts_ac is None else weights_rc @ counts_ac.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return tied_by_bits(np.ldexp(sums / totals, exponent))


def _means_mra(prepared: Prepared, weights_rc: FloatArray) -> FloatArray:
    """Means over cases; inf where an infinite case was drawn, nan (last place) where a worst one was or nothing is left."""
    found = np.empty((len(prepared.metrics), len(weights_rc), len(prepared.arms)))
    for m in range(len(prepared.metrics)):
        lower, kept, worst = prepared.lower_mac[m], prepared.kept_mac[m], prepared.worst_mac[m]
        unending = np.isposinf(lower)
        found[m] = mean_ra(np.where(unending, 0.0, lower), None if kept.all() else kept.astype(float), weights_rc)
        for cells, becomes in ((unending, np.inf), (worst, np.nan)):
            hit = cells.any(axis=1)
            if hit.any():
                drawn = weights_rc @ cells[hit].astype(float).T > 0
                found[m][:, hit] = np.where(drawn, becomes, found[m][:, hit])
    return found


def _medians_mra(prepared: Prepared, weights_rc: FloatArray) -> FloatArray:
    """Medians over cases, the middle two averaged; inf where one of those is. A worst cell counts as worse than inf."""
    found = np.empty((len(prepared.metrics), len(weights_rc), len(prepared.arms)))
    for m in range(len(prepared.metrics)):
        for a in range(len(prepared.arms)):
            kept = prepared.kept_mac[m, a]
            values = np.where(prepared.worst_mac[m, a], np.nan, prepared.lower_mac[m, a])[kept]
            order = np.argsort(values, kind="stable")  # nan, the worst, comes last
            cumulated = np.cumsum(weights_rc[:, kept][:, order], axis=1)
            total = cumulated[:, -1] if cumulated.shape[1] else np.zeros(len(weights_rc))
            if not len(values):
                found[m, :, a] = np.nan
                continue
            ordered = values[order]
            low = ordered[np.minimum((cumulated < ((total + 1) // 2)[:, None]).sum(axis=1), len(values) - 1)]
            high = ordered[np.minimum((cumulated < (total // 2 + 1)[:, None]).sum(axis=1), len(values) - 1)]
            # halves first: the sum of two large numbers may overflow; equal neighbours must stay exactly that
            found[m, :, a] = np.where(total > 0, np.where(low == high, low, low / 2 + high / 2), np.nan)
    return tied_by_bits(found)


def _mean_then_rank(prepared: Prepared, weights_rc: FloatArray, ties: Ties) -> tuple[FloatArray, FloatArray, FloatArray]:
    return _ranked_by_metric(_means_mra(prepared, weights_rc), ties)


def _median_then_rank(prepared: Prepared, weights_rc: FloatArray, ties: Ties) -> tuple[FloatArray, FloatArray, FloatArray]:
    return _ranked_by_metric(_medians_mra(prepared, weights_rc), ties)


def _test_then_rank(prepared: Prepared, weights_rc: FloatArray, ties: Ties) -> tuple[FloatArray, FloatArray, FloatArray]:
    return _ranked_by_metric(-wins_mra(prepared, weights_rc), ties)


def _ranked_by_metric(values_mra: FloatArray, ties: Ties) -> tuple[FloatArray, FloatArray, FloatArray]:
    by_metric = rank_last(values_mra, ties)
    # ranks are whole or half numbers, so their sum is exact
    return values_mra, by_metric, by_metric.sum(axis=0) / len(by_metric)


def _rank_then_mean(prepared: Prepared, weights_rc: FloatArray, ties: Ties) -> tuple[FloatArray, FloatArray, FloatArray]:
    ranks_mca = case_ranks_mca(prepared, ties)
    n_arms = len(prepared.arms)
    values = np.empty((len(ranks_mca), len(weights_rc), n_arms))
    for m, ranks_ca in enumerate(ranks_mca):
        kept = ~np.isnan(ranks_ca)
        if kept.all():  # whole and half numbers: exact as they are
            values[m] = (weights_rc @ ranks_ca) / weights_rc.sum(axis=1, keepdims=True)
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (weights_rc @ np.where(kept, ranks_ca, 0.0)) / (weights_rc @ kept.astype(float))
        values[m] = np.where(np.isnan(means), n_arms, means)
    # sums of fractions are rounded, so that equal averages tie
    return tied_by_bits(values), rank_last(tied_by_bits(values), ties), tied_by_bits(values.sum(axis=0) / len(values))


INSTANCE_METRICS = ("dice", "hd", "rvd", "nsd")

#: Every scheme. instance2022 is inferred: it gives the published order, see leaderboard/instance2022.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "instance2022",
            "mean over cases, rank in each of Dice, HD, RVD and NSD, mean of the four ranks",
            _mean_then_rank,
            metrics=INSTANCE_METRICS,
        ),
        Scheme("mean-then-rank", "mean over cases, rank in each metric, mean of the ranks", _mean_then_rank),
        Scheme("median-then-rank", "median over cases, rank in each metric, mean of the ranks", _median_then_rank),
        Scheme("rank-then-mean", "rank within each case and metric, mean over cases, mean over metrics", _rank_then_mean),
        Scheme(
            "test-then-rank",
            "number of other arms beaten in a one-sided paired Wilcoxon test (Holm, 5 %), rank in each metric, mean of the ranks",
            _test_then_rank,
            most_arms=50,
        ),
    )
}


def get_scheme(name: str) -> Scheme:
    """InputError for a name that is not in SCHEMES."""
    if name not in SCHEMES:
        raise InputError(f"there is no ranking scheme {name!r}; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def rank_arms(
    prepared: Prepared, scheme: Scheme, ties: Ties | None = None, weights_rc: FloatArray | None = None, final_ties: Ties = "min"
) -> Ranked:
    """Rank the arms once for each row of weights (None: once, with every case counted once).

    `ties` is the rule within a metric (None: the scheme's own); equal means of ranks share the better place (`final_ties`).
    A single metric needs no second ranking: its ranks are the final ones. InputError: too many arms for the scheme.
    """
    if scheme.most_arms is not None and len(prepared.arms) > scheme.most_arms:
        raise InputError(f"{scheme.name} compares every pair and takes up to {scheme.most_arms} arms; there are {len(prepared.arms)}")
    weights = np.ones((1, len(prepared.cases))) if weights_rc is None else np.asarray(weights_rc, dtype=np.float64)
    values, by_metric, combined = scheme.order(prepared, weights, ties or scheme.ties)
    ranks = by_metric[0] if len(by_metric) == 1 else rank_last(combined, final_ties)
    return Ranked(values, by_metric, combined, ranks)


def ranks_of_means(values_ma: FloatArray, ties: Ties, final_ties: Ties = "min") -> tuple[FloatArray, FloatArray, FloatArray]:
    """Rank published means (metric, arm), lower better, inf exact: ranks by metric (m, a), their mean (a,), final ranks (a,)."""
    _, by_metric, combined = _ranked_by_metric(tied_by_bits(values_ma)[:, None, :], ties)
    final = by_metric[0] if len(by_metric) == 1 else rank_last(combined, final_ties)
    return by_metric[:, 0], combined[0], final[0]
