"""Small networks for 2D data. Imports torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SamplerMLP(nn.Module):
    """(x [N, D], timestep [N]) -> [N, D]; an embedding of the step is added to the first layer.

    The output is initialized to zero, so an untrained sampler is a random walk.

    Args:
        dim: D.
        steps: T.
        width, depth: width and number of the hidden layers.
        octaves: number of wavelengths of sinusoids of the coordinates in the input: 2 extent, extent, ...;
            helps a small network resolve fine structure (Tancik et al. 2020).
        extent: the data lie within [-extent, extent].
    """

    def __init__(
        self, dim: int, steps: int, width: int, depth: int, octaves: int = 0, extent: float = 4.0
    ) -> None:
        super().__init__()
        self.step = nn.Embedding(steps, width)
        self.first = FirstLayer(dim, width, octaves, extent)
        self.rest = hidden_layers(width, depth)
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.rest(self.first(x) + self.step(timestep)))


class ValueMLP(nn.Module):
    """V^t(x): (x [N, D], timestep [N]) -> [N], for t = 0..T. V^T is the energy.

    All steps share a trunk; each step's linear head adds to the later ones, so that V^t is the energy plus
    the remaining cost. A step's loss trains the trunk and its own head. All heads but the energy's are
    initialized to zero.

    Args:
        dim: D.
        steps: T, or each T of a sampler with several.
        width, depth, octaves, extent: see `SamplerMLP`.
    """

    def __init__(
        self,
        dim: int,
        steps: int | Sequence[int],
        width: int,
        depth: int,
        octaves: int = 0,
        extent: float = 4.0,
    ) -> None:
        super().__init__()
        lengths = [steps] if isinstance(steps, int) else steps
        total = sum(lengths)
        self.trunk = nn.Sequential(FirstLayer(dim, width, octaves, extent), hidden_layers(width, depth))
        self.heads = nn.Linear(width, total + 1)
        with torch.no_grad():
            self.heads.weight[:-1] = 0
            self.heads.bias[:-1] = 0
        self.later: Tensor
        chains = torch.block_diag(*(torch.ones(n, n).triu(1) for n in lengths))
        later = nn.functional.pad(chains, (0, 1, 0, 1))
        later[:-1, -1] = 1  # the energy's head comes after every step
        self.register_buffer("later", later, persistent=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        # Each head plus the detached later heads of its chain.
        weight = torch.addmm(self.heads.weight, self.later, self.heads.weight.detach())
        bias = torch.addmv(self.heads.bias, self.later, self.heads.bias.detach())
        values = nn.functional.linear(self.trunk(x), weight, bias)
        return values.gather(1, timestep[:, None])[:, 0]


class EnergyMLP(nn.Module):
    """E(x): (x [N, D]) -> [N]. See `ValueMLP` for the arguments."""

    def __init__(self, dim: int, width: int, depth: int, octaves: int = 0, extent: float = 4.0) -> None:
        super().__init__()
        layers = FirstLayer(dim, width, octaves, extent), hidden_layers(width, depth), nn.Linear(width, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


class FirstLayer(nn.Linear):
    """A linear layer on x and its sinusoids, [x, sin, cos], initialized with kinks spread over the data."""

    def __init__(self, dim: int, width: int, octaves: int, extent: float) -> None:
        super().__init__(dim * (1 + 2 * octaves), width)
        _start(self)
        with torch.no_grad():
            distance = torch.empty(width).uniform_(-extent, extent)
            self.bias.copy_(distance * self.weight[:, :dim].norm(dim=1))
        self.frequencies: Tensor
        self.register_buffer("frequencies", math.pi / extent * 2.0 ** torch.arange(octaves), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.frequencies):
            return super().forward(x)
        angles = (x.unsqueeze(2) * self.frequencies).flatten(1)
        return super().forward(torch.cat([x, angles.sin(), angles.cos()], dim=1))


def hidden_layers(width: int, depth: int) -> nn.Sequential:
    """The layers between the first and the last linear layer, including both activations."""
    layers: list[nn.Module] = [nn.LeakyReLU(0.2)]
    for _ in range(depth - 1):
        layers += [_layer(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def _layer(inputs: int, outputs: int) -> nn.Linear:
    return _start(nn.Linear(inputs, outputs))


def _start(layer: nn.Linear) -> nn.Linear:
    nn.init.kaiming_normal_(layer.weight, a=0.2, nonlinearity="leaky_relu")
    nn.init.zeros_(layer.bias)
    return layer
