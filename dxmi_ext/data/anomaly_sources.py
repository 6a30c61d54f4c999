"""Collections of good and defective pictures as they are found on disk, and which of them train.

Imports numpy and ``dxmi_ext``; Pillow where a picture is decoded.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dxmi_ext.data.image_sources import ImageDataError, decode, pictures_in
from dxmi_ext.files import UNREADABLE

LAYOUTS = """\
  MVTec-AD    [CLASS/]train/good/*.png, [CLASS/]test/good|DEFECT/NAME.png,
              [CLASS/]ground_truth/DEFECT/NAME_mask.png (or NAME.png); the folder of all classes or of one
  VisA        split_csv/1cls.csv (object,split,label,image,mask), and the files that it names
  folders     good/**/*.jpg; any other folder is a kind of defect: DEFECT/*.jpg;
              for localisation masks/DEFECT/NAME.png, of every picture of a defect
  an .npz     x or images uint8 [n, H, W(, C)]; y, label or labels [n], 0 is good; for localisation mask or
              masks [n, H, W], or mask_packed [n, H, W / 8] of np.packbits; num or group [n]: see below;
              classes, the labels' names; name [n]
Where the layout has no split of its own, the first part of the good pictures trains and the rest is tested,
in the order of their names, or of num (group): like pictures stand together. Those of one folder below good/,
or of one num, are never divided; nor does a picture train whose num has a defect."""

_SPLITS = ("train", "test")
_GOOD = "good"


class Item(NamedTuple):
    """A picture, not yet decoded."""

    name: str
    object_class: int
    label: int
    """Index into the names of labels; 0 is good."""
    image: Callable[[], Any]
    """uint8 [H, W, 3], or a PIL image in RGB."""
    mask: Callable[[], np.ndarray] | None
    """bool [H, W]; None: it has none, as good pictures do."""


class Source(NamedTuple):
    """A split of a collection."""

    files: Sequence[str]
    """All it consists of: when one changes, so may the pictures."""
    items: list[Item]
    class_names: list[str]
    label_names: list[str]
    """The first is good."""
    has_masks: bool
    """Whether every defect has a mask."""


def find(path: Path, split: str, classes: Sequence[str] | None, train_share: float) -> Source:
    """Recognise what lies at ``path`` (LAYOUTS).

    Args:
        split: "train" or "test".
        classes: which of the classes, by name; None: all.
        train_share: of the good pictures, where the layout has no split.

    Raises:
        ImageDataError: nothing known lies there, or files that belong to it are missing.
    """
    if split not in _SPLITS:
        raise ImageDataError(f"split: got {split!r}, wants train or test")
    if not 0 < train_share < 1:
        raise ImageDataError(f"train_share: got {train_share}, wants a share between 0 and 1")
    if path.suffix == ".npz" and path.is_file():
        _chosen([path.stem], classes, path)
        return _npz(path, split, train_share)
    if (path / "split_csv").is_dir():
        return _visa(path, split, classes)
    if (path / "train").is_dir():
        _chosen([path.name], classes, path)
        return _mvtec([path], split)
    if of_classes := sorted(folder.parent for folder in path.glob("*/train") if folder.is_dir()):
        return _mvtec([path / name for name in _chosen([p.name for p in of_classes], classes, path)], split)
    if (path / _GOOD).is_dir():
        _chosen([path.name], classes, path)
        return _folders(path, split, train_share)
    raise _unknown(path, "no collection of a known layout" if path.exists() else "nothing there")


def _unknown(path: Path, found: str) -> ImageDataError:
    return ImageDataError(f"data path: {path}: {found}, wants one of\n{LAYOUTS}")


def _chosen(names: list[str], wanted: Sequence[str] | None, path: Path) -> list[str]:
    if wanted is None:
        return names
    if not wanted or (missing := [name for name in wanted if name not in names]):
        got = ", ".join(missing) if wanted else "none"
        raise ImageDataError(f"classes: got {got}, {path} has {', '.join(names)}")
    return list(wanted)


# --- MVTec-AD ----------------------------------------------------------------------------------------


