"""Chains: rollouts with exact values of mixtures, the Gaussian recursion, weights against quadrature."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.energies import metrics, targets
from dxmi_ext.energies.chains import GradientChain, PolicyChain
from dxmi_ext.energies.networks import Policy, Start, TargetEnergy, Value, input_gradient
from dxmi_ext.energies.policy import PolicyTrainer, raise_stds_
from dxmi_ext.energies.replay import Replay
from dxmi_ext.energies.schedule import Levels, levels, policy_schedule
from dxmi_ext.energies.settings import LearningSettings, PolicySettings
from dxmi_ext.energies.targets import Target
from dxmi_ext.energies.vgs import GradientTrainer
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.path_weights import of_reverse_weights, of_weights
from dxmi_ext.method.sampler import GaussianSampler


class ExactValue(nn.Module):
    """-log density of an isotropic mixture of variance c, diffused backwards by the steps t..T - 1."""

    def __init__(self, means: Tensor, variance: float, of: Levels) -> None:
        super().__init__()
        self.means, self.variance, self.levels = means, variance, of

    def forward(self, y: Tensor, timestep: Tensor) -> Tensor:
        signal, noise = (table.float()[timestep] for table in (self.levels.signal, self.levels.noise))
        variance = signal**2 * self.variance + noise**2
        squared = (y[:, None] - signal[:, None, None] * self.means).square().sum(-1)
        scale = y.shape[1] / 2 * (2 * math.pi * variance).log() + math.log(len(self.means))
        return scale - torch.logsumexp(-squared / (2 * variance[:, None]), 1)


def exact(means: Tensor, variance: float, of: Levels) -> GradientChain:
    energy = TargetEnergy(targets.mixture("mixture", means, variance))
    spread = variance + float(means.var(0, correction=0).mean())
    start = Start(math.sqrt(float(of.signal[0] ** 2 * spread + of.noise[0] ** 2)))
    value = ExactValue(means, variance, of)
    return GradientChain(start, value, energy, of, means.shape[1], 1.0, damped=False)


def recursion(of: Levels) -> float:
    """The final variance of VGS's step with the exact value of N(0, 1) as the target."""
    variances = of.signal**2 + of.noise**2
    v = float(variances[0])
    for t in range(of.steps):
        alpha, c = float(of.growth[t]), float(of.std[t] ** 2)
        v = (alpha * (1 - c / float(variances[t + 1]))) ** 2 * v + c
    return v


class Quadratic(nn.Module):
    """k_t |y|^2 / 2, with a table of curvatures k [T]."""

    def __init__(self, curvatures: list[float]) -> None:
        super().__init__()
        self.curvatures = torch.tensor(curvatures)

    def forward(self, y: Tensor, timestep: Tensor) -> Tensor:
        return self.curvatures[timestep] * y.square().sum(1) / 2


def fixed_point(of: Levels) -> list[float]:
    """The curvatures k_0 .. k_T of VGS's values at the fixed point of their TD targets, for N(0, 1)."""
    k = [1.0]
    for alpha, var in zip(of.growth.flip(0).tolist(), of.std.square().flip(0).tolist(), strict=True):
        c = var * k[0]
        k.insert(0, alpha**2 * k[0] * (1 - c + c**2))
    return k


CASES = [
    (("vp", "quad", 20, 0.2 * 20, 0.1 * 20), 0.893),
    (("vp", "quad", 10, 0.1 * 10, 0.01 * 10), 0.975),
    (("ve", "quad", 30, 0.1 * 30, 1e-4 * 30), 0.983),
    (("ve", "quad", 30, 0.5 * 30, 5e-4 * 30), 0.946),
]


@pytest.mark.parametrize(("schedule", "known"), CASES)
def test_one_gaussian_has_the_variance_of_the_recursion(schedule: Any, known: float) -> None:
    of = levels(*schedule)
    assert recursion(of) == pytest.approx(known, abs=6e-4)
    ends = exact(torch.zeros(1, 4), 1.0, of).rollout(20_000, ops.noise_key(0))[-1]
    assert float(ends.var()) == pytest.approx(known, rel=0.02)


