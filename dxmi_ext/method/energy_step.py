"""One training step of the energy on data and negatives. Imports torch, the engine and the method up to
losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dxmi_ext.engine.learning.learner import Learner
from dxmi_ext.method.losses import EnergyLoss
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.stepper import Batch, Metrics


def energy_step(
    learner: Learner,
    networks: Networks,
    loss_fn: EnergyLoss,
    batch: Batch,
    samples: Tensor,
    sample_labels: Tensor | None = None,
) -> Metrics:
    """Lowers the energy of data and raises the energy of samples (DxMI, Alg. 1).

    Args:
        learner: learner of the energy.
        networks: networks wrapped for training.
        loss_fn: loss of the energies.
        batch: batch with data [N, *].
        samples: negatives [M, *].
        sample_labels: labels [M]; None: the labels of the data.

    Returns:
        The metrics to log: the loss, both mean energies, and spreads.
    """
    n, both = batch.n, None
    if batch.labels is not None:
        both = torch.cat((batch.labels, batch.labels if sample_labels is None else sample_labels))
    energies = networks.energy(torch.cat((batch.data, samples)), both)
    loss = learner.descend("energy", loss_fn(energies[:n], energies[n:]))
    energies = energies.detach()
    return {
        "energy_loss": loss,
        "energy_data": energies[:n].mean(),
        "energy_sample": energies[n:].mean(),
        "energy_spread": spread(energies),
        "data_spread": spread(batch.data),
        "sample_spread": spread(samples),
    }


def spread(rows: Tensor) -> Tensor:
    """Standard deviation over rows [N, *], as root mean square over dimensions."""
    return rows.var(0, correction=0).mean().sqrt()
