"""Shapes of the phantom whose volume is known: ellipsoids, caps, star-shaped clots and shells under the skull.

All of them live in *head millimetres*: x to the patient's left, y to the back, z to the top, the origin in the middle of the
skull cavity. `HeadFrame` leads from the image's millimetres to head millimetres and on to the *skull coordinates* (u, v, w), in
which the cavity is the unit ball: x = a (1 + egg v) u, y = b v, z = c w. The Jacobian is a b c (1 + egg v), so the volume of a
shell under the skull is an integral over directions only.

Everything that decides a voxel uses only + - * / sqrt, rint and comparisons, in float64, and every drawn number is rounded,
so that the voxels come out the same on every machine; sines and powers appear only in volumes and in numbers that are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Vector = tuple[float, float, float]

#: Millimetres of one unit of rho, on average over the skull. Layers near the skull are measured with it.
MM_PER_RHO = 73.0
#: Where blood under the skull begins: the dura (1.1 mm) lies between it and the bone.
UNDER_DURA = 0.985


def wave(turns: Array) -> Array:
    """A sine made of parabolas, with period 1 and values in [-1, 1]; exact in IEEE arithmetic, unlike `np.sin`."""
    t = np.rint(turns)
    t = np.subtract(turns, t, out=t)
    value = np.abs(t)
    value *= -16.0
    value += 8.0
    value *= t
    return value


def mean_wave(frequency: float, phase: float) -> float:
    """Mean of `wave(frequency * (m . n) + phase)` over all directions n: m . n is uniform on [-1, 1]."""

    def primitive(turns: float) -> float:
        t = abs(turns - round(turns))
        return 4.0 * t**2 - 16.0 / 3.0 * t**3

    return (primitive(phase + frequency) - primitive(phase - frequency)) / (2.0 * frequency)


def ramp(distance: Array) -> Array:
    """0 below -1/2, 1 above 1/2, straight between: the share of a point-spread that lies on the positive side."""
    share = distance + 0.5
    np.maximum(share, 0.0, out=share)
    return np.asarray(np.minimum(share, 1.0, out=share))


def rotation(half_tangents_xyz: Vector) -> Array:
    """The rotation whose axis times tan(angle / 2) is given, (3, 3), rounded to 12 digits. Needs no sine."""
    x, y, z = half_tangents_xyz
    n = 1.0 + x * x + y * y + z * z
    matrix = [
        [1 + x * x - y * y - z * z, 2 * (x * y - z), 2 * (x * z + y)],
        [2 * (x * y + z), 1 - x * x + y * y - z * z, 2 * (y * z - x)],
        [2 * (x * z - y), 2 * (y * z + x), 1 - x * x - y * y + z * z],
    ]
    return np.asarray(np.round(np.array(matrix) / n, 12))


def unit(vector: Vector | Array) -> Array:
    """The vector at length 1, rounded to 12 digits."""
    v = np.asarray(vector, dtype=np.float64)
    return np.asarray(np.round(v / np.sqrt((v * v).sum()), 12))


def directions(count: int) -> Array:
    """`count` directions spread evenly over the sphere (Fibonacci lattice), (count, 3)."""
    z = 1.0 - (2.0 * np.arange(count) + 1.0) / count
    angle = np.pi * (3.0 - np.sqrt(5.0)) * np.arange(count)
    r = np.sqrt(1.0 - z * z)
    return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)


@dataclass(frozen=True, eq=False)
class HeadFrame:
    """How the head lies in the image, and the size of the skull cavity.

    to_head_3x3  image direction (x, y, z) -> head direction, a rotation
    centre_mm    the head's origin in image millimetres (x, y, z); voxel (0, 0, 0) is at (0, 0, 0)
    scale        image millimetres of one head millimetre (small heads fit into small fields of view)
    a_mm, b_mm, c_mm, egg   half axes of the cavity along x, y, z and how much wider it is at the back
    """

    to_head_3x3: Array
    centre_mm: Vector
    scale: float
    a_mm: float
    b_mm: float
    c_mm: float
    egg: float

    def linear(self, matrix_3x3: Array, origin_mm: Vector | Array, z: Array, y: Array, x: Array) -> tuple[Array, Array, Array]:
        """`matrix @ (head point - origin)` on the image grid z[:], y[:], x[:] (mm), three arrays (z, y, x)."""
        to_head = np.round(np.asarray(matrix_3x3) @ self.to_head_3x3, 12) / self.scale
        start = np.round(np.asarray(matrix_3x3) @ np.asarray(origin_mm, dtype=np.float64), 9)
        parts = []
        for row, first in zip(to_head, start, strict=True):
            along_x, along_y = row[0] * (x - self.centre_mm[0]), row[1] * (y - self.centre_mm[1])
            along_z = row[2] * (z - self.centre_mm[2]) - first
            parts.append((along_z[:, None] + along_y[None, :])[:, :, None] + along_x[None, None, :])
        return parts[0], parts[1], parts[2]

    def head_points(self, z: Array, y: Array, x: Array) -> tuple[Array, Array, Array]:
        """Head millimetres (x, y, z) on the image grid."""
        return self.linear(np.eye(3), (0.0, 0.0, 0.0), z, y, x)

    def skull(self, x_mm: Array, y_mm: Array, z_mm: Array) -> tuple[Array, Array, Array]:
        """Skull coordinates (u, v, w) of head points."""
        v = y_mm / self.b_mm
        return x_mm / (self.a_mm * np.maximum(1.0 + self.egg * v, 0.5)), v, z_mm / self.c_mm

    def from_skull(self, uvw: Array) -> Array:
        """Head points (n, 3) of skull coordinates (n, 3)."""
        u, v, w = uvw.T
        return np.stack([self.a_mm * (1.0 + self.egg * v) * u, self.b_mm * v, self.c_mm * w], axis=1)

    def to_image(self, head_mm: Array) -> Array:
        """Image millimetres (n, 3) as (x, y, z) of head points (n, 3)."""
        return np.asarray(head_mm @ self.to_head_3x3 * self.scale + np.asarray(self.centre_mm))


@dataclass(frozen=True, eq=False)
class Sulci:
    """Where brain ends and CSF begins below each direction: a rim, meandering sulci and the Sylvian fissures.

    Lengths are in units of rho. waves (k, 5): direction, frequency and phase of the functions whose zeros are the sulci.
    """

    waves: Array
    rim: float
    depth: float
    width: float
    sylvian_depth: float

    def depths(self, nx: Array, ny: Array, nz: Array) -> tuple[Array, Array]:
        """Depth of the CSF and of the inner border of the cortex below the direction, both in rho."""
        line = np.zeros_like(nx)
        for mx, my, mz, frequency, phase in self.waves:
            line += wave(frequency * (mx * nx + my * ny + mz * nz) + phase)
        squared = line * line
        narrow, broad = 1.0 / (1.0 + squared / self.width**2), 1.0 / (1.0 + squared / (2.6 * self.width) ** 2)
        side = np.abs(nx)
        height = nz - 0.22 * ny + 0.06
        lateral = ramp((side - 0.80) * 8.0)
        fissure = lateral / (1.0 + (height / 0.055) ** 2) ** 2
        cortex = lateral / (1.0 + (height / 0.11) ** 2) ** 2
        # sulci fade out below, where the skull's surface runs along the slices and would show them as rings
        depth = self.depth * ramp((nz + 0.52) * 4.0)
        csf = self.rim + depth * narrow * narrow + self.sylvian_depth * fissure
        grey = self.rim + 0.045 + (depth + 0.02) * broad * broad + (self.sylvian_depth + 0.03) * cortex
        return csf, grey


class Clot(Protocol):
    """A shape that a bleed fills. `contains` takes flat or gridded head points in mm."""

    def volume_mm3(self) -> float:
        """Volume in cubic head millimetres."""
        ...

    def contains(self, x_mm: Array, y_mm: Array, z_mm: Array) -> Mask:
        """Which of the points lie inside."""
        ...

    def border_mm(self) -> Array:
        """Points (n, 3) spread over the border, head mm."""
        ...


@dataclass(frozen=True, eq=False)
class Star:
    """A star-shaped clot: in the frame of an ellipsoid its radius is r^3 = 1 + sum of waves with zero mean over all directions.

    The volume of such a body is the integral of r^3 / 3 over the directions, so it is exactly that of the ellipsoid.
    waves (k, 6): direction, frequency, phase, amplitude; small enough that r^3 stays positive.
    level: if given, only the part with (y - centre y) > level * (reach of the ellipsoid along y) is kept: a fluid level in a
    supine patient. It needs an ellipsoid without waves, whose cap is known in closed form.
    """

    centre_mm: Vector
    half_axes_mm: Vector
    to_axes_3x3: Array
    waves: Array
    level: float | None = None

    def volume_mm3(self) -> float:
        """4/3 pi a b c, or that of the cap."""
        a, b, c = self.half_axes_mm
        if self.level is None:
            return 4.0 / 3.0 * np.pi * a * b * c
        return float(np.pi * (1.0 - self.level) ** 2 * (2.0 + self.level) / 3.0 * a * b * c)

    @property
    def matrix_3x3(self) -> Array:
        """Head millimetres from the centre -> the frame in which the ellipsoid is the unit ball."""
        return np.asarray(self.to_axes_3x3 / np.asarray(self.half_axes_mm)[:, None])

    def cubed_radius(self, nx: Array, ny: Array, nz: Array) -> Array:
        """r^3 of the border in the direction (nx, ny, nz) of the ellipsoid's frame."""
        total = np.ones_like(nx)
        for mx, my, mz, frequency, phase, amplitude in self.waves:
            total += amplitude * (wave(frequency * (mx * nx + my * ny + mz * nz) + phase) - mean_wave(frequency, phase))
        return total

    def cubed_limits(self) -> tuple[float, float]:
        """Numbers (at most 1, at least 1) between which r^3 lies in all directions."""
        means = [(amplitude, amplitude * mean_wave(f, phase)) for _, _, _, f, phase, amplitude in self.waves]
        return 1.0 - sum(a + m for a, m in means), 1.0 + sum(a - m for a, m in means)

    def contains(self, x_mm: Array, y_mm: Array, z_mm: Array) -> Mask:
        """Which of the points lie inside."""
        x, y, z = x_mm - self.centre_mm[0], y_mm - self.centre_mm[1], z_mm - self.centre_mm[2]
        qx, qy, qz = (row[0] * x + row[1] * y + row[2] * z for row in self.matrix_3x3)
        radius = np.sqrt(qx * qx + qy * qy + qz * qz)
        if self.level is not None:
            reach = np.sqrt(((self.to_axes_3x3[:, 1] * np.asarray(self.half_axes_mm)) ** 2).sum())
            return np.asarray((radius < 1.0) & (y > self.level * reach))
        low, high = self.cubed_limits()
        inside = np.asarray(radius < low)  # low <= r^3 and low <= 1, so low <= r: only the border needs the waves
        near = np.flatnonzero((radius < high) & ~inside)
        r = np.maximum(radius.ravel()[near], 1e-9)
        border = self.cubed_radius(qx.ravel()[near] / r, qy.ravel()[near] / r, qz.ravel()[near] / r)
        inside.ravel()[near] = r * r * r < border
        return inside

    def border_mm(self) -> Array:
        """400 points of the border (of the whole ellipsoid, for a level)."""
        n = directions(400)
        r = np.cbrt(self.cubed_radius(n[:, 0], n[:, 1], n[:, 2]))
        return np.asarray((n * r[:, None] * np.asarray(self.half_axes_mm)) @ self.to_axes_3x3 + np.asarray(self.centre_mm))


