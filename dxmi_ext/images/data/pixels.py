"""Conversion of pixels of any depth to 8 bits, with one scale for training, testing and scoring.

Files are decoded at their own depth; only `eight_bits` converts. Imports numpy and the standard library;
Pillow where a file is decoded.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

import numpy as np

from dxmi_ext.images.data.contents import ImageDataError, printable, what_it_is

BACKGROUND = 255
"""Background of transparent pixels, white, in place of their hidden color."""
_DEPTHS = (8, 10, 12, 14, 16)
"""Depths of cameras and scanners in bits, so that a dark training set is not taken for a smaller depth."""
_ORIENTATION = 0x0112  # tag of EXIF
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
_TURNS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
"""What turns an image of an orientation upright."""
_SLACK = 0.01  # tolerance as share of a range
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))  # ranges of floats, besides those of integers


class Scale(NamedTuple):
    """Black and white in images of other than 8 bits, from the training set, for all images of a run.

    Images of 8 bits are not scaled.
    """

    white: int = 65535
    """White of integers: 2^bits - 1 for the smallest of 8, 10, 12, 14 and 16 bits that holds the training
    set's maximum; 65535 if it has no integers."""
    floats: tuple[float, float] | None = None
    """Black and white of floats: the first of [0, 1], [-1, 1], [0, 255] and [0, 2^bits - 1] that holds the
    training set; None if it has no floats."""

    @classmethod
    def of(cls, stored: Any) -> Scale:
        """The scale from a json list; None for a run of an earlier version without scales."""
        if stored is None:
            return cls()
        white, floats = stored
        return cls(int(white), None if floats is None else (float(floats[0]), float(floats[1])))


class Unsettled(Exception):
    """A scale is required, but not determined yet."""


def settled(images: Iterable[np.ndarray], name: str) -> Scale:
    """The scale of a training set.

    Args:
        images: images of the set, [..., C].
        name: name of the set, for errors.

    Raises:
        ImageDataError: values are negative, not finite, or in no known range.
    """
    highest, low, high = -1, np.inf, -np.inf
    for image in images:
        colors = _colors(image)
        if _is_eight_bits(image) or colors.size == 0:
            continue
        least, most = colors.min(), colors.max()
        if image.dtype.kind == "f":
            if not (np.isfinite(least) and np.isfinite(most)):
                raise ImageDataError(f"{name}: pixel values must be finite, some are not")
            low, high = min(low, float(least)), max(high, float(most))
        elif least < 0 or most > 65535:
            raise ImageDataError(
                f"{name}: integer pixel values must lie in [0, 65535], got {least} to {most}"
            )
        else:
            highest = max(highest, int(most))
    return Scale(65535 if highest < 0 else _white(highest), None if high < low else _range(low, high, name))


def _white(highest: int) -> int:
    return int(next(2**bits - 1 for bits in _DEPTHS if highest < 2**bits))


def _range(low: float, high: float, name: str) -> tuple[float, float]:
    for black, white in _RANGES:
        slack = _SLACK * (white - black)  # for overshooting filters
        if black - slack <= low and high <= white + slack:
            return black, white
    if low >= 0 and high <= 65535:
        return 0.0, float(_white(int(np.ceil(high))))
    raise ImageDataError(
        f"{name}: float pixel values must lie in [0, 1], [-1, 1], [0, 255] or [0, 65535], "
        f"got {low:g} to {high:g}"
    )


NOMINAL = Scale()
"""The scale of 16 bits, used by default."""


