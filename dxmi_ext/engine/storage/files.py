"""Atomic files and folders, which are complete or absent whenever the process dies, and locks.

Both are written under a temporary name, fsynced and renamed. ``tidy`` removes what a killed process leaves
behind, by its suffix. Only files named by a ``Tree`` are ever removed, so a user's files stay. Imports the
standard library and ``dxmi_ext.engine.errors``.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Union

from dxmi_ext.engine.errors import UserError

UNREADABLE = (
    *(OSError, EOFError, ValueError, AttributeError, TypeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Exceptions of numpy and gzip for files that are missing, empty, truncated, damaged or of another kind."""
_UNFINISHED, _PREVIOUS, _REMOVED = ".unfinished", ".previous", ".removed"
TEMPORARY = re.compile(r"\.lock|.+\.(unfinished|previous|removed)")
"""Names of temporary files of a process that is running or was killed."""

Tree = Mapping[str, Union["Tree", None]]
"""Names of our own files in a folder, as regular expressions; None for a file, a tree for a folder."""
_anything: dict[str, Tree | None] = {}
_anything["(?s).*"] = _anything
ANYTHING: Tree = _anything
"""A folder whose whole content is ours."""


class Locked(UserError):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Within, this process holds the lock, whose file exists meanwhile. The kernel releases it if the process
    dies.

    Raises:
        Locked: another process holds the lock; this call does not wait.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise Locked(f"{path.parent}: another process is at work in this folder (see {path})") from None
        except OSError:
            pass  # the file system has no locks: run without
        if os.fstat(file).st_nlink:  # else its last holder removed it before this one got it
            break
        os.close(file)
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(file)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode(errors="backslashreplace"))  # for names that are not UTF-8


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file atomically."""
    with file(Path(path)) as new:
        new.write(content)


@contextmanager
def file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which atomically becomes ``path``, or what it links to, at the end. A failure
    within the block leaves everything as it was."""
    path = path.resolve()
    making = unfinished(path)
    try:
        with naming(path), making.open("w+b") as new:
            yield new
            new.flush()
            os.fsync(new.fileno())
        making.replace(path)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def folder(path: Path, ours: Tree | None = None) -> Iterator[Path]:
    """A folder to put files into, which becomes ``path`` at the end.

    If the process dies between the two renames, the old content is set aside, and ``tidy`` restores it. A
    failure within the block leaves everything as it was.

    Args:
        ours: files of the old content to replace; all others stay. None: nothing is replaced, so ``path``
            must be absent or an empty folder, also at the end.
    """
    if path.is_symlink():
        path = path.resolve()  # replace what the link names, not the link
    making, previous = unfinished(path), _beside(path, _PREVIOUS)
    shutil.rmtree(making, ignore_errors=True)
    try:
        with naming(path):
            making.mkdir(parents=True)
            yield making
            with ThreadPoolExecutor(16) as threads:  # so that the disk serves many at once
                list(threads.map(_fsync, making.rglob("*")))
            _fsync(making)
            if ours is None:
                making.rename(path)  # fails unless path is absent or an empty folder
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    if ours is not None:
        if path.exists():  # a rename cannot replace a folder that has content
            _merge(previous, path, ours)
            path.rename(previous)
        making.rename(path)
    _fsync(path.parent)
    if ours is not None:
        _merge(previous, path, ours)


def unfinished(path: Path) -> Path:
    """The temporary name of what ``folder(path)`` or ``file(path)`` writes."""
    return _beside(path, _UNFINISHED)


def sync(path: Path) -> None:
    """Flushes a file, and its entry in a folder of another process, to disk."""
    _fsync(path)


def remove(path: Path, ours: Tree | None = None) -> None:
    """Remove a file, or our files in a folder, and the folder itself if it is empty then.

    Args:
        ours: our files in a folder; None: ``path`` is a file, and a folder of that name stays.
    """
    if not path.is_dir() or (path.is_symlink() and ours is ANYTHING):
        path.unlink(missing_ok=True)
    elif ours is not None:
        for entry in list(path.iterdir()):
            known, inside = _look_up(entry.name, ours)
            if known:
                remove(entry, inside)
        with suppress(OSError):  # it holds other files, or is a link
            path.rmdir()


def remove_folder(path: Path, ours: Tree) -> None:
    """Remove our files in a folder, atomically."""
    removed = _beside(path, _REMOVED)
    _merge(removed, path, ours)
    path.rename(removed)
    _merge(removed, path, ours)


def tidy(directory: Path, ours: Tree = ANYTHING) -> None:
    """Clean up after a process killed while writing to a folder. Nobody else may be writing there.

    Args:
        ours: names of what is written there.
    """
    for suffix in (_PREVIOUS, _REMOVED, _UNFINISHED):
        for path in list(directory.glob(f"*{suffix}")):
            whole = path.with_name(path.name.removesuffix(suffix))
            known, inside = _look_up(whole.name, ours)
            if not known:
                continue
            if suffix == _PREVIOUS and not whole.exists():
                path.rename(whole)
            elif suffix == _UNFINISHED:
                remove(path, ANYTHING)
            else:
                _merge(path, whole, inside)


def named(path: Path, ours: Tree) -> bool:
    """Whether the name of a file or folder is among ours."""
    return _look_up(path.name, ours)[0]


def holds(path: Path, ours: Tree) -> bool:
    """Whether a folder has any of our files."""
    return path.is_dir() and any(named(entry, ours) for entry in path.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a json file; empty if it is missing, damaged or not a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time within the block; others wait without a time limit.

    The lock is an empty file that is left behind; the kernel releases it if the process dies. On a file
    system without locks, nobody waits.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Adds the path to an OSError raised within, since write errors lack it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _look_up(name: str, tree: Tree) -> tuple[bool, Tree | None]:
    """Whether a tree has a name, and the tree inside it."""
    for pattern, inside in tree.items():
        if re.fullmatch(pattern, name):
            return True, inside
    return False, None


def _merge(source: Path, target: Path, ours: Tree | None) -> None:
    """Remove our files in a folder that was set aside, and move the rest back."""
    remove(source, ours)
    if not source.exists():
        return
    if not target.exists():
        source.rename(target)
        return
    for entry in list(source.iterdir()):
        names = itertools.chain([entry.name], (f"{entry.name}.{i}" for i in itertools.count(1)))
        entry.rename(next(target / name for name in names if not (target / name).exists()))
    with suppress(OSError):
        source.rmdir()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
