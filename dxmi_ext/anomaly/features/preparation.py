"""Preparations of features for detectors, fitted to good data before training and then fixed.

The best preparation depends on the data. Scaling to unit length keeps differences between classes; whitening
equalizes the channels of one class, which differ in scale and are correlated. All preparations first average
features over a neighborhood of each position. Imports torch, numpy and
``dxmi_ext.anomaly.features.feature_maps``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.features.feature_maps import FeatureMaps

PREPARATIONS = ("unit", "centered", "whitened")
_FORMER = {"centred": "centered"}
"""Names in earlier versions -> present names."""
_CHUNK = 64  # maps at a time
_FAR = 1e12  # standard deviations; much larger squares would overflow float32


class Preparation(nn.Module):
    """Maps [n, C, h, w] -> maps [n, `dim`, h, w] of unit vectors, float32.

    Args:
        shape: (h, w, C) of the maps; (1, 1, C) for vectors.
        patch: side of the neighborhood over which features are averaged, an odd number; 1: no averaging.
        aligned: whether objects are at the same place in all images, so that each position has its own mean.
    """

    name: str

    def __init__(self, shape: tuple[int, int, int], *, patch: int = 5, aligned: bool = False) -> None:
        super().__init__()
        if patch < 1 or patch % 2 == 0:
            raise ValueError(f"patch must be odd and >= 1, got {patch}")
        height, width, channels = shape
        self.patch, self.aligned, self.dim = patch, aligned, channels
        self._places = (height, width) if aligned else ()  # positions with their own mean
        self.mean: Tensor
        self.std: Tensor
        # The mean of a column may far exceed its standard deviation, so both are float64.
        self.register_buffer("mean", torch.zeros(channels, *(self._places or (1, 1)), dtype=torch.float64))
        self.register_buffer("std", torch.ones(channels, 1, 1, dtype=torch.float64))

    def fit(self, maps: np.ndarray) -> None:
        """Fits to maps of good images, [n, h, w, C]. Constant channels keep a standard deviation of 1."""
        mean = torch.stack([block.sum(0) for block in self._blocks(maps)]).sum(0) / len(maps)
        if not self.aligned:
            mean = mean.mean((1, 2), keepdim=True)
        # A second pass with the mean subtracted loses no precision.
        squares = [(block - mean).square().sum(0) for block in self._blocks(maps)]
        variance = (torch.stack(squares).sum(0) / len(maps)).mean((1, 2), keepdim=True)
        constant = variance <= 1e-24 * mean.square().amax((1, 2), keepdim=True)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, 1.0, variance).sqrt())

    def _blocks(self, maps: np.ndarray) -> Iterator[Tensor]:
        """Neighborhood means of some maps at a time, float64 [m, C, h, w]."""
        for start in range(0, len(maps), _CHUNK):
            block = torch.from_numpy(maps[start : start + _CHUNK].astype(np.float64))
            yield self._pooled(block.permute(0, 3, 1, 2))

    def _pooled(self, maps: Tensor) -> Tensor:
        if self.patch == 1 or maps.shape[2:] == (1, 1):  # a vector has no neighbors
            return maps
        return F.avg_pool2d(maps, self.patch, 1, self.patch // 2, count_include_pad=False)


class Unit(Preparation):
    """Features scaled to length 1 (DxMI, sec. 5.3). The fitted mean and standard deviation are not used."""

    name = "unit"

    def forward(self, maps: Tensor) -> Tensor:
        return _unit(self._pooled(maps).double())


class Centered(Preparation):
    """Features minus the mean of good ones, scaled to length 1: their direction from the mean."""

    name = "centered"

    def forward(self, maps: Tensor) -> Tensor:
        return _unit(self._pooled(maps) - self.mean)


class Whitened(Preparation):
    """Features whitened by the covariance of good ones, with an additional coordinate, scaled to length 1.

    Projection onto the sphere alone would discard the Mahalanobis distance of a position from the mean. The
    additional coordinate is sqrt(C), the expected length of whitened features, before the projection; after
    it, it decreases as the distance grows, and most positions are about 45 degrees from the pole.

    If images are aligned, the covariance of a position is the mean of its own and that of all positions,
    which requires h w C^2 instead of C^2 numbers.

    For the arguments see `Preparation`.
    """

    name = "whitened"
    shrinkage = 0.01
    """Weight of the identity in the correlation matrix of channels."""

    def __init__(self, shape: tuple[int, int, int], *, patch: int = 5, aligned: bool = False) -> None:
        super().__init__(shape, patch=patch, aligned=aligned)
        channels = shape[2]
        self.dim = channels + 1
        self.whitening: Tensor
        self.register_buffer("whitening", torch.eye(channels).repeat(*self._places, 1, 1))

    def fit(self, maps: np.ndarray) -> None:
        super().fit(maps)
        whitening = self._whitening_of(self._correlations(maps, self.mean.cpu(), self.std.cpu()))
        self.whitening.copy_(whitening.view_as(self.whitening))

    def forward(self, maps: Tensor) -> Tensor:
        x = (self._pooled(maps) - self.mean) / self.std
        x = x.clamp(-_FAR, _FAR).to(self.whitening)
        x = torch.einsum("hwdc,nchw->ndhw" if self.aligned else "dc,nchw->ndhw", self.whitening, x)
        pole = torch.full_like(x[:, :1], math.sqrt(x.shape[1]))
        return F.normalize(torch.cat((x, pole), dim=1), dim=1)

    def _correlations(self, maps: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
        """Correlations of the channels, [h * w, C, C], or [1, C, C] if all positions share one matrix."""
        total = torch.zeros(math.prod(self._places), len(mean), len(mean), dtype=torch.float64)
        for block in self._blocks(maps):
            rows = ((block - mean) / std).permute(2, 3, 0, 1)
            rows = rows.reshape(len(total), -1, len(mean))
            total += rows.mT @ rows
        own = total / (len(maps) if self.aligned else maps[..., 0].size)
        return (own + own.mean(0)) / 2  # with few images, its own would be singular

    def _whitening_of(self, correlations: Tensor) -> Tensor:
        """The symmetric inverse square roots [places, C, C], which rotate directions least."""
        identity = torch.eye(correlations.shape[-1], dtype=torch.float64)
        shrunk = (1 - self.shrinkage) * correlations + self.shrinkage * identity
        values, vectors = torch.linalg.eigh(shrunk)
        return vectors * values.rsqrt()[:, None] @ vectors.mT


def present(name: str) -> str:
    """The present name of a preparation that may have had another in an earlier version."""
    return _FORMER.get(name, name)


def rename_former(_: nn.Module, tensors: dict[str, Tensor], prefix: str, *__: Any) -> None:
    """A hook of a `ModuleDict` of preparations, which loads tensors saved under former names."""
    for former, name in _FORMER.items():
        for key in [key for key in tensors if key.startswith(f"{prefix}{former}.")]:
            tensors[key.replace(f"{prefix}{former}.", f"{prefix}{name}.", 1)] = tensors.pop(key)


def make(
    name: str, shape: tuple[int, int, int], *, patch: int = 5, aligned: bool = False
) -> Unit | Centered | Whitened:
    """The unfitted preparation with a name in PREPARATIONS; for the arguments see `Preparation`."""
    kinds = {kind.name: kind for kind in (Unit, Centered, Whitened)}
    return kinds[name](shape, patch=patch, aligned=aligned)


def _unit(x: Tensor) -> Tensor:
    """Scales to length 1, however small: float64 [n, C, h, w] -> float32. Zero vectors remain 0."""
    # With a largest coordinate of 1, squares neither overflow nor underflow.
    x = x / x.abs().amax(1, keepdim=True).clamp(min=1e-300)
    return F.normalize(x, dim=1).float()


@torch.no_grad()
def prepared(maps: np.ndarray, preparation: nn.Module) -> FeatureMaps:
    """Prepares features [n, h, w, C] for detectors.

    Args:
        preparation: maps [n, C, h, w] -> maps [n, D, h, w].
    """
    if isinstance(preparation, nn.Identity):
        return FeatureMaps(maps)
    device, blocks = next(preparation.buffers()).device, []
    dtype = np.float16 if maps.dtype == np.float16 else np.float32
    chunk = _CHUNK if maps.shape[1:3] != (1, 1) else 65_536
    for start in range(0, len(maps), chunk):
        block = torch.from_numpy(np.array(maps[start : start + chunk])).to(device)
        block = block.float() if maps.dtype == np.float16 else block
        blocks.append(preparation(block.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).cpu().numpy().astype(dtype))
    return FeatureMaps(np.concatenate(blocks))
