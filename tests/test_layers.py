"""Imports only point up the tree of DESIGN, section 1: rooms from rooms above, files from files above; no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ichbench"

#: rooms from top to bottom; inside a room, files from top to bottom
HOUSE: dict[str, tuple[str, ...]] = {
    "errors": (),
    "compute": (),
    "cases": (
        "case",
        "labels",
        "files",
        "nifti",
        "images",
        "splits",
        "folders",
        "phantom_shapes",
        "phantom_bleeds",
        "phantom_draw",
        "phantom_render",
        "phantom",
        "cohort",
    ),
    "scoring": (
        "overlap",
        "islands",
        "nearest",
        "lattice",
        "surface",
        "edges",
        "lesions",
        "lesionwise",
        "protocol",
        "score",
        "strict_csv",
        "tables",
        "detection",
        "definitions",
        "head",
        "anomalies",
        "layouts",
        "geometry",
        "pairs",
        "folders",
        "exports",
        "screen",
        "probes",
    ),
    "strict": (),
    "recipe": (),
    "overlays": (),
    "arms": (),
    "prepare": (
        "window",
        "resize",
        "linear",
        "downsample",
        "slices",
        "crop",
        "normalize",
        "resample",
        "fingerprint",
        "topology",
        "target",
        "configuration",
        "plan",
        "explain",
        "plans_json",
        "plans_read",
        "nnunet_files",
        "geometry",
        "restore",
        "locations",
        "pipeline",
        "survey",
        "store",
        "whole",
    ),
    "network": (
        "conv",
        "norm",
        "blocks",
        "unet",
        "winograd",
        "native",
        "fast",
        "compiled",
        "losses",
        "weights",
        "checkpoint",
        "nnunet_weights",
    ),
    "inference": (
        "sliding",
        "ensemble",
        "cascade",
        "postprocess",
        "predictors",
        "select",
        "inputs",
        "archives",
        "folders",
        "model",
        "choice",
        "nnunet_import",
        "nnunet_export",
    ),
    "augmentation": ("boxes", "patches", "draw", "straight", "spatial", "intensity", "cascade_augment", "augment", "batches"),
    "training": (
        "schedule",
        "supervision",
        "parallel",
        "checkpoint",
        "folder",
        "keeper",
        "logs",
        "optimizers",
        "trainer",
        "machine",
    ),
    "board": (
        "intervals",
        "signflip",
        "summary",
        "effects",
        "factorial",
        "strata",
        "curves",
        "words",
        "render",
        "report",
        "runs",
        "check",
        "check_report",
        "cube",
        "wins",
        "ranking",
        "resampling",
        "grid",
        "published",
        "rank_board",
        "rank_render",
        "published_render",
    ),
    "ablation": (
        "study",
        "folds",
        "dag",
        "stages",
        "step",
        "preload",
        "engine",
        "settings",
        "facts",
        "run",
        "replacing",
        "single",
        "recheck",
    ),
    "progress": (),
    "commands": ("named", "models", "plans", "boards", "effects", "training"),
    "cli": (),
}
PLACE = {
    ".".join(["ichbench", room, *name]): (number, inside)
    for number, (room, files) in enumerate(HOUSE.items())
    for inside, name in enumerate([(), *[(file,) for file in files]])
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ichbench":
            names |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in PLACE else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "ichbench"}
    return names


def test_every_file_has_a_place() -> None:
    assert sorted(name for name in modules() if name not in PLACE and name != "ichbench") == []
    assert sorted(name for name in PLACE if name not in modules()) == []


@pytest.mark.parametrize("name", [name for name in modules() if name != "ichbench"])
def test_imports_point_up(name: str) -> None:
    below = []
    for other in imported(modules()[name]) - {"ichbench", name}:
        # a room's __init__ gathers its own files
        gathers = modules()[name].name == "__init__.py" and other.startswith(f"{name}.")
        if not gathers and PLACE[other] >= PLACE[name]:
            below.append(other)
    assert below == []


@pytest.mark.parametrize("room", ["cases", "scoring", "board", "prepare"])
def test_rooms_without_torch(room: str) -> None:
    for name, path in modules().items():
        if name.startswith(f"ichbench.{room}"):
            assert "torch" not in {
                line.split()[1].split(".")[0]
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.lstrip().startswith(("import ", "from "))
            }, name
