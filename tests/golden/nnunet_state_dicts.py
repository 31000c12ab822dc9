"""Writes nnunet_state_dicts.txt: names and shapes in the state dicts of nnU-Net's two networks. Needs nnunetv2 2.8.1.

python tests/golden/nnunet_state_dicts.py
"""

from __future__ import annotations

from pathlib import Path

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

SHARED = {
    "input_channels": 1,
    "n_stages": 3,
    "features_per_stage": [4, 8, 16],
    "conv_op": nn.Conv3d,
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "num_classes": 3,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
    "deep_supervision": True,
}
NETWORKS = {
    "plain": PlainConvUNet(n_conv_per_stage=[2, 2, 2], n_conv_per_stage_decoder=[2, 2], **SHARED),
    "residual": ResidualEncoderUNet(n_blocks_per_stage=[1, 2, 1], n_conv_per_stage_decoder=[1, 1], **SHARED),
}

if __name__ == "__main__":
    lines = [
        f"{family} {name} {tuple(value.shape)}" for family, network in NETWORKS.items() for name, value in network.state_dict().items()
    ]
    Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
