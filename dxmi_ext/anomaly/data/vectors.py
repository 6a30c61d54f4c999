"""Vectors for anomaly detection: rows of numbers in a file, with good rows for training. Imports numpy and
``dxmi_ext``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dxmi_ext.engine.errors import first_few
from dxmi_ext.engine.storage import tables
from dxmi_ext.engine.storage.files import UNREADABLE
from dxmi_ext.images.data import npz
from dxmi_ext.images.data.contents import VectorDataError as VectorDataError
from dxmi_ext.images.data.contents import printable, what_it_is

LAYOUTS = """\
  X [n, d] (or samples, data, arr_0); y [n] (or labels, label, arr_1), 0 is good, all else anomalous; good
  rows are split at random, and anomalous rows are for testing
  X [n, d] alone (an .npz, an .npy or a .csv of features): all rows are for training, without test data
  X_train [n, d], X_test [m, d], y_test [m]; optionally y_train [n], whose anomalous rows are not used"""

ROWS = ("x", "samples", "data", "arr_0")
"""Keys of rows, in lower case."""
_FORMATS = ".npz, .npy or .csv"
_EXTREME = 1e100  # squares of larger numbers, or of differences below 1 / this, leave float64
_SAME = 2e-12  # relative difference up to which two numbers count as equal


class Vectors(NamedTuple):
    """Training and test data."""

    train: np.ndarray
    """float64 [n, d], good rows in random order."""
    test: np.ndarray
    """float64 [m, d]; m may be 0."""
    anomalous: np.ndarray
    """bool [m]"""


class Columns(NamedTuple):
    """The varying and the constant columns of good rows.

    Constant columns carry no information for training and are dropped. But a row that differs in one is
    unlike all good rows: `deviates` finds such rows, and their score is inf, above every threshold.
    """

    total: int
    """d, including the constant columns."""
    constants: dict[int, float]
    """Index of a constant column -> its value in the good rows."""

    @classmethod
    def of(cls, rows: np.ndarray, what: str = "X") -> Columns:
        """The columns of good rows, float64 [n, d].

        Args:
            what: name of the rows in errors.

        Raises:
            VectorDataError: all columns are constant, or one varies too little to be squared in float64.
        """
        same = constant(rows)
        if same.all():
            raise VectorDataError(f"{what}: some column must vary, got {rows.shape[1]} constant in the "
                                  f"{len(rows)} good rows to train on")  # fmt: skip
        spread = np.ptp(rows, axis=0)
        if len(tiny := np.flatnonzero(~same & (spread < 1 / _EXTREME))):
            raise VectorDataError(
                f"{what}: a column must vary by >= {1 / _EXTREME:g}, got {spread[tiny[0]]:.3g} in "
                f"column {tiny[0]}; multiply it"
            )
        return cls(rows.shape[1], {int(i): float(rows[0, i]) for i in np.flatnonzero(same)})

    def varying(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n, d] without the constant columns."""
        return np.delete(rows, list(self.constants), axis=1)

    def deviates(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: which rows [n, d] differ in a constant column by more than rounding to float32."""
        found: np.ndarray = differs(rows[:, list(self.constants)], *self.values())
        return found

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Values of the constant columns [k], and the same rounded to float32; both as float64."""
        value = np.array(list(self.constants.values()), np.float64)
        with np.errstate(over="ignore"):
            return value, value.astype(np.float32).astype(np.float64)

    def described(self) -> str:
        """A description of the constant columns with at most ten indices."""
        names = [str(i) for i in self.constants]
        plural = "columns" if len(names) > 1 else "column"
        return f"{plural} {first_few(names, 10)} of {self.total} (from 0)"

    def to_json(self) -> dict[str, Any]:
        return {"total": self.total, "constants": {str(k): v for k, v in self.constants.items()}}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Columns:
        return cls(stored["total"], {int(k): v for k, v in stored["constants"].items()})


def differs(x: Any, value: Any, rounded: Any) -> Any:
    """Which rows differ in constant columns, for numpy arrays or tensors.

    Args:
        x: the constant columns of the rows, float64 [n, k].
        value, rounded: values from `Columns.values`.

    Returns:
        bool [n]
    """
    return ((abs(x - value) > _SAME * abs(value)) & (x != rounded)).any(1)


def constant(rows: np.ndarray) -> np.ndarray:
    """bool [d]: which columns of rows [n, d], n > 0, are constant, up to rounding in float64."""
    low, high = rows.min(axis=0), rows.max(axis=0)
    same: np.ndarray = high - low <= _SAME / 2 * np.maximum(np.abs(low), np.abs(high))
    return same


def load(path: Path | str, *, train_share: float = 0.7, seed: int = 0, columns: int | None = None) -> Vectors:
    """Loads the vectors of a file in one of LAYOUTS.

    Args:
        train_share: share of the good rows to train on if the file has no split; 0: all are for testing, and
            a file may have X_test and y_test alone.
        seed: seed of that split and of the order of the training rows.
        columns: required d; None: any.

    Raises:
        VectorDataError: an array is missing or invalid; the message names it.
    """
    path = Path(path).expanduser()
    arrays, random = _read(path), np.random.default_rng(seed)
    if not train_share and arrays.has(*ROWS, split="test"):
        test, anomalous = _tested(arrays, path, columns)
        return Vectors(test[:0], test, anomalous)
    own = arrays.has(*ROWS, split="train")
    stored = arrays.get(*ROWS, split="train" if own else None)
    truth = arrays.get(*npz.LABELS, split="train" if own else None)
    if stored is None:
        raise VectorDataError(
            f"{printable(path)}: arrays must be X, or X_train, X_test and y_test, got {arrays.keys}; "
            "`dxmi data --help` lists the layouts"
        )
    x = _rows(stored, "X_train" if own else "X", path, columns)
    if own and arrays.has(*ROWS, split="test"):
        test, anomalous = _tested(arrays, path, x.shape[1])
        if truth is not None:
            x = x[~_truth(truth, "y_train", len(x), path)]
        if len(x) < 2:
            raise VectorDataError(f"{printable(path)}: X_train must have >= 2 good rows, got {len(x)}")
        return Vectors(random.permutation(x), test, anomalous)
    if truth is None:
        if len(x) < 2:
            raise VectorDataError(f"{printable(path)}: X must have >= 2 good rows, got {len(x)}")
        return Vectors(random.permutation(x), x[:0], np.zeros(0, bool))
    anomalous = _truth(truth, "y", len(x), path)
    if not train_share:
        return Vectors(x[:0], x, anomalous)
    order = random.permutation(np.flatnonzero(~anomalous))
    if len(order) < 2:
        raise VectorDataError(
            f"{printable(path)}: y must have >= 2 good rows (0) for a split, got {len(order)}"
        )
    end = min(max(1, round(train_share * len(order))), len(order) - 1)
    rest = np.sort(np.concatenate((order[end:], np.flatnonzero(anomalous))))
    return Vectors(x[order[:end]], x[rest], anomalous[rest])


def _tested(arrays: npz.Arrays, path: Path, columns: int | None) -> tuple[np.ndarray, np.ndarray]:
    """X_test and y_test."""
    rows, truth = arrays.get(*ROWS, split="test"), arrays.get(*npz.LABELS, split="test")
    if rows is None or truth is None:
        raise VectorDataError(f"{printable(path)}: must have both X_test and y_test, got X_test alone")
    rows = _rows(rows, "X_test", path, columns)
    return rows, _truth(truth, "y_test", len(rows), path)


def rows_to_score(path: Path | str, columns: int) -> np.ndarray:
    """The rows of a file, float64 [n, columns]: its array X, otherwise X_test, otherwise its only array.

    Raises:
        VectorDataError: the array is missing or invalid.
    """
    path = Path(path).expanduser()
    arrays = _read(path)
    for name, split in (("X", None), ("X_test", "test")):
        if (stored := arrays.get(*ROWS, split=split)) is not None:
            return _rows(stored, name, path, columns)
    if (alone := arrays.alone) is None:
        raise VectorDataError(
            f"{printable(path)}: must have the array X or X_test, or only one array, got {arrays.keys}"
        )
    return _rows(arrays.read(alone), alone, path, columns)


def _read(path: Path) -> npz.Arrays:
    """The arrays of a file; the array of a csv file is x."""
    if path.suffix.lower() != ".csv":
        return npz.Arrays(path, VectorDataError, formats=_FORMATS)
    try:
        content = {"x": tables.read_csv(path)}
    except tables.UnwantedColumn as error:
        raise VectorDataError(f"{printable(path)}: {error} (labels may be y in an .npz, beside X)") from error
    except tables.TableError as error:
        raise VectorDataError(f"{printable(path)}: {error}") from error
    except UNREADABLE as error:
        what = what_it_is(path)
        why = getattr(error, "strerror", None) or error if what is None else f"it {what}"
        raise VectorDataError(f"{printable(path)}: cannot be read as {_FORMATS} ({why})") from error
    if not len(content["x"]):
        raise VectorDataError(f"{printable(path)}: has no rows")
    return npz.Arrays(path, VectorDataError, content=content)


def _rows(array: np.ndarray, name: str, path: Path, columns: int | None = None) -> np.ndarray:
    if array.dtype.kind not in "fiub" or array.ndim != 2 or array.size == 0:
        raise VectorDataError(
            f"{printable(path)}: {name} must be numbers [n, d] with n, d > 0, "
            f"got {array.dtype} {list(array.shape)}"
        )
    if columns is not None and array.shape[1] != columns:
        raise VectorDataError(
            f"{printable(path)}: {name} must have {columns} columns, as the training rows, "
            f"got {array.shape[1]}"
        )
    with np.errstate(over="ignore"):  # long doubles may overflow; rejected below
        array = array.astype(np.float64)
    if not (finite := np.isfinite(array)).all():
        row, column = np.argwhere(~finite)[0]
        raise VectorDataError(
            f"{printable(path)}: {name} must be finite, got {(~finite).sum()} numbers that are not, the "
            f"first in row {row}, column {column} (from 0)"
        )
    if (large := np.abs(array) > _EXTREME).any():
        row, column = np.argwhere(large)[0]
        raise VectorDataError(
            f"{printable(path)}: {name} must have numbers of magnitude <= {_EXTREME:g}, "
            f"got {array[row, column]:.3g} in row {row}, column {column} (from 0)"
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
