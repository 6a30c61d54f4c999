"""Training: both algorithms against plain torch, gradients, guidance, resuming, pretraining."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.learning import health
from dxmi_ext.engine.learning.learner import Average
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method import noise, schedules
from dxmi_ext.method.denoising import Levels, Pretrainer, lognormal_levels, uniform_levels
from dxmi_ext.method.lengths import MultiLengthSampler
from dxmi_ext.method.networks import Networks, TimeIndependent
from dxmi_ext.method.sampler import ExpectedStep, GaussianSampler
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.stepper import Batch
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d import densities as two_d
from dxmi_ext.two_d.networks import EnergyMLP, SamplerMLP, ValueMLP

B, D, T = 7, 3, 4  # batch, data dimensions, steps
CLASSES = 3
ITERATIONS = 3
SEED = 5
SCHEDULE = schedules.variance_exploding(T, sigma_max=2.0, sigma_min=0.4)


class Labeled(nn.Module):
    """A network that shifts its input by class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.shift = network, nn.Embedding(CLASSES, D)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.network(x + self.shift(rest[-1]), *rest[:-1])


def make_networks(seed: int = 0, kind: str = "per_step", labeled: bool = False) -> Networks:
    generator = torch.Generator().manual_seed(seed)
    network: nn.Module = SamplerMLP(D, T, width=8, depth=2)
    value: nn.Module = ValueMLP(D, T, width=8, depth=2)
    energy: nn.Module | None = EnergyMLP(D, width=8, depth=2)
    if kind == "time_independent":
        value, energy = TimeIndependent(energy), None
    elif kind == "per_step":
        energy = None
    if labeled:
        network, value, energy = Labeled(network), Labeled(value), Labeled(energy) if energy else None
    for module in filter(None, (network, value, energy)):
        for p in module.parameters():
            nn.init.normal_(p, std=0.4, generator=generator)  # heads would start at zero
    return Networks(GaussianSampler(network, SCHEDULE, (D,)), value, energy).double()


def make_settings(**changes: Any) -> DxMISettings:
    """All numbers differ from each other and from their defaults; both gradient norms are clipped."""
    settings = DxMISettings(
        tau=0.3,
        gamma=0.7,
        cost_reduction="sum",
        velocity_decay=0.9,
        sampler_steps=T,
        sampler_lr=1e-2,
        log_std_lr=3e-2,
        value_lr=2e-2,
        energy_lr=4e-2,
        adam_beta1=0.7,
        adam_beta2=0.97,
        sampler_clip=0.2,
        value_clip=0.4,
        energy_clip=0.6,
        ema_decay=0.8,
    )
    return dataclasses.replace(settings, **changes)


def make_trainer(settings: DxMISettings, seed: int = 0, **kinds: Any) -> DxMITrainer:
    return DxMITrainer(make_networks(seed, **kinds), settings, iterations=ITERATIONS, seed=SEED)


def batch(iteration: int) -> Tensor:
    return 1 + ops.normal((B, D), ops.noise_key(100 + iteration), dtype=torch.float64)


def state(networks: Networks, averaged: Networks, velocity_var: Tensor) -> dict[str, Tensor]:
    """Everything that an iteration changes, by name."""
    now = {name: p.detach().clone() for name, p in networks.named_parameters()}
    mean = {f"average of {name}": p.detach().clone() for name, p in averaged.named_parameters()}
    return now | mean | {"velocity_var": velocity_var.clone()}


