"""Feature maps of a collection, computed once and then memory-mapped; DxMI is trained on their positions.

Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.anomaly.data.dataset import AnomalyData
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data.dataset import default_cache, making, rows_of_batch, sequence, to_device
from dxmi_ext.images.metrics.features import Extractor, FeatureError

_CACHE_FORMAT = 1
_DTYPES = {"float16": np.float16, "float32": np.float32}


class FeatureMaps:
    """Maps in memory or memory-mapped, and the order in which their positions are drawn for training.

    Args:
        maps: float16 or float32 [n, h, w, C]; each position is one row.
        fingerprint: identifies the maps; by default a digest of them.

    Raises:
        FeatureError: the maps have a wrong type or shape.
    """

    def __init__(self, maps: np.ndarray, *, fingerprint: str | None = None) -> None:
        if maps.dtype not in _DTYPES.values() or maps.ndim != 4 or maps.size == 0:
            raise FeatureError(
                f"maps must be float16 or float32 [n, h, w, C], n > 0, got {maps.dtype} {list(maps.shape)}"
            )
        self.maps = maps
        if fingerprint is None:
            digest = hashlib.blake2b(str(maps.shape).encode(), digest_size=16)
            for each in maps:
                digest.update(np.ascontiguousarray(each).data)
            fingerprint = digest.hexdigest()
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        """The number of images."""
        return len(self.maps)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[n * h * w, C], a view of contiguous maps."""
        return self.maps.reshape(-1, self.maps.shape[3])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        height, width, channels = self.maps.shape[1:]
        return height, width, channels

    def batch(
        self,
        iteration: int,
        batch_size: int,
        *,
        seed: int = 0,
        stream: str = "data",
        offset: int = 0,
        count: int | None = None,
        whole_images: bool = True,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Rows ``offset .. offset + count - 1`` of an iteration's global batch, float32 [count, C].

        As in `ImageData.batch`, a row is a function of (seed, stream, iteration, global row).

        Args:
            batch_size: number of positions; 784 = 4 x 14 x 14 in DxMI, sec. 5.3.
            whole_images: whether images are drawn in random order, each with all its positions in sequence;
                otherwise the positions of all images are drawn in random order.

        Raises:
            ValueError: the rows are not within the batch.
        """
        start, count = rows_of_batch(iteration, batch_size, offset, count)
        if whole_images:
            height, width, _ = self.shape
            size = height * width
            places = np.arange(start, start + count)
            first = start // size
            images, _ = sequence(len(self), seed, stream, first, -(-(start + count) // size) - first)
            rows = images[places // size - first] * size + places % size
        else:
            rows, _ = sequence(len(self.rows), seed, stream, start, count)
        return to_device(torch.from_numpy(self.rows[rows].astype(np.float32)), device)


def load(
    data: AnomalyData,
    backbone: Extractor,
    *,
    dtype: str = "float16",
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    cache: Path | str | None = None,
    what: str = "features",
) -> FeatureMaps:
    """The maps of a collection's images, from the cache if they were computed before.

    Args:
        backbone: backbone from ``anomaly.features.backbones``.
        dtype: stored type, float16 or float32.
        batch_size: number of images per forward pass of the backbone, on ``device``.
        cache: folder, by default that of decoded images. An entry depends on the images, the name, sizes and
            weights of the backbone, and dtype; it may be deleted.
        what: title of the progress.

    Raises:
        FeatureError: dtype is unknown, features are not finite, or the network does not return maps.
    """
    if dtype not in _DTYPES:
        raise FeatureError(f"dtype must be float16 or float32, got {dtype!r}")
    belongs = {"format": _CACHE_FORMAT, "images": data.fingerprint, "of": len(data)}
    belongs |= {"backbone": backbone.identity, "dtype": dtype}
    digest = hashlib.blake2b(json.dumps(belongs).encode(), digest_size=16).hexdigest()
    entry = (Path(cache).expanduser() if cache is not None else default_cache()) / f"maps-{digest}"
    if not entry.is_dir():
        with making(entry):
            if not entry.is_dir():  # another process may have been first
                with files.folder(entry) as folder:
                    _compute(folder / "maps.npy", data, backbone.to(device), dtype, batch_size, device, what)
                    (folder / "about.json").write_text(json.dumps(belongs))
    # a plain array over the map, because indexing np.memmap is slower
    return FeatureMaps(np.asarray(np.load(entry / "maps.npy", mmap_mode="r")), fingerprint=digest)


def computed(
    data: AnomalyData, backbone: Extractor, device: torch.device | str = "cpu", what: str = "features"
) -> np.ndarray:
    """The maps [n, h, w, C] of `load`, computed without the cache."""
    with tempfile.TemporaryDirectory() as scratch:
        return load(data, backbone, device=device, cache=scratch, what=what).maps.copy()


def _compute(
    path: Path,
    data: AnomalyData,
    backbone: Extractor,
    dtype: str,
    batch_size: int,
    device: torch.device | str,
    what: str,
) -> None:
    shape: tuple[int, ...] | None = None
    with path.open("wb") as file, runlog.Progress(what, len(data), 0, enabled=True) as bar:
        for start in range(0, len(data), batch_size):
            images = torch.from_numpy(np.array(data.images[start : start + batch_size])).to(device)
            features = backbone(images).permute(0, 2, 3, 1).cpu().numpy()
            with np.errstate(over="ignore"):  # rejected below
                maps = np.ascontiguousarray(features, _DTYPES[dtype])
            if not np.isfinite(maps).all():
                raise FeatureError(f"backbone {backbone.name}: features are not finite in {dtype}")
            if shape is None:
                shape = maps.shape[1:]
                header = {"descr": maps.dtype.str, "fortran_order": False, "shape": (len(data), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(maps.tobytes())
            bar.update(len(images))
