"""Kills a training at its n-th file operation, starts it again, and compares what comes out with an unbroken run.

    python tests/crash_harness.py --every 1            kill at every operation, one after another
    python tests/crash_harness.py --random 20          kill twenty times at random operations, on one folder, then finish

The process that is killed is a fork: torch is imported once, a round takes a third of a second. The product knows nothing of
this; operations are counted by Python's audit hook and by a wrapper around `os.fsync`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

WATCHED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def count_operations(under: Path, act: Callable[[int, str], None]) -> None:
    """From now on call act(n, what) right before the n-th operation that changes something below a folder."""
    done = 0

    def saw(what: str) -> None:
        nonlocal done
        done += 1
        act(done, what)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(under)):
                saw(f"open {path}")
        elif event in WATCHED and str(args[0]).startswith((str(under), ".")):
            saw(f"{event} {args[0]}")

    synced = os.fsync

    def fsync(handle: int) -> None:
        saw("fsync")
        synced(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def train(out: Path) -> None:
    """Two epochs of two steps of a tiny network, with a checkpoint after every step."""
    from test_trainer import QUICK, SOLID, blob_cases

    from ichbench.recipe import NetworkRecipe
    from ichbench.training.folder import Saving
    from ichbench.training.trainer import train as train_network

    recipe = QUICK.model_copy(update={"iterations_per_epoch": 2, "moving_average": 0.0})
    train_network(blob_cases(2), blob_cases(1, 50), SOLID, NetworkRecipe(), recipe, 0, out, saving=Saving(every_steps=1))


def forked(out: Path, kill_at: int | None, count_into: Path | None = None) -> int:
    """Train in a child process that kills itself before operation `kill_at`; its wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        operations: list[str] = []

        def act(number: int, what: str) -> None:
            operations.append(what)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        count_operations(out, act)
        train(out)
        if count_into is not None:
            count_into.write_text("\n".join(operations))
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def outcome(out: Path) -> dict[str, object]:
    """What must be the same, whatever happened on the way."""
    from ichbench.training.logs import MEASURED, read_log

    names = ("final.safetensors", "final.json", "best.safetensors", "best.json")
    lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in read_log(out / "log.jsonl")]
    # nothing half-written is left, but for what a death in its very last moments could not tidy up
    files = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    return {name: (out / name).read_bytes() for name in names} | {"log": lines, "files": files}


def rounds(every: int, random_rounds: int, seed: int, say: Callable[[str], None]) -> tuple[int, int]:
    """(operations of an unbroken run, rounds done). AssertionError at the first round that ends differently."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # compiles what every child would compile for itself
        train(root / "warm")
        if status := forked(root / "whole", None, root / "operations"):
            raise AssertionError(f"the unbroken run ended with status {status}")
        whole, operations = outcome(root / "whole"), (root / "operations").read_text().splitlines()
        done = 0
        for number in range(1, len(operations) + 1, every) if every else ():
            out = root / f"at{number}"
            status = forked(out, number)
            assert os.WIFSIGNALED(status), f"operation {number} was not reached"
            assert forked(out, None) == 0, f"killed at operation {number} ({operations[number - 1]}), it did not go on"
            assert outcome(out) == whole, f"killed at operation {number} ({operations[number - 1]}), it ended differently"
            done += 1
        draw = random.Random(seed)
        if random_rounds:
            out = root / "random"
            for _ in range(random_rounds):
                forked(out, draw.randint(1, len(operations)))
                done += 1
            assert forked(out, None) == 0, f"seed {seed}: it did not go on"
            assert outcome(out) == whole, f"seed {seed}: it ended differently"
        say(f"{done} kills over {len(operations)} operations: every outcome is that of the unbroken run")
        return len(operations), done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=0, help="kill at every n-th operation, each on a folder of its own")
    parser.add_argument("--random", type=int, default=0, help="so many kills on one folder")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import test_trainer  # noqa: F401  # imported before the forks

    rounds(given.every, given.random, given.seed, print)