def test_damped_steps_keep_values_exact() -> None:
    """With damped steps, the exact curvatures 1 / (1 + noise^2) of N(0, 1) are a fixed point."""
    of = levels("ve", "exp", 5, 10.0, 1.0)
    k = (1 / (1 + of.noise.square())).tolist()
    energy = TargetEnergy(targets.mixture("normal", torch.zeros(1, 2), 1.0))
    start, value = Start(k[0] ** -0.5), Value(energy, of, 1.0, 8, 2, 0)
    chain = GradientChain(start, value, energy, of, 2, 1.0, damped=True)
    trainer = GradientTrainer(chain, LearningSettings(), iterations=1, seed=0)
    chain.value = Quadratic(k[:-1])
    for t in range(4):
        timestep, ends = torch.full((10_000,), t), []
        for place in (torch.ones(10_000, 2), torch.zeros(10_000, 2)):
            output = chain.output(place, timestep)
            ends.append(float(trainer._target(place, output, timestep, ops.noise_key(1), 0).mean()))
        assert ends[0] - ends[1] == pytest.approx(k[t], rel=0.02)


@pytest.mark.parametrize(
    ("schedule", "final", "initial"),
    [(CASES[0][0], 0.878, 0.939), (CASES[1][0], 0.9725, 0.997), (CASES[2][0], 0.982, 2.047)],
)
def test_targets_of_values_have_their_fixed_point(schedule: Any, final: float, initial: float) -> None:
    of = levels(*schedule)
    k = fixed_point(of)
    assert 1 / k[0] == pytest.approx(initial, rel=2e-3)
    energy = TargetEnergy(targets.mixture("normal", torch.zeros(1, 2), 1.0))
    start, value = Start(k[0] ** -0.5), Value(energy, of, 1.0, 8, 2, 0)
    chain = GradientChain(start, value, energy, of, 2, 1.0, damped=False)
    trainer = GradientTrainer(chain, LearningSettings(), iterations=1, seed=0)
    chain.value = Quadratic(k[:-1])
    assert float(chain.rollout(20_000, ops.noise_key(0))[-1].var()) == pytest.approx(final, rel=0.02)
    # The mean target at (1, 1) minus that at 0, where the constants cancel: k_t |x|^2 / 2 = k_t.
    n, t = 20_000, of.steps // 2
    timestep, ends = torch.full((n,), t), []
    for place in (torch.ones(n, 2), torch.zeros(n, 2)):
        output = chain.output(place, timestep)
        ends.append(trainer._target(place, output, timestep, ops.noise_key(1), 0).double())
    assert float((ends[0] - ends[1]).mean()) == pytest.approx(k[t], abs=0.02)


def test_targets_of_values_vary_less_than_the_next_values_at_the_same_mean() -> None:
    """The noise times the gradient is subtracted, so targets from an affine next value have no variance."""
    chain, _ = small("vgs", dim=2)
    assert isinstance(chain, GradientChain)
    trainer = GradientTrainer(chain, LearningSettings(), iterations=1, seed=0)

    class Affine(nn.Module):
        def forward(self, y: Tensor, timestep: Tensor) -> Tensor:
            return y @ torch.tensor([0.5, -1.0]) + 3

    chain.value = Affine()
    n, timestep = 500, torch.zeros(500, dtype=torch.int64)
    x = torch.tensor([0.3, 0.2]).expand(n, 2)
    found = trainer._target(x, chain.output(x, timestep), timestep, ops.noise_key(1), 0)
    # V(x + mu) + |mu|^2 / (2 var) at mu = -k g, and the cost of a smaller sigma
    k, var = -float(chain.tables().output_coef[0]), float(chain.kernel_var[0])
    ratio = float(chain.log_std[0].exp()) ** 2 / var
    assert k == pytest.approx(ratio * var) and ratio < 1
    wanted = 0.15 - 0.2 + 3 - k * 1.25 + k**2 * 1.25 / (2 * var) + ratio - 1 - math.log(ratio)
    assert torch.allclose(found, torch.full((n,), wanted), atol=1e-4)


