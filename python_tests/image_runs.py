"""A run of a task that has only tiny image networks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import image_samplers
from dxmi_ext import tasks
from dxmi_ext.images.networks.unet import Architecture, unet
from dxmi_ext.images.settings import Config
from dxmi_ext.method import generate
from dxmi_ext.method.sampler import GaussianSampler


def run_of_images(
    folder: Path, patch: pytest.MonkeyPatch, *, trains_sampler: bool = True, classes: int | None = None
) -> GaussianSampler:
    """Makes a run of a task that has only tiny image networks."""
    pytest.importorskip("diffusers")
    network = unet(Architecture(8, (1, 2), blocks=1, attention=()), image_samplers.SHAPE, classes)
    networks = image_samplers.make_networks(network)

    def sample(_: Path, rows: range, seed: int, batch_size: int | None, device: Any, **options: Any) -> Any:
        return generate.batches(networks, rows, seed, batch_size=batch_size, **options)

    cfg = Config.of({"recipe": "tiny", "data": "/home/me/images", "tau": 0.2})
    if not trains_sampler:
        cfg.put("negatives", "short_run")
    task = SimpleNamespace(load=lambda *_: (cfg, networks), sample=sample)
    patch.setattr(tasks, "task_of", lambda _: task)
    (folder / "config.yaml").write_text("task: images\n")
    (folder / "model").mkdir(exist_ok=True)
    return networks.sampler
