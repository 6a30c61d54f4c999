"""DxMI: a few-step diffusion sampler and an energy-based model, trained together without MCMC.

``dxmi_ext.ops`` has the fused torch ops; it needs torch and numpy alone. Imports run one way:
ops, noise, schedules, sampler, trainer, recipes, cli.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dxmi_ext")
except PackageNotFoundError:  # imported from the source folder; _native says what to do
    __version__ = "0+uninstalled"
