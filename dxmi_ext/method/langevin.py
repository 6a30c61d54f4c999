"""Langevin chains of an energy, for negatives by MCMC, which DxMI's sampler replaces.

Imports torch, the engine and the method up to networks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.settings import ConfigError, Settings, setting
from dxmi_ext.method import noise
from dxmi_ext.method.networks import Networks, frozen
from dxmi_ext.method.sampler import flat, per_row


@dataclasses.dataclass
class LangevinSettings(Settings):
    """Settings of the Langevin chains that make negatives."""

    heading = "Langevin chains"
    langevin_steps: int = setting(10, "number of Langevin steps per iteration", minimum=1, maximum=10**6)
    langevin_step_size: float = setting(0.5, "step size s in x - s grad E(x) + noise z", minimum=1e-8)
    langevin_noise: float | None = setting(
        None,
        "noise of a step; null: sqrt(2 s w), for samples of exp(-E / w), where w is tau; with refined, the "
        "entropy's tau, divided by D if costs are means",
        minimum=0,
    )
    langevin_clip: float = setting(0.0, "maximum norm of a sample's gradient; 0: no clipping", minimum=0)
    langevin_pool: int = setting(10_000, "number of persistent chains", minimum=1, maximum=10**7)
    langevin_restart: float = setting(
        0.05, "probability that a persistent chain restarts when picked", minimum=0, maximum=1
    )
    langevin_sample_steps: int | None = setting(
        None,
        "number of steps of chains from the final energy; null: langevin_steps, 10 times that if persistent",
        minimum=1,
        maximum=10**6,
    )

    def sample_steps(self, negatives: str) -> int:
        """Number of steps of a chain from an energy that was trained on these negatives."""
        if self.langevin_sample_steps is not None:
            return self.langevin_sample_steps
        return self.langevin_steps * (10 if negatives == "persistent" else 1)


class Chains(NamedTuple):
    """Final states of N chains."""

    samples: Tensor
    """[N, *]"""
    sq_gradient: Tensor
    """[N]: mean over steps and D of (dE/dx)^2, before clipping."""
    diverged: Tensor
    """bool [N]: became non-finite and was reset."""


@dataclasses.dataclass(frozen=True)
class Langevin:
    """Unadjusted Langevin dynamics: x <- x - step_size grad E(x) + noise z.

    With noise = sqrt(2 step_size tau), the stationary density is exp(-E / tau), up to the discretization
    error. Short-run chains usually take less noise.

    Args:
        steps: number of steps.
        step_size, noise: step size, and standard deviation of the noise.
        clip: maximum norm of a sample's gradient; 0: no clipping.
    """

    steps: int
    step_size: float
    noise: float
    clip: float = 0.0

    @classmethod
    def of(cls, settings: LangevinSettings, tau: float) -> Langevin:
        """The dynamics of the settings at temperature tau."""
        step_size, noise = settings.langevin_step_size, settings.langevin_noise
        noise = math.sqrt(2 * step_size * tau) if noise is None else noise
        return cls(settings.langevin_steps, step_size, noise, settings.langevin_clip)

    def __call__(
        self,
        networks: Networks,
        start: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        restart: Tensor | None = None,
        sample_offset: int = 0,
    ) -> Chains:
        """Runs a chain from each row, without gradients to the weights or through the chain.

        Args:
            networks: networks that have the energy.
            start: initial states [N, *].
            key: noise key; step k takes the noise of timestep k, so the key may also have drawn x_0.
            labels: [N], for a conditional energy.
            restart: [N, *], final state of chains that diverge; None: their start.
            sample_offset: global index of the first row.
        """
        x, sq_gradient = start.detach(), start.new_zeros(len(start))
        with torch.enable_grad(), frozen(networks.value, networks.energy_network):
            for step in range(self.steps):
                x = x.requires_grad_()
                (gradient,) = torch.autograd.grad(networks.energy(x, labels).sum(), x)
                squares = flat(gradient).square()
                sq_gradient += squares.mean(1) / self.steps
                if self.clip:
                    gradient = gradient * per_row((self.clip / squares.sum(1).sqrt()).clamp(max=1), x)
                x = torch.add(x.detach(), gradient, alpha=-self.step_size)
                if self.noise:
                    z = ops.normal(x.shape, key, timestep=step, sample_offset=sample_offset, dtype=x.dtype)
                    x = torch.add(x, z, alpha=self.noise)
        diverged = ~flat(x).isfinite().all(1)
        x = torch.where(per_row(diverged, x), start.detach() if restart is None else restart, x)
        return Chains(x, sq_gradient, diverged)

    def sample(
        self,
        networks: Networks,
        n: int,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        sample_offset: int = 0,
        batch_size: int = 4096,
    ) -> Tensor:
        """Final states [n, *] of chains from x_0; row i depends on (key, sample_offset + i) alone, up to the
        rounding of the network's matrix products. A chain that diverges returns its x_0.

        Args:
            labels: [n], for a conditional energy.
            batch_size: rows per call of the network.
        """
        batches = []
        for first in range(0, n, batch_size):
            count, offset = min(batch_size, n - first), sample_offset + first
            classes = None if labels is None else labels[first : first + count]
            start = networks.sampler.initial(count, key, sample_offset=offset)
            batches.append(self(networks, start, key, classes, sample_offset=offset).samples)
        return torch.cat(batches) if batches else networks.sampler.initial(0, key)


class Pool(nn.Module):
    """Persistent chains. Every rank holds all of them and runs those of its rows.

    Args:
        size: number of chains.
        like: tensor [N, *] with the shape, dtype and device of the chains' states.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        super().__init__()
        self.samples: Tensor
        self.labels: Tensor
        self.started: Tensor
        self.register_buffer("samples", like.new_zeros((size, *like.shape[1:])))
        self.register_buffer("labels", like.new_zeros(size, dtype=torch.int64))
        self.register_buffer("started", like.new_zeros(size, dtype=torch.bool))

    def pick(self, n: int, key: Tensor) -> Tensor:
        """Chains for the n rows of a global batch, int64 [n]: consecutive ones from a random start, so that
        none occurs twice.

        Raises:
            ConfigError: there are fewer than n chains.
        """
        size = len(self.started)
        if n > size:
            raise ConfigError(f"langevin_pool must be >= the batch size, {n}, got {size}")
        return (noise.randint(size, 1, key) + torch.arange(n, device=key.device)) % size

    def resume(
        self, chains: Tensor, fresh: Tensor, labels: Tensor | None, restart: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Current states of chains, x [N, *], and their labels [N].

        A chain keeps its label until it restarts, from `fresh` and with the label of its row of the batch.

        Args:
            chains: int64 [N].
            fresh: noise [N, *].
            labels: int64 [N], or None.
            restart: bool [N]; a chain that has not run yet starts in any case.
        """
        restart = restart | ~self.started[chains]
        if labels is not None:
            labels = torch.where(restart, labels, self.labels[chains])
        return torch.where(per_row(restart, fresh), fresh, self.samples[chains]), labels

    def keep(self, chains: Tensor, samples: Tensor, labels: Tensor | None) -> None:
        """Stores the chains' states."""
        self.samples.index_copy_(0, chains, samples)
        if labels is not None:
            self.labels.index_copy_(0, chains, labels)
        self.started.index_fill_(0, chains, True)
