"""Data of an experiment: a digest that identifies them, and data that are prepared from them once.

Imports ``reproduce.experiments`` and the engine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import files
from dxmi_ext.reproduce.experiments import Experiment

_ABOUT = "about.json"  # what prepared data were made from


def source_of(data: str | None, prepared: Path) -> str | None:
    """The digest of the data at a path; without a path, of those from which a folder was prepared, if any.

    Raises:
        ConfigError: there is nothing at the path.
    """
    if data is not None:
        return digest_of(Path(data))
    known = files.read_json(prepared / _ABOUT).get("source")
    return known if isinstance(known, str) else None


def prepare(experiment: Experiment, data: str | None, source: str | None, folder: Path) -> None:
    """Prepares the data of an experiment in a folder, unless it has them already; replaces others.

    Args:
        source: what `source_of` returned for ``data`` and ``folder``.
    """
    wanted = {**experiment.prepared, "source": source}
    if experiment.prepare is None or (source is not None and files.read_json(folder / _ABOUT) == wanted):
        return
    with files.folder(folder, files.ANYTHING) as made:
        experiment.prepare(data, made)
        runlog.write_json(made / _ABOUT, wanted)


def digest_of(path: Path) -> str:
    """A digest of a file's content, or of the names and contents in a folder, wherever these are.

    Raises:
        ConfigError: there is nothing at the path.
    """
    if not path.exists():
        raise ConfigError(f"data must be a file or folder, got {str(path)!r}, which does not exist")
    digest = hashlib.blake2b(digest_size=16)
    for file in [path] if path.is_file() else _files(path):
        digest.update(os.fsencode(f"{os.path.relpath(file, path)} {file.stat().st_size}\n"))
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, in the order of their names, without hidden ones."""
    seen = set()
    for path, inner, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(path)) in seen:  # reached before, as by a link to a parent folder
            inner.clear()
            continue
        seen.add(place)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found = (Path(path, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in found if file.is_file())
