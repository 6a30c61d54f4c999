"""Costs of a sampler's steps: entropy, running cost and time cost, with temperatures and velocity variances
that change over a run.

Imports torch, ``dxmi_ext.ops`` and the method up to the sampler.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.method.lengths import lengths_of
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.temperature import Temperature


class Taus(NamedTuple):
    """Temperatures of a loss."""

    entropy: float
    velocity: float


class Costs:
    """Costs of steps in the losses of value and sampler.

    Args:
        settings: settings of the algorithm.
        sampler: sampler that takes the steps.
        ranks: ranks whose samples the temperature follows.

    Attributes:
        velocity_var: s_t^2 [T] of the usual levels, which AVR adapts in place.
        temperature: common factor of all taus, if it is automatic.
    """

    def __init__(self, settings: DxMISettings, sampler: GaussianSampler, ranks: Ranks) -> None:
        self._sampler, self._settings = sampler, settings
        dim = sampler.dim
        self._taus = {loss: taus(settings, loss, dim) for loss in ("value", "sampler")}
        log_std = sampler.log_std.detach()
        self.velocity_var = (2 * log_std).exp()  # s_t^2 starts at sigma_t^2
        tables = [time_costs(settings.time_cost, steps) for steps in lengths_of(sampler)]
        self.time_cost = torch.cat(tables).to(log_std)
        self.temperature: Temperature | None = None
        if settings.tau_rate:
            self.temperature = Temperature(
                settings.tau_rate,
                log_std.new_ones(()),
                ranks,
                margin=settings.tau_margin,
                hold=settings.tau_hold,
            )
        self._cooled = 1.0  # factor of all taus

    @property
    def tau_factor(self) -> float:
        """The factor of all taus with which the averaged energy was trained."""
        return 1.0 if self.temperature is None else float(self.temperature.factor)

    @property
    def cools(self) -> bool:
        """Whether tau has begun to fall by ``tau_cooling``."""
        return self._cooled < 1

    def of(self, loss: str, sq_displacement: Tensor, timestep: Tensor) -> Tensor:
        """Entropy and running cost of steps in a loss, value or sampler, [N].

        Args:
            sq_displacement: [N].
            timestep: int64 [N].
        """
        tables, skipped = (self._sampler.log_std, self._velocity_var()), self._settings.skip_last
        cost = ops.running_cost(sq_displacement, timestep, *tables, *self._now(loss), skip_last=skipped)
        return cost if self.temperature is None else cost * self.temperature.factor

    def td_target(self, next_value: Tensor, sq_displacement: Tensor, timestep: Tensor) -> Tensor:
        """The regression target of V^t, from V^{t+1}; all [N], without gradient (DxMI, eq. 9)."""
        if self.temperature is None:
            tables = self._sampler.log_std, self._velocity_var(), self.time_cost
            skipped = self._settings.skip_last
            return ops.td_target(
                next_value, sq_displacement, timestep, *tables, *self._now("value"), skip_last=skipped
            )
        # The kernel takes taus as numbers; these are on the device.
        costs = self.of("value", sq_displacement, timestep) + self.time_cost[timestep]
        return (next_value + costs).detach()

    def entropy_noise(self, log_prob: Tensor, timestep: Tensor) -> Tensor:
        """Tau times the difference between the log probability of a step taken and its mean, [N].

        In a value's target, it is 0 on average, but cancels most of the noise of the running cost and of the
        next value; for an optimal sampler, it cancels all of it.

        Args:
            log_prob: [N], mean over D.
            timestep: int64 [N].
        """
        mean = -self._sampler.log_std[timestep] - (1 + math.log(2 * math.pi)) / 2
        added = self._now("value").entropy * (log_prob - mean)
        if self.temperature is not None:
            added = added * self.temperature.factor
        return added * (timestep < self._sampler.end - self._settings.skip_last)

    def begin(self, done: float) -> None:
        """Updates what depends on the progress of the run, from 0 at its start to 1 at its end."""
        if self.temperature is not None:
            self.temperature.at(done)
        self._cooled = cooled(self._settings, done)

    def adapt(self, sq_displacement: Tensor, data: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """Adaptive velocity regularization, and a step of the temperature; in place.

        Args:
            sq_displacement: [T], mean over all ranks for each step of the chain in use.
            data, samples: this rank's rows [N, *].

        Returns:
            The metrics to log.
        """
        velocity_var = self.velocity_var[self._sampler.rows]  # a view
        if (scale := self._sampler.displacement_scale) is not None:
            sq_displacement = sq_displacement / scale
        moved = torch.where(
            sq_displacement < math.inf, sq_displacement, velocity_var
        )  # NaN would never leave the average
        ops.update_velocity_var_(velocity_var, moved[:, None], self._settings.velocity_decay)
        if self._settings.tau_cooling < 1:
            return {"temperature": data.new_full((), self._cooled)}
        return {} if self.temperature is None else self.temperature.update(data, samples)

    def parts(self) -> dict[str, Any]:
        """The state; see `Stepper.parts`."""
        return {
            "velocity_var": self.velocity_var,
            **({} if self.temperature is None else {"temperature": self.temperature.factor}),
        }

    def _velocity_var(self) -> Tensor:
        """s_t^2 for the levels of the chain in use."""
        scale = self._sampler.displacement_scale
        if scale is None:
            return self.velocity_var
        scaled = self.velocity_var.clone()
        scaled[self._sampler.rows] *= scale
        return scaled

    def _now(self, loss: str) -> Taus:
        return Taus(*(self._cooled * tau for tau in self._taus[loss]))


def cooled(settings: DxMISettings, done: float) -> float:
    """The factor of tau by ``tau_cooling`` for the progress of the run, 0 at its start and 1 at its end."""
    falling = max(0.0, (done - settings.tau_hold) / (1 - settings.tau_hold))
    return settings.tau_cooling**falling


def taus(settings: DxMISettings, loss: str, dim: int) -> Taus:
    """The temperatures in a loss, value or sampler, of data with `dim` dimensions."""
    if settings.costs_in not in ("both", loss):
        return Taus(0.0, 0.0)
    factor = dim if settings.cost_reduction == "sum" else 1
    return Taus(settings.entropy_tau * factor, settings.velocity_tau * factor)


def density_temperature(settings: DxMISettings, dim: int) -> float:
    """w in exp(-E / w) / Z, the density toward which a sampler of `dim` dimensions is trained: the weight of
    the entropy as a sum over dimensions. 0 without entropy."""
    return settings.entropy_tau if settings.cost_reduction == "sum" else settings.entropy_tau / dim


def time_costs(kind: str, steps: int) -> Tensor:
    """R(t), [T]: the fixed costs of DxMI's Algorithm 2. sigmoid sums to about 1 over the path."""
    t = torch.arange(steps, dtype=torch.float64)
    return {
        "none": torch.zeros_like(t),
        "linear": torch.full_like(t, 0.05),
        "sigmoid": torch.sigmoid(steps / 2 - t) - torch.sigmoid(steps / 2 - t - 1),
    }[kind]
