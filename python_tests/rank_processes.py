"""Functions that the ranks of test_ranks.py and test_checkpoint.py run; processes import them by name."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

import runs
from dxmi_ext import ops
from dxmi_ext.engine.compute import execution, sharding
from dxmi_ext.engine.compute.ranks import RankError, Ranks, Votes
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.learning.health import Diverged
from dxmi_ext.engine.runs.signals import Stopped
from dxmi_ext.engine.storage import checkpoint, tensor_files
from dxmi_ext.method import schedules
from dxmi_ext.method.contrastive import LangevinTrainer
from dxmi_ext.method.denoising import Pretrainer, uniform_levels
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d import densities
from dxmi_ext.two_d import recipe as two_d
from dxmi_ext.two_d.networks import EnergyMLP, SamplerMLP, ValueMLP
from groups import groups

B, D, T = 12, 3, 4  # global batch, data dimensions, steps
ITERATIONS = 3
SCHEDULE = schedules.variance_exploding(T, sigma_max=2.0, sigma_min=0.4)


def make_trainer(ranks: Ranks, *, separate: bool = False, device: str = "cpu", **changes: Any) -> Any:
    """A trainer of float64 networks, which are pretrained by the same ranks."""
    torch.manual_seed(0)
    sampler = GaussianSampler(SamplerMLP(D, T, width=8, depth=2), SCHEDULE, (D,))
    energy = EnergyMLP(D, width=8, depth=2) if separate else None
    networks = Networks(sampler, ValueMLP(D, T, width=8, depth=2), energy).double().to(device)
    settings = groups(sampler_steps=2, value_clip=0.3, **changes)
    execution.BACKEND = "aot_eager"  # torch.compile without a compiler
    length: dict[str, Any] = {"iterations": ITERATIONS, "seed": 1, "ranks": ranks}
    execution.prepare(settings["execution"], sampler.network, data_shape=(D,))
    levels = uniform_levels(SCHEDULE.signal, SCHEDULE.noise)
    pretrainer = Pretrainer(sampler.network, levels, lr=1e-2, execution=settings["execution"], **length)
    for i in range(ITERATIONS):
        pretrainer.step(batch(ranks, 10 + i, device))
    trains = DxMITrainer if settings["algorithm"].trains_sampler else LangevinTrainer
    return trains(networks, **settings, **length)


def batch(ranks: Ranks, iteration: int, device: str = "cpu") -> Tensor:
    """This rank's rows of a batch."""
    count, offset = ranks.rows(B)
    key = ops.noise_key(iteration, device=device)
    return ops.normal((count, D), key, sample_offset=offset, dtype=torch.float64)


def gathered(state: Any) -> Any:
    """A state with whole tensors on the CPU."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if sharding.is_sharded(state):
        state = state.full_tensor()
    return state.detach().cpu().clone() if isinstance(state, Tensor) else state


def trained(ranks: Ranks, changes: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """The state and the metrics after some iterations."""
    trainer = make_trainer(ranks, device=device, **changes)
    metrics = [trainer.step(batch(ranks, i, device)) for i in range(ITERATIONS)]
    averaged = ranks.whole(trainer.averaged)
    if ranks.first:  # where it is whole
        averaged.sampler.sample(2, ops.noise_key(0, device=device))
    return {"state": gathered(trainer.state_dict()), "metrics": gathered(metrics)}


# --- processes ---------------------------------------------------------------------------------------


def spawn(world_size: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """The results of `function(ranks, *args)` on each rank; `options` are arguments of `Ranks`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        everything = (world_size, port, results, options, function, args)
        multiprocessing.spawn(_process, everything, nprocs=world_size)
        return [results.get(rank) for rank in range(world_size)]


