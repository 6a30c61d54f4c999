"""The experiments ``ablations`` and ``mcmc``: one setting changed at a time, and Langevin chains for DxMI.

Imports the package.
"""

from __future__ import annotations

from typing import Any

from dxmi_ext.reproduce.densities import SCORES, SPREAD_COLUMNS, SPREADS, variant
from dxmi_ext.reproduce.experiments import Experiment, Row

_KINDS = ("short-run", "persistent")


def _langevin(kind: str, steps: int, size: float = 0.5) -> Row:
    settings: dict[str, Any] = {"negatives": kind.replace("-", "_"), "rollbacks": 0}
    settings |= {"langevin_steps": steps, "langevin_step_size": size}
    label = f"{kind}, K = {steps}, s = {size:g}"
    return Row(f"{kind}-{steps}-s{size:g}", label, settings, may_diverge=True)


ABLATIONS = Experiment(
    "ablations",
    "8 Gaussians: one setting changed at a time",
    [
        variant("default", "default"),
        *(variant(f"tau{tau:g}", f"tau = {tau:g}", tau=tau) for tau in (0.001, 0.01, 0.03, 0.3, 1, 10)),
        variant("costs-value", "costs only in the value's loss", costs_in="value"),
        variant("costs-sampler", "costs only in the sampler's loss", costs_in="sampler"),
        variant("sums", "costs summed over dimensions", cost_reduction="sum"),
        variant("avr-off", "without AVR", velocity_decay=1.0),
        *(
            variant(f"avr{alpha:g}", f"AVR with alpha = {alpha:g}", velocity_decay=alpha)
            for alpha in (0.9, 0.999)
        ),
        *(variant(f"gamma{gamma:g}", f"gamma = {gamma:g}", gamma=gamma) for gamma in (0.1, 0.3, 3.0)),
        *(variant(f"t{steps}", f"T = {steps}", steps=steps) for steps in (1, 2, 3, 10)),
        variant("td-shuffled", "TD in shuffled order", td_order="shuffled"),
        variant("td-redraw", "TD on redrawn steps", td_redraw=True),
        variant("value-energy", "value independent of time (Alg. 2)", value_kind="time_independent"),
        variant("separate", "separate energy network", value_kind="separate"),
        variant("policy-gradient", "policy gradient", sampler_update="policy_gradient"),
        variant("backprop", "back-propagation through paths", sampler_update="backprop"),
    ],
    columns=SPREAD_COLUMNS,
    notes=f"""{SCORES}
{SPREADS}
default: T = 5, tau = .1, gamma = 1, alpha = .99, costs in both losses and averaged over dimensions, a value
with a head per step, TD backward in time.""",
    seeds=3,
    sweeps={
        "tau": ("tau0.001", "tau0.01", "tau0.03", "default", "tau0.3", "tau1", "tau10"),
        "costs": ("default", "costs-value", "costs-sampler", "sums"),
        "avr": ("avr0.9", "default", "avr0.999", "avr-off"),
        "gamma": ("gamma0.1", "gamma0.3", "default", "gamma3"),
        "steps": ("t1", "t2", "t3", "default", "t10"),
        "td": ("default", "td-shuffled", "td-redraw"),
        "value": ("default", "value-energy", "separate"),
        "update": ("default", "policy-gradient", "backprop"),
    },
)

MCMC = Experiment(
    "mcmc",
    "8 Gaussians: the same energy network without and with MCMC",
    [
        variant("dxmi", "DxMI, T = 5"),
        *(_langevin(kind, steps) for kind in _KINDS for steps in (14, 23)),
        *(_langevin(kind, 23, size) for kind in _KINDS for size in (0.05, 5.0)),
    ],
    columns={"diverged": "diverged"} | SPREAD_COLUMNS,
    notes=f"""{SCORES}
{SPREADS}
Langevin: the negatives of the energy are chains of K steps x - s grad E + sqrt(2 s tau) z, which start from
noise (short-run) or from their last state (persistent). Samples are such chains of the trained energy. An
iteration of DxMI passes 32 batches through its networks, forward or backward, as K = 14 Langevin steps do; on
one core, it takes about as long as K = 23.
diverged: share of runs that became non-finite; the other numbers are those of the remaining runs.""",
    seeds=3,
    sweeps={
        "budget": ("dxmi", *(f"{kind}-{k}-s0.5" for kind in _KINDS for k in (14, 23))),
        **{f"{kind}-step": tuple(f"{kind}-23-s{s}" for s in ("0.05", "0.5", "5")) for kind in _KINDS},
    },
)
