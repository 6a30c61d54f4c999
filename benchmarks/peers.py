"""The ops, their baselines and their correct results. Imports torch, ``dxmi_ext.ops`` and the float64
reference of ``python_tests``.

An op's implementations take its arguments in the order of the public function. *eager* is code as
commonly written; *lean eager* is optimized by hand: noise is reused, products and sums take one pass, and
tables are combined before they are gathered; *torch.compile* compiles eager.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reference
from dxmi_ext import ops

OURS = "dxmi_ext"
COMPILED = "torch.compile"
STEPS = 5
TAU, GAMMA, DECAY = 0.1, 1.0, 0.99

Shape = tuple[int, ...]
Make = Callable[[Shape, torch.dtype, torch.device], tuple[Any, ...]]


class Op(NamedTuple):
    make: Make
    """(shape, dtype, device) -> arguments."""
    leaves: tuple[int, ...]
    """Positions of the arguments that require gradients in training; empty: there is no backward pass."""
    implementations: dict[str, Callable[..., Any]]
    exact: Callable[..., Any]
    """(float64 arguments, results to check) -> the correct results, differentiable."""


# --- sampler_step and transition_log_prob --------------------------------------------------------------


def _make_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """As in training: gradients for the network's output and log sigma, rows at different steps."""
    ramp = torch.linspace(0, 1, STEPS, device=device)
    return (
        torch.randn(shape, dtype=dtype, device=device),
        torch.randn(shape, dtype=dtype, device=device).requires_grad_(),
        torch.arange(shape[0], device=device) % STEPS,
        1 + 0.2 * ramp,
        -0.5 + 0.2 * ramp,
        (-0.1 - ramp).requires_grad_(),
        ops.noise_key(0, device=device),
    )


