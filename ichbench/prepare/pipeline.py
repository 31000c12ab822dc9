"""Case -> Prepared, and the exact way back to the native grid.

The order, on (z, y, x) arrays. The paper's flags: window, threshold, in-plane downsampling, slice spacing, slice crop,
slice extension. Then nnU-Net's chain: transpose, crop to nonzero, normalise, resample to the plan's spacing. Last, the
neighbouring slices become channels.

The way back undoes sizes, not grey values: nnU-Net's resampling by nnU-Net's rule, everything else by one linear
interpolation of the logits per axis, then argmax (ties to the lower class). What no prepared voxel shows is background.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.case import Case
from ichbench.errors import InputError
from ichbench.prepare.crop import crop_to_nonzero
from ichbench.prepare.downsample import downsample_case, in_plane_ratio, respace_slices
from ichbench.prepare.normalize import normalize
from ichbench.prepare.plan import Plan
from ichbench.prepare.resample import resample_image, resample_labels, resampled_shape
from ichbench.prepare.resize import interpolate_axis
from ichbench.prepare.slices import cover, head_range, neighbours, oriented, permuted, reference_range, take_slices
from ichbench.prepare.window import apply_grey_levels, flagged_channel_names, is_ct, warn_constant
from ichbench.recipe import PrepareRecipe

Shape = tuple[int, int, int]
Floats3 = tuple[float, float, float]

#: nnU-Net keeps this many locations of a class, or this share of its voxels if that is more
LOCATIONS, LOCATIONS_SHARE, LOCATIONS_SEED = 10_000, 0.01, 1234


@dataclass(frozen=True)
class FlagGeometry:
    """Where the flagged volume lies in the native one.

    native_shape   the case as it came
    axes, flips    working axis k is native axis axes[k], reversed if flips[k] (both trivial unless `reorient`)
    slice_back     for each native slice (in working order) its fractional index in the flagged stack
    kept_slices    (first, last + 1) native slices that the crop kept; extension slices are not among them
    in_plane_ratio native pixel i lies at (i + 0.5) * ratio - 0.5 of the flagged slice, along (y, x)
    file_order     flagged axis k is working axis file_order[k] (trivial unless compatibility = "nnunet")
    """

    native_shape: Shape
    axes: Shape
    flips: tuple[bool, bool, bool]
    slice_back: tuple[float, ...]
    kept_slices: tuple[int, int]
    in_plane_ratio: tuple[float, float]
    file_order: Shape


@dataclass(frozen=True)
class Geometry:
    """All that `restore_logits` needs. The last six are in the plan's axis order; shapes in voxels, spacings in mm."""

    flags: FlagGeometry
    transpose_forward: Shape
    shape_before_crop: Shape
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    spacing_mm: Floats3
    shape: Shape
    new_spacing_mm: Floats3

    @property
    def cropped_shape(self) -> Shape:
        """Voxels inside the box, before resampling."""
        (z0, z1), (y0, y1), (x0, x1) = self.box
        return z1 - z0, y1 - y0, x1 - x0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Geometry:
        """Read what `to_json` wrote."""
        values = {key: _tuples(value) for key, value in table.items() if key != "flags"}
        return cls(flags=FlagGeometry(**{key: _tuples(value) for key, value in table["flags"].items()}), **values)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case on the working grid.

    image_czyx    float32, normalised; channels as `Plan.channels`, once per neighbouring slice
    labels_zyx    int16 or None; -1 outside the nonzero mask, where there is nothing to learn
    geometry      the way back
    notes         what the preparation complained about, e.g. a constant image
    foreground    label -> (n, 3) positions (z, y, x) of some or all of its voxels, for sampling patches
    """

    id: str
    image_czyx: NDArray[np.float32]
    labels_zyx: NDArray[np.int16] | None
    geometry: Geometry
    notes: tuple[str, ...] = ()
    foreground: Mapping[int, NDArray[np.int32]] = field(default_factory=dict)


def flagged_case(case: Case, recipe: PrepareRecipe, channel_names: Sequence[str] = ("CT",)) -> tuple[Case, FlagGeometry, tuple[str, ...]]:
    """Apply the paper's flags. Returns the new case, the way back, and notes (constant channels).

    channel_names  of the cohort; "CT" (any case) means HU, and the grey-level flags and the head crop act on those only
    """
    if len(channel_names) != len(case.image_czyx):
        raise InputError(f"case {case.id} has {len(case.image_czyx)} channels, but the cohort declares {list(channel_names)}")
    if not np.isfinite(case.image_czyx).all():
        raise InputError(f"case {case.id}: the image holds NaN or infinite values; repair the file before preparing it")
    working, axes, flips = oriented(case) if recipe.reorient else (case, (0, 1, 2), (False, False, False))
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
        file_order = _as_shape([flagged.grid.file_axes.index(axis) for axis in (2, 1, 0)])
        flagged = permuted(flagged, file_order)
    slice_back = tuple(float(value) for value in back - first + extension)
    return flagged, FlagGeometry(case.grid.shape_zyx, axes, flips, slice_back, kept, ratio, file_order), notes


def prepare_case(case: Case, recipe: PrepareRecipe, plan: Plan) -> Prepared:
    """A case, ready for the network. With labels it is a training case, without (`labels_zyx=None`) a test case."""
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
    resampled = resample_image(normal, shape, spacing, new_spacing, order=3)
    geometry = Geometry(flags, forward, _as_shape(image.shape[1:]), box, spacing, shape, new_spacing)
    channels = np.ascontiguousarray(neighbours(resampled.astype(np.float32, copy=False), plan.neighbour_slices))
    prepared = Prepared(case.id, channels, None, geometry, notes)
    if labels is None:
        return prepared
    new_labels = np.ascontiguousarray(resample_labels(segmentation, shape, spacing, new_spacing).astype(np.int16, copy=False))
    return replace(prepared, labels_zyx=new_labels, foreground=foreground_locations(new_labels))


def restore_logits(logits_czyx: NDArray[np.floating], geometry: Geometry) -> NDArray[np.int16]:
    """Class scores (classes, z, y, x) on the prepared grid -> labels on the native grid, in its axis order."""
    if tuple(logits_czyx.shape[1:]) != geometry.shape:
        raise InputError(f"logits have shape {logits_czyx.shape[1:]}, but the case was prepared to {geometry.shape}")
    return _restore(len(logits_czyx), lambda index: logits_czyx[index], geometry).astype(np.int16)


def restore_scores(scores_czyx: NDArray[np.floating], geometry: Geometry) -> NDArray[np.floating]:
    """Scores (heads, z, y, x) on the prepared grid -> native grid, in its axis order and their own dtype; NaN where none was seen."""
    if tuple(scores_czyx.shape[1:]) != geometry.shape:
        raise InputError(f"scores have shape {scores_czyx.shape[1:]}, but the case was prepared to {geometry.shape}")
    flags = geometry.flags
    order, places = _back(geometry)
    out = np.full((len(scores_czyx), *(flags.native_shape[axis] for axis in flags.axes)), np.nan, dtype=scores_czyx.dtype)
    for head, score in zip(out, scores_czyx, strict=True):
        head[tuple(slice(first, first + len(position)) for first, position in places)] = _shown(score, geometry, order, places)
    flipped = out[(slice(None), *(slice(None, None, -1) if flip else slice(None) for flip in flags.flips))]
    return np.ascontiguousarray(flipped.transpose(0, *(1 + axis for axis in np.argsort(flags.axes))))


def restore_labels(labels_zyx: NDArray[np.integer], geometry: Geometry) -> NDArray[np.int16]:
    """Labels on the prepared grid (-1 counts as background) -> native grid, through their indicators (the ceiling arm)."""
    if tuple(labels_zyx.shape) != geometry.shape:
        raise InputError(f"labels have shape {labels_zyx.shape}, but the case was prepared to {geometry.shape}")
    clean = np.maximum(labels_zyx, 0)
    values = np.unique(np.append(clean, 0))
    best = _restore(len(values), lambda index: (clean == values[index]).astype(np.float32), geometry)
    return values[best].astype(np.int16)


def roundtrip(case: Case, recipe: PrepareRecipe, plan: Plan) -> NDArray[np.int16]:
    """The case's own mask through preparation and back: the best that any network can score with this preparation."""
    if case.labels_zyx is None:
        raise InputError(f"case {case.id} has no labels; the round trip needs a reference mask")
    prepared = prepare_case(case, recipe, plan)
    assert prepared.labels_zyx is not None  # noqa: S101 - labels in, labels out
    return restore_labels(prepared.labels_zyx, prepared.geometry)


