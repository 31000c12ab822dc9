"""Where and how numbers are computed: device, threads, and whether every operation must repeat itself bit for bit.

None of it is part of a recipe, and none of it changes what a method is; but the last digits of a result depend on it, so it
is always given, stored with the result, and said when it changes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from ichbench.errors import InputError

if TYPE_CHECKING:
    import torch

#: the size of cuBLAS's memory with which its sums are made in one order (NVIDIA's word for 8 buffers of 4 MB)
CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Compute:
    """device         cpu, cuda or cuda:N
    threads        of the CPU
    deterministic  a GPU, too, takes only operations that give the same bits every time; a CPU does so anyway
    compiled       networks train as programs of torch's compiler (network/compiled.py); auto: on a GPU, unless deterministic
    """

    device: str = "cpu"
    threads: int = 1
    deterministic: bool = False
    compiled: Literal["auto", "yes", "no"] = "auto"

    def __post_init__(self) -> None:
        if self.compiled == "yes" and self.deterministic and self.kind != "cpu":
            raise InputError("--compile yes and --deterministic: a compiled program is chosen by timing it; leave one of them out")

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.split(":")[0]

    @property
    def compiles(self) -> bool:
        return self.compiled == "yes" or (self.compiled == "auto" and self.kind != "cpu" and not self.deterministic)

    def environment(self) -> dict[str, Any]:
        """What of it a result depends on. Which of several GPUs was used does not count, nor what a CPU does anyway."""
        table: dict[str, Any] = {"device": self.kind, "threads": self.threads}
        table |= {"deterministic": True} if self.deterministic and self.kind != "cpu" else {}
        return table | ({"compiled": True} if self.compiles else {})


ONE_CORE = Compute()


def parse_compiled(text: str) -> Literal["auto", "yes", "no"]:
    """What `--compile` says."""
    if text in ("auto", "yes", "no"):
        return cast(Literal["auto", "yes", "no"], text)
    raise InputError(f"--compile {text!r} is not understood; give auto, yes or no")


@contextlib.contextmanager
def computing(how: Compute) -> Iterator[None]:
    """Torch computes as `how` says inside the block, and as before after it."""
    import torch
    from torch.utils import deterministic as memory

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(how.threads)
    if how.deterministic:
        # read when cuBLAS is first used
        os.environ.setdefault(*CUBLAS)
        torch.use_deterministic_algorithms(True)
        # all memory here is written before it is read, so clearing it first would only cost time
        memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        memory.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def must_repeat(device: torch.device) -> bool:
    """Whether operations that some GPUs cannot repeat bit for bit must be done in another way (torch refuses them otherwise)."""
    import torch

    return device.type != "cpu" and torch.are_deterministic_algorithms_enabled()


def resolve_device(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device to use; auto is CUDA where there is one."""
    if text == "cpu":
        return "cpu"
    # costs 2 s, so only where something other than the CPU is thinkable
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = text.partition(":")
    if kind != "cuda" or (":" in text and not (number.isascii() and number.isdecimal())):
        raise InputError(f"--device {text!r} is not known; give auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise InputError(f"--device {text} was asked for, but torch {torch.__version__} sees no CUDA device; use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise InputError(f"--device {text} was asked for, but there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return text
