"""The few-step sampler: a network, a schedule's tables and a trainable log sigma.

Imports torch, ``dxmi_ext.ops`` and ``dxmi_ext.method.schedules``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.calls import call, output_of
from dxmi_ext.method.schedules import Schedule, reading

LATENT_TIMESTEP = ops.INITIAL_TIMESTEP - 1
"""The timestep that addresses the noise of latents; no step of a sampler has it, nor x_0."""


class Guide(Protocol):
    """(x [N, *], timestep int64 [N] of the step that led to x, labels [N] or None) -> where to go on from."""

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

    def means(self) -> dict[str, Tensor]:
        """What to log: means over particles of each step, [T]."""
        return {"log_prob": self.log_prob.mean(1), "sq_displacement": self.sq_displacement.mean(1)}

    def step(self, t: int) -> Transition:
        """Every particle's step t; views."""
        return Transition(self.samples[t], self.samples[t + 1], self.sq_displacement[t])

    def at(self, t: Tensor) -> Transition:
        """Each particle's own step t, int64 [B]; gathered."""
        rows = torch.arange(len(t), device=t.device)
        return Transition(self.samples[t, rows], self.samples[t + 1, rows], self.sq_displacement[t, rows])


class GaussianSampler(nn.Module):
    """x_{t+1} = sample_coef[t] x_t + output_coef[t] network(x_t, t) + exp(log_std[t]) z (DxMI, sec. 1).

    A chain has T steps. A sampler may know chains of several lengths, each with tables of its own, those of
    one after those of another: a timestep is a row of them, and tells both the length and the step.

    Args:
        network: (x [N, *], timestep int64 [N]) -> [N, *], or with labels [N] as a third argument.
        schedule: its log_std is where the trainable one starts.
        data_shape: (*).
        latent_dim: size of the normal vector that the network gets as ``latent`` [N, latent_dim], a new one
            each step (DDGAN, Xiao et al. 2022); 0: none.
        start: makes x_0 from data, (data [N, *], key, sample_offset=) -> [N, *], its noise keyed by the
            global row; a module, so that checkpoints hold it. None: x_0 is normal noise.
        lengths: T of each chain in a schedule that is `schedules.joined`; None: it is of one chain.

    Attributes:
        steps: T of the chain in use.
        memory_format: of the samples; every step keeps that of the one before.
    """

    memory_format = torch.contiguous_format

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        data_shape: Sequence[int],
        *,
        latent_dim: int = 0,
        start: nn.Module | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if latent_dim < 0:
            raise ValueError(f"latent_dim: got {latent_dim}, wants 0 or more")
        self.lengths = tuple(lengths or [len(schedule.log_std)])
        if sum(self.lengths) != len(schedule.log_std):
            raise ValueError(
                f"lengths: got {self.lengths}, wants in all the schedule's {len(schedule.log_std)} steps"
            )
        self.network, self.start = network, start
        self.data_shape = tuple(data_shape)
        self.latent_dim = latent_dim
        self.initial_std = schedule.initial_std
        self.log_std = nn.Parameter(schedule.log_std.float())
        self.sample_coef: Tensor
        self.output_coef: Tensor
        self.register_buffer("sample_coef", schedule.sample_coef.float())
        self.register_buffer("output_coef", schedule.output_coef.float())
        self.timesteps: Tensor
        self.register_buffer("timesteps", torch.arange(self.end), persistent=False)
        following = torch.arange(1, self.end + 1)
        following[torch.tensor(self.lengths).cumsum(0) - 1] = self.end
        self.following: Tensor
        self.register_buffer("following", following, persistent=False)
        self.use(self.lengths[0])

    def use(self, steps: int) -> None:
        """Chains have so many steps from here on.

        Raises:
            ValueError: it is none of ``lengths``.
        """
        if steps not in self.lengths:
            raise ValueError(f"steps: got {steps}, wants one of {', '.join(map(str, self.lengths))}")
        self.steps = steps
        self.first = sum(self.lengths[: self.lengths.index(steps)])

    @property
    def dim(self) -> int:
        """D: how many numbers a sample has."""
        return math.prod(self.data_shape)

    def fix_last_std(self) -> None:
        """The last step of every chain keeps its sigma: log_std gets no gradient there."""
        trained = torch.ones_like(self.log_std, requires_grad=False)
        trained[self.following == self.end] = 0
        self.log_std.register_hook(lambda grad: grad * trained)

    @property
    def end(self) -> int:
        """The timestep of every chain's x_T: one after all steps."""
        return len(self.log_std)

    def timestep(self, t: int, n: int) -> Tensor:
        """Step t of the chain in use, for n rows: int64 [n], without a copy."""
        return self.timesteps[self.first + t].expand(n)

    def after(self, timestep: Tensor) -> Tensor:
        """Where steps [n] lead to: the next of their chain, or `end`."""
        return self.following[timestep]

    def initial(self, n: int, key: Tensor, *, data: Tensor | None = None, sample_offset: int = 0) -> Tensor:
        """x_0 [n, *]; of data [n, *] where the sampler has a ``start``, which else have no effect."""
        shape, dtype = (n, *self.data_shape), self.log_std.dtype
        if self.start is None:
            x = self.initial_std * ops.normal(shape, key, sample_offset=sample_offset, dtype=dtype)
        elif data is None or data.shape != shape:
            got = "none" if data is None else [*data.shape]
            raise ValueError(f"data: got {got}, wants {[*shape]}: this sampler starts from data")
        else:
            x = self.start(data, key, sample_offset=sample_offset)
        return x.contiguous(memory_format=self.memory_format)

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
        latent = None
        if self.latent_dim:
            latent = draw_latents(timestep, self.end, self.latent_dim, key, sample_offset=sample_offset)
        output = call(self.network, sample, timestep, labels, latent=latent)
        tables = self.sample_coef, self.output_coef, self.log_std
        return ops.sampler_step(sample, output, timestep, *tables, key, sample_offset=sample_offset)

    @torch.no_grad()
    def rollout(
        self,
        n: int,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        data: Tensor | None = None,
        sample_offset: int = 0,
    ) -> Trajectory:
        """The whole path of n particles, on the key's device; one key serves all its noise. Data as in
        `initial`."""
        start = self.initial(n, key, data=data, sample_offset=sample_offset)
        # Each step in the memory format of the first.
        shape, strides = (self.steps + 1, *start.shape), (start.numel(), *start.stride())
        samples = start.new_empty_strided(shape, strides)
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
        data: Tensor | None = None,
        guide: Guide | None = None,
        sample_offset: int = 0,
        batch_size: int = 4096,
    ) -> Tensor:
        """Samples x_T [n, *]; row i depends on (key, sample_offset + i) alone, up to the rounding of the
        network's matrix products.

        Args:
            labels: [n], for a network that takes them.
            data: [n, *], for a sampler that starts from data.
            guide: moves samples after each step, as value guidance does.
            batch_size: rows that the network sees at a time.
        """
        batches = []
        for first in range(0, n, batch_size):
            count, offset = min(batch_size, n - first), sample_offset + first
            classes = None if labels is None else labels[first : first + count]
            rows = None if data is None else data[first : first + count]
            x = self.initial(count, key, data=rows, sample_offset=offset)
            for t in range(self.steps):
                timestep = self.timestep(t, count)
                x = self(x, timestep, key, classes, sample_offset=offset).next_sample
                if guide is not None:
                    x = guide(x, timestep, classes)
            batches.append(x)
        return torch.cat(batches) if batches else self.initial(0, key, data=data)


