"""Cases whose prepared arrays are frozen in nnunet_arrays.txt, one JSON line a case, as nnU-Net 2.8.1 prepares them.

Inputs are integer patterns (no generator of random numbers can change them) and real cases of Dataset501_PHE and
Dataset004_Hippocampus. A line holds shapes, the bounding box, mean, standard deviation and some voxels of the image,
sha256 of labels, class locations and of the labels that half-precision logits come back as.
Rewrite: `tox -e parity-nnunet --notest`, then
`PYTHONPATH=tests:tests/parity_nnunet .tox/parity-nnunet/bin/python tests/golden/nnunet_arrays.py [FOLDER OF DATA]`
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FROZEN = Path(__file__).with_suffix(".txt")
FACTS = {"mean": 30.5, "std": 17.25, "percentile_00_5": -12.0, "percentile_99_5": 71.0}
CT, Z, NONE, UNIT, RGB = ("CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "edge": 3, "ignore": 4}


def _labels(n: int) -> dict[str, Any]:
    return {"background": 0, **{f"l{value}": value for value in range(1, n)}}


#: name -> (shape in file order, spacing, plan's spacing, transpose forward, schemes, masked, labels, regions_class_order)
PATTERNS: dict[str, tuple[Any, ...]] = {
    "thick slices": ((9, 31, 27), (5.0, 0.45, 0.45), (5.0, 0.6, 0.5), (0, 1, 2), (CT,), (False,), _labels(2), None),
    "slices between": ((9, 31, 27), (5.0, 0.7, 0.7), (3.0, 0.5, 0.61), (0, 1, 2), (CT,), (False,), _labels(3), None),
    "isotropic, several channels": (
        (13, 17, 15),
        (1.0, 1.2, 0.9),
        (0.8, 0.9, 1.3),
        (1, 0, 2),
        (Z, Z, UNIT),
        (True, False, False),
        _labels(5),
        None,
    ),
    "coarse last axis": ((21, 19, 7), (0.8, 0.9, 4.0), (4.0, 1.1, 0.7), (2, 0, 1), (RGB,), (False,), _labels(3), None),
    "coarse only after": ((12, 14, 16), (1.0, 1.0, 1.0), (4.1, 1.0, 0.8), (1, 0, 2), (NONE,), (False,), _labels(2), None),
    "two coarse axes": ((8, 9, 30), (4.0, 4.0, 1.0), (3.0, 3.0, 1.5), (0, 1, 2), (CT,), (False,), _labels(4), None),
    "2D of thick slices": ((6, 30, 28), (6.0, 0.5, 0.5), (0.65, 0.4), (0, 1, 2), (CT,), (False,), _labels(3), None),
    "one native 2D image": ((1, 40, 33), (999.0, 0.5, 0.5), (0.4, 0.7), (0, 1, 2), (RGB, RGB, RGB), (False,) * 3, _labels(3), None),
    "regions and ignore": ((11, 24, 22), (3.0, 1.0, 1.0), (2.5, 1.3, 1.2), (0, 1, 2), (Z, CT), (True, False), REGIONS, (1, 2, 3)),
    "two voxels": ((2, 2, 9), (1.0, 1.0, 1.0), (0.4, 0.7, 1.1), (0, 1, 2), (CT,), (False,), _labels(2), None),
    "nothing but zeros": ((4, 6, 5), (1.0, 1.0, 1.0), (0.9, 1.2, 1.0), (0, 1, 2), (Z,), (True,), _labels(2), None),
    "many locations": ((30, 150, 140), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0, 1, 2), (CT,), (False,), {**_labels(2), "ignore": 2}, None),
}
#: (image, label, plan's spacing, scheme)
FILES = (
    ("Dataset501_PHE/imagesTr/phe_0002_0000.nii.gz", "Dataset501_PHE/labelsTr/phe_0002.nii.gz", (5.0, 0.61, 0.58), CT),
    ("Dataset501_PHE/imagesTs/phe_0001_0000.nii.gz", "Dataset501_PHE/labelsTs/phe_0001.nii.gz", (5.0, 0.5, 0.5), CT),
    ("Dataset004_Hippocampus/imagesTr/*_0000.nii.gz", "Dataset004_Hippocampus/labelsTr/", (1.3, 0.7, 0.9), Z),
)


def pattern(name: str) -> tuple[Any, Any, Any]:
    """(image (c, z, y, x), labels, spacing) in file order."""
    shape, spacing, _, _, schemes, _, table, _ = PATTERNS[name]
    z, y, x = np.indices(shape)
    image = np.stack([(37 * z + 5 * y * y + 11 * x + 101 * c) % 97 + (x * y + 3 * z * x + c) % 41 for c in range(len(schemes))]).astype(
        np.float32
    )
    if name != "many locations":
        rim = (z + y + x < sum(shape) // 6) | (x >= shape[2] - 1)
        image[:, rim | ((z + y) % 11 == 3)] = 0
    if name == "nothing but zeros":
        image[:] = 0
    values = 1 + max(value if isinstance(value, int) else max(value) for value in table.values())
    labels = ((z // 2 + y // 5 + x // 4 + (x * y) // 60) % (values + 1)) % values
    return image, labels.astype(np.int16), spacing


def logits_of(heads: int, shape: tuple[int, ...]) -> Any:
    """Half-precision scores with many ties."""
    index, z, y, x = np.indices((heads, *shape))
    return (((17 * index + 5 * z + 3 * y + 7 * x + index * x * y) % 23 - 11) / 8).astype(np.float16)


def line(name: str, box: Any, before: Any, image: Any, labels: Any, locations: dict[Any, Any], back: Any) -> str:
    """What is kept of a prepared case. `locations` as (n, 3) arrays."""
    flat = np.asarray(image, dtype=np.float64).ravel()
    at = np.linspace(0, len(flat) - 1, 9).astype(int)
    kept = {
        "name": name,
        "shape": [int(n) for n in image.shape],
        "box": [[int(a), int(b)] for a, b in box],
        "before": [int(n) for n in before],
        "mean": round(float(flat.mean()), 5),
        "sd": round(float(flat.std()), 5),
        "voxels": [round(float(flat[i]), 5) for i in at],
        "labels": _sha(labels),
        "locations": {str(key): [len(found), _sha(np.reshape(found, (-1, 3)))] for key, found in locations.items()},
        "back": _sha(back),
    }
    return json.dumps(kept)


def _sha(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i4").data).hexdigest()[:20]


def data_pairs(folder: Path) -> list[tuple[str, Path, Path, tuple[float, ...], str]]:
    found = []
    for image, label, spacing, scheme in FILES:
        for path in sorted(folder.glob(image))[:3]:
            mask = folder / label if label.endswith(".gz") else folder / label / path.name.replace("_0000.", ".")
            found.append((path.name, path, mask, spacing, scheme))
    return found


def main(data: Path) -> None:
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = tempfile.mkdtemp()
    import torch
    from nn_arrays import Labels, a_plan, dataset_json, managers, their_way_back
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    def prepared(name: str, image: Any, labels: Any, properties: dict[str, Any], plan: Any, rules: Labels) -> str:
        manager, configuration = managers(plan)
        table = dataset_json(rules, len(image))
        arrays, seg, about = DefaultPreprocessor(verbose=False).run_case_npy(image, labels, properties, manager, configuration, table)
        heads = len(rules.regions_class_order or [key for key in rules.table if key != "ignore"])
        back = their_way_back(torch.from_numpy(logits_of(heads, arrays.shape[1:])), plan, rules, about)
        places = {key: np.reshape(found, (-1, 4))[:, 1:] for key, found in about["class_locations"].items()}
        return line(name, about["bbox_used_for_cropping"], about["shape_before_cropping"], arrays, seg[0], places, back)

    lines = []
    for name, (_, _, target, forward, schemes, masked, table, order) in PATTERNS.items():
        image, labels, spacing = pattern(name)
        plan = a_plan(target, forward, schemes, masked, {str(c): FACTS for c in range(len(schemes))})
        lines.append(prepared(name, image, labels[None].astype(np.float32), {"spacing": list(spacing)}, plan, Labels(table, order)))
    for name, path, mask, target, scheme in data_pairs(data):
        image, properties = SimpleITKIO().read_images([str(path)])
        plan = a_plan(target, schemes=(scheme,), facts={"0": FACTS})
        seg, _ = SimpleITKIO().read_seg(str(mask))
        lines.append(prepared(name, image, seg, properties, plan, Labels(_labels(2 if scheme == CT else 3))))
    FROZEN.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2].parent / "shared" / "data")
