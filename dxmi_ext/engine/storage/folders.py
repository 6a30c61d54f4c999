"""What this package may overwrite: folders that it marked and files that it wrote, nothing else.

A folder that a command fills over time, such as a run's, holds `MARKER` with its kind and format. Folders of
versions without marks are recognized by their content, and marked when they are next written to.
Imports the standard library, ``dxmi_ext.engine.errors`` and ``dxmi_ext.engine.storage.files``.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dxmi_ext.engine.errors import UserError, first_few
from dxmi_ext.engine.storage import files
from dxmi_ext.engine.storage.files import Tree

MARKER = "dxmi.json"
"""File that marks a folder: JSON with its kind (run, scores, ...) and the version of its format."""
FORMAT = 1
"""Format of folders written now; 0 is the format of folders without a mark."""
_TASKS_OF_FORMAT_0 = ("two_d", "images", "anomaly")

CHECKPOINT: Tree = {r"tensors(-\d{5}-of-\d{5})?\.safetensors": None, r"(state|manifest)\.json": None}
CHECKPOINTS: Tree = {r"step_\d{8,}": CHECKPOINT}
MODEL: Tree = {r"model\.safetensors|config\.json": None}
PICTURES: Tree = {r"\w+_\d{8,}\.png": None}
TENSORBOARD: Tree = {r"events\.out\.tfevents\.\d+": None}
RUN: Tree = {
    r"(summary|failure|choice)\.json": None,
    "checkpoints": CHECKPOINTS,
    "model": MODEL,
    "pictures": PICTURES,
    "tb": TENSORBOARD,
    r"metrics\.jsonl|wandb\.json|config\.yaml|test_scores\.npz": None,
    re.escape(MARKER): None,
}
"""A run's files, without wandb/, whose files may not have been uploaded yet."""

_KINDS = {"run": "that of a run", "scores": "that of an earlier scoring"}
_KINDS |= {"work": "that of an experiment's runs", "results": "that of an experiment's results"}
_CONFIG_KEYS = {"recipe", "task", "output", "seed", "iterations", "batch_size"}


class FolderError(UserError):
    """A folder or file that must not be overwritten."""


def is_marked(folder: Path) -> bool:
    """Whether a folder was written by this package, so that it holds results and never data."""
    return (folder / MARKER).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's mark; empty without one.

    Raises:
        FolderError: the mark is not ours, or of a newer format.
    """
    if not is_marked(folder):
        return {}
    path = folder / MARKER
    found = files.read_json(path)
    kind, number = found.get("kind"), found.get("format")
    if not isinstance(kind, str) or type(number) is not int:
        raise FolderError(f"{path} must have a kind and a format, but it was not written by dxmi_ext")
    if number > FORMAT:
        raise FolderError(f"{path}: format must be at most {FORMAT}, got {number}: a newer dxmi_ext wrote it")
    return found


def mark(folder: Path, kind: str, **about: Any) -> None:
    """Mark a folder accepted by `check`, or add to its mark.

    Args:
        kind: run, scores or work.
        about: more entries of the mark.
    """
    found = read(folder)
    wanted = found | {"kind": kind, "format": FORMAT} | about
    if found != wanted:
        files.write_text(folder / MARKER, json.dumps(wanted, indent=2) + "\n")


def check(
    folder: Path, kind: str, is_older: Callable[[Path], bool] = lambda _: False, *, key: str = "output"
) -> None:
    """Check that a folder is new, empty or of a kind; writes nothing.

    Args:
        kind: run, scores, work or results.
        is_older: whether a folder without a mark is of that kind, written by an earlier version.
        key: setting that names the folder.

    Raises:
        FolderError: it has other content, or is not a folder.
    """
    message = f"{key} must be a new folder, an empty one or {_KINDS[kind]}, got {str(folder)!r}"
    if not folder.is_dir():
        if folder.exists():
            raise FolderError(f"{message}, which is a file")
        return
    found = read(folder)
    if found:
        if found["kind"] != kind:
            raise FolderError(f"{message}, which is marked as {found['kind']}")
        return
    names = content(folder)
    if names and not is_older(folder):
        raise FolderError(f"{message}, which holds {first_few(names)}")


def create(folder: Path, *, new: bool = False, key: str = "output") -> None:
    """Create a folder accepted by `check`.

    Args:
        new: whether it must not exist yet.
        key: setting that names the folder.

    Raises:
        FolderError: it cannot be created, or nothing can be written in it.
        FileExistsError: it must be new, and is not.
    """
    message = f"{key} must be a folder that can be written, got {str(folder)!r}"
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            raise
        raise FolderError(f"{message}, which cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FolderError(f"{message}, which is read-only")


def content(folder: Path) -> list[str]:
    """The names in a folder without our temporary files."""
    return sorted(path.name for path in folder.iterdir() if not _is_temporary(path))


def _is_temporary(path: Path) -> bool:
    if path.name == ".lock":
        return path.is_file() and not path.stat().st_size
    return bool(files.TEMPORARY.fullmatch(path.name))


def check_new(path: Path) -> None:
    """Check that a path is free or an empty folder.

    Raises:
        FolderError: the path exists otherwise.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FolderError(f"output must be a new or empty folder, got {str(path)!r}, which already exists")


