"""Images for anomaly detection: good images for training, good and defective images for testing.

Images are decoded once into a cache of memory-mapped arrays, as in ``images.data.dataset``. Imports torch,
numpy and ``dxmi_ext``; Pillow and tqdm while images are decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dxmi_ext.anomaly.data import layouts as anomaly_sources
from dxmi_ext.anomaly.data.layouts import Item, Source
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data import pixels
from dxmi_ext.images.data.contents import ImageDataError, UnequalSizes, printable, resolved
from dxmi_ext.images.data.dataset import beyond, default_cache, key_of, making, note_pages, reject_unreadable
from dxmi_ext.images.data.pixels import NOMINAL, Scale

_CACHE_FORMAT = 4


class AnomalyData:
    """A split of a collection, in memory or memory-mapped.

    Args:
        images: uint8 [n, 3, H, W]; gray images have three equal channels.
        labels: int64 [n], the kind of defect; 0 is good.
        masks: bool [n, H, W], true at defects; None if the collection has no masks, and for training.
        classes: int64 [n], class of the object in the image, such as MVTec-AD's bottle or cable.
        class_names: names of the classes 0, 1, ...
        label_names: names of the labels 0, 1, ...
        names: names of the images, [n].
        split: "train" or "test".
        fingerprint: identifies the images; by default a digest of them.
        scale: scale by which the images were converted to 8 bits.

    Raises:
        ImageDataError: an array has a wrong type or shape, or training data have defects.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray | None = None,
        *,
        classes: np.ndarray | None = None,
        class_names: Sequence[str] = ("",),
        label_names: Sequence[str] = (),
        names: Sequence[str] = (),
        split: str = "test",
        fingerprint: str | None = None,
        scale: Scale = NOMINAL,
    ) -> None:
        n = len(images)
        classes = np.zeros(n, np.int64) if classes is None else classes
        wanted: dict[str, tuple[np.ndarray, type, tuple[int, ...]]]
        wanted = {"images": (images, np.uint8, (n, 3, *images.shape[2:])), "labels": (labels, np.int64, (n,))}
        wanted["classes"] = classes, np.int64, (n,)
        if masks is not None:
            wanted["masks"] = masks, np.bool_, (n, *images.shape[2:])
        for name, (array, dtype, shape) in wanted.items():
            if array.dtype != dtype or array.shape != shape or n == 0 or images.ndim != 4:
                raise ImageDataError(
                    f"{name} must be {np.dtype(dtype)} {list(shape)} for images [n, 3, H, W], n > 0, "
                    f"got {array.dtype} {list(array.shape)}"
                )
        if split == "train" and labels.any():
            raise ImageDataError(
                f"labels must be 0 for training, got {int(labels.astype(bool).sum())} defects"
            )
        self.images, self.labels, self.masks, self.classes = images, labels, masks, classes
        self.class_names, self.names = ([*map(printable, given)] for given in (class_names, names))
        kinds = label_names or ["good", *map(str, range(1, 1 + int(labels.max())))]
        self.label_names, self.split = [*map(printable, kinds)], split
        self.scale = scale
        self.fingerprint = fingerprint or _digest(images.shape[1:], images).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def anomalous(self) -> np.ndarray:
        """bool [n]: whether the image has a defect."""
        return self.labels > 0


