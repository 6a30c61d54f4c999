"""Files and folders that are complete or absent, whenever the process dies, and one writer at a time.

Both are written aside, fsynced and renamed. What a death leaves behind bears a suffix of its own, and
``tidy`` removes it. Imports the standard library and ``dxmi_ext.errors``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dxmi_ext.errors import UserError

UNREADABLE = (
    *(OSError, EOFError, ValueError, AttributeError, TypeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy and gzip raise of files that are missing, empty, cut short, damaged or of another kind."""
_UNFINISHED, _PREVIOUS, _REMOVED = ".unfinished", ".previous", ".removed"


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
def folder(path: Path) -> Iterator[Path]:
    """A folder to put files into; at the end it appears as ``path`` at once, or replaces what was there.

    At no moment is there neither the old content nor the new: a death between the two renames leaves the old
    one set aside, and ``tidy`` brings it back. A failure within the block leaves everything as it was.
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
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    if path.exists():  # a rename cannot replace a folder that has content
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    making.rename(path)
    _fsync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """Where what ``folder(path)`` or ``file(path)`` is making lies meanwhile."""
    return _beside(path, _UNFINISHED)


def sync(path: Path) -> None:
    """A file that this process has put into the folder of another is safe on disk."""
    _fsync(path)


def check_new(path: Path) -> None:
    """Refuse to write a folder over anything else than an empty one.

    Raises:
        UserError: something lies there.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"output: got {str(path)!r}, where something lies already; wants a new folder")


def remove_folder(path: Path) -> None:
    """Make a folder vanish at once: no death leaves half of it under its name."""
    removed = _beside(path, _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def tidy(directory: Path) -> None:
    """Clear what a death left in a folder. Call it only where nobody else is writing."""
    for previous in directory.glob(f"*{_PREVIOUS}"):
        if not (whole := previous.with_suffix("")).exists():
            previous.rename(whole)
    for suffix in (_UNFINISHED, _PREVIOUS, _REMOVED):
        for path in directory.glob(f"*{suffix}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


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


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
