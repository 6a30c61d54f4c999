"""Processes that die at a file operation of one's choice, and disks that are full."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What changes files, as Python's audit hooks name it; os.fsync has no event and changes nothing.
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Killed(BaseException):
    """Nothing in the package catches it, and whatever a ``finally`` wants to do to files raises it again."""


class Death:
    """Of the code within ``after``."""

    def __init__(self, operations: int) -> None:
        self.left, self.died = operations, False


_deaths: list[Death] = []  # at most one


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _deaths or event not in _OPERATIONS or (event == "open" and not _writes(*arguments)):
        return
    death = _deaths[0]
    death.left -= 1
    if death.left < 0:
        death.died = True
        raise Killed


def _writes(path: Any, mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) and not str(path).startswith("/dev/")


sys.addaudithook(_audit)  # for good: there is no way to take it back


@contextmanager
def after(operations: int) -> Iterator[Death]:
    """Code within dies when it wants to change files once more than ``operations`` times."""
    death = Death(operations)
    _deaths.append(death)
    try:
        yield death
    except Killed:
        pass
    finally:
        _deaths.clear()


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as those on a full disk do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leftovers(folder: Path) -> list[str]:
    """What a death left behind."""
    return [p.name for p in folder.rglob("*") if p.suffix in (".unfinished", ".previous", ".removed")]
