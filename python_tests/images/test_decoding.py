"""Decoding of image files and arrays: depths, ranges, transparency, masks, unusual types and shapes, and
files with misleading names."""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dxmi_ext.anomaly.data import dataset as anomaly
from dxmi_ext.anomaly.data import layouts as anomaly_sources
from dxmi_ext.anomaly.data import vectors
from dxmi_ext.anomaly.scores import inspected
from dxmi_ext.images.data import dataset as images
from dxmi_ext.images.data import overview, pixels
from dxmi_ext.images.data.contents import DataError, ImageDataError
from dxmi_ext.images.data.pixels import Scale

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

TWELVE = np.array([0, 1, 8, 16, 2047, 2048, 4094, 4095], np.uint16)  # values of 12 bits
AS_BYTES = np.array([0, 0, 0, 1, 127, 128, 255, 255], np.uint8)


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel from uint16 [H, W, C], which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">2I5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def save(path: Path, image: Any, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def load(path: Path, **options: Any) -> images.ImageData:
    folder = path.parent
    return images.load(path, cache=folder.parent / f"{folder.name}-cache", **options)


def decode(file: str, name: str) -> np.ndarray:
    return pixels.eight_bits(pixels.read(file, name), pixels.NOMINAL, name)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_pillow_turns_them(orientation: int) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).save(file, "PNG", exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(pixels.read(file, "a"), expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0"])
def test_damaged_exif_data_turn_nothing(exif: bytes) -> None:
    file = io.BytesIO()
    Image.new("L", (6, 4)).save(file, "PNG", exif=exif)
    assert pixels.read(file, "a").shape == (4, 6, 3)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[:, :3] = 255
    save(tmp_path / "photos/a.png", stored, exif=exif)
    (found,) = images.load(tmp_path / "photos", cache=tmp_path / "cache").images
    assert found.shape == (3, 6, 4) and found[0, :3].all() and not found[0, 3:].any()
    assert overview.of_images(tmp_path / "photos").details()["sizes"] == {"4x6": 1}


# --- depths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_in_png_are_read_whole(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), np.uint16)
    found = pixels.read(io.BytesIO(png16(values)), "a")
    gray = [0, 0, 0, 1][: 3 + (channels == 2)]
    assert np.array_equal(found, values if channels > 2 else values[..., gray])


def tiff16(values: np.ndarray, order: str) -> bytes:
    """An uncompressed TIFF from uint16 [H, W, 3]."""
    height, width, _ = values.shape
    content = values.astype(f"{order}u2").tobytes()
    tags = {
        256: width,
        257: height,
        258: 122,
        259: 1,
        262: 2,
        273: 128,
        277: 3,
        278: height,
        279: len(content),
    }
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, value)
        for tag, value in tags.items()
    )
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + struct.pack(f"{order}I3H", 0, 16, 16, 16) + content


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_of_color_in_tiff_are_read_whole(order: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    assert np.array_equal(pixels.read(io.BytesIO(tiff16(values, order)), "a"), values)


def test_the_training_sets_depth_scales_all_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 bits in 16-bit PNGs, gray and color; test images are darker, or have a brighter pixel."""
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/test").mkdir()
    row = TWELVE.reshape(1, 8, 1)
    (tmp_path / "data/train/a.png").write_bytes(png16(row // 16))
    (tmp_path / "data/train/b.png").write_bytes(png16(np.repeat(row, 3, axis=2)))
    save(tmp_path / "data/train/c.png", np.full((1, 8, 3), 7, np.uint8))
    (tmp_path / "data/test/a.png").write_bytes(png16(row // 2))
    (tmp_path / "data/test/b.png").write_bytes(png16(row * 16))
    train = load(tmp_path / "data")
    assert train.scale == Scale(4095) and np.array_equal(train.images[1, 0, 0], AS_BYTES)
    assert (train.images[2] == 7).all()  # images of 8 bits are not scaled
    test = load(tmp_path / "data", split="test", scale=train.scale)
    assert test.images[0, 0, 0].tolist() == [0, 0, 0, 0, 64, 64, 127, 127]
    assert test.images[1, 0, 0].tolist() == [0, 1, 8, 16, 255, 255, 255, 255]
    assert "1 image(s) have values beyond the training images' scale" in capsys.readouterr().err
    assert load(tmp_path / "data", scale=Scale(4095)).fingerprint == train.fingerprint
    assert load(tmp_path / "data", scale=Scale()).images[1].max() == 16  # an older run


def test_the_depth_of_anomaly_data_is_that_of_good_training_images(tmp_path: Path) -> None:
    for name, factor in (("good/1", 0.5), ("good/2", 1), ("good/3", 1), ("bad/1", 4)):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png16((TWELVE.reshape(1, 8, 1) * factor).astype(np.uint16)))
    options: dict[str, Any] = {"size": None, "cache": tmp_path / "cache"}
    train, test = (anomaly.load(tmp_path / "data", split=s, **options) for s in ("train", "test"))
    assert train.scale == test.scale == Scale(4095)
    assert np.array_equal(test.images[0, 0, 0], AS_BYTES) and test.images[1].max() == 255
    assert test.images[1, 0, 0, 2] == 2  # 32 of 4095
    source = anomaly_sources.find(tmp_path / "data", "train", None, 0.7)
    assert anomaly.decoded(source, "train", None).fingerprint == train.fingerprint
    test = anomaly.load(tmp_path / "data", split="test", scale=Scale(), **options)
    assert test.images[0].max() == 16


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, (0.0, 1.0)),
        (0.02, 0.9, (0.0, 1.0)),
        (-0.001, 1.001, (0.0, 1.0)),
        (-1.0, 0.8, (-1.0, 1.0)),
        (0.0, 255.0, (0.0, 255.0)),
        (3.0, 1000.5, (0.0, 1023.0)),
        (3.0, 1500.0, (0.0, 4095.0)),
        (0.0, 65535.0, (0.0, 65535.0)),
    ],
)
def test_floats_have_one_of_the_known_ranges(
    low: float, high: float, expected: tuple[float, float], tmp_path: Path
) -> None:
    stored = np.linspace(low, high, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    np.savez(tmp_path / "a.npz", x=stored)
    data = load(tmp_path / "a.npz")
    black, white = expected
    assert data.scale.floats == expected
    assert (
        np.abs(data.images.transpose(0, 2, 3, 1) / 255 - (stored - black) / (white - black)).max()
        < 0.51 / 255
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-500.0, 2000.0], r"float pixel values must lie in \[0, 1\], .*, got -500 to 2000"),
        ([0.0, 1e9], "got 0 to 1e"),
        ([0.5, np.nan], "pixel values must be finite"),
        ([-1, 5], r"integer pixel values must lie in \[0, 65535\], got -1 to 5"),
        ([0, 70000], "got 0 to 70000"),
    ],
)
def test_values_of_no_known_range_are_rejected(values: list[float], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.resize(values, (2, 4, 4)))
    with pytest.raises(ImageDataError, match=message):
        load(tmp_path / "a.npz")


def test_float_tiff_and_16_bit_tiff(tmp_path: Path) -> None:
    save(tmp_path / "f/a.tiff", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    assert load(tmp_path / "f").images[0, 0].ravel()[[0, 32, 63]].tolist() == [0, 130, 255]
    save(tmp_path / "i/a.tiff", np.resize(TWELVE, (1, 8)))
    assert np.array_equal(load(tmp_path / "i").images[0, 2, 0], AS_BYTES)
    with pytest.raises(
        ImageDataError, match=r"a\.tiff: has float pixels, but the training images .* remove it"
    ):
        decode(str(tmp_path / "f/a.tiff"), "a.tiff")


# --- transparency ------------------------------------------------------------------------------------

HIDDEN = np.zeros((2, 3, 4), np.uint8)
HIDDEN[..., :3] = 40, 80, 120  # in opaque, half transparent and transparent pixels
HIDDEN[:, :, 3] = 255, 128, 0
SEEN = [[40, 80, 120], [147, 167, 187], [255, 255, 255]]


def test_files_of_several_pages_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TIFF and APNG, read for samplers, anomaly detection and scoring; previews in photos do not count."""
    first, second = (Image.new("RGB", (6, 6), color) for color in ("red", "blue"))
    folders = [tmp_path / name for name in ("parts/train/good", "parts/test/good", "parts/test/dent")]
    for folder in folders:
        folder.mkdir(parents=True)
        first.copy().save(folder / "0.jpg", "MPO", save_all=True, append_images=[second.copy()])
        first.save(folder / "1.png")
    first.save(folders[0] / "2.png", save_all=True, append_images=[second])
    first.save(folders[0] / "3.tif", save_all=True, append_images=[second])
    noted = "2 image(s) have several pages, of which the first is used: "

    data = images.load(folders[0], cache=tmp_path / "cache")
    assert (data.images[:, 0] > 200).all() and (data.images[:, 2] < 50).all()
    assert capsys.readouterr().err.splitlines()[-1] == f"{noted}{folders[0]}/2.png and 1 more"
    anomaly.load(tmp_path / "parts", cache=tmp_path / "cache")
    assert f"{noted}{folders[0]}/2.png and 1 more" in capsys.readouterr().err
    assert [inspected.read(str(path), 6, False).has_pages for path in sorted(folders[0].iterdir())] == [
        *(False, False, True, True)
    ]
    found = overview.of_images(folders[0]).details()
    assert found["multipage"] == ["2.png", "3.tif"]
    text = overview.text_of(found | {"recipe": "images"})
    assert "several pages, of which the first is used: 2.png, 3.tif" in text


def test_transparent_pixels_are_white_whatever_lies_in_them(tmp_path: Path) -> None:
    assert decode(str(save(tmp_path / "a/a.png", HIDDEN)), "a")[0].tolist() == SEEN
    assert load(tmp_path / "a").images[0, :, 0].T.tolist() == SEEN
    np.savez(tmp_path / "a.npz", x=HIDDEN[None])
    assert load(tmp_path / "a.npz").images[0, :, 0].T.tolist() == SEEN
    wide = HIDDEN.astype(np.uint16) * 257
    assert decode(_file(tmp_path / "w.png", png16(wide)), "w")[0].tolist() == SEEN


def _file(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "LA"])
def test_other_ways_to_be_transparent(mode: str, tmp_path: Path) -> None:
    gray = np.array([[10, 200]], np.uint8)
    image = Image.fromarray(gray).convert(mode)
    options: dict[str, object] = {"transparency": {"P": 10, "L": 10, "RGB": (10, 10, 10)}.get(mode)}
    if mode == "LA":
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        options = {}
    found = decode(str(save(tmp_path / "a.png", image, **options)), "a")
    assert found[0, 0].tolist() == [255] * 3 and found[0, 1].tolist() == [200] * 3


