"""Annealed importance sampling (Neal 2001): log Z without a trained sampler, and a first look at a target.

Imports torch, ``dxmi_ext.ops`` and the task's networks and targets.
"""

from __future__ import annotations

import collections
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.energies.networks import TargetEnergy, input_gradient
from dxmi_ext.energies.targets import Target
from dxmi_ext.method import noise
from dxmi_ext.method.path_weights import of_weights

TARGET_ACCEPTANCE = 0.57
"""Acceptance rate to which Metropolis-adjusted Langevin steps adapt (Roberts & Rosenthal 1998)."""
_MEDIAN_OF_SQUARE = 0.4549  # the median of a squared standard normal


class Shape(NamedTuple):
    """Statistics of a target in each dimension of y, [D] each."""

    mean: Tensor
    std: Tensor
    mode_std: Tensor
    """Standard deviation of a single mode, from the median squared slope of the energy."""


@torch.no_grad()
def annealed(
    target: Target, temperature: float, std: float, key: Tensor, *, n: int, levels: int
) -> dict[str, float]:
    """log Z of exp(-E / temperature) / Z by annealed importance sampling from N(0, std^2).

    Args:
        std: standard deviation of the particles at the first level.
        key: key of all noise.
        n: number of particles.
        levels: number of levels; a particle costs one evaluation of the energy and its gradient at each.

    Returns:
        ais_log_partition, ais_log_partition_std, ais_elbo and ais_ess, as of `path_weights.of_weights`;
        ais_evaluations: evaluations of the energy, n (levels + 1).
    """
    energy = TargetEnergy(target)
    log_w, _ = _anneal(energy, temperature, std, key, n=n, levels=levels)
    found = of_weights(log_w.masked_fill(log_w.isnan(), -math.inf))
    return {f"ais_{name}": value for name, value in found.items()} | {"ais_evaluations": float(energy.count)}


@torch.no_grad()
def shape_of(energy: TargetEnergy, temperature: float, std: float, key: Tensor) -> Shape:
    """A target's shape, by 256 particles annealed in 200 levels.

    Args:
        energy: energy, which counts the evaluations.
        temperature: w of the density exp(-E / w) / Z.
        std: standard deviation of the particles at the first level.
        key: key of all noise.
    """
    _, y = _anneal(energy, temperature, std, key, n=256, levels=200)
    force = input_gradient(energy, y) / temperature
    # In a normal mode of variance m^2 the slope is normal with variance 1 / m^2.
    curvature = force.square().median(0).values / _MEDIAN_OF_SQUARE
    return Shape(y.mean(0), y.std(0), curvature.clamp(min=1e-12).rsqrt())


def _anneal(
    energy: TargetEnergy, temperature: float, std: float, key: Tensor, *, n: int, levels: int
) -> tuple[Tensor, Tensor]:
    """log w [n], float64, and the particles [n, D], after the exponent of the energy went from 0 to 1 as
    sin^2, with one Langevin step at each level, whose size follows the acceptance."""
    walk = Walk(energy, temperature, std, key)
    now = walk.start((n,))
    log_w = torch.full((n,), walk.log_partition(), dtype=torch.float64, device=key.device)
    size = now.y.new_tensor(0.1 * std**2)
    betas = torch.sin(torch.linspace(0, torch.pi / 2, levels + 1, dtype=torch.float64)).square().tolist()
    for level, (before, beta) in enumerate(itertools.pairwise(betas)):
        log_w += (beta - before) * walk.advance(now).double()
        now, accepted = walk.step(now, now.y.new_tensor(beta), size, 2 * level)
        size = size * (0.05 * (accepted.float().mean() - TARGET_ACCEPTANCE)).exp()
    return log_w, now.y


class Particles(NamedTuple):
    """Particles of a `Walk`, with their energies and gradients over the temperature."""

    y: Tensor
    """[*, D]"""
    energy: Tensor
    """[*]"""
    force: Tensor
    """[*, D]"""


class Walk:
    """Metropolis-adjusted Langevin steps on N(0, std^2)^(1 - beta) exp(-E / temperature)^beta.

    Args:
        energy: energy of the target; it counts the evaluations.
        temperature: w of the density exp(-E / w) / Z.
        std: standard deviation at beta = 0.
        key: key of all noise.
    """

    def __init__(self, energy: TargetEnergy, temperature: float, std: float, key: Tensor) -> None:
        self.energy, self.temperature, self.std, self.key = energy, temperature, std, key

    def start(self, shape: tuple[int, ...]) -> Particles:
        """Particles [*shape, D] of beta = 0."""
        return self._at(self.std * ops.normal((*shape, self.energy.target.free), self.key))

    def log_partition(self) -> float:
        """log Z at beta = 0, of the density without its constant."""
        return self.energy.target.free * (math.log(2 * math.pi) / 2 + math.log(self.std))

    def advance(self, at: Particles) -> Tensor:
        """The derivative of the log density in beta, [*]."""
        return self._start(at.y) - at.energy

    def step(self, at: Particles, beta: Tensor, size: Tensor, timestep: int) -> tuple[Particles, Tensor]:
        """One step of all particles, and which of them were accepted, [*].

        Args:
            beta, size: broadcastable to [*].
            timestep: noise of this and the next one is used.
        """
        z = ops.normal(at.y.shape, self.key, timestep=timestep)
        width = size[..., None]
        x = self._at(at.y - width * self._drift(at, beta) + (2 * width).sqrt() * z)
        change = beta * (at.energy - x.energy) + (1 - beta) * (self._start(at.y) - self._start(x.y))
        back = (at.y - x.y + width * self._drift(x, beta)).square().sum(-1)
        change = change + z.square().sum(-1) / 2 - back / (4 * size)
        u = noise.uniform(tuple(change.shape), self.key, timestep=timestep + 1).float()
        accepted = u.log() < change.nan_to_num(nan=-1e30)
        moved = (
            torch.where(accepted.view(*accepted.shape, *[1] * (new.ndim - accepted.ndim)), new, old)
            for new, old in zip(x, at, strict=True)
        )
        return Particles(*moved), accepted

    def _at(self, y: Tensor) -> Particles:
        with torch.enable_grad():
            flat = y.detach().flatten(0, -2).requires_grad_()
            energy = self.energy(flat) / self.temperature
            (force,) = torch.autograd.grad(energy.sum(), flat)
        return Particles(y, energy.detach().view(y.shape[:-1]), force.view(y.shape))

    def _start(self, y: Tensor) -> Tensor:
        return y.square().sum(-1) / (2 * self.std**2)

    def _drift(self, at: Particles, beta: Tensor) -> Tensor:
        beta = beta[..., None]
        return beta * at.force + (1 - beta) * at.y / self.std**2


def line(found: dict[str, float], levels: int) -> str:
    """The numbers of `annealed` as a line of text; nan for skipped ones."""
    numbers = collections.defaultdict(lambda: math.nan, found)
    log_z = f"{numbers['ais_log_partition']:.3f} ± {numbers['ais_log_partition_std']:.3f}"
    title = f"annealed importance sampling, {levels} levels: log Z {log_z}"
    return f"{title}, ELBO {numbers['ais_elbo']:.3f}, ESS {numbers['ais_ess']:.3g}"