def eight_bits(image: np.ndarray, scale: Scale | None, name: str = "image") -> np.ndarray:
    """Pixels as uint8 [..., C], C = 1 or 3.

    Args:
        image: bool, integers or floats [..., C] with C = 1 to 4; 2 and 4 have alpha, blended with BACKGROUND.
        scale: scale, beyond which values are clipped; None: only images of 8 bits are accepted.

    Raises:
        Unsettled: the image requires a scale, but there is none.
        ImageDataError: floats are not finite, or the scale has no range for them.
    """
    if image.dtype.kind == "b":
        image = image * np.uint8(255)
    elif not _is_eight_bits(image):
        if scale is None:
            raise Unsettled
        image = _scaled(image, scale, name)
    if image.shape[-1] in (1, 3):
        return image
    colors, alpha = image[..., :-1].astype(np.uint16), image[..., -1:].astype(np.uint16)
    return ((colors * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)


def _scaled(image: np.ndarray, scale: Scale, name: str) -> np.ndarray:
    if image.dtype.kind != "f":
        values = np.clip(image, 0, scale.white).astype(np.uint32)
        return ((values * 255 + scale.white // 2) // scale.white).astype(np.uint8)
    if scale.floats is None:
        raise ImageDataError(
            f"{name}: has float pixels, but the training images have integers, so its range is unknown; "
            "convert it or remove it"
        )
    if not np.isfinite(image).all():
        raise ImageDataError(f"{name}: pixel values must be finite, some are not")
    black, white = scale.floats
    shares = (np.clip(image, black, white).astype(np.float64) - black) / (white - black)
    return np.rint(shares * 255).astype(np.uint8)


def exceeds(image: np.ndarray, scale: Scale) -> bool:
    """Whether `eight_bits` clips any pixel."""
    colors = _colors(image)
    if _is_eight_bits(image) or colors.size == 0 or (image.dtype.kind == "f" and scale.floats is None):
        return False
    black, white = scale.floats if image.dtype.kind == "f" and scale.floats else (0, scale.white)
    return bool(colors.min() < black or colors.max() > white)


def _is_eight_bits(image: np.ndarray) -> bool:
    return image.dtype in (np.uint8, np.bool_)


def _colors(image: np.ndarray) -> np.ndarray:
    return image[..., :-1] if image.shape[-1] in (2, 4) else image


def read(file: str | IO[bytes], name: str) -> np.ndarray:
    """The pixels of an image file, turned upright as its EXIF data say, for `eight_bits`: [H, W, C] with
    C = 3, or 4 with alpha.

    Args:
        name: name for errors.

    Raises:
        ImageDataError: the file is damaged, or not an image.
    """
    try:
        values, raw = _pixels(file)
        if raw.startswith(("RGB;16", "RGBA;16")):  # Pillow reads the upper bytes; these are the lower
            return values.astype(np.uint16) << 8 | _pixels(file, _swapped(raw))[0]
        if raw == "LA;16B":  # gray and alpha, two bytes each
            upper, lower = np.split(_pixels(file, "RGBA")[0].astype(np.uint16)[..., [0, 2, 1, 3]], 2, 2)
            return (upper << 8 | lower)[..., [0, 0, 0, 1]]
        return values
    except ModuleNotFoundError:  # Pillow itself is missing
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        what = what_it_is(file)
        if what is None:
            unknown = type(error).__name__ == "UnidentifiedImageError"
            what = f"cannot be decoded ({'no known image format' if unknown else error})"
        raise ImageDataError(f"{printable(name)}: {what}") from error


def has_pages(file: str) -> bool:
    """Whether an image file has several pages or frames, of which `read` returns the first. Only its header
    is read."""
    from PIL import Image

    with Image.open(file) as image:
        return is_first_page(image)


def is_first_page(image: Any) -> bool:
    """Whether a file opened by Pillow has more pages or frames; previews in photos (MPO) do not count."""
    return getattr(image, "is_animated", False) and image.format != "MPO"


def marked(file: str, name: str) -> np.ndarray:
    """The marked pixels of a mask file, bool [H, W]: pixels that are neither black nor transparent; if there
    are none and alpha varies, pixels that are not transparent. In a JPEG they have at least half the highest
    value, since its compression leaves dark traces beside a mask."""
    values = read(file, name)
    colors, visible = _colors(values).any(axis=2), np.ones(values.shape[:2], bool)
    if _is_jpeg(file):
        colors &= values.max(axis=2) >= values.max() / 2
    if values.shape[2] == 4 and (values[..., 3] > 0).any():  # alpha of 0 everywhere has no information
        visible = values[..., 3] > 0
    found: np.ndarray = colors & visible
    return visible if not found.any() and not visible.all() else found


def _is_jpeg(file: str) -> bool:
    with open(file, "rb") as stream:
        return stream.read(2) == b"\xff\xd8"


def _pixels(file: str | IO[bytes], raw: str | None = None) -> tuple[np.ndarray, str]:
    """Pixels [H, W, 3 or 4] as decoded by Pillow, and their raw mode in the file, such as RGB;16B.

    Args:
        raw: raw mode to decode with instead.
    """
    from PIL import Image

    if not isinstance(file, str):
        file.seek(0)
    with Image.open(file) as image:
        found = _raw_mode(image)
        if raw is not None:
            image.tile = [_with_raw_mode(tile, raw) for tile in image.tile]
        image.load()  # so that `orientation` fails for the EXIF data alone
        turn = _TURNS.get(orientation(image))
        whole = image if turn is None else image.transpose(Image.Transpose[turn])
        if whole.mode.startswith(("I", "F")):  # Pillow's conversion would clip at 255
            return np.repeat(np.asarray(whole)[..., None], 3, axis=2), found
        alpha = whole.mode in ("RGBA", "RGBa", "LA", "La", "PA")
        alpha |= "transparency" in whole.info and ";16" not in found
        return np.asarray(whole.convert("RGBA" if alpha else "RGB")), found


def orientation(image: Any) -> int:
    """The orientation in the EXIF data of an image, 1 to 8; 1 if these are missing or damaged."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, struct.error):
        return 1
    return int(found) if found in range(1, 9) else 1


def _raw_mode(image: Any) -> str:
    """The raw mode in the file, such as RGB;16B; with several tiles, that of the first."""
    options = image.tile[0][3] if image.tile else ""
    found = options[0] if isinstance(options, tuple) and options else options
    return found if isinstance(found, str) else ""


def _with_raw_mode(tile: Any, raw: str) -> Any:
    *place, options = tile
    options = (raw, *options[1:]) if isinstance(options, tuple) else raw
    return type(tile)(*place, options) if hasattr(tile, "_fields") else (*place, options)


def _swapped(raw: str) -> str:
    own = "B" if sys.byteorder == "big" else "L"
    order = own if raw.endswith("N") else raw[-1]
    return raw[:-1] + ("L" if order == "B" else "B")
