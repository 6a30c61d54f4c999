"""The layout of plain folders: good/, and a folder for each kind of defect."""

from __future__ import annotations

import os

from dxmi_ext.anomaly.data.layouts.items import GOOD, Source, images_of, leading, picture_item
from dxmi_ext.anomaly.data.layouts.masks import Masks
from dxmi_ext.images.data import listing
from dxmi_ext.images.data.listing import Folder, Skipped


def read(root: Folder, good: Folder, split: str, train_share: float) -> Source:
    path, parts = root.path, listing.parts(root)
    kinds = {name: inner for name, inner in parts.others.items() if inner is not good}
    skipped = root.skipped + [Skipped(image, "beside good/") for image in root.images]
    files = images_of(good, skipped)
    groups = [os.path.relpath(f, good.path).split(os.sep)[0] for f in files]  # a subfolder, or the file alone
    trains = leading(groups, train_share, path)
    wanted = [(0, f) for f, first in zip(files, trains, strict=True) if first == (split == "train")]
    masks, found = Masks(parts.masks, path), dict[str, str]()
    if not kinds:
        skipped += listing.left_out(parts.masks, "masks of no image")
    for i, (kind, inner) in enumerate(kinds.items(), 1):
        for f in images_of(inner, skipped, holds_directly=True):
            mask = masks.of(f, kind, inner)
            if split == "test":
                wanted.append((i, f))
                found |= {} if mask is None else {f: mask}
    items = [picture_item(os.path.relpath(f, path), 0, label, f, found.get(f)) for label, f in wanted]
    files = [f for _, f in wanted] + [*found.values()]
    layout = "good and defects" if kinds else "good, without defects"
    return Source(files, items, [root.name], [GOOD, *kinds], bool(found), layout, skipped)