def load(
    path: Path | str,
    *,
    split: str = "train",
    size: int | None = 224,
    classes: Sequence[str] | None = None,
    train_share: float = 0.7,
    cache: Path | str | None = None,
    scale: Scale | None = None,
) -> AnomalyData:
    """Loads a split of the collection at a path, in one of ``anomaly_sources.LAYOUTS``, through the cache.

    Args:
        split: "train" for good images only, or "test".
        size: height and width to which whole images are resized (bicubic, antialiased; masks to the nearest
            pixel), without cropping, so that defects at the border count. None keeps the images, which must
            then have equal sizes.
        classes: names of the classes to load; None: all.
        train_share: share of the good images to train on if the layout has no split; 0: all are for testing.
        cache: folder of the decoded arrays, by default ``images.default_cache()``. An entry depends on the
            names, sizes and times of the files and on the arguments; it may be deleted.
        scale: scale of a run's training set for images that are not of 8 bits; None: that of the training
            split here.

    Raises:
        ImageDataError: the path has no known layout, a file is missing or damaged, or sizes differ.
    """
    path = resolved(path)
    if size is not None and size < 1:
        raise ImageDataError(f"size must be >= 1 or None, got {size}")
    if scale is not None and split == "train":  # usually equal to their own scale, and already decoded
        own = load(path, split=split, size=size, classes=classes, train_share=train_share, cache=cache)
        if own.scale == scale:
            return own
    source = anomaly_sources.find(path, split, classes, train_share)
    if not source.items:
        raise ImageDataError(f"{path}: has no images for split={split}")
    cache = Path(cache).expanduser() if cache is not None else default_cache()
    trained = source
    if scale is None and split != "train":
        trained = anomaly_sources.find(path, "train", classes, train_share)
    about = f"{_CACHE_FORMAT} {path} {split} {size} {train_share} {scale}"
    about += "".join(f"\n{item.name} {item.label} {item.mask is not None}" for item in source.items)
    entry = cache / f"anomaly-{key_of(about, [*source.files, *trained.files])}"
    if not entry.is_dir():
        with making(entry):
            if not entry.is_dir():  # another process may have been first
                try:
                    _decode_to(entry, source, size, path, scale, trained)
                except UnequalSizes:
                    raise
                except ImageDataError:
                    splits = [source]
                    with suppress(ImageDataError):  # there may be no other split
                        other = "test" if split == "train" else "train"
                        splits.append(anomaly_sources.find(path, other, classes, train_share))
                    _reject_unreadable(splits, size, path, scale, trained)
                    raise
    stored = json.loads((entry / "about.json").read_text())
    masks = None
    if (entry / "masks.npy").exists():
        masks = np.asarray(np.load(entry / "masks.npy", mmap_mode="r"))
    return AnomalyData(
        # a plain array over the map, because indexing np.memmap is slower
        np.asarray(np.load(entry / "images.npy", mmap_mode="r")),
        np.array([item.label for item in source.items], np.int64),
        masks,
        classes=np.array([item.object_class for item in source.items], np.int64),
        class_names=source.class_names,
        label_names=source.label_names,
        names=[item.name for item in source.items],
        split=split,
        fingerprint=stored["fingerprint"],
        scale=Scale.of(stored["scale"]),
    )


def decoded(source: Source, split: str, size: int | None, scale: Scale | None = None) -> AnomalyData:
    """Decodes the images of a source in memory, as `load` does; without a scale, with their own."""
    try:
        pairs = [_decode(item, size, scale)[:2] for item in source.items]
    except pixels.Unsettled:
        return decoded(source, split, size, pixels.settled((item.image() for item in source.items), split))
    sizes = sorted({image.shape for image, _ in pairs})
    if len(sizes) != 1:
        got = " and ".join(str(list(shape)) for shape in sizes) or "no images"
        raise ImageDataError(f"{split}: images must have one size unless size is set, got {got}")
    return AnomalyData(
        np.stack([image for image, _ in pairs]),
        np.array([item.label for item in source.items], np.int64),
        np.stack([mask for _, mask in pairs]) if source.has_masks else None,
        classes=np.array([item.object_class for item in source.items], np.int64),
        class_names=source.class_names,
        label_names=source.label_names,
        names=[item.name for item in source.items],
        split=split,
        scale=scale or NOMINAL,
    )


def _digest(shape: tuple[int, ...], images: np.ndarray | tuple[()] = ()) -> Any:
    digest = hashlib.blake2b(str(tuple(shape)).encode(), digest_size=16)
    for image in images:
        digest.update(np.ascontiguousarray(image).data)
    return digest


def _decode_to(
    entry: Path, source: Source, size: int | None, path: Path, scale: Scale | None, trained: Source
) -> None:
    """Writes a cache entry: images.npy, masks.npy if there are masks, and about.json."""
    try:
        _write(entry, source, size, path, scale)
    except pixels.Unsettled:  # most collections have 8 bits and are read only once
        found = pixels.settled((item.image() for item in trained.items), printable(path))
        _write(entry, source, size, path, found)


