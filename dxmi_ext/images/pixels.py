"""Pixels of any depth as 8 bits a channel, by one scale for training, testing and scoring.

Files are decoded to what they hold; `eight_bits` alone turns that into bytes. Imports numpy and the standard
library; Pillow where a file is decoded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

import numpy as np

from dxmi_ext.images.contents import ImageDataError, printable, what_it_is

BACKGROUND = 255
"""Transparent pixels show this, white, and never the colour that lies hidden in them."""
_DEPTHS = (8, 10, 12, 14, 16)
"""Bits of cameras and scanners. A dark training set must not seem to be of fewer."""
_SLACK = 0.01  # share of a range
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))  # of floats, and 0 to a number of bits


class Scale(NamedTuple):
    """What black and white are in images of other than 8 bits: the training set's, for all images of a run.

    Images of 8 bits are what they are.
    """

    white: int = 65535
    """Of integers of more bits: 2^bits - 1 of the fewest of 8, 10, 12, 14 and 16 bits that hold the training
    set's highest value; 65535 where it has none."""
    floats: tuple[float, float] | None = None
    """Black and white of floats: the first of [0, 1], [-1, 1], [0, 255] and [0, 2^bits - 1] that the training
    set keeps to; None where it has none."""

    @classmethod
    def of(cls, stored: Any) -> Scale:
        """From json, as a list; None: of a run before there were scales."""
        if stored is None:
            return cls()
        white, floats = stored
        return cls(int(white), None if floats is None else (float(floats[0]), float(floats[1])))


class Unsettled(Exception):
    """A scale is wanted and has yet to be found."""


def settled(images: Iterable[np.ndarray], name: str) -> Scale:
    """The scale of a training set.

    Args:
        images: of it, [..., C].
        name: of the set, for errors.

    Raises:
        ImageDataError: values are negative, not finite, or in no range that is known.
    """
    highest, low, high = -1, np.inf, -np.inf
    for image in images:
        colours = _colours(image)
        if _is_eight_bits(image) or colours.size == 0:
            continue
        least, most = colours.min(), colours.max()
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
        slack = _SLACK * (white - black)  # of filters that overshoot
        if black - slack <= low and high <= white + slack:
            return black, white
    if low >= 0 and high <= 65535:
        return 0.0, float(_white(int(np.ceil(high))))
    raise ImageDataError(
        f"{name}: float pixel values must lie in [0, 1], [-1, 1], [0, 255] or [0, 65535], "
        f"got {low:g} to {high:g}"
    )


NOMINAL = Scale()
"""That of 16 bits, where nothing else is known."""


