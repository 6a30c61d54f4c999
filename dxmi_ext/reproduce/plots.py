"""Figures of an experiment: galleries of samplers, sweeps of a setting, grids of images.

Imports ``engine.output.plots`` and ``two_d.plots``; matplotlib and PIL where they are used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from dxmi_ext.engine.output import plots
from dxmi_ext.two_d.plots import EXTENT, plane, scatter

_COLUMNS = 9  # in a gallery


def gallery(path: plots.File, models: Sequence[tuple[str, Tensor, Tensor | None]]) -> None:
    """Samplers and their energies: a column each, at most nine side by side, samples above the energy.

    Args:
        models: title, samples [n, 2] and energies [size * size] at the points of ``grid(size)``, or None.
    """
    rows = math.ceil(len(models) / _COLUMNS)
    columns = math.ceil(len(models) / rows)
    with plots.figure(path, 2 * rows, columns, width=1.9, height=2.0) as axes:
        for axis in axes:
            axis.set_visible(False)
        for number, (title, points, energies) in enumerate(models):
            place = number + number // columns * columns
            above, below = axes[place], axes[place + columns]
            above.set_visible(True)
            scatter(above, points, plots.SAMPLES, size=1.2)
            plane(above, title, ticks=False)
            if energies is None:
                continue
            below.set_visible(True)
            size = round(energies.numel() ** 0.5)
            line = np.linspace(-EXTENT, EXTENT, size)
            below.contourf(
                line, line, plots.to_numpy(energies).reshape(size, size).T, levels=40, cmap="viridis_r"
            )
            plane(below, "", extent=EXTENT, ticks=False)


def curves(path: plots.File, lines: Mapping[str, Mapping[int, float]], heading: str) -> None:
    """A number over iterations, with a line for each method.

    Args:
        lines: method -> iteration -> the number.
    """
    with plots.figure(path, 1, 1, width=5.0, height=3.2) as axes:
        for name, line in lines.items():
            axes[0].plot(list(line), list(line.values()), label=name)
        axes[0].set_xlabel("iteration")
        axes[0].set_ylabel(heading)
        axes[0].legend()


def sweep(path: plots.File, labels: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """How numbers depend on a setting: a panel for each number, a dot for each run, a dash for a mean.

    Args:
        labels: values of the setting, from left to right; a common start up to a comma is not repeated.
        panels: name of a number -> its values at each label, from any number of runs.
    """
    heads, _, tails = zip(*(label.partition(", ") for label in labels), strict=True)
    if len(set(heads)) == 1 and all(tails):
        labels = tails
    with plots.figure(path, 1, len(panels), width=2.3, height=2.2) as axes:
        for axis, (title, columns) in zip(axes, panels.items(), strict=True):
            runs = [(x, y) for x, values in enumerate(columns) for y in values]
            means = [(x, np.mean(values)) for x, values in enumerate(columns) if len(values)]
            axis.plot(*zip(*means, strict=True), color=plots.SAMPLES, lw=0.6, marker="_", markersize=12)
            axis.scatter(*zip(*runs, strict=True), s=9, c=plots.SAMPLES, alpha=0.5, linewidths=0)
            heights = [y for _, y in runs]
            if min(heights) > 0 and max(heights) > 10 * min(heights):
                axis.set_yscale("log")
            axis.set_xlim(-0.4, len(labels) - 0.6)
            axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
            axis.set_title(title)
            axis.spines[["top", "right"]].set_visible(False)


def grids(path: plots.File, models: Sequence[tuple[str, Path]]) -> None:
    """Images side by side, four in a row; one at least twice as wide as high has two or four places.

    Args:
        models: title and path of each image.
    """
    from matplotlib.image import imread
    from PIL import Image

    pictures = [(title, imread(picture)) for title, picture in models]
    spans = [_span(*pixels.shape[:2]) for _, pixels in pictures]
    columns, row, column, places = min(4, sum(spans)), 0, 0, list[tuple[int, slice]]()
    for span in spans:
        if column + span > columns:
            row, column = row + 1, 0
        places.append((row, slice(column, column + span)))
        column += span
    heights = [2.3] * (row + 1)
    for (row, _), span in zip(places, spans, strict=True):
        heights[row] = 3.6 if span == 4 else 2.3
    drawn, rows = io.BytesIO(), len(heights)
    # 130 pixels an inch: about a pixel for each of theirs.
    with plots.figure(drawn, rows, columns, width=2.0, height=sum(heights) / rows, dpi=130) as axes:
        cells, page = axes[0].get_gridspec(), axes[0].figure
        cells.set_height_ratios(heights)
        for axis in axes:
            axis.remove()
        for place, span, (title, pixels) in zip(places, spans, pictures, strict=True):
            axis = page.add_subplot(cells[place])
            axis.imshow(pixels, interpolation="none" if span == 1 else "antialiased")
            axis.set_axis_off()
            axis.set_title(title)
    # 256 colors are a third of the bytes: noise does not compress.
    Image.open(drawn).convert("RGB").quantize().save(path, format="PNG")


def _span(height: int, width: int) -> int:
    """The number of places that an image of so many pixels has in a row of four."""
    if width < 2 * height:
        return 1
    return 2 if width <= 1200 else 4
