"""Synthetic defects in good images and good rows, to compare detectors without a test set.

Defects in images are a pasted patch, as in CutPaste (Li et al. 2021), a blob of noise, and a smooth shade.
Defective rows are mixtures of rows, or some of their values come from other rows or columns. Imports numpy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Picture = np.ndarray
"""uint8 [3, H, W]"""
Defect = tuple[Picture, np.ndarray]
"""An image with a defect, and the pixels of the defect, bool [H, W]."""

_LARGEST = 0.1  # largest share of an image that a defect covers
_SMALLEST = 0.003
_SHARE = (0.1, 0.5)  # share of the columns of a row that are changed


def defective(images: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Copies of each image with every kind of defect, drawn from (seed, image, kind).

    Args:
        images: good images, uint8 [n, 3, H, W].

    Returns:
        The images, uint8 [kinds, n, 3, H, W], and the pixels of their defects, bool [kinds, n, H, W].
    """
    kinds: tuple[Callable[[Picture, Picture, np.random.Generator], Defect], ...] = (_patch, _noise, _shade)
    made = np.empty((len(kinds), *images.shape), np.uint8)
    masks = np.empty((len(kinds), len(images), *images.shape[2:]), bool)
    for kind, draw in enumerate(kinds):
        for i, image in enumerate(images):
            rng = np.random.default_rng((seed, i, kind))
            made[kind, i], masks[kind, i] = draw(image, images[rng.integers(len(images))], rng)
    return made, masks


def odd_rows(rows: np.ndarray, mean: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """One defective row of every kind for each row, in the units of the columns.

    - A mixture of two or three rows, weighted so that mean and covariance stay those of good rows: a
      Gaussian model does not detect it, but it is between the classes.
    - A row with a share of its values from other rows: all from the same row, or each from a random row.
    - A row with a share of its values permuted.

    Args:
        rows: good rows, float64 [n, d].
        mean: mean of good rows [d].

    Returns:
        float64 [kinds, n, d]
    """
    n, d = rows.shape
    rng = np.random.default_rng((seed, n))

    def others() -> np.ndarray:
        """The index of another row for each row, if there are several."""
        return (np.arange(n) + rng.integers(1, max(n, 2), n)) % n

    weights = rng.dirichlet((4, 4, 4), n)
    weights[rng.random(n) < 0.5, 2] = 0
    weights = np.sqrt(weights / weights.sum(1, keepdims=True))
    parts = (rows, rows[others()], rows[others()])
    mixed = mean + sum(w[:, None] * (part - mean) for w, part in zip(weights.T, parts, strict=True))

    changed = rng.random((n, d)) < rng.uniform(*_SHARE, (n, 1))
    many = np.take_along_axis(rows, rng.integers(0, n, (n, d)), axis=0)
    source = np.where(rng.random((n, 1)) < 0.5, rows[others()], many)
    moved = rows.copy()
    for row in moved:
        places = rng.permutation(d)[: max(2, round(d * rng.uniform(*_SHARE)))]
        row[places] = row[rng.permutation(places)]
    return np.stack((mixed, np.where(changed, source, rows), moved))


def _patch(image: Picture, other: Picture, rng: np.random.Generator) -> Defect:
    """Pastes a rectangle from elsewhere in the image, or from another image."""
    made, mask = image.copy(), np.zeros(image.shape[1:], bool)
    height, width = image.shape[1:]
    share, aspect = _share(rng), np.exp(rng.uniform(-1.5, 1.5))
    h = int(np.clip(np.sqrt(share * aspect) * height, 1, height))
    w = int(np.clip(np.sqrt(share / aspect) * width, 1, width))
    source = other if rng.random() < 0.5 else image
    (y, to_y), (x, to_x) = (rng.integers(0, size, 2) for size in (height - h + 1, width - w + 1))
    made[:, to_y : to_y + h, to_x : to_x + w] = source[:, y : y + h, x : x + w]
    mask[to_y : to_y + h, to_x : to_x + w] = True
    return made, mask


def _noise(image: Picture, _: Picture, rng: np.random.Generator) -> Defect:
    """Adds gray noise, coarse or fine, within a blob."""
    height, width = image.shape[1:]
    grain = int(rng.integers(1, 5))
    noise = rng.normal(0, rng.uniform(15, 60), (-(-height // grain), -(-width // grain)))
    noise = noise.repeat(grain, 0).repeat(grain, 1)[:height, :width]
    return _added(image, noise, _blob(height, width, rng))


def _shade(image: Picture, _: Picture, rng: np.random.Generator) -> Defect:
    """Adds a smooth spot, brighter or darker."""
    height, width = image.shape[1:]
    depth = rng.uniform(20, 80) * rng.choice((-1, 1))
    return _added(image, depth, _blob(height, width, rng))


def _blob(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A rotated ellipse with soft edges, from 0 to 1: float64 [height, width]."""
    share, aspect = _share(rng), np.exp(rng.uniform(-1, 1))
    y, x = rng.random(2)
    angle = rng.uniform(0, np.pi)
    rows, columns = np.mgrid[:height, :width] / (np.array([height, width]) - 0.999)[:, None, None]
    u = np.cos(angle) * (rows - y) + np.sin(angle) * (columns - x)
    v = np.cos(angle) * (columns - x) - np.sin(angle) * (rows - y)
    radius = np.sqrt(share / np.pi)
    sq = (u / (radius * np.sqrt(aspect))) ** 2 + (v / (radius / np.sqrt(aspect))) ** 2
    return np.exp(-((sq / 1.5) ** 2))


def _share(rng: np.random.Generator) -> float:
    """The share of an image that a defect covers, drawn uniformly on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST))))


def _added(image: Picture, change: np.ndarray | float, blob: np.ndarray) -> Defect:
    """Adds a change within a blob; its pixels are those where the blob has at least half its height."""
    made = np.clip(image + (change * blob).round(), 0, 255).astype(np.uint8)
    return made, blob >= 0.5
