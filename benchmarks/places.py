"""The places of benchmarks: CPU, GPU, and GPU replaying a CUDA graph. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributions import Distribution

from dxmi_ext import __version__, _native
from dxmi_ext.engine.compute.graphs import WARM_UP, Graphed

R = TypeVar("R")


class Place(NamedTuple):
    name: str
    device: torch.device
    graph: bool = False

    def prepare(self, function: Callable[[], R]) -> Callable[[], R]:
        """The callable to time here: the function itself, or the replay of its graph."""
        return _captured(function) if self.graph else function

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def environment(self) -> dict[str, Any]:
        """Device and versions, without which a figure is meaningless."""
        cuda = self.device.type == "cuda"
        return {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if cuda else processor(),
            "kernels": _native.build_info()["CUDA kernels"] if cuda else _native.cpu_variant(),
            "threads": torch.get_num_threads(),
            "dxmi_ext": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
        }


def why_no_cuda() -> str:
    """The reason why nothing is measured on a GPU; empty if it is."""
    return "torch sees no CUDA device" if not torch.cuda.is_available() else _native.cuda_status()


def places() -> list[Place]:
    """Every place that has kernels."""
    found = [Place("cpu", torch.device("cpu"))]
    if not why_no_cuda():
        cuda = torch.device("cuda", 0)
        found += [Place("cuda", cuda), Place("cuda graph", cuda, graph=True)]
    return found


def processor() -> str:
    """The CPU's name as given by its vendor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _captured(function: Callable[[], R]) -> Callable[[], R]:
    """Captures a function without host synchronization; each replay overwrites the same results."""
    checks = Distribution._validate_args  # these checks read results on the host, which a graph cannot
    Distribution.set_default_validate_args(False)
    try:
        graphed = Graphed(function)
        for _ in range(WARM_UP + 1):
            graphed()
    finally:
        Distribution.set_default_validate_args(checks)
    return graphed
