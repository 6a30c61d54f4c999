"""Listing of folders of images, with the same rules for all loaders.

- Names that begin with "." and files of operating systems (`LITTER`) are ignored.
- Links are followed, except those to a parent folder.
- Folders without images are ignored. Folders that this package marked as its results, and folders that hold
  such folders, are skipped.
- Common names of splits and masks are recognized, in any case and spelling (`split_of`, `is_masks`).
- An image called NAME_mask or NAME_gt beside an image NAME is its mask.

Skipped files are reported with the reason. Imports the standard library and ``dxmi_ext``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dxmi_ext.engine.errors import first_few
from dxmi_ext.engine.storage import folders
from dxmi_ext.images.data.contents import ImageDataError as ImageDataError
from dxmi_ext.images.data.contents import printable as printable

PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LITTER = {"__macosx", "__pycache__", "$recycle.bin", "@eadir", "lost+found"}
LITTER |= {"desktop.ini", "ehthumbs.db", "thumbs.db"}
"""Ignored names, in lower case."""

_SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "valset"), "val"),
}
_IMAGES = {"data", "image", "images", "img", "imgs", "jpegimages", "photo", "photos", "picture", "pictures"}
_OF_SPLITS = _IMAGES | _SPLITS.keys() | {"set", "split"}
_MASKS = {"anno", "annos", "annot", "annots", "annotation", "annotations", "label", "labels", "labelmap"}
_MASKS |= {"groundtruth", "groundtruths", "gt", "gts", "mask", "masks", "truth", "truths", "seg", "segs"}
_MASKS |= {"segmentation", "segmentations", "segmentationclass", "segmentationobject"}
_OF_MASKS = _MASKS | _IMAGES | _SPLITS.keys() | {"anomaly", "binary", "class", "color", "defect", "defects"}
_OF_MASKS |= {"ground", "map", "maps", "object", "pixel", "png"}
_UNREAD = "not an image of a type that is read"
_REASONS = 8  # maximum number in a summary
_YEAR = re.compile(r"(19|20)\d\d$")
_MASK_OF = re.compile(
    r"(.+)[-_. ](?:masks?|gts?|ground_?truth|seg|segmentation)(?:\.[^.]*)?", re.IGNORECASE | re.DOTALL
)


class Skipped(NamedTuple):
    """A skipped file or folder."""

    path: str
    reason: str


@dataclasses.dataclass
class Folder:
    """A folder, and its subfolders that hold images, at any depth."""

    path: str
    images: list[str]
    """Sorted paths of the images directly in it."""
    folders: dict[str, Folder]
    """Subfolders by name, sorted."""
    skipped: list[Skipped]
    """What is skipped directly in it."""

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def walk(self) -> Iterator[Folder]:
        """The folder and all below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    def count(self) -> int:
        """Number of images, including those below."""
        return sum(len(folder.images) for folder in self.walk())


class Parts(NamedTuple):
    """The subfolders of a folder, by the role that their names indicate."""

    splits: dict[str, Folder]
    """Splits by "train", "test", "val"."""
    masks: dict[str, Folder]
    others: dict[str, Folder]
    """Masks by name."""


def scan(path: Path | str) -> Folder:
    """The content of a folder, by this module's rules.

    Raises:
        ImageDataError: it holds results of this package, or a subfolder cannot be read.
    """
    if _is_results(os.fspath(path)):
        raise ImageDataError(f"data: {path} holds results of dxmi, not data")
    try:
        return _scan(os.fspath(path), ())[0]
    except RecursionError as error:
        raise ImageDataError(f"data: {path} has folders nested too deeply") from error


def _scan(path: str, above: tuple[tuple[int, int], ...]) -> tuple[Folder, bool]:
    """The content of a folder, and whether it directly holds a folder of results.

    Args:
        above: device and inode of its parent folders.
    """
    folder, names, holds_results = Folder(path, [], {}, []), dict[str, str](), False
    try:
        stat = os.stat(path)
        with os.scandir(path) as found:  # strings, since a million Paths take half a minute
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ImageDataError(f"data: {path} cannot be read: {error.strerror}") from error
    above = (*above, (stat.st_dev, stat.st_ino))
    for entry in entries:
        reason = None
        if entry.name.startswith(".") or entry.name.lower() in LITTER:
            continue
        if _is(entry.is_dir):
            is_results = _is_results(entry.path)
            holds_results |= is_results
            reason = "results of dxmi" if is_results else _enter(folder, entry, above)
        elif not _is(entry.is_file):
            reason = "a broken link" if entry.is_symlink() else "not a regular file"
        elif not entry.name.lower().endswith(PICTURES):
            reason = _UNREAD
        else:
            names[entry.name] = entry.path
        if reason is not None:
            folder.skipped.append(Skipped(entry.path, reason))
    masks = _masks_beside(names)
    for name, image in names.items():
        if name in masks:
            folder.skipped.append(Skipped(image, "a mask beside its image"))
        else:
            folder.images.append(image)
    return folder, holds_results


def _masks_beside(names: Iterable[str]) -> set[str]:
    """The names of images that are masks of other images."""
    likely = {name: match[1] for name in names if (match := _MASK_OF.fullmatch(name))}
    stems = {_stem(name) for name in names} if likely else set()
    return {name for name, of in likely.items() if of in stems}


