"""Pictures of a run, drawn from points, images and numbers alone; no network enters here.

Imports torch, numpy and of ``dxmi_ext`` folders, runlog and data.images; matplotlib (extra ``train``) and its
dependency PIL where used, without a display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dxmi_ext import folders, runlog
from dxmi_ext.data.images import to_uint8

_File = str | Path | IO[bytes]
_EXTENT = 4.0  # energies and the uniform points of AUROC live on [-4, 4]^2
_MARGIN = 4.6  # what is shown: samples stray beyond
_INK, _DATA, _SAMPLES, _ACCENT = "#1f2933", "#52606d", "#1673b8", "#d1571f"
_CONTOUR = (64, 224, 255)  # of a colour that inferno lacks
_COLUMNS = 9  # of a gallery
_PHASES = (_SAMPLES, _ACCENT, "#2f8f5b", "#7b4fa3")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlepad": 6,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.6,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _DATA,
    "ytick.color": _DATA,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
}


def samples(path: _File, data: Tensor, samples: Tensor) -> None:
    """Data and samples, both [n, 2], side by side."""
    with _figure(path, 1, 2, width=2.9, height=2.9) as axes:
        for axis, points, title, colour in zip(
            axes, (data, samples), ("data", "samples"), (_DATA, _SAMPLES), strict=True
        ):
            _scatter(axis, points, colour)
            _plane(axis, title)


def grid(size: int = 200) -> Tensor:
    """The points [size * size, 2] over [-4, 4]^2 whose energies ``energy`` takes, in that order."""
    line = torch.linspace(-_EXTENT, _EXTENT, size)
    return torch.cartesian_prod(line, line)


def energy(path: _File, energies: Tensor, points: Tensor, *, title: str = "energy") -> None:
    """The energy as a filled contour, with points on top.

    Args:
        energies: [size * size], at the points of ``grid(size)``.
        points: [n, 2], few of the data or all of the samples.
    """
    size = round(energies.numel() ** 0.5)
    line = np.linspace(-_EXTENT, _EXTENT, size)
    with _figure(path, 1, 1, width=3.9, height=3.3) as axes:
        values = _numpy(energies).reshape(size, size).T
        filled = axes[0].contourf(line, line, values, levels=40, cmap="viridis_r")
        axes[0].contour(line, line, values, levels=10, colors="white", linewidths=0.3, alpha=0.5)
        _scatter(axes[0], points, "white", size=2.5, alpha=0.9)
        _plane(axes[0], title, extent=_EXTENT)
        bar = axes[0].figure.colorbar(filled, ax=axes[0], shrink=0.9, pad=0.03, aspect=25)
        bar.outline.set_visible(False)
        bar.locator = _ticker().MaxNLocator(5)
        bar.update_ticks()


def paths(path: str | Path, trajectory: Tensor, *, lines: int = 50) -> None:
    """The way of the particles from noise to data: one panel a step, thin lines where they have been.

    Args:
        trajectory: [T + 1, n, 2]; of more than 11, so many evenly spaced are drawn.
        lines: number of particles whose way is drawn.
    """
    way = _numpy(trajectory[:, :lines])
    shown = np.unique(np.linspace(0, len(way) - 1, 11).round().astype(int)).tolist()
    with _figure(path, 1, len(shown), width=1.75, height=1.95) as axes:
        for t, axis in zip(shown, axes, strict=True):
            _scatter(axis, trajectory[t], _SAMPLES, size=1.5, alpha=0.3)
            axis.plot(way[: t + 1, :, 0], way[: t + 1, :, 1], color=_ACCENT, lw=0.35, alpha=0.6)
            _scatter(axis, trajectory[t, :lines], _ACCENT, size=2.5, alpha=1.0)
            _plane(axis, f"$t = {t}$", ticks=False)


def curves(path: _File, metrics_jsonl: str | Path) -> None:
    """Learning curves of a run: one panel a metric and phase; faint as logged, bold a running mean. A metric
    of the sampler's steps has a line for each, the last one's the palest.

    Makes no picture where nothing was logged.
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
    with _figure(path, rows, columns, width=2.3, height=1.6) as axes:
        for axis, ((phase, name), points) in zip(axes, series.items(), strict=False):
            iterations, values = zip(*points, strict=True)
            colour = _PHASES[phases.index(phase) % len(_PHASES)]
            lines = np.array(values, dtype=float).reshape(len(points), -1).T  # None becomes nan
            for t, line in enumerate(lines):  # later steps fainter
                strength = 1 - 0.8 * t / len(lines)
                axis.plot(iterations, line, color=colour, lw=0.6, alpha=0.3 * strength)
                axis.plot(iterations, _smooth(line), color=colour, lw=1.3, alpha=strength)
            axis.set_title(f"{phase}: {name}")
            axis.xaxis.set_major_locator(_ticker().MaxNLocator(4))
            axis.yaxis.set_major_locator(_ticker().MaxNLocator(4))
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[len(series) :]:
            axis.set_visible(False)


