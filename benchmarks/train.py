"""One training step beside nnU-Net's own, in one run: `python benchmarks/train.py` prints a table.

Work: nnU-Net's 3d_fullres plan for head CTs of 512 x 512 x 28 voxels of 0.45 x 0.45 x 5 mm (43.5 million weights), batch 2, patch
16 x 128 x 128, blobs in noise. A step is forward, loss of all supervised levels, backward, clipping, SGD with Nesterov momentum.
Peer: `nnUNetTrainer.train_step` of nnunetv2 with its own network (PlainConvUNet), loss and optimiser, in this process and from the
same weights. Sides take turns and the best counts; seconds are the process's CPU with one thread, the clock's with more or on a GPU.
The first `--trajectory` losses must agree: both sides then compute the same thing. Peak memory is that of a process of its own.

On a GPU the table also gives TFLOP/s, their share of a measured bfloat16 matrix product, and how long a step waits for patches cut
and augmented by `--workers` threads; nnU-Net's step is then compiled, as it is by default, and ours has a row compiled and one not.
That part has not been run: no GPU was at hand. `--compiled` adds our compiled rows on a CPU.

    pip install . "nnunetv2==2.8.1" && OMP_NUM_THREADS=1 python benchmarks/train.py [--out benchmarks/results/train.md]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import arguments, numbers, processor, versions, write
from peer import name_folders, peer_version, their_network
from predict import has_bf16
from torch import Tensor, nn

from ichbench.cases.case import Case, Grid
from ichbench.cases.labels import plain_rules
from ichbench.network.compiled import Compiled
from ichbench.network.losses import LOSSES, Supervision, shrink_target, supervised
from ichbench.network.unet import UNet, make_unet
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import NetworkRecipe, PlanRecipe, TrainingRecipe
from ichbench.training.trainer import OPTIMIZERS

#: the losses of the first steps may differ by so much; later steps multiply rounding
TRAJECTORY = 1e-3


#: our sides: precision, and whether the network is compiled
OURS = {"fp32": ("fp32", False), "bf16": ("bf16", False), "fp32-compiled": ("fp32", True), "bf16-compiled": ("bf16", True)}


@dataclass
class Side:
    """One tool's step: (image, labels) -> loss."""

    name: str
    step: Callable[[Tensor, Tensor], float]


def main() -> None:
    parser = arguments(__doc__, peers=True)
    parser.add_argument("--features", default="32", help="of the highest level, one table each, such as 32,8; nnU-Net plans 32")
    parser.add_argument("--patch", default="16,128,128")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", default="1,2", help="one table each")
    parser.add_argument("--trajectory", type=int, default=5, help="steps whose losses are compared; they are timed too")
    parser.add_argument("--repeats", type=int, default=0, help="steps more, for the times")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=4, help="threads that make patches, on a GPU")
    parser.add_argument("--compiled", action="store_true", help="compiled steps on a CPU, too")
    parser.add_argument("--memory", choices=(*OURS, "peer"), help="only print the peak memory of one side, GB")
    given = parser.parse_args()
    if given.memory:
        print(f"{peak_gb(given):.2f}")
        return
    threads = numbers(given.threads) if given.device == "cpu" else (torch.get_num_threads(),)
    text = "\n\n".join("\n".join(table(given, width, number)) for width in numbers(given.features) for number in threads)
    if given.device == "cpu" and not has_bf16():
        text += "\n\nThis CPU does not compute in bf16: it has no row."
    text += f"\n\n{processor(given.device)}, {versions('torch', 'Python')}."
    print(text)
    write(given.out, "One training step", text)


