"""Validation of detectors by synthetic defects in held-out good data.

Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext.anomaly import metrics
from dxmi_ext.anomaly.data import synthetic
from dxmi_ext.anomaly.data.dataset import AnomalyData
from dxmi_ext.anomaly.detectors.common import Detector, localize
from dxmi_ext.anomaly.detectors.patchcore import image_scores
from dxmi_ext.anomaly.features import feature_maps
from dxmi_ext.anomaly.features.collection import Good
from dxmi_ext.anomaly.features.preparation import prepared
from dxmi_ext.images.metrics.features import Extractor

_ENOUGH = 200  # held-out images or rows, which are used again with each kind of defect
_PIXELS = 64  # height and width, about, at which heat maps are compared with the masks of defects


class Validation(NamedTuple):
    """Features, before any preparation, of good data and of the same data with defects."""

    good: np.ndarray
    """[k, h, w, C]"""
    odd: np.ndarray
    """[kinds * k, h, w, C]: the same with defects, kind by kind."""
    masks: np.ndarray | None = None
    """bool [kinds * k, H, W], the pixels of the defects; None for vectors."""

    @classmethod
    def of(cls, good: Good, backbone: Extractor | None, seed: int, device: torch.device) -> Validation:
        """Validation data from the held-out data, or from an evenly spaced subset of it."""
        count = len(good.held_out)
        rows = np.unique(np.linspace(0, count - 1, min(_ENOUGH, count)).round().astype(int))
        if backbone is None:
            mean = good.train[:, 0, 0].mean(0)
            odd = synthetic.odd_rows(good.held_out[rows, 0, 0], mean, seed=seed)
            return cls(good.held_out[rows], odd.reshape(-1, 1, 1, odd.shape[2]))
        assert good.held_out_images is not None
        made = synthetic.defective(good.held_out_images[rows], seed=seed)
        images, masks = (each.reshape(-1, *each.shape[2:]) for each in made)
        data = AnomalyData(images, np.ones(len(images), np.int64))
        return cls(
            good.held_out[rows],
            feature_maps.computed(data, backbone, device, "features of synthetic defects"),
            masks,
        )


class Verdict(NamedTuple):
    """How well a detector separates good data from defects."""

    auroc: float
    """The mean over kinds of defects."""
    influence: np.ndarray
    """float64 [k]: contribution of each held-out image, without and with defects; the standard deviation
    divided by sqrt(k) is the standard error of the AUROC (DeLong et al. 1988, with images as clusters)."""
    pixel_auroc: float = math.nan
    """The mean over kinds of defects of the AUROC of their pixels against all others; NaN for vectors."""


def judged(good: Tensor, odd: Tensor) -> Verdict:
    """The verdict on scores of good data [k] and of the same with defects [kinds * k]."""
    a, b = good.double().numpy(), odd.double().numpy().reshape(-1, len(good))
    higher = (b[:, :, None] > a) + 0.5 * (b[:, :, None] == a)  # [kinds, k with a defect, k good]
    influence = higher.mean((0, 1)) + higher.mean((0, 2))
    return Verdict(float(higher.mean()), influence)


def judge(
    detector: Detector, preparation: nn.Module, validation: Validation, *, top_share: float = 0.0
) -> Verdict:
    """The verdict on a fitted or trained detector."""
    pictures, scores = [], torch.empty(0)
    for features_ in (validation.good, validation.odd):
        maps = prepared(features_, preparation)
        scores = detector.score(maps)
        pictures.append(image_scores(detector, maps, scores, top_share=top_share))
    verdict = judged(*pictures)
    if validation.masks is None:
        return verdict
    return verdict._replace(pixel_auroc=_pixel_auroc(scores, validation.masks, len(validation.good)))


def _pixel_auroc(scores: Tensor, masks: np.ndarray, count: int) -> float:
    """The mean over kinds of the AUROC of the pixels of defects.

    Args:
        scores: score maps [kinds * count, h, w].
        masks: bool [kinds * count, H, W].
    """
    height, width = masks.shape[1:]
    step = max(1, min(height, width) // _PIXELS)
    thinned = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
    found = []
    for kind in range(0, len(masks), count):
        pixels = localize(scores[kind : kind + count], (height, width))[thinned]
        truth = masks[kind : kind + count][thinned]
        if truth.any() and not truth.all():
            found.append(metrics.auroc(pixels, truth))
    return float(np.mean(found)) if found else math.nan
