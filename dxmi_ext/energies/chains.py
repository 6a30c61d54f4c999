"""Samplers of an energy as Markov chains whose paths have densities: DxMI's policy, and VGS.

A chain has a Gaussian forward transition pi(x_{t+1} | x_t), which leads to the target, and a Gaussian
backward kernel q(x_t | x_{t+1}). Imports torch, ``dxmi_ext.ops``, the method and the task's networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.energies.networks import Start, TargetEnergy, input_gradient
from dxmi_ext.energies.schedule import Levels
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.path_weights import Forward, Kernel, log_ratio

_LARGEST_DRIFT = 4.0  # distance from a mode, in its standard deviations, whose score bounds the drift of VGS


class Tables(NamedTuple):
    """pi = N(sample_coef x + output_coef output, exp(2 log_std)), q = N(back_coef x, exp(2 back_log_std));
    each float32 [T]."""

    sample_coef: Tensor
    output_coef: Tensor
    log_std: Tensor
    back_coef: Tensor
    back_log_std: Tensor


class Chain(nn.Module):
    """Base of both samplers.

    Args:
        start: module that draws x_0.
        energy: energy of the target, y [N, D] -> [N].
        dim: D, the dimension of y.
        temperature: w of the density exp(-E / w) / Z.
    """

    start: Start

    def __init__(self, start: Start, energy: TargetEnergy, dim: int, temperature: float) -> None:
        super().__init__()
        self.start, self.energy, self.dim, self.temperature = start, energy, dim, temperature

    @property
    def log_stds(self) -> Tensor:
        """The log sigmas of pi, [T], which `fit_stds_` sets."""
        raise NotImplementedError

    def tables(self) -> Tables:
        raise NotImplementedError

    def output(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The output from which the mean of pi is computed, x [N, D] -> [N, D]."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """T."""
        return len(self.tables().log_std)

    def initial(self, n: int, key: Tensor, *, sample_offset: int = 0) -> Tensor:
        """x_0 [n, D]."""
        like = torch.zeros((), device=key.device).expand(n, self.dim)
        return self.start(like, key, sample_offset=sample_offset)

    def step(
        self, x: Tensor, timestep: Tensor, key: Tensor, *, noise: float = 1.0, sample_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x_{t+1} and the output of the step, [N, D] both.

        Args:
            x: x_t [N, D].
            timestep: int64 [N].
            noise: factor of the noise.
        """
        tables, output = self.tables(), self.output(x, timestep)
        log_std = tables.log_std + torch.tensor(noise, device=x.device).log()
        coefs = tables.sample_coef, tables.output_coef, log_std
        return ops.sampler_step(x, output, timestep, *coefs, key, sample_offset=sample_offset)[0], output

    @torch.no_grad()
    def rollout(self, n: int, key: Tensor, *, noise: float = 1.0, sample_offset: int = 0) -> Tensor:
        """Paths x_0 .. x_T, [T + 1, n, D]; row i depends on (key, sample_offset + i) alone."""
        path = [self.initial(n, key, sample_offset=sample_offset)]
        for t in range(self.steps):
            timestep = torch.full((n,), t, device=key.device)
            path.append(self.step(path[-1], timestep, key, noise=noise, sample_offset=sample_offset)[0])
        return torch.stack(path)

    @torch.no_grad()
    def sample(self, n: int, key: Tensor, *, last_noise: float = 1.0, sample_offset: int = 0) -> Tensor:
        """Samples x [n, D] of the target; row i depends on (key, sample_offset + i) alone.

        Args:
            last_noise: factor of the noise of the last step; with 1 samples are ends of `rollout`.
        """
        y = self.initial(n, key, sample_offset=sample_offset)
        for t in range(self.steps):
            timestep = torch.full((n,), t, device=key.device)
            noise = last_noise if t == self.steps - 1 else 1.0
            y, _ = self.step(y, timestep, key, noise=noise, sample_offset=sample_offset)
        return self.energy.lift(y)

    @torch.no_grad()
    def backward_rollout(self, x: Tensor, key: Tensor, *, sample_offset: int = 0) -> Tensor:
        """Paths [T + 1, n, D] drawn from q backwards from given ends x_T [n, D]; the noise of row i depends
        on (key, sample_offset + i) alone."""
        tables, path = self.tables(), [x]
        for t in reversed(range(self.steps)):
            timestep, nothing = torch.full((len(x),), t, device=x.device), torch.zeros_like(x)
            coefs = tables.back_coef, torch.zeros_like(tables.back_coef), tables.back_log_std
            path.append(
                ops.sampler_step(path[-1], nothing, timestep, *coefs, key, sample_offset=sample_offset)[0]
            )
        return torch.stack(path[::-1])

    @torch.no_grad()
    def log_weights(self, path: Tensor, true_energy: TargetEnergy | None = None) -> Tensor:
        """log w of paths [T + 1, n, D], float64 [n]: -E(x_T) / w + sum_t [log q(x_t | x_{t+1}) -
        log pi(x_{t+1} | x_t)] - log pi_0(x_0). The mean of w over paths of pi is Z.

        Args:
            true_energy: energy whose Z is estimated, if the chain's own is limited; None: the chain's own.
        """
        tables = self.tables()
        energy = (self.energy(path[-1]) if true_energy is None else true_energy.exact(path[-1])).double()
        forward = Forward(tables.sample_coef, tables.output_coef, tables.log_std)
        energy = energy.masked_fill(energy.isnan(), math.inf)  # points without an energy have no weight
        back = log_ratio(path, self.output, forward, Kernel(tables.back_coef, tables.back_log_std))
        units = self.energy.widths.double().log().sum()  # the density of y is that of x times these
        return units + back - energy / self.temperature - self.start.log_prob(path[0]).double()

    @torch.no_grad()
    def fit_stds_(self, n: int, keys: Mapping[str, Tensor]) -> None:
        """Sets each step's sigma in place to the root mean square of x_{t+1} minus the step's mean, over
        paths drawn backwards from the chain's own samples.

        Training minimizes KL(sampler || target), which makes sigmas too small between modes, where a few
        paths then have large weights. These sigmas minimize the other KL, for the same means.

        Args:
            n: number of paths.
            keys: noise keys ``paths`` and ``back``.
        """
        path = self.backward_rollout(self.rollout(n, keys["paths"])[-1], keys["back"])
        tables, log_std = self.tables(), self.log_stds
        for t in range(self.steps):
            output = self.output(path[t], torch.full((n,), t, device=path.device))
            mean = tables.sample_coef[t] * path[t] + tables.output_coef[t] * output
            found = (path[t + 1] - mean).square().mean().log() / 2
            log_std[t] = torch.where(found.isfinite(), found, log_std[t])


