"""Score rows -> a ranking and everything that says how far it can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ichbench.board.cube import Cube, Prepared, Rule, better_of, cube_of_rows, prepare
from ichbench.board.ranking import INSTANCE_METRICS, SCHEMES, Ranked, Scheme, Ties, case_ranks_mca, get_scheme, rank_arms
from ichbench.board.resampling import DEFAULT_RESAMPLES, Pair, Stability, draw_weights, separable_pairs, stability, tau_between
from ichbench.board.summary import listed
from ichbench.errors import InputError

if TYPE_CHECKING:
    from ichbench.scoring.score import Score

#: Every pair of arms is tested up to this many arms.
MOST_ARMS_IN_PAIRS = 50


@dataclass(frozen=True, eq=False)
class RankBoard:
    """A ranking of arms.

    order         places of the arms in `prepared.arms`, best first
    by_scheme     scheme -> rank of each arm (a,), for every scheme that these arms and metrics allow
    taus          Kendall's tau-b between those
    pairs         None where there are too many arms to test every pair
    n_groups      groups (patients) that were resampled; None where cases were, or every group is one case
    """

    cube: Cube
    prepared: Prepared
    scheme: Scheme
    ties: Ties
    ranked: Ranked
    stability: Stability
    order: tuple[int, ...]
    by_scheme: Mapping[str, tuple[float, ...]]
    taus: Mapping[tuple[str, str], float]
    pairs: tuple[Pair, ...] | None
    n_groups: int | None
    missing: Rule
    infinite: Rule

    @property
    def resamples(self) -> int:
        return len(self.stability.ranks_ra)


def ranking_metrics(scheme: Scheme, present: Iterable[str], asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """The metrics to rank by: those asked for, those the scheme prescribes, or else those of INSTANCE that the rows have.

    InputError for metrics without a direction, twice, or that the scheme does not have.
    """
    have = set(present)
    if asked is not None:
        for metric in asked:
            better_of(metric)
        if len(set(asked)) != len(asked):
            raise InputError(f"--metrics names a metric twice: {', '.join(asked)}")
        if scheme.metrics is not None and set(asked) != set(scheme.metrics):
            raise InputError(
                f"{scheme.name} ranks by {', '.join(scheme.metrics)}; for others choose another scheme, such as mean-then-rank"
            )
        return tuple(asked)
    if scheme.metrics is not None:
        lacking = [metric for metric in scheme.metrics if metric not in have]
        if lacking:
            raise InputError(
                f"{scheme.name} ranks by {', '.join(scheme.metrics)}, but no row has {listed(lacking)}; score with the protocol "
                "instance2022, or choose another scheme (--rank mean-then-rank)"
            )
        return scheme.metrics
    found = tuple(metric for metric in INSTANCE_METRICS if metric in have)
    if not found:
        raise InputError(f"the rows have none of {', '.join(INSTANCE_METRICS)}; say what to rank by with --metrics")
    return found


def build_ranking(
    rows: Iterable[Score],
    scheme: str = "instance2022",
    metrics: Sequence[str] | None = None,
    ties: Ties | None = None,
    missing: Rule | None = None,
    infinite: Rule | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    threads: int = 2,
) -> RankBoard:
    """Rank the arms of score rows by `scheme` over `metrics`, resample the cases (or their groups), and compare with the other schemes.

    `groups`: case -> patient or site, resampled as a whole. InputError: whatever `cube` refuses, fewer than two arms, a case
    without a group.
    """
    every = list(rows)
    chosen = get_scheme(scheme)
    by = ranking_metrics(chosen, {row.metric for row in every}, metrics)
    cube = cube_of_rows(every, by)
    if len(cube.arms) < 2:
        raise InputError(f"there is one arm, {cube.arms[0]!r}; a ranking needs two or more")
    prepared = prepare(cube, missing, infinite)
    of_case = None
    if groups is not None:
        lacking = [case for case in cube.cases if not groups.get(case)]
        if lacking:
            raise InputError(f"no group is given for {len(lacking)} of {len(cube.cases)} cases: {listed(lacking)}. Complete cases.csv")
        of_case = [groups[case] for case in cube.cases]
    rule = ties or chosen.ties
    ranked = rank_arms(prepared, chosen, rule)
    weights = draw_weights(len(cube.cases), resamples, seed, of_case)
    stable = stability(prepared, chosen, weights, rule, threads=threads)
    order = sorted(range(len(cube.arms)), key=lambda a: (ranked.ranks_ra[0, a], ranked.combined_ra[0, a], cube.arms[a]))
    by_scheme = _by_scheme(prepared, chosen, rule)
    return RankBoard(
        cube=cube,
        prepared=prepared,
        scheme=chosen,
        ties=rule,
        ranked=ranked,
        stability=stable,
        order=tuple(order),
        by_scheme={name: tuple(map(float, ranks)) for name, ranks in by_scheme.items()},
        taus=tau_between(by_scheme),
        pairs=tuple(separable_pairs(prepared, of_case)) if len(cube.arms) <= MOST_ARMS_IN_PAIRS else None,
        n_groups=None if of_case is None or len(set(of_case)) == len(of_case) else len(set(of_case)),
        missing=missing or Rule("refuse"),
        infinite=infinite or Rule("exact"),
    )


def _by_scheme(prepared: Prepared, chosen: Scheme, ties: Ties) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """The ranking under every scheme. instance2022 is mean-then-rank by another name where the metrics are its own."""
    twin = "mean-then-rank" if chosen.name == "instance2022" else "instance2022"
    found = {}
    for scheme in SCHEMES.values():
        too_many = scheme.most_arms is not None and len(prepared.arms) > scheme.most_arms
        if scheme.name != twin and not too_many and (scheme.metrics is None or set(scheme.metrics) == set(prepared.metrics)):
            found[scheme.name] = rank_arms(prepared, scheme, ties).ranks_ra[0]
    return found


def podium_rows(board: RankBoard) -> list[tuple[str, str, float, str, float]]:
    """(metric, case, rank within the case, arm, value): what a podium plot draws; arms that do not count in a case are left out."""
    ranks = case_ranks_mca(board.prepared, board.ties)
    return [
        (metric, case, float(ranks[m, c, a]), arm, float(board.cube.values_mac[m, a, c]))
        for m, metric in enumerate(board.cube.metrics)
        for c, case in enumerate(board.cube.cases)
        for a, arm in sorted(enumerate(board.cube.arms), key=lambda item: (ranks[m, c, item[0]], item[1]))
        if not np.isnan(ranks[m, c, a])
    ]
