"""Images to score, which threads read and draw. Imports numpy, torch and ``dxmi_ext``; Pillow where used."""

from __future__ import annotations

import collections
import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dxmi_ext.anomaly.data.dataset import resized
from dxmi_ext.anomaly.detectors import common
from dxmi_ext.anomaly.scores import page, plots
from dxmi_ext.anomaly.scores.page import Place, Shown
from dxmi_ext.images.data import pixels
from dxmi_ext.images.data.contents import ImageDataError, printable
from dxmi_ext.images.data.pixels import NOMINAL, Scale

_LONGEST = 512  # pixels of the longer side of heat maps
_THREADS = min(8, os.cpu_count() or 1)


class Picture(NamedTuple):
    """An image to score."""

    path: str
    image: np.ndarray | None
    """uint8 [3, size, size], input of the network; None if the file cannot be read."""
    shown: np.ndarray | None
    """uint8 [H, W, 3], for the heat map and the page; None if neither shows it."""
    error: str = ""
    has_pages: bool = False
    """Whether the file has several pages, of which this is the first."""
    clipped: bool = False
    """Whether it has values beyond the scale."""


def read(path: str, size: int, shows: bool, scale: Scale = NOMINAL) -> Picture:
    """Decodes and resizes an image; one that cannot be decoded has an error instead."""
    try:
        stored = pixels.read(path, path)
        picture = pixels.eight_bits(stored, scale, printable(path))
    except ImageDataError as error:
        return Picture(path, None, None, str(error).removeprefix(f"{printable(path)}: "))
    image = np.ascontiguousarray(resized(picture, size).transpose(2, 0, 1))
    shown = _thumbnail(picture, _LONGEST) if shows else None
    return Picture(path, image, shown, "", pixels.has_pages(path), pixels.exceeds(stored, scale))


def _thumbnail(picture: np.ndarray, longest: int) -> np.ndarray:
    """Shrinks an image [H, W, 3] so that its longer side has at most ``longest`` pixels."""
    height, width = picture.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return picture
    from PIL import Image

    size = max(1, round(scale * width)), max(1, round(scale * height))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, reducing_gap=3))


def draw(
    picture: Picture, scores: Tensor, pixel_threshold: float, png: Path | None, place: Place | None
) -> Shown | None:
    """Writes a heat map if it has a file, and returns the thumbnails if the image has a place on the page."""
    from PIL import Image

    assert picture.shown is not None
    height, width = picture.shown.shape[:2]
    pixels = common.localize(scores[None], (height, width))[0].numpy()
    heat_map = plots.heat_map(picture.shown, pixels, pixel_threshold)
    if png is not None:
        Image.fromarray(heat_map).save(png, compress_level=3)
    if place is None:
        return None
    small, heat = (_thumbnail(each, page.THUMBNAIL) for each in (picture.shown, heat_map))
    return Shown(place, (small.shape[1], small.shape[0]), _jpeg(small), _jpeg(heat))


def _jpeg(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80, subsampling=0)
    return file.getvalue()


@contextlib.contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; work that has not begun is canceled at the end."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="score")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[str], Picture], arguments: Iterable[str], count: int
) -> Iterator[Picture]:
    """Results in order, with at most ``count`` computed in advance."""
    waiting = collections.deque[Future[Picture]]()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches(pictures: Iterator[Picture], size: int) -> Iterator[tuple[int, list[Picture]]]:
    """Batches of images, each with the index of its first."""
    first, batch = 0, list[Picture]()
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield first, batch
            first, batch = first + size, []
    if batch:
        yield first, batch
