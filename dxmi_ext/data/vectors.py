"""Vectors for anomaly detection: rows of numbers in an npz, good ones to train on. Imports numpy and
``dxmi_ext``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dxmi_ext.errors import UserError
from dxmi_ext.files import UNREADABLE

LAYOUTS = """\
  X [n, d]; y [n], 0 is good, all else anomalous: good rows are split at random, the others are tested
  X [n, d] alone: all rows train, nothing is tested
  X_train [n, d], X_test [m, d], y_test [m]; y_train [n] too: rows that are not good do not train"""


class VectorDataError(UserError, ValueError):
    """A file of vectors that is missing, damaged or of an unknown layout."""


class Vectors(NamedTuple):
    """What trains and what is tested."""

    train: np.ndarray
    """float64 [n, d], good rows in random order."""
    test: np.ndarray
    """float64 [m, d]; m may be 0."""
    anomalous: np.ndarray
    """bool [m]"""


def load(path: Path | str, *, train_share: float = 0.7, seed: int = 0) -> Vectors:
    """The vectors of an npz in a layout of LAYOUTS.

    Args:
        train_share: of the good rows, where the file has no split of its own.
        seed: of that split, and of the training rows' order.

    Raises:
        VectorDataError: names the array and what is wrong with it.
    """
    path = Path(path).expanduser()
    try:
        with np.load(path) as file:  # without pickles, which is the default
            arrays = {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise VectorDataError(f"data: {path}: cannot be read as npz without pickles ({error})") from error
    random = np.random.default_rng(seed)
    if "X" in arrays:
        x = _rows(arrays["X"], "X", path)
        if "y" not in arrays:
            return Vectors(random.permutation(x), x[:0], np.zeros(0, bool))
        anomalous = _truth(arrays["y"], "y", len(x), path)
        order = random.permutation(np.flatnonzero(~anomalous))
        if len(order) < 2:
            raise VectorDataError(f"{path}: y: got {len(order)} good rows (0), a split wants two")
        end = min(max(1, round(train_share * len(order))), len(order) - 1)
        rest = np.sort(np.concatenate((order[end:], np.flatnonzero(anomalous))))
        return Vectors(x[order[:end]], x[rest], anomalous[rest])
    if {"X_train", "X_test", "y_test"} <= arrays.keys():
        train, test = (_rows(arrays[name], name, path) for name in ("X_train", "X_test"))
        if train.shape[1] != test.shape[1]:
            raise VectorDataError(
                f"{path}: X_test: got {test.shape[1]} columns, wants {train.shape[1]}, as X_train"
            )
        if "y_train" in arrays:
            train = train[~_truth(arrays["y_train"], "y_train", len(train), path)]
        if len(train) < 2:
            raise VectorDataError(f"{path}: X_train: got {len(train)} good row(s), wants two or more")
        return Vectors(random.permutation(train), test, _truth(arrays["y_test"], "y_test", len(test), path))
    raise VectorDataError(
        f"{path}: has the arrays {', '.join(arrays) or 'none'}, wants X, or X_train, X_test and y_test; "
        "`dxmi data --help` lists the layouts"
    )


def _rows(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if array.dtype.kind not in "fiub" or array.ndim != 2 or array.size == 0:
        raise VectorDataError(
            f"{path}: {name}: got {array.dtype} {list(array.shape)}, wants numbers [n, d], neither of them 0"
        )
    array = array.astype(np.float64)
    if not (finite := np.isfinite(array)).all():
        row, column = np.argwhere(~finite)[0]
        raise VectorDataError(
            f"{path}: {name}: {(~finite).sum()} of its numbers are not finite, the first in row {row}, "
            f"column {column}"
        )
    return array


def _truth(array: np.ndarray, name: str, n: int, path: Path) -> np.ndarray:
    if array.shape != (n,) or array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        raise VectorDataError(
            f"{path}: {name}: got {array.dtype} {list(array.shape)}, wants {n} numbers, 0 for good"
        )
    return array != 0
