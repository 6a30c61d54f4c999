"""Detectors on feature maps: energies and baselines. Imports torch, numpy and ``dxmi_ext``.

Each scores every position. The highest scores of a map give the score of an image; the map upsampled to the
image localizes defects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.images.features import FeatureError

_PATCH = 3
"""Side of the neighborhood over which nearest neighbors average features, as in PatchCore."""


class Detector(Protocol):
    """A detector is fitted to good images and scores how much other images differ from them."""

    def fit(self, maps: FeatureMaps) -> None:
        """Fits the detector to maps of good images."""

    def score(self, maps: FeatureMaps) -> Tensor:
        """Score maps, float32 [n, h, w] on the CPU; high where a defect is likely."""


def detect(scores: Tensor, *, top_share: float = 0.0) -> Tensor:
    """Score maps [n, h, w] -> scores of images [n], the maxima (DxMI, sec. 5.3).

    Args:
        top_share: share of the positions, the highest, whose mean is the score; rounded to at least one
            position, which gives the maximum.
    """
    if not 0 <= top_share <= 1:
        raise ValueError(f"top_share must be from 0 to 1, got {top_share}")
    positions = scores.flatten(1)
    count = max(1, round(top_share * positions.shape[1]))
    return positions.amax(1) if count == 1 else positions.topk(count, dim=1).values.mean(1)


def localize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Score maps [n, h, w] -> scores of pixels [n, *size], bilinear."""
    return F.interpolate(scores[:, None], size, mode="bilinear", align_corners=False)[:, 0]


class EnergyDetector:
    """The energy of a trained DxMI, or of any function of positions.

    Args:
        energy: [N, C] -> [N].
        device: device of the energy.
    """

    chunk = 16_384
    """Number of positions scored at a time."""

    def __init__(self, energy: nn.Module, *, device: torch.device | str = "cpu") -> None:
        self.energy, self.device = energy, device

    def fit(self, maps: FeatureMaps) -> None:
        """Does nothing, because the energy is already trained."""

    @torch.no_grad()
    def score(self, maps: FeatureMaps) -> Tensor:
        energies = [self.energy(rows) for rows in _chunks(maps.rows, self.chunk, self.device)]
        return torch.cat(energies).float().cpu().view(maps.maps.shape[:3])


