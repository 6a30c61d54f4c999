"""Samplers of chains of several lengths T: one network has a row for each step of each chain, or sees the
noise levels of a step, and so serves any length.

Imports torch and ``dxmi_ext.method.sampler``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dxmi_ext.method.sampler import GaussianSampler, log_of
from dxmi_ext.method.schedules import Schedule, joined

_HIDDEN = 64


class MultiLengthSampler(GaussianSampler):
    """A `GaussianSampler` for chains of several lengths, whose tables are concatenated: a timestep is an
    index into them, and determines both the length and the step.

    Args:
        network, schedule, data_shape: see `GaussianSampler`; the schedule is of `schedules.joined`.
        lengths: T of each chain, in the schedule's order; distinct.

    Attributes:
        steps: T of the current chain.
        favors_short: whether training draws T in proportion to 1 / T; False: each as often.
    """

    favors_short = False

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        data_shape: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        distinct = len({*lengths}) == len(lengths) and min(lengths, default=0) >= 1
        if not distinct or sum(lengths) != len(schedule.log_std):
            raise ValueError(
                f"lengths must be distinct, >= 1 and sum to the schedule's {len(schedule.log_std)} steps, "
                f"got {tuple(lengths)}"
            )
        super().__init__(network, schedule, data_shape)
        self.lengths = tuple(lengths)
        self.following: Tensor
        self.register_buffer("following", _following(self.lengths), persistent=False)
        MultiLengthSampler.use(self, self.lengths[0])  # a subclass is not complete yet

    def use(self, steps: int) -> None:
        """Sets the number of steps of the chains from here on.

        Raises:
            ValueError: ``steps`` is not in ``lengths``.
        """
        if steps not in self.lengths:
            raise ValueError(f"steps must be one of {', '.join(map(str, self.lengths))}, got {steps}")
        self.steps = steps
        first = sum(self.lengths[: self.lengths.index(steps)])
        self.rows = slice(first, first + steps)
        self.timesteps = torch.arange(first, first + steps, device=self.following.device)

    def after(self, timestep: Tensor) -> Tensor:
        return self.following[timestep]


class AnyLengthSampler(MultiLengthSampler):
    """A sampler of chains of any length. Its tables follow from the schedule of each length; log_std adds a
    learned function of the levels of a step. Its weights do not depend on ``lengths``.

    Args:
        network, data_shape: see `GaussianSampler`.
        schedule_of: (T, places of the levels or None) -> the schedule of a chain of T steps.
        lengths: T of each chain to train; `use` adds others.
        levels: levels of these chains, shared with the networks.
        train_last_std: whether the learned function also changes the sigma of last steps. It is part of how
            the sampler is built, not of its weights.

    Attributes:
        random_spacing: share of the training iterations whose chains have random levels (`respace`), so that
            the networks learn steps between any levels, not only between those of the trained lengths.
    """

    random_spacing = 0.0

    def __init__(
        self,
        network: nn.Module,
        schedule_of: Callable[[int, Tensor | None], Schedule],
        data_shape: Sequence[int],
        lengths: Sequence[int],
        levels: StepLevels,
        *,
        train_last_std: bool = True,
    ) -> None:
        schedule = joined([schedule_of(steps, None) for steps in lengths])
        super().__init__(network, schedule, data_shape, lengths)
        self.schedule_of, self.levels = schedule_of, levels
        self.std_offset = LevelFunction(1)
        self._last_log_std: float | None = None
        for name in ("sample_coef", "output_coef"):
            self.register_buffer(name, getattr(self, name), persistent=False)
        self._trains_last_std = train_last_std
        self.use(self.lengths[0])

    def _start_log_std(self, values: Tensor) -> None:
        self.schedule_log_std: Tensor
        self.register_buffer("schedule_log_std", values, persistent=False)

    @property
    def log_std(self) -> Tensor:  # type: ignore[override]
        """log sigma of the steps of all chains, [sum of lengths]."""
        offset, last = self.std_offset(self.levels.inputs[:-1])[:, 0], self.following == self.end
        if not self._trains_last_std:
            offset = offset.masked_fill(last, 0)
        values = self.schedule_log_std + offset
        return values if self._last_log_std is None else values.masked_fill(last, self._last_log_std)

    def std_weights(self) -> list[nn.Parameter]:
        return list(self.std_offset.parameters())

    def fix_last_std(self) -> None:
        self._trains_last_std = False

    def set_last_std(self, std: float) -> None:
        self._last_log_std = log_of(std)

    def use(self, steps: int) -> None:
        """Sets the number of steps of the chains, and whose energy V^T is, from here on; a new one adds its
        chain to the tables.

        Raises:
            ValueError: the schedule has no chain of this length.
        """
        if self.displacement_scale is not None:
            self._set(None)
            self.displacement_scale = None
        if steps not in self.lengths:
            self._add(steps)
        super().use(steps)
        self.levels.end_of(steps)

    def respace(self, places: Tensor) -> None:
        """Moves the noise levels of the chain in use until the next `use`.

        Args:
            places: places of the levels on the schedule's scale, ascending from 0 to 1, [T].
        """
        usual = self.levels.drops(self.rows)
        self._set(places)
        self.displacement_scale = self.levels.drops(self.rows) / usual

    def _set(self, places: Tensor | None) -> None:
        schedule = self.schedule_of(self.steps, places)
        self.levels.set(self.rows, schedule)
        for name, rows in _tables(schedule):
            getattr(self, name)[self.rows] = rows.to(self.sample_coef)

    def _add(self, steps: int) -> None:
        schedule = self.schedule_of(steps, None)
        self.levels.add(schedule)
        for name, rows in _tables(schedule):
            table = getattr(self, name)
            setattr(self, name, torch.cat((table, rows.to(table))))
        self.lengths = (*self.lengths, steps)
        self.following = _following(self.lengths).to(self.following.device)


class StepLevels(nn.Module):
    """The noise levels of the steps of several chains, as inputs of networks.

    Args:
        chains: schedules of the chains, in the sampler's order.

    Attributes:
        sigma: levels noise / signal of the steps, [steps of all chains + 1], 0 at the end.
        inputs: [steps of all chains + 1, INPUTS]. For each step: 1; 0; the log of its level sigma = noise /
            signal, scaled to -1 .. 1 over the chains given here; the ratio of the next level to it;
            sinusoids of both; and its ratio to the previous level (1 for the first step), since the last
            steps of all chains have the same levels, although those of short chains move further. For the
            end, see `end_of`.
    """

    INPUTS = 9

    def __init__(self, chains: Sequence[Schedule]) -> None:
        super().__init__()
        self.longest = max(len(chain.noise) for chain in chains)
        logs = torch.cat([_levels(chain) for chain in chains]).log()
        self.low, self.high = float(logs.min()), float(logs.max())
        self.inputs: Tensor
        self.sigma: Tensor
        self.register_buffer("inputs", torch.zeros(1, self.INPUTS), persistent=False)
        self.register_buffer("sigma", torch.zeros(1), persistent=False)
        for chain in chains:
            self.add(chain)

    def add(self, schedule: Schedule) -> None:
        """Adds the steps of a chain, before the end."""
        level, rows = self._rows(schedule)
        self.inputs = torch.cat((self.inputs[:-1], rows, self.inputs[-1:]))
        self.sigma = torch.cat((self.sigma[:-1], level, self.sigma[-1:]))

    def set(self, rows: slice, schedule: Schedule) -> None:
        """Replaces the steps of a chain by those of one with other levels."""
        self.sigma[rows], self.inputs[rows] = self._rows(schedule)

    def end_of(self, steps: int) -> None:
        """Sets the inputs of the end for a chain of ``steps`` steps.

        They are 0, the shortness 1 - log T / log T_max, and sinusoids of it, where T_max is the largest T of
        the chains given at first; all 0 for this chain and longer ones. Shorter chains thus have energies of
        their own, which oppose errors that longer chains do not make.
        """
        short = 1 - math.log(steps) / math.log(self.longest) if steps < self.longest else 0.0
        waves = (math.sin(math.pi / 2 * k * short) for k in range(1, self.INPUTS - 1))
        self.inputs[-1] = self.inputs.new_tensor([0, short, *waves])

    def drops(self, rows: slice) -> Tensor:
        """The decrease of sigma^2 in each step of a chain, [T]; squared displacements are about proportional
        to it."""
        squares = self.sigma[rows].square()
        return squares - torch.cat((squares[1:], squares.new_zeros(1)))

    def _rows(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        level = _levels(schedule)
        ratio = torch.cat((level[1:], level.new_zeros(1))) / level
        place = (2 * level.log() - self.low - self.high) / max(self.high - self.low, 1e-6)
        angles = torch.pi * torch.stack((place / 2, place, ratio))
        waves = *angles[:2].sin(), *angles[1:].cos()
        before = torch.cat((level.new_ones(1), ratio[:-1]))
        one, zero = torch.ones_like(level), torch.zeros_like(level)
        rows = torch.stack((one, zero, place, ratio, *waves, before), dim=1)
        return level.to(self.sigma), rows.to(self.inputs)


class LevelFunction(nn.Module):
    """A function of the levels of a step or of a shorter chain's end, zero at first and for inputs of 0:
    inputs of `StepLevels` [N, INPUTS] -> [N, outputs].

    Args:
        outputs: number of values.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(StepLevels.INPUTS, _HIDDEN), nn.Linear(_HIDDEN, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.silu(2 * self.first(inputs))
        # Steps of Adam change the values about as much as those of a table.
        return inputs.any(1, keepdim=True) * self.last(hidden) / _HIDDEN**0.5


def lengths_of(sampler: GaussianSampler) -> tuple[int, ...]:
    """T of each chain of a sampler."""
    return sampler.lengths if isinstance(sampler, MultiLengthSampler) else (sampler.steps,)


def draw_length(sampler: GaussianSampler, seed: int, iteration: int) -> None:
    """Sets the length of an iteration at random, the same on all ranks and after a resume: each length once
    in every `len(lengths)` iterations, or in proportion to 1 / T where the sampler favors short chains."""
    if not isinstance(sampler, MultiLengthSampler):
        return
    draws, lengths = random.Random(f"{seed} {iteration}"), sampler.lengths
    if sampler.favors_short:
        sampler.use(draws.choices(lengths, [1 / steps for steps in lengths])[0])
    else:
        # Shuffled blocks, so that no length waits long for its next iteration.
        block, place = divmod(iteration, len(lengths))
        sampler.use(random.Random(f"{seed} block {block}").sample(lengths, len(lengths))[place])
    if isinstance(sampler, AnyLengthSampler) and draws.random() < sampler.random_spacing:
        sampler.respace(_random_places(draws, sampler.steps))


def _random_places(draws: random.Random, steps: int) -> Tensor:
    """Places of random levels, float64 [T], from 0 to 1. The fewer steps, the more their gaps vary, since
    the trained lengths around a short one differ more."""
    gaps = [0.02 + draws.gammavariate(max(steps - 3, 1), 1) for _ in range(steps - 1)]
    places = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0)
    return places / places[-1] if gaps else places


def _tables(schedule: Schedule) -> tuple[tuple[str, Tensor], ...]:
    """The tables of an `AnyLengthSampler`, by name."""
    return (
        ("sample_coef", schedule.sample_coef),
        ("output_coef", schedule.output_coef),
        ("schedule_log_std", schedule.log_std),
    )


def _levels(schedule: Schedule) -> Tensor:
    return schedule.noise / schedule.signal


def _following(lengths: Sequence[int]) -> Tensor:
    """The timestep after each: the next of its chain, or the end of all."""
    following = torch.arange(1, sum(lengths) + 1)
    following[torch.tensor(lengths).cumsum(0) - 1] = sum(lengths)
    return following
