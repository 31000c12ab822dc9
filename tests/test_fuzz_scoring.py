"""5,000 mask pairs of every shape and type that people have: numbers, or one clear error; never anything else."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from ichbench.errors import InputError
from ichbench.scoring import PROTOCOLS, score_masks
from ichbench.scoring.score import FORMULAS

PAIRS = 5000
TYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "int32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    "label255",
    "fraction",
    "nan",
)


def one(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """A mask and whether it is valid."""
    bits = rng.random(shape) < rng.choice([0.0, 0.02, 0.3, 0.9, 1.0])
    kind = str(rng.choice(TYPES))
    if kind == "label255":
        return bits.astype(np.uint8) * 255, True
    if kind == "fraction":
        return bits * 0.5, not bits.any()
    if kind == "nan":
        return np.where(bits, np.nan, 0.0), not bits.any()
    return bits.astype(kind), True


def laid_out(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The same values, stored in another way."""
    way = int(rng.integers(4))
    if way == 1:
        return np.asfortranarray(mask)
    if way == 2:
        return np.repeat(mask, 2, axis=0)[::2]
    if way == 3:
        return mask[::-1, :, ::-1][::-1, :, ::-1]
    return mask


@pytest.mark.slow
def test_five_thousand_pairs() -> None:
    rng = np.random.default_rng(2022)
    names = list(PROTOCOLS)
    scored = refused = 0
    for number in range(PAIRS):
        high = int(rng.choice([2, 4, 9, 24]))
        shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.05 else 1, high, size=3))
        (reference, good), (predicted, also_good) = one(rng, shape), one(rng, shape)
        if rng.random() < 0.03:
            predicted, also_good = predicted[..., :-1], shape[2] == 0 and also_good
        spacing = tuple(rng.choice([0.14, 0.42, 0.45, 1.0, 5.0, 1e-3, 300.0], size=3))
        metrics = None if number % 3 else tuple(FORMULAS)
        protocol = names[number % len(names)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = score_masks(laid_out(rng, reference), laid_out(rng, predicted), spacing, protocol, metrics)
            except InputError as error:
                refused += 1
                wrongly = (number, str(error)) if (good and also_good) or len(str(error)) < 20 else None
            else:
                wrongly = None if good and also_good else (number, "an invalid mask was scored")
        assert wrongly is None
        if not (good and also_good):
            continue
        assert all(isinstance(value, float) for value in found.values())
        for key in {"dice", "nsd", "iou", "pq"} & found.keys():
            assert math.isnan(found[key]) or 0 <= found[key] <= 1, (number, key, found[key])
        scored += 1
    assert scored > 3000
    assert refused > 300