@dataclass(frozen=True, eq=False)
class Shell:
    """A clot under the dura, UNDER_DURA - t(n) < rho < UNDER_DURA, around the direction `axes[2]` of skull coordinates.

    kind        subdural: even, tapering at the ends (crescent); epidural: a lens; subarachnoid: fills rim and sulci
    axes_3x3    rows: unit vectors along the skull front to back, upward, and outward at the middle of the clot
    reach       tan(half angle / 2) along the first two axes
    thickness   largest t (ignored by subarachnoid)
    waves       (k, 6) as in `Star`: they make the outline irregular
    """

    kind: str
    frame: HeadFrame
    sulci: Sulci
    axes_3x3: Array
    reach: tuple[float, float]
    thickness: float
    waves: Array

    def depth(self, nx: Array, ny: Array, nz: Array) -> Array:
        """t in the direction n of skull coordinates; 0 outside the clot."""
        front, up, out = (row[0] * nx + row[1] * ny + row[2] * nz for row in self.axes_3x3)
        shrink = 1.0 / np.maximum(1.0 + out, 0.2)  # stereographic: tan(half the angle), without a tangent
        squared = (front * shrink / self.reach[0]) ** 2 + (up * shrink / self.reach[1]) ** 2
        for mx, my, mz, frequency, phase, amplitude in self.waves:
            squared = squared * (1.0 + amplitude * wave(frequency * (mx * nx + my * ny + mz * nz) + phase))
        if self.kind == "epidural":
            return np.asarray(self.thickness * np.maximum(1.0 - squared, 0.0))
        if self.kind == "subdural":
            return np.asarray(self.thickness * np.maximum(1.0 - squared * squared, 0.0))
        return np.asarray((self.sulci.depths(nx, ny, nz)[0] + 0.008) * np.minimum(np.maximum(2.5 * (1.0 - squared), 0.0), 1.0))

    def contains(self, x_mm: Array, y_mm: Array, z_mm: Array) -> Mask:
        """Which of the points lie inside."""
        u, v, w = self.frame.skull(x_mm, y_mm, z_mm)
        rho2 = u * u + v * v + w * w
        inside = np.zeros(rho2.shape, dtype=bool)
        furthest2 = max(self.reach) ** 2 / float(np.prod(1.0 - self.waves[:, 5]))  # tan^2 of half the widest angle
        out = self.axes_3x3[2]
        ahead = out[0] * u + out[1] * v + out[2] * w
        cone = (1.0 - furthest2) / (1.0 + furthest2)
        near = np.flatnonzero((rho2 < UNDER_DURA * UNDER_DURA) & (rho2 > 0.2) & (ahead > cone * np.sqrt(rho2)))
        rho = np.sqrt(rho2.ravel()[near])
        t = self.depth(u.ravel()[near] / rho, v.ravel()[near] / rho, w.ravel()[near] / rho)
        inside.ravel()[near] = rho > UNDER_DURA - t
        return inside

    def _nodes(self, radial: int, angular: int) -> tuple[Array, Array]:
        """Directions (n, 3) and their solid angles (n,) over a disc that holds the whole clot."""
        furthest = 1.0 / float(np.sqrt(np.prod(1.0 - self.waves[:, 5])))  # beyond it the outline's waves cannot reach
        r = (np.arange(radial) + 0.5) / radial * furthest
        angle = (np.arange(angular) + 0.5) / angular * 2.0 * np.pi
        p = (r[:, None] * np.cos(angle) * self.reach[0]).ravel()
        q = (r[:, None] * np.sin(angle) * self.reach[1]).ravel()
        s = 1.0 + p * p + q * q
        cell = self.reach[0] * self.reach[1] * np.repeat(r, angular) * (furthest / radial) * (2.0 * np.pi / angular)
        n = (np.stack([2.0 * p, 2.0 * q, 2.0 - s], axis=1) / s[:, None]) @ self.axes_3x3
        return n, 4.0 / s**2 * cell

    def volume_mm3(self, nodes: int | None = None) -> float:
        """a b c times the integral over directions of the shell's depth, by the midpoint rule on nodes x nodes points.

        The default is good to 1e-5; sulci are narrow and need more nodes than smooth outlines.
        """
        nodes = nodes or (700 if self.kind == "subarachnoid" else 300)
        n, solid_angle = self._nodes(nodes, nodes)
        below = UNDER_DURA - self.depth(n[:, 0], n[:, 1], n[:, 2])
        radial = (UNDER_DURA**3 - below**3) / 3.0 + self.frame.egg * n[:, 1] * (UNDER_DURA**4 - below**4) / 4.0
        return float((radial * solid_angle).sum()) * self.frame.a_mm * self.frame.b_mm * self.frame.c_mm

    def border_mm(self) -> Array:
        """Points of the outer and the inner face."""
        n, _ = self._nodes(28, 48)
        t = self.depth(n[:, 0], n[:, 1], n[:, 2])
        kept, t = n[t > 0], t[t > 0]
        if not len(t):
            kept, t = self.axes_3x3[2:], np.zeros(1)
        return self.frame.from_skull(np.concatenate([kept * UNDER_DURA, kept * (UNDER_DURA - t[:, None])]))
