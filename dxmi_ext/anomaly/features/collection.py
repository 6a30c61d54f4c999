"""The data on which a run of anomaly detection is trained and tested, as maps for both images and vectors.

A vector is a map with one position. Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dxmi_ext.anomaly.data import dataset as data_anomaly
from dxmi_ext.anomaly.data import vectors as data_vectors
from dxmi_ext.anomaly.data.dataset import AnomalyData
from dxmi_ext.anomaly.data.vectors import Columns
from dxmi_ext.anomaly.features import feature_maps
from dxmi_ext.images.data.layouts import ImageDataError
from dxmi_ext.images.data.pixels import Scale
from dxmi_ext.images.metrics.features import Extractor


class Good(NamedTuple):
    """Training data: features before any preparation."""

    train: np.ndarray
    """[n, h, w, C]"""
    held_out: np.ndarray
    """[k, h, w, C]: nothing is trained on them, so their scores resemble those of new good data."""
    columns: Columns | None = None
    """For vectors: the columns of which the C channels are kept."""
    held_out_images: np.ndarray | None = None
    """uint8 [k, 3, H, W]; None for vectors."""


class Examined(NamedTuple):
    """The test data."""

    maps: np.ndarray
    """Features [m, h, w, C], before any preparation; m may be 0."""
    anomalous: np.ndarray
    """bool [m]"""
    classes: np.ndarray
    """int64 [m]"""
    class_names: list[str]
    masks: np.ndarray | None = None
    """bool [m, H, W]; None for vectors and for images without masks."""
    images: np.ndarray | None = None
    """uint8 [m, 3, H, W]; None for vectors."""
    deviates: np.ndarray | None = None
    """bool [m], for vectors: which rows differ in a column that is constant in the good training rows."""
    names: Sequence[str] = ()
    """Names of the images [m], if they have any."""
    scale: Scale | None = None
    """Scale by which images were converted to 8 bits; None for vectors."""

    def at(self, rows: np.ndarray) -> Examined:
        """A subset of the test data.

        Args:
            rows: int64 indices, or bool [m].
        """
        optional = (self.masks, self.images, self.deviates)
        masks, images, deviates = (None if each is None else each[rows] for each in optional)
        maps, anomalous, classes = self.maps[rows], self.anomalous[rows], self.classes[rows]
        return Examined(maps, anomalous, classes, self.class_names, masks, images, deviates)


class Source(Protocol):
    """A source of training and test data."""

    def good(self, holdout: float) -> Good:
        """The good data, with a share of it (at least one image or row) held out."""

    def tested(self) -> Examined: ...


@dataclasses.dataclass
class Pictures:
    """A collection of images in one of ``anomaly_sources.LAYOUTS``. The last images of each class are held
    out, because neighboring images tend to be alike.

    Args:
        path: path of the collection.
        backbone: backbone from ``anomaly.features.backbones``.
        size, classes, train_share, cache: see `dataset.load`.
        device: device of the backbone.
        few: number of images of each split to use, without caching their features; None: all.
        scale: scale of a run for images that are not of 8 bits; None: that of the training split.

    Raises:
        ImageDataError: (by the methods) as in `dataset.load`, or a class has too few images.
    """

    path: Path | str
    backbone: Extractor
    size: int = 224
    classes: Sequence[str] | None = None
    train_share: float = 0.7
    cache: Path | str | None = None
    device: torch.device | str = "cpu"
    few: int | None = None
    scale: Scale | None = None

    def good(self, holdout: float) -> Good:
        data = self._load("train")
        for i, count in enumerate(np.bincount(data.classes)):
            if count == 1:
                name = data.class_names[i]
                raise ImageDataError(
                    f"{self.path}: class {name!r} must have >= 2 good images to train on, got 1"
                )
        return divided(self._maps(data), holdout, data.classes, data.images)

    def tested(self) -> Examined:
        data = self._load("test")
        maps = self._maps(data)
        truths = data.anomalous, data.classes, data.class_names, data.masks
        return Examined(maps, *truths, data.images, names=data.names, scale=data.scale)

    def _load(self, split: str) -> AnomalyData:
        data = data_anomaly.load(
            self.path,
            split=split,
            size=self.size,
            classes=self.classes,
            train_share=self.train_share,
            cache=self.cache,
            scale=self.scale,
        )
        self.scale = data.scale if split == "train" else self.scale
        return data if self.few is None else _part(data, self.few)

    def _maps(self, data: AnomalyData) -> np.ndarray:
        if self.few is None:
            return feature_maps.load(data, self.backbone, device=self.device, cache=self.cache).maps
        return feature_maps.computed(data, self.backbone, self.device)


@dataclasses.dataclass
class Vectors:
    """A file of vectors in one of ``vectors.LAYOUTS``; rows are split at random.

    Args:
        path, train_share, seed: see `vectors.load`.
        columns: columns of the rows on which a run was trained; None: those of the good rows here.

    Raises:
        VectorDataError: (by the methods) as in `vectors.load`, or there are too few good rows.
    """

    path: Path | str
    train_share: float = 0.7
    seed: int = 0
    columns: Columns | None = None

    def good(self, holdout: float) -> Good:
        rows, columns = self._loaded.train, self._columns
        if len(rows) < 3:
            raise data_vectors.VectorDataError(
                f"{self.path} must have >= 3 good rows to train on, got {len(rows)}"
            )
        rows = columns.varying(rows)
        held = np.arange(len(rows)) < _count(holdout, len(rows))
        # Columns that are constant in the training rows must have the same value in the held-out rows.
        rare = data_vectors.constant(rows[~held])
        held &= (rows[:, rare] == rows[-1, rare]).all(axis=1)
        if not held.any():
            raise data_vectors.VectorDataError(
                f"{self.path}: good rows must be more numerous or similar to hold some out, got {len(rows)}"
            )
        maps = rows[:, None, None]
        return Good(maps[~held], maps[held], columns)

    def tested(self) -> Examined:
        _, rows, anomalous = self._loaded
        classes, columns = np.zeros(len(rows), np.int64), self._columns
        maps = columns.varying(rows)[:, None, None]
        names = [Path(self.path).stem]
        return Examined(maps, anomalous, classes, names, deviates=columns.deviates(rows))

    @functools.cached_property
    def _loaded(self) -> data_vectors.Vectors:
        count = None if self.columns is None else self.columns.total
        return data_vectors.load(self.path, train_share=self.train_share, seed=self.seed, columns=count)

    @functools.cached_property
    def _columns(self) -> Columns:
        if self.columns is not None:
            return self.columns
        return Columns.of(self._loaded.train, str(self.path))


def divided(
    maps: np.ndarray,
    holdout: float,
    classes: np.ndarray | None = None,
    images: np.ndarray | None = None,
) -> Good:
    """Divides features of good images into training data and held-out data, the last images of each class.

    Args:
        maps: features [n, h, w, C] in the order of the images' names, at least two for each class.
        holdout: share of each class to hold out, at least one image.
        classes: int64 [n]; None: all images are of one class.
        images: uint8 [n, 3, H, W].
    """
    classes = np.zeros(len(maps), np.int64) if classes is None else classes
    held = np.zeros(len(maps), bool)
    for i in np.unique(classes):
        members = np.flatnonzero(classes == i)
        held[members[-_count(holdout, len(members)) :]] = True
    return Good(maps[~held], maps[held], held_out_images=None if images is None else images[held])


def _count(share: float, n: int) -> int:
    """The number of n to hold out."""
    return min(max(1, round(share * n)), n - 1)


def _part(data: AnomalyData, n: int) -> AnomalyData:
    """The first n images of the first class."""
    rows = np.flatnonzero(data.classes == data.classes[0])[:n]
    return AnomalyData(
        data.images[rows],
        data.labels[rows],
        None if data.masks is None else data.masks[rows],
        classes=data.classes[rows],
        class_names=data.class_names,
        label_names=data.label_names,
        split=data.split,
    )
