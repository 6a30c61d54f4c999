"""The files of a scoring: scores.csv, heatmaps/ and index.html. Imports the engine."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.storage import files, folders

COLUMNS = ("path", "score", "anomalous", "threshold", "heatmap", "error")
VECTOR_COLUMNS = ("row", "score", "anomalous", "threshold")
TABLE, PAGE, HEAT_MAPS = "scores.csv", "index.html", "heatmaps"
_OURS: files.Tree = {r"(?s)\d{6,}-.*\.png": None}  # in heatmaps/


def check_output(output: Path) -> None:
    """Checks that a folder is new, empty or from an earlier scoring; writes nothing.

    Raises:
        folders.FolderError: it contains something else.
    """
    folders.check(output, "scores", _is_unmarked)


def _is_unmarked(output: Path) -> bool:
    """Whether a folder contains scores from a version that did not mark folders."""
    head = ",".join(COLUMNS).encode() + b"\r\n"
    tables = (output / name for name in (TABLE, f"{TABLE}.unfinished"))
    return any(table.read_bytes().startswith(head) for table in tables if table.is_file())


@contextlib.contextmanager
def room(output: Path, heat_maps: Path | None) -> Iterator[None]:
    """Creates an output folder, and heatmaps/ if it is given, removes the results of an earlier scoring, and
    locks the folder within the block.

    Raises:
        folders.FolderError: see `check_output`.
        files.Locked: another process is scoring into the folder.
    """
    check_output(output)
    folders.create(output)
    with files.lock(output / ".lock"):
        folders.mark(output, "scores")
        for name in (TABLE, f"{TABLE}.unfinished", PAGE):
            files.remove(output / name)
        files.remove(output / HEAT_MAPS, _OURS)
        (heat_maps or output).mkdir(parents=True, exist_ok=True)
        yield


@contextlib.contextmanager
def table(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[csv.DictWriter[str]]:
    """Opens a csv file under a temporary name and renames it when it is complete. Each row is flushed."""
    making = files.unfinished(path)
    options: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # odd names
    try:
        with files.naming(making), making.open("w", buffering=1, **options) as file:
            rows = csv.DictWriter(file, columns)
            rows.writeheader()
            yield rows
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        runlog.note(f"{making} contains the scores so far")
        raise
    making.replace(path)