# --- the algorithms in plain torch -------------------------------------------------------------------


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float, fixed: Tensor | None = None) -> None:
    """One step on a loss. `fixed`: a vector whose last element must not change."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
    for i, p in enumerate(parameters):
        if p is fixed:
            gradients[i][-1] = 0
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    scale = clip / (norm + 1e-6) if 0 < clip < norm else 1.0  # 1e-6: torch's guard against a norm of 0
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = scale * gradient
    optimizer.step()


def plain_dxmi(networks: Networks, settings: DxMISettings, labels: Tensor | None = None) -> dict[str, Tensor]:
    """DxMI, Alg. 1 and 2, as stated in the paper, with the noise and random choices of the trainer."""
    sampler, value, own_energy = networks.sampler, networks.value, networks.energy_network
    net, log_std, a, b = sampler.network, sampler.log_std, sampler.sample_coef, sampler.output_coef
    classes = () if labels is None else (labels,)
    groups: list[dict[str, Any]] = [{"params": net.parameters()}, {"params": [log_std]}]
    how: dict[str, Any] = {"betas": settings.adam_betas, "foreach": False, "fused": False}
    sampler_adam = torch.optim.Adam(groups, **how)
    value_adam = energy_adam = torch.optim.Adam(value.parameters(), **how)
    energy_lr, energy_clip = settings.value_lr, settings.value_clip
    if own_energy:
        energy_adam = torch.optim.Adam(own_energy.parameters(), **how)
        energy_lr, energy_clip = settings.energy_lr, settings.energy_clip
    variance = log_std.detach().exp() ** 2  # s_t^2
    average = copy.deepcopy(networks)
    uses = ["rollout", "choice", *(f"redraw{i}" for i in range(settings.sampler_steps))]
    uses += ["td_choice"] if settings.td_order == "shuffled" else []
    uses += ["td_redraw"] if settings.td_redraw else []
    uses += ["data_noise"] if settings.data_noise else []
    draws = noise.Draws(SEED, "dxmi", uses)
    every = [torch.full((B,), t) for t in range(T + 1)]
    time_cost = {
        "none": torch.zeros(T),
        "linear": torch.full((T,), 0.05),
        "sigmoid": torch.tensor([logistic(T / 2 - t) - logistic(T / 2 - t - 1) for t in range(T)]),
    }[settings.time_cost].double()

    def mean_std(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        column = (B, 1)
        mean = a[t].view(column) * x + b[t].view(column) * net(x, t, *classes)
        return mean, log_std[t].view(column).exp()

    def transition(x: Tensor, t: Tensor, key: Tensor) -> Tensor:
        drawn = torch.stack([ops.normal((B, D), key, timestep=step) for step in range(T)]).double()
        mean, std = mean_std(x, t)
        return mean + std * drawn[t, torch.arange(B)]

    def energy(x: Tensor) -> Tensor:
        return own_energy(x, *classes) if own_energy else value(x, every[T], *classes)

    def value_at(x: Tensor, t: Tensor) -> Tensor:
        if not own_energy:
            return value(x, t, *classes)
        steps = [value(x, every[s], *classes) for s in range(T)] + [energy(x)]
        return torch.stack(steps)[t, torch.arange(B)]

    def cost(x: Tensor, following: Tensor, t: Tensor, loss: str) -> Tensor:
        """tau_1 log pi + tau_2 |following - x|^2 / 2 s_t^2, log pi being -log sigma in each dimension."""
        if settings.costs_in not in ("both", loss):
            return torch.zeros(B).double()
        tau_1 = settings.tau if settings.tau_entropy is None else settings.tau_entropy
        tau_2 = settings.tau if settings.tau_velocity is None else settings.tau_velocity
        terms = tau_2 * (following - x) ** 2 / (2 * variance[t, None]) - tau_1 * log_std[t, None]
        terms = factor * terms * (t < T - settings.skip_last)[:, None]
        return terms.sum(1) if settings.cost_reduction == "sum" else terms.mean(1)

    def mean_log_distance(x: Tensor) -> Tensor:
        """Mean log distance to the third nearest neighbor."""
        return (x[:, None] - x).square().sum(2).sqrt().sort(dim=1).values[:, 3].log().mean()

    factor = torch.ones(()).double()
    for iteration in range(ITERATIONS):
        data, keys, remaining = batch(iteration), draws.at(iteration), 1 - iteration / ITERATIONS
        waited = iteration >= settings.sampler_wait
        sampler_adam.param_groups[0]["lr"] = settings.sampler_lr * remaining * waited
        sampler_adam.param_groups[1]["lr"] = settings.log_std_lr * remaining * waited
        value_adam.param_groups[0]["lr"] = settings.value_lr * remaining
        energy_adam.param_groups[0]["lr"] = energy_lr * remaining

        path = [SCHEDULE.initial_std * ops.normal((B, D), keys["rollout"]).double()]
        with torch.no_grad():
            for t in range(T):
                path.append(transition(path[t], every[t], keys["rollout"]))
            displacement = torch.stack([((path[t + 1] - path[t]) ** 2).mean() for t in range(T)])
        if settings.data_noise:
            data = data + settings.data_noise * ops.normal((B, D), keys["data_noise"]).double()

        of_data, of_samples = energy(data), energy(path[T])
        squares = (of_data**2).mean() + (of_samples**2).mean()
        loss = of_data.mean() - of_samples.mean()
        if settings.energy_loss == "noise_contrastive":  # arXiv 2405.16730, -E for log r
            times = settings.noise_magnitude
            is_data = [(-energies).exp() / ((-energies).exp() + times) for energies in (of_data, of_samples)]
            loss = -is_data[0].log().mean() - times * (1 - is_data[1]).log().mean()
        descend(loss + settings.gamma * squares, energy_adam, energy_clip)

        def at(t: Tensor, path: list[Tensor] = path) -> Tensor:
            return torch.stack(path)[t, torch.arange(B)]

        places = list(reversed(every[:T]))
        if settings.td_order == "shuffled":
            places = [(noise.randint(T, B, keys["td_choice"]) + i) % T for i in range(T)]
        for place in places:
            x, following = at(place), at(place + 1)
            with torch.no_grad():
                if settings.td_redraw:
                    following = transition(x, place, keys["td_redraw"])
                target = (
                    value_at(following, place + 1) + cost(x, following, place, "value") + time_cost[place]
                )
            loss = ((target - value(x, place, *classes)) ** 2).mean()
            descend(settings.td_weight * loss, value_adam, settings.value_clip)

        with torch.no_grad():
            to_go = energy(path[T])
            advantage = []
            for t in reversed(range(T)):
                to_go = to_go + cost(path[t], path[t + 1], every[t], "sampler")
                advantage.insert(0, to_go - value_at(path[t], every[t]))
        first = noise.randint(T, B, keys["choice"])
        for i in range(settings.sampler_steps):
            place = (first + i) % T
            x = at(place)
            if settings.sampler_update == "dxdp":
                following = transition(x, place, keys[f"redraw{i}"])
                loss = (value_at(following, place + 1) + cost(x, following, place, "sampler")).mean()
            elif settings.sampler_update == "backprop":
                costs = torch.zeros(B).double()
                x = SCHEDULE.initial_std * ops.normal((B, D), keys[f"redraw{i}"]).double()
                for t in range(T):
                    following = transition(x, every[t], keys[f"redraw{i}"])
                    costs = costs + cost(x, following, every[t], "sampler")
                    x = following
                loss = (energy(x) + costs).mean()
            else:
                log_pi = torch.distributions.Normal(*mean_std(x, place)).log_prob(at(place + 1)).sum(1)
                weight = torch.stack(advantage)[place, torch.arange(B)]
                loss = (weight * log_pi + cost(x, at(place + 1), place, "sampler")).mean()
            fixed = None if settings.train_last_std else log_std
            descend(loss, sampler_adam, settings.sampler_clip, fixed)

        variance = settings.velocity_decay * variance + (1 - settings.velocity_decay) * displacement
        with torch.no_grad():
            lack = mean_log_distance(data) - mean_log_distance(path[T])
            margin = settings.tau_margin * min(1, 2 * remaining)
            factor = factor * (settings.tau_rate * (lack + margin)).exp()
            for mean, p in zip(average.parameters(), networks.parameters(), strict=True):
                mean.copy_(settings.ema_decay * mean + (1 - settings.ema_decay) * p)
    return state(networks, average, variance)


ALGORITHM_2 = {"costs_in": "sampler", "time_cost": "sigmoid"}
ALGORITHM_2 |= {"tau": 0.1, "tau_entropy": 0.2, "tau_velocity": 0.05}
UNCLIPPED = {"sampler_clip": 0, "value_clip": 0, "energy_clip": 0}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(("per_step", {"cost_reduction": r, "sampler_steps": n}) for r in ("sum", "mean") for n in (1, T)),
        ("per_step", {"cost_reduction": "mean", **UNCLIPPED}),
        ("time_independent", ALGORITHM_2),
        ("time_independent", {**ALGORITHM_2, "time_cost": "linear", "skip_last": 1, "train_last_std": False}),
        ("separate", {"skip_last": 2}),
        ("separate", {"costs_in": "value", "td_order": "shuffled", "td_redraw": True}),
        ("per_step", {"td_order": "shuffled", "td_weight": 0.1}),
        ("per_step", {"td_redraw": True, "time_cost": "linear"}),
        ("per_step", {"sampler_update": "policy_gradient"}),
        ("separate", {"sampler_update": "policy_gradient", "sampler_steps": 1, **UNCLIPPED}),
        ("per_step", {"sampler_update": "backprop", "skip_last": 1}),
        ("separate", {"sampler_update": "backprop", "sampler_steps": 2, "tau_rate": 0.5}),
        ("time_independent", {**ALGORITHM_2, "tau_rate": 0.5}),
        ("per_step", {"tau_rate": 0.5, "sampler_wait": 1}),
        ("per_step", {"data_noise": 0.3, "tau_rate": 0.5}),
        ("per_step", {"energy_loss": "noise_contrastive", "gamma": 0.0}),
        ("separate", {"energy_loss": "noise_contrastive", "noise_magnitude": 100.0}),
    ],
)
@pytest.mark.parametrize("labeled", [False, True])
def test_trainer_follows_the_algorithms(kind: str, changes: dict[str, Any], labeled: bool) -> None:
    settings = make_settings(**changes)
    trainer = make_trainer(settings, kind=kind, labeled=labeled)
    labels = torch.arange(B) % CLASSES if labeled else None
    for iteration in range(ITERATIONS):
        trainer.step(batch(iteration) if labels is None else (batch(iteration), labels))
    actual = state(trainer.networks, trainer.averaged, trainer.costs.velocity_var)
    wanted = plain_dxmi(make_networks(kind=kind, labeled=labeled), settings, labels)
    torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)


LENGTHS = (1, 2, 3)


def of_several_lengths(settings: DxMISettings | None = None) -> DxMITrainer:
    chains = [schedules.variance_exploding(steps, sigma_max=3.0, sigma_min=0.4) for steps in LENGTHS]
    torch.manual_seed(0)
    network, value = SamplerMLP(D, sum(LENGTHS), 8, 2), ValueMLP(D, LENGTHS, 8, 2)
    sampler = MultiLengthSampler(network, schedules.joined(chains), (D,), LENGTHS)
    return DxMITrainer(Networks(sampler, value), settings or DxMISettings(), iterations=20, seed=0)


def test_values_of_several_lengths_add_the_heads_of_their_own_chain() -> None:
    value = of_several_lengths().value
    with torch.no_grad():
        value.heads.weight.zero_()
        value.heads.bias.copy_(2.0 ** torch.arange(7))
        values = value(torch.zeros(7, D), torch.arange(7)).tolist()
    assert values == [1 + 64, 2 + 4 + 64, 4 + 64, 8 + 16 + 32 + 64, 16 + 32 + 64, 32 + 64, 64]


def test_each_iteration_trains_the_steps_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets at the ends of chains are energies, and a resumed run continues the sequence of lengths."""
    trainer, seen = of_several_lengths(), set()
    value_at = Networks.value_at
    ends: list[set[int]] = []

    def noted(self: Networks, x: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
        ends.append(set(timestep.tolist()))
        return value_at(self, x, timestep, *rest)

    monkeypatch.setattr(Networks, "value_at", noted)
    for _ in range(12):
        velocity_var = trainer.costs.velocity_var.clone()
        ends.clear()
        metrics = trainer.step(torch.randn(B, D, generator=torch.Generator().manual_seed(trainer.iteration)))
        steps, mine = trainer.sampler.steps, {*trainer.sampler.timesteps.tolist()}
        assert {*(trainer.costs.velocity_var != velocity_var).nonzero()[:, 0].tolist()} == mine
        assert ends[0] == {6} and set().union(*ends) <= mine - {min(mine)} | {6}
        assert metrics["value_loss"].shape == () and all(v.isfinite().all() for v in metrics.values())
        seen.add(steps)
    assert seen == {*LENGTHS}
    other = of_several_lengths()
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    data = torch.randn(B, D)
    torch.testing.assert_close(other.step(data), trainer.step(data), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="cuda_graph and skip_last must be off"):
        of_several_lengths(DxMISettings(skip_last=1))


def test_value_guidance_goes_down_the_value() -> None:
    """x - guidance sigma_t grad V(x), with the paper's sign: samples end at lower energies."""
    networks = make_networks(kind="time_independent")
    x, timestep = batch(0), torch.arange(B) % T
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(networks.value(leaf, timestep).sum(), leaf)
    std = networks.sampler.log_std.detach().exp()[timestep][:, None]
    moved = networks.guide(0.3)(x, timestep, None)
    torch.testing.assert_close(moved, x - 0.3 * std * slope)
    with torch.inference_mode():
        assert torch.equal(networks.guide(0.3)(x.clone(), timestep.clone(), None), moved)
    key = ops.noise_key(1)
    plain, guided = (
        networks.sampler.sample(200, key),
        networks.sampler.sample(200, key, guide=networks.guide(0.3)),
    )
    assert networks.energy(guided).mean() < networks.energy(plain).mean()
    assert all(p.requires_grad for p in networks.parameters())


# --- gradients ---------------------------------------------------------------------------------------


def test_sampler_step_leaves_the_value_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value's weights are frozen during the sampler's step, so no gradient is computed for them."""
    trainer = make_trainer(make_settings())
    weights = list(trainer.value.parameters())
    frozen_at = []
    value, sampler = (
        learner.optimizer.descend for learner in (trainer.value_learner, trainer.sampler_learner)
    )

    def and_forget(loss: Tensor, failures: Tensor) -> None:
        value(loss, failures)
        for p in weights:
            p.grad = None

    def frozen(loss: Tensor, failures: Tensor) -> None:
        frozen_at.append(not any(p.requires_grad for p in weights))
        sampler(loss, failures)

    monkeypatch.setattr(trainer.value_learner.optimizer, "descend", and_forget)
    monkeypatch.setattr(trainer.sampler_learner.optimizer, "descend", frozen)
    trainer.step(batch(0))
    assert frozen_at == [True] * T
    assert all(p.requires_grad and p.grad is None for p in weights)


def test_value_thaws_when_the_sampler_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_settings())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.sampler_learner.optimizer, "descend", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(batch(0))
    assert all(p.requires_grad for p in trainer.value.parameters())


def test_value_targets_build_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    had_graphs = []
    td_target = ops.td_target

    def spy(next_value: Tensor, *args: Any, **settings: Any) -> Tensor:
        target = td_target(next_value, *args, **settings)
        had_graphs.append(next_value.requires_grad or target.requires_grad)
        return target

    monkeypatch.setattr(ops, "td_target", spy)
    make_trainer(make_settings()).step(batch(0))
    assert had_graphs == [False] * T


class Bowl(nn.Module):
    """|x|^2 / (2 variance_t)."""

    def __init__(self, variance: Tensor) -> None:
        super().__init__()
        self.variance = nn.Parameter(variance)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        return x.square().sum(1) / (2 * self.variance[0 if timestep is None else timestep])


class Still(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return 0 * x


class Ramp(nn.Module):
    """A network for rows of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.scale * x


class Slope(Ramp):
    """A value for rows of any shape."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep).reshape(len(x), -1).sum(1)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_returns_of_an_optimal_sampler_have_no_noise(weight: float) -> None:
    """The sampler takes the exact reverse steps for N(0, c), and its values are exact up to constants."""
    c, kernel = 0.5, torch.tensor([2.0, 1.0, 0.3, 0.1], dtype=torch.float64)  # variances of the steps
    variance = c + kernel.flip(0).cumsum(0).flip(0)
    after = torch.cat((variance[1:], variance.new_tensor([c])))
    schedule = SCHEDULE._replace(
        sample_coef=after / variance, log_std=(after * kernel / variance).log() / 2, initial_std=1.7
    )
    sampler = GaussianSampler(Still(), schedule, (D,))
    networks = Networks(sampler, Bowl(variance), Bowl(variance.new_tensor([c]))).double()
    settings = make_settings(tau=1.0, td_lambda=weight)
    trainer = DxMITrainer(networks, settings, iterations=1, seed=SEED)
    trainer.costs.velocity_var.copy_(kernel)
    path = sampler.rollout(50, ops.noise_key(1))
    rows, timesteps = Batch(path.samples[0], None, 0, {}), [sampler.timestep(t, 50) for t in range(T)]
    values = torch.stack([networks.value_at(path.samples[t], timesteps[t]) for t in range(T)])
    assert (trainer._returns(path, rows) - values).std(1).max() < 1e-6
    one_step = torch.stack([trainer._target(path.step(t), timesteps[t], rows) for t in range(T)])
    assert (one_step - values).std(1).min() > 0.5


def test_expected_cost_has_the_same_mean_gradient_and_less_noise() -> None:
    networks = make_networks()
    sampler, n = networks.sampler, 4000
    x = torch.tensor([0.4, -1.0, 0.2], dtype=torch.float64).expand(n, D)
    gradients = []
    for step in (sampler, ExpectedStep(sampler)):
        log_std, last = sampler.log_std, list(sampler.network.parameters())[-1]
        moved = step(x, sampler.timestep(1, n), ops.noise_key(0)).sq_displacement
        every = [
            torch.autograd.grad(part.mean(), (log_std, last), retain_graph=True) for part in moved.split(100)
        ]
        gradients.append([torch.stack(part) for part in zip(*every, strict=True)])
    for taken, expected in zip(*gradients, strict=True):
        assert expected.std(0).max() < 1e-6 < taken.std(0).max()
        close = 4 * taken.std(0) / math.sqrt(len(taken)) + 1e-9
        assert bool(((taken.mean(0) - expected.mean(0)).abs() <= close).all())


# --- numbers going wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["energy", "value", "sampler"])
def test_a_step_that_is_not_finite_moves_no_weight(
    part: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer counts it and takes the next step; the other networks are not affected."""
    trainer = make_trainer(make_settings(), kind="separate")
    networks = trainer.networks
    modules = {"energy": networks.energy_network, "value": networks.value, "sampler": networks.sampler}
    op = {"energy": "energy_loss", "value": "td_target", "sampler": "running_cost"}[part]
    sound = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: sound(*args, **kwargs) * bad)
    before = copy.deepcopy(networks.state_dict())
    metrics = trainer.step(batch(0))
    moved = {name for name, value in networks.state_dict().items() if not torch.equal(value, before[name])}
    own = {id(p) for p in modules[part].parameters()}
    assert moved == {n for n, p in networks.named_parameters() if id(p) not in own}
    assert health.failures(metrics) == {part: {"energy": 1, "value": T, "sampler": T}[part]}
    monkeypatch.undo()
    assert health.failures(trainer.step(batch(1))) == {}
    assert all(not torch.equal(p, before[name]) for name, p in networks.named_parameters())


