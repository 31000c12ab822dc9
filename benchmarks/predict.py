"""Prediction beside nnU-Net's own predictor, in one run: `python benchmarks/predict.py` prints a table.

Work: one analytic head CT (512 x 512 x 28 voxels of 0.45 x 0.45 x 5 mm, drawn like the phantom cohort), from the array of HU to
the mask on its grid: preparation, tiles with half overlap, all mirrorings, the way back. Both sides have the same weights (a
small nnU-Net U-Net, trained for some steps on the case itself so that it segments something), the same plan, tiles and axes.
Peer: `nnUNetPredictor.predict_single_npy_array` of nnunetv2, in this process. Seconds are those of the process's CPU, which on an
idle machine with one thread are the seconds of the clock; sides take turns and the best counts.

`--memory` predicts a 512 x 512 x 400 CT of noise instead and prints the largest resident set: with `--features 2` what the image and the
logits take, in two minutes; with 32 the activations of a real network too, in a quarter of an hour.

    pip install . "nnunetv2==2.8.1" && OMP_NUM_THREADS=1 python benchmarks/predict.py [--out benchmarks/results/predict.md]
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import arguments, numbers, own_threads, processor, versions, write
from numpy.typing import NDArray
from peer import name_folders, peer_version, their_network
from torch import nn

from ichbench.cases.case import Case, Grid
from ichbench.cases.labels import plain_rules
from ichbench.inference.predictors import Tools, predict_unet
from ichbench.network.losses import Supervision, dice_ce
from ichbench.network.unet import UNet, make_unet
from ichbench.prepare.fingerprint import fingerprint
from ichbench.prepare.pipeline import prepare_case
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import InferenceRecipe, NetworkRecipe, PlanRecipe, PrepareRecipe

LABELS = {"background": 0, "ich": 1}
DEFAULT, PLAIN, DIRECT = "ichbench, fp32 (default)", "ichbench, fp32, without a C++ compiler", "ichbench, fp32, direct"
#: their compiler (20 s to some minutes, once a process) is not timed
COMPILED, COMPILED_BF16 = "ichbench, fp32, compiled", "ichbench, bf16, compiled"


def main() -> None:
    parser = arguments(__doc__, "table", peers=True)
    parser.add_argument("--features", default="32", help="of the highest level, one table each, such as 8,32; nnU-Net plans 32")
    parser.add_argument("--patch", default="16,128,128")
    parser.add_argument("--spacing", default="5,0.9,0.9", help="working spacing, mm")
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=40, help="of training before the comparison")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--nets", action="store_true", help="time the networks alone instead, on one patch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="only the large CT (--out: --features 2 --patch 64,128,128)")
    given = parser.parse_args()
    torch.set_num_threads(own_threads())
    each = memory if given.memory else alone if given.nets else compared
    parts = [each(given, features) for features in numbers(given.features)]
    text = "\n\n".join("\n".join(part) for part in parts)
    print(text)
    if given.out:
        # a process of its own, because the largest resident set is that of a whole life
        command = [sys.executable, __file__, "--memory", "--features", "2", "--patch", "64,128,128", "--device", given.device]
        text += "\n\n" + subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        write(given.out, "Prediction of one head CT, from HU to mask", text)


def compared(given: argparse.Namespace, features: int) -> Iterator[str]:
    case = head_ct()
    plan = planned(given, features, case)
    prepare = PrepareRecipe(compatibility="nnunet")
    network = make_unet(plan, NetworkRecipe())
    train(network, case, plan, prepare, given.steps)
    network.eval()
    unlabelled = replace(case, labels_zyx=None)
    recipe = InferenceRecipe(mirror=given.mirror)

    def side(**fields: str) -> Callable[[], Any]:
        return ours(unlabelled, recipe.model_copy(update=fields), prepare, plan, network, given.device)

    sides = {DEFAULT: side(), DIRECT: side(convolution="direct"), COMPILED: side(convolution="compiled")}
    sides["ichbench, compatibility = nnunet"] = side(compatibility="nnunet")
    if given.device != "cpu" or has_bf16():
        sides["ichbench, bf16"] = side(precision="bf16")
        sides[COMPILED_BF16] = side(precision="bf16", convolution="compiled")
    if not given.skip_peers:
        sides[f"nnU-Net {peer_version()}"] = theirs(unlabelled, plan, network, given.mirror, given.device)
    best, masks = timed(sides, given.repeats)
    base = best.get(f"nnU-Net {peer_version()}" if not given.skip_peers else "", float("nan"))
    yield "| side | seconds | nnU-Net / side | Dice to our direct mask | voxels that differ from it | from nnU-Net's mask |"
    yield "|---|---|---|---|---|---|"
    peer = None if given.skip_peers else masks[f"nnU-Net {peer_version()}"]
    for name, seconds in best.items():
        differ = "" if peer is None else f"{int((masks[name] != peer).sum())}"
        ours_differ = int((masks[name] != masks[DIRECT]).sum())
        agreement = dice(masks[name], masks[DIRECT])
        yield f"| {name} | {seconds:.2f} | {base / seconds:.2f} | {agreement:.6f} | {ours_differ} | {differ} |"
    parts = pieces(unlabelled, recipe, prepare, plan, network, given.device)
    yield ""
    yield f"Of our seconds by default: {', '.join(f'{name} {seconds:.2f}' for name, seconds in parts.items())}."
    yield f"Mask: {int(masks[DIRECT].sum()):,} voxels; Dice to the truth {dice(masks[DIRECT], case.labels_zyx):.3f}."
    yield (
        f"Plan: patch {plan.patch_size} at {plan.spacing} mm, features {plan.features}, {len(tiles(unlabelled, prepare, plan))} tiles, "
        + ("8 mirrorings." if given.mirror else "no mirroring.")
    )
    if given.device == "cpu" and not has_bf16():
        yield "This CPU does not compute in bf16: it has no row."
    yield f"{processor(given.device)}, {torch.get_num_threads()} thread(s), {versions('torch', 'Python')}."


def alone(given: argparse.Namespace, features: int) -> Iterator[str]:
    """The networks on one patch, without tiles, mirrorings and what comes before and after."""
    from ichbench.network import fast
    from ichbench.network.compiled import compiled_network

    plan = planned(given, features, head_ct())
    network = make_unet(plan, NetworkRecipe()).eval()
    x = torch.randn(1, plan.in_channels, *plan.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with patch.object(fast, "kernels", lambda: None):
            plain = fast.fast_network(copy.deepcopy(network))
        sides: dict[str, Callable[[Any], Any]] = {
            DEFAULT: fast.fast_network(network),
            PLAIN: plain,
            DIRECT: network,
            COMPILED: compiled_network(network),
        }
        if has_bf16():
            sides[COMPILED_BF16] = torch.autocast("cpu", torch.bfloat16)(compiled_network(network))
        if not given.skip_peers:
            sides[f"nnU-Net {peer_version()}"] = checked_network(plan, network)
        calls = {name: lambda side=side: side(x).float().numpy() for name, side in sides.items()}  # type: ignore[misc]
        best, answers = timed(calls, given.repeats)
    base, spread = best[list(best)[-1]], float(answers[DIRECT].std())
    yield "| network on one patch | seconds | nnU-Net / side | largest difference to our direct logits, over their spread |"
    yield "|---|---|---|---|"
    for name, seconds in best.items():
        yield f"| {name} | {seconds:.2f} | {base / seconds:.2f} | {float(np.abs(answers[name] - answers[DIRECT]).max()) / spread:.1e} |"


def planned(given: argparse.Namespace, features: int, case: Case) -> Plan:
    """nnU-Net's plan for the case with the patch and the spacing that were asked for."""
    spacing = tuple(float(n) for n in given.spacing.split(","))
    recipe = PlanRecipe(patch_size=numbers(given.patch), spacing_mm=spacing, base_features=features)
    return make_plan(fingerprint(iter([case])), recipe, ("CT",), 2, 1)


