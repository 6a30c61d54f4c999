"""How well an energy separates test images from others. Imports the engine, the method and ``two_d``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dxmi_ext import ops
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.data import dataset
from dxmi_ext.images.data.dataset import ImageData
from dxmi_ext.images.data.layouts import SplitMissing
from dxmi_ext.images.model import classes_of
from dxmi_ext.method import noise
from dxmi_ext.method.networks import Networks
from dxmi_ext.two_d.metrics import energy_auroc

_BLUR = 1.0  # the standard deviation of the blur, in pixels
_BATCH = 250


def separation(
    networks: Networks,
    test: ImageData,
    others: str,
    n: int,
    *,
    seed: int,
    device: torch.device,
    size: int | None = None,
    cache: str | None = None,
) -> dict[str, float]:
    """AUROC of the energy for n test images against as many others; 1 if all others have higher energies.

    Args:
        others: kinds of images, separated by commas: noise, uniform pixels; blurred, the test images blurred
            by a Gaussian of one pixel; or the path of other images of the same shape, of which the test split
            is used if there is one.
        n: maximum number of images of each kind; of more, a fixed random subset is used.
        seed: seed of the noise.
        size, cache: see `dataset.load`; for images at a path.

    Returns:
        auroc_noise, auroc_blurred, and for a path auroc_NAME, where NAME is its last part.

    Raises:
        ConfigError: the energy is conditional on classes, images at a path have another shape, or two kinds
            have the same name.
    """
    if classes_of(networks.sampler) is not None:
        raise ConfigError("against must be null for a run that is conditional on classes")
    energies = _energies(networks, _images(test, n, device))
    found = {}
    for kind in map(str.strip, others.split(",")):
        if (name := f"auroc_{Path(kind).stem}") in found:
            raise ConfigError(f"against must name images with different names, got {others}")
        if kind == "noise":
            images = _noise(len(energies), test.shape, seed, device)
        elif kind == "blurred":
            images = map(_blurred, _images(test, n, device))
        else:
            images = _images(_load(kind, test, size, cache), n, device)
        found[name] = energy_auroc(energies, _energies(networks, images))
    return found


@torch.no_grad()
def _energies(networks: Networks, batches: Iterator[Tensor]) -> Tensor:
    return torch.cat([networks.energy(batch) for batch in batches])


def _images(data: ImageData, n: int, device: torch.device) -> Iterator[Tensor]:
    n = min(n, len(data))
    for i in range(-(-n // _BATCH)):
        count = min(_BATCH, n - i * _BATCH)
        yield data.batch(i, _BATCH, count=count, stream="metrics", device=device)[0]


def _noise(n: int, shape: tuple[int, ...], seed: int, device: torch.device) -> Iterator[Tensor]:
    """Uniform in [-1, 1]: the normal distribution function of keyed noise."""
    key = noise.Draws(seed, "separation", ["noise"], device).at(0)["noise"]
    for first in range(0, n, _BATCH):
        normal = ops.normal((min(_BATCH, n - first), *shape), key, sample_offset=first)
        yield torch.erf(normal / math.sqrt(2))


def _blurred(images: Tensor) -> Tensor:
    reach = math.ceil(3 * _BLUR)
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / _BLUR) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    across = F.conv2d(padded, kernel, groups=images.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=images.shape[1])


def _load(path: str, test: ImageData, size: int | None, cache: str | None) -> ImageData:
    """Other images of the same shape, read with the scale of the test images."""
    try:
        data = dataset.load(path, split="test", size=size, cache=cache, scale=test.scale)
    except SplitMissing:  # a collection without splits
        data = dataset.load(path, size=size, cache=cache, scale=test.scale)
    if data.shape != test.shape:
        raise ConfigError(f"against must be images of shape {[*test.shape]}, got {path} of {[*data.shape]}")
    return data