def _column(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """A table's entry for each row, to broadcast over the data dimensions."""
    return table[t].view(-1, *[1] * (x.ndim - 1))


def _row_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def eager_sampler_step(
    x: Tensor, out: Tensor, t: Tensor, a: Tensor, b: Tensor, log_std: Tensor, key: Tensor
) -> tuple[Tensor, ...]:
    mean = _column(a, t, x) * x + _column(b, t, x) * out
    std = _column(log_std, t, x).exp()
    following = mean + std * torch.randn_like(x)
    log_prob = torch.distributions.Normal(mean, std).log_prob(following)
    return following.to(x.dtype), _row_mean(log_prob), _row_mean((following - x) ** 2)


def lean_sampler_step(
    x: Tensor, out: Tensor, t: Tensor, a: Tensor, b: Tensor, log_std: Tensor, key: Tensor
) -> tuple[Tensor, ...]:
    z = torch.randn_like(x)
    mean = torch.addcmul(_column(a, t, x) * x, _column(b, t, x), out)
    following = torch.addcmul(mean, _column(log_std, t, x).exp(), z)
    log_prob = -_row_mean(z * z).float() / 2 - log_std[t] - math.log(2 * math.pi) / 2
    return following.to(x.dtype), log_prob, _row_mean((following - x).square())


def exact_sampler_step(arguments: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Asserts that z, recovered from next_sample, is standard normal and consistent with other results."""
    x, out, t, a, b, log_std = (x.detach() for x in arguments[:6])
    mean = _column(a, t, x) * x + _column(b, t, x) * out
    z = (results[0].detach().double() - mean) / _column(log_std, t, x).exp()
    # On the CPU, torch 2.11 draws bfloat16 noise from few bits; its variance is .98.
    _assert_standard_normal(z, slack=0.03 if results[0].dtype == torch.bfloat16 else 0.0)
    return reference.sampler_step(*arguments[:6], z)


def _assert_standard_normal(z: Tensor, slack: float = 0.0) -> None:
    assert abs(z.mean()) < 5 / math.sqrt(z.numel()), f"mean of z: {z.mean()}"
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.numel()) + slack, f"variance of z: {z.var()}"


def _make_transition(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    x, *rest, _ = _make_step(shape, dtype, device)
    return torch.randn_like(x), x, *rest


def eager_log_prob(
    following: Tensor, x: Tensor, out: Tensor, t: Tensor, a: Tensor, b: Tensor, log_std: Tensor
) -> Tensor:
    mean = _column(a, t, x) * x + _column(b, t, x) * out
    return _row_mean(torch.distributions.Normal(mean, _column(log_std, t, x).exp()).log_prob(following))


def lean_log_prob(
    following: Tensor, x: Tensor, out: Tensor, t: Tensor, a: Tensor, b: Tensor, log_std: Tensor
) -> Tensor:
    error = torch.addcmul(
        torch.addcmul(following, _column(a, t, x), x, value=-1), _column(b, t, x), out, value=-1
    )
    precision = (-2 * log_std).exp()[t]
    return -precision * _row_mean(error.square()) / 2 - log_std[t] - math.log(2 * math.pi) / 2


# --- noise ---------------------------------------------------------------------------------------------


def _make_noise(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return torch.empty(shape, dtype=dtype, device=device), ops.noise_key(0, device=device)


def our_normal(like: Tensor, key: Tensor) -> Tensor:
    return ops.normal(like.shape, key, timestep=0, dtype=like.dtype)


def eager_normal(like: Tensor, key: Tensor) -> Tensor:
    return torch.randn_like(like)


def exact_normal(arguments: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> Tensor:
    _assert_standard_normal(results[0].double())
    return results[0].double()


# --- rows: costs and losses ----------------------------------------------------------------------------


def _make_cost(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    t = torch.arange(shape[0], device=device) % STEPS
    sq = torch.rand(shape, dtype=dtype, device=device).requires_grad_()
    log_std = -torch.rand(STEPS, dtype=dtype, device=device)
    velocity_var = torch.rand(STEPS, dtype=dtype, device=device) + 0.5
    return sq, t, log_std.requires_grad_(), velocity_var, TAU, TAU


def eager_cost(
    sq: Tensor, t: Tensor, log_std: Tensor, var: Tensor, tau_entropy: float, tau_velocity: float
) -> Tensor:
    return tau_velocity * sq / (2 * var[t]) - tau_entropy * log_std[t]


def lean_cost(
    sq: Tensor, t: Tensor, log_std: Tensor, var: Tensor, tau_entropy: float, tau_velocity: float
) -> Tensor:
    return torch.addcmul((-tau_entropy * log_std)[t], (tau_velocity / 2 / var)[t], sq)


def _make_target(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    sq, t, log_std, var, *taus = _make_cost(shape, dtype, device)
    time_cost = torch.full_like(var, 0.05)
    return torch.randn_like(sq), sq.detach(), t, log_std.detach(), var, time_cost, *taus


def eager_target(
    value: Tensor, sq: Tensor, t: Tensor, log_std: Tensor, var: Tensor, time_cost: Tensor, *taus: float
) -> Tensor:
    return value + eager_cost(sq, t, log_std, var, *taus) + time_cost[t]


def lean_target(
    value: Tensor,
    sq: Tensor,
    t: Tensor,
    log_std: Tensor,
    var: Tensor,
    time_cost: Tensor,
    tau_entropy: float,
    tau_velocity: float,
) -> Tensor:
    constant = torch.sub(time_cost, log_std, alpha=tau_entropy)[t]
    return torch.addcmul(constant, (tau_velocity / 2 / var)[t], sq).add_(value)


def _make_energies(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    data, sample = torch.randn((2, *shape), dtype=dtype, device=device)
    return data.requires_grad_(), sample.requires_grad_(), GAMMA


def eager_energy_loss(data: Tensor, sample: Tensor, gamma: float) -> Tensor:
    return data.mean() - sample.mean() + gamma * ((data**2).mean() + (sample**2).mean())


def lean_energy_loss(data: Tensor, sample: Tensor, gamma: float) -> Tensor:
    return (
        torch.addcmul(data, data, data, value=gamma).mean()
        - torch.addcmul(sample, sample, sample, value=-gamma).mean()
    )


def _make_velocity(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return (
        torch.rand(shape[0], dtype=dtype, device=device),
        torch.rand(shape, dtype=dtype, device=device),
        DECAY,
    )


def eager_velocity_(var: Tensor, sq: Tensor, decay: float) -> Tensor:
    return var.copy_(decay * var + (1 - decay) * sq.mean(1))


def lean_velocity_(var: Tensor, sq: Tensor, decay: float) -> Tensor:
    return var.lerp_(sq.mean(1), 1 - decay)


# --- all of them ---------------------------------------------------------------------------------------


def _op(
    make: Make,
    leaves: tuple[int, ...],
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    lean: Callable[..., Any] | None,
    exact: Callable[..., Any],
) -> Op:
    implementations = {OURS: ours, "eager": eager, "lean eager": lean, COMPILED: eager}
    return Op(make, leaves, {name: f for name, f in implementations.items() if f}, exact)


def _as(reference_op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda arguments, results: reference_op(*arguments)


OPS = {
    "sampler_step": _op(
        _make_step, (1, 5), ops.sampler_step, eager_sampler_step, lean_sampler_step, exact_sampler_step
    ),
    "transition_log_prob": _op(
        _make_transition,
        (2, 6),
        ops.transition_log_prob,
        eager_log_prob,
        lean_log_prob,
        _as(reference.transition_log_prob),
    ),
    "normal": _op(_make_noise, (), our_normal, eager_normal, None, exact_normal),
    "running_cost": _op(
        _make_cost, (0, 2), ops.running_cost, eager_cost, lean_cost, _as(reference.running_cost)
    ),
    "td_target": _op(_make_target, (), ops.td_target, eager_target, lean_target, _as(reference.td_target)),
    "energy_loss": _op(
        _make_energies,
        (0, 1),
        ops.energy_loss,
        eager_energy_loss,
        lean_energy_loss,
        _as(reference.energy_loss),
    ),
    "update_velocity_var_": _op(
        _make_velocity,
        (),
        ops.update_velocity_var_,
        eager_velocity_,
        lean_velocity_,
        _as(reference.update_velocity_var_),
    ),
}


class Problem:
    """An op's arguments, the same for every implementation.

    Args:
        op: the op.
        shape, dtype, device: shape, dtype and device of the samples, or of the rows.
        backward: whether to compute gradients too.
    """

    def __init__(
        self, op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, *, backward: bool
    ) -> None:
        torch.manual_seed(0)
        self.op, self.backward = op, backward
        self.arguments = op.make(shape, dtype, device)
        self.tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        self._leaves = [self.arguments[i] for i in op.leaves]
        with torch.no_grad():
            results = _tuple(op.implementations[OURS](*self.arguments))
        self._weights = tuple(torch.randn_like(r) for r in results)
        inputs, outputs = _bytes(self.arguments), _bytes(results)
        self.bytes = inputs + outputs
        """Bytes if every input is read once and every output written once, in each pass."""
        if backward:
            self.bytes += inputs + outputs + _bytes(self._leaves)

    def call(self, name: str) -> Callable[[], tuple[Tensor, ...]]:
        """A call of an implementation: () -> results, and gradients if requested."""
        function = self.op.implementations[name]
        if name == COMPILED:
            torch.compiler.reset()  # it falls back to eager after some compilations of one function
            function = torch.compile(function, fullgraph=True, dynamic=False)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():  # as in a rollout
                return _tuple(function(*self.arguments))

        def forward_and_backward() -> tuple[Tensor, ...]:
            results = _tuple(function(*self.arguments))
            return (*results, *torch.autograd.grad(results, self._leaves, self._weights))

        return forward_and_backward if self.backward else forward

    def check(self, call: Callable[[], tuple[Tensor, ...]]) -> None:
        """Asserts that a call's results are correct, by their error relative to float64."""
        exact = tuple(_double(x) for x in self.arguments)  # before the call, which may be in place
        actual = call()
        expected = _tuple(self.op.exact(exact, actual))
        if self.backward:
            leaves, weights = [exact[i] for i in self.op.leaves], [w.double() for w in self._weights]
            expected = (*expected, *torch.autograd.grad(expected, leaves, weights))
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            error = (a.detach().double() - e.detach()).norm() / e.detach().norm()
            assert error < self.tolerance, f"result {i}: relative error {error:.1e}, wants {self.tolerance}"

    def kept(self, call: Callable[[], Any]) -> float:
        """Memory saved for backward, in units of the largest argument."""
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call()
        return sum(sizes.values()) / max(_bytes([x]) for x in self.arguments)


def compile_failure(device: torch.device) -> str:
    """The reason why torch.compile does not work here, such as no C++ compiler; empty if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"{type(error).__name__} of torch.compile"
    return ""


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _bytes(arguments: Any) -> int:
    return sum(x.nbytes for x in arguments if isinstance(x, Tensor))


def _double(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(torch.float64, copy=True).requires_grad_(x.requires_grad)