def test_evaluations_do_not_depend_on_the_rows_of_a_rank() -> None:
    """One row takes 4 T + 3: T of its path, 2 T of targets, T of values, and 3 of the start and the ends."""
    for n in (1, 2, 64):
        chain, _ = small("vgs", dim=2, steps=10)
        assert isinstance(chain, GradientChain)
        trainer = GradientTrainer(chain, LearningSettings(), iterations=1, seed=0)
        trainer.step(torch.zeros(n, 2))
        assert int(trainer.evaluations) == n * (4 * 10 + 3)


@pytest.mark.parametrize("name", ["gmm25", "dw4"])
def test_drifts_are_bounded_by_the_score_of_a_narrow_mode(name: str) -> None:
    """A value that is far too steep has the gradient of a narrow mode 4 standard deviations from it."""
    target = targets.TARGETS[name]()
    of, energy = levels("ve", "exp", 5, 30, 0.4, 7.0), TargetEnergy(target)
    chain = GradientChain(Start(1.0), Quadratic([1e4] * 5), energy, of, target.free, 1.0, damped=True)
    y = 3 + ops.normal((20, target.free), ops.noise_key(0))
    for t in range(4):
        steepest = 4 / math.sqrt(0.4 + float(of.noise[t + 1] ** 2))
        gradient = chain.output(y, torch.full((20,), t))
        sizes = gradient.square().mean(1).sqrt()
        assert torch.allclose(sizes, torch.full_like(sizes, steepest), rtol=1e-4)


def test_exact_values_of_a_mixture_lead_to_its_samples_and_log_partition() -> None:
    """gmm25 with geometric variances 600/T -> .4/T and T = 50 has an ELBO gap of .23 and an ESS of .63."""
    target = targets.TARGETS["gmm25"]()
    assert target.modes is not None
    chain = exact(target.modes, 0.3, levels("ve", "exp", 50, 600, 0.4))
    path = chain.rollout(4000, ops.noise_key(0))
    found = of_weights(chain.log_weights(path))
    assert abs(found["log_partition"]) < 4 * found["log_partition_std"]
    assert found["elbo"] == pytest.approx(-0.23, abs=0.05)
    assert found["ess"] == pytest.approx(0.63, abs=0.08)
    assert metrics.of_modes(path[-1], target)["modes"] == 25
    data = target.draw(2000, ops.noise_key(1), 0)  # type: ignore[misc]
    back = chain.backward_rollout(data, ops.noise_key(2))
    reverse = of_reverse_weights(chain.log_weights(back))
    assert reverse["eubo"] > 0
    assert reverse["ess_reverse"] == pytest.approx(found["ess"], abs=0.15)


def small(sampler: str, dim: int = 1, steps: int = 2) -> tuple[PolicyChain | GradientChain, Target]:
    """A chain with random networks."""
    torch.manual_seed(0)
    target = targets.mixture("two", torch.tensor([[-1.0], [1.5]]).expand(2, dim), 0.3)
    of, energy = levels("ve", "exp", steps, 0.3, 0.2, 1.5), TargetEnergy(target)
    value, start = Value(energy, of, 1.0, 16, 2, 1), Start(float(of.spread[0]))
    nn.init.normal_(value.last.weight, std=0.1)
    if sampler == "vgs":
        return GradientChain(start, value, energy, of, dim, 1.0, damped=True), target
    network = Policy(energy, of, 1.0, 16, 2, 1)
    nn.init.normal_(network.motion.last.weight, std=0.3)
    made = GaussianSampler(network, policy_schedule(of), (dim,), start=start)
    return PolicyChain(Networks(made, value, energy), of.variance.float(), 1.0), target


