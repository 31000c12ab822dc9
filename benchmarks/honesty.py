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
real head CTs of 56 patients (`shared/data/rankings`, left out with a word where it is missing).

    OMP_NUM_THREADS=1 python benchmarks/honesty.py [--studies 5000] [--out benchmarks/results/honesty.md]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ichbench.board.effects import Estimate, verdict_of
from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, METHODS, FloatArray, Method, draw_units, mean_intervals
from ichbench.board.signflip import POWER, detectable, holm, sign_flip_p
from ichbench.board.summary import generator_for

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("ICHBENCH_SHARED_DATA", HERE.parents[1] / "shared" / "data"))
SIZES = (13, 30, 70)
#: Where one case makes more than this share of the variance no method covers: most studies never see it.
LONE_CASE = 0.5
#: Clusters differ in size from study to study, so these are computed one by one.
FEW_RESAMPLES = 1000


@dataclass(frozen=True)
class Population:
    """Scores (arms, cases) of one table, and the patient of every case."""

    name: str
    arms: tuple[str, ...]
    scores: FloatArray
    patients: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=2022)
    parser.add_argument("--out", type=Path, help="write the tables here as well")
    given = parser.parse_args()
    began = time.time()
    found = populations()
    parts = [
        "# Honesty of intervals and verdicts\n\n"
        f"`python benchmarks/honesty.py --studies {given.studies} --seed {given.seed}`: {given.studies} studies a cell, numpy "
        f"{version('numpy')}, Python {platform.python_version()}. The standard error of a share is "
        f"{100 * math.sqrt(0.05 * 0.95 / given.studies):.1f} % near 5 or 95 %.\n",
    ]
    for part in (false_claims, power, coverage, clustered):
        parts.append(part(found, given.studies, given.seed))
        print(parts[-1], flush=True)
    text = "\n".join(parts)
    print(f"\n{time.time() - began:.0f} s")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


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


