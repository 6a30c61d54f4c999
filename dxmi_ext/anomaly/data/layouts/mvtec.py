"""Layouts with folders of a split: MVTec-AD, and good/ beside test/."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dxmi_ext.anomaly.data.layouts.items import (
    GOOD,
    SPLITS,
    Source,
    chosen_classes,
    good_of,
    images_of,
    picture_item,
    unknown,
)
from dxmi_ext.anomaly.data.layouts.masks import Masks
from dxmi_ext.images.data import listing
from dxmi_ext.images.data.contents import ImageDataError
from dxmi_ext.images.data.listing import Folder, Skipped

_MVTEC = "MVTec-AD"


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


def read(root: Folder, split: str, classes: Sequence[str] | None) -> Source:
    if "train" in listing.parts(root).splits:
        chosen_classes([root.name], classes, Path(root.path))
        return _with_split([_mvtec_class(root, split)], split, _MVTEC)
    found = {name: f for name, f in root.folders.items() if "train" in listing.parts(f).splits}
    if not found:
        left_out = listing.summary(root.skipped, root.path)
        why = "has no good/, train/good/ or CLASS/train/good/ with images"
        raise unknown(root, f"{why}{left_out and f'; skipped: {left_out}'}")
    chosen = [found[name] for name in chosen_classes([*found], classes, Path(root.path))]
    skipped = root.skipped + [Skipped(image, "beside the classes") for image in root.images]
    unused = {name: f for name, f in root.folders.items() if name not in found}
    skipped += listing.left_out(unused, "not a class: has no train/good/")
    skipped += listing.left_out({n: f for n, f in found.items() if f not in chosen}, "a class not selected")
    return _with_split([_mvtec_class(folder, split) for folder in chosen], split, _MVTEC, skipped)


def _mvtec_class(folder: Folder, split: str) -> _Class:
    parts = listing.parts(folder)
    if good_of(folder, parts.others):
        raise unknown(folder, "must have either good/ or train/good/, got good/ beside train/")
    train = parts.splits["train"]
    kinds = listing.parts(train).others
    good = good_of(train, kinds)
    if split == "train" and (good is None or len(kinds) > 1):
        found = ", ".join(kinds) or ("images" if train.images else "nothing")
        raise unknown(folder, f"train must contain good images only (train/good), got {found}")
    skipped = folder.skipped + train.skipped
    skipped += [Skipped(image, "in no train/good/ or test/KIND/") for image in folder.images + train.images]
    skipped += listing.left_out(parts.others, "not train/, test/ or ground_truth/")
    skipped += listing.left_out(listing.parts(train).masks, "masks, by its name")
    unread = {name: f for name, f in parts.splits.items() if name not in SPLITS}
    skipped += listing.left_out(unread, "a split that is not read")
    base = os.path.dirname(folder.path)
    return _Class(folder.name, base, good, parts.splits.get("test"), parts.masks, skipped)


def read_good_and_test(root: Folder, good: Folder, split: str) -> Source:
    """A collection with good/ for training, and test/ with a folder of each kind."""
    parts = listing.parts(root)
    kinds = [inner.name for inner in parts.others.values() if inner is not good]
    if kinds or parts.splits.keys() != {"test"}:
        names = listing.listed([*(inner.name for inner in parts.splits.values()), *kinds])
        raise unknown(root, f"{names} are beside good/; kinds of defect must be beside good/ or in test/")
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
    label_names = [GOOD, *sorted(kinds - {GOOD})]
    items, files, masked = [], list[str](), False
    required = any(one.masks for one in classes)
    for object_class, (one, inner) in enumerate(zip(classes, folders, strict=True)):
        where = os.path.join(one.base, one.name) if layout == _MVTEC else one.base
        masks = Masks(one.masks, where, required=required)
        for kind in sorted(inner, key=label_names.index):
            for file in images_of(inner[kind], skipped, holds_directly=kind != GOOD):
                mask = masks.of(file, kind, inner[kind]) if kind != GOOD else None
                files += [file, *([mask] if mask else [])]
                masked |= mask is not None
                name = os.path.relpath(file, one.base)
                items.append(picture_item(name, object_class, label_names.index(kind), file, mask))
    names = [one.name for one in classes]
    return Source(files, items, names, label_names, masked, layout, skipped)


def _kinds(one: _Class, split: str, skipped: list[Skipped]) -> dict[str, Folder]:
    """The folders of a split of a class, by kind; skipped files are added to the list."""
    if split == "train":
        return {} if one.train is None else {GOOD: one.train}
    where = os.path.join(one.base, one.name)
    if one.test is None:
        raise ImageDataError(f"data: {where}: has train/ but no test/ with good images (test/good)")
    parts = listing.parts(one.test)
    good = good_of(one.test, parts.others)
    if good is None:
        raise unknown(one.test, "has no good images (test/good)")
    if parts.splits:
        raise unknown(one.test, f"must not contain splits, got {listing.listed(parts.splits)}")
    one.masks.update(parts.masks)
    skipped += one.test.skipped
    skipped += [Skipped(image, "in no folder of a kind") for image in one.test.images]
    kinds = {name: inner for name, inner in parts.others.items() if inner is not good}
    return {GOOD: good, **kinds}
