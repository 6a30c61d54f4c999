# %% [markdown]
# # A given energy
#
# If the energy is known and there are no data, DxMI trains a sampler of exp(-E) / Z, and the weights of its
# paths estimate log Z. This tutorial defines an energy in two dimensions, so that the estimate can be
# compared with a numerical integral.

# %%
import inspect
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from dxmi_ext import cli


def energy(x: Tensor) -> Tensor:
    """Two wells at x_1 = -1.5 and 1.5, with a quadratic in x_2; [N, 2] -> [N]."""
    return (x[:, 0] ** 2 - 2.25) ** 2 + 2 * (x[:, 1] - 0.3 * x[:, 0]) ** 2


# %% [markdown]
# ## Training
#
# `target=module:function` names the energy. The module is looked up in the current folder first, so this
# function could be in a file `wells.py` of yours; here it is written there. `scale` is the rough size of the
# region with low energy.

# %%
source = "from torch import Tensor\n\n\n" + inspect.getsource(energy)
Path("wells.py").write_text(source, encoding="utf-8")
short = bool(os.environ.get("DXMI_SHORT"))
fewer = ["iterations=3", "batch_size=64", "paths=200"] if short else ["iterations=150"]
settings = ["target=wells:energy", "dim=2", "scale=2", "steps=10", "output=runs/wells", "threads=1"]
cli.main(["train", "energy", *settings, *fewer])

# %% [markdown]
# ## The result
#
# log Z by the sampler and by a sum over a grid. `elbo` is a lower bound of log Z, and `ess` is the effective
# sample size of the weighted paths, as a share: 1 if the sampler is perfect.

# %%
summary = json.loads(Path("runs/wells/summary.json").read_text(encoding="utf-8"))
axis = torch.linspace(-5, 5, 1001, dtype=torch.float64)
grid = torch.cartesian_prod(axis, axis)
integral = torch.logsumexp(-energy(grid), 0) + 2 * (axis[1] - axis[0]).log()
print(f"log Z: {summary['log_partition']:.3f} ± {summary['log_partition_std']:.3f}; integral {integral:.3f}")
print(f"ELBO {summary['elbo']:.3f}, effective sample size {summary['ess']:.2f}")

# %% [markdown]
# Samples, as drawn by `dxmi sample runs/wells`, and their share in the right well. Each well has half of the
# mass.

# %%
import numpy as np

cli.main(["sample", "runs/wells", f"n={200 if short else 10000}", "output=runs/wells/samples.npz"])
samples = np.load("runs/wells/samples.npz")["samples"]
print(f"in the right well: {(samples[:, 0] > 0).mean():.2f}")

# %% [markdown]
# A run printed
#
#     log Z: 0.465 ± 0.015; integral 0.443
#     ELBO -0.533, effective sample size 0.30
#     in the right well: 0.50
