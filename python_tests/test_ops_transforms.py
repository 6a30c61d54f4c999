"""Ops under gradcheck, opcheck, torch.compile and torch.func; second and forward-mode
derivatives are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    DIFFERENTIABLE,
    OPERATORS,
    PARAMETERS,
    TWICE,
    T,
    arguments,
    call,
    given_twice,
    recorded_calls,
    with_leaves,
)
from dxmi_ext import ops

ARGUMENTS = [(op, name) for op, names in DIFFERENTIABLE.items() for name in names]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield


def linear(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([y.float().mean() for y in outputs]).sum()


def square(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(y.float() ** 2).mean() for y in outputs]).sum()


def results(function: Callable[..., Any], args: dict[str, Any], op: str) -> list[Tensor]:
    """Outputs of `function(op, args)` and, where the op is differentiable, gradients of their squares."""
    args, leaves = with_leaves(args, DIFFERENTIABLE.get(op, ()))
    outputs = function(op, args)
    gradients = torch.autograd.grad(square(outputs), list(leaves.values())) if leaves else ()
    return [*outputs, *gradients]


def assert_same(actual: list[Tensor], wanted: list[Tensor]) -> None:
    for a, w in zip(actual, wanted, strict=True):
        assert a.stride() == w.stride() and torch.equal(a, w)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str, device: torch.device) -> None:
    args, leaves = with_leaves(arguments(op, (T, 5), torch.float64, device), DIFFERENTIABLE[op])

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return call(op, args | dict(zip(leaves, inputs, strict=True)))

    assert torch.autograd.gradcheck(function, list(leaves.values()))


def test_every_operator_is_recorded() -> None:
    assert set(recorded_calls()) == OPERATORS


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_opcheck(operator: str, device: torch.device) -> None:
    function, args, kwargs = recorded_calls(device)[operator]
    torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 5), (0, 3)])
@pytest.mark.parametrize("op", sorted(PARAMETERS.keys() - {"noise_key", "next_key", "energy_loss"}))
def test_meta_tensors_have_the_shapes_and_dtypes(op: str, shape: tuple[int, ...]) -> None:
    if op == "update_velocity_var_" and 0 in shape:
        pytest.skip("an empty mean is an error")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = arguments(op, shape, dtype)
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in args.items()}
        for actual, wanted in zip(call(op, meta), call(op, args), strict=True):
            assert actual.is_meta and actual.dtype == wanted.dtype
            assert actual.shape == wanted.shape and actual.stride() == wanted.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", [op for op in PARAMETERS if op != "noise_key"])
def test_compile(op: str, dynamic: bool, device: torch.device) -> None:
    """With fullgraph, forward and backward, and two batch sizes: the same bits as without compilation."""
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((5, 2, 3, 4), (7, 2, 3, 4)):
        assert_same(*(results(f, arguments(op, shape, device=device), op) for f in (compiled, call)))


@pytest.mark.parametrize("mode", ["gradients", "grad mode", "no grad mode"])
@pytest.mark.parametrize("op", TWICE)
def test_compile_one_tensor_as_any_two_arguments(op: str, mode: str, device: torch.device) -> None:
    """Every case in one graph; also if nothing requires grad, which Dynamo treats differently."""
    names = DIFFERENTIABLE.get(op, ()) if mode == "gradients" else ()
    cases = [with_leaves(args, names) for args in given_twice(op, device)]
    leaves = [leaf for _, named in cases for leaf in named.values()]

    def every_output() -> list[Tensor]:
        return [output for args, _ in cases for output in call(op, args)]

    found = []
    for function in (torch.compile(every_output, fullgraph=True, backend="aot_eager"), every_output):
        with torch.set_grad_enabled(mode != "no grad mode"):
            outputs = function()
        found.append([*outputs, *(torch.autograd.grad(square(tuple(outputs)), leaves) if leaves else ())])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)  # gradients may be added in another order


@torch._inductor.config.patch({"cpp.vec_isa_ok": False})  # otherwise it compiles probes of the CPU for 20 s
def test_inductor(device: torch.device) -> None:
    """A step, its cost and an energy loss in one graph of the default backend, forward and backward."""

    def loss(step: dict[str, Any], cost: dict[str, Any]) -> Tensor:
        output = ops.sampler_step(**step | {"key": ops.next_key(step["key"])})
        costs = ops.running_cost(**cost | {"sq_displacement": output.sq_displacement})
        value: Tensor = ops.energy_loss(costs + output.next_sample.flatten(1).mean(1), output.log_prob, 0.5)
        return value

    step = arguments("sampler_step", (5, 3, 4, 4), device=device)
    cost = arguments("running_cost", device=device)
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        args, leaves = with_leaves(step, DIFFERENTIABLE["sampler_step"])
        value = function(args, cost)
        found.append([value.detach(), *torch.autograd.grad(value, list(leaves.values()))])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_func_grad_equals_autograd(op: str, device: torch.device) -> None:
    args = arguments(op, device=device)
    leaves = {name: args[name] for name in DIFFERENTIABLE[op]}
    gradients = torch.func.grad(lambda leaves: square(call(op, args | leaves)))(leaves)
    wanted = results(call, args, op)[-len(gradients) :]
    assert all(torch.equal(g, w) for g, w in zip(gradients.values(), wanted, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_vmap_equals_a_loop(op: str, name: str, device: torch.device) -> None:
    args = arguments(op, device=device)

    def outputs_and_gradient(value: Tensor) -> tuple[Tensor, ...]:
        gradient = torch.func.grad(lambda x: square(call(op, args | {name: x})))(value)
        return (*call(op, args | {name: value}), gradient)

    values = torch.stack([args[name], 2 * args[name]])
    looped = [torch.stack(each) for each in zip(*map(outputs_and_gradient, values), strict=True)]
    torch.testing.assert_close([*torch.func.vmap(outputs_and_gradient)(values)], looped)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_jacrev_equals_autograd(op: str, name: str, device: torch.device) -> None:
    args = arguments(op, (T, 3), device=device)

    def outputs(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(op, args | {name: value}))

    found = torch.func.jacrev(outputs)(args[name])
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(outputs, args[name]))


def test_compiled_func_grad_is_right_or_rejected() -> None:
    """Under torch.func, Dynamo traces into an autograd.Function and could return a gradient of zero."""
    args = arguments("energy_loss")
    gradient = torch.func.grad(lambda x: ops.energy_loss(x, args["energy_sample"], args["gamma"]))
    try:
        compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(args["energy_data"])
    except Exception:
        return
    assert torch.equal(compiled, gradient(args["energy_data"]))


def assert_refused(second: Callable[[], Tensor], may_be_zero: bool) -> None:
    """`second` raises the error of second derivatives, or returns zero where that is correct."""
    try:
        value = second()
    except (RuntimeError, NotImplementedError) as error:
        assert "second derivative" in str(error)
    else:
        assert may_be_zero and not value.any()


@pytest.mark.parametrize("loss", [linear, square])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_second_derivatives_are_rejected(
    op: str, name: str, loss: Callable[[tuple[Tensor, ...]], Tensor], device: torch.device
) -> None:
    args, leaves = with_leaves(arguments(op, device=device), [name])
    (wanted,) = torch.autograd.grad(loss(call(op, args)), leaves[name])
    (first,) = torch.autograd.grad(loss(call(op, args)), leaves[name], create_graph=True)
    assert torch.equal(first, wanted)  # create_graph does not change the first derivative

    def penalized() -> Tensor:
        (first.sum() + leaves[name].sum()).backward()
        gradient = leaves[name].grad
        assert gradient is not None
        return gradient - 1

    assert_refused(penalized, may_be_zero=op == "running_cost" and loss is linear)


@pytest.mark.parametrize("loss", [linear, square])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_second_derivatives_are_rejected_by_func(
    op: str, name: str, loss: Callable[[tuple[Tensor, ...]], Tensor], device: torch.device
) -> None:
    args = arguments(op, device=device)
    first = torch.func.grad(lambda x: loss(call(op, args | {name: x})))
    second = torch.func.grad(lambda x: first(x).sum())
    assert_refused(lambda: second(args[name]), may_be_zero=op == "running_cost" and loss is linear)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_derivatives_are_rejected(op: str, grad: bool, device: torch.device) -> None:
    """Even without grad mode, where they would be lost silently."""
    args = arguments(op, device=device)
    name = DIFFERENTIABLE[op][0]
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=f"ops.{op}: forward-mode"):
        torch.func.jvp(lambda x: call(op, args | {name: x}), (args[name],), (args[name],))
