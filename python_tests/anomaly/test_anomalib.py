"""The adapter to anomalib, with anomalib itself: its Engine and data modules against the command `dxmi`.

`anomaly.recipe.fit`, which trains the adapter's detector, is tested without anomalib in test_recipe.py.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dxmi_ext import cli
from dxmi_ext.anomaly.features import backbones
from dxmi_ext.engine.output import plots
from dxmi_ext.engine.settings import ConfigError

pytest.importorskip("anomalib", reason="no anomalib", exc_type=ImportError)
Image = pytest.importorskip("PIL.Image")

SIZE = 16
SETTINGS: dict[str, Any] = {"size": SIZE, "grid": 4, "batch_size": 32, "pretrain_iterations": 60}
SETTINGS |= {"iterations": 3, "latent_dim": 4, "energy_width": 16, "value_width": 8, "sampler_width": 8}
SETTINGS |= {"pretrain_lr": 1e-2, "patch": 3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def colors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone's features are the colors."""

    def load(spec: str, *, weights: str | None, **options: Any) -> Any:
        network = nn.Conv2d(3, 3, 1)
        network.load_state_dict({"weight": torch.eye(3).view(3, 3, 1, 1), "bias": torch.zeros(3)})
        return backbones.backbone(network, "colors", mean=(0.0,) * 3, std=(1.0,) * 3, **options)

    monkeypatch.setattr(backbones, "load", load)
    monkeypatch.setattr(plots, "curves", lambda *_: None)  # which takes seconds


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images in MVTec-AD's layout, larger than `size`: bluish noise is good, a reddish corner is a defect."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for folder, n in (("train/good", 12), ("test/good", 4), ("test/red", 4)):
        for i in range(n):
            pixels = rng.integers(0, 60, (40, 50, 3)) + np.array([0, 0, 190])
            if "red" in folder:
                pixels[:20, :25] = pixels[:20, :25, ::-1]
                mask = np.zeros((40, 50))
                mask[:20, :25] = 255
                save(root / f"ground_truth/red/{i}_mask.png", mask)
            save(root / folder / f"{i}.png", pixels)
    return root


def datamodule(data: Path) -> Any:
    from anomalib.data import Folder

    names = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/red"}
    options = {"train_batch_size": 5, "eval_batch_size": 3, "num_workers": 0, "seed": 0}
    options |= {"val_split_mode": "same_as_test"}
    return Folder(name="corner", root=data, mask_dir="ground_truth/red", **names, **options)


def engine(folder: Path) -> Any:
    from anomalib.engine import Engine

    return Engine(default_root_dir=folder / "results", accelerator="cpu", logger=False)


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    """A tiny run of the recipe on these data; settings that need not be small are the recipe's."""
    folder = tmp_path / "run"
    given = [f"{k}={v}" for k, v in SETTINGS.items()]
    given += [
        "device=cpu",
        "detector=dxmi",
        "baselines=none",
        "tensorboard=false",
        f"cache={tmp_path / 'cache'}",
    ]
    assert cli.main(["train", "anomaly", f"data={data}", f"output={folder}", *given]) == 0
    return folder


def scores_of(run: Path, *images: Path) -> dict[str, tuple[float, bool]]:
    """Scores of the command ``dxmi score``: file -> score, and whether it is above the threshold."""
    assert cli.main(["score", str(run), *map(str, images), "device=cpu", "heatmaps=false", "worst=0"]) == 0
    with (run / "scores/scores.csv").open() as file:
        return {r["path"]: (float(r["score"]), r["anomalous"] == "1") for r in csv.DictReader(file)}


def predictions(batches: Any) -> dict[str, tuple[float, bool]]:
    found = {}
    for batch in batches:
        for path, score, label in zip(batch.image_path, batch.pred_score, batch.pred_label, strict=True):
            found[str(path)] = float(score), bool(label)
    return found


def assert_same(found: dict[str, tuple[float, bool]], expected: dict[str, tuple[float, bool]]) -> None:
    assert found.keys() == expected.keys() and len({label for _, label in expected.values()}) == 2
    for path, (score, label) in expected.items():
        assert found[path] == (pytest.approx(score, rel=1e-5), label)


