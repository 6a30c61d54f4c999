"""Collections of good and defective images: layouts, splits, masks, the cache, and errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dxmi_ext.anomaly.data import dataset as anomaly
from dxmi_ext.anomaly.data import layouts as anomaly_sources
from dxmi_ext.anomaly.data.dataset import AnomalyData
from dxmi_ext.anomaly.data.layouts import ImageDataError

Image = pytest.importorskip("PIL.Image")


def picture(seed: int, size: int = 8, channels: int = 3) -> np.ndarray:
    """uint8 [size, size(, channels)]"""
    shape = (size, size, channels) if channels > 1 else (size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def spot(size: int = 8, value: int = 255) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[1:3, 2:5] = value
    return mask


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_mvtec(root: Path) -> Path:
    """Two classes; screws are gray and larger."""
    for name, size, channels in (("bottle", 8, 3), ("screw", 16, 1)):
        for i in range(3):
            save(root / name / f"train/good/{i:03}.png", picture(i, size, channels))
        save(root / name / "test/good/000.png", picture(10, size, channels))
        for kind in ("crack", f"of_{name}"):
            save(root / name / f"test/{kind}/000.png", picture(11, size, channels))
            save(root / name / f"ground_truth/{kind}/000_mask.png", spot(size))
    return root


def write_visa(root: Path) -> Path:
    """As distributed: masks hold small numbers, one for each kind of defect."""
    rows = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        for split, kind, i in (("train", "Normal", 0), ("test", "Normal", 1), ("test", "Anomaly", 0)):
            image = f"{name}/Data/Images/{kind}/{i:03}.JPG"
            save(root / image, picture(i))
            mask = f"{name}/Data/Masks/Anomaly/{i:03}.png" if kind == "Anomaly" else ""
            if mask:
                save(root / mask, spot(value=2))
            rows.append(f"{name},{split},{kind.lower()},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n,,,,\n")
    return root


def write_folders(root: Path, masks: bool = True) -> Path:
    for i in range(10):
        save(root / f"good/{i + 1}.png", picture(i))
    for kind in ("dent", "scratch"):
        save(root / kind / "a.png", picture(20))
        if masks:
            save(root / "masks" / kind / "a.png", spot())
    return root


def write_npz(path: Path, **changes: object) -> Path:
    """Good and defective images in turn; nums decrease, so the last images are for training."""
    content: dict[str, object] = {
        "x": np.stack([picture(i, channels=1) for i in range(12)]),
        "label": np.arange(12) % 2 * 2,
        "num": 100 - np.arange(12),
        "mask_packed": np.packbits(np.stack([spot() > 0] * 12), axis=-1),
    }
    np.savez(path, **{k: v for k, v in (content | changes).items() if v is not None})  # type: ignore[arg-type]
    return path


def load(path: Path, split: str, **options: object) -> AnomalyData:
    cache = (path if path.is_dir() else path.parent).parent / "cache"
    return anomaly.load(path, split=split, cache=cache, **options)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_mvtec_all_classes_in_one_size(root: Path) -> None:
    train, test = (load(write_mvtec(root), split, size=8) for split in ("train", "test"))
    assert train.images.shape == (6, 3, 8, 8) and not train.anomalous.any() and train.masks is None
    assert train.class_names == ["bottle", "screw"] and train.classes.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(train.images[1], picture(1).transpose(2, 0, 1))
    assert (train.images[3:, 0] == train.images[3:, 1]).all()  # three equal channels
    assert test.label_names == ["good", "crack", "of_bottle", "of_screw"]
    assert test.names[1] == "bottle/test/crack/000.png"
    assert sorted(zip(test.classes.tolist(), test.labels.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 3)
    ]  # fmt: skip
    assert test.masks is not None and not test.masks[~test.anomalous].any()
    assert np.array_equal(test.masks[1], spot() > 0)
    assert np.array_equal(test.masks[4], spot(16)[1::2, 1::2] > 0)  # one pixel of each 2 x 2


def test_decoding_into_memory_gives_the_same(root: Path) -> None:
    cached = load(write_mvtec(root), "test", size=8)
    source = anomaly_sources.find(root, "test", None, 0.7)
    fresh = anomaly.decoded(source, "test", 8)
    assert fresh.fingerprint == cached.fingerprint and fresh.names == cached.names
    assert np.array_equal(fresh.labels, cached.labels) and np.array_equal(fresh.classes, cached.classes)
    assert fresh.masks is not None and cached.masks is not None and np.array_equal(fresh.masks, cached.masks)
    with pytest.raises(ImageDataError, match="test: images must have one size unless size is set, got "):
        anomaly.decoded(source, "test", None)


def test_mvtec_one_class(root: Path) -> None:
    whole, alone = write_mvtec(root), load(root / "bottle", "test")
    assert alone.class_names == ["bottle"] and len(alone) == 3
    assert load(whole, "test", classes=["bottle"]).fingerprint == alone.fingerprint
    with pytest.raises(ImageDataError, match=r"classes must be in .*, got nut; it has bottle, screw"):
        load(whole, "test", classes=["nut"])


def test_mvtec_without_any_masks(root: Path) -> None:
    shutil.rmtree(write_mvtec(root) / "bottle/ground_truth")
    with pytest.raises(ImageDataError, match=r"crack/000\.png: its mask is missing, .*/000\.png$"):
        load(root, "test", size=8)  # the screws have masks
    assert load(root / "bottle", "test", size=8).masks is None


def test_visa_follows_its_csv(root: Path) -> None:
    train, test = (load(write_visa(root / split), split, size=None) for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 4) and test.class_names == ["candle", "pcb1"]
    assert test.anomalous.tolist() == [False, True] * 2 and test.masks is not None
    assert np.array_equal(test.masks[1], spot() > 0)


def test_folders_are_split_in_natural_order(root: Path) -> None:
    train, test = (load(write_folders(root), split, size=None) for split in ("train", "test"))
    assert train.names == [f"good/{i}.png" for i in range(1, 8)]
    assert test.names == ["good/8.png", "good/9.png", "good/10.png", "dent/a.png", "scratch/a.png"]
    assert test.labels.tolist() == [0, 0, 0, 1, 2] and test.label_names == ["good", "dent", "scratch"]
    assert test.masks is not None and np.array_equal(test.masks[3], spot() > 0)
    assert len(load(root, "train", size=None, train_share=0.2)) == 2


def test_masks_of_folders_are_optional(root: Path) -> None:
    assert load(write_folders(root, masks=False), "test").masks is None


def test_images_of_one_folder_stay_in_one_split(root: Path) -> None:
    for i in range(10):
        save(root / f"good/series{i // 4}/{i}.png", picture(i))
    save(root / "dent/a.png", picture(20))
    for share, trained in ((0.1, 4), (0.5, 8), (0.9, 8)):
        train, test = (load(root, split, train_share=share) for split in ("train", "test"))
        assert (len(train), (~test.anomalous).sum()) == (trained, 10 - trained)


def test_folders_whose_numbers_are_equal_stay_apart(tmp_path: Path) -> None:
    for name in ("s1/1", "s01/1", "s1/2", "s01/2"):
        save(tmp_path / f"good/{name}.png", np.zeros((8, 8, 3), np.uint8))
    found = [anomaly_sources.find(tmp_path, split, None, 0.5) for split in ("train", "test")]
    names = [[item.name for item in source.items] for source in found]
    assert names == [["good/s01/1.png", "good/s01/2.png"], ["good/s1/1.png", "good/s1/2.png"]]


def test_npz_is_split_by_sorted_num(root: Path) -> None:
    path = write_npz(root / "tiles.npz")
    train, test = (load(path, split, size=None) for split in ("train", "test"))
    assert train.names == ["10", "8", "6", "4"]  # their nums are 90, 92, 94, 96
    assert test.names == ["2", "0", "11", "9", "7", "5", "3", "1"]
    assert test.label_names == ["good", "defect 1", "defect 2"]
    assert np.array_equal(train.images[0], np.stack([picture(10, channels=1)] * 3))
    assert test.masks is not None and np.array_equal(test.masks[2], spot() > 0)
    assert not test.masks[:2].any()


def test_images_of_one_num_stay_together_and_train_beside_no_defect(root: Path) -> None:
    path = write_npz(root / "pairs.npz", num=np.array([5, 1, 2, 6, 2, 7, 2, 8, 3, 9, 4, 4]))
    train, test = (load(path, split, size=None, train_share=0.2) for split in ("train", "test"))
    assert sorted(train.names) == ["2", "4", "6"] and {"8", "10", "0"} < set(test.names)
    late, _ = (load(path, split, size=None, train_share=0.8) for split in ("train", "test"))
    assert sorted(late.names) == ["2", "4", "6", "8"]  # not 10, which shares num 4 with the defect 11


def test_decoded_once_until_a_file_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = anomaly._decode

    def counted(item: anomaly.Item, *options: object) -> tuple[np.ndarray, np.ndarray, bool]:
        decoded.append(item.name)
        return decode(item, *options)  # type: ignore[arg-type]

    monkeypatch.setattr(anomaly, "_decode", counted)
    first = load(write_mvtec(root), "test")
    count = len(decoded)
    again = load(root, "test")
    assert len(decoded) == count and again.fingerprint == first.fingerprint
    assert np.array_equal(again.images, first.images) and first.images.shape == (6, 3, 224, 224)
    save(root / "bottle/ground_truth/crack/000_mask.png", 255 - spot())
    os.utime(root / "bottle/ground_truth/crack/000_mask.png", ns=(0, 1))
    changed = load(root, "test")
    assert len(decoded) == 2 * count and changed.masks is not None and first.masks is not None
    assert (changed.masks[1] != first.masks[1]).all()


def remove(path: str) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        (write_mvtec(root) / path).unlink()
        return root

    return spoil


def spoil_picture(root: Path) -> Path:
    file = write_mvtec(root) / "bottle/train/good/001.png"
    file.write_bytes(file.read_bytes()[:-30])
    return root


def spoil_mask_size(root: Path) -> Path:
    save(write_mvtec(root) / "bottle/ground_truth/crack/000_mask.png", spot(9))
    return root


def spoil_train(root: Path) -> Path:
    save(write_mvtec(root) / "bottle/train/crack/000.png", picture(0))
    return root


def spoil_visa_file(root: Path) -> Path:
    (write_visa(root) / "pcb1/Data/Images/Anomaly/000.JPG").unlink()
    return root


def spoil_visa_csv(root: Path) -> Path:
    table = write_visa(root) / "split_csv/1cls.csv"
    table.write_text(table.read_text().replace("object,", "class,", 1))
    return root


def spoil_folders(root: Path) -> Path:
    (write_folders(root) / "masks/dent/a.png").unlink()
    return root


def unread_suffixes(root: Path) -> Path:
    (root / "good").mkdir()
    (root / "good/a.gif").touch()
    return root


def npz(**changes: object) -> Callable[[Path], Path]:
    return lambda root: write_npz(root / "a.npz", **changes)


@pytest.mark.parametrize(
    ("spoil", "split", "message"),
    [
        (lambda root: root / "none", "train", r"none does not exist; `dxmi data --help` lists the layouts$"),
        (lambda root: root, "train", r"data: has no good/, train/good/ or CLASS/train/good/ with images"),
        (
            unread_suffixes, "train",
            r"with images; skipped: good \(a folder without images of a type that is read\); `dxmi data"
        ),
        (remove("screw/test/good/000.png"), "test", r"screw/test: has no good images \(test/good\); `dxmi"),
        (remove("bottle/ground_truth/crack/000_mask.png"), "test", r"crack/000\.png: its mask is missing"),
        (spoil_picture, "train", r"bottle/train/good/001\.png: cannot be decoded"),
        (spoil_mask_size, "test", r"crack/000\.png: its mask must be \[8, 8\], as the image, got \[9, 9\]"),
        (spoil_train, "train", r"bottle: train must contain good images only .*got crack, good"),
        (write_mvtec, "train", r"one size unless size is set, got \[3, 8, 8\] and \[3, 16, 16\]"),
        (write_mvtec, "val", r"split must be train or test, got 'val'"),
        (spoil_visa_file, "test", r"names pcb1/Data/Images/Anomaly/000\.JPG, which is missing"),
        (spoil_visa_csv, "test", r"columns must be object,split,label,image,mask, object is missing"),
        (spoil_folders, "test", r"dent/a\.png: its mask is missing, expected .*masks/dent/a\.png"),
        (npz(x=None), "train", r"keys must be x and y, got label, num, mask_packed; `dxmi"),
        (npz(x=np.zeros((12, 8))), "train", r"images must be numbers .* got float64 \[12, 8\]"),
        (npz(label=np.zeros(3, int)), "train", r"labels must be 12 integers or names, got int64 \[3\]"),
        (npz(label=np.ones(12, int)), "train", r"a split requires >= 2 good images or groups, got 0"),
        (npz(mask=np.zeros((12, 4, 4))), "train", r"masks must be \[12, 8, 8\], got \[12, 4, 4\]"),
        (npz(x=np.array([{}])), "train", r"cannot be read as npz without pickles"),
    ],
)  # fmt: skip
def test_bad_data_is_rejected(spoil: Callable[[Path], Path], split: str, message: str, root: Path) -> None:
    path = spoil(root)
    with pytest.raises(ImageDataError, match=f"(?s){message}"):
        load(path, split, size=None)
    assert not list((root.parent / "cache").glob("anomaly-*[!k]"))  # only lock files are left


def test_one_error_names_the_damaged_images_of_both_splits(root: Path) -> None:
    write_folders(root)
    content = (root / "good/1.png").read_bytes()
    damaged = {"good/2.png": content[:40], "good/9.png": b"", "dent/a.png": b"text"}
    for name, spoiled in damaged.items():
        (root / name).write_bytes(spoiled)
    Image.fromarray(np.ones((8, 8), np.float32)).save(root / "good/10.tif")
    for split in ("train", "test"):
        with pytest.raises(
            ImageDataError, match="4 of 13 images cannot be read; repair or remove them:"
        ) as told:
            load(root, split)
        assert all(name in str(told.value) for name in damaged)
        assert "good/10.tif: has float pixels, but the training images have integers" in str(told.value)


def test_arrays_are_checked() -> None:
    images = np.zeros((2, 3, 4, 4), np.uint8)
    with pytest.raises(ImageDataError, match=r"masks must be bool \[2, 4, 4\] for .*got bool \[2, 4\]"):
        AnomalyData(images, np.zeros(2, np.int64), np.zeros((2, 4), np.bool_))
    with pytest.raises(
        ImageDataError, match=r"images must be uint8 \[2, 3, 4, 4\] for .*got uint8 \[2, 1, 4, 4\]"
    ):
        AnomalyData(images[:, :1], np.zeros(2, np.int64))
    with pytest.raises(ImageDataError, match=r"labels must be 0 for training, got 1 defects"):
        AnomalyData(images, np.array([0, 1]), split="train")
