"""DxMI: a few-step diffusion sampler and an energy-based model, trained together without MCMC.

The names in ``__all__`` are for use in other training code; each is imported on first use. ``dxmi_ext.ops``
has the fused torch ops and requires only torch and numpy. Imports run one way:
_native <- ops <- engine <- method <- two_d, images, anomaly, energies <- reproduce <- cli.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from pkgutil import extend_path
from typing import Any

# In a checkout, which python -m and -c put first on the path, use the installed package's compiled module.
__path__ = extend_path(__path__, __name__)

try:
    __version__ = version("dxmi_ext")
except PackageNotFoundError:  # imported from the source folder; _native raises an error
    __version__ = "0+uninstalled"

_HOMES = {
    "DxMISettings": "method.settings",
    "DxMITrainer": "method.trainer",
    "GaussianSampler": "method.sampler",
    "Networks": "method.networks",
    "noise": "method.noise",
    "ops": "ops",
    "schedules": "method.schedules",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return home if _HOMES[name].rpartition(".")[2] == name else getattr(home, name)