def paint(color: list[list[int]], alpha: list[list[int]] | None = None) -> np.ndarray:
    gray = np.repeat(np.array(color, np.uint8)[..., None], 3, axis=2)
    return gray if alpha is None else np.dstack([gray, np.array(alpha, np.uint8)])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (paint([[0, 1, 255]]), [0, 1, 1]),
        (paint([[0, 0, 0]], [[0, 255, 9]]), [0, 1, 1]),  # painted in alpha, over black
        (paint([[200, 200, 200]], [[0, 255, 255]]), [0, 1, 1]),  # over a color
        (paint([[0, 9, 0]], [[0, 255, 0]]), [0, 1, 0]),  # a stroke on a transparent layer
        (paint([[0, 9, 0]], [[255, 255, 255]]), [0, 1, 0]),
        (paint([[9, 9, 0]], [[0, 255, 255]]), [0, 1, 0]),  # an opaque background, and hidden values
        (paint([[0, 9, 0]], [[0, 0, 0]]), [0, 1, 0]),  # alpha has no information
        (paint([[0, 0, 0]], [[255, 255, 255]]), [0, 0, 0]),
        (np.array([[0, 1, 300]], np.uint16), [0, 1, 1]),
    ],
)
def test_masks_mark_what_is_painted(mask: np.ndarray, expected: list[int], tmp_path: Path) -> None:
    found = pixels.marked(str(save(tmp_path / "m.png", mask)), "m")
    assert found.dtype == bool and found.astype(int).tolist() == [expected]


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_traces_of_compression_are_no_marks(quality: int, tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[11:30, 7:21] = 255
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=quality)
    assert np.array_equal(pixels.marked(str(tmp_path / "m.jpg"), "m"), mask > 0)


