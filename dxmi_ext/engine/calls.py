"""Calls of networks, which run in the precision that holds where they are made. Imports torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_AUTOCAST: ContextVar[torch.dtype | None] = ContextVar("autocast", default=None)


@contextmanager
def networks_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within, networks run under torch.autocast to dtype, or as their weights are if it is None; nothing else
    does, so backward passes and optimizers are free of it."""
    token = _AUTOCAST.set(dtype)
    try:
        yield
    finally:
        _AUTOCAST.reset(token)


def call(network: nn.Module, x: Tensor, *conditions: Tensor | None, latent: Tensor | None = None) -> Tensor:
    """A network's output, in x's dtype. Conditions, the timestep and labels, and a latent are passed on where
    there are any; every call of a network comes through here."""
    given = [condition for condition in conditions if condition is not None]
    dtype = _AUTOCAST.get()
    if dtype is None:
        return output_of(network, x, *given, latent=latent).to(x.dtype)
    with torch.autocast(x.device.type, dtype):
        return output_of(network, x, *given, latent=latent).to(x.dtype)


def output_of(network: nn.Module, *inputs: Tensor, latent: Tensor | None) -> Tensor:
    """The networks of diffusers return their output as the ``sample`` of an object."""
    output = network(*inputs) if latent is None else network(*inputs, latent=latent)
    return output if isinstance(output, Tensor) else output.sample