def _mvtec(folders: list[Path], split: str) -> Source:
    class_names = [folder.name for folder in folders]
    kinds = {kind for folder in folders for kind in _subfolders(folder / split)}
    label_names = [_GOOD, *sorted(kinds - {_GOOD})]
    items, files = [], list[str]()
    for object_class, folder in enumerate(folders):
        if split == "train" and _subfolders(folder / split) != [_GOOD]:
            found = ", ".join(_subfolders(folder / split)) or "nothing"
            raise _unknown(folder, f"{found} in train, where good pictures alone belong (train/good)")
        if split == "test" and _GOOD not in _subfolders(folder / split):
            raise _unknown(folder, "no good pictures in test (test/good)")
        truth = folder / "ground_truth"
        for kind in sorted(_subfolders(folder / split), key=label_names.index):
            for file in _pictures(folder / split / kind):
                masks = [truth / kind / f"{Path(file).stem}{suffix}.png" for suffix in ("_mask", "")]
                mask = None if kind == _GOOD else _required_mask(masks, file)
                files += [file, *([str(mask)] if mask else [])]
                name = str(Path(file).relative_to(folder.parent))
                items.append(picture_item(name, object_class, label_names.index(kind), file, mask))
    return Source(files, items, class_names, label_names, has_masks=split == "test")


def _required_mask(candidates: Sequence[Path], file: str) -> Path:
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ImageDataError(f"{file}: its mask is missing, wants {' or '.join(map(str, candidates))}")


# --- VisA --------------------------------------------------------------------------------------------


def _visa(path: Path, split: str, classes: Sequence[str] | None) -> Source:
    table = path / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise _unknown(path, "split_csv without 1cls.csv")
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = ("object", "split", "label", "image", "mask")
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise ImageDataError(f"{table}: has no column {sorted(missing)[0]}, wants {','.join(columns)}")
        rows = list(reader)
    class_names = _chosen(sorted({row["object"] for row in rows}), classes, path)
    rows = [row for row in rows if row["split"] == split and row["object"] in class_names]
    if odd := [row["label"] for row in rows if row["label"] not in ("normal", "anomaly")]:
        raise ImageDataError(f"{table}: got the label {odd[0]!r}, wants normal or anomaly")
    items, files = [], [str(table)]
    for row in rows:
        defect = row["label"] == "anomaly"
        if not (path / row["image"]).is_file():
            raise ImageDataError(f"{table}: names {row['image']}, which is missing in {path}")
        image = str(path / row["image"])
        mask = _required_mask([path / (row["mask"] or "Masks/(none is named)")], image) if defect else None
        files += [image, *([str(mask)] if mask else [])]
        items.append(picture_item(row["image"], class_names.index(row["object"]), int(defect), image, mask))
    return Source(files, items, class_names, [_GOOD, "anomaly"], has_masks=split == "test")


# --- plain folders -----------------------------------------------------------------------------------


def _folders(path: Path, split: str, train_share: float) -> Source:
    kinds = [name for name in _subfolders(path) if name not in (_GOOD, "masks")]
    good = _pictures(path / _GOOD)
    groups = [Path(f).relative_to(path / _GOOD).parts[0] for f in good]  # a subfolder, or the file alone
    trains = _leading(groups, train_share, path)
    wanted = [(0, f) for f, first in zip(good, trains, strict=True) if first == (split == "train")]
    masks: dict[str, Path] = {}
    if split == "test":
        wanted += [(1 + i, f) for i, kind in enumerate(kinds) for f in _pictures(path / kind)]
        if (path / "masks").is_dir():
            for label, f in wanted:
                if label:
                    relative = Path(f).relative_to(path).with_suffix("")
                    candidates = [path / "masks" / f"{relative}{suffix}.png" for suffix in ("", "_mask")]
                    masks[f] = _required_mask(candidates, f)
    items = [picture_item(str(Path(f).relative_to(path)), 0, label, f, masks.get(f)) for label, f in wanted]
    files = [f for _, f in wanted] + [str(mask) for mask in masks.values()]
    return Source(files, items, [path.name], [_GOOD, *kinds], has_masks=bool(masks))


def _leading(groups: Sequence[Any], share: float, path: Path) -> list[bool]:
    """Which of the good pictures train: those before the place ``share`` of the way, and to the end of the
    group that lies there. Equal groups stand together."""
    if len(set(groups)) < 2:
        raise ImageDataError(f"{path}: got {len(set(groups))} good picture(s) or groups, a split wants two")
    end = min(max(1, round(share * len(groups))), len(groups) - 1)
    while end < len(groups) and groups[end] == groups[end - 1]:
        end += 1
    if end == len(groups):  # the last group is as long: it is tested, the others train
        while groups[end - 1] == groups[-1]:
            end -= 1
    return [i < end for i in range(len(groups))]