def test_a_defect_of_one_pixel_survives_shrinking() -> None:
    mask = np.zeros((30, 20), bool)
    mask[7, 13] = True
    found = anomaly._resized_mask(mask, 10)
    assert found.sum() == 1 and found[2, 6]


# --- arrays ------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), np.uint8)
CLASSES = np.array([0, 1, 1, 2])


@pytest.mark.parametrize(
    "content",
    [
        {"x": PIXELS, "y": CLASSES[:, None]},
        {"X": PIXELS.astype(np.int64), "Y": CLASSES.astype(float)},
        {"samples": PIXELS.transpose(0, 3, 1, 2), "labels": CLASSES[None]},
        {"arr_0": PIXELS.astype(np.float16), "arr_1": CLASSES.astype(np.uint64)},
        {"x_train": PIXELS / 255, "y_train": CLASSES, "x_test": PIXELS},
        {"train_images": PIXELS, "train_labels": CLASSES[:, None], "val_images": PIXELS},
        {"data": PIXELS.astype(">i4"), "label": CLASSES.astype(np.int8), "junk": np.array([{}])},
    ],
)
def test_arrays_of_any_name_type_and_order(content: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content)
    data = load(tmp_path / "a.npz")
    assert np.abs(data.images.transpose(0, 2, 3, 1).astype(int) - PIXELS).max() == 0
    assert data.labels is not None and data.labels.tolist() == [0, 1, 1, 2] and data.classes == 3


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "A.NPZ"])
def test_arrays_are_found_by_other_names_or_if_there_is_only_one(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        np.save(file, PIXELS[..., 0])
    assert load(tmp_path / name).shape == (1, 8, 6)
    os.truncate(tmp_path / name, 0)
    with (tmp_path / name).open("wb") as file:
        np.savez(file, x=PIXELS)
    assert load(tmp_path / name).shape == (3, 8, 6)


def test_samples_of_ours_are_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", samples=np.arange(10.0).reshape(5, 2).astype(np.float32))
    assert vectors.load(tmp_path / "v.npz").train.shape == (5, 2)
    own = {"x_train": np.eye(4), "y_train": np.array([[0], [0], [1], [0]]), "x_test": np.eye(4)[:2]}
    np.savez(tmp_path / "v.npz", **own, y_test=np.array([[0], [1]]))
    train, test, anomalous = vectors.load(tmp_path / "v.npz")
    assert len(train) == 3 and len(test) == 2 and anomalous.tolist() == [False, True]
    np.save(tmp_path / "v.npy", np.eye(3))
    assert len(vectors.load(tmp_path / "v.npy").train) == 3


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        ([5, 1_000_000, -3, 5], [1, 2, 0, 1], ["-3", "5", "1000000"]),
        ([1, 2, 1, 2], [0, 1, 0, 1], ["1", "2"]),
        (["cat", "dog", "cat", "ant"], [1, 2, 1, 0], ["ant", "cat", "dog"]),
        ([True, False, True, True], [1, 0, 1, 1], []),
    ],
)
def test_labels_of_any_value_are_classes(
    labels: list[Any], expected: list[int], names: list[str], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", x=PIXELS, y=np.array(labels))
    data = load(tmp_path / "a.npz")
    assert data.labels is not None and data.labels.tolist() == expected
    assert data.class_names == names and data.classes == len(set(labels))


def test_a_class_that_one_split_lacks_keeps_the_others_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_x=PIXELS, train_y=[7, 9, 9, 8], test_x=PIXELS, test_y=[9] * 4)
    assert load(tmp_path / "a.npz", split="test").labels.tolist() == [2] * 4  # type: ignore[union-attr]


