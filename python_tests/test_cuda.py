"""Tests of the CUDA half alone. Also emulated on the CPU: unaligned accesses, NaN rows, launch errors. On a
GPU only: streams, graphs, syncs, huge tensors, several devices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import emulation
import reference
from cases import DIFFERENTIABLE, OPERATORS, PARAMETERS, SEED, T, arguments, call, recorded_calls, with_leaves
from dxmi_ext import ops
from dxmi_ext.method import schedules
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d.networks import SamplerMLP, ValueMLP
from groups import groups

DEVICES = ("emulated", "cuda")

CALLED = [op for op in PARAMETERS if op not in ("noise_key", "next_key")]
SAMPLES = ("next_sample", "sample", "model_output")


def results(op: str, args: dict[str, Any]) -> list[Tensor]:
    """The outputs, and the gradients of their sum."""
    args, leaves = with_leaves(args, DIFFERENTIABLE.get(op, ()))
    outputs = call(op, args)
    gradients = torch.autograd.grad([y.sum() for y in outputs], list(leaves.values())) if leaves else ()
    return [*(y.detach() for y in outputs), *gradients]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


# --- kernels, emulated too ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 2), (3, 64), (2, 4096), (2, 16384)])
@pytest.mark.parametrize("op", ["sampler_step", "transition_log_prob"])
def test_unaligned_tensors(op: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Dense rows without the alignment to 16 bytes that vector accesses require give the same bits."""
    args = arguments(op, shape, dtype, device)
    wanted = results(op, args)
    for name in SAMPLES:
        if name in args:
            shifted = torch.empty(math.prod(shape) + 1, dtype=dtype, device=device)[1:].view(shape)
            assert shifted.data_ptr() % 16
            found = results(op, args | {name: shifted.copy_(args[name])})
            assert_same(found, wanted)


@pytest.mark.parametrize("shape", [(3, 5), (3, 700), (3, 2000), (3, 9000)])
@pytest.mark.parametrize("timestep", [-1, T, 2**40])
@pytest.mark.parametrize("op", ["sampler_step", "transition_log_prob"])
def test_rows_of_bad_timesteps_are_nan(
    op: str, timestep: int, shape: tuple[int, int], device: torch.device
) -> None:
    """Values are not checked on the host, which would have to wait for the device; other rows are correct."""
    args = arguments(op, shape, device=device)
    clean = call(op, args)
    args["timestep"][1] = timestep
    for output, wanted in zip(call(op, args), clean, strict=True):
        assert output[1].isnan().all() and torch.equal(output[::2], wanted[::2])


@pytest.mark.parametrize("op", ["sampler_step", "transition_log_prob", "running_cost"])
def test_a_bad_timestep_makes_the_gradient_of_log_std_nan(op: str, device: torch.device) -> None:
    for timestep in (-1, T):
        args, leaves = with_leaves(arguments(op, device=device), ["log_std"])
        args["timestep"][1] = timestep
        (gradient,) = torch.autograd.grad([y.sum() for y in call(op, args)], leaves["log_std"])
        assert gradient.isnan().all()


@pytest.mark.parametrize("argument", ["timestep", "velocity_var"])
@pytest.mark.parametrize("op", ["running_cost", "td_target"])
def test_costs_of_bad_values_are_nan(op: str, argument: str, device: torch.device) -> None:
    args = arguments(op, (9,), device=device)
    if argument == "timestep":
        args["timestep"][4] = T
        bad = torch.arange(9, device=device) == 4
    else:
        args["velocity_var"][1] = 0
        bad = args["timestep"] == 1
    (cost,) = call(op, args)
    assert cost[bad].isnan().all() and cost[~bad].isfinite().all()


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_a_failed_launch_is_an_error_that_names_the_op(operator: str) -> None:
    emulation.load()
    _, args, kwargs = recorded_calls()[operator]
    torch.ops.dxmi_emulated.fail_next_launch()
    with pytest.raises(
        RuntimeError, match=rf"dxmi_ext\.ops\.{operator.removesuffix('_fwd').rstrip('_')}.*CUDA"
    ):
        getattr(torch.ops.dxmi_emulated, operator)(*args, **kwargs)