class MapDetector(nn.Module):
    """Maps [n, C, h, w] -> score maps [n, h, w]. All fitted values are buffers, so detectors are saved and
    exported as networks are.

    Args:
        chunk: number of positions scored at a time.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def fit(self, maps: FeatureMaps) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def score(self, maps: FeatureMaps) -> Tensor:
        """Score maps, float32 [n, h, w] on the CPU."""
        count = max(1, self.chunk // (maps.shape[0] * maps.shape[1]))
        return torch.cat([self(block).float().cpu() for block in blocks_of(maps, count, self.device)])

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the `state_dict` of another fitted detector, whatever its sizes."""
        for name, buffer in list(self.named_buffers()):
            self.register_buffer(name, tensors[name].to(buffer.device, buffer.dtype))

    def _by_position(self, features: Tensor, distances: Callable[[Tensor], Tensor]) -> Tensor:
        """Distances of the positions of features [n, C, h, w], computed in chunks, [n, h, w].

        Args:
            distances: rows [m, C] -> [m].
        """
        rows = _rows(features)
        if torch.compiler.is_compiling():  # an exported program has no loop over unknown numbers
            found = distances(rows)
        else:
            found = torch.cat([distances(each) for each in rows.split(self.chunk)])
        n, _, height, width = features.shape
        return found.view(n, height, width)

    def _learned(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class NearestNeighbors(MapDetector):
    """Distance to the nearest positions of good images, after PatchCore (Roth et al. 2022).

    PatchCore's own score of an image is in ``anomaly.patchcore``.

    Args:
        share: share of the positions that are kept.
        coreset: how positions are selected: greedy takes the farthest from those already selected, after a
            random projection to 128 dimensions; or random.
        seed: seed of random choices.
        device: device of the computation.
    """

    memory: Tensor
    """The positions kept, [m, C]."""

    def __init__(
        self,
        *,
        share: float = 0.01,
        coreset: str = "greedy",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < share <= 1 or coreset not in ("greedy", "random"):
            raise ValueError(
                "nearest neighbors: share must be > 0 and <= 1 and coreset greedy or random, "
                f"got share={share} and coreset={coreset!r}"
            )
        super().__init__(4096)
        self.share, self.coreset, self.seed = share, coreset, seed
        self._learned(memory=torch.empty(0, device=device))

    @torch.no_grad()
    def fit(self, maps: FeatureMaps) -> None:
        rows = torch.cat([_rows(self._pooled(block)) for block in blocks_of(maps, 64, self.device)])
        size = max(1, round(self.share * len(rows)))
        generator = torch.Generator().manual_seed(self.seed)
        if self.coreset == "random" or size >= len(rows):
            chosen = torch.randperm(len(rows), generator=generator)[:size].to(rows.device)
        else:
            directions = torch.randn(rows.shape[1], min(128, rows.shape[1]), generator=generator)
            first = int(torch.randint(len(rows), (), generator=generator))
            chosen = farthest_points(rows @ directions.to(rows.device), size, first)
        self._learned(memory=rows[chosen])

    def forward(self, features: Tensor) -> Tensor:
        return self._by_position(self._pooled(features), self._distances)

    def positions(self, maps: FeatureMaps, index: Tensor) -> Tensor:
        """The positions that are compared with the memory, one of each map: [n, C].

        Args:
            index: index of the position in each map, int64 [n].
        """
        found = []
        blocks = blocks_of(maps, 64, self.device)
        for block, places in zip(blocks, index.to(self.device).split(64), strict=True):
            pooled = self._pooled(block).flatten(2)
            found.append(pooled[torch.arange(len(pooled), device=pooled.device), :, places])
        return torch.cat(found)

    def _distances(self, rows: Tensor) -> Tensor:
        # |m|^2 - 2 m x orders the distances, but is too inexact for small ones.
        order = torch.addmm(self.memory.square().sum(1), rows, self.memory.T, alpha=-2)
        nearest = self.memory[order.argmin(1)]
        return (nearest - rows).square().sum(1).sqrt()

    def _pooled(self, features: Tensor) -> Tensor:
        """Averages positions over their neighborhoods."""
        if features.shape[2:] == (1, 1):
            return features
        return F.avg_pool2d(features, _PATCH, 1, _PATCH // 2, count_include_pad=False)


class GaussianPositions(MapDetector):
    """Mahalanobis distance to a Gaussian at each position of the map, after PaDiM (Defard et al. 2021).

    It suits aligned images of one class; for many classes, one Gaussian per position is too coarse.

    Args:
        dims: number of the C dimensions to use, drawn at random; PaDiM: 100 of ResNet-18's 448. None: all.
        shrinkage: weight of the mean variance times the identity in each covariance, for regularization.
        seed: seed of the drawn dimensions.
        device: device of the computation; fitting is in float64, scoring in float32.
    """

    dimensions: Tensor
    """int64 [d], the dimensions used."""
    mean: Tensor
    """[h w, 1, d]"""
    whitening: Tensor
    """[h w, d, d], the inverse of each covariance's Cholesky factor."""

    def __init__(
        self,
        *,
        dims: int | None = 100,
        shrinkage: float = 0.01,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < shrinkage <= 1 or (dims is not None and dims < 1):
            raise ValueError(
                "Gaussian positions: dims must be >= 1 and shrinkage > 0 and <= 1, "
                f"got dims={dims}, shrinkage={shrinkage}"
            )
        super().__init__(16_384)
        self.dims, self.shrinkage, self.seed = dims, shrinkage, seed
        self._learned(dimensions=torch.empty(0, dtype=torch.int64, device=device))
        self._learned(mean=torch.empty(0, device=device), whitening=torch.empty(0, device=device))

    @torch.no_grad()
    def fit(self, maps: FeatureMaps) -> None:
        if len(maps) < 2:
            raise FeatureError(f"maps must be of >= 2 images for a covariance, got {len(maps)}")
        channels = maps.shape[2]
        generator = torch.Generator().manual_seed(self.seed)
        dimensions = torch.randperm(channels, generator=generator)[: self.dims or channels].sort().values
        self._learned(dimensions=dimensions.to(self.device))
        d = len(dimensions)
        total = product = torch.zeros((), dtype=torch.float64)
        # Relative to the first image, so that sums of squares lose no precision.
        origin = self._positions(next(blocks_of(maps, 1, self.device))).double()
        for maps_block in blocks_of(maps, 64, self.device):
            block = self._positions(maps_block).double() - origin
            total = total + block.sum(1)
            product = product + block.transpose(1, 2) @ block
        mean = total / len(maps)
        covariance = (product - len(maps) * mean[:, :, None] * mean[:, None]) / (len(maps) - 1)
        variance = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        identity = torch.eye(d, dtype=torch.float64, device=covariance.device)
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * variance[:, None, None] * identity
        factor = torch.linalg.cholesky(covariance)
        whitening = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        self._learned(mean=(mean[:, None] + origin).float(), whitening=whitening.float())

    def forward(self, features: Tensor) -> Tensor:
        n, _, height, width = features.shape
        whitened = (self._positions(features) - self.mean) @ self.whitening.transpose(1, 2)
        return whitened.square().sum(2).sqrt().T.reshape(n, height, width)

    def _positions(self, features: Tensor) -> Tensor:
        """[n, C, h, w] -> [h w, n, d]"""
        return features.index_select(1, self.dimensions).flatten(2).permute(2, 0, 1)


def farthest_points(points: Tensor, size: int, first: int = 0) -> Tensor:
    """Indices of a greedy k-center coreset, int64 [size]: each point is the farthest from those before.

    Args:
        points: [N, D].
        first: index of the first point.
    """
    sq, chosen = points.square().sum(1), torch.empty(size, dtype=torch.int64, device=points.device)
    nearest, last = torch.full_like(sq, torch.inf), torch.tensor(first, device=points.device)
    for i in range(size):
        chosen[i] = last
        distance = torch.addmv(sq, points, points[last], alpha=-2).add_(sq[last])
        nearest = torch.minimum(nearest, distance)
        nearest[last] = -torch.inf  # so that rounding errors cannot select it again
        last = nearest.argmax()
    return chosen


def maps_of(features: Tensor, energy: nn.Module) -> Tensor:
    """Features [n, C, h, w] -> score maps, float32 [n, h, w].

    Args:
        energy: a `MapDetector`, or a function of positions, [N, C] -> [N].
    """
    if isinstance(energy, MapDetector):
        found: Tensor = energy(features)
        return found.float()
    n, _, height, width = features.shape
    energies: Tensor = energy(_rows(features)).float()
    return energies.view(n, height, width)


def detector_of(energy: nn.Module, device: torch.device | str) -> Detector:
    """Converts a scoring module, as in `maps_of`, to a detector of feature maps."""
    return energy if isinstance(energy, MapDetector) else EnergyDetector(energy, device=device)


def _rows(features: Tensor) -> Tensor:
    """[n, C, h, w] -> positions [n h w, C]"""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def blocks_of(maps: FeatureMaps, size: int, device: torch.device | str) -> Iterator[Tensor]:
    """Blocks of at most ``size`` maps, float32 [m, C, h, w]."""
    for start in range(0, len(maps), size):
        block = torch.from_numpy(maps.maps[start : start + size].astype(np.float32))
        yield block.to(device).permute(0, 3, 1, 2)


def _chunks(rows: np.ndarray, size: int, device: torch.device | str) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield torch.from_numpy(rows[start : start + size].astype(np.float32)).to(device)
