"""Several ranks train what one would: gloo processes on the CPU against a single one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from dxmi_ext import noise, ops, schedules
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
    """Pretraining and DxMI on this rank's rows; what has become of everything. A bad rank meets a NaN in its
    data in the second iteration."""
    separate = changes.pop("separate", False)
    networks, settings = make_networks(separate), DxMISettings(sampler_steps=2, value_clip=0.3, **changes)
    count, offset = ranks.rows(B)

    def batch(iteration: int) -> torch.Tensor:
        data = ops.normal((count, D), ops.noise_key(iteration), sample_offset=offset, dtype=torch.float64)
        if iteration == 1 and ranks.rank == bad_rank:
            data[0, 0] = torch.nan
        return data

    networks.sampler.network.float()
    pretrainer = Pretrainer(networks.sampler, SCHEDULE, lr=1e-2, iterations=ITERATIONS, seed=1, ranks=ranks)
    for i in range(ITERATIONS):
        pretrainer.step(batch(10 + i).float())
    networks.sampler.network.double()
    trainer = DxMITrainer(networks, settings, iterations=ITERATIONS, seed=1, ranks=ranks)
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
    multiprocessing.spawn(process, args, nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (3, {"separate": True, "td_order": "shuffled", "td_redraw": True}),
        (2, {"sampler_update": "policy_gradient"}),
    ],
)
def test_ranks_train_what_one_would(world_size: int, changes: dict[str, Any], tmp_path: Path) -> None:
    alone = train(Ranks(), dict(changes), None)
    together = train_on(world_size, tmp_path, changes)
    for other in together[1:]:
        torch.testing.assert_close(other, together[0], rtol=0, atol=0)
    # float32 is the precision of pretraining alone
    torch.testing.assert_close(together[0], alone, rtol=1e-4, atol=1e-5)


def test_a_nan_on_one_rank_moves_no_weight_on_any(tmp_path: Path) -> None:
    """The energy step of the second iteration is skipped everywhere; the run goes on with the third."""
    (first, second) = train_on(2, tmp_path, {"separate": True}, bad_rank=1)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    failures = [metrics["failures"].item() for metrics in first["metrics"]]
    assert failures == [0, 1, 0]
    assert all(value.isfinite().all() for value in first["state"]["networks"].values())


def leave_or_wait(rank: int, port: int) -> None:
    """Rank 1 dies; rank 0 learns of it where it needs an answer."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks(rank, 2, rank)
    with pytest.raises(RankError, match="rank 0 lost contact"), ranks.joined(torch.device("cpu")):
        assert ranks.agree([1, "both"]) == [1, "both"] and ranks.any(rank == 1)
        if rank == 1:
            os._exit(0)
        ranks.mean({"loss": torch.ones(())})


def test_a_rank_that_dies_ends_the_others() -> None:
    multiprocessing.spawn(leave_or_wait, (free_port(),), nprocs=2)


def test_rows_of_a_batch() -> None:
    assert [Ranks(rank, 3).rows(12) for rank in range(3)] == [(4, 0), (4, 4), (4, 8)]
    with pytest.raises(ValueError, match="batch_size: got 10, which 3 ranks do not divide"):
        Ranks(0, 3).rows(10)


def test_the_world_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks() and Ranks().alone
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks = Ranks.from_environment()
    assert ranks == Ranks(5, 8, 1) and not ranks.first


def test_choices_are_keyed_by_the_global_row() -> None:
    key = ops.noise_key(3)
    whole = noise.randint(T, B, key)
    parts = [noise.randint(T, 4, key, sample_offset=4 * i) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)
