"""What stands between features and the networks: fixed, fitted to training data before they learn.

The maps of backbones lie on the unit sphere already and pass as they are (``nn.Identity``); vectors of any
units are standardised here. Imports torch, numpy and ``dxmi_ext.anomaly.features``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.metrics.features import FeatureError

_CHUNK = 65_536  # rows at a time


class Standardised(nn.Module):
    """Vectors [N, d] of any units -> unit vectors [N, d + 1], float32.

    Columns get mean 0 and variance 1 over the training data. A constant coordinate is appended before the
    result is brought to the sphere, which makes the map one to one: length tells too. It is sqrt(d), about
    the length of a standardised vector, so that most of them lie some 45 degrees from the pole.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("std", torch.ones(dim, dtype=torch.float64))

    def fit(self, rows: np.ndarray) -> None:
        """Takes mean and standard deviation from training data, float64 [n, d].

        Raises:
            FeatureError: a column is constant.
        """
        mean, std = rows.mean(0), rows.std(0)
        constant = std <= 1e-12 * np.abs(rows).max(0)
        if constant.any():
            columns = ", ".join(map(str, np.flatnonzero(constant)[:10]))
            raise FeatureError(
                f"X: constant in the {len(rows)} good rows that train: column {columns}; leave it out"
            )
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(std))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.double() - self.mean) / self.std
        pole = x.new_full((len(x), 1), math.sqrt(x.shape[1]))
        return F.normalize(torch.cat((x, pole), dim=1), dim=1).float()


def prepared(maps: np.ndarray, preparation: nn.Module) -> FeatureMaps:
    """Features [n, h, w, C] as the networks, and the detectors beside them, see them."""
    if isinstance(preparation, nn.Identity):
        return FeatureMaps(maps)
    device, rows = next(preparation.buffers()).device, maps.reshape(-1, maps.shape[3])
    starts = range(0, len(rows), _CHUNK)
    chunks = [preparation(torch.from_numpy(rows[i : i + _CHUNK]).to(device)).cpu().numpy() for i in starts]
    unit = np.concatenate(chunks)
    return FeatureMaps(unit.reshape(*maps.shape[:3], unit.shape[1]))
