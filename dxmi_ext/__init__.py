"""DxMI: a few-step diffusion sampler and an energy-based model, trained together without MCMC.

``dxmi_ext.ops`` has the fused torch ops; it needs torch and numpy alone. Imports run one way:
ops, noise, schedules, sampler, trainer, recipes, cli.
"""

from importlib.metadata import PackageNotFoundError, version
from pkgutil import extend_path

# In a checkout, which Python's -m and -c put first on the path, the compiled module is that of the installed
# package.
__path__ = extend_path(__path__, __name__)

try:
    __version__ = version("dxmi_ext")
except PackageNotFoundError:  # imported from the source folder; _native says what to do
    __version__ = "0+uninstalled"
