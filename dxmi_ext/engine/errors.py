"""Errors that the command line shows as one line. Imports nothing of the package."""

from collections.abc import Iterable


class UserError(Exception):
    """An error of the user rather than the program; its text says what to do."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or model is missing, damaged or of an unknown format."""


def first_few(names: Iterable[str], most: int = 4) -> str:
    """Names as text, with the number of those beyond the first few."""
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
