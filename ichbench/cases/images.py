"""NIfTI <-> arrays on a Grid. The only file of the project that knows the axis order of files.

Files store (i, j, k) with i fastest and an affine from (i, j, k) to RAS+ millimetres. Here an array is (z, y, x):
z is the file axis nearest to superior-inferior, y the later and x the earlier of the other two, so the usual axial
(i, j, k) becomes (k, j, i). Nothing is flipped, unless `reorient` is called; the `Grid` remembers all of it.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from ichbench.cases.case import GEOMETRY_TOLERANCE_MM, FloatArray, Grid
from ichbench.cases.files import BoundedReader, gzip_bytes, write_atomically
from ichbench.cases.nifti import (
    GEOMETRY_FIELDS,
    NIBABEL_TURNING,
    FileGeometry,
    geometry_of,
    parse_header,
    read_header,
    scaling,
    shape_ijk_of,
    turn_to_ras,
    voxel_offset,
    voxel_type,
)
from ichbench.errors import InputError

#: A file may claim at most this much (voxels x 4 bytes or more): 512 x 512 x 4096 in float32. A 298 KB .nii.gz can claim 32 GB.
MAX_BYTES = 4 * 1024**3
#: Two axes whose cosines with superior-inferior differ by less than this are equally near to it.
TIE_TOLERANCE = 1e-3

T = TypeVar("T")


def read_image(path: Path, keep_file_order: bool = False) -> tuple[NDArray[np.float32], Grid]:
    """The voxels (z, y, x) of one NIfTI volume with its scale and offset applied (HU for CT), and its grid.

    `keep_file_order` takes the file's axes reversed, (k, j, i), whatever they point at, as nnU-Net does.
    Axes after the third that have one voxel are dropped, without a word: (x, y, z, 1) is read as (x, y, z).
    Raises `InputError` for a file that is missing, damaged, not NIfTI, not 3D, too large, or has voxels that are not finite.
    """
    raw_zyx, header, grid = _read(Path(path), keep_file_order)
    slope, inter = scaling(Path(path), header)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 becomes infinite and is refused below
        scaled = raw_zyx if slope is None else raw_zyx.astype(np.float64) * slope + inter
        image_zyx = np.ascontiguousarray(scaled, dtype=np.float32)
    if raw_zyx.dtype.kind == "f" or slope is not None:
        bad = int(image_zyx.size - np.count_nonzero(np.isfinite(image_zyx)))
        if bad:
            raise InputError(
                f"{path}: {bad} of {image_zyx.size} voxels are NaN or infinite; every voxel must be a finite number: "
                "repair the file (for CT, air is -1000 HU)"
            )
    return image_zyx, grid


def read_labels(path: Path, keep_file_order: bool = False) -> tuple[NDArray[np.int16], Grid]:
    """The labels (z, y, x) of one NIfTI volume and their grid; as `read_image`, but every voxel must be a whole number."""
    raw_zyx, header, grid = _read(Path(path), keep_file_order)
    slope, inter = scaling(Path(path), header)
    values: NDArray[Any] = raw_zyx if slope is None else raw_zyx.astype(np.float64) * slope + inter
    if values.dtype.kind == "f":
        fractional = ~(np.isfinite(values) & (values == np.rint(values)))
        count = int(np.count_nonzero(fractional))
        if count:
            example = float(values[fractional][0])
            raise InputError(
                f"{path}: {count} of {values.size} voxels are not whole numbers (for example {example:g}); a label file may "
                "hold integers only: probabilities must be thresholded, resampled masks must use nearest neighbour"
            )
    low, high = int(values.min()), int(values.max())
    limits = np.iinfo(np.int16)
    if low < limits.min or high > limits.max:
        raise InputError(f"{path}: label values run from {low} to {high}; allowed is {limits.min} to {limits.max}")
    return np.ascontiguousarray(values, dtype=np.int16), grid


def read_grid(path: Path, keep_file_order: bool = False) -> Grid:
    """The grid of a NIfTI volume from its header alone (under a millisecond; the voxels are not looked at)."""
    with BoundedReader(Path(path)) as reader:
        header, _ = read_header(reader)
    return _grid_of(header, shape_ijk_of(Path(path), header), keep_file_order, Path(path))


def case_order(grid: Grid) -> tuple[int, int, int]:
    """How to transpose an array that was read with `keep_file_order`, so that its axes are (z, y, x): the slice axis first."""
    if grid.header is None:
        return 0, 1, 2
    z, y, x = _file_axes(geometry_of(parse_header(grid.header)))
    return grid.file_axes.index(z), grid.file_axes.index(y), grid.file_axes.index(x)


def write_labels(path: Path, labels_zyx: NDArray[np.integer] | NDArray[np.bool_], grid: Grid) -> None:
    """Write a mask in its file's own axis order and geometry (bit for bit where the grid came from a file).

    uint8, or uint16 when a label is 255 or more. The file appears whole or not at all; same mask, same bytes.
    """
    labels = np.asarray(labels_zyx)
    if labels.dtype.kind not in "iub":
        raise InputError(f"{path}: labels must be integers, but are {labels.dtype}; round or threshold them first")
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or high > 65535:
        raise InputError(f"{path}: label values run from {low} to {high}; a mask file holds 0 to 65535")
    _write(Path(path), labels, grid, np.dtype("<u1" if high < 255 else "<u2"))


def write_image(path: Path, image_zyx: NDArray[Any], grid: Grid) -> None:
    """Write a volume in its file's own axis order and geometry: int16 when that is exact, else float32."""
    image = np.asarray(image_zyx)
    limits = np.iinfo(np.int16)
    fits = image.dtype.kind in "iub" or bool(np.all(np.isfinite(image)) and np.array_equal(image, np.rint(image)))
    fits = fits and bool(image.size == 0 or (image.min() >= limits.min and image.max() <= limits.max))
    _write(Path(path), image, grid, np.dtype("<i2" if fits else "<f4"))


