"""Several ranks train what one would: gloo processes on the CPU against a single one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dxmi_ext import noise, ops
from dxmi_ext.ranks import Ranks
from rank_processes import B, T, free_port, leave_or_wait, spawn, train, train_on


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (3, {"separate": True, "td_order": "shuffled", "td_redraw": True}),
        (2, {"sampler_update": "policy_gradient"}),
        (2, {"compile": True}),
        (3, {"negatives": "persistent", "langevin_pool": 20, "langevin_steps": 3}),
    ],
)
def test_ranks_train_what_one_would(world_size: int, changes: dict[str, Any], tmp_path: Path) -> None:
    alone = train(Ranks(), dict(changes), None)
    together = train_on(world_size, tmp_path, changes)
    for other in together[1:]:
        torch.testing.assert_close(other, together[0], rtol=0, atol=0)
    for metrics in (*together[0]["metrics"], *alone["metrics"]):
        for name in ("data_spread", "sample_spread", "energy_spread"):  # means of the ranks' own
            del metrics[name]
    # float32 is the precision of pretraining alone
    torch.testing.assert_close(together[0], alone, rtol=1e-4, atol=1e-5)


def test_a_nan_on_one_rank_moves_no_weight_on_any(tmp_path: Path) -> None:
    """The energy step of the second iteration is skipped everywhere; the run goes on with the third."""
    (first, second) = train_on(2, tmp_path, {"separate": True}, bad_rank=1)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    failures = [metrics["energy_failures"].item() for metrics in first["metrics"]]
    assert failures == [0, 1, 0]
    assert all(value.isfinite().all() for value in first["state"]["networks"].values())


def test_a_rank_that_dies_ends_the_others() -> None:
    spawn(leave_or_wait, free_port(), processes=2)


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
