"""Strict tables: models that refuse what they do not know, and one sentence for what was refused."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from ichbench.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; an instance never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def validated(model: type[Model], table: dict[str, Any], source: str) -> Model:
    """The model of a table as TOML gives it; `InputError`, which begins with `source`, for the first thing that is wrong with it."""
    try:
        return model.model_validate(_lists_to_tuples(table))
    except ValidationError as error:
        raise InputError(_explain(error, model, source)) from None


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def _explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """The first problem in one sentence: where, what came, what is allowed, the nearest known key."""
    problems = error.errors()
    # with a union ("off" or a table) pydantic reports every branch; the deepest path is the branch the user meant
    first = max(problems, key=lambda problem: (len(problem["loc"]), problem["type"] == "extra_forbidden"))
    where = [str(part) for part in first["loc"]]
    if not where:
        return f"{source}: {first['msg'].removeprefix('Value error, ')}"
    fields = _fields_at(where[:-1], model)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where[-1], fields, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{source}: unknown key {'.'.join(_named(where, model))!r}; {hint}known keys here: {', '.join(fields) or 'none'}"
    if first["type"] == "missing":
        return f"{source}: {'.'.join(_named(where[:-1], model))} needs the key {where[-1]!r}, but came as {first.get('input')!r}"
    came = first.get("input")
    choices = [problem["msg"] for problem in problems if _named([str(part) for part in problem["loc"]], model) == _named(where, model)]
    return f"{source}: {'.'.join(_named(where, model))} = {came!r} is not allowed: {'; or '.join(dict.fromkeys(choices))}"


def _named(where: list[str], model: type[BaseModel]) -> list[str]:
    """Drop pydantic's names of union branches from a location, keeping only keys a user wrote."""
    branches = {"int", "float", "bool", "str"} | _branches(model)
    here: Any = model
    kept: list[str] = []
    for part in where:
        if here is not None and part in here.model_fields:
            kept.append(part)
            here = _model_of(here, part)
        elif part.isdigit():
            kept.append(part)
        elif here is not None and part == where[-1] and "[" not in part and part not in branches:
            kept.append(part)
    return kept


def _branches(model: type[BaseModel]) -> set[str]:
    """Names of the models that are one choice of several, such as `"off" | Window`, at any depth."""
    found: set[str] = set()
    for key, field in model.model_fields.items():
        inner = _model_of(model, key)
        if inner is not None:
            found |= _branches(inner) | ({inner.__name__} if inner is not field.annotation else set())
    return found


def _model_of(model: type[BaseModel], key: str) -> Any:
    """The model inside a field's annotation, if there is one (also inside `"off" | Window`)."""
    queue = [model.model_fields[key].annotation]
    while queue:
        item = queue.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
        queue.extend(cast(Any, getattr(item, "__args__", ())))
    return None


def _fields_at(where: list[str], model: type[BaseModel]) -> list[str]:
    here: Any = model
    for part in where:
        if here is not None and part in here.model_fields:
            here = _model_of(here, part)
    return list(here.model_fields) if here is not None else []
