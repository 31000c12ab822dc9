"""Arm files, presets and whatever else is shipped in `baselines/`: found by name or path, read, and made into recipes.

An *arm* is a TOML file that says why it exists and only what differs from the defaults::

    why = "Level 59, width 96: the swapped reading of the paper's window."
    [prepare]
    window = { level_hu = 59, width_hu = 96 }

A *preset* (smoke, small, full) is an overlay of the same form, applied between the defaults and the arm: it says how
much computing is spent, an arm says what is tried.
Its tables `when_2d` and `when_3d` hold for 2D or 3D networks alone.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ichbench.errors import InputError
from ichbench.overlays import CONDITIONS, flat, make_recipe
from ichbench.recipe import Recipe


@dataclass(frozen=True)
class Arm:
    """A named recipe with its reason; `changes` are the keys it sets, e.g. {"prepare.window": ...}."""

    name: str
    why: str
    recipe: Recipe
    changes: dict[str, Any]


def load_arm(name_or_path: str | Path, preset: str | None = None, folder: Path | None = None) -> Arm:
    """An arm by the name of a shipped file (`window_swapped`) or by the path of a TOML file, under a preset.

    A relative path is looked for in `folder` first (a study file's own folder), then here.
    """
    why, table, source = load_overlay(str(name_or_path), folder)
    recipe = make_recipe(load_preset(preset) if preset else {}, table, source=source)
    return Arm(Path(source).stem, why, recipe, flat(table))


def load_overlay(name_or_path: str, folder: Path | None = None) -> tuple[str, dict[str, Any], str]:
    """An arm file as (why, the table of what it sets, where it was found)."""
    beside = folder / name_or_path if folder is not None else None
    source, text = read_shipped(str(beside) if beside is not None and beside.is_file() else name_or_path)
    table = parse_toml(text, source)
    why = table.pop("why", "")
    if not isinstance(why, str) or not why.strip():
        raise InputError(f'{source}: an arm must say why it exists; add a line such as why = "..." at the top')
    for key in sorted(CONDITIONS.values() & table.keys()):
        raise InputError(f"{source}: an arm says what is tried, for 2D and 3D alike; {key} is for presets")
    return why.strip(), table, source


def load_preset(name: str) -> dict[str, Any]:
    """The overlay of a shipped preset (smoke, small, full) or of a TOML file."""
    source, text = read_shipped(name, "presets")
    table = parse_toml(text, source)
    table.pop("why", None)
    make_recipe(table, source=source)
    return table


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """TOML text as a dict; a syntax error names the file and the place."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: not valid TOML: {error}") from None


def shipped(folder: str = "") -> dict[str, Any]:
    """Name -> file of what is shipped in `baselines/` (or its folder `presets` or `studies`)."""
    root = baselines_root().joinpath(folder) if folder else baselines_root()
    return {item.name[:-5]: item for item in sorted(root.iterdir(), key=lambda item: item.name) if item.name.endswith(".toml")}


def baselines_root() -> Any:
    """`baselines/` inside an installed wheel, else the folder beside the package in a checkout."""
    inside = resources.files("ichbench").joinpath("baselines")
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "baselines"


def read_shipped(name: str, folder: str = "") -> tuple[str, str]:
    """(where, text) of a shipped file by its name, or of a .toml file by its path."""
    known = shipped(folder)
    if name in known:
        return f"{name}.toml", known[name].read_text(encoding="utf-8")
    path = Path(name)
    kind = {"": "arm", "presets": "preset", "studies": "study"}[folder]
    if path.suffix != ".toml":
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"there is no {kind} {name!r}{hint} Known: {', '.join(known)}; or give the path of a .toml file")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        # `baselines/studies/phe.toml` works from anywhere: what the wheel ships is found by its last name
        if not path.exists() and path.stem in known and path.parent.name == (folder or "baselines"):
            return path.name, known[path.stem].read_text(encoding="utf-8")
        raise InputError(f"cannot read the {kind} file {path}: {error}") from None
