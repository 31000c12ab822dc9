"""Recipes made of overlays: defaults, presets and arms, the last one winning; and in what two recipes differ."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from ichbench.errors import InputError
from ichbench.recipe import STAGES, InferenceRecipe, PlanRecipe, Recipe
from ichbench.strict import validated

#: tables of the recipe that overlays change key by key
MERGED = (*STAGES, "augment")
#: plan.dims -> the table of an overlay that holds for it alone
CONDITIONS = {2: "when_2d", 3: "when_3d"}
#: fields of `inference` that may be another for a model that is trained: how its tiles are predicted
CHOSEN_LATE = ("mirror", "tile_step", "gaussian", "precision", "convolution")


def diff(arm: Recipe, base: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ: {"training.loss": (base value, arm value)}."""
    ours, theirs = flat(arm.model_dump(mode="json")), flat(base.model_dump(mode="json"))
    return {key: (theirs.get(key), ours.get(key)) for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)}


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A trained model's recipe with some of `CHOSEN_LATE` as "NAME=VALUE" say, values as in TOML (a word needs no quotes)."""
    table: dict[str, Any] = {}
    for text in settings:
        name, given, value = (part.strip() for part in text.partition("="))
        if not given or name not in CHOSEN_LATE:
            raise InputError(f"--set {text!r} is not understood; give NAME=VALUE with one of the names {', '.join(CHOSEN_LATE)}")
        try:
            table[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[name] = value
    inference = validated(InferenceRecipe, recipe.inference.model_dump() | table, "--set")
    return recipe.model_copy(update={"inference": inference})


def make_recipe(*overlays: dict[str, Any], source: str = "recipe") -> Recipe:
    """The defaults with overlays on top, the last one winning; nested tables are merged key by key.

    An overlay's tables `when_2d` and `when_3d` hold right above the rest of it for the `plan.dims` that come out, so that
    one preset can give the two kinds of network patches that cost the same.
    """
    plan = _merged(overlays).get("plan", {})
    dims = plan.get("dims", PlanRecipe().dims) if isinstance(plan, dict) else None
    parts: list[dict[str, Any]] = []
    for overlay in overlays:
        parts.append({key: value for key, value in overlay.items() if key not in CONDITIONS.values()})
        # both are checked as they are read, whichever one holds
        for condition, key in CONDITIONS.items():
            part = overlay.get(key, {})
            if not (isinstance(part, dict) and isinstance(part.get("plan", {}), dict)) or "dims" in part.get("plan", {}):
                raise InputError(f"{source}: {key} must be a table of recipe tables that leaves plan.dims alone, not {part!r}")
            if condition == dims:
                parts.append(part)
            elif part:
                validated(Recipe, {**part, "plan": {**part.get("plan", {}), "dims": condition}}, f"{source}, {key}")
    made = validated(Recipe, _merged(parts), source)
    if made.inference.checkpoint == "best" and made.training.validation_iterations == 0:
        # a model folder of that kind can still be read: its best weights are its final ones
        raise InputError(
            f"{source}: inference.checkpoint = 'best' with training.validation_iterations = 0: nothing says which weights are best; "
            "validate, or use 'final'"
        )
    return made


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"prepare.window": ...}: a stage's tables are opened, a value that is itself a table (a window) stays whole."""
    opened: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and key in MERGED:
            opened |= flat(value, f"{prefix}{key}.")
        else:
            opened[f"{prefix}{key}"] = value
    return opened


def _merged(overlays: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for overlay in overlays:
        merged = _merge(merged, overlay)
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        # a value that happens to be a table (a window) replaces the old one
        merged[key] = (
            _merge(merged[key], value) if key in MERGED and isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged
