"""Heat maps of scores on images. Imports ``engine.output.plots``; matplotlib for the colors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dxmi_ext.engine.output import plots

_CONTOUR = (64, 224, 255)  # a color that inferno does not contain


def heatmaps(
    path: plots.File, pictures: Tensor, heat: Tensor, masks: Tensor | None, *, threshold: float | None = None
) -> None:
    """Writes a figure with a row of images, a row of their masks, and a row of their heat maps.

    Args:
        pictures: uint8 [n, 3, H, W].
        heat: scores of pixels [n, H, W]; those that are not finite, as of a diverging energy, get no color.
        masks: bool [n, H, W]; None: no row of masks.
        threshold: see `heat_map`; None: half the highest score.
    """
    heat = heat.nan_to_num(0.0, 0.0, 0.0)
    level = max(float(heat.max()) / 2, 1e-12) if threshold is None else threshold
    pairs = zip(pictures.permute(0, 2, 3, 1).numpy(), plots.to_numpy(heat), strict=True)
    overlays = np.stack([heat_map(picture, scores, level) for picture, scores in pairs])
    rows = [pictures, torch.from_numpy(overlays).permute(0, 3, 1, 2)]
    if masks is not None:
        rows.insert(1, 255 * masks[:, None].expand_as(pictures).to(torch.uint8))
    plots.images(path, torch.cat(rows), columns=len(pictures))


def heat_map(picture: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Overlays a gray image with the colors of its scores; a line surrounds regions above the threshold.

    Colors range from 0 (transparent) to twice the threshold, so heat maps of different images are comparable.

    Args:
        picture: uint8 [H, W, 3].
        scores: float32 [H, W], >= 0.
        threshold: threshold of pixels, > 0.

    Returns:
        uint8 [H, W, 3].
    """
    level = np.clip(scores / (2 * threshold), 0, 1)
    colors = np.array(heat_colors(256), np.float32)[np.round(255 * level).astype(np.int64)]
    gray = (picture @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    cover = (0.8 * level)[..., None]
    result = np.round((1 - cover) * gray + cover * colors).astype(np.uint8)
    above = scores > threshold
    width = max(1, round(min(above.shape) / 200))
    near = functional.max_pool2d(torch.from_numpy(above).float()[None], 2 * width + 1, 1, width)[0] > 0
    result[near.numpy() & ~above] = _CONTOUR
    return result


def heat_colors(n: int) -> list[tuple[int, int, int]]:
    """The colors of `heat_map` from 0 to twice the threshold: matplotlib's inferno, perceptually uniform."""
    import matplotlib

    colors = matplotlib.colormaps["inferno"](np.linspace(0, 1, n), bytes=True)
    return [(int(red), int(green), int(blue)) for red, green, blue, _ in colors]
