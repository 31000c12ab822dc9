"""nnU-Net beside us in one process: its version, its folders, and its network with our weights.

Imported as `peer` by the scripts beside it; nnunetv2 is imported only where it is asked for.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version

from torch import nn

from ichbench.network.nnunet_weights import weights_to_nnunet
from ichbench.network.unet import UNet
from ichbench.prepare.plan import Plan


def peer_version() -> str:
    return version("nnunetv2")


def name_folders() -> None:
    """nnU-Net complains on import where its three folders are not named; nothing is written to these."""
    for name in ("raw", "preprocessed", "results"):
        os.environ.setdefault(f"nnUNet_{name}", tempfile.gettempdir())


def their_network(plan: Plan, network: UNet, deep_supervision: bool) -> nn.Module:
    """nnU-Net's plain 3D network of the plan with the weights of ours; every name must be matched."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(plan.features)
    peer = PlainConvUNet(
        plan.in_channels, stages, list(plan.features), nn.Conv3d, [list(one) for one in plan.kernels], [list(one) for one in plan.strides],
        [2] * stages, plan.n_classes, [2] * (stages - 1), True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None,
        nn.LeakyReLU, {"inplace": True}, deep_supervision,
    )  # fmt: skip
    peer.load_state_dict(weights_to_nnunet(network, plan))
    return peer  # type: ignore[no-any-return]