def test_anomaly_labels_of_any_value_are_kinds_of_defect(tmp_path: Path) -> None:
    x = np.zeros((6, 8, 16), np.float32)
    packed = np.packbits(np.ones((6, 8, 16), bool), axis=-1).astype(np.int64)
    content = {"x": x, "y": [[0], [0], [0], [-1], [1_000_000], [-1]], "mask_packed": packed}
    np.savez(tmp_path / "a.npz", **content, name=np.array([b"a", b"b", b"c", b"d", b"e", b"f"]))
    data = anomaly.load(tmp_path / "a.npz", split="test", size=None, cache=tmp_path / "cache")
    assert data.label_names == ["good", "defect -1", "defect 1000000"] and data.labels.tolist() == [
        0,
        1,
        2,
        1,
    ]
    assert data.names[1] == "d" and data.masks is not None and data.masks[1].all()


STREAMS = {"train_jpeg": np.zeros(9, np.uint8), "train_off": np.array([0, 4, 9])}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.array(5)}, r"images must be numbers .* got int64 \[\]"),
        ({"x": PIXELS, "y": np.array(3)}, r"labels must be 4 integers or names, got int64 \[\]"),
        ({"x": PIXELS, "y": np.eye(4)}, r"labels must be 4 integers or names, got float64 \[4, 4\]"),
        ({"x": PIXELS, "y": CLASSES + 0.5}, r"labels must be 4 integers or names, got float64 \[4\]"),
        ({"x": np.array([{}])}, r"a\.npz: x: cannot be read as npz without pickles"),
        ({"x": PIXELS[..., None]}, r"images must be numbers .* got uint8 \[4, 8, 6, 3, 1\]"),
        ({"x": np.zeros((0, 8, 8))}, r"images must be .* got float64 \[0, 8, 8\]"),
        (STREAMS | {"train_off": np.array([0, 4.5])}, r"offsets of streams must be .* got float64 \[2\]"),
        (STREAMS | {"train_off": np.array([0.0, 4, 99])}, r"lie in \[0, 9\], the number of bytes, got 0"),
        (STREAMS | {"train_off": np.array(3)}, r"offsets of streams must be .* got int64 \[\]"),
        (STREAMS | {"train_jpeg": np.full(9, 300)}, r"streams must be bytes.* got int64 \[9\]"),
        (STREAMS, r"a\.npz, image 0: cannot be decoded \(no known image format\)"),
    ],
)  # fmt: skip
def test_ambiguous_arrays_are_rejected(content: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ImageDataError, match=message) as error:
        load(tmp_path / "a.npz")
    assert "0x" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": np.array(["a"])}, r"name must be \[4\], one for each image, got \[1\]"),
        ({"num": np.array(1)}, r"num must be \[4\], one for each image, got \[\]"),
        ({"mask_packed": np.full((4, 8, 1), 0.5)}, r"packed masks must be bytes.* got float64 \[4, 8, 1\]"),
        ({"mask": np.array(["a"] * 4)}, r"masks must be \[4, 8, 6\], got \[4\]"),
        ({"y": np.array(["good"] * 4)}, r"labels must be 4 integers, 0 for good, got <U4 \[4\]"),
    ],
)
def test_side_arrays_of_anomaly_data_are_checked(
    changes: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **{"x": PIXELS, "y": [0, 0, 0, 1]} | changes)
    with pytest.raises(ImageDataError, match=message):
        anomaly.load(tmp_path / "a.npz", cache=tmp_path / "cache")


