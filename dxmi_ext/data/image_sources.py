"""Image collections as they are found on disk: which files they are, and how to read them.

Nothing is unpickled: the Python version of CIFAR-10 is read opcode by opcode, without running one.
Imports numpy and the standard library; Pillow where a picture is decoded.
"""

from __future__ import annotations

import gzip
import io
import os
import pickletools
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dxmi_ext.errors import UserError
from dxmi_ext.files import UNREADABLE

LAYOUTS = """\
  an .npz file            x uint8 [n, H, W(, C)], y [n] (or images, labels); train_x, test_x, ... for splits;
                          or JPEG streams end to end: train_jpeg uint8 [bytes], train_off [n + 1], train_y [n]
  CIFAR-10                data_batch_1.bin ... data_batch_5.bin, test_batch.bin (the binary version),
                          or data_batch_1 ... data_batch_5, test_batch (the Python version)
  MNIST, Fashion-MNIST    train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., each plain or .gz
  folders of pictures     [SPLIT/]CLASS/*.jpg (ImageNet; classes in the order of their names),
                          or [SPLIT/]*.jpg without classes (LSUN, exported flat)"""

PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_CIFAR10_BYTES = 3 * 32 * 32


class ImageDataError(UserError, ValueError):
    """Images are missing, damaged or laid out in a way that is not known."""


class Pictures(NamedTuple):
    """A collection that has been opened."""

    n: int
    get: Callable[[int], Any]
    """Picture i: uint8 [H, W, C], C = 1 or 3, or a PIL image."""
    labels: np.ndarray | None
    """int64 [n]"""
    class_names: list[str]
    """Empty where the collection has no names."""


class Source(NamedTuple):
    """A collection that has been found, not yet opened."""

    files: Sequence[str | Path]
    """All it consists of: when one changes, so do the pictures."""
    open: Callable[[], Pictures]


def find(path: Path, split: str) -> Source:
    """Recognise what lies at ``path`` by the names of its files (LAYOUTS).

    Args:
        split: "train", "test", or another folder's name; folders take "val" for a missing "test".

    Raises:
        ImageDataError: nothing known lies there, or not that split of it.
    """
    if path.suffix == ".npz" and path.is_file():
        return Source([path], lambda: _open_npz(path, split))
    if path.is_dir():
        for look in (_find_cifar10, _find_idx, _find_folder):
            if source := look(path, split):
                return source
    found = "no images of a known layout" if path.exists() else "nothing there"
    raise ImageDataError(f"data path: {path} (split {split!r}): {found}, wants one of\n{LAYOUTS}")


def _find_cifar10(path: Path, split: str) -> Source | None:
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else [f"{split}_batch"]
    for suffix, read in ((".bin", _read_cifar10_binary), ("", _read_cifar10_python)):
        files = [path / (name + suffix) for name in names]
        if any(file.is_file() for file in files):
            return Source(_all_there(files), partial(_open_cifar10, files, read))
    return None


def _open_cifar10(files: list[Path], read: Callable[[Path], tuple[np.ndarray, np.ndarray]]) -> Pictures:
    images, labels = (np.concatenate(parts) for parts in zip(*map(read, files), strict=True))
    images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    return Pictures(len(images), images.__getitem__, labels, names.split())


def _read_cifar10_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label's byte and 3,072 bytes of red, green and blue planes."""
    content = np.fromfile(file, np.uint8)
    if len(content) == 0 or len(content) % (1 + _CIFAR10_BYTES):
        raise ImageDataError(f"{file}: got {len(content)} bytes, wants records of {1 + _CIFAR10_BYTES}")
    records = content.reshape(-1, 1 + _CIFAR10_BYTES)
    return records[:, 1:], _labels(records[:, 0], len(records), file)


