from __future__ import annotations

import gzip
import os
import warnings
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import affine_of, rotation

from ichbench.cases import files, nifti
from ichbench.cases.case import Grid
from ichbench.cases.images import read_grid, read_image, read_labels, reorient, write_image, write_labels
from ichbench.errors import InputError

RNG = np.random.default_rng(0)
SPACINGS = (0.43, 0.47, 5.1)
#: An axial grid: z to superior, y to posterior, x to the left.
AXIAL = np.array([[0.0, 0.0, -0.5, 9.0], [0.0, -0.5, 0.0, 8.0], [5.0, 0.0, 0.0, 7.0], [0.0, 0.0, 0.0, 1.0]])


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, **fields: Any) -> Path:
    """Write with nibabel, the oracle of this file; `fields` go into the header afterwards."""
    image = nibabel.Nifti1Image(voxels, np.diag([-0.5, -0.5, 5.0, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    for name, value in fields.items():
        image.header[name] = value
    path.write_bytes(gzip.compress(image.to_bytes(), 1) if path.name.endswith(".gz") else image.to_bytes())
    if fields:  # nibabel rewrites some fields when it writes, so they are patched in the bytes
        patch(path, **fields)
    return path


def patch(path: Path, **fields: Any) -> Path:
    raw = path.read_bytes()
    data = gzip.decompress(raw) if path.name.endswith(".gz") else raw
    header = nibabel.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    data = header.binaryblock + data[348:]
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


def world_intensity(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """An array whose value says where it lies, so that a wrong axis or sign cannot go unseen."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    return np.asarray(world @ np.array([1.0, 300.0, 90000.0]), dtype=np.float32)


def all_orders() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(order, signs) for order in permutations(range(3)) for signs in product((-1, 1), repeat=3)]


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_every_axis_order_and_sign_is_read_right_and_written_back_to_the_bit(tmp_path: Path, form: str, oblique: bool) -> None:
    turn = rotation((0.2, -0.15, 0.3)) if oblique else np.eye(3)
    for number, (order, signs) in enumerate(all_orders()):
        columns = np.zeros((3, 3))
        for axis, world in enumerate(order):
            columns[world, axis] = signs[axis] * SPACINGS[world]
        affine = affine_of(turn @ columns, (12.5, -40.25, 7.125))
        header = nibabel.Nifti1Header()
        header.set_data_shape((3, 4, 5))
        header.set_data_dtype(np.float32)
        header.set_qform(affine, 1)
        if form == "sform":
            header.set_sform(affine, 2)
            header["qform_code"] = 0
        stored = getattr(header, f"get_{form}")()
        voxels = world_intensity((3, 4, 5), stored)
        source, copy = tmp_path / f"{number}.nii", tmp_path / f"{number}_copy.nii.gz"
        source.write_bytes(header.binaryblock + b"\0\0\0\0" + voxels.tobytes(order="F"))
        patch(source, vox_offset=352, magic=b"n+1")

        image, grid = read_image(source)
        assert np.allclose(image, world_intensity(image.shape, grid.affine_4x4), rtol=1e-5, atol=2.0)
        assert grid.file_axes[0] == order.index(2)
        assert grid.file_axes[1] > grid.file_axes[2]
        assert grid.spacing_zyx_mm == tuple(float(np.float32(SPACINGS[order[axis]])) for axis in grid.file_axes)

        labels = (image > np.median(image)).astype(np.int16)
        write_labels(copy, labels, grid)
        written = nibabel.load(copy)
        assert np.array_equal(np.asarray(written.dataobj), (voxels > np.median(voxels)).astype(np.uint8))
        assert np.array_equal(written.affine, stored)
        for field in nifti.GEOMETRY_FIELDS:
            assert written.header[field].tobytes() == nibabel.load(source).header[field].tobytes(), field
        again, its_grid = read_labels(copy)
        assert np.array_equal(again, labels)
        assert np.array_equal(its_grid.affine_4x4, grid.affine_4x4)
        assert its_grid.file_axes == grid.file_axes

        (turned, turned_labels), turned_grid = reorient([image, labels], grid)
        assert turned_grid.axis_codes_zyx == "SPL"
        assert np.allclose(turned, world_intensity(turned.shape, turned_grid.affine_4x4), rtol=1e-5, atol=2.0)
        twice, twice_grid = reorient([turned], turned_grid)
        assert np.array_equal(twice[0], turned)
        assert twice_grid.file_axes == turned_grid.file_axes
        assert twice_grid.file_flips == turned_grid.file_flips
        write_labels(tmp_path / "turned.nii.gz", turned_labels, turned_grid)
        assert (tmp_path / "turned.nii.gz").read_bytes() == copy.read_bytes()


@pytest.mark.parametrize("reader", nifti.TURNING_READERS)
@pytest.mark.parametrize("keep", [False, True])
def test_turning_as_a_reader_of_nnunets_moves_voxels_and_not_the_patient(tmp_path: Path, reader: str, keep: bool) -> None:
    """nibabel's own rule is the oracle, also far from the patient's axes; whatever order the array was read in."""
    for number, (order, signs) in enumerate(all_orders()):
        turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0] if number % 3 else np.eye(3)
        columns = np.zeros((3, 3))
        for axis, world in enumerate(order):
            columns[world, axis] = signs[axis] * SPACINGS[world]
        affine = affine_of(turn @ columns, (12.5, -40.25, 7.125))
        path = save(tmp_path / "a.nii.gz", RNG.normal(size=(3, 4, 5)).astype(np.float32), affine)
        expected = nibabel.load(path).as_reoriented(nibabel.io_orientation(nibabel.load(path).affine))
        image, grid = read_image(path, keep_file_order=keep)
        (turned,), its_grid = reorient([image], grid, path, reader)
        np.testing.assert_array_equal(turned, np.asarray(expected.dataobj).transpose())
        np.testing.assert_allclose(its_grid.affine_4x4[:, [2, 1, 0, 3]], expected.affine, atol=1e-5)
        if reader == nifti.NIBABEL_TURNING:
            assert its_grid.spacing_zyx_mm == tuple(float(size) for size in expected.header.get_zooms()[::-1])
        else:
            assert sorted(its_grid.spacing_zyx_mm) == sorted(grid.spacing_zyx_mm)
        (twice,), last = reorient([turned], its_grid, path, reader)
        np.testing.assert_array_equal(twice, turned)
        assert (last.file_axes, last.file_flips, last.spacing_zyx_mm) == (its_grid.file_axes, its_grid.file_flips, its_grid.spacing_zyx_mm)
        write_labels(tmp_path / "b.nii.gz", (turned > 0).astype(np.int16), its_grid)
        written = nibabel.load(tmp_path / "b.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(nibabel.load(path).dataobj) > 0)
        np.testing.assert_array_equal(written.affine, nibabel.load(path).affine)


def test_a_reader_of_nnunets_where_the_file_does_not_say_enough(tmp_path: Path) -> None:
    """Without a form each of the two libraries has its own default; with two that differ ITK takes now this one, now that."""
    voxels = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    path = save(tmp_path / "a.nii.gz", voxels, np.diag([2.0, 0.5, 0.6, 1.0]), sform_code=0, qform_code=0)
    for reader, back in ((nifti.NIBABEL_TURNING, voxels[::-1]), (nifti.ITK_TURNING, voxels[::-1, ::-1])):
        with pytest.warns(UserWarning, match=f"a.nii.gz: without sform and qform .* as nnU-Net's {reader} takes them"):
            (turned,), _ = reorient(*_listed(read_image(path)), path, reader)
        np.testing.assert_array_equal(turned, back.transpose())
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.set_sform(np.diag([-1.0, 1.0, 1.0, 1.0]), 2)
    image.set_qform(np.diag([1.0, 1.0, -1.0, 1.0]), 1)
    nibabel.save(image, path)
    (turned,), _ = reorient(*_listed(read_image(path)), path, nifti.NIBABEL_TURNING)
    np.testing.assert_array_equal(turned, voxels[::-1].transpose())
    with pytest.raises(InputError, match=r"a\.nii\.gz: its sform and its qform let its axes run to different sides"):
        reorient(*_listed(read_image(path)), path, nifti.ITK_TURNING)


def _listed(found: tuple[np.ndarray, Grid]) -> tuple[list[np.ndarray], Grid]:
    return [found[0]], found[1]


def test_without_sform_and_qform_the_coarsest_axis_is_the_slice_axis(tmp_path: Path) -> None:
    voxels = RNG.integers(0, 9, (4, 5, 6)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", voxels, np.diag([5.0, 0.5, 0.6, 1.0]), sform_code=0, qform_code=0)
    image, grid = read_image(path)
    assert grid.file_axes == (0, 2, 1)
    assert grid.spacing_zyx_mm == (5.0, float(np.float32(0.6)), 0.5)
    assert np.array_equal(image, np.transpose(voxels, (0, 2, 1)))
    write_image(tmp_path / "b.nii.gz", image, grid)
    written = nibabel.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), voxels)
    assert np.array_equal(written.affine, nibabel.load(path).affine)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 0)
    with pytest.raises(InputError, match="cannot be reoriented"):
        reorient([image], grid)


@pytest.mark.parametrize("srow_z", [(0.0, 0.0, 0.0, 0.0), (0.0, 0.0, np.nan, 0.0)])
def test_an_unusable_sform_is_said_and_the_coarsest_axis_taken(tmp_path: Path, srow_z: tuple[float, ...]) -> None:
    path = save(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), np.diag([0.5, 5.0, 0.5, 1.0]), srow_z=srow_z, qform_code=0)
    with pytest.warns(UserWarning, match=r"a\.nii: its sform is unusable"):
        _, grid = read_image(path)
    assert grid.file_axes == (1, 2, 0)
    assert grid.spacing_zyx_mm == (5.0, 0.5, 0.5)


def test_sform_wins_over_qform_and_an_unusable_one_yields(tmp_path: Path) -> None:
    path, other = save(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16)), np.diag([0.5, 0.5, -5.0, 1.0])
    header = nibabel.load(path).header
    header.set_qform(other, 2)
    fields = {name: header[name] for name in nifti.GEOMETRY_FIELDS if not name.startswith(("s", "pix"))}
    patch(path, **fields, pixdim=header["pixdim"])
    assert np.array_equal(read_grid(path).affine_4x4, np.diag([-0.5, -0.5, 5.0, 1.0])[:, [2, 1, 0, 3]])
    patch(path, srow_x=[0, 0, 0, 0])
    with pytest.warns(UserWarning, match="sform is unusable"):
        assert np.array_equal(read_grid(path).affine_4x4, other[:, [2, 1, 0, 3]])


def test_a_tie_between_axes_goes_to_the_coarser(tmp_path: Path) -> None:
    half = np.sqrt(0.5)
    columns = np.array([[1.0, 0.0, 0.0], [0.0, half, -half], [0.0, half, half]]) @ np.diag([0.5, 5.0, 0.5])
    assert read_grid(save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.int16), affine_of(columns))).file_axes == (1, 2, 0)


def test_keep_file_order_only_reverses_the_axes(tmp_path: Path) -> None:
    voxels = RNG.integers(0, 9, (4, 5, 6)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", voxels, np.array([[0, 0.5, 0, 0], [0, 0, 0.5, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]]))
    assert read_grid(path).file_axes == (0, 2, 1)
    image, grid = read_image(path, keep_file_order=True)
    assert np.array_equal(image, voxels.transpose(2, 1, 0))
    assert grid.spacing_zyx_mm == (0.5, 0.5, 5.0)
    write_labels(tmp_path / "b.nii.gz", image.astype(np.int16), grid)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "b.nii.gz").dataobj), voxels)


def test_pixdim_that_disagrees_with_the_affine_is_said_and_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), pixdim=[1, 0.42, 0.42, 5, 0, 0, 0, 0], qform_code=0)
    with pytest.warns(UserWarning, match=r"a\.nii: its pixdim says \[0\.41.* its affine \[0\.5, 0\.5, 5\.0\]"):
        grid = read_grid(path)
    assert grid.spacing_zyx_mm == (5.0, float(np.float32(0.42)), float(np.float32(0.42)))
    close = save(tmp_path / "b.nii", np.zeros((4, 5, 6), np.int16), pixdim=[1, 0.5001, 0.5, 5, 0, 0, 0, 0], qform_code=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_grid(close)


@pytest.mark.parametrize(("code", "unit"), [(1, "metres"), (3, "microns")])
def test_other_units_of_length_are_said_and_taken_as_mm(tmp_path: Path, code: int, unit: str) -> None:
    path = save(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), xyzt_units=code + 8)
    with pytest.warns(UserWarning, match=f"in {unit}; they are taken as mm, while ITK"):
        assert read_grid(path).spacing_zyx_mm == (5.0, 0.5, 0.5)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("scale", [None, (2.0, -1024.0), (0.25, 3.0), (0.0, 5.0), (np.nan, 5.0), (1.0, 0.0)])
def test_voxel_types_byte_orders_and_scales_agree_with_nibabel(
    tmp_path: Path, dtype: str, order: str, scale: tuple[float, float] | None
) -> None:
    voxels = RNG.integers(0, 100, (3, 4, 5)).astype(order + dtype)
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_sform(np.diag([-0.5, -0.5, 5, 1]), 1)
    header["pixdim"][1:4] = 0.5, 0.5, 5
    header["vox_offset"], header["magic"] = 352, b"n+1"
    if scale:
        header["scl_slope"], header["scl_inter"] = scale
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + b"\0\0\0\0" + voxels.tobytes(order="F"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image, grid = read_image(path)
    assert [str(one.message) for one in said] == (
        [f"{path}: its scl_slope is 0, so its scl_inter 5 is not added, as NIfTI says, while ITK and nnU-Net would add it"]
        if scale == (0.0, 5.0)
        else []
    )
    assert image.dtype == np.float32
    assert np.array_equal(image, nibabel.load(path).get_fdata().astype(np.float32).transpose(2, 1, 0))
    write_image(tmp_path / "b.nii", image, grid)
    assert np.array_equal(read_image(tmp_path / "b.nii")[0], image)


def test_nifti2_and_extensions_and_trailing_axes(tmp_path: Path) -> None:
    voxels = RNG.integers(0, 3, (3, 4, 5, 1, 1)).astype(np.int16)
    image = nibabel.Nifti2Image(voxels, np.diag([-0.5, -0.5, 5.0, 1.0]))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 100))
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(image.to_bytes()))
    labels, grid = read_labels(path)
    assert np.array_equal(labels, voxels[..., 0, 0].transpose(2, 1, 0))
    assert len(grid.header or b"") == 540
    write_labels(tmp_path / "b.nii.gz", labels, grid)
    assert isinstance(nibabel.load(tmp_path / "b.nii.gz"), nibabel.Nifti2Image)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "b.nii.gz").dataobj), voxels[..., 0, 0])


def test_the_name_does_not_decide_about_compression(tmp_path: Path) -> None:
    plain = save(tmp_path / "a.nii", np.ones((3, 4, 5), np.int16))
    plain.rename(tmp_path / "b.nii.gz")
    assert read_image(tmp_path / "b.nii.gz")[0].sum() == 60


def test_reading_without_isal_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.nii.gz", RNG.integers(0, 9, (7, 8, 9)).astype(np.int16))
    image, grid = read_image(path)
    monkeypatch.setattr(files, "igzip", None)
    assert np.array_equal(read_image(path)[0], image)
    write_image(tmp_path / "b.nii.gz", image, grid)
    assert np.array_equal(read_image(tmp_path / "b.nii.gz")[0], image)


@pytest.mark.parametrize(("top", "stored"), [(1, "uint8"), (254, "uint8"), (255, "uint16"), (30000, "uint16")])
def test_masks_are_stored_in_the_smallest_type_like_nnunet(tmp_path: Path, top: int, stored: str) -> None:
    labels = np.zeros((3, 4, 5), np.int16)
    labels[1, 2, 3] = top
    write_labels(tmp_path / "a.nii.gz", labels, Grid((3, 4, 5), AXIAL))
    assert nibabel.load(tmp_path / "a.nii.gz").get_data_dtype() == stored
    assert np.array_equal(read_labels(tmp_path / "a.nii.gz")[0], labels)


@given(st.tuples(*[st.floats(-3, 3)] * 3), st.tuples(*[st.floats(0.2, 6)] * 3))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_grid_without_a_file_survives_writing(
    tmp_path: Path, angles: tuple[float, float, float], spacing: tuple[float, float, float]
) -> None:
    affine = affine_of(rotation(angles) @ np.diag(spacing), (1.5, -2.5, 100.0)).astype(np.float32)
    grid = Grid((2, 3, 4), affine)
    labels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    write_labels(tmp_path / "a.nii", labels, grid)
    stored = nibabel.load(tmp_path / "a.nii")
    assert np.array_equal(stored.header.get_sform(), affine[:, [2, 1, 0, 3]])
    assert np.allclose(stored.header.get_qform(), affine[:, [2, 1, 0, 3]], atol=1e-4)
    assert (int(stored.header["sform_code"]), int(stored.header["qform_code"])) == (1, 1)
    assert np.array_equal(np.asarray(stored.dataobj), labels.transpose(2, 1, 0))
    assert np.allclose(sorted(read_grid(tmp_path / "a.nii").spacing_zyx_mm), sorted(spacing), rtol=1e-5)


def test_a_sheared_grid_is_written_with_an_sform_only_and_a_stale_header_is_not_used(tmp_path: Path) -> None:
    sheared = affine_of(np.array([[0.0, 0.0, 0.5], [2.0, 0.5, 0.0], [5.0, 0.0, 0.0]]))
    write_labels(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8), Grid((2, 3, 4), sheared))
    header = nibabel.load(tmp_path / "a.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)
    old = read_grid(save(tmp_path / "b.nii", np.zeros((4, 3, 2), np.int16)))
    moved = Grid(old.shape_zyx, old.affine_4x4 + np.pad([[7.0]], ((0, 3), (3, 0))), file_axes=old.file_axes, header=old.header)
    write_labels(tmp_path / "c.nii", np.zeros((2, 3, 4), np.uint8), moved)
    assert np.array_equal(read_grid(tmp_path / "c.nii").affine_4x4, moved.affine_4x4)


def test_the_same_mask_gives_the_same_bytes_and_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, labels = Grid((2, 3, 4), AXIAL), np.zeros((2, 3, 4), np.uint8)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / "new" / name, labels, grid)
    assert (tmp_path / "new/a.nii.gz").read_bytes() == (tmp_path / "new/b.nii.gz").read_bytes()

    def broken(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    before = (tmp_path / "new/a.nii.gz").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        write_labels(tmp_path / "new/a.nii.gz", labels + 1, grid)
    assert (tmp_path / "new/a.nii.gz").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.nii.gz", "b.nii.gz"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 3, 4)), "must be integers"),
        (np.full((2, 3, 4), -1), "0 to 65535"),
        (np.full((2, 3, 4), 70000), "0 to 65535"),
        (np.zeros((4, 3, 2), int), "its grid is"),
    ],
)
def test_masks_that_cannot_be_written(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_labels(tmp_path / "a.nii.gz", labels, Grid((2, 3, 4), AXIAL))
    assert not list(tmp_path.iterdir())


def test_only_nifti_names_are_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"only \.nii and \.nii\.gz"):
        write_labels(tmp_path / "a.nrrd", np.zeros((2, 3, 4), int), Grid((2, 3, 4), AXIAL))


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Every bad input the project promises a clear message for: name -> (file, what the message must say)."""
    good = save(folder / "good.nii.gz", RNG.integers(-1000, 1000, (40, 40, 10)).astype(np.int16))
    small = np.zeros((4, 5, 6), np.float32)
    nan, inf = small.copy(), small.copy()
    nan[1, 2, 3:5] = np.nan
    inf[0, 0, 0] = -np.inf
    raw = good.read_bytes()

    def make(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    corrupt = bytearray(raw)
    corrupt[-5] ^= 0xFF
    return {
        "missing": (folder / "nowhere.nii.gz", "no such file"),
        "folder": (folder, "is not a file"),
        "empty": (make("empty.nii.gz", b""), "is empty"),
        "text": (make("text.nii.gz", b"hello world, this is not an image" * 30), "not a NIfTI file"),
        "short": (make("short.nii", b"\x5c\x01\x00\x00 too short"), "not a NIfTI file"),
        "cut gzip": (make("cut.nii.gz", raw[: len(raw) // 2]), "damaged or cut off"),
        "cut trailer": (make("trailer.nii.gz", raw[:-4]), "damaged or cut off"),
        "check sum": (make("crc.nii.gz", bytes(corrupt)), "damaged or cut off"),
        "cut inside": (make("inside.nii.gz", gzip.compress(gzip.decompress(raw)[:-100])), "claims 32352 bytes, but there are 32252"),
        "pair": (patch(save(folder / "pair.nii", small), magic=b"ni1"), "not a NIfTI file"),
        "2d": (save(folder / "2d.nii.gz", small[0]), r"2 dimensions \(5, 6\), a 3D volume is needed"),
        "4d": (save(folder / "4d.nii.gz", np.zeros((4, 5, 6, 2), np.int16)), r"4 dimensions \(4, 5, 6, 2\), a 3D volume is needed"),
        "nan": (save(folder / "nan.nii.gz", nan), "2 of 120 voxels are NaN or infinite"),
        "inf": (save(folder / "inf.nii.gz", inf), "1 of 120 voxels are NaN or infinite"),
        "overflow": (save(folder / "big.nii.gz", np.full((4, 5, 6), 1e300)), "120 of 120 voxels are NaN"),
        "complex": (save(folder / "complex.nii.gz", small.astype(np.complex64)), "voxels are complex64"),
        "dtype": (patch(save(folder / "dtype.nii.gz", small), datatype=77), "unknown NIfTI voxel type 77"),
        "no dims": (patch(save(folder / "dims.nii.gz", small), dim=[0] * 8), "claims 0 dimensions"),
        "zero dim": (patch(save(folder / "zero.nii.gz", small), dim=[3, 4, 0, 6, 1, 1, 1, 1]), "at least one voxel"),
        "bomb": (patch(save(folder / "bomb.nii.gz", small), dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), "more than the 4 GiB"),
        "claims too little": (make("more.nii.gz", gzip.compress(gzip.decompress(raw) + b"\0" * 5_000_000)), "more data than its header"),
        "offset": (patch(save(folder / "offset.nii", small), vox_offset=np.nan), "start at byte nan"),
        "no size": (
            patch(save(folder / "nosize.nii", small), pixdim=[1, 0, 0, 0, 0, 0, 0, 0], sform_code=0, qform_code=0),
            "no voxel size",
        ),
        "inter": (patch(save(folder / "inter.nii", small), scl_slope=2.0, scl_inter=np.nan), "scl_inter is nan"),
    }


def test_every_bad_file_gets_a_message_with_its_name_and_the_reason(tmp_path: Path) -> None:
    for name, (path, reason) in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=reason) as caught:
            read_image(path)
        assert str(path) in str(caught.value), name


def test_label_files_must_hold_whole_numbers_that_fit(tmp_path: Path) -> None:
    labels = np.zeros((3, 4, 5), np.float32)
    labels[0, 0, 0] = 2.0
    assert read_labels(save(tmp_path / "whole.nii.gz", labels))[0].max() == 2
    for value, shown in ((0.5, "0.5"), (np.nan, "nan")):
        labels[1, 1, 1] = value
        with pytest.raises(InputError, match=rf"1 of 60 voxels are not whole numbers \(for example {shown}\)"):
            read_labels(save(tmp_path / "half.nii.gz", labels))
    with pytest.raises(InputError, match="run from 0 to 40000"):
        read_labels(save(tmp_path / "large.nii.gz", np.array([0, 40000], np.int32).reshape(1, 1, 2)))


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_end_in_an_image_or_an_input_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "fuzz.nii"
    good = bytearray(save(path, np.ones((3, 4, 5), np.int16)).read_bytes())
    zipped = data.draw(st.booleans())
    if zipped:
        good = bytearray(gzip.compress(bytes(good), mtime=0))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            image, grid = read_image(path)
        except InputError as error:
            message = str(error)
        else:
            message = "fuzz.nii"
            assert image.shape == grid.shape_zyx
            assert np.isfinite(image).all()
    assert "fuzz.nii" in message


def test_real_files_agree_with_nibabel(shared_data: Path) -> None:
    folder = shared_data / "Dataset501_PHE"
    path, label = folder / "imagesTr/phe_0051_0000.nii.gz", folder / "labelsTr/phe_0051.nii.gz"
    image, grid = read_image(path)
    reference = nibabel.load(path)
    assert np.array_equal(image, reference.get_fdata(dtype=np.float32).transpose(2, 1, 0))
    assert np.array_equal(grid.affine_4x4[:, [2, 1, 0, 3]], reference.affine)
    assert grid.axis_codes_zyx == "SPL"
    labels, its_grid = read_labels(label)
    assert grid.same_place(its_grid)
    assert labels.sum() == np.asarray(nibabel.load(label).dataobj).sum() > 0


def test_a_real_mask_written_back_is_the_same_mask(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "phe_derived_hematoma/phe_0011.nii.gz"
    labels, grid = read_labels(path)
    write_labels(tmp_path / "a.nii.gz", labels, grid)
    old, new = nibabel.load(path), nibabel.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asarray(old.dataobj), np.asarray(new.dataobj))
    for field in nifti.GEOMETRY_FIELDS:
        assert old.header[field].tobytes() == new.header[field].tobytes()
