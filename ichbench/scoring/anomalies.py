"""Warnings beside a score: what is odd about one prediction. They never change a number.

Every check in `CHECKS` returns None, or what was found, what it may mean and what to do, and the numbers. The limits are
the constants below, each with its reason. What a reference shows to be right is not odd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError
from ichbench.scoring.head import find_head
from ichbench.scoring.overlap import Counts, MaskArray, as_mask, dice
from ichbench.scoring.score import Measured, measure
from ichbench.scoring.surface import hausdorff, surface_record

#: Less is 50 voxels of 0.45 x 0.45 x 5 mm, which two readers would not agree on; more is a fifth of the skull's content.
PLAUSIBLE_ML = (0.05, 300.0)
#: A speck is a block of 3 x 3 x 3 voxels at most and less than a plausible bleed; a single voxel always is one. Specks that
#: overlap the reference this well (Dice) found something small and guard nothing.
SPECK_VOXELS, SPECK_HIT_DICE = 27, 0.1
#: An outline encloses at least so many times its own voxels: a circle one voxel wide does from radius 12 voxels on. The most
#: hollow slice in 56 masks of edema and clots on head CT, a ring of edema, encloses 3.0 times (and goes on in other slices).
OUTLINE_HOLLOW = 6.0
#: HD must fall by two thick slices without the specks; less is how far two readers disagree.
SPECK_DROP_MM = 10.0
#: More far specks than this are noise all over the volume: what a network leaves beside a bleed can be counted on the fingers.
NOISE_SPECKS = 20
#: A flip must raise Dice by so much, and to so much. Masks of other patients pass in 2 % of 4454 pairs of phantoms and in none
#: of 560 pairs of real masks; without FLIP_DICE it would be 9 % and 1 %.
FLIP_MARGIN, FLIP_DICE = 0.25, 0.5
#: Too much lies outside the head: this part of the prediction, or the smallest plausible bleed.
OUTSIDE_SHARE = 0.01

_AXES = ("z", "y", "x")
_WAYS = {"L": "left-right", "R": "left-right", "P": "front-back", "A": "front-back", "I": "top-bottom", "S": "top-bottom"}
Places = NDArray[np.intp]
Finding = tuple[str, dict[str, float]]


@dataclass(frozen=True)
class Anomaly:
    """One warning. kind: a key of CHECKS; text: for a person; evidence: the numbers in it."""

    kind: str
    text: str
    evidence: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True, eq=False)
class Checked:
    """One prediction with foreground, and what the checks need; no reference is an empty one. Inputs: `find_anomalies`.

    pair                      both masks in the order (z, y, x), with their counts and surfaces
    targets_zyx, places_zyx   (3, n) indices of the foreground of reference and prediction, in C order
    component, sizes          number of the 26-connected component of each predicted voxel; voxels of each component
    """

    pair: Measured
    image_hu: NDArray[Any] | None
    hd_mm: float | None
    axis_codes_zyx: str
    targets_zyx: Places
    places_zyx: Places
    component: Places
    sizes: Places

    @property
    def specks(self) -> NDArray[np.bool_]:
        return self.sizes <= max(1, min(SPECK_VOXELS, int(PLAUSIBLE_ML[0] / self.pair.voxel_ml)))

    @cached_property
    def head(self) -> tuple[MaskArray, tuple[int, ...]] | None:
        return None if self.image_hu is None else find_head(self.image_hu, self.pair.spacing_mm, self.pair.voxel_ml)


def find_anomalies(
    reference_zyx: Any | None, predicted_zyx: Any, spacing_zyx_mm: Sequence[float], image_hu_zyx: Any | None = None, *,
    hd_mm: float | None = None, axis_codes_zyx: str = "SPL", voxel_ml: float | None = None,
) -> tuple[Anomaly, ...]:  # fmt: skip
    """What is odd about a prediction, in the order of CHECKS, at most one of each kind. An empty one is not odd but empty.

    reference_zyx    mask of the same shape, or None: then the checks that compare say nothing
    predicted_zyx    mask as `score_masks` takes it; every label above 0 is foreground
    spacing_zyx_mm   voxel edges; axis 0 is the slice axis
    image_hu_zyx     the CT in HU, or None: then nothing is said about the head
    hd_mm            the Hausdorff distance (100 %) of the pair where it is known; saves time when a far speck is found
    axis_codes_zyx   `Grid.axis_codes_zyx`, to name the direction of a flip
    voxel_ml         volume of a voxel where it is not the product of the edges (a sheared grid, `Grid.voxel_ml`)

    The inputs are not changed. InputError unless they are masks and an image on one grid.
    """
    predicted = as_mask(predicted_zyx, "the prediction")
    reference = np.zeros(predicted.shape, dtype=bool) if reference_zyx is None else reference_zyx
    pair = measure(reference, predicted, spacing_zyx_mm, voxel_ml=voxel_ml)
    image = None if image_hu_zyx is None else np.asarray(image_hu_zyx)
    if image is not None and (image.dtype.kind not in "iuf" or image.shape != predicted.shape):
        raise InputError(f"the image has shape {image.shape} and type {image.dtype}; HU on the masks' grid {predicted.shape} are needed")
    if not pair.counts.predicted:
        return ()
    targets, places = (np.array(np.unravel_index(np.flatnonzero(mask), mask.shape)) for mask in (pair.reference, pair.predicted))
    component = components(places)
    checked = Checked(pair, image, hd_mm, axis_codes_zyx, targets, places, component, np.bincount(component))
    found = {kind: finding for kind, check in CHECKS.items() if (finding := check(checked)) is not None}
    return tuple(Anomaly(kind, text, {name: float(n) for name, n in evidence.items()}) for kind, (text, evidence) in found.items())


def guard_blob(checked: Checked) -> Finding | None:
    """A drawn outline, or nothing but specks: foreground that makes an infinite Hausdorff distance finite.

    An outline is a component within one slice that encloses OUTLINE_HOLLOW times its own voxels. The docker of Viola-Unet (main.py in
    github.com/samleoqh/Viola-Unet) draws a circle of radius 100 voxels into a mask that would be empty; its authors call it a warning.
    """
    outlines, total = _outlines(checked), checked.pair.counts.predicted
    voxels = int(checked.sizes[outlines].sum()) if outlines else total
    numbers = {"voxels": voxels, "ml": voxels * checked.pair.voxel_ml, "share": voxels / total}
    size = f"({voxels} voxel(s), {numbers['ml']:.3g} ml)"
    # beside an empty reference the distance stays infinite, and the foreground guards nothing
    guards = "read this case as an empty prediction"
    if checked.pair.counts.reference:
        guards = f"it only turns an infinite Hausdorff distance into a finite one; {guards}"
    if outlines:
        first = int(checked.places_zyx[0][np.isin(checked.component, outlines)].min())
        text = f"{len(outlines)} closed outline(s) one slice thick {size}, the first on slice {first}: circles and boxes drawn by "
        text += f"hand or program, not bleeds. {f'Nothing else is there: {guards}' if voxels == total else 'Take it out of the mask'}"
        return text, numbers | {"outlines": len(outlines), "slice": first}
    if not checked.specks.all() or dice(checked.pair.counts) >= SPECK_HIT_DICE:
        return None
    n = checked.sizes.size
    return f"nothing but {n} speck(s) {size} is predicted, too little for a bleed: {guards}", numbers | {"specks": n}


def touches_border(checked: Checked) -> Finding | None:
    """Foreground in the first or last row or column of the picture, where the reference has none."""
    return _touched(checked, (1, 2), "no brain reaches the border. Look for padding taken for blood and masks pasted at the wrong place")


def touches_end_slice(checked: Checked) -> Finding | None:
    """Foreground in the first or last slice, where the reference has none; real where the scan ends inside a bleed."""
    return _touched(checked, (0,), "this is real only where the scan ends inside a bleed. Look there for bone taken for blood")


def implausible_volume(checked: Checked) -> Finding | None:
    """A volume outside PLAUSIBLE_ML, unless the reference is beyond the same limit."""
    low, high = PLAUSIBLE_ML
    reference_ml, ml = checked.pair.counts.reference * checked.pair.voxel_ml, checked.pair.counts.predicted * checked.pair.voxel_ml
    if low <= ml <= high or (ml < low and 0 < reference_ml < low) or (ml > high and reference_ml > high):
        return None
    advice = "it may be noise, so look at it" if ml < low else "check the spacing in the header, the threshold, and for an inverted mask"
    return f"{ml:.3g} ml are predicted, but a bleed has {low:g} to {high:g} ml: {advice}", {"ml": ml}


def outside_head(checked: Checked) -> Finding | None:
    """Predicted voxels where the image shows no head; silent without an image and where no head is found (`no_head`).

    Silent as well if the reference lies outside by as much: then the head was not found rightly, or this is another scan.
    """
    if checked.head is None:
        return None
    head, steps = checked.head
    outside = [~head[tuple(places // np.array(steps)[:, None])] for places in (checked.targets_zyx, checked.places_zyx)]
    _, (ml, share) = sums = [(int(own.sum()) * checked.pair.voxel_ml, int(own.sum()) / max(1, own.size)) for own in outside]
    if [own_ml >= PLAUSIBLE_ML[0] or part >= OUTSIDE_SHARE for own_ml, part in sums] != [False, True]:
        return None
    text = f"{share:.1%} of the prediction ({ml:.3g} ml) lie outside the head, where no bleed is. Check that image and mask are one scan "
    return text + "in one orientation, and cut off what lies outside", {"ml": ml, "share": share}


def no_head(checked: Checked) -> Finding | None:
    """An image without a head, so that `outside_head` had nowhere to look; labels or an empty file given as the CT."""
    if checked.image_hu is None or checked.head is not None:
        return None
    return "no head was found in the image: voxels outside the head were not looked for. Check that it is the CT, in HU", {}


def flipped(checked: Checked) -> Finding | None:
    """A prediction whose Dice rises by FLIP_MARGIN, to FLIP_DICE or more, when axes are reversed (any of the seven ways)."""
    counts, shape = checked.pair.counts, checked.pair.predicted.shape
    given, needed = dice(counts), max(dice(counts) + FLIP_MARGIN, FLIP_DICE)
    if dice(Counts(counts.reference, counts.predicted, min(counts.reference, counts.predicted))) < needed:
        return None  # no arrangement of these voxels could be that much better
    strides = (shape[1] * shape[2], shape[2], 1)
    ways = [(at * step, (n - 1 - at) * step) for at, n, step in zip(checked.places_zyx, shape, strides, strict=True)]
    flat, best, axes = checked.pair.reference.reshape(-1), counts.both, (False, False, False)
    # fewest axes first, and a tie is no gain: what is symmetric along an axis is not said to be flipped along it
    for z, y, x in sorted(product((False, True), repeat=3), key=sum):
        both = int(np.count_nonzero(flat[ways[0][z] + ways[1][y] + ways[2][x]]))
        if both > best:
            best, axes = both, (z, y, x)
    after = dice(Counts(counts.reference, counts.predicted, best))
    if after < needed:
        return None
    names = [f"{axis} ({_WAYS.get(code, '?')})" for axis, code, on in zip(_AXES, checked.axis_codes_zyx, axes, strict=False) if on]
    text = f"with {' and '.join(names)} reversed the prediction would have Dice {after:.3f} instead of {given:.3f}: it may be stored "
    text += "mirrored or with its slices in reverse order. Check axis order and affine where the mask is written"
    return text, {"dice": given, "dice_flipped": after} | {f"flip_{axis}": on for axis, on in zip(_AXES, axes, strict=True)}


def speck_far(checked: Checked) -> Finding | None:
    """Specks far from the reference, beside other foreground, that alone make the Hausdorff distance large."""
    from scipy.spatial import cKDTree

    specks = checked.specks
    if not specks.any() or not checked.targets_zyx.size:
        return None
    spacing_mm = np.asarray(checked.pair.spacing_mm)[:, None]
    chosen = specks[checked.component]
    # at most 20,000 voxels of the reference: a distance may come out a little long here, and HD itself decides below
    targets_mm = checked.targets_zyx[:, :: 1 + checked.targets_zyx.shape[1] // 20_000] * spacing_mm
    nearest_mm, _ = cKDTree(targets_mm.T, balanced_tree=False).query((checked.places_zyx[:, chosen] * spacing_mm).T)
    # between surfaces it is no farther than between the centres of voxels: like corners of two voxels are as far apart
    far = np.bincount(checked.component[chosen], nearest_mm >= SPECK_DROP_MM, specks.size) > 0
    if not far.any():
        return None
    gone, without = far[checked.component], checked.pair.predicted.copy()
    without[tuple(checked.places_zyx[:, gone])] = False
    after_mm = hausdorff(surface_record(checked.pair.reference, without, checked.pair.spacing_mm), 100)
    before_mm = checked.hd_mm or hausdorff(checked.pair.surfaces, 100)
    if not before_mm - after_mm >= SPECK_DROP_MM:
        return None
    size = f"{far.sum()} far speck(s) ({gone.sum()} voxel(s))"
    if far.sum() > NOISE_SPECKS:
        text = f"{size} are strewn over the volume: this is noise, because of which the Hausdorff distance is {before_mm:.1f} instead of "
        text += f"{after_mm:.1f} mm. Look at the probabilities and at the threshold"
    else:
        text = f"removing {size} would lower the Hausdorff distance from {before_mm:.1f} to {after_mm:.1f} mm. "
        text += "Removing small components may pay off; try it on cases that are not scored here"
    return text, {"specks": far.sum(), "voxels": gone.sum(), "hd_mm": before_mm, "hd_without_mm": after_mm}


#: Every check, in the order of the warnings.
CHECKS: dict[str, Callable[[Checked], Finding | None]] = {
    "guard_blob": guard_blob, "touches_border": touches_border, "touches_end_slice": touches_end_slice,
    "implausible_volume": implausible_volume, "outside_head": outside_head, "no_head": no_head, "flipped": flipped, "speck_far": speck_far,
}  # fmt: skip


def components(places_zyx: Places) -> Places:
    """The 26-connected component (0, 1, ...) of each voxel of a mask with foreground, given its indices (3, n).

    Of empty planes only the first after a used one is kept, which joins and parts nothing and makes far specks cheap.
    """
    from scipy import ndimage

    used = [np.bincount(at) > 0 for at in places_zyx]
    moved = tuple((np.cumsum(own | np.roll(own, 1)) - 1)[at] for own, at in zip(used, places_zyx, strict=True))
    mask = np.zeros([int(at.max()) + 1 for at in moved], dtype=bool)
    mask[moved] = True
    return np.asarray(ndimage.label(mask, np.ones((3, 3, 3)))[0][moved] - 1, dtype=np.intp)


def _outlines(checked: Checked) -> list[int]:
    """Numbers of the components that are outlines and do not lie, by half or more, on the reference."""
    from scipy import ndimage

    first = np.cumsum(checked.sizes) - checked.sizes
    places = checked.places_zyx[:, np.argsort(checked.component, kind="stable")]
    low, high = np.minimum.reduceat(places, first, axis=1), np.maximum.reduceat(places, first, axis=1)
    extent = high - low + 1  # an outline and what it encloses fit into its box, which leaves next to nothing to look at
    candidates = (extent[0] == 1) & (extent[1] * extent[2] >= (1 + OUTLINE_HOLLOW) * checked.sizes)
    found: list[int] = []
    for number in np.flatnonzero(candidates).tolist():
        z, y, x = places[:, first[number] : first[number] + checked.sizes[number]]
        picture = np.zeros(extent[1:, number], dtype=bool)
        picture[y - low[1, number], x - low[2, number]] = True
        enclosed = np.count_nonzero(ndimage.binary_fill_holes(picture)) - z.size
        if enclosed >= OUTLINE_HOLLOW * z.size and 2 * np.count_nonzero(checked.pair.reference[z, y, x]) < z.size:
            found.append(number)
    return found


def _touched(checked: Checked, axes: Sequence[int], text: str) -> Finding | None:
    found: dict[str, int] = {}
    for axis, end in product(axes, (0, -1)):
        last = checked.pair.predicted.shape[axis] - 1
        voxels = int(np.count_nonzero(checked.places_zyx[axis] == (last if end else 0)))
        # along an axis of one or two planes everything is at the border
        if voxels and last >= 2 and not checked.pair.reference.take(end, axis).any():
            found[f"{_AXES[axis]}_{'last' if end else 'first'}"] = voxels
    planes = ", ".join(f"{n} voxel(s) on the {name[2:]} {name[0]} plane" for name, n in found.items())
    return (f"the prediction has {planes}: {text}", {**found}) if found else None
