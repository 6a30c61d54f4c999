"""Image data: the order, the layouts on disk, the cache, and errors."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dxmi_ext.engine.output.plots import to_uint8
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.data import dataset as images
from dxmi_ext.images.data import layouts as image_sources
from dxmi_ext.images.data.dataset import ImageData, ImageDataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # from the Debian package dataset-fashion-mnist


def numbered(n: int) -> ImageData:
    """Image i has the value i in its left column and 100 + i in its right one."""
    pixels = np.arange(n, dtype=np.uint8)[:, None, None, None] + np.array([0, 100], np.uint8)
    return ImageData(np.ascontiguousarray(np.broadcast_to(pixels, (n, 3, 2, 2))), np.arange(n))


def order(data: ImageData, iterations: range, batch_size: int, **options: object) -> list[int]:
    """Labels in the order in which the iterations see them."""
    batches = [data.batch(i, batch_size, **options)[1] for i in iterations]  # type: ignore[arg-type]
    return torch.cat([labels for labels in batches if labels is not None]).tolist()


def test_epochs_are_permutations_of_their_own_and_batches_cross_their_ends() -> None:
    data = numbered(10)
    seen = order(data, range(15), 4)  # 60 rows: six epochs
    epochs = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert order(data, range(2), 30) == seen  # a batch of three epochs
    assert order(data, range(14, 15), 4) == seen[56:]  # without the batches before
    assert order(data, range(6), 10, seed=1) != seen
    assert order(data, range(6), 10, stream="other") != seen


def test_order_is_part_of_the_format_of_saved_runs() -> None:
    assert order(numbered(8), range(2), 8) == [6, 5, 3, 7, 1, 0, 2, 4, 5, 6, 1, 3, 4, 0, 2, 7]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_what_one_would_see(ranks: int) -> None:
    data = numbered(10)
    whole = data.batch(3, 12, flip=True)
    count = 12 // ranks
    parts = [data.batch(3, 12, offset=r * count, count=count, flip=True) for r in range(ranks)]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole[0])
    assert order(data, range(3, 4), 12) == [int(i) for _, y in parts for i in y]  # type: ignore[union-attr]


def test_half_of_the_rows_are_mirrored() -> None:
    data = numbered(50)
    plain = torch.cat([data.batch(i, 50, dtype=torch.uint8)[0] for i in range(20)])
    flipped = torch.cat([data.batch(i, 50, dtype=torch.uint8, flip=True)[0] for i in range(20)])
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    assert 0.45 < mirrored.double().mean() < 0.55
    assert len({tuple(m.tolist()) for m in mirrored.split(50)}) == 20  # drawn again every epoch


def test_values_survive_conversion_to_floats_and_back() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    values = images.to_dtype(stored, torch.float32)
    assert values.min() == -1 and values.max() == 1
    assert torch.equal(to_uint8(values), stored)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    x, y = ImageData(stored.numpy()).batch(0, 1, dtype=torch.float64)
    assert x.dtype == torch.float64 and torch.allclose(x, values.double(), atol=1e-7) and y is None


def test_rows_out_of_the_batch_are_rejected() -> None:
    with pytest.raises(ValueError, match="rows must lie within a batch of 4, got iteration 0, offset 3"):
        numbered(10).batch(0, 4, offset=3, count=2)


# Layouts: each writes pixels [n, H, W, C] and labels below a folder and returns the path to load.


def pixels(n: int, size: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)


LABELS = np.array([0, 1, 1, 0, 2])


def write_cifar10_binary(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    records = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], axis=1)
    for i in range(5):
        records[i : i + 1].astype(np.uint8).tofile(folder / f"data_batch_{i + 1}.bin")
    return folder


def cifar10_python_batch(x: np.ndarray, y: np.ndarray) -> bytes:
    """A batch as Python 2 pickled it, opcode by opcode."""

    def short(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode() + b"q\x01"

    content = x.transpose(0, 3, 1, 2).tobytes()
    shape = b"K" + bytes([len(x)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short("b") + b"\x87R("
    dtype = b"cnumpy\ndtype\n" + short("u1") + b"K\x00K\x01\x87R(K\x03" + short("|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = (
        array + b"K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(content)) + content + b"q\x02tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in y.tolist()) + b"e"
    names = b"](" + short("cat_s_000001.png") + b"e"
    items = [(b"batch_label", short("training batch 1 of 5")), (b"labels", labels), (b"data", data)]
    body = b"".join(short(key.decode()) + value for key, value in items)
    return b"\x80\x02}q\x01(" + body + short("filenames") + names + b"u."


def write_cifar10_python(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    for i in range(5):
        (folder / f"data_batch_{i + 1}").write_bytes(cifar10_python_batch(x[i : i + 1], y[i : i + 1]))
    return folder


def write_idx(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *x.shape[:3]) + x.tobytes())
    labels = struct.pack(">2I", 0x801, len(y)) + y.astype(np.uint8).tobytes()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


def write_npz(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(folder / "a.npz", x=x, y=y)
    return folder / "a.npz"


def write_npz_channels_first(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(folder / "a.npz", train_images=x.transpose(0, 3, 1, 2), train_labels=y.astype(np.uint8))
    return folder / "a.npz"


def write_npz_streams(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    streams = [encoded(image) for image in x]
    offsets = np.cumsum([0, *map(len, streams)])
    np.savez(
        folder / "a.npz", train_jpeg=np.frombuffer(b"".join(streams), np.uint8), train_off=offsets, train_y=y
    )
    return folder / "a.npz"


def write_folders(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    for i in np.argsort(-y, kind="stable"):  # in another order than they are read
        (folder / "train" / f"n{y[i]}").mkdir(parents=True, exist_ok=True)
        (folder / "train" / f"n{y[i]}" / f"{i}.PNG").write_bytes(encoded(x[i]))
    return folder


def encoded(image: np.ndarray, kind: str = "png") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


WRITERS: list[tuple[Callable[[Path, np.ndarray, np.ndarray], Path], int]] = [
    (write_cifar10_binary, 3),
    (write_cifar10_python, 3),
    (write_idx, 1),
    (write_npz, 1),
    (write_npz, 3),
    (write_npz_channels_first, 3),
    (write_npz_streams, 3),
    (write_folders, 3),
]


@pytest.mark.parametrize(("write", "channels"), WRITERS)
def test_layouts_are_read_exactly(
    write: Callable[[Path, np.ndarray, np.ndarray], Path], channels: int, tmp_path: Path
) -> None:
    pytest.importorskip("PIL")
    x = pixels(5, 32, channels)
    data = images.load(write(tmp_path, x, LABELS), cache=tmp_path / "cache")
    expected = np.argsort(LABELS, kind="stable") if write is write_folders else np.arange(5)
    assert np.array_equal(data.images, x.transpose(0, 3, 1, 2)[expected])
    assert data.labels is not None and np.array_equal(data.labels, LABELS[expected])
    assert data.shape == (channels, 32, 32) and len(data) == 5
    assert data.classes == (10 if "cifar" in write.__name__ else 3)
    if write is write_folders:
        assert data.class_names == ["n0", "n1", "n2"]
    assert data.fingerprint == ImageData(np.array(data.images)).fingerprint


def test_flat_folder_and_its_splits(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    for split, n in (("train", 3), ("val", 2)):
        (tmp_path / split).mkdir()
        for i, image in enumerate(pixels(n, 8, 3)):
            (tmp_path / split / f"{i}.webp").write_bytes(encoded(image, "webp"))
    train, test = (images.load(tmp_path, split=s, cache=tmp_path / "cache") for s in ("train", "test"))
    assert (len(train), len(test)) == (3, 2) and train.labels is None and train.classes == 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [((32, 32), 8), ((64, 32), 8), ((32, 70), 8), ((33, 47), 16), ((8, 8), 20), ((8, 9), 8)],
)
def test_images_are_brought_to_a_size(shape: tuple[int, int], size: int) -> None:
    """A ramp is resampled around the center at the right scale; a constant stays constant."""
    pytest.importorskip("PIL")
    height, width = shape
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    picture = np.stack([across * 3, np.full(shape, 7), down], axis=2)
    fitted = images._fit(picture.astype(np.uint8), size).astype(float)
    assert fitted.shape == (size, size, 3) and (fitted[..., 1] == 7).all()
    step = min(shape) / size
    place = (np.arange(size) - (size - 1) / 2) * step
    inner = slice(2, -2)  # bicubic windows end at the border
    assert np.abs(fitted[..., 0].mean(axis=0) / 3 - (place + (width - 1) / 2))[inner].max() <= 1.2 + step / 2
    assert np.abs(fitted[..., 2].mean(axis=1) - (place + (height - 1) / 2))[inner].max() <= 1.2 + step / 2


def test_halving_by_a_box_filter_is_exact() -> None:
    pytest.importorskip("PIL")
    small = pixels(1, 8, 3)[0]
    assert np.array_equal(images._fit(small.repeat(4, axis=0).repeat(4, axis=1), 8), small)
    wide = np.concatenate([np.zeros((8, 4, 3), np.uint8), small, np.zeros((8, 4, 3), np.uint8)], axis=1)
    assert np.array_equal(images._fit(wide, 8), small)  # the center is kept


def test_images_are_decoded_once_until_a_file_or_the_size_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    path, cache, decoded = write_npz(tmp_path, pixels(5, 8, 1), LABELS), tmp_path / "cache", []
    decode = images._decode_to

    def slow(entry: Path, *arguments: object) -> None:
        decoded.append(entry)
        time.sleep(0.05)  # so that the other thread has to wait
        decode(entry, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "_decode_to", slow)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: images.load(path, cache=cache), range(2)))
    assert len(decoded) == 1
    images.load(path, size=4, cache=cache)
    assert len(decoded) == 2
    os.utime(path, ns=(0, 1))
    images.load(path, cache=cache)
    images.load(path, cache=cache)
    assert len(set(decoded)) == len(decoded) == 3
    assert not isinstance(images.load(path, cache=cache).images, np.memmap)


def test_a_damaged_image_is_named_and_leaves_no_cache(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    path = write_folders(tmp_path / "data", pixels(5, 8, 3), LABELS)
    (path / "train/n1/2.PNG").write_bytes(encoded(pixels(1, 8, 3)[0])[:-40])
    with pytest.raises(ImageDataError, match=r"n1/2\.PNG: cannot be decoded"):
        images.load(path, cache=tmp_path / "cache")
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]


def test_pickles_are_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    for i in range(5):
        batch = {"data": Trap(), "labels": [0]}
        (tmp_path / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ImageDataError, match=r"data_batch_1: expected .* got 0 bytes and 0 labels"):
        images.load(tmp_path, cache=tmp_path / "cache")
    np.savez(tmp_path / "a.npz", x=np.array([Trap()]), y=np.array([0]))
    with pytest.raises(ImageDataError, match="without pickles"):
        images.load(tmp_path / "a.npz", cache=tmp_path / "cache")
    assert not (tmp_path / "sprung").exists()


def spoil_missing_batch(folder: Path) -> Path:
    (write_cifar10_binary(folder, pixels(5, 32, 3), LABELS) / "data_batch_4.bin").unlink()
    return folder


def spoil_binary(folder: Path) -> Path:
    (write_cifar10_binary(folder, pixels(5, 32, 3), LABELS) / "data_batch_2.bin").write_bytes(b"1" * 3072)
    return folder


def spoil_idx_header(folder: Path) -> Path:
    write_idx(folder, pixels(5, 8, 1), LABELS)
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x0d\x03" + bytes(12))
    return folder


def spoil_idx_length(folder: Path) -> Path:
    with (write_idx(folder, pixels(5, 8, 1), LABELS) / "train-images-idx3-ubyte").open("ab") as file:
        file.write(b"1")
    return folder


def spoil_idx_labels(folder: Path) -> Path:
    return write_idx(folder, pixels(5, 8, 1), LABELS[:4])


def spoil_npz_type(folder: Path) -> Path:
    return write_npz(folder, pixels(5, 8, 3).astype(complex), LABELS)


def spoil_npz_keys(folder: Path) -> Path:
    np.savez(folder / "a.npz", faces=pixels(5, 8, 3))
    return folder / "a.npz"


def spoil_npz_body(folder: Path) -> Path:
    path = write_npz(folder, pixels(5, 8, 3), LABELS)
    path.write_bytes(path.read_bytes()[:300])
    return path


def spoil_npz_to_nothing(folder: Path) -> Path:
    (folder / "a.npz").write_bytes(b"")
    return folder / "a.npz"


def spoil_npz_to_an_array(folder: Path) -> Path:
    with (folder / "a.npz").open("wb") as file:
        np.save(file, np.zeros((5, 8), complex))
    return folder / "a.npz"


def spoil_gzip(folder: Path) -> Path:
    plain = write_idx(folder, pixels(5, 8, 1), LABELS) / "train-images-idx3-ubyte"
    content = bytearray(gzip.compress(plain.read_bytes()))
    content[20:60] = bytes(40)
    plain.unlink()
    plain.with_name(plain.name + ".gz").write_bytes(content)
    return folder


def spoil_sizes(folder: Path) -> Path:
    for i, size in enumerate((8, 9)):
        (folder / f"{i}.png").write_bytes(encoded(pixels(1, size, 3)[0]))
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder / "none", r"none does not exist; `dxmi data --help` lists the layouts$"),
        (lambda folder: folder, r"data: .*/data has no images$"),
        (spoil_missing_batch, r"data_batch_4\.bin missing"),
        (spoil_binary, r"data_batch_2\.bin: expected records of 3073 bytes, got 3072"),
        (spoil_idx_header, r"expected the header 00 00 08 03 .* got 00 00 0d 03"),
        (spoil_idx_length, r"expected \(5, 8, 8\) bytes as its header says, got 321"),
        (spoil_idx_labels, r"labels must be 5 integers >= 0, got uint8 \[4\]"),
        (spoil_npz_type, r"images must be numbers .* got complex128 \[5, 8, 8, 3\]"),
        (spoil_npz_keys, r"expected the key x .* got faces"),
        (spoil_npz_body, r"a\.npz: cannot be read as npz"),
        (spoil_npz_to_nothing, r"a\.npz: cannot be read as npz"),
        (spoil_npz_to_an_array, r"images must be numbers .* got complex128 \[5, 8\]"),
        (spoil_gzip, r"ubyte\.gz: is damaged"),
        (spoil_sizes, r"images must have one size unless image_size is set, got \[3, 8, 8\] and \[3, 9, 9\]"),
    ],
)
def test_bad_data_is_rejected(spoil: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "data").mkdir()
    with pytest.raises(ImageDataError, match=message):
        images.load(spoil(tmp_path / "data"), cache=tmp_path / "cache")


def test_one_error_names_all_damaged_images(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "data").mkdir()
    for i in range(14):
        content = encoded(pixels(1, 8, 3)[0])
        (tmp_path / f"data/{i:02}.png").write_bytes(content[:70] if i % 2 else content if i < 12 else b"")
    with pytest.raises(ImageDataError) as told:
        images.load(tmp_path / "data", cache=tmp_path / "cache")
    lines = str(told.value).splitlines()
    assert lines[0] == "8 of 14 images cannot be read; repair or remove them:"
    assert "01.png: cannot be decoded" in lines[1] and "12.png: is empty" in lines[7]


def test_a_split_that_is_not_there_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/1.png").touch()
    with pytest.raises(image_sources.SplitMissing, match=r"expected split 'test', got the splits train"):
        image_sources.find(tmp_path, "test")
    with pytest.raises(ImageDataError, match=r"expected split 'test', got no splits \(keys x, y\)"):
        images.load(write_npz(tmp_path, pixels(5, 8, 3), LABELS), split="test", cache=tmp_path / "cache")


def test_cache_says_what_it_holds(tmp_path: Path) -> None:
    path = write_npz(tmp_path, pixels(5, 8, 3), LABELS)
    images.load(path, cache=tmp_path / "cache")
    (about,) = (tmp_path / "cache").glob("*/about.json")
    assert json.loads(about.read_text())["source"] == str(path)


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is a file in place of a folder, since root may write anywhere."""
    (tmp_path / "file").touch()
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 8, 8, 3), np.uint8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for cache in (None, tmp_path / "file"):
        where = cache or tmp_path / "file/dxmi_ext"
        message = rf"cache must be .*'{where}' \(.*exists|Not a directory\); cache=DIR .* chooses another"
        with pytest.raises(ConfigError, match=message):
            images.load(tmp_path / "x.npz", cache=cache)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="no Debian package dataset-fashion-mnist")
def test_fashion_mnist_of_debian(tmp_path: Path) -> None:
    data = images.load(FASHION_MNIST, split="test", cache=tmp_path)
    assert data.shape == (1, 28, 28) and len(data) == 10_000 and data.labels is not None
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert data.images.mean() / 255 == pytest.approx(0.2868, abs=1e-3)


@pytest.mark.skipif("DXMI_TEST_CIFAR10" not in os.environ, reason="DXMI_TEST_CIFAR10 names no CIFAR-10")
def test_cifar10(tmp_path: Path) -> None:
    data = images.load(os.environ["DXMI_TEST_CIFAR10"], split="test", cache=tmp_path)
    assert data.shape == (3, 32, 32) and data.labels is not None
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert data.images.mean(axis=(0, 2, 3)) / 255 == pytest.approx([0.4942, 0.4851, 0.4504], abs=5e-3)
