"""Layouts of collections of good and defective images on disk, and their training and test splits.

Imports numpy and ``dxmi_ext``; Pillow where an image is decoded.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dxmi_ext.images import listing, npz, pixels
from dxmi_ext.images.contents import ImageDataError, printable, refuse_pointer, what_it_is
from dxmi_ext.images.listing import Folder, Skipped

LAYOUTS = """\
  MVTec-AD    [CLASS/]train/good/*.png, [CLASS/]test/good|DEFECT/NAME.png,
              [CLASS/]ground_truth/DEFECT/NAME_mask.png (or NAME.png); the folder of all classes or of one
  VisA        split_csv/1cls.csv (object,split,label,image,mask), and the files that it names
  folders     good/**/*.jpg; any other folder of images is a kind of defect: DEFECT/*.jpg;
              for localization masks/[DEFECT/]NAME.png for every defective image (or ground_truth/, ...);
              or good/**/*.jpg, all for training, and test/good|DEFECT/*.jpg
  an .npz     x or images [n, H, W], [n, H, W, C] or [n, C, H, W]; y, label or labels [n], 0 is good; for
              localization mask or masks [n, H, W], or mask_packed [n, H, W / 8] of np.packbits; num or group
              [n]: see below; classes, the labels' names; name [n]
If the layout has no split, the first part of the good images is for training and the rest for testing, in the
order of their names or of num (group). Images in one folder below good/ or with the same num stay together,
and good images whose num also has a defect are not used for training."""

_SPLITS = ("train", "test")
_GOOD = "good"
_MVTEC = "MVTec-AD"


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


def find(path: Path, split: str, classes: Sequence[str] | None, train_share: float) -> Source:
    """Recognizes the layout at ``path`` (LAYOUTS) and returns a split of it.

    Args:
        split: "train" or "test".
        classes: names of the classes to use; None: all.
        train_share: share of the good images to train on if the layout has no split.

    Raises:
        ImageDataError: the layout is unknown, or files are missing.
    """
    if split not in _SPLITS:
        raise ImageDataError(f"split must be train or test, got {split!r}")
    if not 0 < train_share < 1:
        raise ImageDataError(f"train_share must be > 0 and < 1, got {train_share}")
    if path.suffix.lower() in npz.SUFFIXES and path.is_file():
        _chosen([path.stem], classes, path)
        return _npz(path, split, train_share)
    if (path / "split_csv").is_dir():
        return _visa(path, split, classes)
    if not path.is_dir():
        what = "is not a collection in a known layout" if path.exists() else "does not exist"
        what = (path.is_file() and what_it_is(path)) or what
        raise ImageDataError(f"data: {printable(path)} {what}; `dxmi data --help` lists the layouts")
    root = listing.scan(path)
    parts = listing.parts(root)
    if "train" in parts.splits or (good := _good_of(root, parts.others)) is None:
        return _mvtec(root, split, classes)
    _chosen([path.name], classes, path)
    if parts.splits:
        return _good_and_test(root, good, split)
    return _folders(root, good, split, train_share)


def recognises(path: Path) -> bool:
    """Whether a folder has a layout that `find` reads: VisA's table, train/good/ (in the folder or in class
    folders), or good/.

    Raises:
        ImageDataError: as in `listing.scan`.
    """
    if (path / "split_csv").is_dir():
        return True
    root = listing.scan(path)
    return _good_of(root, root.folders) is not None or any(
        (train := listing.parts(inner).splits.get("train")) is not None and [*train.folders] == [_GOOD]
        for inner in (root, *root.folders.values())
    )


def _good_of(folder: Folder, inner: dict[str, Folder]) -> Folder | None:
    """The folder of good images among inner folders; None if there is none.

    Raises:
        ImageDataError: there are several.
    """
    found = [each for name, each in inner.items() if name.lower() == _GOOD]
    if len(found) > 1:
        both = listing.listed(each.name for each in found)
        raise ImageDataError(f"data: {folder.path}: {both} are all named good; keep one")
    return found[0] if found else None


def _unknown(folder: Folder, found: str) -> ImageDataError:
    return ImageDataError(f"data: {folder.path}: {found}; `dxmi data --help` lists the layouts")


def _chosen(names: list[str], wanted: Sequence[str] | None, path: Path) -> list[str]:
    if wanted is None:
        return names
    if not wanted or (missing := [name for name in wanted if name not in names]):
        got = ", ".join(missing) if wanted else "none"
        raise ImageDataError(f"classes must be in {path}, got {got}; it has {', '.join(names)}")
    return list(wanted)


# --- MVTec-AD ----------------------------------------------------------------------------------------


class _Class(NamedTuple):
    """A class of a collection with a split."""

    name: str
    base: str
    """Folder to which names of its images are relative."""
    train: Folder | None
    """Folder of good training images; None if it is missing."""
    test: Folder | None
    """Folder of test images, with one folder for good images and for each kind of defect."""
    masks: dict[str, Folder]
    skipped: list[Skipped]


def _mvtec(root: Folder, split: str, classes: Sequence[str] | None) -> Source:
    if "train" in listing.parts(root).splits:
        _chosen([root.name], classes, Path(root.path))
        return _with_split([_mvtec_class(root, split)], split, _MVTEC)
    found = {name: f for name, f in root.folders.items() if "train" in listing.parts(f).splits}
    if not found:
        raise _unknown(root, "has no good/, train/good/ or CLASS/train/good/ with images")
    chosen = [found[name] for name in _chosen([*found], classes, Path(root.path))]
    skipped = root.skipped + [Skipped(image, "beside the classes") for image in root.images]
    unused = {name: f for name, f in root.folders.items() if name not in found}
    skipped += listing.left_out(unused, "not a class: has no train/good/")
    skipped += listing.left_out({n: f for n, f in found.items() if f not in chosen}, "a class not selected")
    return _with_split([_mvtec_class(folder, split) for folder in chosen], split, _MVTEC, skipped)


def _mvtec_class(folder: Folder, split: str) -> _Class:
    parts = listing.parts(folder)
    if _good_of(folder, parts.others):
        raise _unknown(folder, "must have either good/ or train/good/, got good/ beside train/")
    train = parts.splits["train"]
    kinds = listing.parts(train).others
    good = _good_of(train, kinds)
    if split == "train" and (good is None or len(kinds) > 1):
        found = ", ".join(kinds) or "images" * bool(train.images) or "nothing"
        raise _unknown(folder, f"train must contain good images only (train/good), got {found}")
    skipped = folder.skipped + train.skipped
    skipped += [Skipped(image, "in no train/good/ or test/KIND/") for image in folder.images + train.images]
    skipped += listing.left_out(parts.others, "not train/, test/ or ground_truth/")
    skipped += listing.left_out(listing.parts(train).masks, "masks, by its name")
    unread = {name: f for name, f in parts.splits.items() if name not in _SPLITS}
    skipped += listing.left_out(unread, "a split that is not read")
    base = os.path.dirname(folder.path)
    return _Class(folder.name, base, good, parts.splits.get("test"), parts.masks, skipped)


def _good_and_test(root: Folder, good: Folder, split: str) -> Source:
    """A collection with good/ for training, and test/ with a folder of each kind."""
    parts = listing.parts(root)
    kinds = [inner.name for inner in parts.others.values() if inner is not good]
    if kinds or parts.splits.keys() != {"test"}:
        names = listing.listed([*(inner.name for inner in parts.splits.values()), *kinds])
        raise _unknown(root, f"{names} are beside good/; kinds of defect must be beside good/ or in test/")
    skipped = root.skipped + [Skipped(image, "beside good/") for image in root.images]
    name = root.name
    found = _Class(name, root.path, good, parts.splits["test"], parts.masks, skipped)
    return _with_split([found], split, "good and test")


def _with_split(
    classes: Sequence[_Class], split: str, layout: str, skipped: Sequence[Skipped] = ()
) -> Source:
    skipped = [*skipped, *(each for one in classes for each in one.skipped)]
    folders = [_kinds(one, split, skipped) for one in classes]
    kinds = {kind for inner in folders for kind in inner}
    label_names = [_GOOD, *sorted(kinds - {_GOOD})]
    items, files, masked = [], list[str](), False
    for object_class, (one, inner) in enumerate(zip(classes, folders, strict=True)):
        where = os.path.join(one.base, one.name) if layout == _MVTEC else one.base
        masks = _Masks(one.masks, where, required=layout == _MVTEC)
        for kind in sorted(inner, key=label_names.index):
            for file in _images(inner[kind], skipped, holds_directly=kind != _GOOD):
                mask = masks.of(file, kind, inner[kind]) if kind != _GOOD else None
                files += [file, *([mask] if mask else [])]
                masked |= mask is not None
                name = os.path.relpath(file, one.base)
                items.append(picture_item(name, object_class, label_names.index(kind), file, mask))
    names = [one.name for one in classes]
    return Source(files, items, names, label_names, masked, layout, skipped)


def _kinds(one: _Class, split: str, skipped: list[Skipped]) -> dict[str, Folder]:
    """The folders of a split of a class, by kind; skipped files are added to the list."""
    if split == "train":
        return {} if one.train is None else {_GOOD: one.train}
    where = os.path.join(one.base, one.name)
    if one.test is None:
        raise ImageDataError(f"data: {where}: has no good images in test (test/good)")
    parts = listing.parts(one.test)
    good = _good_of(one.test, parts.others)
    if good is None:
        raise _unknown(one.test, "has no good images (test/good)")
    if parts.splits:
        raise _unknown(one.test, f"must not contain splits, got {listing.listed(parts.splits)}")
    one.masks.update(parts.masks)
    skipped += one.test.skipped
    skipped += [Skipped(image, "in no folder of a kind") for image in one.test.images]
    kinds = {name: inner for name, inner in parts.others.items() if inner is not good}
    return {_GOOD: good, **kinds}


# --- masks -------------------------------------------------------------------------------------------


class _Masks:
    """The masks of a collection or a class: MASKS/KIND/NAME.png or MASKS/NAME.png, or NAME_mask.png.

    Args:
        folders: folders with a name for masks, at most one.
        where: path of their parent folder, for errors.
        required: whether masks are required.

    Raises:
        ImageDataError: there are several folders.
    """

    def __init__(self, folders: dict[str, Folder], where: str, *, required: bool = False) -> None:
        if len(folders) > 1:
            names = listing.listed(folders)
            raise ImageDataError(f"data: {where}: {names} could all be masks; keep one")
        self._folder = next(iter(folders.values()), None)
        if self._folder is None and required:
            self._folder = Folder(os.path.join(where, "ground_truth"), [], {}, [])
        self._found, self._used = dict[str, str](), dict[str, str]()
        if self._folder is not None:
            for file in sorted(file for inner in self._folder.walk() for file in inner.images):
                name = listing.stem_of(file, self._folder.path).lower()
                self._found[name] = file
                self._found.setdefault(listing.without_mask(name), file)

    def of(self, image: str, kind: str, folder: Folder) -> str | None:
        """The mask of an image in the folder of a kind; None if the collection has no masks.

        Raises:
            ImageDataError: the mask is missing, or also belongs to another image.
        """
        if self._folder is None:
            return None
        name = listing.stem_of(image, folder.path)
        candidates = [os.path.join(kind, name), name, os.path.join(kind, os.path.basename(name))]
        mask = next((found for c in candidates if (found := self._found.get(c.lower()))), None)
        if mask is None:
            wanted = [os.path.join(self._folder.path, f"{kind}/{name}{end}.png") for end in ("_mask", "")]
            by = f"; {os.path.basename(self._folder.path)}/ is for masks; rename it if it is a kind of defect"
            raise ImageDataError(f"{_missing_mask(image, wanted)}{by}")
        if (other := self._used.setdefault(mask, image)) != image:
            raise ImageDataError(
                f"{mask}: a mask must be of one image (MASKS/KIND/NAME.png), got {image} and {other}"
            )
        return mask


def _missing_mask(image: str, wanted: Sequence[str]) -> ImageDataError:
    return ImageDataError(f"{image}: its mask is missing, expected {' or '.join(wanted)}")


# --- VisA --------------------------------------------------------------------------------------------


def _visa(path: Path, split: str, classes: Sequence[str] | None) -> Source:
    table = path / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise ImageDataError(f"data: {path}: has split_csv/ without 1cls.csv")
    rows = _rows(table, ("object", "split", "label", "image", "mask"))
    class_names = _chosen(sorted({row["object"] for row in rows}), classes, path)
    rows = [row for row in rows if row["split"] == split and row["object"] in class_names]
    if odd := [row["label"] for row in rows if row["label"] not in ("normal", "anomaly")]:
        raise ImageDataError(f"{table}: label must be normal or anomaly, got {odd[0]!r}")
    items, files = [], [str(table)]
    for row in rows:
        defect = row["label"] == "anomaly"
        image = str(_named(path, row["image"]))
        if not os.path.isfile(image):
            raise ImageDataError(f"{table}: names {row['image']}, which is missing in {path}")
        mask = str(_named(path, row["mask"] or "Masks/(none is named)")) if defect else None
        if mask is not None and not os.path.isfile(mask):
            raise _missing_mask(image, [mask])
        files += [image, *([mask] if mask else [])]
        items.append(picture_item(row["image"], class_names.index(row["object"]), int(defect), image, mask))
    return Source(files, items, class_names, [_GOOD, "anomaly"], split == "test", "VisA")


def _rows(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a csv file with all columns, in UTF-8, UTF-16 with a byte order mark, or Latin-1."""
    refuse_pointer(table)
    content = table.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content.decode("utf-16", "replace")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        rows = list(reader)
    except csv.Error as error:
        raise ImageDataError(f"{table}: cannot be read as csv ({error})") from error
    if missing := set(columns) - set(reader.fieldnames or ()):
        raise ImageDataError(f"{table}: columns must be {','.join(columns)}, {sorted(missing)[0]} is missing")
    for i, row in enumerate(rows, 2):
        if short := [name for name in columns[:-1] if row[name] is None]:
            raise ImageDataError(f"{table}: row {i} must have {','.join(columns)}, {short[0]} is missing")
    return rows


def _named(path: Path, name: str) -> Path:
    """The path of a file that a csv names; the names of files may be in Latin-1, as the csv."""
    found = path / name
    if not found.is_file() and not name.isascii():
        try:
            raw = path / os.fsdecode(name.encode("latin-1"))
        except UnicodeEncodeError:
            return found
        return raw if raw.is_file() else found
    return found


# --- plain folders -----------------------------------------------------------------------------------


def _folders(root: Folder, good: Folder, split: str, train_share: float) -> Source:
    path, parts = root.path, listing.parts(root)
    kinds = {name: inner for name, inner in parts.others.items() if inner is not good}
    skipped = root.skipped + [Skipped(image, "beside good/") for image in root.images]
    files = _images(good, skipped)
    groups = [os.path.relpath(f, good.path).split(os.sep)[0] for f in files]  # a subfolder, or the file alone
    trains = _leading(groups, train_share, path)
    wanted = [(0, f) for f, first in zip(files, trains, strict=True) if first == (split == "train")]
    masks, found = _Masks(parts.masks, path), dict[str, str]()
    if not kinds:
        skipped += listing.left_out(parts.masks, "masks of no image")
    for i, (kind, inner) in enumerate(kinds.items(), 1):
        for f in _images(inner, skipped, holds_directly=True):
            mask = masks.of(f, kind, inner)
            if split == "test":
                wanted.append((i, f))
                found |= {} if mask is None else {f: mask}
    items = [picture_item(os.path.relpath(f, path), 0, label, f, found.get(f)) for label, f in wanted]
    files = [f for _, f in wanted] + [*found.values()]
    return Source(files, items, [root.name], [_GOOD, *kinds], bool(found), "good and defects", skipped)


def _leading(groups: Sequence[Any], share: float, path: Path | str) -> list[bool]:
    """Which of the good images are for training: the first ``share``, extended to the end of its last group.
    Images of a group must be consecutive."""
    if len(set(groups)) < 2:
        raise ImageDataError(f"{path}: a split requires >= 2 good images or groups, got {len(set(groups))}")
    end = min(max(1, round(share * len(groups))), len(groups) - 1)
    while end < len(groups) and groups[end] == groups[end - 1]:
        end += 1
    if end == len(groups):  # the last group would train too: test it instead
        while groups[end - 1] == groups[-1]:
            end -= 1
    return [i < end for i in range(len(groups))]


# --- npz ---------------------------------------------------------------------------------------------


def _npz(file: Path, split: str, train_share: float) -> Source:
    arrays = npz.Arrays(file)
    images, labels = arrays.get(*npz.IMAGES), arrays.get(*npz.LABELS)
    if images is None or labels is None:
        raise ImageDataError(
            f"{printable(file)}: keys must be x and y, got {arrays.keys}; "
            "`dxmi data --help` lists the layouts"
        )
    images = npz.images(images, arrays)
    n = len(images)
    labels, label_names = _defects(npz.labels(labels, n, arrays), arrays)
    masks = npz.masks(arrays, images.shape[:3])
    groups, names = _of_each(arrays, n, "num", "group", "groups"), _of_each(arrays, n, "name", "names")
    if groups is None:
        groups = np.arange(n)

    order = np.lexsort((np.arange(n), groups))
    good, defective = order[labels[order] == 0], order[labels[order] > 0]
    trains = np.array(_leading(groups[good].tolist(), train_share, file))
    trains &= ~np.isin(groups[good], groups[defective])
    chosen = good[trains] if split == "train" else np.concatenate([good[~trains], defective])

    def item(i: int) -> Item:
        mask = None if masks is None or labels[i] == 0 else masks[i]
        name = str(i) if names is None else _text(names[i])
        return Item(name, 0, int(labels[i]), lambda: images[i], None if mask is None else lambda: mask)

    items = [item(int(i)) for i in chosen]
    return Source([str(file)], items, [file.stem], label_names, masks is not None, "npz")


def _defects(labels: np.ndarray, arrays: npz.Arrays) -> tuple[np.ndarray, list[str]]:
    """Converts integer labels, 0 for good, to the kinds 0, 1, ... [n], and returns these and their names.

    Raises:
        ImageDataError: the labels are text.
    """
    if labels.dtype.kind in "US":
        raise arrays.refuse("labels", labels, f"{len(labels)} integers, 0 for good")
    names = arrays.get("classes")
    given = [] if names is None or names.ndim != 1 else [_text(name) for name in names]
    if labels.size and labels.min() >= 0 and labels.max() < max(len(labels), len(given)):
        values = np.arange(1 + labels.max())
    else:  # arbitrary numbers
        values = np.concatenate([[0], np.setdiff1d(labels, [0])])
        labels = np.where(labels == 0, 0, np.searchsorted(values[1:], labels) + 1)
    if len(given) > values.max() and values.min() >= 0:
        return labels, [given[value] for value in values]
    return labels, [_GOOD, *(f"defect {value}" for value in values[1:])]


def _of_each(arrays: npz.Arrays, n: int, *names: str) -> np.ndarray | None:
    """An array with a value for each image [n]; None if it is missing.

    Raises:
        ImageDataError: the array has another shape.
    """
    if (found := arrays.get(*names)) is None:
        return None
    if (flat := npz.column(found, n)) is None:
        raise ImageDataError(
            f"{printable(arrays.file)}: {names[0]} must be [{n}], one for each image, got {list(found.shape)}"
        )
    return flat


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# --- files -------------------------------------------------------------------------------------------


def picture_item(name: str, object_class: int, label: int, image: str, mask: Path | str | None) -> Item:
    """The `Item` of an image file and the file of its mask."""
    return Item(
        name,
        object_class,
        label,
        lambda: pixels.read(image, image, upright=True),
        None if mask is None else lambda: pixels.marked(str(mask), str(mask), upright=True),
        image,
    )


def _images(folder: Folder, skipped: list[Skipped], *, holds_directly: bool = False) -> list[str]:
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
    return sorted(files, key=_natural)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
