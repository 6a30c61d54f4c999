"""The layout of a collection at a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dxmi_ext.anomaly.data.layouts import archive, folders, mvtec, visa
from dxmi_ext.anomaly.data.layouts.items import GOOD, SPLITS, Source, chosen_classes, good_of
from dxmi_ext.images.data import listing, npz
from dxmi_ext.images.data.contents import ImageDataError, printable, what_it_is

LAYOUTS = """\
  MVTec-AD    [CLASS/]train/good/*.png, [CLASS/]test/good|DEFECT/NAME.png,
              [CLASS/]ground_truth/DEFECT/NAME_mask.png (or NAME.png) for localization; the folder of all
              classes or of one
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


def find(path: Path, split: str, classes: Sequence[str] | None, train_share: float) -> Source:
    """Recognizes the layout at ``path`` (LAYOUTS) and returns a split of it.

    Args:
        split: "train" or "test".
        classes: names of the classes to use; None: all.
        train_share: share of the good images to train on if the layout has no split; 0: all are for testing.

    Raises:
        ImageDataError: the layout is unknown, or files are missing.
    """
    if split not in SPLITS:
        raise ImageDataError(f"split must be train or test, got {split!r}")
    if not 0 <= train_share < 1:
        raise ImageDataError(f"train_share must be >= 0 and < 1, got {train_share}")
    if path.suffix.lower() in npz.SUFFIXES and path.is_file():
        chosen_classes([path.stem], classes, path)
        return archive.read(path, split, train_share)
    if (path / "split_csv").is_dir():
        return visa.read(path, split, classes)
    if not path.is_dir():
        what = "is not a collection in a known layout" if path.exists() else "does not exist"
        what = (path.is_file() and what_it_is(path)) or what
        raise ImageDataError(f"data: {printable(path)} {what}; `dxmi data --help` lists the layouts")
    root = listing.scan(path)
    parts = listing.parts(root)
    if "train" in parts.splits or (good := good_of(root, parts.others)) is None:
        return mvtec.read(root, split, classes)
    chosen_classes([path.name], classes, path)
    if parts.splits:
        return mvtec.read_good_and_test(root, good, split)
    return folders.read(root, good, split, train_share)


def recognizes(path: Path) -> bool:
    """Whether a folder has a layout that `find` reads: VisA's table, train/good/ (in the folder or in class
    folders), or good/.

    Raises:
        ImageDataError: as in `listing.scan`.
    """
    if (path / "split_csv").is_dir():
        return True
    root = listing.scan(path)
    return good_of(root, root.folders) is not None or any(
        (train := listing.parts(inner).splits.get("train")) is not None
        and [name.lower() for name in listing.parts(train).others] == [GOOD]
        for inner in (root, *root.folders.values())
    )
