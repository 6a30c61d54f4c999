"""What a folder of images holds: one rule for all loaders.

- Names that begin with "." and what systems leave behind (`LITTER`) do not exist.
- Links are followed, but for those that lead back to a folder they lie in.
- A folder without images is no folder. Folders that this package marked as its results, and folders that hold
  such folders, are left out.
- Usual names of splits and of masks are taken as such, in any case and spelling (`split_of`, `is_masks`).
- An image called NAME_mask or NAME_gt beside an image NAME is its mask.

What is left out is told, with the reason. Imports the standard library and ``dxmi_ext``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dxmi_ext.engine import folders
from dxmi_ext.images.contents import ImageDataError as ImageDataError
from dxmi_ext.images.contents import printable as printable

PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LITTER = {"__macosx", "__pycache__", "$recycle.bin", "@eadir", "lost+found"}
LITTER |= {"desktop.ini", "ehthumbs.db", "thumbs.db"}
"""Names, in lower case, that do not exist."""

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
_REASONS = 8  # in a summary
_YEAR = re.compile(r"(19|20)\d\d$")
_MASK_OF = re.compile(
    r"(.+)[-_. ](?:masks?|gts?|ground_?truth|seg|segmentation)(?:\.[^.]*)?", re.IGNORECASE | re.DOTALL
)


class Skipped(NamedTuple):
    """What is left out."""

    path: str
    reason: str


@dataclasses.dataclass
class Folder:
    """A folder, and the folders in it that hold images, directly or further down."""

    path: str
    images: list[str]
    """Paths of those directly in it, sorted."""
    folders: dict[str, Folder]
    """By name, sorted."""
    skipped: list[Skipped]
    """What is left out of it, not of the folders in it."""

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def walk(self) -> Iterator[Folder]:
        """Itself and all folders below."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    def count(self) -> int:
        """How many images it holds, those below included."""
        return sum(len(folder.images) for folder in self.walk())


class Parts(NamedTuple):
    """The folders in a folder, by what their names say."""

    splits: dict[str, Folder]
    """By "train", "test", "val"."""
    masks: dict[str, Folder]
    others: dict[str, Folder]
    """By their names, as masks are."""


def scan(path: Path | str) -> Folder:
    """What lies in a folder, by this module's rule.

    Raises:
        ImageDataError: it holds results of this package, or a folder in it cannot be read.
    """
    if _is_results(os.fspath(path)):
        raise ImageDataError(f"data: {path} holds results of dxmi, not data")
    try:
        return _scan(os.fspath(path), ())[0]
    except RecursionError as error:
        raise ImageDataError(f"data: {path} holds folders that lie too deep in others") from error


def _scan(path: str, above: tuple[tuple[int, int], ...]) -> tuple[Folder, bool]:
    """What lies in a folder, and whether a folder of results lies directly in it.

    Args:
        above: device and inode of the folders on the way to it.
    """
    folder, names, holds_results = Folder(path, [], {}, []), dict[str, str](), False
    try:
        stat = os.stat(path)
        with os.scandir(path) as found:  # paths are strings: a million Paths take half a minute
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
            reason = "not an image of a type that is read"
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
    """The names of images that are masks of others."""
    likely = {name: match[1] for name in names if (match := _MASK_OF.fullmatch(name))}
    stems = {_stem(name) for name in names} if likely else set()
    return {name for name, of in likely.items() if of in stems}


def _is(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself
        return False


def _is_results(path: str) -> bool:
    """Whether a folder is marked, or holds a run or scores from before folders were."""
    folder = Path(path)
    scored = (folder / "scores.csv").is_file() and (folder / "heatmaps").is_dir()
    return folders.is_marked(folder) or folders.is_unmarked_run(folder) or scored


def _enter(folder: Folder, entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> str | None:
    """Takes a folder into the one that it lies in; or says why not."""
    stat = entry.stat()
    if stat.st_ino and (stat.st_dev, stat.st_ino) in above:
        return "a link back to a folder that it lies in"
    inner, holds_results = _scan(entry.path, above)
    if holds_results:
        return "results of dxmi"
    if not (inner.images or inner.folders):
        return "a folder without images"
    folder.folders[entry.name] = inner
    return None


# --- what names say ----------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """The split that a folder's name says: "train", "test" or "val"; None: it says none."""
    words = _words(name)
    splits = {_SPLITS[word] for word in words if word in _SPLITS}
    return splits.pop() if len(splits) == 1 and words <= _OF_SPLITS else None


def is_masks(name: str) -> bool:
    """Whether a folder's name says that it holds masks or other annotations."""
    words = _words(name)
    return not words.isdisjoint(_MASKS) and words <= _OF_MASKS


def is_wrapper(name: str) -> bool:
    """Whether a folder's name says no more than that there are images in it."""
    words = _words(name)
    return bool(words) and words <= _IMAGES


def _words(name: str) -> set[str]:
    """Those of GroundTruth, ground-truth or "ground truth"; train2017's is train."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return {_YEAR.sub("", word) for word in re.split(r"[\W_]+", parted)} - {""}


def parts(folder: Folder) -> Parts:
    """Sorts the folders in a folder by their names.

    Raises:
        ImageDataError: several say the same split.
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
    """All images in a folder and below, sorted by their paths, and what is left out: masks among others.

    Args:
        splits: whether splits may lie in it.

    Raises:
        ImageDataError: splits lie in it, which may not.
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
    """The images beside folders that are read, which are left out.

    Raises:
        ImageDataError: there are more of them than a folder holds on average.
    """
    counts = {inner.name: inner.count() for inner in kept}
    if len(folder.images) * len(counts) > sum(counts.values()):
        raise ambiguous(folder, counts)
    return [Skipped(image, f"beside {listed(counts, 3)}") for image in folder.images]


def ambiguous(folder: Folder, names: Iterable[str]) -> ImageDataError:
    """Of images beside folders of images."""
    first, more = os.path.basename(folder.images[0]), len(folder.images) - 1
    images = f"{first} and {more} more" if more else first
    return ImageDataError(
        f"data: {folder.path}: expected either images or folders of images, got both: {images} beside "
        f"{listed(names)}"
    )


def left_out(unused: dict[str, Folder], reason: str) -> list[Skipped]:
    """Whole folders."""
    return [Skipped(inner.path, reason) for inner in unused.values()]


def summary(skipped: Iterable[Skipped], root: str) -> str:
    """What is left out of a folder, in a line: the first of each reason; empty where there is nothing."""
    of_reason = dict[str, list[str]]()
    for path, reason in skipped:
        of_reason.setdefault(reason, []).append(os.path.relpath(path, root))
    shown = [
        f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)} ({reason})"
        for reason, paths in of_reason.items()
    ]
    more = [f"{len(shown) - _REASONS} more reasons"] * (len(shown) > _REASONS)
    return printable("; ".join(shown[:_REASONS] + more))


def stem_of(path: str, start: str) -> str:
    """A file's path from a folder on, without its suffix."""
    return os.path.splitext(os.path.relpath(path, start))[0]


def without_mask(stem: str) -> str:
    """The name that a mask's name is made from: NAME of NAME_mask and of NAME."""
    match = _MASK_OF.fullmatch(stem)
    return stem if match is None else match[1]


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names of folders in words; of many the first."""
    shown = [f"{name}/" for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
