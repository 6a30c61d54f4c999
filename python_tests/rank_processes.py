"""What the ranks of test_ranks.py run: processes import it by name. May import dxmi_ext."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from dxmi_ext import ops, schedules, speed
from dxmi_ext.contrastive import LangevinTrainer
from dxmi_ext.models.mlp import EnergyMLP, SamplerMLP, ValueMLP
from dxmi_ext.networks import Networks
from dxmi_ext.pretrain import Pretrainer
from dxmi_ext.ranks import RankError, Ranks
from dxmi_ext.sampler import GaussianSampler
from dxmi_ext.trainer import DxMISettings, DxMITrainer

B, D, T = 12, 3, 4  # global batch, data dimensions, steps
ITERATIONS = 3
SCHEDULE = schedules.variance_exploding(T, sigma_max=2.0, sigma_min=0.4)


def make_networks(separate: bool) -> Networks:
    torch.manual_seed(0)
    sampler = GaussianSampler(SamplerMLP(D, T, width=8, depth=2), SCHEDULE, (D,))
    energy = EnergyMLP(D, width=8, depth=2) if separate else None
    return Networks(sampler, ValueMLP(D, T, width=8, depth=2), energy).double()


def train(ranks: Ranks, changes: dict[str, Any], bad_rank: int | None) -> dict[str, Any]:
    """Pretraining and DxMI, or its Langevin baseline, on this rank's rows; what became of everything. A bad
    rank meets a NaN in its data in the second iteration."""
    separate = changes.pop("separate", False)
    speed.BACKEND = "aot_eager"  # torch.compile without a compiler
    networks, settings = make_networks(separate), DxMISettings(sampler_steps=2, value_clip=0.3, **changes)
    count, offset = ranks.rows(B)

    def batch(iteration: int) -> torch.Tensor:
        data = ops.normal((count, D), ops.noise_key(iteration), sample_offset=offset, dtype=torch.float64)
        if iteration == 1 and ranks.rank == bad_rank:
            data[0, 0] = torch.nan
        return data

    networks.sampler.network.float()
    length: dict[str, Any] = {"iterations": ITERATIONS, "seed": 1, "ranks": ranks}
    pretrainer = Pretrainer(networks.sampler, SCHEDULE, lr=1e-2, settings=settings, **length)
    for i in range(ITERATIONS):
        pretrainer.step(batch(10 + i).float())
    networks.sampler.network.double()
    trains = DxMITrainer if settings.trains_sampler else LangevinTrainer
    trainer = trains(networks, settings, **length)
    metrics = [trainer.step(batch(i)) for i in range(ITERATIONS)]
    return {"state": trainer.state_dict(), "metrics": metrics}


def process(rank: int, world_size: int, port: int, folder: Path, *args: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = Ranks(rank, world_size, rank)
    with ranks.joined(torch.device("cpu")):
        torch.save(train(ranks, *args), folder / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_on(
    world_size: int, folder: Path, changes: dict[str, Any], bad_rank: int | None = None
) -> list[Any]:
    """The results of every rank."""
    args = (world_size, free_port(), folder, changes, bad_rank)
    spawn(process, *args, processes=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def leave_or_wait(rank: int, port: int) -> None:
    """Rank 1 dies; rank 0 learns of it where it needs an answer."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks(rank, 2, rank)
    with pytest.raises(RankError, match="rank 0 lost contact"), ranks.joined(torch.device("cpu")):
        assert ranks.agree([1, "both"]) == [1, "both"] and ranks.any(rank == 1)
        if rank == 1:
            os._exit(0)
        ranks.mean({"loss": torch.ones(())})


def spawn(function: Any, *args: Any, processes: int) -> None:
    multiprocessing.spawn(function, args, nprocs=processes)
