"""A study: one base, some factors, and how they are combined into arms."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ichbench.arms import Arm, load_arm, load_overlay, load_preset, parse_toml, read_shipped, shipped
from ichbench.errors import InputError
from ichbench.overlays import diff, make_recipe
from ichbench.recipe import Recipe

#: arms whose masks need no training: they have neither fold nor seed
UNTRAINED = ("threshold", "roundtrip", "folder")


class RunDefaults(BaseModel):
    """What a study file may say about how it is run; the command line and ICHBENCH_* variables win over it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cohort: str | None = None
    preset: str | None = None
    seeds: tuple[int, ...] | None = None
    folds: str | None = None


class StudyFile(BaseModel):
    """A study as it is written down."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    why: Annotated[str, Field(min_length=1)]
    base: str = "base"
    design: Literal["one-at-a-time", "factorial"] = "one-at-a-time"
    floor: Literal[False] | str = "floor_threshold"
    ceilings: bool = True
    #: somebody else's predictions: arm name -> folder, relative to the study file
    predictions: dict[str, str] = {}
    factors: dict[str, tuple[str, ...]] = {}
    run: RunDefaults = RunDefaults()


@dataclass(frozen=True)
class Study:
    """The arms of a study, base first, with resolved recipes. `predictions` holds the folder of every folder arm.

    `design` and `factors` say how the arms were combined, for the effects.
    """

    name: str
    why: str
    base: str
    arms: tuple[Arm, ...]
    predictions: dict[str, Path]
    defaults: RunDefaults
    design: str = "one-at-a-time"
    factors: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def read_study_file(name_or_path: str) -> tuple[str, StudyFile, Path]:
    """Name, content and folder of a shipped study or of a TOML file."""
    known = shipped("studies")
    source, text = read_shipped(name_or_path, "studies")
    table = parse_toml(text, source)
    try:
        parsed = StudyFile.model_validate(table)
    except ValidationError as error:
        raise InputError(_explain(error, source)) from None
    name = Path(source).stem
    return name, parsed, Path() if name_or_path in known else Path(source).resolve().parent


def make_study(name_or_path: str, preset: str, extra_predictions: dict[str, Path] | None = None) -> Study:
    """Read a study and resolve its arms under a preset.

    one-at-a-time: base, then every level of every factor alone. factorial: every combination of (off or a level) over
    the factors, named `a+b`. Floor, ceilings (one per distinct preparation and plan) and folder arms follow.
    """
    name, parsed, folder = read_study_file(name_or_path)
    base = load_arm(parsed.base, preset, folder)
    arms = [base]
    combinations: list[tuple[str, ...]]
    if parsed.design == "one-at-a-time":
        combinations = [(level,) for levels in parsed.factors.values() for level in levels]
    else:
        chosen = itertools.product(*[(None, *levels) for levels in parsed.factors.values()])
        combinations = [tuple(level for level in choice if level is not None) for choice in chosen if any(choice)]
    arms += [_combine(parsed.base, combination, preset, folder) for combination in combinations]
    if parsed.floor is not False:
        arms.append(load_arm(parsed.floor, preset, folder))
    if parsed.ceilings:
        arms += _ceilings(arms)
    predictions = {key: (folder / value) for key, value in parsed.predictions.items()} | (extra_predictions or {})
    for key in predictions:
        arms.append(replace(load_arm("folder", preset), name=key))
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"study {name}: arms named twice: {', '.join(twice)}; every arm needs its own name")
    return Study(name, parsed.why, arms[0].name, tuple(arms), predictions, parsed.run, parsed.design, parsed.factors)


def _combine(base: str, levels: tuple[str, ...], preset: str, folder: Path) -> Arm:
    if len(levels) == 1:
        arm = load_arm(levels[0], preset, folder)
        overlays = [load_overlay(base, folder)[1], load_overlay(levels[0], folder)[1]]
    else:
        overlays = [load_overlay(base, folder)[1], *(load_overlay(level, folder)[1] for level in levels)]
        whys = "; ".join(load_overlay(level, folder)[0] for level in levels)
        arm = Arm("+".join(levels), f"Together: {whys}", Recipe(), {})
    recipe = make_recipe(load_preset(preset), *overlays, source=arm.name)
    return replace(arm, recipe=recipe, changes={key: pair[1] for key, pair in diff(recipe, make_recipe(load_preset(preset))).items()})


def _ceilings(arms: list[Arm]) -> list[Arm]:
    """One roundtrip arm per distinct preparation and plan among the trained arms, named after the first that uses it."""
    ceiling = load_arm("ceiling_roundtrip")
    seen: set[tuple[str, str]] = set()
    made = []
    for arm in arms:
        keys = arm.recipe.stage_keys()
        if arm.recipe.inference.predictor != "unet" or (keys["prepare"], keys["plan"]) in seen:
            continue
        seen.add((keys["prepare"], keys["plan"]))
        recipe = arm.recipe.model_copy(update={"inference": ceiling.recipe.inference})
        why = f"{ceiling.why} Preparation of {arm.name}."
        made.append(Arm(f"ceiling_{arm.name}", why, recipe, arm.changes | ceiling.changes))
    return made


def _explain(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known: dict[str, Any] = dict((RunDefaults if first["loc"][0] == "run" else StudyFile).model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{source}: unknown key {where!r}; {hint}known keys here: {', '.join(known)}"
    return f"{source}: {where} = {first.get('input')!r} is not allowed: {first['msg']}"
