"""Options and the final table of the benchmarks: every time beside ours, as a ratio."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch

from dxmi_ext import __version__, _native

OURS = "dxmi_ext"
_RESULTS = pytest.StashKey[dict[str, dict[str, tuple[float, float]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: fewer rounds, under a minute")
    parser.addoption("--threads", type=int, default=1, help="benchmarks: CPU threads of torch (default: 1)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = {}


@pytest.fixture(scope="session", autouse=True)
def threads(pytestconfig: pytest.Config) -> None:
    torch.set_num_threads(pytestconfig.getoption("--threads"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that has kernels."""
    if request.param == "cuda" and not (torch.cuda.is_available() and not _native.cuda_status()):
        pytest.skip("needs a CUDA device and dxmi_ext's CUDA half")
    return torch.device(request.param)


@pytest.fixture
def measure(
    device: torch.device, benchmark: Any, pytestconfig: pytest.Config
) -> Callable[[Callable[[], Any], str, str], None]:
    """measure(function, group, implementation) times a function and keeps its time for the table.

    A round is as many calls as take some ms; on CUDA its last call waits for the device.
    """

    def run(function: Callable[[], Any], group: str, implementation: str) -> None:
        rounds, round_seconds = (20, 0.005) if pytestconfig.getoption("--quick") else (100, 0.02)
        calls = max(1, round(round_seconds / _seconds(function, device)))
        called = itertools.count(1)

        def call_and_wait() -> None:
            function()
            if next(called) % calls == 0:
                torch.cuda.synchronize()

        benchmark.group = f"{group} on {device}"
        benchmark.extra_info.update(_environment(device), implementation=implementation)
        timed = call_and_wait if device.type == "cuda" else function
        benchmark.pedantic(timed, rounds=rounds, iterations=calls, warmup_rounds=3)
        if benchmark.stats:  # none under --benchmark-disable
            stats = benchmark.stats.stats
            times = pytestconfig.stash[_RESULTS].setdefault(benchmark.group, {})
            times[implementation] = stats.median, stats.min

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the times of a call, and the least against ours: what disturbs a measurement only adds to it."""
    for group, times in config.stash[_RESULTS].items():
        terminalreporter.section(group)
        terminalreporter.write_line(f"{'us a call':24}{'median':>12}{'least':>12}{'least / ours':>16}")
        for implementation, (median, least) in times.items():
            ratio = f"{least / times[OURS][1]:.2f}" if OURS in times else ""
            row = f"{implementation:24}{median * 1e6:12.1f}{least * 1e6:12.1f}{ratio:>16}"
            terminalreporter.write_line(row)


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """A call's time, roughly; warms up as well."""
    for calls in (3, 10):
        start = perf_counter()
        for _ in range(calls):
            function()
        _wait(device)
    return (perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _environment(device: torch.device) -> dict[str, str | int]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "kernels": _native.build_info()["CUDA kernels"] if cuda else _native.cpu_variant(),
        "threads": torch.get_num_threads(),
        "dxmi_ext": __version__,
        "torch": torch.__version__,
    }
