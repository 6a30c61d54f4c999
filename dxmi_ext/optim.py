"""Optimizer steps and learning rates over a run. Imports torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LearningRates:
    """Scales the optimizers' rates over a run; a function of the iteration, so it has no state.

    Args:
        optimizers: with the rates to start from.
        decay: constant, linear (to 0) or cosine (to 0).
        iterations: length of the run.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], decay: str, iterations: int) -> None:
        self._optimizers, self._decay, self._iterations = optimizers, decay, iterations
        self._initial = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def at(self, iteration: int) -> None:
        done = iteration / self._iterations
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        for optimizer, rates in zip(self._optimizers, self._initial, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor[self._decay]


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float = 0.0) -> None:
    """One optimizer step on a loss, its gradient norm clipped to ``clip`` unless that is 0."""
    optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), clip)
    optimizer.step()