def _is(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself
        return False


def _is_results(path: str) -> bool:
    """Whether a folder is marked, or holds a run or scores of an earlier version without marks."""
    folder = Path(path)
    scored = (folder / "scores.csv").is_file() and (folder / "heatmaps").is_dir()
    return folders.is_marked(folder) or folders.is_unmarked_run(folder) or scored


def _enter(folder: Folder, entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> str | None:
    """Adds a subfolder to its folder, or returns the reason why it is skipped."""
    stat = entry.stat()
    if stat.st_ino and (stat.st_dev, stat.st_ino) in above:
        return "a link to a parent folder"
    inner, holds_results = _scan(entry.path, above)
    if holds_results:
        return "results of dxmi"
    if not (inner.images or inner.folders):
        unread = any(reason == _UNREAD for _, reason in inner.skipped)
        return "a folder without images" + (" of a type that is read" if unread else "")
    folder.folders[entry.name] = inner
    return None


# --- what names say ----------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """The split that a folder's name indicates: "train", "test", "val" or None."""
    words = _words(name)
    splits = {_SPLITS[word] for word in words if word in _SPLITS}
    return splits.pop() if len(splits) == 1 and words <= _OF_SPLITS else None


def is_masks(name: str) -> bool:
    """Whether a folder's name indicates masks or other annotations."""
    words = _words(name)
    return not words.isdisjoint(_MASKS) and words <= _OF_MASKS


def is_wrapper(name: str) -> bool:
    """Whether a folder's name only means that it holds images."""
    words = _words(name)
    return bool(words) and words <= _IMAGES


def _words(name: str) -> set[str]:
    """The words in a name such as GroundTruth, ground-truth or train2017 (train)."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return {_YEAR.sub("", word) for word in re.split(r"[\W_]+", parted)} - {""}


def parts(folder: Folder) -> Parts:
    """Sorts the subfolders of a folder by their names.

    Raises:
        ImageDataError: several names mean the same split.
    """
    found = Parts({}, {}, {})
    for name, inner in folder.folders.items():
        if split := split_of(name):
            if split in found.splits:
                both = f"{found.splits[split].name}/ and {name}/"
                raise ImageDataError(f"data: {folder.path}: {both} both mean the split {split!r}; keep one")
            found.splits[split] = inner
        else:
            (found.masks if is_masks(name) else found.others)[name] = inner
    return found


# --- what loaders make of it -------------------------------------------------------------------------


def gather(folder: Folder, *, splits: bool = False) -> tuple[list[str], list[Skipped]]:
    """All images in a folder and below, sorted by path, and what is skipped, such as masks.

    Args:
        splits: whether it may hold splits.

    Raises:
        ImageDataError: it holds splits, but may not.
    """
    found = parts(folder)
    if found.splits and not splits:
        names = listed(inner.name for inner in found.splits.values())
        raise ImageDataError(
            f"data: {folder.path} holds the splits {names}; a split holds classes or kinds of defect, not "
            "the other way round"
        )
    images, skipped = list(folder.images), [*folder.skipped, *left_out(found.masks, "masks, by its name")]
    for name, inner in folder.folders.items():
        if name not in found.masks:
            more, reasons = gather(inner, splits=splits)
            images += more
            skipped += reasons
    return sorted(images), skipped


def strays(folder: Folder, kept: Iterable[Folder]) -> list[Skipped]:
    """The images beside folders that are read, which are skipped.

    Raises:
        ImageDataError: there are more of them than images per folder on average.
    """
    counts = {inner.name: inner.count() for inner in kept}
    if len(folder.images) * len(counts) > sum(counts.values()):
        raise ambiguous(folder, counts)
    return [Skipped(image, f"beside {listed(counts, 3)}") for image in folder.images]


def ambiguous(folder: Folder, names: Iterable[str]) -> ImageDataError:
    """The error for images beside folders of images."""
    images = first_few(map(os.path.basename, folder.images), 1)
    return ImageDataError(
        f"data: {folder.path}: expected either images or folders of images, got both: {images} beside "
        f"{listed(names)}"
    )


def left_out(unused: dict[str, Folder], reason: str) -> list[Skipped]:
    """Skips whole folders."""
    return [Skipped(inner.path, reason) for inner in unused.values()]


def summary(skipped: Iterable[Skipped], root: str) -> str:
    """What is skipped in a folder, as one line with the first of each reason; empty if nothing is."""
    of_reason = dict[str, list[str]]()
    for path, reason in skipped:
        of_reason.setdefault(reason, []).append(os.path.relpath(path, root))
    shown = [f"{first_few(paths, 1)} ({reason})" for reason, paths in of_reason.items()]
    if len(shown) > _REASONS:
        shown = [*shown[:_REASONS], f"{len(shown) - _REASONS} more reasons"]
    return printable("; ".join(shown))


def stem_of(path: str, start: str) -> str:
    """A file's path relative to a folder, without suffix."""
    return os.path.splitext(os.path.relpath(path, start))[0]


def without_mask(stem: str) -> str:
    """The image's name for a mask's: NAME for NAME_mask and for NAME."""
    match = _MASK_OF.fullmatch(stem)
    return stem if match is None else match[1]


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names of folders as text, at most the first few."""
    return first_few([f"{name}/" for name in names], most)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
