"""Energies that DxMI begins at and corrects: E(x) = base(x) + f(x), the base frozen, f learned from 0 on.

A base is what a plain detector says, its squared distance in nats, so that the sampler meets it at the right
temperature. f is the error of an autoencoder times a weight that is 0 at first: together they are a product
of the two densities, in a proportion that DxMI finds. (A perceptron as f learned training rows by heart.)
Imports torch and ``dxmi_ext``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.detectors import MapDetector
from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.anomaly.networks import AutoencoderEnergy, LatentStart, SphereAutoencoder
from dxmi_ext.method.networks import Networks

BASES = ("none", "gaussian", "knn", "autoencoder")
FITTED = BASES[1:3]
"""Those that are fitted to good data before anything is trained."""
_CHUNK = 4096  # rows at a time


class ReconstructionError(nn.Module):
    """Length of what an autoencoder does not reconstruct: x [N, C] -> [N].

    Args:
        autoencoder: is shared, not copied.
    """

    def __init__(self, autoencoder: SphereAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x - self.autoencoder(x), dim=1)


class OfRows(nn.Module):
    """A detector of maps as one of rows: x [N, C] -> distances [N]."""

    def __init__(self, detector: MapDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Tensor:
        distances: Tensor = self.detector(x[:, :, None, None])
        return distances.flatten()


class BasedEnergy(nn.Module):
    """E(x) = w C / 2 (d(x)^2 / m - 1) + a |x - reconstruction|^2 / .1: x [N, C], brought to the sphere first
    -> [N].

    d is a distance from good data, m the mean of its squares there. d^2 C / (2 m) is the negative logarithm,
    but for a constant, of a Gaussian density of the remainder x - (what is nearest to it), whose variance has
    maximum likelihood; w turns nats into energies. The weight a and the autoencoder are trained.

    Args:
        distance: [N, C] -> [N]; its weights are not trained here.
        autoencoder: for points of the C-dimensional sphere.
        dim: C.
        nat: w, the temperature of the density exp(-E / w).
    """

    def __init__(self, distance: nn.Module, autoencoder: SphereAutoencoder, dim: int, nat: float) -> None:
        super().__init__()
        if not 0 < nat < math.inf:
            raise ValueError(f"nat must be > 0 and finite, got {nat}")
        self.distance, self.autoencoder, self.dim, self.nat = distance, autoencoder, dim, nat
        self.weight = nn.Parameter(torch.zeros(()))
        self.mean_square: Tensor
        self.register_buffer("mean_square", torch.ones(()))

    @torch.no_grad()
    def scale(self, maps: FeatureMaps) -> None:
        """Learns m from good data that the distance has not been fitted to."""
        device, total = self.mean_square.device, 0.0
        for start in range(0, len(maps.rows), _CHUNK):
            rows = torch.from_numpy(maps.rows[start : start + _CHUNK].astype(np.float32)).to(device)
            total += float(self.distance(F.normalize(rows, dim=1)).double().square().sum())
        self.mean_square.fill_(max(total / len(maps.rows), 1e-12))

    def base(self, x: Tensor) -> Tensor:
        """The frozen part alone, [N]."""
        relative = self.distance(F.normalize(x, dim=1)).square() / self.mean_square
        return self.nat * self.dim / 2 * (relative - 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1)
        error = (x - self.autoencoder(x)).square().sum(1)
        # At least 0, with a slope everywhere: below 0 the autoencoder would learn not to reconstruct.
        weight = self.weight + (self.weight.clamp(min=0) - self.weight).detach()
        return self.base(x) + weight * error / AutoencoderEnergy.temperature


def based(parts: Networks, detector: MapDetector | None, *, nat: float) -> Networks:
    """Networks whose energy is a base and its correction; samples start where they did.

    Args:
        parts: of ``anomaly.networks.build``, whose autoencoder the correction takes.
        detector: the base, fitted or not; None: the autoencoder that samples start from is the base.
        nat: as of `BasedEnergy`.
    """
    sampler, energy = parts.sampler, parts.energy_network
    assert isinstance(energy, AutoencoderEnergy) and isinstance(sampler.start, LatentStart)
    distance = ReconstructionError(sampler.start.autoencoder) if detector is None else OfRows(detector)
    return Networks(sampler, parts.value, BasedEnergy(distance, energy.autoencoder, sampler.dim, nat))


def fit(energy: nn.Module, train: FeatureMaps, held_out: FeatureMaps) -> None:
    """Fits the detector of a base to the positions of good maps, and scales it by those held out."""
    assert isinstance(energy, BasedEnergy) and isinstance(energy.distance, OfRows)
    energy.distance.detector.fit(FeatureMaps(train.rows[:, None, None]))
    energy.scale(held_out)