def log_normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean.double(), log_std.double().exp()).log_prob(x.double()).sum(1)


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_log_weights_are_those_of_the_definition(sampler: str) -> None:
    chain, target = small(sampler, dim=3)
    path = chain.rollout(50, ops.noise_key(0))
    tables = chain.tables()
    wanted = -target.energy(path[-1]).double()
    wanted -= log_normal(path[0], torch.zeros(()), chain.start.log_std.detach())
    for t in range(chain.steps):
        x, following = path[t], path[t + 1]
        output = chain.output(x, torch.full((50,), t))
        mean = tables.sample_coef[t] * x + tables.output_coef[t] * output
        wanted += log_normal(x, tables.back_coef[t] * following, tables.back_log_std[t])
        wanted -= log_normal(following, mean, tables.log_std[t])
    assert torch.allclose(chain.log_weights(path), wanted.detach(), atol=2e-4)
    # An energy in float64 keeps its precision.
    far = TargetEnergy(Target("far", 3, lambda x: target.energy(x.double()) + 1e7))
    assert torch.allclose(chain.log_weights(path, far) + 1e7, wanted.detach(), atol=2e-4)


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_weights_integrate_to_the_partition_function_on_a_grid(sampler: str) -> None:
    """The mean of w under pi by quadrature over (x_0, x_1) in one dimension, T = 1: w pi = exp(-E) q."""
    chain, _ = small(sampler, steps=1)
    line = torch.linspace(-14, 14, 701)
    grid = torch.cartesian_prod(line, line)
    path = torch.stack((grid[:, :1], grid[:, 1:]))
    tables, timestep = chain.tables(), torch.zeros(len(grid), dtype=torch.int64)
    mean = tables.sample_coef[0] * path[0] + tables.output_coef[0] * chain.output(path[0], timestep)
    log_pi = log_normal(path[1], mean.detach(), tables.log_std[0])
    log_pi += log_normal(path[0], torch.zeros(()), chain.start.log_std.detach())
    cell = 2 * math.log(float(line[1] - line[0]))
    assert float(log_pi.logsumexp(0)) + cell == pytest.approx(0, abs=1e-3)
    assert float((chain.log_weights(path) + log_pi).logsumexp(0)) + cell == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_the_mean_weight_is_unbiased_over_seeds(sampler: str) -> None:
    chain, _ = small(sampler, dim=2, steps=3)
    weights = [chain.log_weights(chain.rollout(500, ops.noise_key(seed))).exp() for seed in range(40)]
    means = torch.stack([each.mean() for each in weights])
    assert abs(float(means.mean()) - 1) < 4 * float(means.std()) / math.sqrt(40)


def test_rows_depend_on_key_and_global_row_alone() -> None:
    chain, _ = small("dxmi", dim=2)
    key = ops.noise_key(5)
    whole = chain.rollout(9, key)
    parts = [chain.rollout(n, key, sample_offset=first) for first, n in ((0, 4), (4, 5))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


@pytest.mark.parametrize("name", ["dw4", "lj13"])
def test_networks_of_particles_have_their_symmetries(name: str) -> None:
    """Values are invariant, policies equivariant, under rotation and permutation."""
    torch.manual_seed(0)
    target = targets.TARGETS[name]()
    n = target.particles or 1
    d = target.dim // n
    of, energy = levels("ve", "exp", 3, 3.0, 0.1, 1.5), TargetEnergy(target, 100.0)
    value, policy = Value(energy, of, 1.0, 16, 2, 2), Policy(energy, of, 1.0, 16, 2, 2)
    for layer in (value.last, policy.motion.last):
        nn.init.normal_(layer.weight)
    nn.init.ones_(policy.share)
    y = 4 * ops.normal((5, target.free), ops.noise_key(1))
    t, x = torch.tensor([0, 1, 2, 0, 1]), target.lift(y).view(5, n, d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(2))).Q
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))

    def moved(x: Tensor) -> Tensor:
        return target.coordinates((x.view(5, n, d)[:, order] @ turn).flatten(1))

    turned = moved(x)
    assert torch.allclose(value(turned, t), value(y, t), rtol=1e-3, atol=1e-3)
    wanted = moved(target.lift(policy(y, t).detach()))
    assert torch.allclose(policy(turned, t).detach(), wanted, rtol=1e-2, atol=1e-2)


