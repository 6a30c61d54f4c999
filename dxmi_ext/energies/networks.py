"""Networks of samplers of an energy: the start, values, and policies. Imports torch, ``dxmi_ext.ops``,
``energies.schedule`` and ``energies.targets``.

All take the coordinates y of a `Target`. For particles, values are invariant and policies
equivariant under rotations, reflections and permutations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.energies.schedule import Levels, policy_schedule
from dxmi_ext.energies.targets import Target, distances

_LEVEL_RATE = 0.05  # smallest rate at which levels of values follow the paths
_LARGEST_FORCE = 5.0  # bound of a step's force, in its standard deviations


class Start(nn.Module):
    """x_0 = mean + sigma eps, with a sigma, and a mean if it has one, that learn; a `GaussianSampler`'s
    ``start``.

    Args:
        std: initial sigma: one number, or one for each dimension, [D].
        mean: initial mean [D]; None: 0, and it does not learn, as symmetries of particles require.
    """

    def __init__(self, std: float | Tensor, mean: Tensor | None = None) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.as_tensor(std, dtype=torch.float32).log())
        self.mean = None if mean is None else nn.Parameter(mean.clone())

    def forward(self, like: Tensor, key: Tensor, *, sample_offset: int = 0) -> Tensor:
        """x_0 of the shape of ``like``, [n, D]."""
        z = ops.normal(like.shape, key, sample_offset=sample_offset, dtype=self.log_std.dtype)
        return self.log_std.exp() * z + (0 if self.mean is None else self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, sigma^2), [n]: the sum over dimensions."""
        z = (x if self.mean is None else x - self.mean) / self.log_std.exp()
        return -z.square().sum(1) / 2 - self.log_stds(x.shape[1]) - x.shape[1] * math.log(2 * math.pi) / 2

    def log_stds(self, dim: int) -> Tensor:
        """The sum of log sigma over dimensions."""
        return self.log_std.expand(dim).sum()


class TargetEnergy(nn.Module):
    """A target's energy of y [N, free] -> [N], as a network without weights.

    Args:
        target: target whose energy it is.
        limit: energy above which it grows as its logarithm only, limit (1 + log(E / limit)), so that it is
            finite where E is infinite; None: none.
        widths: unit of each coordinate y, [free]; None: 1.

    Attributes:
        count: number of rows evaluated so far, with or without a gradient.
    """

    def __init__(self, target: Target, limit: float | None = None, widths: Tensor | None = None) -> None:
        super().__init__()
        self.target, self.limit, self.count = target, limit, 0
        self.widths: Tensor
        self.register_buffer("widths", torch.ones(target.free) if widths is None else widths.float())

    def exact(self, y: Tensor) -> Tensor:
        """The energy without a limit, in the target's precision, which may be float64."""
        self.count += len(y)
        return self.target.energy(self.lift(y))

    def forward(self, y: Tensor) -> Tensor:
        energy = self.exact(y).to(y.dtype)
        if self.limit is None:
            return energy
        most = torch.finfo(energy.dtype).max  # for infinite energies
        above = self.limit * (1 + (energy.clamp(self.limit, most) / self.limit).log())
        return torch.where(energy > self.limit, above, energy)

    def lift(self, y: Tensor) -> Tensor:
        """y [N, free] -> x [N, D]."""
        return self.target.lift(y * self.widths.to(y))

    def coordinates(self, x: Tensor) -> Tensor:
        """x [N, D] -> y [N, free]."""
        y = self.target.coordinates(x)
        return y / self.widths.to(y)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}widths", torch.ones_like(self.widths))  # older runs have none
        super()._load_from_state_dict(state_dict, prefix, *args)


