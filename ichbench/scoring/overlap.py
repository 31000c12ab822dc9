"""Masks as they come in, and everything that can be read off three voxel counts.

A mask is a 3D array in any axis order; nothing here depends on it. Foreground is every voxel that is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError

#: Voxel edges outside this range (mm) are a mistake in a header, and their areas would under- or overflow float64.
SPACING_RANGE_MM = (1e-6, 1e6)

LabelArray = NDArray[np.bool_] | NDArray[np.integer[Any]]
MaskArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Counts:
    """Voxels in the reference, in the prediction and in both."""

    reference: int
    predicted: int
    both: int


def count(reference: MaskArray, predicted: MaskArray) -> Counts:
    """Count two boolean masks of one shape."""
    both = np.count_nonzero(reference & predicted)
    return Counts(int(np.count_nonzero(reference)), int(np.count_nonzero(predicted)), int(both))


def dice(counts: Counts, smooth: float = 0.0) -> float:
    """(2 |P and G| + smooth) / (|P| + |G| + smooth); nan when both masks are empty and nothing smooths.

    `smooth` is 1e-5 in the INSTANCE 2022 scorer: an empty prediction is then not quite 0, two empty masks are 1.
    """
    return _ratio(2.0 * counts.both + smooth, counts.reference + counts.predicted + smooth)


def iou(counts: Counts) -> float:
    """Jaccard index |P and G| / |P or G|; nan when both masks are empty."""
    return _ratio(counts.both, counts.reference + counts.predicted - counts.both)


def sensitivity(counts: Counts) -> float:
    """Part of the reference that was found, |P and G| / |G|; nan for an empty reference."""
    return _ratio(counts.both, counts.reference)


def precision(counts: Counts) -> float:
    """Part of the prediction that is right, |P and G| / |P|; nan for an empty prediction."""
    return _ratio(counts.both, counts.predicted)


def rvd(counts: Counts) -> float:
    """Relative volume difference without its sign, | |P| - |G| | / |G|: unbounded above, 1 for an empty prediction.

    An empty reference gives inf, or nan when the prediction is empty as well (the official script raises on both).
    """
    return abs(_ratio(counts.predicted - counts.reference, counts.reference))


def rvd_signed(counts: Counts) -> float:
    """(|P| - |G|) / |G|: below 0 where too little was segmented. Empty masks as in `rvd`."""
    return _ratio(counts.predicted - counts.reference, counts.reference)


def volume_ml(voxels: int, voxel_ml: float) -> float:
    """Millilitres of so many voxels."""
    return voxels * voxel_ml


def as_labels(array: Any, what: str) -> LabelArray:
    """`array` as a 3D array of bool or integers, without a copy where possible.

    Taken: NumPy arrays and whatever `numpy.asarray` understands, and torch tensors on any device (recognised by their
    methods, torch is not imported). Booleans; integers from 0 up; floats that hold such integers.
    Refused with an InputError that begins with `what`: other shapes, fractions (a probability map must be thresholded
    first; the official script silently truncates one to zero), nan, inf, negative labels, other types.
    """
    values = _to_numpy(array, what)
    if values.ndim != 3:
        raise InputError(f"{what} has shape {values.shape}; a 3D array is needed (a single slice is (1, y, x))")
    kind = values.dtype.kind
    if kind == "b":
        return values
    if kind == "f":
        values = _whole_numbers(values, what)
    elif kind not in "iu":
        raise InputError(f"{what} has type {values.dtype}; allowed are bool, integers, and floats that hold whole numbers")
    if values.dtype.kind == "i" and values.size and int(values.min()) < 0:
        raise InputError(f"{what} contains the label {int(values.min())}; labels are 0 (background) and up")
    return values


def as_mask(array: Any, what: str) -> MaskArray:
    """`as_labels(array, what) != 0`: every label is foreground."""
    labels = as_labels(array, what)
    return np.asarray(labels if labels.dtype == np.bool_ else labels != 0)


def as_spacing(spacing_mm: Any) -> tuple[float, float, float]:
    """Three positive, finite voxel edges in mm as floats, or an InputError."""
    try:
        numbers = tuple(float(value) for value in spacing_mm)
    except (TypeError, ValueError) as error:
        raise InputError(f"the spacing is {spacing_mm!r}; three numbers in mm are needed, one per array axis") from error
    low, high = SPACING_RANGE_MM
    if len(numbers) != 3 or not all(math.isfinite(value) and low <= value <= high for value in numbers):
        raise InputError(f"the spacing is {numbers}; three positive numbers in mm ({low:g} to {high:g}) are needed, one per array axis")
    return numbers[0], numbers[1], numbers[2]


def check_same_shape(reference_shape: Sequence[int], predicted_shape: Sequence[int]) -> None:
    """InputError naming both shapes unless they are equal."""
    if tuple(reference_shape) != tuple(predicted_shape):
        raise InputError(
            f"the reference has shape {tuple(reference_shape)} and the prediction {tuple(predicted_shape)}; "
            "both must lie on the same voxel grid, so bring the prediction back to the grid of the reference first"
        )


def _ratio(above: float, below: float) -> float:
    if below == 0:
        return math.nan if above == 0 else math.copysign(math.inf, above)
    return float(above / below)


def _to_numpy(array: Any, what: str) -> NDArray[Any]:
    for step in ("detach", "cpu"):
        if callable(getattr(array, step, None)):
            array = getattr(array, step)()
    try:
        return np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} is a {type(array).__name__} that NumPy cannot read as an array: {error}") from error


def _whole_numbers(values: NDArray[Any], what: str) -> NDArray[np.int64]:
    """Floats that are whole numbers as int64. Only voxels that are not 0 are looked at: masks are mostly background."""
    found = values[values != 0].astype(np.float64)
    wrong = found[~((found == np.rint(found)) & (np.abs(found) < 2.0**31))]
    if wrong.size:
        raise InputError(
            f"{what} contains the value {float(wrong[0])!r}; a mask holds whole numbers (0 is background), "
            "so threshold a probability map before scoring it"
        )
    return values.astype(np.int64)
