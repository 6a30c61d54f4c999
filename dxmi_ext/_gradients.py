"""Gradients of the ops: a torch.autograd.Function for each, over its forward and backward op, which has about
half the overhead of torch.library.register_autograd. Imports torch alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_ops = torch.ops.dxmi_ext
_WRONG_TYPE = (
    r"dxmi_ext::.*Expected a value of type '(Tensor|float|int)' for argument '(\w+)' but instead found type "
    r"'(\w+)'"
)


def call(gradients: Gradients, *args: Any) -> Any:
    try:
        # Without grad mode, as in a rollout, apply's overhead would exceed the op's; but apply refuses
        # forward-mode derivatives, which do not depend on grad mode.
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return gradients.function.forward(*args)
        return _apply(gradients, args)
    except RuntimeError as error:
        refuse_type(gradients.op, error)
        if "implement the jvp function" in str(error):  # torch's advice to the author of the op
            raise NotImplementedError(
                f"dxmi_ext.ops.{gradients.op}: forward-mode derivatives are not supported"
            ) from None
        raise


def _apply(gradients: Gradients, args: tuple[Any, ...]) -> Any:
    gradients.refuse_others(args)
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # Dynamo would return a zero gradient
            raise NotImplementedError(
                f"dxmi_ext.ops.{gradients.op}: torch.func inside torch.compile is not supported"
            )
        # Dynamo miscalls an autograd.Function if nothing requires grad, and rejects it if a tensor is given
        # twice.
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return gradients.function.forward(*args)
        args = tuple(
            a.view_as(a) if isinstance(a, Tensor) and any(a is b for b in args[:i]) else a
            for i, a in enumerate(args)
        )
    return gradients.function.apply(*args)


def refuse_gradients(op: str, **constants: Any) -> None:
    """Rejects arguments that would silently get no gradient. With grad mode off, none is expected."""
    if torch.is_grad_enabled():
        for name, value in constants.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise _no_gradient(op, name)


def refuse_type(op: str, error: RuntimeError) -> None:
    """Raises a TypeError in our words if torch has refused an argument's type in those of the operator."""
    if found := re.search(_WRONG_TYPE, str(error)):
        wanted, name, got = found.groups()
        kind = {"Tensor": "a tensor", "float": "a number", "int": "an integer"}[wanted]
        got = {"NoneType": "None", "int": "one beyond 64 bits" if wanted == "int" else "int"}.get(got, got)
        raise TypeError(f"dxmi_ext.ops.{op}: {name} must be {kind}, got {got}") from None


def _no_gradient(op: str, argument: str) -> NotImplementedError:
    return NotImplementedError(
        f"dxmi_ext.ops.{op}: {argument} must not require grad, since it gets no gradient; pass it detached"
    )


class _Function(torch.autograd.Function):
    """Caches the signature of forward, which `apply` inspects on every call at half the cost of an op."""

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


class Gradients(NamedTuple):
    """A differentiable op and its differentiable inputs."""

    op: str
    function: type[torch.autograd.Function]
    inputs: tuple[str, ...]
    differentiable: tuple[int, ...]
    """Positions of the inputs that get a gradient; the backward op returns them in this order."""
    others: tuple[int, ...]
    """Positions of the other inputs."""

    @staticmethod
    def of(function: type[torch.autograd.Function], op: str, inputs: str, *differentiable: str) -> Gradients:
        names = tuple(inputs.split())
        others = tuple(i for i, name in enumerate(names) if name not in differentiable)
        return Gradients(op, function, names, tuple(map(names.index, differentiable)), others)

    def refuse_others(self, args: tuple[Any, ...]) -> None:
        for i in self.others:
            if isinstance(args[i], Tensor) and args[i].requires_grad:
                raise _no_gradient(self.op, self.inputs[i])

    def needed(self, ctx: Any) -> tuple[bool, ...]:
        """Which of the differentiable inputs require a gradient."""
        for i in self.others:  # again, since `requires_grad` refers to the innermost level of torch.func only
            if ctx.needs_input_grad[i]:
                raise _no_gradient(self.op, self.inputs[i])
        return tuple(ctx.needs_input_grad[i] for i in self.differentiable)

    def run(self, ctx: Any, op: Callable[..., Any], *args: Any) -> tuple[Tensor | None, ...]:
        """Runs a backward op and places its results at the positions of their inputs."""
        # Grad mode is off in a plain backward pass. torch.compile refuses double backward by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            results = _FirstOrderOnly.apply(op, self.op, *args)
        else:
            results = op(*args)
        placed: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, gradient in zip(self.differentiable, results, strict=True):
            placed[i] = gradient if ctx.needs_input_grad[i] else None
        return tuple(placed)


class _FirstOrderOnly(torch.autograd.Function):
    """Runs a backward op so that differentiating it again raises an error instead of giving zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Callable[..., Any], name: str, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(f"dxmi_ext.ops.{ctx.name}: second derivatives are not supported")


class _SamplerStep(_Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.sampler_step_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.sample_offset = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needed = STEP.needed(ctx)
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        return STEP.run(ctx, _ops.sampler_step_bwd, *grads, *ctx.saved_tensors, ctx.sample_offset, *needed)


STEP = Gradients.of(
    _SamplerStep,
    "sampler_step",
    "sample model_output timestep sample_coef output_coef log_std key sample_offset",
    "sample",
    "model_output",
    "log_std",
)


class _TransitionLogProb(_Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _ops.transition_log_prob_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = LOG_PROB.needed(ctx)
        return LOG_PROB.run(ctx, _ops.transition_log_prob_bwd, grad, *ctx.saved_tensors, *needed)


LOG_PROB = Gradients.of(
    _TransitionLogProb,
    "transition_log_prob",
    "next_sample sample model_output timestep sample_coef output_coef log_std",
    "next_sample",
    "sample",
    "model_output",
    "log_std",
)


class _RunningCost(_Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _ops.running_cost_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, *tensors, tau_entropy, tau_velocity, skip_last = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = (tau_entropy, tau_velocity, skip_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = COST.needed(ctx)
        return COST.run(ctx, _ops.running_cost_bwd, grad, *ctx.saved_tensors, *ctx.settings, *needed)


COST = Gradients.of(
    _RunningCost,
    "running_cost",
    "sq_displacement timestep log_std velocity_var tau_entropy tau_velocity skip_last",
    "sq_displacement",
    "log_std",
)


class _EnergyLoss(_Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _ops.energy_loss_fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        energy_data, energy_sample, ctx.gamma = inputs
        ctx.save_for_backward(energy_data, energy_sample)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ENERGY.needed(ctx)
        return ENERGY.run(ctx, _ops.energy_loss_bwd, grad, *ctx.saved_tensors, ctx.gamma)


ENERGY = Gradients.of(
    _EnergyLoss, "energy_loss", "energy_data energy_sample gamma", "energy_data", "energy_sample"
)
