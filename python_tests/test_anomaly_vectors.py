"""Anomalies among vectors: files, splits, the way to the sphere, and a run that beats chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dxmi_ext import cli, plots
from dxmi_ext.anomaly.collection import Vectors
from dxmi_ext.anomaly.preparation import Whitened, prepared
from dxmi_ext.data import vectors
from dxmi_ext.data.vectors import VectorDataError
from dxmi_ext.recipes import anomaly

N, D = 200, 4


def rows(n: int = N) -> np.ndarray:
    """Near a plane, in columns of unlike units."""
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(n, 2)) @ rng.normal(size=(2, D)) + 0.1 * rng.normal(size=(n, D))
    return plane * 10.0 ** np.arange(D) + 1000


def off_plane(n: int) -> np.ndarray:
    """With the same means and deviations."""
    good = rows()
    return good.mean(0) + good.std(0) * np.random.default_rng(1).normal(size=(n, D))


def write(path: Path, **changes: object) -> Path:
    y = np.repeat([0, 2], [N, 40])
    content = {"X": np.concatenate([rows(), off_plane(40)]), "y": y} | changes
    np.savez(path, **{k: v for k, v in content.items() if v is not None})  # type: ignore[arg-type]
    return path


def test_good_rows_are_split_at_random_and_only_they_train(tmp_path: Path) -> None:
    train, test, anomalous = vectors.load(write(tmp_path / "a.npz"), seed=1)
    assert train.shape == (140, D) and len(test) == 100 and anomalous.sum() == 40
    assert np.array_equal(test[anomalous], off_plane(40))
    together = np.concatenate([train, test[~anomalous]])
    assert np.array_equal(together[np.lexsort(together.T)], rows()[np.lexsort(rows().T)])
    assert not np.array_equal(train, vectors.load(tmp_path / "a.npz", seed=2).train)
    good = Vectors(tmp_path / "a.npz", seed=1).good(0.1)
    assert good.train.shape == (126, 1, 1, D) and np.array_equal(good.held_out[:, 0, 0], train[:14])


def test_a_file_may_have_its_own_split_or_no_truth(tmp_path: Path) -> None:
    own = {"X": None, "y": None, "X_train": rows(8), "X_test": off_plane(3), "y_test": [0.0, 1.0, 0.0]}
    train, test, anomalous = vectors.load(write(tmp_path / "own.npz", **own, y_train=[0, 1] * 4))
    assert sorted(map(tuple, train)) == sorted(map(tuple, rows(8)[::2]))
    assert len(test) == 3 and anomalous.tolist() == [False, True, False]
    train, test, anomalous = vectors.load(write(tmp_path / "alone.npz", y=None))
    assert len(train) == N + 40 and len(test) == len(anomalous) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, r"has the arrays y, wants X, or X_train, X_test and y_test; `dxmi"),
        ({"X": np.zeros(5)}, r"X: got float64 \[5\], wants numbers \[n, d\]"),
        ({"X": np.full((3, 2), "a")}, r"X: got <U1 \[3, 2\], wants numbers"),
        (
            {"X": np.array([[1.0, 2], [3, np.nan]])},
            "X: 1 of its numbers are not finite, the first in row 1, col",
        ),
        ({"y": np.zeros(3)}, r"y: got float64 \[3\], wants 240 numbers"),
        ({"y": np.ones(N + 40)}, r"y: got 0 good rows \(0\), a split wants two"),
        (
            {"X": None, "X_train": rows(3), "X_test": np.zeros((2, 3)), "y_test": [0, 1]},
            "X_test: got 3 columns",
        ),
        ({"X": np.array([[{}]])}, "cannot be read as npz without pickles"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(VectorDataError, match=message):
        vectors.load(write(tmp_path / "a.npz", **changes))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", rows())
    for name, content in (("text", b"1, 2"), ("cut", whole[: len(whole) // 2]), ("empty", b"")):
        (tmp_path / f"{name}.npz").write_bytes(content)
    for name in ("text.npz", "cut.npz", "empty.npz", "array.npy", "missing.npz"):
        with pytest.raises(VectorDataError, match=f"{name}: cannot be read as npz without pickles"):
            vectors.load(tmp_path / name)


def test_vectors_come_to_the_sphere_and_could_come_back() -> None:
    """Whatever float32 would make of an offset as theirs; a vector of length sqrt(D) lies at 45 degrees."""
    x = rows() + 1e9
    preparation = Whitened((1, 1, D), shrinkage=1e-9)
    preparation.fit(x[:, None, None])
    points = prepared(x[:, None, None], preparation).rows
    assert points.shape == (N, D + 1) and points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    back = points[:, :D].astype(np.float64) / points[:, D:] * math.sqrt(D)
    np.testing.assert_allclose(back.T @ back / N, np.eye(D), atol=1e-3)
    length = np.linalg.norm(back, axis=1)
    centred = x - x.mean(0)
    mahalanobis = np.sqrt(np.einsum("nc,cd,nd->n", centred, np.linalg.inv(centred.T @ centred / N), centred))
    np.testing.assert_allclose(length, mahalanobis, rtol=1e-3)
    np.testing.assert_allclose(np.arctan(length / math.sqrt(D)), np.arccos(points[:, D]), atol=1e-3)


def test_constant_columns_are_named(tmp_path: Path) -> None:
    x = rows()
    x[:, [1, 3]] = 0.1, 1e9
    with pytest.raises(VectorDataError, match="X: constant in the 180 good rows that train: column 1, 3; l"):
        Vectors(write(tmp_path / "a.npz", X=x, y=None)).good(0.1)


def test_a_run_beats_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("omegaconf", "matplotlib"):
        pytest.importorskip(library)
    monkeypatch.setattr(plots, "curves", lambda *_: None)  # which takes seconds
    data, folder = write(tmp_path / "a.npz"), tmp_path / "run"
    settings = [
        "batch_size=64",
        "pretrain_iterations=150",
        "iterations=20",
        "latent_dim=3",
        "energy_width=32",
    ]
    settings += ["value_width=16", "sampler_width=16", "device=cpu", "tensorboard=false"]
    assert cli.main(["train", "anomaly-vectors", f"data={data}", f"output={folder}", *settings]) == 0
    numbers = json.loads((folder / "summary.json").read_text())
    assert numbers["image_auroc"] > 0.9 and numbers["autoencoder_image_auroc"] > 0.9
    assert "pixel_auroc" not in numbers and "nearest neighbours" in capsys.readouterr().out
    assert cli.main(["sample", str(folder), "n=5", f"output={tmp_path}/s.npz"]) == 0
    assert np.load(tmp_path / "s.npz")["samples"].shape == (5, D + 1)
    alone = anomaly.EvaluateSettings(data=str(write(tmp_path / "alone.npz", y=None)))
    assert anomaly.evaluate(folder, alone, torch.device("cpu"))[0].keys() == {
        "threshold", "pixel_threshold"
    }  # fmt: skip
    assert "nothing is tested: no scores" in capsys.readouterr().out