def reorient(
    volumes_zyx: list[NDArray[Any]], grid: Grid, source: object = "a file", how: bool | str = True
) -> tuple[list[NDArray[Any]], Grid]:
    """Turn volumes that share `grid` so that z runs to superior, y to posterior and x to the left ("SPL", INSTANCE's
    orientation), by permuting and flipping axes only; the new grid still writes masks back in the file's own order.
    `how` may name a reader of nnU-Net's (`nifti.TURNING_READERS`): then to superior, anterior and right, as that one turns a file.
    `source` begins the message of the InputError for a file that does not say where its axes point."""
    old = None if grid.header is None else parse_header(grid.header)
    if isinstance(how, str):
        return _as_reader(volumes_zyx, grid, source, how)
    if old is not None and not geometry_of(old).oriented:
        raise InputError(
            f"{source}: without sform and qform it does not say where its axes point, so it cannot be reoriented; write one of them"
        )
    codes = grid.axis_codes_zyx
    order = tuple(next(k for k in range(3) if codes[k] in pair) for pair in ("SI", "PA", "LR"))
    turned = (codes[order[0]] != "S", codes[order[1]] != "P", codes[order[2]] != "L")
    return _turn(volumes_zyx, grid, (order[0], order[1], order[2]), turned)


def _as_reader(volumes_zyx: list[NDArray[Any]], grid: Grid, source: object, reader: str) -> tuple[list[NDArray[Any]], Grid]:
    """`reorient` by nnU-Net's rule, which looks at the file's own axes; what was turned so already stays as it is."""
    header = None if grid.header is None else parse_header(grid.header)
    to_file = (grid.file_axes.index(0), grid.file_axes.index(1), grid.file_axes.index(2))
    affine_ijk = _flipped(grid.affine_4x4, grid.shape_zyx, grid.file_flips)[:, [*to_file, 3]]
    (x, y, z), (x_back, y_back, z_back) = turn_to_ras(source, header, affine_ijk, reader)
    order = to_file[z], to_file[y], to_file[x]
    turned = tuple(grid.file_flips[axis] != back for axis, back in zip(order, (z_back, y_back, x_back), strict=True))
    volumes, new = _turn(volumes_zyx, grid, order, (turned[0], turned[1], turned[2]))
    if reader == NIBABEL_TURNING and (new.file_axes != (2, 1, 0) or any(new.file_flips)):
        # nibabel writes a new header for an image that it turns, with the voxel size of the affine
        sizes = np.linalg.norm(new.affine_4x4[:3, :3], axis=0).astype(np.float32)
        new = replace(new, pixdim_zyx_mm=(float(sizes[0]), float(sizes[1]), float(sizes[2])))
    return volumes, new


