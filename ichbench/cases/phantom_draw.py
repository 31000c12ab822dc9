"""The law of the phantom: which heads, with which bleeds, on which grid. Nothing is rendered here.

Spacings follow the 100 training scans of INSTANCE 2022 (facts A3: in plane 0.278-0.599 mm with median 0.456, slices 4.3-5.4 mm,
10 of 100 oblique, axes towards left, posterior and superior).
Every drawn number is rounded, so that a case does not depend on the last bit of anyone's mathematics library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ichbench.cases.phantom_bleeds import DRAW, DrawnBleed, Space, phantom_size, uniform, vector, ventricles, waves_table
from ichbench.cases.phantom_shapes import Array, HeadFrame, Star, Sulci, Vector, rotation

#: Chance of what a head bleeds from first; one in eight bleeds from nothing. Intraparenchymal bleeds break into a ventricle in 3 of 10.
FIRST_KIND = {"intraparenchymal": 0.60, "intraventricular": 0.08, "subarachnoid": 0.11, "subdural": 0.12, "epidural": 0.09}
NO_BLEED, INTO_VENTRICLE, OBLIQUE = 0.125, 0.30, 0.10

#: The share of scans with an in-plane spacing (mm) below each knot, straight lines between.
SPACING_QUANTILES = ((0.0, 0.12, 0.30, 0.50, 0.75, 0.93, 1.0), (0.28, 0.42, 0.43, 0.456, 0.4785, 0.50, 0.60))


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


def draw_head(rng: np.random.Generator, size: str) -> HeadParameters:
    """Draw one head with its grid and its bleeds."""
    law = phantom_size(size)
    native_mm = float(np.interp(rng.random(), *SPACING_QUANTILES))
    # float32 numbers, because a NIfTI header holds no others: the case in memory and on disk then have the same spacing
    in_plane = float(np.float32(round(native_mm * 512 / law.matrix, 6)))
    slice_mm = float(np.float32(round(rng.uniform(4.3, 5.4), 3)))
    skull_mm, scalp_mm = uniform(rng, 5.0, 7.5), uniform(rng, 4.5, 7.0)
    a, b, c = uniform(rng, 63, 68), uniform(rng, 80, 86), uniform(rng, 64, 69)
    length_mm = 2.0 * (b + 1.5 * skull_mm + scalp_mm + 4.0)
    scale = round(min(uniform(rng, 0.94, 1.04), 0.97 * in_plane * law.matrix / length_mm), 4)
    tilt = np.eye(3)
    oblique = rng.random() < OBLIQUE
    angles = (rng.choice([-1.0, 1.0]) * uniform(rng, 0.05, 0.11), uniform(rng, -0.03, 0.03), uniform(rng, -0.02, 0.02))
    if oblique:
        tilt = rotation((round(float(angles[0]), 4), angles[1], angles[2]))
    pose = rotation((uniform(rng, -0.04, 0.04), uniform(rng, -0.025, 0.025), uniform(rng, -0.05, 0.05)))
    if law.middle_mm is None:
        slices = int(np.clip(round(uniform(rng, 124, 134) * scale / slice_mm), *law.slices))
        middle = c + skull_mm + scalp_mm - 1.0 - slices * slice_mm / scale / 2.0
    else:
        slices = int(rng.integers(law.slices[0], law.slices[1] + 1))
        middle = law.middle_mm + uniform(rng, -4, 4)
    half = (law.matrix - 1) / 2 * in_plane
    centre = (round(half + uniform(rng, -3, 3) * scale, 3), round(half + uniform(rng, -2, 2) * scale, 3))
    height = round((slices - 1) / 2 * slice_mm - middle * scale, 3)
    frame = HeadFrame(np.round(pose @ tilt, 12), (*centre, height), scale, a, b, c, uniform(rng, 0.06, 0.14))
    age = uniform(rng, 0.0, 1.0)  # 0: tight young brain, 1: wide sulci and ventricles, calcified basal ganglia
    sulci = Sulci(_sulcal_waves(rng), round((1.8 + 2.0 * age) / 73, 5), round(uniform(rng, 11, 16) / 73, 5), round(0.22 + 0.16 * age, 4),
                  round(uniform(rng, 14, 19) / 73, 5))  # fmt: skip
    kinds = _kinds(rng)
    swell = round(1.0 + 0.3 * age + (0.2 if "intraventricular" in kinds else 0.0), 3)
    space = Space(frame, (slices, law.matrix, law.matrix), (slice_mm, in_plane, in_plane))
    bleeds = tuple(b for kind in kinds for b in DRAW[kind](rng, law, space, sulci, swell))
    masses = [b for b in bleeds if b.kind in ("intraparenchymal", "subdural", "epidural")]
    shift = 0.0
    if masses and "intraventricular" not in kinds:
        side = float(np.sign(masses[0].shape.border_mm()[:, 0].mean()))
        shift = round(-side * min(0.09 * masses[0].scaled_ml, 6.0), 3)
    parts = ventricles(swell)
    fluid = [Blob(centre, half, 7.0, axes, soft_mm=1.5) for centre, half, axes in parts]
    inside = [*_edema(bleeds), *_nuclei(), *fluid, *_cisterns(), *_calcifications(rng, age)]
    return HeadParameters(
        size, (slices, law.matrix, law.matrix), (slice_mm, in_plane, in_plane), tilt, frame, sulci,
        tuple(_moved(blob, shift, frame) for blob in inside), tuple(_base(rng, frame)), bleeds,
        uniform(rng, 26, 28), uniform(rng, 36, 38.5), uniform(rng, 6, 10), skull_mm, scalp_mm, shift,
        uniform(rng, 2.0, 4.5), uniform(rng, 0.8, 2.4), uniform(rng, 1.0, 4.0), str(rng.choice(["A", "B"])),
        "+".join(dict.fromkeys(kinds)) or "none",
    )  # fmt: skip


def _kinds(rng: np.random.Generator) -> tuple[str, ...]:
    """The kinds of this head's bleeds, () in one of eight."""
    bleeds, second = rng.random() >= NO_BLEED, rng.random() < INTO_VENTRICLE
    first = str(rng.choice(list(FIRST_KIND), p=list(FIRST_KIND.values())))
    if not bleeds:
        return ()
    return (first, "intraventricular") if first == "intraparenchymal" and second else (first,)