class PolicyChain(Chain):
    """DxMI's policy; q is the random walk N(x_{t+1}, s_t^2) of the bound that the policy minimizes.

    Args:
        networks: networks whose sampler has a `Start`, and whose energy is a `TargetEnergy`.
        velocity_var: s_t^2, [T].
        temperature: w.
    """

    def __init__(self, networks: Networks, velocity_var: Tensor, temperature: float) -> None:
        start, energy = networks.sampler.start, networks.energy_network
        assert isinstance(start, Start) and isinstance(energy, TargetEnergy)
        super().__init__(start, energy, networks.sampler.dim, temperature)
        self.networks = networks
        self.velocity_var: Tensor
        self.register_buffer("velocity_var", velocity_var.detach().clone())

    @property
    def log_stds(self) -> Tensor:
        return self.networks.sampler.log_std

    def tables(self) -> Tables:
        sampler, var = self.networks.sampler, self.velocity_var
        coefficients, log_std = (sampler.sample_coef, sampler.output_coef), sampler.log_std.detach()
        return Tables(*coefficients, log_std, torch.ones_like(var), var.log() / 2)

    def output(self, x: Tensor, timestep: Tensor) -> Tensor:
        return call(self.networks.sampler.network, x, timestep)


class GradientChain(Chain):
    """VGS: the mean of a step is a descent of the next value, y - (variance alpha^2 / w) grad V^{t+1}(y) at
    y = alpha x (arXiv 2502.13280).

    A damped step has variance / (1 + variance alpha^2 / m^2) in place of the variance, in its noise too, with
    m^2 the variance of the narrowest mode of x_{t+1}: it is the exact reverse step in such a mode. The
    paper's step goes too far, so that values grow too steep from step to step, and samples are too cold.

    The gradient is bounded by that of the narrowest mode, blurred by the noise of x_{t+1}, at 4 of its
    standard deviations. Without a bound a value that is too steep where few paths go pulls them in, and stays
    too steep.

    Args:
        start: module that draws x_0.
        value: V^t, (y [N, D], timestep [N]) -> [N], t = 0..T - 1.
        energy: V^T.
        levels: noise levels of the chain.
        dim: D.
        temperature: w.
        damped: whether steps are damped; not in the paper.
    """

    def __init__(
        self,
        start: Start,
        value: nn.Module,
        energy: TargetEnergy,
        levels: Levels,
        dim: int,
        temperature: float,
        *,
        damped: bool,
    ) -> None:
        super().__init__(start, energy, dim, temperature)
        self.value, self.particles = value, energy.target.particles
        self.log_std: Tensor
        self.largest_gradient: Tensor
        self.kernel_var: Tensor
        step_var, mode_std = levels.std.square(), levels.mode_std[1:]
        damping = 1 + damped * step_var / mode_std.square()
        tables = Tables(
            levels.growth,
            -step_var / damping / temperature,
            levels.std.log() - damping.log() / 2,
            1 / levels.growth,
            levels.variance.log() / 2,
        )
        largest = _LARGEST_DRIFT * temperature / mode_std
        others = {"largest_gradient": largest, "kernel_var": step_var}
        for name, table in {**tables._asdict(), **others}.items():
            self.register_buffer(name, table.float(), persistent=name == "log_std")

    @property
    def log_stds(self) -> Tensor:
        return self.log_std

    def tables(self) -> Tables:
        return Tables(*(getattr(self, name) for name in Tables._fields))

    def value_at(self, x: Tensor, timestep: Tensor, *, mixed: bool = False) -> Tensor:
        """V^t(x), [N], for t = 0..T.

        Args:
            mixed: whether each row has a t of its own. The energy is then always evaluated, also if no row is
                at T, so that the number of evaluations does not depend on how ranks split a batch.
        """
        ends = timestep == self.steps
        if ends.all() and not mixed:
            return self.energy(x)
        values = call(self.value, x, timestep.clamp(max=self.steps - 1))
        return torch.where(ends, self.energy(x), values) if mixed or ends.any() else values

    def output(self, x: Tensor, timestep: Tensor) -> Tensor:
        tables = self.tables()
        y = tables.sample_coef[timestep, None] * x
        gradient = input_gradient(_At(self), y, timestep + 1).nan_to_num()  # where an energy overflows
        largest = self.largest_gradient[timestep, None]
        if self.particles is None:
            return gradient.clamp(-largest, largest)
        size = gradient.square().mean(1, keepdim=True).sqrt()  # one bound for all directions keeps symmetries
        return gradient * (largest / size.clamp(min=1e-30)).clamp(max=1)


class _At(nn.Module):
    """A chain's values as a network."""

    def __init__(self, chain: GradientChain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.chain.value_at(x, timestep)
