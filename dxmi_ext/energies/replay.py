"""A memory of the ends of past paths. Imports torch and the method's noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dxmi_ext.method import noise


class Replay(nn.Module):
    """The latest ends of paths of all ranks, at most `size`; every rank holds all of them.

    Args:
        size: number of ends.
        dim: D.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.ends: Tensor
        self.count: Tensor
        self.register_buffer("ends", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def keep(self, ends: Tensor) -> None:
        """Stores ends [N, D] in place of the oldest."""
        ends = ends[-len(self.ends) :]
        places = (self.count + torch.arange(len(ends), device=ends.device)) % len(self.ends)
        self.ends.index_copy_(0, places, ends)
        self.count += len(ends)

    def draw(self, n: int, key: Tensor, *, sample_offset: int = 0) -> Tensor:
        """n of the stored ends, [n, D], with replacement."""
        stored = min(int(self.count), len(self.ends))
        return self.ends[noise.randint(stored, n, key, sample_offset=sample_offset)]
