"""Toy densities in the plane, within [-4, 4]^2 except for rare tails.

A row depends on (key, global row) alone, so a batch may be split over calls or ranks. Imports torch,
``dxmi_ext.ops`` and ``dxmi_ext.method.noise``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.method import noise

BOX = torch.tensor([[-4.0, -4.0], [4.0, 4.0]])
"""Lower and upper corner of the square in which densities are drawn and AUROC's uniform points lie."""
# The two uses of the key: noise of a point, and uniforms that choose its center.
_NORMAL, _UNIFORM = 0, 1


def sample(name: str, n: int, key: Tensor, *, sample_offset: int = 0) -> Tensor:
    """Draw ``n`` points of a density; row i is point ``sample_offset + i`` of the key's infinite sequence.

    Args:
        name: one of ``DENSITIES``.
        key: int64 [2] from ``ops.noise_key``, with an otherwise unused draw; the points are on its device.

    Returns:
        float32 [n, 2].

    Raises:
        ValueError: the name is unknown.
    """
    if name not in DENSITIES:
        raise ValueError(f"data must be one of {', '.join(DENSITIES)}, got {name!r}")
    z = ops.normal((n, 2), key, timestep=_NORMAL, sample_offset=sample_offset)
    u = noise.uniform((n, 2), key, timestep=_UNIFORM, sample_offset=sample_offset)
    # float64 inside: vectorized float32 functions may round differently for another split of the batch
    return DENSITIES[name](z.double(), u).float()


def _eight_gaussians(z: Tensor, u: Tensor) -> Tensor:
    """Centers on a circle of radius 4/1.414, standard deviation .5/1.414 (DxMI, Table 1)."""
    angles = [k * math.pi / 4 for k in range(8)]
    centers = z.new_tensor([(4 * math.cos(angle), 4 * math.sin(angle)) for angle in angles])
    mode = (8 * u[:, 0]).long()
    return (centers[mode] + 0.5 * z) / 1.414


def _two_spirals(z: Tensor, u: Tensor) -> Tensor:
    """Two opposite arms of one and a half turns, with noise of standard deviation .1."""
    angle = 3 * math.pi * u[:, 0].sqrt()
    arm = torch.where(u[:, 1] < 0.5, -1.0, 1.0)
    spiral = torch.stack([angle.cos(), angle.sin()], dim=1) * (arm * angle / 3).unsqueeze(1)
    return spiral + 0.1 * z


def _checkerboard(z: Tensor, u: Tensor) -> Tensor:
    """The eight dark squares, of side 2, of a 4 x 4 board."""
    across = 4 * u[:, 0]
    along = 2 * u[:, 1]  # two dark squares in each column
    dark = along + along.floor() + across.floor() % 2
    return torch.stack([2 * across - 4, 2 * dark - 4], dim=1)


def log_density(name: str, x: Tensor) -> Tensor:
    """Log density, -inf outside the support.

    Args:
        name: one of ``DENSITIES``.
        x: [n, 2].

    Returns:
        float64 [n]. Exact except for 2spirals, whose arms are 800 Gaussians spaced by half their width.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in DENSITIES:
        raise ValueError(f"data must be one of {', '.join(DENSITIES)}, got {name!r}")
    x = x.double()
    if name == "checkerboard":
        column, row = ((x + 4) / 2).floor().T
        inside = (x >= -4).all(1) & (x < 4).all(1) & ((column + row) % 2 == 0)
        return torch.where(inside, -math.log(32), -math.inf)
    # The two others are mixtures of Gaussians at their noiseless points for evenly spaced u.
    if name == "8gaussians":
        u, std = torch.stack([(torch.arange(8) + 0.5) / 8, torch.zeros(8)], dim=1), 0.5 / 1.414
    else:
        u, std = torch.cartesian_prod((torch.arange(400) + 0.5) / 400, torch.tensor([0.25, 0.75])), 0.1
    u = u.to(x)
    centers = DENSITIES[name](torch.zeros_like(u), u)
    scale = math.log(len(centers) * 2 * math.pi * std**2)
    squared = [torch.cdist(part, centers).square() for part in x.split(4096)]
    return torch.cat([torch.logsumexp(part / (-2 * std**2), dim=1) for part in squared]) - scale


DENSITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "8gaussians": _eight_gaussians,
    "2spirals": _two_spirals,
    "checkerboard": _checkerboard,
}
