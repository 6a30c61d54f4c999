"""The experiments ``temperature`` and ``refinements``: an automatic tau, and the best 2D samplers.

Imports the package.
"""

from __future__ import annotations

from typing import Any

from dxmi_ext.reproduce.densities import COOLED, SCORES, SPREAD_COLUMNS, SPREADS, variant
from dxmi_ext.reproduce.experiments import Experiment

_STEADY: dict[str, Any] = {"batch_size": 256, "sampler_lr": 1e-3, "value_lr": 5e-4, "ema_decay": 0.998}
_AUTOMATIC: dict[str, Any] = {"tau": 1.0, "tau_rate": 0.03, "tau_margin": 0.1}
_LARGE: dict[str, Any] = {"tau": 1.0, "tau_rate": 0.01, "tau_margin": 0.3, "batch_size": 1024}
_STEADY_8: dict[str, Any] = _STEADY | {"octaves": 2}
_TEMPERATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "8gaussians": ("8gaussians", _STEADY_8),
    "2spirals": ("2spirals", _STEADY),
    "checkerboard": ("checkerboard", _STEADY),
    "vp": ("8gaussians", _STEADY_8 | {"schedule": "respaced_ddpm"}),
    "edm": ("8gaussians", _STEADY_8 | {"schedule": "edm", "sigma_max": 10.0, "sigma_min": 0.1}),
}


TEMPERATURE = Experiment(
    "temperature",
    "Automatic temperature",
    [
        row
        for name, (recipe, base) in _TEMPERATURES.items()
        for row in (
            variant(f"{name}-cooled", f"{name}, tau = 0.1, cooled", recipe, **base, **COOLED),
            variant(f"{name}-auto", f"{name}, automatic tau", recipe, **base, **_AUTOMATIC),
            *(
                variant(f"{name}-tau{tau:g}", f"{name}, tau = {tau:g}", recipe, **base, tau=tau)
                for tau in (0.03, 0.1, 0.3)
            ),
        )
    ],
    columns=SPREAD_COLUMNS,
    notes=f"""{SCORES}
{SPREADS}
Automatic: tau starts at 1 and follows the entropy of the data (`method/temperature.py`). Cooled: tau is .1
for 70 % of the run and then falls to a quarter, while the averaged energy stays as it is; KL is with .1. All
rows have the batch size, learning rates and weight average of `8gaussians-auto`, with 2 octaves on the 8
Gaussians and 3 on the other densities.
vp, edm: the 8 Gaussians with other noise levels than 3 to .4, namely DDPM's (T of its 1,000, ending in noise)
and EDM's from 10 to .1 with rho = 7.""",
    seeds=3,
    sweeps={
        name: tuple(f"{name}-{tau}" for tau in ("cooled", "auto", "tau0.03", "tau0.1", "tau0.3"))
        for name in _TEMPERATURES
    },
)

REFINEMENTS = Experiment(
    "refinements",
    "8 Gaussians: closer to the data",
    [
        variant("auto-b1024", "automatic tau, batches of 1,024", **_LARGE, samplings=50),
        variant("auto", "8gaussians-auto", "8gaussians-auto", samplings=50),
        variant(
            "auto-plain", "8gaussians-auto, without sinusoids", "8gaussians-auto", octaves=0, samplings=50
        ),
    ],
    columns=SPREAD_COLUMNS | {"sliced_wasserstein_floor": "SW of fresh data"},
    notes=f"""{SCORES.replace("five", "50")}
{SPREADS}
Automatic: tau follows the entropy of the data (`method/temperature.py`). `8gaussians-auto` does the same with
batches of 256, a higher learning rate of the sampler and a lower one of the value, a longer average of the
weights, and sinusoids of the coordinates as inputs of the networks.""",
)
