"""What `anomalib.DxMI` puts around its model: resizing by Pillow, its own thresholds, maps of energies.

Requires the extras ``anomalib`` and ``images``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode, Resize

from dxmi_ext.anomaly.data.dataset import resized
from dxmi_ext.anomaly.scores.scoring import ScoreError


class WholeImages(PreProcessor):
    """Resizes whole images with Pillow (bicubic, antialiased, 8 bits), as ``dxmi`` does.

    Args:
        size: height and width.
    """

    def __init__(self, size: int) -> None:
        super().__init__(_PillowResize(size))
        self.export_transform = None  # ONNX has no such operation; outside the Engine, the model resizes

    def checkpoint_config(self) -> dict[str, Any]:
        """Returns an empty dictionary, because the model's settings contain the size."""
        return {}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Does nothing; see `checkpoint_config`."""


class _PillowResize(Resize):
    """A ``Resize``, so that data modules find it and apply it before collating."""

    def __init__(self, size: int) -> None:
        super().__init__((size, size), interpolation=InterpolationMode.BICUBIC, antialias=True)

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        size = self.size[0]
        if inpt.shape[-2:] == (size, size):
            return inpt
        if isinstance(inpt, tv_tensors.Mask):  # nearest-exact is Pillow's NEAREST
            rows = inpt.as_subclass(Tensor).reshape(-1, 1, *inpt.shape[-2:])
            mask = F.interpolate(rows.to(torch.uint8), (size, size), mode="nearest-exact")
            changed = mask.to(inpt.dtype).reshape(*inpt.shape[:-2], size, size)
        else:
            changed = resized_images(to_uint8(inpt), size).float() / 255
        return tv_tensors.wrap(changed, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else changed


class OwnThresholds(PostProcessor):
    """Keeps scores unchanged; labels and masks use the detector's own thresholds."""

    def __init__(self) -> None:
        super().__init__(enable_normalization=False)

    def set(self, threshold: float, pixel_threshold: float) -> None:
        """Sets the thresholds of a `Scorer`."""
        self._image_threshold.fill_(threshold)
        self._pixel_threshold.fill_(pixel_threshold)

    @property
    def normalized_image_threshold(self) -> Tensor:
        return self._image_threshold

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        return self._pixel_threshold

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: thresholds do not depend on validation images."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: thresholds do not depend on validation images."""


class Visualizer(ImageVisualizer):
    """Scales energy maps for display so that twice the threshold becomes 1; anomalib expects [0, 1]."""

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        energies, after = batch.anomaly_map, pl_module.post_processor
        if isinstance(after, OwnThresholds):
            batch.anomaly_map = (energies / (2 * after.pixel_threshold)).clamp(0, 1)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
        batch.anomaly_map = energies


def to_uint8(images: Tensor) -> Tensor:
    """Converts anomalib's images in [0, 1] back to the 8 bits in which they were read.

    Raises:
        ScoreError: values are far outside [0, 1].
    """
    if isinstance(images, tv_tensors.TVTensor):
        images = images.as_subclass(Tensor)
    if images.dtype == torch.uint8:
        return images
    if not torch.compiler.is_compiling() and images.numel():
        low, high = (float(x) for x in images.aminmax())
        if not (low > -0.25 and high < 1.25):  # bicubic resizing of floats may overshoot
            raise ScoreError(
                f"images must have values in [0, 1], got {low:.3g} to {high:.3g}; the pre_processor must not "
                "normalize them"
            )
    return (255 * images.clamp(0, 1)).round().to(torch.uint8)


def resized_images(images: Tensor, size: int) -> Tensor:
    """uint8 [..., 3, H, W] -> [..., 3, size, size], resized with Pillow on the CPU as in `dataset.load`."""
    if images.shape[-2:] == (size, size):
        return images
    rows = images.cpu().reshape(-1, *images.shape[-3:]).permute(0, 2, 3, 1).contiguous().numpy()
    small = torch.from_numpy(np.stack([resized(row, size) for row in rows]))
    return small.permute(0, 3, 1, 2).reshape(*images.shape[:-2], size, size).to(images.device)
