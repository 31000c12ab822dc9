"""Optimizers by name, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ichbench.recipe import TrainingRecipe


def _sgd(parameters: Iterator[nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(parameters, recipe.learning_rate, recipe.momentum, 0, recipe.weight_decay, nesterov, fused=True)


def _adamw(parameters: Iterator[nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter], TrainingRecipe], torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors named `optimizer.<parameter>.<key>`, and what of it is no tensor. Rates and the like come
    from the recipe and are left out."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `optimizer_tensors` took.

    Buffers get the memory format of their parameter: a fused step walks both side by side.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        start, number, key = name.split(".", 2)
        if start != "optimizer":
            continue
        like = parameters[int(number)]
        state.setdefault(int(number), {})[key] = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
    for name, value in plain.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