def foreground_locations(labels_zyx: NDArray[np.integer]) -> dict[int, NDArray[np.int32]]:
    """Positions (n, 3) of each label above 0: at most 10,000, or 1 % of its voxels if that is more (nnU-Net's draw)."""
    # nnU-Net's own sample comes from this legacy generator, one for all labels of a case
    generator = np.random.RandomState(LOCATIONS_SEED)
    locations = {}
    for label in np.unique(labels_zyx[labels_zyx > 0]):
        found = np.argwhere(labels_zyx == label)
        wanted = max(min(LOCATIONS, len(found)), int(np.ceil(LOCATIONS_SHARE * len(found))))
        locations[int(label)] = found[generator.choice(len(found), wanted, replace=False)].astype(np.int32)
    return locations


def _restore(n: int, score: Any, geometry: Geometry) -> NDArray[np.intp]:
    """Index of the highest score at each native voxel; score(index) is a map on the prepared grid. Ties: lower index."""
    flags = geometry.flags
    order, places = _back(geometry)
    working_shape = tuple(flags.native_shape[axis] for axis in flags.axes)
    out = np.zeros(working_shape, dtype=np.intp)
    inside = tuple(slice(first, first + len(position)) for first, position in places)
    height: NDArray[np.floating] | None = None
    for index in range(n):
        scores = _shown(score(index), geometry, order, places)
        if height is None:
            height = scores.copy()
            continue
        higher = scores > height
        out[inside][higher] = index
        height[higher] = scores[higher]
    flipped = out[tuple(slice(None, None, -1) if flip else slice(None) for flip in flags.flips)]
    return np.ascontiguousarray(flipped.transpose(np.argsort(flags.axes)))


