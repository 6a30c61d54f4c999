"""Simulates processes that die at a chosen file operation, and full disks."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Audit events of Python that change files; os.fsync has none, and changes nothing.
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Killed(BaseException):
    """Nothing in the package catches it; file operations of a ``finally`` raise it again."""


class Death:
    """The state of a simulated death; see ``after``."""

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


sys.addaudithook(_audit)  # audit hooks cannot be removed


@contextmanager
def after(operations: int) -> Iterator[Death]:
    """The code within dies at its first file operation after ``operations`` of them."""
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
    """Writes beyond ``size`` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leftovers(folder: Path) -> list[str]:
    """Temporary files that a death left behind."""
    return [p.name for p in folder.rglob("*") if p.suffix in (".unfinished", ".previous", ".removed")]
