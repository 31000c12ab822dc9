"""Does it learn as well as nnU-Net? `python benchmarks/learning.py --work FOLDER` trains both and prints the table.

Data: Dataset004_Hippocampus beside the checkout (or where ICHBENCH_SHARED_DATA says), 38 cases, 28 to train and 10 to validate, drawn by
the number SPLIT_SEED. Plan: nnU-Net's own for these cases, but 8 features at the highest level and batch 2, the same file for both
tools; 1,250 steps, learning rate falling over them. Each tool ends with its own sliding-window prediction of the 10 cases with its final
weights; one scorer, ours, gives their mean foreground Dice (the mean of the two labels). Exit code 1 if the upper end of the 95 %
interval of the difference, ours less nnU-Net's (Welch's t over seeds), lies below -0.01.

Ours is `run-ablation`; nnU-Net's is its nnUNetTrainer with the number of epochs set, its augmentation in the same process, and seeds for
torch, numpy and random. Not controlled there: its blur times two ways of convolving and takes the faster, so that a seed of nnU-Net
may give other weights another day.

Finished runs stay in FOLDER/runs and are not repeated. Start the command twice, side by side, and they share the work, one thread each:

    pip install . "nnunetv2==2.8.1" && python benchmarks/learning.py --work FOLDER [--seeds 5] [--out benchmarks/results/learning.md]
    python benchmarks/learning.py --work FOLDER --steps 30 --seeds 1      what a step takes here, and what all would take
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHARED, arguments, processor, versions, write
from filelock import FileLock, Timeout
from peer import peer_version
from scipy.stats import t as student

from ichbench.cases.cohort import Cohort, read_cohort
from ichbench.cases.files import write_atomically
from ichbench.cases.images import read_labels
from ichbench.cases.labels import scored_labels
from ichbench.cases.splits import write_splits
from ichbench.prepare.fingerprint import Fingerprint, fingerprint
from ichbench.prepare.plan import Plan, make_plan
from ichbench.prepare.plans_json import plans_table, plans_text
from ichbench.recipe import PlanRecipe
from ichbench.scoring.score import rows_for_case

NAME, ID = "Dataset004_Hippocampus", 4
SPLIT_SEED, VALIDATION_CASES = 2024, 10
STEPS, EPOCH, TRIAL = 1250, 250, 30
MARGIN = -0.01
TOOLS = ("ichbench", "nnunet")


@dataclass(frozen=True)
class Length:
    """Epochs of so many steps, and of so many batches for the watched Dice; what nnU-Net does is 250 and 50."""

    epochs: int
    steps: int
    validation: int

    @property
    def all_steps(self) -> int:
        return self.epochs * self.steps


def main() -> int:
    parser = arguments(__doc__, "table")
    parser.add_argument("--work", type=Path, required=True, help="an own folder outside the project; runs go on there")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="whole epochs of 250 steps, or fewer than 250")
    parser.add_argument("--compatibility", choices=("ichbench", "nnunet"), default="ichbench", help="of our side")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "SEED"), help="(inside) one run of one tool")
    parser.add_argument("--estimate", action="store_true", help="print what is left to do and how long it will take")
    given = parser.parse_args()
    if given.steps < 1 or (given.steps > EPOCH and given.steps % EPOCH):
        sys.exit(f"--steps {given.steps}: give a multiple of {EPOCH}, or fewer")
    length = Length(max(1, given.steps // EPOCH), min(given.steps, EPOCH), min(50, max(1, given.steps // 5)))
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    with FileLock(given.work / "setting-up"):
        cohort, plan, found = set_up(given.work)
    if given.one:
        run_one(given, given.one[0], int(given.one[1]), length, cohort, plan, found)
        return 0
    runs = [(tool, seed) for seed in range(given.seeds) for tool in TOOLS]
    if length.all_steps > TRIAL and not all(list((given.work / "runs").glob(f"{tool}-seed*.json")) for tool in TOOLS):
        print(f"first {TRIAL} steps of each tool, to learn how long they take", flush=True)
        trial = [sys.executable, __file__, "--work", str(given.work), "--steps", str(TRIAL), "--seeds", "1"]
        subprocess.run(trial, check=True, stdout=subprocess.DEVNULL)
    print(estimate(given, runs, length), flush=True)
    if given.estimate:
        return 0
    # a run that another process has is left to it, and looked at once more in the end
    for wait in (0, -1):
        for tool, seed in runs:
            with contextlib.suppress(Timeout), FileLock(str(record(given, tool, seed, length)) + ".lock", timeout=wait):
                if not record(given, tool, seed, length).exists():
                    start(given, tool, seed)
    lines, failed = table(given, length)
    text = "\n".join(lines)
    print(text)
    write(given.out, "Hippocampus: ours and nnU-Net, trained alike", text)
    return int(failed)


def set_up(work: Path) -> tuple[Cohort, Plan, Fingerprint]:
    """The cohort with its split, as links to the data, and the plan of both tools."""
    folder, data = work / "cohort" / NAME, SHARED / NAME
    if not data.is_dir():
        sys.exit(f"{data} is not there; set ICHBENCH_SHARED_DATA to the folder that holds {NAME}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("imagesTr", "labelsTr"):
        if not (folder / name).exists():
            (folder / name).symlink_to(data / name)
    shutil.copyfile(data / "dataset.json", folder / "dataset.json")
    ids = sorted(path.name.removesuffix(".nii.gz") for path in (data / "labelsTr").glob("*.nii.gz"))
    held_out = set(np.random.default_rng(SPLIT_SEED).choice(ids, VALIDATION_CASES, replace=False).tolist())
    write_splits(folder / "splits_final.json", [{"train": [one for one in ids if one not in held_out], "val": sorted(held_out)}])
    cohort = read_cohort(folder)
    # in file order, as nnU-Net reads; a fingerprint of 38 small cases takes a second
    found = fingerprint(cohort.load(name, keep_file_order=True) for name in cohort.train_ids)
    plan = make_plan(found, PlanRecipe(base_features=8), cohort.channel_names, len(cohort.rules.outputs), len(ids))
    return cohort, replace(plan, batch_size=2), found


def record(given: argparse.Namespace, tool: str, seed: int, length: Length) -> Path:
    folder = given.work / "runs"
    folder.mkdir(exist_ok=True)
    kind = tool if tool != "ichbench" or given.compatibility == "ichbench" else "ichbench-nnunet"
    return folder / f"{kind}-seed{seed}-steps{length.all_steps}.json"


def start(given: argparse.Namespace, tool: str, seed: int) -> None:
    """One run in a process of its own, which starts from nothing."""
    command = [sys.executable, __file__, "--work", str(given.work), "--steps", str(given.steps), "--one", tool, str(seed)]
    command += ["--compatibility", given.compatibility]
    log = given.work / "runs" / f"{tool}-seed{seed}-steps{given.steps}.log"
    settings = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "nnUNet_def_n_proc"), "1")
    settings |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | settings, check=False)
    if done.returncode:
        sys.exit(f"{tool}, seed {seed}: exit code {done.returncode}; see {log}")


def run_one(given: argparse.Namespace, tool: str, seed: int, length: Length, cohort: Cohort, plan: Plan, found: Fingerprint) -> None:
    torch.set_num_threads(1)
    scratch = given.work / "scratch" / f"{tool}-{given.compatibility}-seed{seed}-steps{length.all_steps}"
    began = time.monotonic()
    if tool == "ichbench":
        masks, training = ours(given, scratch, seed, length, cohort, plan)
    else:
        masks, training = theirs(given, scratch, seed, length, cohort, plan, found)
    seconds = time.monotonic() - began
    scores = {name: dice(cohort, name, masks / f"{name}.nii.gz") for name in held_out(cohort)}
    about = {
        "tool": tool,
        "seed": seed,
        "steps": length.all_steps,
        "dice": scores,
        "mean": float(np.mean([list(one.values()) for one in scores.values()])),
        "seconds": round(seconds, 1),
        "training_seconds": round(training, 1),
        "torch": torch.__version__,
        "device": processor(),
    }
    write_atomically(record(given, tool, seed, length), json.dumps(about, indent=1).encode())


def held_out(cohort: Cohort) -> list[str]:
    return list(json.loads((cohort.root / "splits_final.json").read_text(encoding="utf-8"))[0]["val"])


def dice(cohort: Cohort, name: str, mask: Path) -> dict[str, float]:
    """Dice per label by the project's scorer."""
    case = cohort.load(name, keep_file_order=True)
    rows = rows_for_case(
        "-", "-", "-", name, case.labels_zyx, read_labels(mask, keep_file_order=True)[0], case.grid.spacing_zyx_mm,
        labels=scored_labels(cohort.rules), file_axes=case.grid.file_axes,
    )  # fmt: skip
    return {row.metric: row.value for row in rows if row.metric in {f"dice/{label}" for label in cohort.foreground_labels}}


