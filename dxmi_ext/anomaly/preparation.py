"""What stands between features and detectors: fitted to good ones before anything learns, then fixed.

Which preparation suits depends on the data, so there are several. Unit length keeps what distinguishes
classes; whitening evens out the channels of one class, which differ in scale and repeat each other. All of
them take the mean over a neighbourhood of each position first. Imports torch, numpy and
``dxmi_ext.anomaly.features``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.features import FeatureMaps

PREPARATIONS = ("unit", "centred", "whitened")
_CHUNK = 64  # maps at a time
_FAR = 1e12  # deviations; the square of a number much larger is inf in float32, and its direction lost


class Preparation(nn.Module):
    """Maps [n, C, h, w] -> maps [n, `dim`, h, w] of unit vectors, float32.

    Args:
        shape: (h, w, C) of the maps; those of vectors are (1, 1, C).
        patch: a position stands for the mean over so many neighbours each way, an odd number; 1: itself.
        aligned: whether pictures show an object always at the same place, so that a position's features are
            about its own mean.
    """

    name: str

    def __init__(self, shape: tuple[int, int, int], *, patch: int = 5, aligned: bool = False) -> None:
        super().__init__()
        if patch < 1 or patch % 2 == 0:
            raise ValueError(f"patch must be odd and >= 1, got {patch}")
        height, width, channels = shape
        self.patch, self.aligned, self.dim = patch, aligned, channels
        self._places = (height, width) if aligned else ()  # that have a mean of their own
        self.mean: Tensor
        self.std: Tensor
        # Of columns in any unit the mean may be many times the deviation, so both are float64.
        self.register_buffer("mean", torch.zeros(channels, *(self._places or (1, 1)), dtype=torch.float64))
        self.register_buffer("std", torch.ones(channels, 1, 1, dtype=torch.float64))

    def fit(self, maps: np.ndarray) -> None:
        """Learns from maps of good pictures, [n, h, w, C]. A channel that never changes is left as it is."""
        mean = torch.stack([block.sum(0) for block in self._blocks(maps)]).sum(0) / len(maps)
        if not self.aligned:
            mean = mean.mean((1, 2), keepdim=True)
        # About the mean: the sums of squares of a second pass lose nothing.
        squares = [(block - mean).square().sum(0) for block in self._blocks(maps)]
        variance = (torch.stack(squares).sum(0) / len(maps)).mean((1, 2), keepdim=True)
        constant = variance <= 1e-24 * mean.square().amax((1, 2), keepdim=True)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, 1.0, variance).sqrt())

    def _blocks(self, maps: np.ndarray) -> Iterator[Tensor]:
        """Neighbourhood means of some maps at a time, float64 [m, C, h, w]."""
        for start in range(0, len(maps), _CHUNK):
            block = torch.from_numpy(maps[start : start + _CHUNK].astype(np.float64))
            yield self._pooled(block.permute(0, 3, 1, 2))

    def _pooled(self, maps: Tensor) -> Tensor:
        if self.patch == 1 or maps.shape[2:] == (1, 1):  # a vector is all of its neighbourhood
            return maps
        return F.avg_pool2d(maps, self.patch, 1, self.patch // 2, count_include_pad=False)


class Unit(Preparation):
    """Features scaled to length 1 (DxMI, sec. 5.3). Their mean and deviation are learned, but not used."""

    name = "unit"

    def forward(self, maps: Tensor) -> Tensor:
        return _unit(self._pooled(maps).double())


class Centred(Preparation):
    """Features less the mean of good ones, scaled to length 1: their direction from the mean."""

    name = "centred"

    def forward(self, maps: Tensor) -> Tensor:
        return _unit(self._pooled(maps) - self.mean)


class Whitened(Preparation):
    """Features whitened by the covariance of good ones, and one coordinate more, scaled to length 1.

    Projection to the sphere forgets how far a position is from the mean, which a Mahalanobis distance is. The
    further coordinate is constant before it, sqrt(C), the length to expect of whitened features: so after it
    this coordinate falls as that distance grows, and most positions lie some 45 degrees from the pole.

    Where pictures are aligned, the covariance of a position is halfway between its own and that of all
    positions; there are h w C^2 numbers to keep rather than C^2.

    Args:
        shrinkage: weight of the identity in the correlation of channels.
    """

    name = "whitened"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int = 5,
        aligned: bool = False,
        shrinkage: float = 0.01,
    ) -> None:
        super().__init__(shape, patch=patch, aligned=aligned)
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage must be > 0 and <= 1, got {shrinkage}")
        channels = shape[2]
        self.shrinkage, self.dim = shrinkage, channels + 1
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
        """Of the channels, [h w, C, C], or [1, C, C] where all positions share one."""
        total = torch.zeros(math.prod(self._places), len(mean), len(mean), dtype=torch.float64)
        for block in self._blocks(maps):
            rows = ((block - mean) / std).permute(2, 3, 0, 1)
            rows = rows.reshape(len(total), -1, len(mean))
            total += rows.mT @ rows
        own = total / (len(maps) if self.aligned else maps[..., 0].size)
        return (own + own.mean(0)) / 2  # from few pictures alone, its own would be singular

    def _whitening_of(self, correlations: Tensor) -> Tensor:
        """The symmetric inverse roots [places, C, C], which turn directions least."""
        identity = torch.eye(correlations.shape[-1], dtype=torch.float64)
        shrunk = (1 - self.shrinkage) * correlations + self.shrinkage * identity
        values, vectors = torch.linalg.eigh(shrunk)
        return vectors * values.rsqrt()[:, None] @ vectors.mT


def make(
    name: str, shape: tuple[int, int, int], *, patch: int = 5, aligned: bool = False
) -> Unit | Centred | Whitened:
    """The preparation of a name in PREPARATIONS, not fitted yet; arguments as of `Preparation`."""
    kinds = {kind.name: kind for kind in (Unit, Centred, Whitened)}
    return kinds[name](shape, patch=patch, aligned=aligned)


def _unit(x: Tensor) -> Tensor:
    """float64 [n, C, h, w] -> float32, of length 1, however short; 0 stays 0."""
    # Squares of the largest coordinates neither overflow nor vanish once these are 1.
    x = x / x.abs().amax(1, keepdim=True).clamp(min=1e-300)
    return F.normalize(x, dim=1).float()


@torch.no_grad()
def prepared(maps: np.ndarray, preparation: nn.Module) -> FeatureMaps:
    """Features [n, h, w, C] as detectors see them.

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
