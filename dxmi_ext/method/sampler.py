"""The few-step sampler: a network, the tables of a schedule and a trainable log sigma.

Imports torch, ``dxmi_ext.ops`` and ``dxmi_ext.method.schedules``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.arguments import at_least, of_type
from dxmi_ext.engine.compute.calls import call, output_of
from dxmi_ext.method.schedules import Schedule, reading

_TABLE_PRECISION = 2e-3  # of tables that were saved in float16


class Guide(Protocol):
    """(x [N, *], timestep int64 [N] of the step that led to x, labels [N] or None) -> x to continue from."""

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor: ...


class Transition(NamedTuple):
    """One step of N particles."""

    sample: Tensor
    """x_t [N, *]"""
    next_sample: Tensor
    """x_{t+1} [N, *]"""
    sq_displacement: Tensor
    """[N]"""
    place: int | tuple[Tensor, Tensor]
    """Index of the N entries in tensors [T, B]."""


class Trajectory(NamedTuple):
    """A rollout of B particles over T steps, with the row results of each step."""

    samples: Tensor
    """[T + 1, B, *]: x_0 .. x_T."""
    log_prob: Tensor
    """[T, B]"""
    sq_displacement: Tensor
    """[T, B]"""

    def means(self) -> dict[str, Tensor]:
        """Metrics: means over particles for each step, [T]."""
        return {"log_prob": self.log_prob.mean(1), "sq_displacement": self.sq_displacement.mean(1)}

    def step(self, t: int) -> Transition:
        """Every particle's step t; views."""
        return Transition(self.samples[t], self.samples[t + 1], self.sq_displacement[t], t)

    def at(self, t: Tensor) -> Transition:
        """Each particle's own step t, int64 [B]; gathered."""
        rows = torch.arange(len(t), device=t.device)
        place = t, rows
        return Transition(self.samples[place], self.samples[t + 1, rows], self.sq_displacement[place], place)