def _turn(
    volumes_zyx: list[NDArray[Any]], grid: Grid, order: tuple[int, int, int], turned: tuple[bool, bool, bool]
) -> tuple[list[NDArray[Any]], Grid]:
    """Axis k taken from axis order[k], then reversed if turned[k]."""
    flips = tuple(slice(None, None, -1) if flip else slice(None) for flip in turned)
    volumes = [np.ascontiguousarray(np.transpose(volume, order)[flips]) for volume in volumes_zyx]
    shape = _permuted(grid.shape_zyx, order)
    affine = _flipped(grid.affine_4x4[:, [*order, 3]], shape, turned)
    pixdim = None if grid.pixdim_zyx_mm is None else _permuted(grid.pixdim_zyx_mm, order)
    before = _permuted(grid.file_flips, order)
    file_flips = (before[0] != turned[0], before[1] != turned[1], before[2] != turned[2])
    file_axes = _permuted(grid.file_axes, order)
    return volumes, replace(grid, shape_zyx=shape, affine_4x4=affine, pixdim_zyx_mm=pixdim, file_axes=file_axes, file_flips=file_flips)


def _permuted(values: tuple[T, T, T], order: tuple[int, ...]) -> tuple[T, T, T]:
    return values[order[0]], values[order[1]], values[order[2]]


def _flipped(affine_4x4: FloatArray, shape: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> FloatArray:
    """The affine after the axes marked in `flips` were reversed."""
    affine = np.array(affine_4x4, dtype=np.float64)
    for axis in np.flatnonzero(flips):
        affine[:, 3] += affine[:, axis] * (shape[axis] - 1)
        affine[:3, axis] *= -1.0
    return affine


def _read(path: Path, keep_file_order: bool) -> tuple[NDArray[Any], Any, Grid]:
    """Stored voxels as a (z, y, x) view, the header and the grid."""
    with BoundedReader(path) as reader:
        header, head = read_header(reader)
        shape_ijk = shape_ijk_of(path, header)
        dtype = voxel_type(path, header)
        offset = voxel_offset(path, header)
        count = shape_ijk[0] * shape_ijk[1] * shape_ijk[2]
        if count * max(dtype.itemsize, 4) > MAX_BYTES or offset > MAX_BYTES // 4:
            raise InputError(
                f"{path}: the header claims {shape_ijk} voxels of {dtype} at byte {offset}, more than the {MAX_BYTES / 1024**3:g} GiB "
                "that are read; check that the header is right, then crop or resample the volume"
            )
        data = np.empty(offset + count * dtype.itemsize, dtype=np.uint8)
        known = min(len(head), len(data))
        data[:known] = head[:known]
        filled = known + reader.read_into(data[known:])
        if filled < len(data):
            raise InputError(f"{path}: cut off: the header claims {len(data)} bytes, but there are {filled}; copy or download it again")
        reader.finish()
    grid = _grid_of(header, shape_ijk, keep_file_order, path)
    voxels_ijk = np.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape_ijk, order="F")
    return np.transpose(voxels_ijk, grid.file_axes), header, grid


def _grid_of(header: Any, shape_ijk: tuple[int, int, int], keep_file_order: bool, path: Path) -> Grid:
    geometry = geometry_of(header)
    if geometry.spacing_ijk_mm is None and not geometry.oriented:
        raise InputError(f"{path}: no voxel size: {'; '.join(geometry.complaints)}; set pixdim or an affine and write the file again")
    for complaint in geometry.complaints:
        warnings.warn(f"{path}: {complaint}", UserWarning, stacklevel=4)
    axes = (2, 1, 0) if keep_file_order else _file_axes(geometry)
    return Grid(
        shape_zyx=_permuted(shape_ijk, axes),
        affine_4x4=geometry.affine_4x4[:, [*axes, 3]],
        file_axes=axes,
        pixdim_zyx_mm=None if geometry.spacing_ijk_mm is None else _permuted(geometry.spacing_ijk_mm, axes),
        header=header.binaryblock,
    )


