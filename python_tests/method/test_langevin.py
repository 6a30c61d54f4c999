"""Langevin negatives: chains in plain float64, stationary density, the pool, resuming, ranks, settings."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runs
from dxmi_ext import cli, ops
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method import noise, schedules
from dxmi_ext.method.contrastive import LangevinTrainer
from dxmi_ext.method.langevin import Langevin, LangevinSettings, Pool
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d import recipe as two_d
from dxmi_ext.two_d.networks import EnergyMLP, SamplerMLP, ValueMLP
from groups import groups

B, D, T, CLASSES = 6, 3, 4, 3  # batch, data dimensions, steps of the sampler
SEED, ITERATIONS = 5, 6
SCHEDULE = schedules.variance_exploding(T, sigma_max=2.0, sigma_min=0.4)
KEY = ops.noise_key(11)


class Labeled(nn.Module):
    """An energy or value that shifts its input by class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.shift = network, nn.Embedding(CLASSES, D)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.network(x + self.shift(rest[-1]), *rest[:-1])


class Quadratic(nn.Module):
    """E(x) = |x - center|^2 / 2."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 1.5).square().sum(1) / 2


def make_networks(seed: int = 0, energy: nn.Module | None = None, labeled: bool = False) -> Networks:
    torch.manual_seed(seed)
    value: nn.Module = ValueMLP(D, T, width=8, depth=2)
    if labeled:
        value = Labeled(value)
    nn.init.normal_(next(p for p in reversed(list(value.parameters()))), std=0.4)
    return Networks(GaussianSampler(SamplerMLP(D, T, 8, 2), SCHEDULE, (D,)), value, energy).double()


def make_trainer(seed: int = 0, labeled: bool = False, **changes: Any) -> LangevinTrainer:
    defaults = {"negatives": "persistent", "langevin_steps": 3, "langevin_pool": 8, "langevin_restart": 0.3}
    settings = groups(**{**defaults, **changes})
    networks = make_networks(seed, labeled=labeled)
    return LangevinTrainer(networks, **settings, iterations=ITERATIONS, seed=SEED)


def batch(iteration: int, labeled: bool = False) -> Any:
    data = 1 + ops.normal((B, D), ops.noise_key(100 + iteration), dtype=torch.float64)
    return (data, (torch.arange(B) + iteration) % CLASSES) if labeled else data


# --- chains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("labeled", [False, True])
def test_a_chain_is_the_plain_loop(clip: float, separate: bool, labeled: bool) -> None:
    energy: nn.Module | None = EnergyMLP(D, 8, 2) if separate else None
    networks = make_networks(energy=Labeled(energy) if energy and labeled else energy, labeled=labeled)
    labels = torch.arange(B) % CLASSES if labeled else None
    start, steps, size, scale = batch(0), 5, 0.3, 0.2
    chains = Langevin(steps, size, scale, clip)(networks, start, KEY, labels, sample_offset=7)

    for row in range(B):
        x, squares, label = start[row].clone(), [], None if labels is None else labels[row : row + 1]
        for step in range(steps):
            x = x.detach().requires_grad_()
            networks.energy(x[None], label).backward()
            assert x.grad is not None
            slope = x.grad
            squares.append(slope.square().mean())
            if 0 < clip < slope.norm():
                slope = slope * clip / slope.norm()
            z = ops.normal((1, D), KEY, timestep=step, sample_offset=7 + row)[0].double()
            x = x.detach() - size * slope + scale * z
        torch.testing.assert_close(chains.samples[row], x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(chains.sq_gradient[row], torch.stack(squares).mean())
    assert not chains.diverged.any() and not chains.samples.requires_grad and not start.requires_grad


def test_chains_leave_the_weights_alone() -> None:
    networks = make_networks()
    Langevin(2, 0.1, 0.1)(networks, batch(0), KEY)
    assert all(p.requires_grad and p.grad is None for p in networks.parameters())


def test_stationary_density_is_the_boltzmann_density() -> None:
    """For a quadratic energy: mean 1.5 and variance tau / (1 - step / 2), which tends to tau."""
    settings = LangevinSettings(langevin_steps=150, langevin_step_size=0.1)
    langevin, n = Langevin.of(settings, tau=0.25), 20_000
    samples = langevin.sample(make_networks(energy=Quadratic()), n, KEY, batch_size=7000)
    variance = 0.25 / (1 - 0.1 / 2)
    assert samples.mean(0).sub(1.5).abs().max() < 4 * math.sqrt(variance / n)
    assert samples.var(0).sub(variance).abs().max() < 4 * variance * math.sqrt(2 / n)


def test_samples_depend_on_key_and_global_row_alone() -> None:
    networks, langevin = make_networks(), Langevin(4, 0.2, 0.3)
    whole = langevin.sample(networks, 11, KEY)
    parts = (
        langevin.sample(networks, 4, KEY),
        langevin.sample(networks, 7, KEY, sample_offset=4, batch_size=3),
    )
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert not torch.isclose(whole[0], whole[1]).any()
    assert langevin.sample(networks, 0, KEY).shape == (0, D)


class Cliff(nn.Module):
    """An energy that is NaN where x_0 > 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0].neg().sqrt() + x.square().sum(1)


