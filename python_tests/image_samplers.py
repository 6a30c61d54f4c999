"""Tiny samplers of images, and functions of ranks that draw from them, which processes import by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.output import samples
from dxmi_ext.method import generate, schedules
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler, Timed

SHAPE = (3, 8, 8)
SEED = 5


class Network(nn.Module):
    """(x [N, 3, H, W], time [N], labels [N]) -> [N, 3, H, W], which depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.label = nn.Conv2d(3, 3, 3, padding=1), nn.Embedding(10, 3)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return self.image(x) + self.label(labels)[:, :, None, None] * time.cos().view(-1, 1, 1, 1)


def make_networks(network: nn.Module) -> Networks:
    """A sampler of two steps with random weights."""
    schedule = schedules.fastdpm(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in network.parameters():
            nn.init.normal_(p, std=0.2)
    sampler = GaussianSampler(Timed(network.eval(), schedule), schedule, SHAPE)
    return Networks(sampler, nn.Identity())


def write(ranks: Ranks, outputs: list[tuple[Path, str, int]], options: dict[str, Any]) -> list[str]:
    """Writes samples of classes to each (folder, name, n); returns what `samples.write` returns."""
    torch.set_num_threads(1)
    networks, said = make_networks(Network()), []
    with ranks.joined(torch.device("cpu")):
        for folder, name, n in outputs:
            rows = samples.rows_of(n, ranks)
            drawn = generate.batches(networks, rows, SEED, classes=10, **options)
            said.append(samples.write(f"{folder}/{name}", n, drawn, ranks))
    return said