def test_a_run_scores_in_anomalib_as_by_the_command(run: Path, data: Path, tmp_path: Path) -> None:
    """With a folder of images of any size, and with a data module, which resizes them itself."""
    from dxmi_ext.anomaly.anomalib import DxMI

    model = DxMI.from_run(run)
    expected = scores_of(run, data / "test")
    assert_same(predictions(engine(tmp_path).predict(model=model, data_path=data / "test")), expected)
    assert_same(predictions(engine(tmp_path).predict(model=model, datamodule=datamodule(data))), expected)
    thresholds = json.loads((run / "summary.json").read_text())
    assert float(model.post_processor.image_threshold) == pytest.approx(thresholds["threshold"])
    assert float(model.post_processor.pixel_threshold) == pytest.approx(thresholds["pixel_threshold"])
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(expected)]
    whole = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    called = model.eval()(whole)  # without the Engine
    torch.testing.assert_close(called.pred_score.tolist(), [expected[path][0] for path in sorted(expected)])
    assert called.anomaly_map.shape == called.pred_mask.shape == (8, 1, 40, 50)
    small = torch.rand(2, 3, SIZE, SIZE)
    exported = torch.export.export(model, (small,), strict=False).module()
    torch.testing.assert_close(exported(small).pred_score, model(small).pred_score)


def test_the_engine_learns_what_the_recipe_does(run: Path, data: Path, tmp_path: Path) -> None:
    """Whatever the order of the loader. A checkpoint restores the whole detector with its thresholds."""
    from dxmi_ext.anomaly.anomalib import DxMI

    torch.manual_seed(0)
    model, trains = DxMI(SETTINGS), engine(tmp_path)
    assert model.input_size == (SIZE, SIZE)
    assert (model.cfg.tau, model.cfg.top_share) == (0.01, 0.03)  # defaults of the recipe, not of the class
    trains.train(model=model, datamodule=datamodule(data))
    (found,) = trains.test(model=model, datamodule=datamodule(data))
    assert found["image_AUROC"] == 1.0 and found["pixel_AUROC"] > 0.95
    expected = scores_of(run, data / "test")
    assert_same(predictions(engine(tmp_path).predict(model=model, data_path=data / "test")), expected)
    path = trains.trainer.checkpoint_callback.best_model_path
    restored = DxMI.load_from_checkpoint(path)
    assert_same(predictions(engine(tmp_path).predict(model=restored, data_path=data / "test")), expected)


def test_inputs_that_do_not_fit_are_rejected() -> None:
    from dxmi_ext.anomaly.anomalib import DxMI
    from dxmi_ext.anomaly.scores.scoring import ScoreError

    for settings, message in (
        ({"iteration": 3}, "iteration: unknown key; did you mean iterations"),
        ({"top_share": 2.0}, "top_share: got 2"),
        ({"data": "x"}, "settings must not contain data, which anomalib decides here"),
        ({"detector": "knn"}, "settings must not contain detector, which anomalib decides here"),
    ):
        with pytest.raises(ConfigError, match=message):
            DxMI(settings)
    with pytest.raises(ConfigError, match="backbone must be a network, got null, which is for vectors"):
        DxMI(recipe="anomaly-vectors")
    normalized = torch.full((1, 3, SIZE, SIZE), -2.1)
    with pytest.raises(ScoreError, match=r"images must have values in \[0, 1\], got -2.1 to -2.1; the pre_p"):
        DxMI(SETTINGS).model(normalized)


def test_pictures_of_samples_can_be_read_as_data(data: Path) -> None:
    from dxmi_ext.anomaly.anomalib import data_of
    from dxmi_ext.anomaly.data.layouts import ImageDataError

    train, test = (data_of(datamodule(data), split=split, size=None) for split in ("train", "test"))
    assert train.images.shape == (12, 3, 40, 50) and not train.anomalous.any() and train.masks is None
    assert test.label_names == ["good", "abnormal"] and test.anomalous.any() and test.masks is not None
    assert test.masks[test.anomalous][:, :20, :25].all() and test.masks.sum() == 500 * test.anomalous.sum()
    assert (test.images[test.anomalous][:, 0, :20, :25] >= 190).all()
    with pytest.raises(ImageDataError, match="split must be train or test, got 'val'"):
        data_of(datamodule(data), split="val")
