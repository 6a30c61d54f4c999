"""Variances of the noise of each step, and their cumulative levels.

Imports torch and ``method.schedules``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dxmi_ext.method import schedules
from dxmi_ext.method.schedules import Schedule


class Levels(NamedTuple):
    """Noise levels of a chain from noise to the target x_T. Backwards x_t is sqrt(1 - variance_t) x_{t+1} +
    sqrt(variance_t) eps (variance-preserving) or x_{t+1} + sqrt(variance_t) eps (variance-exploding). Tables
    are float64."""

    variance: Tensor
    """[T]"""
    growth: Tensor
    """alpha_t [T]: 1 / sqrt(1 - variance_t), or 1."""
    signal: Tensor
    """x_t = signal x_T + noise eps, [T + 1]."""
    noise: Tensor
    """[T + 1]; 0 at T."""
    scale: float
    """The target's standard deviation, roughly."""

    @property
    def steps(self) -> int:
        return len(self.variance)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the noise that a step adds, [T]."""
        return self.variance.sqrt() * self.growth

    @property
    def mode_var(self) -> float:
        """The variance m^2 of the narrowest mode: the last step's times T, at most the target's."""
        return min(float(self.variance[-1]) * self.steps, self.scale**2)

    @property
    def mode_std(self) -> Tensor:
        """The standard deviation of the narrowest mode of x_t, [T + 1]."""
        return (self.signal.square() * self.mode_var + self.noise.square()).sqrt()

    @property
    def detail(self) -> Tensor:
        """The share of the target's energy in -log density of x_t near a narrow mode, m^2 / (m^2 + noise^2),
        [T + 1]."""
        return self.mode_var / (self.mode_var + self.noise.square())

    @property
    def spread(self) -> Tensor:
        """The standard deviation of x_t, roughly, [T + 1]."""
        return ((self.signal * self.scale).square() + self.noise.square()).sqrt()


def levels(kind: str, spacing: str, steps: int, first: float, last: float, scale: float = 1.0) -> Levels:
    """Noise levels of T steps.

    Args:
        kind: vp or ve.
        spacing: spacing of the variances from first / T to last / T: linear, quad (linear in the roots) or
            exp.
        steps: T.
        first, last: variances of the first and the last step, times T.
        scale: the target's standard deviation, roughly.

    Raises:
        ValueError: a variance is not positive, or with vp not below 1.
    """
    ends = torch.tensor([first, last], dtype=torch.float64) / steps
    line = torch.linspace(0, 1, steps, dtype=torch.float64)
    if not (ends > 0).all() or (kind == "vp" and not (ends < 1).all()):
        raise ValueError(f"first and last must give variances > 0, and < 1 with vp, got {ends.tolist()}")
    if spacing == "linear":
        variance = ends[0] + line * (ends[1] - ends[0])
    elif spacing == "quad":
        variance = (ends[0].sqrt() + line * (ends[1].sqrt() - ends[0].sqrt())).square()
    else:
        variance = (ends[0].log() + line * (ends[1].log() - ends[0].log())).exp()
    growth = torch.ones_like(variance) if kind == "ve" else (1 - variance).rsqrt()
    one = torch.ones(1, dtype=torch.float64)
    signal = torch.cat(((1 / growth).flip(0).cumprod(0).flip(0), one))
    if kind == "ve":
        noise = torch.cat((variance.flip(0).cumsum(0).flip(0), 0 * one)).sqrt()
    else:
        noise = (1 - signal.square()).clamp(min=0).sqrt()
    return Levels(variance, growth, signal, noise, scale)


def policy_schedule(levels: Levels) -> Schedule:
    """The tables of a policy whose network predicts x_T with EDM's preconditioning. If the network is 0, the
    chain ends at N(0, scale^2)."""
    std = schedules.posterior_std(levels.signal, levels.noise)
    made = schedules.from_levels(
        *(levels.signal, levels.noise, std),
        time=torch.zeros_like(levels.variance),
        initial_std=float(levels.spread[0]),
        min_std=1e-6,
        prediction="edm",
        sigma_data=levels.scale,
    )
    return made._replace(log_std=(levels.std * levels.spread[1:] / levels.spread[:-1] / levels.growth).log())
