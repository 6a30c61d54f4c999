"""Annealed importance sampling (Neal 2001): what log Z costs without a sampler that has learned.

Imports torch, ``dxmi_ext.ops`` and the task's networks and targets.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.energies.networks import TargetEnergy, slope
from dxmi_ext.energies.targets import Target
from dxmi_ext.method import noise
from dxmi_ext.method.path_weights import of_weights

_TARGET_ACCEPTANCE = 0.57  # of MALA (Roberts & Rosenthal 1998)


@torch.no_grad()
def annealed(
    target: Target, temperature: float, std: float, key: Tensor, *, n: int, levels: int
) -> dict[str, float]:
    """log Z by n particles that are led from N(0, std^2) to exp(-E / temperature) / Z in levels, the exponent
    of the energy from 0 to 1 by quarters of a circle, one Metropolis-adjusted Langevin step a level. Its size
    follows the acceptance of all particles.

    Args:
        std: of where particles start.
        key: of all noise.
        levels: how many; a particle costs as many evaluations of the energy and its gradient.

    Returns:
        ais_log_partition, ais_log_partition_std, ais_elbo and ais_ess, as of `path_weights.of_weights`;
        ais_evaluations: of the energy, n levels.
    """
    energy, shape = TargetEnergy(target), (n, target.free)
    y = std * ops.normal(shape, key)
    start_log_partition = target.free * (math.log(2 * math.pi) / 2 + math.log(std))
    log_w = torch.full((n,), start_log_partition, dtype=torch.float64, device=y.device)
    size, (now, force) = y.new_tensor(0.1 * std**2), _at(energy, y, temperature)
    betas = torch.sin(torch.linspace(0, torch.pi / 2, levels + 1, dtype=torch.float64)).square().tolist()
    for level, (before, beta) in enumerate(itertools.pairwise(betas)):
        start = y.square().sum(1) / (2 * std**2)
        log_w += (beta - before) * (start - now).double()
        drift = beta * force + (1 - beta) * y / std**2
        z = ops.normal(shape, key, timestep=2 * level)
        x = y - size * drift + (2 * size).sqrt() * z
        reached, pull = _at(energy, x, temperature)
        back = beta * pull + (1 - beta) * x / std**2
        moved = beta * (now - reached) + (1 - beta) * (start - x.square().sum(1) / (2 * std**2))
        moved = moved + z.square().sum(1) / 2 - (y - x + size * back).square().sum(1) / (4 * size)
        u = noise.uniform((n,), key, timestep=2 * level + 1).float()
        accepted = u.log() < moved.nan_to_num(nan=-1e30)
        y = torch.where(accepted[:, None], x, y)
        force = torch.where(accepted[:, None], pull, force)
        now = torch.where(accepted, reached, now)
        size = size * (0.05 * (accepted.float().mean() - _TARGET_ACCEPTANCE)).exp()
    found = of_weights(log_w.nan_to_num(nan=-1e30))
    return {f"ais_{name}": value for name, value in found.items()} | {"ais_evaluations": float(n * levels)}


def _at(energy: TargetEnergy, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The energy over the temperature [n], and its gradient [n, D]."""
    return energy(y) / temperature, slope(energy, y) / temperature


def line(found: dict[str, float], levels: int) -> str:
    """The numbers of `annealed` in words."""
    log_z = f"{found['ais_log_partition']:.3f} ± {found['ais_log_partition_std']:.3f}"
    title = f"annealed importance sampling, {levels} levels: log Z {log_z}"
    return f"{title}, ELBO {found['ais_elbo']:.3f}, ESS {found['ais_ess']:.3g}"
