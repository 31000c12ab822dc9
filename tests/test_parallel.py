"""Several processes against one: the same losses, the same weights (gloo on the CPU, float64)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_trainer import SOLID
from torch import nn

from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.errors import InputError
from ichbench.network.losses import LOSSES, Supervision, supervised
from ichbench.network.unet import make_unet
from ichbench.recipe import NetworkRecipe
from ichbench.training.parallel import ALONE, Team

STEPS = 10
SETTINGS: dict[str, tuple[LabelRules, dict[str, Any], str]] = {
    "batch dice": (plain_rules(2), {"batch_dice": True}, "dice_ce"),
    "dice of samples": (plain_rules(2), {}, "dice_ce"),
    "ignore label": (plain_rules(2, 2), {"batch_dice": True}, "dice_ce"),
    "regions, ignore label": (LabelRules(("a", "b"), ((1, 2), (2,)), (1, 2), 3), {"batch_dice": True}, "dice_ce"),
    "class weights": (plain_rules(2), {"class_weights": (1.0, 3.0)}, "ce"),
}


def steps_of(team: Team, name: str, batch_size: int) -> tuple[list[float], str]:
    """Ten steps on drawn batches: the losses, and what the weights are in the end."""
    rules, settings, loss = SETTINGS[name]
    torch.set_num_threads(1)
    network = make_unet(SOLID, NetworkRecipe(), seed=1).double()
    trained = team.wrapped(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, nesterov=True)
    how = Supervision(rules, **settings, pooled=None if team.size == 1 else team.pooled)
    generator, losses = torch.Generator().manual_seed(3), []
    mine = list(team.share(batch_size))
    for _ in range(STEPS):
        image = torch.randn(batch_size, 1, *SOLID.patch_size, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 2 + (rules.ignore or 1) - 1, (batch_size, *SOLID.patch_size), generator=generator)
        if rules.ignore is not None:
            # what is ignored is not spread evenly over the processes
            labels[0, : SOLID.patch_size[0] // 2] = rules.ignore
        optimizer.zero_grad()
        value = supervised(LOSSES[loss], trained(image[mine]), labels[mine], how, 1)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses, str(sum(float(p.detach().abs().sum()) for p in network.parameters()))


#: batches that divide by two processes and that do not
RUNS = [("batch dice", 2), *((name, 3) for name in SETTINGS)]


def one_process(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        found = [steps_of(Team(rank, size), name, batch_size) for name, batch_size in RUNS]
    finally:
        dist.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """In float64 the losses of ten steps agree within 1e-5 (they do to 1e-10), also where the batch does not divide."""
    mp.spawn(one_process, (2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for (name, batch_size), one, two in zip(RUNS, *told, strict=True):
        alone, weights = steps_of(ALONE, name, batch_size)
        assert alone[0] != pytest.approx(alone[-1], rel=1e-3), "nothing was learnt, so nothing was compared"
        for losses, theirs in (one, two):
            np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-10, err_msg=name)
            assert float(theirs) == pytest.approx(float(weights), rel=1e-10)
        # both processes hold the same weights to the bit
        assert one == two


def test_shares_of_a_batch() -> None:
    for batch_size in range(1, 9):
        for size in range(1, batch_size + 1):
            shares = [Team(rank, size).share(batch_size) for rank in range(size)]
            assert [sample for share in shares for sample in share] == list(range(batch_size))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(InputError, match="a batch of 2 cannot be split over 3 processes"):
        Team(0, 3).share(2)
