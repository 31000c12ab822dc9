"""The same U-Net as one program, written and compiled by torch's compiler for one shape of patch, its weights frozen into it.

What it gains are passes over memory between the convolutions, and with bf16 the turning of weights and images from one precision
into the other. Convolutions are direct (oneDNN's). Where the processor computes in fp32 alone, Winograd's (network/fast.py) gain more.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ichbench.errors import InputError
from ichbench.network.norm import NormAct
from ichbench.network.unet import UNet

#: C++ compilers that torch looks for
COMPILERS = ("g++", "clang++", "c++")
#: programs of one process: models of an ensemble times their folds times shapes of patch times precisions
PROGRAMS = 256

#: the last program of every network, for the weights that it had
_programs: WeakKeyDictionary[UNet, tuple[object, Callable[[Tensor], Tensor]]] = WeakKeyDictionary()


def compiled_network(network: UNet) -> Callable[[Tensor], Tensor]:
    """A function (batch, channels, *patch) -> logits, which `network` answers but for rounding. For inference mode.

    It is compiled when it is first called, and again for another shape of patch, device or precision, which takes about half a minute each.
    Asked for the same network again it is given again, unless weights have changed since.
    Raises InputError on a CPU without a C++ compiler, and when it is called and torch cannot compile the network.
    """
    device = next(network.parameters()).device
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name):
        raise InputError(
            f"inference.convolution = 'compiled' needs a C++ compiler: none of {', '.join(COMPILERS)} was found; "
            "install one, name it in the environment variable CXX, or use 'winograd'"
        )
    network.eval()
    weights = tuple((value.data_ptr(), value._version) for value in (*network.parameters(), *network.buffers()))
    known, program = _programs.get(network, (None, None))
    if program is None or known != weights:
        program = _Program(network)
        _programs[network] = weights, program
    return program


class _Program:
    """Always called with the batch of its largest call so far: every new size would be a program of its own."""

    def __init__(self, network: UNet) -> None:
        shared = {id(value): value for value in (*network.parameters(), *network.buffers())}
        found = copy.deepcopy(network, shared).eval()
        for module in list(found.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, NormAct):
                    setattr(module, name, _PlainNormAct(child))
        on_cpu = next(network.parameters()).device.type == "cpu"
        self.run = torch.compile(found, fullgraph=True, dynamic=False, options={"freezing": on_cpu})
        self.batch = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.batch = max(self.batch, len(x))
        # samples do not know of each other: what fills the batch up does not matter
        whole = torch.cat([x, x.new_zeros(self.batch - len(x), *x.shape[1:])]) if len(x) < self.batch else x
        try:
            # beyond the limit torch would stop compiling
            with torch._dynamo.config.patch(recompile_limit=PROGRAMS, accumulated_recompile_limit=PROGRAMS):
                answer: Tensor = self.run(whole)
        except torch._dynamo.exc.TorchDynamoException as error:
            # the first line may only name the part of torch that failed
            said = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")] or [type(error).__name__]
            raise InputError(
                f"torch could not compile the network ({said[0]}); use inference.convolution = 'winograd' or 'direct'"
            ) from error
        return answer[: len(x)]


class _PlainNormAct(nn.Module):
    """`NormAct` in torch's own functions, which its compiler knows how to join with what stands before and after."""

    def __init__(self, norm: NormAct) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        # not torch.nn.functional's, which refuses a single voxel
        normed = torch.instance_norm(x, self.norm.weight, self.norm.bias, None, None, True, 0.0, self.norm.eps, True)
        return normed if self.norm.leaky_slope == 1 else F.leaky_relu(normed, self.norm.leaky_slope)
