"""Shapes of the ops' results, for torch.compile. Imports torch alone; ``_native`` registers the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.dxmi_ext


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an op's shape function, which first checks that no tensor is on another device."""

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        op = getattr(_ops, name).default
        arguments = [argument.name for argument in op._schema.arguments]

        def checked(*args: Any) -> Any:
            tensors = [(n, a) for n, a in zip(arguments, args, strict=True) if isinstance(a, Tensor)]
            lead, first = tensors[0]
            for argument, tensor in tensors:
                if tensor.device != first.device:
                    raise RuntimeError(
                        f"dxmi_ext.ops.{name.removesuffix('_fwd')}: {argument} must be on {first.device} "
                        f"like {lead}, got {tensor.device}"
                    )
            return shapes(*args)

        torch.library.register_fake(op, checked)
        return shapes

    return register


def _like(tensor: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(tensor) if wanted else tensor.new_empty(0)


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty(rows.shape[0])


@_fake("philox")
def _(counters: Tensor, key0: int, key1: int) -> Tensor:
    return torch.empty_like(counters)


@_fake("normal_")
def _(out: Tensor, key: Tensor, timestep: int, sample_offset: int) -> None:
    return None


@_fake("sampler_step_fwd")
def _(
    sample: Tensor, model_output: Tensor, timestep: Tensor, a: Tensor, b: Tensor, log_std: Tensor, *_: Any
) -> Any:
    return torch.empty_like(sample), _rows(log_std, sample), _rows(log_std, sample)


@_fake("sampler_step_bwd")
def _(*args: Any) -> Any:
    (sample, model_output), log_std, wanted = args[3:5], args[8], args[11:]
    return _like(sample, wanted[0]), _like(model_output, wanted[1]), _table(log_std, wanted[2])


@_fake("transition_log_prob_fwd")
def _(next_sample: Tensor, sample: Tensor, *args: Tensor) -> Tensor:
    return _rows(args[-1], sample)


@_fake("transition_log_prob_bwd")
def _(*args: Any) -> Any:
    samples, log_std, wanted = args[1:4], args[7], args[8:]
    return *(_like(s, w) for s, w in zip(samples, wanted[:3], strict=True)), _table(log_std, wanted[3])


@_fake("running_cost_fwd")
def _(sq_displacement: Tensor, *_: Any) -> Tensor:
    return _table(sq_displacement, True)


@_fake("running_cost_bwd")
def _(grad: Tensor, timestep: Tensor, log_std: Tensor, *args: Any) -> Any:
    return _table(grad, args[-2]), _table(log_std, args[-1])


@_fake("td_target")
def _(next_value: Tensor, sq_displacement: Tensor, *_: Any) -> Tensor:
    return _table(sq_displacement, True)


@_fake("energy_loss_fwd")
def _(energy_data: Tensor, energy_sample: Tensor, gamma: float) -> Tensor:
    return energy_data.new_empty(())


@_fake("energy_loss_bwd")
def _(grad: Tensor, energy_data: Tensor, energy_sample: Tensor, gamma: float) -> Any:
    return _table(energy_data, True), _table(energy_sample, True)


@_fake("update_velocity_var_")
def _(velocity_var: Tensor, sq_displacement: Tensor, decay: float) -> None:
    return None


def _table(tensor: Tensor, wanted: bool) -> Tensor:
    return tensor.new_empty(tensor.shape[0] if wanted else 0)
