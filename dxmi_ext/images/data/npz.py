"""The arrays of npz and npy files, of any unambiguous type and shape.

Nothing is unpickled. Imports numpy and ``dxmi_ext``; Pillow where JPEG streams are decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dxmi_ext.engine.errors import first_few
from dxmi_ext.images.data import pixels
from dxmi_ext.images.data.contents import DataError, ImageDataError, printable, what_it_is

SUFFIXES = (".npz", ".npy")
SPLITS = ("train", "test", "val")
IMAGES = ("x", "images", "samples", "data", "arr_0")
"""Keys of images, including those of `dxmi sample` and numpy; case-insensitive, like all keys."""
LABELS = ("y", "labels", "label", "arr_1")
_SHOWN = 12  # number of keys in an error


class Arrays:
    """The arrays of a file, read on demand. The array of a .npy file is named arr_0.

    Args:
        file: npz or npy file, with any name.
        kind: class of the errors.
        content: content of the file, if already read.
        formats: description of the expected format, for errors.

    Raises:
        DataError: the file cannot be read, or holds Python objects.
    """

    def __init__(
        self,
        file: Path,
        kind: type[DataError] = ImageDataError,
        *,
        content: Any = None,
        formats: str = "npz without pickles",
    ) -> None:
        self.file, self.kind, self.formats = file, kind, formats
        try:
            content = np.load(file, allow_pickle=False) if content is None else content
        except Exception as error:  # numpy raises many kinds of errors for damaged files
            raise self._unreadable("", _reason(file, error)) from error
        self._content = {"arr_0": content} if isinstance(content, np.ndarray) else content
        self._names = {name.lower(): name for name in reversed([*self._content])}

    def __contains__(self, key: str) -> bool:
        return key.lower() in self._names

    @property
    def keys(self) -> str:
        """Its keys, for errors."""
        return first_few(map(printable, self._content), _SHOWN) or "none"

    def get(self, *names: str, split: str | None = None) -> np.ndarray | None:
        """The first of some arrays that exists, or None.

        Args:
            names: names in lower case.
            split: split of the array, SPLIT_NAME or NAME_SPLIT.
        """
        for name in names:
            for key in (name,) if split is None else (f"{split}_{name}", f"{name}_{split}"):
                if key in self._names:
                    return self.read(self._names[key])
        return None

    def has(self, *names: str, split: str) -> bool:
        """Whether a split has one of some arrays."""
        return any(f"{split}_{name}" in self or f"{name}_{split}" in self for name in names)

    @property
    def alone(self) -> str | None:
        """The key, if there is exactly one."""
        return next(iter(self._content)) if len(self._names) == 1 else None

    def read(self, name: str) -> np.ndarray:
        """The array of a key."""
        try:
            array = self._content[name]
        except Exception as error:
            raise self._unreadable(f"{printable(name)}: ", error) from error
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise self._unreadable(f"{printable(name)}: ", "it is not an array of numbers")
        return array

    def _unreadable(self, what: str, error: Exception | str) -> DataError:
        return self.kind(f"{printable(self.file)}: {what}cannot be read as {self.formats} ({error})")

    def refuse(self, what: str, array: np.ndarray, wanted: str) -> DataError:
        """The error for an invalid array."""
        got = f"{array.dtype} {list(array.shape)}"
        return self.kind(f"{printable(self.file)}: {what} must be {wanted}, got {got}")


def _reason(file: Path, error: Exception) -> Exception | str:
    """Why numpy cannot read a file; it takes any unknown file for a pickle."""
    what = what_it_is(file)
    if isinstance(error, OSError) and error.strerror:  # without the path, which the message names
        return error.strerror
    if isinstance(error, OSError) or (what is not None and ("zip" in what or "numpy" in what)):
        return error
    return "it is not a numpy file" if what is None else f"it {what}"


def column(array: np.ndarray, n: int) -> np.ndarray | None:
    """An array of n values, [n], [n, 1] or [1, n], as [n]; None if it has another shape."""
    flat = array.size == n and max((1, *array.shape)) == max(1, n)
    return array.reshape(n) if flat else None


def whole(array: np.ndarray | None) -> np.ndarray | None:
    """Integers of any type as int64; None if some have a fraction or there is no array."""
    if array is None or array.dtype.kind not in "biuf":
        return None
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        return None
    return array.astype(np.int64)


def octets(array: np.ndarray) -> np.ndarray | None:
    """Bytes stored in any numeric type as uint8; None if they are not bytes."""
    if array.dtype == np.uint8:
        return array
    found = whole(array)
    if found is None or (found.size and not 0 <= found.min() <= found.max() < 256):
        return None
    return found.astype(np.uint8)


def images(array: np.ndarray, arrays: Arrays) -> np.ndarray:
    """Images as [n, H, W, C] with their type, for `pixels.eight_bits`.

    Args:
        array: [n, H, W], channels last or channels first.

    Raises:
        DataError: the array does not hold images.
    """
    if array.dtype.kind in "biuf" and array.size:
        if array.ndim == 3:
            return array[..., None]
        if array.ndim == 4:
            for channels in ((1, 3), (2, 4)):  # alpha last, since a height or width of 4 is as likely
                if array.shape[3] in channels:
                    return array
                if array.shape[1] in channels:
                    return array.transpose(0, 2, 3, 1)
    raise arrays.refuse("images", array, "numbers [n, H, W], [n, H, W, C] or [n, C, H, W], C = 1 to 4")


def streams(
    array: np.ndarray, offsets: np.ndarray, arrays: Arrays
) -> tuple[int, Callable[[int], np.ndarray]]:
    """The number of concatenated JPEG or PNG streams, and a function that decodes one.

    Raises:
        DataError: the offsets do not match the array.
    """
    bounds = whole(offsets)
    if bounds is None or bounds.ndim != 1 or bounds.size < 2:
        raise arrays.refuse("offsets of streams", offsets, "integers [n + 1]")
    content = octets(array)
    if content is None or content.ndim != 1:
        raise arrays.refuse("streams", array, "bytes, uint8 [total]")
    if bounds[0] < 0 or (np.diff(bounds) < 0).any() or bounds[-1] > content.size:
        raise arrays.kind(
            f"{printable(arrays.file)}: offsets of streams must not decrease and lie in "
            f"[0, {content.size}], the number of bytes, got {bounds[0]} to {bounds[-1]}"
        )

    def get(i: int) -> np.ndarray:
        stream = io.BytesIO(content[bounds[i] : bounds[i + 1]].tobytes())
        return pixels.read(stream, f"{printable(arrays.file)}, image {i}")

    return len(bounds) - 1, get


def labels(array: np.ndarray, n: int, arrays: Arrays) -> np.ndarray:
    """Labels [n]: integers or texts.

    Raises:
        DataError: their number is wrong, or some have a fraction.
    """
    flat = column(array, n)
    found = flat if flat is not None and flat.dtype.kind in "US" else whole(flat)
    if found is None:
        raise arrays.refuse("labels", array, f"{n} integers or names")
    return found


def classes(own: np.ndarray, every: Sequence[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Labels [n] as classes 0, 1, ..., and their names: the sorted distinct labels of all splits.

    Returns:
        int64 [n], and names unless labels are already classes.
    """
    values = np.unique(np.concatenate(every))
    names = [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in
             values.tolist()]  # fmt: skip
    if values.dtype.kind == "i" and np.array_equal(values, np.arange(len(values))):
        return own, []
    return np.searchsorted(values, own).astype(np.int64), names


def masks(arrays: Arrays, shape: tuple[int, ...]) -> np.ndarray | None:
    """Masks of images [n, H, W], true where not 0; None without masks.

    Raises:
        DataError: they have another shape, or packed bits are not bytes.
    """
    n, height, width = shape
    found = arrays.get("mask", "masks")
    if found is None:
        if (packed := arrays.get("mask_packed")) is None:
            return None
        content = octets(packed)
        if content is None or content.ndim != 3:
            raise arrays.refuse("packed masks", packed, f"bytes {[n, height, -(-width // 8)]} of np.packbits")
        found = np.unpackbits(content, axis=-1)[..., :width]
    if found.dtype.kind in "biuf":
        for each in (found, *(found.squeeze(i) for i in (1, 3) if found.ndim == 4 and found.shape[i] == 1)):
            if each.shape == shape:
                return each != 0
    raise arrays.kind(f"{printable(arrays.file)}: masks must be {list(shape)}, got {list(found.shape)}")
