"""Recognition of files by content, and names and errors of data. Imports ``engine.errors``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from dxmi_ext.engine.errors import UserError

LFS_POINTER = "is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"
_LISTED = 10  # images in an error
_BEGINNINGS = {
    b"version https://git-lfs.github.com/": LFS_POINTER,
    b"<!doctype html": "is a web page (html)",
    b"<html": "is a web page (html)",
    b"<?xml": "is xml",
    b"<svg": "is a drawing (svg), not pixels",
    b"\x93numpy": "is an array of numpy (.npy)",
    b"pk\x03\x04": "is a zip archive",
    b"pk\x05\x06": "is an empty zip archive",
    b"\x1f\x8b": "is compressed by gzip",
    b"%pdf": "is a PDF",
    b"\x89hdf": "is HDF5",
    b"rar!": "is a rar archive",
    b"7z\xbc\xaf": "is a 7z archive",
    b"\x80\x02": "is a pickle, which is never loaded",
    b"\x80\x03": "is a pickle, which is never loaded",
    b"\x80\x04": "is a pickle, which is never loaded",
    b"\x80\x05": "is a pickle, which is never loaded",
}


class DataError(UserError, ValueError):
    """Data are missing, damaged or of an unknown layout."""


class ImageDataError(DataError):
    """Images are missing, damaged or of an unknown layout."""


class UnequalSizes(ImageDataError):
    """Images have several sizes, and no size to fit them to is given."""


class UnreadableImages(ImageDataError):
    """Some images of a collection are damaged.

    Args:
        reasons: for each, its name and what is wrong with it.
        n: number of images in the collection.
    """

    def __init__(self, reasons: Sequence[str], n: int) -> None:
        count, lines = len(reasons), list(reasons[:_LISTED])
        if count > 1:
            lines.insert(0, f"{count} of {n} images cannot be read; repair or remove them:")
        if count > _LISTED:
            lines.append(f"and {count - _LISTED} more")
        super().__init__("\n  ".join(lines))


class VectorDataError(DataError):
    """A file of vectors is missing, damaged or of an unknown layout."""


def what_it_is(file: str | Path | IO[bytes]) -> str | None:
    """What an unreadable file is, such as "is a zip archive"; None if unknown."""
    try:
        if isinstance(file, (str, Path)):
            with open(file, "rb") as stream:
                head = stream.read(512)
        else:
            file.seek(0)
            head = file.read(512)
    except OSError:
        return None
    if not head:
        return "is empty"
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # pages may begin with whitespace
    return next((found for beginning, found in _BEGINNINGS.items() if head.startswith(beginning)), None)


def refuse_pointer(file: Path, kind: type[UserError] = ImageDataError) -> None:
    """Rejects a git-lfs pointer or a web page in place of the expected file.

    Raises:
        UserError: an error of the given kind.
    """
    if (found := what_it_is(file)) is not None and found in (LFS_POINTER, "is a web page (html)"):
        raise kind(f"{printable(file)}: {found}")


def resolved(path: str | Path) -> Path:
    """The absolute path without links, except links to themselves, for which `Path.resolve` fails."""
    return Path(os.path.realpath(Path(path).expanduser()))


def printable(name: str | Path) -> str:
    r"""A file's name as text, with bytes that are not UTF-8 as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
