"""Layouts of image collections on disk: how to find and read their files.

Nothing is unpickled: the Python version of CIFAR-10 is parsed opcode by opcode, without executing any.
Imports numpy and the standard library; Pillow where an image is decoded.
"""

from __future__ import annotations

import gzip
import pickletools
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dxmi_ext.engine.storage.files import UNREADABLE
from dxmi_ext.images.data import listing, npz, pixels
from dxmi_ext.images.data.contents import ImageDataError as ImageDataError
from dxmi_ext.images.data.contents import printable, refuse_pointer, what_it_is
from dxmi_ext.images.data.listing import Folder, Skipped

LAYOUTS = """\
  an .npz or .npy file    x [n, H, W(, C)] or [n, C, H, W] (or images, samples, data, arr_0), y [n] (or
                          labels, label, arr_1); train_x or x_train, test_x, ... for splits; or JPEG streams
                          end to end: train_jpeg uint8 [bytes], train_off [n + 1], train_y [n]
  CIFAR-10                data_batch_1.bin ... data_batch_5.bin, test_batch.bin (the binary version),
                          or data_batch_1 ... data_batch_5, test_batch (the Python version)
  MNIST, Fashion-MNIST    train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., each plain or .gz
  folders of images       [SPLIT/]CLASS/**/*.jpg (ImageNet; classes in the order of their names),
                          or [SPLIT/]*.jpg without classes (LSUN, exported flat)"""

_CIFAR10_BYTES = 3 * 32 * 32


class SplitMissing(ImageDataError):
    """The requested split, or the whole collection, is missing."""


class Pictures(NamedTuple):
    """An open collection."""

    n: int
    get: Callable[[int], np.ndarray]
    """i -> image i [H, W, C], for `pixels.eight_bits`."""
    labels: np.ndarray | None
    """int64 [n]"""
    class_names: list[str]
    """Empty if the collection has no names."""
    files: Sequence[str] = ()
    """The file of each image; empty if the collection has no files of single images."""
    split: str | None = None
    """The split that was read, such as "val" in place of a missing "test"; None if splits have no names."""


class Source(NamedTuple):
    """A collection that was found, but not opened yet."""

    files: Sequence[str | Path]
    """All files of the collection, which determine the images."""
    open: Callable[[], Pictures]
    layout: str
    skipped: Sequence[Skipped] = ()
    """Other files there, which are skipped."""


def find(path: Path, split: str) -> Source:
    """Find the collection at ``path`` by the names of its files (LAYOUTS).

    Args:
        split: "train", "test" or "val"; folders use "val" if "test" is missing.

    Raises:
        SplitMissing: there is no known layout, or not the split.
        ImageDataError: the layout is ambiguous or incomplete.
    """
    if path.suffix.lower() in npz.SUFFIXES and path.is_file():
        return Source([path], lambda: _open_npz(path, split), "npz")
    if path.is_dir():
        for look in (_find_cifar10, _find_idx, _find_folder):
            if source := look(path, split):
                return source
    found = f"has no images of a known layout (split {split!r})" if path.exists() else "does not exist"
    found = (path.is_file() and what_it_is(path)) or found
    raise SplitMissing(f"data: {printable(path)} {found}; `dxmi data --help` lists the layouts")


def _find_cifar10(path: Path, split: str) -> Source | None:
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else [f"{split}_batch"]
    for suffix, read in ((".bin", _read_cifar10_binary), ("", _read_cifar10_python)):
        files = [path / (name + suffix) for name in names]
        if any(file.is_file() for file in files):
            return Source(_all_there(files), partial(_open_cifar10, files, read), "CIFAR-10")
    return None


def _open_cifar10(files: list[Path], read: Callable[[Path], tuple[np.ndarray, np.ndarray]]) -> Pictures:
    images, labels = (np.concatenate(parts) for parts in zip(*map(read, files), strict=True))
    images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    return Pictures(len(images), images.__getitem__, labels, names.split())


