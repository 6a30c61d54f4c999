"""How well scores tell defects: of pictures (detection) and of pixels (localisation).

Imports torch and numpy; the scipy that scikit-learn brings (extra ``train``) for PRO.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.errors import UserError


class AnomalyMetricError(UserError, ValueError):
    """Scores and truths do not belong together, or there is nothing to tell apart."""


def auroc(scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> float:
    """Area under the ROC curve: 1 where every defect scores above everything good, .5 for guesses.

    Args:
        scores, anomalous: of one shape.

    Raises:
        AnomalyMetricError: all are good, or none.
    """
    return _Ranking(scores, anomalous).auroc()


def average_precision(scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> float:
    """Area under the precision-recall curve, as a sum without interpolation. Arguments as in `auroc`."""
    return _Ranking(scores, anomalous).average_precision()


def per_region_overlap(
    scores: np.ndarray | Tensor, masks: np.ndarray | Tensor, *, max_fpr: float = 0.3
) -> float:
    """PRO (Bergmann et al. 2020): the share of a defect's region that is found, a mean over regions of any
    size, and over thresholds whose false positive rate is up to ``max_fpr``. 1 is best.

    Regions are connected through edges and corners. Every score is a threshold, so nothing is binned.

    Args:
        scores: [n, H, W].
        masks: bool [n, H, W].
    """
    return _Ranking(scores, masks).per_region_overlap(max_fpr)


class _Ranking:
    """Scores in falling order, sorted once for all metrics: of millions of pixels it is most of the work.

    Every score is a threshold; those of one score are found together.
    """

    def __init__(self, scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> None:
        self.shape = tuple(anomalous.shape)
        self.truth, score = _pair(scores, anomalous)
        self.order = np.argsort(-score)
        ranked = score[self.order]
        self.last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        """Places of the last of each score."""
        self.found = np.append(0, np.cumsum(self.truth[self.order])[self.last])
        """Anomalous ones at or above each threshold, and above all."""
        self.false = np.append(0, self.last + 1) - self.found
        """Good ones."""

    def auroc(self) -> float:
        area = (np.diff(self.false) * (self.found[1:] + self.found[:-1]).astype(np.float64)).sum() / 2
        return float(area / self.found[-1] / self.false[-1])

    def average_precision(self) -> float:
        precision = self.found[1:] / (self.last + 1)
        return float((np.diff(self.found) * precision).sum() / self.found[-1])

    def per_region_overlap(self, max_fpr: float = 0.3) -> float:
        from scipy import ndimage

        if len(self.shape) != 3 or not 0 < max_fpr <= 1:
            raise AnomalyMetricError(
                f"PRO: got masks {list(self.shape)} and max_fpr={max_fpr}, wants [n, H, W] and a rate up to 1"
            )
        weights, regions = [], 0
        for mask in self.truth.reshape(self.shape):
            labelled, count = ndimage.label(mask, np.ones((3, 3)))
            inverse = 1 / np.bincount(labelled.ravel(), minlength=count + 1).clip(min=1)
            inverse[0] = 0
            weights.append(inverse[labelled.ravel()])
            regions += count
        fpr = self.false / self.false[-1]
        covered = np.cumsum(np.concatenate(weights)[self.order])[self.last]
        overlap = np.append(0.0, covered / regions)
        end = int(np.searchsorted(fpr, max_fpr, side="right"))
        if end < len(fpr):  # a last point on the way to the next threshold
            way = (max_fpr - fpr[end - 1]) / (fpr[end] - fpr[end - 1])
            overlap[end] = overlap[end - 1] + way * (overlap[end] - overlap[end - 1])
            fpr[end] = max_fpr
        fpr, overlap = fpr[: end + 1], overlap[: end + 1]
        return float((np.diff(fpr) * (overlap[1:] + overlap[:-1])).sum() / 2 / max_fpr)


def evaluate(
    image_scores: Tensor,
    anomalous: np.ndarray,
    pixel_scores: Tensor | None = None,
    masks: np.ndarray | None = None,
    *,
    classes: np.ndarray | None = None,
    class_names: Sequence[str] = ("all",),
) -> dict[str, dict[str, float]]:
    """All metrics, each class by itself, and their means over classes (DxMI, Table 5).

    Args:
        image_scores, anomalous: [n]; `detectors.detect`, `AnomalyData.anomalous`.
        pixel_scores, masks: [n, H, W]; `detectors.localise`. Without them pictures are measured alone.
        classes: int64 [n]; None: all are of one.
        class_names: of the classes; those without pictures are left out.

    Returns:
        by class name, last "mean": image_auroc, image_ap (average precision), pixel_auroc, pixel_ap, pro.
    """
    classes = np.zeros(len(image_scores), np.int64) if classes is None else classes
    result: dict[str, dict[str, float]] = {}
    for i in np.unique(classes):
        rows, name = classes == i, class_names[i]
        try:
            of_images = _Ranking(image_scores[rows], anomalous[rows])
            numbers = {"image_auroc": of_images.auroc(), "image_ap": of_images.average_precision()}
            if pixel_scores is not None and masks is not None:
                of_pixels = _Ranking(pixel_scores[rows], masks[rows])
                numbers |= {"pixel_auroc": of_pixels.auroc(), "pixel_ap": of_pixels.average_precision()}
                numbers |= {"pro": of_pixels.per_region_overlap()}
        except AnomalyMetricError as error:
            raise AnomalyMetricError(f"class {name!r}: {error}") from None
        result[name] = numbers
    names = next(iter(result.values()))
    means = {k: float(np.mean([numbers[k] for numbers in result.values()])) for k in names}
    return result | {"mean": means}


def _pair(scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Truths, bool [m], and scores, float64 [m]."""
    truth, score = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in (anomalous, scores))
    if truth.shape != score.shape:
        raise AnomalyMetricError(f"scores: got {list(score.shape)}, wants {list(truth.shape)}, as the truth")
    truth, score = truth.astype(bool).ravel(), score.ravel()
    score = score if score.dtype == np.float32 else score.astype(np.float64)
    if not (score > -np.inf).all():  # inf is a rank as good as any
        raise AnomalyMetricError("scores must be numbers or inf, got NaN or -inf")
    if truth.all() or not truth.any():
        kind = "defective" if truth.any() else "good"
        raise AnomalyMetricError(f"scores: all {len(truth)} are {kind}; wants some of both")
    return truth, score
