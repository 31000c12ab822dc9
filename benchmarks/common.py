"""What the benchmarks share: their arguments, the versions below a table, and the file that holds it.

Imported as `common` by the scripts beside it, which are run as `python benchmarks/NAME.py`.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

#: real data, beside the checkout or where ICHBENCH_SHARED_DATA says
SHARED = Path(os.environ.get("ICHBENCH_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def arguments(doc: str | None, out: str | None = "tables", peers: bool = False) -> argparse.ArgumentParser:
    """A parser described by the first line of the script's `doc`, with `--out` if it has an `out`, and `--skip-peers` if it has `peers`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if peers:
        parser.add_argument("--skip-peers", action="store_true", help="time ichbench alone")
    if out:
        parser.add_argument("--out", type=Path, help=f"write the {out} here as well")
    return parser


def write(out: Path | None, title: str, text: str) -> None:
    """The text under its title, in a file whose folder need not exist; nothing without `out`."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"# {title}\n\n{text}\n", encoding="utf-8")


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of an argument such as 16,128,128."""
    return tuple(int(part) for part in text.split(","))


def own_threads() -> int:
    """The threads that OMP_NUM_THREADS asks for; one where it is not set."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def processor(device: str = "cpu") -> str:
    """The name of the processor, or of the GPU that `device` is."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions(*names: str) -> str:
    """`torch 2.13.0, Python 3.11.2`: of Python and of installed packages."""
    return ", ".join(f"{name} {platform.python_version() if name == 'Python' else version(name)}" for name in names)
