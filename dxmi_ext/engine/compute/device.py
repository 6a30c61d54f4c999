"""The device and the versions of a run, its speed and its memory. Imports torch and the engine."""

from __future__ import annotations

import platform
import resource
import time

import numpy
import torch

from dxmi_ext import __version__
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.settings import ConfigError


def choose(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device that a setting names; on CUDA, each rank on a machine has its own.

    Raises:
        ConfigError: the CUDA device does not exist, or several ranks would share it.
    """
    ranks, available = ranks or Ranks(), torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(f"device must be cpu where torch sees no CUDA device, got {name!r}")
    count = torch.cuda.device_count()
    if name.startswith("cuda:"):
        if not ranks.alone:
            raise ConfigError(f"device must be cuda with {ranks.world_size} ranks, got {name!r} for all")
        if int(name[5:]) >= count:
            raise ConfigError(f"device must be cuda:N with N < {count}, got {name!r}")
        return torch.device(name)
    if ranks.local_rank >= count:
        raise ConfigError(
            f"device must be cpu with more ranks on a machine than its {count} CUDA devices, got {name!r} "
            f"for rank {ranks.local_rank}"
        )
    return torch.device("cuda") if ranks.alone else torch.device("cuda", ranks.local_rank)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "dxmi_ext": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


class Clock:
    """Measures the speed of a phase. It does not synchronize with the device; logging has already.

    Args:
        device: device of the run; on CUDA, peak memory is included.
        batch_size: number of samples per iteration.
        start: iteration before the first.
    """

    def __init__(self, device: torch.device, batch_size: int, start: int) -> None:
        self._device, self._batch_size = device, batch_size
        self._last, self._since = start, time.perf_counter()

    def lap(self, iteration: int) -> dict[str, float]:
        """``runlog.TIMING_FIELDS`` since the last lap."""
        now = time.perf_counter()
        pace = (iteration - self._last) / (now - self._since)
        self._last, self._since = iteration, now
        numbers = {"iterations_per_second": pace, "samples_per_second": pace * self._batch_size}
        if self._device.type == "cuda":
            numbers["peak_memory_mib"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return {name: float(f"{number:.4g}") for name, number in numbers.items()}


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak memory of {device} so far {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
    return f"peak memory of the process so far {peak:,.0f} MiB"
