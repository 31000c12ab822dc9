"""Weights under nnU-Net's names, in and out.

nnU-Net's modules register themselves several times: a conv both by its name and inside `all_modules`, the whole encoder
again inside the decoder, so one tensor has up to four names (facts section 7). DDP and torch.compile put `module.` or
`_orig_mod.` before them. Reading takes any of these names and lets them agree; writing gives all four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ichbench.errors import InputError

#: name parts that wrappers add, which say nothing
WRAPPERS = frozenset({"module", "_orig_mod"})


class Levels(Protocol):
    """The part of a plan that names depend on."""

    @property
    def family(self) -> str: ...
    @property
    def strides(self) -> Sequence[Sequence[int]]: ...


def nnunet_name(name: str, plan: Levels) -> str:
    """Our name of a parameter -> nnU-Net's shortest one: `decoder.0.1.conv.bias` -> `decoder.stages.4.convs.1.conv.bias`."""
    part, *rest = name.split(".")
    if part == "stem":
        return ".".join(["encoder.stem.convs.0", *rest])
    number, rest = int(rest[0]), rest[1:]
    if part == "encoder":
        if plan.family == "plain":
            return ".".join([f"encoder.stages.{number}.0.convs", *rest])
        if rest[1] == "project":
            # behind the average pooling, where there is one
            rest[1:2] = ["skip", "1" if max(plan.strides[number]) > 1 else "0"]
        return ".".join([f"encoder.stages.{number}.blocks", *rest])
    # ours counts from the highest resolution, theirs from the lowest
    level = len(plan.strides) - 2 - number
    theirs = {"up": f"decoder.transpconvs.{level}", "heads": f"decoder.seg_layers.{level}", "decoder": f"decoder.stages.{level}.convs"}
    return ".".join([theirs[part], *rest])


def aliases(name: str) -> list[str]:
    """All names under which nnU-Net's state dict holds the tensor of this (shortest) name, itself first."""
    *block, layer, kind = name.split(".")
    names = [name]
    if layer in ("conv", "norm"):
        names.append(".".join([*block, "all_modules", "0" if layer == "conv" else "1", kind]))
    return names + [f"decoder.{one}" for one in names if name.startswith("encoder.")]


def shortest_name(key: str) -> str:
    """Any of the aliases, with or without wrappers -> the shortest one."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    if parts[:2] == ["decoder", "encoder"]:
        parts = parts[1:]
    if "all_modules" in parts[:-2]:
        at = parts.index("all_modules")
        # the conv comes first; of what follows it (dropout, norm, activation) only the norm has parameters
        parts[at : at + 2] = ["conv" if parts[at + 1] == "0" else "norm"]
    return ".".join(parts)


def weights_to_nnunet(network: nn.Module, plan: Levels) -> dict[str, Tensor]:
    """nnU-Net's state dict of a `UNet`; aliases share their memory, so a file that holds it is no larger."""
    tensors: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        tensor = value.detach().to("cpu", torch.float32).contiguous()
        tensors |= dict.fromkeys(aliases(nnunet_name(name, plan)), tensor)
    return tensors


def weights_from_nnunet(
    weights: Mapping[str, object], network: nn.Module, plan: Levels, source: str, file_bytes: int | None = None
) -> dict[str, Tensor]:
    """Our state dict (float32) for `network`, the network of `plan`, from nnU-Net's `weights`.

    file_bytes  of the checkpoint, which no network that is read from it can exceed

    Raises InputError, with `source`, for names or shapes that are not the plan's, values that are not finite numbers,
    aliases of one tensor that differ, and tensors that claim more numbers than are stored: a stride of 0 makes terabytes of
    four bytes.
    """
    wanted = {nnunet_name(name, plan): (name, value.shape) for name, value in network.state_dict().items()}
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for key, value in weights.items():
        short = shortest_name(str(key))
        if short not in wanted:
            raise InputError(f"{source}: holds {key!r}, which the plans' network has not; the checkpoint belongs to other plans or trainer")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or not value.is_floating_point():
            raise InputError(f"{source}: {key!r} is a {type(value).__name__} that holds no floating-point weights; the file is damaged")
        shape = wanted[short][1]
        if value.shape != shape:
            raise InputError(
                f"{source}: {key!r} has shape {tuple(value.shape)}, but plans.json and dataset.json make it {tuple(shape)}; "
                "the three files must come from one training"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(
                f"{source}: {key!r} claims {value.numel():,} numbers, but fewer are stored; the file was changed: get the original"
            )
        found.setdefault(short, []).append((str(key), value))
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{source}: lacks {missing[0]!r}{more}; the checkpoint belongs to other plans, or is no complete network")
    # tensors may share one storage, so each can be stored and all of them still be more than the file
    needed = sum(value.numel() * value.element_size() for (_, value), *_ in found.values())
    if file_bytes is not None and needed > file_bytes:
        raise InputError(
            f"{source}: has {file_bytes:,} bytes, but its weights would take {needed:,}; the file was changed: get the original"
        )
    try:
        return {wanted[short][0]: _agreed(short, tensors, source) for short, tensors in found.items()}
    except (MemoryError, RuntimeError) as error:
        # torch's allocator raises a bare RuntimeError
        said = (str(error) or "out of memory").splitlines()[0][:200]
        raise InputError(f"{source}: its weights cannot be held in memory ({said}); free some, or use a larger machine") from None


def _agreed(short: str, tensors: Sequence[tuple[str, Tensor]], source: str) -> Tensor:
    """The one tensor that all aliases say, as float32."""
    (_, value), *others = tensors
    tensor = _plain(value)
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{source}: {short!r} holds NaN or infinite weights; the training diverged: use another checkpoint")
    for key, other in others:
        # always by value: a view with other strides or a flipped sign begins at the same address
        if not torch.equal(_plain(other), tensor):
            raise InputError(f"{source}: {key!r} and {short!r} are one tensor in nnU-Net, but differ here; the file was changed")
    return tensor


def _plain(tensor: Tensor) -> Tensor:
    """float32 in memory as it reads: a file can mark a tensor as negated, which writing its bytes would lose."""
    return tensor.detach().to(torch.float32).resolve_neg().contiguous()
