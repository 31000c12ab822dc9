"""The law of the phantom: which heads, which bleeds, on which grid. Nothing is rendered here.

Spacings follow the 100 training scans of INSTANCE 2022 (facts A3: in plane 0.278-0.599 mm with median 0.456, slices 4.3-5.4 mm,
10 of 100 oblique, axes towards left, posterior and superior). Volumes are spread evenly on a log scale.
Every drawn number is rounded, so that a case does not depend on the last bit of anyone's mathematics library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ichbench.cases.phantom_shapes import Array, HeadFrame, Mask, Shell, Star, Sulci, Vector, directions, rotation, unit
from ichbench.errors import InputError

KINDS = ("intraparenchymal", "intraventricular", "subarachnoid", "subdural", "epidural")

#: Chance of what a head bleeds from first; one in eight bleeds from nothing. Intraparenchymal bleeds break into a ventricle in 3 of 10.
FIRST_KIND = {"intraparenchymal": 0.60, "intraventricular": 0.08, "subarachnoid": 0.11, "subdural": 0.12, "epidural": 0.09}
NO_BLEED, INTO_VENTRICLE, OBLIQUE = 0.125, 0.30, 0.10

#: The share of scans with an in-plane spacing (mm) below each knot, straight lines between.
SPACING_QUANTILES = ((0.0, 0.12, 0.30, 0.50, 0.75, 0.93, 1.0), (0.28, 0.42, 0.43, 0.456, 0.4785, 0.50, 0.60))


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


@dataclass(frozen=True, eq=False)
class Blob:
    """An ellipsoid of another tissue. strength: how much of what was there it replaces; soft_mm: width of its edge."""

    centre_mm: Vector
    half_axes_mm: Vector
    hu: float
    to_axes_3x3: Array
    strength: float = 1.0
    soft_mm: float = 1.2


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


@dataclass(frozen=True, eq=False)
class HeadParameters:
    """One drawn head: all that rendering needs besides the seed of the noise."""

    size: str
    shape_zyx: tuple[int, int, int]
    spacing_zyx_mm: tuple[float, float, float]
    tilt_3x3: Array
    frame: HeadFrame
    sulci: Sulci
    inside: tuple[Blob, ...]
    outside: tuple[Blob, ...]
    bleeds: tuple[DrawnBleed, ...]
    white_hu: float
    grey_hu: float
    csf_hu: float
    skull_mm: float
    scalp_mm: float
    shift_mm: float
    noise_hu: float
    streak_hu: float
    cupping_hu: float
    site: str
    subtype: str

    @property
    def is_oblique(self) -> bool:
        """Are the slices tilted against the world's axes?"""
        return not np.array_equal(self.tilt_3x3, np.eye(3))


def phantom_size(name: str) -> PhantomSize:
    """The size of that name; `InputError` for any other."""
    if name not in PHANTOM_SIZES:
        raise InputError(f"phantom size is {name!r}, but must be one of {', '.join(PHANTOM_SIZES)}")
    return PHANTOM_SIZES[name]