def test_a_level_far_from_0_is_found_at_once() -> None:
    """A constant of 500 in the energy shifts every value by 500 and changes nothing else."""
    target = targets.mixture("two", torch.tensor([[-1.0, 0.0], [1.5, 0.0]]), 0.3)
    losses, values = dict[float, float](), dict[float, Tensor]()
    for constant in (0.0, 500.0):
        torch.manual_seed(0)
        moved = dataclasses.replace(target, energy=lambda x, c=constant: target.energy(x) + c)
        of, energy = levels("ve", "exp", 3, 3, 0.2, 1.5), TargetEnergy(moved)
        value, start = Value(energy, of, 1.0, 16, 2, 1), Start(float(of.spread[0]))
        made = GaussianSampler(Policy(energy, of, 1.0, 16, 2, 1), policy_schedule(of), (2,), start=start)
        settings = LearningSettings(), PolicySettings(sampler_steps=2)
        options: Any = {"temperature": 1.0, "iterations": 3, "seed": 0}
        trainer = PolicyTrainer(Networks(made, value, energy), of, *settings, **options)
        for _ in range(2):
            losses[constant] = float(trainer.step(torch.zeros(64, 2))["value_loss"])
        with torch.no_grad():
            values[constant] = value(torch.ones(3, 2), torch.arange(3))
    assert (values[500.0] - values[0.0] - 500).abs().max() < 3
    assert losses[500.0] < 10 * losses[0.0]


def test_values_of_runs_from_before_levels_load() -> None:
    chain, _ = small("dxmi")
    assert isinstance(chain, PolicyChain)
    state = {key: value for key, value in chain.state_dict().items() if not key.endswith(("level", "center"))}
    assert len(state) == len(chain.state_dict()) - 2
    chain.load_state_dict(state)
    (name,) = (key for key in chain.state_dict() if key.endswith("center"))
    chain.load_state_dict(state | {name.replace("center", "centre"): torch.tensor(3.0)})
    assert chain.state_dict()[name] == 3


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_units_and_starts_of_dimensions_keep_the_partition_function(sampler: str) -> None:
    """With a unit and a start for each dimension, the mean of w is still Z."""
    chain, target = small(sampler, dim=2, steps=3)
    chain.energy.widths.copy_(torch.tensor([1.0, 1.5]))
    chain.start = Start(torch.tensor([1.6, 1.2]), torch.tensor([0.2, -0.1]))
    log_w = [chain.log_weights(chain.rollout(2000, ops.noise_key(seed))) for seed in range(5)]
    found = of_weights(torch.cat(log_w))
    assert found["log_partition"] == pytest.approx(0, abs=4 * found["log_partition_std"])
    assert found["log_partition_std"] < 0.1
    x = target.draw(10, ops.noise_key(0), 0)  # type: ignore[misc]
    assert torch.allclose(chain.energy.lift(chain.energy.coordinates(x)), x)


def test_sigmas_are_raised_to_their_floor() -> None:
    log_std, var = torch.tensor([0.1, 0.5, 2.0]).log(), torch.tensor([1.0, 0.25, 1.0])
    raise_stds_(log_std, var, 0.9)
    assert torch.allclose(log_std.exp(), torch.tensor([0.9, 0.5, 2.0]))
    raise_stds_(log_std, 100 * var, 0.0)
    assert torch.allclose(log_std.exp(), torch.tensor([0.9, 0.5, 2.0]))


def test_sigmas_are_fitted_to_paths_backwards_from_samples() -> None:
    """A policy whose means are exact for a normal target gets the sigmas of the exact reverse steps."""
    target = targets.mixture("normal", torch.zeros(1, 2), 2.25)
    of, energy = levels("ve", "exp", 3, 3, 0.2, 1.5), TargetEnergy(target)
    network = Policy(energy, of, 1.0, 16, 2, 1)
    nn.init.zeros_(network.share)
    made = GaussianSampler(network, policy_schedule(of), (2,), start=Start(float(of.spread[0])))
    exact = made.log_std.detach().clone()
    with torch.no_grad():
        made.log_std.add_(torch.tensor([0.05, -0.05, 0.05]))
    chain = PolicyChain(Networks(made, Value(energy, of, 1.0, 8, 2, 1), energy), of.variance.float(), 1.0)
    log_w = [chain.log_weights(chain.rollout(4000, ops.noise_key(0)))]
    chain.fit_stds_(4000, {"paths": ops.noise_key(1), "back": ops.noise_key(2)})
    assert torch.allclose(made.log_std, exact, atol=0.03)
    log_w.append(chain.log_weights(chain.rollout(4000, ops.noise_key(0))))
    assert of_weights(log_w[1])["ess"] > of_weights(log_w[0])["ess"]