class GaussianSampler(nn.Module):
    """x_{t+1} = sample_coef[t] x_t + output_coef[t] network(x_t, t) + exp(log_std[t]) z, for t = 0 .. T - 1.

    Args:
        network: (x [N, *], timestep int64 [N]) -> [N, *], with labels [N] as a third argument if conditional.
        schedule: tables of the steps; its log_std initializes the trainable one.
        data_shape: shape (*) of a sample.
        start: module that computes x_0 from data, (data [N, *], key, sample_offset=) -> [N, *], with noise
            keyed by the global row. None: x_0 is normal noise.
        max_std: upper bound of sigma, at the start and in training; None: no bound.

    Attributes:
        steps: T.
        rows: the chain's rows of the tables; some of them for a `MultiLengthSampler`.
        timesteps: timesteps of the chain, int64 [T].
        memory_format: memory format of the samples.
        displacement_scale: factors of the squared displacements of the chain's steps compared with those of
            the usual chain of this length, [T]; None: it is the usual chain.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``data_shape`` has an entry < 1, or ``max_std`` is <= 0.
    """

    rows = slice(None)
    displacement_scale: Tensor | None = None

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        data_shape: Sequence[int],
        *,
        start: nn.Module | None = None,
        max_std: float | None = None,
    ) -> None:
        super().__init__()
        of_type("network", network, nn.Module, "a torch.nn.Module")
        of_type("schedule", schedule, Schedule, "a Schedule of dxmi_ext.schedules")
        of_type("start", start, (nn.Module, type(None)), "a torch.nn.Module or None")
        self.network, self.start, self.max_std = network, start, max_std
        of_type("data_shape", data_shape, Sequence, "a sequence such as (3,)")
        for size in data_shape:
            at_least("every entry of data_shape", size, 1)
        if max_std is not None and not max_std > 0:
            raise ValueError(f"max_std must be > 0, got {max_std}")
        self.data_shape = tuple(data_shape)
        self.initial_std = schedule.initial_std
        self.steps = len(schedule.log_std)
        self.sample_coef: Tensor
        self.output_coef: Tensor
        self.timesteps: Tensor
        self._trains_last_std, self._channels_last = True, False
        dtype = torch.get_default_dtype()
        self._start_log_std(schedule.log_std.to(dtype, copy=True))
        self.register_buffer("sample_coef", schedule.sample_coef.to(dtype))
        self.register_buffer("output_coef", schedule.output_coef.to(dtype))
        self.register_buffer("timesteps", torch.arange(self.steps), persistent=False)
        self.bound_std()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self._trains_last_std:  # copies of a weight have no hooks
            self.fix_last_std()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # x_0 and T follow from the schedule given, so tables of another one do not fit.
        for name in ("sample_coef", "output_coef"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is None or saved.shape != own.shape:
                continue
            differ = ~saved.to(own).isclose(own, rtol=_TABLE_PRECISION, atol=_TABLE_PRECISION)
            if len(places := differ.nonzero()):
                t = int(places[0])
                raise ValueError(
                    f"schedule must be that of the saved sampler, whose {name}[{t}] is {saved[t]:.4g}, got "
                    f"{own[t]:.4g}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @memory_format.setter
    def memory_format(self, value: torch.memory_format) -> None:
        self._channels_last = value == torch.channels_last  # torch.save cannot store a memory format

    def _start_log_std(self, values: Tensor) -> None:
        self.log_std = nn.Parameter(values)

    def std_weights(self) -> list[nn.Parameter]:
        """The weights that determine log_std."""
        return [self.log_std]

    def use(self, steps: int) -> None:
        """Sets the number of steps of the chain from here on.

        Raises:
            ValueError: the sampler has no chain of this length.
        """
        if steps != self.steps:
            raise ValueError(f"steps must be {self.steps}, the sampler's only length, got {steps}")

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """sample_coef, output_coef and log_std, as the ops take them."""
        return self.sample_coef, self.output_coef, self.log_std

    @property
    def dim(self) -> int:
        """D, the number of dimensions of a sample."""
        return math.prod(self.data_shape)

    def fix_last_std(self) -> None:
        """Freezes the sigma of the last step."""
        self._trains_last_std = False
        if self.log_std.requires_grad:  # else all are frozen
            self.log_std.register_hook(
                lambda grad: grad if self._trains_last_std else grad * ~self._is_last()
            )

    def train_last_std(self) -> None:
        """Undoes `fix_last_std`."""
        self._trains_last_std = True

    @torch.no_grad()
    def set_last_std(self, std: float) -> None:
        """Sets the sigma of the last step; 0: it adds no noise.

        Raises:
            ValueError: ``std`` is < 0.
        """
        self.log_std[self._is_last()] = log_of(std)

    @torch.no_grad()
    def bound_std(self) -> None:
        """Lowers each sigma above ``max_std`` to it; the trainer does so after each update."""
        if self.max_std is not None:
            self.log_std.clamp_(max=math.log(self.max_std))

    def _is_last(self) -> Tensor:
        timesteps = torch.arange(self.end, device=self.log_std.device)
        return self.after(timesteps) == self.end

    @property
    def end(self) -> int:
        """Timestep of x_T, one past all steps."""
        return len(self.sample_coef)

    def timestep(self, t: int, n: int) -> Tensor:
        """Timestep of step t of the chain for n rows: an expanded int64 [n]."""
        return self.timesteps[t].expand(n)

    def after(self, timestep: Tensor) -> Tensor:
        """Timesteps that follow timesteps [n]: the next of their chain, or `end`."""
        return timestep + 1

    def initial(self, n: int, key: Tensor, *, data: Tensor | None = None, sample_offset: int = 0) -> Tensor:
        """x_0 [n, *]; from data [n, *] if the sampler has a ``start``, which otherwise have no effect."""
        shape, dtype = (n, *self.data_shape), self.log_std.dtype
        if self.start is None:
            x = self.initial_std * ops.normal(shape, key, sample_offset=sample_offset, dtype=dtype)
        elif data is None or data.shape != shape:
            got = "none" if data is None else [*data.shape]
            raise ValueError(
                f"data must have shape {[*shape]} for a sampler that starts from data, got {got}"
            )
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
        """One reparametrized step.

        Args:
            sample: x_t [N, *].
            timestep: int64 [N].
            key: noise key, from `ops.noise_key`.
            labels: [N], for a conditional network.
            sample_offset: global index of the first row.
        """
        output = call(self.network, sample, timestep, labels)
        return ops.sampler_step(sample, output, timestep, *self.tables, key, sample_offset=sample_offset)

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
        """The path of n particles, on the key's device; one key gives all its noise. For the arguments and
        errors see `sample`."""
        self._check(n, labels, data)
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
            n: number of samples.
            key: noise key, from `ops.noise_key`.
            labels: [n], for a conditional network.
            data: [n, *], for a sampler that starts from data.
            guide: function applied to samples after each step, such as value guidance.
            sample_offset: global index of the first row.
            batch_size: rows per call of the network.

        Raises:
            TypeError, ValueError: names the argument and its requirement.
        """
        self._check(n, labels, data)
        at_least("batch_size", batch_size, 1)
        batches = []
        for first in range(0, n, batch_size):
            count, offset = min(batch_size, n - first), sample_offset + first
            classes = None if labels is None else labels[first : first + count]
            given = None if data is None else data[first : first + count]
            x = self.initial(count, key, data=given, sample_offset=offset)
            for t in range(self.steps):
                timestep = self.timestep(t, count)
                x = self(x, timestep, key, classes, sample_offset=offset).next_sample
                if guide is not None:
                    x = guide(x, timestep, classes)
            batches.append(x)
        return torch.cat(batches) if batches else self.initial(0, key, data=data)

    def _check(self, n: int, labels: Tensor | None, data: Tensor | None) -> None:
        at_least("n", n, 0)
        for name, rows in (("labels", labels), ("data", data)):
            of_type(name, rows, (Tensor, type(None)), "a tensor or None")
        if labels is not None and labels.shape != (n,):
            raise ValueError(f"labels must have shape [{n}], got {[*labels.shape]}")
        if data is not None and data.shape != (n, *self.data_shape):
            raise ValueError(f"data must have shape {[n, *self.data_shape]}, got {[*data.shape]}")


class LogProb(nn.Module):
    """Log-probability of a sampler's transitions: (x_t [N, *], x_{t+1} [N, *], timestep [N], labels) -> [N],
    means over D."""

    def __init__(self, sampler: GaussianSampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(
        self, sample: Tensor, next_sample: Tensor, timestep: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        output = call(self.sampler.network, sample, timestep, labels)
        return ops.transition_log_prob(next_sample, sample, output, timestep, *self.sampler.tables)


class ExpectedStep(nn.Module):
    """A sampler's reparametrized step, whose squared displacement is the mean over the step's noise given
    x_t: the gradient of a running cost is the same on average, without the noise.

    It is called like the sampler.
    """

    def __init__(self, sampler: GaussianSampler) -> None:
        super().__init__()
        self.sampler = sampler
        ignored = getattr(sampler, "_ddp_params_and_buffers_to_ignore", ())
        self._ddp_params_and_buffers_to_ignore = [f"sampler.{name}" for name in ignored]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        *,
        sample_offset: int = 0,
    ) -> ops.StepOutput:
        output, tables = call(self.sampler.network, sample, timestep, labels), self.sampler.tables
        step = ops.sampler_step(sample, output, timestep, *tables, key, sample_offset=sample_offset)
        scale, gain, log_std = (table[timestep] for table in tables)
        drift = (per_row(scale, sample) - 1) * sample + per_row(gain, sample) * output
        return step._replace(sq_displacement=flat(drift).square().mean(1) + (2 * log_std).exp())


class Timed(nn.Module):
    """A network conditioned on the schedule's time instead of the generation step, with scaled input.

    As a network of `GaussianSampler`: (x [N, *], timestep int64 [N], labels) -> [N, *].

    Args:
        network: (x [N, *], time float32 [N]) -> [N, *], with labels if there are any.
        schedule: schedule that has `time` and `input_scale`.
    """

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.network = network
        self.time: Tensor
        self.input_scale: Tensor
        self.register_buffer("time", schedule.time.float())
        self.register_buffer("input_scale", schedule.input_scale.float())

    def forward(self, x: Tensor, timestep: Tensor, *labels: Tensor) -> Tensor:
        scale = per_row(self.input_scale[timestep].to(x.dtype), x)
        return output_of(self.network, scale * x, self.time[timestep], *labels)


class Clipped(Timed):
    """A `Timed` network whose predicted data are clipped to [-1, 1] (Ho et al. 2020). Otherwise the errors of
    a barely trained network at high noise grow along the chain.

    Args:
        network, schedule: see `Timed`.
        prediction, sigma_data: what the network predicts; see `schedules.from_levels`.
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

    def forward(self, x: Tensor, timestep: Tensor, *labels: Tensor) -> Tensor:
        output = super().forward(x, timestep, *labels)
        kept, out = (per_row(table[timestep].to(x.dtype), x) for table in (self.skip, self.out))
        data = kept * x + out * output
        return (data.clamp(-1, 1) - kept * x) / out


def log_of(std: float) -> float:
    """log sigma, -inf for 0.

    Raises:
        ValueError: ``std`` is < 0.
    """
    if not std >= 0:
        raise ValueError(f"std must be >= 0, got {std}")
    return math.log(std) if std else -math.inf


def flat(x: Tensor) -> Tensor:
    """[N, *] as [N, D]; D = 1 without data dimensions."""
    return x[:, None].flatten(1)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """[N] as [N, 1, ...], to broadcast against `like` [N, *]."""
    return values.view(-1, *[1] * (like.ndim - 1))
