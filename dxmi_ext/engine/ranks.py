"""The ranks of a distributed run: which rows are whose, what ranks tell each other.

The world comes from the environment that torchrun sets, never from the number of devices. Data travel by one
process group (nccl on CUDA devices, gloo elsewhere), what the processes tell each other by another, which is
gloo everywhere: it waits for no device, and notices at once that a rank has died. Imports torch,
``dxmi_ext.engine.errors`` and ``dxmi_ext.engine.sharding``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dxmi_ext.engine import sharding
from dxmi_ext.engine.errors import UserError

PATIENCE = timedelta(seconds=60)
"""How long a rank waits for the others' data before it gives up with an error."""
LONG_PATIENCE = timedelta(minutes=30)
"""How long it waits for their word: they may be writing files."""

M = TypeVar("M", bound=nn.Module)


class RankError(UserError, RuntimeError):
    """Another rank has died, or takes too long; or the environment tells of ranks that cannot be."""


@dataclass
class Ranks:
    """One process among those of a run; alone unless told otherwise.

    Args:
        rank, world_size, local_rank: as torchrun means them.
        shard: whether weights and what optimizers keep of them are split over the ranks; else each has all.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    shard: bool = False
    control: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_environment(cls) -> Ranks:
        """As torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; alone without it. An empty variable is none.

        Raises:
            RankError: they do not fit each other, or MASTER_ADDR or MASTER_PORT is missing beside them.
        """
        world_size = _number("WORLD_SIZE", 1, 1, 2**31)
        rank, local_rank = (_number(name, 0, 0, world_size) for name in ("RANK", "LOCAL_RANK"))
        if world_size == 1:
            return cls()
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise RankError(
                    f"{name} must be set where WORLD_SIZE is {world_size}, got none: unset WORLD_SIZE, or "
                    "start with torchrun"
                )
        _number("MASTER_PORT", 1, 1, 2**16)
        return cls(rank, world_size, local_rank)

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes the files."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """The process groups of all ranks.

        Raises:
            RankError: another rank has left, or does not answer in time.
        """
        if self.alone:
            yield
            return
        on_cuda = device.type == "cuda"
        if on_cuda and device.index is None:
            device = torch.device("cuda", self.local_rank)
        if on_cuda:
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                rank=self.rank,
                world_size=self.world_size,
                timeout=PATIENCE,
                device_id=device if on_cuda else None,
            )
            self.control = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
            yield
        except RuntimeError as error:
            # gloo's errors have no type of their own.
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                if on_cuda and dist.group.WORLD is not None:
                    dist.group.WORLD.abort()  # to leave would wait for the rank that is gone
                reason = str(error).splitlines()[0]
                raise RankError(f"rank {self.rank} lost contact with the others: {reason}") from error
            raise
        finally:
            self.control = None
            if dist.is_initialized():
                dist.destroy_process_group()

    def rows(self, batch_size: int) -> tuple[int, int]:
        """How many rows of a global batch are this rank's, and the first of them.

        Raises:
            ValueError: the ranks do not divide the batch.
        """
        if batch_size % self.world_size:
            raise ValueError(f"batch_size: got {batch_size}, which {self.world_size} ranks do not divide")
        count = batch_size // self.world_size
        return count, self.rank * count

    def shard_(self, network: nn.Module) -> None:
        """Splits a network's weights over the ranks, in place, if so wanted; before it has an optimizer."""
        if self.shard and not self.alone:
            sharding.shard_(network)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is called where it learns: its gradients become the mean over all ranks.

        Where a network is only read, call the module itself, frozen.
        """
        if self.alone:
            return module
        if not self.shard:
            # Buffers are constants here; broadcasting them would be a message at every call.
            return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        for p in module.parameters():
            if not sharding.is_sharded(p):
                dist.broadcast(p.detach(), 0)
                p.register_hook(self._mean_of)
        return module

    def _mean_of(self, grad: Tensor) -> Tensor:
        grad = grad / self.world_size
        dist.all_reduce(grad)
        return grad

    def whole(self, module: M) -> M:
        """The module, its weights gathered on the first rank if they are sharded: a copy, for that rank alone
        to use. All ranks call this."""
        if not any(map(sharding.is_sharded, module.parameters())):
            return module
        module = sharding.deepcopy(module)
        sharding.gather_(module, keep=self.first)
        return module

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over all ranks, of equal shares, in one message."""
        if self.alone:
            return values
        packed = torch.cat([value.detach().double().flatten() for value in values.values()])
        dist.all_reduce(packed)
        parts = (packed / self.world_size).split([value.numel() for value in values.values()])
        return {
            name: part.view(value.shape).to(value.dtype)
            for (name, value), part in zip(values.items(), parts, strict=True)
        }

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks [world_size * N, *], in their order; each rank gives as many."""
        if self.alone:
            return rows
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, which json can hold, on all; no rank goes on before all have come."""
        if self.alone:
            return [value]
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor(len(text)), group=self.control)
        longest = int(max(lengths))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))), group=self.control)
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def agree(self, value: Any) -> Any:
        """The first rank's value on all."""
        return self.exchange(value)[0]

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return any(self.exchange(flag))


def _number(name: str, default: int, minimum: int, below: int) -> int:
    """An environment variable of torchrun's."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,10}", text) or not minimum <= int(text) < below:
        limit = "WORLD_SIZE (1 where it is unset)" if name in ("RANK", "LOCAL_RANK") else below
        raise RankError(
            f"{name} must be a whole number >= {minimum} and below {limit}, got {text!r}: unset it, or start "
            "with torchrun"
        )
    return int(text)


class Votes:
    """Whether any rank wants something, asked in every iteration without waiting for the answer.

    All ranks ask in the same iterations, and hear the same: the answer to the question of the one before.
    Once it is yes it stays so.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._iteration, self._answer = ranks, -1, False
        self._wanted = torch.zeros((), dtype=torch.int32)
        self._pending: dist.Work | None = None

    def ask(self, iteration: int, flag: bool, *, wait: bool = False) -> bool:
        """The last answer; a question that waits, as it may where others write files, has its own."""
        if self._ranks.alone:
            return flag
        if wait or iteration != self._iteration:
            self._iteration = iteration
            self._settle()
            self._wanted.fill_(flag or self._answer)
            self._pending = dist.all_reduce(
                self._wanted, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True
            )
        if wait:
            self._settle()
        return self._answer

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending, self._answer = None, bool(self._wanted)
