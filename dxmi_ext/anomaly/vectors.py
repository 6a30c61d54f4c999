"""Vectors for anomaly detection: rows of numbers in a file, good ones to train on. Imports numpy and
``dxmi_ext``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dxmi_ext.engine.files import UNREADABLE
from dxmi_ext.images import npz
from dxmi_ext.images.contents import VectorDataError as VectorDataError
from dxmi_ext.images.contents import printable, what_it_is

LAYOUTS = """\
  X [n, d] (or samples, data, arr_0); y [n] (or labels, label, arr_1), 0 is good, all else anomalous: good
  rows are split at random, the others are tested
  X [n, d] alone (an .npz, an .npy or a .csv): all rows train, nothing is tested
  X_train [n, d], X_test [m, d], y_test [m]; y_train [n] too: rows that are not good do not train"""

_ROWS = ("x", "samples", "data", "arr_0")
_FORMATS = ".npz, .npy or .csv"
_EXTREME = 1e100  # squares of larger numbers, or of smaller differences, would leave float64
_SAME = 2e-12  # two numbers that differ by such a share of their size are the same


class Vectors(NamedTuple):
    """What trains and what is tested."""

    train: np.ndarray
    """float64 [n, d], good rows in random order."""
    test: np.ndarray
    """float64 [m, d]; m may be 0."""
    anomalous: np.ndarray
    """bool [m]"""


class Columns(NamedTuple):
    """Which columns of a table vary among good rows.

    Nothing can be learned from a column that is constant there, so it is dropped. But a row that differs in
    it is like no good one: `deviates` finds these, and their score is inf, above every threshold.
    """

    total: int
    """d, with those that are constant."""
    constants: dict[int, float]
    """Column, from 0, -> its value in the good rows."""

    @classmethod
    def of(cls, rows: np.ndarray, what: str = "X") -> Columns:
        """Those of good rows, float64 [n, d].

        Args:
            what: what errors call the rows.

        Raises:
            VectorDataError: all columns are constant, or one varies less than float64 can square.
        """
        same = constant(rows)
        if same.all():
            raise VectorDataError(f"{what}: a column must vary, got {rows.shape[1]} that are constant in the "
                                  f"{len(rows)} good rows to train on")  # fmt: skip
        spread = np.ptp(rows, axis=0)
        if len(tiny := np.flatnonzero(~same & (spread < 1 / _EXTREME))):
            raise VectorDataError(
                f"{what}: a column must vary by {1 / _EXTREME:g} or more, got {spread[tiny[0]]:.3g} in "
                f"column {tiny[0]}; multiply it"
            )
        return cls(rows.shape[1], {int(i): float(rows[0, i]) for i in np.flatnonzero(same)})

    def varying(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n, d] without the constant columns."""
        return np.delete(rows, list(self.constants), axis=1)

    def deviates(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: which rows [n, d] differ in a constant column, and not by rounding to float32 alone."""
        found: np.ndarray = differs(rows[:, list(self.constants)], *self.values())
        return found

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Those of the constant columns [k], and the same in float32; both as float64."""
        value = np.array(list(self.constants.values()), np.float64)
        with np.errstate(over="ignore"):
            return value, value.astype(np.float32).astype(np.float64)

    def told(self) -> str:
        """The constant columns in words, at most ten by number."""
        names = [str(i) for i in self.constants]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return f"column{'s' * (len(names) > 1)} {', '.join(names[:10])}{more} of {self.total} (from 0)"

    def to_json(self) -> dict[str, Any]:
        return {"total": self.total, "constants": {str(k): v for k, v in self.constants.items()}}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Columns:
        return cls(stored["total"], {int(k): v for k, v in stored["constants"].items()})


def differs(x: Any, value: Any, rounded: Any) -> Any:
    """Which rows differ in constant columns: numpy arrays or tensors.

    Args:
        x: float64 [n, k], those columns.
        value, rounded: of `Columns.values`.

    Returns:
        bool [n]
    """
    return ((abs(x - value) > _SAME * abs(value)) & (x != rounded)).any(1)


def constant(rows: np.ndarray) -> np.ndarray:
    """bool [d]: which columns of rows [n, d], n > 0, have one value, to float64's rounding."""
    low, high = rows.min(axis=0), rows.max(axis=0)
    same: np.ndarray = high - low <= _SAME / 2 * np.maximum(np.abs(low), np.abs(high))
    return same


def load(path: Path | str, *, train_share: float = 0.7, seed: int = 0, columns: int | None = None) -> Vectors:
    """The vectors of a file in a layout of LAYOUTS.

    Args:
        train_share: of the good rows, where the file has no split of its own.
        seed: of that split, and of the training rows' order.
        columns: d, where it is known.

    Raises:
        VectorDataError: names the array and what is wrong with it.
    """
    path = Path(path).expanduser()
    arrays, random = _read(path), np.random.default_rng(seed)
    own = arrays.has(*_ROWS, split="train")
    stored = arrays.get(*_ROWS, split="train" if own else None)
    truth = arrays.get(*npz.LABELS, split="train" if own else None)
    if stored is None:
        raise VectorDataError(
            f"{printable(path)}: arrays must be X, or X_train, X_test and y_test, got {arrays.keys}; "
            "`dxmi data --help` lists the layouts"
        )
    x = _rows(stored, "X_train" if own else "X", path, columns)
    if own and arrays.has(*_ROWS, split="test"):
        test, test_truth = arrays.get(*_ROWS, split="test"), arrays.get(*npz.LABELS, split="test")
        if test is None or test_truth is None:
            raise VectorDataError(f"{printable(path)}: must have both X_test and y_test, got X_test alone")
        test = _rows(test, "X_test", path, x.shape[1])
        if truth is not None:
            x = x[~_truth(truth, "y_train", len(x), path)]
        if len(x) < 2:
            raise VectorDataError(f"{printable(path)}: X_train must have 2 good rows or more, got {len(x)}")
        return Vectors(random.permutation(x), test, _truth(test_truth, "y_test", len(test), path))
    if truth is None:
        return Vectors(random.permutation(x), x[:0], np.zeros(0, bool))
    anomalous = _truth(truth, "y", len(x), path)
    order = random.permutation(np.flatnonzero(~anomalous))
    if len(order) < 2:
        raise VectorDataError(
            f"{printable(path)}: y must have 2 good rows (0) or more for a split, got {len(order)}"
        )
    end = min(max(1, round(train_share * len(order))), len(order) - 1)
    rest = np.sort(np.concatenate((order[end:], np.flatnonzero(anomalous))))
    return Vectors(x[order[:end]], x[rest], anomalous[rest])


def rows_to_score(path: Path | str, columns: int) -> np.ndarray:
    """The rows of a file, float64 [n, columns]: its array X, else X_test, else the only one.

    Raises:
        VectorDataError: there is no such array, or something is wrong with it.
    """
    path = Path(path).expanduser()
    arrays = _read(path)
    for name, split in (("X", None), ("X_test", "test")):
        if (stored := arrays.get(*_ROWS, split=split)) is not None:
            return _rows(stored, name, path, columns)
    if (alone := arrays.alone) is None:
        raise VectorDataError(
            f"{printable(path)}: must have the array X or X_test, or one array alone, got {arrays.keys}"
        )
    return _rows(arrays.read(alone), alone, path, columns)


def _read(path: Path) -> npz.Arrays:
    """The arrays of a file; x is that of a csv."""
    if path.suffix.lower() != ".csv":
        return npz.Arrays(path, VectorDataError, formats=_FORMATS)
    try:
        return npz.Arrays(path, VectorDataError, content={"x": _csv(path)})
    except UNREADABLE as error:
        what = what_it_is(path)
        why = error if what is None else f"it {what}"
        raise VectorDataError(f"{printable(path)}: cannot be read as {_FORMATS} ({why})") from error


def _csv(path: Path) -> np.ndarray:
    """A table of numbers with commas, under a line of names or not; names are no numbers, or 0, 1, 2, ..."""
    with path.open(encoding="utf-8-sig") as file:
        first = [cell.strip().strip('"') for cell in file.readline().split(",")]
    named = not any(map(_is_number, first)) or first == [str(i) for i in range(len(first))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an empty file, which is refused as such
        return np.loadtxt(path, delimiter=",", skiprows=int(named), ndmin=2, encoding="utf-8-sig")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(array: np.ndarray, name: str, path: Path, columns: int | None = None) -> np.ndarray:
    if array.dtype.kind not in "fiub" or array.ndim != 2 or array.size == 0:
        raise VectorDataError(
            f"{printable(path)}: {name} must be numbers [n, d], neither of them 0, "
            f"got {array.dtype} {list(array.shape)}"
        )
    if columns is not None and array.shape[1] != columns:
        raise VectorDataError(
            f"{path}: {name} must have {columns} columns, as the rows to train on, got {array.shape[1]}"
        )
    with np.errstate(over="ignore"):  # of long doubles, refused below
        array = array.astype(np.float64)
    if not (finite := np.isfinite(array)).all():
        row, column = np.argwhere(~finite)[0]
        raise VectorDataError(
            f"{printable(path)}: {name}: {(~finite).sum()} of its numbers are not finite, the first in row "
            f"{row}, column {column}"
        )
    if (large := np.abs(array) > _EXTREME).any():
        row, column = np.argwhere(large)[0]
        raise VectorDataError(
            f"{path}: {name} must have numbers of size {_EXTREME:g} or less, got {array[row, column]:.3g} in "
            f"row {row}, column {column}"
        )
    return array


def _truth(array: np.ndarray, name: str, n: int, path: Path) -> np.ndarray:
    flat = npz.column(array, n)
    if flat is None or flat.dtype.kind not in "fiub" or not np.isfinite(flat).all():
        raise VectorDataError(
            f"{printable(path)}: {name} must be {n} numbers, 0 for good, "
            f"got {array.dtype} {list(array.shape)}"
        )
    return flat != 0
