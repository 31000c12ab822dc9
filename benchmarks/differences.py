"""What our deliberate differences from nnU-Net change, in numbers: `python benchmarks/differences.py` prints the lines of docs/nnunet.md.

Needs the real data beside the checkout (or ICHBENCH_SHARED_DATA). With `--model`, a result folder of a trained nnU-Net for
Dataset004_Hippocampus, the effect of summing logits in half precision is measured on its validation cases too.

    OMP_NUM_THREADS=1 python benchmarks/differences.py [--model RESULTS/Dataset004_Hippocampus/TRAINER__PLANS__CONFIGURATION]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import SHARED, arguments, own_threads

from ichbench.augmentation.draw import draw_augmentation, enlarged_zyx
from ichbench.augmentation.patches import corner_range, patch_zyx, sample_generator
from ichbench.augmentation.spatial import reading
from ichbench.cases.cohort import Cohort, read_cohort
from ichbench.cases.images import read_grid
from ichbench.cases.splits import five_folds
from ichbench.recipe import AugmentRecipe

#: patches that nnU-Net plans for these data sets (3d_fullres)
PATCHES = {"Dataset004_Hippocampus": (40, 56, 40), "Dataset501_PHE": (28, 256, 256)}


def main() -> None:
    parser = arguments(__doc__, out=None)
    parser.add_argument("--model", type=Path, help="a result folder of nnU-Net for Dataset004_Hippocampus")
    given = parser.parse_args()
    torch.set_num_threads(own_threads())
    for name, patch in PATCHES.items():
        cohort = read_cohort(SHARED / name)
        print(clamping(cohort, patch))
        grids = [read_grid(record.images[0]) for record in cohort.records]
        plain = sum(grid.file_axes == (2, 1, 0) for grid in grids)
        print(f"{name}: {plain} of {len(grids)} files are stored slice by slice, where both orientation rules read the same array")
    for patch in ((16, 320, 320), (28, 256, 256), (512, 512), (128, 128, 128), (40, 56, 40)):
        print(rims(patch))
    print(groups())
    if given.model:
        for line in half_precision(given.model):
            print(line, flush=True)


def clamping(cohort: Cohort, patch: tuple[int, int, int]) -> str:
    """Of patches centred on a random foreground voxel: how many reach beyond the far border, and with how much of their volume."""
    rng = np.random.default_rng(0)
    beyond, avoidable = [], []
    for name in cohort.train_ids[:20]:
        labels = cohort.load(name).labels_zyx
        places = np.argwhere(labels > 0)
        for voxel in places[rng.integers(len(places), size=50)] if len(places) else ():
            theirs, ours = 1.0, 1.0
            for axis, (length, size) in enumerate(zip(labels.shape, patch, strict=True)):
                low, high = corner_range(length, size)
                corner = max(low, int(voxel[axis]) - size // 2)
                theirs *= max(0, min(corner + size, length) - max(corner, 0)) / size
                clamped = min(corner, high)
                ours *= max(0, min(clamped + size, length) - max(clamped, 0)) / size
            beyond.append(theirs < ours)
            avoidable.append(ours - theirs)
    return (
        f"{cohort.name}, patch {patch}: {np.mean(beyond):.0%} of {len(beyond)} patches about a foreground voxel hang out where they "
        f"need not; {np.mean(avoidable):.1%} of all their voxels are padding for that reason"
    )


def rims(patch: tuple[int, ...]) -> str:
    """Of turned or scaled patches: how many read beyond the box that nnU-Net cuts, where all is 0, and how much of them."""
    size, recipe = patch_zyx(patch), AugmentRecipe()
    box, shares = enlarged_zyx(recipe, patch), []
    voxels = np.stack(np.meshgrid(*[np.arange(0, n, max(1, n // 40)) for n in size], indexing="ij"), -1).reshape(-1, 3)
    for step in range(600):
        draw = draw_augmentation(sample_generator(1, 0, step, 0), recipe, patch, 1)
        if draw.is_spatial:
            where = reading(draw, ((0, 0, 0), box), size)
            places = voxels @ where.matrix.T + where.shift
            shares.append(float(((places < -0.5) | (places > np.array(box) - 0.5)).any(axis=1).mean()))
    hit = np.mean(np.array(shares) > 0.001)
    return (
        f"patch {patch}, box {box}: {hit:.0%} of {len(shares)} turned or scaled patches reach beyond it, "
        f"with {np.mean(shares):.2%} of all their voxels"
    )


def groups() -> str:
    """Cases of patients with two scans each: patients on both sides of nnU-Net's folds, and of ours."""
    ids = [f"case_{number:03d}" for number in range(40)]
    patients = {name: f"patient_{number // 2}" for number, name in enumerate(ids)}
    counts = {}
    for what, known in (("nnU-Net", None), ("ours", patients)):
        folds = five_folds(ids, known)
        shared = [len({patients[name] for name in fold["train"]} & {patients[name] for name in fold["val"]}) for fold in folds]
        counts[what] = np.mean(shared)
    said = f"{counts['nnU-Net']:.1f} patients of a fold lie on both sides by nnU-Net's rule, {counts['ours']:.1f} by ours"
    return f"40 scans of 20 patients: {said}"


def half_precision(model: Path) -> Iterator[str]:
    """The same weights with logits summed in float32 and in half precision, over the validation cases of the model's fold 0."""
    from ichbench.inference.model import load_model
    from ichbench.inference.nnunet_import import import_nnunet
    from ichbench.inference.postprocess import dice_counts, mean_dice
    from ichbench.inference.predictors import predict_unet

    cohort = read_cohort(SHARED / "Dataset004_Hippocampus")
    with tempfile.TemporaryDirectory() as folder:
        import_nnunet(model, Path(folder) / "model", "final", ["0"])
        tools = load_model(Path(folder) / "model").tools
    single = replace(tools, inference=tools.inference.model_copy(update={"compatibility": "ichbench"}))
    counts: dict[str, list[np.ndarray]] = {"half": [], "single": []}
    differ = voxels = 0
    for name in five_folds(cohort.train_ids)[0]["val"]:
        case = cohort.load(name, keep_file_order=True)
        masks = {"half": predict_unet(case, tools).labels_zyx, "single": predict_unet(case, single).labels_zyx}
        differ += int((masks["half"] != masks["single"]).sum())
        voxels += int((masks["single"] > 0).sum())
        for which, mask in masks.items():
            counts[which].append(dice_counts(case.labels_zyx, mask, (1, 2)))
    means = {which: np.nanmean(mean_dice(found)) for which, found in counts.items()}
    yield (
        f"Hippocampus, {len(counts['half'])} validation cases of {model.name}: {differ} of {voxels:,} foreground voxels differ; "
        f"mean Dice {means['half']:.6f} in half precision, {means['single']:.6f} in float32"
    )


if __name__ == "__main__":
    main()