# --- npz ---------------------------------------------------------------------------------------------


def _npz(file: Path, split: str, train_share: float) -> Source:
    try:
        with np.load(file) as arrays:  # without pickles, which is the default
            content = {name: arrays[name] for name in arrays.files}
    except UNREADABLE as error:
        raise ImageDataError(f"{file}: cannot be read as npz without pickles ({error})") from error

    def first(*names: str) -> np.ndarray | None:
        return next((content[name] for name in names if name in content), None)

    images, labels = first("x", "images"), first("y", "label", "labels")
    if images is None or labels is None:
        raise ImageDataError(f"{file}: has the keys {', '.join(content)}, wants\n{LAYOUTS}")
    images = _rgb(images, file)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iub" or labels.min() < 0:
        raise ImageDataError(
            f"{file}: labels are {labels.dtype} {list(labels.shape)}, wants {len(images)} integers from 0 up"
        )
    labels = labels.astype(np.int64)
    masks = first("mask", "masks")
    if masks is None and (packed := first("mask_packed")) is not None:
        masks = np.unpackbits(packed, axis=-1)[..., : images.shape[2]]
    if masks is not None and masks.shape != images.shape[:3]:
        raise ImageDataError(f"{file}: masks are {list(masks.shape)}, wants {list(images.shape[:3])}")
    groups = first("num", "group", "groups")
    if groups is None:
        groups = np.arange(len(images))
    if groups.shape != labels.shape:
        raise ImageDataError(f"{file}: num (group) is {list(groups.shape)}, wants {list(labels.shape)}")
    names, label_names = first("name", "names"), first("classes")
    if label_names is None or len(label_names) <= labels.max():
        label_names = np.array([_GOOD, *(f"defect {i}" for i in range(1, 1 + labels.max()))])

    order = np.lexsort((np.arange(len(groups)), groups))
    good, defective = order[labels[order] == 0], order[labels[order] > 0]
    trains = np.array(_leading(groups[good].tolist(), train_share, file))
    trains &= ~np.isin(groups[good], groups[defective])
    chosen = good[trains] if split == "train" else np.concatenate([good[~trains], defective])

    def item(i: int) -> Item:
        mask = None if masks is None or labels[i] == 0 else masks[i] != 0
        name = str(i) if names is None else str(names[i])
        return Item(name, 0, int(labels[i]), lambda: images[i], None if mask is None else lambda: mask)

    items = [item(int(i)) for i in chosen]
    return Source([str(file)], items, [file.stem], label_names.tolist(), has_masks=masks is not None)


def _rgb(images: np.ndarray, file: Path) -> np.ndarray:
    """[n, H, W], [n, H, W, C] or [n, C, H, W] as [n, H, W, 3]; grey ones are repeated."""
    if images.dtype == np.uint8 and len(images):
        if images.ndim == 3:
            images = images[..., None]
        elif images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
            images = images.transpose(0, 2, 3, 1)
        if images.ndim == 4 and images.shape[3] in (1, 3):
            return np.asarray(np.broadcast_to(images, (*images.shape[:3], 3)))
    raise ImageDataError(
        f"{file}: images are {images.dtype} {list(images.shape)}, wants uint8 [n, H, W] or [n, H, W, C], "
        "C = 1 or 3"
    )


# --- files -------------------------------------------------------------------------------------------


def picture_item(name: str, object_class: int, label: int, image: str, mask: Path | None) -> Item:
    """Of files."""
    return Item(
        name,
        object_class,
        label,
        lambda: decode(image, image, upright=True),
        None if mask is None else lambda: _any_colour(str(mask)),
    )


def _any_colour(mask: str) -> np.ndarray:
    return np.any(np.asarray(decode(mask, mask, upright=True)), axis=2)


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _pictures(path: Path) -> list[str]:
    """Those below a folder, in natural order: 2.png before 10.png."""
    found = sorted(pictures_in(path, below=True), key=_natural)
    if not found:
        raise _unknown(path, "no pictures")
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
