"""The experiment ``energies``: few-step samplers of given energies, DxMI's policy beside value gradients.

Imports ``energies.evaluation`` and ``reproduce.experiments``.
"""

from __future__ import annotations

from typing import Any

from dxmi_ext.energies.evaluation import PUBLISHED
from dxmi_ext.reproduce.experiments import Experiment, Row, markdown_table

_SAMPLERS = {"dxmi": "DxMI", "vgs": "VGS"}
_SWEPT = (10, 20, 30, 50)  # T of the targets with a sweep
_SWEEP_TARGETS = ("gmm25", "gmm40")
_STEPS = {"gmm9": 20, "funnel10": 30, "manywell32": 50, "dw4": 30, "lj13": 100}
_MAIN = dict.fromkeys(_SWEEP_TARGETS, 20) | _STEPS
# A fraction of the recipes' length, twice that on dw4.
_ITERATIONS = {"dxmi": 400, "vgs": 300}


def _row(target: str, sampler: str, steps: int) -> Row:
    iterations = _ITERATIONS[sampler] * (2 if target == "dw4" else 1)
    settings: dict[str, Any] = {"sampler": sampler, "steps": steps, "iterations": iterations}
    if sampler == "dxmi":
        # As many policy steps as steps of the value, and an average that suits so short a run.
        settings |= {"sampler_steps": max(10, steps), "ema_decay": 0.97}
    label = f"{target}, {_SAMPLERS[sampler]}, T = {steps}"
    seeds = 1 if target == "lj13" else None
    return Row(f"{target}-{sampler}-t{steps}", label, settings, recipe=target, seeds=seeds)


def _rows() -> list[Row]:
    steps = [(target, t) for target in _SWEEP_TARGETS for t in _SWEPT] + [*_STEPS.items()]
    rows = [_row(target, sampler, t) for target, t in steps for sampler in _SAMPLERS]
    settings = {**_row("gmm25", "vgs", 20).settings, "damped_steps": False}
    label = "gmm25, VGS with the paper's step length, T = 20"
    return [*rows, Row("gmm25-vgs-t20-undamped", label, settings, recipe="gmm25")]


_COLUMNS = {
    "elbo_gap": "ELBO gap",
    "log_partition_error": "log Z error",
    "log_partition_std": "its standard error",
    "ess": "ESS",
    "eubo_gap": "EUBO gap",
    "evaluations": "evaluations",
    "modes": "modes",
    "w2": "W2",
    "w2_floor": "W2 of data",
    "sliced_w2": "sliced W2",
    "aligned_w2": "aligned W2",
    "energy_tvd": "TVD of energies",
    "distance_tvd": "TVD of distances",
}


def _published() -> str:
    """Published figures as a table."""
    keys = ("elbo_gap", "log_partition_error", "w2")
    rows = [
        [f"{target}, {method}", *(f"{numbers[key]:.3f}" if key in numbers else "" for key in keys)]
        for target, methods in PUBLISHED.items()
        for method, numbers in methods.items()
    ]
    return markdown_table(["published", *(_COLUMNS[key] for key in keys)], rows)


ENERGIES = Experiment(
    "energies",
    "Few-step samplers of given energies",
    _rows(),
    columns=_COLUMNS,
    notes=f"""\
Iterations, of 256 paths (lj13: 128): {_ITERATIONS["dxmi"]} of DxMI with T policy steps each (at least 10),
{_ITERATIONS["vgs"]} of VGS, dw4 twice as many: a fraction of the recipes' length. The complete table has
three seeds of every row but lj13's, which have one; the last column counts those that have been run.
ELBO gap: log Z - mean log w over 10,000 paths. log Z error: |log mean w - log Z|, which may be small by
chance; it is reliable only if ESS is not small and the EUBO gap (mean log w over paths drawn backwards from
exact samples, minus log Z) is close to the ELBO gap. evaluations: of the energy, in training. W2 is raw, over
2,000 samples with an exact assignment; `W2 of data` compares fresh samples of the target. Sliced W2 is over
500 directions; aligned W2, over the first 200 samples, is the smallest over rotations, reflections and
permutations of the particles, up to local minima. log Z of dw4 and lj13 is unknown, and their reference
samples are the ends of long Hamiltonian chains.

{_published()}

Published gaps and errors: Sendera et al. 2024, Table 1; W2: VGS, arXiv 2502.13280.""",
    seeds=3,
    sweeps={
        f"{target}-{sampler}": tuple(f"{target}-{sampler}-t{t}" for t in _SWEPT)
        for target in _SWEEP_TARGETS
        for sampler in _SAMPLERS
    },
    shown=[f"{target}-dxmi-t{steps}" for target, steps in _MAIN.items()],
)
