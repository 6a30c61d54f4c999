"""Metrics of scores: of images (detection) and of pixels (localisation).

Imports torch and numpy; the scipy that scikit-learn brings (extra ``train``) for PRO.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine import final, runlog
from dxmi_ext.engine.errors import UserError


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
    """AUPRO (Bergmann et al. 2020): the area under the per-region overlap, the mean over regions of the share
    that is found, over false positive rates up to ``max_fpr``, relative to it. 1 is best.

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
                f"PRO: masks must be [n, H, W] and max_fpr > 0 and <= 1, got {list(self.shape)} and {max_fpr}"
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
    say: final.Say = runlog.note,
) -> dict[str, dict[str, float]]:
    """All metrics, each class by itself, and their means over classes (DxMI, Table 5).

    A number that cannot be computed is omitted, for its class and in the means, and a line says so.

    Args:
        image_scores, anomalous: [n]; `detectors.detect`, `AnomalyData.anomalous`.
        pixel_scores, masks: [n, H, W]; `detectors.localise`. Without them pictures are measured alone. A
            defective picture whose mask marks nothing does not count.
        classes: int64 [n]; None: all are of one.
        class_names: names of the classes; those without images are omitted.
        say: gets the lines.

    Returns:
        by class name, last "mean": image_auroc, image_ap (average precision), pixel_auroc, pixel_ap, pro.
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
    return result | {"mean": means}


def _of_class(scores: Tensor, truth: np.ndarray, what: str, say: final.Say) -> dict[str, float]:
    """image_auroc and so on, or pixel_auroc and so on, of a class; ``what`` says which and ends so."""
    kind = what.rpartition(" ")[2]
    if (one := _of_one_kind(truth)) is not None:
        say(f"{what} metrics are omitted: {one}")
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
    """What `evaluate` will leave out whatever the scores are, in lines. Arguments as there; names of the
    pictures."""
    lines = []
    unmarked = np.zeros(len(anomalous), bool) if masks is None else _unmarked(anomalous, masks)
    if unmarked.any():
        first = f", such as that of {names[int(np.argmax(unmarked))]}" if names else ""
        lines.append(
            f"{unmarked.sum()} of the {anomalous.sum()} masks of defective images mark nothing{first}; pixel "
            "metrics leave these images out"
        )
    for i in np.unique(classes):
        rows, name = classes == i, class_names[i]
        for kind, truth in (("image", anomalous), ("pixel", masks)):
            kept = rows & ~unmarked if kind == "pixel" else rows
            if truth is not None and (one := _of_one_kind(truth[kept])) is not None:
                lines.append(f"{name}: {kind} metrics will be omitted: {one}")
    return lines


def _unmarked(anomalous: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """bool [n]: defective, and the mask marks nothing."""
    marked = np.fromiter((mask.any() for mask in masks), bool, len(masks))  # masks are mapped from disk
    return anomalous & ~marked


def _of_one_kind(truth: np.ndarray) -> str | None:
    """Why no metric can be computed, in words; None: it can."""
    if truth.size == 0:
        return "none are tested"
    found = truth.any()
    if found and not truth.all():
        return None
    return f"all {len(truth)} that are tested are {'defective' if found else 'good'}"


def _pair(scores: np.ndarray | Tensor, anomalous: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Truths, bool [m], and scores, float64 [m]."""
    truth, score = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in (anomalous, scores))
    if truth.shape != score.shape:
        raise AnomalyMetricError(f"scores must be {list(truth.shape)}, as the truth, got {list(score.shape)}")
    truth, score = truth.astype(bool).ravel(), score.ravel()
    score = score if score.dtype == np.float32 else score.astype(np.float64)
    if not (score > -np.inf).all():  # inf is a rank as good as any
        raise AnomalyMetricError("scores must be numbers or inf, got NaN or -inf")
    if (one := _of_one_kind(truth)) is not None:
        raise AnomalyMetricError(f"scores must be of good and of anomalous data: {one}")
    return truth, score
