"""Anomaly detection on vectors: files, splits, preparation, and a run that beats chance."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dxmi_ext import cli
from dxmi_ext.anomaly import metrics
from dxmi_ext.anomaly import recipe as anomaly
from dxmi_ext.anomaly.data import vectors
from dxmi_ext.anomaly.data.vectors import Columns, VectorDataError
from dxmi_ext.anomaly.features.collection import Vectors
from dxmi_ext.anomaly.features.preparation import Whitened, prepared
from dxmi_ext.engine.output import plots

N, D = 200, 4


def rows(n: int = N) -> np.ndarray:
    """Good rows near a plane, in columns of different units."""
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(n, 2)) @ rng.normal(size=(2, D)) + 0.1 * rng.normal(size=(n, D))
    return plane * 10.0 ** np.arange(D) + 1000


def off_plane(n: int) -> np.ndarray:
    """Anomalous rows with the same means and standard deviations."""
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


def test_all_rows_of_other_data_are_tested(tmp_path: Path) -> None:
    _, test, anomalous = vectors.load(write(tmp_path / "a.npz"), train_share=0)
    assert len(test) == N + 40 and anomalous.sum() == 40
    alone = write(tmp_path / "alone.npz", X=None, y=None, X_test=off_plane(3), y_test=[0.0, 1.0, 0.0])
    train, test, anomalous = vectors.load(alone, train_share=0)
    assert len(train) == 0 and len(test) == 3 and anomalous.sum() == 1
    with pytest.raises(VectorDataError, match="arrays must be X, or X_train"):
        vectors.load(alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, r"arrays must be X, or X_train, X_test and y_test, got y; `dxmi"),
        ({"X": np.zeros(5)}, r"X must be numbers \[n, d\] .*got float64 \[5\]"),
        ({"X": np.full((3, 2), "a")}, r"X must be numbers .*got <U1 \[3, 2\]"),
        (
            {"X": np.array([[1.0, 2], [3, np.nan]])},
            "X must be finite, got 1 numbers that are not, the first in row 1, col",
        ),
        ({"X": rows(1), "y": None}, "X must have >= 2 good rows, got 1"),
        ({"y": np.zeros(3)}, r"y must be 240 numbers, 0 for good, got float64 \[3\]"),
        ({"y": np.ones(N + 40)}, r"y must have >= 2 good rows \(0\) for a split, got 0"),
        (
            {"X": None, "X_train": rows(3), "X_test": np.zeros((2, 3)), "y_test": [0, 1]},
            "X_test must have 4 columns, as the training rows, got 3",
        ),
        (
            {"X": np.array([[1.0, 2], [3, -1e200]])},
            r"X must have numbers of magnitude <= 1e\+100, got -1e\+200 i",
        ),
        ({"X": np.array([[{}]])}, "cannot be read as .npz, .npy or .csv .* allow_pickle=False"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(VectorDataError, match=message):
        vectors.load(write(tmp_path / "a.npz", **changes))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.npz").read_bytes()
    for name, content in (("text", b"1, 2"), ("cut", whole[: len(whole) // 2]), ("empty", b"")):
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.save(tmp_path / "objects.npy", np.array([{}]))
    for name, why in (
        ("text.npz", "it is not a numpy file"),
        ("cut.npz", "File is not a zip file"),
        ("empty.npz", "it is empty"),
        ("objects.npy", "Object arrays cannot be loaded"),
        ("missing.npz", "No such file"),
        ("missing.csv", "No such file"),
    ):
        with pytest.raises(VectorDataError, match=rf"{name}: cannot be read as .npz, .npy or .csv \({why}"):
            vectors.load(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n\n3,\n", r"line 4, column 2 \(b\) is empty; missing values are not supported"),
        ("1,2\n3,?\n", r"line 2, column 2 must be a number, got '\?'"),
        ("1,2\n3\n", "line 2 must have 2 columns, as the first line, got 1"),
        ("a;b\n1;2\n", "line 2 must be separated by commas, got semicolons"),
        ("1,5;2,5\n", "line 1 must be separated by commas, got semicolons"),
        ("1\t2\n3\t4\n", "line 2 must be separated by commas, got tabs"),
        ("a b\n1 2\n", "line 2 must be separated by commas, got spaces"),
        ("a,b,Label\n1,2,0\n", "columns must be features, got one named 'Label'; .* beside X\\)"),
        ("", "has no rows"),
        ("a,b\n", "has no rows"),
        ("a,b,y\n1,2,0\n", "columns must be features, got one named 'y'; .* beside X\\)"),
        ("id,a,b\n0,1,2\n", "columns must be features, got one named 'id'; .* beside X\\)"),
        (",a,b\n0,1,2\n", "columns must be features, got one named ''; .* beside X\\)"),
    ],
)
def test_bad_tables_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(VectorDataError, match=f"^[^ ]*a.csv: {message}$"):
        vectors.load(tmp_path / "a.csv")


@pytest.mark.parametrize("first", ["", "a,b,c,d\n", '"a","b",,"d"\n', "0,1,2,3\n", "\ufeffa,b,c,d\n"])
def test_one_table_in_every_kind_of_file(tmp_path: Path, first: str) -> None:
    text = "\n".join(",".join(map(repr, row)) for row in rows(9).tolist())
    (tmp_path / "a.csv").write_text(first + text)
    np.save(tmp_path / "a.npy", rows(9))
    np.savez(tmp_path / "a.npz", anything=rows(9))
    np.savez(tmp_path / "b.npz", X_test=rows(9), y_test=np.zeros(9))
    for name in ("a.csv", "a.npy", "a.npz", "b.npz"):
        assert np.array_equal(vectors.rows_to_score(tmp_path / name, D), rows(9))
    for name in ("a.csv", "a.npy"):
        assert np.array_equal(
            vectors.load(tmp_path / name).train, np.random.default_rng(0).permutation(rows(9))
        )
    with pytest.raises(VectorDataError, match="must have the array X or X_test, or only one array, got a, b"):
        np.savez(tmp_path / "c.npz", a=rows(9), b=rows(9))
        vectors.rows_to_score(tmp_path / "c.npz", D)


def test_whitened_vectors_on_the_sphere_can_be_recovered() -> None:
    """Even with offsets that float32 does not resolve; a vector of length sqrt(D) lies at 45 degrees."""
    x = rows() + 1e9
    preparation = Whitened((1, 1, D))
    preparation.shrinkage = 1e-9
    preparation.fit(x[:, None, None])
    points = prepared(x[:, None, None], preparation).rows
    assert points.shape == (N, D + 1) and points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    back = points[:, :D].astype(np.float64) / points[:, D:] * math.sqrt(D)
    np.testing.assert_allclose(back.T @ back / N, np.eye(D), atol=1e-3)
    length = np.linalg.norm(back, axis=1)
    centered = x - x.mean(0)
    precision = np.linalg.inv(centered.T @ centered / N)
    mahalanobis = np.sqrt(np.einsum("nc,cd,nd->n", centered, precision, centered))
    np.testing.assert_allclose(length, mahalanobis, rtol=1e-3)
    np.testing.assert_allclose(np.arctan(length / math.sqrt(D)), np.arccos(points[:, D]), atol=1e-3)


def test_a_row_that_differs_in_a_constant_column_is_found() -> None:
    good = np.insert(rows(), [1, 3], [0.1, 1e9], axis=1)
    columns = Columns.of(good)
    assert columns.constants == {1: 0.1, 4: 1e9} and columns.described() == "columns 1, 4 of 6 (from 0)"
    assert np.array_equal(columns.varying(good), rows()) and not columns.deviates(good).any()
    assert Columns.from_json(json.loads(json.dumps(columns.to_json()))) == columns
    for column, value, expected in (
        (1, float(np.float32(0.1)), False),  # the file was written in float32
        (1, 0.1 + 1e-8, True),
        (1, -0.1, True),
        (4, 1e9 + 1, True),
        (4, 0, True),
        (0, 5e9, False),  # a large difference, but in a column that varies
    ):
        other = good.copy()
        other[7, column] = value
        assert columns.deviates(other).tolist() == [expected and i == 7 for i in range(N)]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((9, 3)), "some column must vary, got 3 constant in the 9 good rows to train on"),
        (
            np.arange(18.0).reshape(9, 2) * [1, 1e-150],
            "must vary by >= 1e-100, got 1.6e-149 in column 1",
        ),
        (np.diag([1.0, 2, 3]), "good rows must be more numerous or similar to hold some out, got 3"),
    ],
)
def test_tables_without_information(tmp_path: Path, x: np.ndarray, message: str) -> None:
    with pytest.raises(VectorDataError, match=message):
        Vectors(write(tmp_path / "a.npz", X=x, y=None)).good(0.1)


def test_columns_that_vary_only_in_held_out_rows_are_used(tmp_path: Path) -> None:
    """Otherwise the column would be constant in the training rows, and the held-out good row anomalous."""
    x = np.insert(rows(), 0, 0.0, axis=1)
    first = rows()[np.random.default_rng(0).permutation(N)[0]]  # the first one drawn to be held out
    x[(x[:, 1:] == first).all(1), 0] = 1
    good = Vectors(write(tmp_path / "a.npz", X=x, y=None)).good(0.1)
    assert good.columns is not None and not good.columns.constants
    assert len(good.held_out) == 19 and not good.held_out[..., 0].any() and good.train[..., 0].sum() == 1


@pytest.mark.parametrize(
    "x",
    [
        np.random.default_rng(0).normal(size=(12, 40)),
        np.repeat(rows(4), 6, axis=0),
        np.random.default_rng(0).integers(0, 2**62, (30, 3)),
        rows() * 10.0 ** np.array([-90, 0, 40, 90]),
        rows(30)[:, :1],
    ],
    ids=["fewer rows than columns", "duplicates", "integers", "scales", "one column"],
)
def test_odd_tables_have_points_on_the_sphere(tmp_path: Path, x: np.ndarray) -> None:
    """A row whose squares overflow float32 is at the largest distance from the pole."""
    good = Vectors(write(tmp_path / "a.npz", X=x, y=None)).good(0.1)
    preparation = Whitened(good.train.shape[1:])
    preparation.fit(good.train)
    points = prepared(good.train, preparation).rows
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-5)
    assert np.ptp(points, axis=0).max() > 1e-3
    far = good.train[:1].astype(np.float64) * 1e9 * np.sqrt(np.finfo(np.float32).max)
    far = prepared(far, preparation).rows
    assert np.linalg.norm(far) == pytest.approx(1, rel=1e-5) and abs(far[0, -1]) < 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with a constant column, 2; one anomalous row differs from good rows in this column only."""
    x = np.insert(np.concatenate([rows(), off_plane(39), rows(1)]), 2, 0.5, axis=1)
    x[-1, 2] = 0.25
    return write(tmp_path_factory.mktemp("data") / "a.npz", X=x)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests must not modify, except for the default outputs of commands."""
    for library in ("yaml", "matplotlib"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = ["batch_size=64", "pretrain_iterations=150", "iterations=20", "latent_dim=3", "device=cpu"]
    settings += ["energy_width=32", "value_width=16", "sampler_width=16", "tensorboard=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "curves", lambda *_: None)  # which takes seconds
        given = [f"data={data}", f"output={folder}", *settings]
        assert cli.main(["train", "anomaly-vectors", *given]) == 0
    return folder


def test_a_run_beats_chance(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = json.loads((run / "summary.json").read_text())
    assert numbers["image_auroc"] > 0.9 and numbers["autoencoder_image_auroc"] > 0.9
    assert "pixel_auroc" not in numbers
    again, table = anomaly.evaluate(run, anomaly.EvaluateSettings(), torch.device("cpu"))
    assert again["image_auroc"] == numbers["image_auroc"] and "nearest neighbors" in table
    assert "\nGaussian  " in table and "positions" not in table  # rows have no positions
    assert cli.main(["sample", str(run), "n=5", f"output={tmp_path}/s.npz"]) == 0
    assert np.load(tmp_path / "s.npz")["samples"].shape == (5, D + 1)
    x = np.insert(rows(), 2, 0.5, axis=1)
    alone = anomaly.EvaluateSettings(data=str(write(tmp_path / "alone.npz", X=x, y=None)))
    found = anomaly.evaluate(run, alone, torch.device("cpu"))[0]
    sure = {"held_out", "false_alarms_low", "false_alarms_high"}
    assert found.keys() == {"threshold", "pixel_threshold"} | sure
    assert "there are no test data: no metrics are computed" in capsys.readouterr().out


def test_a_run_on_few_rows_without_test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    given = [f"data={write(tmp_path / 'few.npz', X=rows(8), y=None)}", f"output={tmp_path / 'run'}"]
    assert cli.main(["train", "anomaly-vectors", *given, "detector=gaussian", "device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert "8 good rows are few" in err and "requires at least 99 held-out scores, got 1" in err
    assert "\nanomaly-vectors, vectors\n2.5 % to " in out and "T = " not in out
    assert f"{tmp_path / 'run'}: summary.json, model/; " in out


def test_a_file_of_vectors_becomes_a_table(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", str(run), str(data), "device=cpu"]) == 0
    numbers, stored = json.loads((run / "summary.json").read_text()), vectors.load(data)
    assert "of 240 rows are anomalous (score above" in capsys.readouterr().out
    assert {path.name for path in (run / "scores").iterdir()} == {"dxmi.json", "scores.csv"}
    with (run / "scores/scores.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["row"]) for row in table] == list(range(240))
    scores = np.array([float(row["score"]) for row in table])
    assert {row["threshold"] for row in table} == {str(numbers["threshold"])}
    assert [row["anomalous"] == "1" for row in table] == (scores > numbers["threshold"]).tolist()
    assert np.flatnonzero(np.isinf(scores)).tolist() == [239]
    x = np.load(data)["X"]
    of = [int(np.flatnonzero((x == row).all(1))[0]) for row in stored.test]
    assert metrics.auroc(scores[of], stored.anomalous) == numbers["image_auroc"]
    np.savetxt(tmp_path / "a.csv", x, delimiter=",", fmt="%.17g")
    given = [str(tmp_path / "a.csv"), "threshold=1e30", f"output={tmp_path / 'out'}"]
    assert cli.main(["score", str(run), *given]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: 1 of 240 rows are anomalous (score above 1e+30). 1 row differs in column 2 "
        "of 5 (from 0), constant in training.\n"
    )


@pytest.mark.parametrize("onnx", [False, True])
def test_an_exported_run_scores_rows(
    run: Path, data: Path, tmp_path: Path, onnx: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("onnxscript", "onnxruntime") if onnx else ():
        pytest.importorskip(library)
    folder = tmp_path / "detector"
    assert cli.main(["export", str(run), f"onnx={str(onnx).lower()}", f"output={folder}"]) == 0
    usage = capsys.readouterr().out.splitlines()[-2 - 3 * onnx :]
    assert usage[0] == "import torch  # rows: float64 [n, 5]"
    expected = anomaly.load_scorer(run, torch.device("cpu")).scores(np.load(data)["X"])
    for rows in (
        slice(-2, None),
        slice(-1, None),
    ):  # the last has another value
        names = {"rows": torch.from_numpy(np.load(data)["X"][rows])}
        exec("\n".join(usage), names)
        scores = torch.as_tensor(names["scores"])
        torch.testing.assert_close(scores, expected[rows], rtol=1e-5, atol=1e-5)
        assert math.isinf(scores[-1])
    about = json.loads((folder / "detector.json").read_text())
    assert about["constant_columns"] == {"2": 0.5} and about["outputs"] == {"scores": ["n"]}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a.npy"], "a.npy: X must have 5 columns, as the training rows, got 4"),
        (
            ["hole.csv"],
            "hole.csv: line 2, column 4 must be finite, got 'nan'",
        ),
        (["a.npy", "hole.csv"], "FILE must be one file of vectors (.npz, .npy or .csv), got 2"),
        ([], "FILE must be one file of vectors (.npz, .npy or .csv), got 0"),
        (["a.npy", "worst=3"], "worst is for images, got 3 with a run of vectors"),
        (["."], ".: cannot be read as .npz, .npy or .csv (Is a directory)"),
    ],
)
def test_mistakes_of_scoring_are_one_line(
    run: Path,
    tmp_path: Path,
    given: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", rows(3))
    Path("hole.csv").write_text("1,2,.5,4,5\n1,2,.5,nan,5\n")
    assert cli.main(["score", str(run), *given, "output=out"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dxmi score: {says}") and err.count("\n") == 1 and not Path("out").exists()
