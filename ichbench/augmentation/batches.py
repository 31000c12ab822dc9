"""Batches as tensors: every sample drawn by its own key, cut, augmented, written into its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ichbench.augmentation.augment import empty, fill_sample, no_labels
from ichbench.augmentation.draw import AugmentDraw, CascadeDraw, draw_augmentation, draw_cascade, enlarged_zyx
from ichbench.augmentation.patches import PatchDraw, TrainingCase, draw_patch, is_forced, patch_zyx, sample_generator
from ichbench.errors import InputError
from ichbench.recipe import AugmentRecipe, TrainingRecipe

NO_CHANGE, NO_FAULT = AugmentDraw(), CascadeDraw()


@dataclass(frozen=True)
class Sampling:
    """Everything a batch depends on besides the cases, its stream and its number; `augment` None leaves patches alone.

    clamped            patches about a voxel near the far border are moved inside, and a turned patch reads all of the case;
                       False: nnU-Net's boxes, which hang out, and beyond which a turned patch reads 0
    random_foreground  each sample shows foreground with the probability `foreground_share`, instead of the last of a batch
    previous_labels    labels above 0 of a cascade's earlier stage: so many channels are appended to the image
    masked_channels    channels normalised inside the nonzero mask: augmentation leaves 0 outside it
    """

    patch_size: tuple[int, ...]
    batch_size: int
    foreground_share: float
    seed: int
    augment: AugmentRecipe | None
    centred: bool = True
    clamped: bool = True
    random_foreground: bool = False
    previous_labels: int = 0
    masked_channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class SampleDraw:
    """All that was drawn for one sample."""

    patch: PatchDraw
    change: AugmentDraw = NO_CHANGE
    cascade: CascadeDraw = NO_FAULT


def training_sampling(
    patch_size: Sequence[int],
    batch_size: int,
    training: TrainingRecipe,
    seed: int,
    use_mask_for_norm: Sequence[bool] = (),
    previous_labels: int = 0,
) -> Sampling:
    """What a recipe and a plan say about batches. For validation replace `augment` by None."""
    return Sampling(
        tuple(patch_size),
        batch_size,
        training.foreground_share,
        seed,
        training.augment,
        centred=training.foreground_position == "centre",
        clamped=training.compatibility == "ichbench",
        random_foreground=training.foreground_samples == "random",
        previous_labels=previous_labels,
        masked_channels=tuple(channel for channel, masked in enumerate(use_mask_for_norm) if masked),
    )


def draw_sample(cases: Sequence[TrainingCase], sampling: Sampling, stream: int, step: int, sample: int) -> SampleDraw:
    """What sample `sample` of batch `step` is: where it is cut and how it is changed."""
    rng, augment = sample_generator(sampling.seed, stream, step, sample), sampling.augment
    if sampling.random_foreground:
        forced = bool(rng.random() < sampling.foreground_share)
    else:
        forced = is_forced(sample, sampling.batch_size, sampling.foreground_share)
    box = enlarged_zyx(augment, sampling.patch_size) if augment is not None and not sampling.clamped else None
    patch = draw_patch(rng, cases, sampling.patch_size, forced, sampling.centred, sampling.clamped, box)
    if augment is None:
        return SampleDraw(patch)
    change = draw_augmentation(rng, augment, sampling.patch_size, cases[patch.case].image_czyx.shape[0])
    return SampleDraw(patch, change, draw_cascade(rng, augment, sampling.previous_labels) if sampling.previous_labels else NO_FAULT)


def make_batch(
    cases: Sequence[TrainingCase],
    sampling: Sampling,
    stream: int,
    step: int,
    device: torch.device | str = "cpu",
    samples: range | None = None,
) -> tuple[Tensor, Tensor]:
    """Batch number `step` of a stream: (image (b, c, *patch) float32, labels (b, *patch) int16), made on `device`.

    `samples` makes only a part of the batch (for several processes); each sample is what it is in the whole.
    Raises CaseError where a case lacks the labels of the previous stage that the sampling asks for.
    """
    device, chosen = torch.device(device), range(sampling.batch_size) if samples is None else samples
    if not cases:
        raise InputError("there is no case to draw patches from; give at least one training case")
    drawn = [draw_sample(cases, sampling, stream, step, sample) for sample in chosen]
    size = patch_zyx(sampling.patch_size)
    channels = cases[0].image_czyx.shape[0] + sampling.previous_labels
    image = empty((len(drawn), channels, *size), device)
    labels = no_labels((len(drawn), *size), device)
    largest = sampling.augment.remove_component_share if sampling.augment is not None else 0.0
    for one, out, target in zip(drawn, image, labels, strict=True):
        case = cases[one.patch.case]
        fill_sample(case, one.patch, one.change, one.cascade, out, target, sampling.previous_labels, sampling.masked_channels, largest)
    if len(sampling.patch_size) == 2:
        image, labels = image[:, :, 0], labels[:, 0]
    return image, labels


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