def test_energies_that_are_not_finite_have_no_weight_and_a_finite_limit() -> None:
    walls = Target("walls", 1, lambda x: x[:, 0].square().where(x[:, 0] < 0, torch.inf))
    gaps = Target("gaps", 1, lambda x: x[:, 0].square().where(x[:, 0] < 0, torch.nan))
    chain, _ = small("dxmi")
    path = chain.rollout(50, ops.noise_key(0))
    for target in (walls, gaps):
        log_w = chain.log_weights(path, TargetEnergy(target))
        assert torch.equal(log_w.isneginf(), path[-1][:, 0] >= 0) and log_w.isfinite().any()
    limited, x = TargetEnergy(walls, 50.0), torch.tensor([[-1.0], [1.0]])
    assert limited(x).isfinite().all() and limited(x)[0] == 1
    assert input_gradient(limited, x).tolist() == [[-2.0], [0.0]]


def test_samples_without_the_last_noise_are_means_of_the_last_step() -> None:
    chain, _ = small("dxmi", dim=2)
    key = ops.noise_key(3)
    path = chain.rollout(5, key)
    assert torch.equal(chain.sample(5, key), path[-1])
    tables, timestep = chain.tables(), torch.full((5,), chain.steps - 1)
    mean = tables.sample_coef[-1] * path[-2] + tables.output_coef[-1] * chain.output(path[-2], timestep)
    assert torch.allclose(chain.sample(5, key, last_noise=0.0), mean, atol=1e-5)


def test_levels_add_up() -> None:
    of = levels("vp", "quad", 20, 4.0, 2.0)
    assert float(of.variance[0]) == pytest.approx(0.2) and float(of.variance[-1]) == pytest.approx(0.1)
    assert torch.allclose(of.signal**2 + of.noise**2, torch.ones(21, dtype=torch.float64))
    of = levels("ve", "exp", 20, 600, 0.4, 7.0)
    assert float(of.noise[0] ** 2) == pytest.approx(float(of.variance.sum()))
    # A policy whose network is 0 ends at N(0, scale^2).
    tables = policy_schedule(of)
    v = float(of.spread[0] ** 2)
    for t in range(20):
        v = float(tables.sample_coef[t]) ** 2 * v + math.exp(2 * float(tables.log_std[t]))
    assert v == pytest.approx(49.0)
    with pytest.raises(ValueError, match=r"variances > 0, and < 1 with vp"):
        levels("vp", "linear", 2, 2.0, 1.0)


def test_replay_keeps_the_latest_ends() -> None:
    replay = Replay(5, 1)
    replay.keep(torch.tensor([[0.0], [1.0], [2.0]]))
    assert {*replay.draw(200, ops.noise_key(0)).flatten().tolist()} == {0.0, 1.0, 2.0}
    replay.keep(torch.tensor([[3.0], [4.0], [5.0], [6.0]]))
    drawn = replay.draw(200, ops.noise_key(0))
    assert {*drawn.flatten().tolist()} == {2.0, 3.0, 4.0, 5.0, 6.0}
    torch.testing.assert_close(replay.draw(9, ops.noise_key(0), sample_offset=7), drawn[7:16])
    replay.keep(torch.arange(10.0, 17.0)[:, None])  # more than fit
    assert {*replay.draw(200, ops.noise_key(0)).flatten().tolist()} == {12.0, 13.0, 14.0, 15.0, 16.0}
