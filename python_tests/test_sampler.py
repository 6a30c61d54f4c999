"""Schedules against the textbook, and the sampler against its schedule, its ops and exact moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import ops, schedules
from dxmi_ext.models.mlp import SamplerMLP
from dxmi_ext.sampler import GaussianSampler
from dxmi_ext.schedules import Schedule

SHAPE = (3, 5)  # of a data point
KEY = ops.noise_key(17)
BETAS = torch.linspace(0.1, 0.7, 5)
TABLES = ("sample_coef", "output_coef", "log_std", "signal", "noise")
EXAMPLES: dict[str, Callable[[], Schedule]] = {
    "ddpm": lambda: schedules.ddpm(BETAS),
    "variance_exploding": lambda: schedules.variance_exploding(5, sigma_max=3.0, sigma_min=0.4),
}
example = pytest.mark.parametrize("name", EXAMPLES)


class Elementwise(nn.Module):
    """A network without matrix products: a row's result has the same bits in every batch."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x.abs() * (timestep.view(-1, *[1] * (x.ndim - 1)) - 1.5)


def make_sampler(schedule: Schedule, network: nn.Module | None = None) -> GaussianSampler:
    return GaussianSampler(network or Elementwise(), schedule, SHAPE)


def make_mlp_sampler() -> GaussianSampler:
    generator = torch.Generator().manual_seed(0)
    network = SamplerMLP(2, 5, width=16, depth=2)
    for p in network.parameters():
        nn.init.normal_(p, std=0.4, generator=generator)  # no layer starts at zero
    return GaussianSampler(network, EXAMPLES["ddpm"](), (2,))


# --- schedules ---------------------------------------------------------------------------------------


def assert_tables(schedule: Schedule, rows: Sequence[tuple[float, ...]]) -> None:
    for name, column in zip(TABLES, zip(*rows, strict=True), strict=True):
        actual = getattr(schedule, name)
        torch.testing.assert_close(actual, torch.tensor(column, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ddpm_is_the_textbooks() -> None:
    """Ho et al. 2020, eq. 4, 7 and 11: the posterior with the network's eps in place of the noise."""
    betas, rows = [0.1, 0.25, 0.4, 0.55, 0.7], []
    for step in reversed(range(5)):
        beta, alpha = betas[step], 1 - betas[step]
        alpha_bar = math.prod(1 - b for b in betas[: step + 1])
        previous = math.prod(1 - b for b in betas[:step])
        variance = beta * (1 - previous) / (1 - alpha_bar)
        std = max(math.sqrt(variance), 0.05)
        output_coef = -beta / math.sqrt(1 - alpha_bar) / math.sqrt(alpha)
        levels = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        rows.append((1 / math.sqrt(alpha), output_coef, math.log(std), *levels))
    schedule = schedules.ddpm(torch.tensor(betas, dtype=torch.float64))
    assert_tables(schedule, rows)
    assert schedule.initial_std == 1


def test_variance_exploding_is_the_textbooks() -> None:
    """Song et al. 2021, appendix F: ancestral sampling from level s to r, with score = -eps / s."""
    rows = []
    for step in range(5):
        s = 3 * (0.4 / 3) ** (step / 4)
        r = 3 * (0.4 / 3) ** ((step + 1) / 4) if step < 4 else 0.0
        std = max(math.sqrt(r**2 * (s**2 - r**2) / s**2), 0.05)
        rows.append((1.0, -(s**2 - r**2) / s, math.log(std), 1.0, s))
    schedule = EXAMPLES["variance_exploding"]()
    assert_tables(schedule, rows)
    assert schedule.initial_std == 3


@example
def test_last_step_removes_the_noise_that_is_left(name: str) -> None:
    """Given its true noise, the last step lands on the data; its sigma is the bound on sigma."""
    schedule = EXAMPLES[name]()
    data, eps = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = schedule.signal[-1] * data + schedule.noise[-1] * eps
    torch.testing.assert_close(schedule.sample_coef[-1] * noisy + schedule.output_coef[-1] * eps, data)
    assert schedule.log_std[-1].item() == pytest.approx(math.log(0.05))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1, 3.0, 0.4), "steps: got 1, wants 2 or more"),
        ((5, 0.4, 0.4), "got 0.4, 0.4, wants 0 < sigma_min < sigma_max"),
        ((5, 3.0, 0.0), "got 0.0, 3.0, wants 0 < sigma_min < sigma_max"),
        ((5, 3.0, math.nan), "wants 0 < sigma_min < sigma_max"),
    ],
)
def test_bad_variance_exploding(arguments: tuple[int, float, float], says: str) -> None:
    steps, sigma_max, sigma_min = arguments
    with pytest.raises(ValueError) as error:
        schedules.variance_exploding(steps, sigma_max=sigma_max, sigma_min=sigma_min)
    assert says in str(error.value)


# --- exact moments -----------------------------------------------------------------------------------


