"""A user's script passes mypy --strict with the package's types."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dxmi_ext

SCRIPT = """
import torch
from torch import Tensor, nn

import dxmi_ext
from dxmi_ext import DxMISettings, DxMITrainer, GaussianSampler, Networks, Pretrainer
from dxmi_ext import noise_key, ops, schedules


def networks(network: nn.Module, value: nn.Module) -> Networks:
    schedule = schedules.variance_exploding(4, sigma_max=1.0, sigma_min=0.1)
    return Networks(GaussianSampler(network, schedule, (3,)), value)


def train(network: nn.Module, value: nn.Module, data: Tensor) -> Tensor:
    made = networks(network, value)
    draw = dxmi_ext.uniform_levels(torch.ones(4), torch.ones(4))
    dxmi_ext.fit(Pretrainer(network, draw, lr=1e-3, iterations=10, seed=0), [data], output="pretrain")
    trainer = DxMITrainer(made, DxMISettings(tau=0.1), iterations=10, seed=0)
    summary = dxmi_ext.fit(trainer, dxmi_ext.shuffled(data, 2), output="dxmi")
    dxmi_ext.save("model", trainer.averaged, loss=summary["metrics"])
    loaded: Networks = dxmi_ext.load("model", made)
    return loaded.sampler.sample(8, ops.next_key(noise_key(0)))
"""
WRONG = """
trainer: dxmi_ext.DxMITrainer = dxmi_ext.DxMISettings()
dxmi_ext.fit(trainer, [])
"""


# Without torch's own modules, whose types take mypy ten times as long: tensors and modules are Any.
CONFIG = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*, mypy-numpy.*]
follow_imports = skip
"""


def test_a_users_script_is_typed(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    package = Path(dxmi_ext.__path__[0])
    assert (package / "py.typed").is_file()
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(SCRIPT + WRONG)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "script.py", "wrong.py"]
    # mypy finds an installed package itself, and refuses site-packages as a path.
    installed = package.parent.name == "site-packages"
    environment = dict(os.environ) if installed else os.environ | {"MYPYPATH": str(package.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    found = done.stdout.splitlines()
    assert [line for line in found if line.startswith("script.py")] == [], done.stdout + done.stderr
    assert 'expression has type "DxMISettings"' in done.stdout, done.stdout + done.stderr  # typed, not Any
    assert 'Missing named argument "output"' in done.stdout, done.stdout
