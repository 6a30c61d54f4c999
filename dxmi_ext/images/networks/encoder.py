"""Energies and values on the features of a pretrained U-Net. Imports torch and ``images.networks.unet``.

The encoder of the sampler's pretrained network has features of images at every noise level. Here it is copied
and frozen, and small heads predict the energy, as in the discriminators of adversarial distillation (Sauer et
al. 2024, arXiv 2403.12015). A head for each resolution maps features to local energies, whose means over
pixels are summed, so that speckle costs as much as a wrong shape.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.images.networks.unet import UNet, check_labels

_SLOPE = 0.2
_GROUPS = 8


class _Encoder(nn.Module):
    """(x [N, C, H, W], time [N], labels [N] or None) -> a list of features [N, *], one per resolution, and
    the time embedding."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        model = copy.deepcopy(unet.model)
        self.patch, self.classes = unet.patch, unet.classes
        self.time_proj, self.time_embedding = model.time_proj, model.time_embedding
        self.class_embedding = None if unet.classes is None else model.class_embedding
        self.conv_in, self.down_blocks, self.mid_block = model.conv_in, model.down_blocks, model.mid_block
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None) -> tuple[list[Tensor], Tensor]:
        check_labels(labels, self.classes)
        embedding = self.time_embedding(self.time_proj(time).to(x.dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(labels)
        hidden, features = self.conv_in(F.pixel_unshuffle(x, self.patch)), []
        for block in self.down_blocks:
            hidden, states = block(hidden_states=hidden, temb=embedding)
            features.append(states[-2] if block.downsamplers else states[-1])  # the last before downsampling
        features.append(self.mid_block(hidden, embedding))
        return features, embedding


class _Head(nn.Module):
    """Features [N, C, H, W] and the time embedding -> the mean of local energies, [N]."""

    def __init__(self, channels: int, width: int, embedding: int) -> None:
        super().__init__()
        # Not affine: torch's GroupNorm crashes in backward if channels_last features require no gradient.
        self.norm = nn.GroupNorm(math.gcd(_GROUPS, channels), channels, affine=False)
        self.conv1, self.conv2 = (nn.Conv2d(c, width, 3, padding=1) for c in (channels, width))
        self.modulation = nn.Linear(embedding, 2 * width)
        self.last = nn.Conv2d(width, 1, 1, bias=False)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, a=_SLOPE, nonlinearity="leaky_relu")
        for zero in (self.conv1.bias, self.conv2.bias, self.modulation.weight, self.modulation.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(self.norm(features)) * (1 + scale) + shift
        hidden = self.conv2(F.leaky_relu(hidden, _SLOPE))
        return self.last(F.leaky_relu(hidden, _SLOPE)).mean(dim=(1, 2, 3))


class EncoderValue(nn.Module):
    """V^t: (x [N, C, H, W], timestep int64 [N], labels int64 [N] if conditional) -> [N].

    The encoder takes x_t at the noise level of step t, as the pretrained network does.

    Args:
        unet: network to copy.
        time: the U-Net's time at each timestep, [T + 1]; the last is for V^T, the energy of data.
        input_scale: factor of its input at each timestep, [T + 1].
        width: channels of the heads.
    """

    def __init__(self, unet: UNet, time: Tensor, input_scale: Tensor, width: int = 64) -> None:
        super().__init__()
        self.encoder = _Encoder(unet)
        config = unet.model.config
        channels = [*config.block_out_channels, config.block_out_channels[-1]]
        embedding = unet.model.time_embedding.linear_2.out_features
        self.heads = nn.ModuleList(_Head(c, width, embedding) for c in channels)
        self.shift = nn.Parameter(torch.zeros(()))
        self.time: Tensor
        self.input_scale: Tensor
        self.register_buffer("time", time.float())
        self.register_buffer("input_scale", input_scale.float())

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        time, scale, change = self.seen(timestep)
        features, embedding = self.encoder(x * scale[:, None, None, None], time, labels)
        if change is not None:
            embedding = embedding + change
        energies = [head(h, embedding) for head, h in zip(self.heads, features, strict=True)]
        return torch.stack(energies).sum(0) + self.shift

    def seen(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The encoder's time and input scale at timesteps [N], and what is added to the embedding that the
        heads see, [N, width], if anything."""
        return self.time[timestep], self.input_scale[timestep], None


class EncoderEnergy(nn.Module):
    """E: (x [N, C, H, W], labels int64 [N] if conditional) -> [N].

    Args:
        unet, width: see `EncoderValue`.
        time, input_scale: scalars for the single noise level of the encoder.
    """

    def __init__(self, unet: UNet, time: Tensor, input_scale: Tensor, width: int = 64) -> None:
        super().__init__()
        self.value = EncoderValue(unet, time[None], input_scale[None], width)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.value(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), labels)


def load_encoders(module: nn.Module, unet: UNet) -> None:
    """Copies the weights of a U-Net to the encoders in a module, of the same architecture."""
    weights = unet.model.state_dict()
    for encoder in module.modules():
        if isinstance(encoder, _Encoder):
            encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
