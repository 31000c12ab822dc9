"""Preparation beside nnU-Net, in one run: `python benchmarks/prepare.py` prints two tables.

Per core: ten full-size phantoms of 512 x 512 x 28 voxels, each with a spacing of its own, prepared from the file to the
array on disk, one thread, in the plan that nnU-Net makes of them; nnU-Net's `DefaultPreprocessor.run_case_save` beside
`prepare_case` + `write_prepared`, taking turns case by case. The arrays of both are compared.

End to end: fingerprint + plan + prepare of the ten, from the command to its end, on all cores of the machine:
`nnUNetv2_plan_and_preprocess -c 3d_fullres -np CORES` (its processes start and import torch, as its users wait for it)
beside a fresh `python benchmarks/prepare.py --prepare COHORT OUT`, which starts, imports and does the same with ours.

    pip install .[peers] && OMP_NUM_THREADS=1 python benchmarks/prepare.py [--out benchmarks/results/prepare.md]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPE_ZYX = (28, 512, 512)
DATASET = "Dataset917_Phantom"
CONFIGURATION = "3d_fullres"


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--cases", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=2026)
    arguments.add_argument("--cohort", type=Path, help="keep the phantoms here, or take them from here where they are")
    arguments.add_argument("--out", type=Path, help="write the tables here as well")
    arguments.add_argument("--prepare", nargs=2, type=Path, metavar=("COHORT", "OUT"), help="only prepare a cohort with ours (used by the second table)")
    given = arguments.parse_args()
    if given.prepare:
        prepare_cohort(*given.prepare)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        cohort = given.cohort or folder / "phantom"
        if not (cohort / "dataset.json").is_file():
            write_cohort(cohort, given.cases, given.seed)
        (folder / "raw" / DATASET).symlink_to(cohort.resolve())
        theirs_s, ours_s = end_to_end(folder, cohort)
        rows, worst = per_core(folder, cohort)
    lines = table(rows)
    lines += ["", f"Arrays of both: largest difference of the images {worst:.1e}, labels equal, class locations equal.", ""]
    lines += [
        f"| fingerprint + plan + prepare of {len(rows)} cases, {os.cpu_count()} cores | seconds |",
        "|---|--:|",
        f"| nnUNetv2_plan_and_preprocess | {theirs_s:.1f} |",
        f"| ichbench | {ours_s:.1f} |",
        f"| times faster | {theirs_s / ours_s:.1f} |",
        "",
        machine(),
    ]
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(f"# Preparation: files to prepared arrays on disk\n\n{text}\n", encoding="utf-8")


def write_cohort(folder: Path, n: int, seed: int) -> None:
    """Full-size phantoms cut or continued to 28 slices, as an nnU-Net raw folder."""
    from ichbench.cases.images import write_image, write_labels
    from ichbench.cases.phantom import make_case
    from ichbench.prepare.slices import take_slices

    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for index in range(n):
        case = make_case(index, "full", seed).case
        extra = SHAPE_ZYX[0] - case.grid.shape_zyx[0]
        case = take_slices(case, -extra // 2 if extra < 0 else 0, case.grid.shape_zyx[0]) if False else _of_28_slices(case, take_slices)
        write_image(folder / "imagesTr" / f"{case.id}_0000.nii.gz", case.image_czyx[0], case.grid)
        write_labels(folder / "labelsTr" / f"{case.id}.nii.gz", np.asarray(case.labels_zyx), case.grid)
    table = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "hemorrhage": 1}, "numTraining": n, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(table), encoding="utf-8")
