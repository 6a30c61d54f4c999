"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

README = Path(__file__).parents[1] / "README.md"


def test_loop_of_ones_own() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
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
