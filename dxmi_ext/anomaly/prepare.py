"""Features before they are points of the sphere: neighbourhood means, whitening, and their length.

A backbone's channels differ in scale and repeat each other; what is learned on good pictures evens that out.
Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.metrics.features import FeatureError

_CHUNK = 64


class Preparation(nn.Module):
    """Maps [n, C, h, w] -> maps [n, C + 1, h, w] of unit vectors: whitened features and one coordinate more.

    Projection to the sphere forgets how far a position is from the mean, which a Mahalanobis distance is. The
    further coordinate is constant before it, so that after it -x[C] orders positions by that distance.

    What `fit` learns are buffers, to be saved with the energy that was trained on what they give.

    Args:
        shape: (h, w, C) of the maps, as `FeatureMaps.shape`.
        patch: a position stands for the mean over so many neighbours each way, an odd number; 1: itself.
        aligned: whether pictures show an object always at the same place. Then a position's features are
            about its own mean, and their variances are halfway between its own and those of all positions.
        shrinkage: weight of the identity in the correlation of channels.
        constant: the further coordinate, in units of sqrt(C), the length to expect of whitened features; 0:
            there is none, and length is lost.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int = 5,
        aligned: bool = False,
        shrinkage: float = 0.01,
        constant: float = 1.0,
    ) -> None:
        super().__init__()
        if patch < 1 or patch % 2 == 0 or not 0 < shrinkage <= 1 or not 0 <= constant < math.inf:
            raise ValueError(
                f"preparation: got patch={patch}, shrinkage={shrinkage}, constant={constant}, wants an odd "
                "patch, a shrinkage above 0, up to 1, and a constant from 0 up"
            )
        height, width, channels = self.shape = shape
        self.patch, self.aligned, self.shrinkage, self.constant = patch, aligned, shrinkage, constant
        places = (height, width) if aligned else (1, 1)
        self.mean: Tensor
        self.std: Tensor
        self.whitening: Tensor
        self.register_buffer("mean", torch.zeros(channels, *places))
        self.register_buffer("std", torch.ones(channels, *places))
        self.register_buffer("whitening", torch.eye(channels))

    @property
    def dim(self) -> int:
        """Channels of what comes out: C of the networks."""
        return self.shape[2] + (self.constant > 0)

    def fit(self, maps: FeatureMaps) -> None:
        """Learns from maps of good pictures, as their backbone gives them without normalising.

        Raises:
            FeatureError: their shape is another.
        """
        channels = self.shape[2]
        mean = _total(block.sum(0) for block in self._blocks(maps)) / len(maps)
        if not self.aligned:
            mean = mean.mean((1, 2), keepdim=True)
        # About the mean: the sums of squares of a second pass lose nothing.
        variance = _total((block - mean).square().sum(0) for block in self._blocks(maps)) / len(maps)
        overall = variance.mean((1, 2), keepdim=True)
        overall = overall.clamp(min=1e-6 * overall.mean().item() or 1.0)  # some channels never change
        std = ((variance + overall) / 2 if self.aligned else overall).sqrt()
        correlation = torch.zeros(channels, channels, dtype=torch.float64)
        for block in self._blocks(maps):
            rows = ((block - mean) / std).permute(0, 2, 3, 1).reshape(-1, channels)
            correlation += rows.T @ rows / len(maps.rows)
        identity = torch.eye(channels, dtype=torch.float64)
        values, vectors = torch.linalg.eigh((1 - self.shrinkage) * correlation + self.shrinkage * identity)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.whitening.copy_(vectors * values.rsqrt() @ vectors.T)

    def forward(self, maps: Tensor) -> Tensor:
        x = (self._pooled(maps) - self.mean) / self.std
        x = torch.einsum("dc,nchw->ndhw", self.whitening, x)
        if self.constant:
            further = torch.full_like(x[:, :1], self.constant * math.sqrt(self.shape[2]))
            x = torch.cat((x, further), dim=1)
        return F.normalize(x, dim=1)

    @torch.no_grad()
    def prepare(self, maps: FeatureMaps) -> FeatureMaps:
        """A collection's maps as the networks want them, float16 in memory.

        Raises:
            FeatureError: their shape is not the one of this preparation.
        """
        self._check(maps)
        height, width, _ = self.shape
        prepared = np.empty((len(maps), height, width, self.dim), np.float16)
        for start in range(0, len(maps), _CHUNK):
            block = self(_block(maps, start).to(self.mean))
            prepared[start : start + _CHUNK] = block.permute(0, 2, 3, 1).cpu().numpy()
        digest = hashlib.blake2b(f"{maps.fingerprint} {self.patch} {self.constant}".encode(), digest_size=16)
        for tensor in (self.mean, self.std, self.whitening):
            digest.update(tensor.cpu().numpy().tobytes())
        return FeatureMaps(prepared, fingerprint=digest.hexdigest())

    def _check(self, maps: FeatureMaps) -> None:
        if maps.shape != self.shape:
            raise FeatureError(f"maps: got {maps.shape}, preparation wants {self.shape}, (h, w, C)")

    def _blocks(self, maps: FeatureMaps) -> Iterator[Tensor]:
        """Neighbourhood means of some pictures at a time, float64 [m, C, h, w]."""
        self._check(maps)
        for start in range(0, len(maps), _CHUNK):
            yield self._pooled(_block(maps, start).double())

    def _pooled(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, self.patch, 1, self.patch // 2, count_include_pad=False)


def _block(maps: FeatureMaps, start: int) -> Tensor:
    """float32 [m, C, h, w]."""
    return torch.from_numpy(maps.maps[start : start + _CHUNK].astype(np.float32)).permute(0, 3, 1, 2)


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total