def draw_head(rng: np.random.Generator, size: str) -> HeadParameters:
    """Draw one head with its grid and its bleeds."""
    law = phantom_size(size)
    native_mm = float(np.interp(rng.random(), *SPACING_QUANTILES))
    # float32 numbers, because a NIfTI header holds no others: the case in memory and on disk then have the same spacing
    in_plane = float(np.float32(round(native_mm * 512 / law.matrix, 6)))
    slice_mm = float(np.float32(round(rng.uniform(4.3, 5.4), 3)))
    skull_mm, scalp_mm = _uniform(rng, 5.0, 7.5), _uniform(rng, 4.5, 7.0)
    a, b, c = _uniform(rng, 63, 68), _uniform(rng, 80, 86), _uniform(rng, 64, 69)
    length_mm = 2.0 * (b + skull_mm + scalp_mm + 4.0)
    scale = round(min(_uniform(rng, 0.94, 1.04), 0.97 * in_plane * law.matrix / length_mm), 4)
    tilt = np.eye(3)
    oblique = rng.random() < OBLIQUE
    angles = (rng.choice([-1.0, 1.0]) * _uniform(rng, 0.05, 0.11), _uniform(rng, -0.03, 0.03), _uniform(rng, -0.02, 0.02))
    if oblique:
        tilt = rotation((round(float(angles[0]), 4), angles[1], angles[2]))
    pose = rotation((_uniform(rng, -0.04, 0.04), _uniform(rng, -0.025, 0.025), _uniform(rng, -0.05, 0.05)))
    if law.middle_mm is None:
        slices = int(np.clip(round(_uniform(rng, 124, 134) * scale / slice_mm), *law.slices))
        middle = c + skull_mm + scalp_mm - 1.0 - slices * slice_mm / scale / 2.0
    else:
        slices = int(rng.integers(law.slices[0], law.slices[1] + 1))
        middle = law.middle_mm + _uniform(rng, -4, 4)
    half = (law.matrix - 1) / 2 * in_plane
    centre = (round(half + _uniform(rng, -3, 3) * scale, 3), round(half + _uniform(rng, -2, 2) * scale, 3))
    height = round((slices - 1) / 2 * slice_mm - middle * scale, 3)
    frame = HeadFrame(np.round(pose @ tilt, 12), (*centre, height), scale, a, b, c, _uniform(rng, 0.06, 0.14))
    age = _uniform(rng, 0.0, 1.0)  # 0: tight young brain, 1: wide sulci and ventricles, calcified basal ganglia
    sulci = Sulci(_sulcal_waves(rng), round((1.8 + 2.0 * age) / 73, 5), round(_uniform(rng, 11, 16) / 73, 5), round(0.22 + 0.16 * age, 4),
                  round(_uniform(rng, 14, 19) / 73, 5))  # fmt: skip
    kinds = _kinds(rng)
    swell = round(1.0 + 0.3 * age + (0.2 if "intraventricular" in kinds else 0.0), 3)
    space = _Space(frame, (slices, law.matrix, law.matrix), (slice_mm, in_plane, in_plane))
    bleeds = tuple(b for kind in kinds for b in _DRAW[kind](rng, law, space, sulci, swell))
    masses = [b for b in bleeds if b.kind in ("intraparenchymal", "subdural", "epidural")]
    shift = 0.0
    if masses and "intraventricular" not in kinds:
        side = float(np.sign(masses[0].shape.border_mm()[:, 0].mean()))
        shift = round(-side * min(0.09 * masses[0].scaled_ml, 6.0), 3)
    parts = ventricles(swell)
    inside = [*_edema(bleeds), *_nuclei(), *(Blob(p, h, 7.0, m, soft_mm=1.5) for p, h, m in parts), *_cisterns(), *_calcifications(rng, age)]
    return HeadParameters(
        size, (slices, law.matrix, law.matrix), (slice_mm, in_plane, in_plane), tilt, frame, sulci,
        tuple(_moved(blob, shift, frame) for blob in inside), tuple(_base(rng, frame)), bleeds,
        _uniform(rng, 26, 28), _uniform(rng, 36, 38.5), _uniform(rng, 6, 10), skull_mm, scalp_mm, shift,
        _uniform(rng, 2.0, 4.5), _uniform(rng, 0.8, 2.4), _uniform(rng, 1.0, 4.0), str(rng.choice(["A", "B"])),
        "+".join(dict.fromkeys(kinds)) or "none",
    )  # fmt: skip


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 4)


def _kinds(rng: np.random.Generator) -> tuple[str, ...]:
    """The kinds of this head's bleeds, () in one of eight."""
    bleeds, second = rng.random() >= NO_BLEED, rng.random() < INTO_VENTRICLE
    first = str(rng.choice(list(FIRST_KIND), p=list(FIRST_KIND.values())))
    if not bleeds:
        return ()
    return (first, "intraventricular") if first == "intraparenchymal" and second else (first,)


def _waves(rng: np.random.Generator, count: int, low: float, high: float, total: float) -> Array:
    """(count, 6): random directions, frequencies in [low, high] turns per unit, phases, amplitudes that sum to `total`."""
    rows = []
    for _ in range(count):
        m = unit(rng.normal(size=3))
        frequency = _uniform(rng, low, high)
        rows.append([*m, frequency, _uniform(rng, 0, 1), 1.0 / frequency])
    table = np.array(rows)
    table[:, 5] = np.round(table[:, 5] * total / table[:, 5].sum(), 6)
    return table


def _sulcal_waves(rng: np.random.Generator) -> Array:
    """(5, 5): waves of 2.0-3.2 turns per unit of direction, so that neighbouring sulci lie 12-18 mm apart."""
    return _waves(rng, 5, 2.0, 3.2, 1.0)[:, :5]


