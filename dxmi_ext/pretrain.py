"""Denoising pretraining of a sampler's network: DDPM's objective, EDM's. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dxmi_ext import noise, ops, schedules, sharding, speed
from dxmi_ext.optim import Adam, LearningRates
from dxmi_ext.ranks import Ranks
from dxmi_ext.sampler import conditioned, per_row
from dxmi_ext.speed import SpeedSettings


class Levels(NamedTuple):
    """Noise levels of N rows: a row is signal data + noise eps."""

    signal: Tensor
    """[N], as the others."""
    noise: Tensor
    time: Tensor
    """What the network gets for the level."""
    input_scale: Tensor | None = None
    """What its input is multiplied by; None: nothing."""


DrawLevels = Callable[[int, Tensor, int], Levels]
"""(N, noise key, global index of the first row) -> the levels to train at."""


def uniform_levels(signal: Tensor, noise_: Tensor) -> DrawLevels:
    """Levels of a table, all as likely; the time is the place in it. A sampler's own steps, or DDPM's.

    Args:
        signal, noise_: [L].
    """
    signal, noise_ = signal.float(), noise_.float()

    def draw(n: int, key: Tensor, sample_offset: int) -> Levels:
        place = noise.randint(len(signal), n, key, sample_offset=sample_offset)
        return Levels(signal.to(key.device)[place], noise_.to(key.device)[place], place)

    return draw


def lognormal_levels(
    *, mean: float = -1.2, std: float = 1.2, sigma_data: float = 0.5, time_scale: float = 1.0
) -> DrawLevels:
    """data + sigma eps, ln sigma ~ N(mean, std^2), with the loss's weight of Karras et al. 2022, Table 1."""

    def draw(n: int, key: Tensor, sample_offset: int) -> Levels:
        log_sigma = mean + std * ops.normal((n, 1), key, sample_offset=sample_offset)[:, 0]
        sigma = log_sigma.exp()
        scale = (sigma**2 + sigma_data**2).rsqrt()
        return Levels(torch.ones_like(sigma), sigma, time_scale / 4 * log_sigma, scale)

    return draw


class Pretrainer:
    """Teaches a network what a schedule wants it to predict, by least squares on noisy data.

    Args:
        network: (x [N, *], time [N]) -> [N, *], with labels [N] where the data have them.
        draw_levels: what it is trained at.
        prediction, sigma_data: what it tells; as in `schedules.from_levels`.
        lr: learning rate, decayed to 0 over the run.
        warmup: iterations in which it rises from 0 first.
        iterations: length of the run.
        seed: of every random choice, each keyed by the global row.
        ema_decay: of `averaged`; 0: it is the network itself.
        clip: largest gradient norm; 0: any.
        ranks: among which the rows of a batch are split.
        settings: of how the network runs; `speed.prepare` has prepared it.
        memory_format: of the data.

    Attributes:
        averaged: the network to go on with.
    """

    def __init__(
        self,
        network: nn.Module,
        draw_levels: DrawLevels,
        *,
        prediction: str = "eps",
        sigma_data: float = 0.5,
        lr: float,
        warmup: int = 0,
        iterations: int,
        seed: int,
        ema_decay: float = 0.0,
        clip: float = 0.0,
        ranks: Ranks | None = None,
        settings: SpeedSettings | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.network, self.iteration, self.ranks = network, 0, ranks or Ranks()
        self.settings = settings or SpeedSettings()
        self._draw_levels, self._prediction, self._sigma_data = draw_levels, prediction, sigma_data
        self._memory_format = memory_format
        self.ranks.shard_(network)
        self.averaged = sharding.deepcopy(network).requires_grad_(False).eval() if ema_decay else network
        self._average = get_ema_multi_avg_fn(ema_decay)
        self._averages = list(self.averaged.parameters()), list(network.parameters())
        self._learning = self.ranks.wrap(network)
        self._optimizer = Adam(network.parameters(), lr, clip)
        self._learning_rates = LearningRates([self._optimizer], "linear", iterations, warmup=warmup)
        self._failures = torch.zeros((), device=self._averages[1][0].device)
        self._seed = seed
        self.retry(0, 1.0)

    def retry(self, attempt: int, lr_scale: float) -> None:
        stream = f"pretrain, attempt {attempt}" if attempt else "pretrain"
        self._draws = noise.Draws(self._seed, stream, ["timestep", "noise"], self._failures.device)
        self._learning_rates.scale = lr_scale

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return {}

    def step(self, batch: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """One iteration.

        Args:
            batch: this rank's rows: data [B, *], or data and labels [B].
        """
        data, labels = batch if isinstance(batch, tuple) else (batch, None)
        self._learning_rates.at(self.iteration)
        keys = self._draws.at(self.iteration)
        offset = self.ranks.rank * len(data)
        levels = self._draw_levels(len(data), keys["timestep"], offset)
        eps = ops.normal(data.shape, keys["noise"], sample_offset=offset)
        eps, data = (x.contiguous(memory_format=self._memory_format) for x in (eps, data))
        signal, noise_ = per_row(levels.signal, data), per_row(levels.noise, data)
        noisy = signal * data + noise_ * eps
        target = schedules.target(self._prediction, data, eps, signal, noise_, self._sigma_data)
        if levels.input_scale is not None:
            noisy = per_row(levels.input_scale, data) * noisy
        with speed.running(self.settings, data.device):
            output = conditioned(self._learning, noisy, levels.time, labels)
            loss = nn.functional.mse_loss(output, target)
            self._optimizer.descend(loss, self._failures)
        if self.averaged is not self.network:
            self._average(*map(sharding.local, self._averages), None)
        self.iteration += 1
        return self.ranks.mean({"loss": loss.detach()}) | {"network_failures": self._failures.clone()}

    def state_dict(self) -> dict[str, Any]:
        state = {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "failures": self._failures,
        }
        return state if self.averaged is self.network else state | {"averaged": self.averaged.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        sharding.load_(self.network, state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._failures.copy_(sharding.like(state["failures"], self._failures))
        if self.averaged is not self.network:
            sharding.load_(self.averaged, state["averaged"])