class LogProb(nn.Module):
    """Scores transitions of a sampler: (x_t [N, *], x_{t+1} [N, *], timestep [N], labels) -> log pi, [N], its
    mean over D."""

    def __init__(self, sampler: GaussianSampler) -> None:
        super().__init__()
        if sampler.latent_dim:
            raise NotImplementedError(
                f"sampler: got one with latent_dim={sampler.latent_dim}, wants 0: "
                "a transition has no closed log-probability where a latent that nobody kept took part in it"
            )
        self.sampler = sampler

    def forward(
        self, sample: Tensor, next_sample: Tensor, timestep: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        output = call(self.sampler.network, sample, timestep, labels)
        tables = self.sampler.sample_coef, self.sampler.output_coef, self.sampler.log_std
        return ops.transition_log_prob(next_sample, sample, output, timestep, *tables)


class Timed(nn.Module):
    """A network that knows no generation step: it gets the schedule's time, and its input scaled.

    As a network of `GaussianSampler`: (x [N, *], timestep int64 [N], labels, latent) -> [N, *].

    Args:
        network: (x [N, *], time float32 [N]) -> [N, *], with labels and latent where there are any.
        schedule: its `time` and `input_scale` are used.
    """

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.network = network
        self.time: Tensor
        self.input_scale: Tensor
        self.register_buffer("time", schedule.time.float())
        self.register_buffer("input_scale", schedule.input_scale.float())

    def forward(self, x: Tensor, timestep: Tensor, *labels: Tensor, latent: Tensor | None = None) -> Tensor:
        scale = per_row(self.input_scale[timestep].to(x.dtype), x)
        return output_of(self.network, scale * x, self.time[timestep], *labels, latent=latent)


class Clipped(Timed):
    """A `Timed` network that tells no data beyond [-1, 1] (Ho et al. 2020): its output is that of the nearest
    data. What a young network gets wrong where all is noise would else grow along the chain.

    Args:
        network, schedule: as of `Timed`.
        prediction, sigma_data: what the network tells, as in `schedules.from_levels`.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, prediction: str, sigma_data: float = 0.5
    ) -> None:
        super().__init__(network, schedule)
        skip, out, _ = reading(prediction, schedule.signal, schedule.noise, sigma_data)
        self.skip: Tensor
        self.out: Tensor
        self.register_buffer("skip", skip.float())
        self.register_buffer("out", out.float())

    def forward(self, x: Tensor, timestep: Tensor, *labels: Tensor, latent: Tensor | None = None) -> Tensor:
        output = super().forward(x, timestep, *labels, latent=latent)
        kept, out = (per_row(table[timestep].to(x.dtype), x) for table in (self.skip, self.out))
        data = kept * x + out * output
        return (data.clamp(-1, 1) - kept * x) / out


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """[N] as [N, 1, ...], to meet the rows of `like` [N, *]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def draw_latents(timestep: Tensor, steps: int, dim: int, key: Tensor, *, sample_offset: int = 0) -> Tensor:
    """The latents of a step, [N, dim]: standard normal, by (key, global row, timestep).

    Args:
        timestep: int64 [N], which may differ from row to row.
        steps: T.
        dim: of a latent.
        key: the step's own; its latents share none of the noise of steps.
        sample_offset: global index of the first row.
    """
    n = len(timestep)
    every = ops.normal((n, steps, dim), key, timestep=LATENT_TIMESTEP, sample_offset=sample_offset)
    return every[torch.arange(n, device=timestep.device), timestep]
