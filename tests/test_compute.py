"""What holds on a GPU is tested without one where that can be done: on torch's "meta" device, which has shapes and no numbers, every
operation is seen, and one that mixes it with a CPU's tensors is found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import QUICK, SOLID, blob_cases
from torch.utils._python_dispatch import TorchDispatchMode

from ichbench import compute
from ichbench.augmentation.batches import make_batch, training_sampling
from ichbench.augmentation.patches import TrainingCase
from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.compute import ONE_CORE, Compute, computing, parse_compiled, resolve_device
from ichbench.errors import InputError
from ichbench.network.blocks import MEAN_POOL, box_mean
from ichbench.network.losses import LOSSES, Supervision, repeatable_cross_entropy, supervised
from ichbench.network.unet import make_unet
from ichbench.recipe import AugmentRecipe, NetworkRecipe, TrainingRecipe
from ichbench.training.trainer import train

#: operations that torch refuses on a GPU in deterministic mode (its documentation of use_deterministic_algorithms), by their ATen names
REFUSED = (
    "avg_pool3d_backward", "adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool", "max_unpool", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss", "ctc_loss", "embedding_bag", "put_", "histc", "bincount",
    "median", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "cumsum",
)  # fmt: skip


class Watch(TorchDispatchMode):
    """Names of all operations, and those that were given tensors of several devices (numbers and copies apart)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.mixed: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        flat = [one for value in (*args, *(kwargs or {}).values()) for one in (value if isinstance(value, list | tuple) else [value])]
        devices = {one.device.type for one in flat if isinstance(one, torch.Tensor) and one.ndim}
        self.seen.add(name)
        if len(devices) > 1 and "copy" not in name:
            self.mixed.add(name)
        return function(*args, **(kwargs or {}))

    def refused(self) -> set[str]:
        return {name for name in self.seen if any(name.startswith(word) for word in REFUSED)}


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    with computing(Compute(deterministic=on)):
        yield


def topology(family: str, dims: int) -> Any:
    one = (1,) * dims
    return SimpleNamespace(
        dims=dims, family=family, in_channels=1, n_classes=3, features=(4, 8, 8), strides=(one, (1, 2, 2)[-dims:], (2,) * dims),
        kernels=((3,) * dims,) * 3, convs_per_stage=(1, 2, 1), decoder_convs=(1, 1),
    )  # fmt: skip


def step_on_meta(family: str, dims: int, norm: str, rules: LabelRules, losses: list[str], weights: tuple[float, ...]) -> Watch:
    network = make_unet(topology(family, dims), NetworkRecipe(norm=norm)).to("meta").train()  # type: ignore[arg-type]
    shape = (4, 16, 16)[-dims:]
    with Watch() as watch:
        outputs = network(torch.empty(2, 1, *shape, device="meta"))
        labels = torch.zeros(2, *shape, dtype=torch.long, device="meta")
        for name in losses:
            loss = supervised(LOSSES[name], outputs, labels, Supervision(rules, class_weights=weights), 0)
            assert loss.device.type == "meta"
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return watch


REGIONS = LabelRules(("whole", "edge", "core"), ((1, 2, 3), (2, 3), 3), (1, 2, 3))
LABELS = plain_rules(3)
STEPS: list[tuple[str, int, str, LabelRules, list[str], tuple[float, ...]]] = [
    *(
        (family, dims, norm, LABELS, ["dice_ce"], ())
        for family in ("plain", "residual")
        for dims in (2, 3)
        for norm in ("instance", "batch")
    ),
    ("residual", 3, "instance", LABELS, list(LOSSES), ()),
    ("residual", 3, "instance", LABELS, list(LOSSES), (1.0, 2.0, 3.0)),
    ("residual", 3, "instance", REGIONS, ["dice_ce", "dice", "ce"], ()),
]


@pytest.mark.parametrize("step", STEPS)
def test_a_training_step_stays_on_its_device_and_can_be_repeated(step: Any) -> None:
    with deterministic(True):
        watch = step_on_meta(*step)
    assert not watch.mixed
    assert not watch.refused()


def test_the_watch_sees_what_torch_would_refuse() -> None:
    watch = step_on_meta("residual", 3, "instance", plain_rules(3), ["ce"], ())
    assert {"nll_loss2d_forward", "avg_pool3d_backward"} <= watch.refused()
    with Watch() as mixing:
        torch.zeros(3, device="meta").copy_(torch.zeros(3))
        assert not mixing.mixed
        with pytest.raises(RuntimeError):
            torch.zeros(3, device="meta") + torch.zeros(3)
    assert mixing.mixed == {"add"}


