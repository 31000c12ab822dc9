"""Do the boards' words hold? Simulated studies from real per-case spreads: `python benchmarks/honesty.py` prints the tables.

The truth is known here: the cases of a real table are the population, and every study draws its cases from them, with
replacement. What is simulated is the board's own code (`board.intervals`, `board.signflip`, `board.effects.verdict_of`), with the
draws and the number of resamples of a board.

- coverage: how often the 95 % interval of a mean, and of a mean paired difference, holds the population's mean
- A/A studies: base and four arms that are exchangeable (in every case the five real scores are shuffled), so that each claim is
  false; the share of studies with at least one verdict better or worse
- power: the same, and one arm better by what the board states beside "not separable" (`detectable`); the share that finds it
- clusters: cases of one patient are drawn together, and analysed with and without that knowledge

Populations: Dice of five arms of leaderboard/phantom (16 cases, frozen in honesty_spreads.json), and of five published models on 63
real head CTs of 62 patients (`shared/data/rankings`, left out with a word where it is missing).

    OMP_NUM_THREADS=1 python benchmarks/honesty.py [--studies 5000] [--workers 2] [--out benchmarks/results/honesty.md]
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from common import SHARED, arguments, versions, write
from numpy.typing import NDArray

from ichbench.board.effects import Estimate, verdict_of
from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, METHODS, FloatArray, Method, draw_units, mean_intervals
from ichbench.board.signflip import ALPHA, POWER, detectable, holm, sign_flip_p
from ichbench.board.summary import generator_for

HERE = Path(__file__).resolve().parent
SIZES = (13, 30, 70)
#: Where one case makes more than this share of the variance no method covers: most studies never see it.
LONE_CASE = 0.5
#: Clusters differ in size from study to study, so these are computed one by one.
FEW_RESAMPLES = 1000
#: The other methods are measured on one study of so many.
PEERS = 10
PARTS = ("claims", "power", "coverage", "clusters")


@dataclass(frozen=True)
class Population:
    """Scores (arms, cases) of one table, and the patient of every case."""

    name: str
    arms: tuple[str, ...]
    scores: FloatArray
    patients: tuple[str, ...]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--studies", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=2022)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    began = time.time()
    found = populations()
    tasks: list[tuple[str, Population, int]] = []
    for part in PARTS:
        for population in found:
            tasks += [(part, population, place) for place in range(len(series_of(population)) if part == "coverage" else 1)]
    lines: dict[str, list[str]] = {part: [] for part in PARTS}
    with ProcessPoolExecutor(given.workers) as pool:
        rows = pool.map(rows_of, *zip(*tasks, strict=True), [given.studies] * len(tasks), [given.seed] * len(tasks))
        for (part, _, _), more in zip(tasks, rows, strict=True):
            lines[part] += more
            print("\n".join(more), flush=True)
    lines["coverage"].append(totals(lines["coverage"]))
    text = (
        f"`python benchmarks/honesty.py --studies {given.studies} --seed {given.seed}`: {given.studies} studies a cell, "
        f"{DEFAULT_RESAMPLES} resamples, {versions('numpy', 'Python')}. The standard error of a share is "
        f"{100 * math.sqrt(0.05 * 0.95 / given.studies):.1f} % near 5 or 95 %.\n"
    )
    for part, heading in headings(given.studies).items():
        text += f"\n{heading}\n" + "\n".join(lines[part]) + "\n"
    print(f"\n{text}\n{time.time() - began:.0f} s")
    write(given.out, "Honesty of intervals and verdicts", text.removesuffix("\n"))


def headings(studies: int) -> dict[str, str]:
    """Title, words and header of every part."""
    return {
        "claims": "## A/A studies: share with any claim\n\nAsked for: at most 5.8 %, per study (one base, four arms), after Holm. "
        "The claims are those of one metric, Dice: Holm runs over the arms within one metric, and whoever looks at several metrics finds "
        "more by chance. Measured once, on the phantom's arms and the cases that are finite in all metrics, 2,000 studies: any claim in "
        "dice or nsd 7.3 % at n = 13 and 6.0 % at n = 30; in dice, nsd, rvd or hd95 13.1 % and 11.0 %. So decide on one metric beforehand."
        "\n\n| population | n | claims | without Holm |\n| --- | ---: | ---: | ---: |",
        "power": f"## Planted effects\n\nOne arm is better by the stated detectable difference; stated power {POWER:.0%}.\n\n"
        "| population | n | arms | planted (Dice) | found | called worse |\n| --- | ---: | ---: | ---: | ---: | ---: |",
        "coverage": f"## Coverage of the 95 % intervals\n\nThe default is `{DEFAULT_METHOD}`. It and `t` are of {studies} studies, the "
        f"others of {studies // PEERS}. Asked for: 93 to 97 % from n = 30 on. `!`: outside. `lone case`: one case makes more than half of "
        "the variance, and a study that does not draw it cannot know of it.\n\n"
        f"| population | mean of | n | {' | '.join(METHODS)} |\n| --- | --- | ---: |" + " ---: |" * len(METHODS),
        "clusters": f"## Several scans of one patient\n\nPatients are drawn, each with all scans ({max(200, studies // 10)} studies, "
        f"{FEW_RESAMPLES} resamples). Copies: every scan of the population three times.\n\n"
        "| population | mean of | patients | scans as cases | by patient |\n| --- | --- | ---: | ---: | ---: |",
    }


def rows_of(part: str, population: Population, place: int, studies: int, seed: int) -> list[str]:
    """The rows of one part on one population (and, of the coverage, one series)."""
    if part == "coverage":
        return coverage(population, place, studies, seed)
    return {"claims": claims, "power": power, "clusters": clusters}[part](population, studies, seed)


def populations() -> list[Population]:
    """The tables that are there."""
    frozen = json.loads((HERE / "honesty_spreads.json").read_text(encoding="utf-8"))
    scores = np.array([frozen["dice"][arm] for arm in frozen["arms"]])
    found = [Population("phantom", tuple(frozen["arms"]), scores, tuple(map(str, range(scores.shape[1]))))]
    path = SHARED / "rankings" / "masilab_tbi_nih_vu_per_case.csv"
    if not path.is_file():
        print(f"{path} is not there: the rows on real CTs are left out")
        return found
    with path.open(newline="") as stream:
        table = list(csv.DictReader(stream))
    arms, cases = sorted({line["algorithm"] for line in table}), sorted({line["case"] for line in table})
    dice = {(line["algorithm"], line["case"]): float(line["dice"]) for line in table}
    patient = {line["case"]: line["patient"] for line in table}
    scores = np.array([[dice[arm, case] for case in cases] for arm in arms])
    return [*found, Population("real CTs", tuple(arms), scores, tuple(patient[case] for case in cases))]


def claims(population: Population, studies: int, seed: int) -> list[str]:
    """A/A studies."""
    lines = []
    for n in SIZES:
        differences = shuffled_studies(population, n, studies, generator_for(seed, "A/A", population.name, str(n)))
        shares = [f"{100 * np.mean((table != 0).any(axis=1)):.1f} %" for table in verdicts_of(differences)]
        lines.append(f"| {population.name} | {n} | {' | '.join(shares)} |")
    return lines


def power(population: Population, studies: int, seed: int) -> list[str]:
    """Planted effects of the size that the board calls detectable."""
    lines = []
    for n, arms in itertools.product(SIZES, (1, 4)):
        rng = generator_for(seed, "power", population.name, str(n), str(arms))
        differences = shuffled_studies(population, n, studies, rng)[:, :, :arms]
        planted = detectable(exchangeable_sd(population.scores) / math.sqrt(n), n, arms)
        differences[:, :, 0] += planted
        verdicts = verdicts_of(differences)[0][:, 0]
        right, wrong = (f"{100 * np.mean(hits):.1f} %" for hits in (verdicts > 0, verdicts < 0))
        lines.append(f"| {population.name} | {n} | {arms} | {planted:.3f} | {right} | {wrong} |")
    return lines


def coverage(population: Population, place: int, studies: int, seed: int) -> list[str]:
    """How often each method's interval holds the truth."""
    name, values = series_of(population)[place]
    squares = (values - values.mean()) ** 2
    lone = " (lone case)" if squares.max() / squares.sum() > LONE_CASE else ""
    lines = []
    for n in SIZES:
        drawn = values[generator_for(seed, "coverage", population.name, name, str(n)).integers(0, len(values), (n, studies))]
        cells = []
        for method in METHODS:
            part = drawn if method in ("t", DEFAULT_METHOD) else drawn[:, : studies // PEERS]
            share = covered(part, np.ones(n), float(values.mean()), method)
            cells.append(f"{100 * share:.1f}{' !' if n >= 30 and not 0.93 <= share <= 0.97 else ''}")
        lines.append(f"| {population.name} | {name}{lone} | {n} | {' | '.join(cells)} |")
    return lines


def totals(lines: list[str]) -> str:
    """How many cells of each method are outside, without lone cases."""
    counted = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "(lone case)" not in line]
    counted = [cells for cells in counted if int(cells[2]) >= 30]
    outside = [sum("!" in cells[3 + place] for cells in counted) for place in range(len(METHODS))]
    return f"| outside, without lone cases | | | {' | '.join(f'{out} of {len(counted)}' for out in outside)} |"


