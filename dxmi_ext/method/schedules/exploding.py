"""Variance-exploding schedules: x_t = data + sigma_t eps. Imports torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dxmi_ext.method.schedules.tables import Schedule, check_fraction, check_steps, from_levels, posterior_std


def variance_exploding(
    steps: int, *, sigma_max: float, sigma_min: float, min_std: float = 0.05, prediction: str = "eps"
) -> Schedule:
    """Ancestral sampling on geometric noise levels sigma_max .. sigma_min, 0.

    Args:
        steps: T; of one step, sigma_max is the level.
        sigma_max, sigma_min: noise levels at which the first and the last step see the sample.
        min_std: lower bound of the posterior's standard deviation, which is 0 at the last step.
        prediction: what the network tells, as in `from_levels`.
    """
    check_steps(steps)
    _check_sigmas(sigma_min, sigma_max)
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()
    return _ancestral(_with_zero(sigmas), sigma_max, min_std=min_std, prediction=prediction)


def edm(
    steps: int,
    *,
    sigma_max: float = 80.0,
    sigma_min: float = 0.002,
    rho: float = 7.0,
    stochastic_last: bool = False,
    eta: float = 1.0,
    prediction: str = "edm",
    sigma_data: float = 0.5,
    time_scale: float = 1.0,
    min_std: float = 1e-3,
) -> Schedule:
    """Ancestral sampling on the levels of Karras et al. 2022, eq. 5 (DxMI, sec. 5.2: ImageNet and LSUN).

    Args:
        steps: T, at least 2.
        sigma_max, sigma_min: the first and the last level.
        rho: how much denser levels are near the data; the paper takes 7 for T = 10, 4 for T = 4.
        stochastic_last: False: T levels, and the last step goes from sigma_min to the data, with nothing but
            min_std of noise. True: T + 1 levels, and the last step goes from the level before sigma_min to
            sigma_min itself, so that it has a posterior's std and the samples keep sigma_min of noise.
        eta: share of the posterior's std; 0 is Euler's method on the probability flow.
        prediction, sigma_data: what the network tells, as in `from_levels`.
        time_scale: the network gets time_scale ln(sigma) / 4; 1000 for the networks of consistency models.
        min_std: lower bound of a step's std.
    """
    check_steps(steps, 2)
    _check_sigmas(sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho: got {rho}, wants more than 0")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = torch.linspace(*ends, steps + stochastic_last, dtype=torch.float64) ** rho
    sigmas = sigmas if stochastic_last else _with_zero(sigmas)
    schedule = _ancestral(
        sigmas, sigma_max, eta=eta, min_std=min_std, prediction=prediction, sigma_data=sigma_data
    )
    return schedule._replace(time=time_scale * schedule.time)


def _ancestral(
    sigmas: Tensor,
    sigma_max: float,
    *,
    eta: float = 1.0,
    min_std: float,
    prediction: str,
    sigma_data: float = 0.5,
) -> Schedule:
    check_fraction("eta", eta)
    signal = torch.ones_like(sigmas)
    return from_levels(
        signal,
        sigmas,
        eta * posterior_std(signal, sigmas),
        time=sigmas[:-1].log() / 4,  # EDM's c_noise
        initial_std=sigma_max,
        min_std=min_std,
        prediction=prediction,
        sigma_data=sigma_data,
    )


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, wants 0 < sigma_min < sigma_max"
        )