def test_a_path_that_is_not_finite_leaves_the_velocity_as_it_is() -> None:
    trainer = make_trainer(make_settings())
    before = trainer.costs.velocity_var.clone()
    bad = trainer.sampler.network.register_forward_hook(lambda *called: called[-1] * math.nan)
    trainer.step(batch(0))
    bad.remove()
    # It changes only by the rounding of the decay and its complement.
    torch.testing.assert_close(trainer.costs.velocity_var, before)
    trainer.step(batch(1))
    assert trainer.costs.velocity_var.isfinite().all() and not torch.allclose(
        trainer.costs.velocity_var, before
    )


def test_the_averaged_value_stays_as_it_was_while_tau_is_cooled() -> None:
    trainer = make_trainer(make_settings(tau_hold=1 / ITERATIONS, tau_cooling=0.1))
    for iteration in range(3):
        before = copy.deepcopy(trainer.averaged).state_dict()
        metrics = trainer.step(batch(iteration))
        weights = trainer.averaged.named_parameters()
        changed = {name.partition(".")[0] for name, weight in weights if (weight != before[name]).any()}
        assert changed == ({"sampler", "value"} if iteration < 2 else {"sampler"})
    assert metrics["temperature"].item() == pytest.approx(0.1**0.5)
    moved, timestep = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    falling = trainer.costs.of("sampler", moved, timestep)
    trainer.costs.begin(0.0)
    torch.testing.assert_close(falling, 0.1**0.5 * trainer.costs.of("sampler", moved, timestep))


