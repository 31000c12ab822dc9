"""The U-Net as one compiled program: the network's own answers, also after its weights, the batch or the precision changed."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from test_unet import Plan, isotropic, residual
from test_winograd import trained_like
from torch import Tensor

from ichbench.errors import InputError
from ichbench.inference.sliding import predict_logits
from ichbench.network.compiled import compiled_network
from ichbench.network.unet import UNet, make_unet
from ichbench.recipe import InferenceRecipe, NetworkRecipe

torch.set_num_threads(1)
#: torch's compiler warns of itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FLAT = isotropic(2, (4, 8))
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="this machine has no C++ compiler")


def predicted(network: UNet, image: np.ndarray, plan: Plan, patch: tuple[int, ...], **fields: Any) -> Tensor:
    class Tiles:
        dims, patch_size = plan.dims, patch

    return torch.from_numpy(predict_logits(network, image, Tiles, InferenceRecipe(**{"mirror": (1,)} | fields)))


@needs_compiler
def test_answers_are_the_networks_own() -> None:
    """In 2D: slices that fill no batch, mirrorings, then other weights in the same network, then bf16."""
    network = trained_like(FLAT, 3)
    image = torch.randn(1, 11, 16, 24, generator=torch.Generator().manual_seed(0)).numpy()

    def compare(limit: float, **fields: Any) -> Tensor:
        compiled, direct = (predicted(network, image, FLAT, (16, 16), convolution=way, **fields) for way in ("compiled", "direct"))
        assert float((compiled - direct).abs().max()) <= limit * float(direct.std())
        return compiled

    first = compare(1e-5)
    with torch.inference_mode():
        assert compiled_network(network) is compiled_network(network), "a second image would be compiled for again"
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(-0.7)
    assert not torch.allclose(compare(1e-5), first), "the weights before the change were frozen into the program"
    network.load_state_dict(trained_like(FLAT, 4).state_dict())
    compare(1e-5)
    # one step of bf16 is 2^-8
    half = compare(0.1, precision="bf16")
    assert not torch.allclose(half, compare(1e-5), rtol=0, atol=1e-4), "it was computed in float32"
    # sums in half precision
    compare(4e-3, compatibility="nnunet")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("plan", [isotropic(3, (4, 8)), residual(isotropic(3, (4, 8))), residual(FLAT)])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_every_kind_of_network(plan: Plan, norm: str) -> None:
    network = make_unet(plan, NetworkRecipe(norm=norm), 5) if norm == "batch" else trained_like(plan, 5)  # type: ignore[arg-type]
    patch = (8, 16, 16)[3 - plan.dims :]
    # tiles that fill no pair, then one tile alone
    for shape in ((1, 8, 16, 31), (1, 8, 16, 16)):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        compiled, direct = (predicted(network, image, plan, patch, convolution=way) for way in ("compiled", "direct"))
        torch.testing.assert_close(compiled, direct, rtol=0, atol=1e-4 * float(direct.std()))


@needs_compiler
@pytest.mark.slow
def test_many_networks_in_one_process() -> None:
    """More than torch compiles of one function unless it is told: beyond its limit it would go on without compiling, or fail."""
    image = np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)
    for seed in range(torch._dynamo.config.recompile_limit + 2):
        network = trained_like(isotropic(2, (2, 2)), seed)
        compiled, direct = (predicted(network, image, FLAT, (8, 8), convolution=way, mirror=False) for way in ("compiled", "direct"))
        torch.testing.assert_close(compiled, direct, rtol=0, atol=1e-5 * float(direct.std()))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"'compiled' needs a C\+\+ compiler: none of g\+\+, .* use 'winograd'"):
        predicted(trained_like(FLAT, 0), np.zeros((1, 2, 16, 16), np.float32), FLAT, (16, 16), convolution="compiled")


@needs_compiler
def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("backend='inductor' raised:\nno such operation\nand forty lines more")

    monkeypatch.setattr(torch, "compile", lambda *given, **named: refuse)
    with pytest.raises(InputError, match=r"could not compile the network \(no such operation\); use inference.convolution = 'winograd'"):
        predicted(trained_like(FLAT, 0), np.zeros((1, 2, 16, 16), np.float32), FLAT, (16, 16), convolution="compiled")
