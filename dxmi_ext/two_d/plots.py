"""Plots of points and energies in the plane. Imports ``engine.plots``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine import plots

EXTENT = 4.0  # energies and AUROC's uniform points are on [-4, 4]^2
_LINES = 50  # particles whose path is drawn
_MARGIN = 4.6  # range of the axes, since samples stray beyond


def samples(path: plots.File, data: Tensor, samples: Tensor) -> None:
    """Data and samples, both [n, 2], side by side."""
    with plots.figure(path, 1, 2, width=2.9, height=2.9) as axes:
        for axis, points, title, color in zip(
            axes, (data, samples), ("data", "samples"), (plots.DATA, plots.SAMPLES), strict=True
        ):
            scatter(axis, points, color)
            plane(axis, title)


def grid(size: int = 200) -> Tensor:
    """The points [size * size, 2] on [-4, 4]^2 for ``energy``, in its order."""
    line = torch.linspace(-EXTENT, EXTENT, size)
    return torch.cartesian_prod(line, line)


def energy(path: plots.File, energies: Tensor, points: Tensor, *, title: str = "energy") -> None:
    """The energy as a filled contour, with points on top.

    Args:
        energies: [size * size], at the points of ``grid(size)``.
        points: [n, 2].
    """
    size = round(energies.numel() ** 0.5)
    line = np.linspace(-EXTENT, EXTENT, size)
    with plots.figure(path, 1, 1, width=3.9, height=3.3) as axes:
        values = plots.to_numpy(energies).reshape(size, size).T
        filled = axes[0].contourf(line, line, values, levels=40, cmap="viridis_r")
        axes[0].contour(line, line, values, levels=10, colors="white", linewidths=0.3, alpha=0.5)
        scatter(axes[0], points, "white", size=2.5, alpha=0.9)
        plane(axes[0], title, extent=EXTENT)
        bar = axes[0].figure.colorbar(filled, ax=axes[0], shrink=0.9, pad=0.03, aspect=25)
        bar.outline.set_visible(False)
        bar.locator = plots.ticker().MaxNLocator(5)
        bar.update_ticks()


def paths(path: str | Path, trajectory: Tensor) -> None:
    """Paths of particles from noise to data, one panel per step.

    Args:
        trajectory: [T + 1, n, 2], of which at most 11 evenly spaced steps are drawn.
    """
    way = plots.to_numpy(trajectory[:, :_LINES])
    shown = np.unique(np.linspace(0, len(way) - 1, 11).round().astype(int)).tolist()
    with plots.figure(path, 1, len(shown), width=1.75, height=1.95) as axes:
        for t, axis in zip(shown, axes, strict=True):
            scatter(axis, trajectory[t], plots.SAMPLES, size=1.5, alpha=0.3)
            axis.plot(way[: t + 1, :, 0], way[: t + 1, :, 1], color=plots.ACCENT, lw=0.35, alpha=0.6)
            scatter(axis, trajectory[t, :_LINES], plots.ACCENT, size=2.5, alpha=1.0)
            plane(axis, f"$t = {t}$", ticks=False)


def scatter(axis: Any, points: Tensor, color: str, *, size: float = 2.0, alpha: float = 0.35) -> None:
    axis.scatter(*plots.to_numpy(points).T, s=size, c=color, alpha=alpha, linewidths=0)


def plane(axis: Any, title: str, *, extent: float = _MARGIN, ticks: bool = True) -> None:
    axis.set(title=title, xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    axis.set(xticks=[-4, -2, 0, 2, 4] if ticks else [], yticks=[-4, -2, 0, 2, 4] if ticks else [])
