"""The experiment ``energies``: few-step samplers of given energies, DxMI's policy beside value gradients.

Imports ``energies.evaluation`` and ``reproduce.experiments``.
"""

from __future__ import annotations

from typing import Any

from dxmi_ext.energies.evaluation import PUBLISHED
from dxmi_ext.reproduce.experiments import Experiment, Row

_SAMPLERS = {"dxmi": "DxMI", "vgs": "VGS"}
_SWEPT = (10, 20, 30, 50)  # T of the targets that have a sweep
_STEPS = {"gmm9": 20, "funnel10": 30, "manywell32": 50, "dw4": 30, "lj13": 100}
_ITERATIONS = 150  # a fraction of the recipes' length, for one core


def _row(target: str, sampler: str, steps: int) -> Row:
    settings: dict[str, Any] = {"sampler": sampler, "steps": steps, "iterations": _ITERATIONS}
    if sampler == "dxmi":
        settings["ema_decay"] = 0.93  # an average of as short a run
    label = f"{target}, {_SAMPLERS[sampler]}, T = {steps}"
    return Row(f"{target}-{sampler}-t{steps}", label, settings, recipe=target)


def _rows() -> list[Row]:
    steps = [(target, t) for target in ("gmm25", "gmm40") for t in _SWEPT] + [*_STEPS.items()]
    return [_row(target, sampler, t) for target, t in steps for sampler in _SAMPLERS]


_COLUMNS = {
    "elbo_gap": "ELBO gap",
    "log_partition_error": "log Z error",
    "log_partition_std": "its standard error",
    "ess": "ESS",
    "eubo_gap": "EUBO gap",
    "modes": "modes",
    "w2": "W2",
    "w2_floor": "W2 of data",
    "energy_tvd": "TVD of energies",
    "distance_tvd": "TVD of distances",
}


def _published() -> str:
    """Published figures as a table."""
    keys = ("elbo_gap", "log_partition_error", "w2")
    lines = ["| published | " + " | ".join(_COLUMNS[key] for key in keys) + " |", "|---|---:|---:|---:|"]
    for target, methods in PUBLISHED.items():
        for method, numbers in methods.items():
            cells = (f"{numbers[key]:.3f}" if key in numbers else "" for key in keys)
            lines.append(f"| {target}, {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


ENERGIES = Experiment(
    "energies",
    "Few-step samplers of given energies",
    _rows(),
    columns=_COLUMNS,
    notes=f"""\
All rows have {_ITERATIONS} iterations of 256 paths (lj13: 128), about a tenth of the recipes'.
ELBO gap: log Z - mean log w over 10,000 paths. log Z error: |log mean w - log Z|, which can be small by luck:
it means something where ESS is not small and the EUBO gap (mean log w over paths led back from exact samples,
less log Z) is near the ELBO gap. W2 is raw, of 2,000 samples by an exact assignment; `W2 of data` is that of
fresh data. log Z of dw4 and lj13 is not known, and what they are compared with are ends of long Hamiltonian
chains.

{_published()}

Published gaps and errors: Sendera et al. 2024, Table 1; W2: VGS, arXiv 2502.13280.""",
    seeds=3,
    sweeps={
        f"{target}-{sampler}": tuple(f"{target}-{sampler}-t{t}" for t in _SWEPT)
        for target in ("gmm25", "gmm40")
        for sampler in _SAMPLERS
    },
    shown=[f"{target}-dxmi-t{t}" for target, t in {"gmm25": 20, "gmm40": 20, **_STEPS}.items()],
)
