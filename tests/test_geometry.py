"""Do two files lie on the same voxels? Every order and direction of axes is turned back exactly; everything else is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ichbench.cases.case import Grid
from ichbench.cases.images import case_order, read_image, read_labels
from ichbench.errors import InputError
from ichbench.scoring import PROTOCOLS, Pair, score_files, score_folder
from ichbench.scoring.geometry import agree, onto_reference, same_voxels
from ichbench.scoring.pairs import Settings, score_pair

SHAPE = (7, 6, 5)
TURNS = [(order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)]
RNG = np.random.default_rng(0)
MASK = RNG.random(SHAPE) < 0.3
OTHER = RNG.random(SHAPE) < 0.3


def affine_of(angles: tuple[float, float, float] = (0.0, 0.0, 0.0), spacing: tuple[float, ...] = (0.45, 0.43, 5.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix() * np.array(spacing)
    affine[:3, 3] = (-80.0, 95.5, -12.25)
    return affine


def turned(voxels: np.ndarray, affine: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels with axes permuted and reversed, and the affine that keeps them in place: written out anew, by hand."""
    corner = np.array([voxels.shape[axis] - 1 if flip else 0 for axis, flip in zip(order, flips, strict=True)])
    new = np.eye(4)
    index = np.zeros(4)
    index[3] = 1
    for column, (axis, flip) in enumerate(zip(order, flips, strict=True)):
        new[:3, column] = affine[:3, axis] * (-1 if flip else 1)
        index[axis] = corner[column]
    new[:3, 3] = (affine @ index)[:3]
    array = voxels.transpose(order)
    for axis in np.flatnonzero(flips):
        array = np.flip(array, axis)
    return array, new


def save(path: Path, voxels: np.ndarray, affine: np.ndarray, **fields: int) -> Path:
    image = nib.Nifti1Image(np.ascontiguousarray(voxels).astype(np.uint8), affine)
    for name, value in fields.items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (0.3, -0.2, 0.1)])
def test_every_turn_of_the_axes_is_undone(tmp_path: Path, angles: tuple[float, float, float]) -> None:
    affine = affine_of(angles)
    reference = save(tmp_path / "r.nii.gz", MASK, affine)
    expected = score_files(reference, save(tmp_path / "p.nii.gz", OTHER, affine))
    for number, (order, flips) in enumerate(TURNS):
        path = save(tmp_path / f"{number}.nii", *turned(OTHER, affine, order, flips))
        if (order, flips) == ((0, 1, 2), (False, False, False)):
            assert score_files(reference, path) == expected
            continue
        with pytest.raises(InputError, match=r"--reorient .* turns the prediction by its affine, without interpolation") as error:
            score_files(reference, path)
        assert str(path) in str(error.value)
        assert score_files(reference, path, reorient=True) == expected


@settings(max_examples=40)
@given(st.data(), st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from(TURNS), st.tuples(*[st.floats(-0.6, 0.6)] * 3))
def test_turns_of_small_and_flat_volumes(data: st.DataObject, shape: tuple[int, int, int], turn: Any, angles: Any) -> None:
    """Axes of one voxel included: every voxel comes back to where it lies."""
    voxels = np.arange(np.prod(shape)).reshape(shape)
    affine = affine_of(angles)
    moved, new = turned(voxels, affine, *turn)
    reference, other = (Grid(array.shape, matrix) for array, matrix in ((voxels, affine), (moved, new)))
    assert np.array_equal(onto_reference(moved, other, reference, True), voxels)
    assert same_voxels(reference, other) is not None


def test_the_message_says_where_the_axes_point(tmp_path: Path) -> None:
    reference = save(tmp_path / "r.nii.gz", MASK, affine_of())
    path = save(tmp_path / "p.nii.gz", *turned(OTHER, affine_of(), (1, 0, 2), (True, False, False)))
    with pytest.raises(InputError, match=r"axes \(i, j, k\) of the reference point to RAS, those of the prediction to PRS"):
        score_files(reference, path)


def moved(affine: np.ndarray, mm: float) -> np.ndarray:
    return affine + mm * np.outer([1, 0, 0, 0], [0, 0, 0, 1])


