"""What detectors on feature maps share, and energies as detectors. Imports torch, numpy and ``dxmi_ext``.

Each detector scores every position. The highest scores of a map give the score of an image; the map
upsampled to the image localizes defects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.features.feature_maps import FeatureMaps


class Detector(Protocol):
    """A detector is fitted to good images and scores how much other images differ from them."""

    def fit(self, maps: FeatureMaps) -> None:
        """Fits the detector to maps of good images."""

    def score(self, maps: FeatureMaps) -> Tensor:
        """Score maps, float32 [n, h, w] on the CPU; high where a defect is likely."""


def detect(scores: Tensor, *, top_share: float = 0.0) -> Tensor:
    """Score maps [n, h, w] -> scores of images [n], the maxima (DxMI, sec. 5.3).

    Args:
        top_share: share of the positions, the highest, whose mean is the score; rounded to at least one
            position, which gives the maximum.
    """
    if not 0 <= top_share <= 1:
        raise ValueError(f"top_share must be from 0 to 1, got {top_share}")
    positions = scores.flatten(1)
    count = max(1, round(top_share * positions.shape[1]))
    return positions.amax(1) if count == 1 else positions.topk(count, dim=1).values.mean(1)


def localize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Score maps [n, h, w] -> scores of pixels [n, *size], bilinear."""
    return F.interpolate(scores[:, None], size, mode="bilinear", align_corners=False)[:, 0]


class EnergyDetector:
    """The energy of a trained DxMI, or of any function of positions.

    Args:
        energy: [N, C] -> [N].
        device: device of the energy.
    """

    chunk = 16_384
    """Number of positions scored at a time."""

    def __init__(self, energy: nn.Module, *, device: torch.device | str = "cpu") -> None:
        self.energy, self.device = energy, device

    def fit(self, maps: FeatureMaps) -> None:
        """Does nothing, because the energy is already trained."""

    @torch.no_grad()
    def score(self, maps: FeatureMaps) -> Tensor:
        energies = [self.energy(rows) for rows in _chunks(maps.rows, self.chunk, self.device)]
        return torch.cat(energies).float().cpu().view(maps.maps.shape[:3])


class MapDetector(nn.Module):
    """Maps [n, C, h, w] -> score maps [n, h, w]. All fitted values are buffers, so detectors are saved and
    exported as networks are.

    Args:
        chunk: number of positions scored at a time.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def fit(self, maps: FeatureMaps) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def score(self, maps: FeatureMaps) -> Tensor:
        """Score maps, float32 [n, h, w] on the CPU."""
        count = max(1, self.chunk // (maps.shape[0] * maps.shape[1]))
        return torch.cat([self(block).float().cpu() for block in blocks_of(maps, count, self.device)])

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the `state_dict` of another fitted detector, whatever its sizes."""
        for name, buffer in list(self.named_buffers()):
            self.register_buffer(name, tensors[name].to(buffer.device, buffer.dtype))

    def _by_position(self, features: Tensor, distances: Callable[[Tensor], Tensor]) -> Tensor:
        """Distances of the positions of features [n, C, h, w], computed in chunks, [n, h, w].

        Args:
            distances: rows [m, C] -> [m].
        """
        rows = rows_of(features)
        if torch.compiler.is_compiling():  # an exported program has no loop over unknown numbers
            found = distances(rows)
        else:
            found = torch.cat([distances(each) for each in rows.split(self.chunk)])
        n, _, height, width = features.shape
        return found.view(n, height, width)

    def _learned(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def maps_of(features: Tensor, energy: nn.Module) -> Tensor:
    """Features [n, C, h, w] -> score maps, float32 [n, h, w].

    Args:
        energy: a `MapDetector`, or a function of positions, [N, C] -> [N].
    """
    if isinstance(energy, MapDetector):
        found: Tensor = energy(features)
        return found.float()
    n, _, height, width = features.shape
    energies: Tensor = energy(rows_of(features)).float()
    return energies.view(n, height, width)


def detector_of(energy: nn.Module, device: torch.device | str) -> Detector:
    """Converts a scoring module, as in `maps_of`, to a detector of feature maps."""
    return energy if isinstance(energy, MapDetector) else EnergyDetector(energy, device=device)


def rows_of(features: Tensor) -> Tensor:
    """[n, C, h, w] -> positions [n h w, C]"""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def blocks_of(maps: FeatureMaps, size: int, device: torch.device | str) -> Iterator[Tensor]:
    """Blocks of at most ``size`` maps, float32 [m, C, h, w]."""
    for start in range(0, len(maps), size):
        block = torch.from_numpy(maps.maps[start : start + size].astype(np.float32))
        yield block.to(device).permute(0, 3, 1, 2)


def _chunks(rows: np.ndarray, size: int, device: torch.device | str) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield torch.from_numpy(rows[start : start + size].astype(np.float32)).to(device)
