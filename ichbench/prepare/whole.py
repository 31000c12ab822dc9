"""A cohort, prepared whole: fingerprint and plan of its training cases, and every case as arrays on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ichbench.cases.cohort import Cohort
from ichbench.cases.files import write_atomically
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.locations import location_classes
from ichbench.prepare.pipeline import prepare_case
from ichbench.prepare.plan import Plan
from ichbench.prepare.store import write_prepared
from ichbench.prepare.survey import cohort_fingerprint, cohort_plan
from ichbench.recipe import PlanRecipe, PrepareRecipe


def prepare_cohort(
    cohort: Cohort,
    ids: Sequence[str],
    prepare: PrepareRecipe,
    recipe: PlanRecipe,
    out: Path,
    found: Fingerprint | None = None,
    progress: Callable[[str], None] = lambda case_id: None,
) -> Plan:
    """Write `fingerprint.json`, `plan.json` and `cases/` (`store.write_prepared`) into `out`; returns the plan.

    ids    the cases to prepare; those of the cohort's training cases are also what is measured, unless `found` is given
    """
    measured = found or cohort_fingerprint(cohort, [name for name in ids if name in set(cohort.train_ids)], prepare)
    plan = cohort_plan(cohort, measured, prepare, recipe)
    write_atomically(out / "fingerprint.json", json.dumps(measured.to_json(), indent=1).encode())
    write_atomically(out / "plan.json", json.dumps(plan.to_json(), indent=1).encode())
    regions = cohort.rules.targets if cohort.rules.has_regions else ()
    classes = location_classes(cohort.labels.values(), cohort.ignore_label, regions)
    for name in ids:
        write_prepared(out / "cases", prepare_case(cohort.load(name, prepare.compatibility == "nnunet"), prepare, plan, classes))
        progress(name)
    return plan