def test_an_average_has_the_statistics_of_batch_normalization() -> None:
    modules = nn.ModuleDict({"value": nn.BatchNorm1d(D), "sampler": nn.BatchNorm1d(D)})
    average = Average(modules, 0.9)
    for module in modules.values():
        module(batch(0).float())

    def same() -> dict[str, bool]:
        averaged = dict(average.module.named_buffers())
        return {name: torch.equal(buffer, averaged[name]) for name, buffer in modules.named_buffers()}

    average.update("sampler")
    assert [name for name, is_same in same().items() if not is_same] == [
        f"value.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    average.update()
    assert all(same().values())


@pytest.mark.parametrize(
    "settings",
    [
        DxMISettings(expected_cost=True, tau_rate=0.1),
        DxMISettings(negatives="refined", td_order="shuffled"),
    ],
)
def test_samples_may_be_scalars(settings: DxMISettings) -> None:
    """Rows without data dimensions give the same results as rows of one number."""
    metrics = []
    for shape in ((), (1,)):
        sampler = GaussianSampler(Ramp(), SCHEDULE, shape)
        trainer = DxMITrainer(Networks(sampler, Slope()), settings, iterations=1, seed=SEED)
        metrics.append(trainer.step(torch.linspace(-1, 1, B).view(B, *shape)))
    torch.testing.assert_close(*metrics)


def test_adam_without_momentum_may_be_an_integer() -> None:
    wanted = make_trainer(make_settings(adam_beta1=0.0)).step(batch(0))
    metrics = make_trainer(make_settings(adam_beta1=0)).step(batch(0))
    torch.testing.assert_close(metrics, wanted, rtol=0, atol=0)


def test_the_default_dtype_of_torch_does_not_matter() -> None:
    settings, networks = make_settings(), make_networks()
    wanted = make_trainer(settings).step(batch(0))
    torch.set_default_dtype(torch.float64)
    try:
        metrics = DxMITrainer(networks, settings, iterations=ITERATIONS, seed=SEED).step(batch(0))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(metrics, wanted, rtol=0, atol=0)


# --- resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("tau", [{"tau_rate": 0.5, "tau_margin": 0.2}, {"tau_cooling": 0.1}])
def test_trainer_resumes_to_the_bit(split: int, tau: dict[str, float]) -> None:
    settings = make_settings(tau_hold=1 / ITERATIONS, **tau)
    straight, first = (make_trainer(settings) for _ in range(2))
    for iteration in range(ITERATIONS):
        straight.step(batch(iteration))
    for iteration in range(split):
        first.step(batch(iteration))
    resumed = make_trainer(settings, seed=1)  # other weights, to be overwritten
    resumed.load_state_dict(first.state_dict())
    for iteration in range(split, ITERATIONS):
        first.step(batch(iteration))  # to show that they share no tensors
        resumed.step(batch(iteration))
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert resumed.costs.tau_factor == straight.costs.tau_factor
    assert (straight.costs.tau_factor != 1) == ("tau_rate" in tau)


def test_a_copy_of_a_trainer_continues_like_the_original() -> None:
    trainer = make_trainer(make_settings(train_last_std=False))
    trainer.step(batch(0))
    other = copy.deepcopy(trainer)
    for each in (trainer, other):
        each.step(batch(1))
    torch.testing.assert_close(other.state_dict(), trainer.state_dict(), rtol=0, atol=0)


def test_sigma_stays_within_its_bound() -> None:
    bound, trainers = 0.3, [make_trainer(make_settings(tau=10.0, log_std_lr=0.5)) for _ in range(2)]
    assert (trainers[0].sampler.log_std.exp() < bound).any()
    trainers[0].sampler.max_std = bound
    for trainer in trainers:
        for iteration in range(ITERATIONS):
            trainer.step(batch(iteration))
    bounded, free = (trainer.sampler.log_std.exp() for trainer in trainers)
    assert (free > bound).all()
    torch.testing.assert_close(bounded, torch.full_like(bounded, bound))


def test_trained_networks_can_be_saved_as_modules() -> None:
    trainer = make_trainer(make_settings())
    for each in (trainer.networks, trainer.averaged):
        torch.save(each, io.BytesIO())


def test_an_optimizer_state_of_another_device_keeps_this_ones_kind_of_rates() -> None:
    """On CUDA, learning rates are tensors, for CUDA graphs; on the CPU, they are numbers."""
    trainer = make_trainer(make_settings())
    state = copy.deepcopy(trainer.value_learner.optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), "capturable": True}
    trainer.value_learner.optimizer.load_state_dict(state)
    (group,) = trainer.value_learner.optimizer.param_groups
    assert isinstance(group["lr"], float) and not group["capturable"]
    trainer.step(batch(0))


