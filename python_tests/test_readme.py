"""The README's Python code runs as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_loop_of_ones_own() -> None:
    code = blocks()[0]
    weight = torch.ones(2, requires_grad=True)
    log_std = torch.zeros(3, requires_grad=True)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return weight * x

    def value(x: Tensor, t: Tensor) -> Tensor:
        return x.square().sum(1) + t

    tables = {name: torch.ones(3) for name in ("a", "b", "velocity_var")}
    names = {"torch": torch, "T": 3, "x": torch.ones(8, 2), "net": net, "V": value, "log_std": log_std}
    exec(code, names | tables)
    assert weight.grad is not None and weight.grad.abs().min() > 0
    assert log_std.grad is not None and log_std.grad.abs().sum() > 0


def test_own_data_and_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    code = blocks()[1].replace("iterations=3000", "iterations=2")

    class Network(torch.nn.Linear):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            output = super().forward(x)
            return output if self.out_features > 1 else output[:, 0]

    names = {"network": Network(3, 3), "value": Network(3, 1), "data": torch.randn(300, 3)}
    exec(code, names)
    assert names["samples"].shape == (1000, 3) and names["energies"].shape == (1000,)
    assert (tmp_path / "mine" / "model.safetensors").is_file()
