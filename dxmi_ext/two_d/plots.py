"""Plots of points and energies in the plane. Imports ``engine.output.plots`` and ``two_d.densities``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine.output import plots
from dxmi_ext.two_d.densities import BOX

EXTENT = float(BOX[1, 0])
_LINES = 50  # particles whose path is drawn
_MARGIN = 0.075  # margin of the axes, as a share of the box, since samples stray beyond it


def samples(path: plots.File, data: Tensor, samples: Tensor, *, box: Tensor = BOX) -> None:
    """Data and samples, both [n, 2], side by side.

    Args:
        box: lower and upper corner of the region that is drawn, with a margin around it, [2, 2].
    """
    with plots.figure(path, 1, 2, width=2.9, height=2.9) as axes:
        for axis, points, title, color in zip(
            axes, (data, samples), ("data", "samples"), (plots.DATA, plots.SAMPLES), strict=True
        ):
            scatter(axis, points, color)
            _frame(axis, title, _widened(box))


def grid(size: int = 200, *, box: Tensor = BOX) -> Tensor:
    """The points [size * size, 2] of a box for ``energy``, in its order.

    Args:
        box: lower and upper corner, [2, 2].
    """
    return torch.cartesian_prod(*(torch.linspace(low, high, size) for low, high in box.T.tolist()))


def energy(
    path: plots.File, energies: Tensor, points: Tensor, *, title: str = "energy", box: Tensor = BOX
) -> None:
    """The energy as a filled contour, with points on top.

    Args:
        energies: [size * size], in the order of ``grid(size)``.
        points: [n, 2].
        box: lower and upper corner of the grid in the units of the points, [2, 2].
    """
    size = round(energies.numel() ** 0.5)
    lines = [np.linspace(low, high, size) for low, high in box.T.tolist()]
    with plots.figure(path, 1, 1, width=3.9, height=3.3) as axes:
        values = plots.to_numpy(energies).reshape(size, size).T
        filled = axes[0].contourf(*lines, values, levels=40, cmap="viridis_r")
        axes[0].contour(*lines, values, levels=10, colors="white", linewidths=0.3, alpha=0.5)
        scatter(axes[0], points, "white", size=2.5, alpha=0.9)
        _frame(axes[0], title, box)
        bar = axes[0].figure.colorbar(filled, ax=axes[0], shrink=0.9, pad=0.03, aspect=25)
        bar.outline.set_visible(False)
        bar.locator = plots.ticker().MaxNLocator(5)
        bar.update_ticks()


def paths(path: str | Path, trajectory: Tensor, *, box: Tensor = BOX) -> None:
    """Paths of particles from noise to data, one panel per step.

    Args:
        trajectory: [T + 1, n, 2], of which at most 11 evenly spaced steps are drawn.
        box: see `samples`.
    """
    way = _numpy(trajectory[:, :_LINES])
    shown = np.unique(np.linspace(0, len(way) - 1, 11).round().astype(int)).tolist()
    with plots.figure(path, 1, len(shown), width=1.75, height=1.95) as axes:
        for t, axis in zip(shown, axes, strict=True):
            scatter(axis, trajectory[t], plots.SAMPLES, size=1.5, alpha=0.3)
            axis.plot(way[: t + 1, :, 0], way[: t + 1, :, 1], color=plots.ACCENT, lw=0.35, alpha=0.6)
            scatter(axis, trajectory[t, :_LINES], plots.ACCENT, size=2.5, alpha=1.0)
            _frame(axis, f"$t = {t}$", _widened(box), ticks=False)


def scatter(axis: Any, points: Tensor, color: str, *, size: float = 2.0, alpha: float = 0.35) -> None:
    axis.scatter(*_numpy(points).T, s=size, c=color, alpha=alpha, linewidths=0)


def plane(axis: Any, title: str, *, extent: float = EXTENT * (1 + 2 * _MARGIN), ticks: bool = True) -> None:
    """The axes of a density, on [-extent, extent]^2."""
    _frame(axis, title, BOX * (extent / EXTENT), ticks=ticks)


def _frame(axis: Any, title: str, box: Tensor, *, ticks: bool = True) -> None:
    """Square axes with the limits of a box [2, 2], whatever the units of its sides."""
    x, y = box.T.tolist()
    axis.set(title=title, xlim=x, ylim=y, box_aspect=1)
    for line in (axis.xaxis, axis.yaxis):
        line.set_major_locator(plots.ticker().MaxNLocator(5) if ticks else plots.ticker().NullLocator())


def _widened(box: Tensor) -> Tensor:
    margin = _MARGIN * (box[1] - box[0])
    return torch.stack((box[0] - margin, box[1] + margin))


def _numpy(x: Tensor) -> np.ndarray:
    """float64, since coordinates of a file may differ by little, far from 0."""
    return x.detach().double().cpu().numpy()
