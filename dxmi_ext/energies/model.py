"""The target and the chain of a run: building, saving and loading.

Imports torch, the engine and the method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dxmi_ext.energies import custom
from dxmi_ext.energies.annealing import shape_of
from dxmi_ext.energies.chains import Chain, GradientChain, PolicyChain
from dxmi_ext.energies.networks import Policy, Start, TargetEnergy, Value
from dxmi_ext.energies.policy import raise_stds_
from dxmi_ext.energies.schedule import Levels, levels, policy_schedule
from dxmi_ext.energies.settings import Config
from dxmi_ext.energies.targets import TARGETS, Target
from dxmi_ext.engine.runs.identity import settings_of
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.method import noise
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler


def target_of(cfg: Config) -> tuple[Target, str | None]:
    """The target of a run's settings, and a hash of its source if it is a user's own.

    Raises:
        ConfigError: no target is given, dim or particles do not fit energy=, or `custom.load` fails.
    """
    s = cfg.target
    if s.target is not None:
        assert s.dim is not None
        return custom.load(s.target, s.dim, s.particles, cfg.chain.scale)
    if s.energy is None:
        raise ConfigError("target must be MODULE:FUNCTION, got null")
    target = TARGETS[s.energy]()
    if s.dim not in (None, target.dim):
        raise ConfigError(f"dim must be {target.dim} with energy={s.energy}, got {s.dim}")
    if s.particles != target.particles:
        wanted, got = ("null" if each is None else each for each in (target.particles, s.particles))
        raise ConfigError(f"particles must be {wanted} with energy={s.energy}, got {got}")
    return target, None


def levels_of(cfg: Config) -> Levels:
    s = cfg.chain
    return levels(s.schedule, s.spacing, s.steps, s.var_first, s.var_last, s.scale)


def build(cfg: Config, target: Target, device: torch.device, *, looks: bool = True) -> Chain:
    """A chain, its weights drawn from the seed. A policy's is a `PolicyChain` of its networks.

    Args:
        looks: whether units and start of per_dimension are found by annealing; if not, they are loaded
            afterwards.
    """
    levels, temperature = levels_of(cfg), cfg.target.temperature
    energy = TargetEnergy(target, cfg.target.energy_limit)
    start = Start(float(levels.spread[0]))
    if cfg.chain.per_dimension:
        start = _start_of(cfg, energy, levels, looks=looks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        s = cfg.networks
        value = Value(energy, levels, temperature, s.value_width, s.value_depth, s.octaves)
        if cfg.chain.sampler == "vgs":
            damped = cfg.chain.damped_steps
            chain = GradientChain(start, value, energy, levels, target.free, temperature, damped=damped)
            return chain.to(device)
        network: nn.Module = Policy(energy, levels, temperature, s.sampler_width, s.sampler_depth, s.octaves)
    sampler = GaussianSampler(network, policy_schedule(levels), (target.free,), start=start)
    raise_stds_(sampler.log_std, levels.variance.float(), cfg.policy.std_floor)
    # Steps do not use the start, and DistributedDataParallel would wait for its gradient.
    own = [f"start.{name}" for name, _ in start.named_parameters()]
    sampler._ddp_params_and_buffers_to_ignore = own  # type: ignore[assignment]
    networks = Networks(sampler, value, energy).to(device)
    return PolicyChain(networks, levels.variance.float().to(device), temperature)


def _start_of(cfg: Config, energy: TargetEnergy, levels: Levels, *, looks: bool) -> Start:
    """The start of each dimension; the energy gets its units."""
    free, spread = energy.target.free, float(levels.spread[0])
    if not looks:
        return Start(torch.full((free,), spread), torch.zeros(free))
    key = noise.Draws(cfg.run.seed, "shape of the target", ["all"], torch.device("cpu")).at(0)["all"]
    shape = shape_of(energy, cfg.target.temperature, cfg.chain.scale, key)
    energy.widths.copy_(shape.mode_std / shape.mode_std.min())
    std = (shape.std / energy.widths).square() + float(levels.noise[0]) ** 2
    return Start(std.sqrt(), shape.mean / energy.widths)


def save(path: Path, chain: Chain) -> None:
    """Saves a final chain."""
    checkpoint.save_model(path, chain, {"task": "energies"})


def load(directory: Path, device: torch.device) -> tuple[Config, Target, Chain]:
    """A run's settings, target and final chain.

    Raises:
        checkpoint.CheckpointError: the model is missing or damaged.
        ConfigError: the target cannot be loaded, or its source has changed.
    """
    tensors, _ = checkpoint.load_model_state(directory / "model", device)
    cfg = settings_of(Config, directory)
    target, source = target_of(cfg)
    if source != cfg.target.target_source:
        raise ConfigError(
            f"target: the module of {cfg.target.target} must be the one that {directory} was trained on, but "
            "its source has changed"
        )
    with checkpoint.fitting(directory):
        chain = build(cfg, target, device, looks=False)
        chain.load_state_dict(tensors)
    return cfg, target, chain.eval()


def about(cfg: Config) -> dict[str, Any]:
    """Settings of the target and the sampler that the summary repeats."""
    values = cfg.flat()
    return {key: values[key] for key in ("energy", "target", "target_source", "sampler", "steps")}
