"""What a user sees while a study runs without a terminal."""

from __future__ import annotations

import pytest

from ichbench.ablation.dag import Dag, Step
from ichbench.ablation.engine import Event
from ichbench.progress import Progress

STEPS = [Step("prepare", {"n": 1}, label="prepare base"), Step("train", {"n": 2}, label="train base")]
DAG = Dag({step.id: step for step in STEPS}, ())


def event(kind: str, step: Step | None = None, finished: int = 0, seconds: float = 3.0, message: str = "") -> Event:
    return Event(kind, step, finished, len(STEPS), seconds, 65.0, ("train base (3/10 epochs)",), message)


def test_one_line_per_finished_step_with_the_time_to_go(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(DAG) as progress:
        progress.show(event("found", STEPS[0], 1))
        progress.show(event("began", STEPS[1], 1))
        progress.show(event("ended", STEPS[1], 2, 130.0))
    assert capsys.readouterr().out.splitlines() == [
        "1 of 2 steps were finished before; going on from there",
        "[2/2] 2 min 10 s  train base; about 65 s to go",
    ]


def test_signs_of_life_failures_and_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(DAG) as progress:
        progress.show(event("tick", None, 0, 30.0))
        progress.show(event("tick", None, 0, 61.0))
        progress.show(event("failed", STEPS[0], 1, 62.0, "the mask is upside down"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "at work: train base (3/10 epochs); about 65 s to go" in lines[0]
    assert lines[1].endswith("failed: prepare base: the mask is upside down")
    with Progress(DAG) as progress:
        progress.show(event("found", STEPS[0], 1))
        progress.show(event("found", STEPS[1], 2))
    assert capsys.readouterr().out == "all 2 steps were finished before\n"
