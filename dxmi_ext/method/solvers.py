"""Deterministic solvers of a diffusion model's probability flow ODE, as alternatives to DxMI's sampler.

Heun's method (Karras et al. 2022, Alg. 1) and DPM-Solver++ 2M (Lu et al. 2022, Alg. 2), both on levels
x = data + sigma eps. Imports torch and ``dxmi_ext``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.method.schedules import reading

_RHO = 7.0
Denoise = Callable[[Tensor, float], Tensor]
"""(x [N, *], sigma) -> predicted data [N, *]."""


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Heun's method, of second order: 2 evaluations per step, 1 in the last.

    Args:
        denoise: denoiser.
        x: data + sigmas[0] eps, [N, *].
        sigmas: decreasing noise levels that end at 0.
    """
    for sigma, following in itertools.pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (euler - denoise(euler, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def dpm_solver(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DPM-Solver++ 2M: second order from the last two predictions, 1 evaluation per step.

    Args:
        denoise, x, sigmas: see `heun`.
    """
    data, width = None, 0.0
    for sigma, following in itertools.pairwise(sigmas):
        earlier, earlier_width = data, width
        data = denoise(x, sigma)
        width = math.log(sigma / following) if following > 0 else math.inf
        ahead = data  # the first and the last step are of first order
        if earlier is not None and following > 0:
            ahead = data + (data - earlier) * width / (2 * earlier_width)
        x = following / sigma * x + (1 - following / sigma) * ahead
    return x


SOLVERS: dict[str, Callable[[Denoise, Tensor, Sequence[float]], Tensor]] = {"heun": heun, "dpmpp": dpm_solver}
"""Solvers by their names in `dxmi evaluate chain=`."""


class SolverSampler(nn.Module):
    """Samples a pretrained network with a solver, with the interface of `GaussianSampler.sample`.

    Args:
        network: (x [N, *], time [N]) -> [N, *], with labels [N] if it is conditional.
        solver: one of ``SOLVERS``.
        sigmas: decreasing noise levels that end at 0.
        time: sigma -> the network's time input.
        prediction, sigma_data: what the network predicts; see `schedules.from_levels`.
        preserving: whether the network's input is variance preserving.
        data_shape: shape of a sample.
        clip: whether to clip predicted data to [-1, 1].
    """

    def __init__(
        self,
        network: nn.Module,
        solver: Callable[[Denoise, Tensor, Sequence[float]], Tensor],
        sigmas: Sequence[float],
        *,
        time: Callable[[float], float],
        prediction: str,
        sigma_data: float = 1.0,
        preserving: bool,
        data_shape: Sequence[int],
        clip: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.data_shape = network, tuple(data_shape)
        self._solver, self._sigmas, self._time = solver, list(sigmas), time
        self._prediction, self._sigma_data, self._preserving = prediction, sigma_data, preserving
        self._clip = clip

    @torch.no_grad()
    def sample(
        self,
        n: int,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        sample_offset: int = 0,
        batch_size: int = 4096,
    ) -> Tensor:
        """Samples [n, *], on the key's device; row i depends on (key, sample_offset + i) alone.

        Args:
            labels: [n], for a conditional network.
            batch_size: rows per call of the network.
        """
        batches = []
        for first in range(0, n, batch_size):
            count = min(batch_size, n - first)
            rows = None if labels is None else labels[first : first + count]
            noise = ops.normal((count, *self.data_shape), key, sample_offset=sample_offset + first)
            batches.append(self._solver(self._denoiser(rows), self._sigmas[0] * noise, self._sigmas))
        return torch.cat(batches) if batches else ops.normal((0, *self.data_shape), key)

    def _denoiser(self, labels: Tensor | None) -> Denoise:
        def denoise(x: Tensor, sigma: float) -> Tensor:
            signal = (1 + sigma**2) ** -0.5 if self._preserving else 1.0
            levels = torch.tensor([signal, sigma * signal], dtype=torch.float64)
            skip, out, scale = (
                c.item() for c in reading(self._prediction, levels[0], levels[1], self._sigma_data)
            )
            x = signal * x
            time = x.new_full((len(x),), self._time(sigma))
            data = skip * x + out * call(self.network, scale * x, time, labels)
            return data.clamp(-1, 1) if self._clip else data

        return denoise


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float) -> list[float]:
    """The levels of Karras et al. 2022, eq. 5, with rho = 7, followed by 0."""
    ends = sigma_max ** (1 / _RHO), sigma_min ** (1 / _RHO)
    return [*(torch.linspace(*ends, steps, dtype=torch.float64) ** _RHO).tolist(), 0.0]


def time_in_table(betas: Tensor) -> tuple[Callable[[float], float], float, float]:
    """The time of a discrete-time diffusion, fractional in general, as a function of sigma, and the smallest
    and largest sigma.

    Args:
        betas: float64 [steps], in the order of the forward process.
    """
    import numpy as np

    alpha_bar = (1 - betas).cumprod(0)
    log_sigmas = ((1 - alpha_bar) / alpha_bar).log().div(2).numpy()
    places: Any = np.arange(len(betas))

    def time(sigma: float) -> float:
        return float(np.interp(math.log(sigma), log_sigmas, places))

    return time, math.exp(log_sigmas[0]), math.exp(log_sigmas[-1])
