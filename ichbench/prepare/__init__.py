"""Case -> Prepared, and the exact way back. Files in reading order: one step a file, then the plan, the pipeline, the store."""

from __future__ import annotations

from ichbench.prepare.fingerprint import Fingerprint, case_facts, combine, fingerprint
from ichbench.prepare.geometry import FlagGeometry, Geometry
from ichbench.prepare.locations import foreground_locations, location_classes
from ichbench.prepare.pipeline import (
    Prepared,
    ShearedGridWarning,
    flagged_case,
    prepare_case,
    restore_labels,
    restore_logits,
    roundtrip,
)
from ichbench.prepare.plan import Plan, make_plan
from ichbench.prepare.store import list_prepared, read_prepared, write_prepared
from ichbench.prepare.window import ConstantImageWarning

__all__ = [
    "ConstantImageWarning",
    "Fingerprint",
    "FlagGeometry",
    "Geometry",
    "Plan",
    "Prepared",
    "ShearedGridWarning",
    "case_facts",
    "combine",
    "fingerprint",
    "flagged_case",
    "foreground_locations",
    "list_prepared",
    "location_classes",
    "make_plan",
    "prepare_case",
    "read_prepared",
    "restore_labels",
    "restore_logits",
    "roundtrip",
    "write_prepared",
]