# --- files with misleading names ---------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>404</body></html>"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    return file.getvalue()


def images_of(path: Path) -> object:
    return load(path)


def folder_of(path: Path) -> object:
    return load(path.parent)


def vectors_of(path: Path) -> object:
    return vectors.load(path)


def visa_of(path: Path) -> object:
    return anomaly.load(path.parent.parent, cache=path.parent.parent / "cache")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (POINTER, "is a git-lfs pointer, not the file itself; run `git lfs pull`"),
        (PAGE, r"is a web page \(html\)"),
    ],
)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("d/a.png", folder_of),
        ("d/a.npz", images_of),
        ("d/a.npz", vectors_of),
        ("d/train-images-idx3-ubyte", folder_of),
        ("d/data_batch_1", folder_of),
        ("d/data_batch_1.bin", folder_of),
        ("split_csv/1cls.csv", visa_of),
        ("d/a.tar", images_of),
    ],
)
def test_pointers_instead_of_files_are_named(
    name: str, read: Callable[[Path], object], content: bytes, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "root" / name
    for i in range(1, 6):
        _file(path.with_name(path.name.replace("batch_1", f"batch_{i}")), content)
    _file(path.parent / "train-labels-idx1-ubyte" if "idx3" in name else path, content)
    with pytest.raises(DataError, match=found):
        read(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [(zipped(), "is a zip archive"), (b"", "is empty"), (b"\x93NUMPY\x01", "is an array of numpy"),
     (b"no picture", "cannot be decoded"), (b"\x1f\x8b\x08", "is compressed by gzip")],
)  # fmt: skip
def test_files_that_are_not_images_are_named(content: bytes, found: str, tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match=rf"a\.jpg: {found}"):
        decode(_file(tmp_path / "a.jpg", content), "a.jpg")


def test_a_missing_pillow_is_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", PIXELS[0])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="PIL"):
        pixels.read(str(path), "a.png")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
@pytest.mark.parametrize("on_disk", ["utf-8", "latin-1"])
def test_visas_table_in_other_encodings(encoding: str, on_disk: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    rows = ["object,split,label,image,mask", "Tür,train,normal,Tür/größe.png,"]
    save(root / os.fsdecode("Tür".encode(on_disk)) / os.fsdecode("größe.png".encode(on_disk)), PIXELS[0])
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_bytes("\r\n".join(rows).encode(encoding))
    if encoding != "latin-1" and on_disk == "latin-1":
        pytest.skip("a name in a Unicode table is Unicode on disk")
    data = anomaly.load(root, size=8, cache=tmp_path / "cache")
    assert data.class_names == ["Tür"] and len(data) == 1


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Names of classes, kinds of defect, files and the folder itself; all are shown as valid text."""
    odd = os.fsdecode(b"caf\xe9")
    for name in (f"{odd}/{odd}.png", "tea/a.png"):
        save(tmp_path / odd / name, PIXELS[0])
    data = load(tmp_path / odd)
    assert data.class_names == ["caf\\xe9", "tea"] and data.classes == 2
    for name in ("good/1.png", f"good/{odd}.png", f"{odd}/1.png"):
        save(tmp_path / "anomaly" / odd / name, PIXELS[0])
    found = anomaly.load(tmp_path / "anomaly" / odd, split="test", cache=tmp_path / "cache")
    told = [*found.class_names, *found.label_names, *found.names]
    assert found.label_names == ["good", "caf\\xe9"] and [text.encode() for text in told]
    (tmp_path / odd / "tea/a.png").write_bytes(POINTER)
    with pytest.raises(ImageDataError, match=r"caf\\xe9/tea/a\.png: is a git-lfs pointer"):
        load(tmp_path / odd)
