"""The losses of energy and sampler, by name.

Imports torch, ``dxmi_ext.ops`` and the method up to costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dxmi_ext import ops
from dxmi_ext.method.costs import Costs
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import Trajectory
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.stepper import Batch

# --- the energy's ------------------------------------------------------------------------------------

EnergyLoss = Callable[[Tensor, Tensor], Tensor]
"""(energies of data [N], energies of samples [M]) -> a scalar."""


def energy_loss(settings: DxMISettings) -> EnergyLoss:
    """The energy loss of the settings: contrast (DxMI) or noise_contrastive (N2CE)."""
    if settings.energy_loss == "noise_contrastive":
        return functools.partial(
            noise_contrastive_loss, gamma=settings.gamma, magnitude=settings.noise_magnitude
        )
    return lambda energy_data, energy_sample: ops.energy_loss(energy_data, energy_sample, settings.gamma)


def noise_contrastive_loss(
    energy_data: Tensor, energy_sample: Tensor, gamma: float, magnitude: float
) -> Tensor:
    """Logistic loss of data against samples weighted by ``magnitude``, where -E is the log ratio of their
    densities ("Noisier" NCE, arXiv 2405.16730), plus the squares of `ops.energy_loss`.

    The gradient at a sample is that of the contrast times exp(-E) / (1 + exp(-E) / magnitude), which is small
    where the energy is already high.

    Args:
        energy_data, energy_sample: [N], [M].
        gamma: weight of the mean squares.
        magnitude: M >= 1.
    """
    shift = math.log(magnitude)
    ratio = softplus(energy_data + shift).mean() + magnitude * softplus(-energy_sample - shift).mean()
    return ratio + gamma * (energy_data.square().mean() + energy_sample.square().mean())


# --- the sampler's -----------------------------------------------------------------------------------


class LossInputs(NamedTuple):
    """Inputs of the sampler's loss in one iteration."""

    networks: Networks
    """Networks to evaluate; value and energy are frozen."""
    sampler: nn.Module
    """Sampler as wrapped for training: a `GaussianSampler`, or its `LogProb` for the policy gradient."""
    costs: Costs
    path: Trajectory
    batch: Batch


SamplerLoss = Callable[[Tensor, Tensor], Tensor]
"""(step of each particle, int64 [N] in 0..T - 1; noise key) -> a scalar."""


def dxdp(inputs: LossInputs) -> SamplerLoss:
    """Value and cost of a redrawn step; the gradient flows through that step alone (DxMI, Alg. 1)."""
    networks, costs, batch = inputs.networks, inputs.costs, inputs.batch
    sampler = networks.sampler

    def loss(t: Tensor, key: Tensor) -> Tensor:
        step, timestep = inputs.path.at(t), sampler.timesteps[t]
        redrawn = inputs.sampler(step.sample, timestep, key, batch.labels, sample_offset=batch.offset)
        value = networks.value_at(redrawn.next_sample, sampler.after(timestep), batch.labels)
        return (value + costs.of("sampler", redrawn.sq_displacement, timestep)).mean()

    return loss


def policy_gradient(inputs: LossInputs) -> SamplerLoss:
    """Score of the steps taken, weighted by their advantage (GCD, arXiv 2312.03397)."""
    sampler, labels = inputs.networks.sampler, inputs.batch.labels
    advantage = advantages(inputs)
    dim = sampler.dim

    def loss(t: Tensor, key: Tensor) -> Tensor:
        step, timestep = inputs.path.at(t), sampler.timesteps[t]
        log_prob = inputs.sampler(step.sample, step.next_sample, timestep, labels)
        # The entropy bound depends on sigma directly, not only through the next sample.
        cost = inputs.costs.of("sampler", step.sq_displacement, timestep)
        return (advantage.gather(0, t[None])[0] * dim * log_prob + cost).mean()

    return loss


def backprop(inputs: LossInputs) -> SamplerLoss:
    """Energy at the end of new paths plus all their costs; the gradient flows through every step, so memory
    grows with T, which dynamic programming avoids."""
    networks, costs, batch = inputs.networks, inputs.costs, inputs.batch
    sampler = networks.sampler

    def loss(t: Tensor, key: Tensor) -> Tensor:
        sample = sampler.initial(batch.n, key, data=batch.data, sample_offset=batch.offset)
        spent: list[Tensor] = []
        for i in range(sampler.steps):
            timestep = sampler.timestep(i, batch.n)
            step = inputs.sampler(sample, timestep, key, batch.labels, sample_offset=batch.offset)
            spent.append(costs.of("sampler", step.sq_displacement, timestep))
            sample = step.next_sample
        return (networks.energy(sample, batch.labels) + torch.stack(spent).sum(0)).mean()

    return loss


SAMPLER_LOSSES: dict[str, Callable[[LossInputs], SamplerLoss]] = {
    "dxdp": dxdp,
    "policy_gradient": policy_gradient,
    "backprop": backprop,
}


@torch.no_grad()
def advantages(inputs: LossInputs) -> Tensor:
    """[T, N]: each particle's final energy plus its costs from step t on, minus V^t(x_t)."""
    networks, path, labels = inputs.networks, inputs.path, inputs.batch.labels
    steps, n = path.sq_displacement.shape
    timesteps = [networks.sampler.timestep(t, n) for t in range(steps)]
    values = [networks.value_at(path.samples[t], timesteps[t], labels) for t in range(steps)]
    costs = [inputs.costs.of("sampler", path.sq_displacement[t], timesteps[t]) for t in range(steps)]
    remaining = torch.stack(costs).flip(0).cumsum(0).flip(0)
    return networks.energy(path.samples[-1], labels) + remaining - torch.stack(values)