def false_claims(found: list[Population], studies: int, seed: int) -> str:
    """A/A studies."""
    lines = ["## A/A studies: share with any claim\n", "Asked for: at most 5.8 %, per study (one base, four arms), after Holm.\n"]
    lines += ["| population | n | claims | without Holm | by the interval alone |", "| --- | ---: | ---: | ---: | ---: |"]
    for population, n in itertools.product(found, SIZES):
        rng = generator_for(seed, "A/A", population.name, str(n))
        differences = shuffled_studies(population, n, studies, rng)
        verdicts, raw, interval = verdicts_of(differences)
        shares = [f"{100 * np.mean((table != 0).any(axis=1)):.1f} %" for table in (verdicts, raw, interval)]
        lines.append(f"| {population.name} | {n} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def power(found: list[Population], studies: int, seed: int) -> str:
    """Planted effects of the size that the board calls detectable."""
    lines = ["## Planted effects\n", f"One arm is better by the stated detectable difference; stated power {POWER:.0%}.\n"]
    lines += ["| population | n | arms | planted (Dice) | found | called worse |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for population, n, arms in itertools.product(found, SIZES, (1, 4)):
        rng = generator_for(seed, "power", population.name, str(n), str(arms))
        differences = shuffled_studies(population, n, studies, rng)[:, :, :arms]
        planted = detectable(exchangeable_sd(population.scores) / math.sqrt(n), n, arms)
        differences[:, :, 0] += planted
        verdicts = verdicts_of(differences)[0][:, 0]
        right, wrong = (f"{100 * np.mean(hits):.1f} %" for hits in (verdicts > 0, verdicts < 0))
        lines.append(f"| {population.name} | {n} | {arms} | {planted:.3f} | {right} | {wrong} |")
    return "\n".join(lines) + "\n"


def coverage(found: list[Population], studies: int, seed: int) -> str:
    """How often each method's interval holds the truth."""
    lines = [
        "## Coverage of the 95 % intervals\n",
        f"The default is `{DEFAULT_METHOD}`. It and `t` are of {studies} studies, the others of {studies // 5}. Asked for: 93 to 97 % from "
        "n = 30 on. `!`: outside. `lone case`: one case makes more than half of the variance, and a study that does not draw it cannot "
        "know of it.\n",
        f"| population | mean of | n | {' | '.join(METHODS)} |",
        "| --- | --- | ---: |" + " ---: |" * len(METHODS),
    ]
    outside: dict[Method, list[int]] = {method: [0, 0] for method in METHODS}
    for population in found:
        for name, values in series_of(population):
            lone = ((values - values.mean()) ** 2).max() / ((values - values.mean()) ** 2).sum() > LONE_CASE
            for n in SIZES:
                drawn = values[generator_for(seed, "coverage", population.name, str(n)).integers(0, len(values), (n, studies))]
                few = {method: drawn if method in ("t", DEFAULT_METHOD) else drawn[:, : studies // 5] for method in METHODS}
                shares = [covered(few[method], np.ones(n), float(values.mean()), method) for method in METHODS]
                cells = []
                for method, share in zip(METHODS, shares, strict=True):
                    out = n >= 30 and not 0.93 <= share <= 0.97
                    outside[method][0] += out and not lone
                    outside[method][1] += n >= 30 and not lone
                    cells.append(f"{100 * share:.1f}{' !' if out else ''}")
                lines.append(f"| {population.name} | {name}{' (lone case)' if lone else ''} | {n} | {' | '.join(cells)} |")
    totals = " | ".join(f"{out} of {of}" for out, of in outside.values())
    lines += [f"| outside 93-97 % from n = 30 on | without lone cases | | {totals} |", ""]
    return "\n".join(lines)


def clustered(found: list[Population], studies: int, seed: int) -> str:
    """Patients with several scans."""
    lines = [
        "## Several scans of one patient\n",
        f"Patients are drawn, each with all scans ({max(200, studies // 10)} studies, {FEW_RESAMPLES} resamples). Copies: every scan of "
        "the population three times.\n",
    ]
    lines += ["| population | mean of | patients | scans as cases | by patient |", "| --- | --- | ---: | ---: | ---: |"]
    for population in found:
        for copies, n in itertools.product((1, 3), SIZES):
            if copies == 1 and len(set(population.patients)) == len(population.patients):
                continue
            values = np.tile(population.scores[0], copies)
            patients = population.patients * copies
            rng = generator_for(seed, "clusters", population.name, str(n), str(copies))
            alone, together = cluster_coverage(values, patients, n, max(200, studies // 10), rng)
            name = population.name + (f", {copies} copies" if copies > 1 else "")
            lines.append(f"| {name} | {population.arms[0]} | {n} | {100 * alone:.1f} | {100 * together:.1f} |")
    return "\n".join(lines) + "\n"


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


def verdicts_of(differences: FloatArray) -> tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.int8]]:
    """1 better, -1 worse, 0 neither, (studies, arms): as a board says it; with p unadjusted; by the interval alone."""
    n, studies, arms = differences.shape
    columns = differences.reshape(n, studies * arms)
    p_values = sign_flip_p(columns)
    adjusted = np.concatenate([holm(p.tolist()) for p in p_values.reshape(studies, arms)])
    lower, upper = mean_intervals(columns, np.ones(n), board_draws(n), DEFAULT_METHOD)
    word = {"better": 1, "worse": -1}
    tables = []
    for p in (adjusted, p_values, np.zeros_like(p_values)):
        said = [
            word.get(verdict_of(Estimate(float(m), float(a), float(b), n, 0, n, math.nan, float(q), float(q), math.nan), "higher"), 0)
            for m, a, b, q in zip(columns.mean(axis=0), lower, upper, p, strict=True)
        ]
        tables.append(np.array(said, dtype=np.int8).reshape(studies, arms))
    return tables[0], tables[1], tables[2]


def series_of(population: Population) -> list[tuple[str, FloatArray]]:
    """Each arm's scores, and the differences of neighbouring arms and of every arm to the first."""
    found = [(f"Dice of {arm}", scores) for arm, scores in zip(population.arms, population.scores, strict=True)]
    pairs = [(i, j) for i, j in itertools.combinations(range(len(population.arms)), 2) if i == 0 or j == i + 1]
    return found + [(f"{population.arms[j]} - {population.arms[i]}", population.scores[j] - population.scores[i]) for i, j in pairs]


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
