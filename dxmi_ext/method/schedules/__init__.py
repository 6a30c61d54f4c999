"""Schedules as tables for `ops.sampler_step`, from noise (t = 0) to data (t = T - 1).

`tables` computes them from noise levels; `preserving` and `exploding` define the usual noise levels.
The package imports torch and ``dxmi_ext.engine.arguments``.
"""

from __future__ import annotations

from collections.abc import Callable

from dxmi_ext.method.schedules.exploding import edm, variance_exploding
from dxmi_ext.method.schedules.preserving import ddim, ddpm, fastdpm, make_betas
from dxmi_ext.method.schedules.tables import Schedule, from_levels, joined, posterior_std, reading, target

__all__ = [
    "CHOICES",
    "Schedule",
    "ddim",
    "ddpm",
    "edm",
    "fastdpm",
    "from_levels",
    "joined",
    "make_betas",
    "posterior_std",
    "reading",
    "target",
    "variance_exploding",
]

CHOICES: dict[str, Callable[..., Schedule]] = {
    "ddim": ddim,
    "edm": edm,
    "fastdpm": fastdpm,
    "variance_exploding": variance_exploding,
}
"""Schedules by name, for recipes; each takes the number of steps as first argument."""
