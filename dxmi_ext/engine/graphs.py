"""CUDA graphs of whole functions: one launch instead of hundreds. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture: what is made on first use, an optimizer's state for one, must be there."""


class Graphed:
    """A function of CUDA tensors that is captured on its fourth call and replayed from then on.

    The function may change tensors in place, but nothing that Python holds; its inputs keep their shapes. The
    outputs of a replay are overwritten by the next.

    Args:
        function: (tensors or None) -> anything made of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.forget()

    def forget(self) -> None:
        """Captures anew: tensors that the function uses have been replaced, which a graph does not see."""
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()
        self._inputs: tuple[Tensor | None, ...] = ()
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor | None) -> Any:
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._warm_up(*inputs)
        if self._calls == WARM_UP + 1:
            self._inputs = tuple(None if i is None else i.clone() for i in inputs)
            # Records, and runs nothing. Other threads, one that prefetches data, may go on meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._graph.replay()
        return self._outputs

    def _warm_up(self, *inputs: Tensor | None) -> Any:
        """On a side stream, where a capture runs too."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        return outputs
