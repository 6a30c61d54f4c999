"""Overview of what training would read from a path, before anything is decoded, from the loaders' sources.

Imports numpy and ``dxmi_ext``; Pillow and tqdm where the headers of image files are read.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dxmi_ext.engine.errors import first_few
from dxmi_ext.images.data import layouts, listing, pixels
from dxmi_ext.images.data.contents import resolved, what_it_is
from dxmi_ext.images.data.layouts import SplitMissing
from dxmi_ext.images.data.listing import Skipped

IMAGES = "images"
"""The label of images without classes."""
_SHOWN = 6  # number of labels in a line
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclasses.dataclass
class Overview:
    """What would be read from a path."""

    path: Path
    layout: str
    splits: dict[str, dict[str, int]]
    """Number of images of each class or kind of defect; IMAGES without classes."""
    masks: int
    """Number of images of defects with a mask."""
    skipped: list[Skipped]
    """What is skipped, with paths relative to ``path``."""
    files: dict[str, tuple[str, str]]
    """The split and the label of each image file, whose header has its size."""
    arrays: dict[tuple[int, ...], int]
    """Number of images in arrays, by shape [H, W, C]."""

    def lines(self) -> str:
        """Two lines: what is read, and what is skipped."""
        splits = "; ".join(f"{name} {_counts(counts)}" for name, counts in self.splits.items())
        masks = f"; {self.masks:,} masks" if self.masks else ""
        left_out = listing.summary(self._skipped_paths(), str(self.path)) or "nothing"
        return f"{self.path} ({self.layout}): {listing.printable(splits)}{masks}\nskipped: {left_out}"

    def details(self) -> dict[str, Any]:
        """The overview as JSON, with sizes ("width x height") and modes from the headers of files.

        Files whose header cannot be read are not counted.
        """
        sizes, modes, unreadable, paged = self._headers()
        skipped = [each._asdict() for each in self.skipped]
        splits = {name: dict(counts) for name, counts in self.splits.items()}
        for file in unreadable:
            split, label = self.files[file]
            splits[split][label] -= 1
        about: dict[str, Any] = {"path": str(self.path), "layout": self.layout, "splits": splits}
        about |= {"masks": self.masks, "skipped": skipped, "sizes": sizes, "modes": modes}
        listed = [{"path": os.path.relpath(f, self.path), "reason": why} for f, why in unreadable.items()]
        about |= {"unreadable": listed, "multipage": [os.path.relpath(file, self.path) for file in paged]}
        return about | {"files": len(self.files)}

    def _skipped_paths(self) -> list[Skipped]:
        return [Skipped(os.path.join(self.path, path), reason) for path, reason in self.skipped]

    def _headers(self) -> tuple[dict[str, int], dict[str, int], dict[str, str], list[str]]:
        """Counts of sizes and modes, the reasons why files cannot be read, and files with several pages."""
        sizes, modes = collections.Counter[str](), collections.Counter[str]()
        for shape, count in self.arrays.items():
            sizes[f"{shape[1]}x{shape[0]}"] += count
            modes[_MODES.get(shape[-1], "L")] += count
        unreadable, paged = dict[str, str](), list[str]()
        for file, (size, mode, has_pages) in zip(self.files, _read_headers([*self.files]), strict=True):
            if has_pages:
                paged.append(file)
            if size:
                sizes[size] += 1
                modes[mode] += 1
            else:
                unreadable[file] = mode
        return dict(sizes.most_common()), dict(modes.most_common()), unreadable, paged


def text_of(details: dict[str, Any]) -> str:
    """`Overview.details`, or those of points, and the recipe that reads the data, as text."""
    splits = details["splits"]
    labels = dict.fromkeys(label for counts in splits.values() for label in counts)
    rows = [["", *splits], *([label, *(f"{c.get(label, 0):,}" for c in splits.values())] for label in labels)]
    if len(labels) > 1:
        rows.append(["all", *(f"{sum(counts.values()):,}" for counts in splits.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{details['path']}: {details['layout']}, as recipe={details['recipe']} reads it"]
    for first, *others in rows:
        numbers = (f"  {number:>{width}}" for number, width in zip(others, widths[1:], strict=True))
        lines.append(f"    {first:<{widths[0]}}{''.join(numbers)}")
    lines.append(f"  masks: {details['masks'] or 'none'}")
    for key in ("sizes", "modes"):
        if details.get(key):
            lines.append(f"  {key}: {_listed(details[key])}")
    if ranges := details.get("ranges"):  # points have ranges
        shown = (f"{axis} from {low:.4g} to {high:.4g}" for axis, (low, high) in ranges.items())
        lines.append(f"  ranges: {', '.join(shown)}")
    for key, title in (("unreadable", "cannot be read"), ("skipped", "skipped")):
        named = [f"    {each['path']}: {each['reason']}" for each in details.get(key, [])]
        lines += [f"  {title}:" if named else f"  {title}: nothing", *named]
    if details.get("multipage"):
        lines.append(f"  several pages, of which the first is used: {first_few(details['multipage'])}")
    if details.get("unreadable"):
        lines.append("  Training stops at files that cannot be read, which are not counted here.")
    if details.get("files"):
        lines.append("  Only headers were read; training decodes whole files and names all damaged ones.")
    return listing.printable("\n".join(lines))


def of_images(path: Path | str) -> Overview:
    """The overview of the splits that `dataset.load` reads.

    Raises:
        ImageDataError: see `layouts.find`; or the collection cannot be opened.
    """
    path, found, missing = resolved(path), {}, None
    for split in ("train", "val", "test"):
        try:
            source = layouts.find(path, split)
            found[split] = source, source.open()
        except SplitMissing as error:
            missing = missing or error
    if "test" in found and found["test"][1].split == "val":  # used for test, and listed as val
        del found["test"]
    if missing and not found:
        raise missing
    splits, arrays, files = {}, dict[tuple[int, ...], int](), dict[str, tuple[str, str]]()
    for split, (_, pictures) in found.items():
        splits[split] = by_label(pictures.labels, pictures.class_names, pictures.n)
        if pictures.files:
            names = pictures.class_names
            labels = [IMAGES] * pictures.n if pictures.labels is None else [names[i] for i in pictures.labels]
            files |= {file: (split, label) for file, label in zip(pictures.files, labels, strict=True)}
        elif pictures.n and isinstance(first := pictures.get(0), np.ndarray):
            arrays[first.shape] = arrays.get(first.shape, 0) + pictures.n
    first_source = next(iter(found.values()))[0]
    skipped = [each for source, _ in found.values() for each in source.skipped]
    return Overview(path, first_source.layout, splits, 0, relative(skipped, path), files, arrays)


def by_label(labels: np.ndarray | None, names: Sequence[str], n: int) -> dict[str, int]:
    if labels is None:
        return {IMAGES: n}
    counts = np.bincount(labels, minlength=len(names)).tolist()
    names = [*names, *map(str, range(len(names), len(counts)))]
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def relative(skipped: Iterable[Skipped], root: Path) -> list[Skipped]:
    """Unique entries, with paths relative to the root."""
    return list(dict.fromkeys(Skipped(os.path.relpath(path, root), reason) for path, reason in skipped))


def _counts(counts: dict[str, int]) -> str:
    whole = f"{sum(counts.values()):,}"
    return f"{whole} ({_listed(counts)})" if len(counts) > 1 else _listed(counts) or whole


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{name}: {count:,}" for name, count in counts.items()]
    if len(shown) > _SHOWN:
        shown = [*shown[: _SHOWN - 1], f"{len(shown) - _SHOWN + 1} others"]
    return ", ".join(shown)


def _read_headers(files: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Size, once upright, mode, and whether there are several pages, of each image file; "" and the reason
    if it cannot be read."""
    if not files:
        return []
    from PIL import Image, UnidentifiedImageError
    from tqdm import tqdm

    def header(file: str) -> tuple[str, str, bool]:
        try:
            with Image.open(file) as image:
                # In other formats, EXIF data can only be found by decoding the image.
                has_exif = "exif" in image.info or image.format == "TIFF"
                lies = has_exif and pixels.orientation(image) >= 5
                width, height = image.size[::-1] if lies else image.size
                return f"{width}x{height}", image.mode, pixels.is_first_page(image)
        except UnidentifiedImageError:
            return "", what_it_is(file) or "no known image format", False
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            return "", str(error), False

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        progress = tqdm(total=len(files), desc="reading headers", unit="image", disable=None)
        with progress:
            found = []
            for size in threads.map(header, files):
                found.append(size)
                progress.update()
    return found
