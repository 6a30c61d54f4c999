"""Example calls of every public op: arguments, layouts, expected values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import reference
from dxmi_ext import ops

T = 4  # generation steps
SEED = 2**40 + 3

# The contract's parameters, in order; those after "*" are keyword-only.
PARAMETERS = {
    "noise_key": "seed * generator device",
    "next_key": "key",
    "normal": "shape key * timestep sample_offset dtype",
    "sampler_step": "sample model_output timestep sample_coef output_coef log_std key * sample_offset",
    "transition_log_prob": "next_sample sample model_output timestep sample_coef output_coef log_std",
    "running_cost": "sq_displacement timestep log_std velocity_var tau_entropy tau_velocity * skip_last",
    "td_target": "next_value sq_displacement timestep log_std velocity_var time_cost tau_entropy tau_velocity"
    " * skip_last",
    "energy_loss": "energy_data energy_sample gamma",
    "update_velocity_var_": "velocity_var sq_displacement decay",
}
DIFFERENTIABLE = {
    "sampler_step": ("sample", "model_output", "log_std"),
    "transition_log_prob": ("next_sample", "sample", "model_output", "log_std"),
    "running_cost": ("sq_displacement", "log_std"),
    "energy_loss": ("energy_data", "energy_sample"),
}
# Arguments that get no gradient and so must not require one. td_target and update_velocity_var_ have no
# gradients at all; to them, results of networks are constants.
CONSTANT = {
    "normal": ("timestep", "sample_offset"),
    "sampler_step": ("sample_coef", "output_coef", "sample_offset"),
    "transition_log_prob": ("sample_coef", "output_coef"),
    "running_cost": ("velocity_var", "tau_entropy", "tau_velocity", "skip_last"),
    "td_target": ("velocity_var", "time_cost", "tau_entropy", "tau_velocity", "skip_last"),
    "energy_loss": ("gamma",),
    "update_velocity_var_": ("velocity_var", "decay"),
}
# Operators behind them, as torch.ops.dxmi_ext names them.
OPERATORS = {
    *("sampler_step_fwd", "sampler_step_bwd", "transition_log_prob_fwd", "transition_log_prob_bwd"),
    *("running_cost_fwd", "running_cost_bwd", "energy_loss_fwd", "energy_loss_bwd"),
    *("td_target", "update_velocity_var_", "normal_"),
}
# Ops with arguments that may be the same tensor.
TWICE = ("sampler_step", "transition_log_prob", "running_cost", "td_target", "energy_loss")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "expanded_rows": lambda x: x[:1].expand_as(x),
    "expanded_data": lambda x: x[..., :1].expand_as(x),
}


def arguments(
    op: str,
    shape: Sequence[int] = (5, 6),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Valid arguments of `op`, by name: samples of this shape and dtype, and matching others."""
    rows, steps = shape[0], torch.linspace(0, 1, T, dtype=torch.float64)
    row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    values: dict[str, Any] = {
        "sample": randn(*shape).to(device, dtype),
        "model_output": randn(*shape).to(device, dtype),
        "next_sample": randn(*shape).to(device, dtype),
        "timestep": ((3 * torch.arange(rows) + 1) % T).to(device),
        "sample_coef": (0.7 + 0.5 * steps).to(device, row_dtype),
        "output_coef": (-0.5 + 1.4 * steps).to(device, row_dtype),
        "log_std": (0.3 - 1.5 * steps).to(device, row_dtype),
        "velocity_var": (0.2 + 1.3 * steps).to(device, row_dtype),
        "time_cost": (-0.1 + 0.4 * steps).to(device, row_dtype),
        "next_value": randn(rows).to(device, dtype),
        "sq_displacement": (randn(rows) ** 2).to(device, row_dtype),
        "energy_data": randn(rows).to(device, dtype),
        "energy_sample": randn(rows + 2).to(device, dtype),
        "key": ops.noise_key(SEED, device=device),
        "sample_offset": 7,
        "tau_entropy": 0.3,
        "tau_velocity": 0.8,
        "skip_last": 1,
        "gamma": 0.6,
        "decay": 0.9,
    }
    if op == "update_velocity_var_":
        values["sq_displacement"] = (randn(T, rows) ** 2).to(device, row_dtype)
    if op == "normal":
        values |= {"shape": tuple(shape), "timestep": 2, "dtype": dtype}
    return {name: values[name] for name in PARAMETERS[op].split() if name in values}


def given_twice(op: str, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """Valid arguments that share a tensor: every pair that may be the same, and all of them together."""
    args = arguments(op, (T,), device=device)  # samples, rows and tables then have the same shape
    floats = [name for name, a in args.items() if isinstance(a, Tensor) and a.is_floating_point()]
    cases = [
        args | dict.fromkeys(names, torch.linspace(0.2, 1.5, T, device=device))
        for names in (*itertools.combinations(floats, 2), floats)
    ]
    if op == "sampler_step":
        key = ops.noise_key(1, device=device)
        cases.append(arguments(op, (2,), device=device) | {"timestep": key, "key": key})
    return cases


def call(op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """Outputs of the public function, as a tuple even if there is only one."""
    outputs = getattr(ops, op)(**args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def expected(op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """Float64 outputs of the reference, on the values of `args` (widened, graphs kept)."""
    args = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    if op == "sampler_step":
        key, offset = args.pop("key"), args.pop("sample_offset", 0)
        args["z"] = drawn_noise(args["sample"].shape, args["timestep"], key, offset)
    outputs = getattr(reference, op)(**args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def drawn_noise(shape: Sequence[int], timestep: Tensor, key: Tensor, sample_offset: int) -> Tensor:
    """The ops' own z at each row's timestep, float64 [N, *]; test_noise.py compares it with the reference."""
    z = torch.zeros(tuple(shape), dtype=torch.float64, device=key.device)
    for t in set(timestep.tolist()):
        drawn = ops.normal(shape, key, timestep=t, sample_offset=sample_offset).double()
        z[timestep == t] = drawn[timestep == t]
    return z


def with_leaves(
    args: dict[str, Any], names: Iterable[str], dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`args` with the named tensors replaced by leaves (of `dtype`) that require a gradient, and those.

    A tensor given under several names becomes one leaf, listed under the first of them.
    """
    leaves: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for name in names:
        if id(args[name]) not in leaves:
            named[name] = args[name].detach().to(dtype or args[name].dtype).requires_grad_()
            leaves[id(args[name])] = named[name]
    return args | {name: leaves[id(args[name])] for name in names}, named


class Recorder(TorchDispatchMode):
    """Records every call of a dxmi_ext operator made within, as (overload, args, kwargs)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "dxmi_ext":
            self.calls.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs)))
        return func(*args, **kwargs)


def recorded_calls(
    device: torch.device | str = "cpu",
) -> dict[str, tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]]:
    """A valid call of every operator behind the public functions, including backward operators, by name."""
    with Recorder() as recorder:
        for op in PARAMETERS:
            if op not in ("noise_key", "next_key"):
                args, leaves = with_leaves(arguments(op, device=device), DIFFERENTIABLE.get(op, ()))
                outputs = call(op, args)
                if leaves:
                    torch.autograd.grad([y.sum() for y in outputs], list(leaves.values()))
    return {recorded[0].name().removeprefix("dxmi_ext::"): recorded for recorded in recorder.calls}
