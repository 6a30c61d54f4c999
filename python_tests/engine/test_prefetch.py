"""Prefetched batches are the same, in order, and no thread is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dxmi_ext.engine.compute.prefetch import Prefetcher

CPU = torch.device("cpu")
ITERATIONS = 12


def data(iteration: int) -> Tensor:
    return torch.full((3, 2), float(iteration))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_batch_once_and_in_order(first: int, workers: int) -> None:
    """Even if later batches are ready first, and if a resumed run starts at a later iteration."""
    asked = []

    def batch(iteration: int) -> tuple[Tensor, Tensor]:
        asked.append(iteration)
        time.sleep(0.002 * (iteration % 3 == 0))
        return data(iteration), torch.tensor([iteration])

    with Prefetcher(batch, CPU, ITERATIONS, ahead=4, workers=workers) as batches:
        for iteration in range(first, ITERATIONS):
            samples, labels = batches(iteration)
            assert torch.equal(samples, data(iteration)) and labels.tolist() == [iteration]
    assert sorted(asked) == list(range(first, ITERATIONS))


def test_batches_are_made_while_one_is_used() -> None:
    made = threading.Semaphore(0)

    def batch(iteration: int) -> Tensor:
        made.release()
        return data(iteration)

    with Prefetcher(batch, CPU, ITERATIONS, ahead=2) as batches:
        assert torch.equal(batches(0), data(0))
        for _ in range(3):
            assert made.acquire(timeout=60)
        assert not made.acquire(timeout=0.05)  # no more are made


def test_a_jump_restarts() -> None:
    with Prefetcher(data, CPU, ITERATIONS) as batches:
        for iteration in (0, 1, 6, 7, 3, ITERATIONS - 1):
            assert torch.equal(batches(iteration), data(iteration))


def test_an_error_is_raised_when_its_batch_is_requested() -> None:
    def batch(iteration: int) -> Tensor:
        if iteration == 2:
            raise OSError("image 17 is torn")
        return data(iteration)

    with pytest.raises(OSError, match="image 17 is torn"), Prefetcher(batch, CPU, ITERATIONS) as batches:
        for iteration in range(ITERATIONS):
            assert torch.equal(batches(iteration), data(iteration))
    assert iteration == 2


def test_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        Prefetcher(data, CPU, ITERATIONS, workers=0)


@pytest.mark.gpu
def test_batches_on_the_device_are_whole_and_stay_so() -> None:
    """A slow stream reads each batch late, while later ones are copied; nothing waits for the device."""
    device, reads = torch.device("cuda"), []

    def batch(iteration: int) -> Tensor:
        return torch.full((1024, 1024), float(iteration))

    torch.cuda.set_sync_debug_mode("error")
    try:
        with Prefetcher(batch, device, ITERATIONS) as batches:
            for iteration in range(ITERATIONS):
                x = batches(iteration)
                torch.cuda._sleep(10_000_000)  # cycles: some milliseconds
                reads.append(torch.stack((x.min(), x.max())))
                del x
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(reads).tolist() == [[i, i] for i in range(ITERATIONS)]
