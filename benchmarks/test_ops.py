"""Every op against eager torch, lean eager torch and torch.compile; each is proved right before it is timed.

    pytest benchmarks/ --benchmark-only [--quick] [--threads N] [--report FOLDER] [--benchmark-json FILE]

On the CPU, set MALLOC_MMAP_THRESHOLD_=268435456 and MALLOC_TRIM_THRESHOLD_=536870912 first. Without them
glibc gives every temporary of some MB back to the system and faults its pages in again; that costs eager
torch more than its arithmetic, and depends on what the process did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
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
Case = tuple[Place, str, Shape, torch.dtype, bool]


def cases() -> Iterator[Case]:
    """Place, op, shape, dtype, and whether gradients are wanted."""
    for place in places():
        for op in OPS:
            for shape in [ROWS[op]] if op in ROWS else SAMPLES[place.device.type]:
                yield place, op, shape, torch.float32, False
                if OPS[op].leaves:
                    yield place, op, shape, torch.float32, True
                if op == "sampler_step" and shape != (256, 2):
                    yield place, op, shape, torch.bfloat16, False
                    yield place, op, shape, torch.bfloat16, True


def title(op: str, shape: Shape, dtype: torch.dtype, backward: bool) -> str:
    kind = str(dtype).removeprefix("torch.")
    return f"{op} {'x'.join(map(str, shape))} {kind}{', forward + backward' if backward else ''}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """--quick compiles sampler_step in float32 alone: compiling takes longer than all the rest."""
    if "backward" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        metafunc.parametrize(
            ("place", "op", "shape", "dtype", "backward", "name"),
            [
                pytest.param(*case, name, id=f"{case[0].name}-{title(*case[1:])}-{name}")
                for case in cases()
                for name in OPS[case[1]].implementations
                if not (quick and name == COMPILED) or case[1::2][:2] == ("sampler_step", torch.float32)
            ],
        )


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


@pytest.mark.parametrize("place", places(), ids=lambda place: place.name)
@pytest.mark.parametrize("name", ["randn_like alone", "add alone"])
def test_parts_of_sampler_step(measure: Any, place: Place, name: str) -> None:
    """The honest roof of a CPU: drawing the noise by itself, and moving the samples by itself."""
    shape = SAMPLES[place.device.type][-1]
    problem = Problem(OPS["sampler_step"], shape, torch.float32, place.device, backward=False)
    x, out, *_ = (x.detach() for x in problem.arguments)
    part: Callable[[], Any] = {"randn_like alone": lambda: torch.randn_like(x), "add alone": lambda: x + out}[
        name
    ]
    group = title("sampler_step", shape, torch.float32, False)
    ours = place.prepare(problem.call(OURS))
    moved = {"randn_like alone": 1, "add alone": 3}[name] * x.nbytes
    measure(
        place.prepare(part), group, name, ours=ours, bytes=moved, shape=list(shape), dtype="torch.float32"
    )


@pytest.mark.parametrize("place", places()[:1], ids=["cpu"])
@pytest.mark.parametrize("name", [OURS, "1 thread", "eager", "lean eager"])
def test_two_threads(measure: Any, place: Place, name: str) -> None:
    """Two threads each, and ours on one thread against ours on two."""
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
