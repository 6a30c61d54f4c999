"""Weights sharded over the ranks (FSDP2): each rank holds consecutive rows of a sharded tensor, a DTensor.

Imports torch; DTensor and FSDP, whose import takes seconds, only if something is sharded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Stored(Protocol):
    """A tensor stored in files."""

    @property
    def shape(self) -> Sequence[int]: ...

    def read(self, first: int | None = None, count: int | None = None) -> Tensor:
        """Rows of the tensor, on the CPU; by default all."""
        ...


# Copies of the modules before sharding, with weights on the device "meta".
_structures: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def shard_(module: nn.Module) -> None:
    """Shards the weights of a network, in place, over all ranks, starting from the first rank's weights.

    Calling the network gathers them block by block, where blocks are the elements of its outermost
    ModuleLists. Each block must be called, and weights outside of blocks may only be used within the
    network's call. Scalars are replicated; a sharded network is left as it is.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if module in _structures:
        return
    weights = list(module.parameters())
    for p in weights:
        p.data = p.data.contiguous()  # required by FSDP
        dist.broadcast(p.data, 0)
    _structures[module] = copy.deepcopy(module, {id(p): nn.Parameter(p.data.to("meta")) for p in weights})
    # FSDP warns that outputs that are views must not be modified in place; none is here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(weights[0].device.type, (dist.get_world_size(),))
    scalars = {p for p in weights if p.ndim == 0}
    for part in (*_blocks(module), module):
        # Also reshard weights outside of blocks after a call, or they are stale after a forward pass alone.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")  # isinstance would import DTensor


def local(tensors: Iterable[Any]) -> list[Tensor]:
    """This rank's rows of sharded tensors, and other tensors unchanged; they share memory."""
    return [tensor.detach().to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def rows(sharded: Any) -> tuple[int, int]:
    """The first of this rank's rows and their number; split as by torch.chunk."""
    total, mesh = sharded.shape[0], sharded.device_mesh
    most = -(-total // mesh.size())
    first = min(most * mesh.get_local_rank(), total)
    return first, min(most, total - first)


def alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Whole and sharded tensors in separate lists: torch's foreach functions do not support a mixture."""
    kinds = [[t for t in tensors if is_sharded(t) == sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The total norm of tensors, the same on all ranks; whole tensors must be replicated."""
    sharded = [t for t in tensors if is_sharded(t)]
    whole = _norm([t for t in tensors if not is_sharded(t)])
    if not sharded:
        return whole
    mine = _norm(local(sharded))
    squared = mine.double().square()  # could overflow in float32
    dist.all_reduce(squared)
    return (squared + whole.to(squared).square()).sqrt().to(mine.dtype)


def _norm(tensors: list[Tensor]) -> Tensor:
    """`nn.utils.get_total_norm` of tensors on one device, without its checks."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))) if tensors else torch.zeros(())


def like(value: Tensor | Stored, target: Tensor) -> Tensor:
    """A whole or stored tensor, sharded like the target; for that, only this rank's rows are read.

    Raises:
        ValueError: the target is sharded and has another shape.
    """
    if not is_sharded(target):
        return value if isinstance(value, Tensor) else value.read()
    if is_sharded(value):
        return value  # type: ignore[return-value]
    from torch.distributed.tensor import DTensor

    assert isinstance(target, DTensor)
    if tuple(value.shape) != tuple(target.shape):
        raise ValueError(f"a tensor of the state must have shape {[*target.shape]}, got {[*value.shape]}")
    first, count = rows(target)
    mine = value[first : first + count] if isinstance(value, Tensor) else value.read(first, count)
    return DTensor.from_local(
        mine.to(target.device).contiguous(),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def load_(module: nn.Module, state: dict[str, Any]) -> None:
    """`module.load_state_dict` from whole or stored tensors into whole or sharded weights."""
    own = module.state_dict()
    module.load_state_dict({name: like(value, own.get(name, value)) for name, value in state.items()})


def deepcopy(module: M) -> M:
    """`copy.deepcopy` for sharded networks, too: copies hold shards, and can be called after `gather_`."""
    copies: dict[int, Any] = {}
    if any(map(is_sharded, module.parameters())):
        for p in module.parameters():
            copies[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    for part in module.modules():
        if (structure := _structures.get(part)) is not None:
            memo = {}
            for its, mine in zip(structure.parameters(), part.parameters(), strict=True):
                memo[id(its)] = copies[id(mine)]
            for buffer, now in zip(structure.buffers(), part.buffers(), strict=True):
                memo[id(buffer)] = now.clone()
            copies[id(part)] = copy.deepcopy(structure, memo)
    return copy.deepcopy(module, copies)


def gather_(module: nn.Module, *, keep: bool) -> None:
    """Gathers the sharded weights of a copy, one by one, on the ranks that keep them."""
    gathered: dict[int, nn.Parameter] = {}  # a weight may be shared
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if is_sharded(p) and id(p) not in gathered:
                whole = p.full_tensor()  # type: ignore[attr-defined]
                gathered[id(p)] = nn.Parameter(whole, requires_grad=p.requires_grad) if keep else p
            setattr(part, name, gathered.get(id(p), p))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if isinstance(module, nn.ModuleList) and not container:
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from _blocks(child)
