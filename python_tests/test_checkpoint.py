"""Checkpoints: exact, complete or absent, and honest about damage."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dxmi_ext import checkpoint
from dxmi_ext.checkpoint import CheckpointError


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


def test_a_run_taken_back_forgets_its_abandoned_future(tmp_path: Path) -> None:
    for iteration in (100, 200, 300):
        checkpoint.save(tmp_path, iteration, {}, keep=3)
    checkpoint.save(tmp_path, 150, {}, keep=3)
    assert names(tmp_path) == ["step_00000100", "step_00000150"]


def test_a_save_that_dies_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"x": torch.ones(2)}, keep=1)

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fsync", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, {}, keep=1)
    assert names(tmp_path) == ["step_00000001", "step_00000002.unfinished"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    checkpoint.save(tmp_path, 3, {}, keep=2)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    for iteration in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, iteration, {}, keep=9)
    (tmp_path / "step_200000000").mkdir()  # incomplete
    assert checkpoint.latest(tmp_path) == tmp_path / "step_100000000"


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(100)}, keep=1)
    file = path / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path)


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 1, {"x": torch.ones(1)}, keep=2)
    second = checkpoint.save(tmp_path, 2, {"y": torch.ones(1)}, keep=2)
    shutil.copy(first / "state.json", second)
    with pytest.raises(CheckpointError, match=r"state\.x"):
        checkpoint.load(second)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": {"b": object()}}, r"state\.a\.b: got a object"),
        ({"a": {1.5: 0}}, r"state\.a: got the key 1\.5"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        checkpoint.save(tmp_path, 1, state, keep=1)
    assert names(tmp_path) == []


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: got 0"):
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
