"""What modules may import, told by fresh processes."""

from __future__ import annotations

import subprocess
import sys

TRAIN_EXTRA = ("omegaconf", "ot", "sklearn", "matplotlib", "tensorboard", "safetensors", "tqdm")
REFUSED = ("omegaconf", "ot", "sklearn", "matplotlib", "tensorboard", "diffusers", "huggingface_hub")
REFUSED += ("PIL", "torchvision", "timm", "scipy")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from dxmi_ext import checkpoint, pretrain, run, sampler, schedules, trainer
from dxmi_ext.anomaly import backbones, detectors, features, networks, reconstruction
from dxmi_ext.data import anomaly, images, two_d
from dxmi_ext.metrics import anomaly, features, images, inception, two_d
from dxmi_ext.models import convert, energy, mlp, pretrained, unet
"""
    run(code)


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
