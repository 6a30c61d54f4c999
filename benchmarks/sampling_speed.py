"""Images per second of the Fashion-MNIST samplers that ship, and of the chains and solvers of their base.

Rounds alternate between all samplers; printed are medians over rounds. Loading is not included. Imports
``dxmi_ext`` with its image extras; requires no data.

    python benchmarks/sampling_speed.py [--n IMAGES] [--rounds R] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dxmi_ext import tasks
from dxmi_ext.images import chains, model
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.solvers import SolverSampler
from dxmi_ext.ops import noise_key

SAMPLERS = ("fashion-mnist-t4", "fashion-mnist-t10")
BASE = "fashion-mnist-base"
CHAINS = {"dpmpp-4": 4, "dpmpp-10": 10, "heun-18": 35, "heun-40": 79, "edm-ancestral-100": 100}
"""Chain of the base -> evaluations per image."""


def samplers() -> dict[str, tuple[int, GaussianSampler | SolverSampler]]:
    """Name -> evaluations per image and sampler."""
    cpu, found = torch.device("cpu"), {}
    for name in SAMPLERS:
        sampler = model.load(tasks.shipped()[name], cpu)[1].sampler
        found[name] = (sampler.steps, sampler)
    cfg, networks, diffusion = model.load(tasks.shipped()[BASE], cpu)
    for chain, evaluations in CHAINS.items():
        found[f"the base, {chain}"] = (evaluations, chains.named(chain, networks.sampler, cfg, diffusion))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=250, help="images per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found, times = samplers(), dict[str, list[float]]()
    for r in range(options.rounds + 1):
        for name, (_, sampler) in found.items():
            start = time.perf_counter()
            sampler.sample(options.n, noise_key(r))
            if r:  # the first round is a warm-up
                times.setdefault(name, []).append(time.perf_counter() - start)
    print(f"{options.threads} threads, {options.n} images per round")
    print(f"{'':28}{'evaluations':>12}{'images/s':>12}")
    for name, (evaluations, _) in found.items():
        print(f"{name:28}{evaluations:12}{options.n / statistics.median(times[name]):12.1f}")


if __name__ == "__main__":
    main()
