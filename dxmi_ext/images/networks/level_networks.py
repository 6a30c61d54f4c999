"""Networks that see the levels of a step, and so serve chains of any length, from a pretrained U-Net.

The noise level is the time of the U-Net and of the encoder, as in pretraining. For the previous and
the next level, and for T at the end of a shorter chain, a learned vector, zero at first, is added to the time
embedding, as for the step size of shortcut models (Frans et al. 2024, arXiv 2410.12557).

Imports torch, ``dxmi_ext.method.lengths`` and the networks of images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dxmi_ext.images.networks.encoder import EncoderValue
from dxmi_ext.images.networks.pretrained import EDM
from dxmi_ext.images.networks.unet import UNet
from dxmi_ext.method.lengths import LevelFunction, StepLevels
from dxmi_ext.method.sampler import per_row


def see_steps_(unet: UNet) -> UNet:
    """Adds a `LevelFunction` to an unconditional U-Net, unless it has one."""
    if not unet.sees_steps:
        unet.model.class_embedding = LevelFunction(embedding_width(unet))
    return unet


def embedding_width(unet: UNet) -> int:
    """Width of the time embedding."""
    width: int = unet.model.time_embedding.linear_2.out_features
    return width


class LevelTimed(nn.Module):
    """A U-Net on the levels of the sampler's steps: (x [N, C, H, W], timestep int64 [N]) -> [N, C, H, W].

    Args:
        network: U-Net of `see_steps_`.
        levels: levels of the sampler's steps.
        diffusion: diffusion of its pretraining, which gives its time and input scale at a level.
    """

    def __init__(self, network: UNet, levels: StepLevels, diffusion: EDM) -> None:
        super().__init__()
        self.network, self.levels, self.diffusion = network, levels, diffusion

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        sigma, inputs = self.levels.sigma[timestep], self.levels.inputs[timestep]
        scaled = x * per_row(self.diffusion.input_scale(sigma).to(x.dtype), x)
        return self.network(scaled, self.diffusion.time(sigma), None, inputs.to(x.dtype))


class LevelEncoderValue(EncoderValue):
    """An `EncoderValue` on the levels of the sampler's steps; V^T is the energy.

    Args:
        unet, width: see `EncoderValue`.
        levels, diffusion: see `LevelTimed`.
        lowest: level of the encoder for images with less noise.
    """

    def __init__(
        self, unet: UNet, levels: StepLevels, diffusion: EDM, lowest: float, width: int = 64
    ) -> None:
        at_end = torch.tensor([lowest])
        super().__init__(unet, diffusion.time(at_end), diffusion.input_scale(at_end), width)
        self.levels, self.diffusion, self.lowest = levels, diffusion, lowest
        self.steps = LevelFunction(embedding_width(unet))

    def seen(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        sigma = self.levels.sigma[timestep].clamp(min=self.lowest)
        change = self.steps(self.levels.inputs[timestep])
        return self.diffusion.time(sigma), self.diffusion.input_scale(sigma), change
