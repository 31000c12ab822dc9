"""Mask pairs on which scorers differ: knife-edge spacings, empty masks, single voxels, masks at the border.

`ichbench check` scores them beside the board, because the coarse voxels of a small phantom do not feel a tolerance of
0.42 mm. Pairs and spacings: facts, A1 and F.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ichbench.scoring.protocol import PROTOCOLS
from ichbench.scoring.score import Score, rows_for_case

Mask = NDArray[np.bool_]
#: in-plane spacings about the official tolerance, mm; slices are 5 mm apart
SPACINGS_MM = (0.14, 0.21, 0.4, 0.42, 0.43, 0.488)


def probe_pairs() -> Iterator[tuple[str, Mask, Mask]]:
    """(name, reference, prediction) on a grid of 8 x 48 x 48 voxels (z, y, x)."""
    z, y, x = np.ogrid[:8, :48, :48]
    ball = ((z - 3.5) / 2.5) ** 2 + ((y - 22) / 11.0) ** 2 + ((x - 25) / 9.0) ** 2 <= 1
    dented = ball & ~(((y - 14) ** 2 + (x - 25) ** 2) * np.ones_like(z) <= 25)
    speck, border, empty = (np.zeros_like(ball) for _ in range(3))
    speck[4, 40, 41] = True
    border[:3, :9, -7:] = True
    yield "shifted_in_plane", ball, np.roll(ball, 1, axis=2)
    yield "shifted_by_a_slice", ball, np.roll(ball, 1, axis=0)
    yield "dented", ball, dented
    yield "with_a_speck", ball, ball | speck
    yield "one_voxel_each", speck, np.roll(speck, 2, axis=1)
    yield "at_the_border", border, np.roll(border, -2, axis=2)
    yield "perfect", ball, ball
    yield "empty_prediction", ball, empty
    yield "empty_reference", empty, ball
    yield "both_empty", empty, empty


def probe_rows() -> list[Score]:
    """Every pair at every spacing under every protocol; the arm is the protocol, the case `pair@spacing`."""
    return [
        row
        for protocol in PROTOCOLS
        for name, reference, predicted in probe_pairs()
        for spacing in SPACINGS_MM
        for row in rows_for_case(protocol, "-", "-", f"{name}@{spacing}", reference, predicted, (5.0, spacing, spacing), protocol)
    ]
