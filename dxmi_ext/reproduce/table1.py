"""The experiments ``table1``, ``ddpm`` and ``densities``: the paper's table, and the same on other densities.

Imports ``two_d.evaluation`` and the package.
"""

from __future__ import annotations

import dataclasses

from dxmi_ext.reproduce.densities import SCORES
from dxmi_ext.reproduce.experiments import Experiment, Row
from dxmi_ext.two_d.evaluation import PAPER

# T, and the paper's SW
_DDPM = ((5, 0.967), (10, 0.824), (100, 0.241), (1000, 0.123))


def _ddpm(steps: int, paper: float, schedule: str = "respaced_ddpm") -> Row:
    # A larger min_std would blur the many small steps. As many iterations as a row of DxMI has in total.
    settings = {"schedule": schedule, "steps": steps, "min_std": 1e-3}
    settings |= {"pretrain_iterations": 5600, "iterations": 0}
    return Row(f"ddpm-t{steps}", f"DDPM, T = {steps}", settings, {"sliced_wasserstein": (paper, None)})


def _dxmi(pretrained: bool, tau: float) -> Row:
    sw, deviation, auroc = PAPER[pretrained, tau]
    scratch = "" if pretrained else ", from scratch"
    return Row(
        f"dxmi-tau{tau:g}{'' if pretrained else '-scratch'}",
        f"DxMI, T = 5, tau = {tau:g}{scratch}",
        {"tau": tau, "pretrained": pretrained},
        {"sliced_wasserstein": (sw, deviation), "auroc": (auroc, None)},
    )


def _density(name: str) -> list[Row]:
    rows = *(_ddpm(*row) for row in _DDPM), *(_dxmi(*run) for run in PAPER)
    return [
        dataclasses.replace(
            row, name=f"{name}-{row.name}", label=f"{name}, {row.label}", paper={}, recipe=name
        )
        for row in rows
    ]


TABLE1 = Experiment(
    "table1",
    "8 Gaussians (DxMI, Table 1)",
    [
        *(_ddpm(*row, schedule="ddpm") for row in _DDPM),
        *(_dxmi(*run) for run in PAPER),
    ],
    notes=f"""{SCORES}

DDPM: the denoiser of the DxMI rows, trained on T noise levels and sampled with the same T steps; it has no
energy. The paper does not give its noise schedule. Here it has T linear betas from 1e-4 to .02 for every T,
since only then do few steps come close to the paper's figures. These levels end far from noise, although
sampling starts from noise. The experiment `ddpm` has levels that end in noise for every T, a stronger
baseline.
DxMI: `dxmi train 8gaussians` (variance-exploding levels from 3 to .4) with the named settings changed.""",
)

DDPM = Experiment(
    "ddpm",
    "8 Gaussians: DDPM with T levels that end in noise",
    [_ddpm(*row) for row in _DDPM[:-1]],
    columns={"sliced_wasserstein": "SW"},
    notes="The levels are T of those of DDPM with 1,000 betas. With T = 1000, this is the row of `table1`.",
)

DENSITIES = Experiment(
    "densities",
    "Table 1 on other densities",
    [*_density("2spirals"), *_density("checkerboard")],
    notes=f"""{SCORES}

DDPM: T of the noise levels of DDPM with 1,000 betas, as in the experiment `ddpm`. There are no published
results.""",
    seeds=3,
)
