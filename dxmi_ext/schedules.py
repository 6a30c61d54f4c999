"""Schedules as tables for `ops.sampler_step`, from noise (t = 0) to data (t = T - 1). Imports torch alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Schedule(NamedTuple):
    """A few-step Gaussian sampler, but for its network. Tables are float64 [T]."""

    sample_coef: Tensor
    output_coef: Tensor
    log_std: Tensor
    signal: Tensor
    """The network meets x_t = signal[t] data + noise[t] eps at step t; what pretraining teaches it."""
    noise: Tensor
    initial_std: float
    """x_0 ~ N(0, initial_std^2 I)."""


def ddpm(betas: Tensor, *, min_std: float = 0.05) -> Schedule:
    """Variance-preserving ancestral sampling with an eps-prediction network.

    Args:
        betas: [T], in the order of the forward diffusion.
        min_std: lower bound of the posterior's standard deviation, which is 0 at the last step.
    """
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas: got {betas}, wants a vector within (0, 1)")
    _check_min_std(min_std)
    betas = betas.double()
    alphas = 1 - betas
    alpha_bar = alphas.cumprod(0)
    previous = torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
    posterior_std = (betas * (1 - previous) / (1 - alpha_bar)).sqrt()
    return Schedule(
        sample_coef=alphas.rsqrt().flip(0),
        output_coef=(-betas / ((1 - alpha_bar) * alphas).sqrt()).flip(0),
        log_std=posterior_std.clamp(min=min_std).log().flip(0),
        signal=alpha_bar.sqrt().flip(0),
        noise=(1 - alpha_bar).sqrt().flip(0),
        initial_std=1.0,
    )


def variance_exploding(steps: int, *, sigma_max: float, sigma_min: float, min_std: float = 0.05) -> Schedule:
    """Ancestral sampling on geometric noise levels sigma_max .. sigma_min, 0 with an eps-prediction network.

    Args:
        steps: T, at least 2.
        sigma_max, sigma_min: noise levels at which the first and the last step see the sample.
        min_std: lower bound of the posterior's standard deviation, which is 0 at the last step.
    """
    if steps < 2:
        raise ValueError(f"steps: got {steps}, wants 2 or more")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}, wants 0 < sigma_min < sigma_max"
        )
    _check_min_std(min_std)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()
    following = torch.cat((levels[1:], levels.new_zeros(1)))
    removed_var = levels**2 - following**2
    posterior_std = following * removed_var.sqrt() / levels
    return Schedule(
        sample_coef=torch.ones_like(levels),
        output_coef=-removed_var / levels,
        log_std=posterior_std.clamp(min=min_std).log(),
        signal=torch.ones_like(levels),
        noise=levels,
        initial_std=sigma_max,
    )


def _check_min_std(min_std: float) -> None:
    if not min_std > 0:  # log sigma is trained, so it must be finite
        raise ValueError(f"min_std: got {min_std}, wants more than 0")
