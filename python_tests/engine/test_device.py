"""The choice of a device on a machine that pretends to have one GPU."""

from __future__ import annotations

import pytest
import torch

from dxmi_ext.engine.compute.device import choose
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.settings import ConfigError

FIRST, SECOND = Ranks(rank=0, world_size=2), Ranks(rank=1, world_size=2, local_rank=1)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize(
    ("name", "ranks", "chosen"),
    [
        ("cpu", SECOND, "cpu"),
        ("auto", Ranks(), "cuda"),
        ("cuda:0", Ranks(), "cuda:0"),
        ("auto", FIRST, "cuda:0"),
        ("cuda", FIRST, "cuda:0"),
    ],
)
def test_device_of_a_rank(name: str, ranks: Ranks, chosen: str) -> None:
    assert str(choose(name, ranks)) == chosen


@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        ("cuda:1", Ranks(), "device must be cuda:N with N < 1, got 'cuda:1'"),
        ("auto", SECOND, "more ranks on a machine than its 1 CUDA devices, got 'auto' for rank 1"),
        ("cuda:0", FIRST, "device must be cuda with 2 ranks, got 'cuda:0' for all"),
    ],
)
def test_a_device_that_a_rank_cannot_have(name: str, ranks: Ranks, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose(name, ranks)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(choose("auto", SECOND)) == "cpu"
    with pytest.raises(ConfigError, match="device must be cpu where torch sees no CUDA device, got 'cuda'"):
        choose("cuda")
