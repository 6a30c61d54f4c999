"""PatchCore's score of an image (Roth et al. 2022), as a baseline. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

import torch
from torch import Tensor

from dxmi_ext.anomaly.detectors.common import Detector, detect
from dxmi_ext.anomaly.detectors.plain import NearestNeighbors
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps

_AROUND = 9
"""b, number of positions of the memory in a neighborhood, as in anomalib; the paper does not say."""


class PatchCore:
    """Nearest neighbors with PatchCore's score of an image (eq. 7): the largest distance of its positions,
    weighted down in crowded neighborhoods of the memory. Score maps are those of nearest neighbors.

    Args:
        neighbors: detector of the distances, which may be fitted already.
    """

    def __init__(self, neighbors: NearestNeighbors) -> None:
        self.neighbors = neighbors

    def fit(self, maps: FeatureMaps) -> None:
        self.neighbors.fit(maps)

    def score(self, maps: FeatureMaps) -> Tensor:
        return self.neighbors.score(maps)

    @torch.no_grad()
    def detect(self, maps: FeatureMaps, scores: Tensor) -> Tensor:
        """Scores of images, float32 [n] on the CPU.

        Args:
            maps: maps of the images.
            scores: their score maps [n, h, w].
        """
        memory = self.neighbors.memory
        highest = scores.flatten(1).max(1)
        rows = self.neighbors.positions(maps, highest.indices)
        nearest = memory[_distances(rows, memory).argmin(1)]  # m*, also the first of those around it
        around = _distances(nearest, memory).topk(min(_AROUND, len(memory)), largest=False).indices
        distances = (memory[around] - rows[:, None]).square().sum(2).sqrt()
        weight = 1 - distances.softmax(1)[:, 0]
        return highest.values * weight.cpu()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def image_scores(detector: Detector, maps: FeatureMaps, scores: Tensor, *, top_share: float) -> Tensor:
    """Scores of images [n] from their score maps [n, h, w]: PatchCore's own, or those of `detect`."""
    if isinstance(detector, PatchCore):
        return detector.detect(maps, scores)
    return detect(scores, top_share=top_share)
