"""What modules may import, told by fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TRAIN_EXTRA = ("yaml", "sklearn", "matplotlib", "tensorboard", "safetensors", "tqdm")
REFUSED = ("yaml", "sklearn", "matplotlib", "tensorboard", "diffusers", "huggingface_hub")
REFUSED += ("PIL", "torchvision", "timm", "scipy")


REFUSE = f"""
import sys
for name in {REFUSED}:
    sys.modules[name] = None
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    return done.stdout


def test_ops_load_nothing_of_the_train_extra() -> None:
    """Beyond what torch itself loads."""
    code = f"""
import sys, numpy, torch
before = set(sys.modules)
import dxmi_ext.ops
print(*({{name.partition(".")[0] for name in sys.modules.keys() - before}} & set({TRAIN_EXTRA})))
"""
    assert run(code).split() == []


def test_training_needs_no_library_of_config_metrics_or_pictures() -> None:
    code = f"""
{REFUSE}
from dxmi_ext import checkpoint, pretrain, run, sampler, schedules, trainer
from dxmi_ext.anomaly import backbones, collection, comparison, detectors, features, networks
from dxmi_ext.anomaly import preparation, reconstruction, scoring
from dxmi_ext.data import anomaly, images, two_d, vectors
from dxmi_ext.metrics import anomaly, features, images, inception, two_d
from dxmi_ext.models import convert, energy, mlp, pretrained, unet
from dxmi_ext.recipes import anomaly, images, two_d
"""
    run(code)


def test_every_test_is_collected_without_them() -> None:
    """On a machine that lacks them, a module that does not import would keep all others from running."""
    folder = Path(__file__).parent
    run(f"""
{REFUSE}
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", {str(folder)!r}]))
""")


def test_command_line_without_the_train_extra() -> None:
    """`dxmi info` works; `dxmi train` names what to install."""
    code = f"""
import sys
for name in {TRAIN_EXTRA}:
    sys.modules[name] = None
from dxmi_ext import cli
assert cli.main(["info"]) == 0
assert cli.main(["train", "8gaussians"]) == 2
"""
    assert "CPU kernels" in run(code)