def table(given: argparse.Namespace, features: int, threads: int) -> Iterator[str]:
    torch.set_num_threads(threads)
    plan = planned(features, numbers(given.patch), given.batch)
    image, labels = batch(plan, given.device)
    sides = {name: make_side(name, plan, given.device) for name in names(given)}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    best: dict[str, float] = {}
    clock = time.process_time if given.device == "cpu" and threads == 1 else time.perf_counter
    for _ in range(given.trajectory + given.repeats):
        for name, side in sides.items():
            began = clock()
            losses[name].append(side.step(image, labels))
            best[name] = min(best.get(name, float("inf")), clock() - began)
    weights = sum(parameter.numel() for parameter in make_unet(plan, NetworkRecipe()).parameters())
    seconds = "CPU seconds" if clock is time.process_time else "seconds"
    size = f"patch {plan.patch_size}, batch {plan.batch_size}, {threads} thread(s)"
    yield f"Features {plan.features}, {weights / 1e6:.1f} million weights, {size}."
    yield ""
    gpu = given.device != "cpu"
    yield f"| side | {seconds} a step | nnU-Net / side | peak GB | losses, relative difference |" + (
        " TFLOP/s | of the bf16 rate |" if gpu else ""
    )
    yield "|---|---|---|---|---|" + ("---|---|" if gpu else "")
    flops = 3 * forward_flops(plan) if gpu else 0
    rate = matrix_rate(given.device) if gpu else 0
    for name in sides:
        ratio = f"{best['peer'] / best[name]:.2f}" if "peer" in best else ""
        others = losses["peer" if "peer" in losses else "fp32"][: given.trajectory]
        worst = max((abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses[name], others, strict=False)), default=0.0)
        if name == "fp32" and worst > TRAJECTORY:
            raise SystemExit(f"the losses of the first steps differ by {worst:.1e}: the two sides do not compute the same")
        line = f"| {sides[name].name} | {best[name]:.2f} | {ratio} | {own_peak(given, features, threads, name)} | {worst:.1e} |"
        done = flops / best[name] if gpu else 0
        yield line + (f" {done / 1e12:.1f} | {done / rate:.0%} |" if gpu else "")
    if gpu:
        yield ""
        yield waits(plan, given.device, given.workers, best["bf16-compiled"])


def names(given: argparse.Namespace) -> list[str]:
    gpu = given.device != "cpu"
    precisions = ["fp32", *(["bf16"] if gpu or has_bf16() else [])]
    compiled = [f"{name}-compiled" for name in precisions] if gpu or given.compiled else []
    return [*precisions, *compiled, *([] if given.skip_peers else ["peer"])]


def make_side(name: str, plan: Plan, device: str) -> Side:
    network = make_unet(plan, NetworkRecipe(), seed=0)
    return theirs(plan, network, device) if name == "peer" else ours(name, plan, network, device)


