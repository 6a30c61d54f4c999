"""Images that are not yet decoded, and what all layouts share: classes, kinds, and the share for training."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dxmi_ext.images.data import listing, pixels
from dxmi_ext.images.data.contents import ImageDataError
from dxmi_ext.images.data.listing import Folder, Skipped

SPLITS = ("train", "test")
GOOD = "good"


class Item(NamedTuple):
    """An image that is not yet decoded."""

    name: str
    object_class: int
    label: int
    """Index into the label names; 0 is good."""
    image: Callable[[], np.ndarray]
    """Returns [H, W, C] for `pixels.eight_bits`."""
    mask: Callable[[], np.ndarray] | None
    """Returns bool [H, W]; None if the image has no mask, as for good images."""
    file: str | None = None
    """Path of the image, if it is a file of its own."""


class Source(NamedTuple):
    """A split of a collection."""

    files: Sequence[str]
    """All files of the split; the cache depends on them."""
    items: list[Item]
    class_names: list[str]
    label_names: list[str]
    """Names of the labels; the first is good."""
    has_masks: bool
    """Whether every defect has a mask."""
    layout: str = ""
    skipped: Sequence[Skipped] = ()
    """Other files, which are skipped."""


def picture_item(name: str, object_class: int, label: int, image: str, mask: Path | str | None) -> Item:
    """The `Item` of an image file and the file of its mask."""
    return Item(
        name,
        object_class,
        label,
        lambda: pixels.read(image, image),
        None if mask is None else lambda: pixels.marked(str(mask), str(mask)),
        image,
    )


def good_of(folder: Folder, inner: dict[str, Folder]) -> Folder | None:
    """The folder of good images among inner folders; None if there is none.

    Raises:
        ImageDataError: there are several.
    """
    found = [each for name, each in inner.items() if name.lower() == GOOD]
    if len(found) > 1:
        both = listing.listed(each.name for each in found)
        raise ImageDataError(f"data: {folder.path}: {both} are all named good; keep one")
    return found[0] if found else None


def unknown(folder: Folder, found: str) -> ImageDataError:
    """The error for a folder in no known layout."""
    return ImageDataError(f"data: {folder.path}: {found}; `dxmi data --help` lists the layouts")


def chosen_classes(names: list[str], wanted: Sequence[str] | None, path: Path) -> list[str]:
    """The wanted classes, by default all.

    Raises:
        ImageDataError: a class does not exist, or is named twice.
    """
    if wanted is None:
        return names
    if not wanted or (missing := [name for name in wanted if name not in names]):
        got = ", ".join(missing) if wanted else "none"
        raise ImageDataError(f"classes must be in {path}, got {got}; it has {', '.join(names)}")
    if len({*wanted}) < len(wanted):
        raise ImageDataError(f"classes must be distinct, got {', '.join(wanted)}")
    return list(wanted)


def images_of(folder: Folder, skipped: list[Skipped], *, holds_directly: bool = False) -> list[str]:
    """Images of a kind in natural order (2.png before 10.png). Skipped files are added to the list.

    Raises:
        ImageDataError: the folder must contain images directly and does not, or it contains splits.
    """
    if holds_directly and not folder.images:
        inner = listing.listed(folder.folders)
        raise ImageDataError(
            f"data: {folder.path} must contain images of a kind of defect itself, got folders ({inner})"
        )
    files, more = listing.gather(folder)
    skipped += more
    return sorted(files, key=natural)


def natural(name: str) -> list[tuple[list[tuple[int, int, str]], str]]:
    """Sorting key of natural order of paths, which keeps the files of a folder together."""

    def numbers(part: str) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", part)
        return [(0, int(each), "") if each.isdecimal() else (1, 0, each) for each in parts]

    return [(numbers(part), part) for part in name.split(os.sep)]  # s1 and s01 differ


def leading(groups: Sequence[Any], share: float, path: Path | str) -> list[bool]:
    """Which of the good images are for training: the first ``share``, extended to the end of its last group;
    none if ``share`` is 0. Images of a group must be consecutive."""
    if not share:
        return [False] * len(groups)
    if len(set(groups)) < 2:
        raise ImageDataError(f"{path}: a split requires >= 2 good images or groups, got {len(set(groups))}")
    end = min(max(1, round(share * len(groups))), len(groups) - 1)
    while end < len(groups) and groups[end] == groups[end - 1]:
        end += 1
    if end == len(groups):  # the last group would train too: test it instead
        while groups[end - 1] == groups[-1]:
            end -= 1
    return [i < end for i in range(len(groups))]
