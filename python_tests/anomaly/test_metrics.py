"""Metrics of detection and localization against direct implementations of their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dxmi_ext.anomaly import metrics as anomaly
from dxmi_ext.anomaly.curve import Curve, measure_of
from dxmi_ext.anomaly.features.collection import Examined
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.anomaly.metrics import AnomalyMetricError

pytest.importorskip("scipy")


def scored(n: int = 4, size: int = 9, levels: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and masks with regions of any size; the last image is good."""
    random = np.random.default_rng(0)
    masks = random.random((n, size, size)) < 0.2
    masks[-1] = False
    return random.integers(0, levels, masks.shape) / levels + 0.3 * masks, masks


def regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Regions of pixels connected through edges and corners, by flood fill."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        region = [left.pop()]
        for y, x in region:
            around = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            region += around
        found.append(region)
    return found


@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
def test_pro_is_what_each_threshold_finds(max_fpr: float) -> None:
    scores, masks = scored()
    points = [(0.0, 0.0)]
    for threshold in np.unique(scores)[::-1]:
        found = scores >= threshold
        shares = [
            np.mean([picture[y, x] for y, x in region])
            for picture, mask in zip(found, masks, strict=True)
            for region in regions(mask)
        ]
        points.append((found[~masks].mean(), float(np.mean(shares))))
    fine = np.linspace(0, max_fpr, 100_001)
    expected = np.interp(fine, *zip(*points, strict=True)).mean()
    assert anomaly.per_region_overlap(scores, masks, max_fpr=max_fpr) == pytest.approx(expected, abs=1e-4)


def test_pro_counts_regions_alike_whatever_their_size() -> None:
    """A large region that is missed weighs as much as a small one that is found."""
    masks = np.zeros((1, 20, 20), bool)
    masks[0, :10], masks[0, 15, 15] = True, True
    scores = np.zeros(masks.shape)
    scores[0, 15, 15] = 1
    # found alone up to a false positive rate of 0, from there on a line to (1, 1)
    assert anomaly.per_region_overlap(scores, masks, max_fpr=1.0) == pytest.approx(0.75)
    assert anomaly.per_region_overlap(scores, masks) == pytest.approx(0.5 + 0.5 * 0.3 / 2)
    assert anomaly.per_region_overlap(masks.astype(float), masks) == pytest.approx(1)


def test_auroc_and_average_precision_of_pairs() -> None:
    scores, masks = scored()
    bad, good = scores[masks], scores[~masks]
    pairs = (bad[:, None] > good).mean() + (bad[:, None] == good).mean() / 2
    assert anomaly.auroc(scores, torch.from_numpy(masks)) == pytest.approx(pairs)
    precision = [masks[scores >= s].mean() for s in bad]  # at the threshold of each defect
    assert anomaly.average_precision(torch.from_numpy(scores), masks) == pytest.approx(np.mean(precision))


def test_each_class_by_itself_then_their_mean() -> None:
    scores, masks = scored(8)
    masks[3] = False  # each class has a good image
    images, anomalous = scores.max(axis=(1, 2)) + np.arange(8), masks.any(axis=(1, 2))
    classes = np.repeat([0, 2], 4)
    arguments = torch.from_numpy(images), anomalous, torch.from_numpy(scores), masks
    names = ["nut", "none", "mean"]  # a class may be called so
    means, result = anomaly.evaluate(*arguments, classes=classes, class_names=names)
    assert list(result) == ["nut", "mean"]
    assert list(result["nut"]) == ["image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pro"]
    assert result["mean"]["pro"] == anomaly.per_region_overlap(scores[4:], masks[4:])
    assert result["nut"]["image_auroc"] == anomaly.auroc(images[:4], anomalous[:4])
    for name, mean in means.items():
        assert mean == pytest.approx((result["nut"][name] + result["mean"][name]) / 2)
    assert list(anomaly.evaluate(*arguments[:2])[1]["all"]) == ["image_auroc", "image_ap"]


def test_bad_arguments_of_metrics_are_rejected() -> None:
    with pytest.raises(AnomalyMetricError, match="all 3 tested are good"):
        anomaly.auroc(np.arange(3.0), np.zeros(3, bool))
    with pytest.raises(AnomalyMetricError, match="scores must be numbers or inf, got NaN or -inf"):
        anomaly.average_precision(np.array([1.0, np.nan]), np.array([True, False]))
    with pytest.raises(AnomalyMetricError, match=r"scores must be \[3\], as the truth, got \[2\]"):
        anomaly.auroc(np.arange(2.0), np.zeros(3, bool))


def test_metrics_that_cannot_be_computed_are_left_out_of_the_mean() -> None:
    """All screws are defective; one has an empty mask, and another a score map that is not finite."""
    scores, masks = scored(8)
    classes, lines = np.repeat([0, 1], 4), list[str]()
    masks[3] = masks[4] = False
    anomalous = masks.any(axis=(1, 2))
    anomalous[4:] = True
    arguments = anomalous, masks, classes, ["nut", "screw"], [f"{i}.png" for i in range(8)]
    assert anomaly.unmeasurable(*arguments) == [
        "2 of the 7 masks of defective images are empty, such as that of 4.png; pixel metrics skip these "
        "images",
        "screw: image metrics will be skipped: all 4 tested are defective",
    ]
    images, pixels = torch.arange(8.0), torch.from_numpy(scores)
    options = {"classes": classes, "class_names": ["nut", "screw"], "say": lines.append}
    means, found = anomaly.evaluate(images, anomalous, pixels, masks, **options)  # type: ignore[arg-type]
    assert list(found["screw"]) == ["pixel_auroc", "pixel_ap", "pro"]
    assert found["screw"]["pixel_auroc"] == anomaly.auroc(scores[5:7], masks[5:7])
    assert means["image_auroc"] == found["nut"]["image_auroc"]
    pixels[6, 0, 0] = torch.nan
    means, found = anomaly.evaluate(images, anomalous, pixels, masks, **options)  # type: ignore[arg-type]
    assert found["screw"] == {} and means["pro"] == found["nut"]["pro"]
    assert lines[-1].startswith("screw: pixel metrics")
    assert lines[-1].endswith("scores must be numbers or inf, got NaN or -inf")
    unmarked = anomaly.unmeasurable(np.array([False, True]), np.zeros((2, 3, 3), bool), classes[:2], ["nut"])
    assert unmarked[1] == "nut: pixel metrics will be skipped: all 1 tested are good"


def test_a_curve_leaves_out_energies_that_cannot_be_ranked(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight[0, 0] * x[:, 0]

    maps, anomalous = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1), np.array([False, False, True, True])
    tested = Examined(maps, anomalous, np.zeros(4, np.int64), ["all"])
    measure = measure_of(FeatureMaps(maps), tested, 0.0)
    assert measure is not None
    curve, energy = Curve(tmp_path / "curve.json", 1, measure), Scaled(1, 1)
    for iteration, weight in enumerate((1.0, math.nan, -1.0)):
        nn.init.constant_(energy.weight, weight)
        curve.add("dxmi", iteration, energy)
    assert curve.numbers() == {"curve/dxmi/0": 1.0, "curve/dxmi/2": 0.0}
