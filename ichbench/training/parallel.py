"""One training by several processes, as torchrun starts them: each takes a part of every batch, and all keep the same weights.

The batch is that of one process: sample i of step s is the same whoever draws it, so the forced patches keep their places. The
loss is that of the whole batch as well, because its sums run over all processes (nnU-Net pools only the Dice, and only with
batch_dice). Source of the split: nnU-Net's DDP, facts section 8.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

from ichbench.errors import InputError

Message = TypeVar("Message")


@dataclass(frozen=True)
class Team:
    """The processes of one training. A team of one does nothing."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Does this process write what there is to write?"""
        return self.rank == 0

    def share(self, batch_size: int) -> range:
        """This process's samples of a batch: neighbours, the first processes taking one more where it does not divide."""
        if batch_size < self.size:
            raise InputError(
                f"a batch of {batch_size} cannot be split over {self.size} processes; use at most {batch_size}, or a larger batch"
            )
        small, more = divmod(batch_size, self.size)
        first = self.rank * small + min(self.rank, more)
        return range(first, first + small + (self.rank < more))

    def pooled(self, sums: Tensor) -> Tensor:
        """Sums over all processes, whose gradient reaches every process's part."""
        # differentiable: what flows back is summed over the processes too, and the average of gradients then divides by their number
        return differentiable.all_reduce(sums)  # type: ignore[no-any-return, no-untyped-call]

    def summed(self, values: Tensor) -> Tensor:
        """The same without a gradient, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def told(self, message: Message) -> Message:
        """What the leading process says; the others' `message` is not looked at."""
        box = [message]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, said: bool, device: torch.device) -> bool:
        """Does any process say so?"""
        return said if self.size == 1 else bool(self.summed(torch.tensor(float(said), device=device)))

    def wrapped(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over the processes while they are computed."""
        if self.size == 1:
            return network
        # the lowest deep-supervision head never has a gradient
        return nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = Team()


@contextlib.contextmanager
def team_of_torchrun(device: str) -> Iterator[tuple[Team, str]]:
    """The team that torchrun's environment describes, and this process's own device; without torchrun a team of one.

    NCCL on GPUs, one GPU a process; gloo on CPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield ALONE, device
        return
    kind = device.split(":")[0]
    if kind == "cuda":
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if own >= torch.cuda.device_count():
            raise InputError(f"torchrun started process {own} of this machine, which has {torch.cuda.device_count()} GPUs; start fewer")
        torch.cuda.set_device(own)
        device = f"cuda:{own}"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