def clusters(population: Population, studies: int, seed: int) -> list[str]:
    """Patients with several scans."""
    lines = []
    for copies, n in itertools.product((1, 3), SIZES):
        if copies == 1 and len(set(population.patients)) == len(population.patients):
            continue
        values, patients = np.tile(population.scores[0], copies), population.patients * copies
        rng = generator_for(seed, "clusters", population.name, str(n), str(copies))
        alone, together = cluster_coverage(values, patients, n, max(200, studies // 10), rng)
        name = population.name + (f", {copies} copies" if copies > 1 else "")
        lines.append(f"| {name} | {population.arms[0]} | {n} | {100 * alone:.1f} | {100 * together:.1f} |")
    return lines


def shuffled_studies(population: Population, n: int, studies: int, rng: np.random.Generator) -> FloatArray:
    """Differences (n, studies, arms - 1) to the first of the exchangeable arms."""
    cases = rng.integers(0, population.scores.shape[1], (n, studies))
    drawn = population.scores.T[cases]
    shuffled = rng.permuted(drawn, axis=2)
    return np.asarray(shuffled[:, :, 1:] - shuffled[:, :, :1])


def exchangeable_sd(scores: FloatArray) -> float:
    """Standard deviation of the difference of two arms that were shuffled in every case (its mean is 0)."""
    pairs = [scores[i] - scores[j] for i, j in itertools.permutations(range(len(scores)), 2)]
    return math.sqrt(float(np.mean(np.square(pairs))))


def verdicts_of(differences: FloatArray) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """1 better, -1 worse, 0 neither, (studies, arms): as a board says it, and with p unadjusted."""
    n, studies, arms = differences.shape
    columns = differences.reshape(n, studies * arms)
    p_values = sign_flip_p(columns)
    adjusted = np.concatenate([holm(p.tolist()) for p in p_values.reshape(studies, arms)])
    # the interval is asked only where p is small: else there is no claim whatever it is
    asked = np.flatnonzero(p_values <= ALPHA)
    lower, upper = mean_intervals(columns[:, asked], np.ones(n), board_draws(n), DEFAULT_METHOD)
    tables = np.zeros((2, studies * arms), dtype=np.int8)
    for table, p in zip(tables, (adjusted, p_values), strict=True):
        for column, low, high in zip(asked, lower, upper, strict=True):
            q, mean = float(p[column]), float(columns[:, column].mean())
            estimate = Estimate(mean, float(low), float(high), n, 0, n, math.nan, q, q, math.nan)
            table[column] = {"better": 1, "worse": -1}.get(verdict_of(estimate, "higher"), 0)
    return tables[0].reshape(studies, arms), tables[1].reshape(studies, arms)


def series_of(population: Population) -> list[tuple[str, FloatArray]]:
    """Each arm's scores, and the differences to the first arm."""
    found = [(f"Dice of {arm}", scores) for arm, scores in zip(population.arms, population.scores, strict=True)]
    first = population.scores[0]
    return found + [
        (f"{arm} - {population.arms[0]}", scores - first) for arm, scores in zip(population.arms[1:], population.scores[1:], strict=True)
    ]


def covered(sums: FloatArray, sizes: FloatArray, truth: float, method: Method, resamples: int = DEFAULT_RESAMPLES) -> float:
    """Share of the columns whose interval holds the truth."""
    lower, upper = mean_intervals(sums, sizes, board_draws(len(sums), resamples), method)
    return float(np.mean((lower <= truth + 1e-12) & (truth - 1e-12 <= upper)))


def cluster_coverage(values: FloatArray, patients: tuple[str, ...], n: int, studies: int, rng: np.random.Generator) -> tuple[float, float]:
    """Coverage with scans taken for cases, and by patient."""
    names = sorted(set(patients))
    sums = np.array([sum(v for v, p in zip(values, patients, strict=True) if p == name) for name in names])
    sizes = np.array([float(patients.count(name)) for name in names])
    scans = [values[[p == name for p in patients]] for name in names]
    truth = float(sums.sum() / sizes.sum())
    hits = np.zeros(2)
    for _ in range(studies):
        chosen = rng.integers(0, len(names), n)
        every = np.concatenate([scans[i] for i in chosen])
        hits[0] += covered(every[:, None], np.ones(len(every)), truth, DEFAULT_METHOD, FEW_RESAMPLES)
        hits[1] += covered(sums[chosen][:, None], sizes[chosen], truth, DEFAULT_METHOD, FEW_RESAMPLES)
    return float(hits[0] / studies), float(hits[1] / studies)


@lru_cache(maxsize=256)
def board_draws(n: int, resamples: int = DEFAULT_RESAMPLES) -> NDArray[np.intp]:
    """The draws that a board takes for n units."""
    return draw_units(n, resamples, generator_for(0, str(n)))


if __name__ == "__main__":
    main()
