"""Training: the trainer against Algorithm 1 written out in plain torch, gradients, resuming, pretraining."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import noise, ops, schedules
from dxmi_ext.data import two_d
from dxmi_ext.models.mlp import SamplerMLP, ValueMLP
from dxmi_ext.pretrain import Pretrainer
from dxmi_ext.sampler import GaussianSampler
from dxmi_ext.trainer import DxMISettings, DxMITrainer, Networks

B, D, T = 7, 3, 4  # batch, data dimensions, steps
ITERATIONS = 3
SEED = 5
SCHEDULE = schedules.variance_exploding(T, sigma_max=2.0, sigma_min=0.4)


def make_networks(seed: int = 0) -> Networks:
    generator = torch.Generator().manual_seed(seed)
    network, value = SamplerMLP(D, T, width=8, depth=2), ValueMLP(D, T, width=8, depth=2)
    for p in (*network.parameters(), *value.parameters()):
        nn.init.normal_(p, std=0.4, generator=generator)  # no head starts at zero
    return Networks(GaussianSampler(network, SCHEDULE, (D,)), value).double()


def make_settings(cost_reduction: str = "sum", sampler_steps: int = T, clip: bool = True) -> DxMISettings:
    """Every number differs from the others and from its default; both clips bite."""
    return DxMISettings(
        tau=0.3,
        gamma=0.7,
        cost_reduction=cost_reduction,
        velocity_decay=0.9,
        sampler_steps=sampler_steps,
        sampler_lr=1e-2,
        log_std_lr=3e-2,
        value_lr=2e-2,
        sampler_clip=0.2 if clip else 0,
        value_clip=0.4 if clip else 0,
        ema_decay=0.8,
    )


def make_trainer(settings: DxMISettings, seed: int = 0) -> DxMITrainer:
    return DxMITrainer(make_networks(seed), settings, iterations=ITERATIONS, seed=SEED)


def batch(iteration: int) -> Tensor:
    return 1 + ops.normal((B, D), ops.noise_key(100 + iteration), dtype=torch.float64)


def state(networks: Networks, averaged: Networks, velocity_var: Tensor) -> dict[str, Tensor]:
    """All that an iteration changes, by name."""
    now = {name: p.detach().clone() for name, p in networks.named_parameters()}
    mean = {f"average of {name}": p.detach().clone() for name, p in averaged.named_parameters()}
    return now | mean | {"velocity_var": velocity_var.clone()}


# --- Algorithm 1 in plain torch ----------------------------------------------------------------------


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    scale = clip / (norm + 1e-6) if 0 < clip < norm else 1.0  # 1e-6: torch's guard against a norm of 0
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = scale * gradient
    optimizer.step()


def algorithm_1(networks: Networks, settings: DxMISettings) -> dict[str, Tensor]:
    """DxMI, Alg. 1, as the paper states it; noise and random choices are those of the trainer."""
    sampler, value = networks.sampler, networks.value
    net, log_std, a, b = sampler.network, sampler.log_std, sampler.sample_coef, sampler.output_coef
    groups: list[dict[str, Any]] = [{"params": net.parameters()}, {"params": [log_std]}]
    sampler_adam = torch.optim.Adam(groups, foreach=False, fused=False)
    value_adam = torch.optim.Adam(value.parameters(), foreach=False, fused=False)
    variance = log_std.detach().exp() ** 2  # s_t^2
    average = copy.deepcopy(networks)
    redraws = [f"redraw{i}" for i in range(settings.sampler_steps)]
    draws = noise.Draws(SEED, "dxmi", ["rollout", "choice", *redraws])

    def transition(x: Tensor, t: Tensor, key: Tensor) -> Tensor:
        drawn = torch.stack([ops.normal((B, D), key, timestep=step) for step in range(T)]).double()
        z, column = drawn[t, torch.arange(B)], (B, 1)
        mean = a[t].view(column) * x + b[t].view(column) * net(x, t)
        return mean + log_std[t].view(column).exp() * z

    def cost(x: Tensor, following: Tensor, t: Tensor) -> Tensor:
        """tau (log pi + |following - x|^2 / 2 s_t^2), log pi being -log sigma in each dimension."""
        terms = (following - x) ** 2 / (2 * variance[t, None]) - log_std[t, None]
        return settings.tau * (terms.sum(1) if settings.cost_reduction == "sum" else terms.mean(1))

    for iteration in range(ITERATIONS):
        data, keys, remaining = batch(iteration), draws.at(iteration), 1 - iteration / ITERATIONS
        sampler_adam.param_groups[0]["lr"] = settings.sampler_lr * remaining
        sampler_adam.param_groups[1]["lr"] = settings.log_std_lr * remaining
        value_adam.param_groups[0]["lr"] = settings.value_lr * remaining
        every = [torch.full((B,), t) for t in range(T + 1)]

        path = [SCHEDULE.initial_std * ops.normal((B, D), keys["rollout"]).double()]
        with torch.no_grad():
            for t in range(T):
                path.append(transition(path[t], every[t], keys["rollout"]))
            displacement = torch.stack([((path[t + 1] - path[t]) ** 2).mean() for t in range(T)])

        of_data, of_samples = value(data, every[T]), value(path[T], every[T])
        squares = (of_data**2).mean() + (of_samples**2).mean()
        loss = of_data.mean() - of_samples.mean() + settings.gamma * squares
        descend(loss, value_adam, settings.value_clip)

        for t in reversed(range(T)):
            target = value(path[t + 1], every[t + 1]) + cost(path[t], path[t + 1], every[t])
            loss = ((target.detach() - value(path[t], every[t])) ** 2).mean()
            descend(loss, value_adam, settings.value_clip)

        first = noise.randint(T, B, keys["choice"])
        for i, redraw in enumerate(redraws):
            place = (first + i) % T
            x = torch.stack(path)[place, torch.arange(B)]
            redrawn = transition(x, place, keys[redraw])
            loss = (value(redrawn, place + 1) + cost(x, redrawn, place)).mean()
            descend(loss, sampler_adam, settings.sampler_clip)

        variance = settings.velocity_decay * variance + (1 - settings.velocity_decay) * displacement
        keep = settings.ema_decay
        with torch.no_grad():
            for mean, p in zip(average.parameters(), networks.parameters(), strict=True):
                mean.copy_(keep * mean + (1 - keep) * p)
    return state(networks, average, variance)


@pytest.mark.parametrize(
    ("cost_reduction", "sampler_steps", "clip"), [*product(["sum", "mean"], [1, T], [True, False])]
)
def test_trainer_follows_algorithm_1(cost_reduction: str, sampler_steps: int, clip: bool) -> None:
    settings = make_settings(cost_reduction, sampler_steps, clip)
    trainer = make_trainer(settings)
    for iteration in range(ITERATIONS):
        trainer.step(batch(iteration))
    actual = state(trainer.networks, trainer.averaged, trainer.velocity_var)
    torch.testing.assert_close(actual, algorithm_1(make_networks(), settings), rtol=1e-9, atol=1e-10)


# --- gradients ---------------------------------------------------------------------------------------


def test_sampler_step_leaves_the_value_alone() -> None:
    """Its weights are frozen, not only unused, while the sampler learns; nothing is computed for them."""
    trainer = make_trainer(make_settings())
    weights = list(trainer.value.parameters())
    frozen_at = []

    def forget(*_: object) -> None:
        for p in weights:
            p.grad = None

    trainer.value_optimizer.register_step_post_hook(forget)
    trainer.sampler_optimizer.register_step_pre_hook(
        lambda *_: frozen_at.append(not any(p.requires_grad for p in weights))
    )
    trainer.step(batch(0))
    assert frozen_at == [True] * T
    assert all(p.requires_grad and p.grad is None for p in weights)


def test_value_thaws_when_the_sampler_step_fails() -> None:
    trainer = make_trainer(make_settings())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    trainer.sampler_optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(batch(0))
    assert all(p.requires_grad for p in trainer.value.parameters())


def test_value_targets_build_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    had_graphs = []
    td_target = ops.td_target

    def spy(next_value: Tensor, *args: Any) -> Tensor:
        target = td_target(next_value, *args)
        had_graphs.append(next_value.requires_grad or target.requires_grad)
        return target

    monkeypatch.setattr(ops, "td_target", spy)
    make_trainer(make_settings()).step(batch(0))
    assert had_graphs == [False] * T


# --- resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 2])
def test_trainer_resumes_to_the_bit(split: int) -> None:
    straight, first = make_trainer(make_settings()), make_trainer(make_settings())
    for iteration in range(ITERATIONS):
        straight.step(batch(iteration))
    for iteration in range(split):
        first.step(batch(iteration))
    resumed = make_trainer(make_settings(), seed=1)  # other weights, to be overwritten
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for iteration in range(split, ITERATIONS):
        resumed.step(batch(iteration))
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


# --- pretraining -------------------------------------------------------------------------------------


def make_pretrainer(iterations: int, weights: int = 0) -> tuple[GaussianSampler, Pretrainer]:
    torch.manual_seed(weights)
    network = SamplerMLP(2, T, width=32, depth=2)
    nn.init.normal_(network.last.weight, std=0.1)  # an output that starts at zero would see no input
    sampler = GaussianSampler(network, SCHEDULE, (2,))
    return sampler, Pretrainer(sampler, SCHEDULE, lr=1e-2, iterations=iterations, seed=SEED)


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
