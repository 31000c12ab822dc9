"""The same U-Net as one program, which torch's compiler writes for one shape of patch.

What it gains are passes over memory between the convolutions, and in half precision the turning of weights and images from
one precision into the other. Convolutions are torch's own. It is for GPUs and for processors that compute in bf16; in fp32 on a CPU
prediction gains more from the kernels of network/fast.py, and training from the gradients of network/conv.py.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ichbench.errors import InputError
from ichbench.network.native import COMPILERS, find_compilers
from ichbench.network.unet import UNet, weights_digest

#: programs of one process: models of an ensemble times their folds times shapes of patch times precisions
PROGRAMS = 256


class CompileWarning(UserWarning):
    """Torch could not compile a network, which now computes as it is."""


class Compiled(nn.Module):
    """Answers as `network` does but for rounding, from a program that is made at the first call.

    Another shape, device or precision, training or not, has a program of its own; each takes from half a minute to some minutes.
    freeze      the weights are part of the program, which must be made anew when they change: for prediction on a CPU
    batch_grows batches smaller than the largest one so far are filled up with zeros, so that they need no program of their own
    setting     what asked for it, for messages
    insist      False: where torch fails a `CompileWarning` says so, and the network computes as it is
    Raises InputError on a CPU without a C++ compiler, and, when it is called, where torch cannot compile the network.
    """

    def __init__(self, network: UNet, setting: str, *, freeze: bool = False, batch_grows: bool = False, insist: bool = True) -> None:
        super().__init__()
        on_cpu = next(network.parameters()).device.type == "cpu"
        if on_cpu and not find_compilers():
            raise InputError(
                f"{setting} needs a C++ compiler: none of {', '.join(COMPILERS)} was found; "
                "install one, name it in the environment variable CXX, or leave the setting out"
            )
        self.setting, self.batch_grows, self.insist = setting, batch_grows, insist
        self.network = network
        self.run: Any = None
        self.freeze, self.batch = freeze, 0

    def forward(self, x: Tensor) -> Any:
        """Logits, or those of all levels, as `UNet`; a batch that was filled up is cut again."""
        if not self.batch_grows:
            return self._answer(x)
        self.batch = max(self.batch, len(x))
        if len(x) == self.batch:
            return self._answer(x)
        return self._answer(torch.cat([x, x.new_zeros(self.batch - len(x), *x.shape[1:])]))[: len(x)]

    def _answer(self, x: Tensor) -> Any:
        try:
            # beyond the limit torch would stop compiling; an option of `torch.compile` alone does not freeze
            many = torch._dynamo.config.patch(recompile_limit=PROGRAMS, accumulated_recompile_limit=PROGRAMS)
            with many, torch._inductor.config.patch(freezing=self.freeze):
                if self.run is None:
                    self.run = torch.compile(self.network, fullgraph=True, dynamic=False)
                return self.run(x)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            # the first line may only name the part of torch that failed
            lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
            said = f"{self.setting}: torch could not compile the network ({(lines or [type(error).__name__])[0]})"
            if self.insist:
                raise InputError(f"{said}; leave the setting out") from error
            warnings.warn(f"{said}; it goes on without", CompileWarning, stacklevel=2)
            self.run = self.network
            return self.run(x)


#: the last program of every network that predicts, and the weights that it had then
_predicting: WeakKeyDictionary[UNet, tuple[object, Compiled]] = WeakKeyDictionary()


def compiled_network(network: UNet) -> Compiled:
    """`network` compiled for prediction; the program is kept with it, so that it is made once for many images.
    Weights may change between two calls of this function."""
    weights = weights_digest(network)
    known, program = _predicting.get(network, (None, None))
    if program is None or known != weights:
        # a copy: frozen weights are known by their tensors alone, so torch would take changed ones in the same tensors for the old
        # ones; and a program that kept `network` itself would keep it for ever
        twin = copy.deepcopy(network)
        on_cpu = next(network.parameters()).device.type == "cpu"
        program = Compiled(twin, "inference.convolution = 'compiled'", freeze=on_cpu, batch_grows=True).eval()
        _predicting[network] = weights, program
    return program
