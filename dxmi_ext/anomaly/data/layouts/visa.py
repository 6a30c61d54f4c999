"""The layout of VisA: a table of image files and their masks."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from dxmi_ext.anomaly.data.layouts.items import GOOD, Source, chosen_classes, picture_item
from dxmi_ext.anomaly.data.layouts.masks import missing_mask
from dxmi_ext.images.data.contents import ImageDataError, refuse_pointer


def read(path: Path, split: str, classes: Sequence[str] | None) -> Source:
    table = path / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise ImageDataError(f"data: {path}: has split_csv/ without 1cls.csv")
    rows = _rows(table, ("object", "split", "label", "image", "mask"))
    class_names = chosen_classes(sorted({row["object"] for row in rows}), classes, path)
    rows = [row for row in rows if row["split"] == split and row["object"] in class_names]
    if odd := [row["label"] for row in rows if row["label"] not in ("normal", "anomaly")]:
        raise ImageDataError(f"{table}: label must be normal or anomaly, got {odd[0]!r}")
    items, files = [], [str(table)]
    for row in rows:
        defect = row["label"] == "anomaly"
        image = str(_named(path, row["image"]))
        if not os.path.isfile(image):
            raise ImageDataError(f"{table}: names {row['image']}, which is missing in {path}")
        if defect and not row["mask"]:
            raise ImageDataError(f"{table}: every anomaly must have a mask, got none for {row['image']}")
        mask = str(_named(path, row["mask"])) if defect else None
        if mask is not None and not os.path.isfile(mask):
            raise missing_mask(image, [mask])
        files += [image, *([mask] if mask else [])]
        items.append(picture_item(row["image"], class_names.index(row["object"]), int(defect), image, mask))
    return Source(files, items, class_names, [GOOD, "anomaly"], split == "test", "VisA")


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
    return [row for row in rows if any(row[name] for name in columns)]  # spreadsheets add empty rows


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
