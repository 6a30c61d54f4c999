"""Settings for trainers, given by their flat keys."""

from __future__ import annotations

from typing import Any

from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.method.langevin import LangevinSettings
from dxmi_ext.method.settings import DxMISettings

KINDS: dict[str, Any] = {"algorithm": DxMISettings, "langevin": LangevinSettings}
KINDS |= {"execution": ExecutionSettings}


def groups(**settings: Any) -> dict[str, Any]:
    """The keyword arguments of `DxMITrainer` and `LangevinTrainer`."""
    made = {
        name: kind(**{key: settings.pop(key) for key in kind.keys() & settings.keys()})
        for name, kind in KINDS.items()
    }
    assert not settings, f"unknown settings: {settings}"
    return made
