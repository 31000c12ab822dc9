"""Effects per stratum: volume, subtype, spacing, site. What a stratum is comes from `cases.csv`, never from the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from ichbench.board.effects import Effect, better_direction, differences_of, estimate_family, paired_effects, verdict_of, within_width
from ichbench.board.intervals import DEFAULT_METHOD, DEFAULT_RESAMPLES, Method
from ichbench.board.summary import ArmSummary, CaseTable, Clusters, clusters_of, listed, summarise_table
from ichbench.errors import InputError
from ichbench.scoring.strict_csv import number_of

#: case -> column -> text, as cases.csv has them
Cases = Mapping[str, Mapping[str, str]]

#: Upper ends (exclusive) of the volume bins in ml, those of the lesions' strata; and of the slice spacing in mm.
VOLUME_ENDS_ML = (1.0, 10.0, 30.0)
SLICE_ENDS_MM = (1.5, 3.0)
#: The tolerance of the official surface Dice lies at a common voxel edge: scans with larger voxels cannot be a voxel off.
IN_PLANE_MM = 0.42
KINDS = ("volume", "subtype", "slice spacing", "in-plane spacing", "site")


@dataclass(frozen=True)
class StratumEffect:
    """One arm in one stratum: its summary, and its effect against the base (None for the base itself)."""

    kind: str
    stratum: str
    summary: ArmSummary
    effect: Effect | None


def strata_of(cases: Cases, kinds: Sequence[str] = KINDS) -> dict[str, dict[str, tuple[str, ...]]]:
    """kind -> stratum -> its cases; only kinds for which the columns say something and that split the cases.

    volume by `reference_ml`; subtype by `subtype`, where `a+b` counts in a and in b; spacing by `spacing_z_mm` and the larger of
    `spacing_y_mm` and `spacing_x_mm`; site by `site`. A case whose cell is empty is in the stratum `?`. InputError: an unknown
    kind, a cell that is no number where one is needed.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"no such strata: {listed(unknown)}; known are {', '.join(KINDS)}")
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for kind in kinds:
        members: dict[tuple[float, str], list[str]] = {}
        for case, line in cases.items():
            for stratum in _strata_of_case(kind, case, line):
                members.setdefault(stratum, []).append(case)
        if len(members) > 1:
            found[kind] = {name: tuple(sorted(members[place, name])) for place, name in sorted(members)}
    return found


def strata_effects(
    table: CaseTable,
    base: str,
    cases: Cases,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    method: Method = DEFAULT_METHOD,
    clusters: Clusters = None,
    margins: Mapping[str, float] | None = None,
) -> list[StratumEffect]:
    """Summaries and effects of every arm in every stratum, in the order of kinds, strata, arms, metrics.

    The family of Holm is all arms in all strata of a kind, per metric: whoever looks at more strata finds more by chance.
    InputError: a case of the table that `cases` does not describe, and whatever `paired_effects` and `strata_of` refuse.
    """
    every = table.cases[base]
    if lacking := [case for case in every if case not in cases]:
        raise InputError(f"cases.csv has no line for {listed(lacking)}; strata need every scored case")
    found: list[StratumEffect] = []
    for kind, strata in strata_of({case: cases[case] for case in every}, kinds).items():
        parts = {name: _only(table, set(members)) for name, members in strata.items()}
        plain = {name: paired_effects(part, base, seed, resamples, method, clusters, margins) for name, part in parts.items()}
        adjusted = _adjusted(plain, parts, base, seed, resamples, method, clusters)
        for name, part in parts.items():
            for summary in summarise_table(part, seed, resamples, method, clusters):
                found.append(StratumEffect(kind, name, summary, adjusted.get((name, summary.arm, summary.metric))))
    return found