class GaussianEps(nn.Module):
    """E[eps | x_t] for data N(mean, var): the network that pretraining would reach."""

    def __init__(self, schedule: Schedule, mean: float, var: float) -> None:
        super().__init__()
        total = schedule.signal**2 * var + schedule.noise**2
        self.slope = schedule.noise / total
        self.offset = -self.slope * schedule.signal * mean

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        slope, offset = (c[timestep].to(x).view(-1, *[1] * (x.ndim - 1)) for c in (self.slope, self.offset))
        return slope * x + offset


def exact_moments(schedule: Schedule, network: GaussianEps) -> tuple[float, float]:
    """Mean and variance of x_T: every step is affine in x_t, so they follow step by step."""
    mean, var = 0.0, schedule.initial_std**2
    for t in range(len(schedule.log_std)):
        a = (schedule.sample_coef[t] + schedule.output_coef[t] * network.slope[t]).item()
        mean = a * mean + (schedule.output_coef[t] * network.offset[t]).item()
        var = a**2 * var + math.exp(2 * schedule.log_std[t])
    return mean, var


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.ddpm(torch.linspace(1e-4, 0.02, 1000), min_std=1e-6),
        schedules.variance_exploding(1000, sigma_max=100.0, sigma_min=0.01, min_std=1e-6),
    ],
    ids=EXAMPLES,
)
def test_many_steps_reach_the_data(schedule: Schedule) -> None:
    mean, var = exact_moments(schedule, GaussianEps(schedule, mean=1.5, var=0.5))
    assert mean == pytest.approx(1.5, abs=0.02) and var == pytest.approx(0.5, abs=0.01)


@example
def test_samples_have_the_exact_moments(name: str) -> None:
    schedule = EXAMPLES[name]()
    network = GaussianEps(schedule, mean=1.5, var=0.5)
    samples = make_sampler(schedule, network).sample(20_000, KEY).double()
    mean, var = exact_moments(schedule, network)
    n = samples.numel()
    assert abs(samples.mean().item() - mean) < 4 * math.sqrt(var / n)
    assert abs(samples.var().item() - var) < 4 * var * math.sqrt(2 / n)


# --- rollout and samples -----------------------------------------------------------------------------


@example
def test_rollout_is_its_ops_step_by_step(name: str) -> None:
    schedule, n, offset = EXAMPLES[name](), 6, 3
    sampler = make_sampler(schedule)
    path = sampler.rollout(n, KEY, sample_offset=offset)
    x = schedule.initial_std * ops.normal((n, *SHAPE), KEY, sample_offset=offset)
    assert torch.equal(path.samples[0], x)
    a, b, log_std = schedule.sample_coef.float(), schedule.output_coef.float(), schedule.log_std.float()
    for t in range(5):
        timestep = torch.full((n,), t)
        output = Elementwise()(x, timestep)
        step = ops.sampler_step(x, output, timestep, a, b, log_std, KEY, sample_offset=offset)
        recorded = path.samples[t + 1], path.log_prob[t], path.sq_displacement[t]
        torch.testing.assert_close(recorded, tuple(step), rtol=0, atol=0)
        x = step.next_sample
    assert not path.samples.requires_grad and not path.log_prob.requires_grad


def test_split_of_the_batch_does_not_change_a_row() -> None:
    sampler = make_sampler(EXAMPLES["ddpm"]())
    whole = sampler.rollout(9, KEY)
    parts = sampler.rollout(4, KEY), sampler.rollout(5, KEY, sample_offset=4)
    for rows, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat((first, second), dim=1), rows)


def test_samples_are_the_ends_of_the_rollouts_paths() -> None:
    sampler = make_sampler(EXAMPLES["ddpm"]())
    path = sampler.rollout(9, KEY, sample_offset=2)
    assert torch.equal(sampler.sample(9, KEY, sample_offset=2), path.samples[-1])
    assert not torch.equal(sampler.sample(9, KEY), sampler.sample(9, ops.next_key(KEY)))


@pytest.mark.parametrize("batch_size", [1, 4, 9, 100])
def test_batch_size_changes_no_sample(batch_size: int) -> None:
    """To the bit where the network has no matrix products, else to their rounding."""
    mlp = make_mlp_sampler()
    torch.testing.assert_close(mlp.sample(9, KEY, batch_size=batch_size), mlp.sample(9, KEY))
    exact = make_sampler(EXAMPLES["ddpm"]())
    assert torch.equal(exact.sample(9, KEY, batch_size=batch_size), exact.sample(9, KEY))


def test_no_samples() -> None:
    sampler = make_sampler(EXAMPLES["ddpm"]())
    assert sampler.sample(0, KEY).shape == (0, *SHAPE)
    assert sampler.rollout(0, KEY).samples.shape == (6, 0, *SHAPE)


def test_gradients_reach_network_and_sigma_but_not_the_schedule() -> None:
    sampler = make_mlp_sampler()
    sampler(torch.ones(5, 2), torch.arange(5), KEY).next_sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sampler.parameters())
    assert "log_std" in dict(sampler.named_parameters())
    assert sampler.state_dict().keys() >= {"log_std", "sample_coef", "output_coef"}
