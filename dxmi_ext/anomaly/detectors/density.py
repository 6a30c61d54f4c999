"""A kernel density of good positions, as a detector. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dxmi_ext.anomaly.detectors.common import MapDetector
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps

_BANDWIDTH = 0.1  # h relative to the mean squared distance of a position to its nearest neighbor
_MOST = 20_000  # positions kept, a random part of more
_COMPARED = 1000  # rows whose nearest neighbors decide the bandwidth


class KernelDensity(MapDetector):
    """Soft distance to good positions: the square root of -h log mean_i exp(-|x - x_i|^2 / h).

    That is the negative logarithm of a kernel density in units of h. As h approaches 0, it becomes the
    distance to the nearest position; a larger h takes more neighbors into account.

    Args:
        seed: seed of the random choice of at most 20,000 positions.
    """

    memory: Tensor
    """Positions kept, [m, C]."""
    width: Tensor
    """h, a scalar."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(4096)
        self.seed = seed
        self._learned(memory=torch.empty(0), width=torch.ones(()))

    @torch.no_grad()
    def fit(self, maps: FeatureMaps) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(maps.rows), generator=generator)[:_MOST]
        rows = torch.from_numpy(maps.rows[chosen.numpy()]).float().to(self.device)
        # The nearest position is the row itself.
        nearest = self._squares(rows[:_COMPARED], rows).topk(min(2, len(rows)), largest=False).values[:, -1]
        width = (_BANDWIDTH * nearest.double().mean()).clamp(min=1e-12).float()
        self._learned(memory=rows, width=width)

    def forward(self, features: Tensor) -> Tensor:
        return self._by_position(features, self._distances)

    def _distances(self, rows: Tensor) -> Tensor:
        logits = -self._squares(rows, self.memory) / self.width
        # A mean over at least two rows of which none is nearer than 0, so the logarithm is below 0.
        mean = torch.logsumexp(logits, 1) - math.log(len(self.memory))
        return (-self.width * mean).clamp(min=1e-12).sqrt()

    @staticmethod
    def _squares(rows: Tensor, others: Tensor) -> Tensor:
        products = torch.addmm(others.square().sum(1), rows, others.T, alpha=-2)
        return (products + rows.square().sum(1, keepdim=True)).clamp(min=0)
