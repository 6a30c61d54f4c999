"""Folders of images: what counts as a class, a kind of defect, a split or a mask, what is skipped or refused;
and the command ``data``, which shows it."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dxmi_ext import cli
from dxmi_ext.anomaly.data import dataset as anomaly
from dxmi_ext.anomaly.data import overview
from dxmi_ext.anomaly.scores import inspection
from dxmi_ext.images.data import dataset as images
from dxmi_ext.images.data import layouts as image_sources
from dxmi_ext.images.data import listing
from dxmi_ext.images.data import overview as images_overview
from dxmi_ext.images.data.listing import ImageDataError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("yaml")

MARK = '{"kind": "run", "format": 1}'
UNMARKED = "recipe: a\ntask: images\noutput: a\nseed: 0\niterations: 1\nbatch_size: 1\n"
"""The config.yaml of a run from a version that did not mark folders."""


def write(root: Path, tree: str) -> Path:
    """Makes a tree: "bus/5" stands for five images 0.png to 4.png in bus/, "cat/a.png" for an image, "x -> y"
    for a link, "empty/" for a folder; other names are text files."""
    for entry in tree.split(", "):
        name, _, target = entry.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif entry.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        elif path.name.isdecimal():
            path.parent.mkdir(parents=True, exist_ok=True)
            for i in range(int(path.name)):
                save(path.with_name(f"{i}.png"))
        elif path.suffix == ".png":
            save(path)
        else:
            path.write_text({"config.yaml": UNMARKED}.get(path.name, MARK))
    return root


def save(path: Path) -> None:
    """Saves pixels that differ from those of every other path; none is 0, so masks mark all pixels."""
    pixels = np.random.default_rng(list(os.fsencode(path))).integers(1, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def told(path: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> dict:
    """The output of `dxmi data --json`."""
    assert cli.main(["data", str(path), "--json", *settings]) == 0
    return dict(json.loads(capsys.readouterr().out))


IMAGES = [
    # name, tree, splits, what is skipped
    ("classes", "bus/5, car/4", {"train": {"bus": 5, "car": 4}}, []),
    ("stray", "bus/5, car/5, van/4, p.png", {"train": {"bus": 5, "car": 5, "van": 4}}, ["p.png"]),
    ("Splits", "Train/a/2, Train/b/3, TEST/a/1, TEST/b/1",
     {"train": {"a": 2, "b": 3}, "test": {"a": 1, "b": 1}}, []),
    ("words", "training_set/a/2, validation/a/1", {"train": {"a": 2}, "val": {"a": 1}}, []),
    ("years", "train2017/3, val2017/2, test2017/1",
     {"train": {"images": 3}, "val": {"images": 2}, "test": {"images": 1}}, []),
    ("class called train", "train/train/2, train/bus/3, test/train/1, test/bus/1",
     {"train": {"bus": 3, "train": 2}, "test": {"bus": 1, "train": 1}}, []),
    ("linked folder", "cat/2, cat/more -> ../../else, dog/1", {"train": {"cat": 5, "dog": 1}}, []),
    ("linked class", "cat/2, dog -> ../else", {"train": {"cat": 2, "dog": 3}}, []),
    ("linked split", "train/a/2, test -> train", {"train": {"a": 2}, "test": {"a": 2}}, []),
    ("cycle", "cat/2, cat/up -> .., dog/1", {"train": {"cat": 2, "dog": 1}}, ["cat/up"]),
    ("broken links", "cat/2, dog/1, dog/x.png -> nowhere, dog/y.png -> y.png, van -> van",
     {"train": {"cat": 2, "dog": 1}}, ["dog/x.png", "dog/y.png", "van"]),
    ("empty", "cat/2, dog/1, owl/, owl/deep/", {"train": {"cat": 2, "dog": 1}}, ["owl"]),
    ("litter", "cat/2, dog/1, cat/._0.png, .ipynb_checkpoints/0.png, __MACOSX/cat/0.png, cat/Thumbs.db, "
     "@eaDir/0.png, desktop.ini, .DS_Store", {"train": {"cat": 2, "dog": 1}}, []),
    ("side files", "cat/2, cat/0.txt, readme.md, labels/0.txt", {"train": {"cat": 2}},
     ["cat/0.txt", "labels", "readme.md"]),
    ("masks", "cat/3, dog/3, GroundTruth/cat/3, segmentation_masks/0.png",
     {"train": {"cat": 3, "dog": 3}}, ["GroundTruth", "segmentation_masks"]),
    ("masks in a class", "cat/3, cat/masks/3, dog/1", {"train": {"cat": 3, "dog": 1}}, ["cat/masks"]),
    ("masks beside images", "cat/2, cat/0_mask.png, cat/1-GT.png, dog/1", {"train": {"cat": 2, "dog": 1}},
     ["cat/0_mask.png", "cat/1-GT.png"]),
    ("images and masks", "images/3, masks/3, p.png", {"train": {"images": 3}}, ["masks", "p.png"]),
    ("images with splits", "images/train/3, images/val/1, labels/train/0.txt",
     {"train": {"images": 3}, "val": {"images": 1}}, ["labels"]),
    ("splits with images", "train/images/3, train/masks/3, test/images/1, test/masks/1",
     {"train": {"images": 3}, "test": {"images": 1}}, ["test/masks", "train/masks"]),
    ("flat", "3, masks/3, notes.txt", {"train": {"images": 3}}, ["masks", "notes.txt"]),
    ("deep", "cat/a/2, cat/b/c/3, dog/1", {"train": {"cat": 5, "dog": 1}}, []),
    ("runs", "cat/2, dog/1, runs/a/dxmi.json, runs/a/pictures/9, runs/b/dxmi.json, out/dxmi.json, out/3",
     {"train": {"cat": 2, "dog": 1}}, ["out", "runs"]),
    ("runs without marks", "cat/2, dog/1, runs/a/config.yaml, runs/a/model/, runs/a/pictures/9, "
     "s/scores.csv, s/heatmaps/3", {"train": {"cat": 2, "dog": 1}}, ["runs", "s"]),
]  # fmt: skip

ANOMALIES = [
    # name, tree, splits, masks, what is skipped; 7 of 10 good images are for training
    ("plain", "good/10, dent/2, scratch/1", {"good": 3, "dent": 2, "scratch": 1}, 0, []),
    ("ground_truth", "good/10, dent/2, ground_truth/dent/2", {"good": 3, "dent": 2}, 2, []),
    ("mask", "good/10, dent/2, mask/dent/0_mask.png, mask/dent/1_mask.png", {"good": 3, "dent": 2}, 2, []),
    ("Masks", "good/10, Dent/2, Masks/dent/2", {"good": 3, "Dent": 2}, 2, []),
    ("flat masks", "good/10, bad/2, gt/2", {"good": 3, "bad": 2}, 2, []),
    ("masks of nothing", "good/10, annotations/2", {"good": 3}, 0, ["annotations"]),
    ("masks beside images", "good/10, dent/2, dent/0_mask.png, dent/1_mask.png", {"good": 3, "dent": 2}, 0,
     ["dent/0_mask.png", "dent/1_mask.png"]),
    ("masks in a kind", "good/10, dent/2, dent/masks/2", {"good": 3, "dent": 2}, 0, ["dent/masks"]),
    ("own runs", "good/10, dent/2, runs/a/dxmi.json, runs/a/pictures/9, scores/dxmi.json, scores/heatmaps/9",
     {"good": 3, "dent": 2}, 0, ["runs", "scores"]),
    ("Good", "Good/10, dent/2", {"good": 3, "dent": 2}, 0, []),
    ("litter", "good/10, dent/2, .ipynb_checkpoints/3, __MACOSX/dent/2, dent/._0.png, scratch/, p.png",
     {"good": 3, "dent": 2}, 0, ["p.png", "scratch"]),
    ("linked", "good/10, dent/1, dent/more -> ../../else", {"good": 3, "dent": 4}, 0, []),
    ("cycle", "good/10, dent/1, dent/up -> ..", {"good": 3, "dent": 1}, 0, ["dent/up"]),
]  # fmt: skip

SPLIT_ANOMALIES = [
    ("good and test", "good/7, test/good/3, test/dent/2, p.png", {"good": 3, "dent": 2}, 0, ["p.png"]),
    ("good, test, masks", "good/7, test/good/3, test/dent/2, ground_truth/dent/2", {"good": 3, "dent": 2}, 2,
     []),
    ("MVTec-AD", "train/good/7, test/good/3, test/dent/2, ground_truth/dent/2, license.txt",
     {"good": 3, "dent": 2}, 2, ["license.txt"]),
    ("MVTec-AD, other names", "Train/good/7, Testing/Good/3, Testing/dent/2, GroundTruth/dent/2",
     {"good": 3, "dent": 2}, 2, []),
    ("MVTec-AD, capitals", "train/Good/7, test/Good/3, test/dent/2, ground_truth/dent/2",
     {"good": 3, "dent": 2}, 2, []),
    ("MVTec-AD with more",
     "train/good/7, test/good/3, test/dent/2, gt/dent/2, validation/good/2, dent/1, runs/a/dxmi.json",
     {"good": 3, "dent": 2}, 2, ["dent", "runs", "validation"]),
    ("classes", "nut/train/good/4, nut/test/good/2, nut/test/dent/2, nut/ground_truth/dent/2, "
     "runs/a/dxmi.json, bolt/train/good/3, bolt/test/good/1, bolt/test/bent/1, bolt/ground_truth/bent/1, "
     "other/1, p.png",
     {"good": 3, "bent": 1, "dent": 2}, 3, ["other", "p.png", "runs"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "splits", "skipped"), [each[1:] for each in IMAGES], ids=[e[0] for e in IMAGES]
)
def test_image_folders(
    tree: str, splits: dict[str, dict[str, int]], skipped: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write(tmp_path / "else", "3")
    root = write(tmp_path / "data", tree)
    about = told(root, capsys)
    assert about["recipe"] == "images" and about["masks"] == 0
    assert about["splits"] == splits
    assert sorted(each["path"] for each in about["skipped"]) == skipped
    assert (
        about["sizes"] == {"4x4": sum(sum(c.values()) for c in about["splits"].values())} or None is skipped
    )
    for split, counts in splits.items():  # training reads the same
        data = images.load(root, split=split, cache=tmp_path / "cache")
        labels = ["images"] * len(data)
        if data.labels is not None:
            labels = [data.class_names[i] for i in data.labels]
        assert collections.Counter(labels) == counts
        assert len(data) == sum(counts.values())


@pytest.mark.parametrize(
    ("tree", "test", "masks", "skipped"),
    [each[1:] for each in ANOMALIES + SPLIT_ANOMALIES],
    ids=[e[0] for e in ANOMALIES + SPLIT_ANOMALIES],
)
def test_anomaly_folders(
    tree: str, test: dict[str, int], masks: int, skipped: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write(tmp_path / "else", "3")
    root = write(tmp_path / "data", tree)
    about = told(root, capsys)
    assert about["recipe"] == "anomaly" and about["masks"] == masks
    assert about["splits"] == {"train": {"good": 7}, "test": test}
    assert sorted(each["path"] for each in about["skipped"]) == skipped
    train, tested = (anomaly.load(root, split=s, size=4, cache=tmp_path / "cache") for s in ("train", "test"))
    assert len(train) == 7 and collections.Counter(tested.label_names[i] for i in tested.labels) == test
    assert (tested.masks is None) == (masks == 0)
    if tested.masks is not None:
        assert np.array_equal(tested.masks.all(axis=(1, 2)), tested.anomalous)


REFUSED = [
    ("images", "bus/5, car/5, train/5", "train/ may be a split or a class, beside bus/, car/; rename"),
    ("images", "train/a/2, Training/a/2", "Training/ and train/ both mean the split 'train'; keep one"),
    ("images", "9, cat/2, dog/2", "got both: 0.png and 8 more beside cat/, dog/"),
    ("images", "p.png, cat/2", "either images or folders of images, got both: p.png beside cat/"),
    ("images", "cat/train/2, cat/test/1, dog/train/2", "cat holds the splits test/, train/; a split holds"),
    ("images", "train/train/2", "train is a split and holds the splits train/; keep one level"),
    ("images", "mask/3, no_mask/3, other/3", "mask/ may be masks or a class, beside no_mask/; rename it"),
    ("images", "label/3, cap/3", "label/ may be masks or a class, beside cap/; rename it"),
    ("images", "cat/3, dog/3, mask/a.png", "mask/ may be masks or a class: most of its files match no image"),
    ("images", "gt/3", "gt/ may be masks or a class, beside nothing; rename it"),
    ("images", "empty/, .x/3, a/dxmi.json, a/3", "data has no images; skipped: a (results of dxmi); empty"),
    ("images", "dxmi.json, 3", "data holds results of dxmi, not data"),
    ("anomaly", "good/9, dent/2, test/good/2", "test/, dent/ are beside good/; kinds of defect must"),
    ("anomaly", "good/9, val/good/2", "val/ are beside good/; kinds of defect must be beside good/"),
    ("anomaly", "good/9, train/good/2", "must have either good/ or train/good/, got good/ b"),
    ("anomaly", "good/9, bad/dent/2, bad/bent/2", "of a kind of defect itself, got folders (bent/, dent/)"),
    ("anomaly", "good/9, dent/2, mask/dent/2, gt/dent/2", "gt/, mask/ could all be masks; keep one"),
    ("anomaly", "good/9, dent/2, mask/a.png", "dent/0.png: its mask is missing, expected "),
    ("anomaly", "good/9, dent/1, bent/1, mask/0.png", "mask/0.png: a mask must be of one image"),
    ("anomaly", "good/train/9, good/test/2, dent/1", "good holds the splits test/, train/; a split holds"),
    ("anomaly", "good/9, Good/9, dent/2", "Good/, good/ are all named good; keep one"),
    ("anomaly", "train/9, test/good/2", "train must contain good images only (train/good), got images"),
    ("anomaly", "train/good/9, test/2", "test: has no good images (test/good)"),
    ("anomaly", "a/train/good/2, a/test/good/1, a/test/x/1, a/gt/x/1, b/train/good/2, b/test/good/1, "
     "b/test/x/1", "b/test/x/0.png: its mask is missing, expected "),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "tree", "message"), REFUSED)
def test_ambiguous_folders_are_an_error_in_one_line(
    recipe: str, tree: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "data", tree)
    assert cli.main(["data", str(root), f"recipe={recipe}"]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    with pytest.raises(ImageDataError):
        if recipe == "images":
            images.load(root, cache=tmp_path / "cache")
        else:
            for split in ("train", "test"):
                anomaly.load(root, split=split, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "split", "masks"),
    [
        ("train", "train", False), ("Validation", "val", False), ("test_images", "test", False),
        ("Train Set", "train", False), ("ground_truth", None, True), ("GroundTruth", None, True),
        ("train_masks", None, True), ("SegmentationClass", None, True), ("label-images", None, True),
        ("trainer", None, False), ("train_station", None, False), ("mask_off", None, False),
        ("masked", None, False), ("test1", None, False), ("Übertest", None, False), ("ü mask", None, False),
        ("2017", None, False), ("images", None, False), ("train_test", None, False),
    ],
)  # fmt: skip
def test_names(name: str, split: str | None, masks: bool) -> None:
    assert listing.split_of(name) == split and listing.is_masks(name) == masks


def test_images_to_score_are_those_of_folders_without_masks_and_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = "2, dent/1, dent/more -> ../../else, ground_truth/dent/1, train/1, .x/1, a.txt, __MACOSX/1"
    root = write(tmp_path / "data", f"{tree}, runs/a/dxmi.json, runs/a/pictures/3, own/1")
    write(tmp_path / "else", "3")
    found = inspection.find_pictures([str(root)], root / "own")
    names = [os.path.relpath(path, root) for path in found]
    assert names == ["0.png", "1.png", "dent/0.png", *(f"dent/more/{i}.png" for i in range(3)), "train/0.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("runs (results of dxmi); ground_truth (masks, by its name)") and "a.txt (not" in line
    with pytest.raises(ImageDataError, match="holds results of dxmi"):
        inspection.find_pictures([str(root / "runs/a")], root / "own")


def test_files_are_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.zeros((6, 4, 5, 3), np.uint8)
    np.savez(tmp_path / "a.npz", train_x=pixels, train_y=[0, 2, 2, 0, 2, 2], test_x=pixels[:2], test_y=[0, 1])
    about = told(tmp_path / "a.npz", capsys)
    assert about["recipe"] == "images" and about["layout"] == "npz"
    assert about["splits"] == {"train": {"0": 2, "2": 4}, "test": {"0": 1, "1": 1}}
    assert about["sizes"] == {"5x4": 8} and about["modes"] == {"RGB": 8}

    masks = np.ones((6, 4, 5), bool)
    np.savez(tmp_path / "b.npz", x=pixels[..., 0], y=[0, 0, 0, 0, 1, 1], mask=masks)
    about = told(tmp_path / "b.npz", capsys, "train_share=.5")
    assert about["recipe"] == "anomaly" and about["masks"] == 2
    assert about["splits"] == {"train": {"good": 2}, "test": {"good": 2, "defect 1": 2}}

    np.savez(tmp_path / "c.npz", X=np.random.default_rng(0).normal(size=(12, 3)), y=[0] * 10 + [1] * 2)
    about = told(tmp_path / "c.npz", capsys)
    assert about["recipe"] == "anomaly-vectors" and about["layout"] == "vectors"
    assert about["splits"] == {"train": {"good": 7}, "test": {"good": 3, "anomalous": 2}}

    (tmp_path / "d.csv").write_text("a,b\n1,2\n3,4\n5,6\n")
    about = told(tmp_path / "d.csv", capsys)
    assert about["recipe"] == "anomaly-vectors" and about["splits"] == {"train": {"good": 3}}
    np.save(tmp_path / "e.npy", np.ones((4, 2)))
    assert told(tmp_path / "e.npy", capsys)["recipe"] == "anomaly-vectors"
    np.save(tmp_path / "e.npy", np.ones((4, 8, 8)))
    assert told(tmp_path / "e.npy", capsys)["recipe"] == "images"
    np.savez(tmp_path / "f.npz", X=np.ones((4, 8, 8)))  # keys have any case
    assert told(tmp_path / "f.npz", capsys)["recipe"] == "images"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["a.npz"], "a.npz: cannot be read as npz"),
        (["vectors.npz"], "arrays must be X, or X_train"),
        ([".", "recipe=gmm25"], "recipe must be one of 2D points, images or anomaly detection, got 'gmm25'"),
        (
            ["checkerboard", "recipe=8gaussians"],
            "data must be a file of points, got the density checkerboard",
        ),
        ([".", "recipe=image"], "recipe must be one of 2spirals, "),
        ([".", "recipe=anomaly", "classes=bolt"], "got bolt; it has"),
        ([".", "recipes=anomaly"], "recipes: unknown key; did you mean recipe?"),
    ],
)
def test_unreadable_data_is_an_error_in_one_line(
    settings: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(write(tmp_path, "good/10, dent/2, a.npz"))
    np.savez("vectors.npz", Y=np.zeros(3))
    assert cli.main(["data", *settings, *["recipe=anomaly-vectors"] * ("vectors" in settings[0])]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_text_and_the_two_lines_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data", "good/10, dent/2, masks/dent/2, p.png, q.png, runs/a/dxmi.json")
    (root / "dent/1.png").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert cli.main(["data", str(root)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == f"{root}: good and defects, as recipe=anomaly reads it"
    assert text[1:5] == ["          train  test", "    good      7     3", "    dent      0     1",
                         "    all       7     4"]  # fmt: skip
    assert "  masks: 2" in text and "  sizes: 4x4: 11" in text and "    p.png: beside good/" in text
    assert text[text.index("  cannot be read:") + 1].startswith("    dent/1.png: is a git-lfs")
    assert "  Training stops at files that cannot be read, which are not counted here." in text
    assert "  Only headers were read; training decodes whole files and names all damaged ones." in text
    assert overview.of_anomalies(root).lines().splitlines() == [
        f"{root} (good and defects): train good: 7; test 5 (good: 3, dent: 2); 2 masks",
        "skipped: runs (results of dxmi); p.png and 1 more (beside good/)",
    ]


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "val"), ("train", "test")])
def test_every_split_of_an_npz_is_listed(splits: tuple[str, ...], tmp_path: Path) -> None:
    """Including a test split beside val, which replaces it if it is missing."""
    file = tmp_path / "images.npz"
    counts = {name: 2 + i for i, name in enumerate(splits)}
    np.savez(file, **{f"{name}_x": np.zeros((n, 4, 4), np.uint8) for name, n in counts.items()})
    found = images_overview.of_images(file).splits
    assert found == {name: {"images": n} for name, n in counts.items()}


def test_a_missing_split_and_a_missing_file_are_different(tmp_path: Path) -> None:
    root = write(tmp_path / "data", "train/a/1, test/a/1")
    with pytest.raises(image_sources.SplitMissing, match="expected split 'val', got the splits test, train"):
        image_sources.find(root, "val")
