"""A ranking as text, Markdown, CSV and JSON. It shows ranks and how sure they are; means stand on the board, with n and intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from ichbench.board.grid import Grid, csv_of, heading, markdown_of, safe, shown_rank, text_of, wrapped
from ichbench.board.rank_board import MOST_ARMS_IN_PAIRS, RankBoard, podium_rows
from ichbench.board.resampling import LEVEL, rank_counts
from ichbench.board.summary import ROUGH_BELOW_CASES
from ichbench.board.wins import ALPHA
from ichbench.cases.files import write_atomically

#: How many pairs of arms that cannot be told apart are named on screen; ranking.json and pairs.csv have all.
PAIRS_SHOWN = 12


def ranking_text(board: RankBoard) -> str:
    """For a terminal, plain ASCII."""
    parts = [title_of(board), text_of(_main_grid(board)), text_of(_scheme_grid(board)), wrapped(_notes(board))]
    return "\n\n".join(part for part in parts if part) + "\n"


def ranking_markdown(board: RankBoard) -> str:
    notes = "\n".join(f"- {safe(note)}" for note in _notes(board))
    return "\n\n".join([safe(title_of(board)), markdown_of(_main_grid(board)), markdown_of(_scheme_grid(board)), notes]) + "\n"


def ranking_csv(board: RankBoard) -> str:
    """One line per arm, best first."""
    metrics = board.cube.metrics
    header = ["arm", "rank", "rank_lower", "rank_upper", "p_first", "mean_of_ranks", *(f"rank_{metric}" for metric in metrics)]
    header += [*(f"rank_{name}" for name in board.by_scheme), "n_cases", "n_empty_prediction", "n_missing", "n_infinite"]
    header += ["n_dropped", "n_worst", "n_penalised"]
    infinite = np.isinf(board.cube.values_mac).sum(axis=(0, 2))
    rows: list[list[str | float | int]] = []
    for a in board.order:
        s, r, p = board.stability, board.ranked, board.prepared
        rows.append([
            board.cube.arms[a], float(r.ranks_ra[0, a]), float(s.lower_a[a]), float(s.upper_a[a]), float(s.p_first_a[a]),
            float(r.combined_ra[0, a]), *(float(r.by_metric_mra[m, 0, a]) for m in range(len(metrics))),
            *(ranks[a] for ranks in board.by_scheme.values()), len(board.cube.cases), _count(board.cube.n_empty[a]),
            _count(board.cube.n_missing[a]), int(infinite[a]), p.n_dropped[a], p.n_worst[a], p.n_penalised[a],
        ])  # fmt: skip
    return csv_of(header, rows)


def blob_csv(board: RankBoard) -> str:
    """How often each arm had each rank in the resamples: the areas of a blob plot."""
    counts = rank_counts(board.stability.ranks_ra)
    rows = [(board.cube.arms[a], rank, count, count / board.resamples) for a in board.order for rank, count in sorted(counts[a].items())]
    return csv_of(("arm", "rank", "resamples", "share"), rows)


def podium_csv(board: RankBoard) -> str:
    """Every case's own ranking, metric by metric."""
    return csv_of(("metric", "case", "rank", "arm", "value"), podium_rows(board))


def pairs_csv(board: RankBoard) -> str:
    """Every pair of arms and whether it can be told apart."""
    rows = [(p.better, p.worse, p.n, p.p, p.p_holm, "separable" if p.separable else "not separable") for p in board.pairs or ()]
    return csv_of(("better", "worse", "n_cases_differing", "p", "p_holm", "verdict"), rows)


