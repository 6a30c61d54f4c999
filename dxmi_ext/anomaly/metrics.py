"""Metrics of the scores of images (detection) and of pixels (localization).

Imports torch and numpy; scipy, which scikit-learn installs (extra ``train``), for PRO.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs import final


class AnomalyMetricError(UserError, ValueError):
    """Scores do not match the ground truth, or all data are of one kind."""


def auroc(scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> float:
    """Area under the ROC curve: 1 if every defect scores above all good data, 0.5 for random scores.

    Args:
        scores, anomalous: arrays or tensors of the same shape.

    Raises:
        AnomalyMetricError: all are good, or all anomalous.
    """
    return _Ranking(scores, anomalous).auroc()


def average_precision(scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> float:
    """Area under the precision-recall curve, as a sum without interpolation; arguments as in `auroc`."""
    return _Ranking(scores, anomalous).average_precision()


def per_region_overlap(
    scores: np.ndarray | Tensor, masks: np.ndarray | Tensor, *, max_fpr: float = 0.3
) -> float:
    """AUPRO (Bergmann et al. 2020): area under the per-region overlap (the mean over regions of the share
    that is found) up to the false positive rate ``max_fpr``, divided by ``max_fpr``. 1 is best.

    Regions are connected through edges and corners. Every score is a threshold, without binning.

    Args:
        scores: [n, H, W].
        masks: bool [n, H, W].
    """
    return _Ranking(scores, masks).per_region_overlap(max_fpr)


class _Ranking:
    """Scores in descending order, sorted once for all metrics, because sorting millions of pixels is slow.

    Every score is a threshold; equal scores exceed it together.
    """

    def __init__(self, scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> None:
        self.shape = tuple(anomalous.shape)
        self.truth, score = _pair(scores, anomalous)
        self.order = np.argsort(-score)
        ranked = score[self.order]
        self.last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        """Indices of the last entry of each distinct score."""
        self.found = np.append(0, np.cumsum(self.truth[self.order])[self.last])
        """Number of anomalous entries above all thresholds (0) and at or above each threshold."""
        self.false = np.append(0, self.last + 1) - self.found
        """The same for good entries."""

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
                f"PRO: masks must be [n, H, W] and max_fpr > 0 and <= 1, got {list(self.shape)} and {max_fpr}"
            )
        weights, regions = [], 0
        for mask in self.truth.reshape(self.shape):
            labeled, count = ndimage.label(mask, np.ones((3, 3)))
            inverse = 1 / np.bincount(labeled.ravel(), minlength=count + 1).clip(min=1)
            inverse[0] = 0
            weights.append(inverse[labeled.ravel()])
            regions += count
        fpr = self.false / self.false[-1]
        covered = np.cumsum(np.concatenate(weights)[self.order])[self.last]
        overlap = np.append(0.0, covered / regions)
        end = int(np.searchsorted(fpr, max_fpr, side="right"))
        if end < len(fpr):  # interpolates a last point at max_fpr
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
    say: final.Say = runlog.note,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over classes (DxMI, Table 5), and all metrics of each class.

    A metric that cannot be computed for a class is skipped, also in the mean, with a note.

    Args:
        image_scores, anomalous: [n], from `detectors.detect` and `AnomalyData.anomalous`.
        pixel_scores, masks: [n, H, W], from `detectors.localize` and the data; None: metrics of images only.
            Pixel metrics skip defective images with empty masks.
        classes: int64 [n]; None: all images are of one class.
        class_names: names of the classes; classes without images are skipped.
        say: receives the notes.

    Returns:
        The means, and the metrics by class name: image_auroc, image_ap (average precision), pixel_auroc,
        pixel_ap, pro.
    """
    classes = np.zeros(len(image_scores), np.int64) if classes is None else classes
    result: dict[str, dict[str, float]] = {}
    for i in np.unique(classes):
        rows, name = classes == i, class_names[i]
        result[name] = numbers = _of_class(image_scores[rows], anomalous[rows], f"{name}: image", say)
        if pixel_scores is not None and masks is not None:
            rows &= ~_unmarked(anomalous, masks)
            numbers |= _of_class(pixel_scores[rows], masks[rows], f"{name}: pixel", say)
    names = {k: None for numbers in result.values() for k in numbers}  # in their order
    means = {k: float(np.mean([each[k] for each in result.values() if k in each])) for k in names}
    return means, result


def _of_class(scores: Tensor, truth: np.ndarray, what: str, say: final.Say) -> dict[str, float]:
    """Metrics of a class for images or pixels; the last word of ``what`` (image or pixel) is their prefix."""
    kind = what.rpartition(" ")[2]
    if (one := _of_one_kind(truth)) is not None:
        say(f"{what} metrics are skipped: {one}")
        return {}
    if (ranking := final.attempt(f"{what} metrics", lambda: _Ranking(scores, truth), say)) is None:
        return {}
    numbers = {f"{kind}_auroc": ranking.auroc(), f"{kind}_ap": ranking.average_precision()}
    if kind == "pixel":
        numbers |= final.numbers(f"{what}: pro", lambda: {"pro": ranking.per_region_overlap()}, say)
    return numbers


def unmeasurable(
    anomalous: np.ndarray,
    masks: np.ndarray | None,
    classes: np.ndarray,
    class_names: Sequence[str],
    names: Sequence[str] = (),
) -> list[str]:
    """Notes on metrics that `evaluate` will skip whatever the scores are.

    Args:
        anomalous, masks, classes, class_names: see `evaluate`.
        names: names of the images.
    """
    lines = []
    unmarked = np.zeros(len(anomalous), bool) if masks is None else _unmarked(anomalous, masks)
    if unmarked.any():
        first = f", such as that of {names[int(np.argmax(unmarked))]}" if names else ""
        lines.append(
            f"{unmarked.sum()} of the {anomalous.sum()} masks of defective images are empty{first}; pixel "
            "metrics skip these images"
        )
    for i in np.unique(classes):
        rows, name = classes == i, class_names[i]
        for kind, truth in (("image", anomalous), ("pixel", masks)):
            kept = rows & ~unmarked if kind == "pixel" else rows
            if truth is not None and (one := _of_one_kind(truth[kept])) is not None:
                lines.append(f"{name}: {kind} metrics will be skipped: {one}")
    return lines


def _unmarked(anomalous: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """bool [n]: which images are defective and have an empty mask."""
    marked = np.fromiter((mask.any() for mask in masks), bool, len(masks))  # memory-mapped
    return anomalous & ~marked


def _of_one_kind(truth: np.ndarray) -> str | None:
    """The reason why no metric can be computed; None if metrics can be computed."""
    if truth.size == 0:
        return "there are no test data"
    found = truth.any()
    if found and not truth.all():
        return None
    return f"all {len(truth)} tested are {'defective' if found else 'good'}"


def _pair(scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Flattens the ground truth, bool [m], and scores, float32 or float64 [m], after checks."""
    truth, score = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in (anomalous, scores))
    if truth.shape != score.shape:
        raise AnomalyMetricError(f"scores must be {list(truth.shape)}, as the truth, got {list(score.shape)}")
    truth, score = truth.astype(bool).ravel(), score.ravel()
    score = score if score.dtype == np.float32 else score.astype(np.float64)
    if not (score > -np.inf).all():  # inf can be ranked
        raise AnomalyMetricError("scores must be numbers or inf, got NaN or -inf")
    if (one := _of_one_kind(truth)) is not None:
        raise AnomalyMetricError(f"scores must be of both good and anomalous data: {one}")
    return truth, score
