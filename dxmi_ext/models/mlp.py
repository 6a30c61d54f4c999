"""Small networks for 2D data. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SamplerMLP(nn.Module):
    """(x [N, D], timestep [N]) -> [N, D]; the step enters as an embedding added to the first layer.

    The output starts at zero, so an untrained sampler is a plain random walk.

    Args:
        dim: D.
        steps: T.
        width, depth: of the hidden layers.
        extent: the data lie within [-extent, extent].
    """

    def __init__(self, dim: int, steps: int, width: int, depth: int, extent: float = 4.0) -> None:
        super().__init__()
        self.step = nn.Embedding(steps, width)
        self.first = _first_layer(dim, width, extent)
        self.rest = _hidden_layers(width, depth)
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.rest(self.first(x) + self.step(timestep)))


class ValueMLP(nn.Module):
    """V^t(x): (x [N, D], timestep [N]) -> [N], for t = 0..T. V^T is the energy (DxMI, sec. 1).

    One trunk serves all steps; each step's linear head adds to those after it, so that V^t is the energy plus
    the cost that remains. A step's loss trains the trunk and its own head. All but the energy's head start at
    zero: values need not learn anew what the energy knows.

    Args:
        dim: D.
        steps: T.
        width, depth: of the hidden layers.
        extent: the data lie within [-extent, extent].
    """

    def __init__(self, dim: int, steps: int, width: int, depth: int, extent: float = 4.0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(_first_layer(dim, width, extent), _hidden_layers(width, depth))
        self.heads = nn.Linear(width, steps + 1)
        with torch.no_grad():
            self.heads.weight[:-1] = 0
            self.heads.bias[:-1] = 0
        self.later: Tensor
        self.register_buffer("later", torch.ones(steps + 1, steps + 1).triu(1), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        # Each head plus those of later steps, which get no gradient here.
        weight = torch.addmm(self.heads.weight, self.later, self.heads.weight.detach())
        bias = torch.addmv(self.heads.bias, self.later, self.heads.bias.detach())
        values = nn.functional.linear(self.trunk(x), weight, bias)
        return values.gather(1, timestep[:, None])[:, 0]


class EnergyMLP(nn.Module):
    """E(x): (x [N, D]) -> [N]. Arguments as in `ValueMLP`."""

    def __init__(self, dim: int, width: int, depth: int, extent: float = 4.0) -> None:
        super().__init__()
        layers = _first_layer(dim, width, extent), _hidden_layers(width, depth), nn.Linear(width, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


def _first_layer(dim: int, width: int, extent: float) -> nn.Linear:
    """Units whose kinks are spread over the data, rather than crowded at the origin."""
    layer = _layer(dim, width)
    with torch.no_grad():
        distance = torch.empty(width).uniform_(-extent, extent)
        layer.bias.copy_(distance * layer.weight.norm(dim=1))
    return layer


def _hidden_layers(width: int, depth: int) -> nn.Sequential:
    """Everything between the first and the last linear layer, both activations included."""
    layers: list[nn.Module] = [nn.LeakyReLU(0.2)]
    for _ in range(depth - 1):
        layers += [_layer(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def _layer(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, a=0.2, nonlinearity="leaky_relu")
    nn.init.zeros_(layer.bias)
    return layer
