"""Networks that see the levels of a step: their start, their heads, and training with any length."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dxmi_ext.engine.runs import config as config_file
from dxmi_ext.method.lengths import StepLevels
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d import model
from dxmi_ext.two_d.level_networks import LevelSamplerMLP, LevelValueMLP
from dxmi_ext.two_d.settings import Config

SETTINGS: dict[str, Any] = {"lengths": "2,3", "steps": 2, "step_input": "levels"}
SETTINGS |= {"sampler_width": 8, "value_width": 8}


def config(**more: Any) -> Config:
    return Config.of(SETTINGS | more)


def test_a_network_of_levels_is_initially_the_same_for_all_steps() -> None:
    levels = StepLevels([model.schedule_of(config(), steps) for steps in (2, 3)])
    network, value = LevelSamplerMLP(levels, 2, 8, 2), LevelValueMLP(levels, 2, 8, 2)
    x = torch.linspace(-2, 2, 12).view(6, 2)
    timestep, end = torch.arange(6), torch.full((6,), 5)
    assert not network(x, timestep).any()
    torch.testing.assert_close(value(x, timestep), value(x, end))
    torch.nn.init.normal_(value.head.last.weight)
    assert (value(x, timestep) != value(x, end)).tolist() == [True] * 5 + [False]
    value(x[:5], timestep[:5]).sum().backward()
    assert value.head.last.weight.grad is not None and value.energy.weight.grad is not None
    assert value.head.last.weight.grad.any() and not value.energy.weight.grad.any()


def test_a_shorter_chain_has_an_energy_of_its_own() -> None:
    networks, _ = model.build(config(), torch.device("cpu"))
    sampler, value, x = networks.sampler, networks.value, torch.linspace(-2, 2, 12).view(6, 2)
    assert isinstance(value, LevelValueMLP)
    sampler.use(3)
    longest = networks.energy(x)
    torch.nn.init.normal_(value.head.last.weight)
    assert torch.equal(networks.energy(x), longest)
    sampler.use(2)
    assert (networks.energy(x) != longest).all()
    networks.energy(x).sum().backward()
    assert value.energy.weight.grad is not None and not value.energy.weight.grad.any()


@pytest.mark.parametrize("kind", ["per_step", "separate"])
def test_training_resumes_and_its_result_serves_any_length(kind: str) -> None:
    data = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def trainer() -> DxMITrainer:
        networks, _ = model.build(config(value_kind=kind), torch.device("cpu"))
        return DxMITrainer(networks, config().algorithm, iterations=8, seed=0)

    first, second = trainer(), trainer()
    for _ in range(3):
        first.step(data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(second.step(data), first.step(data), rtol=0, atol=0)
    assert all(weights.grad is not None for weights in first.sampler.std_weights())
    sampler = first.averaged.sampler
    sampler.use(7)
    assert sampler.rollout(4, torch.tensor([0, 0])).samples.shape == (8, 4, 2)
    assert first.averaged.energy(data).isfinite().all() and first.sampler.lengths == (2, 3)
    assert first.averaged.guide(0.1)(data, sampler.timestep(0, 16), None).isfinite().all()


def test_a_fixed_last_sigma_is_fixed_in_the_averaged_and_in_the_saved_sampler(tmp_path: Path) -> None:
    cfg = config(train_last_std=False, log_std_lr=0.1)
    networks, _ = model.build(cfg, torch.device("cpu"))
    trainer = DxMITrainer(networks, cfg.algorithm, iterations=8, seed=0)
    for _ in range(3):
        trainer.step(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    model.save(tmp_path / "model", trainer.averaged)
    config_file.save(cfg, tmp_path / "config.yaml")
    _, loaded = model.load(tmp_path, torch.device("cpu"))
    for sampler in (trainer.sampler, trainer.averaged.sampler, loaded.sampler):
        last = sampler.after(torch.arange(sampler.end)) == sampler.end
        start = torch.cat([model.schedule_of(cfg, steps).log_std for steps in (2, 3)]).float()
        assert torch.equal(sampler.log_std[last], start[last])
        assert not torch.isclose(sampler.log_std, start)[~last].any()
