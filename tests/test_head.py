"""Where the head is: its least volume, the coarse grid against the fine one, and pictures that show none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from test_anomalies import CT_MM, MM, ball

from ichbench.scoring.head import find_head


@pytest.mark.parametrize(("planes", "found"), [(19, False), (20, True)])
def test_a_head_has_200_ml_in_one_piece(planes: int, found: bool) -> None:
    """Voxels of 8 mm3, all of them looked at: 25 x 50 x 20 are 200 ml; what lies apart does not help."""
    image = np.full((60, 60, 60), -1000)
    image[5:30, 5:55, 5 : 5 + planes] = 30
    image[40:55, 5:55, 5:20] = 30
    assert (find_head(image, (2.0, 2.0, 2.0), 8e-3) is not None) == found
    assert find_head(image, (2.0, 2.0, 2.0), 9e-3) is not None  # a sheared grid's voxels need not hold the product of their edges
    assert find_head(image, (2.0, 2.0, 2.0), 7e-3) is None


def test_the_coarse_head_is_the_head() -> None:
    """Found on every fourth voxel of 0.45 mm, and on all of them: the same to about two voxels of 2 mm."""
    image = np.full((6, 400, 400), -1000, dtype=np.int16)
    truth = ball(image.shape, (2.5, 200, 190), (1e6, 170, 140))
    image[truth] = 30
    head, steps = find_head(image, CT_MM, 1.0125e-3) or pytest.fail("no head")
    assert steps == (1, 4, 4)
    grown = np.repeat(np.repeat(head, 4, axis=1), 4, axis=2)[:, :400, :400]
    assert grown[truth].all()
    assert not (grown & ~ndimage.binary_dilation(truth, np.ones((1, 17, 17)))).any()


def test_no_head() -> None:
    """Voxels that are no numbers, and a ball of 0.5 ml."""
    assert find_head(np.full((4, 9, 9), np.nan), (40.0, 40.0, 40.0), 64.0) is None
    assert find_head(np.where(ball((20, 200, 200), (10, 90, 90), (5, 5, 5)), 30, -1000), MM, 1e-3) is None
