"""Importance weights of a sampler's paths: log Z of an energy, so its normalized density.

log w = -E(x_T) / w' + sum_t [log q(x_t | x_{t+1}) - log pi(x_{t+1} | x_t)] - log pi_0(x_0) with the density's
temperature w'. The mean of w over paths of pi is Z, whatever the Gaussian backward kernels q. Imports torch,
``dxmi_ext.ops`` and the method up to networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.method import noise
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import flat
from dxmi_ext.method.schedules import Schedule

_PILOT = 4000  # paths for the choice of a backward kernel
_BATCH = 10_000  # paths at a time


class Kernel(NamedTuple):
    """q(x_t | x_{t+1}) = N(coef x_{t+1}, exp(2 log_std)), [T] both."""

    coef: Tensor
    log_std: Tensor

    @classmethod
    def noising(cls, schedule: Schedule) -> Kernel:
        """The kernel that leads from each noise level of a schedule to the one before, the last from clean
        data."""
        one = schedule.signal.new_ones(1)
        signal, level = torch.cat((schedule.signal, one)), torch.cat((schedule.noise, 0 * one))
        coef = signal[:-1] / signal[1:]
        variance = level[:-1].square() - (coef * level[1:]).square()
        return cls(coef.float(), (variance.log() / 2).float())


class Forward(NamedTuple):
    """pi(x_{t+1} | x_t) = N(sample_coef x_t + output_coef output, exp(2 log_std)), [T] each."""

    sample_coef: Tensor
    output_coef: Tensor
    log_std: Tensor


@torch.no_grad()
def log_ratio(
    path: Tensor, output: Callable[[Tensor, Tensor], Tensor], forward: Forward, kernel: Kernel
) -> Tensor:
    """sum_t [log q(x_t | x_{t+1}) - log pi(x_{t+1} | x_t)] of paths [T + 1, n, *], float64 [n].

    Args:
        output: output from which the means of pi are computed, (x_t [n, *], t int64 [n] in 0..T - 1) ->
            [n, *].
    """
    n, dim = path.shape[1], math.prod(path.shape[2:])
    total, nothing = torch.zeros(n, dtype=torch.float64, device=path.device), torch.zeros_like(path[0])
    backward = kernel.coef, torch.zeros_like(kernel.coef), kernel.log_std
    for t in range(len(path) - 1):
        x, following, timestep = path[t], path[t + 1], torch.full((n,), t, device=path.device)
        log_pi = ops.transition_log_prob(following, x, output(x, timestep), timestep, *forward)
        log_q = ops.transition_log_prob(x, following, nothing, timestep, *backward)
        total += dim * (log_q - log_pi).double()  # the op's are means over dimensions
    return total


def of_weights(log_w: Tensor) -> dict[str, float]:
    """Estimates from weights of paths, log w float64 [n].

    Returns:
        log_partition: log mean w, an estimate of log Z; log_partition_std: its standard error (delta method);
        elbo: mean log w, a lower bound of log Z; ess: (sum w)^2 / (n sum w^2), in (0, 1].
    """
    n, log_w = len(log_w), log_w.double()
    log_mean = float(log_w.logsumexp(0)) - math.log(n)
    weights = (log_w - log_w.max()).exp()  # without log_mean, which is rounded to more than 1 for huge log w
    relative = weights / weights.mean()
    return {
        "log_partition": log_mean,
        "log_partition_std": float(relative.std() / math.sqrt(n)),
        "elbo": float(log_w.mean()),
        "ess": float(1 / relative.square().mean()),
    }


def of_reverse_weights(log_w: Tensor) -> dict[str, float]:
    """Estimates from log w [n] of paths drawn backwards from exact samples.

    Returns:
        eubo: mean log w, an upper bound of log Z; ess_reverse: the effective sample size under the sampler,
        1 / (mean w mean 1/w), estimated from these paths; it is small if the sampler misses a mode.
    """
    log_w = log_w.double()
    means = (each.logsumexp(0) - math.log(len(log_w)) for each in (log_w, -log_w))
    return {"eubo": float(log_w.mean()), "ess_reverse": math.exp(-float(sum(means)))}


# --- of energies that were learned -------------------------------------------------------------------


def log_partition(
    networks: Networks, temperature: float, kernels: Mapping[str, Kernel], *, n: int, seed: int
) -> dict[str, Any]:
    """log Z of the density exp(-E / temperature) / Z, from paths of the networks' own sampler.

    Of several backward kernels, the one with the largest effective sample size on separate paths is used: the
    given ones; ``velocity``, N(x_{t+1}, s_t^2) with s_t^2 the mean squared displacement of each step, as
    adaptive velocity regularization finds it; ``fitted``, N(a_t x_{t+1}, b_t^2) by least squares.

    Args:
        networks: networks whose sampler starts from normal noise.
        kernels: further backward kernels, by name.
        n: number of paths.
        seed: seed of their noise.

    Returns:
        The numbers of `of_weights`, and kernel: the name of the backward kernel.

    Raises:
        ValueError: the paths of the sampler have no density, or the temperature is not positive.
        ArithmeticError: no kernel gives the paths finite weights.
    """
    sampler = networks.sampler
    if sampler.start is not None:
        raise ValueError("networks must have a sampler that starts from noise, or its paths have no density")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    keys = noise.Draws(seed, "log partition", ["pilot", "paths"], sampler.log_std.device).at(0)
    pilot = sampler.rollout(_PILOT, keys["pilot"]).samples
    tried = {**kernels, **_fits(pilot)}
    weighed = _all_weights(networks, temperature, pilot, tried)
    found = {name: of_weights(log_w)["ess"] for name, log_w in weighed.items()}
    finite = {name: ess for name, ess in found.items() if math.isfinite(ess)}
    if not finite:
        raise ArithmeticError(f"paths must have finite weights by one of {', '.join(found)}, got none")
    best = max(finite, key=lambda name: finite[name])
    parts: list[Tensor] = []
    for first in range(0, n, _BATCH):
        path = sampler.rollout(min(_BATCH, n - first), keys["paths"], sample_offset=first).samples
        parts += _all_weights(networks, temperature, path, {best: tried[best]}).values()
    return {**of_weights(torch.cat(parts)), "kernel": best}


def _fits(path: Tensor) -> dict[str, Kernel]:
    """Backward kernels fitted to paths [T + 1, n, *]."""
    x, following = path[:-1].flatten(1).double(), path[1:].flatten(1).double()
    coef = (x * following).mean(1) / following.square().mean(1)
    log_std = {
        "velocity": (following - x).square().mean(1).log() / 2,
        "fitted": (x - coef[:, None] * following).square().mean(1).log() / 2,
    }
    coefs = {"velocity": torch.ones_like(coef), "fitted": coef}
    return {name: Kernel(coefs[name].float(), std.float()) for name, std in log_std.items()}


@torch.no_grad()
def _all_weights(
    networks: Networks, temperature: float, path: Tensor, kernels: Mapping[str, Kernel]
) -> dict[str, Tensor]:
    """log w of paths [T + 1, n, *] by each kernel."""
    sampler = networks.sampler
    forward = Forward(*(table[sampler.rows] for table in sampler.tables))
    start = path[0].double() / sampler.initial_std
    log_start = -flat(start).square().sum(1) / 2
    log_start -= sampler.dim * (math.log(sampler.initial_std) + math.log(2 * math.pi) / 2)
    log_ends = -networks.energy(path[-1]).double() / temperature - log_start

    def output(x: Tensor, timestep: Tensor) -> Tensor:
        return call(sampler.network, x, sampler.timesteps[timestep])

    return {name: log_ends + log_ratio(path, output, forward, kernel) for name, kernel in kernels.items()}
