"""Images from disk, decoded once, in a keyed order that is the same for any number of ranks.

Decoded images are cached as one memory-mapped array, which all ranks of a machine share. Imports torch, numpy
and ``dxmi_ext``; Pillow and tqdm while images are decoded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine.errors import first_few
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data import layouts as image_sources
from dxmi_ext.images.data import pixels
from dxmi_ext.images.data.contents import UnequalSizes, UnreadableImages, printable, resolved
from dxmi_ext.images.data.layouts import ImageDataError, Pictures
from dxmi_ext.images.data.pixels import NOMINAL, Scale

_CACHE_FORMAT = 3
_DECODE_BLOCK = 512


class ImageData:
    """Images in memory or memory-mapped, and their order over iterations.

    Args:
        images: uint8 [n, C, H, W].
        labels: int64 [n], or None.
        class_names: names of the classes 0, 1, ...; without them, the largest label gives their number.
        fingerprint: digest that identifies the images; by default computed from them.
        scale: scale by which images of other than 8 bits were converted.

    Raises:
        ImageDataError: the type or shape is wrong.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        class_names: list[str] | None = None,
        fingerprint: str | None = None,
        scale: Scale = NOMINAL,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
            raise ImageDataError(
                f"images must be uint8 [n, C, H, W] with n > 0, got {images.dtype} {list(images.shape)}"
            )
        if labels is not None and (labels.dtype != np.int64 or labels.shape != images.shape[:1]):
            raise ImageDataError(
                f"labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}"
            )
        self.images = images
        self.labels = labels
        self.class_names = [*map(printable, class_names or [])]
        self.fingerprint = fingerprint or _fingerprint(images)
        self.scale = scale

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.class_names) or int(self.labels.max()) + 1

    def batch(
        self,
        iteration: int,
        batch_size: int,
        *,
        seed: int = 0,
        stream: str = "data",
        offset: int = 0,
        count: int | None = None,
        flip: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows ``offset .. offset + count - 1`` of an iteration's global batch of ``batch_size`` rows.

        Iterations read one infinite sequence: the images in a new random order every epoch; a batch may span
        two. A row is a function of (seed, stream, iteration, global row), so resuming requires no state.

        Args:
            stream: name of the use; streams of one seed are shuffled independently.
            offset, count: this rank's rows; by default all.
            flip: flip half of the rows horizontally.
            dtype: uint8, or a floating dtype for values in [-1, 1].

        Returns:
            Images [count, C, H, W], and labels int64 [count] or None.

        Raises:
            ValueError: the rows are not within the batch.
        """
        start, count = rows_of_batch(iteration, batch_size, offset, count)
        rows, mirrored = sequence(len(self), seed, stream, start, count)
        images = torch.from_numpy(self.images[rows])
        if flip:
            where = torch.from_numpy(mirrored)
            images[where] = images[where].flip(-1)
        labels = None if self.labels is None else to_device(torch.from_numpy(self.labels[rows]), device)
        return to_dtype(to_device(images, device), dtype), labels


def to_dtype(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images in a dtype; for floating types scaled from [0, 255] to [-1, 1]."""
    return images if dtype == torch.uint8 else images.to(dtype).div_(127.5).sub_(1)


def load(
    path: Path | str,
    *,
    split: str = "train",
    size: int | None = None,
    cache: Path | str | None = None,
    scale: Scale | None = None,
) -> ImageData:
    """Images at a path, in a layout of ``layouts.LAYOUTS``; decoded by the first call and cached.

    Args:
        split: "train" or "test".
        size: height and width: images are halved by a box filter while at least twice as large, then resized
            bicubically (antialiased) and center cropped, as usual for ImageNet 64 (Dhariwal and Nichol 2021).
            Images of this size are not changed. None keeps the images, which must have one size.
        cache: folder of the decoded arrays, by default ``dxmi_ext`` in ``$XDG_CACHE_HOME`` or ``~/.cache``,
            or in the temporary folder without a home folder. An entry depends on the path, the names, sizes
            and times of the files, ``size`` and ``scale``; it may be deleted.
        scale: scale of the training set's ``ImageData``, for images of other than 8 bits; None: determined
            from these images.

    Raises:
        ImageDataError: the layout is unknown, or images are damaged or differ in size.
    """
    path = resolved(path)
    if size is not None and size < 1:
        raise ImageDataError(f"size must be >= 1 or None, got {size}")
    if scale is not None and split == "train":  # usually their own, and already decoded
        own = load(path, split=split, size=size, cache=cache)
        if own.scale == scale:
            return own
    source = image_sources.find(path, split)
    cache = Path(cache).expanduser() if cache is not None else default_cache()
    entry = cache / f"images-{_key(path, split, size, scale, source.files)}"
    if not entry.is_dir():
        with making(entry):
            if not entry.is_dir():  # another process may have been first
                _decode_to(entry, source.open(), size, path, scale)
    about = json.loads((entry / "about.json").read_text())
    labels = np.load(entry / "labels.npy") if (entry / "labels.npy").exists() else None
    # a plain array over the map, since indexing np.memmap is slower
    images = np.asarray(np.load(entry / "images.npy", mmap_mode="r"))
    told = {"class_names": about["class_names"], "fingerprint": about["fingerprint"]}
    return ImageData(images, labels, **told, scale=Scale.of(about["scale"]))


def default_cache() -> Path:
    """Default folder of decoded images and reference statistics."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):  # no home folder, as for an unknown user in a container
        folder = f"{tempfile.gettempdir()}/cache-of-{os.getuid()}"
    return Path(folder) / "dxmi_ext"


@contextmanager
def making(entry: Path) -> Iterator[None]:
    """Within, this process alone makes an entry of a cache; others wait.

    Raises:
        ConfigError: the cache cannot be written to.
    """
    cache = entry.parent
    try:
        with files.locked(entry.with_suffix(".lock")):
            yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename or ""))
        if error.filename is None or not (cache.is_relative_to(place) or place.is_relative_to(cache)):
            raise  # another file failed, such as an image
        raise ConfigError(
            f"cache must be a folder that can be written to, got {str(cache)!r} ({error.strerror}); "
            "cache=DIR or the environment variable XDG_CACHE_HOME chooses another"
        ) from error


@functools.lru_cache(maxsize=4)  # two streams, each at the end of an epoch
def _epoch(n: int, seed: int, stream: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch, int64 [n], and which of its rows are flipped, bool [n].

    Computed from Philox's raw output, which is the same in every version of numpy; Generator's may change.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(n)
    order = np.argsort(words, kind="stable")
    return order, (words[order] & 1).astype(bool)


def rows_of_batch(iteration: int, batch_size: int, offset: int, count: int | None) -> tuple[int, int]:
    """The first row of a part of a batch in the sequence of all batches, and the number of its rows.

    Raises:
        ValueError: the rows are not within the batch.
    """
    count = batch_size - offset if count is None else count
    if iteration < 0 or offset < 0 or count < 0 or offset + count > batch_size:
        raise ValueError(
            f"rows must lie within a batch of {batch_size}, got iteration {iteration}, offset {offset}, "
            f"count {count}"
        )
    return iteration * batch_size + offset, count


def sequence(n: int, seed: int, stream: str, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``start .. start + count - 1`` of the infinite sequence of epochs, and which are flipped."""
    parts = []
    while count > 0:
        epoch, place = divmod(start, n)
        take = min(count, n - place)
        parts.append([array[place : place + take] for array in _epoch(n, seed, stream, epoch)])
        start, count = start + take, count - take
    if not parts:
        return np.empty(0, np.int64), np.empty(0, bool)
    rows, mirrored = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return rows, mirrored


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies a host tensor to a device without blocking."""
    device = torch.device(device)
    if device.type == "cuda":  # copies from pinned memory are asynchronous
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _fingerprint(images: np.ndarray) -> str:
    digest = _digest(images.shape[1:])
    for start in range(0, len(images), _DECODE_BLOCK):
        digest.update(np.ascontiguousarray(images[start : start + _DECODE_BLOCK]))
    return digest.hexdigest()


def _digest(shape: tuple[int, ...]) -> Any:
    return hashlib.blake2b(str(shape).encode(), digest_size=16)


def _key(path: Path, split: str, size: int | None, scale: Scale | None, sources: Sequence[str | Path]) -> str:
    return key_of(f"{_CACHE_FORMAT} {path} {split} {size} {scale}", sources)


def key_of(about: str, sources: Sequence[str | Path]) -> str:
    """The name of a cache entry: a digest of a text and of the names, sizes and times of files."""
    digest = hashlib.blake2b(about.encode("utf-8", "surrogateescape"), digest_size=16)
    for file in sources:
        stat = os.stat(file)
        digest.update(f"\n{file} {stat.st_size} {stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _decode_to(entry: Path, pictures: Pictures, size: int | None, path: Path, scale: Scale | None) -> None:
    """Write a cache entry: images.npy, labels.npy, about.json."""
    if pictures.n == 0:
        raise ImageDataError(f"{printable(path)}: holds no images")
    try:
        try:
            _write(entry, pictures, size, path, scale)
        except pixels.Unsettled:  # most collections have 8 bits and are read once
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                found = pixels.settled(_ahead(threads, pictures.get, pictures.n), printable(path))
            _write(entry, pictures, size, path, found)
    except UnequalSizes:
        raise
    except ImageDataError:
        reject_unreadable(pictures.n, lambda i: _read(pictures, i, path, scale))
        raise


def reject_unreadable(n: int, read: Callable[[int], object]) -> None:
    """Reads all images of a collection in which one is damaged, so that an error names them all.

    Args:
        read: reads the image of an index < n.

    Raises:
        UnreadableImages: some images cannot be read.
    """
    from tqdm import tqdm

    def reason(i: int) -> str | None:
        try:
            read(i)
        except ImageDataError as error:
            return str(error)
        except pixels.Unsettled:  # the image is whole
            pass
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        progress = tqdm(
            threads.map(reason, range(n)), total=n, desc="finding damaged images", unit="image", disable=None
        )
        reasons = [each for each in progress if each is not None]
    if reasons:
        raise UnreadableImages(reasons, n)


def _read(pictures: Pictures, i: int, path: Path, scale: Scale | None) -> tuple[np.ndarray, np.ndarray]:
    """Image i as stored and as uint8, both [H, W, C]."""
    stored = pictures.get(i)
    name = pictures.files[i] if pictures.files else path
    return stored, pixels.eight_bits(stored, scale, printable(name))


def _ahead(threads: ThreadPoolExecutor, get: Callable[[int], np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Images in order, decoded ahead in blocks."""
    for start in range(0, n, _DECODE_BLOCK):
        yield from threads.map(get, range(start, min(start + _DECODE_BLOCK, n)))


def _write(entry: Path, pictures: Pictures, size: int | None, path: Path, scale: Scale | None) -> None:
    from tqdm import tqdm

    clipped: list[int] = []
    paged: set[str] = set()

    def fitted(i: int) -> np.ndarray:
        picture, image = _read(pictures, i, path, scale)
        if pictures.files and pixels.has_pages(pictures.files[i]):
            paged.add(pictures.files[i])
        if scale is not None and pixels.exceeds(picture, scale):
            clipped.append(i)
        return np.ascontiguousarray(_fit(image, size).transpose(2, 0, 1))

    shape, name = fitted(0).shape, printable(path.name)
    clipped.clear()
    digest = _digest(shape)
    with (
        files.folder(entry) as folder,
        (folder / "images.npy").open(
            "wb"
        ) as file,  # appended, so that a full disk raises an error, not a SIGBUS
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=pictures.n, desc=f"decoding {name}", unit="image", disable=None) as progress,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (pictures.n, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for image in _ahead(threads, fitted, pictures.n):
            if image.shape != shape:
                sizes = f"{list(shape)} and {list(image.shape)}"
                raise UnequalSizes(
                    f"{printable(path)}: images must have one size unless image_size is set, got {sizes}"
                )
            file.write(image.tobytes())
            digest.update(image)
            progress.update()
        if pictures.labels is not None:
            np.save(folder / "labels.npy", pictures.labels)
        about = {"source": str(path), "size": size, "scale": scale, "class_names": pictures.class_names}
        (folder / "about.json").write_text(json.dumps(about | {"fingerprint": digest.hexdigest()}))
    if scale is not None and clipped:
        runlog.note(f"{printable(path)}: {beyond(len(clipped), scale)}")
    note_pages(paged)


def note_pages(paged: Collection[str]) -> None:
    """Notes which image files have several pages or frames, if any."""
    if paged:
        names = printable(first_few(sorted(paged), 1))
        runlog.note(f"{len(paged)} image(s) have several pages, of which the first is used: {names}")


def beyond(count: int, scale: Scale) -> str:
    """The note for images with values outside of a scale."""
    shown = f"0 to {scale.white}"
    if scale.floats:
        shown += " or, of floats, {:g} to {:g}".format(*scale.floats)
    return f"{count} image(s) have values beyond the training images' scale ({shown}); these are clipped"


def _fit(array: np.ndarray, size: int | None) -> np.ndarray:
    """An image, uint8 [H, W, C], resized to size x size; see ``load``."""
    if size is None or array.shape[:2] == (size, size):
        return array
    from PIL import Image

    image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wanted = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    image = image.resize(wanted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.atleast_3d(np.asarray(image.crop((left, top, left + size, top + size))))
