"""Plots of any run, image grids and learning curves, and helpers for other figures.

Imports torch, numpy and the engine; matplotlib (extra ``train``) and PIL where they are used. No display is
required.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.storage import folders

File = str | Path | IO[bytes]
INK, DATA, SAMPLES, ACCENT = "#1f2933", "#52606d", "#1673b8", "#d1571f"
_PHASES = (SAMPLES, ACCENT, "#2f8f5b", "#7b4fa3")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlepad": 6,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": DATA,
    "ytick.color": DATA,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
}


def curves(path: File, metrics_jsonl: str | Path) -> None:
    """Learning curves of a run, one panel per metric and phase: as logged (faint) and a running mean (bold).
    A metric of the sampler's steps has a line for each, the last one the palest.

    Writes nothing if nothing was logged.
    """
    series: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for row in runlog.read_metrics(metrics_jsonl):
        phase, iteration = row.pop("phase"), row.pop("iteration")
        row.pop("symptoms", None)
        for name, value in row.items():
            series.setdefault((phase, name), []).append((iteration, value))
    even = {key for key, points in series.items() if len({np.size(value) for _, value in points}) == 1}
    series = {key: points for key, points in series.items() if key in even}
    if not series:
        return
    phases = list(dict.fromkeys(phase for phase, _ in series))
    columns = min(4, len(series))
    rows = -(-len(series) // columns)
    with figure(path, rows, columns, width=2.3, height=1.6) as axes:
        for axis, ((phase, name), points) in zip(axes, series.items(), strict=False):
            iterations, values = zip(*points, strict=True)
            color = _PHASES[phases.index(phase) % len(_PHASES)]
            lines = np.array(values, dtype=float).reshape(len(points), -1).T  # None becomes nan
            for t, line in enumerate(lines):  # later steps fainter
                strength = 1 - 0.8 * t / len(lines)
                axis.plot(iterations, line, color=color, lw=0.6, alpha=0.3 * strength)
                axis.plot(iterations, _smooth(line), color=color, lw=1.3, alpha=strength)
            axis.set_title(f"{phase}: {name}")
            axis.xaxis.set_major_locator(ticker().MaxNLocator(4))
            axis.yaxis.set_major_locator(ticker().MaxNLocator(4))
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[len(series) :]:
            axis.set_visible(False)


def images(path: File, images: Tensor, *, columns: int | None = None) -> None:
    """A grid of images as a png, without scaling, row by row.

    Args:
        images: [n, C, H, W] with C 1 or 3; uint8, or values in [-1, 1], clipped.
        columns: number of columns; None: as for a square grid.

    Raises:
        ValueError: there are no images, or they have another shape.
    """
    from PIL import Image, PngImagePlugin

    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images must be [n, C, H, W] with C 1 or 3, got shape {list(images.shape)}")
    n, _, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    gap = 2
    canvas = np.full(
        (gap + -(-n // columns) * (height + gap), gap + columns * (width + gap), 3), 255, dtype=np.uint8
    )
    pixels = (images if images.dtype == torch.uint8 else to_uint8(images)).detach().cpu()
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image  # broadcasts one channel to three
    text = PngImagePlugin.PngInfo()
    text.add_text(*folders.PICTURE_TEXT)  # so that it may be overwritten
    Image.fromarray(canvas).save(path, format="PNG", pnginfo=text)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], clipped and rounded to uint8, as they are stored and evaluated."""
    return (images.float() * 127.5 + 128).clamp_(0, 255).to(torch.uint8)


@contextmanager
def figure(
    path: File, rows: int, columns: int, *, width: float, height: float, dpi: int = 200
) -> Iterator[list[Any]]:
    """Panels of width x height inches, written to ``path`` at the end, without pyplot's global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(columns * width, rows * height), dpi=dpi, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        figure.savefig(path, bbox_inches="tight", pad_inches=0.06)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the curve."""
    window = max(1, len(values) // 50)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.full(window, 1 / window), mode="valid")


def ticker() -> Any:
    from matplotlib import ticker

    return ticker


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
