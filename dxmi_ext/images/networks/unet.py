"""U-Nets for images: diffusers' ``UNet2DModel`` as a network of this package.

Imports torch, the engine and ``dxmi_ext.method.lengths``; diffusers where a network is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.engine.runs.config import did_you_mean
from dxmi_ext.method.lengths import StepLevels


@dataclass(frozen=True)
class Architecture:
    """The architecture of a U-Net, without the data's shape. Each level halves the images."""

    width: int
    """Channels at full resolution; the time embedding has 4 times as many."""
    multipliers: tuple[int, ...]
    """Multiples of the width, one per level."""
    blocks: int
    """Number of residual blocks per level."""
    attention: tuple[int, ...]
    """Heights in pixels at which blocks have self-attention; the middle always has it."""
    head_channels: int | None = None
    """Channels of an attention head; None: one head."""
    adm: bool = False
    """Whether residual blocks resample instead of convolutions, as in Dhariwal & Nichol 2021."""
    scale_shift: bool = False
    """Whether the time embedding scales and shifts the normalized features instead of adding a bias."""
    dropout: float = 0.0


ARCHITECTURES = {
    # DxMI's start networks: Ho et al. 2020; Karras et al. 2022; consistency models (Song et al. 2023).
    "cifar10": Architecture(128, (1, 2, 2, 2), blocks=2, attention=(16,)),
    "imagenet64": Architecture(
        192, (1, 2, 3, 4), blocks=3, attention=(32, 16, 8), head_channels=64, adm=True, scale_shift=True
    ),
    "lsun256": Architecture(
        256, (1, 1, 2, 2, 4, 4), blocks=2, attention=(32, 16, 8), head_channels=64, adm=True
    ),
    # For images of 28 x 28 and 32 x 32 on a CPU: .7M parameters; 1.1M, for patches of 2 x 2 pixels.
    "small": Architecture(16, (1, 2, 4), blocks=1, attention=(7, 8)),
    "compact": Architecture(32, (1, 2), blocks=2, attention=(7, 8), scale_shift=True),
}


class UNet(nn.Module):
    """(x [N, C, H, W], diffusion time [N] float or int, labels int64 [N] or none) -> [N, C, H, W].

    A network of `level_networks.see_steps_` takes inputs of `StepLevels` [N, INPUTS] as fourth argument.

    Args:
        model: UNet2DModel with as many output as input channels.
        patch: side of the patches of pixels that it takes as channels; H and W are multiples of it.
    """

    def __init__(self, model: Any, patch: int = 1) -> None:  # diffusers is not typed
        super().__init__()
        self.model, self.patch = model, patch
        self.classes: int | None = model.config["num_class_embeds"]

    @property
    def sees_steps(self) -> bool:
        return self.classes is None and self.model.class_embedding is not None

    def forward(
        self, x: Tensor, time: Tensor, labels: Tensor | None = None, step: Tensor | None = None
    ) -> Tensor:
        check_labels(labels, self.classes)
        condition = labels
        if self.sees_steps:  # in pretraining and long chains there is no next level
            condition = x.new_zeros(len(x), StepLevels.INPUTS) if step is None else step
        output = self.model(F.pixel_unshuffle(x, self.patch), time, class_labels=condition, return_dict=False)
        return F.pixel_shuffle(output[0], self.patch)


def unet(
    architecture: Architecture | str, data_shape: Sequence[int], classes: int | None = None, patch: int = 1
) -> UNet:
    """A U-Net to train from scratch. Its output and residual branches are initialized to 0 (Ho et al. 2020).

    Args:
        architecture: an architecture, or a name in ``ARCHITECTURES``.
        data_shape: shape (C, H, W) of an image; H and W must be multiples of patch 2^(levels - 1).
        classes: number of classes; None: unconditional.
        patch: side of the patches of pixels that the network takes as channels.

    Raises:
        ValueError: the architecture is unknown, or does not fit the data.
    """
    from diffusers import UNet2DModel

    if isinstance(architecture, str):
        architecture = _named(architecture)
    channels, height, width = check_shape(data_shape, len(architecture.multipliers), patch)
    shape = channels * patch**2, height // patch, width // patch
    network = UNet(UNet2DModel(**unet_config(architecture, shape, classes)), patch)
    _start_at_zero(network)
    return network


def unet_config(a: Architecture, data_shape: Sequence[int], classes: int | None = None) -> dict[str, object]:
    """``UNet2DModel``'s config for an architecture; see ``unet`` for the arguments."""
    channels, height, width = check_shape(data_shape, len(a.multipliers))
    groups = min(32, a.width // 4)
    if a.width < 4 or a.width % groups:
        raise ValueError(
            f"width must be a multiple of {max(groups, 4)} for group normalization, got {a.width}"
        )
    attends = [height >> level in a.attention for level in range(len(a.multipliers))]
    widths = tuple(a.width * m for m in a.multipliers)
    attending = {c for c, there in zip(widths, attends, strict=True) if there} | {widths[-1]}
    if a.head_channels is not None and any(c % a.head_channels for c in attending):
        raise ValueError(f"head_channels must divide {sorted(attending)}, got {a.head_channels}")
    plain_down, plain_up = "DownBlock2D", "UpBlock2D"
    if a.adm:
        plain_down, plain_up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    resample = "resnet" if a.adm else "conv"
    config: dict[str, object] = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": a.blocks,
        "down_block_types": tuple("AttnDownBlock2D" if there else plain_down for there in attends),
        "up_block_types": tuple("AttnUpBlock2D" if there else plain_up for there in reversed(attends)),
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": a.head_channels,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "resnet_time_scale_shift": "scale_shift" if a.scale_shift else "default",
        "num_class_embeds": classes,
        "dropout": a.dropout,
    }
    if not a.adm:  # as in Ho et al. 2020
        config |= {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
    return config


def check_labels(labels: Tensor | None, classes: int | None) -> None:
    """Checks that labels are given if the network has classes, and only then.

    Raises:
        ValueError: they are given to an unconditional network, or missing for a conditional one.
    """
    if (labels is None) != (classes is None):
        wanted = "None" if classes is None else f"one of {classes} classes for each row"
        raise ValueError(f"labels must be {wanted}, got {'None' if labels is None else 'some'}")


def check_shape(data_shape: Sequence[int], levels: int, patch: int = 1) -> tuple[int, int, int]:
    """The shape (C, H, W), checked for a U-Net with some number of levels.

    Raises:
        ValueError: H or W is not a multiple of patch 2^(levels - 1).
    """
    shape, factor = tuple(data_shape), patch * 2 ** (levels - 1)
    if len(shape) != 3 or min(shape) < 1 or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"data_shape must be (C, H, W) with H and W multiples of {factor}, got {shape}; recipes set "
            "H and W by image_size"
        )
    channels, height, width = shape
    return channels, height, width


def _named(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(
            f"architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}"
            f"{did_you_mean(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _start_at_zero(network: UNet) -> None:
    for name, parameter in network.named_parameters():
        if re.search(r"\.(conv_out|conv2|to_out\.0)\.(weight|bias)$", name):
            nn.init.zeros_(parameter)
