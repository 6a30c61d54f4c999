"""A network that learns, and the average of networks over a run. Imports torch and the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dxmi_ext.engine import sharding
from dxmi_ext.engine.optim import Adam, LearningRates
from dxmi_ext.engine.ranks import Ranks

M = TypeVar("M", bound=nn.Module)


class Learner:
    """A network with what makes it learn: optimizer, learning rates, the mean of gradients over all ranks.

    Args:
        network: as it is called where it learns.
        lr: learning rate of weights without one of their own.
        decay: of the learning rates over the run, as of `LearningRates`.
        iterations: length of the run.
        ranks: among which the rows of a batch are split.
        weights: those that learn, or groups of them; None: the network's.
        clip: largest norm of the gradient; 0: any.
        wait, warmup: as of `LearningRates`.
        losses: names of the losses that it descends.

    Attributes:
        network: what to call for a loss to descend; where it is only read, call the bare network, frozen.
        optimizer: its `Adam`.
        rates: its `LearningRates`.
        failures: by loss, how many steps in a row moved nothing because they were not finite; scalars.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        decay: str,
        iterations: int,
        ranks: Ranks,
        *,
        weights: Iterable[Any] | None = None,
        clip: float = 0.0,
        wait: int = 0,
        warmup: int = 0,
        losses: Sequence[str] = ("network",),
    ) -> None:
        self.optimizer = Adam(network.parameters() if weights is None else weights, lr, clip)
        self.rates = LearningRates(self.optimizer, decay, iterations, wait=wait, warmup=warmup)
        self.network = ranks.wrap(network)
        device = next(network.parameters()).device
        self.failures = {name: torch.zeros((), device=device) for name in losses}

    def descend(self, name: str, loss: Tensor) -> Tensor:
        """One step on a loss, a scalar; returns it without its gradient."""
        self.optimizer.descend(loss, self.failures[name])
        return loss.detach()


class Average(Generic[M]):
    """The exponential moving average of a module's weights.

    Args:
        module: whose weights are averaged.
        decay: of the average.

    Attributes:
        module: a copy with the averaged weights, frozen and in evaluation mode.
    """

    def __init__(self, module: M, decay: float) -> None:
        # torch's AveragedModel would wait for the device.
        self.module = sharding.deepcopy(module).requires_grad_(False).eval()
        self._update = get_ema_multi_avg_fn(decay)
        self._weights = list(self.module.parameters()), list(module.parameters())

    def update(self) -> None:
        self._update(*map(sharding.local, self._weights), None)
