"""Cohorts whose plans are frozen in nnunet_plans.txt, one configuration a line, as nnU-Net 2.8.1 plans them.

The cohorts are those of the golden vectors in the project's facts (plan.out, plan2.out), whose lines are among the frozen
ones word for word; the older residual planner and five odd cohorts were added.
Rewrite: `tox -e parity-nnunet --notest`, then `.tox/parity-nnunet/bin/python tests/golden/nnunet_plans.py`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).with_suffix(".txt")
FACTS = {"max": 90.0, "mean": 40.0, "median": 40.0, "min": 0.0, "percentile_00_5": 10.0, "percentile_99_5": 80.0, "std": 10.0}
Floats = tuple[float, float, float]
Ints = tuple[int, int, int]


def cohort(cases: list[tuple[int, Floats, Ints]], channels: tuple[str, ...], labels: int, n_cases: int, relative: float = 1.0) -> Any:
    """(fingerprint, dataset.json) of groups of equal cases: how many, spacing, shape."""
    fingerprint = {
        "foreground_intensity_properties_per_channel": {str(index): FACTS for index in range(len(channels))},
        "median_relative_size_after_cropping": relative,
        "shapes_after_crop": [list(shape) for count, _, shape in cases for _ in range(count)],
        "spacings": [list(spacing) for count, spacing, _ in cases for _ in range(count)],
    }
    dataset = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {"background": 0} | {f"l{value}": value for value in range(1, labels)},
        "numTraining": n_cases,
        "file_ending": ".nii.gz",
    }
    return fingerprint, dataset


COHORTS: dict[str, Any] = {
    "CTiso_liver_like": cohort([(9, (1.0, 0.77, 0.77), (482, 512, 512))], ("CT",), 3, 131),
    "ACDC_like": cohort([(8, (10.0, 1.56, 1.56), (9, 237, 207)), (2, (5.0, 1.56, 1.56), (9, 237, 207))], ("cineMRI",), 4, 200),
    "BraTS_like": cohort([(9, (1.0, 1.0, 1.0), (140, 171, 137))], ("T1", "T1ce", "T2", "Flair"), 4, 484),
    "Hippocampus_like": cohort([(9, (1.0, 1.0, 1.0), (36, 50, 35))], ("MRI",), 3, 260),
    "PNG2D": cohort([(9, (999.0, 1.0, 1.0), (1, 512, 512))], ("R", "G", "B"), 2, 100),
    "Prostate_like": cohort([(9, (3.6, 0.62, 0.62), (20, 320, 320))], ("T2", "ADC"), 3, 32),
    "tiny_n": cohort([(4, (1.0, 1.0, 1.0), (64, 64, 64))], ("MRI",), 2, 4),
    "PNG2D_big": cohort([(9, (999.0, 1.0, 1.0), (1, 2048, 2048))], ("rgb_to_0_1",) * 3, 2, 1000),
    "PNG2D_1024": cohort([(9, (999.0, 1.0, 1.0), (1, 1024, 1024))], ("x",), 2, 1000),
    "sag_lastaxis_aniso": cohort([(9, (0.9, 0.9, 4.0), (256, 256, 30))], ("MRI",), 2, 100),
    "aniso_axis_mid_10pct_clamp": cohort([(8, (0.8, 5.0, 0.8), (300, 40, 300)), (2, (0.8, 0.5, 0.8), (300, 40, 300))], ("MRI",), 2, 100),
    "CT_abd_2.5": cohort([(9, (2.5, 0.8, 0.8), (160, 512, 512))], ("CT",), 16, 30),
    "exact_aniso_3": cohort([(9, (3.0, 1.0, 1.0), (60, 200, 200))], ("MRI",), 2, 100),
    "head_ct": cohort([(9, (5.0, 0.45, 0.45), (30, 512, 512)), (4, (4.97, 0.43, 0.488), (28, 512, 512))], ("CT",), 2, 30),
    "half_voxels": cohort([(1, (1.0, 1.0, 1.0), (33, 50, 41)), (1, (1.0, 1.0, 1.0), (34, 53, 40))], ("nonorm", "CT"), 2, 2, 0.7499),
    "few_voxels": cohort([(3, (2.0, 1.0, 1.0), (5, 7, 6))], ("zscore",), 117, 3, 0.75),
    "wide": cohort([(3, (0.5, 0.25, 4.0), (64, 700, 300))], ("rescale_to_0_1", "MR"), 4, 12, 0.2),
    "one_case": cohort([(1, (6.0, 0.2, 0.7), (12, 900, 400))], ("CT", "CT"), 2, 1),
}


def lines(name: str, plans_text: str) -> list[str]:
    """One line a configuration of a plans file, in the form of the facts."""
    table = json.loads(plans_text)
    found = []
    for key, made in table["configurations"].items():
        head = f"{name} {table['experiment_planner_used']} {key}"
        if "inherits_from" in made:
            found.append(f"{head} {made}")
            continue
        kwargs = made["architecture"]["arch_kwargs"]
        parts = {
            "tf": table["transpose_forward"],
            "sp": [round(value, 6) for value in made["spacing"]],
            "med": [float(value) for value in made["median_image_size_in_voxels"]],
            "ps": made["patch_size"],
            "bs": made["batch_size"],
            "nst": kwargs["n_stages"],
            "feat": kwargs["features_per_stage"][-1],
            "bd": made["batch_dice"],
            "str": kwargs["strides"],
            "ks": kwargs["kernel_sizes"],
            "blocks": kwargs.get("n_conv_per_stage") or kwargs["n_blocks_per_stage"],
            "id": made["data_identifier"],
        }
        found.append(f"{head} {' '.join(f'{one} {value}' for one, value in parts.items())} {made['normalization_schemes']}")
    return found


def rewrite() -> None:
    with tempfile.TemporaryDirectory() as place:
        for kind in ("raw", "preprocessed", "results"):
            Path(place, kind).mkdir()
            os.environ[f"nnUNet_{kind}"] = str(Path(place, kind))
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "parity_nnunet"))
        from nn_planners import planners, their_plans

        found = []
        for name, (fingerprint, dataset) in COHORTS.items():
            for family in planners():
                found += lines(name, their_plans(Path(place), family, fingerprint, dataset, {}))
    FROZEN.write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    rewrite()
