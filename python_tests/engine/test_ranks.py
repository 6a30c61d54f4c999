"""Several ranks give the result of one: gloo processes on the CPU against a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import rank_processes
import runs
from dxmi_ext import ops
from dxmi_ext.engine.compute.ranks import RankError, Ranks
from dxmi_ext.engine.output.runlog import read_metrics
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.method import noise
from rank_processes import B, T, spawn

SHUFFLED = {"separate": True, "td_order": "shuffled", "td_redraw": True}
SCORED = {"sampler_update": "policy_gradient", "train_last_std": False, "data_noise": 0.1}
CHAINS = {"negatives": "persistent", "langevin_pool": 20, "langevin_steps": 3}


@pytest.mark.parametrize(
    ("world_size", "settings", "unsharded"),
    [(2, [{}, SCORED], {"compile": True}), (3, [SHUFFLED], CHAINS)],
)
def test_ranks_train_what_one_would(
    world_size: int, settings: list[dict[str, Any]], unsharded: dict[str, Any]
) -> None:
    cases = [changes | {"shard": shard} for changes in settings for shard in (False, True)]
    cases += [unsharded | {"shard": False}]
    assert_trained_as_by_one(cases, spawn(world_size, rank_processes.train, cases))


@pytest.mark.gpu
def test_ranks_with_a_device_each_train_what_one_would() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    cases = [SHUFFLED | {"shard": shard} for shard in (False, True)]
    assert_trained_as_by_one(cases, spawn(2, rank_processes.train, cases, "cuda"), "cuda")


def assert_trained_as_by_one(
    cases: list[dict[str, Any]], ranks: list[list[dict[str, Any]]], device: str = "cpu"
) -> None:
    for case, *together in zip(cases, *ranks, strict=True):
        for other in together[1:]:
            torch.testing.assert_close(other, together[0], rtol=0, atol=0)
        alone = rank_processes.trained(Ranks(), {k: v for k, v in case.items() if k != "shard"}, device)
        for metrics in (*together[0]["metrics"], *alone["metrics"]):
            for name in ("data_spread", "sample_spread", "energy_spread"):  # means over the ranks
                del metrics[name]
        torch.testing.assert_close(together[0], alone, rtol=1e-6, atol=1e-7)


def test_a_nan_on_one_rank_moves_no_weight_on_any() -> None:
    """The network whose step meets the NaN does not change in that iteration; the others do."""
    networks = {"energy_network", "value", "sampler"}
    hit = {"energy": {"energy_network"}, "value": {"value"}, "sampler": {"sampler"}, "path": networks}
    cases = [(place, shard) for place in hit for shard in (False, True)]
    first, second = spawn(2, rank_processes.train_past_nans, cases)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for (place, _), story in first.items():
        (before, _, _), (after, failures, velocity_var), (later, recovered, _) = story
        assert moved(before, after) == networks - hit[place]
        assert moved(after, later) == networks
        assert failures > 0 and recovered == 0
        assert velocity_var.isfinite().all() and all(weight.isfinite().all() for weight in later.values())


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The networks whose weights differ."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_statistics_of_each_rank_alone_are_refused() -> None:
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match=r"no BatchNorm1d with several ranks, .* got one at '0'; see"):
        Ranks(0, 2).wrap(network)


def test_weights_that_are_not_used_are_one_line() -> None:
    for error in spawn(2, rank_processes.train_unused_weights):
        assert error.startswith("with several ranks, networks must use all their weights in every call")


@pytest.mark.parametrize("control", [False, True])
def test_a_rank_that_dies_ends_the_others(control: bool) -> None:
    spawn(2, rank_processes.leave_or_wait, control)


def test_all_ranks_stop_after_the_same_iteration() -> None:
    assert spawn(2, rank_processes.vote) == [[4, 5], [4, 5]]


@pytest.mark.parametrize("shard", ["true", "false"])
def test_a_signal_to_one_rank_stops_all_and_any_number_resumes(tmp_path: Path, shard: str) -> None:
    """Two ranks save; one rank resumes, and ends where an uninterrupted one does."""
    for library in ("yaml", "sklearn"):
        pytest.importorskip(library)
    settings = ["checkpoint_every=100", "iterations=12"]
    assert spawn(2, rank_processes.stopped_run, tmp_path / "two", [*settings, f"shard={shard}"]) == [True] * 2
    assert (tmp_path / "two/checkpoints/step_00000009").exists()
    for name in ("one", "two"):
        rank_processes.resumed_run(Ranks(), tmp_path / name, settings)
    one, two = (checkpoint.load_model_state(tmp_path / name / "model")[0] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def test_ranks_go_back_together_or_stop_together(tmp_path: Path) -> None:
    """One of them meets NaNs. One checkpoint is kept at a time; in the first run, it is sharded."""
    for library in ("yaml", "sklearn"):
        pytest.importorskip(library)
    settings = ["rollback_after=2", "rollbacks=2", "keep_checkpoints=1"]
    sharded = [*settings, "shard=true"]
    (first, _), (second, _) = spawn(2, rank_processes.run_gone_bad, tmp_path / "recovered", sharded, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    summary = runs.read(tmp_path / "recovered" / "summary.json")
    assert [rollback["iteration"] for rollback in summary["rollbacks"]] == [5, 5]
    assert summary["world_size"] == 2
    rows = read_metrics(tmp_path / "recovered" / "metrics.jsonl")[runs.PRETRAIN :]
    assert [row["iteration"] for row in rows] == [*range(1, runs.DXMI + 1)]
    (_, first), (_, second) = spawn(2, rank_processes.run_gone_bad, tmp_path / "bad", settings, 9)
    assert first == second and "2 of the energy" in first and "after 2 rollbacks" in first
    report = runs.read(tmp_path / "bad" / "failure.json")
    assert report["last_checkpoint"].endswith("step_00000006") and len(report["rollbacks"]) == 3
    (left,) = (tmp_path / "bad" / "checkpoints").iterdir()
    assert left.name == "step_00000006"


def test_a_process_group_of_the_caller_is_kept(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        joined = Ranks(0, 2).joined(torch.device("cpu"))
        with pytest.raises(RankError, match="before any process group exists"), joined:
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_rows_of_a_batch() -> None:
    assert [Ranks(rank, 3).rows(12) for rank in range(3)] == [(4, 0), (4, 4), (4, 8)]
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 ranks, got 10"):
        Ranks(0, 3).rows(10)


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def in_environment(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    """Sets torchrun's variables NAME=VALUE, and unsets its other ones."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for text in variables.split():
        monkeypatch.setenv(*text.split("="))


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ("", Ranks()),
        ("WORLD_SIZE= RANK= LOCAL_RANK= MASTER_PORT=", Ranks()),
        ("WORLD_SIZE=1 MASTER_ADDR=gone", Ranks()),
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=29500", Ranks(5, 8, 1)),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29500", Ranks(1, 2, 0)),
    ],
)
def test_the_world_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: str, ranks: Ranks
) -> None:
    in_environment(monkeypatch, variables)
    found = Ranks.from_environment()
    assert found == ranks and found.alone == (ranks.world_size == 1) and found.first == (ranks.rank == 0)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ("WORLD_SIZE=2", "RANK must be set where WORLD_SIZE is 2, got none: unset WORLD_SIZE, or start with"),
        ("WORLD_SIZE=2 RANK=0 MASTER_PORT=1", "MASTER_ADDR must be set where WORLD_SIZE is 2"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a", "MASTER_PORT must be set where WORLD_SIZE is 2"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=http", "MASTER_PORT must be an integer >= 1"),
        (
            "WORLD_SIZE=abc",
            "WORLD_SIZE must be an integer >= 1 and < 2147483648, got 'abc': unset it",
        ),
        ("WORLD_SIZE=0", "WORLD_SIZE must be an integer >= 1"),
        ("RANK=1", "RANK must be an integer >= 0 and < WORLD_SIZE (1 if unset), got '1'"),
        ("RANK=-1 WORLD_SIZE=2", "RANK must be an integer >= 0"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK must be an integer >= 0 and <"),
        ("LOCAL_RANK=3", "LOCAL_RANK must be an integer >= 0 and < WORLD_SIZE"),
    ],
)
def test_leftover_variables_of_torchrun_are_named(
    monkeypatch: pytest.MonkeyPatch, variables: str, says: str
) -> None:
    in_environment(monkeypatch, variables)
    with pytest.raises(RankError) as error:
        Ranks.from_environment()
    assert str(error.value).startswith(says)


def test_choices_are_keyed_by_the_global_row() -> None:
    key = ops.noise_key(3)
    whole = noise.randint(T, B, key)
    parts = [noise.randint(T, 4, key, sample_offset=4 * i) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)