def gallery(path: _File, models: Sequence[tuple[str, Tensor, Tensor | None]]) -> None:
    """Samplers and their energies: a column each, at most nine side by side, samples above the energy.

    Args:
        models: title, samples [n, 2] and energies [size * size] at the points of ``grid(size)``, or None.
    """
    rows = math.ceil(len(models) / _COLUMNS)
    columns = math.ceil(len(models) / rows)
    with _figure(path, 2 * rows, columns, width=1.9, height=2.0) as axes:
        for axis in axes:
            axis.set_visible(False)
        for number, (title, points, energies) in enumerate(models):
            place = number + number // columns * columns
            above, below = axes[place], axes[place + columns]
            above.set_visible(True)
            _scatter(above, points, _SAMPLES, size=1.2)
            _plane(above, title, ticks=False)
            if energies is None:
                continue
            below.set_visible(True)
            size = round(energies.numel() ** 0.5)
            line = np.linspace(-_EXTENT, _EXTENT, size)
            below.contourf(line, line, _numpy(energies).reshape(size, size).T, levels=40, cmap="viridis_r")
            _plane(below, "", extent=_EXTENT, ticks=False)


def sweep(path: _File, labels: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """How numbers change with a setting: a panel a number, a dot a run, a dash a mean.

    Args:
        labels: of what the setting was, from left to right; how all begin, up to a comma, is not repeated.
        panels: name of a number -> what it came to at each label, of no run or several.
    """
    heads, _, tails = zip(*(label.partition(", ") for label in labels), strict=True)
    if len(set(heads)) == 1 and all(tails):
        labels = tails
    with _figure(path, 1, len(panels), width=2.3, height=2.2) as axes:
        for axis, (title, columns) in zip(axes, panels.items(), strict=True):
            runs = [(x, y) for x, values in enumerate(columns) for y in values]
            means = [(x, np.mean(values)) for x, values in enumerate(columns) if len(values)]
            axis.plot(*zip(*means, strict=True), color=_SAMPLES, lw=0.6, marker="_", markersize=12)
            axis.scatter(*zip(*runs, strict=True), s=9, c=_SAMPLES, alpha=0.5, linewidths=0)
            heights = [y for _, y in runs]
            if min(heights) > 0 and max(heights) > 10 * min(heights):
                axis.set_yscale("log")
            axis.set_xlim(-0.4, len(labels) - 0.6)
            axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
            axis.set_title(title)
            axis.spines[["top", "right"]].set_visible(False)


def grids(path: _File, models: Sequence[tuple[str, Path]]) -> None:
    """Pictures side by side, four a row.

    Args:
        models: title and picture, as of ``images``.
    """
    from matplotlib.image import imread
    from PIL import Image

    drawn = io.BytesIO()
    columns = min(4, len(models))
    # 130 pixels an inch: about a pixel for each of theirs.
    with _figure(drawn, -(-len(models) // columns), columns, width=2.0, height=2.3, dpi=130) as axes:
        for axis in axes:
            axis.set_axis_off()
        for axis, (title, picture) in zip(axes, models, strict=False):
            axis.imshow(imread(picture), interpolation="none")
            axis.set_title(title)
    # 256 colours are a third of the bytes: noise does not compress.
    Image.open(drawn).convert("RGB").quantize().save(path, format="PNG")


def heatmaps(
    path: _File, pictures: Tensor, heat: Tensor, masks: Tensor | None, *, threshold: float | None = None
) -> None:
    """Pictures in a row, below them where their defects are, and each under the colours of its scores.

    Args:
        pictures: uint8 [n, 3, H, W].
        heat: scores of pixels [n, H, W].
        masks: bool [n, H, W]; None: no such row.
        threshold: as of `heat_map`; None: half the highest score.
    """
    level = max(float(heat.max()) / 2, 1e-12) if threshold is None else threshold
    pairs = zip(pictures.permute(0, 2, 3, 1).numpy(), _numpy(heat), strict=True)
    overlays = np.stack([heat_map(picture, scores, level) for picture, scores in pairs])
    rows = [pictures, torch.from_numpy(overlays).permute(0, 3, 1, 2)]
    if masks is not None:
        rows.insert(1, 255 * masks[:, None].expand_as(pictures).to(torch.uint8))
    images(path, torch.cat(rows), columns=len(pictures))


def images(path: _File, images: Tensor, *, columns: int | None = None) -> None:
    """A grid of images as a png, a pixel each, row by row.

    Args:
        images: [n, C, H, W] with C 1 or 3; uint8, or values in [-1, 1], others clipped.
        columns: of the grid; None: as many as make it square.

    Raises:
        ValueError: no images, or of another shape.
    """
    from PIL import Image, PngImagePlugin

    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images: got shape {list(images.shape)}, wants [n, C, H, W] with C 1 or 3")
    n, _, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    gap = 2
    canvas = np.full(
        (gap + -(-n // columns) * (height + gap), gap + columns * (width + gap), 3), 255, dtype=np.uint8
    )
    pixels = (images if images.dtype == torch.uint8 else to_uint8(images)).detach().cpu()
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image  # one channel becomes three
    text = PngImagePlugin.PngInfo()
    text.add_text(*folders.PICTURE_TEXT)  # so that it may be written over
    Image.fromarray(canvas).save(path, format="PNG", pnginfo=text)


def heat_map(picture: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """A picture in grey under the colours of its scores; a line surrounds what is above the threshold.

    Colours run from 0, where nothing covers the picture, to 2 thresholds: they compare between pictures.

    Args:
        picture: uint8 [H, W, 3].
        scores: float32 [H, W], 0 or more.
        threshold: of pixels, above 0.

    Returns:
        uint8 [H, W, 3].
    """
    level = np.clip(scores / (2 * threshold), 0, 1)
    colours = np.array(heat_colours(256), np.float32)[np.round(255 * level).astype(np.int64)]
    grey = (picture @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    cover = (0.8 * level)[..., None]
    result = np.round((1 - cover) * grey + cover * colours).astype(np.uint8)
    above = scores > threshold
    width = max(1, round(min(above.shape) / 200))
    near = functional.max_pool2d(torch.from_numpy(above).float()[None], 2 * width + 1, 1, width)[0] > 0
    result[near.numpy() & ~above] = _CONTOUR
    return result


def heat_colours(n: int) -> list[tuple[int, int, int]]:
    """The colours of `heat_map` from 0 to 2 thresholds: matplotlib's inferno, whose steps look even."""
    import matplotlib

    colours = matplotlib.colormaps["inferno"](np.linspace(0, 1, n), bytes=True)
    return [(int(red), int(green), int(blue)) for red, green, blue, _ in colours]


@contextmanager
def _figure(
    path: _File, rows: int, columns: int, *, width: float, height: float, dpi: int = 200
) -> Iterator[list[Any]]:
    """Panels of width x height inches; written to ``path`` at the end. No pyplot: no state, no display."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(columns * width, rows * height), dpi=dpi, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        figure.savefig(path, bbox_inches="tight", pad_inches=0.06)


def _scatter(axis: Any, points: Tensor, colour: str, *, size: float = 2.0, alpha: float = 0.35) -> None:
    axis.scatter(*_numpy(points).T, s=size, c=colour, alpha=alpha, linewidths=0)


def _plane(axis: Any, title: str, *, extent: float = _MARGIN, ticks: bool = True) -> None:
    axis.set(title=title, xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    axis.set(xticks=[-4, -2, 0, 2, 4] if ticks else [], yticks=[-4, -2, 0, 2, 4] if ticks else [])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the curve."""
    window = max(1, len(values) // 50)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.full(window, 1 / window), mode="valid")


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
