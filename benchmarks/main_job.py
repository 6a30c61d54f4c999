"""The README's main job through the Python API alone: pretraining, DxMI on the 8 Gaussians, and the numbers
of the paper's Table 1.

    python benchmarks/main_job.py [--device cpu] [--no-graph] [--json FILE]

On a CUDA device an iteration of DxMI is one CUDA graph (``cuda_graph=true``). Seed, data and networks are
those of `dxmi train 8gaussians`. Imports torch, numpy, safetensors and tqdm beside ``dxmi_ext``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from dxmi_ext import noise
from dxmi_ext.data import two_d as data
from dxmi_ext.networks import Networks
from dxmi_ext.pretrain import Pretrainer, uniform_levels
from dxmi_ext.recipes import two_d as recipe
from dxmi_ext.trainer import DxMITrainer, Stepper

LINES = 5  # of progress in a phase


def main() -> None:
    parser = argparse.ArgumentParser(description="The 8 Gaussians through the trainer's Python API.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-graph", action="store_true", help="on a CUDA device, launch kernels one by one")
    parser.add_argument("--iterations", type=int, default=recipe.Config.iterations)
    parser.add_argument("--pretrain-iterations", type=int, default=recipe.Config.pretrain_iterations)
    parser.add_argument("--samplings", type=int, default=recipe.Config.samplings)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    arguments = parser.parse_args()
    settings = recipe.Config(
        device=arguments.device,
        cuda_graph=torch.device(arguments.device).type == "cuda" and not arguments.no_graph,
        iterations=arguments.iterations,
        pretrain_iterations=arguments.pretrain_iterations,
        samplings=arguments.samplings,
    )
    torch.set_num_threads(settings.threads)
    networks, seconds = train(settings)
    start = perf_counter()
    numbers = recipe.evaluate_networks(settings, networks, seed=settings.seed)
    seconds["evaluation"] = round(perf_counter() - start, 3)
    record = {
        "device": settings.device,
        "cuda_graph": settings.cuda_graph,
        "iterations": settings.iterations,
        "seconds": seconds,
        **numbers,
    }
    print(recipe.table(settings, numbers))
    print(json.dumps(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train(settings: recipe.Config) -> tuple[Networks, dict[str, float]]:
    """The averaged networks, and the seconds that each phase took."""
    device = torch.device(settings.device)
    networks, schedule = recipe.build(settings, device)
    pretrainer = Pretrainer(
        networks.sampler.network,
        uniform_levels(schedule.signal, schedule.noise),
        lr=settings.pretrain_lr,
        iterations=settings.pretrain_iterations,
        seed=settings.seed,
        settings=settings,
    )
    seconds = {"pretraining": repeat("pretrain", pretrainer, settings.pretrain_iterations, settings, device)}
    trainer = DxMITrainer(networks, settings, iterations=settings.iterations, seed=settings.seed)
    seconds["DxMI"] = repeat("dxmi", trainer, settings.iterations, settings, device)
    return trainer.averaged, seconds


def repeat(
    phase: str, stepper: Stepper, iterations: int, settings: recipe.Config, device: torch.device
) -> float:
    """Runs a phase on the recipe's data; its seconds."""
    draws = noise.Draws(settings.seed, f"data of {phase}", ["data"], device)
    start = perf_counter()
    for iteration in range(iterations):
        key = draws.at(iteration)["data"]
        numbers = stepper.step(data.sample(settings.data, settings.batch_size, key))
        if (iteration + 1) % max(1, iterations // LINES) == 0:
            # Reading them waits for the device.
            print(phase, iteration + 1, {name: mean(x) for name, x in numbers.items()}, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return round(perf_counter() - start, 3)


def mean(x: Tensor) -> float:
    return round(x.float().mean().item(), 4)


if __name__ == "__main__":
    main()
