"""Random draws keyed like the ops' noise: by (key, global row), never by a generator's state.

Imports torch and ``dxmi_ext.ops``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dxmi_ext import ops


def uniform(
    shape: Sequence[int], key: Tensor, *, timestep: int = ops.INITIAL_TIMESTEP, sample_offset: int = 0
) -> Tensor:
    """Uniforms in (0, 1), float64 [N, *]: the normal CDF of `ops.normal`'s values."""
    z = ops.normal(shape, key, timestep=timestep, sample_offset=sample_offset)
    return torch.special.ndtr(z.double())


def randint(
    high: int, n: int, key: Tensor, *, timestep: int = ops.INITIAL_TIMESTEP, sample_offset: int = 0
) -> Tensor:
    """Integers in 0..high - 1, int64 [n], one per row; high is at most 2**53."""
    if not isinstance(high, int) or not 1 <= high <= 2**53:
        raise ValueError(f"dxmi_ext.method.noise.randint: high must be an integer in 1..2**53, got {high}")
    u = uniform((n,), key, timestep=timestep, sample_offset=sample_offset)
    return (u * high).long()


class Draws:
    """Noise keys of one part of a run: every use within an iteration has its own draw.

    Keys are a function of (seed, stream, iteration), so resuming needs no state. They are made on the device,
    without a host sync.

    Args:
        seed: seed of the run.
        stream: name of the part; streams of the same seed are independent.
        uses: names of the uses within an iteration. Their order is part of the format of saved runs.
    """

    def __init__(
        self, seed: int, stream: str, uses: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
        first = ops.noise_key(int.from_bytes(digest, "little"), device=device)
        draws = torch.arange(len(uses), dtype=torch.int64, device=device)
        self._uses = tuple(uses)
        self._keys = torch.stack((first[0].expand_as(draws), draws), dim=1)
        self._stride = first.new_tensor([0, len(uses)])

    def at(self, iteration: int) -> dict[str, Tensor]:
        """The keys of an iteration by use, each int64 [2]. A draw has 32 bits, which limits iterations."""
        return self.named(self.keys(iteration))

    def keys(self, iteration: int) -> Tensor:
        """The same as one tensor, int64 [uses, 2], as input of a CUDA graph."""
        iterations = 2**32 // max(1, len(self._uses))
        if not 0 <= iteration < iterations:
            raise ValueError(
                f"dxmi_ext.method.noise.Draws: iteration must be in 0..{iterations - 1}, got {iteration}"
            )
        return torch.add(self._keys, self._stride, alpha=iteration)

    def named(self, keys: Tensor) -> dict[str, Tensor]:
        """The rows of `keys` by use."""
        return dict(zip(self._uses, keys.unbind(), strict=True))
