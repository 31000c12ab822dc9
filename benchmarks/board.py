"""Speed of rankings beside a plain pandas loop, in one run: `python benchmarks/board.py` prints a table.

Work: bootstrap of the whole ranking over four metrics (Dice, HD with some infinite values, RVD, NSD), both aggregate schemes:
mean-then-rank and rank-then-mean. Ours with two threads, and with the rank intervals, P(rank 1) and Kendall's tau to every resample,
which the loop does not compute. The loop draws cases, takes means and ranks with pandas, one resample after the other; it is timed on
fewer resamples and scaled, which the table says. Both get the same draws, and the final ranks must agree in every compared resample.
challengeR (R, one metric at a time, GPL) is not installable here, so it is not in the table.

    pip install . pandas && OMP_NUM_THREADS=1 python benchmarks/board.py [--out benchmarks/results/board.md]
"""

from __future__ import annotations

import os
import resource
import time

import numpy as np
from common import arguments, processor, versions, write
from numpy.typing import NDArray

from ichbench.board.cube import Cube, Prepared, prepare
from ichbench.board.ranking import SCHEMES
from ichbench.board.resampling import draw_weights, stability

METRICS = ("dice", "hd", "rvd", "nsd")
SIZES = ((13, 70, 1000), (50, 200, 1000), (1000, 100, 1000))
#: Resamples that the pandas loop is timed on, by the number of arms.
LOOPED = {13: 200, 50: 100, 1000: 10}
AGGREGATE = ("mean-then-rank", "rank-then-mean")
REPEATS = 3


def main() -> None:
    parser = arguments(__doc__, "table", peers=True)
    parser.add_argument("--seed", type=int, default=2022)
    parser.add_argument("--tests", action="store_true", help="also time test-then-rank (50 arms x 200 cases: about half a minute)")
    given = parser.parse_args()
    header = ("arms x cases x metrics", "resamples", "scheme", "ichbench s", "of CPU", "pandas loop s", "of CPU", "times in CPU")
    lines = ["| " + " | ".join(header) + " |", "|---|---:|---|---:|---:|---:|---:|---:|"]
    differing = 0
    for n_arms, n_cases, resamples in SIZES:
        values = drawn(n_arms, n_cases, given.seed)
        names = tuple(map(str, range(n_arms))), tuple(map(str, range(n_cases)))
        cube = Cube(METRICS, *names, values, np.zeros(values.shape, dtype=bool), (0,) * n_arms, (0,) * n_arms)
        started = now()
        ready, weights = prepare(cube), draw_weights(n_cases, resamples, given.seed)
        ours, theirs = now() - started, np.zeros(2)
        size = f"{n_arms} x {n_cases} x {len(METRICS)}"
        for name in AGGREGATE:
            seconds, ranks = timed(ready, name, weights)
            ours, looping = ours + seconds, np.zeros(2)
            if not given.skip_peers:
                n_looped = LOOPED[n_arms]
                looping, looped = pandas_loop(values, weights[:n_looped], name)
                looping = looping * resamples / n_looped
                differing += int((looped != ranks[:n_looped]).any(axis=1).sum())
            theirs = theirs + looping
            lines.append(line(size, resamples, name, seconds, looping))
        lines.append(line(size, resamples, "**both, with the draws**", ours, theirs))
        if given.tests and n_arms <= 50:
            seconds, _ = timed(ready, "test-then-rank", weights, repeats=1)
            lines.append(line(size, resamples, "test-then-rank", seconds, np.zeros(2)))
    lines.append("")
    if not given.skip_peers:
        lines.append(
            f"Resamples in which the two disagree about a rank: {differing}. The loop ran {LOOPED} resamples (arms: resamples), scaled."
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines.append(f"Peak memory of the whole run {peak:.0f} MB. challengeR (R) is not installable here.")
    cores = len(os.sched_getaffinity(0))
    busy = f"load average at the end {os.getloadavg()[0]:.1f}"
    lines.append(f"{processor()}, {cores} cores, {busy}, {versions('Python', 'NumPy')}; best of {REPEATS}.")
    text = "\n".join(lines)
    print(text)
    write(given.out, "Boards: resampling a whole ranking", text)


def drawn(n_arms: int, n_cases: int, seed: int) -> NDArray[np.float64]:
    """Case difficulty plus arm quality plus noise, in the units of the metrics; one HD in 500 is infinite."""
    rng = np.random.default_rng(seed)
    quality, difficulty = rng.normal(0, 0.3, (4, n_arms, 1)), rng.normal(0, 1, (4, 1, n_cases))
    raw = 1 / (1 + np.exp(-(1 + quality + difficulty + rng.normal(0, 0.5, (4, n_arms, n_cases)))))
    values = np.stack([raw[0], 60 * (1 - raw[1]), 1 - raw[2], raw[3]])
    values[1][rng.random((n_arms, n_cases)) < 0.002] = np.inf
    return values


def now() -> NDArray[np.float64]:
    """Seconds on the wall, and of CPU in all threads: the second hardly depends on what else the machine does."""
    return np.array([time.perf_counter(), time.process_time()])


def line(size: str, resamples: int, name: str, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    looped = f"{theirs[0]:.1f} | {theirs[1]:.1f} | {theirs[1] / ours[1]:.0f}" if theirs[0] else " | | "
    return f"| {size} | {resamples} | {name} | {ours[0]:.2f} | {ours[1]:.2f} | {looped} |"


def timed(
    ready: Prepared, name: str, weights_rc: NDArray[np.float64], repeats: int = REPEATS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    best = np.full(2, np.inf)
    for _ in range(repeats):
        started = now()
        found = stability(ready, SCHEMES[name], weights_rc, threads=2)
        best = np.minimum(best, now() - started)
    return best, found.ranks_ra


def pandas_loop(
    values_mac: NDArray[np.float64], weights_rc: NDArray[np.float64], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One resample after the other, as one would write it: a frame per metric, cases in rows, arms in columns."""
    import pandas as pd

    frames = [pd.DataFrame(metric.T) for metric in values_mac]
    ascending = [metric in ("hd", "rvd") for metric in METRICS]
    found = []
    started = now()
    for row in weights_rc.astype(int):
        drawn_cases = np.repeat(np.arange(len(row)), row)
        total = 0
        for frame, up in zip(frames, ascending, strict=True):
            sample = frame.iloc[drawn_cases]
            if name == "mean-then-rank":
                total = total + sample.mean().rank(method="min", ascending=up)
            else:
                total = total + sample.rank(axis=1, method="min", ascending=up).mean()
        found.append(total.round(9).rank(method="min").to_numpy())
    return now() - started, np.array(found)


if __name__ == "__main__":
    main()