def _process(
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    options: dict[str, Any],
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    results[rank] = function(Ranks(rank, world_size, rank, **options), *args)


def train(ranks: Ranks, cases: list[dict[str, Any]], kind: str = "cpu") -> list[dict[str, Any]]:
    """The results of `trained` for each case, which gives its changes and `shard`."""
    device = f"cuda:{ranks.local_rank}" if kind == "cuda" else kind
    results = []
    with ranks.joined(torch.device(kind)):
        for case in cases:
            changes = dict(case)
            ranks.shard = changes.pop("shard")
            results.append(trained(ranks, changes, device))
    return results


def train_unused_weights(ranks: Ranks) -> str:
    """The error for a network with a part that is not called."""
    with ranks.joined(torch.device("cpu")):
        network = SamplerMLP(D, T, width=8, depth=2)
        network.idle = torch.nn.Linear(1, 1)
        levels = uniform_levels(SCHEDULE.signal, SCHEDULE.noise)
        pretrainer = Pretrainer(network, levels, lr=1e-2, iterations=ITERATIONS, seed=1, ranks=ranks)
        with pytest.raises(UserError) as caught:
            for i in range(ITERATIONS):
                pretrainer.step(batch(ranks, i).float())
        return str(caught.value)


def train_past_nans(ranks: Ranks, cases: list[tuple[str, bool]]) -> dict[tuple[str, bool], Any]:
    """Three iterations for each (place, shard), where rank 1 meets a NaN in the second. Returns the weights,
    the failures and the velocity variance after each iteration."""
    results = {}
    with ranks.joined(torch.device("cpu")):
        for place, ranks.shard in cases:
            trainer = make_trainer(ranks, separate=True)
            stories: list[Any] = []
            for i in range(3):
                with pytest.MonkeyPatch.context() as patch:
                    if i == 1 and ranks.rank == 1:
                        _break(patch, trainer, place)
                    trainer.step(batch(ranks, i))
                weights = gathered(dict(trainer.networks.named_parameters()))
                failures = max(count.item() for count in trainer.parts()["failures"].values())
                stories.append((weights, failures, trainer.costs.velocity_var.clone()))
            results[place, ranks.shard] = stories
    return results


def _break(patch: pytest.MonkeyPatch, trainer: DxMITrainer, place: str) -> None:
    def poisoned(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*args, **kwargs) * torch.nan

    if place == "energy":
        patch.setattr(ops, "energy_loss", poisoned(ops.energy_loss))
    elif place == "value":
        patch.setattr(ops, "td_target", poisoned(ops.td_target))
    elif place == "sampler":
        patch.setattr(ops, "running_cost", poisoned(ops.running_cost))
    else:  # the whole path, which affects all networks
        patch.setattr(trainer.sampler, "initial", poisoned(trainer.sampler.initial))


def leave_or_wait(ranks: Ranks, control: bool) -> None:
    """Rank 1 dies; rank 0 notices when it waits for an answer."""
    with pytest.raises(RankError, match="rank 0 lost contact"), ranks.joined(torch.device("cpu")):
        assert ranks.agree([1, "both"]) == [1, "both"] and ranks.any(ranks.rank == 1)
        assert ranks.exchange("a" * ranks.rank) == ["", "a"]
        votes = Votes(ranks)
        votes.ask(0, False)
        if ranks.rank == 1:
            os._exit(0)
        if not control:
            ranks.mean({"loss": torch.ones(())})
        for i in range(1, 3):
            votes.ask(i, False)


def vote(ranks: Ranks) -> list[int]:
    """The iterations after which this rank knows that rank 1 asks to stop: in iteration 3, and in the last
    iteration of another phase, where the first rank takes longer than the timeout of data."""
    stops = []
    with ranks.joined(torch.device("cpu")):
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        backend._set_default_timeout(timedelta(seconds=0.1))
        for wanted in (3, 5):
            votes = Votes(ranks)
            for iteration in range(6):
                last = iteration == 5
                if ranks.first and last:
                    time.sleep(0.5)
                flag = ranks.rank == 1 and iteration >= wanted
                answers = [votes.ask(iteration, flag, wait=last) for _ in range(2)]
                assert answers[0] == answers[1]
                if answers[0]:
                    stops.append(iteration)
                    break
        assert votes._pending is None
    return stops


def stopped_run(ranks: Ranks, folder: Path, settings: list[str]) -> bool:
    """A run in which only rank 1 gets a signal, in its eighth iteration."""
    sample, calls = densities.sample, iter(range(10**9))

    def sampled(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 7 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    with runs.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(densities, "sample", sampled)
        cfg = runs.config_of(folder, *settings)
        with ranks.joined(torch.device("cpu")):
            try:
                two_d.train(cfg, ranks)
            except Stopped:
                return True
    return False


def run_gone_bad(ranks: Ranks, folder: Path, settings: list[str], bad_attempts: int) -> tuple[Any, str]:
    """A run in which only rank 1 meets NaNs, from the fourth iteration of DxMI on, in the first attempts.
    Returns the averaged weights, or None and the error that stopped it."""
    iterate, made = DxMITrainer._run, []

    def iteration(self: DxMITrainer, keys: Tensor, data: Tensor, *args: Any) -> Any:
        made.append(self)
        bad = ranks.rank == 1 and self.iteration >= 3 and self.learners[0].rates.scale > 0.5**bad_attempts
        return iterate(self, keys, data * torch.nan if bad else data, *args)

    with runs.quick(), pytest.MonkeyPatch.context() as patch, ranks.joined(torch.device("cpu")):
        patch.setattr(DxMITrainer, "_run", iteration)
        try:
            two_d.train(runs.config_of(folder, *settings), ranks)
        except Diverged as error:
            return None, str(error)
        return gathered([p.detach() for p in made[-1].averaged.parameters()]), ""


def resumed_run(ranks: Ranks, folder: Path, settings: list[str]) -> None:
    with runs.quick(), ranks.joined(torch.device("cpu")):
        two_d.train(runs.config_of(folder, *settings), ranks)


def refused_run(ranks: Ranks, folder: Path) -> str:
    """The error that refuses a run."""
    with ranks.joined(torch.device("cpu")), pytest.raises(UserError) as refused:
        two_d.train(runs.config_of(folder), ranks)
    return str(refused.value)


# --- checkpoints -------------------------------------------------------------------------------------


def save_on_the_way(ranks: Ranks, root: Path) -> Any:
    """The state after all iterations, saved after two of them."""
    with ranks.joined(torch.device("cpu")):
        trainer = make_trainer(ranks, separate=True)
        for i in range(ITERATIONS):
            if i == 2:
                checkpoint.save(root, i, trainer.state_dict(), keep=1, ranks=ranks)
            trainer.step(batch(ranks, i))
        return gathered(trainer.state_dict())


def go_on_from(ranks: Ranks, *paths: Path) -> list[Any]:
    """The states after all iterations, from checkpoints after two of them."""
    states = []
    with ranks.joined(torch.device("cpu")):
        for path in paths:
            trainer = make_trainer(ranks, separate=True)
            trainer.load_state_dict(checkpoint.load(path, ranks=ranks, lazy=ranks.shard))
            trainer.step(batch(ranks, 2))
            states.append(gathered(trainer.state_dict()))
    return states


def die_in_a_save(ranks: Ranks, root: Path) -> None:
    with pytest.raises(RankError, match="rank 0 lost contact"), ranks.joined(torch.device("cpu")):
        state = make_trainer(ranks).state_dict()
        checkpoint.save(root, 1, state, keep=1, ranks=ranks)
        if ranks.rank == 1:
            tensor_files.write_tensors = lambda *_: os._exit(0)  # type: ignore[assignment]
        checkpoint.save(root, 2, state, keep=1, ranks=ranks)
