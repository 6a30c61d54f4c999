"""Pretraining of the autoencoder that becomes the energy. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dxmi_ext import speed
from dxmi_ext.anomaly.networks import SphereAutoencoder
from dxmi_ext.optim import Adam, LearningRates
from dxmi_ext.ranks import Ranks
from dxmi_ext.sampler import conditioned
from dxmi_ext.speed import SpeedSettings


class ReconstructionPretrainer:
    """Lowers the mean of |x - reconstruction|^2, as `trainer.Stepper` says.

    Args:
        autoencoder: is trained.
        lr: learning rate.
        iterations: length of the run.
        lr_decay: of the rate over the run: constant, linear or cosine.
        ranks: among which the rows of a batch are split.
        settings: of how the network runs.
    """

    def __init__(
        self,
        autoencoder: SphereAutoencoder,
        *,
        lr: float,
        iterations: int,
        lr_decay: str = "linear",
        ranks: Ranks | None = None,
        settings: SpeedSettings | None = None,
    ) -> None:
        self.settings = settings or SpeedSettings()
        self.autoencoder, self.iteration, self.ranks = autoencoder, 0, ranks or Ranks()
        self._learning = self.ranks.wrap(autoencoder)
        self._optimizer = Adam(autoencoder.parameters(), lr)
        self._failures = next(autoencoder.parameters()).detach().new_zeros(())
        self._learning_rates = LearningRates([self._optimizer], lr_decay, iterations)

    def retry(self, attempt: int, lr_scale: float) -> None:
        self._learning_rates.scale = lr_scale

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return {}

    def step(self, data: Tensor) -> dict[str, Tensor]:
        """One iteration on this rank's rows of a minibatch, [B, C] on the sphere."""
        self._learning_rates.at(self.iteration)
        with speed.running(self.settings, data.device):
            loss = (data - conditioned(self._learning, data)).square().sum(1).mean()
            self._optimizer.descend(loss, self._failures)
        self.iteration += 1
        return self.ranks.mean({"loss": loss.detach()}) | {"network_failures": self._failures.clone()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "network": self.autoencoder.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "failures": self._failures,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.autoencoder.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._failures.copy_(state["failures"])
