"""The tutorials run unchanged, in their short form."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
NEEDS = {
    "anomaly_folders": ("PIL", "efficientnet_lite_pytorch", "sklearn", "matplotlib", "yaml"),
    "diffusers_four_steps": ("diffusers", "sklearn", "matplotlib", "yaml"),
    "ops_in_your_loop": (),
}
SHOWN = {
    "anomaly_folders": "scratched003",
    "diffusers_four_steps": "DxMI, 4 steps",
    "given_energy": "in the right well",
    "many_ranks": "1 rank(s)",
    "new_task": "radius",
    "ops_in_your_loop": "standard deviation",
    "own_data": "AUROC",
    "time_series": "AUROC",
}


def test_each_has_a_test() -> None:
    assert sorted(SHOWN) == sorted(path.stem for path in TUTORIALS.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_tutorial(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in NEEDS.get(name, ("matplotlib", "yaml")):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DXMI_SHORT", "1")
    monkeypatch.syspath_prepend(str(TUTORIALS))  # as Python does with the folder of a script
    monkeypatch.setattr(sys, "argv", [name])
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(TUTORIALS / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop(name, None)
    output = capsys.readouterr()
    assert SHOWN[name] in output.out, output.out + output.err


def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    script = str(TUTORIALS / "many_ranks.py")
    environment = os.environ | {"DXMI_SHORT": "1", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = {}
    for ranks, before in ((1, []), (2, launch)):
        command = [sys.executable, *before, script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        *_, printed[ranks] = done.stdout.splitlines()  # gloo of torch 2.10 prints its connections before
    one, two = (re.findall(r"\d\.\d+", printed[ranks]) for ranks in (1, 2))
    assert printed[2].startswith("2 rank(s)") and len(two) == 2
    assert [float(x) for x in one] == pytest.approx([float(x) for x in two], abs=2e-4)
