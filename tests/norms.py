"""Images and norms on which the fast norms of prediction are tried, and what float64 makes of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ichbench.network.norm import NormAct

#: an input of 1000 or 30,000 is itself only known to 6e-8 of its size
INPUT_ERROR = 4e-4


def drawn(shape: tuple[int, ...], slope: float, mean: float, spread: float) -> tuple[NormAct, Tensor, Tensor]:
    """A norm with its activation, an image with channels innermost that begins with air (where the mean is guessed), the exact answer."""
    torch.manual_seed(0)
    norm = NormAct(shape[1], slope)
    with torch.inference_mode():
        norm.weight.uniform_(-2, 2)
        norm.bias.normal_()
        x = mean + spread * torch.randn(shape)
        x[..., : shape[-1] // 3] = mean - 20 * spread
        exact = F.instance_norm(x.double(), weight=norm.weight.double(), bias=norm.bias.double(), eps=norm.eps)
        exact = exact if slope == 1 else F.leaky_relu(exact, slope)
        return norm, x.clone(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d), exact


def assert_close(found: Tensor, exact: Tensor, atol: float) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=atol)
