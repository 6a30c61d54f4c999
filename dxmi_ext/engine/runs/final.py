"""Final metrics of a run; one that cannot be computed is skipped, with a note that says why.

Imports the standard library and ``dxmi_ext``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dxmi_ext.engine.output import runlog

T = TypeVar("T")
Say = Callable[[str], None]
"""Prints a note."""


def attempt(what: str, compute: Callable[[], T], say: Say = runlog.note) -> T | None:
    """The result of ``compute``; None with a note if it fails, so that a finished training is not lost.

    Args:
        what: name of the result, for the note.
    """
    try:
        return compute()
    except Exception as error:  # whatever goes wrong here
        say(f"{what}: skipped, {reason(error)}")
        return None


def numbers(what: str, compute: Callable[[], Mapping[str, Any]], say: Say = runlog.note) -> dict[str, Any]:
    """The finite numbers and the texts that ``compute`` returns; none if it fails. A note names those
    skipped."""
    found = attempt(what, compute, say) or {}
    values = {name: value for name, value in found.items() if not isinstance(value, str)}
    if odd := [name for name, value in values.items() if not math.isfinite(value)]:
        say(f"{', '.join(odd)}: skipped, not finite")
    return {name: value for name, value in found.items() if name not in odd}


def number(name: str, compute: Callable[[], float]) -> float | None:
    """The same for one number."""
    return numbers(name, lambda: {name: compute()}).get(name)


def reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return next(iter(str(error).splitlines()), type(error).__name__)


def announce_missing(needs: Mapping[str, str]) -> None:
    """Notes before a run which results it will skip.

    Args:
        needs: module -> what requires it.
    """
    for module, what in needs.items():
        if importlib.util.find_spec(module) is None:
            runlog.note(f"{what}: will be skipped, {module} is not installed (pip install 'dxmi_ext[train]')")
