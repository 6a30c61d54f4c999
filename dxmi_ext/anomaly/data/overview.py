"""An overview of the data at a path without decoding them. Imports ``dxmi_ext.images``."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dxmi_ext.anomaly.data import layouts, vectors
from dxmi_ext.images.data.contents import resolved
from dxmi_ext.images.data.listing import Skipped
from dxmi_ext.images.data.overview import Overview, by_label, relative

_MASK_KEYS = {"mask", "masks", "mask_packed"}
_ROW_KEYS = [form.format(key) for key in vectors.ROWS for form in ("{}", "{}_train", "train_{}")]


def recipe_for(path: Path) -> str:
    """The recipe for the data at a path: "anomaly", "anomaly-vectors", or otherwise "images".

    Raises:
        ImageDataError: as in `layouts.recognizes`.
    """
    if path.is_dir():
        return "anomaly" if layouts.recognizes(path) else "images"
    if path.suffix.lower() == ".csv":
        return "anomaly-vectors"
    try:
        shapes = _shapes(path)
    except (OSError, ValueError, zipfile.BadZipFile):
        return "images"  # its loader raises the error
    if any(len(shapes[key]) < 3 for key in _ROW_KEYS if key in shapes):
        return "anomaly-vectors"
    return "anomaly" if shapes.keys() & _MASK_KEYS else "images"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of an .npy or .npz file by their keys in lower case, from their headers."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {"arr_0": _shape(file)}
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                found[name.removesuffix(".npy").lower()] = _shape(file)
    return found


def _shape(file: IO[bytes]) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]


def of_anomalies(
    path: Path | str, classes: Sequence[str] | None = None, train_share: float = 0.7
) -> Overview:
    """An overview of the images that `dataset.load` reads with the same arguments.

    Raises:
        ImageDataError: as in `layouts.find`.
    """
    path, splits, masks, files = resolved(path), {}, 0, dict[str, tuple[str, str]]()
    arrays, skipped, layout = dict[tuple[int, ...], int](), list[Skipped](), ""
    for split in ("train", "test"):
        source = layouts.find(path, split, classes, train_share)
        labels = np.array([item.label for item in source.items], np.int64)
        splits[split] = by_label(labels, source.label_names, len(labels))
        masks += sum(item.mask is not None for item in source.items)
        names = source.label_names
        files |= {item.file: (split, names[item.label]) for item in source.items if item.file is not None}
        if source.items and source.items[0].file is None:
            shape = np.asarray(source.items[0].image()).shape
            arrays[shape] = arrays.get(shape, 0) + len(labels)
        layout, skipped = source.layout, [*skipped, *source.skipped]
    return Overview(path, layout, splits, masks, relative(skipped, path), files, arrays)


def of_vectors(path: Path | str, train_share: float = 0.7, seed: int = 0) -> Overview:
    """An overview of the vectors that `vectors.load` reads with the same arguments.

    Raises:
        VectorDataError: as in `vectors.load`.
    """
    path = resolved(path)
    found = vectors.load(path, train_share=train_share, seed=seed)
    splits = {"train": {"good": len(found.train)}}
    if len(found.test):
        splits["test"] = by_label(found.anomalous.astype(np.int64), ["good", "anomalous"], len(found.test))
    return Overview(path, "vectors", splits, 0, [], {}, {})