def _file_axes(geometry: FileGeometry) -> tuple[int, int, int]:
    """(z, y, x) as file axes: the axis rule of the project, stated in this module's first lines."""
    columns = geometry.affine_4x4[:3, :3]
    spacing = np.asarray(geometry.spacing_ijk_mm or np.linalg.norm(columns, axis=0), dtype=np.float64)
    nearest = list(range(3))
    if geometry.oriented:
        upward = np.abs(columns[2]) / np.linalg.norm(columns, axis=0)
        nearest = [axis for axis in range(3) if upward[axis] >= upward.max() - TIE_TOLERANCE]
    z = max(nearest, key=lambda axis: (round(float(spacing[axis]), 4), axis))
    x, y = sorted({0, 1, 2} - {z})
    return z, y, x


def _write(path: Path, volume_zyx: NDArray[Any], grid: Grid, dtype: np.dtype[Any]) -> None:
    if tuple(volume_zyx.shape) != grid.shape_zyx:
        raise InputError(f"{path}: the array has shape {volume_zyx.shape}, its grid is {grid.shape_zyx} (z, y, x)")
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: only .nii and .nii.gz can be written; change the name")
    flips = tuple(slice(None, None, -1) if flip else slice(None) for flip in grid.file_flips)
    to_file = (grid.file_axes.index(0), grid.file_axes.index(1), grid.file_axes.index(2))
    voxels_ijk = np.transpose(volume_zyx[flips], to_file)
    affine_ijk = _flipped(grid.affine_4x4, grid.shape_zyx, grid.file_flips)[:, [*to_file, 3]]
    header = _new_header(path, grid, voxels_ijk.shape, affine_ijk, to_file)
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 1.0, 0.0, int(header["sizeof_hdr"]) + 4
    data = header.binaryblock + b"\0\0\0\0" + voxels_ijk.astype(dtype, order="K").tobytes(order="F")
    write_atomically(path, gzip_bytes(data) if path.name.endswith(".gz") else data)


def _new_header(path: Path, grid: Grid, shape_ijk: tuple[int, ...], affine_ijk: FloatArray, to_file: tuple[int, int, int]) -> Any:
    """A little-endian header with the geometry fields of the file the grid came from, else with the grid's affine."""
    old = None if grid.header is None else parse_header(grid.header)
    header = (nibabel.Nifti1Header if old is None else type(old))(endianness="<")
    try:
        header.set_data_shape(shape_ijk)
    except HeaderDataError as error:
        raise InputError(f"{path}: the shape {shape_ijk} does not fit into NIfTI-1 (32767 voxels an axis)") from error
    if old is not None and _same_space(old, grid, shape_ijk, affine_ijk):
        for name in GEOMETRY_FIELDS:
            header[name] = old[name]
        return header
    if grid.slice_positions_mm is not None:
        message = f"{path}: slices are not evenly spaced, which NIfTI cannot say; their mean spacing is written"
        warnings.warn(message, UserWarning, stacklevel=4)
    header.set_xyzt_units("mm")
    header.set_sform(affine_ijk, code=1)
    columns = affine_ijk[:3, :3] / np.linalg.norm(affine_ijk[:3, :3], axis=0)
    if np.allclose(columns.T @ columns, np.eye(3), atol=1e-6):  # a quaternion cannot hold a sheared affine
        header.set_qform(affine_ijk, code=1)
    header["pixdim"][1:4] = _permuted(grid.spacing_zyx_mm, to_file)
    return header


def _same_space(header: Any, grid: Grid, shape_ijk: tuple[int, ...], affine_ijk: FloatArray) -> bool:
    """Does the remembered header still describe this grid? (A caller may have replaced the affine alone.)"""
    geometry = geometry_of(header)
    if shape_ijk_of(Path(), header) != shape_ijk:
        return False
    shape = (int(shape_ijk[0]), int(shape_ijk[1]), int(shape_ijk[2]))
    return Grid(shape, geometry.affine_4x4).same_place(Grid(shape, affine_ijk), GEOMETRY_TOLERANCE_MM)
