"""Small networks for 2D data. Imports torch alone."""

from __future__ import annotations

from torch import Tensor, nn


class SamplerMLP(nn.Module):
    """(x [N, D], timestep [N]) -> [N, D]; the step enters as an embedding added to the first layer.

    Args:
        dim: D.
        steps: T.
        width, depth: of the hidden layers.
    """

    def __init__(self, dim: int, steps: int, width: int, depth: int) -> None:
        super().__init__()
        self.step = nn.Embedding(steps, width)
        self.first = nn.Linear(dim, width)
        self.rest = _hidden(width, depth)
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.rest(self.first(x) + self.step(timestep)))


class ValueMLP(nn.Module):
    """V^t(x): (x [N, D], timestep [N]) -> [N], for t = 0..T. V^T is the energy (DxMI, sec. 1).

    One trunk serves all steps; each has a linear head of its own.

    Args:
        dim: D.
        steps: T.
        width, depth: of the hidden layers.
    """

    def __init__(self, dim: int, steps: int, width: int, depth: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(dim, width), _hidden(width, depth))
        self.heads = nn.Linear(width, steps + 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.heads(self.trunk(x)).gather(1, timestep[:, None])[:, 0]


def _hidden(width: int, depth: int) -> nn.Sequential:
    """Everything between the first and the last linear layer, both activations included."""
    layers: list[nn.Module] = [nn.LeakyReLU(0.2)]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)