def test_a_chain_that_diverges_ends_where_it_restarts() -> None:
    networks, start = make_networks(energy=Cliff()), batch(0)
    start[:, 0] = torch.tensor([-50.0, 1, -50, -50, 1, -50])
    for restart in (None, batch(1)):
        chains = Langevin(3, 0.01, 0.1, clip=1.0)(networks, start, KEY, restart=restart)
        assert chains.diverged.tolist() == [False, True, False, False, True, False]
        bad = chains.diverged
        assert torch.equal(chains.samples[bad], (start if restart is None else restart)[bad])
        assert chains.samples.isfinite().all() and (chains.samples[~bad] != start[~bad]).any()


# --- the pool ----------------------------------------------------------------------------------------


def test_chains_of_the_pool_continue_or_restart() -> None:
    pool, fresh = Pool(5, torch.zeros(0, D)), torch.full((2, D), 9.0)
    no, labels = torch.tensor([False, False]), torch.tensor([1, 2])
    assert torch.equal(pool.resume(torch.tensor([3, 4]), fresh, labels, no)[0], fresh)  # new chains
    pool.keep(torch.tensor([3, 4]), torch.ones(2, D), labels)
    start, kept = pool.resume(torch.tensor([4, 0]), fresh, torch.tensor([0, 0]), no)
    assert start[:, 0].tolist() == [1, 9] and kept is not None and kept.tolist() == [2, 0]
    start, kept = pool.resume(torch.tensor([4, 3]), fresh, torch.tensor([0, 0]), ~no)
    assert start[:, 0].tolist() == [9, 9] and kept is not None and kept.tolist() == [0, 0]


def test_picks_are_distinct_and_reach_every_chain() -> None:
    pool, draws = Pool(7, torch.zeros(0, D)), noise.Draws(0, "test", ["pick"])
    picks = [pool.pick(4, draws.at(i)["pick"]) for i in range(60)]
    assert all(len(pick.unique()) == 4 for pick in picks)
    assert torch.cat(picks).unique().tolist() == list(range(7))
    with pytest.raises(ConfigError, match="langevin_pool must be >= the batch size, 8, got 7"):
        pool.pick(8, KEY)


# --- the trainer -------------------------------------------------------------------------------------


def test_persistent_negatives_by_hand() -> None:
    """Two iterations over the whole pool: the second continues the chains of the first, with their labels."""
    trainer = make_trainer(labeled=True, langevin_pool=B, langevin_restart=0.0, gamma=0.7)
    pool = trainer.pool
    langevin, draws = (
        Langevin.of(trainer.langevin, trainer.algorithm.tau),
        noise.Draws(SEED, "langevin", ["chain", "pick", "restart"]),
    )
    assert pool is not None
    for iteration in range(2):
        keys, networks = draws.at(iteration), copy.deepcopy(trainer.networks)
        picked = pool.pick(B, keys["pick"])
        data, labels = batch(iteration, labeled=True)
        if iteration == 0:
            start, classes = networks.sampler.initial(B, keys["chain"]).detach(), labels
        else:
            start, classes = pool.samples[picked].clone(), pool.labels[picked].clone()
            assert not torch.equal(classes, labels)
        samples = langevin(networks, start, keys["chain"], classes).samples
        of_data, of_samples = networks.energy(data, labels), networks.energy(samples, classes)
        loss = of_data.mean() - of_samples.mean()
        loss += 0.7 * (of_data.square().mean() + of_samples.square().mean())
        metrics = trainer.step((data, labels))
        torch.testing.assert_close(metrics["energy_loss"], loss.detach())
        torch.testing.assert_close(pool.samples[picked], samples)
        assert torch.equal(pool.labels[picked], classes)


def test_only_the_energy_learns() -> None:
    trainer = make_trainer(negatives="short_run")
    before = copy.deepcopy(trainer.networks.state_dict())
    trainer.step(batch(0))
    moved = {
        name for name, now in trainer.networks.state_dict().items() if not torch.equal(now, before[name])
    }
    assert moved and all(name.startswith("value.") for name in moved)


@pytest.mark.parametrize("negatives", ["short_run", "persistent"])
@pytest.mark.parametrize("labeled", [False, True])
def test_resumes_to_the_bit(negatives: str, labeled: bool) -> None:
    straight, first = (make_trainer(negatives=negatives, labeled=labeled) for _ in range(2))
    for iteration in range(ITERATIONS):
        straight.step(batch(iteration, labeled))
    for iteration in range(3):
        first.step(batch(iteration, labeled))
    resumed = make_trainer(seed=1, negatives=negatives, labeled=labeled)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for iteration in range(3, ITERATIONS):
        resumed.step(batch(iteration, labeled))
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