SHEAR = np.array([[1, 0.02, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
#: what is done to the prediction, and what must be said; none of it is another order of the same voxels
CHANGES: dict[str, tuple[Any, str]] = {
    "shape": (lambda voxels, affine: (voxels[1:], affine), r"shape \(i, j, k\): \(7, 6, 5\) and \(6, 6, 5\)"),
    "spacing": (lambda voxels, affine: (voxels, affine @ np.diag([1.001, 1, 1, 1])), r"spacing \(i, j, k; mm\).*0.0027 mm apart"),
    "origin": (lambda voxels, affine: (voxels, moved(affine, 0.00125)), r"origin \(RAS\+ mm\).*0.00125\d* mm apart"),
    "half a voxel": (lambda voxels, affine: (voxels, moved(affine, 0.225)), r"origin \(RAS\+ mm\).*0.225 mm apart"),
    "direction": (lambda voxels, affine: (voxels, affine_of((0.0, 0.0, 0.01))), "direction"),
    "sheared": (lambda voxels, affine: (voxels, affine @ SHEAR), "direction"),
    "mirrored header": (lambda voxels, affine: (voxels, affine @ np.diag([-1, 1, 1, 1])), r"orientation .* RAS and LAS"),
    "turned and moved": (lambda voxels, affine: turned(voxels, moved(affine, 0.01), (2, 1, 0), (False, True, False)), "shape"),
    "flipped and moved": (lambda voxels, affine: turned(voxels, moved(affine, 0.01), (0, 1, 2), (False, True, False)), "orientation"),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("reorient", [False, True])
def test_other_voxels_are_refused_with_the_difference(tmp_path: Path, change: str, reorient: bool) -> None:
    alter, words = CHANGES[change]
    reference = save(tmp_path / "r" / "1.nii.gz", MASK, affine_of())
    path = save(tmp_path / "p" / "1.nii.gz", *alter(OTHER, affine_of()))
    with pytest.raises(InputError, match=f"reference and prediction differ in .*{words}") as error:
        score_folder(reference.parent, path.parent, reorient=reorient)
    assert str(error.value).startswith("case 1: ")
    assert str(reference) in str(error.value)
    assert str(path) in str(error.value)


def test_rounding_in_headers_is_no_difference(tmp_path: Path) -> None:
    reference = save(tmp_path / "r.nii.gz", MASK, affine_of())
    shift = np.zeros((4, 4))
    shift[:3, 3] = 9e-4
    path = save(tmp_path / "p.nii.gz", OTHER, affine_of() + shift)
    near = score_files(reference, path)
    assert near == score_files(reference, save(tmp_path / "q.nii.gz", OTHER, affine_of()))
    moved = save(tmp_path / "m.nii.gz", *turned(OTHER, affine_of() + shift, (1, 2, 0), (True, True, False)))
    assert score_files(reference, moved, reorient=True) == near


def test_thickness_of_a_single_slice_counts(tmp_path: Path) -> None:
    """All corners coincide, but volumes and areas would not."""
    reference = save(tmp_path / "r.nii.gz", MASK[..., :1], affine_of())
    path = save(tmp_path / "p.nii.gz", OTHER[..., :1], affine_of(spacing=(0.45, 0.43, 4.0)))
    grids = [read_labels(file, keep_file_order=True)[1] for file in (reference, path)]
    assert grids[0].same_place(grids[1])
    assert not agree(*grids)
    with pytest.raises(InputError, match=r"spacing .*\[0.45, 0.43, 5.0\] and \[0.45, 0.43, 4.0\]"):
        score_files(reference, path, reorient=True)


def test_files_that_do_not_say_where_they_point(tmp_path: Path) -> None:
    """Two of them agree by their voxels; against a file that does say, nothing can be turned."""
    spacing = np.diag([0.45, 0.43, 5.0, 1.0])
    files = []
    for name, mask in (("r", MASK), ("p", OTHER)):
        image = nib.Nifti1Image(mask.astype(np.uint8), None)
        image.header.set_zooms((0.45, 0.43, 5.0))
        image.header["sform_code"] = image.header["qform_code"] = 0
        path = tmp_path / f"{name}.nii"
        nib.save(image, path)
        files.append(path)
    assert score_files(*files)
    # nibabel's stand-in affine, x reversed: a real file that has exactly the flipped one must still not be matched with it
    stand_in = nib.load(files[1]).header.get_base_affine()
    oriented = save(tmp_path / "o.nii.gz", *turned(MASK, stand_in, (0, 1, 2), (True, False, False)))
    assert not np.allclose(stand_in, spacing)
    with pytest.raises(InputError, match="does not say where its axes point and cannot be reoriented"):
        score_files(oriented, files[1], reorient=True)


def test_real_scans_with_turned_predictions(shared_data: Path, tmp_path: Path) -> None:
    references, predictions = shared_data / "Dataset501_PHE" / "labelsTs", shared_data / "phe_derived_hematoma"
    for case, turn in (("phe_0006", ((1, 0, 2), (False, True, False))), ("phe_0011", ((2, 0, 1), (True, True, False)))):
        reference, path = references / f"{case}.nii.gz", predictions / f"{case}.nii.gz"
        image = nib.load(path)
        other = save(tmp_path / f"{case}.nii.gz", *turned(np.asarray(image.dataobj), image.affine, *turn))
        assert score_files(reference, other, reorient=True) == score_files(reference, path)


def test_an_image_lies_on_the_reference_too(tmp_path: Path) -> None:
    """The checks see the image in the order of the masks, or one message that names it and both geometries."""
    affine = affine_of()
    files = [save(tmp_path / f"{name}.nii.gz", mask, affine) for name, mask in (("r", MASK), ("p", OTHER))]
    order, flips = (2, 0, 1), (True, False, True)
    picture = save(tmp_path / "i.nii.gz", *turned(np.arange(MASK.size).reshape(SHAPE) % 251, affine, order, flips))
    values, grid = read_image(picture, keep_file_order=True)
    _, reference = read_labels(files[0], keep_file_order=True)
    assert np.array_equal(onto_reference(values, grid, reference, True, "image").T, np.arange(MASK.size).reshape(SHAPE) % 251)
    settings = Settings(PROTOCOLS["strict"], anomalies=True)
    with pytest.raises(InputError, match=r"case c: .*those of the image.*turns the image.*i\.nii\.gz"):
        score_pair((settings, Pair("c", *files, image=picture)))
    assert score_pair((replace(settings, reorient=True), Pair("c", *files, image=picture))).rows
    short = save(tmp_path / "short.nii.gz", MASK[1:], affine)
    with pytest.raises(InputError, match=r"reference and image differ in shape .*give the image that the masks were drawn on"):
        score_pair((settings, Pair("c", *files, image=short)))
    assert score_pair((replace(settings, anomalies=False), Pair("c", *files, image=short))).rows  # nobody looks at it


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_slice_axis_of_the_checks_is_that_of_the_scan(tmp_path: Path, order: tuple[int, int, int]) -> None:
    """The same scan in every order of the file's axes: a circle on axial slice 3, a bleed from end to end, air open to the top.

    The scores are those of the file's order either way, whatever the checks look at.
    """
    x, y, z = np.ogrid[:60, :50, :10]
    column = ((x - 20) ** 2 + (y - 25) ** 2 < 20) & (z < 99)
    ring = np.zeros((60, 50, 10), dtype=bool)
    ring[28:54, 8:42, 3] = True
    ring[29:53, 9:41, 3] = False
    image = np.where((abs(x - 30) < 28) & (abs(y - 25) < 23) & (z < 99), 200, 0)
    image[18:23, 23:28] = 0  # a shaft of air from the first slice to the last: the head's in every slice, and not from the side
    affine = np.diag([-2.0, -2.0, 5.0, 1.0])
    parts = {"r": column & (z > 2) & (z < 7), "p": column | ring, "i": image}
    files = {name: save(tmp_path / f"{name}.nii.gz", *turned(part, affine, order, (False,) * 3)) for name, part in parts.items()}
    settings = Settings(PROTOCOLS["instance2022"], anomalies=True)
    pair = Pair("c", files["r"], files["p"], image=files["i"])
    found = score_pair((settings, pair))
    assert [one.kind for one in found.anomalies] == ["guard_blob", "touches_end_slice"]
    assert found.anomalies[0].evidence["slice"] == 3
    assert found.anomalies[0].evidence["voxels"] == ring.sum()
    assert found.anomalies[1].evidence == {"z_first": column[:, :, 0].sum(), "z_last": column[:, :, 0].sum()}
    assert found.rows == score_pair((replace(settings, anomalies=False), pair)).rows
    # upside down, beside a bleed that is nearer to one end: named by the axis that runs from bottom to top
    low, high = (column & (z >= first) & (z < first + 3) for first in (1, 6))
    ends = [save(tmp_path / f"{name}.nii.gz", *turned(part, affine, order, (False,) * 3)) for name, part in (("low", low), ("high", high))]
    (flip,) = score_pair((settings, Pair("c", *ends))).anomalies
    assert "with z (top-bottom) reversed" in flip.text
    # and that order is the one in which the project reads a scan
    file_order, grid = read_labels(files["p"], keep_file_order=True)
    working, working_grid = read_labels(files["p"])
    assert np.array_equal(file_order.transpose(case_order(grid)), working)
    assert case_order(working_grid) == case_order(Grid((3, 4, 5), np.eye(4))) == (0, 1, 2)
