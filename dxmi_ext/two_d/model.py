"""Networks and schedule of a 2D run: construction, saving, loading. Imports torch and the method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext.engine.runs.identity import settings_of
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.method import schedules
from dxmi_ext.method.langevin import Langevin
from dxmi_ext.method.lengths import AnyLengthSampler, MultiLengthSampler, StepLevels
from dxmi_ext.method.networks import Networks, TimeIndependent
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.two_d.level_networks import LevelSamplerMLP, LevelValueMLP
from dxmi_ext.two_d.networks import EnergyMLP, SamplerMLP, ValueMLP
from dxmi_ext.two_d.settings import Config, NetworkSettings
from dxmi_ext.two_d.sources import Units

SIGMA_DATA = 2.0
"""Standard deviation of the data for EDM, about that of the 8 Gaussians; checkerboard 2.3, spirals 1.6."""


def build(cfg: Config, device: torch.device) -> tuple[Networks, schedules.Schedule]:
    """The networks, initialized from the seed, and the sampler's schedule."""
    chains = [schedule_of(cfg, steps) for steps in cfg.chain.all_steps]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        networks = _of_levels(cfg, chains) if cfg.networks.step_input == "levels" else _of_rows(cfg, chains)
    if isinstance(networks.sampler, MultiLengthSampler):
        networks.sampler.favors_short = cfg.chain.length_draw == "short"
    networks.sampler.use(cfg.chain.steps)
    return networks.to(device), schedules.joined(chains)


def _of_rows(cfg: Config, chains: Sequence[schedules.Schedule]) -> Networks:
    """Networks that look up a row for each step."""
    lengths, sizes = cfg.chain.all_steps, cfg.networks
    network = SamplerMLP(2, sum(lengths), *_of_sampler(sizes))
    value, energy = _values(sizes, lambda: ValueMLP(2, lengths, *_of_value(sizes)))
    schedule = schedules.joined(chains)
    if len(chains) == 1:
        return Networks(GaussianSampler(network, schedule, (2,)), value, energy)
    return Networks(MultiLengthSampler(network, schedule, (2,), lengths), value, energy)


def _of_levels(cfg: Config, chains: Sequence[schedules.Schedule]) -> Networks:
    """Networks that see the noise levels of a step."""
    levels, sizes = StepLevels(chains), cfg.networks
    network = LevelSamplerMLP(levels, 2, *_of_sampler(sizes))
    value, energy = _values(sizes, lambda: LevelValueMLP(levels, 2, *_of_value(sizes)))
    schedule, last = functools.partial(schedule_of, cfg), cfg.algorithm.train_last_std
    lengths = cfg.chain.all_steps
    sampler = AnyLengthSampler(network, schedule, (2,), lengths, levels, train_last_std=last)
    sampler.random_spacing = cfg.networks.random_spacing
    return Networks(sampler, value, energy)


def _values(sizes: NetworkSettings, of_steps: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module | None]:
    """The value and, if it is not part of it, the energy."""
    if sizes.value_kind == "time_independent":
        return TimeIndependent(EnergyMLP(2, *_of_value(sizes))), None
    value = of_steps()
    return value, EnergyMLP(2, *_of_value(sizes)) if sizes.value_kind == "separate" else None


def _of_sampler(sizes: NetworkSettings) -> tuple[int, int, int]:
    return sizes.sampler_width, sizes.sampler_depth, sizes.octaves


def _of_value(sizes: NetworkSettings) -> tuple[int, int, int]:
    return sizes.value_width, sizes.value_depth, sizes.octaves


def save(path: Path, networks: Networks, units: Units | None = None, tau_factor: float = 1.0) -> None:
    """Saves final networks.

    Args:
        units: of the points of a file, which the networks see standardized.
        tau_factor: factor of tau at the end of the run, if it was automatic.
    """
    about: dict[str, Any] = {"task": "two_d", "tau_factor": tau_factor}
    if units is not None:
        about["units"] = units._asdict()
    checkpoint.save_model(path, networks, about)


def load(directory: Path, device: torch.device) -> tuple[Config, Networks]:
    """A run's settings and final networks, which see points of a file standardized (`units_of`).

    Raises:
        checkpoint.CheckpointError: they are missing or damaged.
    """
    tensors, _ = checkpoint.load_model_state(directory / "model", device)
    cfg = settings_of(Config, directory)
    with checkpoint.fitting(directory):
        networks, _ = build(cfg, device)
        networks.load_state_dict(tensors)
    return cfg, networks.eval()


def units_of(directory: Path) -> Units | None:
    """The units of the points of a file that a run was trained on; None for a density."""
    _, about = checkpoint.load_model_state(directory / "model")
    return Units(**about["units"]) if "units" in about else None


def draw(cfg: Config, networks: Networks, n: int, key: Tensor, batch_size: int = 4096) -> Tensor:
    """Samples [n, 2] of the sampler, or of Langevin chains if none was trained."""
    if cfg.algorithm.trains_sampler:
        return networks.sampler.sample(n, key, batch_size=batch_size)
    return chains(cfg).sample(networks, n, key, batch_size=batch_size)


def chains(cfg: Config) -> Langevin:
    """Langevin chains for an energy trained without a sampler."""
    steps = cfg.langevin.sample_steps(cfg.algorithm.negatives)
    return dataclasses.replace(Langevin.of(cfg.langevin, cfg.algorithm.tau), steps=steps)


def schedule_of(cfg: Config, steps: int, places: Tensor | None = None) -> schedules.Schedule:
    """The schedule of a chain of ``steps`` steps; ``places`` is for variance exploding levels."""
    chain = cfg.chain
    if chain.schedule == "ddpm":
        return schedules.ddpm(schedules.make_betas(steps=steps), min_std=chain.min_std)
    if chain.schedule == "respaced_ddpm":  # starts from pure noise
        return schedules.ddim(steps, eta=1.0, spacing="trailing", min_std=chain.min_std)
    levels: dict[str, Any] = {
        "sigma_max": chain.sigma_max,
        "sigma_min": chain.sigma_min,
        "min_std": chain.min_std,
        "places": places,
    }
    if chain.schedule == "edm":
        return schedules.edm(steps, sigma_data=SIGMA_DATA, **levels)
    return schedules.variance_exploding(steps, **levels)