def ours(name: str, plan: Plan, network: UNet, device: str) -> Side:
    precision, compiled = OURS[name]
    recipe = TrainingRecipe(precision="bf16" if precision == "bf16" else "fp32")
    network = network.to(device).train()
    model = Compiled(network, "--compiled") if compiled else network
    optimizer = OPTIMIZERS[recipe.optimizer](network.parameters(), recipe)
    how = Supervision(plain_rules(plan.n_classes), plan.batch_dice)

    def step(image: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            outputs = model(image)
        loss = supervised(LOSSES[recipe.loss], outputs, labels, how, NetworkRecipe().unsupervised_levels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.gradient_clip)
        optimizer.step()
        value = float(loss.detach())
        finish(device)
        return value

    return Side(f"ichbench, {recipe.precision}" + (", compiled" if compiled else ""), step)


def theirs(plan: Plan, network: UNet, device: str) -> Side:
    """nnUNetTrainer's methods on what they need of a trainer: no files, no data set."""
    name_folders()
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    # in torch's usual memory format, as nnU-Net makes it
    peer = their_network(plan, network, deep_supervision=True)
    trainer = SimpleNamespace(
        device=torch.device(device), network=peer.to(device).train(), is_ddp=False, enable_deep_supervision=True, initial_lr=1e-2,
        weight_decay=3e-5, num_epochs=1000, grad_scaler=torch.amp.GradScaler("cuda") if device != "cpu" else None,
        label_manager=SimpleNamespace(has_regions=False, ignore_label=None),
        configuration_manager=SimpleNamespace(batch_dice=plan.batch_dice, pool_op_kernel_sizes=[list(one) for one in plan.strides]),
    )  # fmt: skip
    trainer._do_i_compile = lambda: device != "cpu" and os.environ.get("nnUNet_compile", "t") in ("t", "1", "true")
    trainer._get_deep_supervision_scales = lambda: nnUNetTrainer._get_deep_supervision_scales(trainer)
    if trainer._do_i_compile():
        trainer.network = torch.compile(trainer.network)
    trainer.optimizer, _ = nnUNetTrainer.configure_optimizers(trainer)
    trainer.loss = nnUNetTrainer._build_loss(trainer)
    shapes = np.array(plan.patch_size) // np.cumprod(np.array(plan.strides), axis=0)
    made: list[Tensor] = []

    def step(image: Tensor, labels: Tensor) -> float:
        if not made:
            # their augmentation makes the targets of the levels; its time is not the step's, and the first step is not the best
            made.extend(shrink_target(labels, shape)[:, None] for shape in shapes[:-1].tolist())
        loss = float(nnUNetTrainer.train_step(trainer, {"data": image, "target": made})["loss"])
        finish(device)
        return loss

    return Side(f"nnU-Net {peer_version()}" + (", compiled, fp16" if trainer._do_i_compile() else ", fp32"), step)


def planned(features: int, patch: tuple[int, ...], batch_size: int) -> Plan:
    """nnU-Net's plan for the phantom's full-size CTs, with this patch."""
    affine = np.array([[0, 0, -0.45, 0], [0, -0.45, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1]])
    image = np.random.default_rng(0).normal(40, 20, (1, 28, 512, 512)).astype(np.float32)
    case = Case("head", image, (image[0] > 60).astype(np.int16), Grid((28, 512, 512), affine))
    plan = make_plan(fingerprint(iter([case])), PlanRecipe(base_features=features), ("CT",), 2, 1)
    return replace(plan, patch_size=patch, batch_size=batch_size)


def batch(plan: Plan, device: str) -> tuple[Tensor, Tensor]:
    """Noise with a brighter box, the bleed, in every sample."""
    rng = np.random.default_rng(0)
    labels = np.zeros((plan.batch_size, *plan.patch_size), np.int64)
    for sample in labels:
        sample[tuple(slice(n // 3 + int(rng.integers(-n // 8, n // 8 + 1)), n // 2 + n // 8) for n in plan.patch_size)] = 1
    image = rng.standard_normal((plan.batch_size, 1, *plan.patch_size)) + labels[:, None]
    return torch.from_numpy(image.astype(np.float32)).to(device), torch.from_numpy(labels).to(device)


def peak_gb(given: argparse.Namespace) -> float:
    """Of two steps of one side, beyond what the process held before; on a GPU what torch allocated there."""
    torch.set_num_threads(numbers(given.threads)[0])
    plan = planned(numbers(given.features)[0], numbers(given.patch), given.batch)
    image, labels = batch(plan, given.device)
    before = resident_gb("VmRSS")
    # Linux: the highest mark starts anew, else the making of the plan would be in it
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    side = make_side(given.memory, plan, given.device)
    for _ in range(2):
        side.step(image, labels)
    return torch.cuda.max_memory_allocated() / 1024**3 if given.device != "cpu" else resident_gb("VmHWM") - before


def resident_gb(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024**2


def own_peak(given: argparse.Namespace, features: int, threads: int, name: str) -> str:
    command = [sys.executable, __file__, "--memory", name, "--features", str(features), "--patch", given.patch, "--batch", str(given.batch)]
    command += ["--threads", str(threads), "--device", given.device]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 else "?"


def finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def forward_flops(plan: Plan) -> float:
    """Multiplications and additions of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    network = make_unet(plan, NetworkRecipe()).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(plan.batch_size, plan.in_channels, *plan.patch_size, device="meta"))
    return float(counter.get_total_flops())


def matrix_rate(device: str, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large bfloat16 matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    finish(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ a
    finish(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def waits(plan: Plan, device: str, workers: int, step_seconds: float) -> str:
    """How much of a step's time patches cost, made by `workers` threads of the CPU from one full-size CT."""
    from ichbench.augmentation.batches import Sampling, ahead, make_batch
    from ichbench.augmentation.patches import TRAIN_STREAM, TrainingCase

    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 28, 512, 512)).astype(np.float32)
    labels = np.zeros(image.shape[1:], np.int16)
    labels[10:15, 200:260, 200:260] = 1
    case = TrainingCase("head", image, labels, {1: np.argwhere(labels)})
    sampling = Sampling(plan.patch_size, plan.batch_size, 0.33, 0, TrainingRecipe().augment)
    torch.set_num_threads(1)
    began, count = time.perf_counter(), 10 * workers
    for made, _ in ahead(lambda step: make_batch([case], sampling, TRAIN_STREAM, step), range(count), workers):
        made.to(device)
    seconds = (time.perf_counter() - began) / count
    share = max(0.0, 1 - step_seconds / max(seconds, step_seconds))
    hours = 250_000 * max(seconds, step_seconds) / 3600
    said = f"Patches: {seconds:.3f} s a batch with {workers} threads, so a bf16 step waits {share:.0%} of the time"
    return f"{said}; 1000 x 250 steps take {hours:.1f} h."


if __name__ == "__main__":
    main()
