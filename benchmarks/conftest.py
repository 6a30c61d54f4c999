"""Options, timing and the final table of the benchmarks.

Every implementation is timed beside ours: a round consists of some milliseconds of its calls, then as many of
ours. *ratio* is the median over rounds of its time divided by ours in the same round, so above 1 ours is
faster; *least* is the ratio of the least times of all rounds, which other processes disturb least. *GB/s* is
the bytes that have to be moved divided by the least time; *of copy* compares it with a large copy in the same
run; *kept* is the memory saved for backward, in units of the largest argument.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from dxmi_ext.engine.compute.graphs import WARM_UP
from peers import OURS
from places import Place, places, why_no_cuda
from report import Report, Row

_REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    quick = "under a minute: fewer rounds, smaller networks, torch.compile for sampler_step in float32 alone"
    group.addoption("--quick", action="store_true", help=quick)
    group.addoption("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    group.addoption("--report", metavar="FOLDER", help="write the table there as report.json and report.png")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = Report()
    config.option.benchmark_quiet = True  # our table replaces pytest-benchmark's
    if config.getoption("--quick"):  # torch.compile takes 15 s to try out instruction sets
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_report_header() -> str:
    names = [f"{place.name} ({place.environment()['device']})" for place in places()]
    missing = f"; not on a GPU: {why_no_cuda()}" if why_no_cuda() else ""
    return f"benchmarks on {', '.join(names)}{missing}"


@pytest.fixture(autouse=True)
def threads(pytestconfig: pytest.Config) -> None:
    torch.set_num_threads(pytestconfig.getoption("--threads"))


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--quick")


@pytest.fixture(params=places(), ids=lambda place: place.name)
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


class Measure:
    """Times an implementation beside ours and adds a row to the table."""

    def __init__(self, benchmark: Any, place: Place, report: Report, quick: bool) -> None:
        self._benchmark, self._place, self._report = benchmark, place, report
        self._rounds, self._round_seconds, self._budget = (11, 0.003, 0.35) if quick else (50, 0.01, 10.0)

    def __call__(
        self,
        function: Callable[[], Any],
        group: str,
        name: str,
        *,
        ours: Callable[[], Any] | None = None,
        **facts: Any,
    ) -> None:
        """Times ``function``, the implementation ``name``, beside ``ours``.

        Args:
            facts: more about it for the table and pytest-benchmark's JSON; ``bytes`` makes a bandwidth.
        """
        calls, rounds = self._plan(function)
        our_calls, our_rounds = self._plan(ours) if ours else (0, rounds)
        rounds = max(5, min(rounds, our_rounds))
        our_times: list[float] = []
        count = itertools.count(1)

        def call_and_wait() -> None:
            function()
            if next(count) % calls == 0:
                self._place.synchronize()

        def beside() -> None:
            if ours:
                start = perf_counter()
                for _ in range(our_calls):
                    ours()
                self._place.synchronize()
                our_times.append((perf_counter() - start) / our_calls)

        benchmark = self._benchmark
        benchmark.group = f"{group}, {self._place.name}"
        facts |= self._place.environment() | self._peak(function) | {"implementation": name}
        benchmark.extra_info.update(facts)
        timed = call_and_wait if self._place.device.type == "cuda" else function
        benchmark.pedantic(timed, rounds=rounds, iterations=calls, warmup_rounds=1, teardown=beside)
        if not benchmark.stats:  # --benchmark-disable
            return
        times = benchmark.stats.stats.data
        our_times = our_times[1 : len(times) + 1] or times  # ours in timed rounds; the first warms up
        ratios = [theirs / our for theirs, our in zip(times, our_times, strict=True)]
        self._report.add(
            Row(
                place=self._place.name,
                group=group,
                implementation=name,
                median_us=statistics.median(times) * 1e6,
                least_us=min(times) * 1e6,
                ratio=statistics.median(ratios) if ours or name == OURS else None,
                least_ratio=min(times) / min(our_times) if ours or name == OURS else None,
                facts=facts,
            )
        )

    def skip(self, group: str, name: str, reason: str) -> NoReturn:
        """Adds a row that states why there is no time."""
        self._report.add(Row(self._place.name, group, name, skipped=reason))
        pytest.skip(reason)

    def _plan(self, function: Callable[[], Any]) -> tuple[int, int]:
        """The number of calls per round and of rounds that fit the budget; also warms up."""
        for _ in range(WARM_UP + 1 if self._place.graph else 1):  # the trainer captures its graph in the last
            function()
        seconds = self._seconds(function, 1)
        if seconds < self._round_seconds:
            seconds = self._seconds(function, 10)
        calls = max(1, round(self._round_seconds / seconds))
        return calls, min(self._rounds, int(self._budget / (calls * seconds)))

    def _peak(self, function: Callable[[], Any]) -> dict[str, int]:
        """Memory that a call allocates beyond what was allocated before; a graph keeps its memory."""
        if self._place.device.type != "cuda" or self._place.graph:
            return {}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        self._place.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before}

    def _seconds(self, function: Callable[[], Any], calls: int) -> float:
        self._place.synchronize()
        start = perf_counter()
        for _ in range(calls):
            function()
        self._place.synchronize()
        return (perf_counter() - start) / calls


@pytest.fixture
def measure(place: Place, benchmark: Any, pytestconfig: pytest.Config, quick: bool) -> Measure:
    return Measure(benchmark, place, pytestconfig.stash[_REPORT], quick)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[_REPORT]
    for line in report.lines():
        terminalreporter.write_line(line)
    folder = config.getoption("--report")
    if folder and report.rows:
        terminalreporter.write_line(report.save(Path(folder), [place.environment() for place in places()]))
