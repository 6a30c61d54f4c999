"""The layout of an npz file: arrays of images, labels and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dxmi_ext.anomaly.data.layouts.items import GOOD, Item, Source, leading
from dxmi_ext.images.data import npz
from dxmi_ext.images.data.contents import ImageDataError, printable


def read(file: Path, split: str, train_share: float) -> Source:
    arrays = npz.Arrays(file)
    images, labels = arrays.get(*npz.IMAGES), arrays.get(*npz.LABELS)
    if images is None or labels is None:
        raise ImageDataError(
            f"{printable(file)}: keys must be x and y, got {arrays.keys}; "
            "`dxmi data --help` lists the layouts"
        )
    images = npz.images(images, arrays)
    n = len(images)
    labels, label_names = _defects(npz.labels(labels, n, arrays), arrays)
    masks = npz.masks(arrays, images.shape[:3])
    groups, names = _of_each(arrays, n, "num", "group", "groups"), _of_each(arrays, n, "name", "names")
    if groups is None:
        groups = np.arange(n)

    order = np.lexsort((np.arange(n), groups))
    good, defective = order[labels[order] == 0], order[labels[order] > 0]
    trains = np.array(leading(groups[good].tolist(), train_share, file))
    trains &= ~np.isin(groups[good], groups[defective])
    chosen = good[trains] if split == "train" else np.concatenate([good[~trains], defective])

    def item(i: int) -> Item:
        mask = None if masks is None or labels[i] == 0 else masks[i]
        name = str(i) if names is None else _text(names[i])
        return Item(name, 0, int(labels[i]), lambda: images[i], None if mask is None else lambda: mask)

    items = [item(int(i)) for i in chosen]
    return Source([str(file)], items, [file.stem], label_names, masks is not None, "npz")


def _defects(labels: np.ndarray, arrays: npz.Arrays) -> tuple[np.ndarray, list[str]]:
    """Converts integer labels, 0 for good, to the kinds 0, 1, ... [n], and returns these and their names.

    Raises:
        ImageDataError: the labels are text.
    """
    if labels.dtype.kind in "US":
        raise arrays.refuse("labels", labels, f"{len(labels)} integers, 0 for good")
    names = arrays.get("classes")
    given = [] if names is None or names.ndim != 1 else [_text(name) for name in names]
    if labels.size and labels.min() >= 0 and labels.max() < max(len(labels), len(given)):
        values = np.arange(1 + labels.max())
    else:  # arbitrary numbers
        values = np.concatenate([[0], np.setdiff1d(labels, [0])])
        labels = np.where(labels == 0, 0, np.searchsorted(values[1:], labels) + 1)
    if len(given) > values.max() and values.min() >= 0:
        return labels, [given[value] for value in values]
    return labels, [GOOD, *(f"defect {value}" for value in values[1:])]


def _of_each(arrays: npz.Arrays, n: int, *names: str) -> np.ndarray | None:
    """An array with a value for each image [n]; None if it is missing.

    Raises:
        ImageDataError: the array has another shape.
    """
    if (found := arrays.get(*names)) is None:
        return None
    if (flat := npz.column(found, n)) is None:
        raise ImageDataError(
            f"{printable(arrays.file)}: {names[0]} must be [{n}], one for each image, got {list(found.shape)}"
        )
    return flat


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
