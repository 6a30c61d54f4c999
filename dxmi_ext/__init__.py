"""DxMI: a few-step diffusion sampler and an energy-based model, trained together without MCMC.

The names in ``__all__`` are the public interface; each is imported on first use. ``dxmi_ext.ops`` has the
fused torch ops and requires only torch and numpy. Modules that the documentation does not list are internal.
Imports run one way:
_native <- ops <- engine <- method <- training <- two_d, images, anomaly, energies <- reproduce <- cli.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which do not see __getattr__
    from dxmi_ext import ops as ops
    from dxmi_ext.engine.compute.execution import ExecutionSettings as ExecutionSettings
    from dxmi_ext.engine.compute.ranks import Ranks as Ranks
    from dxmi_ext.engine.errors import CheckpointError as CheckpointError
    from dxmi_ext.engine.settings import ConfigError as ConfigError
    from dxmi_ext.method import noise as noise
    from dxmi_ext.method import schedules as schedules
    from dxmi_ext.method.denoising import Pretrainer as Pretrainer
    from dxmi_ext.method.denoising import lognormal_levels as lognormal_levels
    from dxmi_ext.method.denoising import uniform_levels as uniform_levels
    from dxmi_ext.method.langevin import LangevinSettings as LangevinSettings
    from dxmi_ext.method.networks import Networks as Networks
    from dxmi_ext.method.networks import TimeIndependent as TimeIndependent
    from dxmi_ext.method.sampler import GaussianSampler as GaussianSampler
    from dxmi_ext.method.sampler import Timed as Timed
    from dxmi_ext.method.settings import DxMISettings as DxMISettings
    from dxmi_ext.method.trainer import DxMITrainer as DxMITrainer
    from dxmi_ext.ops import noise_key as noise_key
    from dxmi_ext.training import fit as fit
    from dxmi_ext.training import load as load
    from dxmi_ext.training import save as save
    from dxmi_ext.training import shuffled as shuffled

# In a checkout, which python -m and -c put first on the path, use the installed package's compiled module.
__path__ = extend_path(__path__, __name__)

try:
    __version__ = version("dxmi_ext")
except PackageNotFoundError:  # imported from the source folder; _native raises an error
    __version__ = "0+uninstalled"

_HOMES = {
    "CheckpointError": "engine.errors",
    "ConfigError": "engine.settings",
    "DxMISettings": "method.settings",
    "DxMITrainer": "method.trainer",
    "ExecutionSettings": "engine.compute.execution",
    "GaussianSampler": "method.sampler",
    "LangevinSettings": "method.langevin",
    "Networks": "method.networks",
    "Pretrainer": "method.denoising",
    "Ranks": "engine.compute.ranks",
    "TimeIndependent": "method.networks",
    "Timed": "method.sampler",
    "fit": "training",
    "load": "training",
    "lognormal_levels": "method.denoising",
    "noise": "method.noise",
    "noise_key": "ops",
    "ops": "ops",
    "save": "training",
    "schedules": "method.schedules",
    "shuffled": "training",
    "uniform_levels": "method.denoising",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return home if _HOMES[name].rpartition(".")[2] == name else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
