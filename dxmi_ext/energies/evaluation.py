"""Metrics of a sampler, and a table of them beside published figures.

Imports torch, the engine and the method; scipy where it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dxmi_ext.energies import metrics, reference
from dxmi_ext.energies.chains import Chain
from dxmi_ext.energies.networks import TargetEnergy
from dxmi_ext.energies.settings import Config
from dxmi_ext.energies.targets import Target
from dxmi_ext.engine.runs import final
from dxmi_ext.method import noise
from dxmi_ext.method.path_weights import of_reverse_weights, of_weights

_BATCH = 2000  # paths at a time

PUBLISHED = {
    "gmm25": {
        "PIS, T = 100": {"elbo_gap": 1.769, "log_partition_error": 1.274},
        "DDS, T = 100": {"elbo_gap": 1.760, "log_partition_error": 0.746},
        "TB with exploration and local search, T = 100": {"elbo_gap": 0.171, "log_partition_error": 0.004},
        "TB with learned variance, T = 10": {"elbo_gap": 0.62},
    },
    "funnel10": {
        "DDS, T = 100": {"elbo_gap": 0.424, "log_partition_error": 0.206},
        "PIS, T = 100": {"elbo_gap": 0.534, "log_partition_error": 0.262},
        "TB, T = 100": {"elbo_gap": 0.653, "log_partition_error": 0.285},
    },
    "manywell32": {
        "PIS, T = 100": {"elbo_gap": 3.85, "log_partition_error": 2.69},
        "VarGrad, T = 100": {"elbo_gap": 4.11, "log_partition_error": 0.02},
        "TB, T = 100": {"elbo_gap": 4.57, "log_partition_error": 0.19},
    },
    "dw4": {"VGS, T = 30": {"w2": 1.610}, "iDEM": {"w2": 2.13}, "FAB": {"w2": 2.15}},
    "lj13": {"VGS, T = 100": {"w2": 4.167}, "iDEM": {"w2": 4.26}, "FAB": {"w2": 4.35}},
}
"""Gaps and errors of log Z: Sendera et al. 2024, Table 1 (2,000 paths). W2, raw: VGS (arXiv 2502.13280)."""


def samples_of(cfg: Config, target: Target, seed: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Two independent sets of samples of the target, [n, D] both; None if it has no sampler."""
    if cfg.target.temperature != 1 or (draw := reference.sampler_of(target)) is None:
        return None
    n, key = cfg.evaluation.compared, noise.Draws(seed, "samples of the target", ["all"], device).at(0)["all"]

    def both() -> tuple[Tensor, Tensor]:
        drawn = draw(2 * n, key, 0)
        return drawn[:n], drawn[n:]

    return final.attempt("samples of the target", both)


def evaluate_chain(
    cfg: Config,
    target: Target,
    chain: Chain,
    data: tuple[Tensor, Tensor] | None,
    *,
    seed: int,
    weighs: bool = True,
) -> dict[str, float | None]:
    """All metrics of a sampler, without those that cannot be computed.

    Args:
        data: `samples_of` the target.
        weighs: whether log Z and its bounds are estimated.

    Returns:
        log_partition, its standard error and its true value (None where it is unknown), elbo, ess, and
        evaluations_per_sample, evaluations of the energy (or its gradient) that a path takes; where
        the true value is known also elbo_gap and log_partition_error, |log_partition - the true value|; where
        the target has samples also eubo, eubo_gap, ess_reverse, and those of `metrics.compare`.
    """
    keys = noise.Draws(seed, "evaluate", ["paths", "back"], chain.start.log_std.device).at(0)
    true = TargetEnergy(target, widths=chain.energy.widths)
    known = target.log_partition if cfg.target.temperature == 1 else None
    numbers: dict[str, float | None] = {"log_partition_true": known}
    ends: list[Tensor] = []

    def weights() -> dict[str, float]:
        log_w, evaluations = [], 0
        for first in range(0, cfg.evaluation.paths, _BATCH):
            count = min(_BATCH, cfg.evaluation.paths - first)
            before = chain.energy.count
            path = chain.rollout(count, keys["paths"], sample_offset=first)
            evaluations += chain.energy.count - before
            log_w.append(chain.log_weights(path, true))
            ends.append(path[-1])
        found = of_weights(torch.cat(log_w))
        found["evaluations_per_sample"] = evaluations / cfg.evaluation.paths
        if known is None:
            return found
        error = abs(found["log_partition"] - known)
        return found | {"elbo_gap": known - found["elbo"], "log_partition_error": error}

    if weighs:
        numbers |= final.numbers("log_partition, elbo, ess", weights)
    if data is None:
        return numbers
    drawn, other = data
    n = len(drawn)

    def reverse() -> dict[str, float]:
        back = chain.backward_rollout(chain.energy.coordinates(drawn), keys["back"])
        found = of_reverse_weights(chain.log_weights(back, true))
        return found if known is None else found | {"eubo_gap": found["eubo"] - known}

    def compared() -> dict[str, float]:
        last_noise = cfg.evaluation.last_noise
        if last_noise == 1 and sum(map(len, ends)) >= n:
            samples = chain.energy.lift(torch.cat(ends)[:n])
        else:
            samples = chain.sample(n, keys["paths"], last_noise=last_noise)
        with torch.no_grad():
            return metrics.compare(samples, drawn, other, target)

    if weighs:
        numbers |= final.numbers("eubo, ess_reverse", reverse)
    return numbers | final.numbers("w2 and other distances", compared)


def table(cfg: Config, numbers: dict[str, float | None]) -> str:
    """A run's metrics above published ones, as text."""
    s = cfg.chain
    what = cfg.target.target or cfg.target.energy
    rows = [f"{what}, {s.sampler}, T = {s.steps}: log Z {_range(numbers)}"]
    titles = {"elbo_gap": "ELBO gap", "log_partition_error": "log Z error", "ess": "ESS"}
    titles |= {"w2": "W2", "modes": "modes", "evaluations": "evaluations"}
    own = {key: value for key in titles if (value := numbers.get(key)) is not None}
    shown = [*own]
    rows.append(f"{'':48}" + "".join(f"{titles[key]:>13}" for key in shown))
    rows.append(_row("this run", own, shown))
    if (floor := numbers.get("w2_floor")) is not None:
        rows.append(_row("samples of the target", {"w2": floor}, shown))
    if cfg.target.target is None:
        others = PUBLISHED.get(str(cfg.target.energy), {})
        rows += [_row(name, values, shown) for name, values in others.items() if values.keys() & own.keys()]
    return "\n".join(rows)


def _range(numbers: dict[str, float | None]) -> str:
    if "log_partition" not in numbers:
        return "unknown"
    true = numbers["log_partition_true"]
    known = "unknown" if true is None else f"{true:.3f}"
    return f"{numbers['log_partition']:.3f} ± {numbers['log_partition_std']:.3f} (true: {known})"


def _row(name: str, values: dict[str, float], shown: list[str]) -> str:
    cells = (f"{values[key]:13.4g}" if key in values else f"{'-':>13}" for key in shown)
    return f"{name:48}" + "".join(cells)
