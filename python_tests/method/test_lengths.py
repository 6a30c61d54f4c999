"""Samplers of several lengths, and of any length: their tables, levels and draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.method import schedules
from dxmi_ext.method.costs import Costs
from dxmi_ext.method.lengths import AnyLengthSampler, MultiLengthSampler, StepLevels, draw_length, lengths_of
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.schedules import Schedule
from dxmi_ext.method.settings import DxMISettings

SHAPE = (2,)
KEY = ops.noise_key(3)


def schedule_of(steps: int, places: Tensor | None = None) -> Schedule:
    return schedules.variance_exploding(steps, sigma_max=3.0, sigma_min=0.4, places=places)


class OfStep(nn.Module):
    """A network whose steps differ only by their levels."""

    def __init__(self, levels: StepLevels) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x.sin() + self.levels.inputs[timestep, 1:3]


def any_length(*lengths: int) -> AnyLengthSampler:
    levels = StepLevels([schedule_of(steps) for steps in lengths])
    torch.manual_seed(0)
    sampler = AnyLengthSampler(OfStep(levels), schedule_of, SHAPE, lengths, levels)
    nn.init.normal_(sampler.std_offset.last.weight, std=0.3)
    return sampler


class Sine(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return (x + timestep[:, None]).sin()


def test_chains_of_several_lengths() -> None:
    """Each chain follows the tables of its own schedule, and all end at the same timestep."""
    chains, network = [schedule_of(steps) for steps in (1, 3, 2)], Sine()
    sampler = MultiLengthSampler(network, schedules.joined(chains), SHAPE, (1, 3, 2))
    assert (sampler.steps, sampler.end) == (1, 6)
    assert sampler.after(torch.arange(6)).tolist() == [6, 2, 3, 6, 5, 6]
    for first, chain in zip((0, 1, 4), chains, strict=True):
        sampler.use(len(chain.log_std))
        path = sampler.rollout(4, KEY)
        tables = [table.float() for table in (chain.sample_coef, chain.output_coef, chain.log_std)]
        for t in range(sampler.steps):
            timestep = sampler.timestep(t, 4)
            assert timestep.tolist() == [first + t] * 4
            output = network(path.samples[t], timestep)
            std = tables[2].exp()[t]
            mean = tables[0][t] * path.samples[t] + tables[1][t] * output
            z = ops.normal((4, *SHAPE), KEY, timestep=first + t)
            torch.testing.assert_close(path.samples[t + 1], mean + std * z)
        assert torch.equal(sampler.sample(4, KEY), path.samples[-1])
    with pytest.raises(ValueError, match=r"steps must be one of 1, 3, 2, got 4"):
        sampler.use(4)
    for lengths in ((1, 3), (3, 3), (0, 6)):
        with pytest.raises(ValueError, match=r"lengths must be distinct, >= 1 and sum to .* 6 steps, got \("):
            MultiLengthSampler(network, schedules.joined(chains), SHAPE, lengths)
    with pytest.raises(ValueError, match=r"chains must have the same initial_std, got"):
        schedules.joined([chains[0], schedules.ddim(2)])


def test_levels_are_those_of_each_step_and_the_next() -> None:
    levels = StepLevels([schedule_of(2), schedule_of(3)])
    middle = (3 * 0.4) ** 0.5
    assert levels.inputs[:, 0].tolist() == [1, 1, 1, 1, 1, 0] and not levels.inputs[-1].any()
    torch.testing.assert_close(levels.inputs[:-1, 2], torch.tensor([1.0, -1, 1, 0, -1]))
    torch.testing.assert_close(
        levels.inputs[:-1, -1], torch.tensor([1, 0.4 / 3, 1, middle / 3, 0.4 / middle])
    )
    torch.testing.assert_close(levels.inputs[:-1, 3], torch.tensor([0.4 / 3, 0, middle / 3, 0.4 / middle, 0]))
    levels.end_of(2)
    short = 1 - math.log(2) / math.log(3)
    torch.testing.assert_close(levels.inputs[-1, :3], torch.tensor([0, short, math.sin(math.pi / 2 * short)]))
    for steps in (3, 7):  # the longest chain, and one that is longer still
        levels.end_of(steps)
        assert not levels.inputs[-1].any()
    single = StepLevels([schedule_of(1)])
    single.end_of(1)
    assert not single.inputs[-1].any()


def test_a_length_is_the_same_chain_trained_or_added() -> None:
    """Including the learned sigma; the weights fit a sampler of other lengths."""
    first, other = any_length(2, 5), any_length(5, 2, 3)
    assert first.state_dict().keys() == {f"std_offset.{n}" for n in first.std_offset.state_dict()}
    other.load_state_dict(first.state_dict())
    first.use(3)
    other.use(3)
    assert (first.lengths, other.lengths) == ((2, 5, 3), (5, 2, 3)) and first.end == other.end == 10
    tables = [(s.sample_coef[s.rows], s.output_coef[s.rows], s.log_std[s.rows]) for s in (first, other)]
    torch.testing.assert_close(*tables)
    assert not torch.allclose(tables[0][2], schedule_of(3).log_std.float(), atol=0.01)
    torch.testing.assert_close(first.timesteps, torch.tensor([7, 8, 9]))
    assert first.after(first.timesteps).tolist() == [8, 9, 10]
    single = GaussianSampler(nn.Identity(), schedule_of(3), SHAPE)
    torch.testing.assert_close(tables[0][:2], (single.sample_coef, single.output_coef))
    assert first.sample(4, KEY).isfinite().all()


def test_a_chain_with_random_levels_is_the_usual_one_after_the_next_use() -> None:
    sampler = any_length(2, 3)
    sampler.use(3)
    usual = [table.clone() for table in (sampler.sample_coef, sampler.log_std, sampler.levels.inputs[:-1])]
    sampler.respace(torch.tensor([0, 0.8, 1]))
    low = 3 * (0.4 / 3) ** 0.8
    torch.testing.assert_close(sampler.levels.sigma[sampler.rows], torch.tensor([3.0, low, 0.4]))
    scale = torch.tensor([(9 - low**2) / (9 - 3 * 0.4), (low**2 - 0.16) / (3 * 0.4 - 0.16), 1])
    torch.testing.assert_close(sampler.displacement_scale, scale)
    assert not torch.equal(sampler.log_std, usual[1])
    sampler.use(2)
    assert sampler.displacement_scale is None
    for table, before in zip(
        (sampler.sample_coef, sampler.log_std, sampler.levels.inputs[:-1]), usual, strict=True
    ):
        assert torch.equal(table, before)
    with pytest.raises(ValueError, match=r"places must be 2 ascending numbers within \[0, 1\], got"):
        sampler.respace(torch.tensor([0.5, 0.2]))


def test_running_costs_of_random_levels_are_those_of_their_steps() -> None:
    """s_t^2 is proportional to the expected displacement; AVR adapts it for the usual levels."""
    sampler = any_length(2, 3)
    costs = Costs(DxMISettings(tau_entropy=0.0, tau_velocity=0.1), sampler, Ranks())
    sampler.use(3)
    usual, timesteps = costs.velocity_var.clone(), sampler.timesteps
    before = costs.of("sampler", torch.ones(3), timesteps)
    sampler.respace(torch.tensor([0, 0.8, 1]))
    scale = sampler.displacement_scale
    torch.testing.assert_close(costs.of("sampler", torch.ones(3), timesteps), before / scale)
    costs.adapt(usual[sampler.rows] * scale, torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE))
    torch.testing.assert_close(costs.velocity_var, usual)


def test_half_of_the_iterations_have_random_levels() -> None:
    sampler = any_length(2, 5)
    sampler.random_spacing = 0.5
    respaced = 0
    for iteration in range(200):
        draw_length(sampler, 0, iteration)
        respaced += sampler.displacement_scale is not None
        levels = sampler.levels.sigma[sampler.rows]
        assert (levels[0], levels[-1]) == pytest.approx((3, 0.4)) and (levels.diff() < 0).all()
    assert 70 < respaced < 130


def test_gradients_reach_the_function_of_the_levels_but_not_a_fixed_last_sigma() -> None:
    sampler = any_length(1, 3)
    (slope,) = torch.autograd.grad(sampler.log_std.sum(), sampler.std_offset.last.bias)
    assert float(slope) == pytest.approx(4 / 8)
    sampler.fix_last_std()
    (slope,) = torch.autograd.grad(sampler.log_std.sum(), sampler.std_offset.last.bias)
    assert float(slope) == pytest.approx(2 / 8)
    last = sampler.following == sampler.end
    torch.testing.assert_close(sampler.log_std[last], sampler.schedule_log_std[last])


def test_lengths_are_drawn_in_shuffled_blocks_or_favor_short_ones() -> None:
    schedule = schedules.joined([schedule_of(1), schedule_of(4)])
    sampler = MultiLengthSampler(nn.Identity(), schedule, SHAPE, (1, 4))

    def drawn(iteration: int) -> int:
        draw_length(sampler, 0, iteration)
        return sampler.steps

    pairs = [(drawn(i), drawn(i + 1)) for i in range(0, 1000, 2)]
    assert {*pairs} == {(1, 4), (4, 1)} and abs(pairs.count((1, 4)) - 250) < 40
    sampler.favors_short = True
    assert abs([drawn(i) for i in range(1000)].count(1) - 800) < 50
    single = GaussianSampler(nn.Identity(), schedule_of(4), SHAPE)
    draw_length(single, 0, 0)
    assert lengths_of(single) == (4,) and lengths_of(sampler) == (1, 4)
    with pytest.raises(ValueError, match="steps must be 4, the sampler's only length, got 2"):
        single.use(2)
