"""Trial calls of networks on the first batch: a network that does not fit is named in one error, before
anything is trained. Imports torch and the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext.engine.compute.calls import call
from dxmi_ext.engine.settings import ConfigError


def check(
    name: str,
    network: nn.Module,
    x: Tensor,
    time: Tensor | None,
    labels: Tensor | None,
    *,
    shape: Sequence[int],
    why: str = "",
) -> None:
    """Checks that a network takes a batch and returns what its loss requires.

    The call changes neither buffers of the network, which is in evaluation mode, nor the state of torch's
    generators.

    Args:
        name: name of the network in errors.
        x: [N, *].
        time: [N]: timesteps, one of which is the last, or another time; None: the network takes none.
        labels: [N], or None if the data have none.
        shape: shape of the output.
        why: what the timesteps mean, for errors.

    Raises:
        ConfigError: the call raises an error or changes ``x``, or the output is not a tensor of that shape
            that depends on the network's weights.
    """
    given = x.clone()
    with _without_traces(network, x.device), torch.enable_grad():
        try:
            output = call(network, given, time, labels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            takes = ", ".join(_inputs(x, time, labels))
            got = f"{type(error).__name__}{_where(network, x, time, labels)}: {error}"
            raise ConfigError(f"{name} must take ({takes}){why}, got {got}") from error
    if given._version:
        raise ConfigError(f"{name} must not change its input in place, got a call that changes x")
    if output.shape != torch.Size(shape):
        raise ConfigError(f"{name} must return shape {[*shape]}, got {[*output.shape]}")
    if not output.requires_grad and any(p.requires_grad for p in network.parameters()):
        raise ConfigError(f"{name} must return a function of its weights, got a tensor without a gradient")


def timesteps(last: int, n: int, device: torch.device) -> Tensor:
    """The first and the last timestep: int64 [n], 0 .. 0, last."""
    found = torch.zeros(n, dtype=torch.int64, device=device)
    found[-1] = last
    return found


def _inputs(x: Tensor, time: Tensor | None, labels: Tensor | None) -> Iterator[str]:
    for name, given in (("x", x), ("timestep", time), ("labels", labels)):
        if given is not None:
            yield f"{name} {str(given.dtype).removeprefix('torch.')} {[*given.shape]}"


def _where(network: nn.Module, x: Tensor, time: Tensor | None, labels: Tensor | None) -> str:
    """The first timestep at which a call fails, if there is one at which it does not."""
    if time is None or time.is_floating_point():
        return ""
    for t in range(int(time.max()) + 1):
        try:
            call(network, x.clone(), torch.full_like(time, t), labels)
        except Exception:
            return f" at timestep {t}" if t else ""
    return ""


@contextmanager
def _without_traces(network: nn.Module, device: torch.device) -> Iterator[None]:
    modes: dict[Any, bool] = {module: module.training for module in network.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
