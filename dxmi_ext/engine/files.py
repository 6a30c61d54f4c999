"""Files and folders that are complete or absent, whenever the process dies, and one writer at a time.

Both are written aside, fsynced and renamed. What a death leaves behind bears a suffix of its own, and
``tidy`` removes it. Nothing is ever removed but what a ``Tree`` names, so a user's files stay wherever they
lie. Imports the standard library and ``dxmi_ext.engine.errors``.
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
"""What numpy and gzip raise of files that are missing, empty, cut short, damaged or of another kind."""
_UNFINISHED, _PREVIOUS, _REMOVED = ".unfinished", ".previous", ".removed"
TEMPORARY = re.compile(r"\.lock|.+\.(unfinished|previous|removed)")
"""Names of what a process that is at work, or died, leaves in a folder."""

Tree = Mapping[str, Union["Tree", None]]
"""The names of our own files in a folder, as regular expressions; None: a file, else a folder of such."""
_anything: dict[str, Tree | None] = {}
_anything["(?s).*"] = _anything
ANYTHING: Tree = _anything
"""A folder that is ours with all that lies in it."""


class Locked(UserError):
    """Another process holds a lock."""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Within, no other process gets past the same call; the file is there meanwhile. The kernel holds the
    lock, so no death leaves it held.

    Raises:
        Locked: another process is within; nobody waits.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise Locked(f"{path.parent}: another process is at work in this folder (see {path})") from None
        except OSError:
            pass  # a file system without locks: better no guard than no run
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
    """Write a file that appears, or replaces another, at once."""
    write_bytes(path, text.encode(errors="backslashreplace"))  # of names that are not UTF-8


def write_bytes(path: Path | str, content: bytes) -> None:
    """The same of bytes."""
    with file(Path(path)) as new:
        new.write(content)


@contextmanager
def file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; at the end it appears as ``path`` at once, or replaces what was there. A failure
    within the block leaves everything as it was."""
    making = unfinished(path)
    try:
        with naming(path), making.open("wb") as new:
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
    """A folder to put files into; at the end it appears as ``path`` at once, or replaces what was there.

    At no moment is there neither the old content nor the new: a death between the two renames leaves the old
    one set aside, and ``tidy`` brings it back. A failure within the block leaves everything as it was.

    Args:
        ours: what of an old content the new one replaces; all else in it stays. None: nothing is replaced,
            so ``path`` must be absent or an empty folder, at the end too.
    """
    making, previous = unfinished(path), _beside(path, _PREVIOUS)
    shutil.rmtree(making, ignore_errors=True)
    try:
        with naming(path):
            making.mkdir(parents=True)
            yield making
            with ThreadPoolExecutor(16) as threads:  # so that the disk takes many at once
                list(threads.map(_fsync, making.rglob("*")))
            _fsync(making)
            if ours is None:
                making.rename(path)  # which fails on anything but an empty folder
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
    """Where what ``folder(path)`` or ``file(path)`` is making lies meanwhile."""
    return _beside(path, _UNFINISHED)


def sync(path: Path) -> None:
    """A file that this process has put into the folder of another is safe on disk."""
    _fsync(path)


def remove(path: Path, ours: Tree | None = None) -> None:
    """Remove a file, or what is ours in a folder, and the folder itself if nothing else is left in it.

    Args:
        ours: of a folder; None: ``path`` is a file, and a folder of that name stays.
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
    """The same, at once: no death leaves half of our files under the folder's name."""
    removed = _beside(path, _REMOVED)
    _merge(removed, path, ours)
    path.rename(removed)
    _merge(removed, path, ours)


def tidy(directory: Path, ours: Tree = ANYTHING) -> None:
    """Clear what a death left in a folder. Call it only where nobody else is writing.

    Args:
        ours: the names of what is written there.
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
    """Whether a folder has anything that is ours."""
    return path.is_dir() and any(named(entry, ours) for entry in path.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """What a json file says, empty where it is missing, damaged or no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time within the block; the others wait, however long it takes.

    The lock is a file, left behind empty, and ends with the process that holds it.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError within says which file it was about; that of a write does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _look_up(name: str, tree: Tree) -> tuple[bool, Tree | None]:
    """Whether a tree has a name, and what it says of what is inside."""
    for pattern, inside in tree.items():
        if re.fullmatch(pattern, name):
            return True, inside
    return False, None


def _merge(source: Path, target: Path, ours: Tree | None) -> None:
    """Remove what is ours in a folder that was set aside, and put the rest where it was."""
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
