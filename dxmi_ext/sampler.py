"""The few-step sampler: a network, a schedule's tables and a trainable log sigma.

Imports torch, ``dxmi_ext.ops`` and ``dxmi_ext.schedules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.schedules import Schedule


class Guide(Protocol):
    """(x [N, *], timestep int64 [N] that x has reached, labels [N] or None) -> the samples to go on from."""

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor: ...


class Transition(NamedTuple):
    """One step of N particles."""

    sample: Tensor
    """x_t [N, *]"""
    next_sample: Tensor
    """x_{t+1} [N, *]"""
    sq_displacement: Tensor
    """[N]"""


class Trajectory(NamedTuple):
    """A rollout of B particles over T steps. Row results are kept, so that training on the path reads
    [T, B] scalars only."""

    samples: Tensor
    """[T + 1, B, *]: x_0 .. x_T."""
    log_prob: Tensor
    """[T, B]"""
    sq_displacement: Tensor
    """[T, B]"""

    def step(self, t: int) -> Transition:
        """Every particle's step t; views."""
        return Transition(self.samples[t], self.samples[t + 1], self.sq_displacement[t])

    def at(self, timestep: Tensor) -> Transition:
        """Each particle's step at its own timestep, int64 [B]; gathered."""
        rows = torch.arange(len(timestep), device=timestep.device)
        return Transition(
            self.samples[timestep, rows],
            self.samples[timestep + 1, rows],
            self.sq_displacement[timestep, rows],
        )


class GaussianSampler(nn.Module):
    """x_{t+1} = sample_coef[t] x_t + output_coef[t] network(x_t, t) + exp(log_std[t]) z (DxMI, sec. 1).

    Args:
        network: (x [N, *], timestep int64 [N]) -> [N, *], or with labels [N] as a third argument.
        schedule: its log_std is where the trainable one starts.
        data_shape: (*).
    """

    def __init__(self, network: nn.Module, schedule: Schedule, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.data_shape = tuple(data_shape)
        self.initial_std = schedule.initial_std
        self.log_std = nn.Parameter(schedule.log_std.float())
        self.sample_coef: Tensor
        self.output_coef: Tensor
        self.register_buffer("sample_coef", schedule.sample_coef.float())
        self.register_buffer("output_coef", schedule.output_coef.float())
        self.timesteps: Tensor
        self.register_buffer("timesteps", torch.arange(len(self.log_std)), persistent=False)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.log_std)

    def timestep(self, t: int, n: int) -> Tensor:
        """Step t for n rows: int64 [n], without a copy."""
        return self.timesteps[t].expand(n)

    def initial(self, n: int, key: Tensor, *, sample_offset: int = 0) -> Tensor:
        """x_0 [n, *]."""
        shape, dtype = (n, *self.data_shape), self.log_std.dtype
        return self.initial_std * ops.normal(shape, key, sample_offset=sample_offset, dtype=dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        sample_offset: int = 0,
    ) -> ops.StepOutput:
        """One reparametrised step.

        Args:
            sample: x_t [N, *].
            timestep: int64 [N].
            key: its noise; `ops.noise_key`.
            labels: [N], for a network that takes them.
            sample_offset: global index of the first row.
        """
        output = conditioned(self.network, sample, timestep, labels)
        tables = self.sample_coef, self.output_coef, self.log_std
        return ops.sampler_step(sample, output, timestep, *tables, key, sample_offset=sample_offset)

    @torch.no_grad()
    def rollout(
        self, n: int, key: Tensor, labels: Tensor | None = None, *, sample_offset: int = 0
    ) -> Trajectory:
        """The whole path of n particles, on the key's device; one key serves all its noise."""
        start = self.initial(n, key, sample_offset=sample_offset)
        samples = start.new_empty((self.steps + 1, *start.shape))
        rows = start.new_empty((2, self.steps, n))
        path = Trajectory(samples, rows[0], rows[1])
        samples[0] = start
        for t in range(self.steps):
            step = self(samples[t], self.timestep(t, n), key, labels, sample_offset=sample_offset)
            samples[t + 1] = step.next_sample
            path.log_prob[t] = step.log_prob
            path.sq_displacement[t] = step.sq_displacement
        return path

    @torch.no_grad()
    def sample(
        self,
        n: int,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        guide: Guide | None = None,
        sample_offset: int = 0,
        batch_size: int = 4096,
    ) -> Tensor:
        """Samples x_T [n, *]; row i depends on (key, sample_offset + i) alone, up to the rounding of the
        network's matrix products.

        Args:
            labels: [n], for a network that takes them.
            guide: moves samples after each step, as value guidance does.
            batch_size: rows that the network sees at a time.
        """
        batches = []
        for first in range(0, n, batch_size):
            count, offset = min(batch_size, n - first), sample_offset + first
            classes = None if labels is None else labels[first : first + count]
            x = self.initial(count, key, sample_offset=offset)
            for t in range(self.steps):
                timestep = self.timestep(t, count)
                x = self(x, timestep, key, classes, sample_offset=offset).next_sample
                if guide is not None:
                    x = guide(x, timestep + 1, classes)
            batches.append(x)
        return torch.cat(batches) if batches else self.initial(0, key)


class LogProb(nn.Module):
    """Scores transitions of a sampler: (x_t [N, *], x_{t+1} [N, *], timestep [N], labels) -> log pi, [N], its
    mean over D."""

    def __init__(self, sampler: GaussianSampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(
        self, sample: Tensor, next_sample: Tensor, timestep: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        output = conditioned(self.sampler.network, sample, timestep, labels)
        tables = self.sampler.sample_coef, self.sampler.output_coef, self.sampler.log_std
        return ops.transition_log_prob(next_sample, sample, output, timestep, *tables)


def conditioned(network: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    """The network's output; labels are passed on where there are any."""
    return network(x, timestep) if labels is None else network(x, timestep, labels)
