"""The sampler: its schedule, its ops and exact moments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.method import schedules
from dxmi_ext.method.sampler import Clipped, GaussianSampler, Timed
from dxmi_ext.method.schedules import Schedule
from dxmi_ext.two_d.networks import SamplerMLP

SHAPE = (3, 5)  # shape of a data point
KEY = ops.noise_key(17)
BETAS = torch.linspace(0.1, 0.7, 5)
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
    """Mean and variance of x_T, computed step by step, since every step is affine in x_t."""
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
    """Exactly if the network has no matrix products, otherwise up to their rounding."""
    mlp = make_mlp_sampler()
    torch.testing.assert_close(mlp.sample(9, KEY, batch_size=batch_size), mlp.sample(9, KEY))
    exact = make_sampler(EXAMPLES["ddpm"]())
    assert torch.equal(exact.sample(9, KEY, batch_size=batch_size), exact.sample(9, KEY))


def test_no_samples() -> None:
    sampler = make_sampler(EXAMPLES["ddpm"]())
    assert sampler.sample(numpy.int64(0), KEY).shape == (0, *SHAPE)
    assert sampler.rollout(0, KEY).samples.shape == (6, 0, *SHAPE)


def test_a_frozen_sigma_stays_so() -> None:
    sampler = make_sampler(EXAMPLES["ddpm"]())
    sampler.log_std.requires_grad_(False)
    sampler.fix_last_std()
    assert not sampler.log_std.requires_grad


def test_sigma_starts_within_its_bound() -> None:
    schedule = EXAMPLES["variance_exploding"]()
    sampler = GaussianSampler(Elementwise(), schedule, SHAPE, max_std=1.0)
    torch.testing.assert_close(sampler.log_std, schedule.log_std.clamp(max=0).float())
    with pytest.raises(ValueError, match="max_std must be > 0, got 0"):
        GaussianSampler(Elementwise(), schedule, SHAPE, max_std=0)


def test_the_last_step_may_add_no_noise() -> None:
    sampler = make_mlp_sampler()
    sampler.set_last_std(0)
    path = sampler.rollout(3, KEY)
    last = sampler(path.samples[-2], sampler.timestep(4, 3), ops.noise_key(18)).next_sample
    assert torch.equal(last, path.samples[-1])  # whatever the key
    with pytest.raises(ValueError, match="std must be >= 0, got -1"):
        sampler.set_last_std(-1)


def test_tables_have_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert make_mlp_sampler().sample(3, KEY).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_last_sigma_is_frozen_until_it_is_trained_again() -> None:
    sampler = make_sampler(EXAMPLES["ddpm"]())

    def last_gradient() -> float:
        (gradient,) = torch.autograd.grad(sampler.log_std.sum(), sampler.log_std)
        return float(gradient[-1])

    sampler.fix_last_std()
    assert last_gradient() == 0
    sampler.train_last_std()
    assert last_gradient() == 1
    sampler.fix_last_std()
    sampler = copy.deepcopy(sampler)
    assert last_gradient() == 0
    sampler.train_last_std()
    assert last_gradient() == 1


def test_a_step_compiles_as_one_graph() -> None:
    sampler, x, timestep = make_mlp_sampler(), torch.ones(5, 2), torch.arange(5)

    def step(x: Tensor) -> Tensor:
        return sampler(x, timestep, KEY).next_sample

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))


def test_gradients_reach_network_and_sigma_but_not_the_schedule() -> None:
    sampler = make_mlp_sampler()
    sampler(torch.ones(5, 2), torch.arange(5), KEY).next_sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sampler.parameters())
    assert "log_std" in dict(sampler.named_parameters())
    assert sampler.state_dict().keys() >= {"log_std", "sample_coef", "output_coef"}


# --- networks of the time ----------------------------------------------------------------------------


class Recorder(nn.Module):
    """Records its inputs; returns x like networks of diffusers do."""

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None, **more: Tensor) -> Tensor:
        self.given = x, time, labels, more
        return SimpleNamespace(sample=x)  # type: ignore[return-value]


def test_timed_gives_the_schedules_time_and_scale() -> None:
    schedule = schedules.edm(4, time_scale=1000.0)
    network = Timed(Recorder(), schedule)
    timestep, labels = torch.tensor([3, 0, 1]), torch.tensor([7, 8, 9])
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    output = make_sampler(schedule, network)(x, timestep, KEY, labels).next_sample
    assert output.isfinite().all()
    given, time, passed, more = network.network.given
    levels = [80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in (3, 0, 1)]
    sigmas = torch.tensor([level**7 for level in levels])
    torch.testing.assert_close(given, x / (sigmas**2 + 0.25).sqrt()[:, None, None])
    torch.testing.assert_close(time, 250 * sigmas.log())
    assert passed is labels and not more
    assert network(x.bfloat16(), timestep).dtype == torch.bfloat16


@pytest.mark.parametrize("prediction", ["eps", "v", "x", "edm"])
def test_clipped_tells_the_nearest_data(prediction: str) -> None:
    """If the predicted data are within [-1, 1], the output is unchanged; otherwise it predicts the bound."""
    schedule = schedules.edm(4) if prediction == "edm" else schedules.ddim(4, prediction=prediction)
    timestep = torch.tensor([1, 3, 2])
    signal, noise = (table[timestep, None] for table in (schedule.signal, schedule.noise))
    data = torch.tensor([[-0.9, 0.3, 5.0], [0.7, -1.5, 1.0], [0.0, 2.0, -7.0]], dtype=torch.float64)
    x = signal * data.flip(0) + noise * torch.linspace(-2, 2, 9, dtype=torch.float64).view(3, 3)

    def output(data: Tensor) -> Tensor:
        return schedules.target(prediction, data, (x - signal * data) / noise, signal, noise)

    class Network(nn.Module):
        def forward(self, scaled: Tensor, time: Tensor) -> Tensor:
            torch.testing.assert_close(scaled, schedule.input_scale[timestep, None] * x)
            return output(data)

    clipped = Clipped(Network(), schedule, prediction).double()
    torch.testing.assert_close(clipped(x, timestep), output(data.clamp(-1, 1)), rtol=1e-4, atol=1e-4)
