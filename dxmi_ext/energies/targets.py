"""Targets: densities exp(-E) / Z with known energies, some also with exact samples, log Z and modes.

Imports torch, numpy, ``dxmi_ext.ops`` and ``method.noise``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.method import noise

Energy = Callable[[Tensor], Tensor]
"""x [N, D] -> [N]"""
Draw = Callable[[int, Tensor, int], Tensor]
"""(n, key, global index of the first row) -> samples [n, D]; row i depends on (key, global row) alone."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The density exp(-E(x)) / Z on R^D, or for particles on configurations with center of mass 0.

    A sampler works in coordinates y of `free` dimensions, in which normal noise is isotropic: x itself, or
    for particles coordinates in an orthonormal basis of those configurations. So the center of mass is
    projected out exactly of noise, displacements and transition densities.

    Attributes:
        dim: D.
        energy: E.
        particles: number of particles in x; None: x is one point.
        log_partition: log Z; None if it is unknown.
        draw: function that draws exact samples; None if there is none.
        modes: centers [K, D] of equally likely modes.
        mode_std: standard deviation of a mode, in each dimension.
    """

    name: str
    dim: int
    energy: Energy
    particles: int | None = None
    log_partition: float | None = None
    draw: Draw | None = None
    modes: Tensor | None = None
    mode_std: float = 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Target:
        return self  # it never changes, and a user's energy need not be copyable

    @property
    def free(self) -> int:
        """Dimension of y: D, or (n - 1) d for n particles in d dimensions."""
        return self.dim if self.particles is None else self.dim - self.dim // self.particles

    def lift(self, y: Tensor) -> Tensor:
        """y [N, free] -> x [N, D]."""
        if self.particles is None:
            return y
        basis = centered_basis(self.particles).to(y)
        return (basis @ y.unflatten(1, (self.particles - 1, -1))).flatten(1)

    def coordinates(self, x: Tensor) -> Tensor:
        """x [N, D] -> y [N, free]; the center of mass is lost."""
        if self.particles is None:
            return x
        basis = centered_basis(self.particles).to(x)
        return (basis.T @ x.unflatten(1, (self.particles, -1))).flatten(1)


@functools.cache
def centered_basis(n: int) -> Tensor:
    """An orthonormal basis of the vectors of R^n with sum 0, float64 [n, n - 1] (Helmert)."""
    basis = torch.ones(n, n - 1, dtype=torch.float64).triu()
    basis[1:].diagonal().copy_(-torch.arange(1, n, dtype=torch.float64))
    return basis / basis.norm(dim=0)


def distances(x: Tensor, particles: int) -> Tensor:
    """The distances of all pairs of particles, x [N, D] -> [N, n (n - 1) / 2]."""
    points = x.unflatten(1, (particles, -1))
    i, j = torch.triu_indices(particles, particles, 1, device=x.device)
    return (points[:, i] - points[:, j]).square().sum(-1).clamp(min=1e-12).sqrt()


# --- mixtures of Gaussians ---------------------------------------------------------------------------


def mixture(name: str, means: Tensor, variance: float) -> Target:
    """Equally likely components N(mean, variance I), means [K, D]; normalized, so that log Z = 0."""
    k, dim = means.shape
    scale = math.log(k) + dim / 2 * math.log(2 * math.pi * variance)

    def energy(x: Tensor) -> Tensor:
        squared = (x[:, None] - means.to(x)).square().sum(-1)  # not cdist, which has no second derivative
        return scale - torch.logsumexp(squared / (-2 * variance), 1)

    def draw(n: int, key: Tensor, offset: int) -> Tensor:
        which = noise.randint(k, n, key, sample_offset=offset)
        z = ops.normal((n, dim), key, timestep=0, sample_offset=offset)
        return means.to(z)[which] + math.sqrt(variance) * z

    return Target(
        name,
        dim,
        energy,
        log_partition=0.0,
        draw=draw,
        modes=means,
        mode_std=math.sqrt(variance),
    )


def _grid(name: str, line: list[float], variance: float) -> Target:
    return mixture(name, torch.cartesian_prod(torch.tensor(line), torch.tensor(line)), variance)


def _forty() -> Target:
    """Means uniform in [-40, 40]^2 (FAB, Midgley et al. 2023), by torch's generator of seed 0."""
    means = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    return mixture("gmm40", 80 * (means - 0.5), 1.0)


