"""The law of the phantom's bleeds, and how much of each voxel a clot fills.

Volumes are spread evenly on a log scale. A clot lies wholly inside the skull and inside the picture, so its volume is what the
picture can show of it. Every drawn number is rounded, so that a case does not depend on the last bit of anyone's mathematics library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ichbench.cases.phantom_shapes import Array, HeadFrame, Mask, Shell, Star, Sulci, Vector, rotation, unit
from ichbench.errors import InputError


@dataclass(frozen=True)
class PhantomSize:
    """How finely a phantom is drawn and rendered.

    matrix       voxels along y and x; the field of view is that of a 512 x 512 scan
    slices       fewest and most slices; None of `middle_mm`: as many as the head needs
    middle_mm    head height of the slab's middle, for sizes that show a part of the head
    ml           smallest usual bleed; one in ten may be as small as `rare_ml`
    anatomy_sub_zyx, bleed_sub_zyx   points per voxel at which anatomy and bleeds are evaluated
    """

    matrix: int
    slices: tuple[int, int]
    middle_mm: float | None
    ml: float
    rare_ml: float
    anatomy_sub_zyx: tuple[int, int, int]
    bleed_sub_zyx: tuple[int, int, int]


PHANTOM_SIZES: dict[str, PhantomSize] = {
    "small": PhantomSize(96, (14, 18), 7.0, 3.0, 1.0, (3, 2, 2), (4, 2, 2)),
    "full": PhantomSize(512, (24, 36), None, 0.5, 0.5, (4, 1, 1), (5, 2, 2)),
}


def phantom_size(name: str) -> PhantomSize:
    """The size of that name; `InputError` for any other."""
    if name not in PHANTOM_SIZES:
        raise InputError(f"phantom size is {name!r}, but must be one of {', '.join(PHANTOM_SIZES)}")
    return PHANTOM_SIZES[name]


@dataclass(frozen=True, eq=False)
class DrawnBleed:
    """A clot of one kind and the density of its blood."""

    kind: str
    shape: Star | Shell
    hu: float

    @cached_property
    def scaled_ml(self) -> float:
        """Volume in ml of a head whose scale is 1."""
        return self.shape.volume_mm3() / 1000.0


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 4)


def waves_table(rng: np.random.Generator, count: int, low: float, high: float, total: float) -> Array:
    """(count, 6): random directions, frequencies in [low, high] turns per unit, phases, amplitudes that sum to `total`."""
    rows = []
    for _ in range(count):
        m = unit(rng.normal(size=3))
        frequency = uniform(rng, low, high)
        rows.append([*m, frequency, uniform(rng, 0, 1), 1.0 / frequency])
    table = np.array(rows)
    table[:, 5] = np.round(table[:, 5] * total / table[:, 5].sum(), 6)
    return table


def vector(values: Array | Vector) -> Vector:
    x, y, z = (float(v) for v in values)
    return x, y, z


@dataclass(frozen=True, eq=False)
class Space:
    """Where a bleed may lie: inside the skull and inside the picture."""

    frame: HeadFrame
    shape_zyx: tuple[int, int, int]
    spacing_zyx_mm: tuple[float, float, float]

    @property
    def ml(self) -> float:
        return self.spacing_zyx_mm[0] * self.spacing_zyx_mm[1] * self.spacing_zyx_mm[2] / 1000.0

    def shows(self, border_mm: Array, rho: float | None) -> bool:
        """Are all points in the picture and (unless rho is None) below that rho of the skull?"""
        index = self.frame.to_image(border_mm)[:, ::-1] / np.asarray(self.spacing_zyx_mm)
        if (index < -0.4).any() or (index > np.asarray(self.shape_zyx) - 0.6).any():
            return False
        u, v, w = self.frame.skull(*border_mm.T)
        return rho is None or bool((u * u + v * v + w * w).max() < rho * rho)


def _target_ml(rng: np.random.Generator, law: PhantomSize, high: float) -> float:
    low = law.rare_ml if rng.random() < 0.1 else law.ml
    return round(float(low * (high / low) ** rng.random()), 3)


def _blood_hu(rng: np.random.Generator, low: float = 52.0, high: float = 70.0) -> float:
    return uniform(rng, low, high)


def _intraparenchymal(rng: np.random.Generator, law: PhantomSize, space: Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    ml, side, place = _target_ml(rng, law, 80.0), float(rng.choice([-1, 1])), rng.random()
    if place < 0.35:  # putamen
        centre = np.array([side * 25, uniform(rng, -12, 10), uniform(rng, 0, 12)])
    elif place < 0.55:  # thalamus
        centre = np.array([side * 13, uniform(rng, 6, 16), uniform(rng, 4, 10)])
    elif place < 0.92 or law.middle_mm is not None:  # a lobe
        centre = np.array([side * uniform(rng, 26, 40), uniform(rng, -45, 48), uniform(rng, 8, 36)])
    else:  # cerebellum
        centre = np.array([side * uniform(rng, 12, 22), uniform(rng, 38, 48), uniform(rng, -38, -30)])
    half = np.array([1.0, uniform(rng, 1.05, 1.55), uniform(rng, 0.85, 1.15)])
    axes = rotation((uniform(rng, -0.15, 0.15), uniform(rng, -0.15, 0.15), uniform(rng, -0.25, 0.25)))
    waves, hu = waves_table(rng, 8, 0.45, 1.7, uniform(rng, 0.40, 0.62)), _blood_hu(rng)
    while True:
        half = half * (ml * 1000.0 / (4.0 / 3.0 * np.pi * half.prod())) ** (1.0 / 3.0)
        star = Star(vector(centre), vector(np.round(half, 5)), axes, waves)
        if space.shows(star.border_mm(), 0.965):
            break
        ml, centre = round(ml * 0.975, 3), np.round(centre * 0.94 + np.array([0, 0, 0.6]), 4)
    return [DrawnBleed("intraparenchymal", _settled(rng, star, space, law), hu)]


def _settled(rng: np.random.Generator, star: Star, space: Space, law: PhantomSize) -> Star:
    """Move a clot of 10 ml or more by less than a voxel until its hard mask has its volume within 2 %.

    Thick slices quantise a clot: at 10 ml the voxels that are at least half blood miss the volume by up to 4 %, depending only
    on where the slices happen to cut it. A reference mask that is off by that much is a property of the grid, not of a method.
    """
    true_ml = star.volume_mm3() * space.frame.scale**3 / 1000.0
    if true_ml < 9.9:
        return star
    best, best_error, z, y, x = star, np.inf, *space.spacing_zyx_mm
    sub = bleed_points("intraparenchymal", true_ml, space.spacing_zyx_mm, law)
    moved = star
    for _ in range(60):
        fraction, _, _ = blood_fraction(moved, space.frame, space.shape_zyx, space.spacing_zyx_mm, sub)
        error = abs(float((fraction >= 0.5).sum()) * space.ml / true_ml - 1.0)
        if error < best_error:
            best, best_error = moved, error
        if error < 0.018:
            break
        step = np.round(rng.uniform(-0.5, 0.5, 3) * np.array([x, y, z]) / space.frame.scale, 4)
        moved = Star(vector(np.asarray(star.centre_mm) + step), star.half_axes_mm, star.to_axes_3x3, star.waves)
    return best


def blood_fraction(
    shape: Star | Shell, frame: HeadFrame, shape_zyx: tuple[int, int, int], spacing_zyx_mm: tuple[float, float, float],
    sub_zyx: tuple[int, int, int], without: tuple[Star | Shell, ...] = (),
) -> tuple[Array, Array, tuple[slice, slice, slice]]:  # fmt: skip
    """Share of every voxel that the shape fills, the same without what lies in one of `without`, and the box they are given in.

    The box is slices (z, y, x) of the grid; points are counted on sub_zyx points per voxel.
    """
    border = frame.to_image(shape.border_mm())[:, ::-1] / np.asarray(spacing_zyx_mm)
    first = np.maximum(np.floor(border.min(axis=0) - 0.5 - 2.0 / np.asarray(spacing_zyx_mm)), 0).astype(int)
    last = np.minimum(np.ceil(border.max(axis=0) + 0.5 + 2.0 / np.asarray(spacing_zyx_mm)) + 1, shape_zyx).astype(int)
    box = (slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2]))
    fraction = np.zeros(tuple(np.maximum(last - first, 0)))
    rest = np.zeros_like(fraction) if without else fraction
    y, x = (sub_centres(first[k], last[k], sub_zyx[k], spacing_zyx_mm[k]) for k in (1, 2))
    for k in range(fraction.shape[0]):
        z = sub_centres(first[0] + k, first[0] + k + 1, sub_zyx[0], spacing_zyx_mm[0])
        points = frame.head_points(z, y, x)
        inside: Mask = shape.contains(*points)
        fraction[k] = _counted(inside, sub_zyx)
        if without:
            x_mm, y_mm, z_mm = (p[inside] for p in points)
            inside[inside] = ~np.logical_or.reduce([other.contains(x_mm, y_mm, z_mm) for other in without])
            rest[k] = _counted(inside, sub_zyx)
    return fraction, rest, box


def bleed_points(kind: str, ml: float, spacing_zyx_mm: tuple[float, float, float], law: PhantomSize) -> tuple[int, int, int]:
    """Points per voxel (z, y, x) for one bleed: more for small, thin and flat-topped ones, whose few points would miss the 1 %."""
    z, y, x = law.bleed_sub_zyx
    points = ml * 1000.0 / (spacing_zyx_mm[0] * spacing_zyx_mm[1] * spacing_zyx_mm[2]) * (z * y * x)
    if points < 2000 or kind == "intraventricular":
        return z + 1, 2 * y + 1, 2 * x + 1
    return (z + 1, y + 1, x + 1) if points < 8000 or kind == "subarachnoid" else (z, y, x)


def _counted(inside: Mask, sub_zyx: tuple[int, int, int]) -> Array:
    """Share of the points of each voxel (y, x) of one slice that are inside; `inside` is (sub z, y * sub y, x * sub x)."""
    counts = np.zeros((inside.shape[1] // sub_zyx[1], inside.shape[2] // sub_zyx[2]))
    for j in range(sub_zyx[1]):
        for i in range(sub_zyx[2]):
            counts += inside[:, j :: sub_zyx[1], i :: sub_zyx[2]].sum(axis=0)
    return counts / (sub_zyx[0] * sub_zyx[1] * sub_zyx[2])


def sub_centres(first: int, last: int, sub: int, spacing_mm: float) -> Array:
    """Centres (mm) of `sub` equal parts of each voxel first..last-1; voxel 0 has its centre at 0."""
    return np.asarray((np.arange(first * sub, last * sub) + 0.5) / sub - 0.5) * spacing_mm


def ventricles(swell: float) -> list[tuple[Vector, Vector, Array]]:
    """Centre, half axes and axes of the ellipsoids that make the ventricles; the first six are left and right horn, body, atrium."""
    parts = []
    for side in (1.0, -1.0):
        for centre, half, turn in (
            ((9.5, -22.0, 9.0), (4.0, 12.0, 8.0), 0.13),
            ((11.0, 6.0, 20.0), (5.5, 25.0, 7.0), -0.05),
            ((22.0, 33.0, 9.0), (6.0, 15.0, 9.0), -0.16),
            ((29.0, 2.0, -19.0), (2.5, 11.0, 2.5), 0.0),
        ):
            grown = (half[0] * swell, half[1] * (0.6 + 0.4 * swell), half[2] * swell)
            parts.append(((side * centre[0], centre[1], centre[2]), vector(np.round(grown, 4)), rotation((0.0, 0.0, side * turn))))
    parts.append(((0.0, -1.0, 0.0), vector(np.round((1.6 * swell**2, 12.0, 9.0), 4)), np.eye(3)))
    parts.append(((0.0, 36.0, -34.0), (6.0, 4.0, 8.0), np.eye(3)))
    return parts


def _intraventricular(rng: np.random.Generator, law: PhantomSize, space: Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    """A cast of one lateral ventricle, or a fluid level in both; the third ventricle at times."""
    parts, hu, found = ventricles(swell), _blood_hu(rng), []
    side = int(rng.integers(2)) * 4
    cast, third, level = rng.random() < 0.6, rng.random() < 0.35, uniform(rng, -0.35, 0.15)
    waves = waves_table(rng, 4, 0.6, 1.6, 0.15)
    chosen = [(side, True), (side + 1, True), (2, False), (6, False)] if cast else [(2, False), (6, False)]
    for index, whole in [*chosen, *([(8, True)] if third else [])]:
        centre, half, axes = parts[index]
        found.append(Star(centre, half, axes, waves) if whole else Star(centre, half, axes, np.zeros((0, 6)), level))
    return [DrawnBleed("intraventricular", star, hu) for star in found if space.shows(star.border_mm(), 0.99)]


def _shell(
    rng: np.random.Generator, space: Space, sulci: Sulci, kind: str, ml: float, middle: Vector,
    reach: tuple[float, float], most: tuple[float, float], wobble: float,
) -> Shell:  # fmt: skip
    """A shell around the direction `middle` that shows wholly; its thickness, then its reach, follow from the volume wanted."""
    out = unit(middle)
    up = unit(np.array([0.0, 0.0, 1.0]) - out[2] * out)
    front = unit(np.cross(up, out))
    waves = waves_table(rng, 4, 0.8, 3.0, wobble)
    wide, tall = reach
    want_mm3 = ml * 1000.0 / space.frame.scale**3
    for _ in range(40):
        shell = Shell(kind, space.frame, sulci, np.array([front, up, out]), (round(wide, 4), round(tall, 4)), most[1], waves)
        if not space.shows(shell.border_mm(), None):
            tall *= 0.93
            continue
        if shell.volume_mm3(60) < want_mm3 and wide < 1.15 * reach[0]:
            wide, tall = wide * 1.06, tall * 1.06
            if not space.shows(Shell(kind, space.frame, sulci, shell.axes_3x3, (wide, tall), most[1], waves).border_mm(), None):
                tall /= 1.06
            continue
        if kind == "subarachnoid":
            if shell.volume_mm3(60) < 1.15 * want_mm3 or wide < 0.13:
                return shell
            wide, tall = wide * 0.93, tall * 0.93
            continue
        thin = Shell(kind, space.frame, sulci, shell.axes_3x3, shell.reach, most[0], waves)
        if thin.volume_mm3(60) < want_mm3 or wide < 0.1:
            break
        wide, tall = wide * 0.94, tall * 0.94
    low, high = most
    for _ in range(12):
        shell = Shell(kind, space.frame, sulci, shell.axes_3x3, shell.reach, round((low + high) / 2, 5), waves)
        low, high = (low, shell.thickness) if shell.volume_mm3(60) > want_mm3 else (shell.thickness, high)
    return shell


def _subarachnoid(rng: np.random.Generator, law: PhantomSize, space: Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    side, ml = float(rng.choice([-1, 1])), _target_ml(rng, law, 30.0)
    middle = (side, uniform(rng, -0.35, 0.0), uniform(rng, 0.0, 0.12))
    if rng.random() < 0.4:  # over the convexity instead of the Sylvian fissure
        middle = (side * 0.8, uniform(rng, -0.5, 0.5), uniform(rng, 0.15, 0.4))
    shell = _shell(rng, space, sulci, "subarachnoid", ml, middle, (0.36, 0.26), (0.0, 0.0), 0.3)
    return [DrawnBleed("subarachnoid", shell, _blood_hu(rng, 50.0, 64.0))]


def _subdural(rng: np.random.Generator, law: PhantomSize, space: Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    ml = max(_target_ml(rng, law, 80.0), 5.0)
    middle = (float(rng.choice([-1, 1])), uniform(rng, -0.25, 0.35), uniform(rng, 0.1, 0.35))
    shell = _shell(rng, space, sulci, "subdural", ml, middle, (0.56, 0.34), (0.085, 0.24), 0.2)
    return [DrawnBleed("subdural", shell, _blood_hu(rng))]


def _epidural(rng: np.random.Generator, law: PhantomSize, space: Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    middle = (float(rng.choice([-1, 1])), uniform(rng, -0.5, 0.5), uniform(rng, 0.0, 0.3))
    shell = _shell(rng, space, sulci, "epidural", _target_ml(rng, law, 60.0), middle, (0.24, 0.20), (0.10, 0.42), 0.15)
    return [DrawnBleed("epidural", shell, _blood_hu(rng, 56.0, 72.0))]


#: How a bleed of each kind is drawn: (rng, size, where it may lie, sulci, swelling of the ventricles) -> its clots.
DRAW: dict[str, Callable[[np.random.Generator, PhantomSize, Space, Sulci, float], list[DrawnBleed]]] = {
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
    "subarachnoid": _subarachnoid,
    "subdural": _subdural,
    "epidural": _epidural,
}
