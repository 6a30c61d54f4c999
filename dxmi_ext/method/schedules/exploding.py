"""Variance-exploding schedules: x_t = data + sigma_t eps.

Imports torch and ``dxmi_ext.engine.arguments``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dxmi_ext.engine.arguments import at_least, of_type
from dxmi_ext.method.schedules.tables import Schedule, check_fraction, from_levels, posterior_std


def variance_exploding(
    steps: int,
    *,
    sigma_max: float,
    sigma_min: float,
    min_std: float = 0.05,
    prediction: str = "eps",
    places: Tensor | None = None,
) -> Schedule:
    """Ancestral sampling on geometric noise levels sigma_max .. sigma_min, 0.

    Args:
        steps: T; a single step is at sigma_max.
        sigma_max: noise level of the sample at the first step.
        sigma_min: noise level of the sample at the last step.
        min_std: lower bound of the posterior's standard deviation, which is 0 at the last step.
        prediction: what the network predicts; see `from_levels`.
        places: places of the levels between the first, 0, and the last, 1, on the log scale, ascending [T];
            None: evenly spaced.
    """
    at_least("steps", steps, 1)
    _check_sigmas(sigma_min, sigma_max)
    sigmas = _between(math.log(sigma_max), math.log(sigma_min), steps, places).exp()
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
    places: Tensor | None = None,
) -> Schedule:
    """Ancestral sampling on the levels of Karras et al. 2022, eq. 5 (DxMI, sec. 5.2: ImageNet and LSUN).

    Args:
        steps: T, at least 2.
        sigma_max: the first level.
        sigma_min: the last level.
        rho: density of the levels near the data; the paper uses 7 for T = 10 and 4 for T = 4.
        stochastic_last: False: T levels, and the last step goes from sigma_min to the data with noise of
            min_std. True: T + 1 levels, and the last step goes to sigma_min, with the posterior's standard
            deviation, so that samples keep noise of sigma_min.
        eta: factor of the posterior's standard deviation; 0 is Euler's method on the probability flow ODE.
        prediction: what the network predicts; see `from_levels`.
        sigma_data: standard deviation of the data, for the prediction "edm".
        time_scale: factor of the network's time ln(sigma) / 4; 1000 for consistency models.
        min_std: lower bound of a step's standard deviation.
        places: places of the levels, as in `variance_exploding`, on the scale of their rho-th roots.
    """
    at_least("steps", steps, 2)
    _check_sigmas(sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho must be > 0, got {rho}")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = _between(*ends, steps + stochastic_last, places) ** rho
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


def _between(first: float, last: float, count: int, places: Tensor | None) -> Tensor:
    if places is None:
        return torch.linspace(first, last, count, dtype=torch.float64)
    of_type("places", places, Tensor, "a tensor or None")
    if places.shape != (count,) or not (places.diff() >= 0).all() or places[0] < 0 or places[-1] > 1:
        raise ValueError(f"places must be {count} ascending numbers within [0, 1], got {places}")
    return first + (last - first) * places.double()


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min, sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}"
        )
