"""What a NIfTI header says, checked, in the file's own axis order and words. `images.py` turns it into arrays and grids."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from ichbench.cases.case import FloatArray
from ichbench.cases.files import BoundedReader
from ichbench.errors import InputError

#: pixdim and the length of the affine's columns may differ by this much, relative to each other, before we warn.
SPACING_TOLERANCE = 1e-3
#: All that NIfTI says about space except the shape.
GEOMETRY_FIELDS = (
    "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "xyzt_units", "dim_info",
)  # fmt: skip
#: codes of `xyzt_units` that are neither unknown nor mm
OTHER_UNITS = {1: "metres", 3: "microns"}
#: nnU-Net's readers that turn a file on reading, so that its axes run to the right, anterior, superior
NIBABEL_TURNING, ITK_TURNING = "NibabelIOWithReorient", "SimpleITKIOWithReorient"
TURNING_READERS = (NIBABEL_TURNING, ITK_TURNING)
HEADER_BYTES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}


Axes = tuple[int, int, int]
Flips = tuple[bool, bool, bool]


@dataclass(frozen=True)
class FileGeometry:
    """What a header says about space, in file order. `oriented` is false when it says nothing usable about directions."""

    affine_4x4: FloatArray
    spacing_ijk_mm: tuple[float, float, float] | None
    oriented: bool
    complaints: tuple[str, ...]


def read_header(reader: BoundedReader) -> tuple[Any, NDArray[np.uint8]]:
    """The NIfTI header and the first bytes of the file."""
    head = np.zeros(544, dtype=np.uint8)
    head = head[: reader.read_into(head)]
    if not len(head):
        raise InputError(f"{reader.path}: is empty; copy or download it again")
    header = parse_header(head.tobytes())
    if header is None:
        raise InputError(
            f"{reader.path}: is not a NIfTI file (single-file NIfTI-1 or NIfTI-2, .nii or .nii.gz): it starts with "
            f"{head[:8].tobytes()!r}; convert it to NIfTI first"
        )
    return header, head


def parse_header(head: bytes) -> Any | None:
    """A nibabel header in the file's own byte order, or None where this is not single-file NIfTI."""
    for size, kind in HEADER_BYTES.items():
        for order in "<>":
            if len(head) >= size and int(np.frombuffer(head, dtype=f"{order}i4", count=1)[0]) == size:
                header: Any = kind(head[:size], order, False)  # type: ignore[no-untyped-call]
                return header if bytes(header["magic"])[:2] == b"n+" else None
    return None


def shape_ijk_of(path: Path, header: Any) -> tuple[int, int, int]:
    """The shape (i, j, k); trailing axes of one voxel are dropped. `InputError` for 1D, 2D and real 4D files."""
    dim = [int(n) for n in header["dim"]]
    n_dims = dim[0]
    if not 1 <= n_dims <= 7:
        raise InputError(f"{path}: the header claims {n_dims} dimensions; a 3D volume is needed; write the file again from its source")
    shape = dim[1 : n_dims + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        hint = "stack the slices into one volume" if len(shape) < 3 else "write one file per channel or time point"
        raise InputError(f"{path}: has {len(shape)} dimensions {tuple(shape)}, a 3D volume is needed; {hint}")
    if min(shape) < 1:
        raise InputError(f"{path}: the header claims the shape {tuple(shape)}; every axis needs at least one voxel")
    return shape[0], shape[1], shape[2]


def voxel_type(path: Path, header: Any) -> np.dtype[Any]:
    """The stored type in the file's byte order; `InputError` for colours, complex numbers and unknown codes."""
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError) as error:
        raise InputError(f"{path}: unknown NIfTI voxel type {int(header['datatype'])}; write it as int16 or float32") from error
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are {dtype}, not numbers; write one real value per voxel, int16 or float32")
    in_file: np.dtype[Any] = dtype.newbyteorder(header.endianness)
    return in_file


def voxel_offset(path: Path, header: Any) -> int:
    """The byte at which the voxels start in the unpacked file."""
    offset, first = float(header["vox_offset"]), int(header["sizeof_hdr"]) + 4
    if not np.isfinite(offset) or offset != int(offset) or offset < 0:
        raise InputError(f"{path}: voxels are said to start at byte {offset}; {first} or more is allowed; write it again from its source")
    return max(int(offset), first)  # 0 is common and means "right after the header"