# --- pretraining -------------------------------------------------------------------------------------


def make_pretrainer(iterations: int, weights: int = 0) -> tuple[GaussianSampler, Pretrainer]:
    torch.manual_seed(weights)
    network = SamplerMLP(2, T, width=32, depth=2)
    nn.init.normal_(network.last.weight, std=0.1)  # an output that starts at zero would see no input
    sampler = GaussianSampler(network, SCHEDULE, (2,))
    levels = uniform_levels(SCHEDULE.signal, SCHEDULE.noise)
    return sampler, Pretrainer(sampler.network, levels, lr=1e-2, iterations=iterations, seed=SEED)


def points(iteration: int, n: int = 128) -> Tensor:
    return two_d.sample("8gaussians", n, ops.noise_key(iteration))


def test_pretraining_starts_from_the_ddpm_loss() -> None:
    sampler, pretrainer = make_pretrainer(1)
    keys = noise.Draws(SEED, "pretrain", ["timestep", "noise"]).at(0)
    t = noise.randint(T, 128, keys["timestep"])
    eps = ops.normal((128, 2), keys["noise"])
    noisy = SCHEDULE.signal[t, None].float() * points(0) + SCHEDULE.noise[t, None].float() * eps
    expected = ((sampler.network(noisy, t) - eps) ** 2).mean().detach()
    torch.testing.assert_close(pretrainer.step(points(0))["loss"], expected)


