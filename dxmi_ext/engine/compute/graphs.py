"""CUDA graphs of whole functions: one launch instead of hundreds.

Imports torch and the engine's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dxmi_ext.engine.settings import ConfigError

WARM_UP = 3
"""Number of calls before the capture, which create lazy state such as an optimizer's."""


class Graphed:
    """A function of CUDA tensors that is captured on its fourth call and replayed from then on.

    The function may change tensors in place, but no Python state; its inputs keep their shapes. The outputs
    of a replay are overwritten by the next.

    Args:
        function: (tensors or None) -> a structure of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.forget()

    def forget(self) -> None:
        """Discards the graph, after tensors that it uses have been replaced."""
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()
        self._inputs: tuple[Tensor | None, ...] = ()
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Calls the function, or replays its graph.

        Raises:
            ConfigError: the inputs differ from those of the graph in their shapes, or in which are None.
        """
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._warm_up(*inputs)
        if self._calls == WARM_UP + 1:
            self._inputs = tuple(None if i is None else i.clone() for i in inputs)
            # Only records. Other threads, such as the prefetcher's, may run meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
        if (now := _shapes(inputs)) != (captured := _shapes(self._inputs)):  # a copy could broadcast
            raise ConfigError(f"inputs of a CUDA graph must keep their shapes, {captured}, got {now}")
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._graph.replay()
        return self._outputs

    def _warm_up(self, *inputs: Tensor | None) -> Any:
        """Runs the function on a side stream, as a capture does."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        return outputs


def _shapes(inputs: Sequence[Tensor | None]) -> list[list[int] | None]:
    return [None if i is None else [*i.shape] for i in inputs]
