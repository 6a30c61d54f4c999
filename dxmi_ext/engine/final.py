"""Numbers at the end of a run: one that cannot be computed is left out, and a line says which and why.

Imports the standard library and ``dxmi_ext``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from dxmi_ext.engine import runlog

T = TypeVar("T")
Say = Callable[[str], None]
"""What becomes of a line."""


def attempt(what: str, compute: Callable[[], T], say: Say = runlog.note) -> T | None:
    """What ``compute`` returns; where it fails None, and a line, for training must not end in vain.

    Args:
        what: is left out then.
    """
    try:
        return compute()
    except Exception as error:  # a finished run must not be lost, whatever goes wrong here
        say(f"{what}: left out, {reason(error)}")
        return None


def numbers(
    what: str, compute: Callable[[], Mapping[str, float]], say: Say = runlog.note
) -> dict[str, float]:
    """The finite numbers that ``compute`` returns; none where it fails. A line names those left out."""
    found = attempt(what, compute, say) or {}
    if odd := [name for name, value in found.items() if not math.isfinite(value)]:
        say(f"{', '.join(odd)}: left out, not finite")
    return {name: value for name, value in found.items() if name not in odd}


def number(name: str, compute: Callable[[], float], say: Say = runlog.note) -> float | None:
    """The same of one number."""
    return numbers(name, lambda: {name: compute()}, say).get(name)


def reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].removesuffix(", wants one of")  # what follows is a list of lines


def announce_missing(needs: Mapping[str, str]) -> None:
    """Says before a run which of its numbers it will lack.

    Args:
        needs: by module, what needs it.
    """
    for module, what in needs.items():
        if importlib.util.find_spec(module) is None:
            runlog.note(
                f"{what}: will be left out, {module} is not installed (pip install 'dxmi_ext[train]')"
            )