def _back(geometry: Geometry) -> tuple[list[int], list[tuple[int, NDArray[np.float64]]]]:
    """The prepared axis that is each working axis, and for each working axis what `_place` says."""
    to_working = [geometry.flags.file_order[axis] for axis in geometry.transpose_forward]
    order = [to_working.index(axis) for axis in range(3)]
    return order, [_place(axis, geometry.box[order[axis]], geometry.flags) for axis in range(3)]


def _shown(score_zyx: NDArray[np.floating], geometry: Geometry, order: Sequence[int], places: Sequence[Any]) -> NDArray[np.floating]:
    """One map on the prepared grid, resampled to the native voxels that the box shows, in working order."""
    spacings = geometry.new_spacing_mm, geometry.spacing_mm
    scores: NDArray[np.floating] = resample_image(score_zyx[None], geometry.cropped_shape, *spacings, order=1)[0].transpose(order)
    for axis, (_, position) in enumerate(places):
        if len(position) != scores.shape[axis] or not np.array_equal(position, np.arange(len(position))):
            scores = interpolate_axis(scores, axis, position)
    return scores


def _place(axis: int, span: tuple[int, int], flags: FlagGeometry) -> tuple[int, NDArray[np.float64]]:
    """Along one working axis: the first native voxel that the box shows, and the positions of it and its followers in the box."""
    if axis == 0:
        position = np.asarray(flags.slice_back)
        shown = np.zeros(len(position), dtype=bool)
        shown[slice(*flags.kept_slices)] = True
    else:
        position = (np.arange(flags.native_shape[flags.axes[axis]]) + 0.5) * flags.in_plane_ratio[axis - 1] - 0.5
        shown = np.ones(len(position), dtype=bool)
    shown &= (position >= span[0] - 0.5) & (position < span[1] - 0.5)
    first = int(np.argmax(shown))
    return first, np.clip(position[shown] - span[0], 0, span[1] - span[0] - 1)


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


def _as_shape(values: Sequence[int]) -> Shape:
    z, y, x = values
    return int(z), int(y), int(x)


def _as_floats(values: Sequence[float]) -> Floats3:
    z, y, x = values
    return float(z), float(y), float(x)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