@dataclass(frozen=True, eq=False)
class _Space:
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
    return _uniform(rng, low, high)


def _intraparenchymal(rng: np.random.Generator, law: PhantomSize, space: _Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    ml, side, place = _target_ml(rng, law, 80.0), float(rng.choice([-1, 1])), rng.random()
    if place < 0.35:  # putamen
        centre = np.array([side * 25, _uniform(rng, -12, 10), _uniform(rng, 0, 12)])
    elif place < 0.55:  # thalamus
        centre = np.array([side * 13, _uniform(rng, 6, 16), _uniform(rng, 4, 10)])
    elif place < 0.92 or law.middle_mm is not None:  # a lobe
        centre = np.array([side * _uniform(rng, 26, 40), _uniform(rng, -45, 48), _uniform(rng, 8, 36)])
    else:  # cerebellum
        centre = np.array([side * _uniform(rng, 12, 22), _uniform(rng, 38, 48), _uniform(rng, -38, -30)])
    half = np.array([1.0, _uniform(rng, 1.05, 1.55), _uniform(rng, 0.85, 1.15)])
    axes = rotation((_uniform(rng, -0.15, 0.15), _uniform(rng, -0.15, 0.15), _uniform(rng, -0.25, 0.25)))
    waves, hu = _waves(rng, 8, 0.45, 1.7, _uniform(rng, 0.40, 0.62)), _blood_hu(rng)
    while True:
        half = half * (ml * 1000.0 / (4.0 / 3.0 * np.pi * half.prod())) ** (1.0 / 3.0)
        star = Star(_vector(centre), _vector(np.round(half, 5)), axes, waves)
        if space.shows(star.border_mm(), 0.965):
            break
        ml, centre = round(ml * 0.975, 3), np.round(centre * 0.94 + np.array([0, 0, 0.6]), 4)
    return [DrawnBleed("intraparenchymal", _settled(rng, star, space, law), hu)]


def _settled(rng: np.random.Generator, star: Star, space: _Space, law: PhantomSize) -> Star:
    """Move a clot of 10 ml or more by less than a voxel until its hard mask has its volume within 2 %.

    Thick slices quantise a clot: at 10 ml the voxels that are at least half blood miss the volume by up to 4 %, depending only
    on where the slices happen to cut it. A reference mask that is off by that much is a property of the grid, not of a method.
    """
    true_ml = star.volume_mm3() * space.frame.scale**3 / 1000.0
    if true_ml < 9.9:
        return star
    best, best_error, z, y, x = star, np.inf, *space.spacing_zyx_mm
    moved = star
    for _ in range(60):
        fraction, _, _ = blood_fraction(moved, space.frame, space.shape_zyx, space.spacing_zyx_mm, law.bleed_sub_zyx)
        error = abs(float((fraction >= 0.5).sum()) * space.ml / true_ml - 1.0)
        if error < best_error:
            best, best_error = moved, error
        if error < 0.018:
            break
        step = np.round(rng.uniform(-0.5, 0.5, 3) * np.array([x, y, z]) / space.frame.scale, 4)
        moved = Star(_vector(np.asarray(star.centre_mm) + step), star.half_axes_mm, star.to_axes_3x3, star.waves)
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
            parts.append(((side * centre[0], centre[1], centre[2]), _vector(np.round(grown, 4)), rotation((0.0, 0.0, side * turn))))
    parts.append(((0.0, -1.0, 0.0), _vector(np.round((1.6 * swell**2, 12.0, 9.0), 4)), np.eye(3)))
    parts.append(((0.0, 36.0, -34.0), (6.0, 4.0, 8.0), np.eye(3)))
    return parts


def _intraventricular(rng: np.random.Generator, law: PhantomSize, space: _Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    """A cast of one lateral ventricle, or a fluid level in both; the third ventricle at times."""
    parts, hu, found = ventricles(swell), _blood_hu(rng), []
    side = int(rng.integers(2)) * 4
    cast, third, level = rng.random() < 0.6, rng.random() < 0.35, _uniform(rng, -0.35, 0.15)
    waves = _waves(rng, 4, 0.6, 1.6, 0.15)
    chosen = [(side, True), (side + 1, True), (2, False), (6, False)] if cast else [(2, False), (6, False)]
    for index, whole in [*chosen, *([(8, True)] if third else [])]:
        centre, half, axes = parts[index]
        found.append(Star(centre, half, axes, waves) if whole else Star(centre, half, axes, np.zeros((0, 6)), level))
    return [DrawnBleed("intraventricular", star, hu) for star in found if space.shows(star.border_mm(), 0.99)]


def _shell(
    rng: np.random.Generator, space: _Space, sulci: Sulci, kind: str, ml: float, middle: Vector, reach: tuple[float, float], most: tuple[float, float], wobble: float
) -> Shell:  # fmt: skip
    """A shell around the direction `middle` that shows wholly; its thickness, then its reach, follow from the volume wanted."""
    out = unit(middle)
    up = unit(np.array([0.0, 0.0, 1.0]) - out[2] * out)
    front = unit(np.cross(up, out))
    waves = _waves(rng, 4, 0.8, 3.0, wobble)
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


def _subarachnoid(rng: np.random.Generator, law: PhantomSize, space: _Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    side, ml = float(rng.choice([-1, 1])), _target_ml(rng, law, 30.0)
    middle = (side, _uniform(rng, -0.35, 0.0), _uniform(rng, 0.0, 0.12))
    if rng.random() < 0.4:  # over the convexity instead of the Sylvian fissure
        middle = (side * 0.8, _uniform(rng, -0.5, 0.5), _uniform(rng, 0.15, 0.4))
    shell = _shell(rng, space, sulci, "subarachnoid", ml, middle, (0.36, 0.26), (0.0, 0.0), 0.3)
    return [DrawnBleed("subarachnoid", shell, _blood_hu(rng, 50.0, 64.0))]


def _subdural(rng: np.random.Generator, law: PhantomSize, space: _Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    ml = max(_target_ml(rng, law, 80.0), 5.0)
    middle = (float(rng.choice([-1, 1])), _uniform(rng, -0.25, 0.35), _uniform(rng, 0.1, 0.35))
    shell = _shell(rng, space, sulci, "subdural", ml, middle, (0.56, 0.34), (0.085, 0.24), 0.2)
    return [DrawnBleed("subdural", shell, _blood_hu(rng))]


def _epidural(rng: np.random.Generator, law: PhantomSize, space: _Space, sulci: Sulci, swell: float) -> list[DrawnBleed]:
    middle = (float(rng.choice([-1, 1])), _uniform(rng, -0.5, 0.5), _uniform(rng, 0.0, 0.3))
    shell = _shell(rng, space, sulci, "epidural", _target_ml(rng, law, 60.0), middle, (0.24, 0.20), (0.10, 0.42), 0.15)
    return [DrawnBleed("epidural", shell, _blood_hu(rng, 56.0, 72.0))]


_DRAW = {
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
    "subarachnoid": _subarachnoid,
    "subdural": _subdural,
    "epidural": _epidural,
}


def _vector(values: Array | Vector) -> Vector:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _edema(bleeds: tuple[DrawnBleed, ...]) -> list[Blob]:
    """Darker tissue around a clot in the brain."""
    stars = [b.shape for b in bleeds if b.kind == "intraparenchymal" and isinstance(b.shape, Star)]
    return [Blob(s.centre_mm, _vector(np.round(np.asarray(s.half_axes_mm) * 1.12 + 3.0, 4)), 19.0, s.to_axes_3x3, 0.75, 5.0) for s in stars]


def _nuclei() -> list[Blob]:
    """Caudate, lentiform nucleus and thalamus, midbrain."""
    found = []
    for side in (1.0, -1.0):
        found.append(Blob((side * 14.0, -17.0, 9.0), (4.5, 8.0, 10.0), 39.0, rotation((0.0, 0.0, side * 0.1))))
        found.append(Blob((side * 25.0, -1.0, 3.0), (6.0, 16.0, 10.0), 38.5, rotation((0.0, 0.0, side * -0.1))))
        found.append(Blob((side * 10.5, 14.0, 4.0), (7.5, 12.0, 9.0), 37.5, rotation((0.0, 0.0, side * -0.2))))
    return [*found, Blob((0.0, 18.0, -16.0), (15.0, 12.0, 12.0), 31.0, np.eye(3), soft_mm=3.0)]


def _cisterns() -> list[Blob]:
    return [
        Blob((0.0, -10.0, -24.0), (13.0, 8.0, 5.0), 9.0, np.eye(3)),
        Blob((0.0, 3.0, -24.0), (8.0, 6.0, 5.0), 9.0, np.eye(3)),
        Blob((0.0, 31.0, -6.0), (10.0, 3.5, 5.0), 9.0, np.eye(3)),
        Blob((17.0, 20.0, -14.0), (2.0, 11.0, 6.0), 9.0, rotation((0.0, 0.0, 0.12))),
        Blob((-17.0, 20.0, -14.0), (2.0, 11.0, 6.0), 9.0, rotation((0.0, 0.0, -0.12))),
    ]


def _calcifications(rng: np.random.Generator, age: float) -> list[Blob]:
    """Bright spots that are no blood: pineal gland, choroid plexus and, in older heads, the globus pallidus."""
    found = []
    if rng.random() < 0.35 + 0.5 * age:
        r = _uniform(rng, 2.0, 3.6)
        found.append(Blob((_uniform(rng, -1, 1), 29.0, 2.0), (r, r, r + 0.6), _uniform(rng, 75, 190), np.eye(3)))
    choroid = rng.random() < 0.3 + 0.5 * age
    for side in (1.0, -1.0):
        r = _uniform(rng, 2.2, 4.2)
        spot = Blob((side * 23.0, _uniform(rng, 30, 37), 9.0), (r, r + 1.5, r + 1.0), _uniform(rng, 60, 160), np.eye(3))
        if choroid and rng.random() < 0.85:
            found.append(spot)
    pallidum, hu = rng.random() < 0.3 * age, _uniform(rng, 55, 110)
    if pallidum:
        found.extend(Blob((side * 20.0, 0.0, 3.0), (3.0, 6.0, 3.5), hu, rotation((0.0, 0.0, side * -0.15)), 0.8, 2.5) for side in (1.0, -1.0))
    return found


def _base(rng: np.random.Generator, frame: HeadFrame) -> list[Blob]:
    """Outside the cavity below the brain: orbits, air in nose, sinuses, mastoids and throat, jaw and first vertebra."""
    nose, front = -frame.b_mm + 8.0, -frame.b_mm - 3.5
    found = [Blob((0.0, nose, -46.0), (11.0, 16.0, 16.0), -850.0, np.eye(3)), Blob((0.0, nose, -46.0), (1.2, 16.0, 14.0), 60.0, np.eye(3))]
    for side in (1.0, -1.0):
        found.append(Blob((side * 31.0, nose - 2.0, -46.0), (17.0, 20.0, 17.0), 700.0, np.eye(3)))
        found.append(Blob((side * 31.0, nose - 4.0, -46.0), (15.0, 20.0, 15.0), -85.0, np.eye(3)))
        found.append(Blob((side * 31.0, nose - 9.0, -46.0), (12.0, 12.0, 12.0), 22.0, np.eye(3)))
        found.append(Blob((side * 60.0, 32.0, -44.0), (11.0, 13.0, 13.0), 650.0, np.eye(3)))
        found.append(Blob((side * 62.0, 32.0, -46.0), (7.0, 8.0, 9.0), -500.0, np.eye(3), 0.8, 3.0))
        found.append(Blob((side * 46.0, -32.0, -76.0), (5.0, 15.0, 26.0), 900.0, rotation((0.0, 0.0, side * 0.1))))
    found.append(Blob((0.0, -18.0, -84.0), (9.0, 8.0, 24.0), -980.0, np.eye(3)))
    found.append(Blob((0.0, 22.0, -88.0), (24.0, 17.0, 22.0), 520.0, np.eye(3)))
    found.append(Blob((0.0, 25.0, -88.0), (9.0, 9.0, 40.0), 25.0, np.eye(3)))
    wide = _uniform(rng, 6, 16)
    return [*found, Blob((_uniform(rng, -4, 4), front, -22.0), (wide, 2.6, 9.0), -900.0, np.eye(3))]


def _moved(blob: Blob, shift_mm: float, frame: HeadFrame) -> Blob:
    """The blob pushed sideways by a mass; most in the middle of the head, nothing at the skull."""
    u, v, w = frame.skull(*(np.float64(value) for value in blob.centre_mm))
    inner = max(1.0 - float(u * u + v * v + w * w), 0.0)
    x, y, z = blob.centre_mm
    return Blob((round(x + shift_mm * inner, 4), y, z), blob.half_axes_mm, blob.hu, blob.to_axes_3x3, blob.strength, blob.soft_mm)
