"""nnU-Net's names of weights: every alias is written, any of them is read, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_unet import THIN, Plan, isotropic, residual
from torch import Tensor

from ichbench.errors import InputError
from ichbench.network.nnunet_weights import aliases, nnunet_name, shortest_name, weights_from_nnunet, weights_to_nnunet
from ichbench.network.unet import UNet, make_unet
from ichbench.recipe import NetworkRecipe

GOLDEN = Path(__file__).parent / "golden" / "nnunet_state_dicts.txt"
PLAIN = replace(THIN, in_channels=1)
#: the two networks of the golden file (facts section 7)
PLANS = {"plain": PLAIN, "residual": replace(residual(PLAIN), convs_per_stage=(1, 2, 1))}


def golden(family: str) -> dict[str, str]:
    lines = (line.split(" ", 2) for line in GOLDEN.read_text(encoding="utf-8").splitlines())
    return {name: shape for kind, name, shape in lines if kind == family}


def drawn(plan: Plan, seed: int = 0) -> UNet:
    """A network whose every parameter is a draw, so that no two tensors are equal."""
    network = make_unet(plan, NetworkRecipe())
    generator = torch.Generator().manual_seed(seed)
    for value in network.parameters():
        torch.nn.init.normal_(value, generator=generator)
    return network


@pytest.mark.parametrize("family", PLANS)
def test_written_names_and_shapes_are_nnunets(family: str) -> None:
    found = weights_to_nnunet(drawn(PLANS[family]), PLANS[family])
    assert {name: str(tuple(value.shape)) for name, value in found.items()} == golden(family)
    # aliases share their memory, as nnU-Net's do
    assert len({value.data_ptr() for value in found.values()}) == len(make_unet(PLANS[family], NetworkRecipe()).state_dict())


@pytest.mark.parametrize("family", PLANS)
def test_every_golden_name_leads_back(family: str) -> None:
    plan = PLANS[family]
    own = {nnunet_name(name, plan): name for name in make_unet(plan, NetworkRecipe()).state_dict()}
    for name in golden(family):
        for wrapped in (name, f"module.{name}", f"_orig_mod.module.{name}", name.replace("stages.0.", "stages.0._orig_mod.")):
            assert shortest_name(wrapped) in own
    assert sorted(golden(family)) == sorted(alias for name in own for alias in aliases(name))


@pytest.mark.parametrize("plan", [PLANS["plain"], PLANS["residual"], residual(isotropic(2, (4, 8, 8, 8), channels=3))])
def test_round_trip(plan: Plan) -> None:
    ours = drawn(plan)
    back = weights_from_nnunet(weights_to_nnunet(ours, plan), make_unet(plan, NetworkRecipe()), plan, "x")
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("pick", [0, 1, -1])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_any_one_alias_is_enough(pick: int, prefix: str) -> None:
    """DDP's and compile's prefixes, files without the duplicates, and half precision."""
    plan = PLANS["residual"]
    ours, theirs = drawn(plan), weights_to_nnunet(drawn(plan), plan)
    names = [nnunet_name(name, plan) for name in ours.state_dict()]
    few = {prefix + aliases(name)[pick % len(aliases(name))]: theirs[name] for name in names}
    back = weights_from_nnunet(few, make_unet(plan, NetworkRecipe()), plan, "x")
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())
    half = {key: value.half() for key, value in few.items()}
    back = weights_from_nnunet(half, make_unet(plan, NetworkRecipe()), plan, "x")
    assert all(torch.equal(back[name], value.half().float()) for name, value in ours.state_dict().items())


def test_a_norm_behind_dropout_is_the_norm() -> None:
    """With dropout the norm is number 2 of `all_modules`; dropout and activation have no parameters."""
    assert shortest_name("decoder.encoder.stages.0.0.convs.1.all_modules.2.bias") == "encoder.stages.0.0.convs.1.norm.bias"


def changed(key: str, value: object) -> dict[str, object]:
    weights: dict[str, object] = dict(weights_to_nnunet(drawn(PLAIN), PLAIN))
    if value is None:
        return {name: tensor for name, tensor in weights.items() if shortest_name(name) != key}
    return weights | {key: value}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("encoder.stages.9.0.convs.0.conv.weight", torch.ones(1), "the plans' network has not"),
        ("encoder.stages.0.0.convs.0.norm.running_mean", torch.ones(4), "the plans' network has not"),
        ("decoder.seg_layers.1.weight", torch.ones(2, 4, 1, 1, 1), r"\(2, 4, 1, 1, 1\), but plans.json and dataset.json make it \(3, 4"),
        ("encoder.stages.1.0.convs.0.norm.bias", None, "lacks 'encoder.stages.1.0.convs.0.norm.bias'"),
        ("encoder.stages.1.0.convs.0.norm.bias", torch.full((8,), torch.nan), "NaN"),
        ("decoder.encoder.stages.1.0.convs.0.norm.bias", torch.zeros(8), "differ here"),
        ("encoder.stages.1.0.convs.0.norm.bias", "weights", "is a str"),
        ("encoder.stages.1.0.convs.0.norm.bias", torch.zeros(8, dtype=torch.int64), "no floating-point"),
        ("encoder.stages.1.0.convs.0.norm.bias", torch.zeros(8, device="meta"), "no floating-point"),
        # a terabyte by its shape, four bytes in the file
        ("decoder.seg_layers.1.weight", torch.zeros(1).expand(2**38), "make it"),
        # the right shape, of one stored number
        ("encoder.stages.1.0.convs.0.norm.bias", torch.ones(1).expand(8), "claims 8 numbers, but fewer are stored"),
    ],
)
def test_what_does_not_fit_is_refused(key: str, value: Tensor | str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        weights_from_nnunet(changed(key, value), make_unet(PLAIN, NetworkRecipe()), PLAIN, "fold_0")


def test_weights_of_the_other_family_are_refused() -> None:
    with pytest.raises(InputError, match="other plans or trainer"):
        weights_from_nnunet(weights_to_nnunet(drawn(PLANS["residual"]), PLANS["residual"]), make_unet(PLAIN, NetworkRecipe()), PLAIN, "x")


@pytest.mark.parametrize("view", [lambda tensor: tensor.transpose(0, 1), torch._neg_view])
def test_an_alias_that_begins_at_the_same_address_is_compared(view: Callable[[Tensor], Tensor]) -> None:
    """nnU-Net loads the last of the aliases, so it would compute with other weights than we do."""
    weights = weights_to_nnunet(drawn(PLAIN), PLAIN)
    key = "encoder.stages.1.0.convs.1.conv.weight"
    other = f"decoder.{key}"
    weights[other] = view(weights[key])
    assert weights[other].shape == weights[key].shape
    assert weights[other].data_ptr() == weights[key].data_ptr()
    with pytest.raises(InputError, match="differ here"):
        weights_from_nnunet(weights, make_unet(PLAIN, NetworkRecipe()), PLAIN, "x")


def test_a_negated_view_is_written_as_it_reads() -> None:
    """torch.save keeps the mark, safetensors would write the bytes below it."""
    ours = drawn(PLAIN)
    weights = {key: torch._neg_view(value) for key, value in weights_to_nnunet(ours, PLAIN).items()}
    back = weights_from_nnunet(weights, make_unet(PLAIN, NetworkRecipe()), PLAIN, "x")
    assert not any(value.is_neg() for value in back.values())
    assert all(torch.equal(back[name], -value) for name, value in ours.state_dict().items())


def test_a_network_that_is_larger_than_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor may lie in one shared storage, which is large enough for each alone."""
    network = make_unet(PLAIN, NetworkRecipe())
    shared = torch.zeros(max(value.numel() for value in network.state_dict().values()))
    weights = {nnunet_name(name, PLAIN): shared[: value.numel()].view(value.shape) for name, value in network.state_dict().items()}
    monkeypatch.setattr(Tensor, "contiguous", lambda _: pytest.fail("memory was asked for before the sizes were compared"))
    with pytest.raises(InputError, match="weights would take"):
        weights_from_nnunet(weights, network, PLAIN, "x", 4 * len(shared) + 1000)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    weights, network = weights_to_nnunet(drawn(PLAIN), PLAIN), make_unet(PLAIN, NetworkRecipe())

    def fail(_: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(Tensor, "contiguous", fail)
    with pytest.raises(InputError, match="cannot be held in memory"):
        weights_from_nnunet(weights, network, PLAIN, "x")