def ours(given: argparse.Namespace, scratch: Path, seed: int, length: Length, cohort: Cohort, plan: Plan) -> tuple[Path, float]:
    """`run-ablation` with one arm; it goes on where it was interrupted. Returns its masks and the seconds of the training step."""
    scratch.mkdir(parents=True, exist_ok=True)
    values = {
        "prepare": {"compatibility": given.compatibility},
        "plan": {"base_features": 8, "batch_size": 2, "patch_size": list(plan.patch_size), "spacing_mm": list(plan.spacing)},
        "training": {"epochs": length.epochs, "iterations_per_epoch": length.steps, "validation_iterations": length.validation},
    }
    lines = ['why = "The plan and the length that both tools are given."']
    for table, keys in values.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    (scratch / "same.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    study = 'why = "Ours beside nnU-Net."\nbase = "same.toml"\nfloor = false\nceilings = false\n'
    (scratch / "study.toml").write_text(study, encoding="utf-8")
    command = [sys.executable, "-c", "from ichbench.cli import run_ablation_main; run_ablation_main()", str(scratch / "study.toml")]
    command += ["--cohort", str(cohort.root), "--out", str(scratch / "run"), "--preset", "full", "--seeds", str(seed), "--folds", "0"]
    command += ["--workers", "1", "--threads", "1", "--device", "cpu"]
    subprocess.run(command, check=True)
    outputs, seconds = {}, math.nan
    for path in (scratch / "run" / "steps").glob("*/step.json"):
        kind, result = (
            json.loads(path.read_text(encoding="utf-8"))["kind"],
            json.loads((path.parent / "result.json").read_text(encoding="utf-8")),
        )
        outputs[kind] = path.parent / "attempts" / str(result["attempt"]) / "output"
        seconds = result["seconds"] if kind == "train" else seconds
    used = Plan.from_json(json.loads((outputs["prepare"] / "plan.json").read_text(encoding="utf-8")))
    check_same(used, plan)
    return outputs["predict"], seconds


def check_same(used: Plan, plan: Plan) -> None:
    for name in ("patch_size", "batch_size", "spacing", "features", "strides", "kernels", "convs_per_stage", "decoder_convs", "batch_dice"):
        mine, other = getattr(used, name), getattr(plan, name)
        if mine != other:
            sys.exit(f"the two tools would not train alike: {name} is {mine} here and {other} in nnU-Net's plans")


def theirs(
    given: argparse.Namespace, scratch: Path, seed: int, length: Length, cohort: Cohort, plan: Plan, found: Fingerprint
) -> tuple[Path, float]:
    """nnU-Net's trainer, from its own preparation to its own final validation."""
    preprocessed, dataset = given.work / "nnunet" / NAME, json.loads((cohort.root / "dataset.json").read_text(encoding="utf-8"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    os.environ.update(nnUNet_raw=str(given.work / "cohort"), nnUNet_preprocessed=str(given.work / "nnunet"), nnUNet_results=str(scratch))
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    with FileLock(given.work / "preparing"):
        if not (preprocessed / "done").exists():
            prepare_theirs(preprocessed, cohort, plan, found, dataset)
            (preprocessed / "done").touch()
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(seed)
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8")) | {"continue_training": False}
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = (
        length.epochs,
        length.steps,
        length.validation,
    )
    began = time.monotonic()
    trainer.run_training()
    seconds = time.monotonic() - began
    trainer.perform_actual_validation()
    return Path(trainer.output_folder) / "validation", seconds


def prepare_theirs(folder: Path, cohort: Cohort, plan: Plan, found: Fingerprint, dataset: dict[str, Any]) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nnUNetPlans.json").write_text(plans_text(plans_table({"3d_fullres": plan}, found, NAME)), encoding="utf-8")
    (folder / "dataset_fingerprint.json").write_text(json.dumps(found.to_json()), encoding="utf-8")
    shutil.copyfile(cohort.root / "dataset.json", folder / "dataset.json")
    shutil.copyfile(cohort.root / "splits_final.json", folder / "splits_final.json")
    # their final validation scores its masks too, with these
    shutil.copytree(cohort.root / "labelsTr", folder / "gt_segmentations", dirs_exist_ok=True)
    manager = PlansManager(str(folder / "nnUNetPlans.json"))
    settings = manager.get_configuration("3d_fullres")
    (folder / settings.data_identifier).mkdir(exist_ok=True)
    for record in cohort.records:
        target, images = str(folder / settings.data_identifier / record.id), [str(path) for path in record.images]
        DefaultPreprocessor(verbose=False).run_case_save(target, images, str(record.label), manager, settings, dataset)


def finished(given: argparse.Namespace, length: Length) -> dict[str, list[dict[str, Any]]]:
    paths = {tool: [record(given, tool, seed, length) for seed in range(given.seeds)] for tool in TOOLS}
    return {tool: [json.loads(path.read_text(encoding="utf-8")) for path in some if path.exists()] for tool, some in paths.items()}


def estimate(given: argparse.Namespace, runs: list[tuple[str, int]], length: Length) -> str:
    """From the runs in the folder, of any length: seconds that grow with the steps, and those that do not (the final validation)."""
    left = [tool for tool, seed in runs if not record(given, tool, seed, length).exists()]
    said = f"{len(left)} of {len(runs)} runs of {length.all_steps} steps are left"
    known = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((given.work / "runs").glob("*.json"))]
    per_tool: dict[str, tuple[float, float]] = {}
    for tool in TOOLS:
        longest = max((one for one in known if one["tool"] == tool), key=lambda one: one["steps"], default=None)
        if longest is not None:
            rest = longest["seconds"] - longest["training_seconds"]
            per_tool[tool] = (longest["training_seconds"] / longest["steps"], rest)
    if not left or not set(left) <= per_tool.keys():
        return f"{said}." if not left else f"{said}; how long a step takes is not known yet."
    minutes = sum(per_tool[tool][0] * length.all_steps + per_tool[tool][1] for tool in left) / 60
    each = ", ".join(f"{tool} {per_step:.2f} s a step and {rest:.0f} s" for tool, (per_step, rest) in per_tool.items())
    return f"{said}: about {minutes:.0f} minutes one after another, half with two of these commands on two idle cores ({each})."


def table(given: argparse.Namespace, length: Length) -> tuple[list[str], bool]:
    """The lines, and whether ours is worse."""
    runs = finished(given, length)
    lines = [
        "| tool | seeds | mean foreground Dice | sd between seeds | lowest | highest | seconds a step, validation and all |",
        "|" + "---|" * 7,
    ]
    means = {tool: np.array([run["mean"] for run in some]) for tool, some in runs.items()}
    for tool, values in means.items():
        name = tool if tool == "ichbench" else f"nnU-Net {peer_version()}"
        spread = f"{values.std(ddof=1):.4f}" if len(values) > 1 else ""
        per_step = np.mean([run["training_seconds"] for run in runs[tool]]) / length.all_steps
        lines.append(
            f"| {name} | {len(values)} | {values.mean():.4f} | {spread} | {values.min():.4f} | {values.max():.4f} | {per_step:.3f} |"
        )
    difference = means["ichbench"].mean() - means["nnunet"].mean()
    lines += ["", f"{length.all_steps} steps; {VALIDATION_CASES} validation cases; ours with compatibility = {given.compatibility!r}."]
    failed = False
    if min(map(len, means.values())) > 1:
        low, high = welch(means["ichbench"], means["nnunet"])
        failed = high < MARGIN
        verdict = "ours is worse" if failed else "not shown to be worse"
        interval = f"95 % interval over seeds {low:+.4f} to {high:+.4f}"
        lines.append(f"Ours less nnU-Net's: {difference:+.4f}, {interval}: {verdict} (by more than {-MARGIN}).")
    else:
        lines.append(f"Ours less nnU-Net's: {difference:+.4f}; one seed gives no interval.")
    lines += ["", f"{processor()}, one thread a run, {versions('torch', 'Python')}."]
    return lines, failed


def welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """95 % interval of mean(a) - mean(b), variances of their own."""
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    difference = float(a.mean() - b.mean())
    if va + vb == 0:
        return difference, difference
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(student.ppf(0.975, freedom) * math.sqrt(va + vb))
    return difference - half, difference + half


if __name__ == "__main__":
    sys.exit(main())
