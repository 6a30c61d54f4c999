"""Small networks for 2D data that see the noise levels of a step, and so serve chains of any length.

Imports torch, ``dxmi_ext.method.lengths`` and ``two_d.networks``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dxmi_ext.method.lengths import LevelFunction, StepLevels
from dxmi_ext.two_d.networks import FirstLayer, hidden_layers


class LevelSamplerMLP(nn.Module):
    """(x [N, D], timestep [N]) -> [N, D]; the levels of the step scale and shift every hidden layer.

    The output is initialized to zero, so an untrained sampler is a random walk.

    Args:
        levels: levels of the sampler's steps.
        dim, width, depth, octaves, extent: see `networks.SamplerMLP`.
    """

    def __init__(
        self, levels: StepLevels, dim: int, width: int, depth: int, octaves: int = 0, extent: float = 4.0
    ) -> None:
        super().__init__()
        self.levels = levels
        self.layers = nn.ModuleList([FirstLayer(dim, width, octaves, extent)])
        self.layers.extend(layer for layer in hidden_layers(width, depth) if isinstance(layer, nn.Linear))
        self.modulation = LevelFunction(2 * width * depth)
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        changes = self.modulation(self.levels.inputs)[timestep].chunk(2 * len(self.layers), dim=1)
        for layer, scale, shift in zip(self.layers, changes[::2], changes[1::2], strict=True):
            x = nn.functional.leaky_relu(layer(x) * (1 + scale) + shift, 0.2)
        return self.last(x)


class LevelValueMLP(nn.Module):
    """V^t(x): (x [N, D], timestep [N]) -> [N]. V^T is the energy, a linear head on a trunk for the longest
    chain; steps, and the energies of shorter chains, add a function of their inputs, zero at first, whose
    losses do not train that head.

    Args:
        levels: levels of the sampler's steps.
        dim, width, depth, octaves, extent: see `networks.ValueMLP`.
    """

    def __init__(
        self, levels: StepLevels, dim: int, width: int, depth: int, octaves: int = 0, extent: float = 4.0
    ) -> None:
        super().__init__()
        self.levels = levels
        self.trunk = nn.Sequential(FirstLayer(dim, width, octaves, extent), hidden_layers(width, depth))
        self.energy = nn.Linear(width, 1)
        self.head = LevelFunction(width + 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        inputs = self.levels.inputs
        own = torch.cat((self.energy.weight, self.energy.bias[None]), dim=1)
        differs = inputs.any(1, keepdim=True)  # from the end of the longest chain
        heads = torch.where(differs, own.detach() + self.head(inputs), own)
        values = nn.functional.linear(self.trunk(x), heads[:, :-1], heads[:, -1])
        return values.gather(1, timestep[:, None])[:, 0]
