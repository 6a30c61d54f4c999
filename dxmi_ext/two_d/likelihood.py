"""The energy that a 2D run has learned as a normalized density: log Z, and the log-likelihood of test data.

Imports torch, the engine and the method.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import torch

from dxmi_ext.engine.runs import final
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method import noise
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.path_weights import Kernel, log_partition
from dxmi_ext.two_d import densities, model, sources
from dxmi_ext.two_d.evaluation import temperature_of
from dxmi_ext.two_d.settings import Config

_TESTED = 10_000  # test points
_REACH, _SIZE = 6.0, 600  # half the side of the grid, points per side; on [-4, 4]^2 log Z is .013 less


def evaluate(
    cfg: Config, networks: Networks, *, paths: int, seed: int, tau_factor: float = 1.0
) -> dict[str, Any]:
    """Numbers of the density exp(-E / w) / Z, where w is the weight of the entropy.

    Args:
        paths: number of paths whose weights give log Z.
        seed: seed of the paths and the test data.
        tau_factor: factor of tau at the end of the run, if it was automatic.

    Returns:
        log_partition with its standard error log_partition_std, elbo, ess and the kernel by
        `path_weights.log_partition`; log_partition_grid: the same by a grid on [-6, 6]^2; log_likelihood:
        mean log density of test data in nats (of a file its held-out points, standardized), and its
        standard error; log_likelihood_true: by the true density, if that is known. Those that cannot be
        computed are skipped, with a note.

    Raises:
        ConfigError: the run has no sampler, or no entropy.
    """
    if not cfg.algorithm.trains_sampler:
        raise ConfigError(
            f"log_partition must be false for a run without a sampler (negatives={cfg.algorithm.negatives}), "
            "got true"
        )
    w = tau_factor * temperature_of(cfg)
    if not w > 0:
        raise ConfigError(
            f"log_partition must be false for a run whose entropy has temperature {w:g}, got true"
        )
    networks.sampler.use(cfg.chain.steps)
    return final.numbers("log Z and log-likelihood", lambda: _numbers(cfg, networks, w, paths, seed))


def _numbers(cfg: Config, networks: Networks, w: float, paths: int, seed: int) -> dict[str, Any]:
    kernels = {"schedule": Kernel.noising(model.schedule_of(cfg, cfg.chain.steps))}
    numbers = log_partition(networks, w, kernels, n=paths, seed=seed)
    numbers["log_partition_grid"] = grid_log_partition(networks, w)
    key = noise.Draws(seed, "test data", ["data"], networks.sampler.log_std.device).at(0)["data"]
    source = sources.of(cfg.density.data, key.device)
    data = source.tested(_TESTED, key)
    with torch.no_grad():
        log_density = -networks.energy(data).double() / w - numbers["log_partition"]
    spread = float(log_density.std()) / math.sqrt(len(data))
    numbers["log_likelihood"] = float(log_density.mean())
    numbers["log_likelihood_std"] = math.hypot(spread, numbers["log_partition_std"])
    if source.units is None:
        numbers["log_likelihood_true"] = float(densities.log_density(source.name, data).mean())
    return numbers


@torch.no_grad()
def grid_log_partition(networks: Networks, w: float) -> float:
    """log of the integral of exp(-E / w) over [-6, 6]^2, by midpoints."""
    cell = 2 * _REACH / _SIZE
    line = (torch.arange(_SIZE, device=networks.sampler.log_std.device) + 0.5) * cell - _REACH
    energies = networks.energy(torch.cartesian_prod(line, line)).double()
    return float((-energies / w).logsumexp(0)) + 2 * math.log(cell)


def table(numbers: dict[str, Any]) -> str:
    """The numbers of `evaluate` in words; nan for skipped ones."""
    of = collections.defaultdict(lambda: math.nan, numbers)
    true = ""
    if "log_likelihood_true" in numbers:
        true = f" (true density: {of['log_likelihood_true']:.3f})"
    return (
        f"log Z {of['log_partition']:.3f} ± {of['log_partition_std']:.3f} (grid: "
        f"{of['log_partition_grid']:.3f}), ESS {of['ess']:.3g} with the backward kernel {of['kernel']}\n"
        f"test log-likelihood {of['log_likelihood']:.3f} ± {of['log_likelihood_std']:.3f} nats{true}"
    )