# --- funnel and many wells ---------------------------------------------------------------------------


def _funnel() -> Target:
    """x_0 ~ N(0, 9), nine others N(0, exp(x_0)) (Neal 2003)."""

    def energy(x: Tensor) -> Tensor:
        first, others = x[:, 0], x[:, 1:]
        spread = others.square().sum(1) * (-first).exp() + 9 * first
        return first.square() / 18 + math.log(3) + spread / 2 + 5 * math.log(2 * math.pi)

    def draw(n: int, key: Tensor, offset: int) -> Tensor:
        z = ops.normal((n, 10), key, timestep=0, sample_offset=offset)
        first = 3 * z[:, :1]
        return torch.cat((first, (first / 2).exp() * z[:, 1:]), 1)

    return Target("funnel10", 10, energy, log_partition=0.0, draw=draw)


def _many_wells() -> Target:
    """16 pairs with -log p = x1^4 - 6 x1^2 - x1 / 2 + x2^2 / 2, up to a constant (Noe et al. 2019)."""
    line = torch.linspace(-4, 4, 2**15 + 1, dtype=torch.float64)
    density = (-(line**4 - 6 * line**2 - line / 2)).exp()
    masses = torch.cat((density.new_zeros(1), ((density[1:] + density[:-1]) / 2).cumsum(0)))
    log_pair = float((masses[-1] * (line[1] - line[0])).log()) + math.log(2 * math.pi) / 2
    below, places = (masses / masses[-1]).numpy(), line.numpy()

    def energy(x: Tensor) -> Tensor:
        first, second = x[:, 0::2], x[:, 1::2]
        return (first**4 - 6 * first**2 - first / 2 + second.square() / 2).sum(1)

    def draw(n: int, key: Tensor, offset: int) -> Tensor:
        u = noise.uniform((n, 16), key, sample_offset=offset)
        first = torch.from_numpy(np.interp(u.cpu().numpy(), below, places)).to(u.device).float()
        second = ops.normal((n, 16), key, timestep=0, sample_offset=offset)
        return torch.stack((first, second), 2).flatten(1)

    return Target("manywell32", 32, energy, log_partition=16 * log_pair, draw=draw)


# --- particles ---------------------------------------------------------------------------------------


def _double_well() -> Target:
    """Four particles in the plane (Koehler et al. 2020)."""

    def energy(x: Tensor) -> Tensor:
        d = distances(x, 4) - 4
        return (0.9 * d**4 - 4 * d**2).sum(1)

    return Target("dw4", 8, energy, particles=4)


def _lennard_jones() -> Target:
    """13 particles in space, held together by a harmonic well (Koehler et al. 2020)."""

    def energy(x: Tensor) -> Tensor:
        inverse = distances(x, 13).pow(-6)
        points = x.unflatten(1, (13, 3))
        centered = points - points.mean(1, keepdim=True)
        return 2 * (inverse.square() - 2 * inverse).sum(1) + centered.square().sum((1, 2)) / 2

    return Target("lj13", 39, energy, particles=13)


TARGETS: dict[str, Callable[[], Target]] = {
    "gmm9": lambda: _grid("gmm9", [-5.0, 0.0, 5.0], 0.3),
    "gmm25": lambda: _grid("gmm25", [-10.0, -5.0, 0.0, 5.0, 10.0], 0.3),
    "gmm40": _forty,
    "funnel10": _funnel,
    "manywell32": _many_wells,
    "dw4": _double_well,
    "lj13": _lennard_jones,
}
"""Built-in targets by name."""
