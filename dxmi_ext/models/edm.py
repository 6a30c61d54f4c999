"""EDM's preconditioning and training objective (Karras et al. 2022, Table 1). Imports torch alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Coefficients(NamedTuple):
    """D(x; sigma) = skip x + out network(input x, time); each [N]."""

    skip: Tensor
    out: Tensor
    input: Tensor
    time: Tensor


class EDM(NamedTuple):
    """How a network is wrapped into a denoiser D of x = data + sigma eps."""

    sigma_data: float = 0.5
    """Standard deviation of the data."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    """Noise levels between which it was trained."""
    time_scale: float = 1.0
    """The network's time is time_scale ln(sigma) / 4; 1000 in consistency models."""
    boundary: bool = False
    """A consistency function, D(x; sigma_min) = x (Song et al. 2023, appendix C)."""

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Of noise levels [N]."""
        data_var, var = self.sigma_data**2, sigma**2
        above = sigma - self.sigma_min if self.boundary else sigma
        norm = (var + data_var).sqrt()
        return Coefficients(
            skip=data_var / (above**2 + data_var),
            out=above * self.sigma_data / norm,
            input=1 / norm,
            time=self.time_scale / 4 * sigma.log(),
        )

    def weight(self, sigma: Tensor) -> Tensor:
        """The objective's weight of noise levels [N], with which every level starts with the same loss."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class Denoiser(nn.Module):
    """D: (x [N, *], sigma [N], labels [N] where the network takes them) -> an estimate of the data, [N, *].

    Args:
        network: (x [N, *], time [N], labels [N]) -> [N, *].
        edm: its preconditioning.
    """

    def __init__(self, network: nn.Module, edm: EDM | None = None) -> None:
        super().__init__()
        self.network, self.edm = network, edm or EDM()

    def forward(self, x: Tensor, sigma: Tensor, *labels: Tensor) -> Tensor:
        skip, out, scale, time = self.edm.coefficients(sigma)
        output = self.network(_rows(scale, x) * x, time, *labels)
        return _rows(skip, x) * x + _rows(out, x) * output


def training_sigma(z: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Noise levels to train at, from standard normal z: ln sigma ~ N(mean, std^2). Defaults are EDM's."""
    return (mean + std * z).exp()


def edm_loss(denoiser: Denoiser, data: Tensor, sigma: Tensor, eps: Tensor, *labels: Tensor) -> Tensor:
    """EDM's objective, a mean over rows and dimensions.

    Args:
        denoiser: to be trained.
        data: [N, *].
        sigma: [N]; `training_sigma`.
        eps: standard normal noise [N, *].
        labels: [N], where the network takes them.
    """
    error = denoiser(torch.addcmul(data, _rows(sigma, data), eps), sigma, *labels) - data
    return (_rows(denoiser.edm.weight(sigma), data) * error**2).mean()


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """[N] as [N, 1, ...], in x's dtype."""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
