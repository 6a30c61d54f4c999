"""Plain detectors: nearest neighbors as in PatchCore, and a Gaussian for each position after PaDiM.

Imports torch and ``dxmi_ext``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dxmi_ext.anomaly.detectors.common import MapDetector, blocks_of, rows_of
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.images.metrics.features import FeatureError

_PATCH = 3
"""Side of the neighborhood over which nearest neighbors average features, as in PatchCore."""
_CANDIDATES = 1024  # for a coreset, at least
_PRODUCTS = 2**22  # of points and centers, at a time


class NearestNeighbors(MapDetector):
    """Distance to the nearest positions of good images, after PatchCore (Roth et al. 2022).

    PatchCore's own score of an image is in ``anomaly.detectors.patchcore``.

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
        rows = torch.cat([rows_of(self._pooled(block)) for block in blocks_of(maps, 64, self.device)])
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

    Distances to the nearest center only shrink, so earlier ones are upper bounds. Centers are selected from
    the farthest points, the candidates, while one of them is at least as far as the bound of all others;
    then the distances of all points are updated, with all new centers in one matrix product.

    Args:
        points: [N, D].
        first: index of the first point.
    """
    squares, chosen = points.square().sum(1), torch.empty(size, dtype=torch.int64, device=points.device)
    nearest = torch.full_like(squares, torch.inf)
    chosen[0], nearest[first] = first, -torch.inf  # so that rounding errors cannot select it again
    known, count = 0, 1  # number of centers in `nearest`, and in `chosen`
    while count < size:
        _approach(nearest, points, squares, chosen[known:count])
        known = count
        candidates = min(len(points), max(_CANDIDATES, len(points) // 32))
        found = nearest.topk(min(len(points), candidates + 1))
        bound = found.values[-1] if candidates < len(points) else -torch.inf
        rows, distances = found.indices[:candidates], found.values[:candidates]
        near, near_squares = points[rows], squares[rows]
        while count < size and not distances[last := distances.argmax()] < bound:  # also if it is NaN
            chosen[count] = rows[last]
            distance = torch.addmv(near_squares, near, near[last], alpha=-2).add_(near_squares[last])
            distances = torch.minimum(distances, distance)
            distances[last] = -torch.inf
            count += 1
        nearest[rows] = distances
    return chosen


def _approach(nearest: Tensor, points: Tensor, squares: Tensor, centers: Tensor) -> None:
    """Lowers squared distances to the nearest center [N], in place, to those from new centers.

    Args:
        points: [N, D].
        squares: their squared lengths [N].
        centers: indices of the new centers.
    """
    parts = (each.split(max(1, _PRODUCTS // len(centers))) for each in (nearest, points, squares))
    for distances, some, some_squares in zip(*parts, strict=True):
        products = torch.addmm(squares[centers], some, points[centers].T, alpha=-2)
        torch.minimum(distances, products.amin(1) + some_squares, out=distances)
