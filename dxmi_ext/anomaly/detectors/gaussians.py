"""Gaussian detectors of maps, local and pooled together. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

import torch
from torch import Tensor

from dxmi_ext.anomaly.detectors.common import blocks_of
from dxmi_ext.anomaly.detectors.plain import GaussianPositions
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.images.metrics.features import FeatureError

FEWEST = 4
"""Number of maps that a fit requires: two for each half."""
_SHRINKAGE = 0.01  # weight of the identity in the correlation matrix of all positions


class Gaussians(GaussianPositions):
    """The sum of two Mahalanobis distances, each divided by its standard deviation over new good maps.

    One is that of `GaussianPositions`, with a covariance for each position; the other has the covariance of
    all positions, which is estimated from many more data, around the mean of each position. Each finds
    defects that the other does not. A Gaussian of a position has nearly the same distance to all of few maps
    that it was fitted to, so the deviations are those of one half of the maps from Gaussians of the other.

    Args:
        seed: see `GaussianPositions`.
        device: device of the computation.
    """

    pooled: Tensor
    """[d, d], the whitening of all positions."""
    scale: Tensor
    """[2], the standard deviations of both distances."""

    def __init__(self, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__(dims=None, shrinkage=0.3, seed=seed, device=device)
        self._learned(pooled=torch.empty(0, device=device), scale=torch.ones(2, device=device))

    @torch.no_grad()
    def fit(self, maps: FeatureMaps) -> None:
        if len(maps) < FEWEST:
            raise FeatureError(f"maps must be of >= {FEWEST} images, two for each half, got {len(maps)}")
        fitted, others = (FeatureMaps(maps.maps[first::2], fingerprint="") for first in (0, 1))
        self._fit(fitted)
        distances = torch.cat(
            [self._both(block).cpu() for block in blocks_of(others, 64, self.device)], dim=1
        )
        self._learned(scale=distances.flatten(1).std(1).clamp(min=1e-12).to(self.device))
        self._fit(maps)

    def _fit(self, maps: FeatureMaps) -> None:
        super().fit(maps)
        total = torch.zeros((), dtype=torch.float64)
        for block in blocks_of(maps, 64, self.device):
            x = (self._positions(block) - self.mean).flatten(0, 1).double()
            total = total + x.T @ x
        covariance = total / (len(maps) * len(self.mean))
        std = covariance.diagonal().clamp(min=1e-24).sqrt()
        identity = torch.eye(len(std), dtype=torch.float64, device=std.device)
        correlation = (1 - _SHRINKAGE) * covariance / (std[:, None] * std) + _SHRINKAGE * identity
        whitening = torch.linalg.inv(torch.linalg.cholesky(correlation)) / std
        self._learned(pooled=whitening.float())

    def forward(self, features: Tensor) -> Tensor:
        return (self._both(features) / self.scale[:, None, None, None]).sum(0)

    def _both(self, features: Tensor) -> Tensor:
        """Both distances of the positions of features [n, C, h, w]: [2, n, h, w]."""
        n, _, height, width = features.shape
        whitened = (self._positions(features) - self.mean) @ self.pooled.T
        pooled = whitened.square().sum(2).sqrt().T.reshape(n, height, width)
        return torch.stack((super().forward(features), pooled))