@pytest.mark.parametrize("compatibility", ["ichbench", "nnunet"])
def test_batches_stay_on_their_device(compatibility: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((10, 24, 24), np.int16)
    labels[3:6, 5:12, 5:12] = 1
    image = rng.normal(size=(1, 10, 24, 24)).astype(np.float32)
    case = TrainingCase("a", image, labels, {1: np.argwhere(labels == 1)}, (labels > 0).astype(np.uint8))
    # torch has no generator on the meta device, so noise is left out
    names = [name for name in AugmentRecipe.model_fields if name.endswith("probability") and name != "noise_probability"]
    always = dict.fromkeys(names, 1.0) | {"noise_probability": 0.0}
    for in_plane in (True, False):
        recipe = TrainingRecipe(augment=AugmentRecipe(**always, in_plane=in_plane), compatibility=compatibility)  # type: ignore[arg-type]
        with Watch() as watch, deterministic(True):
            made = make_batch([case], training_sampling((6, 16, 16), 2, recipe, 0, (True,), 1), 0, 0, "meta")
        assert {one.device.type for one in made} == {"meta"}
        assert not watch.mixed
        assert not watch.refused()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_without_indices_is_torchs(reduction: str) -> None:
    rng = np.random.default_rng(3)
    logits = torch.tensor(rng.normal(0, 3, (2, 4, 5, 6, 7)), requires_grad=True)
    labels = torch.tensor(rng.integers(0, 4, (2, 5, 6, 7)))
    for weights, skipped in itertools.product((None, torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)), (-100, 2, 9)):
        given = labels if skipped != 9 else torch.where(labels == 1, 9, labels)
        ours = repeatable_cross_entropy(logits, given, weights, skipped, reduction)
        torchs = torch.nn.functional.cross_entropy(logits, given, weights, ignore_index=skipped, reduction=reduction)
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
        factor = torch.tensor(rng.normal(size=tuple(ours.shape)))
        gradients = [torch.autograd.grad((value * factor).sum(), logits)[0] for value in (ours, torchs)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [(2, 2), (1, 2, 2), (2, 2, 2), (3, 1, 2)])
def test_means_over_boxes_are_torchs(stride: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *(4 * step for step in stride), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(box_mean(x, stride), MEAN_POOL[len(stride)](x, stride, stride), rtol=1e-12, atol=1e-12)


def test_deterministic_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    recipe = QUICK.model_copy(update={"epochs": 1})
    digests = []
    for how in (Compute(), Compute(deterministic=True)):
        result = train(blob_cases(2), blob_cases(1, 50), SOLID, NetworkRecipe(), recipe, 0, tmp_path / str(how.deterministic), how)
        digests.append(result.final_sha256)
    assert digests[0] == digests[1]
    assert not torch.are_deterministic_algorithms_enabled()


def test_torch_is_left_as_it_was() -> None:
    before = torch.get_num_threads()

    def fails() -> None:
        with computing(Compute(threads=before + 1, deterministic=True)):
            assert torch.get_num_threads() == before + 1
            assert torch.are_deterministic_algorithms_enabled()
            assert compute.must_repeat(torch.device("cuda"))
            assert not compute.must_repeat(torch.device("cpu"))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert not compute.must_repeat(torch.device("cuda"))


def test_the_environment_names_what_moves_the_last_digits() -> None:
    assert ONE_CORE.environment() == {"device": "cpu", "threads": 1} == Compute(deterministic=True).environment()
    assert Compute("cuda:3", 2, True).environment() == {"device": "cuda", "threads": 2, "deterministic": True}
    assert Compute("cuda", compiled="no").environment() == {"device": "cuda", "threads": 1}
    assert Compute("cuda").environment() == {"device": "cuda", "threads": 1, "compiled": True}
    assert Compute(compiled="yes").environment() == {"device": "cpu", "threads": 1, "compiled": True}


def test_what_is_compiled() -> None:
    """Programs are chosen by timing them, so that one may be another the next time."""
    gpu = [Compute("cuda").compiles, Compute("cuda", deterministic=True).compiles, Compute("cuda", compiled="no").compiles]
    assert gpu == [True, False, False]
    assert not ONE_CORE.compiles
    assert Compute(deterministic=True, compiled="yes").compiles
    with pytest.raises(InputError, match=r"--compile yes and --deterministic: .* leave one of them out"):
        Compute("cuda:1", deterministic=True, compiled="yes")
    assert [parse_compiled(text) for text in ("auto", "yes", "no")] == ["auto", "yes", "no"]
    with pytest.raises(InputError, match="--compile 'maybe' is not understood; give auto, yes or no"):
        parse_compiled("maybe")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("tpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""):
        with pytest.raises(InputError, match="give auto, cpu, cuda or cuda:N"):
            resolve_device(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu" == resolve_device("cpu")
    with pytest.raises(InputError, match="sees no CUDA device"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (resolve_device("auto"), resolve_device("cuda"), resolve_device("cuda:1")) == ("cuda", "cuda", "cuda:1")
    with pytest.raises(InputError, match="there are 2 CUDA devices, counted from 0"):
        resolve_device("cuda:2")
