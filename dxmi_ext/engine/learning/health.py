"""Counts of non-finite steps in a run's metrics. Imports ``engine.errors``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dxmi_ext.engine.errors import UserError

_FAILURES = "_failures"


class Diverged(UserError, ArithmeticError):
    """Steps are still not finite after all rollbacks with lower learning rates."""


def failures(numbers: Mapping[str, Any]) -> dict[str, int]:
    """Number of consecutive skipped steps for each loss that has any, from metrics ``NAME_failures``."""
    return {
        name.removesuffix(_FAILURES): int(count)
        for name, count in numbers.items()
        if name.endswith(_FAILURES) and count
    }
