"""Frozen networks that map an image to a feature map with a point on the unit sphere at each position.

A backbone is an `Extractor` with features [n, C, h, w]. Nothing is downloaded: weights come from an installed
package or a file. Imports torch and ``dxmi_ext.images.metrics.features``; efficientnet-lite-pytorch, or
timm (which pulls torchvision) and safetensors, where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.images.metrics.features import Extractor, FeatureError, efficientnet_lite0_network

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONES = ("efflite0", "efflite0_deep", "efficientnet_b4")
_RAW = "-raw"
_PAPER, _DEEP = (0, 2, 4, 10), (4, 10, 14)


def load(
    spec: str,
    *,
    size: int = 224,
    grid: int = 14,
    normalize: bool = True,
    weights: Path | str | None = None,
) -> Extractor:
    """The backbone with a name in BACKBONES.

    Args:
        size, grid, normalize: see `backbone`.
        weights: file of efficientnet_b4's weights; those of efflite0 are installed with its package.

    Raises:
        FeatureError: the name is unknown, or packages or weights are missing.
    """
    if spec == "efflite0":
        return efflite0(size=size, grid=grid, normalize=normalize)
    if spec == "efflite0_deep":
        return efflite0(size=size, grid=grid, normalize=normalize, blocks=_DEEP)
    if spec == "efficientnet_b4":
        return efficientnet_b4(weights, size=size, grid=grid, normalize=normalize)
    raise FeatureError(f"backbone must be one of {', '.join(BACKBONES)}, got {spec!r}")


def backbone(
    network: nn.Module,
    name: str,
    *,
    size: int = 224,
    grid: int = 14,
    mean: Sequence[float] = _IMAGENET[0],
    std: Sequence[float] = _IMAGENET[1],
    normalize: bool = True,
) -> Extractor:
    """Makes a backbone from any network.

    Args:
        network: images [n, 3, size, size] -> one map [n, C, h, w], or several with any C, h and w.
        name: name of the backbone in the cache, which also identifies it by its weights.
        size: height and width to which images are resized (bicubic, antialiased when they shrink).
        grid: height and width of the maps; the network's maps are resized (averaged over areas when they
            shrink, bilinear when they grow) and concatenated.
        mean, std: mean and standard deviation per channel of the values in [0, 1] that the network expects.
        normalize: whether each position is scaled to unit length (DxMI, sec. 5.3).
    """
    if size < 1 or grid < 1:
        raise FeatureError(f"size and grid must be >= 1, got {size} and {grid}")
    name = f"{name}-maps{size}to{grid}" + ("" if normalize else _RAW)
    return Extractor(_Maps(network, size, grid, mean, std, normalize), name)


def is_normalized(identity: str) -> bool:
    """Whether the backbone with this `Extractor.identity` scales its features to unit length."""
    return f"{_RAW}-" not in identity


def efflite0(
    *, size: int = 224, grid: int = 14, normalize: bool = True, blocks: Sequence[int] = _PAPER
) -> Extractor:
    """EfficientNet-lite0's stages with reductions 2, 4, 8 and 16: 16 + 24 + 40 + 112 = 192 channels.

    They correspond to the stages of b4. The extra ``images`` installs the weights.

    Args:
        blocks: indices of the blocks (0 to 15) whose outputs are the maps, ascending. efflite0_deep has 4, 10
            and 14, with reductions 8, 16 and 32: 40 + 112 + 192 = 344 channels.

    Raises:
        FeatureError: its packages are not installed, or the blocks are invalid.
    """
    if not blocks or list(blocks) != sorted({*blocks} & {*range(16)}):
        raise FeatureError(f"blocks must be distinct, from 0 to 15 and ascending, got {list(blocks)}")
    network = _Lite0(efficientnet_lite0_network(size), blocks)
    name = "efflite0" + ("" if tuple(blocks) == _PAPER else "-" + ".".join(map(str, blocks)))
    scale = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    return backbone(network, name, size=size, grid=grid, normalize=normalize, **scale)


def efficientnet_b4(
    weights: Path | str | None, *, size: int = 224, grid: int = 14, normalize: bool = True
) -> Extractor:
    """EfficientNet-b4's stages 1 to 4: 24 + 32 + 56 + 160 = 272 channels, as in DxMI, sec. 5.3.

    Args:
        weights: safetensors file of timm's tf_efficientnet_b4, with or without the classifier, such as
            model.safetensors of timm/tf_efficientnet_b4.ns_jft_in1k.

    Raises:
        FeatureError: timm is not installed, or the file is missing or contains another network.
    """
    if weights is None or not (path := Path(weights).expanduser()).is_file():
        raise FeatureError(
            "weights must be the safetensors file of timm's tf_efficientnet_b4 with "
            f"backbone=efficientnet_b4, got {weights}"
        )
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises the latter
        raise FeatureError(f"backbone=efficientnet_b4 requires timm and its torchvision: {error}") from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = timm.create_model(
        "tf_efficientnet_b4", pretrained=False, features_only=True, out_indices=(0, 1, 2, 3)
    )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FeatureError(f"{path}: is not a safetensors file ({error})") from error
    wanted = network.state_dict()
    wrong = [k for k, v in wanted.items() if k not in tensors or tensors[k].shape != v.shape]
    if wrong:
        raise FeatureError(
            f"{path}: is not of tf_efficientnet_b4; {wrong[0]} is missing or has a wrong shape"
        )
    network.load_state_dict({key: tensors[key] for key in wanted})
    return backbone(network, "efficientnet_b4", size=size, grid=grid, normalize=normalize)


class _Maps(nn.Module):
    """uint8 images [n, 3, H, W] -> maps [n, C, grid, grid]."""

    def __init__(
        self,
        network: nn.Module,
        size: int,
        grid: int,
        mean: Sequence[float],
        std: Sequence[float],
        normalize: bool,
    ) -> None:
        super().__init__()
        self.network, self.size, self.grid, self.normalize = network, size, grid, normalize
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x, size = images.float() / 255, (self.size, self.size)
        if images.shape[2:] != size:
            shrinks = max(images.shape[2:]) > self.size
            x = F.interpolate(x, size, mode="bicubic", antialias=shrinks).clamp(0, 1)
        maps = self.network((x - self.mean) / self.std)
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        for stage in maps:
            if not isinstance(stage, Tensor) or stage.ndim != 4:
                got = list(stage.shape) if isinstance(stage, Tensor) else type(stage).__name__
                raise FeatureError(f"the backbone must return maps [n, C, h, w], got {got}")
        features = torch.cat([self._resized(stage) for stage in maps], dim=1)
        return F.normalize(features, dim=1) if self.normalize else features

    def _resized(self, stage: Tensor) -> Tensor:
        grid = (self.grid, self.grid)
        if min(stage.shape[2:]) >= self.grid:
            return F.adaptive_avg_pool2d(stage, grid)
        return F.interpolate(stage, grid, mode="bilinear", align_corners=False)


class _Lite0(nn.Module):
    """EfficientNet-lite0: images -> the outputs of the chosen blocks."""

    def __init__(self, network: Any, blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem, self.norm, self.activation = network._conv_stem, network._bn0, network._swish
        self.blocks, self.given = network._blocks[: blocks[-1] + 1], frozenset(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.activation(self.norm(self.stem(x))), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.given:
                maps.append(x)
        return maps