def _sulcal_waves(rng: np.random.Generator) -> Array:
    """(5, 5): waves of 2.0-3.2 turns per unit of direction, so that neighbouring sulci lie 12-18 mm apart."""
    return waves_table(rng, 5, 2.0, 3.2, 1.0)[:, :5]


def _edema(bleeds: tuple[DrawnBleed, ...]) -> list[Blob]:
    """Darker tissue around a clot in the brain."""
    stars = [b.shape for b in bleeds if b.kind == "intraparenchymal" and isinstance(b.shape, Star)]
    return [Blob(s.centre_mm, vector(np.round(np.asarray(s.half_axes_mm) * 1.12 + 3.0, 4)), 19.0, s.to_axes_3x3, 0.75, 5.0) for s in stars]


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
        r = uniform(rng, 2.0, 3.6)
        found.append(Blob((uniform(rng, -1, 1), 29.0, 2.0), (r, r, r + 0.6), uniform(rng, 75, 190), np.eye(3)))
    choroid = rng.random() < 0.3 + 0.5 * age
    for side in (1.0, -1.0):
        r = uniform(rng, 2.2, 4.2)
        spot = Blob((side * 23.0, uniform(rng, 30, 37), 9.0), (r, r + 1.5, r + 1.0), uniform(rng, 60, 160), np.eye(3))
        if choroid and rng.random() < 0.85:
            found.append(spot)
    pallidum, hu = rng.random() < 0.3 * age, uniform(rng, 55, 110)
    if pallidum:
        turns = {side: rotation((0.0, 0.0, side * -0.15)) for side in (1.0, -1.0)}
        found.extend(Blob((side * 20.0, 0.0, 3.0), (3.0, 6.0, 3.5), hu, axes, 0.8, 2.5) for side, axes in turns.items())
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
    wide = uniform(rng, 6, 16)
    return [*found, Blob((uniform(rng, -4, 4), front, -22.0), (wide, 2.6, 9.0), -900.0, np.eye(3))]


def _moved(blob: Blob, shift_mm: float, frame: HeadFrame) -> Blob:
    """The blob pushed sideways by a mass; most in the middle of the head, nothing at the skull."""
    u, v, w = frame.skull(*np.array(blob.centre_mm)[:, None])
    inner = max(1.0 - float((u * u + v * v + w * w)[0]), 0.0)
    x, y, z = blob.centre_mm
    return Blob((round(x + shift_mm * inner, 4), y, z), blob.half_axes_mm, blob.hu, blob.to_axes_3x3, blob.strength, blob.soft_mm)
