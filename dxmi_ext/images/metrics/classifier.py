"""A small classifier of a data set's classes, whose features are used by metrics.

ImageNet features are a poor fit for small gray images; a classifier of the data set itself is more sensitive.
It is trained once, with a fixed seed, and cached. Imports torch and ``dxmi_ext``; safetensors where weights
are read and written.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data.dataset import ImageData, default_cache, making, to_dtype
from dxmi_ext.images.metrics.features import Extractor, FeatureError

NAME = "classifier"
_FORMAT = 1  # format of a cached classifier: architecture and training
_WIDTHS = (32, 64, 128)
_STEPS, _BATCH, _LR = 1500, 128, 2e-3
_HELD_OUT = 10  # a tenth of the images is held out to measure the accuracy


class Features(nn.Module):
    """uint8 images [n, 3, H, W] -> features [n, 128]: six convolutions and a mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(to_dtype(images, torch.float32))
        return features.mean(dim=(2, 3))


def extractor(data: ImageData, *, cache: Path | str | None = None) -> Extractor:
    """The features of a classifier of the data's classes, which is trained or read from the cache.

    Args:
        data: training images with labels of two or more classes.
        cache: folder of the cache, by default that of decoded images. An entry depends on the images and
            their labels; it may be deleted.

    Raises:
        FeatureError: the images have no labels, or only one class.
    """
    check(data)
    assert data.labels is not None
    labels = hashlib.blake2b(data.labels.tobytes(), digest_size=16).hexdigest()
    belongs = {"format": _FORMAT, "images": data.fingerprint, "labels": labels}
    digest = hashlib.blake2b(json.dumps(belongs).encode(), digest_size=16).hexdigest()
    entry = (Path(cache).expanduser() if cache is not None else default_cache()) / f"classifier-{digest}"
    with making(entry):
        if (weights := _read(entry, belongs)) is not None:
            network = Features()
            network.load_state_dict(weights)
        else:
            network, accuracy = _trained(data)
            if accuracy is not None:
                runlog.note(f"features=classifier: accuracy {accuracy:.1%} on held-out images")
            _write(entry, network, belongs | {"accuracy": accuracy})
    return Extractor(network, NAME)


def check(data: ImageData) -> None:
    """Checks that the images have labels of two or more classes.

    Raises:
        FeatureError: they do not.
    """
    if data.labels is None or data.classes < 2:
        raise FeatureError(
            f"features=classifier requires labels of >= 2 classes, got {data.classes}; features=efflite0 "
            "requires none"
        )


def _trained(data: ImageData) -> tuple[Features, float | None]:
    """The trained features, without the linear layer, and the accuracy on held-out images, if any."""
    assert data.labels is not None
    held_out = np.arange(len(data)) % _HELD_OUT == _HELD_OUT - 1
    if len(np.unique(data.labels[~held_out])) < len(np.unique(data.labels)):  # the labels are periodic
        held_out = np.random.default_rng(0).permutation(held_out)
    train = ImageData(data.images[~held_out], data.labels[~held_out])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, head = Features(), nn.Linear(_WIDTHS[-1], data.classes)
    classifier = nn.Sequential(network, head)
    optimizer = torch.optim.Adam(classifier.parameters(), _LR)
    with runlog.Progress(NAME, _STEPS, 0, enabled=True) as bar:
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _LR * (1 - step / _STEPS)
            images, labels = train.batch(step, _BATCH, stream=NAME, dtype=torch.uint8)
            assert labels is not None
            loss = F.cross_entropy(classifier(images.expand(-1, 3, -1, -1)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(1, loss=float(loss.detach()))
    return network, _accuracy(classifier, data, np.flatnonzero(held_out))


@torch.no_grad()
def _accuracy(classifier: nn.Module, data: ImageData, rows: np.ndarray) -> float | None:
    """Accuracy on some rows; None if there are none."""
    assert data.labels is not None
    if not len(rows):
        return None
    right = 0
    for part in np.array_split(rows, max(1, len(rows) // 500)):
        logits: Tensor = classifier(torch.from_numpy(data.images[part]).expand(-1, 3, -1, -1))
        right += int((logits.argmax(1).numpy() == data.labels[part]).sum())
    return right / len(rows)


def _read(entry: Path, belongs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The weights in an entry of the cache; None if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = files.read_json(entry / "about.json")
    if {key: about.get(key) for key in belongs} != belongs:
        return None
    try:
        return load_file(entry / "classifier.safetensors")
    except (OSError, SafetensorError):
        return None


def _write(entry: Path, network: nn.Module, about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with files.folder(entry, files.ANYTHING) as folder:  # may replace a damaged one
        save_file(network.state_dict(), folder / "classifier.safetensors")
        (folder / "about.json").write_text(json.dumps(about))