# --- devices -----------------------------------------------------------------------------------------


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """Calling it makes every synchronization with the device an error, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLED)
def test_ops_do_not_wait_for_the_device(op: str, no_sync: Callable[[], None]) -> None:
    args = arguments(op, (3, 20_000), device="cuda")
    no_sync()
    results(op, args)
    ops.next_key(ops.noise_key(3, device="cuda"))


def make_trainer(**settings: Any) -> DxMITrainer:
    torch.manual_seed(0)
    schedule = schedules.variance_exploding(T, sigma_max=2.0, sigma_min=0.4)
    sampler = GaussianSampler(SamplerMLP(2, T, width=8, depth=2), schedule, (2,))
    networks = Networks(sampler, ValueMLP(2, T, width=8, depth=2)).cuda()
    return DxMITrainer(networks, **groups(**settings), iterations=10, seed=0)


@pytest.mark.gpu
def test_training_in_a_graph_equals_training_without() -> None:
    """Weights, averages and metrics have the same bits; every replay has its own learning rates and noise."""
    trainers = [make_trainer(cuda_graph=graph) for graph in (False, True)]
    for iteration in range(8):
        data = ops.normal((16, 2), ops.noise_key(iteration, device="cuda"))
        plain, graphed = (trainer.step(data) for trainer in trainers)
        torch.testing.assert_close(graphed, plain, rtol=0, atol=0)
    states = [trainer.networks.state_dict() | trainer.averaged.state_dict() for trainer in trainers]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_captured_iteration_resumes_from_a_state_loaded_later() -> None:
    """As in a rollback: with other noise and rates, from before the first step and from the fourth."""
    trainers = [make_trainer(cuda_graph=graph) for graph in (False, True)]
    kept = [copy.deepcopy(trainers[0].state_dict())]
    for attempt in range(3):
        for trainer in trainers:
            trainer.load_state_dict(kept[-1])
            trainer.retry(attempt, 0.5**attempt)
        for iteration in range(trainers[0].iteration, 9):
            data = ops.normal((16, 2), ops.noise_key(iteration, device="cuda"))
            plain, graphed = (trainer.step(data) for trainer in trainers)
            torch.testing.assert_close(graphed, plain, rtol=0, atol=0)
            if attempt == 1 and iteration == 3:
                kept.append(copy.deepcopy(trainers[0].state_dict()))


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLED)
def test_ops_run_on_the_current_stream(op: str) -> None:
    """The inputs are written late on a side stream; an op on another stream would read the old values."""
    wanted = results(op, arguments(op, (3, 20_000), device="cuda"))
    args = arguments(op, (3, 20_000), device="cuda")
    late = {name: a.clone() for name, a in args.items() if isinstance(a, Tensor)}
    for name in late:
        args[name].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        for name, value in late.items():
            args[name].copy_(value)
        found = results(op, args)
    stream.synchronize()
    assert_same(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 2), (5, 3000), (3, 20_000)])
def test_graph_replays_draw_fresh_noise(shape: tuple[int, int]) -> None:
    """Forward and backward in a CUDA graph whose key advances on the device, as in a training loop."""
    args, leaves = with_leaves(
        arguments("sampler_step", shape, device="cuda"), DIFFERENTIABLE["sampler_step"]
    )
    key = args["key"]

    def iteration() -> list[Tensor]:
        outputs = ops.sampler_step(**args)
        gradients = torch.autograd.grad([y.sum() for y in outputs], list(leaves.values()))
        return [*(y.detach() for y in outputs), *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            iteration()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = iteration()
        key.copy_(ops.next_key(key))
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append([x.clone() for x in static])
    assert key.tolist() == [SEED, 3]
    key.copy_(ops.noise_key(SEED, device="cuda"))
    for found in replayed:
        assert_same(found, iteration())
        key.copy_(ops.next_key(key))
    assert not torch.equal(replayed[0][0], replayed[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLED)
def test_graph_replays_equal_the_op(op: str) -> None:
    args = arguments(op, (3, 20_000), device="cuda")
    if op == "update_velocity_var_":
        args["decay"] = 1.0  # keeps the input of each replay the same
    wanted = results(op, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(op, args)
    graph.replay()
    assert_same(found, wanted)


@pytest.fixture
def gigabytes() -> Callable[[int], None]:
    def need(count: int) -> None:
        if torch.cuda.mem_get_info()[0] < count * 2**30:
            pytest.skip(f"needs {count} GiB of free device memory")

    return need


@pytest.mark.gpu
def test_more_than_2_31_elements(gigabytes: Callable[[int], None]) -> None:
    """The last rows of a huge batch are those of a small one."""
    gigabytes(40)
    rows, dim = 2**16 + 3, 2**15
    small = arguments("sampler_step", (3, dim), torch.bfloat16, "cuda")
    large = arguments("sampler_step", (3, 1), torch.bfloat16, "cuda")
    for name in ("sample", "model_output"):
        large[name] = torch.zeros(rows, dim, dtype=torch.bfloat16, device="cuda")
        large[name][-3:] = small[name]
    large["timestep"] = torch.ones(rows, dtype=torch.int64, device="cuda")
    large["timestep"][-3:] = small["timestep"]
    small["sample_offset"] += rows - 3
    args, leaves = with_leaves(large, ["sample", "model_output"])
    outputs = ops.sampler_step(**args)
    gradients = torch.autograd.grad([y.sum() for y in outputs], list(leaves.values()))
    wanted = results("sampler_step", small)[:5]
    assert_same([x[-3:] for x in (*(y.detach() for y in outputs), *gradients)], wanted)


@pytest.mark.gpu
def test_a_row_of_more_than_2_31_elements(gigabytes: Callable[[int], None]) -> None:
    gigabytes(20)
    dim, tail = 2**31 + 10, 1024
    z = ops.normal((1, dim), ops.noise_key(SEED, device="cuda"), timestep=2, dtype=torch.float16)
    groups = np.arange((dim - tail) // 4, -(-dim // 4))
    counter = np.stack([groups, *(np.full_like(groups, c) for c in (0, 2, 0))], axis=-1)
    u = reference.uniforms(reference.philox4x32(counter, (SEED & 0xFFFFFFFF, SEED >> 32))).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0::2])), 2 * math.pi * u[:, 1::2]
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)
    wanted = torch.from_numpy(exact)[: dim - 4 * int(groups[0])]
    torch.testing.assert_close(z[0, 4 * int(groups[0]) :].cpu().double(), wanted, rtol=1e-3, atol=1e-3)
    assert abs(z.mean(dtype=torch.float32)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLED)
def test_ops_run_on_the_device_of_their_tensors(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    wanted = results(op, arguments(op, (3, 20_000), device="cuda:0"))
    found = results(op, arguments(op, (3, 20_000), device="cuda:1"))
    assert all(f.device.index == 1 for f in found) and torch.cuda.current_device() == 0
    assert_same([f.to("cuda:0") for f in found], wanted)
