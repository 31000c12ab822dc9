"""Several processes against one: the same losses, the same weights (gloo on the CPU, float64)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_trainer import QUICK, SOLID, blob_cases, lines
from torch import nn

from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.errors import InputError
from ichbench.network.losses import LOSSES, Supervision, supervised
from ichbench.network.unet import make_unet
from ichbench.recipe import NetworkRecipe
from ichbench.scoring.tables import read_scores
from ichbench.training.parallel import ALONE, Team
from ichbench.training.trainer import train

STEPS = 10
#: the lowest head of three stages is never trained, so it has no gradient that could be averaged
DEEP = replace(
    SOLID,
    features=(4, 8, 8),
    strides=(*SOLID.strides, (1, 2, 2)),
    kernels=(*SOLID.kernels, (3, 3, 3)),
    convs_per_stage=(2, 2, 2),
    decoder_convs=(2, 2),
)
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
    network = make_unet(DEEP, NetworkRecipe(), seed=1).double()
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
    team = Team(rank, size)
    try:
        found = [steps_of(team, name, batch_size) for name, batch_size in RUNS]
        results = [trained(team, Path(folder) / "out") for _ in range(2)]
    finally:
        dist.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps([found, results]))


def trained(team: Team, out: Path) -> list[Any]:
    """Two epochs by the trainer itself, batches of three; a second call finds the training finished."""
    plan = replace(DEEP, batch_size=3)
    result = train(blob_cases(3), blob_cases(2, 50), plan, NetworkRecipe(), QUICK, 0, out, team=team)
    return [result.final_sha256, result.best_sha256, result.moving_average, result.epochs]


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """In float64 the losses of ten steps agree within 1e-5 (they do to 1e-10), also where the batch does not divide."""
    mp.spawn(one_process, (2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    told, results = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True)
    # the trainer: all processes say the same, twice; and what one process says but for rounding
    assert results[0] == results[1]
    assert results[0][0] == results[0][1]
    trained(ALONE, tmp_path / "alone")
    alone_log, team_log = lines(tmp_path / "alone"), lines(tmp_path / "out")
    assert len(alone_log) == len(team_log) == QUICK.epochs
    for alone_line, line in zip(alone_log, team_log, strict=True):
        assert line["train_loss"] == pytest.approx(alone_line["train_loss"], abs=1e-4)
        assert line["val_loss"] == pytest.approx(alone_line["val_loss"], abs=1e-4)
        assert line["pseudo_dice"] == pytest.approx(alone_line["pseudo_dice"], abs=0.01)
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


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains(small_phantom: Path, tiny_preset: Path, tmp_path: Path) -> None:
    """`ichbench train` as torchrun starts it: one folder, one log, and the masks of a training by one process."""
    command = ["-m", "ichbench.cli", "train", str(small_phantom), "--fold", "full", "--preset", str(tiny_preset), "--device", "cpu"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, first in (("team", start), ("alone", [sys.executable])):
        done = subprocess.run([*first, *command, "--out", str(tmp_path / name)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    scores = [{row[:5]: row.value for row in read_scores(tmp_path / name / "scores.csv")} for name in ("team", "alone")]
    assert scores[0].keys() == scores[1].keys()
    dice = [[value for row, value in one.items() if row[4] == "dice"] for one in scores]
    assert dice[0] == pytest.approx(dice[1], abs=0.02)
    logs = [lines(tmp_path / name) for name in ("team", "alone")]
    assert [one["train_loss"] for one in logs[0]] == pytest.approx([one["train_loss"] for one in logs[1]], abs=1e-4)
