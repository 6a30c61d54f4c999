"""`ops.sampler_step` against eager torch and torch.compile, forward and backward; correctness comes first.

    pytest benchmarks/ --benchmark-only [--quick] [--threads N]

On the CPU, set MALLOC_MMAP_THRESHOLD_=268435456 and MALLOC_TRIM_THRESHOLD_=536870912 first. Without them
glibc gives every temporary of some MB back to the system and faults its pages in again; that costs eager
torch more than its arithmetic, and depends on what the process did before.

May import torch and ``dxmi_ext.ops``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dxmi_ext import ops

STEPS = 5
SHAPES = [(256, 2), (128, 3, 32, 32)]

Results = tuple[Tensor, Tensor, Tensor]
"""next_sample [N, *], log_prob [N], sq_displacement [N]: what a training step needs."""


class Problem(NamedTuple):
    sample: Tensor
    model_output: Tensor
    timestep: Tensor
    a: Tensor
    b: Tensor
    log_std: Tensor
    key: Tensor

    @staticmethod
    def make(shape: tuple[int, ...], device: torch.device) -> Problem:
        """As in training: gradients for the network's output and log sigma, rows at different steps."""
        torch.manual_seed(0)
        ramp = torch.linspace(0, 1, STEPS, device=device)
        return Problem(
            sample=torch.randn(shape, device=device),
            model_output=torch.randn(shape, device=device).requires_grad_(),
            timestep=torch.arange(shape[0], device=device) % STEPS,
            a=1 + 0.2 * ramp,
            b=-0.5 + 0.2 * ramp,
            log_std=(-0.1 - ramp).requires_grad_(),
            key=ops.noise_key(0, device=device),
        )


# --- implementations ---------------------------------------------------------------------------------


def ours(p: Problem) -> Results:
    return ops.sampler_step(p.sample, p.model_output, p.timestep, p.a, p.b, p.log_std, p.key)


def eager(p: Problem) -> Results:
    """As the field writes it."""
    a, b, std = _columns(p)
    mean = a * p.sample + b * p.model_output
    next_sample = mean + std * torch.randn_like(p.sample)
    log_prob = torch.distributions.Normal(mean, std).log_prob(next_sample)
    return next_sample, _row_mean(log_prob), _row_mean((next_sample - p.sample) ** 2)


def lean_eager(p: Problem) -> Results:
    """As written with care: z is kept, products are added in place of their sums."""
    a, b, std = _columns(p)
    z = torch.randn_like(p.sample)
    next_sample = torch.addcmul(torch.addcmul(a * p.sample, b, p.model_output), std, z)
    log_prob = -_row_mean(z * z) / 2 - p.log_std[p.timestep] - math.log(2 * math.pi) / 2
    return next_sample, log_prob, _row_mean((next_sample - p.sample).square())


def compiled(p: Problem) -> Results:
    return _compile_eager()(p)


IMPLEMENTATIONS: dict[str, Callable[[Problem], Results]] = {
    "dxmi_ext": ours,
    "eager": eager,
    "lean eager": lean_eager,
    "torch.compile": compiled,
}


@cache
def _compile_eager() -> Callable[[Problem], Results]:
    return torch.compile(eager, fullgraph=True, dynamic=False)


@cache
def _compile_failure(device: torch.device) -> str:
    """Why torch.compile does not work here, as without a C++ compiler; empty if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"torch.compile: {type(error).__name__}"
    return ""


def _columns(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients and sigma of each row, to broadcast over the data dimensions."""
    shape = (-1, *[1] * (p.sample.ndim - 1))
    return (
        p.a[p.timestep].view(shape),
        p.b[p.timestep].view(shape),
        p.log_std[p.timestep].exp().view(shape),
    )


def _row_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


# --- correctness -------------------------------------------------------------------------------------


def gradients(p: Problem, results: Results, weights: Results) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, (p.model_output, p.log_std), weights)


def assert_correct(p: Problem, implementation: Callable[[Problem], Results], weights: Results) -> None:
    """Its own z, found from its next_sample, is standard normal and explains all else, in float64."""
    results = implementation(p)
    a, b, std = (x.detach().double() for x in _columns(p))
    z = (results[0].detach().double() - a * p.sample.double() - b * p.model_output.detach().double()) / std
    assert abs(z.mean()) < 5 / math.sqrt(z.numel()) and abs(z.var() - 1) < 5 * math.sqrt(2 / z.numel())

    exact = Problem(*(x.detach().double() if x.is_floating_point() else x for x in p))
    exact.model_output.requires_grad_()
    exact.log_std.requires_grad_()
    a, b, std = _columns(exact)
    next_sample = a * exact.sample + b * exact.model_output + std * z
    log_prob = -_row_mean(z * z) / 2 - exact.log_std[p.timestep] - math.log(2 * math.pi) / 2
    expected = next_sample, log_prob, _row_mean((next_sample - exact.sample) ** 2)
    exact_weights = (weights[0].double(), weights[1].double(), weights[2].double())
    for actual, wanted in zip(
        (*results, *gradients(p, results, weights)),
        (*expected, *gradients(exact, expected, exact_weights)),
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)


# --- benchmarks --------------------------------------------------------------------------------------


CASES = [(direction, name) for direction in ("forward", "forward and backward") for name in IMPLEMENTATIONS]


@pytest.mark.parametrize(("direction", "name"), [*CASES, ("forward", "randn_like alone")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sampler_step(
    measure: Callable[..., None], device: torch.device, shape: tuple[int, ...], direction: str, name: str
) -> None:
    p = Problem.make(shape, device)
    group = f"sampler_step {list(shape)}, {direction},"
    if name == "randn_like alone":
        measure(lambda: torch.randn_like(p.sample), group, name)
        return
    if name == "torch.compile" and (failure := _compile_failure(device)):
        pytest.skip(failure)
    function = IMPLEMENTATIONS[name]
    weights = torch.randn_like(p.sample), torch.randn(shape[0]).to(device), torch.randn(shape[0]).to(device)
    assert_correct(p, function, weights)
    if direction == "forward":
        with torch.no_grad():  # as in a rollout
            measure(lambda: function(p), group, name)
    else:
        measure(lambda: gradients(p, function(p), weights), group, name)