def ranking_json(board: RankBoard) -> str:
    """Everything but the cases; nan becomes null."""
    s, r = board.stability, board.ranked
    taus = np.sort(s.taus_r[~np.isnan(s.taus_r)])
    content = {
        "scheme": board.scheme.name,
        "rule": board.scheme.text,
        "ties": board.ties,
        "missing": {"rule": board.missing.kind, "penalties": dict(board.missing.penalties)},
        "infinite": {"rule": board.infinite.kind, "penalties": dict(board.infinite.penalties)},
        "metrics": list(board.cube.metrics),
        "n_cases": len(board.cube.cases),
        "n_groups": board.n_groups,
        "resamples": board.resamples,
        "arms": [
            {
                "arm": board.cube.arms[a],
                "rank": float(r.ranks_ra[0, a]),
                "rank_interval": [float(s.lower_a[a]), float(s.upper_a[a])],
                "p_first": float(s.p_first_a[a]),
                "mean_of_ranks": float(r.combined_ra[0, a]),
                "ranks": {metric: float(r.by_metric_mra[m, 0, a]) for m, metric in enumerate(board.cube.metrics)},
                "by_scheme": {name: ranks[a] for name, ranks in board.by_scheme.items()},
                "n_dropped": board.prepared.n_dropped[a],
                "n_worst": board.prepared.n_worst[a],
                "n_penalised": board.prepared.n_penalised[a],
            }
            for a in board.order
        ],
        "tau_to_resamples": {"median": _quantile(taus, 0.5), "lower": _quantile(taus, 0.025), "upper": _quantile(taus, 0.975)},
        "tau_between_schemes": [{"schemes": list(two), "tau": None if math.isnan(tau) else tau} for two, tau in board.taus.items()],
        "pairs": None
        if board.pairs is None
        else [
            {"better": p.better, "worse": p.worse, "n": p.n, "p": p.p, "p_holm": p.p_holm, "separable": p.separable} for p in board.pairs
        ],
        "notes": list(board.prepared.notes),
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_ranking(board: RankBoard, out: Path) -> list[Path]:
    """ranking.csv, .md, .json, blob.csv, podium.csv and pairs.csv in `out`; no half-written file is ever seen."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "ranking.csv": ranking_csv(board),
        "ranking.md": ranking_markdown(board),
        "ranking.json": ranking_json(board),
        "blob.csv": blob_csv(board),
        "podium.csv": podium_csv(board),
        "pairs.csv": pairs_csv(board),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in texts]


def title_of(board: RankBoard) -> str:
    units = f"{board.n_groups} groups" if board.n_groups is not None else "cases"
    return (
        f"ranking: {board.scheme.name} over {', '.join(board.cube.metrics)}; ties: {board.ties}; {len(board.cube.cases)} cases; "
        f"{board.resamples} resamples of {units}"
    )


def _main_grid(board: RankBoard) -> Grid:
    header = [
        "arm",
        "rank",
        f"{LEVEL:.0%} of resamples",
        "P(rank 1)",
        "mean of ranks",
        *map(heading, board.cube.metrics),
        "empty",
        "missing",
    ]
    s, r = board.stability, board.ranked
    rows = []
    for a in board.order:
        cells = [board.cube.arms[a] + ("*" if board.prepared.n_dropped[a] else ""), shown_rank(r.ranks_ra[0, a])]
        cells += [f"{shown_rank(s.lower_a[a])} to {shown_rank(s.upper_a[a])}", f"{s.p_first_a[a]:.3f}", f"{r.combined_ra[0, a]:.2f}"]
        cells += [_metric_rank(board, m, a) for m in range(len(board.cube.metrics))]
        rows.append((*cells, *("?" if n < 0 else str(n) for n in (board.cube.n_empty[a], board.cube.n_missing[a]))))
    return Grid(tuple(header), tuple(rows))


def _metric_rank(board: RankBoard, m: int, a: int) -> str:
    infinite = int(np.isinf(board.cube.values_mac[m, a]).sum())
    return shown_rank(board.ranked.by_metric_mra[m, 0, a]) + (f" ({infinite} inf)" if infinite else "")


def _scheme_grid(board: RankBoard) -> Grid:
    header = ("rank under", *board.by_scheme)
    return Grid(header, tuple((board.cube.arms[a], *(shown_rank(ranks[a]) for ranks in board.by_scheme.values())) for a in board.order))


def _notes(board: RankBoard) -> list[str]:
    n = len(board.cube.cases)
    taus = np.sort(board.stability.taus_r[~np.isnan(board.stability.taus_r)])
    notes = [f"{board.scheme.name}: {board.scheme.text}. Equal means of ranks share the better place (in P(rank 1) too)."]
    notes += board.prepared.notes
    for a in board.order:
        if board.prepared.n_dropped[a]:
            kept = int(board.prepared.kept_mac[:, a].sum())
            of = kept + board.prepared.n_dropped[a]
            notes.append(f"* {board.cube.arms[a]}: ranked on {kept} of {of} values; the others were dropped for this arm alone.")
    if any(board.prepared.n_worst):
        worst = [f"{board.cube.arms[a]} {board.prepared.n_worst[a]}" for a in board.order if board.prepared.n_worst[a]]
        notes.append("values that take the last place: " + ", ".join(worst))
    if any(board.prepared.n_penalised):
        paid = [f"{board.cube.arms[a]} {board.prepared.n_penalised[a]}" for a in board.order if board.prepared.n_penalised[a]]
        notes.append("values replaced by a penalty: " + ", ".join(paid))
    if len(taus):
        tau = f"median {_quantile(taus, 0.5):.2f}, 95 % of them in [{_quantile(taus, 0.025):.2f}, {_quantile(taus, 0.975):.2f}]"
        notes.append(f"Kendall's tau between this ranking and its resamples: {tau}")
    between = ", ".join(f"{one} / {two} {tau:.2f}" for (one, two), tau in board.taus.items() if not math.isnan(tau))
    if between:
        notes.append(f"Kendall's tau between schemes: {between}")
    if board.pairs is None:
        notes.append(f"Pairs are tested for up to {MOST_ARMS_IN_PAIRS} arms; which of these can be told apart is not said.")
    if board.pairs:
        units = f"{n} cases" if board.n_groups is None else f"{board.n_groups} groups"
        apart = [pair for pair in board.pairs if pair.separable]
        named = ", ".join(f"{pair.better} > {pair.worse}" for pair in apart[:PAIRS_SHOWN])
        more = f" and {len(apart) - PAIRS_SHOWN} more" if len(apart) > PAIRS_SHOWN else ""
        notes.append(
            f"{len(apart)} of {len(board.pairs)} pairs are separable (Wilcoxon test of the mean ranks over {units}, Holm, "
            f"{ALPHA:.0%}){': ' if apart else ''}{named}{more}"
        )
    if board.n_groups is not None and "test-then-rank" in board.by_scheme:
        notes.append(f"test-then-rank takes the {n} cases as independent although they are {board.n_groups} groups, so it is too sure.")
    # what is drawn is what counts: 60 cases of 4 patients are 4
    drawn, word = (n, "case") if board.n_groups is None else (board.n_groups, "group")
    if drawn == 1:
        notes.append(f"One {word}: every resample is the same, so the ranks' intervals and P(rank 1) say nothing.")
    elif drawn < ROUGH_BELOW_CASES:
        notes.append(f"{drawn} {word}s: below {ROUGH_BELOW_CASES} all of this is rough.")
    return notes


def _count(n: int) -> str | int:
    return "" if n < 0 else n


def _quantile(ordered: np.ndarray[tuple[int], np.dtype[np.float64]], share: float) -> float | None:
    return float(ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]) if len(ordered) else None
