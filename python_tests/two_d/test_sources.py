"""Points in a file as the data of a 2D run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dxmi_ext import cli, ops
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.two_d import plots, sources

SHORT = ["iterations=2", "pretrain_iterations=2", "batch_size=16", "samplings=1", "device=cpu"]


def write(path: Path, seed: int = 0) -> Path:
    """Points in two clusters, far from standardized; a table has a header."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(300, 2)) * [0.1, 50] + rng.choice([-1, 1], 300)[:, None] * [0.3, 200] + [7, 1e4]
    if path.suffix == ".npy":
        np.save(path, points)
    else:
        np.savetxt(path, points, delimiter=",", header="x,y", comments="", fmt="%.17g")
    return path


def test_points_are_standardized_and_every_tenth_is_held_out(tmp_path: Path) -> None:
    table, data = (sources.of(str(write(tmp_path / name))) for name in ("a.csv", "a.npy"))
    assert table.fingerprints == data.fingerprints and data.units is not None
    assert data.train is not None and data.held_out is not None and data.train.dtype == torch.float32
    torch.testing.assert_close(data.train.std(0, correction=0), torch.full((2,), 2.0))
    points = torch.from_numpy(np.load(tmp_path / "a.npy"))
    torch.testing.assert_close(data.units.restore(data.held_out), points[::10], rtol=1e-6, atol=1e-6)
    key = ops.noise_key(0)
    whole = data.sample(100, key)
    assert torch.equal(whole[60:], data.sample(40, key, sample_offset=60))
    assert len(data.tested(30, key).unique(dim=0)) == data.sampling["n"] == 30
    low, high = data.sampling["box"]
    assert all((whole >= torch.tensor(low)).flatten()) and all((whole <= torch.tensor(high)).flatten())


def test_points_are_previewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.stack((np.linspace(-1, 3, 200), np.linspace(50, 60, 200)), 1))
    assert cli.main(["data", str(path), "recipe=8gaussians"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == f"{path}: points, as recipe=8gaussians reads it"
    assert text[1:3] == ["            train  held out", "    points    180        20"]
    assert "  ranges: x from -1 to 3, y from 50 to 60" in text


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((300, 3)), r"must hold numbers \[N, 2\], got float64 \[300, 3\]; .*own_data.py"),
        (np.zeros((9, 2)), "must have >= 100 points, got 9"),
        (np.ones((300, 2)), "columns must vary"),
        (
            np.where(np.arange(600).reshape(300, 2) == 11, np.nan, 1),
            "must be finite, got nan in row 5, column 1",
        ),
    ],
)
def test_bad_points(points: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", points)
    with pytest.raises(ConfigError, match=rf"data: .*p\.npy:? {message}"):
        sources.of(str(tmp_path / "p.npy"))
    with pytest.raises(ConfigError, match=r"none\.csv does not exist"):
        sources.of(str(tmp_path / "none.csv"))
    (tmp_path / "q.csv").write_text('"x","y"\n' + "".join(f'"{i}.5","{i % 7}"\n' for i in range(100)))
    assert sources.of(str(tmp_path / "q.csv")).units is not None  # quoted numbers, as written by R
    (tmp_path / "i.csv").write_text(",x\n" + "".join(f"{i},{i % 7}\n" for i in range(100)))  # as pandas
    with pytest.raises(ConfigError, match=r"i\.csv: columns must be features, got one named ''; remove or"):
        sources.of(str(tmp_path / "i.csv"))
    (tmp_path / "t.csv").write_text("x,y\n1,\n")
    with pytest.raises(ConfigError, match=r"t\.csv: line 2, column 2 \(y\) is empty"):
        sources.of(str(tmp_path / "t.csv"))


def test_a_run_on_points_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("p.npy"))
    train = ["train", "8gaussians", "output=run", *SHORT]
    drawn: list[torch.Tensor] = []
    scatter = plots.scatter
    monkeypatch.setattr(
        plots, "scatter", lambda axis, x, *a, **b: (drawn.append(x), scatter(axis, x, *a, **b))
    )
    assert cli.main([*train, "data=p.npy"]) == 0
    assert len(drawn) > 5 and all(9000 < x[:, 1].mean() < 11_000 for x in drawn)  # in the units of the file
    assert "270 points for training, 30 held out; standardized" in capsys.readouterr().out
    assert cli.main(["sample", "run", "n=50"]) == 0
    samples = np.load("run/samples.npz")["samples"]
    assert samples.shape == (50, 2) and 5000 < samples[:, 1].mean() < 15_000
    assert cli.main(["evaluate", "run", "samplings=1", "log_partition=true", "paths=100"]) == 0
    told = capsys.readouterr()
    assert "energy_kl" not in told.out + told.err and "log-likelihood" in told.out
    write(Path("other.npy"), seed=1)
    assert cli.main([*train, "data=other.npy", "iterations=3"]) == 2
    assert "whose train split has another fingerprint" in capsys.readouterr().err
    Path("p.npy").rename("moved.npy")
    assert cli.main(["evaluate", "run"]) == 2
    assert "p.npy does not exist; data=FILE names another place" in capsys.readouterr().err
    assert cli.main(["evaluate", "run", "samplings=1", "data=moved.npy"]) == 0
    for data, message in (
        ("other.npy", "other.npy must hold the points that run was trained on"),
        ("2spirals", "data must be the file that run was trained on, got 2spirals"),
    ):
        assert cli.main(["evaluate", "run", f"data={data}"]) == 2
        assert message in capsys.readouterr().err


def test_a_run_on_a_density_is_not_evaluated_on_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = str(tmp_path / "run"), write(tmp_path / "p.npy")
    assert cli.main(["train", "8gaussians", f"output={run}", *SHORT]) == 0
    assert cli.main(["evaluate", run, f"data={file}"]) == 2
    assert "data must be null, as" in capsys.readouterr().err


def test_columns_that_vary_little_or_are_large_keep_their_digits(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(100, 2))
    np.save(tmp_path / "p.npy", x * [1e-3, 1e149] + [1e6, 0])
    data = sources.of(str(tmp_path / "p.npy"))
    assert data.train is not None
    shown = data.restored(data.train)
    np.testing.assert_allclose((shown[:, 0] - 1e6) * 1e3, x[np.arange(100) % 10 > 0, 0], atol=1e-6)
    np.testing.assert_allclose(shown[:, 1] / 1e149, x[np.arange(100) % 10 > 0, 1], atol=1e-6)
