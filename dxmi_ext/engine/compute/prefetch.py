"""Prefetching of batches in the background, for data that are read and decoded on the CPU.

Imports torch alone. It has no use for data generated on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class Prefetcher:
    """``batch`` with prefetching for the next iterations; a context manager that is called like it::

        with Prefetcher(batch, device, cfg.iterations) as batches:
            run.phase("dxmi", trainer, cfg.iterations, batches)

    Batches and their order are unchanged, also if a run resumes at a later iteration. On CUDA they are
    copied from pinned memory on a separate stream, without blocking the host. An error in making a batch is
    raised by the call that requests it. Leaving the context ends the threads after their current batch.

    Args:
        batch: iteration -> data, or data and labels. A function of the iteration alone, called from other
            threads, whose results are not modified later.
        device: device of the returned batches.
        iterations: length of the run, after which nothing is prefetched.
        ahead: number of batches prefetched to the device besides the current one.
        workers: number of threads; more than one requires that ``batch`` is thread-safe.

    Raises:
        ValueError: ahead or workers is below 1.
    """

    def __init__(
        self,
        batch: Callable[[int], Tensor | tuple[Tensor, ...]],
        device: torch.device,
        iterations: int,
        *,
        ahead: int = 2,
        workers: int = 1,
    ) -> None:
        for name, value in (("ahead", ahead), ("workers", workers)):
            if value < 1:
                raise ValueError(
                    f"dxmi_ext.engine.compute.prefetch.Prefetcher: {name} must be >= 1, got {value}"
                )
        self._batch, self._device, self._iterations, self._ahead = batch, device, iterations, ahead
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._waiting: deque[tuple[int, Future[_Loaded]]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._waiting.clear()

    def __call__(self, iteration: int) -> Any:
        if self._waiting and self._waiting[0][0] != iteration:  # a jump: discard what was prefetched
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()
        first = self._waiting[-1][0] + 1 if self._waiting else iteration
        last = max(iteration, min(iteration + self._ahead, self._iterations - 1))
        for i in range(first, last + 1):
            self._waiting.append((i, self._threads.submit(self._load, i)))
        tensors, event = self._waiting.popleft()[1].result()
        if event is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(now)  # or its memory may be reused while it is still read
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def _load(self, iteration: int) -> _Loaded:
        """Runs in a thread."""
        if self._stream is None:
            return [x.to(self._device) for x in _parts(self._batch(iteration))], None
        with torch.cuda.stream(self._stream):
            tensors = []
            for x in _parts(self._batch(iteration)):
                host = x.pin_memory() if x.device.type == "cpu" else x
                tensors.append(host.to(self._device, non_blocking=True))
            return tensors, self._stream.record_event()


_Loaded = tuple[list[Tensor], "torch.cuda.Event | None"]


def _parts(batch: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (batch,) if isinstance(batch, Tensor) else batch