def differing_strata(found: Sequence[StratumEffect]) -> list[tuple[str, str, str]]:
    """(kind, arm, metric) where verdicts point both ways: better in one stratum and worse in another."""
    verdicts: dict[tuple[str, str, str], set[str]] = {}
    for one in found:
        if one.effect is not None:
            verdicts.setdefault((one.kind, one.effect.arm, one.effect.metric), set()).add(one.effect.verdict)
    return [key for key, said in verdicts.items() if {"better", "worse"} <= said]


def _adjusted(
    plain: Mapping[str, Sequence[Effect]],
    parts: Mapping[str, CaseTable],
    base: str,
    seed: int,
    resamples: int,
    method: Method,
    clusters: Clusters,
) -> dict[tuple[str, str, str], Effect]:
    """The effects with Holm over arms and strata together, and the detectable difference for that many tests."""
    families: dict[str, list[tuple[str, Effect]]] = {}
    for name, effects in plain.items():
        for effect in effects:
            families.setdefault(effect.metric, []).append((name, effect))
    found = {}
    for metric, members in families.items():
        columns, units = [], []
        for name, effect in members:
            part = parts[name]
            columns.append(differences_of(part.values[effect.arm, metric], part.values[base, metric]))
            units.append(clusters_of(part.cases[base], clusters))
        together = estimate_family(columns, units, seed, resamples, method)
        for (name, effect), estimate in zip(members, together, strict=True):
            verdict = verdict_of(estimate, better_direction(metric), effect.margin)
            column = differences_of(parts[name].values[effect.arm, metric], parts[name].values[base, metric])
            found[name, effect.arm, metric] = replace(effect, **asdict(within_width(estimate, metric, column)), verdict=verdict)
    return found


def _only(table: CaseTable, members: set[str]) -> CaseTable:
    """The table with these cases only. Marks count all cases of an arm, so they are not known here."""
    cases = {arm: tuple(case for case in table.cases[arm] if case in members) for arm in table.arms}
    values = {(arm, metric): column[[case in members for case in table.cases[arm]]] for (arm, metric), column in table.values.items()}
    return CaseTable(table.arms, cases, table.seeds, table.metrics, values, {}, {})


def _strata_of_case(kind: str, case: str, line: Mapping[str, str]) -> list[tuple[float, str]]:
    """The strata of a case, each with a number to sort by."""
    unknown = [(math.inf, "?")]
    if kind == "subtype":
        return [(0, part) for part in dict.fromkeys(map(str.strip, (line.get("subtype") or "").split("+"))) if part] or unknown
    if kind == "site":
        site = (line.get("site") or "").strip()
        return [(0, site)] if site else unknown
    if kind == "volume":
        volume = _number(case, line, "reference_ml")
        return unknown if volume is None else [(-1, "no bleed")] if volume == 0 else [_bin(volume, VOLUME_ENDS_ML, "ml")]
    if kind == "slice spacing":
        spacing = _number(case, line, "spacing_z_mm")
        return unknown if spacing is None else [_bin(spacing, SLICE_ENDS_MM, "mm")]
    y, x = (_number(case, line, column) for column in ("spacing_y_mm", "spacing_x_mm"))
    if y is None or x is None:
        return unknown
    # a header in single precision says 0.41999998 or 0.42000002 for 0.42
    return [(0, f"<= {IN_PLANE_MM} mm") if max(y, x) <= IN_PLANE_MM + 1e-6 else (1, f"> {IN_PLANE_MM} mm")]


def _bin(value: float, ends: Sequence[float], unit: str) -> tuple[float, str]:
    low = 0.0
    for high in ends:
        if value < high:
            return low, f"< {high:g} {unit}" if low == 0 else f"{low:g} to < {high:g} {unit}"
        low = high
    return low, f">= {low:g} {unit}"


def _number(case: str, line: Mapping[str, str], column: str) -> float | None:
    text = (line.get(column) or "").strip()
    if not text:
        return None
    try:
        value = number_of(text)
    except ValueError:
        value = math.nan
    if not (0 <= value < math.inf):
        raise InputError(f"cases.csv, case {case}: {column} is {text!r}; a number, 0 or more, is needed")
    return value