def check_file(path: Path, is_ours: Callable[[Path], bool], what: str, *, key: str = "output") -> None:
    """Check that a file is new, empty or of the same kind; writes nothing.

    Args:
        is_ours: whether a file is of that kind.
        what: the kind, for the error.
        key: setting that names the file.

    Raises:
        FolderError: the file has other content, or could not be created.
    """
    message = f"{key} must be a new file or {what}, got {str(path)!r}"
    if path.is_dir():
        raise FolderError(f"{message}, which is a folder")
    if path.exists() and not path.is_file():
        raise FolderError(f"{message}, which is not a regular file")
    if path.is_file() and path.stat().st_size and not is_ours(path):
        raise FolderError(f"{message}, which has other content")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise FolderError(f"{message}, but {str(above)!r} is not a folder")


# --- runs --------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run to read, finished or not.

    Raises:
        FolderError: its format is newer than this version.
    """
    if is_marked(folder):
        return read(folder)["kind"] == "run"
    config = folder / "config.yaml"
    return config.is_file() and (not config.stat().st_size or "task" in _config_keys(folder))


def is_unmarked_run(folder: Path) -> bool:
    """Whether a folder holds a run of format 0, which can be resumed."""
    parts = any((folder / name).is_dir() for name in ("checkpoints", "model"))
    return parts and _config_keys(folder) >= _CONFIG_KEYS


def clear(folder: Path) -> None:
    """Remove a run from its folder, starting with the files that mark it as finished or resumable."""
    for pattern, inside in RUN.items():
        for path in sorted(folder.iterdir(), reverse=True):
            if not re.fullmatch(pattern, path.name) or path.name == MARKER:
                continue
            if inside is CHECKPOINTS and path.is_dir():
                steps = [step for step in path.iterdir() if re.fullmatch(r"step_\d{8,}", step.name)]
                for step in sorted(steps, reverse=True):
                    files.remove_folder(step, CHECKPOINT)
            files.remove(path, inside)


def _config_keys(folder: Path) -> set[str]:
    """The keys in a run's config.yaml; none if another program wrote it."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return set()
    task = re.search(r"^task:\s*['\"]?(\w+)['\"]?\s*$", text, re.MULTILINE)
    if task is None or task[1] not in _TASKS_OF_FORMAT_0:
        return set()
    return set(re.findall(r"^(\w+):", text, re.MULTILINE))


# --- files -------------------------------------------------------------------------------------------

PICTURE_TEXT = ("Software", "dxmi_ext")
"""Text chunk in each png that a command writes by name."""
GENERATOR = '<meta name="generator" content="dxmi_ext">'
"""Tag in the head of every page."""
_PAGE_OF_FORMAT_0 = "body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933 }"
NUMBERS_ENTRY = {"generator": "dxmi_ext"}
"""Entry of each json of `dxmi evaluate`."""
ARCHIVE_COMMENT = b"dxmi_ext"
"""Comment of each npz of `dxmi sample`; data of users may have the same arrays."""


def is_samples(path: Path) -> bool:
    """Whether a file is an npz of `dxmi sample`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == ARCHIVE_COMMENT
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def is_picture(path: Path) -> bool:
    """Whether a file is a png that a command wrote."""
    head = _head(path)
    return head.startswith(b"\x89PNG\r\n\x1a\n") and b"tEXt" + "\0".join(PICTURE_TEXT).encode() in head


def is_page(path: Path) -> bool:
    """Whether a file is a page of `dxmi report`."""
    head = _head(path).decode(errors="replace")
    return head.startswith("<!doctype html>") and (GENERATOR in head or _PAGE_OF_FORMAT_0 in head)


def is_numbers(path: Path) -> bool:
    """Whether a file is a json of `dxmi evaluate`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and NUMBERS_ENTRY.items() <= found.items()


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""