def eight_bits(image: np.ndarray, scale: Scale | None, name: str = "image") -> np.ndarray:
    """Pixels as uint8 [..., C], C = 1 or 3.

    Args:
        image: bool, integers or floats [..., C], C = 1 to 4; 2 and 4 have alpha, which is laid on BACKGROUND.
        scale: what is below black or above white is clipped. None: only 8 bits are taken.

    Raises:
        Unsettled: there is no scale, and one is needed.
        ImageDataError: floats where the scale knows none, or some are not finite.
    """
    if image.dtype.kind == "b":
        image = image * np.uint8(255)
    elif not _is_eight_bits(image):
        if scale is None:
            raise Unsettled
        image = _scaled(image, scale, name)
    if image.shape[-1] in (1, 3):
        return image
    colours, alpha = image[..., :-1].astype(np.uint16), image[..., -1:].astype(np.uint16)
    return ((colours * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)


def _scaled(image: np.ndarray, scale: Scale, name: str) -> np.ndarray:
    if image.dtype.kind != "f":
        values = np.clip(image, 0, scale.white).astype(np.uint32)
        return ((values * 255 + scale.white // 2) // scale.white).astype(np.uint8)
    if scale.floats is None:
        raise ImageDataError(f"{name}: has float pixel values, whose range is unknown: no training image has")
    if not np.isfinite(image).all():
        raise ImageDataError(f"{name}: pixel values must be finite, some are not")
    black, white = scale.floats
    shares = (np.clip(image, black, white).astype(np.float64) - black) / (white - black)
    return np.rint(shares * 255).astype(np.uint8)


def exceeds(image: np.ndarray, scale: Scale) -> bool:
    """Whether `eight_bits` clips some of the pixels."""
    colours = _colours(image)
    if _is_eight_bits(image) or colours.size == 0 or (image.dtype.kind == "f" and scale.floats is None):
        return False
    black, white = scale.floats if image.dtype.kind == "f" and scale.floats else (0, scale.white)
    return bool(colours.min() < black or colours.max() > white)


def _is_eight_bits(image: np.ndarray) -> bool:
    return image.dtype in (np.uint8, np.bool_)


def _colours(image: np.ndarray) -> np.ndarray:
    return image[..., :-1] if image.shape[-1] in (2, 4) else image


def read(file: str | IO[bytes], name: str, *, upright: bool = False) -> np.ndarray:
    """What a file of an image holds, for `eight_bits`: [H, W, C], C = 3, or 4 with alpha.

    Args:
        name: what errors call it.
        upright: turned as its EXIF orientation says.

    Raises:
        ImageDataError: it is damaged, or no image.
    """
    try:
        values, raw = _pixels(file, upright)
        if raw.startswith(
            ("RGB;16", "RGBA;16")
        ):  # of which Pillow gives the upper bytes: these are the lower
            return values.astype(np.uint16) << 8 | _pixels(file, upright, _swapped(raw))[0]
        if raw == "LA;16B":  # grey and alpha, two bytes each
            upper, lower = np.split(
                _pixels(file, upright, "RGBA")[0].astype(np.uint16)[..., [0, 2, 1, 3]], 2, 2
            )
            return (upper << 8 | lower)[..., [0, 0, 0, 1]]
        return values
    except Exception as error:  # of a damaged file Pillow raises errors of many kinds
        what = what_it_is(file)
        if what is None:
            unknown = type(error).__name__ == "UnidentifiedImageError"
            what = f"cannot be decoded ({'no known image format' if unknown else error})"
        raise ImageDataError(f"{printable(name)}: {what}") from error


def decode(file: str | IO[bytes], name: str, scale: Scale = NOMINAL, *, upright: bool = False) -> np.ndarray:
    """A file of an image as uint8 [H, W, 3]. Arguments and errors as of `read` and `eight_bits`."""
    return eight_bits(read(file, name, upright=upright), scale, printable(name))


def marked(file: str, name: str, *, upright: bool = False) -> np.ndarray:
    """Where the file of a mask marks something, bool [H, W]: any colour but black, however dark, that is not
    transparent; or, where there is none and alpha tells pixels apart, whatever is not transparent."""
    values = read(file, name, upright=upright)
    colours, visible = _colours(values).any(axis=2), np.ones(values.shape[:2], bool)
    if values.shape[2] == 4 and (values[..., 3] > 0).any():  # alpha of 0 throughout tells nothing
        visible = values[..., 3] > 0
    found: np.ndarray = colours & visible
    return visible if not found.any() and not visible.all() else found


def _pixels(file: str | IO[bytes], upright: bool, raw: str | None = None) -> tuple[np.ndarray, str]:
    """Pixels [H, W, 3 or 4] as Pillow gives them, and how their numbers lie in the file, as RGB;16B.

    Args:
        raw: take them to lie otherwise.
    """
    from PIL import Image, ImageOps

    if not isinstance(file, str):
        file.seek(0)
    with Image.open(file) as image:
        found = _raw_mode(image)
        if raw is not None:
            image.tile = [_with_raw_mode(tile, raw) for tile in image.tile]
        whole = ImageOps.exif_transpose(image) if upright else image
        if whole.mode.startswith(("I", "F")):  # which Pillow's own conversion would cut off at 255
            return np.repeat(np.asarray(whole)[..., None], 3, axis=2), found
        alpha = whole.mode in ("RGBA", "RGBa", "LA", "La", "PA")
        alpha |= "transparency" in whole.info and ";16" not in found
        return np.asarray(whole.convert("RGBA" if alpha else "RGB")), found


def _raw_mode(image: Any) -> str:
    """How its numbers lie in the file, as RGB;16B; of several tiles those of the first."""
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