def _reject_unreadable(
    splits: Sequence[Source], size: int | None, path: Path, scale: Scale | None, trained: Source
) -> None:
    """Raises an error that names all images of both splits that cannot be decoded, if there are any."""
    items = [item for source in splits for item in source.items]
    if scale is None:
        with suppress(ImageDataError):  # rejected by the caller
            scale = pixels.settled(_readable(trained.items), printable(path))
    reject_unreadable(len(items), lambda i: _decode(items[i], size, scale))


def _readable(items: Sequence[Item]) -> Iterator[np.ndarray]:
    for item in items:
        with suppress(ImageDataError):
            yield item.image()


def _write(entry: Path, source: Source, size: int | None, path: Path, scale: Scale | None) -> None:
    from tqdm import tqdm

    items, clipped, paged = source.items, 0, list[str]()
    shape = _decode(items[0], size, scale)[0].shape
    digest = _digest(shape)
    with files.folder(entry) as folder:
        with (folder / "images.npy").open("wb") as images, (folder / "masks.npy").open("wb") as masks:
            _header(images, "|u1", (len(items), *shape))
            _header(masks, "|b1", (len(items), *shape[1:]))
            for item in tqdm(items, desc=f"decoding {printable(path.name)}", unit="image", disable=None):
                image, mask, is_beyond = _decode(item, size, scale)
                if image.shape != shape:
                    sizes = f"{list(shape)} and {list(image.shape)}"
                    raise UnequalSizes(
                        f"{printable(path)}: images must have one size unless size is set, got {sizes}"
                    )
                images.write(image.tobytes())
                masks.write(mask.tobytes())
                digest.update(image.data)
                clipped += is_beyond
                if item.file is not None and pixels.has_pages(item.file):
                    paged.append(item.file)
        if not source.has_masks:
            (folder / "masks.npy").unlink()
        about = {"source": str(path), "size": size, "scale": scale, "fingerprint": digest.hexdigest()}
        (folder / "about.json").write_text(json.dumps(about))
    if scale is not None and clipped:
        runlog.note(f"{printable(path)}: {beyond(clipped, scale)}")
    note_pages(paged)


def _header(file: Any, dtype: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def _decode(item: Item, size: int | None, scale: Scale | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns the image, uint8 [3, H, W]; its mask, bool [H, W], false everywhere if it has none; and whether
    the scale clips the image."""
    stored = item.image()
    name = printable(item.name)
    picture = rgb(stored, scale, name)
    mask = np.zeros(picture.shape[:2], np.bool_) if item.mask is None else item.mask()
    if mask.shape != picture.shape[:2]:
        raise ImageDataError(
            f"{name}: its mask must be {list(picture.shape[:2])}, as the image, got {list(mask.shape)}"
        )
    is_beyond = scale is not None and pixels.exceeds(stored, scale)
    picture = np.ascontiguousarray(resized(picture, size).transpose(2, 0, 1))
    return picture, mask if size is None else _resized_mask(mask, size), is_beyond


def rgb(stored: np.ndarray, scale: Scale | None, name: str) -> np.ndarray:
    """Converts stored pixels [H, W, C] to uint8 [H, W, 3]; gray pixels get three equal channels. Errors are
    those of `pixels.eight_bits`."""
    picture = pixels.eight_bits(stored, scale, name)
    return np.asarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))


def _resized_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resizes a mask to the nearest pixel; a defect too small for that keeps one pixel."""
    if mask.shape == (size, size):
        return mask
    from PIL import Image

    found = np.array(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    if not found.any():
        rows, columns = np.nonzero(mask)
        found[rows * size // mask.shape[0], columns * size // mask.shape[1]] = True
    return found


def resized(picture: np.ndarray, size: int | None) -> np.ndarray:
    """Resizes an image as `load` does: uint8 [H, W, 3] -> [size, size, 3] (bicubic, antialiased)."""
    if size is None or picture.shape[:2] == (size, size):
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))
