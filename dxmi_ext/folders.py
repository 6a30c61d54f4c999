"""Folders that belong to this package: each holds a file that says so, `MARKER`.

Imports the standard library and ``dxmi_ext``.
"""

from __future__ import annotations

from pathlib import Path

MARKER = "dxmi.json"
"""What marks a folder: JSON with its kind (run, scores, ...) and the version of its format."""


def is_marked(folder: Path) -> bool:
    """Whether a folder was made by this package, and so holds results and never data."""
    return (folder / MARKER).is_file()
