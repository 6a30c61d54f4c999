"""The ranks of a distributed run: split of the rows, and communication.

The world size comes from the environment that torchrun sets, never from the number of devices. Data use one
process group (nccl on CUDA devices, gloo elsewhere), and control messages another one, always gloo, which
does not wait for a device and notices at once that a rank has died. Imports torch and the modules errors,
settings and sharding of the engine.
"""

from __future__ import annotations

import inspect
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

from dxmi_ext.engine.compute import sharding
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.settings import ConfigError

_NEW_NAME = "forward_sync_buffers"  # replaces broadcast_buffers, about which newer torch warns
_IS_NEW = _NEW_NAME in inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = _NEW_NAME if _IS_NEW else "broadcast_buffers"

PATIENCE = timedelta(seconds=60)
"""Timeout of data collectives, after which a rank fails."""
LONG_PATIENCE = timedelta(minutes=30)
"""Timeout of control messages, while others may be writing files."""

M = TypeVar("M", bound=nn.Module)


class RankError(UserError, RuntimeError):
    """Another rank died or timed out, or the environment describes impossible ranks."""


@dataclass
class Ranks:
    """This process among the ranks of a run; by default the only one.

    Args:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_rank: number of this process on its machine.
        shard: whether weights and optimizer states are sharded over the ranks; otherwise replicated.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    shard: bool = False
    control: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_environment(cls) -> Ranks:
        """The ranks of torchrun's RANK, WORLD_SIZE and LOCAL_RANK; a single one if these are unset or empty.

        Raises:
            RankError: they are inconsistent, or MASTER_ADDR or MASTER_PORT is missing.
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
        """Within, the process groups of all ranks exist.

        Raises:
            RankError: another rank has left, or does not respond in time, or a process group exists already.
        """
        if self.alone:
            yield
            return
        if dist.is_initialized():
            raise RankError("ranks must be joined before any process group exists, got one of the caller")
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
                    dist.group.WORLD.abort()  # a regular exit would wait for the lost rank
                reason = str(error).splitlines()[0]
                raise RankError(f"rank {self.rank} lost contact with the others: {reason}") from error
            raise
        finally:
            self.control = None
            if dist.is_initialized():
                dist.destroy_process_group()

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Number of this rank's rows of a global batch, and the first of them.

        Raises:
            ValueError: the batch size is not a multiple of the number of ranks.
        """
        if batch_size % self.world_size:
            raise ValueError(
                f"batch_size must be a multiple of the {self.world_size} ranks, got {batch_size}"
            )
        count = batch_size // self.world_size
        return count, self.rank * count

    @torch.no_grad()
    def equalize_(self, module: nn.Module) -> None:
        """Copies the first rank's weights and buffers to all ranks, in place; sharded ones are not copied."""
        if self.alone:
            return
        for tensor in module.state_dict(keep_vars=True).values():
            if not sharding.is_sharded(tensor):
                dist.broadcast(tensor.detach(), 0)

    def shard_(self, network: nn.Module) -> None:
        """Shards a network over the ranks, in place, if ``shard``; call it before creating an optimizer."""
        if self.shard and not self.alone:
            sharding.shard_(network)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module for training, whose gradients are averaged over all ranks.

        For inference, call the module itself, frozen. Buffers are not exchanged: they have to be constants,
        or to change alike on all ranks.

        Raises:
            ConfigError: the module has running statistics, which would be those of each rank's own rows.
        """
        if self.alone:
            return module
        for name, part in module.named_modules():
            if _has_own_statistics(part):
                kind = type(part).__name__
                raise ConfigError(
                    f"networks must have no {kind} with several ranks, whose statistics would differ, got "
                    f"one at {name or 'the top'!r}; see torch.nn.SyncBatchNorm.convert_sync_batchnorm"
                )
        if not self.shard:
            options: dict[str, Any] = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
            return DistributedDataParallel(module, **options)
        for p in module.parameters():
            if not sharding.is_sharded(p):
                dist.broadcast(p.detach(), 0)
                if p.requires_grad:
                    p.register_hook(self._mean_of)
        return module

    def _mean_of(self, grad: Tensor) -> Tensor:
        grad = grad / self.world_size
        dist.all_reduce(grad)
        return grad

    def whole(self, module: M) -> M:
        """The module; if sharded, a copy with weights gathered on the first rank, the only one that may use
        it. All ranks call this."""
        if not any(map(sharding.is_sharded, module.parameters())):
            return module
        module = sharding.deepcopy(module)
        sharding.gather_(module, keep=self.first)
        return module

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over all ranks, in one message."""
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
        """The rows of all ranks, [world_size * N, *]; N is the same on each."""
        if self.alone:
            return rows
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, serializable as json, on all ranks; also a barrier."""
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
        """The first rank's value, on all ranks."""
        return self.exchange(value)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.exchange(flag))


def _has_own_statistics(module: nn.Module) -> bool:
    kept = isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(module, nn.SyncBatchNorm)
    return kept and module.training and bool(module.track_running_stats)


def _number(name: str, default: int, minimum: int, below: int) -> int:
    """The value of an environment variable that torchrun sets, in minimum .. below - 1.

    Raises:
        RankError: it is not such an integer.
    """
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,10}", text) or not minimum <= int(text) < below:
        limit = "WORLD_SIZE (1 if unset)" if name in ("RANK", "LOCAL_RANK") else below
        raise RankError(
            f"{name} must be an integer >= {minimum} and < {limit}, got {text!r}: unset it, or start "
            "with torchrun"
        )
    return int(text)


class Votes:
    """Asynchronous votes of all ranks, one in every iteration: whether any rank has set its flag.

    All ranks vote in the same iterations and get the same answer, that of the vote before. Once true, it
    stays true.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._iteration, self._answer = ranks, -1, False
        self._wanted = torch.zeros((), dtype=torch.int32)
        self._pending: dist.Work | None = None

    def ask(self, iteration: int, flag: bool, *, wait: bool = False) -> bool:
        """The answer of the last vote; with ``wait``, of this vote, while others may be writing files."""
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
