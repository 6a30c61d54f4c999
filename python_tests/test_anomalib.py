"""The adapter to anomalib, with anomalib itself: its Engine, a datamodule of its own, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dxmi_ext.anomaly import backbones

pytest.importorskip("anomalib", reason="no anomalib", exc_type=ImportError)
Image = pytest.importorskip("PIL.Image")

SIZE = 16
SETTINGS = {"size": SIZE, "grid": 4, "batch_size": 32, "pretrain_iterations": 60, "iterations": 3}
SETTINGS |= {"latent_dim": 4, "energy_width": 16, "value_width": 8, "sampler_width": 8, "pretrain_lr": 1e-2}


@pytest.fixture
def datamodule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Bluish noise is good, a reddish corner a defect; the backbone's features are the colours."""
    from anomalib.data import Folder

    rng = np.random.default_rng(0)
    for folder, n in (("good", 12), ("red", 4), ("mask", 4)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            pixels = rng.integers(0, 60, (SIZE, SIZE, 3), np.uint8) + np.array([0, 0, 190], np.uint8)
            corner = pixels[:8, :8]
            if folder != "good":
                corner[:] = corner[..., ::-1]
            pixels = 255 * (pixels[..., 0] > 100) if folder == "mask" else pixels
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / f"{i}.png")

    def load(spec: str, *, size: int, grid: int, weights: str | None) -> Any:
        network = nn.Conv2d(3, 3, 1)
        network.load_state_dict({"weight": torch.eye(3).view(3, 3, 1, 1), "bias": torch.zeros(3)})
        return backbones.backbone(network, "colours", size=size, grid=grid, mean=(0.0,) * 3, std=(1.0,) * 3)

    monkeypatch.setattr(backbones, "load", load)
    options: dict[str, Any] = {"train_batch_size": 5, "eval_batch_size": 5, "num_workers": 0, "seed": 0}
    folders = {"normal_dir": "good", "abnormal_dir": "red", "mask_dir": "mask"}
    return Folder(name="corner", root=tmp_path, **folders, **options)


def test_the_engine_trains_tests_and_restores_it(datamodule: Any, tmp_path: Path) -> None:
    from anomalib.engine import Engine

    from dxmi_ext.anomaly.anomalib import DxMI

    torch.manual_seed(0)
    model = DxMI(SETTINGS)
    assert model.input_size == (SIZE, SIZE)
    started = {name: p.detach().clone() for name, p in model.model.energy.named_parameters()}
    engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu", logger=False)
    engine.train(model=model, datamodule=datamodule)
    (found,) = engine.test(model=model, datamodule=datamodule)
    assert found["image_AUROC"] == 1.0 and found["pixel_AUROC"] > 0.95
    assert any(not torch.equal(p, started[name]) for name, p in model.model.energy.named_parameters())
    restored = DxMI.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    images = torch.rand(2, 3, SIZE, SIZE)
    for mine, other in zip(model.eval()(images), restored.eval()(images), strict=True):
        torch.testing.assert_close(mine, other)


def test_its_pictures_are_data_of_ours(datamodule: Any) -> None:
    from dxmi_ext.anomaly.anomalib import data_of
    from dxmi_ext.data.anomaly_sources import ImageDataError

    train, test = (data_of(datamodule, split=split, size=None) for split in ("train", "test"))
    assert train.images.shape[1:] == (3, SIZE, SIZE) and not train.anomalous.any() and train.masks is None
    assert test.label_names == ["good", "abnormal"] and test.anomalous.any() and test.masks is not None
    assert test.masks[test.anomalous][:, :8, :8].all() and test.masks.sum() == 64 * test.anomalous.sum()
    assert (test.images[test.anomalous][:, 0, :8, :8] >= 190).all()
    with pytest.raises(ImageDataError, match="split: got 'val', wants train or test"):
        data_of(datamodule, split="val")