def _read_cifar10_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3,072 bytes of red, green and blue planes."""
    refuse_pointer(file)
    content = np.fromfile(file, np.uint8)
    if len(content) == 0 or len(content) % (1 + _CIFAR10_BYTES):
        raise ImageDataError(
            f"{file}: expected records of {1 + _CIFAR10_BYTES} bytes, got {len(content)} bytes"
        )
    records = content.reshape(-1, 1 + _CIFAR10_BYTES)
    return records[:, 1:], _labels(records[:, 0], len(records), file)


def _read_cifar10_python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes after the key "data" and the integers after the key "labels" of a pickled dict.

    The pickle is parsed without executing it, and rejected if it has another structure.
    """
    content, labels, key = b"", list[int](), None
    c_order = False
    argument: Any
    refuse_pointer(file)
    try:
        with file.open("rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if "STRING" in opcode.name:  # written by Python 2; a pickle of Python 3 is rejected below
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
            f"{file}: expected {_CIFAR10_BYTES} bytes per label as in CIFAR-10's Python version, got "
            f"{len(content)} bytes and {len(labels)} labels; the binary version (data_batch_1.bin) works too"
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
    return Source(_all_there(files), partial(_open_idx, *files), "idx")


def _open_idx(images_file: Path, labels_file: Path) -> Pictures:
    images = _read_idx(images_file, dimensions=3)
    labels = _labels(_read_idx(labels_file, dimensions=1), len(images), labels_file)
    return Pictures(len(images), images[..., None].__getitem__, labels, [])


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """MNIST's format: two zero bytes, the type, the number of dimensions, big-endian sizes, values."""
    refuse_pointer(file)
    try:
        with _open_plain_or_gzip(file) as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise ImageDataError(
                    f"{file}: expected the header 00 00 08 {dimensions:02x} (idx of unsigned bytes, "
                    f"{dimensions} dimensions), got {header[:4].hex(' ')}"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            content = np.frombuffer(stream.read(), np.uint8)
    except ImageDataError:
        raise
    except UNREADABLE as error:
        raise ImageDataError(f"{file}: is damaged ({error})") from error
    if content.size != int(np.prod(shape)):
        raise ImageDataError(f"{file}: expected {shape} bytes as its header says, got {content.size}")
    return content.reshape(shape)


def _open_plain_or_gzip(file: Path) -> gzip.GzipFile | IO[bytes]:
    """Opens a file by its first bytes, since some browsers change its name."""
    with file.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(file) if compressed else file.open("rb")


def _open_npz(file: Path, split: str) -> Pictures:
    arrays = npz.Arrays(file)
    splits = [name for name in npz.SPLITS if arrays.has(*npz.IMAGES, "jpeg", split=name)]
    own: str | None = None
    if splits:
        own = "val" if split == "test" and "test" not in splits else split
    if (own not in splits) if splits else (split != "train"):
        found = f"the splits {', '.join(splits)}" if splits else f"no splits (keys {arrays.keys})"
        raise SplitMissing(f"{printable(file)}: expected split {split!r}, got {found}")
    labels, streams = arrays.get(*npz.LABELS, split=own), arrays.get("jpeg", split=own)
    offsets = arrays.get("off", split=own)
    get: Callable[[int], np.ndarray]
    if streams is not None and offsets is not None:
        count, get = npz.streams(streams, offsets, arrays)
    elif (stored := arrays.get(*npz.IMAGES, split=own)) is not None:
        images = npz.images(stored, arrays)
        count, get = len(images), images.__getitem__
    else:
        prefix = "" if own is None else f"{own}_"
        raise ImageDataError(
            f"{printable(file)}: expected the key {prefix}x (or {prefix}images), or the keys {prefix}jpeg "
            f"and {prefix}off, got {arrays.keys}"
        )
    if labels is None:
        return Pictures(count, get, None, [], split=own)
    labels = npz.labels(labels, count, arrays)
    of_splits = (arrays.get(*npz.LABELS, split=name) for name in splits or (None,))
    every = [npz.labels(each, each.size, arrays) for each in of_splits if each is not None]
    return Pictures(count, get, *npz.classes(labels, every), split=own)


def _find_folder(path: Path, split: str) -> Source | None:
    folder, skipped = _unwrapped(listing.scan(path))
    if split == "train" and not (folder.images or folder.folders):
        left_out = listing.summary(folder.skipped, str(path))
        raise SplitMissing(f"data: {path} has no images{left_out and f'; skipped: {left_out}'}")
    own: str | None = None
    parts = listing.parts(folder)
    if parts.splits:
        if parts.others:
            unclear = listing.listed(inner.name for inner in parts.splits.values())
            classes = listing.listed(parts.others)
            raise ImageDataError(
                f"data: {folder.path}: {unclear} may be a split or a class, beside {classes}; rename the "
                "class, or put all classes into train/"
            )
        own = "val" if split == "test" and "test" not in parts.splits else split
        if own not in parts.splits:
            raise SplitMissing(
                f"data: {path}: expected split {split!r}, got the splits {', '.join(parts.splits)}"
            )
        skipped += listing.strays(folder, parts.splits.values()) + folder.skipped
        skipped += listing.left_out(parts.masks, "masks, by its name")
        folder, more = _unwrapped(parts.splits[own])
        skipped += more
    elif split != "train":
        if folder.images or folder.folders:
            raise SplitMissing(f"data: {path} has no split {split!r}, whose images would be in {split}/")
        return None
    found, more = _classes(folder, within_split=bool(parts.splits))
    skipped += more
    files, labels = [], list[int]()
    for i, inner in enumerate(found or [folder]):
        images, more = (inner.images, []) if inner is folder else listing.gather(inner)
        files += images
        skipped += more
        labels += [i] * len(images)
    if not files:
        return None
    names = [inner.name for inner in found]

    def get(i: int) -> np.ndarray:
        return pixels.read(files[i], files[i])

    def opened() -> Pictures:
        return Pictures(len(files), get, np.array(labels, np.int64) if found else None, names, files, own)

    return Source(files, opened, "folders of classes" if found else "a folder of images", skipped)


def _unwrapped(folder: Folder) -> tuple[Folder, list[Skipped]]:
    """A folder, or its only folder of images if named so, possibly beside masks; and what is skipped."""
    parts = listing.parts(folder)
    others = list(parts.others.values())
    if len(others) == 1 and listing.is_wrapper(others[0].name) and not parts.splits:
        inner, skipped = _unwrapped(others[0])
        skipped += (
            listing.strays(folder, others)
            + folder.skipped
            + listing.left_out(parts.masks, "masks, by its name")
        )
        return inner, skipped
    return folder, []


def _classes(folder: Folder, *, within_split: bool) -> tuple[list[Folder], list[Skipped]]:
    """The folders of classes in a folder, none if it holds images directly; and what is skipped.

    Args:
        within_split: whether the folder is a split, so that a class may have the name of a split.
    """
    parts = listing.parts(folder)
    classes = dict(parts.others)
    if within_split and classes:
        classes |= {inner.name: inner for inner in parts.splits.values()}
    elif parts.splits:
        inside = listing.listed(inner.name for inner in parts.splits.values())
        raise ImageDataError(f"data: {folder.path} is a split and holds the splits {inside}; keep one level")
    _check_masks(folder, parts.masks, classes)
    skipped = folder.skipped + listing.left_out(parts.masks, "masks, by its name")
    if folder.images and len(classes) == 1:
        raise listing.ambiguous(folder, classes)
    if classes:
        skipped += listing.strays(folder, classes.values())
    return [classes[name] for name in sorted(classes)], skipped


def _check_masks(folder: Folder, masks: dict[str, Folder], classes: dict[str, Folder]) -> None:
    """Rejects folders that are named like masks but may be classes."""
    stems: set[str] | None = None
    for name, inner in masks.items():
        what = f"data: {folder.path}: {name}/ may be masks or a class"
        alike = [other for other in classes if name.lower().rstrip("s") in other.lower()]
        if alike or len(classes) == 1 or not (classes or folder.images):
            raise ImageDataError(f"{what}, beside {listing.listed(alike or classes) or 'nothing'}; rename it")
        if stems is None:
            stems = {_stem(image) for image in folder.images}
            stems |= {_stem(i) for other in classes.values() for part in other.walk() for i in part.images}
        own = [listing.without_mask(_stem(image)) for part in inner.walk() for image in part.images]
        if 2 * sum(stem in stems for stem in own) < len(own):
            raise ImageDataError(f"{what}: most of its files match no image; rename it")


def _stem(image: str) -> str:
    return Path(image).stem.lower()


def _labels(labels: np.ndarray, count: int, file: Path) -> np.ndarray:
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or (count and labels.min() < 0):
        raise ImageDataError(
            f"{file}: labels must be {count} integers >= 0, got {labels.dtype} {list(labels.shape)}"
        )
    return labels.astype(np.int64)


def _all_there(files: list[Path]) -> list[Path]:
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ImageDataError(
            f"data: {', '.join(missing)} missing; a layout requires all of its files:\n{LAYOUTS}"
        )
    return files
