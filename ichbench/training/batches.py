"""Batches as tensors: every sample drawn by its own key, cut, augmented, stacked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ichbench.recipe import AugmentRecipe
from ichbench.training.augment import AugmentDraw, apply, draw_augmentation, source_size
from ichbench.training.patches import PatchDraw, TrainingCase, cut_patch, draw_patch, enlarged, is_forced, sample_generator


@dataclass(frozen=True)
class Sampling:
    """Everything a batch depends on besides the cases, its stream and its number; `augment` None leaves patches alone."""

    patch_size: tuple[int, ...]
    batch_size: int
    foreground_share: float
    seed: int
    augment: AugmentRecipe | None
    centred: bool = True
    clamped: bool = True


def draw_sample(cases: Sequence[TrainingCase], sampling: Sampling, stream: int, step: int, sample: int) -> tuple[PatchDraw, AugmentDraw]:
    """What sample `sample` of batch `step` is: where it is cut and how it is changed."""
    rng = sample_generator(sampling.seed, stream, step, sample)
    forced = is_forced(sample, sampling.batch_size, sampling.foreground_share)
    patch = draw_patch(rng, cases, sampling.patch_size, forced, sampling.centred, sampling.clamped)
    if sampling.augment is None:
        return patch, AugmentDraw()
    return patch, draw_augmentation(rng, sampling.augment, sampling.patch_size, cases[patch.case].image_czyx.shape[0])


def make_sample(
    cases: Sequence[TrainingCase], sampling: Sampling, patch: PatchDraw, change: AugmentDraw
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """(image (c, z, y, x), labels (z, y, x)) of a draw; voxels outside the image count as background."""
    image, labels = cut_patch(cases[patch.case], enlarged(patch, source_size(sampling.patch_size, change)))
    image, labels = apply(image, labels, change, sampling.patch_size)
    return image, np.maximum(labels, 0)


def make_batch(cases: Sequence[TrainingCase], sampling: Sampling, stream: int, step: int) -> tuple[Tensor, Tensor]:
    """Batch number `step` of a stream: (image (b, c, *patch) float32, labels (b, *patch) int64)."""
    samples = [make_sample(cases, sampling, *draw_sample(cases, sampling, stream, step, i)) for i in range(sampling.batch_size)]
    image, labels = np.stack([s[0] for s in samples]), np.stack([s[1] for s in samples])
    if len(sampling.patch_size) == 2:
        image, labels = image[:, :, 0], labels[:, 0]
    return torch.from_numpy(image), torch.from_numpy(labels.astype(np.int64))


def ahead(make: Callable[[int], tuple[Tensor, Tensor]], steps: Iterable[int], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """make(step) for every step in order. With workers > 0 threads work ahead (numpy and torch release the lock), which
    keeps a GPU fed; the result is the same, because a batch depends on its number alone."""
    if workers == 0:
        yield from map(make, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batch")
    try:
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
