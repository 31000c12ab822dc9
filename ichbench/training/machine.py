"""What this machine can do for a training: measured where it can be, estimated where that would take hours.

The estimate is arithmetic of the convolutions (three times those of a forward pass) over the rate at which this machine does
a whole training step of a middle-sized network. It is good to a factor of two, which tells minutes from days.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ichbench.arms import load_preset
from ichbench.cases.labels import plain_rules
from ichbench.network.losses import Supervision, dice_ce, supervised
from ichbench.network.native import about_kernels
from ichbench.network.unet import UNet, make_unet
from ichbench.overlays import make_recipe
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import PlanRecipe, Recipe
from ichbench.training.logs import duration
from ichbench.training.optimizers import OPTIMIZERS

#: what each extra brings, by the name of its distribution
EXTRAS = {
    "plots": "matplotlib",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow-skinny",
    "itk": "SimpleITK",
    "dicom": "highdicom",
    "fast": "edt",
    "blosc2": "blosc2",
}
#: the cohort that presets are estimated for: head CTs of 5 x 0.45 x 0.45 mm (the phantom for `smoke`)
HEAD_CT = ((5.0, 0.45, 0.45), (30, 512, 512), 30)
PHANTOM = ((5.0, 2.0, 2.0), (26, 96, 96), 24)
PRESETS = {"smoke": PHANTOM, "small": HEAD_CT, "full": HEAD_CT}
#: bytes that a training step holds per element of its feature maps (outputs of convolutions, of norms and activations, gradients)
BYTES_PER_ELEMENT = 12
BASE_GB = 0.6
DAY_S = 86400.0
CT = {"mean": 40.0, "median": 40.0, "std": 20.0, "min": -50.0, "max": 120.0, "percentile_00_5": -20.0, "percentile_99_5": 100.0}


@dataclass(frozen=True)
class Rates:
    """GFLOP a second: of one convolution and of a whole training step, in fp32 and in bf16."""

    convolution_fp32: float
    convolution_bf16: float
    step_fp32: float
    step_bf16: float


@dataclass(frozen=True)
class Machine:
    """What was found. Memory in GB; `gpus` are (name, memory in GB); `rates` by device; extras that are missing have no version."""

    cores: int
    threads: int
    memory_gb: float | None
    free_gb: float | None
    torch: str
    capability: str
    bf16_instructions: bool
    gpus: tuple[tuple[str, float], ...]
    rates: dict[str, Rates]
    kernels: str
    extras: dict[str, str | None]


def examine(threads: int | None = None) -> Machine:
    """Look and measure; about five seconds on a CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    used, before = threads or cores, torch.get_num_threads()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        gpus.append((about.name, about.total_memory / 2**30))
    torch.set_num_threads(used)
    try:
        rates = {device: measure(device) for device in (["cpu", "cuda"] if gpus else ["cpu"])}
    finally:
        torch.set_num_threads(before)
    capability = torch.backends.cpu.get_cpu_capability()
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    total, free = _memory_gb()
    return Machine(cores, used, total, free, torch.__version__, capability, supported, tuple(gpus), rates, about_kernels(), _extras())


