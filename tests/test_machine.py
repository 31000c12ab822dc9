"""`ichbench doctor`: arithmetic of the estimate, and that it looks."""

from __future__ import annotations

import pytest
import torch
from model_folders import small_plan
from typer.testing import CliRunner

from ichbench.cli import app
from ichbench.network.unet import make_unet
from ichbench.recipe import Recipe
from ichbench.training import machine
from ichbench.training.machine import Machine, Rates, advice, estimate, forward_flops, machine_lines


def test_flops_are_those_of_the_convolutions() -> None:
    """Counted by hand from the sizes that every convolution really has."""
    plan, recipe = small_plan(), Recipe()
    network, total = make_unet(plan, recipe.network), 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        # a transposed convolution spreads every input voxel over its kernel, a plain one gathers for every output voxel
        voxels = inputs[0] if isinstance(module, torch.nn.ConvTranspose3d) else output
        total += 2 * weight.numel() * voxels.shape[0] * voxels[0, 0].numel()

    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(plan.batch_size, 1, *plan.patch_size))
    assert forward_flops(plan, recipe) == total > 0


def test_presets_are_estimated_in_order() -> None:
    found = {preset: estimate(preset, 100.0) for preset in machine.PRESETS}
    seconds = [found[preset][2] for preset in ("smoke", "small", "full")]
    assert seconds == sorted(seconds)
    assert found["full"][1] > found["small"][1]
    # twice the rate, half the time; the smoke preset's 200 steps at about 15 GFLOP/s take about half a minute (README)
    assert estimate("small", 200.0)[2] == pytest.approx(seconds[1] / 2)
    assert 10 < estimate("smoke", 15.0)[2] < 150


def made(free_gb: float | None, gpus: tuple[tuple[str, float], ...] = (), step: float = 50.0) -> Machine:
    rates = {"cpu": Rates(100.0, 20.0, step, 10.0)} | ({"cuda": Rates(1e4, 8e4, 1e4, 5e4)} if gpus else {})
    return Machine(2, 2, 16.0, free_gb, "2.13.0", "AVX2", False, gpus, rates, "for prediction, built by g++", {"plots": "3.9", "itk": None})


def test_advice() -> None:
    assert "the largest preset that fits here within a day: small;" in advice(made(15.0))[-1]
    small = advice(made(1.0))
    assert "smoke     fits" in small[0]
    assert "full      too large" in small[2]
    assert "no preset fits here" in advice(made(0.01))[-1]
    assert "fits" in advice(made(None))[0]
    with_gpu = advice(made(15.0, (("a GPU", 80.0),)))
    assert "on cuda" in with_gpu[2]
    lines = "\n".join(machine_lines(made(15.0, (("a GPU", 80.0),))))
    assert "0.2 times fp32; the CPU lacks" in lines
    assert "GPU       a GPU, 80 GB" in lines
    assert "not installed: itk" in lines


def test_what_is_timed_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._seconds(lambda: None, "cpu", 0.0) >= 0
    runs: list[object] = []
    monkeypatch.setattr(machine, "_seconds", lambda work, device: runs.append(work()) or 0.5)
    rates = machine.measure("cpu", 8)
    assert len(runs) == 4
    assert rates.convolution_fp32 == rates.convolution_bf16 == 2 * 32 * 32 * 27 * 8 * 8 * 8 / 1e9 / 0.5
    assert rates.step_fp32 == rates.step_bf16 > 0


def test_the_command_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_seconds", lambda work, device: 0.5)
    before = torch.get_num_threads()
    found = CliRunner().invoke(app, ["doctor", "--threads", "1"])
    assert found.exit_code == 0, found.output
    assert torch.get_num_threads() == before
    assert f"torch     {torch.__version__}" in found.output
    assert "GFLOP/s in a 3D convolution" in found.output
    for preset in machine.PRESETS:
        assert f"\n{preset} " in found.output
