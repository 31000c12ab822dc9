"""Case -> Prepared, and the exact way back to the native grid.

The order, on (z, y, x) arrays. The paper's flags: window, threshold, in-plane downsampling, slice spacing, slice crop,
slice extension. Then nnU-Net's chain: transpose, crop to nonzero, normalise, resample to the plan's spacing. Last, the
neighbouring slices become channels.

The way back undoes sizes, not grey values: nnU-Net's resampling by nnU-Net's rule, everything else by one linear
interpolation of the logits per axis, then argmax (ties to the lower class). What no prepared voxel shows is background.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case
from ichbench.errors import InputError
from ichbench.prepare.crop import crop_to_nonzero
from ichbench.prepare.downsample import downsample_case, in_plane_ratio, respace_slices
from ichbench.prepare.geometry import FlagGeometry, Floats3, Geometry, Shape
from ichbench.prepare.locations import Location, foreground_locations
from ichbench.prepare.normalize import normalize
from ichbench.prepare.plan import Plan
from ichbench.prepare.resample import resample_image, resample_labels, resampled_shape
from ichbench.prepare.restore import restore, restore_each
from ichbench.prepare.slices import cover, head_range, neighbours, oriented, permuted, reference_range, take_slices
from ichbench.prepare.window import apply_grey_levels, flagged_channel_names, is_ct, warn_constant
from ichbench.recipe import PrepareRecipe

__all__ = [
    "FlagGeometry",
    "Geometry",
    "Prepared",
    "ShearedGridWarning",
    "flagged_case",
    "prepare_case",
    "restore_labels",
    "restore_logits",
    "restore_scores",
    "roundtrip",
]


class ShearedGridWarning(UserWarning):
    """A case's axes are not at right angles: it is prepared as if they were."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case on the working grid.

    image_czyx    float32, normalised; channels as `Plan.channels`, once per neighbouring slice
    labels_zyx    int16 or None; -1 outside the nonzero mask, where there is nothing to learn
    geometry      the way back
    notes         what the preparation complained about, e.g. a constant image
    foreground    label or region -> (n, 3) positions (z, y, x) of some or all of its voxels, for sampling patches
    """

    id: str
    image_czyx: NDArray[np.float32]
    labels_zyx: NDArray[np.int16] | None
    geometry: Geometry
    notes: tuple[str, ...] = ()
    foreground: Mapping[Location, NDArray[np.int32]] = field(default_factory=dict)


def flagged_case(case: Case, recipe: PrepareRecipe, channel_names: Sequence[str] = ("CT",)) -> tuple[Case, FlagGeometry, tuple[str, ...]]:
    """Apply the paper's flags. Returns the new case, the way back, and notes (constant channels).

    channel_names  of the cohort; "CT" (any case) means HU, and the grey-level flags and the head crop act on those only
    """
    if len(channel_names) != len(case.image_czyx):
        raise InputError(f"case {case.id} has {len(case.image_czyx)} channels, but the cohort declares {list(channel_names)}")
    if not np.isfinite(case.image_czyx).all():
        raise InputError(f"case {case.id}: the image holds NaN or infinite values; repair the file before preparing it")
    sheared = _sheared_notes(case)
    working, axes, flips = oriented(case, recipe.reorient) if recipe.reorient else (case, (0, 1, 2), (False, False, False))
    n = working.grid.shape_zyx[0]
    kept = _crop_range(working, recipe, channel_names)
    image, notes = apply_grey_levels(working.image_czyx, recipe, channel_names, case.id)
    flagged = replace(working, image_czyx=np.ascontiguousarray(image, dtype=np.float32))
    ratio = (1.0, 1.0)
    if recipe.downsample != "off":
        ratio = in_plane_ratio(flagged.grid.shape_zyx, recipe.downsample)
        flagged = downsample_case(flagged, recipe.downsample)
    back = np.arange(n, dtype=np.float64)
    if recipe.slice_spacing_mm != "native" or flagged.grid.slice_positions_mm is not None:
        flagged, back = respace_slices(flagged, None if recipe.slice_spacing_mm == "native" else recipe.slice_spacing_mm)
    first, stop = cover(kept, back, flagged.grid.shape_zyx[0])
    extension = 0 if recipe.slice_extension == "off" else recipe.slice_extension
    flagged = take_slices(flagged, first, stop, extension)
    file_order = (0, 1, 2)
    if recipe.compatibility == "nnunet":
        # what a reader of nnU-Net's has turned goes on as it is
        if not isinstance(recipe.reorient, str):
            file_order = _as_shape([flagged.grid.file_axes.index(axis) for axis in (2, 1, 0)])
        flagged = _contiguous(permuted(flagged, file_order))
    slice_back = tuple(float(value) for value in back - first + extension)
    return flagged, FlagGeometry(case.grid.shape_zyx, axes, flips, slice_back, kept, ratio, file_order), (*sheared, *notes)


def prepare_case(case: Case, recipe: PrepareRecipe, plan: Plan, classes: Sequence[Location] | None = None) -> Prepared:
    """A case, ready for the network. With labels it is a training case, without (`labels_zyx=None`) a test case.

    classes  labels and regions whose voxels `Prepared.foreground` lists (`locations.location_classes`); by default the
             labels above 0 that the case has
    """
    flagged, flags, notes = flagged_case(case, recipe, plan.source_channels)
    names = flagged_channel_names(plan.source_channels, recipe)
    if names != plan.channels:
        raise InputError(f"the preparation makes channels {list(names)}, but the plan was made for {list(plan.channels)}; plan again")
    forward = _as_shape(plan.transpose_forward)
    image = flagged.image_czyx.transpose(0, *(axis + 1 for axis in forward))
    labels = None if flagged.labels_zyx is None else flagged.labels_zyx.transpose(forward)
    spacing = _as_floats([flagged.grid.spacing_zyx_mm[axis] for axis in forward])
    cropped, segmentation, box = crop_to_nonzero(image, labels)
    normal = normalize(cropped, segmentation, plan.normalization, plan.use_mask_for_norm, plan.intensities)
    notes += _constant_notes(case.id, cropped, normal, plan)
    new_spacing = _as_floats(plan.spacing if plan.dims == 3 else (spacing[0], *plan.spacing))
    shape = _as_shape(resampled_shape(normal.shape[1:], spacing, new_spacing))
    resampled = resample_image(normal, shape, spacing, new_spacing, order=3, how=plan.resampling)
    geometry = Geometry(flags, forward, _as_shape(image.shape[1:]), box, spacing, shape, new_spacing, plan.resampling)
    channels = np.ascontiguousarray(neighbours(resampled.astype(np.float32, copy=False), plan.neighbour_slices))
    prepared = Prepared(case.id, channels, None, geometry, notes)
    if labels is None:
        return prepared
    resized = resample_labels(segmentation, shape, spacing, new_spacing, plan.resampling)
    new_labels = np.ascontiguousarray(resized.astype(np.int16, copy=False))
    return replace(prepared, labels_zyx=new_labels, foreground=foreground_locations(new_labels, classes))


def restore_logits(logits_czyx: NDArray[np.floating], geometry: Geometry, regions: Sequence[int] | None = None) -> NDArray[np.int16]:
    """Class scores (classes, z, y, x) on the prepared grid -> labels on the native grid, in its axis order.

    regions  for a network of regions: the label that each head writes, in the order in which they write
             (nnU-Net's `regions_class_order`), where the sigmoid of its score is above one half
    Half precision in, half precision compared: nnU-Net resamples in float64 and rounds to the type that came; by torch, in float32.
    """
    if tuple(logits_czyx.shape[1:]) != geometry.shape:
        raise InputError(f"logits have shape {logits_czyx.shape[1:]}, but the case was prepared to {geometry.shape}")
    if regions is not None and len(regions) != len(logits_czyx):
        raise InputError(f"there are scores of {len(logits_czyx)} regions, but labels for {len(regions)}: {list(regions)}")
    return restore(len(logits_czyx), lambda index, rows: logits_czyx[index, rows], geometry, regions)


def restore_scores(scores_czyx: NDArray[np.floating], geometry: Geometry) -> NDArray[np.floating]:
    """Scores (heads, z, y, x) on the prepared grid -> native grid, in its axis order and their own dtype (float32 after torch's
    resampling); NaN where none was seen."""
    if tuple(scores_czyx.shape[1:]) != geometry.shape:
        raise InputError(f"scores have shape {scores_czyx.shape[1:]}, but the case was prepared to {geometry.shape}")
    # nnU-Net's torch resampling computes and leaves single precision
    dtype = scores_czyx.dtype if geometry.resampling == "spline" else np.dtype(np.float32)
    return restore_each(len(scores_czyx), lambda index, rows: scores_czyx[index, rows], geometry, dtype)


def restore_labels(labels_zyx: NDArray[np.integer], geometry: Geometry) -> NDArray[np.int16]:
    """Labels on the prepared grid (-1 counts as background) -> native grid, through their indicators (the ceiling arm)."""
    if tuple(labels_zyx.shape) != geometry.shape:
        raise InputError(f"labels have shape {labels_zyx.shape}, but the case was prepared to {geometry.shape}")
    clean = np.maximum(labels_zyx, 0)
    values = np.unique(np.append(clean, 0))
    best = restore(len(values), lambda index, rows: (clean[rows] == values[index]).astype(np.float32), geometry)
    return np.asarray(values[best], dtype=np.int16)


def roundtrip(case: Case, recipe: PrepareRecipe, plan: Plan) -> NDArray[np.int16]:
    """The case's own mask through preparation and back: the best that any network can score with this preparation."""
    if case.labels_zyx is None:
        raise InputError(f"case {case.id} has no labels; the round trip needs a reference mask")
    prepared = prepare_case(case, recipe, plan)
    assert prepared.labels_zyx is not None  # noqa: S101 - labels in, labels out
    return restore_labels(prepared.labels_zyx, prepared.geometry)


def _crop_range(case: Case, recipe: PrepareRecipe, channel_names: Sequence[str]) -> tuple[int, int]:
    n = case.grid.shape_zyx[0]
    if recipe.slice_crop == "reference":
        return reference_range(case.labels_zyx, n)
    if recipe.slice_crop == "head":
        ct = [index for index, name in enumerate(channel_names) if is_ct(name)]
        if not ct:
            raise InputError(f"prepare.slice_crop = 'head' needs a CT channel, but the channels are {list(channel_names)}; set it to 'off'")
        return head_range(case.image_czyx[ct[0]], case.grid.spacing_zyx_mm)
    return 0, n


def _constant_notes(case_id: str, before: NDArray[np.float32], after: NDArray[np.float32], plan: Plan) -> tuple[str, ...]:
    """Channels that varied and no longer do: the foreground of the training cases has no contrast, and clipping to it erases all."""
    notes = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if new.min() == new.max() and old.min() != old.max():
            facts = plan.intensities.get(str(index), {})
            low, high = facts.get("percentile_00_5", float("nan")), facts.get("percentile_99_5", float("nan"))
            notes.append(
                f"case {case_id}: channel {index} is constant after normalisation, because the training foreground spans only "
                f"[{low:g}, {high:g}] after the flags; before it spanned [{old.min():g}, {old.max():g}]"
            )
            warn_constant(notes[-1])
    return tuple(notes)


def _contiguous(case: Case) -> Case:
    """The same arrays in C order: numpy's float32 mean depends on it, by more than nnU-Net's parity allows where the mean is large."""
    labels = None if case.labels_zyx is None else np.ascontiguousarray(case.labels_zyx)
    return replace(case, image_czyx=np.ascontiguousarray(case.image_czyx), labels_zyx=labels)


def _sheared_notes(case: Case) -> tuple[str, ...]:
    """ITK, and with it nnU-Net, refuses to read such a file; here only spacings are looked at, so it is prepared, with a word."""
    if replace(case.grid, slice_positions_mm=None).is_regular:
        return ()
    direction = case.grid.direction_3x3
    cosine = float(np.abs(direction.T @ direction - np.eye(3)).max())
    note = (
        f"case {case.id}: its axes are {np.degrees(np.arccos(min(cosine, 1.0))):.1f} degrees apart instead of 90 (a sheared affine); it is "
        "prepared as if they were at right angles, so shapes are distorted; nnU-Net refuses such files: resample the case first"
    )
    warnings.warn(note, ShearedGridWarning, stacklevel=3)
    return (note,)


def _as_shape(values: Sequence[int]) -> Shape:
    z, y, x = values
    return int(z), int(y), int(x)


def _as_floats(values: Sequence[float]) -> Floats3:
    z, y, x = values
    return float(z), float(y), float(x)
