"""Steps that were not finite, as a run's metrics count them. Imports ``engine.errors``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dxmi_ext.engine.errors import UserError

_FAILURES = "_failures"


class Diverged(UserError, ArithmeticError):
    """Steps stay not finite, however often the run goes back and lowers its rates."""


def failures(numbers: Mapping[str, Any]) -> dict[str, int]:
    """Steps in a row that moved nothing, for each loss that has such, from metrics ``NAME_failures``."""
    return {
        name.removesuffix(_FAILURES): int(count)
        for name, count in numbers.items()
        if name.endswith(_FAILURES) and count
    }
