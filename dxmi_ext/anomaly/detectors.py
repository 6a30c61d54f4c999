"""Detectors on feature maps: energies, and the baselines to beat. Imports torch, numpy and ``dxmi_ext``.

Each scores every position; the largest scores of a map detect, the map upsampled to the picture localises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.anomaly.networks import AutoencoderEnergy, SphereAutoencoder
from dxmi_ext.anomaly.reconstruction import ReconstructionPretrainer
from dxmi_ext.images.features import FeatureError


class Detector(Protocol):
    """Learns what good pictures are like, and tells how far others are from it."""

    def fit(self, maps: FeatureMaps) -> None:
        """Learns from maps of good pictures."""

    def score(self, maps: FeatureMaps) -> Tensor:
        """Score maps, float32 [n, h, w] on the CPU; high where a defect is likely."""


def detect(scores: Tensor, *, top_share: float = 0.0) -> Tensor:
    """Score maps [n, h, w] -> scores of pictures [n]: their maxima (DxMI, sec. 5.3).

    Args:
        top_share: the mean of this share of the largest positions instead, rounded to whole ones.
    """
    if not 0 <= top_share <= 1:
        raise ValueError(f"top_share: got {top_share}, wants a share of the positions, 0 to 1")
    positions = scores.flatten(1)
    count = max(1, round(top_share * positions.shape[1]))
    return positions.amax(1) if count == 1 else positions.topk(count, dim=1).values.mean(1)


def localise(scores: Tensor, size: tuple[int, int], *, sigma: float = 0.0) -> Tensor:
    """Score maps [n, h, w] -> scores of pixels [n, *size], bilinear.

    Args:
        sigma: of a Gaussian that then smooths them, in pixels, cut off at 4 sigma; 0: none (DxMI). PatchCore
            and PaDiM take 4 at 224 pixels.
    """
    pixels = F.interpolate(scores[:, None], size, mode="bilinear", align_corners=False)
    if sigma > 0:
        radius = min(int(4 * sigma + 0.5), min(size) - 1)  # what a reflected border allows
        weight = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=pixels.dtype) / sigma) ** 2)
        weight = (weight / weight.sum()).to(pixels.device)
        pixels = F.pad(pixels, (radius,) * 4, mode="reflect")
        pixels = F.conv2d(F.conv2d(pixels, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
    return pixels[:, 0]


class EnergyDetector:
    """The energy of a trained DxMI, or of any function of positions.

    Args:
        energy: [N, C] -> [N].
        chunk: positions that it sees at a time.
        device: where it is.
    """

    def __init__(self, energy: nn.Module, *, chunk: int = 16_384, device: torch.device | str = "cpu") -> None:
        self.energy, self.chunk, self.device = energy, chunk, device

    def fit(self, maps: FeatureMaps) -> None:
        """Nothing: it is trained already."""

    @torch.no_grad()
    def score(self, maps: FeatureMaps) -> Tensor:
        energies = [self.energy(rows) for rows in _chunks(maps.rows, self.chunk, self.device)]
        return torch.cat(energies).float().cpu().view(maps.maps.shape[:3])


class AutoencoderDetector:
    """The reconstruction error of an autoencoder alone: what DxMI starts from.

    Args:
        autoencoder: is trained by ``fit``, from where it stands.
        iterations, batch_size, lr: of that; batch_size counts positions.
        seed: of the order of data.
        device: where it is.
    """

    def __init__(
        self,
        autoencoder: SphereAutoencoder,
        *,
        iterations: int,
        batch_size: int = 784,
        lr: float = 1e-4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.autoencoder = autoencoder.to(device)
        self.iterations, self.batch_size, self.lr = iterations, batch_size, lr
        self.seed, self.device = seed, device

    def fit(self, maps: FeatureMaps) -> None:
        pretrainer = ReconstructionPretrainer(self.autoencoder, lr=self.lr, iterations=self.iterations)
        for iteration in range(self.iterations):
            pretrainer.step(maps.batch(iteration, self.batch_size, seed=self.seed, device=self.device))

    def score(self, maps: FeatureMaps) -> Tensor:
        return EnergyDetector(AutoencoderEnergy(self.autoencoder), device=self.device).score(maps)


class NearestNeighbours:
    """Distance to the nearest positions of good pictures, after PatchCore (Roth et al. 2022).

    The score of a picture is its largest distance, without PatchCore's weight of crowded neighbourhoods.

    Args:
        share: of the positions that are kept.
        coreset: which: greedy, each the farthest from those before, as random projections to 128 dimensions
            tell it; or random.
        k: over how many neighbours the distance is averaged.
        patch: a position stands for the mean over so many neighbours each way, an odd number; PatchCore: 3.
        chunk: distances are computed for so many positions at a time.
        seed: of random choices.
        device: where they are computed.
    """

    def __init__(
        self,
        *,
        share: float = 0.01,
        coreset: str = "greedy",
        k: int = 1,
        patch: int = 3,
        chunk: int = 4096,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < share <= 1 or coreset not in ("greedy", "random") or k < 1 or patch < 1 or patch % 2 == 0:
            raise ValueError(
                f"nearest neighbours: got share={share}, coreset={coreset!r}, k={k}, patch={patch}, "
                "wants a share up to 1, greedy or random, k from 1 up and an odd patch"
            )
        self.share, self.coreset, self.k, self.patch = share, coreset, k, patch
        self.chunk, self.seed, self.device = chunk, seed, device
        self.memory = torch.empty(0)
        """The positions kept, [m, C]."""

    def fit(self, maps: FeatureMaps) -> None:
        rows = torch.cat(list(_chunks(self._patches(maps), self.chunk, self.device)))
        size = max(self.k, round(self.share * len(rows)))
        generator = torch.Generator().manual_seed(self.seed)
        if self.coreset == "random" or size >= len(rows):
            chosen = torch.randperm(len(rows), generator=generator)[:size].to(rows.device)
        else:
            directions = torch.randn(rows.shape[1], min(128, rows.shape[1]), generator=generator)
            first = int(torch.randint(len(rows), (), generator=generator))
            chosen = farthest_points(rows @ directions.to(rows.device), size, first)
        self.memory = rows[chosen]

    @torch.no_grad()
    def score(self, maps: FeatureMaps) -> Tensor:
        sq_memory = self.memory.square().sum(1)
        distances = []
        for rows in _chunks(self._patches(maps), self.chunk, self.device):
            sq = torch.addmm(sq_memory, rows, self.memory.T, alpha=-2) + rows.square().sum(1, keepdim=True)
            nearest = sq.topk(self.k, dim=1, largest=False).values.clamp(min=0).sqrt()
            distances.append(nearest.mean(1))
        return torch.cat(distances).cpu().view(maps.maps.shape[:3])

    def _patches(self, maps: FeatureMaps) -> np.ndarray:
        """[n h w, C]: positions averaged over their neighbourhoods."""
        if self.patch == 1:
            return maps.rows
        pooled = np.empty_like(maps.maps)
        for start in range(0, len(maps), 64):
            block = torch.from_numpy(maps.maps[start : start + 64].astype(np.float32)).permute(0, 3, 1, 2)
            mean = F.avg_pool2d(block, self.patch, 1, self.patch // 2, count_include_pad=False)
            pooled[start : start + 64] = mean.permute(0, 2, 3, 1).numpy()
        return pooled.reshape(maps.rows.shape)


class GaussianPositions:
    """Mahalanobis distance to a Gaussian at each position of the map, after PaDiM (Defard et al. 2021).

    For pictures of one class that are aligned; over many classes one Gaussian a position says little.

    Args:
        dims: how many of the C dimensions, drawn at random; PaDiM: 100 of its ResNet-18's 448. None: all.
        shrinkage: weight of the mean variance times the identity in each covariance, which makes it regular.
        seed: of the draw.
        device: where it is computed, in float64.
    """

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
                f"Gaussian positions: got dims={dims}, shrinkage={shrinkage}, wants dims from 1 up and a "
                "shrinkage above 0, up to 1"
            )
        self.dims, self.shrinkage, self.seed, self.device = dims, shrinkage, seed, device
        self.dimensions = torch.empty(0, dtype=torch.int64)
        self.mean = self.whitening = torch.empty(0)

    def fit(self, maps: FeatureMaps) -> None:
        if len(maps) < 2:
            raise FeatureError(f"maps: got {len(maps)} picture, a covariance wants two")
        channels = maps.shape[2]
        generator = torch.Generator().manual_seed(self.seed)
        self.dimensions = torch.randperm(channels, generator=generator)[: self.dims or channels].sort().values
        d = len(self.dimensions)
        total = product = torch.zeros((), dtype=torch.float64)
        # About the first picture, so that sums of squares lose nothing.
        origin = next(self._blocks(maps))[:, :1]
        for block in self._blocks(maps):
            block = block - origin
            total = total + block.sum(1)
            product = product + block.transpose(1, 2) @ block
        mean = total / len(maps)
        covariance = (product - len(maps) * mean[:, :, None] * mean[:, None]) / (len(maps) - 1)
        variance = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        identity = torch.eye(d, dtype=torch.float64, device=covariance.device)
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * variance[:, None, None] * identity
        self.mean = mean + origin[:, 0]
        factor = torch.linalg.cholesky(covariance)
        self.whitening = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)

    def score(self, maps: FeatureMaps) -> Tensor:
        distances = []
        for block in self._blocks(maps):
            whitened = (block - self.mean[:, None]) @ self.whitening.transpose(1, 2)
            distances.append(whitened.square().sum(2).sqrt().T)
        return torch.cat(distances).float().cpu().view(maps.maps.shape[:3])

    def _blocks(self, maps: FeatureMaps) -> Iterator[Tensor]:
        """Positions of some pictures at a time, float64 [h w, m, d]."""
        for start in range(0, len(maps), 64):
            block = torch.from_numpy(maps.maps[start : start + 64][..., self.dimensions.numpy()])
            yield block.flatten(1, 2).transpose(0, 1).to(self.device, torch.float64)


def farthest_points(points: Tensor, size: int, first: int = 0) -> Tensor:
    """A greedy k-centre coreset: each point is the one farthest from those before. int64 [size].

    Args:
        points: [N, D].
        first: index of the first.
    """
    sq, chosen = points.square().sum(1), torch.empty(size, dtype=torch.int64, device=points.device)
    nearest, last = torch.full_like(sq, torch.inf), torch.tensor(first, device=points.device)
    for i in range(size):
        chosen[i] = last
        distance = torch.addmv(sq, points, points[last], alpha=-2).add_(sq[last])
        nearest = torch.minimum(nearest, distance)
        nearest[last] = -torch.inf  # rounding must not choose it again
        last = nearest.argmax()
    return chosen


def _chunks(rows: np.ndarray, size: int, device: torch.device | str) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield torch.from_numpy(rows[start : start + size].astype(np.float32)).to(device)
