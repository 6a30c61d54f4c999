"""Checkpoints: exact, complete or absent, and damage is detected."""

from __future__ import annotations

import errno
import itertools
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deaths
import rank_processes
from deaths import limited_file_size
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.storage import checkpoint, files
from dxmi_ext.engine.storage.checkpoint import CheckpointError, load
from rank_processes import spawn


def assert_same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key, value in wanted.items():
            assert_same(got[key], value)
    elif isinstance(wanted, list | tuple):
        assert isinstance(got, list) and len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)
    else:
        assert type(got) is type(wanted) and got == wanted


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "dtypes": [
            base.to(dtype)
            for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
        ],
        "shared": {"whole": base, "row": base[1], "column": base[:, 1], "transposed": base.T},
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 2),
        "plain": [1, 2.5, 0.1 + 0.2, "text", None, True, False, -(2**70), (1, (2, 3))],
        "infinite": math.inf,
        "int keys": {0: {"step": torch.tensor(7)}, 1: {}},
        "clash": {0: torch.zeros(1), "0": torch.ones(1)},
        "$tensor": "not a tensor",
    }
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 5, state, keep=1)), state)


def test_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, torch.optim.Adam(net.parameters(), lr=0.1)

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    net, optimizer = build()
    step(net, optimizer)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    path = checkpoint.save(tmp_path, 1, state, keep=1)
    step(net, optimizer)

    resumed, resumed_optimizer = build()
    loaded = checkpoint.load(path)
    resumed.load_state_dict(loaded["net"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    step(resumed, resumed_optimizer)
    assert_same(resumed.state_dict(), dict(net.state_dict()))


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    for iteration in (1, 2, 10, 11):
        checkpoint.save(tmp_path, iteration, {}, keep=2)
    assert names(tmp_path) == ["step_00000010", "step_00000011"]
    checkpoint.save(tmp_path, 11, {"again": 1}, keep=1)
    assert names(tmp_path) == ["step_00000011"]
    assert checkpoint.load(tmp_path / "step_00000011") == {"again": 1}


def test_resuming_from_an_earlier_checkpoint_removes_later_ones(tmp_path: Path) -> None:
    for iteration in (100, 200, 300):
        checkpoint.save(tmp_path, iteration, {}, keep=3)
    checkpoint.save(tmp_path, 150, {}, keep=3)
    assert names(tmp_path) == ["step_00000100", "step_00000150"]


# --- death and failure -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [3, 2])  # a new checkpoint, and one that replaces another
def test_an_interrupted_save_is_complete_or_absent(tmp_path: Path, target: int) -> None:
    for operation in itertools.count():
        root = tmp_path / str(operation)
        checkpoint.save(root, 1, {"x": 1}, keep=2)
        checkpoint.save(root, 2, {"x": 2}, keep=2)
        with deaths.after(operation) as death:
            checkpoint.save(root, target, {"x": target + 10}, keep=2)
        files.tidy(root)  # as the next start does
        saved = {load(path)["x"] for path in root.iterdir()}
        assert saved >= {2} or saved >= {target + 10}
        assert saved <= {1, 2, target + 10}
        if not death.died:
            break
        checkpoint.save(root, 4, {"x": 4}, keep=1)
        assert names(root) == ["step_00000004"]
    assert operation > 5 and len(saved) == 2 and target + 10 in saved


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    checkpoint.save(tmp_path, 1, {"x": 1}, keep=1)
    fsync = files._fsync

    def full(path: Path) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(path)

    monkeypatch.setattr(files, "_fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*step_00000002"):
        checkpoint.save(tmp_path, 2, {}, keep=1)
    assert names(tmp_path) == ["step_00000001"]
    assert load(tmp_path / "step_00000001") == {"x": 1}


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    with limited_file_size(1000), pytest.raises(OSError, match=r"tensors\.safetensors.*File too large"):
        checkpoint.save(tmp_path, 1, {"x": torch.ones(1000)}, keep=1)
    with limited_file_size(1000), pytest.raises(OSError, match=r"File too large.*state\.json"):
        checkpoint.save(tmp_path, 1, {"x": "x" * 1000}, keep=1)
    assert names(tmp_path) == []


# --- damage ------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1  # within the numbers of tensors.safetensors
    file.write_bytes(content)


def garble(file: Path) -> None:
    file.write_text("[3]")


def forget_files(file: Path) -> None:
    file.write_text('{"format": 2, "files": 3}')  # replaces the manifest


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, garble, forget_files])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_skipped(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    good, bad = (checkpoint.save(tmp_path, i, {"x": torch.ones(100), "i": i}, keep=2) for i in (1, 2))
    damage(bad / file)
    with pytest.raises(CheckpointError, match=rf"step_00000002/{file}"):
        load(bad)
    warnings: list[str] = []
    found = checkpoint.load_latest(tmp_path, warnings.append)
    assert found is not None and found[0] == good and found[1]["i"] == 1
    assert len(warnings) == 1 and f"step_00000002/{file}" in warnings[0]


def test_another_format_is_rejected(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {}, keep=1) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 7'))
    with pytest.raises(CheckpointError, match="format must be 2, got 7"):
        load(path.parent)


def test_the_latest(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert checkpoint.load_latest(tmp_path / "absent", warnings.append) is None
    (tmp_path / "step_00000003.unfinished").mkdir()
    assert checkpoint.load_latest(tmp_path, warnings.append) is None
    for iteration in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, iteration, {}, keep=9)
    assert checkpoint.load_latest(tmp_path, warnings.append) == (tmp_path / "step_100000000", {})
    assert warnings == []


def test_if_all_checkpoints_are_damaged_they_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged; resume=never starts afresh"):
        checkpoint.load_latest(tmp_path, lambda _: None)
    assert names(tmp_path) == ["step_00000001"]


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 1, {"x": torch.ones(1)}, keep=2)
    second = checkpoint.save(tmp_path, 2, {"y": torch.ones(1)}, keep=2)
    shutil.copy(first / "state.json", second)
    with pytest.raises(CheckpointError, match=r"state\.json: its content has changed since it was saved"):
        load(second)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": {"b": object()}}, r"state\.a\.b must be a tensor, .* got object"),
        ({"a": {1.5: 0}}, r"keys of state\.a must be str or int, got 1\.5"),
    ],
)
def test_states_that_cannot_be_saved_are_named(tmp_path: Path, state: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        checkpoint.save(tmp_path, 1, state, keep=1)
    assert names(tmp_path) == []


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        checkpoint.save(tmp_path, 1, {}, keep=0)


def test_model_bytes_follow_from_its_content(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"value": torch.nn.Linear(2, 3), "sampler": torch.nn.Linear(3, 2)})
    module["tied"] = module["value"]
    for name in ("a", "b", "b"):  # the second b replaces the first
        checkpoint.save_model(tmp_path / name, module, {"steps": 5, "widths": [3, 4]})
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tensors, cfg = checkpoint.load_model_state(tmp_path / "a")
    assert cfg == {"steps": 5, "widths": [3, 4]}
    assert tensors.keys() == module.state_dict().keys()
    module.load_state_dict(tensors)
    with pytest.raises(CheckpointError, match="absent"):
        checkpoint.load_model_state(tmp_path / "absent")


