"""Kills a training at its n-th file operation, starts it again, and compares what comes out with an unbroken run.

    python tests/crash_harness.py --every 1            kill at every operation, one after another
    python tests/crash_harness.py --random 20          kill twenty times at random operations, on one folder, then finish
    python tests/crash_harness.py --overwrite 1        kill one that overwrites another: the old one is whole, or the new one goes on
    python tests/crash_harness.py --aside 1            the same for the results that step aside while it prepares

The process that is killed is a fork: torch is imported once, a round takes a third of a second. The product knows nothing of
this; operations are counted by Python's audit hook and by a wrapper around `os.fsync`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
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
        elif event in WATCHED and (str(args[0]).startswith((str(under), ".")) or "/" not in str(args[0])):
            # a bare name is what `shutil.rmtree` gives, beside a handle of its folder
            saw(f"{event} {args[0]}")

    synced = os.fsync

    def fsync(handle: int) -> None:
        saw("fsync")
        synced(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def train(out: Path, seed: int = 0, overwrite: bool = False) -> None:
    """Two epochs of two steps of a tiny network, with a checkpoint after every step."""
    from test_trainer import QUICK, SOLID, blob_cases

    from ichbench.recipe import NetworkRecipe
    from ichbench.training.folder import Saving
    from ichbench.training.trainer import train as train_network

    recipe = QUICK.model_copy(update={"iterations_per_epoch": 2, "moving_average": 0.0})
    about = {"saving": Saving(every_steps=1), "overwrite": overwrite}
    train_network(blob_cases(2), blob_cases(1, 50), SOLID, NetworkRecipe(), recipe, seed, out, **about)


def forked(out: Path, kill_at: int | None, count_into: Path | None = None, task: Callable[[Path], None] = train) -> int:
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
        task(out)
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


def overwriting(every: int, say: Callable[[str], None]) -> None:
    """Kill a training that overwrites a finished one. AssertionError where neither the old nor the new one comes out."""

    def replacing(out: Path) -> None:
        train(out, seed=0, overwrite=True)

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        train(root / "old", seed=1)
        train(root / "new")
        old, new, mark = outcome(root / "old"), outcome(root / "new"), (root / "old/training.json").read_bytes()
        shutil.copytree(root / "old", root / "whole")
        assert forked(root / "whole", None, root / "operations", replacing) == 0
        assert outcome(root / "whole") == new
        operations, kept, begun = (root / "operations").read_text().splitlines(), 0, 0
        for number in range(1, len(operations) + 1, every):
            out = shutil.copytree(root / "old", root / f"at{number}")
            assert os.WIFSIGNALED(forked(out, number, task=replacing)), f"operation {number} was not reached"
            at = f"killed at operation {number} ({operations[number - 1]})"
            if (out / "training.json").read_bytes() == mark:
                kept += 1
                train(out, seed=1)
                assert outcome(out) == old, f"{at}, the old training is not whole"
            else:
                begun += 1
                train(out)
                assert outcome(out) == new, f"{at}, the new training ended differently"
            shutil.rmtree(out)
        assert kept, "the old training was never there"
        assert begun, "the new training never began"
        say(f"{kept + begun} kills: {kept} left the old training whole, {begun} let the new one go on")


def stepping_aside(every: int, say: Callable[[str], None]) -> None:
    """Kill what sets results aside, then what brings them back. AssertionError where they are lost, or mixed with new ones."""
    from ichbench.ablation.replacing import ASIDE, come_back, set_aside

    left = ("fold.json", "predictions", "prepared", "scores.csv", "model.json")

    def results(out: Path, name: str, begun: bool) -> None:
        (out / "prepared").mkdir(parents=True)
        for path in ("fold.json", "prepared/case.npy"):
            (out / path).write_text(name)
        if begun:
            (out / "training.json").write_text(name)

    def finished(out: Path) -> None:
        results(out, "old", begun=True)
        (out / "predictions").mkdir()
        (out / "predictions/case.nii.gz").write_text("old")
        (out / "scores.csv").write_text("old")

    def replacing(out: Path) -> None:
        with set_aside(out, left):
            results(out, "new", begun=False)
            # made by the new one, unknown to the old one
            (out / "model.json").write_text("new")
            (out / "training.json").write_text("new")

    def failing(out: Path) -> None:
        with contextlib.suppress(KeyError), set_aside(out, left):
            results(out, "new", begun=False)
            (out / "model.json").write_text("new")
            raise KeyError

    def returning(out: Path) -> None:
        come_back(out, left)

    def there(out: Path) -> dict[str, str]:
        return {str(path.relative_to(out)): path.read_text() for path in sorted(out.rglob("*")) if path.is_file()}

    done, seen = 0, set()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        finished(root / "old")
        old = there(root / "old")
        for task in (replacing, failing):
            number = 1
            while True:
                out = shutil.copytree(root / "old", root / "out")
                status = forked(out, number, task=task)
                # killed once more on the way back, at every operation in turn
                again = 1
                while os.WIFSIGNALED(status):
                    twice = shutil.copytree(out, root / "twice", symlinks=True)
                    second = forked(twice, again, task=returning)
                    come_back(twice, left)
                    begun = (twice / "training.json").read_text() == "new"
                    new = {"fold.json", "prepared/case.npy", "model.json", "training.json"}
                    assert there(twice) == (dict.fromkeys(sorted(new), "new") if begun else old), f"{task.__name__} {number}, {again}"
                    assert not (twice / ASIDE).exists()
                    shutil.rmtree(twice)
                    done, again = done + 1, again + every
                    seen.add(begun)
                    if not os.WIFSIGNALED(second):
                        assert second == 0
                        break
                shutil.rmtree(out)
                if not os.WIFSIGNALED(status):
                    assert status == 0
                    break
                number += every
        assert seen == {False, True}
        say(f"{done} kills: results are never lost and never mixed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=0, help="kill at every n-th operation, each on a folder of its own")
    parser.add_argument("--random", type=int, default=0, help="so many kills on one folder")
    parser.add_argument("--overwrite", type=int, default=0, help="kill one that overwrites at every n-th operation")
    parser.add_argument("--aside", type=int, default=0, help="kill what sets results aside at every n-th operation")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import test_trainer  # noqa: F401  # imported before the forks

    if given.every or given.random:
        rounds(given.every, given.random, given.seed, print)
    if given.overwrite:
        overwriting(given.overwrite, print)
    if given.aside:
        stepping_aside(given.aside, print)
