"""Comparison of detectors on the same features: thresholds, metrics, latency and a table.

Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext.anomaly import metrics
from dxmi_ext.anomaly.detectors.common import Detector, detect, localize
from dxmi_ext.anomaly.detectors.patchcore import image_scores
from dxmi_ext.anomaly.features.collection import Examined
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.anomaly.features.preparation import prepared
from dxmi_ext.anomaly.scores import scoring
from dxmi_ext.anomaly.scores.scoring import TooFew, false_alarm_interval, rank_of, threshold_of
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs import final
from dxmi_ext.images.metrics.features import Extractor

TITLES = {
    "dxmi": "DxMI",
    "tau0": "DxMI, tau = 0",
    "langevin": "Langevin negatives",
    "base": "its base alone",
    "autoencoder": "autoencoder alone",
    "knn": "nearest neighbors",
    "patchcore": "PatchCore",
    "gaussian": "Gaussian positions",
    "gaussians": "summed Gaussians",
}
"""Titles of methods, in the order of the table."""

_COLUMNS = {
    "image_auroc": "AUROC",
    "image_ap": "AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pro": "AUPRO",
    "latency_ms": "ms each",
}

_SHARES = {"found": "of the defective", "false_alarms": "of the good"}


def titles_of(*, vectors: bool) -> Mapping[str, str]:
    """Titles of methods for images, or vectors, which have no positions."""
    return TITLES | {"gaussian": "Gaussian"} if vectors else TITLES


def calibrate(
    detector: Detector,
    good: FeatureMaps,
    size: int | None,
    quantile: float,
    pixel_quantile: float,
    *,
    top_share: float = 0.0,
) -> dict[str, float]:
    """Thresholds for images and for pixels: quantiles of the scores of held-out good data.

    The threshold for images is that of `threshold_of`, or, with a note, the highest score if there are too
    few images for the quantile.

    Args:
        good: maps of at least one image or vector.
        size: height and width of images; None for vectors, whose positions count as pixels.
        top_share: see `detect`.

    Returns:
        ``threshold`` and ``pixel_threshold``; the number of images, ``held_out``; and the 95 % confidence
        interval of the share of new good images above the threshold, ``false_alarms_low`` and
        ``false_alarms_high``.
    """
    scores = detector.score(good)
    pixels = scores if size is None else localize(scores, (size, size))
    pictures = detect(scores, top_share=top_share)
    try:
        threshold, rank = threshold_of(pictures, quantile), rank_of(len(pictures), quantile)
    except TooFew as error:
        threshold, rank = float(pictures.max()), len(pictures)
        runlog.note(f"the threshold is the highest held-out score: {error}")
    pixel_threshold = max(float(np.quantile(pixels.numpy(), pixel_quantile)), 1e-12)  # equal images give 0
    low, high = false_alarm_interval(len(pictures), rank)
    return {
        "threshold": threshold,
        "pixel_threshold": pixel_threshold,
        "held_out": float(len(pictures)),
        "false_alarms_low": low,
        "false_alarms_high": high,
    }


def measure(pictures: Tensor, scores: Tensor, tested: Examined) -> tuple[dict[str, float], list[str]]:
    """Metrics of scores, and notes on metrics that cannot be computed.

    Args:
        pictures: scores of the images [m].
        scores: score maps [m, h, w].

    Returns:
        Means over classes, named as in `metrics.evaluate` (image_auroc, ...); for several classes also the
        metrics of each (image_auroc/CLASS).
    """
    notes: list[str] = []
    pixels = None
    if tested.masks is not None:
        height, width = tested.masks.shape[1:]
        pixels = localize(scores, (height, width))
    numbers, found = metrics.evaluate(
        pictures,
        tested.anomalous,
        pixels,
        tested.masks,
        classes=tested.classes,
        class_names=tested.class_names,
        say=notes.append,
    )
    if len(tested.class_names) > 1:
        numbers |= {f"{k}/{name}": v for name, each in found.items() for k, v in each.items()}
    return numbers, notes


def at_threshold(pictures: Tensor, tested: Examined, threshold: float) -> dict[str, float]:
    """Shares of images whose score [m] is above the threshold: ``found`` among defective images and
    ``false_alarms`` among good images, each only if there are any."""
    above = (pictures > threshold).numpy()
    kinds = {"found": tested.anomalous, "false_alarms": ~tested.anomalous}
    return {name: float(above[members].mean()) for name, members in kinds.items() if members.any()}


def latency_ms(
    detector: Detector, maps: FeatureMaps, backbone: Extractor | None, images: np.ndarray | None
) -> float:
    """Milliseconds from a decoded image to its score map: the median of five runs with one image."""
    one, picture = FeatureMaps(maps.maps[:1]), None
    if backbone is not None and images is not None:
        device = next(backbone.buffers()).device
        picture = torch.from_numpy(images[:1].copy()).to(device)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        if backbone is not None and picture is not None:
            backbone(picture).cpu()
        detector.score(one)  # returns a CPU tensor, so the device has finished
        times.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(times[1:]), 3)  # the first run is a warm-up


class Method(NamedTuple):
    """A fitted or trained detector and its preparation of features."""

    preparation: nn.Module
    detector: Detector


class Comparison(NamedTuple):
    """Results of methods on test data."""

    numbers: dict[str, float]
    """Metrics by name."""
    notes: list[str]
    """Notes on metrics that could not be computed."""
    maps: Tensor | None
    """Score maps [m, h, w] of the first method; None if it fails."""
    scores: dict[str, np.ndarray]
    """Scores of images by method, float32 [m]."""


def compare(
    methods: Mapping[str, Method],
    first: str,
    tested: Examined,
    backbone: Extractor | None,
    threshold: float,
    *,
    top_share: float = 0.0,
) -> Comparison:
    """Metrics and scores of every method.

    Args:
        methods: methods by their names in TITLES.
        first: name of the method that scores new images; its metrics have no prefix.
        tested: test data, with features before any preparation.
        backbone: backbone, whose time is part of the latency; None for vectors.
        threshold: threshold for the scores of the first method.
        top_share: see `detect`.
    """
    numbers: dict[str, float] = {}
    notes: list[str] = []
    of_first: Tensor | None = None
    of_pictures: dict[str, np.ndarray] = {}
    for name in runlog.each("test data", [first, *(name for name in methods if name != first)]):
        prepares, detector = methods[name]

        def measured(
            prepares: nn.Module = prepares, detector: Detector = detector
        ) -> tuple[Tensor, Tensor, dict[str, float], list[str]]:
            maps = prepared(tested.maps, prepares)
            scores = detector.score(maps)
            if tested.deviates is not None:
                scores[torch.from_numpy(tested.deviates)] = torch.inf
            pictures = image_scores(detector, maps, scores, top_share=top_share)
            found, lines = measure(pictures, scores, tested)
            found["latency_ms"] = latency_ms(detector, maps, backbone, tested.images)
            return scores, pictures, found, lines

        title = titles_of(vectors=backbone is None)[name]
        if (done := final.attempt(title, measured, notes.append)) is None:
            continue
        scores, pictures, found, lines = done
        of_pictures[name] = pictures.numpy()
        notes += [line for line in lines if line not in notes]  # most notes depend only on the data
        if name == first:
            of_first = scores
            numbers |= found | at_threshold(pictures, tested, threshold)
        else:
            numbers |= {f"{name}_{k}": v for k, v in found.items()}
    return Comparison(numbers, notes, of_first, of_pictures)


def table(
    numbers: Mapping[str, Any],
    first: str = "dxmi",
    published: Mapping[str, Mapping[str, float]] | None = None,
    *,
    titles: Mapping[str, str] = TITLES,
) -> str:
    """A table with one row per method and, for several classes, one row per class for the first method;
    without metrics, only the false alarms to expect.

    Args:
        numbers: metrics from `compare` and thresholds from `calibrate`.
        first: see `compare`.
        published: rows of published results, by title.
        titles: titles of methods; see `titles_of`.
    """
    columns = [name for name in _COLUMNS if name in numbers]
    lines = [f"{'':22}" + "".join(f"{_COLUMNS[name]:>12}" for name in columns)] if columns else []

    def row(title: str, values: Mapping[str, float], prefix: str = "", suffix: str = "") -> None:
        cells = [values.get(f"{prefix}{name}{suffix}") for name in columns]
        shown = ((f"{v:.1f}" if c == "latency_ms" else f"{v:.3f}") if v is not None else "" for c, v in
                 zip(columns, cells, strict=True))  # fmt: skip
        lines.append(f"{title:22}" + "".join(f"{cell:>12}" for cell in shown).rstrip())

    for name, title in titles.items():
        prefix = "" if name == first else f"{name}_"
        if any(f"{prefix}{column}" in numbers for column in columns):
            row(title, numbers, prefix)
    for title, values in (published or {}).items() if columns else ():
        row(title, values)
    classes = [key.partition("/")[2] for key in numbers if key.startswith("image_auroc/")]
    if classes:
        lines.append(f"{titles[first]} by class")
        for name in classes:
            row(f"  {name}", numbers, suffix=f"/{name}")
    shares = [f"{numbers[key]:.3f} {what}" for key, what in _SHARES.items() if key in numbers]
    if shares:
        lines.append(f"above the threshold, {numbers['threshold']:.4g}: {', '.join(shares)}")
    return "\n".join((*lines, *filter(None, (scoring.about(numbers),))))