def measure(device: str, size: int = 32) -> Rates:
    """Time a 3D convolution and a training step of a small U-Net. `size`: of the patch, along y and x."""
    plan = _plan(((5.0, 1.0, 1.0), (16, 2 * size, 2 * size), 10), PlanRecipe(base_features=16, patch_size=(8, size, size), batch_size=2))
    recipe = Recipe()
    network = make_unet(plan, recipe.network).to(device)
    optimizer = OPTIMIZERS["sgd"](network.parameters(), recipe.training)
    x = torch.randn(plan.batch_size, plan.in_channels, *plan.patch_size, device=device)
    target = torch.zeros(plan.batch_size, *plan.patch_size, dtype=torch.long, device=device)
    convolution = torch.nn.Conv3d(32, 32, 3, padding=1).to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    y = torch.randn(1, 32, 8, size, size, device=device).contiguous(memory_format=torch.channels_last_3d)

    def step(bf16: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            outputs = network(x)
        supervised(dice_ce, outputs, target, Supervision(plain_rules(plan.n_classes)), 1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def convolve(bf16: bool) -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            convolution(y)

    one, whole = 2 * 32 * 32 * 27 * y[0, 0].numel() / 1e9, 3 * forward_flops(plan, recipe) / 1e9
    slow, fast = one / _seconds(lambda: convolve(False), device), one / _seconds(lambda: convolve(True), device)
    full = whole / _seconds(lambda: step(False), device)
    # where bf16 is emulated a step takes very long, and nobody wants it
    half = whole / _seconds(lambda: step(True), device) if fast > slow / 2 else full * fast / slow
    return Rates(slow, fast, full, half)


def forward_flops(plan: Plan, recipe: Recipe) -> int:
    """Floating-point operations of one forward pass of a batch, a multiplication and an addition counted as two."""
    with torch.device("meta"):
        network, x = UNet(plan, recipe.network), torch.empty(plan.batch_size, plan.in_channels, *plan.patch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return int(counter.get_total_flops())


def estimate(preset: str, rate_gflops: float) -> tuple[Plan, float, float]:
    """(plan, GB of memory, seconds of the whole training) of a preset on the cohort that stands for it."""
    recipe = make_recipe(load_preset(preset))
    plan = _plan(PRESETS[preset], recipe.plan)
    with torch.device("meta"):
        weights = sum(value.numel() for value in UNet(plan, recipe.network).parameters())
    gb = BASE_GB + (plan.estimate * plan.batch_size * BYTES_PER_ELEMENT + weights * 16) / 2**30
    flops, training = forward_flops(plan, recipe), recipe.training
    per_epoch = (3 * training.iterations_per_epoch + training.validation_iterations) * flops
    return plan, gb, per_epoch * training.epochs / (rate_gflops * 1e9)


def machine_lines(machine: Machine) -> list[str]:
    """What was found, for people."""
    memory = "unknown" if machine.memory_gb is None else f"{machine.memory_gb:.1f} GB"
    free = "" if machine.free_gb is None else f", {machine.free_gb:.1f} GB free"
    cpu = machine.rates["cpu"]
    gain = cpu.convolution_bf16 / cpu.convolution_fp32
    native = "the CPU has" if machine.bf16_instructions else "the CPU lacks"
    lines = [
        f"cores     {machine.cores} ({machine.threads} used to measure), {machine.capability}",
        f"memory    {memory}{free}",
        f"torch     {machine.torch}",
        f"fp32      {cpu.convolution_fp32:.3g} GFLOP/s in a 3D convolution, {cpu.step_fp32:.3g} in a training step",
        f"kernels   {machine.kernels}",
        f"bf16      {cpu.convolution_bf16:.3g} GFLOP/s in a 3D convolution, {cpu.step_bf16:.3g} in a training step: {gain:.2g} times fp32; "
        f"{native} instructions for it",
    ]
    for name, gb in machine.gpus:
        lines.append(f"GPU       {name}, {gb:.0f} GB")
    if (gpu := machine.rates.get("cuda")) is not None:
        lines.append(f"          {gpu.step_fp32:.0f} GFLOP/s in a training step in fp32, {gpu.step_bf16:.0f} in bf16")
    elif not machine.gpus:
        lines.append("GPU       none that torch sees")
    has = [f"{name} ({number})" for name, number in machine.extras.items() if number is not None]
    lacks = [name for name, number in machine.extras.items() if number is None]
    lines.append(f"extras    {', '.join(has) or 'none'}" + (f"; not installed: {', '.join(lacks)}" if lacks else ""))
    return lines


def advice(machine: Machine) -> list[str]:
    """A line per preset: does it fit, and how long would one training take? Then the largest that fits in a day."""
    lines, fitting = [], ""
    for preset, (spacing, shape, _) in PRESETS.items():
        recipe = make_recipe(load_preset(preset)).training
        device = "cuda" if machine.gpus else "cpu"
        rates = machine.rates[device]
        plan, gb, seconds = estimate(preset, rates.step_bf16 if recipe.precision == "bf16" else rates.step_fp32)
        room = machine.gpus[0][1] if machine.gpus else machine.free_gb
        fits = room is None or gb <= room
        if fits and seconds <= DAY_S:
            fitting = preset
        patch = " x ".join(map(str, plan.patch_size))
        lines.append(
            f"{preset:9} {'fits' if fits else 'too large'}: about {gb:.1f} GB and {duration(seconds)} a training on {device} "
            f"(patch {patch}, batch {plan.batch_size}; CTs of {' x '.join(map(str, shape))} at {' x '.join(map(str, spacing))} mm)"
        )
    said = f"the largest preset that fits here within a day: {fitting}" if fitting else "no preset fits here within a day"
    return [*lines, f"{said}; times and memory are estimates, good to a factor of two"]


def _plan(cohort: tuple[tuple[float, float, float], tuple[int, int, int], int], recipe: PlanRecipe) -> Plan:
    spacing, shape, n_cases = cohort
    return make_plan(Fingerprint((spacing,) * n_cases, (shape,) * n_cases, {"0": CT}, 1.0), recipe, ("CT",), 2, n_cases)


def _seconds(work: Callable[[], Any], device: str, budget_s: float = 0.5) -> float:
    """The shortest of a few runs after a first one that warms up."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    times, began = [once()], time.perf_counter()
    while time.perf_counter() - began < budget_s:
        times.append(once())
    return min(times)


def _memory_gb() -> tuple[float | None, float | None]:
    """(all, available) main memory, a container's limit respected; None where the system does not say."""
    try:
        page = os.sysconf("SC_PAGE_SIZE") / 2**30
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # pragma: no cover - Windows
        return None, None
    try:
        from pathlib import Path

        known = {
            line.split(":")[0]: int(line.split()[1]) / 2**20 for line in Path("/proc/meminfo").read_text().splitlines() if " kB" in line
        }
        free = known.get("MemAvailable", free)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdecimal():
            used = int(Path("/sys/fs/cgroup/memory.current").read_text()) / 2**30
            total, free = min(total, int(limit) / 2**30), min(free, int(limit) / 2**30 - used)
    except (OSError, ValueError):
        pass
    return total, free


def _extras() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for extra, name in EXTRAS.items():
        try:
            found[extra] = version(name)
        except PackageNotFoundError:
            found[extra] = None
    return found
