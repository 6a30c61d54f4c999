"""Checks of the arguments of public functions. Imports the standard library."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def of_type(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Checks the type of an argument.

    Args:
        name: name of the argument.
        value: its value.
        kind: type that it must have, or one of several.
        wanted: description of the type.

    Raises:
        TypeError: the value is not of that type.
    """
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be {wanted}, got {got}")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def at_least(name: str, value: Any, minimum: int) -> None:
    """Checks that an argument is an integer and not too small.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is smaller than ``minimum``.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
