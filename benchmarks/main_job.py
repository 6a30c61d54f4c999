"""The README's main job through the Python API alone: pretraining, DxMI on the 8 Gaussians, and the numbers
of the paper's Table 1.

    python benchmarks/main_job.py [--device cpu] [--no-graph] [--json FILE]

On a CUDA device an iteration of DxMI is one CUDA graph (``cuda_graph=true``). Seed, data and networks are
those of `dxmi train 8gaussians`. Imports torch, numpy, safetensors and tqdm besides ``dxmi_ext``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from dxmi_ext.engine.learning.steps import Trainable
from dxmi_ext.method import noise
from dxmi_ext.method.denoising import Pretrainer, uniform_levels
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d import densities as data
from dxmi_ext.two_d import recipe

DEFAULTS = recipe.Config()
LINES = 5  # lines of progress per phase


def main() -> None:
    parser = argparse.ArgumentParser(description="The 8 Gaussians through the trainer's Python API.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-graph", action="store_true", help="on a CUDA device, launch kernels one by one")
    parser.add_argument("--iterations", type=int, default=DEFAULTS.run.iterations)
    parser.add_argument("--pretrain-iterations", type=int, default=DEFAULTS.run.pretrain_iterations)
    parser.add_argument("--samplings", type=int, default=DEFAULTS.evaluation.samplings)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    arguments = parser.parse_args()
    settings = DEFAULTS.replace(
        device=arguments.device,
        cuda_graph=torch.device(arguments.device).type == "cuda" and not arguments.no_graph,
        iterations=arguments.iterations,
        pretrain_iterations=arguments.pretrain_iterations,
        samplings=arguments.samplings,
    )
    torch.set_num_threads(settings.run.threads)
    networks, seconds = train(settings)
    start = perf_counter()
    numbers = recipe.evaluate_networks(settings, networks, seed=settings.run.seed)
    seconds["evaluation"] = round(perf_counter() - start, 3)
    record = {
        "device": settings.run.device,
        "cuda_graph": settings.execution.cuda_graph,
        "iterations": settings.run.iterations,
        "seconds": seconds,
        **numbers,
    }
    print(recipe.table(settings, numbers))
    print(json.dumps(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train(settings: recipe.Config) -> tuple[Networks, dict[str, float]]:
    """The averaged networks, and the seconds that each phase took."""
    device = torch.device(settings.run.device)
    networks, schedule = recipe.build(settings, device)
    pretrainer = Pretrainer(
        networks.sampler.network,
        uniform_levels(schedule.signal, schedule.noise),
        lr=settings.pretraining.pretrain_lr,
        iterations=settings.run.pretrain_iterations,
        seed=settings.run.seed,
        execution=settings.execution,
    )
    seconds = {
        "pretraining": repeat("pretrain", pretrainer, settings.run.pretrain_iterations, settings, device)
    }
    iterations = settings.run.iterations
    trainer = DxMITrainer(
        networks,
        settings.algorithm,
        iterations=iterations,
        seed=settings.run.seed,
        execution=settings.execution,
    )
    seconds["DxMI"] = repeat("dxmi", trainer, iterations, settings, device)
    return trainer.averaged, seconds


def repeat(
    phase: str, stepper: Trainable, iterations: int, settings: recipe.Config, device: torch.device
) -> float:
    """Runs a phase on the recipe's data; returns its seconds."""
    draws = noise.Draws(settings.run.seed, f"data of {phase}", ["data"], device)
    start = perf_counter()
    for iteration in range(iterations):
        key = draws.at(iteration)["data"]
        numbers = stepper.step(data.sample(settings.density.data, settings.run.batch_size, key))
        if (iteration + 1) % max(1, iterations // LINES) == 0:
            # Reading them synchronizes with the device.
            print(phase, iteration + 1, {name: mean(x) for name, x in numbers.items()}, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return round(perf_counter() - start, 3)


def mean(x: Tensor) -> float:
    return round(x.float().mean().item(), 4)


if __name__ == "__main__":
    main()