def scaling(path: Path, header: Any) -> tuple[float | None, float]:
    """Slope and offset to apply, (None, 0) when the stored values are meant as they are."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):  # NIfTI: "do not scale"
        if slope == 0 and inter != 0 and np.isfinite(inter):
            said = f"its scl_slope is 0, so its scl_inter {inter:g} is not added, as NIfTI says, while ITK and nnU-Net would add it"
            warnings.warn(f"{path}: {said}", UserWarning, stacklevel=3)
        return None, 0.0
    if not np.isfinite(inter):
        raise InputError(f"{path}: scl_inter is {inter}; a finite number is needed; write it again from its source")
    return (None, 0.0) if (slope, inter) == (1.0, 0.0) else (slope, inter)


@np.errstate(invalid="ignore")  # a damaged header may hold signalling NaNs
def geometry_of(header: Any) -> FileGeometry:
    """Affine (sform, else qform, else nibabel's default), voxel size, and what is wrong with them."""
    complaints: list[str] = []
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    pixdim_usable = bool(np.isfinite(pixdim).all() and (pixdim > 0).all())
    spacing = (float(pixdim[0]), float(pixdim[1]), float(pixdim[2])) if pixdim_usable else None
    unit = int(header["xyzt_units"]) & 7
    if unit in OTHER_UNITS:
        complaints.append(
            f"its lengths are said to be in {OTHER_UNITS[unit]}; they are taken as mm, while ITK and nnU-Net would scale them"
        )
    affine: FloatArray | None = None
    for name in ("sform", "qform"):  # sform first, as nibabel does
        if affine is None:
            affine, complaint = _form(header, name)
            complaints += [complaint] if complaint else []
    if affine is None:
        if spacing is None:
            complaints.append(f"its pixdim {pixdim.tolist()} is unusable")
            return FileGeometry(np.eye(4), None, False, tuple(complaints))
        return FileGeometry(np.asarray(header.get_base_affine(), dtype=np.float64), spacing, False, tuple(complaints))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing is None:
        complaints.append(f"its pixdim {pixdim.tolist()} is unusable; the affine's {lengths.tolist()} mm is used")
    elif np.any(np.abs(lengths - pixdim) > SPACING_TOLERANCE * pixdim):
        complaints.append(f"its pixdim says {pixdim.tolist()} mm, its affine {lengths.tolist()} mm (i, j, k); pixdim is used for distances")
    return FileGeometry(affine, spacing, True, tuple(complaints))


def _form(header: Any, name: str) -> tuple[FloatArray | None, str]:
    """The affine "sform" or "qform", None where it is not set, or of no use: then also why."""
    if int(header[f"{name}_code"]) <= 0:
        return None, ""
    try:
        found = np.asarray(getattr(header, f"get_{name}")(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        return None, f"its {name} is unusable ({error})"
    if np.isfinite(found).all() and abs(np.linalg.det(found[:3, :3])) > 1e-12:
        return found, ""
    return None, f"its {name} is unusable {found[:3].tolist()}"


def turn_to_ras(path: object, header: Any | None, affine_ijk: FloatArray, reader: str) -> tuple[Axes, Flips]:
    """Which file axis runs to the right, to anterior and to superior, and which of them run the other way, for nnU-Net's `reader`.

    affine_ijk  (i, j, k) to RAS+ mm; what counts, unless the header says nothing of directions (None: there is no header)
    Raises `InputError` where ITK might take the qform, and it turns the file otherwise than the sform.
    """
    if header is not None and not geometry_of(header).oriented:
        # the libraries differ: nibabel takes NIfTI's default, which runs to the left, ITK its own axes, left and posterior
        y = 1.0 if reader == NIBABEL_TURNING else -1.0
        affine_ijk = np.diag([-1.0, y, 1.0, 1.0])
        said = f"left, {'anterior' if y > 0 else 'posterior'} and superior, as nnU-Net's {reader} takes them"
        warnings.warn(f"{path}: without sform and qform its axes (i, j, k) are taken to run to {said}", UserWarning, stacklevel=5)
    elif header is not None and reader == ITK_TURNING:
        forms = [form for form in (_form(header, name)[0] for name in ("sform", "qform")) if form is not None]
        if len(forms) == 2 and _nearest_axes(forms[0]) != _nearest_axes(forms[1]):
            raise InputError(
                f"{path}: its sform and its qform let its axes run to different sides, and ITK takes now the one, now the other; "
                "set both to what is right"
            )
    return _nearest_axes(affine_ijk)


def _nearest_axes(affine_ijk: FloatArray) -> tuple[Axes, Flips]:
    """The file axis nearest to each world axis, given away by decreasing cosine, and whether it runs against it.

    The rule of nibabel (since 5.4) and ITK; it counts for axes more than about 35 degrees off. A sheared affine is replaced
    by the nearest rotation, as nibabel does.
    """
    left, _, right = np.linalg.svd(affine_ijk[:3, :3] / np.linalg.norm(affine_ijk[:3, :3], axis=0))
    cosines = np.asarray(left @ right)
    axes, left_over = [0, 0, 0], [0, 1, 2]
    for axis in np.argsort(-np.abs(cosines).max(axis=0), kind="stable"):
        world = left_over.pop(int(np.argmax(np.abs(cosines[left_over, axis]))))
        axes[world] = int(axis)
    x, y, z = axes
    return (x, y, z), (bool(cosines[0, x] < 0), bool(cosines[1, y] < 0), bool(cosines[2, z] < 0))
