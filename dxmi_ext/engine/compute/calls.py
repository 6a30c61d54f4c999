"""Calls of networks under the current autocast setting. Imports torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_autocast: torch.dtype | None = None  # not a ContextVar, which torch.compile cannot trace


@contextmanager
def networks_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within, networks run under torch.autocast to dtype; if dtype is None, only under an autocast of the
    caller. Backward passes and optimizers are not affected."""
    global _autocast
    before, _autocast = _autocast, dtype
    try:
        yield
    finally:
        _autocast = before


def call(network: nn.Module, x: Tensor, *conditions: Tensor | None) -> Tensor:
    """A network's output, in x's dtype. Conditions (timestep, labels) are passed on unless None. Every call
    of a network goes through here.
    """
    given = [condition for condition in conditions if condition is not None]
    if _autocast is None:
        return output_of(network, x, *given).to(x.dtype)
    with torch.autocast(x.device.type, _autocast):
        return output_of(network, x, *given).to(x.dtype)


def output_of(network: nn.Module, *inputs: Tensor) -> Tensor:
    """The output tensor; networks of diffusers return an object that has it as ``sample``."""
    output = network(*inputs)
    if not isinstance(output, Tensor):
        output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"the output of a network must be a tensor, got {type(output).__name__}")
    return output
