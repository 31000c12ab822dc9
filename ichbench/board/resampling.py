"""How far a ranking can be trusted: the whole scheme applied again to resamples of the cases.

Resamples draw cases with replacement, or whole groups of cases (patients) where those are given. Nothing is ranked by parts: holes,
ties, metrics and aggregation are what they were. The same seed gives the same resamples on every machine, whatever the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ichbench.board.cube import FloatArray, Prepared
from ichbench.board.ranking import Scheme, Ties, case_ranks_mca, rank_arms
from ichbench.board.summary import generator_for
from ichbench.board.wins import ALPHA, FEWEST_PAIRS, holm, two_sided_p
from ichbench.errors import InputError

DEFAULT_RESAMPLES = 1000
#: Share of the resamples between the ends of a rank interval.
LEVEL = 0.95
#: Numbers (metric x arm x resample) that one thread holds at once.
BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Stability:
    """What resampling says about a ranking.

    ranks_ra      the final ranks in each resample
    lower_a, upper_a  the middle 95 % of them (order statistics, outward)
    p_first_a     share of the resamples in which no other arm is better; shared first places count for each
    taus_r        Kendall's tau-b between the ranking and each resample; nan where all arms tie
    """

    ranks_ra: FloatArray
    lower_a: FloatArray
    upper_a: FloatArray
    p_first_a: FloatArray
    taus_r: FloatArray


@dataclass(frozen=True)
class Pair:
    """Two arms, the better one first by its mean rank over cases, and whether they can be told apart.

    p, p_holm  two-sided Wilcoxon signed-rank test over cases of the arms' mean ranks over metrics; adjusted for all pairs
    n          cases (groups, where those are given) in which the two differ
    """

    better: str
    worse: str
    n: int
    p: float
    p_holm: float
    separable: bool


def draw_weights(n_cases: int, resamples: int, seed: int = 0, groups: Sequence[str] | None = None) -> FloatArray:
    """How often each case is drawn, (resamples, n_cases). With `groups`, one name per case, whole groups are drawn.

    InputError for fewer than one resample and for groups that do not fit the cases.
    """
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; it must be at least 1, and 1000 or more for usable intervals")
    if groups is not None and len(groups) != n_cases:
        raise InputError(f"{len(groups)} groups for {n_cases} cases; give one for each case")
    names = sorted(set(groups)) if groups is not None else []
    n = len(names) if groups is not None else n_cases
    drawn = generator_for(seed, "ranking").integers(0, n, size=(resamples, n))
    counts = np.bincount((drawn + n * np.arange(resamples)[:, None]).ravel(), minlength=n * resamples).reshape(resamples, n).astype(float)
    if groups is None:
        return counts
    place = {name: index for index, name in enumerate(names)}
    return counts[:, [place[name] for name in groups]]


def resampled_ranks(
    prepared: Prepared, scheme: Scheme, weights_rc: FloatArray, ties: Ties | None = None, final_ties: Ties = "min", threads: int = 2
) -> FloatArray:
    """The final ranks (r, a) of every resample, in blocks so that memory stays small; NumPy works outside Python's lock."""
    step = max(1, min(-(-len(weights_rc) // threads), BLOCK // max(1, len(prepared.metrics) * len(prepared.arms))))
    blocks = [weights_rc[start : start + step] for start in range(0, len(weights_rc), step)]

    def ranks_of(block: FloatArray) -> FloatArray:
        return rank_arms(prepared, scheme, ties, block, final_ties).ranks_ra

    if len(blocks) == 1 or threads < 2:
        return np.concatenate([ranks_of(block) for block in blocks])
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(ranks_of, blocks)))


def stability(
    prepared: Prepared, scheme: Scheme, weights_rc: FloatArray, ties: Ties | None = None, final_ties: Ties = "min", threads: int = 2
) -> Stability:
    """Apply the whole scheme to every resample and sum up the ranks."""
    ranks = resampled_ranks(prepared, scheme, weights_rc, ties, final_ties, threads)
    whole = rank_arms(prepared, scheme, ties, None, final_ties).ranks_ra[0]
    ordered = np.sort(ranks, axis=0)
    outside = math.floor((1 - LEVEL) / 2 * len(ranks))
    return Stability(
        ranks_ra=ranks,
        lower_a=ordered[outside],
        upper_a=ordered[len(ranks) - 1 - outside],
        p_first_a=(ranks == ranks.min(axis=1, keepdims=True)).mean(axis=0),
        taus_r=kendall_tau_b(whole, ranks),
    )


def rank_counts(ranks_ra: FloatArray) -> list[dict[float, int]]:
    """For each arm: rank -> in how many resamples it had it (the areas of a blob plot)."""
    found = []
    for column in ranks_ra.T:
        values, counts = np.unique(column, return_counts=True)
        found.append({float(value): int(count) for value, count in zip(values, counts, strict=True)})
    return found


def separable_pairs(prepared: Prepared, groups: Sequence[str] | None = None, alpha: float = ALPHA) -> list[Pair]:
    """Every pair of arms, tested over cases on the mean over metrics of the ranks within each case; Holm over all pairs.

    With `groups` (one name per case) the cases of a group are averaged first: they are not independent, and a group counts once.

    One test per pair says whether the order of the two would hold with other cases, whatever the units of the metrics. With fewer than
    `wins.FEWEST_PAIRS` cases in which two arms differ they are never called separable.
    """
    ranks_mca = case_ranks_mca(prepared, "average")
    kept = ~np.isnan(ranks_mca)
    n_metrics = kept.sum(axis=0)
    mean_ca = np.where(n_metrics > 0, np.where(kept, ranks_mca, 0.0).sum(axis=0) / np.maximum(n_metrics, 1), np.nan)
    if groups is not None:
        members = np.array([[group == name for group in groups] for name in sorted(set(groups))], dtype=float)
        defined_ca = ~np.isnan(mean_ca)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_ca = (members @ np.where(defined_ca, mean_ca, 0.0)) / (members @ defined_ca)
    first, second = np.triu_indices(len(prepared.arms), k=1)
    if not len(first):
        return []
    differences = np.round((mean_ca[:, first] - mean_ca[:, second]).T, 9)  # thirds of a rank that are equal stay equal
    defined = ~np.isnan(differences)
    differences = np.where(defined, differences, 0.0)
    p, n = two_sided_p(differences, defined)
    adjusted = holm(p)
    pairs = []
    for k, (i, j) in enumerate(zip(first, second, strict=True)):
        ahead, behind = (i, j) if differences[k].sum() <= 0 else (j, i)
        told_apart = bool(adjusted[k] <= alpha and n[k] >= FEWEST_PAIRS)
        pairs.append(Pair(prepared.arms[ahead], prepared.arms[behind], int(n[k]), float(p[k]), float(adjusted[k]), told_apart))
    return pairs


def tau_between(rankings: dict[str, FloatArray]) -> dict[tuple[str, str], float]:
    """Kendall's tau-b between every two named rankings (a,)."""
    return {(one, two): float(kendall_tau_b(rankings[one], rankings[two][None])[0]) for one, two in combinations(rankings, 2)}


def kendall_tau_b(first_a: FloatArray, second_ra: FloatArray) -> FloatArray:
    """Kendall's tau-b between one ranking and each of several, (r,); nan where one of them ties everything.

    Knight's way, for all rows at once: order by the first, count the inversions of the second with a merge sort.
    """
    n = len(first_a)
    _, one = np.unique(first_a, return_inverse=True)
    _, flat = np.unique(second_ra, return_inverse=True)
    other = flat.reshape(second_ra.shape).astype(np.int64)
    width = int(other.max(initial=0)) + 1
    both = np.sort(one.astype(np.int64)[None] * width + other, axis=1)
    pairs = n * (n - 1) // 2
    tied_one = _tied_pairs(np.sort(one)[None].astype(np.int64))
    tied_other = _tied_pairs(np.sort(other, axis=1))
    discordant = _inversions(both % width)
    concordant = pairs - tied_one - tied_other + _tied_pairs(both) - discordant
    scale = np.sqrt((pairs - tied_one).astype(float) * (pairs - tied_other))
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = np.where(scale > 0, (concordant - discordant) / scale, np.nan)
    return np.clip(tau, -1.0, 1.0)


def _tied_pairs(ordered_rn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of equal values in each sorted row."""
    new = np.ones(ordered_rn.shape, dtype=bool)
    new[:, 1:] = ordered_rn[:, 1:] != ordered_rn[:, :-1]
    place = np.arange(ordered_rn.shape[1], dtype=np.int64)
    return np.asarray((place - np.maximum.accumulate(np.where(new, place, 0), axis=1)).sum(axis=1))


def _inversions(rows_rn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs (i, j), i < j, with row[i] > row[j], for each row: a merge sort from the bottom up."""
    r, n = rows_rn.shape
    size = 1 << max(0, (n - 1).bit_length())
    largest = int(rows_rn.max(initial=0)) + 1  # the padding at the end is larger than all and makes no inversions
    kind = np.int16 if largest < 2**15 else np.int64  # 16-bit numbers are sorted in linear time
    work = np.full((r, size), largest, dtype=kind)
    work[:, :n] = rows_rn
    found = np.zeros(r, dtype=np.int64)
    half = 1
    while half < size:
        blocks = work.reshape(r, -1, 2 * half)
        order = np.argsort(blocks, axis=2, kind="stable")
        # of the left half, those before the k-th of the right half are not larger than it
        places = np.where(order >= half, np.arange(2 * half), 0).sum(axis=2)
        found += (half * half + half * (half - 1) // 2 - places).sum(axis=1)
        work = np.take_along_axis(blocks, order, axis=2).reshape(r, size)
        half *= 2
    return found
