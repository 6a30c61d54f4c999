"""Networks of a user that do not fit are named before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import (
    ConfigError,
    DxMISettings,
    DxMITrainer,
    GaussianSampler,
    Networks,
    Pretrainer,
    schedules,
    uniform_levels,
)

T = 3
SCHEDULE = schedules.variance_exploding(T, sigma_max=1.0, sigma_min=0.1)
DATA = torch.arange(12.0).view(4, 3) / 6 - 1
LEVELS = uniform_levels(SCHEDULE.signal, SCHEDULE.noise)


class Net(nn.Module):
    """(x [N, 3], timestep [N]) -> [N, out]"""

    def __init__(self, out: int = 3, embeddings: int = T) -> None:
        super().__init__()
        self.linear, self.step = nn.Linear(3, out), nn.Embedding(embeddings, out)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(x) + self.step(timestep)


class Value(Net):
    """(x [N, 3], timestep [N]) -> [N]"""

    def __init__(self, embeddings: int = T + 1, ending: Callable[[Tensor], Any] = lambda y: y[:, 0]) -> None:
        super().__init__(1, embeddings)
        self.ending = ending

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        return self.ending(super().forward(x, timestep))


class InPlace(Net):
    """(x [N, 3], timestep [N]) -> [N, 3]; changes x."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x.mul_(2), timestep)


class Energy(nn.Linear):
    """(x [N, 3]) -> [N]"""

    def __init__(self) -> None:
        super().__init__(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class Quadratic(nn.Module):
    """A given energy: (x [N, 3]) -> [N]"""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum(1)


def trainer(
    network: nn.Module | None = None, value: nn.Module | None = None, energy: nn.Module | None = None
) -> DxMITrainer:
    sampler = GaussianSampler(network or Net(), SCHEDULE, (3,))
    networks = Networks(sampler, Value() if value is None else value, energy)
    return DxMITrainer(networks, DxMISettings(), iterations=1, seed=0)


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (
            {"value": Value(T)},
            r"value must take \(x float32 \[4, 3\], timestep int64 \[4\]\) with timesteps 0 to 3 \(T\), "
            "got IndexError at timestep 3: index out of range",
        ),
        (
            {"network": Net(3, T - 1)},
            r"network of the sampler .* 0 to 2 \(T - 1\), got IndexError at timestep 2",
        ),
        ({"network": Net(2)}, r"network of the sampler must return shape \[4, 3\], got \[4, 2\]"),
        ({"network": InPlace()}, "network of the sampler must not change its input in place"),
        ({"network": Energy()}, r"network of the sampler must take .* got TypeError: Energy\.forward"),
        ({"value": Value(ending=lambda y: y)}, r"value must return shape \[4\], got \[4, 1\]"),
        ({"value": Value(ending=lambda y: (y, y))}, "TypeError: the output of a network must be a tensor"),
        ({"value": Value(ending=lambda y: y[:, 0].detach())}, "value must return a function of its weights"),
        ({"energy": Value()}, r"energy must take \(x float32 \[4, 3\]\), got TypeError"),
        ({"value": Value(T - 1), "energy": Energy()}, r"value must take .* 0 to 2 \(T - 1\)"),
    ],
)
def test_a_misfit_is_named_before_anything_is_trained(networks: dict[str, Any], message: str) -> None:
    made = trainer(**networks)
    with pytest.raises(ConfigError, match=message):
        made.step(DATA)
    assert made.iteration == 0


def test_a_sampler_that_cannot_be_trained_is_named() -> None:
    network, value = Net(), Value()
    value.linear = network.linear
    with pytest.raises(
        ConfigError, match=r"share no weights with value or energy, .* got linear\.weight, linear"
    ):
        trainer(network=network, value=value)
    still = SCHEDULE._replace(log_std=torch.tensor([-1.0, -1.0, -math.inf]))
    networks = Networks(GaussianSampler(Net(), still, (3,)), Value())
    with pytest.raises(ConfigError, match="sigma must be > 0 for training, got 0 at timestep 2"):
        DxMITrainer(networks, DxMISettings(train_last_std=False), iterations=1, seed=0)


def test_trained_weights_have_one_dtype() -> None:
    with pytest.raises(ConfigError, match="networks must have weights of one dtype, got float32 and float64"):
        trainer(value=Value().double())
    value = Value()
    value.frozen = nn.Linear(1, 1).bfloat16().requires_grad_(False)
    trainer(value=value).step(DATA)


def test_a_compiled_value_is_trained() -> None:
    trainer(value=torch.compile(Value(), backend="eager")).step(DATA)


@pytest.mark.parametrize("energy", [Quadratic(), Energy().requires_grad_(False)])
def test_an_energy_that_cannot_learn_is_named(energy: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"energy must have weights to train, got .* `dxmi train energy`"):
        trainer(energy=energy).step(DATA)


def test_labels_are_part_of_the_trial() -> None:
    with pytest.raises(ConfigError, match=r"labels int64 \[4\]\) .* got TypeError"):
        trainer().step((DATA, torch.zeros(4, dtype=torch.int64)))


def test_networks_that_fit_are_trained() -> None:
    trainer(value=Value(T), energy=Energy()).step(DATA)
    frozen = trainer(network=Net().requires_grad_(False))
    before = frozen.sampler.log_std.detach().clone()
    frozen.step(DATA)
    assert not torch.equal(before, frozen.sampler.log_std)


def test_a_trial_leaves_no_traces() -> None:
    """The state of the generator and running means do not change, and modules are in training mode again."""
    parts = nn.BatchNorm1d(3), nn.Dropout(0.5)

    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(*parts)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            torch.rand(1)
            return super().forward(self.parts(x), timestep)

    made = trainer(network=Noisy())
    state = torch.get_rng_state()
    made.checked(DATA)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(parts[0].running_mean, torch.zeros(3))
    assert all(module.training for module in made.networks.modules())


@pytest.mark.parametrize(
    ("network", "levels", "message"),
    [
        (Net(1), LEVELS, r"network must return shape \[4, 3\], got \[4, 1\]"),
        (Net(3, 1), LEVELS, "network must take .* got IndexError"),
        (Net(), lambda n, key, offset: torch.ones(n), "draw_levels must return Levels, got Tensor"),
    ],
)
def test_pretraining(network: nn.Module, levels: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pretrainer(network, levels, lr=1e-3, iterations=1, seed=0).step(DATA)
