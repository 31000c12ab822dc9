"""Nothing that kills a training, at any moment, changes what comes out of it. ICHBENCH_CRASH_ROUNDS=20 for more rounds by hand."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROUNDS = int(os.environ.get("ICHBENCH_CRASH_ROUNDS", "5"))
TESTS = Path(__file__).resolve().parent
PRESET = """
[plan]
base_features = 4
max_features = 8
memory_gb = 0.01
[training]
epochs = 6
iterations_per_epoch = 8
validation_iterations = 1
moving_average = 0.0
[inference]
mirror = false
tile_step = 1.0
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.slow
def test_killed_at_every_nth_file_operation() -> None:
    command = [sys.executable, str(TESTS / "crash_harness.py"), "--every", str(max(1, 50 // ROUNDS)), "--random", str(ROUNDS)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "every outcome is that of the unbroken run" in done.stdout


@pytest.mark.parametrize("what", [pytest.param(("--overwrite", 9), id="training"), pytest.param(("--aside", 5), id="results")])
def test_overwriting_killed_at_every_nth_file_operation(what: tuple[str, int]) -> None:
    """Either the old training is whole again, or the new one goes on. ICHBENCH_CRASH_ROUNDS=45 kills at every operation."""
    command = [sys.executable, str(TESTS / "crash_harness.py"), what[0], str(max(1, what[1] * 5 // ROUNDS))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " kills: " in done.stdout


def facts(out: Path) -> dict[str, bytes]:
    """Everything that a time or a date cannot change."""
    found = {}
    for path in sorted(out.rglob("*")):
        inside = path.relative_to(out)
        timed = path.name in ("training.json", "log.jsonl", "curves.png", "run.json", "study.json") or inside.parts[0] in (
            "steps",
            "checkpoints",
        )
        if path.is_file() and not timed and not any(part.startswith(".") for part in inside.parts):
            found[str(inside)] = path.read_bytes()
    return found


def kill_and_finish(command: list[str], kills: int) -> None:
    """Start a command again and again, kill -9 it and all its children at a random time, and in the end let it be."""
    seed = random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(draw.uniform(1.0, 12.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "run-ablation"])
def test_killed_at_random_times(what: str, small_phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "preset.toml").write_text(PRESET)
    (tmp_path / "study.toml").write_text('why = "one arm"\nfloor = false\nceilings = false\n')
    commands = {
        "train": ["-m", "ichbench.cli", "train", str(small_phantom), "--fold", "full", "--save-every", "0"],
        "run-ablation": [
            "-c",
            "from ichbench.cli import run_ablation_main; run_ablation_main()",
            str(tmp_path / "study.toml"),
            *("--cohort", str(small_phantom), "--workers", "1"),
        ],
    }
    common = ["--preset", str(tmp_path / "preset.toml"), "--device", "cpu", "--threads", "1"]
    base = [sys.executable, *commands[what], *common]
    assert subprocess.run([*base, "--out", str(tmp_path / "whole")], env=environment(), capture_output=True, check=False).returncode == 0
    kill_and_finish([*base, "--out", str(tmp_path / "broken")], ROUNDS // 2)
    assert facts(tmp_path / "broken") == facts(tmp_path / "whole")
