"""The embedded default cohort: analytic head CT with bleeds of known volume, the same bytes on every machine.

`make_case` makes one case, `phantom_cases` a cohort in memory, `write_phantom` an nnU-Net raw folder with a sidecar.
What is drawn: `phantom_draw` and `phantom_bleeds`; how it becomes voxels: `phantom_render`; the shapes and their volumes: `phantom_shapes`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ichbench.cases.case import Case, Grid
from ichbench.cases.images import write_image, write_labels
from ichbench.cases.phantom_bleeds import PHANTOM_SIZES, PhantomSize, phantom_size
from ichbench.cases.phantom_draw import HeadParameters, draw_head
from ichbench.cases.phantom_render import render_head
from ichbench.errors import InputError

__all__ = ["GENERATOR", "PHANTOM_SIZES", "Bleed", "HeadParameters", "PhantomCase", "PhantomSize"]
__all__ += ["draw_case", "make_case", "phantom_cases", "write_phantom"]

#: Rises whenever a voxel of any case changes.
GENERATOR = 1


@dataclass(frozen=True)
class Bleed:
    """One clot. true_volume_ml: closed form or quadrature; rendered_volume_ml: sum of the voxels' shares of it;
    hard_mask_ml: voxels that are at least half this bleed; mean_hu: density of its blood before noise and partial volume."""

    kind: str
    true_volume_ml: float
    rendered_volume_ml: float
    hard_mask_ml: float
    mean_hu: float


@dataclass(frozen=True, eq=False)
class PhantomCase:
    """A rendered case with its true bleeds; `subtype` joins the kinds by "+", or is "none"; `split` is "train" or "test"."""

    case: Case
    bleeds: tuple[Bleed, ...]
    site: str
    subtype: str
    split: str = "train"

    @property
    def volume_ml(self) -> float:
        """Volume of the reference mask, ml."""
        return float((np.asarray(self.case.labels_zyx) > 0).sum()) * self.case.grid.voxel_ml


def draw_case(index: int, size: str, seed: int) -> HeadParameters:
    """The head of case `index`, not rendered. It depends on seed and index only, not on how many cases there are."""
    if index < 0 or seed < 0:
        raise InputError(f"phantom index is {index} and seed is {seed}; both must be 0 or more")
    phantom_size(size)
    return draw_head(np.random.default_rng([seed, index]), size)


def make_case(index: int, size: str, seed: int, split: str = "train") -> PhantomCase:
    """Draw and render case `index`; image in HU (whole numbers in float32), labels 1 for blood."""
    head = draw_case(index, size, seed)
    rendered = render_head(head, np.random.default_rng([seed, index, 1]))
    case = Case(f"phantom_{index:03d}", rendered.image_zyx[None].astype(np.float32), rendered.labels_zyx, phantom_grid(head))
    ml = head.frame.scale**3
    bleeds = tuple(
        Bleed(b.kind, round(b.scaled_ml * ml, 6), round(rendered_ml, 6), round(hard_ml, 6), b.hu)
        for b, (rendered_ml, hard_ml) in zip(head.bleeds, rendered.volumes_ml, strict=True)
    )
    return PhantomCase(case, bleeds, head.site, head.subtype, split)


def phantom_grid(head: HeadParameters) -> Grid:
    """The grid of a drawn head: axes towards left, posterior, superior (tilted if oblique), the middle of the volume at the origin.

    The affine holds float32 numbers, as a NIfTI header does, so that the case read back from disk has the same grid.
    """
    spacing_xyz = np.asarray(head.spacing_zyx_mm[::-1])
    directions_xyz = np.diag([-1.0, -1.0, 1.0]) @ head.tilt_3x3
    middle_xyz = (np.asarray(head.shape_zyx[::-1]) - 1) / 2.0
    affine = np.eye(4)
    affine[:3, :3] = (directions_xyz * spacing_xyz)[:, ::-1]
    affine[:3, 3] = np.round(-(directions_xyz * spacing_xyz) @ middle_xyz, 3)
    return Grid(head.shape_zyx, affine.astype(np.float32).astype(np.float64), pixdim_zyx_mm=head.spacing_zyx_mm)


def phantom_cases(n_cases: int, size: str = "small", seed: int = 0, n_test: int | None = None) -> Iterator[PhantomCase]:
    """The cohort, one case at a time: the last `n_test` of `n_cases` (a third unless given) are test cases."""
    test = round(n_cases / 3) if n_test is None else n_test
    if n_cases < 1 or not 0 <= test <= n_cases:
        asked = f"a phantom cohort of {n_cases} cases, {test} of them for testing, was asked for"
        raise InputError(f"{asked}; give 1 or more cases and 0 to all of them for testing")
    phantom_size(size)
    return (make_case(index, size, seed, "train" if index < n_cases - test else "test") for index in range(n_cases))


def write_phantom(out: Path, n_cases: int, size: str = "small", seed: int = 0, n_test: int | None = None) -> None:
    """Write the cohort as an nnU-Net raw folder (imagesTr, labelsTr, imagesTs, labelsTs, dataset.json) with cases.csv and phantom.json.

    Raises `InputError` if `out` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already exists and is not an empty folder; give a new folder for the phantom or empty this one first")
    cases = phantom_cases(n_cases, size, seed, n_test)
    facts, rows = [], []
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (out / folder).mkdir(parents=True)
    for made in cases:
        part, case = "Tr" if made.split == "train" else "Ts", made.case
        write_image(out / f"images{part}" / f"{case.id}_0000.nii.gz", case.image_czyx[0], case.grid)
        write_labels(out / f"labels{part}" / f"{case.id}.nii.gz", np.asarray(case.labels_zyx), case.grid)
        z, y, x = case.grid.spacing_zyx_mm
        rows.append([case.id, made.split, made.site, made.subtype, z, y, x, round(made.volume_ml, 6)])
        facts.append({"id": case.id, "split": made.split, "subtype": made.subtype, "bleeds": [asdict(bleed) for bleed in made.bleeds]})
    trained = sum(row[1] == "train" for row in rows)
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "hemorrhage": 1}, "numTraining": trained, "file_ending": ".nii.gz"}
    _write_json(out / "dataset.json", dataset)
    _write_json(out / "phantom.json", {"generator": GENERATOR, "seed": seed, "size": size, "cases": facts})
    with (out / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "split", "site", "subtype", "spacing_z_mm", "spacing_y_mm", "spacing_x_mm", "volume_ml"])
        table.writerows(rows)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
