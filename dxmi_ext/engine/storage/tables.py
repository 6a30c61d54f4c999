"""Tables of numbers in csv files, with errors that name the line. Imports numpy and the standard library."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path

import numpy as np

_LABELS = {"y", "label", "labels", "target", "class", "anomaly", "anomalous", "is_anomaly"}
_INDICES = {"", "index", "unnamed: 0", "id", "row"}  # names of a column of row numbers; pandas writes ""
_OTHERS = {";": "semicolons", "\t": "tabs"}


class TableError(ValueError):
    """A csv file is not a table of numbers; the message names the line and the column, both from 1."""


class UnwantedColumn(TableError):
    """The header names a column of labels or of row numbers."""


def read_csv(path: Path) -> np.ndarray:
    """A table of comma-separated numbers, float64 [n, d], with an optional header of names, or of the numbers
    0, 1, 2, ...

    Raises:
        TableError: a cell is empty, not a number or not finite, or rows differ in length.
        UnwantedColumn: the header names labels or row numbers, which would be learned.
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    first = _first_line(path)
    named = not any(map(_is_number, first)) or first == [str(i) for i in range(len(first))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an empty file, whose table has no rows
            rows = np.loadtxt(
                path, delimiter=",", quotechar='"', skiprows=int(named), ndmin=2, encoding="utf-8-sig"
            )
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise TableError(_fault(path, first if named else []) or str(error)) from error
    if not np.isfinite(rows).all():
        raise TableError(_fault(path, first if named else []) or "numbers must be finite")
    if named and len(rows) and (unwanted := _not_a_feature(first)) is not None:
        raise UnwantedColumn(f"columns must be features, got one named {unwanted!r}; remove or rename it")
    return rows


def _not_a_feature(names: list[str]) -> str | None:
    """The name in a header that means labels or, in the first column, row numbers."""
    labels = _LABELS - {"y"} if "x" in map(str.lower, names) else _LABELS  # y beside x is a coordinate
    for i, name in enumerate(names):
        if name.lower() in (labels if i else labels | _INDICES):
            return name
    return None


def _first_line(path: Path) -> list[str]:
    """The cells of the first line of a csv file, without quotes."""
    with path.open(encoding="utf-8-sig") as file:
        return [cell.strip().strip('"') for cell in file.readline().split(",")]


def _fault(path: Path, names: list[str]) -> str | None:
    """What is wrong with a file that numpy rejects; None if it is something else."""
    columns = len(names)
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            text = line.partition("#")[0].strip("\r\n")  # numpy's comments
            if not text.strip() or (names and number == 1):
                continue
            cells = [cell.strip() for cell in next(csv.reader([text]))]
            columns = columns or len(cells)
            bad = next((i for i, cell in enumerate(cells) if not _is_finite(cell)), None)
            if bad is not None and (other := _other_separator(cells[bad])):
                return f"line {number} must be separated by commas, got {other}"
            if len(cells) != columns:
                return f"line {number} must have {columns} columns, as the first line, got {len(cells)}"
            if bad is not None:
                where = f"line {number}, column {bad + 1}" + (f" ({names[bad]})" if names else "")
                if not cells[bad]:
                    return f"{where} is empty; missing values are not supported"
                what = "finite" if _is_number(cells[bad]) else "a number"
                return f"{where} must be {what}, got {cells[bad]!r}"
    return None


def _other_separator(cell: str) -> str | None:
    """What separates the numbers of a cell."""
    numbers = cell.split()
    found = [what for mark, what in _OTHERS.items() if mark in cell]
    found += ["spaces"] * (len(numbers) > 1 and all(map(_is_number, numbers)))
    return next(iter(found), None)


def _is_finite(text: str) -> bool:
    return _is_number(text) and math.isfinite(float(text))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