def _read_cifar10_python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes after the key "data" and the integers after the key "labels" of a pickled dict.

    A pickle is a program; here it is only parsed, and what does not look as expected is refused.
    """
    content, labels, key = b"", list[int](), None
    c_order = False
    argument: Any
    try:
        with file.open("rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if "STRING" in opcode.name:  # what Python 2 wrote; a pickle of Python 3 is refused below
                    if key == "data" and c_order and not content:
                        content = argument.encode("latin-1")
                    elif argument in ("data", "labels", "filenames", "batch_label"):
                        key = argument
                elif key == "labels" and opcode.name.startswith(("BININT", "INT")):
                    labels.append(argument)
                c_order = opcode.name == "NEWFALSE"  # numpy's state: ..., is_fortran, bytes
    except ValueError as error:
        raise ImageDataError(f"{file}: cannot be parsed as a batch of CIFAR-10's Python version") from error
    if not content or len(content) != len(labels) * _CIFAR10_BYTES:
        raise ImageDataError(
            f"{file}: got {len(content)} bytes of images and {len(labels)} labels where CIFAR-10's Python "
            f"version has {_CIFAR10_BYTES} bytes a label; the binary version (data_batch_1.bin) is read too"
        )
    images = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR10_BYTES)
    return images, _labels(np.array(labels), len(images), file)


def _find_idx(path: Path, split: str) -> Source | None:
    prefix = "t10k" if split == "test" else split
    files = []
    for kind in ("images-idx3", "labels-idx1"):
        kinds = kind, kind.replace("-idx", ".idx")
        names = [path / f"{prefix}-{name}-ubyte{gz}" for gz in ("", ".gz") for name in kinds]
        files.append(next(filter(Path.is_file, names), names[0]))
    if not files[0].is_file():
        return None
    return Source(_all_there(files), partial(_open_idx, *files))


def _open_idx(images_file: Path, labels_file: Path) -> Pictures:
    images = _read_idx(images_file, dimensions=3)
    labels = _labels(_read_idx(labels_file, dimensions=1), len(images), labels_file)
    return Pictures(len(images), images[..., None].__getitem__, labels, [])


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """MNIST's format: two zero bytes, the type, the number of dimensions, big-endian sizes, values."""
    try:
        with _open_plain_or_gzip(file) as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise ImageDataError(
                    f"{file}: begins with {header[:4].hex(' ')}, wants 00 00 08 {dimensions:02x} "
                    f"(idx of unsigned bytes, {dimensions} dimensions)"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            content = np.frombuffer(stream.read(), np.uint8)
    except ImageDataError:
        raise
    except UNREADABLE as error:
        raise ImageDataError(f"{file}: is damaged ({error})") from error
    if content.size != int(np.prod(shape)):
        raise ImageDataError(f"{file}: got {content.size} bytes, its header says {shape}")
    return content.reshape(shape)


def _open_plain_or_gzip(file: Path) -> gzip.GzipFile | IO[bytes]:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def _open_npz(file: Path, split: str) -> Pictures:
    try:
        arrays = np.load(file)  # without pickles, which is the default
        prefix = f"{split}_" if any(name.startswith(("train_", "test_")) for name in arrays.files) else ""
        if not prefix and split != "train":
            raise ImageDataError(
                f"{file}: has no splits (keys {', '.join(arrays.files)}), got split {split!r}"
            )

        def first(*names: str) -> np.ndarray | None:
            return next((arrays[prefix + name] for name in names if prefix + name in arrays.files), None)

        labels, streams, offsets = first("y", "labels", "label"), first("jpeg"), first("off")
        images = None if streams is not None else first("x", "images")
    except ImageDataError:
        raise
    except UNREADABLE as error:
        raise ImageDataError(f"{file}: cannot be read as npz without pickles ({error})") from error
    if streams is not None and offsets is not None:
        count, get = len(offsets) - 1, _jpeg_getter(streams, offsets, file)
    elif images is not None:
        images = _channels_last(images, file)
        count, get = len(images), images.__getitem__
    else:
        raise ImageDataError(
            f"{file}: has the keys {', '.join(arrays.files)}, wants {prefix}x (or {prefix}images), "
            f"or {prefix}jpeg and {prefix}off"
        )
    return Pictures(count, get, None if labels is None else _labels(labels, count, file), [])


def _jpeg_getter(streams: np.ndarray, offsets: np.ndarray, file: Path) -> Callable[[int], Any]:
    def get(i: int) -> Any:
        return decode(io.BytesIO(streams[offsets[i] : offsets[i + 1]].tobytes()), f"{file}, picture {i}")

    return get


def _channels_last(images: np.ndarray, file: Path) -> np.ndarray:
    """[n, H, W] or [n, C, H, W] as [n, H, W, C]."""
    if images.dtype == np.uint8 and images.ndim in (3, 4):
        if images.ndim == 3:
            return images[..., None]
        if images.shape[3] in (1, 3):
            return images
        if images.shape[1] in (1, 3):
            return images.transpose(0, 2, 3, 1)
    raise ImageDataError(
        f"{file}: images are {images.dtype} {list(images.shape)}, wants uint8 [n, H, W] or [n, H, W, C], "
        "C = 1 or 3"
    )


def _find_folder(path: Path, split: str) -> Source | None:
    splits = [name for name in dict.fromkeys(("train", "test", "val", split)) if (path / name).is_dir()]
    if splits:
        name = "val" if split == "test" and "test" not in splits else split
        if name not in splits:
            raise ImageDataError(f"{path}: has the splits {', '.join(splits)}, got split {split!r}")
        path = path / name
    elif split != "train":
        return None
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    files, labels = pictures_in(path, below=False), None
    if not files:  # a folder for each class
        of_class = [pictures_in(path / name, below=True) for name in classes]
        files = [file for part in of_class for file in part]
        labels = np.repeat(np.arange(len(classes)), [len(part) for part in of_class])
    if not files:
        return None
    names = classes if labels is not None else []

    def get(i: int) -> Any:
        return decode(files[i], files[i])

    return Source(files, lambda: Pictures(len(files), get, labels, names))


def pictures_in(folder: Path, *, below: bool) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):  # of strings: a million Paths take half a minute
        found += [os.path.join(parent, name) for name in names if name.lower().endswith(PICTURES)]
        if not below:
            folders.clear()
    return sorted(found)


def decode(file: str | IO[bytes], name: str, *, upright: bool = False) -> Any:
    """A file as a PIL image in RGB. Of 16 bits the upper 8 are taken, rounded up: what is not 0 stays so.

    Args:
        name: what errors call it.
        upright: turned as its EXIF orientation says.

    Raises:
        ImageDataError: it is damaged, or of values whose range nothing tells.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            whole = ImageOps.exif_transpose(image) if upright else image
            return _eight_bits(whole).convert("RGB")
    except Exception as error:  # of a damaged file Pillow raises errors of many kinds
        raise ImageDataError(f"{name}: cannot be decoded ({error})") from error


def _eight_bits(image: Any) -> Any:
    """Grey values of 16 bits, which Pillow's own conversion would cut off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values are {values.dtype}, wants 8 or 16 bits")
    return Image.fromarray((-(-values.astype(np.int64) // 257)).astype(np.uint8))


def _labels(labels: np.ndarray, count: int, file: Path) -> np.ndarray:
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or (count and labels.min() < 0):
        raise ImageDataError(
            f"{file}: labels are {labels.dtype} {list(labels.shape)}, wants {count} integers from 0 up"
        )
    return labels.astype(np.int64)


def _all_there(files: list[Path]) -> list[Path]:
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ImageDataError(f"data path: {', '.join(missing)} missing; wants all of one layout:\n{LAYOUTS}")
    return files
