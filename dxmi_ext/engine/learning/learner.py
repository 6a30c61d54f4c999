"""A network with its optimizer, and the moving average of networks. Imports torch and the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dxmi_ext.engine.compute import sharding
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.optim import Adam, LearningRates
from dxmi_ext.engine.settings import ConfigError

M = TypeVar("M", bound=nn.Module)


class Learner:
    """A network in training: optimizer, learning rates, and gradients averaged over all ranks.

    Args:
        network: network to train.
        lr: learning rate of parameter groups without their own.
        decay: decay of the learning rates over the run; see `LearningRates`.
        iterations: length of the run.
        ranks: ranks that share the rows of a batch.
        weights: parameters to train, or groups of them; None: all of the network's.
        clip: maximum gradient norm; 0: no clipping.
        betas: see `Adam`.
        wait, warmup: see `LearningRates`.
        losses: names of the losses that it minimizes.

    Attributes:
        network: wrapped network to call for a loss; for inference call the bare network, frozen.
        optimizer: the `Adam` optimizer.
        rates: the `LearningRates`.
        failures: number of consecutive steps skipped because they were not finite, a scalar for each loss.
        tallies: numbers of skipped steps and of all steps so far, float64 [2] for each loss.

    Raises:
        ConfigError: the network has extra state that is not a tensor, which a checkpoint could not hold.
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
        betas: tuple[float, float] = (0.9, 0.999),
        wait: int = 0,
        warmup: int = 0,
        losses: Sequence[str] = ("network",),
    ) -> None:
        if odd := [name for name, value in network.state_dict().items() if not isinstance(value, Tensor)]:
            raise ConfigError(f"networks must have no state but tensors, got {odd[0]}")
        self.optimizer = Adam(network.parameters() if weights is None else weights, lr, clip, betas=betas)
        self.rates = LearningRates(self.optimizer, decay, iterations, wait=wait, warmup=warmup)
        self.network = ranks.wrap(network)
        device = next(network.parameters()).device
        self.failures = {name: torch.zeros((), dtype=torch.float32, device=device) for name in losses}
        self.tallies = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in losses}
        self._counts = {name: tally.unbind() for name, tally in self.tallies.items()}  # views

    def descend(self, name: str, loss: Tensor) -> Tensor:
        """One step on a scalar loss; returns it detached."""
        self.optimizer.descend(loss, self.failures[name])
        skipped, steps = self._counts[name]
        skipped.add_(self.optimizer.found_inf)
        steps.add_(1)
        return loss.detach()


class Average(Generic[M]):
    """The exponential moving average of a module's weights, with its current persistent buffers. Other
    buffers are constants, or tables that each module extends for itself.

    Args:
        module: module whose weights are averaged.
        decay: decay of the average.

    Attributes:
        module: a copy with the averaged weights, frozen and in evaluation mode.
    """

    def __init__(self, module: M, decay: float) -> None:
        # torch's AveragedModel would synchronize with the device.
        self.module = sharding.deepcopy(module).requires_grad_(False).eval()
        self._update, self._source = get_ema_multi_avg_fn(decay), module
        self._weights = list(self.module.parameters()), list(module.parameters())
        self._buffers = _buffers(self.module), _buffers(module)

    def update(self, child: str | None = None) -> None:
        """Moves the average toward the current weights and copies the buffers, for all submodules or for the
        one with a name."""
        weights, buffers = self._weights, self._buffers
        if child is not None:
            mean, source = (each.get_submodule(child) for each in (self.module, self._source))
            weights = list(mean.parameters()), list(source.parameters())
            buffers = _buffers(mean), _buffers(source)
        self._update(*map(sharding.local, weights), None)
        _copy(*buffers)

    def copy_buffers(self) -> None:
        """Copies the buffers alone, before an `update`."""
        _copy(*self._buffers)


# Where a buffer is: a module's dict of buffers, and its name. The tensor there may be replaced.
_Place = tuple[dict[str, Tensor | None], str]


def _buffers(module: nn.Module) -> list[_Place]:
    """The persistent buffers."""
    return [
        (part._buffers, name)
        for part in module.modules()
        for name in part._buffers
        if name not in part._non_persistent_buffers_set
    ]


@torch.no_grad()
def _copy(places: Sequence[_Place], sources: Sequence[_Place]) -> None:
    mine, theirs = ([buffers[name] for buffers, name in each] for each in (places, sources))
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    if pairs:
        torch._foreach_copy_([mean for mean, _ in pairs], [now for _, now in pairs])
