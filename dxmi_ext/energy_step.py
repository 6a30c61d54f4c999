"""How the energy learns from data and samples. Imports torch, ``dxmi_ext.ops`` and what lies between."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dxmi_ext import ops
from dxmi_ext.networks import Networks
from dxmi_ext.optim import Adam

Loss = Callable[[Tensor, Tensor], Tensor]
"""Energies of data [N] and of samples [M] -> a scalar."""


def loss_of(kind: str, gamma: float, magnitude: float) -> Loss:
    """The loss of a name: contrast, DxMI's, or noise_contrastive, N2CE with that magnitude."""
    if kind == "contrast":
        return lambda energy_data, energy_sample: ops.energy_loss(energy_data, energy_sample, gamma)
    return functools.partial(noise_contrastive_loss, gamma=gamma, magnitude=magnitude)


def noise_contrastive_loss(
    energy_data: Tensor, energy_sample: Tensor, gamma: float, magnitude: float
) -> Tensor:
    """Logistic loss of telling data from samples that count as ``magnitude`` times as many, where -E is the
    log ratio of their densities ("Noisier" NCE, arXiv 2405.16730), and the squares of `ops.energy_loss`.

    The gradient at a sample is that of the contrast times exp(-E) / (1 + exp(-E) / magnitude): where the
    energy is high already, little is left to raise.

    Args:
        energy_data, energy_sample: [N], [M].
        gamma: weight of the mean squares.
        magnitude: M, 1 or more.
    """
    shift = math.log(magnitude)
    ratio = softplus(energy_data + shift).mean() + magnitude * softplus(-energy_sample - shift).mean()
    return ratio + gamma * (energy_data.square().mean() + energy_sample.square().mean())


def energy_step(
    networks: Networks,
    optimizer: Adam,
    loss_fn: Loss,
    failures: Tensor,
    data: Tensor,
    samples: Tensor,
    labels: Tensor | None = None,
    sample_labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Lowers the energy of data, raises that of samples (DxMI, Alg. 1).

    Args:
        networks: as they are called where they learn.
        optimizer: of the energy.
        loss_fn: of the energies.
        failures: of such steps in a row, a scalar that is updated.
        data, samples: [N, *], [M, *].
        labels: of the data, [N], or None.
        sample_labels: [M]; None: those of the data.

    Returns:
        What to log: the loss, both mean energies, and spreads.
    """
    n, both = len(data), None
    if labels is not None:
        both = torch.cat((labels, labels if sample_labels is None else sample_labels))
    energies = networks.energy(torch.cat((data, samples)), both)
    loss = loss_fn(energies[:n], energies[n:])
    optimizer.descend(loss, failures)
    energies = energies.detach()
    return {
        "energy_loss": loss.detach(),
        "energy_data": energies[:n].mean(),
        "energy_sample": energies[n:].mean(),
        "energy_spread": spread(energies),
        "data_spread": spread(data),
        "sample_spread": spread(samples),
    }


def spread(rows: Tensor) -> Tensor:
    """The standard deviation over rows [N, *], its root mean square over dimensions."""
    return rows.var(0, correction=0).mean().sqrt()
