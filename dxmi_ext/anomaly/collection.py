"""The data that a run of anomaly detection trains and is tested on, as maps for images and vectors.

A vector is a map of one position. Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dxmi_ext.anomaly import dataset as data_anomaly
from dxmi_ext.anomaly import features
from dxmi_ext.anomaly import vectors as data_vectors
from dxmi_ext.anomaly.dataset import AnomalyData
from dxmi_ext.anomaly.vectors import Columns
from dxmi_ext.images.features import Extractor
from dxmi_ext.images.layouts import ImageDataError
from dxmi_ext.images.pixels import Scale


class Good(NamedTuple):
    """Training data: features before any preparation."""

    train: np.ndarray
    """[n, h, w, C]"""
    held_out: np.ndarray
    """[k, h, w, C]: nothing is trained on them, so their scores are those of new good data."""
    columns: Columns | None = None
    """Of vectors: which of theirs the C are."""
    held_out_images: np.ndarray | None = None
    """uint8 [k, 3, H, W]; None: no pictures."""


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
    """bool [m, H, W]; None: no pictures, or none that tell where defects are."""
    images: np.ndarray | None = None
    """uint8 [m, 3, H, W]; None: no pictures."""
    deviates: np.ndarray | None = None
    """bool [m], of vectors: those that differ where all good ones that train are the same."""
    names: Sequence[str] = ()
    """Of the pictures [m], where they have any."""
    scale: Scale | None = None
    """By which pictures of other than 8 bits became these; None: there are no pictures."""

    def at(self, rows: np.ndarray) -> Examined:
        """Some of them: int64, or bool [m]."""
        optional = (self.masks, self.images, self.deviates)
        masks, images, deviates = (None if each is None else each[rows] for each in optional)
        maps, anomalous, classes = self.maps[rows], self.anomalous[rows], self.classes[rows]
        return Examined(maps, anomalous, classes, self.class_names, masks, images, deviates)


class Source(Protocol):
    """A source of training and test data."""

    def good(self, holdout: float) -> Good:
        """A share of the good ones, at least one, is held out."""

    def tested(self) -> Examined: ...


@dataclasses.dataclass
class Pictures:
    """A collection of pictures, in a layout of ``anomaly_sources.LAYOUTS``; the last of each class are held
    out, as like pictures stand together.

    Args:
        path: of the collection.
        backbone: of ``anomaly.backbones``.
        size, classes, train_share, cache: as `dataset.load` takes them.
        device: of the backbone.
        few: compute features of so many pictures of each split alone, and keep none of them; None: of all.
        scale: of pictures of other than 8 bits: a run's; None: that of the training split.

    Raises:
        ImageDataError: by the methods: as `dataset.load`, or a class has too few pictures.
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
                    f"{self.path}: class {name!r} must have 2 good images or more to train on, got 1"
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
            return features.load(data, self.backbone, device=self.device, cache=self.cache).maps
        return features.computed(data, self.backbone, self.device)


@dataclasses.dataclass
class Vectors:
    """A file of vectors, in a layout of ``vectors.LAYOUTS``; rows are split at random.

    Args:
        path, train_share, seed: as `vectors.load` takes them.
        columns: of the rows that a run learned from; None: found in these.

    Raises:
        VectorDataError: by the methods: as `vectors.load`, or there are too few good rows.
    """

    path: Path | str
    train_share: float = 0.7
    seed: int = 0
    columns: Columns | None = None

    def good(self, holdout: float) -> Good:
        rows, columns = self._loaded.train, self._columns
        if len(rows) < 3:
            raise data_vectors.VectorDataError(
                f"{self.path} must have 3 good rows or more to train on, got {len(rows)}"
            )
        rows = columns.varying(rows)
        held = np.arange(len(rows)) < _count(holdout, len(rows))
        # A value that held-out rows alone have would leave its column constant to those that train.
        rare = data_vectors.constant(rows[~held])
        held &= (rows[:, rare] == rows[-1, rare]).all(axis=1)
        if not held.any():
            raise data_vectors.VectorDataError(
                f"{self.path}: good rows must be more, or more alike, to hold some out, got {len(rows)}"
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
    """Features of good pictures [n, h, w, C], of which a share is held out: the last of each class.

    Args:
        maps: in the order of the pictures' names, two or more of each class.
        holdout: the share, of each at least one.
        classes: int64 [n]; None: all are of one.
        images: uint8 [n, 3, H, W], the pictures.
    """
    classes = np.zeros(len(maps), np.int64) if classes is None else classes
    held = np.zeros(len(maps), bool)
    for i in np.unique(classes):
        members = np.flatnonzero(classes == i)
        held[members[-_count(holdout, len(members)) :]] = True
    return Good(maps[~held], maps[held], held_out_images=None if images is None else images[held])


def _count(share: float, n: int) -> int:
    """How many of n are held out."""
    return min(max(1, round(share * n)), n - 1)


def _part(data: AnomalyData, n: int) -> AnomalyData:
    """The first n of the first class."""
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
