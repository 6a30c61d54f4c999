"""Every op against eager torch, lean eager torch and torch.compile; each is verified before it is timed.

    pytest benchmarks/ --benchmark-only [--quick] [--threads N] [--report FOLDER] [--benchmark-json FILE]

On the CPU, set MALLOC_MMAP_THRESHOLD_=268435456 and MALLOC_TRIM_THRESHOLD_=536870912 first. Without them
glibc returns every temporary of some MB to the system and faults its pages in again, which costs eager torch
more than its arithmetic, and depends on the history of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from peers import COMPILED, OPS, OURS, Problem, Shape, compile_failure
from places import Place, places

SAMPLES: dict[str, list[Shape]] = {"cpu": [(256, 2), (128, 3, 32, 32)]}
SAMPLES["cuda"] = [*SAMPLES["cpu"], (128, 3, 64, 64), (64, 3, 256, 256), (256, 3, 256, 256)]
ROWS: dict[str, Shape] = {
    "running_cost": (128,),
    "td_target": (128,),
    "energy_loss": (128,),
    "update_velocity_var_": (10, 128),
}


def cases(quick: bool) -> Iterator[Any]:
    """Place, op, shape, dtype, whether with gradients, implementation."""
    for place, (op, entry) in product(places(), OPS.items()):
        for shape in [ROWS[op]] if op in ROWS else SAMPLES[place.device.type]:
            low = op == "sampler_step" and shape != (256, 2)
            for dtype in (torch.float32, torch.bfloat16) if low else (torch.float32,):
                for backward, name in product(
                    (False, True) if entry.leaves else (False,), entry.implementations
                ):
                    if quick and name == COMPILED and (op, dtype) != ("sampler_step", torch.float32):
                        continue  # compiling takes longer than everything else
                    group = title(op, shape, dtype, backward)
                    yield pytest.param(
                        place, op, shape, dtype, backward, name, id=f"{place.name}-{group}-{name}"
                    )


def title(op: str, shape: Shape, dtype: torch.dtype, backward: bool) -> str:
    kind = str(dtype).removeprefix("torch.")
    return f"{op} {'x'.join(map(str, shape))} {kind}{', forward + backward' if backward else ''}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backward" in metafunc.fixturenames:
        names = ("place", "op", "shape", "dtype", "backward", "name")
        metafunc.parametrize(names, list(cases(metafunc.config.getoption("--quick"))))


def test_op(
    measure: Any, place: Place, op: str, shape: Shape, dtype: torch.dtype, backward: bool, name: str
) -> None:
    group = title(op, shape, dtype, backward)
    if name == COMPILED and (failure := _compile_failure(place.device)):
        measure.skip(group, name, failure)
    problem = Problem(OPS[op], shape, dtype, place.device, backward=backward)
    plain = problem.call(name)
    plain()  # compiles
    facts = {"bytes": problem.bytes, "shape": list(shape), "dtype": str(dtype)}
    if backward:
        facts["kept"] = problem.kept(plain)
    try:
        call = place.prepare(plain)
        ours = place.prepare(problem.call(OURS)) if name != OURS else None
    except RuntimeError as error:
        measure.skip(group, name, f"cannot be captured: {str(error).splitlines()[0]}")
    problem.check(call)
    measure(call, group, name, ours=ours, **facts)


@pytest.mark.parametrize("name", ["randn_like alone", "add alone"])
def test_parts_of_sampler_step(measure: Any, place: Place, name: str) -> None:
    """The roof of a CPU: drawing the noise alone, and moving the samples alone."""
    shape = SAMPLES[place.device.type][-1]
    problem = Problem(OPS["sampler_step"], shape, torch.float32, place.device, backward=False)
    x, out = (x.detach() for x in problem.arguments[:2])
    noise = name == "randn_like alone"
    part: Callable[[], Tensor] = (lambda: torch.randn_like(x)) if noise else (lambda: x + out)
    group = title("sampler_step", shape, torch.float32, False)
    ours = place.prepare(problem.call(OURS))
    facts = {"bytes": (1 if noise else 3) * x.nbytes, "shape": list(shape), "dtype": "torch.float32"}
    measure(place.prepare(part), group, name, ours=ours, **facts)


@pytest.mark.parametrize("name", [OURS, "contiguous", "eager"])
def test_sampler_step_channels_last(measure: Any, place: Place, name: str) -> None:
    """Samples in channels_last; ours on contiguous ones, and eager torch."""
    shape = (128, 3, 64, 64)
    problems = [
        Problem(OPS["sampler_step"], shape, torch.float32, place.device, backward=False) for _ in range(2)
    ]
    last, contiguous = problems
    last.arguments = tuple(
        x.contiguous(memory_format=torch.channels_last) if i < 2 else x for i, x in enumerate(last.arguments)
    )
    ours = place.prepare(last.call(OURS))
    call = place.prepare(contiguous.call(OURS) if name == "contiguous" else last.call(name))
    last.check(call)
    group = f"{title('sampler_step', shape, torch.float32, False)}, channels_last"
    facts = {"bytes": last.bytes, "shape": list(shape), "dtype": "torch.float32"}
    measure(call, group, name, ours=None if name == OURS else ours, **facts)


@pytest.mark.parametrize("place", places()[:1], ids=["cpu"])
@pytest.mark.parametrize("name", [OURS, "1 thread", "eager", "lean eager"])
def test_two_threads(measure: Any, place: Place, name: str) -> None:
    """Two threads each, and ours on one thread against two."""
    shape = (128, 3, 32, 32)
    problem = Problem(OPS["sampler_step"], shape, torch.float32, place.device, backward=False)
    torch.set_num_threads(2)
    ours = problem.call(OURS)

    def on_one_thread() -> None:
        torch.set_num_threads(1)
        ours()
        torch.set_num_threads(2)

    call = on_one_thread if name == "1 thread" else problem.call(name)
    problem.check(ours if name == "1 thread" else problem.call(name))
    group = f"{title('sampler_step', shape, torch.float32, False)}, 2 threads"
    measure(call, group, name, ours=None if name == OURS else ours, shape=list(shape), dtype="torch.float32")


@cache
def _compile_failure(device: torch.device) -> str:
    return compile_failure(device)
