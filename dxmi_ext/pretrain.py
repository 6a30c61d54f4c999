"""Denoising pretraining of a sampler's network (DDPM objective). Imports torch and ``dxmi_ext``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dxmi_ext import noise, ops, sharding, speed
from dxmi_ext.optim import Adam, LearningRates
from dxmi_ext.ranks import Ranks
from dxmi_ext.sampler import GaussianSampler, conditioned
from dxmi_ext.schedules import Schedule
from dxmi_ext.speed import SpeedSettings


class Pretrainer:
    """Teaches the network to predict the noise in signal[t] x + noise[t] eps, at the sampler's own T steps.

    Args:
        sampler: its network is trained, its log sigma is not.
        schedule: signal and noise levels.
        lr: learning rate, decayed to 0 over the run.
        iterations: length of the run.
        seed: of every random choice, each keyed by the global row.
        ranks: among which the rows of a batch are split.
        settings: of how the network runs.
    """

    def __init__(
        self,
        sampler: GaussianSampler,
        schedule: Schedule,
        *,
        lr: float,
        iterations: int,
        seed: int,
        ranks: Ranks | None = None,
        settings: SpeedSettings | None = None,
    ) -> None:
        self.settings = settings or SpeedSettings()
        speed.prepare(self.settings, sampler)
        self._memory_format = sampler.memory_format
        self.network, self.iteration, self.ranks = sampler.network, 0, ranks or Ranks()
        self.ranks.shard_(self.network)
        self._learning = self.ranks.wrap(self.network)
        device = sampler.log_std.device
        self._signal = schedule.signal.float().to(device)
        self._noise = schedule.noise.float().to(device)
        self._optimizer = Adam(self.network.parameters(), lr)
        self._failures = self._signal.new_zeros(())
        self._learning_rates = LearningRates([self._optimizer], "linear", iterations)
        self._seed, self._device = seed, device
        self.retry(0, 1.0)

    def retry(self, attempt: int, lr_scale: float) -> None:
        stream = f"pretrain, attempt {attempt}" if attempt else "pretrain"
        self._draws = noise.Draws(self._seed, stream, ["timestep", "noise"], self._device)
        self._learning_rates.scale = lr_scale

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return {}

    def step(self, data: Tensor) -> dict[str, Tensor]:
        """One iteration on this rank's rows of a minibatch, [B, *]."""
        self._learning_rates.at(self.iteration)
        keys = self._draws.at(self.iteration)
        offset = self.ranks.rank * len(data)
        timestep = noise.randint(len(self._signal), len(data), keys["timestep"], sample_offset=offset)
        eps = ops.normal(data.shape, keys["noise"], sample_offset=offset)
        eps, data = (x.contiguous(memory_format=self._memory_format) for x in (eps, data))
        level = (-1, *[1] * (data.ndim - 1))
        noisy = self._signal[timestep].view(level) * data + self._noise[timestep].view(level) * eps
        with speed.running(self.settings, data.device):
            loss = nn.functional.mse_loss(conditioned(self._learning, noisy, timestep), eps)
            self._optimizer.descend(loss, self._failures)
        self.iteration += 1
        return self.ranks.mean({"loss": loss.detach()}) | {"network_failures": self._failures.clone()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "failures": self._failures,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        sharding.load_(self.network, state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._failures.copy_(sharding.like(state["failures"], self._failures))
