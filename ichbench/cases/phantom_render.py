"""From a drawn head to voxels: tissues, partial volume, blood, streaks, cupping and noise.

A head is painted slice by slice on several points per voxel and averaged, so thick slices mix what they contain. What lies inside
the skull cavity is kept apart from what lies outside until the end, so that blood replaces brain and never bone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.phantom_bleeds import PHANTOM_SIZES, bleed_points, blood_fraction, sub_centres
from ichbench.cases.phantom_draw import Blob, HeadParameters
from ichbench.cases.phantom_shapes import MM_PER_RHO, UNDER_DURA, Array, HeadFrame, ramp, wave

#: [1 4 6 4 1] / 16, a Gaussian with a standard deviation of one pixel in plane: the grain of a soft reconstruction kernel.
GRAIN = (1.0, 4.0, 6.0, 4.0, 1.0)
AIR_HU, MUSCLE_HU, FAT_HU, TABLE_HU = -1000.0, 48.0, -85.0, 1350.0


@dataclass(frozen=True, eq=False)
class Rendered:
    """image_zyx int16 HU; labels_zyx 1 where at least half of the voxel is blood; per bleed (rendered ml, hard mask ml)."""

    image_zyx: NDArray[np.int16]
    labels_zyx: NDArray[np.int16]
    volumes_ml: tuple[tuple[float, float], ...]


def render_head(head: HeadParameters, rng: np.random.Generator) -> Rendered:
    """Render one head; `rng` makes the noise and the streaks only."""
    outside, share, brain = (np.zeros(head.shape_zyx) for _ in range(3))
    outside += AIR_HU
    box = _head_box(head)
    for k in range(head.shape_zyx[0]):
        here = (k, box[0], box[1])
        outside[here], share[here], brain[here] = _paint_slice(head, k, box)
    blood, blood_hu, volumes = _blood(head)
    hu = outside + brain * (1.0 - np.minimum(blood / np.maximum(share, 1e-9), 1.0)) + blood_hu
    hu += _artefacts(head, rng)
    image = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    return Rendered(image, (blood >= 0.5).astype(np.int16), volumes)


def _head_box(head: HeadParameters) -> tuple[slice, slice]:
    """Rows and columns that can contain the head."""
    frame, spacing = head.frame, head.spacing_zyx_mm
    half = (1.35 * head.skull_mm + head.scalp_mm + 7.0) * frame.scale
    found = []
    for centre, size, step, count in (
        (frame.centre_mm[1], frame.b_mm, spacing[1], head.shape_zyx[1]),
        (frame.centre_mm[0], frame.a_mm * (1.0 + frame.egg), spacing[2], head.shape_zyx[2]),
    ):
        reach = size * frame.scale + half
        found.append(slice(max(int((centre - reach) / step), 0), min(int((centre + reach) / step) + 2, count)))
    return found[0], found[1]


def _paint_slice(head: HeadParameters, k: int, box: tuple[slice, slice]) -> tuple[Array, Array, Array]:
    """Means over the points of each voxel of slice k: HU outside the cavity times its share, share of the cavity, HU inside times share."""
    sub = PHANTOM_SIZES[head.size].anatomy_sub_zyx
    z = sub_centres(k, k + 1, sub[0], head.spacing_zyx_mm[0])
    y = sub_centres(box[0].start, box[0].stop, sub[1], head.spacing_zyx_mm[1])
    x = sub_centres(box[1].start, box[1].stop, sub[2], head.spacing_zyx_mm[2])
    points = head.frame.head_points(z, y, x)
    u, v, w = head.frame.skull(*points)
    rho = np.sqrt(u * u + v * v + w * w)
    inside = _paint_inside(head, points, (u, v, w), rho)
    _paint_blobs(inside, head.inside, head.frame, z, y, x)
    outside = _paint_outside(head, points, (u, v, w), rho)
    _paint_blobs(outside, head.outside, head.frame, z, y, x)
    share = ramp((1.0 - rho) * (MM_PER_RHO / 0.8))
    inside *= share
    outside *= 1.0 - share
    return _mean(outside, sub), _mean(share, sub), _mean(inside, sub)


def _mean(points_zyx: Array, sub: tuple[int, int, int]) -> Array:
    """Mean over the points of each voxel, added in a fixed order (numpy's own sums depend on the processor's width)."""
    total = None
    for k in range(sub[0]):
        for j in range(sub[1]):
            for i in range(sub[2]):
                part = points_zyx[k, j :: sub[1], i :: sub[2]]
                total = part.copy() if total is None else np.add(total, part, out=total)
    return np.asarray(total) / (sub[0] * sub[1] * sub[2])


def _paint_inside(head: HeadParameters, points: tuple[Array, Array, Array], uvw: tuple[Array, Array, Array], rho: Array) -> Array:
    """White matter, cortex, rim and sulci of CSF, cerebellum, falx and tentorium."""
    hu = np.full(rho.shape, head.white_hu)
    near = np.flatnonzero((rho < 1.02) & (rho > 0.52))
    r = rho.ravel()[near]
    csf, cortex = head.sulci.depths(*(c.ravel()[near] / r for c in uvw))
    depth = 1.0 - r
    value = head.white_hu + (head.grey_hu - head.white_hu) * ramp((cortex - depth) * (MM_PER_RHO / 1.5))
    value += (head.csf_hu - value) * ramp((csf - depth) * (MM_PER_RHO / 1.2))
    value += (50.0 - value) * ramp((1.0 - UNDER_DURA - depth) * (MM_PER_RHO / 0.8))
    hu.ravel()[near] = value
    _paint_hindbrain(head, hu, points, rho)
    _paint_falx(head, hu, points, rho)
    return hu


def _paint_hindbrain(head: HeadParameters, hu: Array, points: tuple[Array, Array, Array], rho: Array) -> None:
    """Cerebellum below the tentorium, whose two leaves fall off from a ridge that runs down towards the back."""
    if float(points[2].min()) > 10.0:
        return
    near = np.flatnonzero((points[1] > 8.0) & (points[2] < 10.0) & (rho < 1.0))
    x, y, z = (p.ravel()[near] for p in points)
    side = np.abs(x)
    above = z - (9.0 - 0.30 * (y - 22.0) - 0.62 * side)
    notch = ramp((20.0 - np.sqrt(x * x + (y - 12.0) * (y - 12.0))) / 2.0)
    folia = 33.0 + 3.0 * wave((z + 0.35 * y + 0.2 * side) / 7.0)
    rim = ramp(((1.0 - rho.ravel()[near]) * MM_PER_RHO - 2.5) / 1.5)
    folia += (head.csf_hu - folia) * (1.0 - rim)
    value = hu.ravel()[near]
    behind = ramp((y - 15.0 - 0.30 * side) / 5.0)  # the petrous ridges are the border to the temporal lobes
    value += (folia - value) * ramp(-above / 1.5) * behind
    value += (50.0 - value) * ramp(0.8 - np.abs(above)) * (1.0 - notch) * behind
    hu.ravel()[near] = value


def _paint_falx(head: HeadParameters, hu: Array, points: tuple[Array, Array, Array], rho: Array) -> None:
    """The fissure between the hemispheres with the falx in it and the sagittal sinus at its edge."""
    near = np.flatnonzero((np.abs(points[0]) < 14.0) & (points[2] > -26.0) & (rho < 1.0))
    x, y, z = (p.ravel()[near] for p in points)
    r = rho.ravel()[near]
    off = np.abs(x - head.shift_mm * (1.0 - r * r))
    beyond = np.sqrt(((y - 3.0) / 47.0) ** 2 + ((z - 2.0) / 34.0) ** 2) - 1.0  # in front of, above and behind the corpus callosum
    above_tent = ramp((z - 9.0 + 0.30 * (y - 22.0)) / 2.0)
    there = ramp(beyond * 15.0) * np.where(y > 12.0, above_tent, 1.0)
    fissure = 1.3 + 25.0 * head.sulci.rim * (1.0 + 0.5 * wave(y / 23.0 + z / 31.0))
    value = hu.ravel()[near]
    grey = ramp((fissure + 3.0 - off) / 1.5) * there * (r < 0.97)
    value += np.where(value > head.white_hu - 1.0, (head.grey_hu - value) * grey, 0.0)
    value += (head.csf_hu - value) * ramp((fissure - off) / 1.2) * there
    value += (55.0 - value) * ramp((0.75 - off) / 1.0) * ramp(beyond * 30.0 - 0.6) * np.where(y > 12.0, above_tent, 1.0)
    sinus = np.where((z > 0.0) | (y > 30.0), ramp(((r - 0.915) * MM_PER_RHO - 1.1 * off) / 1.2), 0.0)
    value += (52.0 - value) * sinus
    hu.ravel()[near] = value


def _paint_outside(head: HeadParameters, points: tuple[Array, Array, Array], uvw: tuple[Array, Array, Array], rho: Array) -> Array:
    """Skull with its two tables, muscle, fat, skin and air.

    Below the widest level of the skull the skin does not follow it inward but goes straight down, as face and neck do.
    """
    hu = np.full(rho.shape, AIR_HU)
    u, v, w = uvw
    low = np.maximum(w, 0.0)
    cylinder = rho if float(w.min()) >= 0.0 else np.sqrt(u * u + v * v + low * low)
    near = np.flatnonzero((rho > 0.97) & (cylinder < 1.36))
    r, c = rho.ravel()[near], cylinder.ravel()[near]
    nx, ny, nz = (part.ravel()[near] / r for part in uvw)
    depth = (r - 1.0) * MM_PER_RHO
    bumps = wave(0.9 * nx + 0.6 * ny + 0.7 * nz + 0.2) + wave(0.8 * ny - 1.3 * nz + 0.4)
    thin = 0.30 * ramp((np.abs(nx) - 0.85) * 6.0) + 0.40 * ramp((-0.6 - nz) * 4.0)  # at the temples and below
    skull = head.skull_mm * (1.0 + 0.10 * bumps + 1.12 * np.maximum(np.abs(ny) - 0.75, 0.0) - thin)
    temporal = 7.0 * ramp((0.45 - np.abs(ny + 0.25)) * 4.0) * ramp((0.35 - nz) * 3.0) * ramp((np.abs(nx) - 0.6) * 4.0)
    scalp = head.scalp_mm + temporal * ramp((0.30 - nz) * 3.0)
    below_skin = skull + scalp - (c - 1.0) * MM_PER_RHO
    x, y, z = (part.ravel()[near] for part in points)
    lumps = wave((0.9 * x + 0.4 * y) / 47.0) + wave((0.5 * x - 0.8 * y) / 61.0 + 0.3) + wave((0.9 * z + 0.3 * x + 0.5 * y) / 53.0)
    value = MUSCLE_HU + 2.0 * lumps
    fat = ramp((below_skin - 1.8) / 0.8) * ramp((head.scalp_mm - 0.8 - below_skin) / 0.8)
    deep_fat = ramp((below_skin - 14.0) / 2.0) * ramp((lumps - 0.9) * 4.0)
    value += (FAT_HU - value) * np.maximum(fat, deep_fat)
    bone = TABLE_HU - ramp((depth - 2.0) / 1.2) * ramp((skull - 2.0 - depth) / 1.2) * (720.0 + 160.0 * wave(7.0 * nx + 5.0 * ny + 9.0 * nz))
    value += (bone - value) * ramp((skull - depth) / 0.9)
    value = AIR_HU + (value - AIR_HU) * ramp(below_skin / 0.9)
    hu.ravel()[near] = value
    return hu


def _paint_blobs(hu: Array, blobs: tuple[Blob, ...], frame: HeadFrame, z: Array, y: Array, x: Array) -> None:
    """Paint ellipsoids over `hu`, one after another, each inside its own box of the grid."""
    for blob in blobs:
        half = np.asarray(blob.half_axes_mm) + blob.soft_mm
        reach = np.sqrt(((blob.to_axes_3x3 * half[:, None]) ** 2).sum(axis=0))
        corners = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]) * reach + np.asarray(blob.centre_mm)
        ends = frame.to_image(corners)
        low, high = ends.min(axis=0)[::-1], ends.max(axis=0)[::-1]
        cut = [slice(*np.searchsorted(axis, (low[n], high[n]))) for n, axis in enumerate((z, y, x))]
        part = hu[cut[0], cut[1], cut[2]]
        if part.size == 0:
            continue
        matrix = blob.to_axes_3x3 / np.asarray(blob.half_axes_mm)[:, None]
        p, q, r = frame.linear(matrix, blob.centre_mm, z[cut[0]], y[cut[1]], x[cut[2]])
        edge = min(blob.half_axes_mm) / (2.0 * blob.soft_mm)
        part += (blob.hu - part) * (blob.strength * ramp((1.0 - (p * p + q * q + r * r)) * edge))


def _blood(head: HeadParameters) -> tuple[Array, Array, tuple[tuple[float, float], ...]]:
    """Share of blood in each voxel, blood's HU times that share, and the volumes (rendered, hard mask) of each bleed in ml.

    Where two bleeds overlap, each counts its own volume, and the voxel holds the blood once.
    """
    blood, blood_hu = np.zeros(head.shape_zyx), np.zeros(head.shape_zyx)
    z_mm, y_mm, x_mm = head.spacing_zyx_mm
    voxel_ml = z_mm * y_mm * x_mm / 1000.0
    volumes = []
    for n, bleed in enumerate(head.bleeds):
        sub = bleed_points(bleed.kind, bleed.scaled_ml * head.frame.scale**3, head.spacing_zyx_mm, PHANTOM_SIZES[head.size])
        before = tuple(b.shape for b in head.bleeds[:n])
        own, added, box = blood_fraction(bleed.shape, head.frame, head.shape_zyx, head.spacing_zyx_mm, sub, before)
        volumes.append((float(own.sum()) * voxel_ml, float((own >= 0.5).sum()) * voxel_ml))
        grid = (sub_centres(s.start, s.stop, 1, mm) for s, mm in zip(box, head.spacing_zyx_mm, strict=True))
        x, y, z = head.frame.head_points(*grid)
        clumps = wave(x / 19.0 + y / 31.0 + 0.13 * n) + wave(y / 17.0 - z / 23.0) + wave(z / 13.0 + x / 29.0)
        blood[box] += added
        blood_hu[box] += added * (bleed.hu + 2.0 * clumps)
    return blood, blood_hu, tuple(volumes)


def _artefacts(head: HeadParameters, rng: np.random.Generator) -> Array:
    """Cupping, streaks that start at the skull, dark bands between the petrous bones, and grainy noise; HU (z, y, x)."""
    z, y, x = (sub_centres(0, n, 1, mm) for n, mm in zip(head.shape_zyx, head.spacing_zyx_mm, strict=True))
    u, v, w = head.frame.skull(*head.frame.head_points(z, y, x))
    flat = u * u + v * v
    rho2 = flat + w * w
    added = np.asarray(head.cupping_hu * (np.minimum(rho2, 1.2) - 0.5))
    low = ramp((-0.25 - w) * 4.0)
    for _ in range(5):
        p, q = (rng.uniform(-1, 1, 2)).round(4)
        turns, phase, drift = (round(rng.uniform(*between), 4) for between in ((1.0, 3.5), (0.0, 1.0), (-4.0, 4.0)))
        added += head.streak_hu * np.minimum(rho2, 1.0) * (0.45 + 1.6 * low) * wave(turns * (p * u + q * v) + drift * w + phase)
    band = ramp((0.14 - np.abs(v - 0.1 + 0.1 * u)) * 4.0) * ramp((0.75 - np.abs(u)) * 5.0) * low
    added -= 4.5 * head.streak_hu * band * (0.6 + 0.4 * wave(v * 5.0))
    return added + head.noise_hu * (0.8 + 0.25 * np.maximum(1.0 - rho2, 0.0)) * _grain(rng, head.shape_zyx)


def _grain(rng: np.random.Generator, shape_zyx: tuple[int, int, int]) -> Array:
    """Noise of standard deviation 1, correlated over a pixel in plane only; nearly normal, for each voxel mixes 25 even draws."""
    nz, ny, nx = shape_zyx
    white = rng.random((nz, ny + 4, nx + 4)) - 0.5
    white *= np.sqrt(12.0)
    rows = sum(weight * white[:, k : k + ny] for k, weight in enumerate(GRAIN))
    both = sum(weight * np.asarray(rows)[:, :, k : k + nx] for k, weight in enumerate(GRAIN))
    return np.asarray(both) / sum(weight**2 for weight in GRAIN)
