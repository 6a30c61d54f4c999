"""Reference samples of targets: exact ones, or for particles the ends of long Hamiltonian chains.

Imports torch, ``dxmi_ext.ops``, the method and the task's networks and targets.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.energies.networks import TargetEnergy, input_gradient
from dxmi_ext.energies.targets import TARGETS, Draw, Target
from dxmi_ext.method import noise


class _Chains(NamedTuple):
    """Length of Hamiltonian chains."""

    steps: int
    leaps: int
    """Leapfrog steps of one step."""
    start: float
    """Standard deviation of their starting points."""


_CHAINS = {"dw4": _Chains(800, 8, 2.0), "lj13": _Chains(600, 8, 1.0)}
_TARGET_ACCEPTANCE = 0.8


def sampler_of(target: Target) -> Draw | None:
    """A function that draws samples of a target; None if there is none. Ends of chains also depend on n,
    through their common step size."""
    if target.draw is not None:
        return target.draw
    if target.name not in _CHAINS:
        return None
    return functools.partial(_ends, target.name)


def _ends(name: str, n: int, key: Tensor, offset: int) -> Tensor:
    """The ends of n chains, [n, D]."""
    return hamiltonian(TARGETS[name](), n, key, _CHAINS[name], sample_offset=offset)


@torch.no_grad()
def hamiltonian(target: Target, n: int, key: Tensor, chains: _Chains, *, sample_offset: int = 0) -> Tensor:
    """The ends of n chains of Hamiltonian Monte Carlo, started from normal noise; [n, D].

    In the first half the common step size adapts to an acceptance rate of .8.

    Args:
        target: target to sample.
        key: key of all noise.
        chains: length of the chains.
    """
    energy, shape = TargetEnergy(target), (n, target.free)
    soft = TargetEnergy(target, 1e3)  # overlapping particles are pushed apart at a finite speed
    y = chains.start * ops.normal(shape, key, sample_offset=sample_offset)
    for _ in range(200):  # down to where an energy is finite
        force = input_gradient(soft, y)
        y = y - 0.02 * force / (1 + force.norm(dim=1, keepdim=True) / 5)
    size, now, force = torch.tensor(0.02), energy(y), input_gradient(energy, y)
    for step in range(chains.steps):
        p = ops.normal(shape, key, timestep=2 * step, sample_offset=sample_offset)
        u = noise.uniform((n,), key, timestep=2 * step + 1, sample_offset=sample_offset).float()
        x, push, before = y, force, now + p.square().sum(1) / 2
        for _ in range(chains.leaps):
            p = p - size / 2 * push
            x = x + size * p
            push = input_gradient(energy, x)
            p = p - size / 2 * push
        reached = energy(x)
        change = (before - reached - p.square().sum(1) / 2).nan_to_num(nan=-1e30)
        accepted = u.log() < change
        y, force = (torch.where(accepted[:, None], *pair) for pair in ((x, y), (push, force)))
        now = torch.where(accepted, reached, now)
        if step < chains.steps // 2:
            size = size * (0.1 * (accepted.float().mean() - _TARGET_ACCEPTANCE)).exp()
    return target.lift(y)
