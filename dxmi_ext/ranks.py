"""The ranks of a distributed run: which rows are whose, what ranks tell each other.

The world comes from the environment that torchrun sets, never from the number of devices. Imports torch and
``dxmi_ext.errors``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dxmi_ext.errors import UserError

PATIENCE = timedelta(seconds=60)
"""How long a rank waits for another before it gives up with an error."""


class RankError(UserError, RuntimeError):
    """Another rank has died, or takes too long."""


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run; alone unless told otherwise."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """As torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; alone without it."""
        rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in
                                        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
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
        """The process group of all ranks: nccl on CUDA devices, gloo elsewhere.

        Raises:
            RankError: another rank has left, or does not answer within PATIENCE.
        """
        if self.alone:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=PATIENCE)
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):  # whose errors have no type
                reason = str(error).splitlines()[0]
                raise RankError(f"rank {self.rank} lost contact with the others: {reason}") from error
            raise
        finally:
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

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is called where it learns: its gradients become the mean over all ranks.

        Where a network is only read, call the module itself, frozen.
        """
        if self.alone:
            return module
        # Buffers are constants here; broadcasting them would be a message at every call.
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

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

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank. Waits for the device."""
        if self.alone:
            return flag
        found = torch.tensor(flag, dtype=torch.int32, device=_message_device())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def agree(self, value: Any) -> Any:
        """The first rank's value, which json can hold, on all; no rank goes on before the first has come."""
        if self.alone:
            return value
        text = json.dumps(value).encode()
        length = torch.tensor(len(text), device=_message_device())
        dist.broadcast(length, 0)
        letters = torch.zeros(int(length), dtype=torch.uint8, device=length.device)
        if self.first:
            letters.copy_(torch.tensor(list(text), dtype=torch.uint8))
        dist.broadcast(letters, 0)
        return json.loads(bytes(letters.tolist()))


def _message_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