def input_gradient(function: nn.Module, x: Tensor, *conditions: Tensor) -> Tensor:
    """The gradient in x [N, *] of a function [N, *] -> [N], detached."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(x, *conditions).sum(), x)
    return found


class _Body(nn.Module):
    """Hidden layers; an embedding of the step is added to the first."""

    def __init__(self, inputs: int, steps: int, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.step = nn.Linear(inputs, width), nn.Embedding(steps, width)
        nn.init.normal_(self.step.weight, std=0.5)
        rest = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.rest = nn.Sequential(nn.SiLU(), *rest)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.rest(self.first(x) + self.step(timestep))


class _Sinusoids(nn.Module):
    """x [N, D] -> [N, D (1 + 2 octaves)]: x over the level's spread, and sinusoids of x with wavelengths
    8 scale, 4 scale, 2 scale, ...

    Sinusoids are damped where the level's noise blurs their wavelength. Values have no such detail there, and
    large steps down a value with spurious detail would overshoot.
    """

    def __init__(self, levels: Levels, octaves: int) -> None:
        super().__init__()
        self.spread: Tensor
        self.rates: Tensor
        self.register_buffer("spread", levels.spread.float(), persistent=False)
        rates = 2 * math.pi / (8 * levels.scale) * 2.0 ** torch.arange(octaves)
        self.register_buffer("rates", rates, persistent=False)
        self.strength: Tensor
        strength = 1 / (1 + (levels.noise[:, None] * rates).square())
        self.register_buffer("strength", strength.float(), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles, strength = x[:, :, None] * self.rates, self.strength[timestep, None]
        waves = (strength * angles.sin()).flatten(1), (strength * angles.cos()).flatten(1)
        return torch.cat((x / self.spread[timestep, None], *waves), 1)


class Value(nn.Module):
    """V^t(y): (y [N, free], timestep [N]) -> [N], for t = 0..T - 1; V^T is the energy.

    It interpolates between the value of a normal target, |y|^2 / (2 spread_t^2), and the energy, with a
    learned weight for each step that starts at the schedule's detail, and adds a network that is 0 at first.
    The level of each step is estimated separately (`raise_level`), since a network takes thousands of steps
    to reach a constant in the hundreds; the interpolated energy is centered by its first mean, so that the
    level does not depend on the weight.

    Args:
        energy: energy of the target.
        levels: noise levels of the chain.
        temperature: temperature of the target.
        width, depth: size of the hidden layers.
        octaves: number of sinusoids of the coordinates, or of the distances of particles.
    """

    def __init__(
        self,
        energy: TargetEnergy,
        levels: Levels,
        temperature: float,
        width: int,
        depth: int,
        octaves: int,
    ) -> None:
        super().__init__()
        self.energy, self.particles, self.temperature = energy, energy.target.particles, temperature
        n = self.particles
        seen = energy.target.free if n is None else n * (n - 1) // 2
        self.features = _Sinusoids(levels, octaves)
        self.body = _Body(seen * (1 + 2 * octaves), levels.steps, width, depth)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.share = nn.Parameter(levels.detail[:-1].float())
        self.level: Tensor
        self.register_buffer("level", torch.zeros(levels.steps))
        self.center: Tensor
        self.register_buffer("center", torch.zeros(()))

    @torch.no_grad()
    def raise_level(self, residual: Tensor, iteration: int) -> None:
        """Raises the level of each step in place, by the whole ``residual`` in the first iteration of a run
        and by a decreasing share of it later.

        Args:
            residual: mean over paths of the return from step t on minus V^t(x_t), [T]; values that are not
                finite count as 0.
            iteration: from 0.
        """
        rate = max(1 / (iteration + 1), _LEVEL_RATE)
        self.level += rate * residual.nan_to_num(0.0, 0.0, 0.0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (former := state_dict.pop(f"{prefix}centre", None)) is not None:
            state_dict[f"{prefix}center"] = former
        for name in ("level", "center"):  # older runs have none
            state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, y: Tensor, timestep: Tensor) -> Tensor:
        seen = y
        if self.particles is not None:
            seen = distances(self.energy.target.lift(y), self.particles).sort(1).values
        learned = self.last(self.body(self.features(seen, timestep), timestep))[:, 0]
        learned = self.level[timestep] + self.temperature * learned
        normal = self.temperature * y.square().sum(1) / (2 * self.features.spread[timestep].square())
        share = self.share[timestep]
        return learned + (1 - share) * normal + share * (self.energy(y) - self.center)


class Policy(nn.Module):
    """The network of a `GaussianSampler`, (y [N, free], timestep [N]) -> [N, free].

    Besides y, it takes the force -grad E, in standard deviations of the step and bounded, and adds it with a
    learned weight for each step. At first the output is this term alone, whose weights approximate the score
    of the noised target near a narrow mode.

    Args:
        energy, levels, temperature, width, depth, octaves: see `Value`.
    """

    def __init__(
        self, energy: TargetEnergy, levels: Levels, temperature: float, width: int, depth: int, octaves: int
    ) -> None:
        super().__init__()
        self.energy, self.temperature = energy, temperature
        self.std: Tensor
        self.register_buffer("std", levels.std.float(), persistent=False)
        share = levels.std * levels.detail[:-1] / policy_schedule(levels).output_coef
        self.share = nn.Parameter(share.float())
        kind = _Point if energy.target.particles is None else _Pairs
        self.motion = kind(energy.target, levels, width, depth, octaves)

    def forward(self, y: Tensor, timestep: Tensor) -> Tensor:
        force = -input_gradient(self.energy, y) * (self.std[timestep, None] / self.temperature)
        size = force.square()
        if self.energy.target.particles is not None:  # one bound for all directions keeps the symmetry
            size = size.mean(1, keepdim=True)
        force = force / (1 + size / _LARGEST_FORCE**2).sqrt()
        force = force.nan_to_num()  # where an energy overflows
        return self.motion(y, force, timestep) + self.share[timestep, None] * force


class _Point(nn.Module):
    """The motion of one point."""

    def __init__(self, target: Target, levels: Levels, width: int, depth: int, octaves: int) -> None:
        super().__init__()
        self.features = _Sinusoids(levels, octaves)
        self.body = _Body(target.dim * (2 + 2 * octaves), levels.steps, width, depth)
        self.last = nn.Linear(width, target.dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, y: Tensor, force: Tensor, timestep: Tensor) -> Tensor:
        seen = torch.cat((self.features(y, timestep), force), 1)
        return self.last(self.body(seen, timestep))


class _Pairs(nn.Module):
    """The motion of particles: each moves along the lines to all others, by amounts that a network predicts
    from the distance and from all distances, sorted."""

    def __init__(self, target: Target, levels: Levels, width: int, depth: int, octaves: int) -> None:
        super().__init__()
        assert target.particles is not None
        self.target, self.n = target, target.particles
        self.features = _Sinusoids(levels, octaves)
        seen = 1 + 2 * octaves
        self.all = _Body(self.n * (self.n - 1) // 2 * seen, levels.steps, width, 1)
        self.one, self.context = nn.Linear(seen, width), nn.Linear(width, width)
        rest = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.rest, self.last = nn.Sequential(nn.SiLU(), *rest), nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, y: Tensor, force: Tensor, timestep: Tensor) -> Tensor:
        x, n = self.target.lift(y), self.n
        between = distances(x, n)  # [N, pairs]
        pairs = between.shape[1]
        context = self.context(self.all(self.features(between.sort(1).values, timestep), timestep))
        each = self.features(between.view(-1, 1), timestep.repeat_interleave(pairs)).view(len(y), pairs, -1)
        amounts = self.last(self.rest(self.one(each) + context[:, None]))  # [N, pairs, 1]
        points = x.view(len(x), n, -1)
        i, j = torch.triu_indices(n, n, 1, device=x.device)
        pulls = amounts * (points[:, i] - points[:, j]) / (between[:, :, None] + 0.1)
        moved = torch.zeros_like(points).index_add(1, i, pulls).index_add(1, j, -pulls)
        return self.target.coordinates(moved.flatten(1))
