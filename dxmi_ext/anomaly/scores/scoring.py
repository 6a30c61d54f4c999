"""Trained detectors that score images or vectors. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext.anomaly.data.vectors import Columns
from dxmi_ext.anomaly.detectors import common
from dxmi_ext.anomaly.features.preparation import prepared
from dxmi_ext.engine.errors import UserError
from dxmi_ext.images.data.pixels import NOMINAL, Scale
from dxmi_ext.images.metrics.features import Extractor


class ScoreError(UserError, ValueError):
    """A detector cannot be created, or images cannot be scored."""


class TooFew(ScoreError):
    """There are too few good images for a threshold at the quantile."""


class Scorer(nn.Module):
    """A frozen backbone, an energy on the positions of its maps, and thresholds for the scores.

    Args:
        backbone: backbone from ``anomaly.features.backbones``.
        energy: positions [N, C] -> [N], or a `MapDetector`; see `common.maps_of`.
        preparation: preparation of the backbone's maps, [n, C, h, w] -> [n, D, h, w]; None: no preparation.
        threshold: score above which an image is anomalous; see `threshold_of`.
        pixel_threshold: the same for a pixel, for heat maps; > 0.
        top_share: share of the positions, the highest, whose mean is the score of an image; 0: the maximum
            (DxMI, sec. 5.3).
        size: height and width to which files are resized; None: the backbone's.
        scale: scale of the training images, for files that are not of 8 bits.
        about_threshold: sentence about the threshold, for reports.

    Raises:
        ScoreError: a threshold or the share is out of bounds, or the size is unknown.
    """

    def __init__(
        self,
        backbone: Extractor,
        energy: nn.Module,
        *,
        preparation: nn.Module | None = None,
        threshold: float,
        pixel_threshold: float,
        top_share: float = 0.0,
        size: int | None = None,
        scale: Scale = NOMINAL,
        about_threshold: str = "",
    ) -> None:
        super().__init__()
        if not (math.isfinite(threshold) and 0 < pixel_threshold < math.inf and 0 <= top_share <= 1):
            raise ScoreError(
                "threshold must be finite, pixel_threshold > 0 and top_share from 0 to 1, "
                f"got {threshold}, {pixel_threshold} and {top_share}"
            )
        known = getattr(backbone.network, "size", None) if size is None else size
        if not isinstance(known, int):
            raise ScoreError(f"size must be given, as backbone {backbone.name} has none")
        self.backbone, self.energy = backbone, energy.eval()
        self.preparation = (preparation or nn.Identity()).eval()
        self.threshold, self.pixel_threshold, self.top_share = threshold, pixel_threshold, top_share
        self.size, self.scale, self.about_threshold = known, scale, about_threshold

    @property
    def device(self) -> torch.device:
        """The device of the networks; images are moved to it."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] -> the energy of each position, float32 [n, h, w], on the scorer's device.

        Raises:
            FeatureError: the images have another type or shape.
        """
        return common.maps_of(self.preparation(self.backbone(images.to(self.device))), self.energy)

    def scores(self, maps: Tensor) -> Tensor:
        """Score maps [n, h, w] -> scores [n]."""
        return common.detect(maps, top_share=self.top_share)


class VectorScorer(nn.Module):
    """An energy on rows of numbers, and a threshold for the scores.

    Args:
        energy: scoring module; see `common.maps_of`.
        preparation: preparation of the varying columns, as maps [n, C, 1, 1].
        columns: the varying and the constant columns.
        threshold: score above which a row is anomalous.
        about_threshold: sentence about the threshold, for reports.
    """

    def __init__(
        self,
        energy: nn.Module,
        preparation: nn.Module,
        columns: Columns,
        *,
        threshold: float,
        about_threshold: str = "",
    ) -> None:
        super().__init__()
        self.energy, self.preparation = energy.eval(), preparation.eval()
        self.columns, self.threshold, self.about_threshold = columns, threshold, about_threshold

    @property
    def device(self) -> torch.device:
        """The device of the networks; rows are moved to it."""
        return next(itertools.chain(self.energy.parameters(), self.energy.buffers())).device

    def scores(self, rows: np.ndarray) -> Tensor:
        """Scores of rows: [n, d] -> float32 [n] on the CPU; inf for rows that differ in a constant column."""
        maps = prepared(self.columns.varying(rows)[:, None, None], self.preparation)
        scores = common.detector_of(self.energy, self.device).score(maps)[:, 0, 0]
        scores[torch.from_numpy(self.columns.deviates(rows))] = math.inf
        return scores


def threshold_of(scores: Tensor | np.ndarray, quantile: float) -> float:
    """A threshold that a new good image exceeds with a probability of at most 1 - quantile.

    It is the score of rank `rank_of` of n scores (split conformal prediction, Vovk et al. 2005). The bound
    holds for any distribution and any n if all images are exchangeable.

    Args:
        scores: scores [n] of held-out good images.
        quantile: quantile from 0 to 1; 1 would require infinitely many images.

    Raises:
        TooFew: n is too small for the quantile.
        ScoreError: the quantile is invalid, or a score is not finite.
    """
    values = torch.as_tensor(scores).flatten().double()
    rank = rank_of(len(values), quantile)
    if not values.isfinite().all():
        raise ScoreError(f"scores: {int((~values.isfinite()).sum())} of {len(values)} are not finite")
    return float(values.sort().values[rank - 1])


def rank_of(n: int, quantile: float) -> int:
    """The rank, from 1, of the threshold among n scores: ceil((n + 1) quantile).

    Raises:
        TooFew: n is too small for the quantile.
        ScoreError: the quantile is invalid.
    """
    if not 0 <= quantile <= 1:
        raise ScoreError(f"quantile must be from 0 to 1, got {quantile}")
    rank = math.ceil((n + 1) * quantile - 1e-9)  # 20 * .95 may be slightly above 19
    if rank > n:
        least = math.ceil(max(1, quantile / (1 - quantile) - 1e-9)) if quantile < 1 else "infinitely many"
        raise TooFew(f"quantile={quantile} requires at least {least} held-out scores, got {n}")
    return max(rank, 1)


def false_alarm_interval(n: int, rank: int) -> tuple[float, float]:
    """95 % confidence interval of the share of new good data above a threshold.

    The share of a continuous distribution above the score of a rank has the distribution
    Beta(n + 1 - rank, rank), whatever the distribution of scores. Its quantiles are those of Clopper and
    Pearson's exact interval.

    Args:
        n: number of held-out scores.
        rank: rank of the threshold among them, 1 to n.
    """
    if not 1 <= rank <= n:
        raise ValueError(f"rank must be from 1 to n={n}, got {rank}")
    return _beta_quantile(0.025, n + 1 - rank, rank), _beta_quantile(0.975, n + 1 - rank, rank)


def _beta_quantile(probability: float, a: int, b: int) -> float:
    """The quantile of Beta(a, b), by bisection of its distribution function, a binomial tail."""
    n = a + b - 1
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        below = sum(math.exp(_log_binomial(n, j, p)) for j in range(a))
        low, high = (p, high) if 1 - below < probability else (low, p)
    return (low + high) / 2


def _log_binomial(n: int, k: int, p: float) -> float:
    """The logarithm of the probability of k successes in n trials."""
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return choose + k * math.log(p) + (n - k) * math.log1p(-p)


def about(thresholds: Mapping[str, float]) -> str:
    """A sentence about the false alarms to expect, from the numbers of `comparison.calibrate`; empty for runs
    that have none."""
    if "held_out" not in thresholds:
        return ""
    low, high = (100 * thresholds[f"false_alarms_{end}"] for end in ("low", "high"))
    scores = (
        "1 held-out score" if thresholds["held_out"] == 1 else f"{thresholds['held_out']:.0f} held-out scores"
    )
    return (
        f"{low:.1f} % to {high:.1f} % of new good data will score above the threshold (95 % confidence "
        f"interval from {scores})."
    )
