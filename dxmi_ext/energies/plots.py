"""Pictures of samples: over the energy in the plane, else histograms of coordinates, distances and energies.

Imports ``engine.output.plots`` and the task's chains.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.energies.chains import Chain
from dxmi_ext.energies.settings import Config
from dxmi_ext.energies.targets import Target, distances
from dxmi_ext.engine.output import plots
from dxmi_ext.method import noise

_GRID = 200
_SHOWN = 6  # coordinates that have a histogram


def draw(directory: Path, cfg: Config, target: Target, chain: Chain, data: Tensor | None) -> None:
    """samples.png and curves.png of a run; data [n, D] are samples of the target."""
    draws = noise.Draws(cfg.run.seed, "pictures", ["sample"], chain.start.log_std.device)
    drawn = chain.sample(2000, draws.at(0)["sample"], last_noise=cfg.evaluation.last_noise)
    samples(directory / "samples.png", target, drawn, data)
    plots.curves(directory / "curves.png", directory / "metrics.jsonl")


def samples(path: plots.File, target: Target, samples: Tensor, data: Tensor | None) -> None:
    """Samples [n, D], and of the target where there are some; without numbers that are not finite."""
    if target.dim == 2 and target.particles is None:
        _over_energy(path, target, samples)
        return
    panels = {"energy": lambda x: target.energy(x)}
    if target.particles is not None:
        panels["distance"] = lambda x: distances(x, target.particles or 0).flatten()
    else:
        for i in range(min(target.dim, _SHOWN)):
            panels[f"$x_{{{i}}}$"] = lambda x, i=i: x[:, i]  # type: ignore[misc]
    rows = -(-len(panels) // 4)
    with torch.no_grad(), plots.figure(path, rows, min(len(panels), 4), width=2.5, height=2.0) as axes:
        for axis, (name, values) in zip(axes, panels.items(), strict=False):
            sets = {"target": data, "samples": samples}
            shown = {kind: _finite(values(x)) for kind, x in sets.items() if x is not None}
            axis.set(title=name, yticks=[])
            if not all(map(len, shown.values())):
                continue
            low, high = np.quantile(shown.get("target", shown["samples"]), [0.001, 0.999])
            for (kind, numbers), color in zip(
                shown.items(), (plots.DATA, plots.SAMPLES)[-len(shown) :], strict=True
            ):
                clipped = np.clip(numbers, low, high)
                axis.hist(
                    clipped, 60, range=(low, high), density=True, histtype="step", color=color, label=kind
                )
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis in [axis for axis in axes if axis.has_data()][:1]:
            axis.legend(fontsize=7)


def _finite(values: Tensor) -> np.ndarray:
    numbers = plots.to_numpy(values)
    return numbers[np.isfinite(numbers)]


def _over_energy(path: plots.File, target: Target, samples: Tensor) -> None:
    """Samples [n, 2] over contours of the energy."""
    samples = samples[samples.isfinite().all(1)]
    if not len(samples):
        samples = torch.zeros(1, 2)
    center = samples.median(0).values
    reach = 1.2 * float((samples - center).abs().quantile(0.995).clamp(min=1e-3))
    lines = [torch.linspace(float(c) - reach, float(c) + reach, _GRID) for c in center]
    with torch.no_grad():
        energies = target.energy(torch.cartesian_prod(*lines).to(samples))
    values = plots.to_numpy(energies).reshape(_GRID, _GRID).T
    values = np.minimum(values - np.fmin.reduce(values, axis=None), 30.0)  # nan outside a domain
    with plots.figure(path, 1, 1, width=4.2, height=4.2) as axes:
        axes[0].contourf(lines[0], lines[1], values, levels=30, cmap="viridis_r")
        axes[0].scatter(*plots.to_numpy(samples).T, s=2.0, c="white", alpha=0.6, linewidths=0)
        axes[0].set(title="samples over the energy", aspect="equal")
        axes[0].set(
            xlim=(float(lines[0][0]), float(lines[0][-1])), ylim=(float(lines[1][0]), float(lines[1][-1]))
        )
