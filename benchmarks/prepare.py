"""Preparation beside nnU-Net, in one run: `python benchmarks/prepare.py` prints two tables.

Per core: ten full-size phantoms of 512 x 512 x 28 voxels, each with a spacing of its own, prepared from the file to the
array on disk, one thread, in the plan that nnU-Net makes of them; nnU-Net's `DefaultPreprocessor.run_case_save` beside
`prepare_case` + `write_prepared`, taking turns case by case. The arrays of both are compared.

End to end: fingerprint + plan + prepare of the ten, from the command to its end, on all cores of the machine:
`nnUNetv2_plan_and_preprocess -c 3d_fullres -np CORES` (its processes start and import torch, as its users wait for it)
beside a fresh `python benchmarks/prepare.py --prepare COHORT OUT`, which starts, imports and does the same with ours.

The cohort has one plan (no flag is set), and the fingerprint repeats nnU-Net's own draw, so that both do the same work.

    pip install .[peers] && OMP_NUM_THREADS=1 python benchmarks/prepare.py [--out benchmarks/results/prepare.md]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, processor, versions, write

SHAPE_ZYX = (28, 512, 512)
DATASET = "Dataset917_Phantom"
CONFIGURATION = "3d_fullres"
REPEATS = 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--cohort", type=Path, help="keep the phantoms here, or take them from here where they are")
    parser.add_argument(
        "--prepare", nargs=2, type=Path, metavar=("COHORT", "OUT"), help="only prepare a cohort with ours (used by the second table)"
    )
    given = parser.parse_args()
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
        theirs, ours = end_to_end(folder, cohort)
        rows, worst = per_core(folder, cohort)
    lines = table(rows)
    lines += ["", f"Arrays of both: largest difference of the images {worst:.1e}, labels equal, class locations equal.", ""]
    lines += [
        f"| fingerprint + plan + prepare of {len(rows)} cases, {os.cpu_count()} cores | seconds | seconds of processor time |",
        "|---|--:|--:|",
        f"| nnUNetv2_plan_and_preprocess | {theirs[0]:.1f} | {theirs[1]:.1f} |",
        f"| ichbench | {ours[0]:.1f} | {ours[1]:.1f} |",
        f"| times faster | {theirs[0] / ours[0]:.1f} | {theirs[1] / ours[1]:.1f} |",
        "",
        machine(),
    ]
    text = "\n".join(lines)
    print(text)
    write(given.out, "Preparation: files to prepared arrays on disk", text)


def write_cohort(folder: Path, n: int, seed: int) -> None:
    """Full-size phantoms of 28 slices (some are left out, or the last repeated), as an nnU-Net raw folder."""
    from ichbench.cases.images import write_image, write_labels
    from ichbench.cases.phantom import make_case
    from ichbench.prepare.slices import take_slices

    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for index in range(n):
        case = make_case(index, "full", seed).case
        case = take_slices(case, 0, SHAPE_ZYX[0])
        write_image(folder / "imagesTr" / f"{case.id}_0000.nii.gz", case.image_czyx[0], case.grid)
        write_labels(folder / "labelsTr" / f"{case.id}.nii.gz", np.asarray(case.labels_zyx), case.grid)
    table = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "hemorrhage": 1}, "numTraining": n, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(table), encoding="utf-8")


def prepare_cohort(folder: Path, out: Path) -> None:
    """What a study's first step does: fingerprint, plan, and every case prepared, as nnU-Net would (compatibility "nnunet")."""
    from concurrent.futures import ThreadPoolExecutor

    from ichbench.cases.cohort import read_cohort
    from ichbench.prepare.locations import location_classes
    from ichbench.prepare.pipeline import prepare_case
    from ichbench.prepare.store import write_prepared
    from ichbench.prepare.survey import cohort_fingerprint, cohort_plan
    from ichbench.recipe import PlanRecipe, PrepareRecipe

    cohort, recipe, workers = read_cohort(folder), PrepareRecipe(compatibility="nnunet"), os.cpu_count() or 1
    found = cohort_fingerprint(cohort, cohort.train_ids, recipe, workers)
    plan = cohort_plan(cohort, found, recipe, PlanRecipe())
    classes = location_classes(cohort.labels.values(), cohort.ignore_label)

    def one(case_id: str) -> None:
        write_prepared(out, prepare_case(cohort.load(case_id, keep_file_order=True), recipe, plan, classes))

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(one, cohort.train_ids))


def end_to_end(folder: Path, cohort: Path) -> list[tuple[float, float]]:
    """(seconds, seconds of processor time) of nnU-Net's command and of ours, each a new process."""
    cores = str(os.cpu_count())
    command = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    theirs = [str(command), "-d", DATASET[7:10], "-c", CONFIGURATION, "-np", cores, "-npfp", cores]
    ours = [sys.executable, __file__, "--prepare", str(cohort), str(folder / "ours")]
    seconds = []
    for run in (theirs, ours):
        start, busy = time.perf_counter(), sum(os.times()[2:4])
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds.append((time.perf_counter() - start, sum(os.times()[2:4]) - busy))
        print(f"{Path(run[0]).name}: {seconds[-1][0]:.1f} s", flush=True)
    return seconds


