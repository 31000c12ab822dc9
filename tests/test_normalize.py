"""Each normalisation by its formula, chosen by channel name."""

from __future__ import annotations

import numpy as np
import pytest

from ichbench.errors import InputError
from ichbench.prepare.normalize import NORMALIZERS, SCHEME_OF_CHANNEL, normalize, scheme_of

FACTS = {"0": {"percentile_00_5": -5.0, "percentile_99_5": 90.0, "mean": 40.0, "std": 12.0}}
INSIDE = np.zeros((3, 4, 5), dtype=np.int16)


def image() -> np.ndarray:
    return np.random.default_rng(0).normal(40, 60, (1, 3, 4, 5)).astype(np.float32)


def test_names_choose_the_scheme() -> None:
    assert {scheme_of(name) for name in SCHEME_OF_CHANNEL} == set(NORMALIZERS)
    assert [scheme_of(name) for name in ("CT", "ct", "T1", "noNorm", "CTA")] == [
        "CTNormalization",
        "CTNormalization",
        "ZScoreNormalization",
        "NoNormalization",
        "ZScoreNormalization",
    ]


def test_formulas() -> None:
    raw = image()
    rgb = np.abs(raw[0]) % 256
    expected = {
        "CTNormalization": (np.clip(raw[0], -5, 90) - 40) / 12,
        "ZScoreNormalization": (raw[0] - raw[0].mean()) / raw[0].std(),
        "NoNormalization": raw[0],
        "RescaleTo01Normalization": (raw[0] - raw[0].min()) / np.ptp(raw[0]),
    }
    for scheme, value in expected.items():
        np.testing.assert_allclose(normalize(raw, INSIDE, (scheme,), (False,), FACTS)[0], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalize(rgb[None], INSIDE, ("RGBTo01Normalization",), (False,), {})[0], rgb / 255, rtol=1e-6)
    with pytest.raises(InputError, match=r"0\.\.255"):
        normalize(raw, INSIDE, ("RGBTo01Normalization",), (False,), {})


def test_the_mask_limits_statistics_and_action() -> None:
    raw, labels = image(), INSIDE.copy()
    labels[0] = -1
    out = normalize(raw, labels, ("ZScoreNormalization",), (True,), {})
    np.testing.assert_array_equal(out[0, 0], raw[0, 0])
    np.testing.assert_allclose(out[0, 1:], (raw[0, 1:] - raw[0, 1:].mean()) / raw[0, 1:].std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(normalize(raw, INSIDE - 1, ("ZScoreNormalization",), (True,), {}), raw)


@pytest.mark.parametrize("scheme", [name for name in NORMALIZERS if name != "NoNormalization"])
def test_a_constant_stays_finite(scheme: str) -> None:
    flat = np.full((1, 3, 4, 5), 66.5, np.float32)
    facts = {"0": {"percentile_00_5": 66.5, "percentile_99_5": 66.5, "mean": 66.5, "std": 0.0}}
    out = normalize(flat, INSIDE, (scheme,), (False,), facts)
    assert np.isfinite(out).all()
    assert np.ptp(out) == 0


def test_channels_must_fit_the_plan() -> None:
    with pytest.raises(InputError, match="1 channels, but the plan normalises 2"):
        normalize(image(), INSIDE, ("NoNormalization",) * 2, (False,) * 2, {})
