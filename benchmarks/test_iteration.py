"""Whole iterations of DxMI: the trainer against a plain torch loop with the same losses.

First the losses of both are compared with the same noise; then the loop draws its own. *networks alone* is
the lower bound of both: the same passes through the networks and nothing else. The other rows are ours with
other settings of ``engine.compute.execution``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.method import noise, schedules
from dxmi_ext.method.networks import Networks, frozen
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.trainer import DxMITrainer
from networks import BFloat16, ConvValue, UNet
from peers import OURS
from places import Place
from plain_iteration import PlainLoop, TorchNoise

ITERATIONS = 1_000_000  # length of the run whose first iterations are timed; learning rates hardly decay
SEED = 0
PLAIN, FUSED, FLOOR = "plain loop", "plain loop, fused Adam", "networks alone"
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32", "channels_last": False},
    "float32, channels_last": {"precision": "float32", "channels_last": True},
    "bfloat16": {"precision": "bfloat16", "channels_last": False},
    "bfloat16, channels_last": {"precision": "bfloat16", "channels_last": True},
    "compiled": {"compile": True},
}


class Setup(NamedTuple):
    networks: Networks
    settings: DxMISettings
    execution: ExecutionSettings
    data: Tensor


class TrainersNoise(TorchNoise):
    """The noise and random steps that the trainer draws."""

    def __init__(self, settings: DxMISettings, device: torch.device) -> None:
        redraws = [f"redraw{i}" for i in range(settings.sampler_steps)]
        self._draws = noise.Draws(SEED, "dxmi", ["rollout", "choice", *redraws], device)

    def start(self, iteration: int) -> None:
        self._keys = self._draws.at(iteration)

    def normal(self, use: str, like: Tensor, timestep: Tensor | None) -> Tensor:
        key = self._keys[use]
        if timestep is None:
            return ops.normal(like.shape, key)
        z = torch.empty_like(like)
        for t in timestep.unique().tolist():
            z = torch.where(
                (timestep == t).view(-1, *[1] * (like.ndim - 1)), ops.normal(like.shape, key, timestep=t), z
            )
        return z

    def choice(self, steps: int, like: Tensor) -> Tensor:
        return noise.randint(steps, len(like), self._keys["choice"])


def two_d(place: Place) -> Setup:
    """The recipe 8gaussians, unchanged."""
    for library in ("safetensors", "tqdm"):
        pytest.importorskip(library, reason=f"the 2D recipe needs {library}")
    from dxmi_ext.two_d import densities as data
    from dxmi_ext.two_d import recipe

    settings = recipe.Config()  # the defaults are those of 8gaussians.yaml
    networks, _ = recipe.build(settings, place.device)
    key = ops.noise_key(SEED, device=place.device)
    return Setup(
        networks,
        settings.algorithm,
        settings.execution,
        data.sample(settings.density.data, settings.run.batch_size, key),
    )


def is_small(place: Place, quick: bool) -> bool:
    """Whether image networks are smaller than usual, which a GPU does not need."""
    return quick and place.device.type == "cpu"


def images(place: Place, quick: bool) -> Setup:
    """Images of 3 x 32 x 32: 128 in bfloat16 and channels_last on a GPU, fewer on a CPU."""
    cuda, small = place.device.type == "cuda", is_small(place, quick)
    steps, batch = (10, 128) if cuda else (4, 1)
    torch.manual_seed(SEED)
    network = UNet(steps, 16, (1, 2)) if small else UNet(steps)
    value = ConvValue(steps, 16 if small else 64)
    schedule = schedules.ddpm(torch.linspace(1e-2, 0.5, steps))
    networks = Networks(GaussianSampler(network, schedule, (3, 32, 32)), value).to(place.device)
    data = ops.normal((batch, 3, 32, 32), ops.noise_key(SEED, device=place.device)).clamp(-1, 1)
    speed = VARIANTS["bfloat16, channels_last" if cuda else "float32"]
    algorithm = DxMISettings(sampler_steps=1, sampler_lr=1e-5)
    return Setup(networks, algorithm, ExecutionSettings(**speed), data)


def as_they_run(networks: Networks, settings: ExecutionSettings) -> Networks:
    """Networks that apply the settings themselves, for a loop that has no settings."""
    networks = deepcopy(networks)
    if settings.precision == "bfloat16":
        networks.sampler.network = BFloat16(networks.sampler.network)
        networks.value = BFloat16(networks.value)
    return networks


@pytest.mark.parametrize("name", [OURS, PLAIN, FUSED, FLOOR])
@pytest.mark.parametrize("task", ["2D", "image"])
def test_iteration(measure: Any, place: Place, quick: bool, task: str, name: str) -> None:
    group = title(task, place, quick)
    if place.graph and name == FLOOR:
        measure.skip(group, name, "measured on cuda")
    networks, settings, execution, data = two_d(place) if task == "2D" else images(place, quick)
    if name in (PLAIN, FUSED):
        tolerance = 1e-3 if place.device.type == "cpu" else 5e-2
        assert_same_losses(networks, settings, execution, data, fused=name == FUSED, tolerance=tolerance)
    # Only ours in a graph: a loop that reads its numbers cannot be captured.
    trainer = make_trainer(networks, settings, execution, cuda_graph=place.graph)
    plain = as_they_run(networks, execution)
    loop = PlainLoop(plain, settings, iterations=ITERATIONS, fused=name == FUSED)
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: trainer.step(data),
        PLAIN: lambda: loop.step(data),
        FUSED: lambda: loop.step(data),
        FLOOR: lambda: passes(plain, settings, data),
    }
    measure(calls[name], group, name, ours=None if name == OURS else calls[OURS], shape=list(data.shape))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("task", ["2D", "image"])
def test_settings(measure: Any, place: Place, quick: bool, task: str, name: str) -> None:
    """The effect of the settings on ours. A test of the package checks that they only change rounding."""
    group = title(task, place, quick)
    networks, settings, execution, data = two_d(place) if task == "2D" else images(place, quick)
    changes = VARIANTS[name]
    if all(getattr(execution, key) == value for key, value in changes.items()):
        pytest.skip("these are the settings of ours")
    if task == "2D" and "compile" not in changes:
        pytest.skip("for images")
    if "compile" in changes and task == "image" and place.device.type == "cpu":
        measure.skip(group, f"ours, {name}", "compiling a U-Net for a CPU takes minutes")
    ours = make_trainer(networks, settings, execution, cuda_graph=place.graph)
    theirs = make_trainer(networks, settings, execution, cuda_graph=place.graph, **changes)
    measure(
        lambda: theirs.step(data),
        group,
        f"ours, {name}",
        ours=lambda: ours.step(data),
        shape=list(data.shape),
    )


def title(task: str, place: Place, quick: bool) -> str:
    return f"iteration of {'small ' if task == 'image' and is_small(place, quick) else ''}{task} networks"


def make_trainer(
    networks: Networks, settings: DxMISettings, execution: ExecutionSettings, **changes: Any
) -> DxMITrainer:
    execution = dataclasses.replace(execution, **changes)
    return DxMITrainer(deepcopy(networks), settings, iterations=ITERATIONS, seed=SEED, execution=execution)


def passes(networks: Networks, settings: DxMISettings, data: Tensor) -> None:
    """The calls of the networks in an iteration of Alg. 1."""
    network, value, steps = networks.sampler.network, networks.value, networks.sampler.steps
    every = [torch.full((len(data),), t, device=data.device) for t in range(steps + 1)]
    with torch.no_grad():
        for t in range(steps):
            network(data, every[t])
    networks.energy(torch.cat((data, data))).sum().backward()
    for t in range(steps):
        with torch.no_grad():
            value(data, every[t + 1])
        value(data, every[t]).sum().backward()
    with frozen(value):
        for t in range(settings.sampler_steps):
            value(network(data, every[t]), every[t + 1]).sum().backward()


def assert_same_losses(
    networks: Networks,
    settings: DxMISettings,
    execution: ExecutionSettings,
    data: Tensor,
    *,
    fused: bool,
    tolerance: float,
) -> None:
    """Two iterations, so that the losses of the second depend on the updates of the first."""
    trainer = make_trainer(networks, settings, execution)
    its_noise = TrainersNoise(settings, data.device)
    loop = PlainLoop(
        as_they_run(networks, execution), settings, iterations=ITERATIONS, noise=its_noise, fused=fused
    )
    for _ in range(2):
        ours, theirs = trainer.step(data), loop.step(data)
        steps = range(networks.sampler.steps)
        expected = {
            "energy_loss": [theirs["energy_loss"]],
            "value_loss": [theirs[f"value_loss_{t}"] for t in steps],
            "sampler_loss": [theirs[f"sampler_loss_{i}"] for i in range(settings.sampler_steps)],
            "velocity_var": [theirs[f"velocity_{t}"] for t in range(networks.sampler.steps)],
        }
        for key, wanted in expected.items():
            actual = ours[key].reshape(-1)
            torch.testing.assert_close(
                actual, torch.tensor(wanted, device=actual.device), rtol=tolerance, atol=tolerance
            )
