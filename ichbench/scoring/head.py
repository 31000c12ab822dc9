"""Where the head is on a CT: for the check that nothing is predicted outside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.scoring.overlap import MaskArray

#: Air and padding (-1000 to -3024 HU) lie below, fat (-100) and all else above; in an image clipped to a window, so far above its minimum.
HEAD_HU, CLIPPED_AIR_HU = -200.0, 10.0
#: The head is looked for on voxels of about 2 mm, which is many times faster. Less than 200 ml, two thick slices, is none.
HEAD_STEP_MM, HEAD_ML = 2.0, 200.0


def find_head(image_hu_zyx: NDArray[Any], spacing_zyx_mm: Sequence[float], voxel_ml: float) -> tuple[MaskArray, tuple[int, ...]] | None:
    """The head on every n-th voxel, one such voxel too wide, and n per axis; None if there is less than HEAD_ML of it.

    The largest part above air, headrests that touch it included, with holes (sinuses, dark brain) filled slice by slice.
    The image is in HU, its first axis that of the slices; `voxel_ml` is the volume of one of its voxels.
    """
    from scipy import ndimage

    steps = tuple(max(1, int(HEAD_STEP_MM / mm)) for mm in spacing_zyx_mm)
    coarse = image_hu_zyx[:: steps[0], :: steps[1], :: steps[2]].astype(np.float64)
    air = float(np.min(coarse, where=np.isfinite(coarse), initial=math.inf))
    label, _ = ndimage.label(coarse > (HEAD_HU if air < HEAD_HU else air + CLIPPED_AIR_HU))
    sizes = np.bincount(label[label > 0], minlength=1)
    if sizes.max() * math.prod(steps) * voxel_ml < HEAD_ML:
        return None
    head = ndimage.binary_fill_holes(label == sizes.argmax(), ndimage.generate_binary_structure(2, 1)[None])
    return ndimage.binary_dilation(head, np.ones((1, 3, 3))), steps