def head_ct() -> Case:
    """One full-size phantom with its bleed."""
    from ichbench.cases.cohort import read_cohort
    from ichbench.cases.phantom import write_phantom

    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder) / "cohort", 3, "full", 1)
        cohort = read_cohort(Path(folder) / "cohort")
        found = max(
            (cohort.load(name, keep_file_order=True) for name in cohort.train_ids), key=lambda case: int((case.labels_zyx > 0).sum())
        )
    return found


def train(network: nn.Module, case: Case, plan: Plan, prepare: PrepareRecipe, steps: int) -> None:
    """On patches of the case itself, half of them about the bleed: a network that segments something, not a good one."""
    torch.manual_seed(0)
    prepared = prepare_case(case, prepare, plan)
    if prepared.labels_zyx is None:
        raise SystemExit("the case has no labels")
    labels = np.maximum(prepared.labels_zyx, 0)
    pads = [(0, max(0, n - m)) for n, m in zip(plan.patch_size, labels.shape, strict=True)]
    image, labels = np.pad(prepared.image_czyx, [(0, 0), *pads]), np.pad(labels, pads)
    rng = np.random.default_rng(0)
    places = np.argwhere(labels > 0)
    optimizer = torch.optim.Adam(network.parameters(), 0.004)
    network.train()
    for _ in range(steps):
        corners = [
            rng.integers(0, np.array(labels.shape) - plan.patch_size + 1),
            places[rng.integers(len(places))] - np.array(plan.patch_size) // 2,
        ]
        boxes = [_box(np.clip(corner, 0, np.array(labels.shape) - plan.patch_size), plan.patch_size) for corner in corners]
        images = torch.from_numpy(np.stack([image[(slice(None), *box)] for box in boxes]))
        target = torch.from_numpy(np.stack([labels[box] for box in boxes])).long()
        answer = network(images)
        loss = dice_ce(answer[0] if isinstance(answer, list) else answer, target, Supervision(plain_rules(2), True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _box(corner: NDArray[np.integer], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(int(start), int(start) + n) for start, n in zip(corner, shape, strict=True))


def ours(case: Case, recipe: InferenceRecipe, prepare: PrepareRecipe, plan: Plan, network: UNet, device: str) -> Callable[[], Any]:
    tools = Tools(recipe, prepare, plan, (network.to(device),), device)
    return lambda: predict_unet(case, tools).labels_zyx


def theirs(case: Case, plan: Plan, network: UNet, mirror: bool, device: str) -> Callable[[], Any]:
    """nnU-Net's predictor with nnU-Net's network and our weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parity_nnunet"))
    name_folders()
    from nn_predictor import make_predictor

    peer = checked_network(plan, network)
    predictor = make_predictor(peer, [peer.state_dict()], plan, LABELS, mirror=(0, 1, 2) if mirror else None)
    predictor.device = torch.device(device)
    properties = {"spacing": list(case.grid.spacing_zyx_mm)}
    return lambda: predictor.predict_single_npy_array(case.image_czyx, dict(properties), None, None, False)


def checked_network(plan: Plan, network: UNet) -> nn.Module:
    """nnU-Net's network with our weights, which must answer as ours."""
    peer = their_network(plan, network, deep_supervision=False)
    x = torch.randn(2, plan.in_channels, *plan.patch_size, generator=torch.Generator().manual_seed(0))
    device = next(network.parameters()).device
    with torch.inference_mode():
        worst = float((peer.eval()(x) - network.cpu()(x)).abs().max())
        network.to(device)
    if worst > 1e-3:
        raise SystemExit(f"the two networks differ by {worst}: the weights were not carried over")
    return peer


def timed(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, NDArray[np.integer]]]:
    best: dict[str, float] = {}
    masks: dict[str, NDArray[np.integer]] = {}
    for name in (COMPILED, COMPILED_BF16):
        if name in sides:
            sides[name]()
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.process_time()
            masks[name] = side()
            best[name] = min(best.get(name, float("inf")), time.process_time() - began)
    return best, masks


def pieces(case: Case, recipe: InferenceRecipe, prepare: PrepareRecipe, plan: Plan, network: UNet, device: str) -> dict[str, float]:
    from ichbench.inference.ensemble import fold_logits, native_labels

    clock = [time.process_time()]
    prepared = prepare_case(case, prepare, plan)
    clock.append(time.process_time())
    logits = fold_logits([network], prepared.image_czyx, plan, recipe, device)
    clock.append(time.process_time())
    native_labels(logits, prepared.geometry, plain_rules(2))
    clock.append(time.process_time())
    return dict(zip(("preparation", "tiles", "way back"), np.diff(clock).tolist(), strict=True))


def tiles(case: Case, prepare: PrepareRecipe, plan: Plan) -> list[tuple[int, ...]]:
    from itertools import product

    from ichbench.inference.sliding import tile_starts

    shape = prepare_case(case, prepare, plan).image_czyx.shape[1:]
    return list(product(*(tile_starts(max(n, p), p, 0.5) for n, p in zip(shape, plan.patch_size, strict=True))))


def memory(given: argparse.Namespace, features: int) -> Iterator[str]:
    """Largest resident set of predicting 512 x 512 x 400 voxels with two classes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    rng = np.random.default_rng(0)
    image = np.empty((1, 400, 512, 512), np.float32)
    for z in range(400):
        image[0, z] = rng.normal(40, 20, (512, 512))
    affine = np.array([[0, 0, -0.5, 0], [0, -0.5, 0, 0], [0.6, 0, 0, 0], [0, 0, 0, 1]])
    case = Case("large", image, None, Grid((400, 512, 512), affine))
    small = Case("small", image[:, :32, :64, :64], np.ones((32, 64, 64), np.int16), Grid((32, 64, 64), affine))
    patch = numbers(given.patch)
    recipe = PlanRecipe(patch_size=patch, spacing_mm=(0.7, 0.6, 0.6), base_features=features, max_features=10 * features)
    plan = replace(make_plan(fingerprint(iter([small])), recipe, ("CT",), 2, 1), patch_size=patch)
    network = make_unet(plan, NetworkRecipe())
    began = time.process_time()
    mask = predict_unet(
        case, Tools(InferenceRecipe(mirror=False, tile_step=1.0), PrepareRecipe(), plan, (network,), given.device)
    ).labels_zyx
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    yield f"512 x 512 x 400 CT, two classes, working grid at {plan.spacing} mm, patch {plan.patch_size}, features {plan.features}:"
    yield f"at most {peak:.2f} GB resident"
    yield f"(before the case was made: {before:.2f} GB; {time.process_time() - began:.0f} s; mask of {0 if mask is None else mask.shape})."


def dice(a: NDArray[np.integer], b: NDArray[np.integer] | None) -> float:
    if b is None:
        return float("nan")
    total = int((a > 0).sum() + (b > 0).sum())
    return 2 * int(((a > 0) & (b > 0)).sum()) / total if total else 1.0


def has_bf16() -> bool:
    """Whether oneDNN computes bf16 on this CPU (AVX-512 BF16, AMX and the like), not merely stores it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(torch.cpu._is_avx512_bf16_supported())


if __name__ == "__main__":
    main()
