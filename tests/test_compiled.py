"""The U-Net as one compiled program: the network's own answers, also after weights, batch or precision changed, and its training."""

from __future__ import annotations

import shutil
import signal
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_trainer import QUICK, SOLID, blob_cases, lines
from test_unet import Plan, isotropic, residual
from test_winograd import trained_like
from torch import Tensor

from ichbench.compute import Compute
from ichbench.errors import InputError
from ichbench.inference.sliding import predict_logits
from ichbench.network.compiled import Compiled, CompileWarning, compiled_network
from ichbench.network.unet import UNet, make_unet
from ichbench.recipe import InferenceRecipe, NetworkRecipe
from ichbench.training.folder import TrainResult
from ichbench.training.trainer import train

torch.set_num_threads(1)
#: torch's compiler warns of itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FLAT = isotropic(2, (4, 8))
HEADERS = Path(sysconfig.get_path("include")) / "Python.h"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))) or not HEADERS.is_file(), reason="no C++ compiler, or no headers of Python"
)


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
    program = compiled_network(network)
    assert compiled_network(network) is program, "a second image would be compiled for again"
    with torch.no_grad():
        x = torch.from_numpy(image).movedim(0, 1)[:8, :, :, :16].contiguous()
        answer = program(x)
        assert program(x[:3]).shape == answer[:3].shape
        for value in program.network.parameters():
            value.zero_()
        assert torch.equal(program(x), answer), "the program reads its weights anew each time"
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(-0.7)
    assert not torch.allclose(compare(1e-5), first), "the weights before the change were frozen into the program"
    # one step of bf16 is 2^-8
    half = compare(0.1, precision="bf16")
    assert not torch.allclose(half, compare(1e-5), rtol=0, atol=1e-4), "it was computed in float32"
    # sums in half precision
    compare(4e-3, compatibility="nnunet")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "norm"), [(isotropic(3, (4, 8)), "instance"), (residual(isotropic(3, (4, 8))), "batch"), (residual(FLAT), "instance")]
)
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
    with torch._dynamo.config.patch(recompile_limit=1):
        for seed in range(3):
            network = trained_like(isotropic(2, (2, 2)), seed)
            compiled, direct = (predicted(network, image, FLAT, (8, 8), convolution=way, mirror=False) for way in ("compiled", "direct"))
            torch.testing.assert_close(compiled, direct, rtol=0, atol=1e-5 * float(direct.std()))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("plan", [SOLID, residual(SOLID)])
def test_training(plan: Plan, tmp_path: Path) -> None:
    """The same losses and weights but for rounding, in steps and in validation, and again after an interruption."""
    results, logs = [], []
    for compiled in ("no", "yes"):
        out, how = tmp_path / compiled, Compute(compiled=compiled)  # type: ignore[arg-type]

        def run(out: Path = out, how: Compute = how, **more: Any) -> TrainResult:
            return train(blob_cases(3), blob_cases(2, 50), plan, NetworkRecipe(), QUICK, 0, out, how, **more)

        def interrupt(epoch: int, step: int, steps: int, loss: float) -> None:
            if (epoch, step) == (1, 1):
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            run(tick=interrupt)
        results.append(run())
        logs.append(lines(out))
    for name in ("train_loss", "val_loss"):
        plain, made = ([line[name] for line in log] for log in logs)
        assert made == pytest.approx(plain, rel=1e-3)
        assert made != plain, "nothing was compiled"
    plain, made = (load_file(result.final) for result in results)
    assert plain.keys() == made.keys()
    for name, value in plain.items():
        # AdamW takes steps of 0.01 whatever the gradient; a bias before a norm has none but rounding
        if not name.endswith("conv.bias"):
            torch.testing.assert_close(made[name], value, rtol=0, atol=5e-3)


@pytest.mark.parametrize("error", [torch._dynamo.exc.TorchDynamoException, OSError])
def test_a_training_goes_on_where_torch_fails(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise error("no such operation")

    network, x = trained_like(FLAT, 0), torch.randn(2, 1, 16, 16)
    monkeypatch.setattr(torch, "compile", lambda *given, **named: refuse)
    model = Compiled(network, "--compile auto", insist=False)
    with pytest.warns(
        CompileWarning, match=r"--compile auto: torch could not compile the network \(no such operation\); it goes on without"
    ):
        first = model(x)
    assert torch.equal(first, network(x))
    assert torch.equal(model(x), first)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        InputError, match=r"inference.convolution = 'compiled' needs a C\+\+ compiler: none of g\+\+, .* leave the setting out"
    ):
        predicted(trained_like(FLAT, 0), np.zeros((1, 2, 16, 16), np.float32), FLAT, (16, 16), convolution="compiled")


@needs_compiler
def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("backend='inductor' raised:\nno such operation\nand forty lines more")

    monkeypatch.setattr(torch, "compile", lambda *given, **named: refuse)
    with pytest.raises(InputError, match=r"'compiled': torch could not compile the network \(no such operation\); leave"):
        predicted(trained_like(FLAT, 0), np.zeros((1, 2, 16, 16), np.float32), FLAT, (16, 16), convolution="compiled")
