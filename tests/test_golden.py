"""The oracles of the facts, frozen: the scorer against them, they against the facts' digits, and the file against its script.

Rewrite the frozen values: `python tests/golden/scoring_oracles.py --rewrite`
"""

from __future__ import annotations

import csv
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from golden import scoring_oracles
from golden.scoring_oracles import Known, frozen, known

from ichbench.scoring import PROTOCOLS, score_masks
from ichbench.scoring.surface import surface_areas_mm2, surface_record

#: the facts rounded this one twice: .86345 to .8635 to .864
ROUNDED_TWICE = ("two ellipsoids, large", "strict:nsd_fractions@2")
ORACLES = {one.name: one for one in known()}


def expected(name: str) -> dict[str, float]:
    return {quantity: float(value) for oracle, quantity, value, *_ in frozen() if oracle == name}


def by_ichbench(one: Known) -> dict[str, float]:
    asked: dict[str, list[str]] = {}
    for key in one.printed:
        protocol, _, metric = key.partition(":")
        asked.setdefault(protocol, []).append(metric)
    found: dict[str, float] = {}
    for protocol in asked.keys() & PROTOCOLS.keys():
        values = score_masks(*one.pair, one.spacing_mm, protocol, asked[protocol])
        found |= {f"{protocol}:{metric}": value for metric, value in values.items()}
    record = surface_record(*one.pair, one.spacing_mm)
    sides = {"reference": (record.reference_mm, record.reference_mm2), "predicted": (record.predicted_mm, record.predicted_mm2)}
    for metric in asked.get("record", []):
        name, _, parameter = metric.partition("@")
        distances, areas = sides.get(name.rpartition("_")[2], sides["reference"])
        if name.startswith("mean_"):
            found[f"record:{metric}"] = float(np.average(distances, weights=areas))
        elif name.startswith("overlap_"):
            found[f"record:{metric}"] = float(areas[distances <= float(parameter)].sum() / areas.sum())
        elif name == "code_area":
            distinct = np.unique(np.round(surface_areas_mm2(one.spacing_mm), 12))
            assert (distinct.size, distinct[0]) == (13, 0.0)
            found[f"record:{metric}"] = float(distinct[1 + int(parameter)])
        else:
            found[f"record:{metric}"] = float(areas.sum())
    return found


@pytest.mark.parametrize("name", list(ORACLES))
def test_the_scorer_gives_the_frozen_value(name: str) -> None:
    assert by_ichbench(ORACLES[name]) == pytest.approx(expected(name), rel=1e-11, abs=0, nan_ok=True)


@pytest.mark.parametrize("name", list(ORACLES))
def test_the_reference_still_gives_the_frozen_value(name: str) -> None:
    """The rewrite command would write what is there."""
    assert scoring_oracles.by_reference(ORACLES[name]) == pytest.approx(expected(name), rel=1e-13, abs=0, nan_ok=True)


def test_the_frozen_values_are_those_of_the_facts_in_all_their_digits() -> None:
    rows = frozen()
    assert [(oracle, quantity) for oracle, quantity, *_ in rows] == [(one.name, key) for one in known() for key in one.printed]
    for oracle, quantity, value, printed, source in rows:
        assert ORACLES[oracle].printed[quantity] == printed
        assert ORACLES[oracle].source == source
        if printed in ("inf", "nan"):
            assert value == printed
        elif printed:
            if (oracle, quantity) == ROUNDED_TWICE:
                value = str(round(float(value), 4))
            half = Decimal(5).scaleb(Decimal(printed).as_tuple().exponent - 1)  # type: ignore[operator]
            assert abs(Decimal(value) - Decimal(printed)) <= half, (oracle, quantity)


def test_the_rewrite_command_writes_the_file(tmp_path: Path) -> None:
    # the folder is named because another test may have set PYTHONSAFEPATH
    program = "import sys; from pathlib import Path; sys.path.insert(0, '.'); from golden import scoring_oracles as s; "
    program += f"s.FILE = Path({str(tmp_path / 'f.csv')!r}); s.rewrite()"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "f.csv").open(newline="") as file:
        fresh = [tuple(row) for row in csv.reader(file)][1:]
    assert [(row[0], row[1], *row[3:]) for row in fresh] == [(row[0], row[1], *row[3:]) for row in frozen()]