def test_pretraining_lowers_its_loss_and_leaves_sigma() -> None:
    sampler, pretrainer = make_pretrainer(150)
    log_std = sampler.log_std.detach().clone()
    losses = torch.stack([pretrainer.step(points(iteration))["loss"] for iteration in range(150)])
    assert losses[-20:].mean() < 0.75 * losses[:5].mean()
    assert torch.equal(sampler.log_std, log_std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_get_the_dtype_of_the_data(dtype: torch.dtype) -> None:
    """A schedule's tables are float64, log-normal levels float32."""

    class Timed(nn.Linear):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return super().forward(torch.cat((x, time.to(x.dtype)[:, None]), 1))

    def uniform(n: int, key: Tensor, sample_offset: int) -> Levels:
        t = noise.randint(T, n, key, sample_offset=sample_offset)
        return Levels(SCHEDULE.signal[t], SCHEDULE.noise[t], t)

    for draw in (uniform, lognormal_levels()):
        pretrainer = Pretrainer(Timed(3, 2).to(dtype), draw, lr=1e-3, iterations=1, seed=SEED)
        assert pretrainer.step(points(0).to(dtype))["loss"].isfinite()


def test_channels_last_needs_images() -> None:
    sampler, _ = make_pretrainer(1)
    levels, execution = uniform_levels(SCHEDULE.signal, SCHEDULE.noise), ExecutionSettings(channels_last=True)
    pretrainer = Pretrainer(sampler.network, levels, lr=1, iterations=1, seed=SEED, execution=execution)
    with pytest.raises(ConfigError, match=r"channels_last must be false unless .* got \[128, 2\]"):
        pretrainer.step(points(0))


def test_pretraining_resumes_to_the_bit() -> None:
    (_, straight), (_, first), (_, resumed) = make_pretrainer(4), make_pretrainer(4), make_pretrainer(4, 1)
    for iteration in range(4):
        straight.step(points(iteration))
    for iteration in range(2):
        first.step(points(iteration))
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for iteration in range(2, 4):
        resumed.step(points(iteration))
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
