"""U-Nets for images: diffusers' ``UNet2DModel`` as a network of this package.

Imports torch and the standard library; diffusers where a network is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Architecture:
    """A U-Net but for the data it is for. Images are halved between levels."""

    width: int
    """Channels at full resolution; time is embedded in 4 times as many."""
    multipliers: tuple[int, ...]
    """Of the width, one a level."""
    blocks: int
    """Residual blocks a level."""
    attention: tuple[int, ...]
    """Heights in pixels at which every block is followed by self-attention; the middle always has it."""
    head_channels: int | None = None
    """Channels of an attention head; None: one head."""
    adm: bool = False
    """As in Dhariwal & Nichol 2021: residual blocks resample, in place of convolutions."""
    scale_shift: bool = False
    """Time scales and shifts the normalised features, in place of a bias."""
    dropout: float = 0.0


ARCHITECTURES = {
    # Those that DxMI starts from: Ho et al. 2020; Karras et al. 2022; consistency models (Song et al. 2023).
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

    Args:
        model: a UNet2DModel whose output has the channels of its input.
        patch: side of the squares of pixels that it sees as channels of one; a multiple of it are H and W.
    """

    def __init__(self, model: Any, patch: int = 1) -> None:  # diffusers is not typed
        super().__init__()
        self.model, self.patch = model, patch
        self.classes: int | None = model.config["num_class_embeds"]

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        check_labels(labels, self.classes)
        output = self.model(F.pixel_unshuffle(x, self.patch), time, class_labels=labels, return_dict=False)
        return F.pixel_shuffle(output[0], self.patch)


def unet(
    architecture: Architecture | str, data_shape: Sequence[int], classes: int | None = None, patch: int = 1
) -> UNet:
    """A U-Net to train from scratch. It starts by giving 0, each residual branch too (Ho et al. 2020).

    Args:
        architecture: or its name in ``ARCHITECTURES``.
        data_shape: (C, H, W) of an image; H and W multiples of patch 2^(levels - 1).
        classes: number of classes that it is conditional on; None: unconditional.
        patch: side of the squares of pixels that the network sees as channels of one.

    Raises:
        ValueError: an architecture that is not known, or that does not fit the data.
    """
    from diffusers import UNet2DModel

    if isinstance(architecture, str):
        architecture = _named(architecture)
    shape = patched_shape(data_shape, patch)
    network = UNet(UNet2DModel(**unet_config(architecture, shape, classes)), patch)
    _start_at_zero(network)
    return network


def patched_shape(data_shape: Sequence[int], patch: int) -> tuple[int, int, int]:
    """(C, H, W) of an image -> (C patch^2, H / patch, W / patch).

    Raises:
        ValueError: H and W are not multiples of patch.
    """
    channels, height, width = check_shape(data_shape, 1)
    if height % patch or width % patch:
        raise ValueError(f"patch must divide the image size, {height} x {width}, got {patch}")
    return channels * patch**2, height // patch, width // patch


def unet_config(a: Architecture, data_shape: Sequence[int], classes: int | None = None) -> dict[str, object]:
    """``UNet2DModel``'s settings for an architecture; arguments as in ``unet``."""
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
    if not a.adm:  # the details of Ho et al. 2020
        config |= {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
    return config


def check_labels(labels: Tensor | None, classes: int | None) -> None:
    """Raises:
    ValueError: there are labels and the network takes none, or the other way round.
    """
    if (labels is None) != (classes is None):
        wanted = "None" if classes is None else f"one of {classes} classes for each row"
        raise ValueError(f"labels must be {wanted}, got {'None' if labels is None else 'some'}")


def check_shape(data_shape: Sequence[int], levels: int) -> tuple[int, int, int]:
    """(C, H, W) that a U-Net of so many levels can take.

    Raises:
        ValueError: it cannot.
    """
    shape, factor = tuple(data_shape), 2 ** (levels - 1)
    if len(shape) != 3 or min(shape) < 1 or shape[1] % factor or shape[2] % factor:
        raise ValueError(f"data_shape must be (C, H, W) with H and W multiples of {factor}, got {shape}")
    channels, height, width = shape
    return channels, height, width


def _named(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        near = get_close_matches(name, ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}{hint}")
    return ARCHITECTURES[name]


def _start_at_zero(network: UNet) -> None:
    for name, parameter in network.named_parameters():
        if re.search(r"\.(conv_out|conv2|to_out\.0)\.(weight|bias)$", name):
            nn.init.zeros_(parameter)
