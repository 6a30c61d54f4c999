"""Peak memory of an iteration on images: ours, the plain loop, and back-propagation through the path, which
DxMI avoids.

Each is measured in the first iteration of a fresh process: on the CPU the peak of resident memory minus the
memory resident before, on a GPU the same for torch's allocations. So it includes activations, gradients,
moments and the trajectory.

    python benchmarks/peak_memory.py [--batch N] [--steps T] [--width W]
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
from pathlib import Path

import torch

from dxmi_ext import ops
from dxmi_ext.method import schedules
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.trainer import DxMITrainer
from networks import ConvValue, UNet
from plain_iteration import PlainLoop

SETTINGS = DxMISettings(sampler_steps=1, sampler_lr=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("batch", 64), ("steps", 10), ("width", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    size = parser.parse_args()
    found = {}
    for name in ("ours", "ours, backprop", "plain loop", "plain loop, fused Adam"):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found[name] = process.apply(peak, (name, size.batch, size.steps, size.width))
    for name, mib in found.items():
        print(f"{name:24}{mib:10.1f} MiB{mib / found['ours']:8.2f}")


def peak(name: str, batch: int, steps: int, width: int) -> float:
    """MiB beyond the memory in use before the iteration."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, value = UNet(steps, width, (1, 2)), ConvValue(steps, width)
    schedule = schedules.ddpm(torch.linspace(1e-2, 0.5, steps))
    networks = Networks(GaussianSampler(network, schedule, (3, 32, 32)), value).to(device)
    data = ops.normal((batch, 3, 32, 32), ops.noise_key(0, device=device))
    if name.startswith("ours"):
        update = "backprop" if "backprop" in name else "dxdp"
        settings = dataclasses.replace(SETTINGS, sampler_update=update)
        step = DxMITrainer(networks, settings, iterations=1000, seed=0).step
    else:
        step = PlainLoop(networks, SETTINGS, iterations=1000, fused="fused" in name).step
    network(data[:1], torch.zeros(1, dtype=torch.int64, device=device))  # libraries allocate on first use
    before = _high_water(device, reset=True)
    step(data)
    return (_high_water(device) - before) / 2**20


def _high_water(device: torch.device, reset: bool = False) -> int:
    """The peak in bytes; ``reset`` restarts it from the memory in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
