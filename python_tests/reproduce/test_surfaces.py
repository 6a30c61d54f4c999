"""The experiment of three classes of surfaces: its images and their splits."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from dxmi_ext.anomaly.data import layouts
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.reproduce import surfaces

N = 20


@pytest.fixture
def tiles(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [10, 4])
    masks = np.zeros((14, 16, 16), bool)
    masks[10:, 4:8] = True
    images = rng.integers(0, 256, (14, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "tiles.npz", x=images, label=labels, mask=masks)
    return str(tmp_path / "tiles.npz")


def test_three_classes_have_good_images_to_train_on_and_masks_where_there_are_any(
    tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = np.random.default_rng(1).integers(0, 256, (N, 24, 24), dtype=np.uint8)
    probabilities = np.tile([0.0, 1 / 3, 2 / 3, 1.0], N // 4)
    kinds = np.repeat(["mono", "poly"], [12, N - 12])
    package = SimpleNamespace(load_dataset=lambda: (cells, probabilities, kinds))
    monkeypatch.setitem(sys.modules, "elpv_dataset", ModuleType("elpv_dataset"))
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", package)
    surfaces.prepare(tiles, tmp_path / "data")

    train, test = (layouts.find(tmp_path / "data" / "classes", s, None, 0.7) for s in ("train", "test"))
    assert sorted(train.class_names) == sorted(surfaces.CLASSES)
    counts = {
        name: [sum(item.object_class == i for item in split.items) for split in (train, test)]
        for i, name in enumerate(train.class_names)
    }
    # 70 % of 10, 6 and 4 good images are for training; the rest and all defective ones are for testing.
    assert counts == {"tiles": [7, 7], "monocrystalline": [4, 8], "polycrystalline": [3, 5]}
    marked = {
        test.class_names[item.object_class]: bool(item.mask().any()) for item in test.items if item.mask
    }
    assert marked == {"tiles": True, "monocrystalline": False, "polycrystalline": False}
    first = next(item for item in train.items if train.class_names[item.object_class] == "monocrystalline")
    np.testing.assert_array_equal(first.image()[:, :, 0], cells[0])


def test_what_is_missing_is_named(tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="data must be the magnetic tiles, as an npz or a folder, got null"):
        surfaces.prepare(None, tmp_path / "data")
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    with pytest.raises(ConfigError, match="pip install elpv-dataset"):
        surfaces.prepare(tiles, tmp_path / "data")
    assert not (tmp_path / "data").exists()
