"""Energies that DxMI starts from and corrects: E(x) = base(x) + f(x); f is trained from 0.

A base is the frozen squared distance of a plain detector, in nats, so that its temperature suits the sampler;
several bases are averaged. f is the error of a pretrained autoencoder times a weight that starts at
0, so that E is the energy of a product of densities whose proportion DxMI learns. The autoencoder is frozen:
with further training, it learns to reconstruct samples as badly as possible, and data hardly better. (A
multilayer perceptron as f memorized the training rows.) Imports torch and ``dxmi_ext``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.detectors.common import MapDetector
from dxmi_ext.anomaly.detectors.networks import AutoencoderEnergy, LatentStart, SphereAutoencoder
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.method.networks import Networks

BASES = ("gaussian", "knn", "density", "autoencoder")
FITTED = BASES[:3]
"""Bases that are fitted to good data before training."""
_CHUNK = 4096  # rows at a time
_GAIN = 10  # a relative to its parameter, so that learning rates of networks suit it


def names_of(base: str) -> tuple[str, ...]:
    """The bases in the setting ``base``: knn+gaussian -> (knn, gaussian), none -> ()."""
    return () if base == "none" else tuple(base.split("+"))


class ReconstructionError(nn.Module):
    """Norm of the reconstruction error of an autoencoder: x [N, C] -> [N].

    Args:
        autoencoder: network that is shared, not copied.
    """

    def __init__(self, autoencoder: SphereAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x - self.autoencoder(x), dim=1)


class OfRows(nn.Module):
    """A detector for maps, applied to rows: x [N, C] -> distances [N]."""

    def __init__(self, detector: MapDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Tensor:
        distances: Tensor = self.detector(x[:, :, None, None])
        return distances.flatten()


class Base(nn.Module):
    """C / 2 (d(x)^2 / m - 1), x [N, C] on the sphere -> nats [N], where m is the mean of d^2 over good data.

    d^2 C / (2 m) is the negative logarithm, up to a constant, of a Gaussian density of the residual, whose
    variance has maximum likelihood.

    Args:
        distance: [N, C] -> [N], the distance d from good data; frozen.
        dim: C.
    """

    def __init__(self, distance: nn.Module, dim: int) -> None:
        super().__init__()
        self.distance, self.dim = distance, dim
        self.mean_square: Tensor
        self.register_buffer("mean_square", torch.ones(()))

    @torch.no_grad()
    def scale(self, maps: FeatureMaps) -> None:
        """Sets m from good data to which the distance has not been fitted."""
        device, total = self.mean_square.device, 0.0
        for start in range(0, len(maps.rows), _CHUNK):
            rows = torch.from_numpy(maps.rows[start : start + _CHUNK].astype(np.float32)).to(device)
            total += float(self.distance(F.normalize(rows, dim=1)).double().square().sum())
        self.mean_square.fill_(max(total / len(maps.rows), 1e-12))

    def forward(self, x: Tensor) -> Tensor:
        nats: Tensor = self.dim / 2 * (self.distance(x).square() / self.mean_square - 1)
        return nats


class BasedEnergy(nn.Module):
    """E(x) = w mean_i base_i(x) + a |x - reconstruction|^2 / .1: x [N, C], projected onto the sphere -> [N].

    Several bases form a logarithmic opinion pool, the geometric mean of their densities. a, which is 10 times
    the parameter `weight`, is the only trained parameter once `begin` has frozen the autoencoder.

    Args:
        bases: bases in nats.
        autoencoder: autoencoder of points on the C-dimensional sphere.
        nat: w, the temperature of the density exp(-E / w).
    """

    def __init__(self, bases: Sequence[Base], autoencoder: SphereAutoencoder, nat: float) -> None:
        super().__init__()
        if not 0 < nat < math.inf:
            raise ValueError(f"nat must be > 0 and finite, got {nat}")
        self.bases, self.autoencoder, self.nat = nn.ModuleList(bases), autoencoder, nat
        self.weight = nn.Parameter(torch.zeros(()))

    def base(self, x: Tensor) -> Tensor:
        """The frozen part alone, [N]."""
        x = F.normalize(x, dim=1)
        return self.nat * torch.stack([base(x) for base in self.bases]).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1)
        error = (x - self.autoencoder(x)).square().sum(1)
        # Clamped to >= 0 with a gradient everywhere; a negative weight would reward reconstruction errors.
        weight = self.weight + (self.weight.clamp(min=0) - self.weight).detach()
        return self.base(x) + _GAIN * weight * error / AutoencoderEnergy.temperature


class BaseAlone(nn.Module):
    """The frozen part of an energy, as an energy: x [N, C] -> [N]."""

    def __init__(self, energy: BasedEnergy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        return self.energy.base(x)


def based(parts: Networks, detectors: Sequence[MapDetector | None], *, nat: float) -> Networks:
    """Networks with the sum of bases and a correction as energy, and the same sampler.

    Args:
        parts: networks from ``networks.build``; the correction uses the energy's autoencoder.
        detectors: bases, fitted or not; None: the autoencoder from which samples start.
        nat: see `BasedEnergy`.
    """
    sampler, energy = parts.sampler, parts.energy_network
    assert isinstance(energy, AutoencoderEnergy) and isinstance(sampler.start, LatentStart)
    start = sampler.start.autoencoder
    distances = [ReconstructionError(start) if each is None else OfRows(each) for each in detectors]
    bases = [Base(distance, sampler.dim) for distance in distances]
    return Networks(sampler, parts.value, BasedEnergy(bases, energy.autoencoder, nat))


def fit(energy: nn.Module, train: FeatureMaps, held_out: FeatureMaps) -> None:
    """Fits the detectors of bases to the positions of good maps, and scales them with held-out maps."""
    assert isinstance(energy, BasedEnergy)
    for base in _of(energy, OfRows):
        detector = base.distance.detector
        assert isinstance(detector, MapDetector)
        detector.fit(FeatureMaps(train.rows[:, None, None]))
        base.scale(held_out)


def begin(energy: nn.Module, maps: FeatureMaps) -> None:
    """Freezes the pretrained autoencoder of a `BasedEnergy`, and scales autoencoder bases with good maps."""
    if isinstance(energy, BasedEnergy):
        energy.autoencoder.requires_grad_(False)
        for base in _of(energy, ReconstructionError):
            base.scale(maps)


def _of(energy: BasedEnergy, kind: type[nn.Module]) -> list[Base]:
    bases = [base for base in energy.bases if isinstance(base, Base)]
    return [base for base in bases if isinstance(base.distance, kind)]
