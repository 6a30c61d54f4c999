"""A trained detector of anomalies: pictures or vectors in, scores out. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext.anomaly import detectors
from dxmi_ext.anomaly.preparation import prepared
from dxmi_ext.anomaly.vectors import Columns
from dxmi_ext.engine.errors import UserError
from dxmi_ext.images.features import Extractor
from dxmi_ext.images.pixels import NOMINAL, Scale


class ScoreError(UserError, ValueError):
    """A detector cannot be made, or pictures cannot be scored."""


class TooFew(ScoreError):
    """Good pictures are too few for a threshold of that quantile."""


class Scorer(nn.Module):
    """A frozen backbone, an energy on the positions of its maps, and from where on scores mean a defect.

    Args:
        backbone: of ``anomaly.backbones``.
        energy: what scores, as `detectors.maps_of` takes it: positions [N, C] -> [N], or a `MapDetector`.
        preparation: of the backbone's maps for the energy, [n, C, h, w] -> [n, D, h, w]; None: as they are.
        threshold: a picture with a higher score is anomalous; see `threshold_of`.
        pixel_threshold: the same of a pixel, for heat maps; above 0.
        top_share: a picture's score is the mean over this share of its positions, the highest; 0: their
            maximum (DxMI, sec. 5.3).
        size: height and width that files are brought to first; None: the backbone's.
        scale: of files of other than 8 bits: that of the training images.

    Raises:
        ScoreError: a threshold or the share is out of its bounds, or no size is known.
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
        self.size, self.scale = known, scale

    @property
    def device(self) -> torch.device:
        """Where it is; images come there by themselves."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] -> the energy of each position, float32 [n, h, w], on the scorer's device.

        Raises:
            FeatureError: other images.
        """
        return detectors.maps_of(self.preparation(self.backbone(images.to(self.device))), self.energy)

    def scores(self, maps: Tensor) -> Tensor:
        """Maps [n, h, w] -> [n]."""
        return detectors.detect(maps, top_share=self.top_share)


class VectorScorer(nn.Module):
    """An energy on rows of numbers, and from where on a score means an anomaly.

    Args:
        energy: what scores, as `detectors.maps_of` takes it.
        preparation: of the columns that vary, as maps [n, C, 1, 1], for the energy.
        columns: which those are.
        threshold: a row with a higher score is anomalous.
    """

    def __init__(
        self, energy: nn.Module, preparation: nn.Module, columns: Columns, *, threshold: float
    ) -> None:
        super().__init__()
        self.energy, self.preparation = energy.eval(), preparation.eval()
        self.columns, self.threshold = columns, threshold

    @property
    def device(self) -> torch.device:
        """Where it is; rows come there by themselves."""
        return next(itertools.chain(self.energy.parameters(), self.energy.buffers())).device

    def scores(self, rows: np.ndarray) -> Tensor:
        """float64 [n, d] -> float32 [n] on the CPU; inf where a row differs in a constant column."""
        maps = prepared(self.columns.varying(rows)[:, None, None], self.preparation)
        scores = detectors.detector_of(self.energy, self.device).score(maps)[:, 0, 0]
        scores[torch.from_numpy(self.columns.deviates(rows))] = math.inf
        return scores


def threshold_of(scores: Tensor | np.ndarray, quantile: float) -> float:
    """A threshold that another good picture exceeds with a probability of at most 1 - quantile.

    It is the ceil((n + 1) quantile)-th smallest of n scores (split conformal prediction, Vovk et al. 2005):
    that holds for any distribution and any n, if these pictures and the other are exchangeable.

    Args:
        scores: [n], of good pictures that did not train.
        quantile: from 0 to 1, which no n suffices for.

    Raises:
        TooFew: n is, for the quantile.
        ScoreError: another quantile, or some score is not finite.
    """
    values = torch.as_tensor(scores).flatten().double()
    if not 0 <= quantile <= 1:
        raise ScoreError(f"quantile must be from 0 to 1, got {quantile}")
    if not values.isfinite().all():
        raise ScoreError(f"scores: {int((~values.isfinite()).sum())} of {len(values)} are not finite")
    rank = math.ceil((len(values) + 1) * quantile - 1e-9)  # 20 * .95 may be a hair above 19
    if rank > len(values):
        least = math.ceil(max(1, quantile / (1 - quantile) - 1e-9)) if quantile < 1 else "infinitely many"
        raise TooFew(f"quantile={quantile} requires at least {least} good images, got {len(values)}")
    return float(values.sort().values[max(rank, 1) - 1])
