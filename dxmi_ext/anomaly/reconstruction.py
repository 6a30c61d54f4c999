"""Pretraining of the autoencoder that becomes the energy. Imports torch and the method."""

from __future__ import annotations

from typing import Any

from dxmi_ext.anomaly.detectors.networks import SphereAutoencoder
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.learner import Learner
from dxmi_ext.method.stepper import Batch, Metrics, Stepper


class ReconstructionPretrainer(Stepper):
    """Minimizes the mean of |x - reconstruction|^2; batches are [B, C] on the sphere.

    Args:
        autoencoder: network to train.
        lr: learning rate, which decays to 0.
        iterations: number of iterations.
        ranks: ranks among which the rows of a batch are split.
        execution: execution settings of the network.
    """

    stream = "reconstruction"

    def __init__(
        self,
        autoencoder: SphereAutoencoder,
        *,
        lr: float,
        iterations: int,
        ranks: Ranks | None = None,
        execution: ExecutionSettings | None = None,
    ) -> None:
        self.autoencoder, ranks = autoencoder, ranks or Ranks()
        self.learner = Learner(autoencoder, lr, "linear", iterations, ranks)
        self.learners = [self.learner]
        super().__init__(
            seed=0,  # it draws no noise
            device=next(autoencoder.parameters()).device,
            ranks=ranks,
            execution=execution or ExecutionSettings(),
        )

    def iterate(self, batch: Batch) -> Metrics:
        reconstruction = call(self.learner.network, batch.data)
        loss = (batch.data - reconstruction).square().sum(1).mean()
        return self.ranks.mean({"loss": self.learner.descend("network", loss)})

    def parts(self) -> dict[str, Any]:
        return {
            "network": self.autoencoder,
            "optimizer": self.learner.optimizer,
            "failures": self.learner.failures["network"],
        }
