"""Parallel tempering (Hukushima & Nemoto 1996): samples and log Z without a trained sampler.

Imports torch and the task's networks, targets and ``annealing``.
"""

from __future__ import annotations

import collections
import math

import torch
from torch import Tensor

from dxmi_ext.energies.annealing import TARGET_ACCEPTANCE, Particles, Walk
from dxmi_ext.energies.networks import TargetEnergy
from dxmi_ext.energies.targets import Target
from dxmi_ext.method import noise

_REPLICAS = 20
_CHAINS = 100
_KEPT = 20  # states of a chain that are kept as samples


@torch.no_grad()
def tempered(
    target: Target, temperature: float, std: float, key: Tensor, *, sweeps: int
) -> tuple[dict[str, float], Tensor]:
    """100 independent chains of 20 replicas. Replica k has the density N(0, std^2)^(1 - b_k)
    exp(-E / temperature)^b_k, with b_k from 0 to 1 as sin^2. A sweep is a Metropolis-adjusted Langevin step
    of every replica, then an exchange of neighbors. The first half of the sweeps, in which the sizes of
    steps follow the acceptance, is discarded.

    Args:
        target: target to sample.
        temperature: w of the density exp(-E / w) / Z.
        std: standard deviation of the first replica.
        key: key of all noise.
        sweeps: number of sweeps, >= 2; each takes 2,000 evaluations of the energy and its gradient.

    Returns:
        tempering_log_partition, from the mean density ratios of neighbors; tempering_log_partition_std, its
        standard error over chains; and tempering_evaluations. Also up to 2,000 samples of the last replica,
        [m, D].
    """
    energy = TargetEnergy(target)
    walk = Walk(energy, temperature, std, key)
    betas = torch.linspace(0, torch.pi / 2, _REPLICAS, dtype=torch.float64, device=key.device)
    betas = betas.sin().square().float()[:, None]
    at = walk.start((_REPLICAS, _CHAINS))
    size = torch.full_like(betas, 0.1 * std**2)
    burn, kept = sweeps // 2, list[Tensor]()
    every = max(1, (sweeps - burn) // _KEPT)
    ratios = torch.full((_REPLICAS - 1, _CHAINS), -math.inf, dtype=torch.float64, device=key.device)
    for sweep in range(sweeps):
        at, accepted = walk.step(at, betas, size, 3 * sweep)
        # log density of each replica's neighbor over its own
        gain = (betas[1:] - betas[:-1]) * walk.advance(at)[:-1]
        if sweep < burn:
            share = accepted.float().mean(1, keepdim=True)
            size = size * (0.05 * (share - TARGET_ACCEPTANCE)).exp()
        else:
            ratios = torch.logaddexp(ratios, gain.double().nan_to_num(nan=-math.inf))
            if (sweep - burn) % every == every - 1:
                kept.append(at.y[-1])
        u = noise.uniform((_REPLICAS - 1, _CHAINS), key, timestep=3 * sweep + 2).float()
        at = _exchanged(at, betas, walk.advance(at), u.log(), sweep % 2)
    log_means = (ratios - math.log(sweeps - burn)).double()
    pairs = log_means.logsumexp(1, keepdim=True) - math.log(_CHAINS)
    spread = (log_means - pairs).exp().sum(0).std()  # over chains, which are independent
    numbers = {
        "log_partition": walk.log_partition() + float(pairs.sum()),
        "log_partition_std": float(spread) / math.sqrt(_CHAINS),
        "evaluations": float(energy.count),
    }
    found = {f"tempering_{name}": value for name, value in numbers.items()}
    return found, target.lift(torch.cat(kept[:_KEPT]))


def _exchanged(at: Particles, betas: Tensor, advance: Tensor, log_u: Tensor, first: int) -> Particles:
    """Particles [K, n] after an exchange of the replicas first and first + 1, first + 2 and first + 3, ...,
    by the rule of Metropolis.

    Args:
        advance: derivative of the log density in beta, [K, n].
        log_u: logarithms of uniform numbers, [K - 1, n].
    """
    change = (betas[1:] - betas[:-1]) * (advance[:-1] - advance[1:])
    swaps = log_u < change.nan_to_num(nan=-1e30)
    swaps[1 - first :: 2] = False
    order = torch.arange(len(betas), device=betas.device)[:, None].repeat(1, log_u.shape[1])
    order[:-1] += swaps.long()
    order[1:] -= swaps.long()
    columns = torch.arange(log_u.shape[1], device=betas.device)
    return Particles(*(each[order, columns] for each in at))


def line(found: dict[str, float], sweeps: int) -> str:
    """The numbers of `tempered` as a line of text; nan for skipped ones."""
    numbers = collections.defaultdict(lambda: math.nan, found)
    log_z = f"{numbers['tempering_log_partition']:.3f} ± {numbers['tempering_log_partition_std']:.3f}"
    shown = {"W2": "tempering_w2", "modes": "tempering_modes"}
    rest = "".join(f", {title} {found[key]:.3f}" for title, key in shown.items() if key in found)
    return f"parallel tempering, {sweeps} sweeps: log Z {log_z}{rest}"