class Split:
    """A rank of a run, simulated in this process; the rows of other ranks are given in advance."""

    def __init__(self, rank: int, world_size: int, rows: list[Tensor]) -> None:
        self.rank, self.world_size, self.alone, self._rows = rank, world_size, False, rows
        self.gathered: list[Tensor] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values

    def gather(self, rows: Tensor) -> Tensor:
        self.gathered.append(rows)
        return self._rows.pop(0)


def test_chains_do_not_depend_on_the_split() -> None:
    """Each of two ranks runs the chains that a single rank would run for its rows."""
    alone = make_trainer(value_lr=0.0)  # otherwise each energy would be trained on its own rows alone
    pools = []
    for iteration in range(3):
        before = copy.deepcopy(alone.pool)
        alone.step(batch(iteration))
        assert before is not None and alone.pool is not None
        picked = alone.pool.pick(B, alone._draws.at(iteration)["pick"])
        pools.append(alone.pool.samples[picked].clone())
    for rank in range(2):
        ranks: Any = Split(rank, 2, list(pools))
        split = make_trainer(value_lr=0.0)
        split.ranks = ranks
        half = slice(rank * B // 2, (rank + 1) * B // 2)
        for iteration in range(3):
            split.step(batch(iteration)[half])
            torch.testing.assert_close(ranks.gathered[-1], pools[iteration][half], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(split.pool.state_dict(), alone.pool.state_dict())  # type: ignore[union-attr]


def test_refined_negatives_start_from_the_samplers_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = groups(negatives="refined", langevin_steps=2)
    trainer, networks = (DxMITrainer(make_networks(), **settings, iterations=2, seed=SEED) for _ in range(2))
    keys = noise.Draws(SEED, "dxmi", ["rollout", "choice", "redraw0", "redraw1", "refine"]).at(0)
    samples = networks.sampler.sample(B, keys["rollout"])
    langevin = Langevin.of(settings["langevin"], settings["algorithm"].tau / D)
    refined = langevin(networks.networks, samples, keys["refine"]).samples
    energy = networks.networks.energy(refined).mean()
    torch.testing.assert_close(trainer.step(batch(0))["energy_sample"], energy.detach())


# --- settings and runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"negatives": "mcmc"},
            "negatives must be one of sampler, refined, short_run, persistent, got 'mcmc'",
        ),
        ({"langevin_steps": 0}, "langevin_steps must be >= 1, got 0"),
        ({"langevin_step_size": 0.0}, "langevin_step_size must be >= 1e-08, got 0.0"),
        ({"langevin_noise": -1.0}, "langevin_noise must be >= 0, got -1.0"),
        ({"langevin_restart": 1.5}, "langevin_restart must be <= 1, got 1.5"),
        ({"langevin_restart": math.nan}, "langevin_restart must be finite, got nan"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        groups(**changes)


def test_each_trainer_rejects_the_others_negatives() -> None:
    with pytest.raises(ConfigError, match="negatives must be short_run or persistent, got refined"):
        make_trainer(negatives="refined")
    with pytest.raises(ConfigError, match="negatives must be sampler or refined, got persistent"):
        DxMITrainer(make_networks(), DxMISettings(negatives="persistent"), iterations=1, seed=0)
    with pytest.raises(ConfigError, match="cuda_graph must be false"):
        make_trainer(cuda_graph=True)


def test_length_of_evaluation_chains() -> None:
    def steps(**changes: Any) -> int:
        negatives = changes.pop("negatives")
        return LangevinSettings(langevin_steps=20, **changes).sample_steps(negatives)

    assert steps(negatives="short_run") == 20
    assert steps(negatives="persistent") == 200
    assert steps(negatives="persistent", langevin_sample_steps=7) == 7


def test_a_run_resumes_and_says_what_its_samples_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["negatives=persistent", "langevin_pool=32", "langevin_steps=2", "langevin_sample_steps=5"]
    with runs.quick():
        assert runs.train(tmp_path / "dry", *settings, "--dry-run") == 0
        assert "langevin: one iteration" in capsys.readouterr().out and not (tmp_path / "dry").exists()
        assert runs.train(tmp_path / "first", *settings, "iterations=4", "lr_decay=constant") == 0
        assert runs.train(tmp_path / "first", *settings, "lr_decay=constant") == 0
        assert runs.train(tmp_path / "whole", *settings, "lr_decay=constant") == 0
    runs.assert_same_run(tmp_path / "first", tmp_path / "whole")
    summary = runs.read(tmp_path / "first" / "summary.json")
    assert summary["samples"] == "Langevin chains from noise, 5 steps each"
    assert summary["resumed_from"] == [4] and not (tmp_path / "first" / "paths.png").exists()
    assert cli.main(["sample", str(tmp_path / "first"), "n=10", "device=cpu"]) == 0
    cfg = config.load(two_d.Config, tmp_path / "first" / "config.yaml")
    assert "negatives: persistent" in two_d.table(cfg, dict.fromkeys(runs.SCORES, 0.5))
