"""2D data, metrics and pictures against known values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dxmi_ext import ops
from dxmi_ext.engine.output.plots import curves
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.two_d import densities as data
from dxmi_ext.two_d import metrics, plots, recipe
from dxmi_ext.two_d.networks import EnergyMLP


@pytest.mark.parametrize("name", data.DENSITIES)
def test_rows_depend_on_key_and_global_row_alone(name: str) -> None:
    key = ops.noise_key(3)
    whole = data.sample(name, 1001, key)
    assert whole.shape == (1001, 2) and whole.dtype == torch.float32
    parts = [data.sample(name, n, key, sample_offset=start) for start, n in ((0, 1), (1, 513), (514, 487))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.sample(name, 1001, ops.next_key(key)), whole)
    assert whole.abs().max() < 5 and (whole.abs() < 4).float().mean() > 0.99


def test_eight_gaussians_has_its_moments() -> None:
    x = data.sample("8gaussians", 40_000, ops.noise_key(0))
    sector = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    for k in range(8):
        mode = x[sector == k]
        center = 4 / 1.414 * torch.tensor([math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)])
        assert abs(len(mode) / len(x) - 1 / 8) < 0.01
        assert torch.allclose(mode.mean(dim=0), center, atol=0.03)
        assert torch.allclose(mode.std(dim=0), torch.tensor(0.5 / 1.414), atol=0.02)


def test_checkerboard_fills_the_dark_squares_evenly() -> None:
    x = data.sample("checkerboard", 40_000, ops.noise_key(0))
    column, row = ((x + 4) / 2).floor().long().T
    counts = torch.bincount(4 * column + row, minlength=16) / len(x)
    dark = torch.tensor([(c + r) % 2 == 0 for c in range(4) for r in range(4)])
    assert torch.allclose(counts, dark / 8, atol=0.01)


def test_two_spirals_lie_on_their_arms() -> None:
    x = data.sample("2spirals", 10_000, ops.noise_key(0)).double()
    angle = torch.linspace(0, 3 * math.pi, 2000, dtype=torch.float64)
    arm = torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / 3
    first, second = torch.cdist(x, arm).amin(dim=1), torch.cdist(x, -arm).amin(dim=1)
    assert torch.minimum(first, second).square().mean().sqrt() < 0.11
    assert abs((first < second).double().mean() - 0.5) < 0.02


def test_unknown_density_lists_the_known() -> None:
    for call in (
        lambda: data.sample("9gaussians", 1, ops.noise_key(0)),
        lambda: data.log_density("9gaussians", torch.zeros(1, 2)),
    ):
        with pytest.raises(ValueError, match=r"8gaussians, 2spirals, checkerboard, got '9gaussians'"):
            call()


def test_sliced_wasserstein_known_values() -> None:
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    assert metrics.sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-9)
    # Each direction sees the projection of the shift, whose mean square is |shift|^2 / D.
    shifted = metrics.sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]), projections=10_000)
    assert shifted == pytest.approx(5 / 2**0.5, rel=0.02)
    assert metrics.sliced_wasserstein(x, x + 1, seed=1) == metrics.sliced_wasserstein(x, x + 1, seed=1)
    line = torch.tensor([[0.0], [4.0], [1.0]]), torch.tensor([[2.0], [5.0], [1.0]])
    assert metrics.sliced_wasserstein(*line) == pytest.approx(1)  # 0 to 1, 1 to 2, 4 to 5
    with pytest.raises(ValueError, match=r"y must have the shape of x, \[60, 2\], got \[59, 2\]"):
        metrics.sliced_wasserstein(x, x[1:])


def test_entropy_and_coverage_known_values() -> None:
    pytest.importorskip("sklearn")
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, 2, generator=draw) for _ in range(2))
    assert metrics.entropy_excess(3 * x, x) == pytest.approx(2 * math.log(3), abs=1e-5)
    assert metrics.entropy_excess(y, x) == pytest.approx(0, abs=0.05)
    assert metrics.entropy_excess(torch.zeros(50, 2), x[:50]) < -50
    assert metrics.coverage(y, x) == pytest.approx(1 - 2**-5, abs=0.01)
    left = y[y[:, 0] < 0]
    assert metrics.coverage(torch.cat((left, left)), x) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match=r"samples must have the shape of data, \[4, 2\], got \[3, 2\]"):
        metrics.entropy_excess(x[:3], x[:4])


def test_energy_auroc_known_values() -> None:
    low, high = torch.linspace(0, 1, 10), torch.linspace(2, 3, 20)
    assert metrics.energy_auroc(low, high) == 1
    assert metrics.energy_auroc(high, low) == 0
    assert metrics.energy_auroc(torch.zeros(10), torch.zeros(20)) == 0.5
    mixed = torch.tensor([1.0, 2, 2, 5]), torch.tensor([2.0, 3, 1])
    assert metrics.energy_auroc(*mixed) == pytest.approx((2 + 3 + 0.5) / 12)  # pairs in order, ties as halves
    with pytest.raises(ValueError, match="energies must be finite"):
        metrics.energy_auroc(low, torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("name", data.DENSITIES)
def test_log_density_is_that_of_the_samples(name: str) -> None:
    """It integrates to 1, and predicts the number of points in cells of the plane."""
    line = (torch.arange(200) + 0.5) * (10 / 200) - 5
    density = data.log_density(name, torch.cartesian_prod(line, line)).exp().view(200, 200) * (10 / 200) ** 2
    assert density.sum().item() == pytest.approx(1, abs=2e-3)
    x = data.sample(name, 100_000, ops.noise_key(0))
    cell = ((x + 5) / 0.5).floor().long()
    counts = torch.bincount(20 * cell[:, 0] + cell[:, 1], minlength=400).view(20, 20) / len(x)
    cells = density.view(20, 10, 20, 10).sum(dim=(1, 3))
    assert (counts - cells).abs().max() < 4 * (cells.max() / len(x)).sqrt()


def test_energy_kl_known_values() -> None:
    def normal(std: float, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(dim=1) / (2 * std**2)

    def kl(temperature: float, std: float = 0.5) -> float:
        return metrics.energy_kl(lambda x: normal(std, x), lambda x: -normal(0.5, x), temperature)

    assert kl(1.0) == pytest.approx(0, abs=1e-6)
    # For normals in the plane: D (log s + 1 / (2 s^2) - 1/2), where s is the ratio of standard deviations.
    assert kl(1.0, std=0.7) == pytest.approx(2 * (math.log(1.4) + 0.5 / 1.4**2 - 0.5), abs=1e-4)
    assert kl(1.4**2) == pytest.approx(kl(1.0, std=0.7))
    board = metrics.energy_kl(
        lambda x: torch.zeros(len(x)), lambda x: data.log_density("checkerboard", x), temperature=1.0
    )
    assert board == pytest.approx(math.log(2))  # half of the square
    with pytest.raises(ValueError, match=r"temperature must be > 0, got 0"):
        kl(0)


def test_evaluate_a_perfect_model_reaches_the_papers_ceiling() -> None:
    """A perfect sampler is at the floor, and the AUROC of the true density is about .902 (DxMI, Table 1)."""
    pytest.importorskip("sklearn")
    angles = torch.arange(8) * math.pi / 4
    centers = 4 / 1.414 * torch.stack([angles.cos(), angles.sin()], dim=1)

    def true_energy(x: torch.Tensor) -> torch.Tensor:
        return -torch.logsumexp(-torch.cdist(x, centers).square() / (2 * (0.5 / 1.414) ** 2), dim=1)

    def draws(seed: int) -> metrics.Draws:
        return lambda n, draw: data.sample("8gaussians", n, torch.tensor([seed, draw]))

    result = metrics.evaluate(draws(0), draws(1), true_energy, n=2000, projections=50)
    assert result["auroc"] == pytest.approx(0.902, abs=0.01) and 0 < result["auroc_std"] < 0.02
    assert result["sliced_wasserstein"] < 2 * result["sliced_wasserstein_floor"]
    assert result["entropy_excess"] == pytest.approx(0, abs=0.05)
    assert result["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)
    worse = metrics.evaluate(lambda n, _: torch.zeros(n, 2), draws(1), true_energy, n=500, projections=50)
    assert worse["sliced_wasserstein"] > 5 * worse["sliced_wasserstein_floor"]


def test_numbers_that_cannot_be_computed_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Samples that are not finite, then energies that are not finite."""
    pytest.importorskip("sklearn")

    def draws(n: int, draw: int) -> torch.Tensor:
        return data.sample("8gaussians", n, torch.tensor([0, draw]))

    few = {"n": 100, "repeats": 2, "projections": 5}
    found = metrics.evaluate(lambda n, _: torch.full((n, 2), math.nan), draws, lambda x: x[:, 0], **few)  # type: ignore[arg-type]
    floor = ["sliced_wasserstein_floor", "sliced_wasserstein_floor_std"]
    assert list(found) == [*floor, "auroc", "auroc_std"]
    shown = capsys.readouterr().err
    assert shown.count("sliced_wasserstein: skipped, not finite") == 1 and "coverage: skipped" in shown
    assert "auroc" not in recipe.table(recipe.Config().replace(recipe="8gaussians"), found)
    found = metrics.evaluate(draws, draws, lambda x: torch.full((len(x),), math.nan), **few)  # type: ignore[arg-type]
    assert "auroc" not in found and "auroc_std" not in found and found["coverage"] > 0
    assert "auroc: skipped" in capsys.readouterr().err


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    x = torch.randn(50, 2)
    log = [{"phase": "dxmi", "iteration": i, "loss": None if i == 3 else 1 / (i + 1)} for i in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    plots.samples(tmp_path / "samples.png", x, x)
    plots.energy(tmp_path / "energy.png", plots.grid(20).square().sum(dim=1), x)
    plots.paths(tmp_path / "paths.png", torch.randn(3, 50, 2))
    curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    assert {path.stem for path in tmp_path.glob("*.png")} == {"samples", "energy", "paths", "curves"}
    assert all(path.stat().st_size > 1000 for path in tmp_path.glob("*.png"))


def test_pretraining_teaches_what_edm_reads(tmp_path: Path) -> None:
    """A barely trained denoiser is closer to the data than the noise; an eps predictor would be at 2.4."""
    pytest.importorskip("sklearn")
    cfg = recipe.Config().replace(schedule="edm", steps=10, output=str(tmp_path / "run"), tensorboard=False)
    cfg = cfg.replace(iterations=0, pretrain_iterations=150, batch_size=64, samplings=1)
    assert recipe.train(cfg)["sliced_wasserstein"] < 0.5


def test_pretraining_is_of_a_sampler_that_is_trained() -> None:
    with pytest.raises(ConfigError, match="negatives must be sampler or refined for pretraining alone, got"):
        recipe.pretrain(recipe.Config().replace(negatives="short_run"))


def test_networks_with_octaves_see_sinusoids() -> None:
    torch.manual_seed(0)
    network, x = EnergyMLP(2, width=8, depth=1, octaves=3).double(), 3 * torch.randn(5, 2).double()
    first, _, last = (network.layers[0], *network.layers[1], network.layers[2])
    seen = [x] + [
        torch.stack([wave(2 * math.pi / length * x[:, i]) for i in range(2) for length in (8, 4, 2)], dim=1)
        for wave in (torch.sin, torch.cos)
    ]
    hidden = torch.nn.functional.leaky_relu(torch.cat(seen, dim=1) @ first.weight.T + first.bias, 0.2)
    torch.testing.assert_close(network(x), hidden @ last.weight[0] + last.bias)


@pytest.mark.parametrize("value_kind", ["per_step", "time_independent", "separate"])
def test_octaves_reach_all_networks(value_kind: str) -> None:
    networks, _ = recipe.build(recipe.Config().replace(octaves=2, value_kind=value_kind), torch.device("cpu"))
    inputs = {name: p.shape[1] for name, p in networks.named_parameters() if p.ndim == 2 and p.shape[1] < 128}
    assert len(inputs) == 2 + (value_kind == "separate") and {*inputs.values()} == {2 * (1 + 2 * 2)}