# --- sharded weights ---------------------------------------------------------------------------------


def test_any_number_of_ranks_can_load_a_checkpoint(tmp_path: Path) -> None:
    """A sharded checkpoint of two ranks and a whole one are read by three ranks and by one."""
    end, _ = spawn(2, rank_processes.save_on_the_way, tmp_path / "shards", shard=True)
    rank_processes.save_on_the_way(Ranks(), tmp_path / "whole")
    shards, whole = (tmp_path / name / "step_00000002" for name in ("shards", "whole"))
    files_of_ranks = [f"tensors-0000{rank}-of-00002.safetensors" for rank in range(2)]
    assert names(shards) == ["manifest.json", "state.json", *files_of_ranks]
    key, wanted = "state.networks.sampler.network.first.weight", load(whole)
    rows = [load_file(shards / name)[key] for name in files_of_ranks]
    assert [len(part) for part in rows] == [4, 4]
    torch.testing.assert_close(load(shards), wanted, rtol=1e-9, atol=1e-12)
    assert load(shards).keys() == wanted.keys()
    ends = [*spawn(3, rank_processes.go_on_from, shards, whole, shard=True)[2]]
    for state in ends + rank_processes.go_on_from(Ranks(), shards):
        torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-12)

    for name in files_of_ranks:
        bad = shutil.copytree(shards, tmp_path / name / "step_00000003")
        flip(bad / name)
        with pytest.raises(CheckpointError, match=f"{name}: its content has changed since it was saved"):
            load(bad)
    moved = {"log_position": 7}
    checkpoint.adopt(shards, tmp_path / "adopted", 2, moved, keep=1)
    assert_same(load(tmp_path / "adopted" / shards.name), load(shards) | moved)


def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    spawn(2, rank_processes.die_in_a_save, tmp_path, shard=True)
    assert names(tmp_path) == ["step_00000001"]
    assert load(tmp_path / "step_00000001")["iteration"] == 0
