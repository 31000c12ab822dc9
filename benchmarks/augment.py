"""Augmented batches beside nnU-Net's, in one run: `python benchmarks/augment.py` prints a table.

Batches of 2 patches of 16 x 320 x 320 voxels, one channel, cut from phantoms in memory, on one core, by
- nnU-Net: its `nnUNetDataLoader` with the enlarged crop and the transforms of `nnUNetTrainer.get_training_transforms`
  (batchgeneratorsv2), no deep supervision targets, in this process and thread;
- ours: `make_batch` with the default recipe, and with `compatibility = "nnunet"` (its boxes).
They take turns block by block, so that what else the machine does meets all alike. Before the clock starts each has made
batches, among them those in which nnU-Net measures how to blur. The number that counts is CPU time per patch: drawing,
cutting, turning, changing, and putting together the batch. The second table holds one transform at a time.

    pip install .[peers] && OMP_NUM_THREADS=1 python benchmarks/augment.py [--out benchmarks/results/augment.md]
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, processor, versions, write
from peer import name_folders

PATCH, BATCH = (16, 320, 320), 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, default=200, help="batches of each")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--seed", type=int, default=2026)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = phantoms(given.cases, given.seed)
    torch.manual_seed(given.seed)
    np.random.seed(given.seed)  # noqa: NPY002 (nnU-Net draws from it)
    peers = {
        "nnU-Net": theirs(cases),
        "ours": ours(cases, given.seed, True),
        'ours, compatibility = "nnunet"': ours(cases, given.seed, False),
    }
    seconds = measured(peers, given.batches)
    text = [
        f"Batches of {BATCH} x {' x '.join(map(str, PATCH))}, one channel, one core; {given.batches} batches of each, in turns.",
        f"{processor()}, {platform.system()}; {versions('torch', 'numpy', 'nnunetv2', 'batchgeneratorsv2')}.",
        "",
        "| | CPU ms a patch | patches a core-second | times nnU-Net |",
        "|---|---:|---:|---:|",
    ]
    for name, spent in seconds.items():
        each = spent / given.batches / BATCH
        text.append(f"| {name} | {each * 1e3:.1f} | {1 / each:.1f} | {seconds['nnU-Net'] / spent:.1f} |")
    text += ["", "One transform at a time, drawn always (ours), CPU ms a patch beyond the cut:", "", *alone(cases, given.seed)]
    print("\n".join(text))
    write(given.out, "Augmentation", "\n".join(text))


def phantoms(number: int, seed: int) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Normalised CTs (c, z, y, x) of about 28 x 512 x 512 voxels and their labels."""
    from ichbench.cases.phantom import make_case

    made = []
    for index in range(number):
        case = make_case(index, "full", seed).case
        image = ((np.clip(case.image_czyx, -10, 90) - 35) / 15).astype(np.float32)
        made.append((image, case.labels_zyx.astype(np.int16)))
    return made


def theirs(cases: list[tuple[Any, Any]]) -> Callable[[int], Any]:
    """nnU-Net's loader over arrays in memory (its files, which would have to be unpacked, are spared it)."""
    name_folders()
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Cases:
        identifiers = tuple(str(index) for index in range(len(cases)))

        def load_case(self, name: str) -> Any:
            image, labels = cases[int(name)]
            return image, labels[None], None, {"class_locations": {1: places[int(name)]}}

    class Labels:
        all_labels, has_ignore_label = [0, 1], False

    places = [np.argwhere(labels[None] == 1) for _, labels in cases]
    angle = (-np.pi, np.pi)
    box = get_patch_size(PATCH, angle, angle, angle, (0.85, 1.25))
    box[0] = PATCH[0]
    transforms = nnUNetTrainer.get_training_transforms(PATCH, angle, None, (0, 1, 2), True)
    loader = nnUNetDataLoader(Cases(), BATCH, box, PATCH, Labels(), 0.33, None, None, transforms=transforms)
    return lambda step: next(loader)


def ours(cases: list[tuple[Any, Any]], seed: int, clamped: bool, **fields: Any) -> Callable[[int], Any]:
    from ichbench.augmentation.batches import Sampling, make_batch
    from ichbench.augmentation.patches import TRAIN_STREAM, TrainingCase
    from ichbench.recipe import AugmentRecipe

    made = [TrainingCase(str(i), image, labels, {1: np.argwhere(labels == 1)}) for i, (image, labels) in enumerate(cases)]
    sampling = Sampling(PATCH, BATCH, 0.33, seed, AugmentRecipe(**fields), clamped=clamped)
    return lambda step: make_batch(made, sampling, TRAIN_STREAM, step)


def measured(makers: dict[str, Callable[[int], Any]], batches: int, block: int = 5) -> dict[str, float]:
    """CPU seconds that each needs for its batches, taking turns."""
    for make in makers.values():
        for step in range(10_000, 10_025):
            make(step)
    seconds = dict.fromkeys(makers, 0.0)
    for first in range(0, batches, block):
        for name, make in makers.items():
            began = time.process_time()
            for step in range(first, min(first + block, batches)):
                make(step)
            seconds[name] += time.process_time() - began
    return seconds


def alone(cases: list[tuple[Any, Any]], seed: int) -> list[str]:
    names = ("rotation", "scaling", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted")
    off: dict[str, Any] = {f"{name}_probability": 0.0 for name in names}
    off |= {"mirror": False, "blur_channel_probability": 1.0, "low_resolution_channel_probability": 1.0}
    fields = {"the cut alone": off, "mirror": off | {"mirror": True}} | {name: off | {f"{name}_probability": 1.0} for name in names}
    seconds = measured({name: ours(cases, seed, True, **given) for name, given in fields.items()}, 20)
    each = {name: spent / 20 / BATCH * 1e3 for name, spent in seconds.items()}
    bare = each.pop("the cut alone")
    rows = [f"| the cut alone | {bare:.1f} |", *(f"| {name.replace('_', ' ')} | {value - bare:.1f} |" for name, value in each.items())]
    return ["| | CPU ms |", "|---|---:|", *rows]


if __name__ == "__main__":
    main()