def per_core(folder: Path, cohort_folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Seconds per case of both, by nnU-Net's own plans, and the largest difference of the images."""
    from dataclasses import replace

    import blosc2
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from ichbench.cases.cohort import read_cohort
    from ichbench.prepare.fingerprint import Fingerprint
    from ichbench.prepare.locations import location_classes
    from ichbench.prepare.pipeline import prepare_case
    from ichbench.prepare.plan import make_plan
    from ichbench.prepare.store import read_prepared, write_prepared
    from ichbench.recipe import PlanRecipe, PrepareRecipe

    preprocessed = folder / "preprocessed" / DATASET
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    cohort, recipe = read_cohort(cohort_folder), PrepareRecipe(compatibility="nnunet")
    found = Fingerprint.from_json(json.loads((preprocessed / "dataset_fingerprint.json").read_text()))
    ours = make_plan(found, PlanRecipe(), cohort.channel_names, len(cohort.labels), len(cohort.train_ids))
    ours = replace(ours, spacing=tuple(configuration.spacing), transpose_forward=tuple(plans["transpose_forward"]))
    classes = location_classes(cohort.labels.values(), cohort.ignore_label)
    table = json.loads((cohort_folder / "dataset.json").read_text())
    rows, worst = [], 0.0
    for case_id in cohort.train_ids:
        record = cohort.record(case_id)
        row: dict[str, Any] = {"case": case_id, "spacing": cohort.metadata()[cohort.train_ids.index(case_id)]["spacing_y_mm"]}
        seconds: dict[str, float] = {}
        for _ in range(REPEATS):
            with clock(seconds, "ours"):
                write_prepared(folder / "one", prepare_case(cohort.load(case_id, keep_file_order=True), recipe, ours, classes))
            for old in folder.glob("theirs*"):
                old.unlink()
            with clock(seconds, "theirs"), contextlib.redirect_stdout(io.StringIO()):
                DefaultPreprocessor(verbose=False).run_case_save(
                    str(folder / "theirs"), [str(path) for path in record.images], str(record.label), manager, configuration, table
                )
        prepared = read_prepared(folder / "one", case_id, verify=True)
        image, labels = (blosc2.open(str(folder / f"theirs{name}.b2nd"), mode="r")[:] for name in ("", "_seg"))
        with (folder / "theirs.pkl").open("rb") as file:
            locations = pickle.load(file)["class_locations"]  # noqa: S301 - written by the line above
        worst = max(worst, float(np.abs(image - prepared.image_czyx).max()))
        if not np.array_equal(labels[0], prepared.labels_zyx):
            raise SystemExit(f"{case_id}: the labels differ")
        if not all(np.array_equal(prepared.foreground[key], np.asarray(at)[:, 1:]) for key, at in locations.items()):
            raise SystemExit(f"{case_id}: the class locations differ")
        rows.append(row | seconds | {"shape": "x".join(map(str, prepared.geometry.shape))})
    return rows, worst


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Keep the least time of the repeats, and the least processor time, which a busy machine changes less."""
    start, busy = time.perf_counter(), time.process_time()
    yield
    seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - start)
    seconds[f"{name} cpu"] = min(seconds.get(f"{name} cpu", np.inf), time.process_time() - busy)


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case of 28x512x512 | in plane, mm | prepared | nnU-Net 2.8.1, s | ichbench, s | times faster "
        "| nnU-Net, s of processor | ichbench, s of processor | times less |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    keys = ("theirs", "ours", "theirs cpu", "ours cpu")
    means = {key: float(np.mean([row[key] for row in rows])) for key in keys}
    least = [min(row[a] / row[b] for row in rows) for a, b in (keys[:2], keys[2:])]
    for row in [*rows, {"case": "mean", "spacing": "", "shape": "", **means}]:
        spacing = f"{float(row['spacing']):.3f}" if row["spacing"] else ""
        ratios = [f"{row[a] / row[b]:.1f}" for a, b in (keys[:2], keys[2:])]
        if not spacing:
            ratios = [f"{ratio} (least {low:.1f})" for ratio, low in zip(ratios, least, strict=True)]
        seconds = [f"{row[key]:.2f}" for key in keys]
        lines.append("| " + " | ".join([row["case"], spacing, row["shape"], *seconds[:2], ratios[0], *seconds[2:], ratios[1]]) + " |")
    return lines


def machine() -> str:
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    said = f"{os.cpu_count()} cores (load at the end {load}), OMP_NUM_THREADS={threads}"
    return f"{processor()}, {said}, {versions('Python', 'NumPy', 'SciPy', 'nnunetv2')}; best of {REPEATS}."


if __name__ == "__main__":
    main()
